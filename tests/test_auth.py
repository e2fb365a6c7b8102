"""Tokens: their sources, the replacement of a refused pair, the auth circuit, and what must never be seen."""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import pathlib
import pickle
import random
import sys
import threading
import traceback
import types
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import httpx
import pytest
import respx

from layer_async import AsyncLayerClient
from layer_async import _auth as auth_room
from layer_async._auth import DualTokenAuth, _Circuit
from layer_async._errors import (
    APIConnectionError,
    AuthenticationError,
    ConfigurationError,
    LayerError,
    MissingTokensError,
    RateLimitError,
    RequestInfo,
    ServerError,
)
from layer_async._exchange import ExchangeRecord
from layer_async._origin import Origin
from layer_async._retry import RetryMiddleware, RetryPolicy
from layer_async._telemetry import CallFinished, Event
from layer_async._tokens import TokenPair, TokenSource, env_tokens, file_tokens, keyring_tokens, resolve_tokens

BASE = "https://webapi.thelayer.com"
CROWD = 200


def pair(number: int) -> TokenPair:
    return TokenPair(f"primary-{number}", f"secondary-{number}")


class Server:
    """Accepts some pairs, refuses the rest with 401, and counts."""

    def __init__(self, *valid: int) -> None:
        self.valid = set(valid)
        self.statuses: Counter[int] = Counter()
        self.seen: list[tuple[str, str | None, str | None]] = []
        self.mixed = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        one, two = request.headers.get("token1"), request.headers.get("token2")
        self.seen.append((request.url.path, one, two))
        self.mixed += str(one).partition("-")[2] != str(two).partition("-")[2]
        status = 200 if (one, two) in {(f"primary-{n}", f"secondary-{n}") for n in self.valid} else 401
        self.statuses[status] += 1
        return httpx.Response(status, json={"message": f"your token {one} is no good"})

    def client(self, auth: httpx.Auth, **settings: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self), auth=auth, base_url=BASE, **settings)


class Source:
    """An async source that gives pairs, or raises errors, in turn; the last one for ever. `opened` holds it back."""

    def __init__(self, *answers: int | Exception, held: bool = False) -> None:
        self.answers = list(answers)
        self.held = held
        self.asked = 0
        self.running = 0
        self.begun = anyio.Event() if held else None
        self.opened = anyio.Event() if held else None

    async def __call__(self) -> TokenPair:
        assert self.running == 0
        self.asked += 1
        self.running += 1
        try:
            if self.opened is not None and self.begun is not None:
                self.begun.set()
                await self.opened.wait()
            await anyio.lowlevel.checkpoint()
        finally:
            self.running -= 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return pair(answer)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second is sat out."""

    async def pause(_: float) -> None:
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(auth_room, "_pause", pause)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_auth(tokens: TokenPair | TokenSource, **settings: Any) -> DualTokenAuth:
    return DualTokenAuth(tokens, origin=BASE, **settings)


async def settle() -> None:
    """Let everything that can go on go on."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


# The pair


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "must be a str, not NoneType"),
        (b"hush", "must be a str, not bytes"),
        ("", "is empty"),
        ("hush\n", "white space at one of its ends"),
        (" hush", "white space at one of its ends"),
        ("hush\r\nX-Evil: 1", "contains white space"),
        ("hush hush", "contains white space"),
        ("hush\x00", "contains white space, a control character"),
        ("hush\x7f", "contains white space, a control character"),
        ("hüsh", "outside ASCII"),
        ("hush\ud800", "outside ASCII"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_token_is_refused_without_quoting_it(token: Any, words: str, first: bool) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        TokenPair(token, "fine") if first else TokenPair("fine", token)
    assert str(caught.value).startswith("Token1" if first else "Token2")
    assert "hush" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_pair_is_equal_by_value_and_hidden_in_its_repr() -> None:
    assert pair(1) == pair(1)
    assert pair(1) != pair(2)
    assert len({pair(1), pair(1)}) == 1
    assert repr(pair(1)) == "TokenPair(token1=***, token2=***)"


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_pair_refuses_pickling_and_copying(way: Callable[[TokenPair], object]) -> None:
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        way(pair(1))


# The sources


def ask(source: TokenPair | TokenSource) -> TokenPair:
    assert not isinstance(source, TokenPair)
    answer = source()
    assert isinstance(answer, TokenPair)
    return answer


ENVIRON = {"LAYER_TOKEN1": "primary-1", "LAYER_TOKEN2": "secondary-1"}


def test_the_environment_is_read_whenever_it_is_asked() -> None:
    environ = dict(ENVIRON)
    source = env_tokens(environ)
    assert ask(source) == pair(1)
    environ.update(LAYER_TOKEN1="primary-2", LAYER_TOKEN2="secondary-2")
    assert ask(source) == pair(2)
    assert "primary" not in repr(source)


def test_an_environment_that_lacks_a_token_says_which() -> None:
    with pytest.raises(MissingTokensError, match=r"^Token2 is missing\. Looked for in .*LAYER_TOKEN2.*Token Man"):
        ask(env_tokens({"LAYER_TOKEN1": "primary-1"}))
    with pytest.raises(MissingTokensError, match=r"^Token1 and Token2 are missing"):
        ask(env_tokens({"LAYER_TOKEN1": ""}))


def write(folder: pathlib.Path, one: bytes | str, two: bytes | str) -> tuple[pathlib.Path, pathlib.Path]:
    paths = folder / "token1", folder / "token2"
    for path, content in zip(paths, (one, two), strict=True):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return paths


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_files_are_read_without_their_last_line_break(tmp_path: pathlib.Path, end: str) -> None:
    source = file_tokens(*write(tmp_path, f"primary-1{end}", f"secondary-1{end}"))
    assert ask(source) == pair(1)
    write(tmp_path, f"primary-2{end}", f"secondary-2{end}")
    assert ask(source) == pair(2)


@pytest.mark.parametrize("content", ["primary-1\n\n", "hush hush", "", b"\xef\xbb\xbfprimary-1", b"\xff\xfeh\x00"])
def test_a_file_that_holds_no_token_is_named_and_not_quoted(tmp_path: pathlib.Path, content: bytes | str) -> None:
    with pytest.raises(ConfigurationError, match=r"^Token1 \(.*token1\)") as caught:
        ask(file_tokens(*write(tmp_path, content, "secondary-1")))
    assert "hush" not in str(caught.value)
    assert "primary-1" not in str(caught.value)


def test_a_file_that_is_missing_or_unreadable_is_named(tmp_path: pathlib.Path) -> None:
    one, _ = write(tmp_path, "primary-1", "secondary-1")
    with pytest.raises(MissingTokensError, match=r"^Token2 is missing\. Looked for in the file .*absent"):
        ask(file_tokens(one, tmp_path / "absent"))
    with pytest.raises(ConfigurationError, match=r"^Token2: the file .* cannot be read"):
        ask(file_tokens(one, tmp_path))


def swap_while_reading(
    monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, contents: Iterable[int]
) -> list[pathlib.Path]:
    """Whenever Token1 has been read, the pair on the disk is swapped for the next of `contents`."""
    reads: list[pathlib.Path] = []
    swaps = iter(contents)
    original = pathlib.Path.read_bytes

    def read_bytes(path: pathlib.Path) -> bytes:
        content = original(path)
        reads.append(path)
        if path.name == "token1" and (number := next(swaps, None)) is not None:
            write(folder, f"primary-{number}", f"secondary-{number}")
        return content

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    return reads


@pytest.mark.parametrize("swaps", [1, 2, 5])
def test_files_that_are_swapped_while_they_are_read_are_never_mixed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, swaps: int
) -> None:
    source = file_tokens(*write(tmp_path, "primary-0", "secondary-0"))
    reads = swap_while_reading(monkeypatch, tmp_path, range(1, swaps + 1))
    assert ask(source) == pair(swaps)
    assert len(reads) == 2 * (swaps + 2)


def test_files_that_never_stand_still_are_given_up(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file_tokens(*write(tmp_path, "primary-0", "secondary-0"))
    swap_while_reading(monkeypatch, tmp_path, range(1, 1000))
    with pytest.raises(ConfigurationError, match="change faster than they can be read"):
        ask(source)


def test_the_keyring_is_asked_for_both_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {("layer-async", "token1"): "primary-1", ("layer-async", "token2"): "secondary-1"}
    fake = types.ModuleType("keyring")
    fake.get_password = lambda service, user: kept.get((service, user))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", fake)
    assert ask(keyring_tokens()) == pair(1)
    with pytest.raises(MissingTokensError, match="the keyring, service 'other'"):
        ask(keyring_tokens("other"))
    kept["layer-async", "token2"] = "hush hush"
    with pytest.raises(ConfigurationError, match="Token2"):
        ask(keyring_tokens())


def test_without_the_extra_the_keyring_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'layer-async\[keyring\]'"):
        keyring_tokens()


def test_tokens_are_looked_for_in_order(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write(tmp_path, "primary-3", "secondary-3")
    files = {"LAYER_TOKEN1_FILE": str(one), "LAYER_TOKEN2_FILE": str(two)}
    everything = ENVIRON | files

    def source() -> TokenPair:
        return pair(2)

    assert resolve_tokens(token1="primary-9", token2="secondary-9", environ=everything) == pair(9)
    assert resolve_tokens(tokens=pair(8), environ=everything) == pair(8)
    assert resolve_tokens(tokens=source, environ=everything) is source
    assert resolve_tokens(environ=everything) == pair(1)
    assert ask(resolve_tokens(environ=files | {"LAYER_TOKEN1": ""})) == pair(3)
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    assert resolve_tokens() == pair(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, r"^Token1 and Token2 are missing.*token1= and token2=, tokens=.*LAYER_TOKEN1 and.*LAYER_TOKEN1_FILE and"),
        ({"token1": "hush"}, "^Token2 is missing.*never completed from elsewhere"),
        ({"token2": "hush"}, "^Token1 is missing"),
        ({"token1": "", "token2": "hush"}, "^Token1 is missing"),
        ({"environ": {"LAYER_TOKEN2": "hush"}}, "^Token1 is missing.*LAYER_TOKEN1"),
        ({"environ": {"LAYER_TOKEN1": "hush", "LAYER_TOKEN2_FILE": "/x"}}, "^Token2 is missing.*LAYER_TOKEN2"),
        ({"environ": {"LAYER_TOKEN1_FILE": "/x"}}, "^Token2 is missing.*LAYER_TOKEN2_FILE"),
    ],
)
def test_half_a_pair_is_never_completed_from_elsewhere(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(MissingTokensError, match=words) as caught:
        resolve_tokens(**({"environ": {}} | arguments))
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"token1": "hush", "token2": "hush", "tokens": pair(1)}, "not both"),
        ({"token1": "hush", "tokens": pair(1)}, "not both"),
        ({"tokens": ("hush", "hush")}, "not tuple"),
        ({"tokens": "hush"}, "not str"),
        ({"token1": "hush hush", "token2": "hush"}, r"Token1 \(token1=\) contains white space"),
        ({"environ": {"LAYER_TOKEN1": "hush", "LAYER_TOKEN2": "hush\n"}}, r"Token2 \(LAYER_TOKEN2\) has white space"),
    ],
)
def test_wrong_tokens_are_refused_without_quoting_them(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        resolve_tokens(**({"environ": {}} | arguments))
    assert "hush" not in str(caught.value)


def test_an_auth_refuses_wrong_tokens_and_origins() -> None:
    with pytest.raises(ConfigurationError, match="not tuple"):
        make_auth(("hush", "hush"))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="not https"):
        DualTokenAuth(pair(1), origin="http://webapi.thelayer.com")
    assert DualTokenAuth(pair(1), origin="http://gateway.internal", allow_http=True).origin.host == "gateway.internal"
    with pytest.raises(ConfigurationError, match="on_refresh must be callable, and int is not"):
        make_auth(pair(1), on_refresh=0)
    origin = Origin.parse(BASE)
    assert DualTokenAuth(pair(1), origin=origin).origin is origin


# The flow


@pytest.mark.anyio
async def test_a_static_pair_rides_on_every_request() -> None:
    server, auth = Server(1), make_auth(pair(1))
    async with server.client(auth) as client:
        assert (await client.get("/x")).status_code == 200
        assert (await client.post("/x", json={})).request.headers["Token1"] == "primary-1"
    assert server.seen == [("/x", "primary-1", "secondary-1")] * 2
    assert auth.generation == 1
    assert auth.secrets == ("secondary-1", "primary-1")


@pytest.mark.anyio
async def test_respx_sees_the_tokens() -> None:
    with respx.mock(base_url=BASE) as router:
        route = router.get("/x", headers={"Token1": "primary-1", "Token2": "secondary-1"}).respond(200)
        async with httpx.AsyncClient(auth=make_auth(pair(1)), base_url=BASE) as client:
            assert (await client.get("/x")).status_code == 200
        assert route.called


def test_a_synchronous_client_is_refused() -> None:
    with (
        httpx.Client(auth=make_auth(pair(1)), transport=httpx.MockTransport(Server(1))) as client,
        pytest.raises(RuntimeError, match="AsyncClient"),
    ):
        client.get(BASE)


async def an_async_function() -> TokenPair:
    await anyio.lowlevel.checkpoint()
    return pair(1)


def a_plain_function() -> TokenPair:
    assert threading.current_thread() is not threading.main_thread()
    return pair(1)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "source",
    [
        an_async_function,
        functools.partial(an_async_function),
        Source(1),
        lambda: an_async_function(),
        a_plain_function,
        functools.partial(a_plain_function),
        env_tokens(ENVIRON),
    ],
)
async def test_any_callable_is_a_source(source: TokenSource) -> None:
    server, auth = Server(1), make_auth(source)
    assert auth.generation == 0
    assert auth.secrets == ()
    async with server.client(auth) as client:
        assert (await client.get("/x")).status_code == 200
        assert (await client.get("/x")).status_code == 200
    assert auth.generation == 1


@pytest.mark.anyio
@pytest.mark.parametrize("value", [None, ("hush", "hush"), "hush"])
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_source_that_gives_no_pair_is_refused_by_type(value: Any, is_async: bool) -> None:
    async def async_source() -> Any:
        return value

    server = Server(1)
    async with server.client(make_auth(async_source if is_async else lambda: value)) as client:
        with pytest.raises(ConfigurationError, match=f"gave {type(value).__name__}, not a TokenPair") as caught:
            await client.get("/x")
    assert "hush" not in str(caught.value)
    assert server.seen == []


@pytest.mark.anyio
async def test_an_expired_pair_is_replaced_and_the_call_tried_once_more() -> None:
    server, source, refreshed = Server(1), Source(1, 2), list[int]()
    auth = make_auth(source, on_refresh=refreshed.append)
    async with server.client(auth) as client:
        assert (await client.get("/x")).status_code == 200
        server.valid = {2}
        response = await client.post("/x", json={"n": 1})
        assert response.status_code == 200
        assert [r.status_code for r in response.history] == [401]
        assert response.request.content == b'{"n":1}'
    assert server.seen == [("/x", f"primary-{n}", f"secondary-{n}") for n in (1, 1, 2)]
    assert (source.asked, auth.generation, refreshed) == (2, 2, [1, 2])
    assert auth.secrets == ("secondary-1", "secondary-2", "primary-1", "primary-2")


@pytest.mark.anyio
async def test_the_secrets_of_old_pairs_are_forgotten_in_the_end() -> None:
    auth = make_auth(Source(*range(1, 20)))
    async with Server().client(auth) as client:
        for _ in range(3):
            await client.get("/x")
            auth._circuit.meet_success(auth.generation)
    assert auth.generation == 4
    auth._install(pair(5))
    assert len(auth.secrets) == 8
    assert "primary-1" not in auth.secrets
    assert "primary-5" in auth.secrets


@pytest.mark.anyio
async def test_a_second_refusal_is_the_answer() -> None:
    server, source = Server(1), Source(1, 2, 3)
    async with server.client(make_auth(source)) as client:
        await client.get("/x")
        server.valid = {3}
        response = await client.get("/x")
    assert response.status_code == 401
    assert source.asked == 2
    assert server.statuses == {200: 1, 401: 2}


@pytest.mark.anyio
async def test_the_same_pair_again_is_no_newer_pair() -> None:
    server, source, clock, refreshed = Server(), Source(1), Clock(), list[int]()
    auth = make_auth(source, clock=clock, on_refresh=refreshed.append)
    async with server.client(auth) as client:
        assert (await client.get("/x")).status_code == 401
        assert (source.asked, len(server.seen), auth.generation) == (3, 1, 1)  # once more a second later
        assert (await client.get("/x")).status_code == 401
        assert (source.asked, len(server.seen)) == (4, 2)  # within a second the source is not asked again
        clock.now += 1.0
        assert (await client.get("/x")).status_code == 401
        assert (source.asked, len(server.seen)) == (6, 3)
    assert refreshed == [1]


@pytest.mark.anyio
async def test_a_body_that_cannot_be_sent_again_is_not_but_the_pair_is_replaced() -> None:
    server, source = Server(2), Source(1, 2)

    async def body() -> AsyncIterator[bytes]:
        yield b"once"

    class Sink(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert isinstance(request.stream, httpx.AsyncByteStream)
            assert [part async for part in request.stream] == [b"once"]
            return server(request)

    auth = make_auth(source)
    async with httpx.AsyncClient(transport=Sink(), auth=auth, base_url=BASE) as client:
        assert (await client.post("/x", content=body())).status_code == 401
        assert auth.generation == 2
        assert (await client.post("/x", content=body())).status_code == 200
    assert len(server.seen) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("status", [400, 403, 404, 407, 429, 500, 503])
async def test_other_errors_neither_ask_the_source_nor_count(status: int) -> None:
    source, sent = Source(1), list[int]()

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(status)
        return httpx.Response(status)

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, auth=make_auth(source), base_url=BASE) as client:
        for path in "abcdef":
            assert (await client.get(f"/{path}")).status_code == status
    assert (source.asked, len(sent)) == (1, 6)


@pytest.mark.anyio
async def test_a_refusal_by_another_origin_is_not_about_our_tokens() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "evil.example":
            return httpx.Response(401)
        return httpx.Response(302, headers={"location": f"https://evil.example{request.url.path}"})

    source = Source(1, 2)
    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=make_auth(source), base_url=BASE)
    async with client:
        for path in "abc":
            assert (await client.get(f"/{path}", follow_redirects=True)).status_code == 401
            assert (await client.get(f"https://evil.example/{path}")).status_code == 401
    assert source.asked == 1


# The body of a 401


class Stream(httpx.AsyncByteStream):
    """A body from the wire, that knows whether it was closed and how much of it was read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.read = 0
        self.closed = False

    # Not a generator: httpx, between us and it, leaves one that is not read to its end to the garbage collector.
    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for chunk in self.chunks:
            self.read += len(chunk)
            return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


class Wire(httpx.AsyncBaseTransport):
    """Refuses `primary-1` with a streamed body."""

    def __init__(self, chunks: Iterable[bytes], **headers: str) -> None:
        self.stream = Stream(chunks)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.headers["token1"] == "primary-1":
            return httpx.Response(401, stream=self.stream, headers=self.headers)
        return httpx.Response(200, stream=Stream([b"fine"]))


def endless() -> Iterable[bytes]:
    while True:
        yield bytes(1000)


@pytest.mark.anyio
async def test_the_body_of_a_401_is_read_to_64_kib_and_closed_before_the_source_is_asked() -> None:
    wire = Wire(endless())
    closed: list[bool] = []

    async def source() -> TokenPair:
        closed.append(wire.stream.closed)
        return pair(1 if len(closed) == 1 else 2)

    async with httpx.AsyncClient(transport=wire, auth=make_auth(source), base_url=BASE) as client:
        response = await client.get("/x")
    assert response.content == b"fine"
    assert closed == [False, True]
    assert len(response.history[0].content) == 65536
    assert 65536 <= wire.stream.read < 90_000


def compressed(size: int, wbits: int) -> list[bytes]:
    coder = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return [coder.compress(b"x" * size) + coder.flush()]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("coding", "chunks", "expected"),
    [
        ("identity", [b"no", b" good"], b"no good"),
        ("gzip", compressed(30, 31), b"x" * 30),
        ("X-GZIP", compressed(30, 31), b"x" * 30),
        ("deflate", compressed(30, 15), b"x" * 30),
        ("gzip", compressed(50_000_000, 31), b"x" * 65536),
        ("gzip", [b"not gzip at all", b"indeed"], b""),
        ("gzip", [compressed(30, 31)[0][:-6]], b"x" * 30),
        ("unheard-of", [b"\x1b\x00"], b"\x1b\x00"),
        ("gzip, unheard-of", [b"\x1b\x00"], b""),
        ("gzip," * 9, [b"\x1b\x00"], b""),
    ],
)
async def test_no_compression_makes_the_body_of_a_401_larger_or_the_retry_fail(
    coding: str, chunks: list[bytes], expected: bytes
) -> None:
    wire = Wire(chunks, content_encoding=coding)
    async with httpx.AsyncClient(transport=wire, auth=make_auth(Source(1, 2)), base_url=BASE) as client:
        response = await client.get("/x")
    assert response.status_code == 200
    assert expected.startswith(response.history[0].content)
    assert len(response.history[0].content) >= len(expected) * 0.9
    assert wire.stream.closed


@pytest.mark.anyio
async def test_a_hook_that_took_the_body_of_a_401_leaves_it_the_answer() -> None:
    async def take(response: httpx.Response) -> None:
        async for _ in response.aiter_raw():
            pass

    source = Source(1, 2)
    hooks = {"response": [take]}
    client = httpx.AsyncClient(transport=Wire([b"no"]), auth=make_auth(source), base_url=BASE, event_hooks=hooks)
    async with client, client.stream("GET", "/x") as response:
        assert response.status_code == 401
    assert source.asked == 1


@pytest.mark.anyio
async def test_a_hook_that_puts_another_stream_under_a_401_changes_nothing() -> None:
    async def replace(response: httpx.Response) -> None:
        if response.status_code == 401:
            response.stream = Stream(endless())

    hooks = {"response": [replace]}
    client = httpx.AsyncClient(transport=Wire([]), auth=make_auth(Source(1, 2)), base_url=BASE, event_hooks=hooks)
    async with client:
        response = await client.get("/x")
    assert response.status_code == 200
    assert len(response.history[0].content) == 65536


@pytest.mark.anyio
async def test_a_hook_that_read_the_body_of_a_401_changes_nothing() -> None:
    async def read(response: httpx.Response) -> None:
        await response.aread()

    hooks = {"response": [read]}
    wire = Wire([b"no"])
    client = httpx.AsyncClient(transport=wire, auth=make_auth(Source(1, 2)), base_url=BASE, event_hooks=hooks)
    async with client:
        response = await client.get("/x")
    assert response.status_code == 200
    assert response.history[0].content == b"no"


class Slot:
    def __init__(self) -> None:
        self.released = 0

    def release(self) -> None:
        self.released += 1


@pytest.mark.anyio
async def test_no_slot_is_held_while_the_source_is_asked_and_the_record_says_refresh() -> None:
    server, slot = Server(2), Slot()
    record = ExchangeRecord(phase="read", slot=slot)
    phases: list[tuple[str, int]] = []

    async def source() -> TokenPair:
        phases.append((record.phase, slot.released))
        return pair(len(phases))

    async with server.client(make_auth(source)) as client:
        response = await client.get("/x", extensions={"layer_async": record})
    assert response.status_code == 200
    assert phases == [("refresh", 1), ("refresh", 1)]
    assert (record.phase, record.slot) == ("read", None)


@pytest.mark.anyio
async def test_an_error_that_ends_a_refresh_finds_its_phase() -> None:
    record = ExchangeRecord(phase="read")
    async with Server().client(make_auth(Source(ValueError("no")))) as client:
        with pytest.raises(ValueError, match="no"):
            await client.get("/x", extensions={"layer_async": record})
    assert record.phase == "refresh"


# Many at once


async def gather(count: int, call: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """The results or exceptions of `count` calls at once."""
    results: list[Any] = [None] * count

    async def run(index: int) -> None:
        try:
            results[index] = await call(index)
        except Exception as exc:
            results[index] = exc

    async with anyio.create_task_group() as group:
        for index in range(count):
            group.start_soon(run, index)
    return results


@pytest.mark.anyio
async def test_a_crowd_that_meets_an_expired_pair_makes_one_refresh_and_all_succeed() -> None:
    server, source = Server(1), Source(1, 2, 3)
    auth = make_auth(source)
    async with server.client(auth) as client:
        await client.get("/x")
        server.valid = {2}
        responses = await gather(CROWD, lambda index: client.get(f"/{index}"))
    assert Counter(response.status_code for response in responses) == {200: CROWD}
    assert source.asked == 2
    assert server.statuses == {200: CROWD + 1, 401: CROWD}
    assert server.mixed == 0


@pytest.mark.anyio
async def test_a_crowd_fetches_the_first_pair_once() -> None:
    server, source = Server(1), Source(1)
    async with server.client(make_auth(source)) as client:
        responses = await gather(CROWD, lambda index: client.get(f"/{index}"))
    assert Counter(response.status_code for response in responses) == {200: CROWD}
    assert source.asked == 1


@pytest.mark.anyio
async def test_a_call_with_an_older_pair_tries_the_current_one_without_a_refresh() -> None:
    source, late = Source(1, 2, 3), anyio.Event()
    seen: list[tuple[str, str]] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        token = request.headers["token1"]
        seen.append((request.url.path, token))
        if request.url.path == "/slow" and token == "primary-1":
            await late.wait()
        return httpx.Response(200 if token == "primary-2" else 401)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=make_auth(source), base_url=BASE)
    async with client, anyio.create_task_group() as group:
        statuses: list[int] = []

        async def slow() -> None:
            statuses.append((await client.get("/slow")).status_code)

        group.start_soon(slow)
        await settle()
        assert (await client.get("/quick")).status_code == 200
        late.set()
    assert statuses == [200]
    assert source.asked == 2
    assert seen[-1] == ("/slow", "primary-2")


@pytest.mark.anyio
async def test_pairs_are_never_mixed_however_often_they_rotate() -> None:
    server, asked = Server(1), 0

    def source() -> TokenPair:
        nonlocal asked
        asked += 1
        return pair(max(server.valid))

    async with server.client(make_auth(source)) as client:

        async def call(index: int) -> int:
            if index % 50 == 0:
                server.valid = {max(server.valid) + 1}
            await anyio.lowlevel.checkpoint()
            return (await client.get("/x")).status_code

        await gather(400, call)
        assert (await client.get("/x")).status_code == 200
    assert server.mixed == 0
    assert asked <= 10


# Cancellation, and sources that fail


@pytest.mark.anyio
@pytest.mark.parametrize("cancelled", [1, 2, 5])
async def test_a_cancelled_leader_hands_over_to_the_next(cancelled: int) -> None:
    server, source = Server(1), Source(1, held=True)
    assert source.opened is not None
    scopes: list[anyio.CancelScope] = []
    done: list[int] = []
    with anyio.fail_after(5):
        async with server.client(make_auth(source)) as client, anyio.create_task_group() as group:

            async def call(index: int) -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await client.get(f"/{index}")
                    done.append(index)

            for index in range(10):
                group.start_soon(call, index)
                await settle()
            for index in range(cancelled):
                scopes[index].cancel()
                await settle()
            source.opened.set()
    assert source.asked == cancelled + 1
    assert sorted(done) == list(range(cancelled, 10))


@pytest.mark.anyio
async def test_an_heir_that_is_cancelled_before_it_begins_passes_the_lead_on() -> None:
    server, source = Server(1), Source(1, held=True)
    auth = make_auth(source)
    assert source.opened is not None
    scopes: list[anyio.CancelScope] = []
    done: list[int] = []
    with anyio.fail_after(5):
        async with server.client(auth) as client, anyio.create_task_group() as group:

            async def call(index: int) -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await client.get(f"/{index}")
                    done.append(index)

            for index in range(6):
                group.start_soon(call, index)
                await settle()
            for scope in (scopes[3], scopes[0], scopes[1], scopes[2]):  # all before anybody can react
                scope.cancel()
            await settle()
            assert auth._flight is not None
            assert len(auth._flight.waiters) == 1
            source.opened.set()
    assert sorted(done) == [4, 5]
    assert auth._flight is None


@pytest.mark.anyio
async def test_a_refresh_that_everybody_left_leaves_nothing_behind() -> None:
    server, source = Server(1), Source(1, held=True)
    auth = make_auth(source)
    assert source.opened is not None
    async with server.client(auth) as client:
        with anyio.fail_after(5):
            for _ in range(3):
                async with anyio.create_task_group() as group:
                    for index in range(5):
                        group.start_soon(client.get, f"/{index}")
                    await settle()
                    group.cancel_scope.cancel()
                assert auth._flight is None
            source.opened.set()
            assert (await client.get("/x")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("ticks", range(12))
async def test_a_leader_cancelled_natively_at_any_tick_hands_over(ticks: int, anyio_backend: str) -> None:
    server, source = Server(1), Source(1)
    async with server.client(make_auth(source)) as client:
        tasks = [asyncio.create_task(client.get(f"/{index}")) for index in range(6)]
        for _ in range(ticks):
            await asyncio.sleep(0)
        for task in tasks[:3]:
            task.cancel()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results[3:]:
        assert isinstance(result, httpx.Response)
        assert result.status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_heir_cancelled_natively_in_the_same_tick_passes_the_lead_on(anyio_backend: str) -> None:
    server, source = Server(1), Source(1, held=True)
    assert source.opened is not None
    async with server.client(make_auth(source)) as client:
        tasks = [asyncio.create_task(client.get(f"/{index}")) for index in range(4)]
        await settle()
        tasks[0].cancel()
        await asyncio.sleep(0)  # the leader has handed over; the heir has not run yet
        tasks[1].cancel()
        source.opened.set()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, httpx.Response) for result in results] == [False, False, True, True]


@pytest.mark.anyio
async def test_a_source_in_a_thread_holds_no_deadline_up() -> None:
    server, going, asked = Server(1), threading.Event(), 0

    def source() -> TokenPair:
        nonlocal asked
        asked += 1
        going.wait(5)
        return pair(1)

    auth = make_auth(source)
    async with server.client(auth) as client:
        try:
            with anyio.fail_after(5):
                for count in range(1, 5):
                    async with anyio.create_task_group() as group:
                        group.start_soon(client.get, "/x")
                        while len(auth._threads) < count:
                            await anyio.sleep(0.001)
                        group.cancel_scope.cancel()
                with pytest.raises(ConfigurationError, match="hangs: 4 calls"):
                    await client.get("/x")
        finally:
            going.set()
        with anyio.fail_after(5):
            while auth._threads:
                await anyio.sleep(0.001)
            auth._setback = None
            assert (await client.get("/x")).status_code == 200


class VaultError(Exception):
    pass


@pytest.mark.anyio
@pytest.mark.parametrize("expired", [True, False])
async def test_a_source_that_raises_fails_all_who_wait_with_that_one_error(expired: bool) -> None:
    error = VaultError("sealed")
    source = Source(1, error) if expired else Source(error)
    clock = Clock()
    auth = make_auth(source, clock=clock)
    server = Server(1)
    async with server.client(auth) as client:
        if expired:
            await client.get("/x")
            server.valid = {2}
        asked = source.asked
        with anyio.fail_after(5):
            results = await gather(CROWD, lambda index: client.get(f"/{index}"))
            assert {type(result) for result in results} == {VaultError}
            assert {str(result) for result in results} == {"sealed"}
            assert len({id(result) for result in results}) == CROWD
            assert source.asked == asked + 1
            clock.now += 0.999
            with pytest.raises(VaultError, match="sealed") as caught:
                await client.get("/x")
            assert caught.value is not error
            assert source.asked == asked + 1
            source.answers = [2]
            server.valid = {2}
            clock.now += 0.002
            assert (await client.get("/x")).status_code == 200
            assert source.asked == asked + 2
    assert all(len(traceback.extract_tb(result.__traceback__)) < 40 for result in (*results, caught.value, error))


class OddError(Exception):
    """Copied, it would say something else."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")


@pytest.mark.anyio
@pytest.mark.parametrize("error", [OddError(7), httpx.HTTPStatusError("503", request=None, response=None)])  # type: ignore[arg-type]
async def test_an_error_of_a_source_that_cannot_be_copied_is_raised_itself(error: Exception) -> None:
    async with Server().client(make_auth(Source(error))) as client:
        with anyio.fail_after(5):
            results = await gather(50, lambda index: client.get(f"/{index}"))
    assert all(result is error for result in results)
    assert len(traceback.extract_tb(error.__traceback__)) < 40


SOURCE_ERRORS = [
    httpx.ConnectError("the vault is down"),
    httpx.ReadTimeout("the vault is slow"),
    httpx.InvalidURL("no vault there"),
    RateLimitError("the vault is busy", status_code=429, retry_after=30.0, request=RequestInfo("GET", "https://vault")),
    ServerError("the vault fails", status_code=503, request=RequestInfo("GET", "https://vault"), maybe_processed=True),
    APIConnectionError("the vault is away"),
    VaultError("sealed"),
]


@pytest.mark.anyio
@pytest.mark.parametrize("error", SOURCE_ERRORS, ids=repr)
@pytest.mark.parametrize("expired", [True, False])
async def test_what_a_source_raises_is_no_failure_of_the_api(error: Exception, expired: bool) -> None:
    raised = copy.copy(error)
    source = Source(1, raised) if expired else Source(raised)
    events: list[Event] = []
    server = Server(1)
    async with AsyncLayerClient(
        tokens=source, base_url=BASE, transport=httpx.MockTransport(server), observer=events.append
    ) as client:
        if expired:
            await client.get("/x")
            server.valid = set()
        tokens, asked, seen = client._corridor.identity.budget.tokens, source.asked, len(server.seen)
        events.clear()
        with anyio.fail_after(5):
            results = await gather(5, lambda index: client.post(f"/{index}", json={}))
        assert (source.asked - asked, len(server.seen) - seen) == (1, 5 * expired)
        assert client._corridor.identity.budget.tokens == tokens
        gate = client._corridor.identity.gate
        assert gate is not None
        assert not gate.is_shut
    assert {(type(result), result.args) for result in results} == {(type(error), error.args)}
    assert len({id(result) for result in results}) == 5
    assert [type(event) for event in events] == [CallFinished] * 5
    for number, result in enumerate(results):
        if isinstance(error, LayerError):
            assert isinstance(result, LayerError)
            assert result.request == (error.request or RequestInfo("POST", f"{BASE}/{number}"))
            assert result.attempts == ()
            assert result.maybe_processed == error.maybe_processed


@pytest.mark.anyio
async def test_an_error_of_a_source_about_its_own_request_is_told_nothing_of_this_one() -> None:
    error = ServerError("no secondary-1 there", status_code=503, request=RequestInfo("GET", "https://vault"))
    answers = iter([503, 401])
    async with AsyncLayerClient(
        tokens=Source(1, error),
        base_url=BASE,
        transport=httpx.MockTransport(lambda request: httpx.Response(next(answers))),
        retry=RetryPolicy(backoff_initial=1e-9),
    ) as client:
        with pytest.raises(ServerError) as caught:
            await client.get("/x")
    assert caught.value is error
    assert (error.args, error.attempts) == (("no secondary-1 there",), ())


@pytest.mark.anyio
@pytest.mark.parametrize("error", SOURCE_ERRORS, ids=repr)
async def test_what_a_source_raises_passes_the_middleware_over_a_bare_client(error: Exception) -> None:
    source = Source(error)
    retry = RetryMiddleware(RetryPolicy(backoff_initial=1e-9))
    async with Server().client(make_auth(source)) as client:
        with anyio.fail_after(5), pytest.raises(type(error)) as caught:
            await retry(client.build_request("POST", "/x"), client.send)
    assert (source.asked, retry.budget.tokens) == (1, 100)
    assert caught.value.args == error.args


@pytest.mark.anyio
async def test_a_source_that_raises_in_a_thread_fails_all_who_wait_with_that_one_error() -> None:
    def source() -> TokenPair:
        raise VaultError("sealed")

    async with Server().client(make_auth(source)) as client:
        with anyio.fail_after(5):
            results = await gather(10, lambda index: client.get(f"/{index}"))
    assert {(type(result), str(result)) for result in results} == {(VaultError, "sealed")}


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["async", "from_thread", "asyncio.run", "task"])
@pytest.mark.parametrize("expired", [True, False])
async def test_a_source_that_calls_the_client_it_serves_is_told_so(way: str, expired: bool) -> None:
    server = Server(1)
    auth: DualTokenAuth
    client: httpx.AsyncClient
    asked = 0

    async def call() -> TokenPair:
        await client.get("/tokens?key=hush")
        raise AssertionError("not reached")

    async def in_task() -> TokenPair:
        async with anyio.create_task_group() as group:
            results: list[BaseException] = []

            async def run() -> None:
                try:
                    await call()
                except ConfigurationError as exc:
                    results.append(exc)

            group.start_soon(run)
        raise results[0]

    def in_thread() -> TokenPair:
        return anyio.from_thread.run(call)

    def in_own_loop() -> TokenPair:
        return asyncio.run(call())

    ways: dict[str, TokenSource] = {
        "async": call,
        "from_thread": in_thread,
        "asyncio.run": in_own_loop,
        "task": in_task,
    }

    def source() -> TokenPair | Awaitable[TokenPair]:
        nonlocal asked
        asked += 1
        return pair(1) if expired and asked == 1 else ways[way]()

    auth = make_auth(source)
    client = server.client(auth)
    async with client:
        with anyio.fail_after(5):
            if expired:
                await client.get("/x")
                server.valid = {2}
            results = await gather(5, lambda index: client.get("/x"))
    for result in results:
        assert isinstance(result, ConfigurationError)
        assert "called the client that it serves" in str(result)
        assert "hush" not in str(result)


@pytest.mark.anyio
async def test_a_source_may_call_other_hosts_and_other_clients() -> None:
    """Also with the auth that it serves, where no tokens go; and its background tasks may call the client later."""
    server = Server(1)
    going = anyio.Event()
    async with anyio.create_task_group() as group:
        statuses: list[int] = []

        async def later() -> None:
            await going.wait()
            statuses.append((await client.get("/x")).status_code)

        async def source() -> TokenPair:
            await client.get("https://vault.example/tokens")
            await other.get("/x")
            group.start_soon(later)
            return pair(1)

        async with server.client(make_auth(pair(1))) as other, server.client(make_auth(source)) as client:
            with anyio.fail_after(5):
                assert (await client.get("/x")).status_code == 200
                going.set()
                await settle()
            assert statuses == [200]
    assert server.seen[0] == ("/tokens", None, None)


def test_an_auth_goes_on_under_a_second_event_loop() -> None:
    server, source = Server(1, 2), Source(1, 2)
    auth = make_auth(source)

    async def call() -> int:
        async with server.client(auth) as client:
            return (await client.get("/x")).status_code

    assert asyncio.run(call()) == 200
    server.valid = {2}
    assert asyncio.run(call()) == 200
    assert source.asked == 2


@pytest.mark.parametrize("end", ["cancelled", "late"])
def test_a_refresh_on_another_loop_is_neither_waited_for_nor_believed_later(end: str) -> None:
    """Two live loops at once are nothing to build on, but a dead one must not hold the next one up."""
    server, clock = Server(2), Clock()
    asked = 0

    async def source() -> TokenPair:
        nonlocal asked
        asked += 1
        if asked > 1:
            return pair(2)
        await held.wait()
        return pair(1)

    auth = make_auth(source, clock=clock)

    async def call() -> int:
        async with server.client(auth) as client, asyncio.timeout(5):
            return (await client.get("/x")).status_code

    held = asyncio.Event()
    loop = asyncio.new_event_loop()
    task = loop.create_task(call())
    loop.run_until_complete(asyncio.sleep(0.01))
    assert auth._flight is not None  # and now that loop stands still
    assert asyncio.run(call()) == 200
    assert (asked, auth.generation) == (2, 1)
    if end == "late":
        held.set()
        assert loop.run_until_complete(task) == 200
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()
    assert auth._flight is None
    assert asyncio.run(call()) == 200
    assert (asked, auth.generation) == (2, 1)


# The circuit


@pytest.mark.anyio
async def test_a_static_pair_refused_on_two_paths_opens_the_circuit() -> None:
    server, clock = Server(), Clock()
    async with server.client(make_auth(pair(1), clock=clock)) as client:
        assert (await client.get("/a?x=1")).status_code == 401
        assert (await client.get("/a?x=2")).status_code == 401
        assert (await client.get("/b")).status_code == 401
        results = await gather(CROWD, lambda index: client.get(f"/{index}?secret=hush"))
    assert len(server.seen) == 3
    assert len({id(result) for result in results}) == CROWD
    for result in results:
        assert type(result) is AuthenticationError
        assert result.status_code == 401
    assert str(results[7]) == (
        f"GET {BASE}/7: 401 Unauthorized. The tokens were refused. Token1 may have lapsed, or Token2 be stale: create "
        "or regenerate them (Settings > Token Management > All API Applications > Create), and give this client the "
        "new pair. The server says: your token *** is no good Nothing was sent this time: these tokens were refused "
        "before, with no success since. One call is let through every 30 s, and all of them once there are new tokens."
    )
    assert b"primary-1" not in results[0].body


@pytest.mark.anyio
async def test_a_static_pair_refused_by_a_crowd_makes_no_storm() -> None:
    server = Server()
    async with server.client(make_auth(pair(1))) as client:
        limiter = anyio.CapacityLimiter(10)

        async def call(index: int) -> httpx.Response:
            async with limiter:
                return await client.get(f"/{index}")

        results = await gather(CROWD, call)
    refused = [result for result in results if isinstance(result, AuthenticationError)]
    assert len(server.seen) <= 20
    assert len(refused) + len(server.seen) == CROWD


@pytest.mark.anyio
async def test_a_success_between_keeps_the_circuit_closed() -> None:
    server = Server()
    async with server.client(make_auth(pair(1))) as client:
        for path in "abcdef":
            assert (await client.get(f"/{path}")).status_code == 401
            server.valid = {1}
            assert (await client.get("/fine")).status_code == 200
            server.valid = set()


@pytest.mark.anyio
async def test_two_fresh_pairs_refused_in_a_row_open_the_circuit() -> None:
    server, source = Server(), Source(1, 2, 3)
    async with server.client(make_auth(source)) as client:
        assert (await client.get("/x")).status_code == 401
        with pytest.raises(AuthenticationError):
            await client.get("/x")
    assert (source.asked, len(server.seen)) == (2, 2)


@pytest.mark.anyio
async def test_a_pair_that_had_met_success_is_not_fresh() -> None:
    server, source = Server(1), Source(1, 2, 3)
    async with server.client(make_auth(source)) as client:
        assert (await client.get("/x")).status_code == 200
        server.valid = {3}
        assert (await client.get("/x")).status_code == 401
        assert (await client.get("/x")).status_code == 200
    assert source.asked == 3


@pytest.mark.anyio
async def test_a_crowd_refused_with_two_fresh_pairs_makes_no_storm() -> None:
    server, source = Server(), Source(*range(1, 100))
    async with server.client(make_auth(source)) as client:
        for _ in range(2):
            results = await gather(200, lambda index: client.get(f"/{index}"))
            assert {type(result) for result in results} <= {httpx.Response, AuthenticationError}
        assert {type(result) for result in results} == {AuthenticationError}
    assert source.asked == 2
    assert len(server.seen) <= 400


class SlowServer(Server):
    """Answers `/late` only when told to."""

    def __init__(self, *valid: int) -> None:
        super().__init__(*valid)
        self.told = anyio.Event()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        response = self(request)
        if request.url.path == "/late":
            await self.told.wait()
        return response

    def slow_client(self, auth: httpx.Auth) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self.answer), auth=auth, base_url=BASE)


class PickySource(Source):
    """Its pairs are all good, and yet `/bad` refuses them: it always has a newer one."""

    def __init__(self) -> None:
        super().__init__(*range(1, 10_000))


class PickyServer(SlowServer):
    """Accepts every pair, but at `/bad…`."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append((request.url.path, request.headers.get("token1"), None))
        return httpx.Response(401 if request.url.path.startswith("/bad") else 200)


@pytest.mark.anyio
async def test_a_success_of_a_call_still_under_way_with_the_pair_before_counts_as_one_between() -> None:
    server, auth = PickyServer(), make_auth(PickySource())
    async with server.slow_client(auth) as client:
        async with anyio.create_task_group() as group:
            await client.get("/x")
            group.start_soon(client.get, "/late")
            await settle()
            assert (await client.get("/bad")).status_code == 401
            server.told.set()
        assert (await client.get("/bad")).status_code == 401
        assert auth.generation == 3
        assert (await client.get("/x")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("sent_with", [1, 2, None])
async def test_an_open_circuit_is_closed_by_a_late_success_of_a_refused_pair_only(sent_with: int | None) -> None:
    server, auth = PickyServer(), make_auth(PickySource())
    async with server.slow_client(auth) as client:
        await client.get("/x")
        async with anyio.create_task_group() as group:
            for generation in (1, 2):
                if sent_with == generation:
                    group.start_soon(client.get, "/late")
                    await settle()
                assert (await client.get("/bad")).status_code == 401
            with pytest.raises(AuthenticationError):
                await client.get("/y")
            server.told.set()
        if sent_with == 2:
            assert (await client.get("/x")).status_code == 200
        else:
            with pytest.raises(AuthenticationError):
                await client.get("/x")


@pytest.mark.anyio
async def test_a_success_from_before_the_last_but_one_pair_is_none_between() -> None:
    server, auth = PickyServer(), make_auth(PickySource())
    async with server.slow_client(auth) as client:
        async with anyio.create_task_group() as group:
            await client.get("/x")
            group.start_soon(client.get, "/late")  # with the first pair
            await settle()
            await client.get("/bad")
            await client.get("/x")  # with the second, which is therefore not fresh any more
            await client.get("/bad")
            assert auth.generation == 3
            server.told.set()
        assert (await client.get("/bad")).status_code == 401
        with pytest.raises(AuthenticationError):
            await client.get("/x")


def test_a_late_success_of_the_pair_before_says_nothing_of_a_pair_refused_on_two_paths() -> None:
    circuit = _Circuit()
    for generation in (2, 3):
        circuit.meet_new_pair()
        opens = circuit.meet_refusal(generation)
    assert opens
    error = AuthenticationError("refused", status_code=401)
    circuit.open(error, 0.0)
    circuit.meet_final_refusal("/a")
    assert circuit.meet_final_refusal("/b")
    circuit.meet_late_success(2)
    assert circuit.error is error
    assert circuit.fresh == 0


@pytest.mark.anyio
async def test_a_late_success_of_an_older_pair_does_not_make_the_current_one_fresh_again() -> None:
    server, source = SlowServer(1, 2), Source(1, 2, 3, 4)
    async with server.slow_client(make_auth(source)) as client:
        async with anyio.create_task_group() as group:
            await client.get("/x")
            group.start_soon(client.get, "/late")
            await settle()
            server.valid = {2}
            assert (await client.get("/x")).status_code == 200
            server.told.set()
        server.valid = {4}
        assert (await client.get("/x")).status_code == 401
        assert (await client.get("/x")).status_code == 200


@pytest.mark.anyio
async def test_one_path_that_is_always_refused_amid_a_crowd_of_successes_stops_nobody() -> None:
    chance = random.Random(1)

    async def answer(request: httpx.Request) -> httpx.Response:
        for _ in range(chance.randrange(1, 20)):
            await anyio.lowlevel.checkpoint()
        return server(request)

    server, auth = PickyServer(), make_auth(PickySource())
    limiter = anyio.CapacityLimiter(50)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=auth, base_url=BASE) as client:

        async def call(index: int) -> httpx.Response:
            async with limiter:
                return await client.get("/bad" if index % 10 == 9 else f"/{index}")

        results = await gather(CROWD, call)
    assert Counter((type(result), result.status_code) for result in results) == {
        (httpx.Response, 200): CROWD * 9 // 10,
        (httpx.Response, 401): CROWD // 10,
    }
    assert auth.generation > 3


@pytest.mark.anyio
async def test_a_call_under_way_with_an_older_pair_is_not_tried_again_once_the_circuit_is_open() -> None:
    server, source = SlowServer(), Source(1, 2, 3)
    statuses: list[int] = []
    async with server.slow_client(make_auth(source)) as client, anyio.create_task_group() as group:

        async def late() -> None:
            statuses.append((await client.get("/late")).status_code)

        group.start_soon(late)
        await settle()
        assert (await client.get("/x")).status_code == 401
        server.told.set()
    assert statuses == [401]
    assert [path for path, *_ in server.seen] == ["/late", "/x", "/x"]


@pytest.mark.anyio
async def test_a_call_under_way_asks_no_source_once_the_circuit_is_open() -> None:
    server, source, clock = SlowServer(1), Source(1, 2), Clock()
    statuses: list[int] = []
    async with server.slow_client(make_auth(source, clock=clock)) as client, anyio.create_task_group() as group:

        async def late() -> None:
            statuses.append((await client.get("/late")).status_code)

        assert (await client.get("/x")).status_code == 200
        server.valid = set()
        assert (await client.get("/x")).status_code == 401
        group.start_soon(late)
        await settle()
        assert (await client.get("/y")).status_code == 401
        assert source.asked == 4
        clock.now += 2
        server.told.set()
    assert statuses == [401]
    assert source.asked == 4


@pytest.mark.anyio
async def test_a_source_that_keeps_giving_the_refused_pair_opens_the_circuit_by_two_paths() -> None:
    server, source, clock = Server(), Source(1), Clock()
    async with server.client(make_auth(source, clock=clock)) as client:
        assert (await client.get("/a")).status_code == 401
        clock.now += 2
        assert (await client.get("/a")).status_code == 401
        clock.now += 2
        assert (await client.get("/b")).status_code == 401
        with pytest.raises(AuthenticationError):
            await client.get("/c")
    assert (source.asked, len(server.seen)) == (7, 3)


@pytest.mark.anyio
@pytest.mark.parametrize("crowd", [1, 20])
async def test_a_source_that_is_a_little_behind_is_waited_for(crowd: int) -> None:
    server, source = Server(2), Source(1, 1, 2)
    async with server.client(make_auth(source, clock=Clock())) as client, anyio.create_task_group() as group:
        statuses: list[int] = []

        async def call(index: int) -> None:
            statuses.append((await client.get(f"/{index}")).status_code)

        for index in range(crowd):
            group.start_soon(call, index)
    assert statuses == [200] * crowd
    assert source.asked == 3


@pytest.mark.anyio
async def test_who_has_sat_out_a_setback_asks_no_more_once_somebody_has_the_newer_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paused: list[anyio.Event] = []

    async def pause(_: float) -> None:
        paused.append(anyio.Event())
        await paused[-1].wait()

    monkeypatch.setattr(auth_room, "_pause", pause)
    server, source = Server(2), Source(1, 1, 2)
    statuses: list[int] = []
    async with server.client(make_auth(source, clock=Clock())) as client, anyio.create_task_group() as group:

        async def call(path: str) -> None:
            statuses.append((await client.get(path)).status_code)

        group.start_soon(call, "/a")
        group.start_soon(call, "/b")
        await settle()
        assert (len(paused), source.asked) == (2, 2)
        paused[0].set()
        await settle()
        assert (statuses, source.asked) == ([200], 3)
        paused[1].set()
    assert (statuses, source.asked) == ([200, 200], 3)


@pytest.mark.anyio
async def test_a_source_that_is_behind_is_not_waited_for_beyond_the_deadline() -> None:
    server, source = Server(2), Source(1, 1, 2)
    async with server.client(make_auth(source)) as client:
        with anyio.fail_after(0.5):
            assert (await client.get("/x")).status_code == 401
    assert source.asked == 2


@pytest.mark.anyio
async def test_a_refresh_under_way_is_no_reason_to_open_the_circuit() -> None:
    """Calls that begin while an expired pair is being replaced, on many paths, all succeed."""
    server, source = Server(1), Source(1, 2, held=True)
    assert source.opened is not None
    source.opened.set()
    async with server.client(make_auth(source)) as client:
        await client.get("/x")
        server.valid = {2}
        source.opened = anyio.Event()
        async with anyio.create_task_group() as group:
            statuses: list[int] = []

            async def call(index: int) -> None:
                statuses.append((await client.get(f"/{index}")).status_code)

            for index in range(20):
                group.start_soon(call, index)
                await anyio.lowlevel.checkpoint()
            await settle()
            source.opened.set()
    assert statuses == [200] * 20
    assert source.asked == 2


async def open_circuit(client: httpx.AsyncClient) -> None:
    for path in ("/a", "/b"):
        assert (await client.get(path)).status_code == 401
    with pytest.raises(AuthenticationError):
        await client.get("/c")


@pytest.mark.anyio
async def test_an_open_circuit_lets_one_call_through_every_30_s_and_closes_with_its_success() -> None:
    server, clock = Server(), Clock()
    async with server.client(make_auth(pair(1), clock=clock)) as client:
        await open_circuit(client)
        for turn in range(3):
            clock.now += 29.9
            with pytest.raises(AuthenticationError):
                await client.get("/x")
            clock.now += 0.1
            results = await gather(50, lambda index: client.get("/x"))
            assert sum(isinstance(result, httpx.Response) for result in results) == 1
            assert len(server.seen) == 3 + turn
        server.valid = {1}
        clock.now += 30
        assert (await client.get("/x")).status_code == 200
        assert [(await client.get("/x")).status_code for _ in range(5)] == [200] * 5


@pytest.mark.anyio
@pytest.mark.parametrize("status", [403, 404, 500])
async def test_a_probe_that_meets_another_error_leaves_the_circuit_open(status: int) -> None:
    clock, statuses = Clock(), [401, 401, status, 200]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(statuses.pop(0))

    auth = make_auth(pair(1), clock=clock)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=auth, base_url=BASE) as client:
        await open_circuit(client)
        clock.now += 30
        assert (await client.get("/x")).status_code == status
        with pytest.raises(AuthenticationError):
            await client.get("/x")
        clock.now += 30
        assert (await client.get("/x")).status_code == 200


@pytest.mark.anyio
async def test_a_cancelled_probe_leaves_the_circuit_able_to_close() -> None:
    clock, hold = Clock(), anyio.Event()
    statuses = [401, 401]

    async def answer(request: httpx.Request) -> httpx.Response:
        if statuses:
            return httpx.Response(statuses.pop())
        await hold.wait()
        return httpx.Response(200)

    auth = make_auth(pair(1), clock=clock)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=auth, base_url=BASE) as client:
        await open_circuit(client)
        clock.now += 30
        async with anyio.create_task_group() as group:
            group.start_soon(client.get, "/x")
            await settle()
            group.cancel_scope.cancel()
        hold.set()
        clock.now += 30
        assert (await client.get("/x")).status_code == 200
        assert (await client.get("/x")).status_code == 200


@pytest.mark.anyio
async def test_an_open_circuit_asks_the_source_each_second_and_a_newer_pair_closes_it() -> None:
    server, source, clock = Server(), Source(1), Clock()
    async with server.client(make_auth(source, clock=clock)) as client:
        await open_circuit(client)
        asked = source.asked
        clock.now += 30
        assert (await client.get("/x")).status_code == 401  # the same pair still
        assert source.asked == asked + 2
        source.answers = [2]
        server.valid = {2}
        with pytest.raises(AuthenticationError):
            await client.get("/x")
        assert source.asked == asked + 2
        clock.now += 1  # no probe yet
        assert (await client.get("/x")).status_code == 200
        assert (await client.get("/y")).status_code == 200


@pytest.mark.anyio
async def test_a_third_fresh_pair_that_is_refused_opens_the_circuit_at_once() -> None:
    server, source, clock = Server(), Source(1, 2, 3, 4), Clock()
    async with server.client(make_auth(source, clock=clock)) as client:
        await client.get("/x")
        clock.now += 30
        assert (await client.get("/x")).status_code == 401
        with pytest.raises(AuthenticationError):
            await client.get("/x")
    assert [token for _, token, _ in server.seen] == ["primary-1", "primary-2", "primary-2", "primary-3"]


# What must never be seen


def frames_of_ours(error: BaseException) -> list[str]:
    """The frames of this package in the traceback of `error` and of all that it came from, with their locals."""
    shown: list[str] = []
    pending: list[BaseException | None] = [error]
    while pending:
        exc = pending.pop()
        if exc is None:
            continue
        pending += [exc.__cause__, exc.__context__]
        stack = traceback.TracebackException.from_exception(exc, capture_locals=True).stack
        shown += [
            f"{frame.name}: {value}"
            for frame in stack
            if "layer_async" in frame.filename and "/tests/" not in frame.filename
            for value in (frame.locals or {}).values()
        ]
        shown += [str(exc), repr(exc)]
    return shown


HUSH = ("hush hush", "h-u-s-h\n", "hüsh")


@pytest.mark.parametrize("token", HUSH)
@pytest.mark.parametrize(
    "way",
    [
        lambda token: TokenPair(token, "fine"),
        lambda token: TokenPair("fine", token),
        lambda token: resolve_tokens(token1=token, token2="fine"),
        lambda token: resolve_tokens(token1=token),
        lambda token: resolve_tokens(token1=token, token2=token, tokens=pair(1)),
        lambda token: resolve_tokens(tokens=(token, token)),  # type: ignore[arg-type]
        lambda token: resolve_tokens(environ={"LAYER_TOKEN1": token, "LAYER_TOKEN2": "fine"}),
        lambda token: resolve_tokens(environ={"LAYER_TOKEN1": token}),
        lambda token: resolve_tokens(environ={"LAYER_TOKEN1_FILE": "x", "OTHER": token}),
        lambda token: env_tokens({"LAYER_TOKEN1": "fine", "LAYER_TOKEN2": token})(),
        lambda token: make_auth((token, token)),  # type: ignore[arg-type]
        lambda token: DualTokenAuth((token, token), origin="nowhere"),  # type: ignore[arg-type]
        lambda token: DualTokenAuth(functools.partial(TokenPair, token, token), origin="nowhere"),
        lambda token: Origin.parse(f"https://{token}@webapi.thelayer.com"),
        lambda token: Origin.parse(BASE).resolve(f"https://evil.example/?q={token}"),
    ],
)
def test_no_error_on_the_way_in_shows_a_token(way: Callable[[str], object], token: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        way(token)
    shown = frames_of_ours(caught.value)
    assert len(shown) > 2
    assert not [line for line in shown if token.strip() in line or repr(token)[1:-1] in line]


async def in_turn(client: httpx.AsyncClient) -> None:
    with anyio.fail_after(5):
        for path in "abcd":
            await client.get(f"/{path}")


@pytest.mark.anyio
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("fault", ["raises", "wrong type", "own client", "circuit", "transport"])
async def test_no_error_in_the_flow_shows_a_token(fault: str, is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client: httpx.AsyncClient

    async def call() -> Any:
        await client.get("/x")

    def give(secret: str) -> Any:
        if fault == "wrong type":
            return (secret, secret)
        if fault == "own client":
            return call() if is_async else anyio.from_thread.run(call)
        if fault == "raises":
            raise VaultError("sealed")
        return TokenPair(secret, secret)

    async def give_async(secret: str) -> Any:
        given = give(secret)
        return await given if asyncio.iscoroutine(given) else given

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["Token1"] == "hush-hush"
        if fault == "transport":
            raise httpx.ReadError("cut", request=request)
        return httpx.Response(401, text="hush-hush is refused", headers={"x-echo": "hush-hush"})

    auth = make_auth(functools.partial(give_async if is_async else give, "hush-hush"))
    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=auth, base_url=BASE)
    async with client:
        with pytest.raises((LayerError, VaultError, httpx.ReadError)) as caught:
            await in_turn(client)
    shown = frames_of_ours(caught.value)
    assert any("async_auth_flow" in line for line in shown) is (fault != "transport")
    assert not [line for line in shown if "hush-hush" in line]
    if isinstance(caught.value, LayerError):
        assert b"hush-hush" not in pickle.dumps(caught.value)
        assert "hush-hush" not in f"{caught.value.__dict__}"
    assert "hush-hush" not in caplog.text
    assert not [record for record in caplog.records if "hush-hush" in str(record.__dict__)]


@pytest.mark.anyio
async def test_a_call_shows_its_tokens_in_no_repr_log_or_pickle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server, auth = Server(2), make_auth(Source(1, 2))
    async with server.client(auth) as client:
        response = await client.get("/x")
    things: list[object] = [auth, client, response, response.request, response.request.headers, response.history]
    things += [vars(response.request), auth._issue, auth._pairs, auth._circuit, auth._source]
    for thing in things:
        assert "primary-" not in f"{thing!r}{thing!s}"
    assert repr(auth) == f"DualTokenAuth(origin='{BASE}', generation=2)"
    assert b"primary-" not in pickle.dumps(response.request)
    assert "primary-" not in caplog.text
    assert caplog.records
