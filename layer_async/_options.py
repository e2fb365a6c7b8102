"""What a client and a call can be told, and what is refused before anything is sent.

Rules: each check returns the value that it was given, in the form that we keep, or raises `ConfigurationError` and says
what would do. No header's value is ever quoted.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import httpx

from ._errors import ConfigurationError
from ._retry import RetryPolicy
from ._tokens import TokenPair, TokenSource

F = TypeVar("F")

HeaderValues = Mapping[str, str] | Sequence[tuple[str, str]] | httpx.Headers
QueryValue = str | int | float | bool | None
QueryValues = Mapping[str, QueryValue | Sequence[QueryValue]] | list[tuple[str, QueryValue]] | str | httpx.QueryParams
Content = str | bytes | AsyncIterable[bytes]


class CallOptions(TypedDict, total=False):
    """What every call takes beside its path.

    `params` is the query, `headers` are added to the client's (not `Token1` and `Token2`). `timeout` bounds the phases
    of one attempt, `deadline` the whole call, both in seconds. `retry` replaces the client's policy (None: one
    attempt). `idempotent=True` says that a POST or PATCH may be sent twice without harm, False that a PUT or DELETE may
    not. `max_response_bytes` bounds the decoded body (None: no bound).
    """

    params: QueryValues | None
    headers: HeaderValues | None
    timeout: float | httpx.Timeout
    deadline: float | None
    retry: RetryPolicy | None
    idempotent: bool | None
    max_response_bytes: int | None


class BodyOptions(CallOptions, total=False):
    """What a call with a body takes besides: `json` (what `into` could give back), `content`, or `data` and `files`.

    `json` is encoded once, up front; `content` is bytes, text, or an async iterable of bytes; `data` and `files` make a
    form, as in httpx. What comes from an iterator can be sent only once: such a call is not retried once it has begun.
    """

    json: Any
    content: Content | None
    data: Mapping[str, Any] | None
    files: Mapping[str, Any] | Sequence[tuple[str, Any]] | None


class ViewOptions(TypedDict, total=False):
    """What `with_options` can set anew: as in `CallOptions`, and `tokens`, as in `AsyncLayerClient`."""

    headers: HeaderValues | None
    timeout: float | httpx.Timeout
    deadline: float | None
    retry: RetryPolicy | None
    max_response_bytes: int | None
    tokens: TokenPair | TokenSource


# Checks: each returns its value, or says what is wrong with it before anything is sent. None quotes a header.


def checked_seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name} must be a positive number of seconds, not {value!r}.")
    return value


def checked_timeout(value: Any) -> httpx.Timeout:
    if isinstance(value, httpx.Timeout):
        for phase, seconds in value.as_dict().items():
            if seconds is not None:
                checked_seconds(f"timeout ({phase})", seconds)
        return value
    return httpx.Timeout(checked_seconds("timeout", value), pool=None)


def checked_deadline(value: Any) -> float | None:
    return None if value is None else checked_seconds("deadline", value)


def checked_retry(value: Any) -> RetryPolicy | None:
    if value is None or isinstance(value, RetryPolicy):
        return value
    raise ConfigurationError(f"retry must be a RetryPolicy or None, not {type(value).__name__}.")


def checked_size(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ConfigurationError(f"max_response_bytes must be a positive number of bytes or None, not {value!r}.")


def checked_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigurationError(f"{name} must be True or False, not {value!r}.")


def checked_idempotent(value: Any) -> bool | None:
    return None if value is None else checked_bool("idempotent", value)


def checked_callable(name: str, value: F) -> F:
    if callable(value):
        return value
    raise ConfigurationError(f"{name} must be callable, and {type(value).__name__} is not.")


def checked_method(value: Any) -> str:
    if value in METHODS:
        return value  # type: ignore[no-any-return]
    if isinstance(value, str) and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value):  # RFC 9110 section 9.1: a token
        method = value.upper()
        if method not in ("CONNECT", "TRACE"):
            return method
    raise ConfigurationError(f"{value!r} is no method to call an API with.")


def checked_body(options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The `content`, `data` and `files` of a call, of which there may be one body, `json` counted."""
    content, data, files = options.get("content"), options.get("data"), checked_files(options.get("files"))
    bodies = (options.get("json") is not None, content is not None, data is not None or files is not None)
    if sum(bodies) > 1:
        raise ConfigurationError("a request has one body: give json=, or content=, or data= and files=.")
    if content is not None and not isinstance(content, str | bytes | AsyncIterable):
        raise ConfigurationError(f"content must be bytes, text or an async iterable, not {type(content).__name__}.")
    return content, data, files


def checked_files(values: Any) -> Any:
    """A file is bytes, text or something to read from, or a tuple whose second member is that (as in httpx)."""
    for entry in values.items() if isinstance(values, Mapping) else values or ():
        file = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        file = file[1] if isinstance(file, tuple) and len(file) > 1 else file
        if not isinstance(file, str | bytes) and not hasattr(file, "read"):
            raise ConfigurationError(f"a file must be bytes, text or open for reading, not {type(file).__name__}.")
    return values


def merged_headers(ours: httpx.Headers, values: Any) -> httpx.Headers:
    """A copy of `ours`, with `values` put in place of those of the same name."""
    merged = httpx.Headers(ours)
    if values is not None:
        merged.update(checked_headers(values))
    return merged


METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})

_ILLEGAL_VALUE = re.compile(rb"[^\t\x20-\x7e\x80-\xff]|^[ \t]|[ \t]$")
_LEGAL_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def checked_headers(values: Any) -> httpx.Headers:
    """RFC 9110 section 5: a name is a token, a value has no control characters. Values are never quoted."""
    if values is None:
        return httpx.Headers()
    try:
        headers = httpx.Headers(values)
    except (TypeError, ValueError, AttributeError):
        raise ConfigurationError("headers must be a mapping or pairs of ASCII text.") from None
    for name, value in headers.raw:
        shown = name.decode("ascii", "backslashreplace")
        if name.lower() in (b"token1", b"token2"):
            raise ConfigurationError(f"{shown} is set by the client: give tokens as token1= and token2=, or tokens=.")
        if not _LEGAL_NAME.fullmatch(name):
            raise ConfigurationError(f"{shown!r} is no header name.")
        if _ILLEGAL_VALUE.search(value):
            raise ConfigurationError(f"the value of header {shown} has characters that a header may not have.")
    return headers


CALL_CHECKS: dict[str, Callable[[Any], Any]] = {
    "timeout": checked_timeout,
    "deadline": checked_deadline,
    "retry": checked_retry,
    "max_response_bytes": checked_size,
    "idempotent": checked_idempotent,
}
REQUEST_OPTIONS = frozenset({"params", "headers", "json", "content", "data", "files"})
