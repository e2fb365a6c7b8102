"""What can go wrong, as a tree.

LayerError                        .request .attempts .maybe_processed
├─ ConfigurationError             your side, before anything was sent (also a ValueError)
│  └─ MissingTokensError          says which token is missing and where it was looked for
├─ ClientClosedError
├─ APIConnectionError             no usable answer
│  ├─ APITimeoutError             (also a TimeoutError)  .phase
│  │  └─ DeadlineExceededError    .phase says what the call was doing
│  └─ MalformedResponseError      truncated, contradictory, too large, or not HTTP
├─ APIStatusError                 an answer              .status_code .headers .body .request_id .retry_after
│  ├─ BadRequestError 400 · AuthenticationError 401 · PermissionDeniedError 403 · NotFoundError 404 · ConflictError 409
│  └─ UnprocessableEntityError 422 · RateLimitError 429 · ServerError 5xx
└─ ResponseDecodeError            a 2xx that cannot be read as `into`  .path

Rules: this room imports none of ours. A message says what happened, to which call, and what to do. No token, header
value or query value is in a message, repr or pickle; the values of the tokens are scrubbed from what the server says.
httpx's errors become ours in `raise_translated`, here and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import httpx

from ._values import Value

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AttemptInfo",
    "AuthenticationError",
    "BadRequestError",
    "ClientClosedError",
    "ConfigurationError",
    "ConflictError",
    "DeadlineExceededError",
    "LayerError",
    "MalformedResponseError",
    "MissingTokensError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestInfo",
    "ResponseDecodeError",
    "ServerError",
    "UnprocessableEntityError",
]

BODY_LIMIT = 64 * 1024
MESSAGE_LIMIT = 200


class RequestInfo(Value):
    """Which request an error or event is about, without anything secret.

    `method` is the HTTP method; `url` is the URL without user, query and fragment, since those may carry secrets.
    """

    __match_args__ = ("method", "url")
    __slots__ = __match_args__

    def __init__(self, method: str, url: str) -> None:
        self.method = method
        self.url = url

    @classmethod
    def of(cls, request: httpx.Request) -> RequestInfo:
        """The method of `request` and its URL, less user, query and fragment."""
        return cls.of_url(request.method, request.url)

    @classmethod
    def of_url(cls, method: str, url: httpx.URL) -> RequestInfo:
        """`method` and `url`, less user, query and fragment."""
        path = url.raw_path.partition(b"?")[0].decode("ascii")  # as sent: what was escaped forges no line of a log
        return cls(method, f"{url.scheme}://{url.netloc.decode('ascii')}{path}")

    def __str__(self) -> str:
        return f"{self.method} {self.url}"


class AttemptInfo(Value):
    """What one attempt met.

    `number` counts from 1. `outcome` is the status code or the name of the httpx exception, as text. `status_code` is
    None when there was no answer. `elapsed` is how long the attempt took, `delay` how long the call then waited before
    it tried again (None for the last attempt); both in seconds.
    """

    __match_args__ = ("number", "outcome", "status_code", "elapsed", "delay")
    __slots__ = __match_args__

    def __init__(
        self, number: int, outcome: str, status_code: int | None, elapsed: float, delay: float | None = None
    ) -> None:
        self.number = number
        self.outcome = outcome
        self.status_code = status_code
        self.elapsed = elapsed
        self.delay = delay


class LayerError(Exception):
    """Base of all errors that this package raises.

    `request` says which request it was (method, URL without query), or is None when there was none yet. `attempts` says
    what each attempt met, the last one included. `maybe_processed` is True when the server may have acted on the
    request although no usable answer came: look before you send it again.
    """

    request: RequestInfo | None
    attempts: tuple[AttemptInfo, ...]
    maybe_processed: bool

    def __init__(
        self,
        message: str,
        *,
        request: RequestInfo | None = None,
        attempts: Iterable[AttemptInfo] = (),
        maybe_processed: bool = False,
    ) -> None:
        super().__init__(message)
        self.request = request
        self.attempts = tuple(attempts)
        self.maybe_processed = maybe_processed

    def __str__(self) -> str:
        message = str(self.args[0])
        if self.request is not None:
            message = f"{self.request}: {message}"
        if len(self.attempts) > 1:
            message += f" (after {len(self.attempts)} attempts: {', '.join(a.outcome for a in self.attempts)})"
        if self.maybe_processed:
            message += " The server may have processed the request: look before you send it again."
        return message

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__.copy())


def _restore(cls: type[LayerError], args: tuple[Any, ...], state: dict[str, Any]) -> LayerError:
    error = cls.__new__(cls)
    error.args = args  # OSError, from which TimeoutError comes, sets them in its own __init__ only
    error.__dict__.update(state)
    return error


class ConfigurationError(LayerError, ValueError):
    """Something on your side is wrong; nothing was sent."""


class MissingTokensError(ConfigurationError):
    """A token is missing. The message says which, and where it was looked for; nothing was sent."""


class ClientClosedError(LayerError):
    """The client was closed, before the call or while it waited."""


class APIConnectionError(LayerError):
    """No usable answer came: refused, reset, unreachable, cut short."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """A phase of an attempt took longer than `timeout` allows.

    `phase` is connect, write, read or pool (as in `httpx.Timeout`).
    """

    phase: str

    def __init__(self, message: str, *, phase: str, **context: Any) -> None:
        super().__init__(message, **context)
        self.phase = phase


class DeadlineExceededError(APITimeoutError):
    """The call's `deadline` passed, or a wait that was due would have passed it.

    `phase` says what the call was doing: queue (waiting for a slot), gate (the server said slow down), refresh (new
    tokens), connect, write, read, sleep (before a retry).
    """


class MalformedResponseError(APIConnectionError):
    """An answer came that cannot be trusted: truncated, contradictory, larger than allowed, or not HTTP."""


class APIStatusError(LayerError):
    """The server answered with an error (or, with `into=`, with a redirect that is not followed).

    `status_code` is the answer's status, `headers` its headers, `body` the first 64 KiB of its body as bytes,
    `request_id` the server's own id for the request when it gave one, `retry_after` what it asked to wait in seconds.
    """

    status_code: int
    headers: httpx.Headers
    body: bytes
    request_id: str | None
    retry_after: float | None

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        headers: httpx.Headers | None = None,
        body: bytes = b"",
        request_id: str | None = None,
        retry_after: float | None = None,
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.status_code = status_code
        self.headers = httpx.Headers() if headers is None else headers
        self.body = body
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequestError(APIStatusError):
    """400: the server does not understand the request."""


class AuthenticationError(APIStatusError):
    """401: the tokens were refused. Token1 may have lapsed, or Token2 be stale."""


class PermissionDeniedError(APIStatusError):
    """403: the tokens lack the access level that this method and path need."""


class NotFoundError(APIStatusError):
    """404: there is nothing at this path."""


class ConflictError(APIStatusError):
    """409: the request conflicts with the state of the resource."""


class UnprocessableEntityError(APIStatusError):
    """422: the request is well-formed and its content is refused."""


class RateLimitError(APIStatusError):
    """429: too many requests, and the wait asked for is longer than the call may take."""


class ServerError(APIStatusError):
    """5xx: the server failed."""


class ResponseDecodeError(LayerError):
    """A successful answer cannot be read as `into`. `path` is the JSON path of the mismatch, such as `$[3].name`."""

    path: str

    def __init__(self, message: str, *, path: str = "$", **context: Any) -> None:
        super().__init__(message, **context)
        self.path = path


STATUS_ERRORS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}

TOKENS_ARE_MADE = "Settings > Token Management > All API Applications > Create"

ADVICE: dict[int, str] = {
    401: (
        "The tokens were refused. Token1 may have lapsed, or Token2 be stale: create or regenerate them "
        f"({TOKENS_ARE_MADE}), and give this client the new pair."
    ),
    403: "These tokens lack the access that this method and path need: ask an administrator of the account for it.",
    429: "Too many requests: slow down, or raise `deadline` and `RetryPolicy(retry_after_max=)` to wait for longer.",
}


def error_class(status_code: int) -> type[APIStatusError]:
    """The class of the tree for a status: the exact one, `ServerError` for 5xx, else `APIStatusError`."""
    return STATUS_ERRORS.get(status_code) or (ServerError if 500 <= status_code <= 599 else APIStatusError)


def scrub(text: str, secrets: Iterable[str]) -> str:
    """`text` with asterisks in place of each of `secrets`, also where it is escaped as JSON, URLs or HTML escape."""
    for secret in secrets:
        text = re.sub(_in_any_spelling(secret), "***", text, flags=re.IGNORECASE)
    return text


def _in_any_spelling(secret: str) -> str:
    """A pattern for `secret`: each character as itself or by one of the usual escapes, perhaps with filling between."""
    return r"[\x00\s]?".join(_spellings(char, ord(char)) for char in secret)


def _spellings(char: str, code: int) -> str:
    itself = rf"\\?{re.escape(char)}"
    entity = _ENTITIES.get(char, "")
    return rf"(?:{itself}|\\u00{code:02x}|%{code:02x}|&\#0*{code};|&\#x0*{code:x};{entity})"


_ENTITIES = {"&": "|&amp;", "<": "|&lt;", ">": "|&gt;", '"': "|&quot;", "'": "|&apos;", "/": "|&sol;", "+": "|&plus;"}


def _without_cut_secret(text: str, secrets: Iterable[str]) -> str:
    """`text` less the beginning of a secret at its end: a body that was cut may have been cut right there."""
    for secret in secrets:
        for length in range(len(secret) - 1, 3, -1):
            if text.endswith(secret[:length]):
                return text[:-length]
    return text


def status_error(
    response: httpx.Response,
    body: bytes,
    *,
    retry_after: float | None = None,
    secrets: Iterable[str] = (),
    **context: Any,
) -> APIStatusError:
    """The error for an answer: its class by status, advice, and up to 200 characters of the server's own words.

    `body` is what was read of the body, decoded; `secrets` are token values to scrub from all that the server said.
    """
    secrets = tuple(secrets)
    body = scrubbed_body(body, secrets)
    headers = httpx.Headers(
        [(name, scrub(value.decode("latin-1"), secrets).encode("latin-1")) for name, value in response.headers.raw]
    )
    code = response.status_code
    words = scrub(_server_message(body), secrets)
    parts = [f"{code} {scrub(response.reason_phrase, secrets)}".strip() + ".", ADVICE.get(code, "")]
    if words:
        parts.append(f"The server says: {words}")
    return error_class(code)(
        " ".join(part for part in parts if part),
        status_code=code,
        headers=headers,
        body=body,
        request_id=next((headers[name] for name in REQUEST_ID_HEADERS if name in headers), None),
        retry_after=retry_after,
        **context,
    )


def scrubbed_body(body: bytes, secrets: Iterable[str]) -> bytes:
    """The first 64 KiB of `body`, without `secrets`."""
    secrets = tuple(secrets)
    text = body[:BODY_LIMIT].decode("latin-1")  # any bytes, and back again as they were
    if len(body) >= BODY_LIMIT:
        text = _without_cut_secret(text, secrets)
    return scrub(text, secrets).encode("latin-1")


REQUEST_ID_HEADERS = ("x-request-id", "request-id", "x-correlation-id", "x-amzn-requestid")


def _server_message(body: bytes) -> str:
    """The server's own words out of an error body: the usual members of a JSON object, else the text itself."""
    text = body.decode("utf-8", "replace")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        if "<html" in text[:1024].lower():
            # Within bounds: what a server sends must not keep the event loop busy.
            text = re.sub(r"<(script|style)\b.*?</\1>|<[^<>]*>", " ", text[:2048], flags=re.DOTALL | re.IGNORECASE)
    else:
        text = _find_message(document) or text
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


def _find_message(document: Any, depth: int = 8) -> str | None:
    if isinstance(document, str):
        return document
    if isinstance(document, list) and document and depth:
        return _find_message(document[0], depth - 1)
    if isinstance(document, dict) and depth:
        lowered = {key.lower(): value for key, value in document.items()}
        for key in ("message", "detail", "error_description", "error", "title", "errors"):
            if found := _find_message(lowered.get(key), depth - 1):
                return found
    return None


class ErrorContext:
    """What is known of a call when it fails, to be put on its error."""

    __slots__ = ("attempts", "maybe_processed", "request", "response_started")

    def __init__(
        self,
        request: RequestInfo,
        attempts: tuple[AttemptInfo, ...],
        maybe_processed: bool,  # noqa: FBT001 - a field
        response_started: bool | None = None,  # noqa: FBT001 - likewise
    ) -> None:
        self.request = request
        self.attempts = attempts
        self.maybe_processed = maybe_processed
        self.response_started = response_started


TIMEOUT_PHASES: dict[type[httpx.TimeoutException], str] = {
    httpx.ConnectTimeout: "connect",
    httpx.WriteTimeout: "write",
    httpx.ReadTimeout: "read",
    httpx.PoolTimeout: "pool",
}


def raise_translated(error: httpx.RequestError | httpx.InvalidURL, known: ErrorContext) -> NoReturn:
    """Raise the error of our tree that stands for one of httpx's; `known` is what is known of the call.

    The cause stays with it, except where httpx quotes what it refuses: that may be a secret, of ours or echoed.
    """
    context: dict[str, Any] = {
        "request": known.request,
        "attempts": known.attempts,
        "maybe_processed": known.maybe_processed,
    }
    if isinstance(error, httpx.TimeoutException):
        phase = next((name for cls, name in TIMEOUT_PHASES.items() if isinstance(error, cls)), "read")
        raise APITimeoutError(
            f"timed out in the {phase} phase. The server or the way to it is slow; `timeout=` sets the bound.",
            phase=phase,
            **context,
        ) from error
    if isinstance(error, httpx.LocalProtocolError | httpx.InvalidURL):
        what = "the URL is not valid" if isinstance(error, httpx.InvalidURL) else "a header or the body is not HTTP"
        del error
        raise ConfigurationError(f"{what}; it was not sent, or not whole.", request=known.request) from None
    if isinstance(error, httpx.UnsupportedProtocol):
        raise ConfigurationError("the URL is neither http nor https.", request=known.request) from error
    if isinstance(error, httpx.RemoteProtocolError | httpx.DecodingError):
        if isinstance(error, httpx.RemoteProtocolError) and known.response_started is False:
            raise APIConnectionError(f"no usable answer: {str(error).rstrip('.')}.", **context) from error
        malformed = MalformedResponseError(f"the answer cannot be trusted: {error}.", **context)
        del error  # the other is rid of what it quotes before anybody sees it
        try:
            raise malformed from None
        finally:
            del malformed  # it has this frame
    raise APIConnectionError(f"no answer: {str(error) or type(error).__name__}.", **context) from error
