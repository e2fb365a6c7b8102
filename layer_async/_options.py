"""What a client and a call can be told, and what is refused before anything is sent.

Rules: each check returns the value that it was given, in the form that we keep, or raises `ConfigurationError` and says
what would do. No header's value is ever quoted.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, TypedDict, TypeVar

import httpx

from ._errors import ConfigurationError
from ._pacing import Pacing
from ._retry import RetryPolicy
from ._tokens import TokenPair, TokenSource
from ._values import number, shown

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

    `json` is encoded once, up front; `content` is bytes, text, or an async iterable of bytes (or bytearrays, or
    memoryviews); `data` and `files` make a form, as in httpx. What comes from an iterator can be sent only once: such a
    call is not retried once it has begun.
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


class Quiet(dict[str, Any]):
    """Values that no traceback shows, though it shows local variables."""

    def __repr__(self) -> str:
        return f"<{', '.join(self)}>"


# Checks: each returns its value, or says what is wrong with it before anything is sent. None quotes a header.


def checked_seconds(name: str, value: Any) -> float:
    if not 0 < number(value) < math.inf:
        raise ConfigurationError(f"{name} must be a positive number of seconds, not {shown(value)}.")
    return number(value)


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


def checked_pacing(value: Any) -> Pacing | None:
    if value is None or isinstance(value, Pacing):
        return value
    raise ConfigurationError(f"pacing must be a Pacing or None, not {type(value).__name__}.")


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


def checked_middleware(values: Any) -> tuple[Any, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ConfigurationError(f"middleware must be a list of async callables, not {type(values).__name__}.")
    return tuple(checked_callable("each middleware", entry) for entry in values)


def checked_proxy_url(value: Any) -> httpx.Proxy | None:
    """An `httpx.Proxy`, whose repr masks its password."""
    if value is None or isinstance(value, httpx.Proxy):
        return value
    if isinstance(value, str | httpx.URL):
        with suppress(httpx.InvalidURL, ValueError):
            return httpx.Proxy(value)
    kind = type(value).__name__
    del value
    raise ConfigurationError(
        f"proxy must be the URL of a proxy (http://host:port) or an httpx.Proxy; this {kind} is not."
    )


def checked_method(value: Any) -> str:
    if isinstance(value, str) and value in METHODS:
        return value
    if isinstance(value, str) and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value):  # RFC 9110 section 9.1: a token
        method = value.upper()
        if method not in ("CONNECT", "TRACE"):
            return method
    raise ConfigurationError(f"{value!r} is no method to call an API with.")


def checked_body(options: Quiet) -> dict[str, Any]:
    """The `content`, `data` and `files` of a call, of which there may be one body, `json` counted."""
    body = {name: options.get(name) for name in ("content", "data", "files")}
    flaw = _body_flaw(options, **body)
    if flaw is not None:
        del body
        raise ConfigurationError(flaw)
    if isinstance(body["content"], AsyncIterable) and not hasattr(body["content"], "aread"):  # httpx reads files itself
        body["content"] = Pieces(body["content"])
    return body


class Pieces:
    """A body that comes in pieces, each of which must be bytes: their length frames them.

    As with httpx's own, what a generator gives is there once: who asks again gets `httpx.StreamConsumed`.
    """

    __slots__ = ("_given", "_is_begun")

    def __init__(self, given: AsyncIterable[Any]) -> None:
        self._given = given
        self._is_begun = False

    def __aiter__(self) -> PieceIterator:
        if self._is_begun and isinstance(self._given, AsyncIterator):
            raise httpx.StreamConsumed
        self._is_begun = True
        return PieceIterator(aiter(self._given))


class PieceIterator:
    """Not a generator: nobody has to close it."""

    __slots__ = ("_iterator",)

    def __init__(self, iterator: AsyncIterator[Any]) -> None:
        self._iterator = iterator

    def __aiter__(self) -> PieceIterator:
        return self

    async def __anext__(self) -> bytes | bytearray | memoryview:
        piece = await anext(self._iterator)
        if isinstance(piece, bytes | bytearray):
            return piece
        if isinstance(piece, memoryview):
            return piece if piece.nbytes == len(piece) and piece.c_contiguous else bytes(piece)
        kind = type(piece).__name__
        del piece
        raise ConfigurationError(
            f"each piece of content must be bytes, not {kind}: the body was not sent, or not whole."
        )


def _body_flaw(options: Quiet, content: Any, data: Any, files: Any) -> str | None:
    bodies = (options.get("json") is not None, content is not None, data is not None or files is not None)
    if sum(bodies) > 1:
        return "a request has one body: give json=, or content=, or data= and files=."
    if content is not None and not isinstance(content, str | bytes | AsyncIterable):
        return f"content must be bytes, text or an async iterable, not {type(content).__name__}."
    names = {name.lower() for name in _read_names(options.get("headers"))}
    if "content-length" in names and not isinstance(content, AsyncIterable):
        return "Content-Length is set by the client, but for an async iterable whose length you know."
    if data is not None and not isinstance(data, Mapping):
        return f"data must be a mapping of form fields, not {type(data).__name__}."
    for field in (data or {}).values():
        if _is_odd(field):
            return f"a field of data must be text, a number, True, False or None, not {type(field).__name__}."
    return _files_flaw(files)


def _read_names(headers: Any) -> Iterable[str]:
    checked = _read_headers(headers)
    return () if isinstance(checked, str) else checked.keys()


def _is_odd(value: Any) -> bool:
    """Whether httpx would send the repr of `value` where a query or a form wants text."""
    if isinstance(value, list | tuple):
        return any(isinstance(each, list | tuple) or _is_odd(each) for each in value)
    return (value is not None and not isinstance(value, str | int | float)) or value != value


def merged_params(path: str, values: Any) -> Any:
    """The query: that of `path`, with `values` put in place of those of the same name; None: that of `path` alone."""
    flaw = _params_flaw(values)
    if flaw is not None:
        del values
        raise ConfigurationError(flaw)
    query = path.partition("#")[0].partition("?")[2]
    if values is None or not values:
        return None
    return httpx.QueryParams(query).merge(values) if query else values


def _params_flaw(values: Any) -> str | None:
    if values is None or isinstance(values, str | httpx.QueryParams):
        return "params must be text that can be encoded." if values is not None and _is_broken(str(values)) else None
    pairs = values.items() if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping | list | tuple) or not all(_is_pair(pair) for pair in pairs):
        return f"params must be a mapping, a list of pairs, or text, not {type(values).__name__}."
    for name, value in pairs:
        if not isinstance(name, str) or _is_odd(value) or _is_broken(f"{name}{value}"):
            return f"a parameter must be text, a number, True, False, None, or a list of these: {type(value).__name__}."
    return None


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2


def _is_broken(text: str) -> bool:
    """Whether `text` has half a surrogate pair, which UTF-8 cannot say."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _files_flaw(values: Any) -> str | None:
    """A file is bytes, text or something to read from, or a tuple whose second member is that (as in httpx)."""
    if values is not None and not isinstance(values, Mapping | list | tuple):
        return f"files must be a mapping or a list of pairs, not {type(values).__name__}."
    for entry in values.items() if isinstance(values, Mapping) else values or ():
        file = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if isinstance(file, tuple) and len(file) > 1:
            name, file, *others = file
            flaw = _part_flaw(name, *others[:2])
            if flaw is not None:
                return flaw
        if not isinstance(file, str | bytes) and not hasattr(file, "read"):
            return f"a file must be bytes, text or open for reading, not {type(file).__name__}."
    return None


def _part_flaw(name: Any, content_type: Any = None, headers: Any = MappingProxyType({})) -> str | None:
    """What httpx would write into the body as it is, so that a line end in it begins a header, or a part."""
    for what, text in (("name", name), ("content type", content_type)):
        if text is not None and (not isinstance(text, str) or _CONTROL.search(text)):
            return f"the {what} of a file must be text without control characters, or None."
    if not isinstance(headers, Mapping) or not all(
        isinstance(field, str)
        and isinstance(value, str)
        and _LEGAL_NAME.fullmatch(field.encode("utf-8", "replace"))
        and not _CONTROL.search(value)
        for field, value in headers.items()
    ):
        return "the headers of a file must be a mapping of text: names as in HTTP, values without control characters."
    return None


def merged_headers(ours: httpx.Headers, values: Any) -> httpx.Headers:
    """A copy of `ours`, with `values` put in place of those of the same name."""
    added = _read_headers(values)
    del values
    if isinstance(added, str):
        raise ConfigurationError(added)
    merged = httpx.Headers(ours)
    if added:
        merged.update(added)
    return merged


METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})

_ILLEGAL_VALUE = re.compile(rb"[^\t\x20-\x7e\x80-\xff]|^[ \t]|[ \t]$")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_LEGAL_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def checked_headers(values: Any) -> httpx.Headers:
    """RFC 9110 section 5: a name is a token, a value has no control characters. Values are never quoted."""
    headers = _read_headers(values)
    if isinstance(headers, str):
        del values
        raise ConfigurationError(headers)
    return headers


def _read_headers(values: Any) -> httpx.Headers | str:
    if values is None:
        return httpx.Headers()
    try:
        headers = httpx.Headers(values)
    except (TypeError, ValueError, AttributeError):
        return "headers must be a mapping or pairs of ASCII text."
    if not isinstance(values, httpx.Headers | Mapping) and any(isinstance(entry, str) for entry in values):
        return "headers must be a mapping or pairs of ASCII text, not texts."
    for name, value in headers.raw:
        shown, lower = name.decode("ascii", "backslashreplace"), name.lower()
        if lower in (b"token1", b"token2"):
            return f"{shown} is set by the client: give tokens as token1= and token2=, or tokens=."
        if lower in (b"host", b"transfer-encoding"):
            return f"{shown} is set by the client: it follows from the URL and the body."
        if not _LEGAL_NAME.fullmatch(name):
            return f"{shown!r} is no header name."
        if _ILLEGAL_VALUE.search(value):
            return f"the value of header {shown} has characters that a header may not have."
    return headers


CALL_CHECKS: dict[str, Callable[[Any], Any]] = {
    "timeout": checked_timeout,
    "deadline": checked_deadline,
    "retry": checked_retry,
    "max_response_bytes": checked_size,
    "idempotent": checked_idempotent,
}
REQUEST_OPTIONS = frozenset({"path", "params", "headers", "json", "content", "data", "files"})
