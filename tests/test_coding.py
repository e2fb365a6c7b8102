"""Content codings: decoded as the standard library does, in bounded steps, whole or not at all."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import random
import time
import tracemalloc
import types
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_async import _coding
from layer_async._coding import (
    AGAIN,
    MAX_CODINGS,
    PIECES_AT_ONCE,
    STEP,
    Decoder,
    bound_body,
    decode_bounded,
    read_bounded,
)
from layer_async._errors import MalformedResponseError

REPEATABLE = settings(derandomize=True, deadline=None, database=None, max_examples=20)
MIB = 2**20
NO_LIMIT = 10**12


def deflated(data: bytes, wbits: int = -15, level: int = 6) -> bytes:
    coder = zlib.compressobj(level, zlib.DEFLATED, wbits)
    return coder.compress(data) + coder.flush()


def in_members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half], mtime=0) + gzip.compress(b"", mtime=0) + gzip.compress(data[half:], mtime=0)


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


CODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "none": ("", bytes),
    "identity": ("identity", bytes),
    "unknown": ("unheard-of", bytes),
    "gzip": ("gzip", gzipped),
    "x-gzip": (" X-GZip\t", gzipped),
    "gzip in members": ("gzip", in_members),
    "gzip, zero-padded": ("gzip", lambda data: gzipped(data) + bytes(700)),
    "gzip, padded between members": ("gzip", lambda data: gzipped(data) + bytes(9) + gzipped(b"")),
    "gzip, stored": ("gzip", lambda data: gzip.compress(data, 0, mtime=0)),
    "deflate, zlib": ("deflate", zlib.compress),
    "deflate, raw": ("deflate", deflated),
    "deflate, raw, stored": ("deflate", lambda data: deflated(data, level=0)),
    "deflate, small window": ("deflate", lambda data: deflated(data, 9)),
    "gzip twice": ("gzip, gzip", lambda data: gzipped(gzipped(data))),
    "gzip and deflate": ("gzip,deflate", lambda data: zlib.compress(gzipped(data))),
    "as many as are admitted": ("identity, , deflate, x-gzip, gzip", lambda data: gzipped(in_members(deflated(data)))),
}


def fed(encodings: str, parts: list[bytes], limit: int = NO_LIMIT) -> bytes:
    decoder = Decoder(encodings, limit)
    pieces = [piece for part in parts for piece in decoder.feed(part)]
    decoder.finish()
    assert all(0 < len(piece) <= STEP for piece in pieces)
    return b"".join(pieces)


def outcome(encodings: str, parts: list[bytes]) -> bytes | None:
    """The body, or None where they cannot be decoded."""
    try:
        return fed(encodings, parts)
    except httpx.DecodingError:
        return None


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


BODIES = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 99), st.integers(0, 3 * STEP)),
    st.builds(lambda size: b"0123456789" * size, st.integers(0, 20_000)),
)


@pytest.mark.parametrize("coder", CODERS)
@given(body=BODIES, cuts=st.lists(st.integers(0, 10**6), max_size=6))
@REPEATABLE
def test_any_split_of_any_body_gives_what_was_encoded(coder: str, body: bytes, cuts: list[int]) -> None:
    encodings, encode = CODERS[coder]
    raw = encode(body)
    assert fed(encodings, split(raw, cuts)) == body
    assert decode_bounded(raw, encodings, len(body)) == body


@pytest.mark.parametrize("coder", CODERS)
def test_a_body_that_comes_byte_by_byte_is_the_same(coder: str) -> None:
    encodings, encode = CODERS[coder]
    body = b"one after the other" * 5
    assert fed(encodings, [bytes([byte]) for byte in encode(body)]) == body


@pytest.mark.parametrize("coder", CODERS)
def test_an_empty_body_is_whole_in_any_coding(coder: str) -> None:
    encodings, _ = CODERS[coder]
    assert fed(encodings, []) == b""
    assert fed(encodings, [b""]) == b""
    assert decode_bounded(b"", encodings, 0) == b""


@pytest.mark.parametrize("coder", [name for name in CODERS if "gzip" in name or "deflate" in name])
def test_a_body_cut_short_at_any_byte_is_an_error(coder: str) -> None:
    encodings, encode = CODERS[coder]
    body = random.Random(1).randbytes(40) * 2
    raw = encode(body)
    # Where a member or its padding ends, nothing can tell that more was to come.
    whole = {len(raw)}
    if "members" in coder:
        half = gzipped(body[:40])
        whole |= {len(half), len(half + gzipped(b"")), *range(len(gzipped(body)), len(gzipped(body)) + 10)}
    if "zero-padded" in coder:
        whole |= set(range(len(gzipped(body)), len(raw)))
    whole = whole if coder != "as many as are admitted" else {len(raw)}
    for size in range(1, len(raw)):
        if size not in whole:
            with pytest.raises(httpx.DecodingError):
                decode_bounded(raw[:size], encodings, NO_LIMIT)
        kept = decode_bounded(raw[:size], encodings, NO_LIMIT, truncate=True)
        assert body.startswith(kept)


@pytest.mark.parametrize("coder", CODERS)
@given(body=st.binary(max_size=200), at=st.integers(0, 10**6), flip=st.integers(1, 255), cuts=st.lists(st.integers()))
@REPEATABLE
def test_corruption_is_an_error_of_httpxs_or_goes_unseen(
    coder: str, body: bytes, at: int, flip: int, cuts: list[int]
) -> None:
    encodings, encode = CODERS[coder]
    raw = bytearray(encode(body))
    if raw:
        raw[at % len(raw)] ^= flip
    found = outcome(encodings, split(bytes(raw), cuts))
    assert found == outcome(encodings, [bytes(raw)])
    if "gzip" in encodings.lower():  # which has a checksum; zlib's is not asked for where it is taken for raw deflate
        assert found in (None, body)
    kept = decode_bounded(bytes(raw), encodings, 1000, truncate=True)
    assert len(kept) <= 1000
    assert found is None or kept == found


@given(st.binary(max_size=500), st.sampled_from(["gzip", "deflate", "gzip, deflate", "deflate, gzip"]))
@REPEATABLE
def test_no_bytes_at_all_make_an_untyped_error(raw: bytes, encodings: str) -> None:
    found = outcome(encodings, [raw])
    assert found == outcome(encodings, [bytes([byte]) for byte in raw])
    assert found is None or found == decode_bounded(raw, encodings, NO_LIMIT, truncate=True)


@pytest.mark.parametrize("more", [b"\n", b"\x1f", b"\0\0x", b"garbage"])
@pytest.mark.parametrize("coder", ["gzip", "deflate, zlib", "deflate, raw", "gzip and deflate"])
def test_what_follows_the_end_is_an_error_in_one_piece_or_two(coder: str, more: bytes) -> None:
    encodings, encode = CODERS[coder]
    raw = encode(b"body")
    for parts in ([raw + more], [raw, more]):
        with pytest.raises(httpx.DecodingError):
            fed(encodings, parts)


def test_a_padding_is_no_member() -> None:
    with pytest.raises(httpx.DecodingError):
        fed("gzip", [b"\0" + gzipped(b"")])


def test_a_long_list_of_codings_is_refused() -> None:
    assert fed(", ".join(["identity"] * MAX_CODINGS), [b"abc"]) == b"abc"
    for encodings in (", ".join(["gzip"] * (MAX_CODINGS + 1)), "," * 100_000):
        with pytest.raises(MalformedResponseError, match="more than 5 content codings"):
            Decoder(encodings)
        assert decode_bounded(b"abc", encodings, 10, truncate=True) == b""


# The bound


@pytest.mark.parametrize("coder", CODERS)
def test_as_much_as_the_limit_is_admitted_and_a_byte_more_is_not(coder: str) -> None:
    encodings, encode = CODERS[coder]
    for size in (1, STEP - 1, STEP, STEP + 1, 3 * STEP):
        body = b"x" * size
        raw = encode(body)
        assert decode_bounded(raw, encodings, size) == body
        with pytest.raises(MalformedResponseError, match=f"max_response_bytes={size - 1} "):
            decode_bounded(raw, encodings, size - 1)
        assert decode_bounded(raw, encodings, size - 1, truncate=True) == body[:-1]


def bomb(encodings: str, size: int) -> bytes:
    """`size` zero bytes, compressed a thousandfold by the coding nearest to them."""
    names = encodings.split(", ")
    coder = zlib.compressobj(9, zlib.DEFLATED, 31 if names[0] == "gzip" else 15)
    raw = b"".join([*(coder.compress(bytes(MIB)) for _ in range(size // MIB)), coder.flush()])
    for _ in names[1:]:
        raw = gzipped(raw)
    return raw


STATE = 80 * 1024  # of one coding: zlib's window of 32 KiB, its tables, and compressed bytes that it has not taken yet


@contextmanager
def held() -> Iterator[list[int]]:
    """How many bytes were held at most."""
    found: list[int] = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield found
        found.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encodings", ["gzip", "deflate", "gzip, gzip", "gzip, gzip, gzip"])
def test_a_bomb_is_held_to_the_limit_and_64_kib(encodings: str) -> None:
    raw = bomb(encodings, 64 * MIB)
    codings = len(encodings.split(", "))
    with held() as found, pytest.raises(MalformedResponseError):
        decode_bounded(raw, encodings, MIB)
    assert found[0] <= MIB + 64 * 1024 + codings * STATE


def test_what_lies_between_two_codings_is_bounded_too() -> None:
    """An outer coding that inflates to inner packing without end gives nothing out, and is stopped all the same."""
    empty_members = gzipped(gzipped(b"") * 40_000)
    header_without_end = gzipped(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 2 * MIB)
    for raw in (empty_members, header_without_end):
        with held() as found, pytest.raises(MalformedResponseError):
            decode_bounded(raw, "gzip, gzip", 256 * 1024)
        assert found[0] <= 256 * 1024 + 64 * 1024 + 2 * STATE


def test_one_pull_does_a_bounded_amount_of_work() -> None:
    decoder = Decoder("gzip, gzip")
    decoder.push(gzipped(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 4 * MIB)[:STEP])
    assert decoder.pull() == b""
    assert not decoder.is_hungry
    assert decoder._fed[1] <= 8 * STEP


def test_a_bomb_that_is_to_be_shown_is_cut() -> None:
    assert decode_bounded(bomb("gzip", 4 * MIB), "gzip", 1000, truncate=True) == bytes(1000)


# Codings of other libraries


class Brotli(types.SimpleNamespace):
    """A library with the interface of Brotli 1.2, whose codec is zlib's."""

    class error(Exception):
        """As the library names it."""

    class Decompressor:
        def __init__(self) -> None:
            self.zlib = zlib.decompressobj()
            self.tail = b""

        def process(self, data: bytes, *, output_buffer_limit: int) -> bytes:
            try:
                part = self.zlib.decompress(self.tail + data, output_buffer_limit)
            except zlib.error as exc:
                raise Brotli.error(str(exc)) from exc
            self.tail = self.zlib.unconsumed_tail
            return part

        def can_accept_more_data(self) -> bool:
            return not self.tail

        def is_finished(self) -> bool:
            return self.zlib.eof


def install(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setattr(_coding._of_httpx, "brotli", library)
    monkeypatch.setitem(_coding._of_httpx.SUPPORTED_DECODERS, "br", object)


def test_brotli_is_decoded_where_the_library_bounds_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Brotli)
    body = bytes(range(256)) * 2000
    raw = zlib.compress(body)
    assert fed("br", [raw]) == body
    assert fed("br", [bytes([byte]) for byte in raw]) == body
    assert fed("gzip, br", [zlib.compress(gzipped(body))]) == body
    assert fed("br", []) == b""
    large = bomb("deflate", 8 * MIB)
    with held() as found, pytest.raises(MalformedResponseError):
        decode_bounded(large, "br", 256 * 1024)
    assert found[0] <= 256 * 1024 + 64 * 1024 + STATE
    for wrong in ([raw[:-1]], [b"corrupt"], [raw, b"more"]):
        with pytest.raises(httpx.DecodingError):
            fed("br", wrong)


def test_brotli_itself_is_decoded() -> None:
    library = _coding._of_httpx.brotli
    if not hasattr(getattr(library, "Decompressor", None), "can_accept_more_data"):
        pytest.skip("Brotli 1.2 or later is not installed")
    body = bytes(range(256)) * 40_000  # pragma: no cover - only with the library
    assert fed("br", [library.compress(body)]) == body  # pragma: no cover
    with pytest.raises(MalformedResponseError):  # pragma: no cover
        decode_bounded(library.compress(bytes(64 * MIB)), "br", MIB)


def test_a_coding_that_could_only_be_decoded_without_a_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, types.SimpleNamespace(Decompressor=object))
    with pytest.raises(MalformedResponseError, match=r"coding br, .*Brotli 1\.2"):
        decode_bounded(b"abc", "br", 10)
    monkeypatch.setitem(_coding._of_httpx.SUPPORTED_DECODERS, "zstd", object)
    with pytest.raises(MalformedResponseError, match=r"coding zstd, .*ask for gzip"):
        decode_bounded(b"abc", "zstd", 10)


# In a response


class Wire(httpx.AsyncByteStream):
    """A body in pieces, which ends once it is closed, and tells how many pieces were taken of it.

    A piece that is an exception is raised.
    """

    def __init__(self, *pieces: bytes | httpx.RequestError) -> None:
        self.pieces = pieces
        self.taken = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if self.closed:
                return
            self.taken += 1
            if isinstance(piece, httpx.RequestError):
                raise piece
            yield piece

    async def aclose(self) -> None:
        self.closed = True


CUT = httpx.ReadError("cut")
GZIP = {"Content-Encoding": "gzip"}


@pytest.mark.anyio
@pytest.mark.parametrize("limit", [None, 6, 100])
@pytest.mark.parametrize("truncate", [False, True])
async def test_a_body_within_the_bound_is_read_whole_and_closed(limit: int | None, truncate: bool) -> None:
    body = Wire(b"abc", b"def")
    response = httpx.Response(200, stream=body)
    await read_bounded(response, limit, truncate=truncate)
    assert response.content == b"abcdef"
    assert response.text == "abcdef"
    assert body.closed
    assert response.is_closed


@pytest.mark.anyio
async def test_an_empty_body_is_within_every_bound() -> None:
    response = httpx.Response(200, stream=Wire())
    await read_bounded(response, 0)
    assert response.content == b""


@pytest.mark.anyio
async def test_a_longer_body_is_refused_before_the_rest_of_it_is_taken() -> None:
    body = Wire(*[b"abc"] * 100)
    with pytest.raises(MalformedResponseError, match="max_response_bytes=5"):
        await read_bounded(httpx.Response(200, stream=body), 5)
    assert body.taken <= 3
    assert body.closed


@pytest.mark.anyio
async def test_a_body_whose_last_piece_is_too_much_is_refused() -> None:
    with pytest.raises(MalformedResponseError):
        await read_bounded(httpx.Response(200, stream=Wire(b"abcdef")), 5)


class Endless(httpx.AsyncByteStream):
    """A body that goes on after it was closed, as those of mocking tools may."""

    def __init__(self, *, waits: bool = False) -> None:
        self.taken = 0
        self.is_closed = self.has_ended = False
        self.waits = waits

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while True:
                if self.is_closed and self.waits:
                    await anyio.sleep_forever()
                self.taken += 1
                yield b"abc"
        finally:
            self.has_ended = True

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [False, True])
async def test_a_body_that_goes_on_after_it_was_closed_is_left(waits: bool) -> None:
    body = Endless(waits=waits)
    response = httpx.Response(500, stream=body)
    await read_bounded(response, 5, truncate=True)
    assert response.content == b"abcab"
    assert body.taken <= 20
    assert body.has_ended
    body = Endless(waits=waits)
    with pytest.raises(MalformedResponseError):
        await read_bounded(httpx.Response(200, stream=body), 5)
    assert body.taken <= 20
    assert body.has_ended


@pytest.mark.anyio
async def test_a_longer_body_that_is_only_to_be_shown_is_cut_at_the_bound() -> None:
    body = Wire(*[b"abc"] * 100)
    response = httpx.Response(500, stream=body)
    await read_bounded(response, 5, truncate=True)
    assert response.content == b"abcab"
    assert body.taken <= 3
    assert body.closed


@pytest.mark.anyio
async def test_a_body_that_breaks_off_is_the_errors_or_kept_as_far_as_it_came_to_be_shown() -> None:
    with pytest.raises(httpx.ReadError):
        await read_bounded(httpx.Response(200, stream=Wire(b"abc", CUT)), 100)
    response = httpx.Response(500, stream=Wire(b"abc", CUT))
    await read_bounded(response, 100, truncate=True)
    assert response.content == b"abc"


@pytest.mark.anyio
async def test_a_body_that_breaks_off_behind_the_bound_was_too_long_already() -> None:
    with pytest.raises(MalformedResponseError):
        await read_bounded(httpx.Response(200, stream=Wire(b"abcdef", CUT)), 5)


@pytest.mark.anyio
async def test_the_bound_is_on_the_decoded_body() -> None:
    small = gzip.compress(b"x" * 10_000)
    with pytest.raises(MalformedResponseError):
        await read_bounded(httpx.Response(200, headers=GZIP, stream=Wire(small)), 9_999)
    response = httpx.Response(200, headers=GZIP, stream=Wire(small))
    await read_bounded(response, 10_000)
    assert response.content == b"x" * 10_000


@pytest.mark.anyio
async def test_a_body_that_was_already_read_is_held_to_the_bound_too() -> None:
    response = httpx.Response(200, content=b"abcdef")
    await read_bounded(response, None)
    await read_bounded(response, 6)
    await read_bounded(response, 5, truncate=True)
    assert response.content == b"abcdef"
    with pytest.raises(MalformedResponseError):
        await read_bounded(response, 5)


@pytest.mark.anyio
async def test_who_streams_gets_as_much_as_the_bound_and_an_error_for_more() -> None:
    response = httpx.Response(200, stream=Wire(b"abc", b"def"))
    bound_body(response, 6)
    assert [chunk async for chunk in response.aiter_bytes()] == [b"abc", b"def"]

    response = httpx.Response(200, stream=Wire(b"abc", b"def", b"ghi"))
    bound_body(response, 5)
    stream = response.aiter_bytes()
    assert await anext(stream) == b"abc"
    assert await anext(stream) == b"de"
    with pytest.raises(MalformedResponseError, match="max_response_bytes=5"):
        await anext(stream)
    await response.aclose()


async def pieces_of(response: httpx.Response, way: str) -> list[bytes]:
    pieces: list[bytes] = []
    if way == "aread":
        pieces.append(await response.aread())
    elif way == "aiter_text":
        pieces += [text.encode() async for text in response.aiter_text()]
    elif way == "aiter_lines":
        pieces += [(line + "\n").encode() async for line in response.aiter_lines()]
    else:
        pieces += [piece async for piece in getattr(response, way)()]
    return pieces


WAYS = ["aread", "aiter_bytes", "aiter_text", "aiter_lines", "aiter_raw"]


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
async def test_every_way_to_read_a_stream_is_bounded(way: str) -> None:
    lines = b"line\n" * 20_000
    for raw, headers in ((lines, {}), (gzipped(lines), GZIP)):
        body = raw if way == "aiter_raw" else lines
        response = httpx.Response(200, headers=headers, stream=Wire(raw))
        bound_body(response, len(body))
        assert b"".join(await pieces_of(response, way)) == body
        assert response.num_bytes_downloaded == len(raw)
        assert response.is_closed
        assert response.is_stream_consumed
        response = httpx.Response(200, headers=headers, stream=Wire(raw))
        bound_body(response, len(body) - 1)
        with pytest.raises(MalformedResponseError):
            await pieces_of(response, way)


@pytest.mark.anyio
async def test_raw_bytes_are_given_out_as_far_as_the_limit() -> None:
    response = httpx.Response(200, headers=GZIP, stream=Wire(b"abc", b"def"))
    bound_body(response, 5)
    stream = response.aiter_raw()
    assert [await anext(stream), await anext(stream)] == [b"abc", b"de"]
    with pytest.raises(MalformedResponseError):
        await anext(stream)


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["aiter_bytes", "aiter_raw", "aiter_text"])
@pytest.mark.parametrize("coding", ["", "gzip", "gzip, gzip"])
async def test_pieces_are_small_without_a_limit_too(way: str, coding: str) -> None:
    raw = bomb(coding, 8 * MIB) if coding else bytes(8 * MIB)
    response = httpx.Response(200, headers={"Content-Encoding": coding}, stream=Wire(raw))
    bound_body(response, None)
    pieces = await pieces_of(response, way)
    assert max(map(len, pieces)) <= STEP
    assert sum(map(len, pieces)) == (len(raw) if way == "aiter_raw" else 8 * MIB)


@pytest.mark.anyio
async def test_a_body_in_one_piece_of_a_given_size_is_httpxs_as_ever() -> None:
    response = httpx.Response(200, headers=GZIP, stream=Wire(gzipped(b"abcdefg")))
    bound_body(response, 100)
    assert [piece async for piece in response.aiter_bytes(3)] == [b"abc", b"def", b"g"]


@pytest.mark.anyio
async def test_others_have_their_turn_while_a_large_body_is_inflated() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    response = httpx.Response(200, headers=GZIP, stream=Wire(bomb("gzip", 8 * MIB)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        await read_bounded(response, 8 * MIB)
        tasks.cancel_scope.cancel()
    assert turns >= 8 * MIB // STEP // PIECES_AT_ONCE - 2


@pytest.mark.anyio
async def test_a_flood_of_tiny_pieces_gives_others_their_turn() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        await read_bounded(httpx.Response(200, stream=Wire(*[b"x"] * 320)), 1000)
        tasks.cancel_scope.cancel()
    assert turns >= 320 // PIECES_AT_ONCE - 2


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS[:-1])
@pytest.mark.parametrize("raw", [gzipped(b"text")[:-1], b"plain text", gzipped(b"text") + b"x"])
async def test_a_body_that_cannot_be_decoded_is_an_error_that_leaves_no_generator_behind(way: str, raw: bytes) -> None:
    for parts in ([raw], [raw, b"more"], [bytes([byte]) for byte in raw]):
        request = httpx.Request("GET", "https://api.example/things")
        body = Wire(*parts)
        response = httpx.Response(200, headers=GZIP, stream=body, request=request)
        bound_body(response, 100)
        with pytest.raises(httpx.DecodingError) as caught:
            await pieces_of(response, way)
        assert caught.value.request is request
        response = httpx.Response(500, headers=GZIP, stream=Wire(*parts))
        bound_body(response, 100, truncate=True)
        assert b"text\n".startswith(b"".join(await pieces_of(response, way)))


@pytest.mark.anyio
async def test_who_takes_the_raw_body_may_take_a_corrupt_one() -> None:
    response = httpx.Response(200, headers=GZIP, stream=Wire(b"plain text"))
    bound_body(response, 100)
    assert [piece async for piece in response.aiter_raw()] == [b"plain text"]


@pytest.mark.anyio
async def test_a_stream_that_was_closed_half_way_does_not_pass_for_a_whole_one() -> None:
    response = httpx.Response(200, stream=Wire(b"abc", b"def"))
    bound_body(response, 100)
    stream = response.aiter_raw()
    assert await anext(stream) == b"abc"
    await response.aclose()
    await response.stream.aclose()  # type: ignore[union-attr]
    with pytest.raises(httpx.StreamClosed):
        await anext(stream)


@pytest.mark.anyio
async def test_a_stream_that_nobody_reads_is_closed() -> None:
    wire = Wire(b"abc")
    response = httpx.Response(200, stream=wire)
    bound_body(response, 100)
    await response.aclose()
    assert wire.closed
    assert not wire.taken


class Tireless(Endless):
    """The same, and no generator."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self.taken += 1
        return b"abc"


@pytest.mark.anyio
async def test_what_is_no_generator_is_left_too() -> None:
    stream = Tireless()
    with pytest.raises(MalformedResponseError):
        await read_bounded(httpx.Response(200, stream=stream), 5)
    assert stream.taken <= 20


@pytest.mark.anyio
async def test_raw_bytes_for_who_is_only_to_be_shown_them_are_cut() -> None:
    response = httpx.Response(500, stream=Wire(b"abc", b"", b"def"))
    bound_body(response, 5, truncate=True)
    assert [piece async for piece in response.aiter_raw()] == [b"abc", b"de"]


@pytest.mark.anyio
async def test_an_error_body_that_breaks_off_is_kept_whatever_its_length_was_to_be() -> None:
    response = httpx.Response(500, headers={"Content-Length": "10"}, stream=Wire(b"abc", CUT))
    await read_bounded(response, 100, truncate=True)
    assert response.content == b"abc"


@pytest.mark.anyio
async def test_a_body_that_is_known_to_fit_is_read_by_httpx_alone() -> None:
    stream = Wire(b"abc")
    response = httpx.Response(200, headers={"Content-Length": "3"}, stream=stream)
    await read_bounded(response, 3)
    assert response.stream is stream
    assert response.content == b"abc"
    response = httpx.Response(200, headers={"Content-Length": "3"}, stream=Wire(b"abc"))
    with pytest.raises(MalformedResponseError):
        await read_bounded(response, 2)


@pytest.mark.anyio
async def test_the_errors_of_a_body_pass_through_its_border() -> None:
    class Ours(Exception):
        pass

    @contextmanager
    def border() -> Iterator[None]:
        try:
            yield
        except (httpx.RequestError, MalformedResponseError) as exc:
            raise Ours from exc

    for headers, parts in (
        ({}, [b"ab", CUT]),
        (GZIP, [b"plain text"]),
        (GZIP, [gzipped(b"x")[:-1]]),
        ({}, [b"abcdef"]),
    ):
        response = httpx.Response(200, headers=headers, stream=Wire(*parts))
        bound_body(response, 5, border=border)
        with pytest.raises(Ours):
            async for _ in response.aiter_bytes():
                pass


def test_what_asks_the_decoder_again_is_no_bytes_but_true() -> None:
    assert AGAIN == b""
    assert AGAIN


@pytest.mark.promise
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("encodings", ["gzip", "deflate", "gzip, gzip"])
async def test_memory_of_a_bomb(encodings: str, full: bool, report: list[str], anyio_backend: str) -> None:
    """Decoded body: at most the limit + 64 KiB, and the loop has a turn meanwhile."""
    size = (1024 if full else 64) * MIB
    raw, limit = bomb(encodings, size), size // 8
    stalls: list[float] = []

    async def watch() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            stalls.append(now - last)
            last = now

    watcher = asyncio.create_task(watch())
    response = httpx.Response(200, headers={"Content-Encoding": encodings}, stream=Wire(raw))
    with held() as found, pytest.raises(MalformedResponseError):
        await read_bounded(response, limit)
    watcher.cancel()
    report += [
        f"{size // MIB} MiB from {len(raw)} bytes in {encodings}",
        f"held {(found[0] - limit) / 1024:.0f} KiB above the limit",
        f"longest stall {max(stalls) * 1000:.0f} ms",
    ]
    assert found[0] <= limit + 64 * 1024 + len(encodings.split(",")) * STATE + limit // STEP * 64
