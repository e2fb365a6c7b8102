"""Content codings (RFC 9110 section 8.4.1), undone in small steps under a bound.

Rules: one step gives out at most `STEP` bytes, whatever goes into it, and what one coding of a list has not taken yet
waits in the one below it: no ratio and no nesting makes a body larger than its limit before it is refused. A coded body
must be whole, and nothing may follow it. `Decoder` and `decode_bounded` know bytes only; `Body` puts a decoder into an
`httpx.Response`, which goes on reading as httpx does. There a body's errors are raised where the next piece is asked
for, by the stream and not by the decoder: so they pass through all generators of httpx, and none is left half-way.

`gzip`, `x-gzip` and `deflate` are decoded, and `br` with a library that bounds its output. A coding that httpx does not
know is handed on as it came, as httpx does; one that only httpx could decode, without a bound, is refused.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import anyio
import anyio.lowlevel
import httpx
import httpx._decoders

from ._errors import MalformedResponseError

STEP = 32 * 1024  # bytes: as much as zlib gives out without putting blocks together
STEPS_AT_ONCE = 4  # that give nothing out, before others have their turn
PIECES_AT_ONCE = 16
STEPS_TO_END = 16  # for a stream that was closed
MAX_CODINGS = 5  # in a list; as many as curl allows

_of_httpx: Any = httpx._decoders

Border = Callable[[], AbstractContextManager[None]]


class _Stage(Protocol):
    """One coding of a list. It is given more only when it `is_hungry`."""

    @property
    def is_hungry(self) -> bool:
        """Whether it has given out all that it can."""
        ...

    def push(self, data: bytes) -> None:
        """Take at most `STEP` bytes."""

    def step(self) -> bytes:
        """Decode at most `STEP` bytes; none does not mean that it is hungry. Raises `httpx.DecodingError`."""
        ...

    def finish(self) -> None:
        """There is no more. Raises `httpx.DecodingError` where there should be."""


class _Plain:
    """No coding at all."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = b""

    @property
    def is_hungry(self) -> bool:
        return not self._data

    def push(self, data: bytes) -> None:
        self._data = data

    def step(self) -> bytes:
        data, self._data = self._data, b""
        return data

    def finish(self) -> None:
        """Nothing is ever missing."""


class _Inflating:
    """What gzip and deflate have in common: an inflate stream, which knows its end."""

    __slots__ = ("_data", "_has_more", "_inflate", "_was_fed")

    def __init__(self) -> None:
        self._data = b""
        self._inflate: Any = None
        self._has_more = False
        self._was_fed = False

    @property
    def is_hungry(self) -> bool:
        return not self._data and not self._has_more

    def push(self, data: bytes) -> None:
        self._data += data

    def _inflated(self) -> bytes:
        try:
            part: bytes = self._inflate.decompress(self._data, STEP)
        except zlib.error as exc:
            raise httpx.DecodingError(f"the compressed body is corrupt ({exc})") from exc
        ended = self._inflate.eof
        self._data = self._inflate.unused_data if ended else self._inflate.unconsumed_tail
        # A full step may have taken all of the input, and still hold back output.
        self._has_more = not ended and len(part) == STEP
        return part


class _Gzip(_Inflating):
    """RFC 1952: one or more members. Zeros may follow each, as they do in archives and for gzip(1) and Python."""

    __slots__ = ()

    def step(self) -> bytes:
        if self._inflate is None:
            if self._was_fed:
                self._data = self._data.lstrip(b"\0")
            if not self._data:
                return b""
            self._was_fed = True
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
        part = self._inflated()
        if self._inflate.eof:
            self._inflate = None
        return part

    def finish(self) -> None:
        if self._inflate is not None:
            raise _cut_short()


class _Deflate(_Inflating):
    """RFC 1950, or RFC 1951 alone, which has been sent under this name too; the first two bytes tell which."""

    __slots__ = ()

    @property
    def is_hungry(self) -> bool:
        return (self._inflate is None and len(self._data) < 2) or super().is_hungry

    def step(self) -> bytes:
        if self._inflate is None:
            head = int.from_bytes(self._data[:2], "big")
            # RFC 1950 section 2.2. A bare block that begins like this has padding bits set, which nobody does.
            wrapped = head >> 8 & 0x0F == 8 and head >> 12 <= 7 and head % 31 == 0
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)
        elif self._inflate.eof:
            raise httpx.DecodingError("something follows the end of the compressed body")
        return self._inflated()

    def finish(self) -> None:
        if self._data or not (self._inflate is None or self._inflate.eof):
            raise _cut_short()


class _Brotli:
    """RFC 7932, by the library that httpx uses, where that can bound its output (Brotli and brotlicffi from 1.2)."""

    __slots__ = ("_data", "_decompressor", "_error", "_has_more", "_was_fed")

    def __init__(self, library: Any) -> None:
        self._decompressor = library.Decompressor()
        self._error = library.error
        self._data = b""
        self._was_fed = self._has_more = False

    @property
    def is_hungry(self) -> bool:
        return not self._data and not self._has_more

    def push(self, data: bytes) -> None:
        self._was_fed = True
        self._data = data

    def step(self) -> bytes:
        if self._data and self._decompressor.is_finished():
            raise httpx.DecodingError("something follows the end of the compressed body")
        data, self._data = self._data, b""
        try:
            part: bytes = self._decompressor.process(data, output_buffer_limit=STEP // 2)
        except self._error as exc:
            raise httpx.DecodingError(f"the compressed body is corrupt ({exc})") from exc
        # All input taken does not mean all output given.
        self._has_more = bool(part) or not self._decompressor.can_accept_more_data()
        return part

    def finish(self) -> None:
        if self._was_fed and not self._decompressor.is_finished():
            raise _cut_short()


def _stages(encodings: str) -> list[_Stage]:
    """The codings of a Content-Encoding, in the order in which they are undone. Raises `MalformedResponseError`."""
    names = [name.strip(" \t").lower() for name in encodings.split(",", MAX_CODINGS + 1)]
    if len(names) > MAX_CODINGS:
        raise MalformedResponseError(f"the body is in more than {MAX_CODINGS} content codings.")
    stages = [stage for name in reversed(names) if (stage := _stage(name)) is not None]
    return stages or [_Plain()]


def _stage(name: str) -> _Stage | None:
    if name in ("gzip", "x-gzip"):  # one and the same: RFC 9110 section 8.4.1.3
        return _Gzip()
    if name == "deflate":
        return _Deflate()
    if name == "identity" or name not in _of_httpx.SUPPORTED_DECODERS:
        return None
    library = _of_httpx.brotli if name == "br" else None
    if hasattr(getattr(library, "Decompressor", None), "can_accept_more_data"):
        return _Brotli(library)
    raise MalformedResponseError(
        f"the body is in the content coding {name}, whose output cannot be bounded here: ask for gzip"
        f"{', or install Brotli 1.2 or later' if name == 'br' else ''}."
    )


class Decoder:
    """Undoes the content codings of one body, step by step, and gives out at most `limit` bytes.

    `encodings` is the value of Content-Encoding, the first coding applied first; empty for none. What a coding is given
    is bounded too, to twice the limit and a little: a body that is nearly all packing is refused like a long one.

    Raises `MalformedResponseError` for what is too large or in too many codings, `httpx.DecodingError` for what is
    corrupt, cut short, or goes on behind its end.
    """

    __slots__ = ("_fed", "_is_over", "_left", "_limit", "_most", "_stages")

    def __init__(self, encodings: str = "", limit: int = sys.maxsize) -> None:
        self._stages = _stages(encodings)
        self._limit = self._left = limit
        self._most = 2 * limit + STEP
        self._fed = [0] * len(self._stages)
        self._is_over = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The pieces, of at most `STEP` bytes, that `data`, the next part of the body, makes."""
        for start in range(0, len(data), STEP):
            self.push(data[start : start + STEP])
            while not self.is_hungry:
                if part := self.pull():
                    yield part

    def finish(self) -> None:
        """The body is at its end."""
        for stage in self._stages:
            stage.finish()

    @property
    def is_hungry(self) -> bool:
        """Whether `pull` gives nothing more before there is more."""
        return not self._is_over and all(stage.is_hungry for stage in self._stages)

    def push(self, data: bytes) -> None:
        """Take at most `STEP` bytes of the body; only where `is_hungry`."""
        self._push(0, data)

    def pull(self) -> bytes:
        """The next piece, of at most `STEP` bytes; where it is empty, `is_hungry` says whether to ask again."""
        if self._is_over:
            raise _too_large(self._limit)
        last = at = len(self._stages) - 1
        for _ in range(STEPS_AT_ONCE * len(self._stages)):
            while self._stages[at].is_hungry:
                if at == 0:
                    return b""
                at -= 1
            part = self._stages[at].step()
            if not part:
                continue
            if at == last:
                return self._bounded(part)
            at += 1
            self._push(at, part)
        return b""

    def _push(self, at: int, data: bytes) -> None:
        self._fed[at] += len(data)
        if self._fed[at] > self._most:
            raise _too_large(self._limit)
        self._stages[at].push(data)

    def _bounded(self, part: bytes) -> bytes:
        allowed = self._left
        self._left -= len(part)
        if self._left >= 0:
            return part
        self._is_over = True
        return part[:allowed]


def decode_bounded(raw: bytes, encodings: str, limit: int, *, truncate: bool = False) -> bytes:
    """The body that came as `raw` in `encodings` (see `Decoder`), of at most `limit` bytes.

    With `truncate` a longer body is cut at the limit, and a corrupt one kept as far as it can be read. Otherwise raises
    as `Decoder` does.
    """
    if not raw or (not encodings and len(raw) <= limit):
        return raw
    parts: list[bytes] = []
    try:
        decoder = Decoder(encodings, limit)
        parts.extend(decoder.feed(raw))
        decoder.finish()
    except (httpx.DecodingError, MalformedResponseError):
        if not truncate:
            raise
    return b"".join(parts)


# In a response of httpx


async def read_bounded(response: httpx.Response, limit: int | None, *, truncate: bool = False) -> None:
    """Read and close `response`, holding at most `limit` bytes of its decoded body (None: no bound).

    Where `truncate` is set (for error bodies, which are read to be shown), a longer body is cut at the limit, and one
    that breaks off is kept as far as it came; elsewhere the one is a `MalformedResponseError`, the other httpx's error.
    """
    if truncate or not _is_known_to_fit(response, limit):
        bound_body(response, limit, truncate=truncate)
    await response.aread()


def _is_known_to_fit(response: httpx.Response, limit: int | None) -> bool:
    """Whether the framing alone keeps the body below `limit`: then it needs no watching."""
    headers = response.headers
    if "content-encoding" in headers or response.is_stream_consumed:
        return False
    length = headers.get("content-length", "")
    return length.isdecimal() and len(length) < 16 and (limit is None or int(length) <= limit)


def bound_body(
    response: httpx.Response, limit: int | None, *, truncate: bool = False, border: Border = nullcontext
) -> None:
    """Let whoever reads `response`, in any way, have at most `limit` bytes of it; see `read_bounded`.

    As it comes from the wire (`aiter_raw`) the body is held to the same limit, decoded or not. Each piece is asked for
    inside of a `border()`, which can turn its errors into others.
    """
    bound = sys.maxsize if limit is None else limit
    if response.is_stream_consumed:
        if len(response.content) > bound and not truncate:
            raise _too_large(bound)
        return
    body = Body(response, bound, truncate=truncate, border=border)
    response.stream = body
    response._decoder = body  # type: ignore[assignment]


class _Again(bytes):
    """No bytes, which httpx would pass over if it were not for this: so the decoder is asked once more."""

    def __bool__(self) -> bool:
        return True


AGAIN = _Again()


class Body(httpx.AsyncByteStream):
    """The stream and the content decoder of a response at once.

    httpx asks the stream for a piece, has the decoder decode it, and comes back: by then it is known whether the piece
    has more in it, which is fetched by an empty one, or whether nobody decodes, so that the bound is on the wire.
    """

    def __init__(self, response: httpx.Response, limit: int, *, truncate: bool, border: Border) -> None:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._stream: httpx.AsyncByteStream = response.stream
        self._encodings: str = response.headers.get("content-encoding", "")
        self._limit = limit
        self._truncate = truncate
        self._border = border
        self._decoder: Decoder | None = None
        self._error: Exception | None = None
        self._iterator: AsyncIterator[bytes] | None = None
        self._chunk = b""
        self._at = 0
        self._undecoded = 0
        self._pieces = 0
        self._is_closed = False

    # The stream

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        if self._is_closed:
            raise httpx.StreamClosed
        with self._border():
            piece = await self._next()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _next(self) -> bytes | None:
        self._pieces += 1
        if self._pieces % PIECES_AT_ONCE == 0:
            await anyio.lowlevel.checkpoint()
        if self._error is not None:
            await self._end(self._error)
            return None
        if self._decoder is not None and not self._decoder.is_hungry:
            return AGAIN
        if self._at == len(self._chunk):
            try:
                self._chunk, self._at = await self._read(), 0
            except StopAsyncIteration:
                self._iterator = None
                if self._decoder is not None and not self._truncate:
                    self._decoder.finish()
                return None
            except httpx.RequestError:
                if not self._truncate:
                    raise
                return None
        room = max(self._limit, 1) - self._undecoded
        if not room and self._chunk:
            await self._end(_too_large(self._limit))
            return None
        piece = self._chunk[self._at : self._at + min(STEP, room)]
        self._at += len(piece)
        self._undecoded += len(piece)
        return piece

    async def _read(self) -> bytes:
        if self._iterator is None:
            self._iterator = self._stream.__aiter__()
        return await self._iterator.__anext__()

    async def _end(self, error: Exception) -> None:
        """The body is too long, or cannot be decoded: leave it where it is."""
        self._error = None
        await self.aclose()
        if not self._truncate:
            raise error

    async def aclose(self) -> None:
        """Close the stream below; who goes on reading this one gets `httpx.StreamClosed`."""
        if not self._is_closed:
            self._is_closed = True
            self._border = nullcontext  # which may know the response, which knows this stream
            await self._stream.aclose()
            if self._iterator is not None:
                await self._run_out(self._iterator)

    async def _run_out(self, iterator: AsyncIterator[bytes]) -> None:
        """Let the generators below end, which are closed: half-way they would be left to the garbage collector."""
        with anyio.CancelScope() as scope:
            scope.cancel()  # those that would wait end by this
            try:
                for _ in range(STEPS_TO_END):
                    await iterator.__anext__()
            except Exception:  # what a stream of whatever make says once it is closed is nobody's matter
                return
            if isinstance(iterator, AsyncGenerator):  # a mock that goes on, perhaps for ever
                await iterator.aclose()

    # The decoder

    def decode(self, data: bytes) -> bytes:
        """Decode `data`, at most as much as one step gives."""
        self._undecoded -= len(data)
        try:
            if self._decoder is None:
                self._decoder = Decoder(self._encodings, self._limit)
            if data is not AGAIN:
                self._decoder.push(data)
            return self._decoder.pull()
        except (httpx.DecodingError, MalformedResponseError) as error:
            self._error = error.with_traceback(None)
            return b""

    def flush(self) -> bytes:
        """Nothing: the stream has not ended before all was decoded."""
        return b""


def _cut_short() -> httpx.DecodingError:
    return httpx.DecodingError("the compressed body is cut short")


def _too_large(limit: int) -> MalformedResponseError:
    return MalformedResponseError(f"the body is larger than max_response_bytes={limit} allows.")
