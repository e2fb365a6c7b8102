"""The client against servers that break things, over real sockets."""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import gc
import gzip
import pickle
import socket
import ssl
import threading
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from layer_async import (
    APIConnectionError,
    AsyncLayerClient,
    CallNext,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    LayerError,
    MalformedResponseError,
    NotFoundError,
    RetryPolicy,
    TokenPair,
)
from layer_async._deadline import Scopes
from layer_async._lean import Lane
from layer_async._options import Pieces
from layer_async._pacing import Gate

from .faultserver import Exchange, FaultServer, authority
from .test_wire import RESET, listening

pytestmark = pytest.mark.anyio

PAIR = TokenPair("faults-token-one", "faults-token-two")
QUICK = RetryPolicy(backoff_initial=1e-9)
TEXT = b"[" + b"1," * 6000 + b"1]"
GZIP = "Content-Encoding: gzip\r\n"


def gate_of(client: AsyncLayerClient) -> Gate:
    gate = client._corridor.identity.gate
    assert gate is not None
    return gate


def make(server: FaultServer, **options: Any) -> AsyncLayerClient:
    settings: dict[str, Any] = {"tokens": PAIR, "base_url": server.url, "retry": QUICK}
    return AsyncLayerClient(**(settings | options))


@pytest.mark.parametrize("limit", [10**6, None])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "gzip, gzip"])
async def test_a_compressed_body_that_is_cut_short_is_not_taken_for_a_whole_one(coding: str, limit: int | None) -> None:
    body = {"gzip": gzip.compress(TEXT), "deflate": zlib.compress(TEXT)}.get(coding, gzip.compress(gzip.compress(TEXT)))
    headers = f"Content-Encoding: {coding}\r\n"
    with FaultServer() as server:
        server.behaviours["whole"] = lambda ex: ex.respond(body, headers=headers)
        server.behaviours["cut"] = lambda ex: ex.respond(body[:-14], headers=headers)
        async with make(server, max_response_bytes=limit) as client:
            assert (await client.get("/whole/1")).content == TEXT
            assert (await client.head("/whole/1")).content == b""
            with pytest.raises(MalformedResponseError, match="cut short"):
                await client.get("/cut/1")


async def test_a_proxy_that_speaks_no_http_is_not_said_to_have_closed() -> None:
    with FaultServer(refuse_tunnels="nonsense") as proxy:
        async with AsyncLayerClient(tokens=PAIR, base_url="https://origin.invalid", proxy=proxy.url) as client:
            with pytest.raises(APIConnectionError, match="no usable answer: ") as caught:
                await client.get("/x", retry=None)
    assert "closed" not in str(caught.value)


async def test_a_body_without_length_that_is_reset_during_the_upload_is_no_whole_one() -> None:
    """The kernel tells the write, and who reads then finds an end like any other."""
    is_reset = threading.Event()

    def begin(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf of")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()
        is_reset.set()

    async def body() -> AsyncGenerator[bytes, None]:
        yield b"x"
        is_reset.wait(5)
        yield b"y"

    with listening(begin) as server:
        server.tls = False
        async with make(server) as client, contextlib.aclosing(body()) as pieces:
            with pytest.raises(APIConnectionError):
                await client.post("/x", content=pieces, retry=None)


@pytest.mark.parametrize("body", [b"plain text", gzip.compress(TEXT)[:-14]])
async def test_an_error_keeps_its_status_whatever_its_body_is(body: bytes) -> None:
    with FaultServer() as server:
        server.behaviours["odd"] = lambda ex: ex.respond(body, status="404 Not Found", headers=GZIP)
        async with make(server) as client:
            with pytest.raises(NotFoundError):
                await client.get("/odd/1")
    assert len(server.record.requests) == 1


async def test_a_body_that_is_not_in_the_coding_it_claims_is_malformed() -> None:
    with FaultServer() as server:
        server.behaviours["odd"] = lambda ex: ex.respond(b"plain text", headers=GZIP)
        async with make(server) as client:
            with pytest.raises(MalformedResponseError):
                await client.get("/odd/1")


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_a_bomb_is_refused_and_its_connection_with_it(framing: str) -> None:
    body = gzip.compress(bytes(4 * 2**20))
    head = f"HTTP/1.1 200 OK\r\n{GZIP}"

    def send(ex: Exchange) -> None:
        if framing == "chunked":
            ex.send(f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
        elif framing == "length":
            ex.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        else:
            ex.send(f"{head}Connection: close\r\n\r\n".encode() + body)
            ex.close()

    with FaultServer() as server:
        server.behaviours["bomb"] = send
        async with make(server, max_response_bytes=2**20) as client:
            with pytest.raises(MalformedResponseError, match="max_response_bytes=1048576"):
                await client.get("/bomb/1")
            assert client.pool.stats.in_use == 0
            response = await client.get("/bomb/2", max_response_bytes=4 * 2**20)
            assert response.content == bytes(4 * 2**20)
            assert response.num_bytes_downloaded == len(body)
            assert response.elapsed.total_seconds() > 0
            async with client.stream("GET", "/bomb/3") as streamed:
                sizes = [len(piece) async for piece in streamed.aiter_bytes()]
            assert max(sizes) <= 64 * 1024
            assert sum(sizes) == 4 * 2**20


async def test_a_header_that_is_not_ascii_does_not_hide_the_status() -> None:
    def latin(ex: Exchange) -> None:
        ex.send(b"HTTP/1.1 404 Not Found\r\nX-Info: caf\xe9\r\nContent-Length: 0\r\n\r\n")

    with FaultServer() as server:
        server.behaviours["latin"] = latin
        async with make(server) as client:
            with pytest.raises(NotFoundError) as caught:
                await client.get("/latin/1")
    assert (b"X-Info", b"caf\xe9") in caught.value.headers.raw


@pytest.mark.parametrize("hooked", [False, True])  # with a hook, httpx drives the auth
async def test_a_401_whose_body_breaks_off_leads_to_a_refresh_all_the_same(hooked: bool) -> None:
    async def hook(response: httpx.Response) -> None:
        assert response.status_code in (200, 401)

    def refuse(ex: Exchange) -> None:
        if ex.request.headers["token1"] == "faults-token-new":
            ex.respond(b"{}")
        else:
            ex.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 99\r\n\r\nshort")
            ex.close()

    pairs = iter([PAIR, TokenPair("faults-token-new", "faults-token-two")])
    with FaultServer() as server:
        server.behaviours["refuse"] = refuse
        async with make(server, tokens=lambda: next(pairs)) as client:
            client.http.event_hooks = {"response": [hook] if hooked else []}
            await client.post("/refuse/1", json={})
    assert len(server.record.requests) == 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio warns of the generator that httpx leaves half-way
async def test_a_body_that_does_not_fit_its_declared_length_is_a_typed_error() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"abcdef"

    with FaultServer() as server:
        async with make(server) as client:
            with pytest.raises(ConfigurationError, match="not HTTP"):
                await client.post("/echo", content=body(), headers={"Content-Length": "3"})
            assert client.pool.stats.in_use == 0


@pytest.mark.parametrize("where", ["sleep", "gate", "refresh"])
async def test_closing_the_client_ends_the_calls_that_sleep_wait_or_refresh(where: str) -> None:
    async def source() -> TokenPair:
        if where == "refresh":
            await anyio.sleep_forever()
        return PAIR

    statuses = {"sleep": "503 Service Unavailable", "gate": "429 Too Many Requests", "refresh": "200 OK"}
    caught: list[BaseException] = []

    async def call() -> None:
        with pytest.raises(ClientClosedError, match=f"in its {where} phase") as info:
            await client.get("/later/1")
        caught.append(info.value)

    with FaultServer() as server:
        server.behaviours["later"] = lambda ex: ex.respond(status=statuses[where], headers="Retry-After: 30\r\n")
        client = make(server, tokens=source)
        with anyio.fail_after(100):  # a retry that cannot meet a scope of the caller would not be begun
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                while not client._corridor.live or next(iter(client._corridor.live)) is None:
                    await anyio.sleep(0.001)
                while where != "refresh" and not server.record.requests:
                    await anyio.sleep(0.001)
                await anyio.sleep(0.01)
                await client.aclose()
    assert len(caught) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_closing_that_is_cancelled_has_closed_the_client_all_the_same() -> None:
    with FaultServer() as server:
        client = make(server, retry=RetryPolicy(backoff_initial=60.0))
        call = asyncio.ensure_future(client.get("/status/503"))
        while not server.record.requests:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        closing = asyncio.ensure_future(client.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with anyio.fail_after(5), pytest.raises(ClientClosedError):
            await call
        assert "closed" in repr(client)
        await client.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("path", ["/ok", "/never", "/status/404", "/text", "/garbage"])
async def test_a_call_leaves_nothing_for_the_garbage_collector(path: str) -> None:
    """However it ends: at a thousand calls a second its walks would take more than the calls."""
    with FaultServer() as server:
        server.behaviours["text"] = lambda ex: ex.respond(b"text")
        async with make(server, retry=None) as client:

            async def call() -> None:
                with contextlib.suppress(LayerError):
                    await client.get(path, into=None if path == "/ok" else Any, deadline=0.005)

            for _ in range(3):
                await client.get("/ok")
                await call()
            gc.collect()
            gc.disable()
            try:
                for _ in range(20):
                    await client.get("/ok")
                    await call()
                assert gc.collect() <= 20 * 15  # a connection that is opened anew leaves some, and an error far more
            finally:
                gc.enable()


async def test_a_patient_item_at_a_shut_gate_is_not_burnt_when_its_bulk_is_ended(anyio_backend: str) -> None:
    with FaultServer() as server:
        async with make(server) as client:
            gate_of(client).shut(30)
            outcomes_seen = 0
            with anyio.move_on_after(0.01):
                async with client.bulk(f"/ok/{n}" for n in range(10**6)) as outcomes:
                    async for _ in outcomes:
                        outcomes_seen += 1
    assert outcomes_seen == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_close_that_another_event_loop_refuses_can_be_done_again_at_home() -> None:
    with FaultServer() as server:
        client = make(server)
        await client.get("/ok/1")
        with pytest.raises(ConfigurationError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, client.aclose())
        await client.get("/ok/2")
        await client.aclose()
        assert client.pool.stats.open == 0


async def test_closing_a_client_over_a_transport_of_ones_own_closes_that() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200))
    client = AsyncLayerClient(tokens=PAIR, transport=transport)
    await client.get("/x")
    await client.aclose()
    assert client.http.is_closed


@pytest.fixture(scope="module")
def lines() -> Iterator[tuple[FaultServer, bytes]]:
    """A server with a long answer, which is that."""
    lines = b"a line\n" * 100_000
    with FaultServer() as server:
        server.behaviours["lines"] = lambda ex: ex.respond(lines)
        yield server, lines


@pytest.mark.parametrize("reader", ["aiter_raw", "aiter_bytes", "aiter_text", "aiter_lines"])
@pytest.mark.parametrize("end", ["break", "error", "cancel"])
@pytest.mark.parametrize("limit", [None, 10**7])
async def test_a_stream_that_is_left_half_way_leaves_no_generator_behind(
    reader: str, end: str, limit: int | None, lines: tuple[FaultServer, bytes]
) -> None:
    """trio warns of a generator that the garbage collector finds, and a warning is an error here."""
    server, whole = lines
    async with make(server) as client:
        seen = 0
        with contextlib.suppress(ZeroDivisionError), anyio.CancelScope() as scope:
            async with client.stream("GET", "/lines/1", max_response_bytes=limit) as response:
                async for piece in getattr(response, reader)():
                    seen += len(piece)
                    if end == "error":
                        raise ZeroDivisionError
                    if end == "cancel":
                        scope.cancel()
                        await anyio.sleep_forever()
                    break
        assert 0 < seen < len(whole)
        del response
        gc.collect()
        assert client.pool.stats.in_use == client.pool.stats.open == 0
        assert (await client.get("/ok/1")).status_code == 200


async def test_a_stream_that_another_task_still_reads_is_ended_there() -> None:
    errors: list[BaseException] = []

    async def read(response: httpx.Response) -> None:
        try:
            async for _ in response.aiter_bytes():
                pass
        except APIConnectionError as exc:
            errors.append(exc)

    with FaultServer() as server:
        async with make(server) as client, anyio.create_task_group() as tasks:
            with anyio.fail_after(5):
                async with client.stream("GET", "/stall/1") as response:
                    tasks.start_soon(read, response)
                    for _ in range(20):
                        await anyio.lowlevel.checkpoint()
    assert len(errors) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio warns of the generators that are httpx's own
async def test_an_endless_stream_of_a_transport_of_ones_own_is_left_all_the_same() -> None:
    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield b"more"
                await anyio.lowlevel.checkpoint()

    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Endless()))
    async with AsyncLayerClient(tokens=PAIR, transport=transport) as client:
        with anyio.fail_after(5):
            async with client.stream("GET", "/x") as response:
                async for piece in response.aiter_bytes():
                    assert piece == b"more"
                    break
    assert response.is_closed


async def test_a_response_that_was_streamed_can_be_pickled_once_it_is_read() -> None:
    with FaultServer() as server:
        async with make(server) as client, client.stream("GET", "/ok/1") as response:
            content = await response.aread()
            assert pickle.loads(pickle.dumps(response)).content == content


async def test_a_streamed_response_of_a_class_of_ones_own_stays_one() -> None:
    class Own(httpx.Response):
        pass

    transport = httpx.MockTransport(lambda request: Own(200, content=b"x"))
    async with AsyncLayerClient(tokens=PAIR, transport=transport) as client, client.stream("GET", "/x") as response:
        assert type(response) is Own
        assert await response.aread() == b"x"


# Bodies that come in pieces


class Again:
    """A body that can be had more than once."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces = pieces

    async def __aiter__(self) -> AsyncIterator[Any]:
        for piece in self.pieces:
            await anyio.lowlevel.checkpoint()
            yield piece


PIECES = (
    b"bytes",
    bytearray(b"bytearray"),
    memoryview(b"memoryview"),
    memoryview(b"e_v_e_r_y")[::2],
    memoryview(array.array("i", [1, 2])),
    memoryview(b"abcdef").cast("B", (2, 3)),
    memoryview(b"ghijkl").cast("B", (6, 1)),
    memoryview(array.array("i")),
    b"",
)
WHOLE = b"".join(map(bytes, PIECES))


@pytest.mark.parametrize("framing", [{}, {"Content-Length": str(len(WHOLE))}], ids=["chunked", "length"])
@pytest.mark.parametrize("kind", ["generator", "iterable", "file"])
async def test_pieces_of_a_body_are_framed_by_the_bytes_that_they_have(
    framing: dict[str, str], kind: str, tmp_path: Path
) -> None:
    content: Any = Again(*PIECES) if kind == "iterable" else aiter(Again(*PIECES))
    with FaultServer() as server:
        async with make(server) as client:
            if kind == "file":
                (tmp_path / "body").write_bytes(WHOLE)
                content = await anyio.open_file(tmp_path / "body", "rb")
            response = await client.post("/echo/1", content=content, headers=framing)
            if kind == "file":
                await content.aclose()
    assert response.content == server.record.requests[0].body == WHOLE


@pytest.mark.parametrize("piece", [array.array("i", [1, 2]), "5ecret", 5, None, ["5ecret"]], ids=repr)
@pytest.mark.parametrize("framing", [{}, {"Content-Length": "8"}], ids=["chunked", "length"])
async def test_a_piece_that_is_no_bytes_is_refused_and_leaves_nothing_behind(
    piece: Any, framing: dict[str, str]
) -> None:
    with FaultServer() as server:
        async with make(server) as client:
            with pytest.raises(ConfigurationError, match=f"must be bytes, not {type(piece).__name__}: ") as caught:
                await client.put("/echo/1", content=Again(b"a", piece), headers=framing)
            assert len(caught.value.attempts) <= 1
            assert client.pool.stats.in_use == 0
            assert (await client.put("/echo/2", content=Again(b"a"))).content == b"a"
    assert [request.body for request in server.record.requests if request.body] == [b"a"]


async def test_a_generators_pieces_come_once_and_an_iterables_again() -> None:
    async def twice(request: httpx.Request, call_next: CallNext) -> httpx.Response:
        await call_next(request)
        return await call_next(request)

    with FaultServer() as server:
        async with make(server, middleware=[twice]) as client:
            assert (await client.post("/echo/1", content=Again(b"a"))).content == b"a"
            with pytest.raises(httpx.StreamConsumed):
                await client.post("/echo/2", content=aiter(Again(b"b")))
    assert [request.body for request in server.record.requests if request.body] == [b"a", b"a", b"b"]


async def test_who_iterates_over_the_pieces_of_a_body_can_go_on_with_the_same_iterator() -> None:
    iterator = aiter(Pieces(Again(b"a", b"b")))
    assert await anext(iterator) == b"a"
    assert [piece async for piece in iterator] == [b"b"]


async def test_a_client_without_pacing_has_no_gate_that_could_hear_of_a_quota() -> None:
    with FaultServer() as server:
        server.behaviours["quota"] = lambda ex: ex.respond(
            b"{}", headers="RateLimit-Remaining: 0\r\nRateLimit-Reset: 60\r\n"
        )
        async with make(server, pacing=None) as client:
            for number in range(2):
                with anyio.fail_after(5):
                    assert (await client.get(f"/quota/{number}", into=dict)) == {}
            assert client.pace is None


async def test_a_deadline_that_passes_in_the_queue_says_so() -> None:
    with FaultServer() as server:
        async with make(server, limits=httpx.Limits(max_connections=1)) as client:
            slot = await client.pool.acquire()
            with pytest.raises(DeadlineExceededError) as caught:
                await client.get("/ok/1", deadline=0.01)
            slot.release()
    assert caught.value.phase == "queue"
    assert not caught.value.maybe_processed
    assert not server.record.requests


@pytest.mark.parametrize("has_certificate", [False, True])
async def test_a_server_that_misses_a_certificate_of_ours_is_asked_once(has_certificate: bool) -> None:
    with FaultServer(tls=True, wants_certificate=True) as server:
        context = ssl.create_default_context()
        authority().configure_trust(context)
        if has_certificate:
            authority().issue_cert("client.invalid").configure_cert(context)
        async with make(server, verify=context) as client:
            if has_certificate:
                assert (await client.get("/ok/1")).status_code == 200
                return
            with pytest.raises(APIConnectionError, match="certificate required") as caught:
                await client.get("/ok/1")
            assert len(caught.value.attempts) == 1
    assert not server.record.requests


def half_a_head(ex: Exchange) -> None:
    ex.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    ex.hang()


def drops(ex: Exchange) -> None:
    ex.send(b"HTTP/1.1 200 OK\r\nX: ")
    while not ex.server.stopped.is_set():
        ex.send(b"x")
        ex.pause()


def deaf(ex: Exchange) -> None:
    ex.server.stopped.wait(5)


@pytest.mark.parametrize("is_warm", [False, True], ids=["new connection", "open connection"])
@pytest.mark.parametrize(
    ("method", "path", "timeout"),
    [
        ("POST", "never", None),
        ("PUT", "never", 5),
        ("POST", "half-a-head", 5),
        ("PUT", "drops", 5),
        ("POST", "stall", 5),
        ("PUT", "refuse-early", 5),
        ("POST", "refuse-early", None),
    ],
)
async def test_a_deadline_passes_whatever_the_server_does_and_the_error_tells_what_that_was(
    method: str, path: str, timeout: float | None, is_warm: bool
) -> None:
    """Where the connection is open already it keeps the deadline itself; else a scope does."""
    is_deaf = path == "refuse-early"
    document = "x" * (30_000_000 if is_deaf else 1)
    with FaultServer() as server:
        server.behaviours |= {"half-a-head": half_a_head, "drops": drops, "refuse-early": deaf}
        async with make(server, timeout=httpx.Timeout(timeout)) as client:
            if is_warm:
                await client.get("/ok/1")
            with anyio.fail_after(5), pytest.raises(DeadlineExceededError) as caught:
                await client.request(method, f"/{path}/1", json=document, into=Any, deadline=0.02)
            assert client.pool.stats.in_use == 0
            assert (client.pool.stats.opened, client.pool.stats.open) == (1, 0)
            await client.get("/ok/2")
    error = caught.value
    assert error.phase == ("write" if is_deaf else "read")
    assert f"the deadline of 0.02 s passed in the {error.phase} phase" in str(error)
    assert error.maybe_processed is (method == "POST")
    assert error.attempts == ()
    assert error.__cause__ is None
    assert [request.target for request in server.record.requests if request.method == method] == [f"/{path}/1"]


async def test_a_slot_that_comes_after_the_deadline_is_of_no_use() -> None:
    """The event loop was busy meanwhile, so that nobody could be told."""
    with FaultServer() as server:
        async with make(server, limits=httpx.Limits(max_connections=1)) as client:
            await client.get("/ok/1")
            slot = await client.pool.acquire()
            async with anyio.create_task_group() as tasks:

                async def post() -> None:
                    with pytest.raises(DeadlineExceededError) as caught:
                        await client.post("/ok/2", json=1, deadline=0.004)
                    assert caught.value.phase == "queue"
                    assert not caught.value.maybe_processed

                tasks.start_soon(post)
                await anyio.wait_all_tasks_blocked()
                time.sleep(0.006)
                slot.release()
            assert (client.pool.stats.in_use, client.pool.stats.idle) == (0, 1)
    assert [request.method for request in server.record.requests] == ["GET"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_time_in_the_queue_counts_for_the_attempt_that_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float | None] = []
    send = Lane.send

    async def spy(self: Lane, sent: Any, call: Any, deadline: float | None) -> None:
        left.append(deadline)
        await send(self, sent, call, deadline)

    monkeypatch.setattr(Lane, "send", spy)
    with FaultServer() as server:
        async with make(server, limits=httpx.Limits(max_connections=1)) as client:
            await client.get("/ok/1")
            left.clear()
            slot = await client.pool.acquire()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(functools.partial(client.get, "/ok/2", deadline=10))
                for _ in range(5):
                    await anyio.sleep(0.005)
                slot.release()
            (seconds,) = left
    assert seconds is not None
    assert seconds <= 10 - 0.025


async def test_the_time_of_an_attempt_without_a_scope_counts_for_what_follows_it(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt takes half of the call's time, and its retry has what is left."""
    asked: list[float] = []
    after = Scopes.after

    def spy(self: Scopes, seconds: Any) -> Any:
        asked.append(seconds)
        return after(self, seconds)

    monkeypatch.setattr(Scopes, "after", spy)
    with FaultServer() as server:

        def slow(ex: Exchange) -> None:
            for _ in range(5):
                ex.pause(0.005)
            ex.respond(status="503 Service Unavailable")
            server.behaviours["slow"] = Exchange.hang

        server.behaviours["slow"] = slow
        async with make(server) as client:
            await client.get("/ok/1")
            asked.clear()
            with anyio.fail_after(5), pytest.raises(DeadlineExceededError) as caught:
                await client.get("/slow/1", into=Any, deadline=0.05)
    assert [attempt.status_code for attempt in caught.value.attempts] == [503]
    (seconds,) = asked
    if anyio_backend == "asyncio":  # on trio a scope bounds the first attempt too
        assert seconds <= 0.025


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("way", ["verb", "stream", "cut", "codings", "redirect"])
async def test_an_answer_that_cannot_be_used_says_that_the_server_may_have_acted(method: str, way: str) -> None:
    codings = ", ".join(["gzip"] * 6)
    with FaultServer() as server:
        server.behaviours["created"] = lambda ex: ex.respond(
            b"x" * 999, status="201 Created", headers=f"Content-Encoding: {codings}\r\n" if way == "codings" else ""
        )
        server.behaviours["moved"] = lambda ex: ex.respond(status="303 See Other", headers="Location: /ok/1\r\n")
        async with make(server) as client:

            async def call() -> None:
                if way == "redirect":
                    await client.request(method, "/moved/1", json={}, into=dict)
                elif way == "codings":
                    await client.request(method, "/created/1", json={})
                elif way == "verb":
                    await client.request(method, "/created/1", json={}, max_response_bytes=10)
                else:
                    path, limit = ("/created/1", 10) if way == "stream" else ("/truncate-length/1", 10**6)
                    async with client.stream(method, path, json={}, max_response_bytes=limit) as response:
                        await response.aread()

            with pytest.raises(LayerError) as caught:
                await call()
            assert client.pool.stats.in_use == 0
    assert caught.value.maybe_processed is (method == "POST")
    assert len(caught.value.attempts) == 1
    assert caught.value.attempts[0].elapsed > 0
