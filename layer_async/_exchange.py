"""What our layers know of one exchange (a request and its response) beyond what httpx itself keeps.

Rules: this room decides nothing. The record of a call lives in `request.extensions["layer_async"]`, which httpx copies
by reference into a redirected request; a request without one is read in the strictest way (it may have been processed,
its body cannot be sent again unless httpx holds it in memory).
"""

from __future__ import annotations

import email.utils
import re
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import attrs
import httpx

from ._errors import AttemptInfo, MalformedResponseError, RequestInfo

EXTENSION = "layer_async"


class QuietRequest(httpx.Request):
    """A request whose repr leaves out the query: a traceback that shows local variables shows it."""

    def __repr__(self) -> str:
        return f"<Request({self.method!r}, {RequestInfo.of(self).url!r})>"


class Releasable(Protocol):
    """The right to have one attempt on the wire, as far as the layers above the pool know it."""

    def release(self) -> None:
        """Give it back, closing what is still open under it; synchronous, and harmless when already done."""


@attrs.define(eq=False)
class ExchangeRecord:
    """What is known of a call, kept across its attempts.

    The transport writes for the attempt under way (None means unknown): `bytes_written`, how many bytes of the request
    went out (a TLS handshake or CONNECT does not count); `response_started`, whether a byte of the answer came;
    `head_received`, whether its head was complete; `reused`, whether the connection had served before. `phase` says
    what the call is doing, `slot` is the slot it holds, `attempts` and `maybe_processed` grow with each attempt. `info`
    is the request as errors and events show it, once somebody has wanted it. `idempotent` is the caller's word on an
    unsafe method. `is_patient`: the call belongs to a bulk, and waits out any number of 429s. `is_in_outage` says
    whether that bulk waits for the server to come back, so that the call is not to try again by itself. `is_outage`:
    its last failure may be one of many like it. `fresh` asks the transport for a new connection, since an idle one has
    just turned out to be dead.
    """

    bytes_written: int | None = None
    response_started: bool | None = None
    head_received: bool | None = None
    reused: bool | None = None
    info: RequestInfo | None = None
    phase: str = "queue"
    slot: Releasable | None = None
    attempts: list[AttemptInfo] = attrs.field(factory=list)
    maybe_processed: bool = False
    idempotent: bool | None = None
    is_patient: bool = False
    is_in_outage: Callable[[], bool] | None = None
    is_outage: bool = False
    fresh: bool = False

    @classmethod
    def of(cls, request: Any) -> ExchangeRecord:
        """The record of an httpx or httpcore request; made and attached when there is none yet."""
        record = request.extensions.get(EXTENSION)
        if not isinstance(record, cls):
            record = request.extensions[EXTENSION] = cls()
        return record

    def begin_attempt(self) -> None:
        """Forget what the transport wrote for the attempt before."""
        self.bytes_written = self.response_started = self.head_received = self.reused = None
        self.is_outage = False

    def release_slot(self) -> None:
        """Give the slot back, if one is held; synchronous."""
        slot, self.slot = self.slot, None
        if slot is not None:
            slot.release()


def is_replayable(request: httpx.Request) -> bool:
    """Whether the body of `request` can be sent once more.

    Bytes can; an iterator can as long as nobody has begun it; multipart can when each of its files can seek.
    """
    stream = request.stream
    if isinstance(stream, httpx.ByteStream):
        return True
    consumed = getattr(stream, "_is_stream_consumed", None)
    if consumed is not None:
        return consumed is False
    fields = getattr(stream, "fields", None)
    if fields is None:
        return False
    return all(_can_go_back(field.file) for field in fields if hasattr(field, "file"))


def _can_go_back(file: Any) -> bool:
    if isinstance(file, str | bytes):
        return True
    # A closed file does not say that it cannot seek, it raises.
    return hasattr(file, "seekable") and not getattr(file, "closed", False) and bool(file.seekable())


def retry_after(response: httpx.Response) -> float | None:
    """The seconds that `Retry-After` asks for (RFC 9110 section 10.2.3), or None where it says nothing usable.

    At most 10 ASCII digits, or an HTTP-date measured against the response's own `Date`. Zero, a date that is past, and
    everything else (negative, fraction, list, unit) say nothing usable.
    """
    value = response.headers.get("retry-after", "").strip(" \t")
    if re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
        return float(value) or None
    until, now = _http_date(value), _http_date(response.headers.get("date", ""))
    if until is None or now is None or until <= now:
        return None
    return until - now


async def read_bounded(response: httpx.Response, limit: int | None, *, truncate: bool = False) -> None:
    """Read and close `response`, holding at most `limit` bytes of its decoded body (None: no bound).

    Where `truncate` is set (for error bodies, which are read to be shown), a longer body is cut at the limit, and one
    that breaks off is kept as far as it came; elsewhere the one is a `MalformedResponseError`, the other httpx's error.
    """
    bound = sys.maxsize if limit is None else limit
    if truncate or not _is_known_to_fit(response, bound):
        bound_body(response, bound, truncate=truncate)
    await response.aread()


def _is_known_to_fit(response: httpx.Response, limit: int) -> bool:
    """Whether the framing alone keeps the body below `limit`: then it needs no watching."""
    headers = response.headers
    if "content-encoding" in headers or response.is_stream_consumed:
        return False
    length = headers.get("content-length", "")
    return length.isdecimal() and len(length) < 16 and int(length) <= limit


def bound_body(response: httpx.Response, limit: int, *, truncate: bool = False) -> None:
    """Let whoever reads `response` have at most `limit` decoded bytes of it; see `read_bounded`."""
    if response.is_stream_consumed:
        if len(response.content) > limit and not truncate:
            raise _too_large(limit)
        return
    body = BoundedBody(response, limit, truncate=truncate)
    response.stream = body
    response._decoder = body  # type: ignore[assignment]


class BoundedBody(httpx.AsyncByteStream):
    """The stream and the content decoder of a response at once: what the one gives out decides when the other ends."""

    def __init__(self, response: httpx.Response, limit: int, *, truncate: bool) -> None:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._stream = response.stream
        self._decoder: Any = response._get_content_decoder()
        self._limit = self._left = limit
        self._truncate = truncate
        self._was_fed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        is_open = True
        try:
            async for chunk in self._stream:
                if self._left >= 0:
                    yield chunk
                elif is_open:
                    # Closed, the generators below soon run out. Left half-way, they would be the garbage collector's,
                    # which trio warns of.
                    is_open = False
                    await self._stream.aclose()
        except httpx.RequestError:
            if self._left >= 0 and not self._truncate:
                raise
        self._check()

    async def aclose(self) -> None:
        """Close the stream below."""
        await self._stream.aclose()

    def decode(self, data: bytes) -> bytes:
        """Decode `data`, and let none of it out beyond the limit."""
        self._was_fed = self._was_fed or bool(data)
        try:
            return self._bounded(self._decoder.decode(data))
        except httpx.DecodingError:
            if not self._truncate:
                raise
            return b""

    def flush(self) -> bytes:
        """The rest, under the same bound."""
        try:
            rest = self._bounded(self._decoder.flush())
            # httpx takes a gzip or deflate body that breaks off for a whole one.
            if self._was_fed and self._left >= 0 and any(map(_is_unfinished, _decoders(self._decoder))):
                raise httpx.DecodingError("the compressed body is cut short")
        except httpx.DecodingError:
            if not self._truncate:
                raise
            return b""
        self._check()
        return rest

    def _bounded(self, data: bytes) -> bytes:
        allowed = max(self._left, 0)
        self._left -= len(data)
        return data[:allowed]

    def _check(self) -> None:
        if self._left < 0 and not self._truncate:
            raise _too_large(self._limit)


def _decoders(decoder: Any) -> list[Any]:
    return list(getattr(decoder, "children", [decoder]))


def _is_unfinished(decoder: Any) -> bool:
    return getattr(getattr(decoder, "decompressor", None), "eof", True) is False


def _too_large(limit: int) -> MalformedResponseError:
    return MalformedResponseError(f"the body is larger than max_response_bytes={limit} allows.")


def _http_date(value: str) -> float | None:
    if not value.endswith("GMT"):
        return None
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
