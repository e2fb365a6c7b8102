"""One HTTP/1.1 connection of ours on asyncio: over real sockets, cancelled at every step, and cheap to keep."""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, closing, contextmanager, suppress
from typing import Any

import anyio
import httpcore
import httpx
import pytest

from benchmarks.origin import running_origin
from layer_async import _wire
from layer_async._exchange import DeadlinePassed, ExchangeRecord
from layer_async._wire import Answer, Proxy, WireConnection, is_on_asyncio

from .faultserver import Exchange, FaultServer, client_context, server_context
from .test_siege_pool import acting_at, open_sockets

pytestmark = pytest.mark.anyio
Fields = list[tuple[bytes, bytes]]
RESET = b"\1\0\0\0\0\0\0\0"  # what SO_LINGER takes


@pytest.fixture
def anyio_backend() -> str:
    """This connection is asyncio's alone."""
    return "asyncio"


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultServer]:
    with FaultServer(tls=request.param == "https") as server:
        yield server


@contextmanager
def connection_to(server: FaultServer, **options: Any) -> Iterator[WireConnection]:
    options.setdefault("tls", client_context() if server.tls else None)
    connection = WireConnection("127.0.0.1", server.port, **options)
    try:
        yield connection
    finally:
        connection.close()
        assert connection._sock is None


async def exchange(
    connection: WireConnection,
    path: str,
    *,
    method: str = "GET",
    body: bytes | AsyncIterator[bytes] = b"",
    headers: Fields | None = None,
    record: ExchangeRecord | None = None,
    timeout: dict[str, float | None] | None = None,
) -> Answer:
    fields = [(b"Host", b"127.0.0.1"), *(headers or [])]
    if isinstance(body, bytes) and body and not headers:
        fields.append((b"Content-Length", b"%d" % len(body)))
    return await connection.exchange(
        method.encode(), path.encode(), fields, body, record or ExchangeRecord(), timeout or {}
    )


async def call(connection: WireConnection, path: str, **options: Any) -> bytes:
    return b"".join([piece async for piece in await exchange(connection, path, **options)])


def facts(record: ExchangeRecord) -> tuple[int | None, bool | None, bool | None, bool | None, str]:
    return record.bytes_written, record.response_started, record.head_received, record.reused, record.phase


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.001)


# The record


async def test_a_write_that_fails_says_how_much_went_out_and_what_the_server_said(server: FaultServer) -> None:
    for body in (b"", b"x" * 200_000):
        record = ExchangeRecord()
        with connection_to(server) as connection:
            await call(connection, "/ok/1")
            assert connection._sock is not None
            connection._sock.shutdown(socket.SHUT_WR)
            with pytest.raises(httpcore.RemoteProtocolError):
                await call(connection, "/ok/2", record=record, body=body, method="PUT")
        assert facts(record) == (0, False, False, True, "read")


# Whole exchanges


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_every_method_is_sent(server: FaultServer, method: str) -> None:
    with connection_to(server) as connection:
        assert await call(connection, "/echo", method=method, body=b"body") == b"body"
    assert server.record.requests[0].method == method


async def test_a_body_that_came_with_its_head_is_there_at_once(server: FaultServer) -> None:
    with connection_to(server) as connection:
        answer = await exchange(connection, "/ok/1")
        assert (answer.status, answer.reason, answer.http_version) == (200, b"OK", b"HTTP/1.1")
        assert answer.headers == [(b"Content-Length", b"5")]
        assert answer.body == b"/ok/1"
        assert await answer.read() == b""
        assert connection.is_reusable()
        await answer.aclose()
        assert connection.is_reusable()


async def test_a_body_is_read_piece_by_piece(server: FaultServer) -> None:
    with connection_to(server) as connection:
        answer = await exchange(connection, "/chunked")
        assert answer.body is None
        assert not connection.is_reusable()
        pieces = []
        while piece := await answer.read():
            pieces.append(piece)
        assert b"".join(pieces) == b"onetwothree"
        assert connection.is_reusable()
        assert await answer.read() == b""


async def test_an_answer_that_is_left_early_costs_its_connection(server: FaultServer) -> None:
    with connection_to(server) as connection:
        answer = await exchange(connection, "/large/3000000")
        assert answer.body is None
        await answer.aclose()
        await answer.aclose()
        assert connection._is_closed
        assert await answer.read() == b""


async def test_an_answer_never_reads_from_a_later_exchange(server: FaultServer) -> None:
    with connection_to(server) as connection:
        first = await exchange(connection, "/chunked")
        assert b"".join([piece async for piece in first]) == b"onetwothree"
        second = await exchange(connection, "/stall")
        first._connection = connection
        assert await first.read() == b""
        first._connection = connection
        await first.aclose()
        assert not connection._is_closed
        await second.aclose()


async def test_one_exchange_at_a_time(server: FaultServer) -> None:
    with connection_to(server) as connection:
        await exchange(connection, "/stall")
        with pytest.raises(RuntimeError, match="one exchange"):
            await exchange(connection, "/ok/2")
    with connection_to(server) as connection:
        answer = await exchange(connection, "/stall")
        assert await answer.read() == b"half."
        async with anyio.create_task_group() as group:

            async def read() -> None:
                with pytest.raises(httpcore.ReadError):
                    await answer.read()

            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match="two tasks"):
                await connection._read(connection._serial, None)
            connection.close()


async def test_httpcores_objects_go_in_and_out(server: FaultServer) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        yield b""
        yield b"two"

    contents: list[tuple[Any, dict[str, str]]] = [
        (httpx.ByteStream(b"bytes"), {"Content-Length": "5"}),
        (b"bytes", {"Content-Length": "5"}),
        (pieces(), {"Transfer-Encoding": "chunked"}),
        (pieces(), {"Content-Length": "6"}),
        (None, {}),
    ]
    with connection_to(server) as connection:
        for content, headers in contents:
            headers["Host"] = "x"
            request = httpcore.Request("PUT", f"{server.url}/echo", headers=[*headers.items()], content=content)
            response = await connection.handle(request, ExchangeRecord())
            async with aclosing(response):
                assert await response.aread() in (b"bytes", b"onetwo", b"")
            assert (response.status, response.extensions["http_version"]) == (200, b"HTTP/1.1")
            assert response.extensions["reason_phrase"] == b"OK"
            assert connection.is_reusable()
        stream = response.extensions["network_stream"]
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
        assert stream.get_extra_info("client_addr")[0] == "127.0.0.1"
        assert isinstance(stream.get_extra_info("socket"), socket.socket)
        assert stream.get_extra_info("is_readable") is False
        assert stream.get_extra_info("unheard of") is None
        assert (stream.get_extra_info("ssl_object") is not None) is server.tls
        assert "open, idle" in repr(connection)
        await stream.aclose()
        assert stream.get_extra_info("client_addr") is None
        assert stream.get_extra_info("is_readable") is True
        assert "closed, idle" in repr(connection)
    assert server.record.connections == 1


async def test_what_is_no_request_is_refused_before_anything_is_opened() -> None:
    with FaultServer() as server, connection_to(server) as connection:
        record = ExchangeRecord()
        with pytest.raises(httpcore.LocalProtocolError, match="illegal characters") as caught:
            await call(connection, "/ok", headers=[(b"Token1", b"s3cret\r\nX: y")], record=record)
        assert "s3cret" not in str(caught.value)
        assert record.bytes_written == 0
    assert server.record.connections == 0


@pytest.mark.parametrize("length", [b"3", b"9"])
async def test_a_body_of_another_length_than_announced_is_an_error(server: FaultServer, length: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"12345"

    for body in (b"12345", pieces()):
        with connection_to(server) as connection, pytest.raises(httpcore.LocalProtocolError, match="body"):
            await call(connection, "/echo", method="PUT", body=body, headers=[(b"Content-Length", length)])


# When a connection serves again


async def test_what_the_loop_has_not_told_yet_is_noticed(server: FaultServer) -> None:
    with connection_to(server) as connection:
        await call(connection, "/ok/1")
        assert connection.is_alive()
        server.drop_connections()
        while server.open_connections:  # without a turn of the loop
            time.sleep(0.0005)
        assert not connection.is_alive()
        with pytest.raises(httpcore.ConnectError, match="closed on this side"):
            await call(connection, "/ok/2")


async def test_a_request_that_asks_to_close_is_the_last(server: FaultServer) -> None:
    with connection_to(server) as connection:
        await call(connection, "/ok/1", headers=[(b"Connection", b"close")])
        assert not connection.is_reusable()


# Bodies that break off


@pytest.mark.parametrize("path", ["truncate-length", "truncate-chunked", "truncate-reset"])
async def test_a_body_that_was_cut_is_an_error_each_time_it_is_read(server: FaultServer, path: str) -> None:
    with connection_to(server) as connection:
        answer = await exchange(connection, f"/{path}")
        got: list[bytes] = []

        async def read_on() -> None:
            while piece := await answer.read():
                got.append(piece)

        for _ in range(2):
            with pytest.raises((httpcore.RemoteProtocolError, httpcore.ReadError)):
                await read_on()
        assert b"".join(got) == b"half."
        assert not connection.is_reusable()


async def test_a_body_that_ended_while_nobody_looked_is_all_there(server: FaultServer) -> None:
    def slowly(ex: Exchange) -> None:
        ex.send(b"HTTP/1.1 200 OK\r\n\r\n")
        ex.pause()
        ex.send(b"whole")
        ex.finish()

    server.behaviours["slowly"] = slowly
    with connection_to(server) as connection:
        answer = await exchange(connection, "/slowly")
        await until(lambda: connection._is_closed)
        assert b"".join([piece async for piece in answer]) == b"whole"
        assert not connection.is_reusable()


async def test_what_is_not_http_is_an_error(server: FaultServer) -> None:
    for path in ("garbage", "upgrade"):
        with connection_to(server) as connection, pytest.raises(httpcore.RemoteProtocolError):
            await call(connection, f"/{path}")


# Flow


async def test_a_reader_that_is_slow_stops_the_server(server: FaultServer) -> None:
    sent: list[int] = []

    def endless(ex: Exchange) -> None:
        ex.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sum(sent) < 40_000_000:
            ex.send(b"%x\r\n%b\r\n" % (100_000, b"x" * 100_000))
            sent.append(100_000)
        ex.send(b"0\r\n\r\n")

    server.behaviours["endless"] = endless
    with connection_to(server) as connection:
        answer = await exchange(connection, "/endless")
        await until(lambda: connection._is_paused)
        assert connection._reader.unread < _wire.HIGH_WATER + 2 * _wire.RECEIVE
        await anyio.sleep(0.005)
        assert sum(sent) < 40_000_000
        assert sum([len(piece) async for piece in answer]) == 40_000_000
        assert connection.is_reusable()


async def endless() -> AsyncIterator[bytes]:
    for _ in range(1000):
        yield b"x" * 64_000


def take_nothing(ex: Exchange) -> None:
    ex.server.stopped.wait(5)


async def all_at_once() -> AsyncIterator[bytes]:
    yield b"x" * 64_000_000


BODIES: list[Callable[[], bytes | AsyncIterator[bytes]]] = [lambda: b"x" * 64_000_000, endless, all_at_once]


@pytest.mark.parametrize("make", BODIES)
@pytest.mark.parametrize("code", ["401 Unauthorized", "413 Content Too Large"])
async def test_a_refusal_in_the_middle_of_an_upload_is_delivered_at_once(
    server: FaultServer, code: str, make: Callable[[], bytes | AsyncIterator[bytes]]
) -> None:
    """The server answers and takes nothing more: neither the upload's end nor a timeout is waited for."""

    def refuse(ex: Exchange) -> None:
        ex.respond(b"no", status=code)
        ex.server.stopped.wait(10)

    server.behaviours["refuse-early"] = refuse
    record = ExchangeRecord()
    headers = [(b"Content-Length", b"64000000")]
    with connection_to(server) as connection, anyio.fail_after(10):
        answer = await exchange(connection, "/refuse-early", method="PUT", body=make(), headers=headers, record=record)
        assert (answer.status, answer.body) == (int(code[:3]), b"no")
        assert not connection.is_reusable()
    assert 0 < (record.bytes_written or 0) < 64_000_000


async def test_a_refusal_wakes_an_upload_that_waits_for_the_server_to_take_more(server: FaultServer) -> None:
    is_stuck = threading.Event()

    def refuse(ex: Exchange) -> None:
        is_stuck.wait(10)
        ex.respond(b"no", status="413 Content Too Large")
        ex.server.stopped.wait(10)

    server.behaviours["refuse-early"] = refuse
    with connection_to(server) as connection, anyio.fail_after(10):
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await until(lambda: connection._waiter is not None and connection._wants == _wire.DRAINED)
                is_stuck.set()

            group.start_soon(watch)
            answer = await exchange(connection, "/refuse-early", method="PUT", body=b"x" * 64_000_000)
        assert (answer.status, answer.body) == (413, b"no")


@pytest.mark.parametrize("make", [lambda: b"x" * 6_400_000, lambda: first(100)])
async def test_a_success_that_begins_early_does_not_end_an_upload(server: FaultServer, make: Callable[[], Any]) -> None:
    with connection_to(server) as connection:
        body = await call(
            connection, "/accept-early", method="PUT", body=make(), headers=[(b"Content-Length", b"6400000")]
        )
        assert body == b"all of it"


async def first(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 64_000


async def test_large_uploads_arrive_whole(server: FaultServer) -> None:
    body = os.urandom(3_000_000)

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:2_000_000]
        for start in range(2_000_000, 3_000_000, 20_000):
            yield body[start : start + 20_000]

    chunked = [(b"Transfer-Encoding", b"chunked")]
    with connection_to(server) as connection:
        assert await call(connection, "/echo", method="POST", body=body) == body
        assert await call(connection, "/echo", method="POST", body=body, headers=chunked) == body
        assert await call(connection, "/echo", method="POST", body=pieces(), headers=chunked) == body
        assert connection.is_reusable()
    assert server.record.connections == 1


async def test_an_upload_that_never_waits_lets_others_run_all_the_same(server: FaultServer) -> None:
    ran: list[None] = []
    seen: list[int] = []

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x"
        seen.append(len(ran))

    async with anyio.create_task_group() as group:
        with connection_to(server) as connection:
            await call(connection, "/ok")

            async def note() -> None:
                ran.append(None)

            group.start_soon(note)
            await call(connection, "/echo", method="PUT", body=pieces(), headers=[(b"Content-Length", b"40")])
    assert seen == [1]


async def test_what_makes_a_body_is_closed_when_the_request_ends_before_it(server: FaultServer) -> None:
    closed: list[bool] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            yield b"12345"
            raise LookupError("mine")
        finally:
            closed.append(True)

    with connection_to(server) as connection:
        with pytest.raises(LookupError, match="mine"):
            await call(connection, "/echo", method="PUT", body=pieces(), headers=[(b"Content-Length", b"9")])
        assert connection._is_closed

    class Plain:
        def __aiter__(self) -> Plain:
            return self

        async def __anext__(self) -> bytes:
            return b"x" * 10

    body: Any = Plain()
    with connection_to(server) as connection, pytest.raises(httpcore.LocalProtocolError):
        await call(connection, "/echo", method="PUT", body=body, headers=[(b"Content-Length", b"9")])
    assert closed == [True]


# Timeouts


async def test_each_wait_has_its_timeout(server: FaultServer) -> None:
    with connection_to(server) as connection, pytest.raises(httpcore.ReadTimeout, match=r"0\.01 s"):
        await call(connection, "/never", timeout={"read": 0.01})
    with connection_to(server) as connection:
        await call(connection, "/ok", timeout={"read": 30.0})
        with pytest.raises(httpcore.ReadTimeout):
            await call(connection, "/stall", timeout={"read": 0.01})
        assert connection._timer is None


async def test_a_deadline_passes_though_the_socket_takes_all_of_the_body(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices: list[int] = []

    def push(self: WireConnection, data: bytes | memoryview) -> None:
        slices.append(len(data))
        if len(slices) == 4:
            self._deadline = 0.0

    with connection_to(server) as connection:
        await call(connection, "/ok")
        monkeypatch.setattr(WireConnection, "_push", push)
        fields = [(b"Host", b"127.0.0.1"), (b"Content-Length", b"1000000")]
        with pytest.raises(DeadlinePassed):
            await connection.exchange(b"PUT", b"/echo", fields, b"x" * 1_000_000, ExchangeRecord(), {}, deadline=60)
    assert slices[1:] == [64 * 1024] * 3


async def test_a_deadline_is_that_of_the_head_and_not_of_the_body(server: FaultServer) -> None:
    """Who reads that has bounds of his own."""
    with connection_to(server) as connection:
        await call(connection, "/ok")
        answer = await connection.exchange(
            b"GET", b"/stall", [(b"Host", b"127.0.0.1")], b"", ExchangeRecord(), {"read": 0.01}, deadline=5
        )
        assert connection._deadline == math.inf
        assert await answer.read() == b"half."
        with pytest.raises(httpcore.ReadTimeout):
            await answer.read()


async def test_a_timeout_counts_from_the_last_byte(server: FaultServer) -> None:
    def drip(ex: Exchange) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ndrops":
            ex.send(bytes([byte]))
            ex.pause(0.003)

    server.behaviours["drip"] = drip
    with connection_to(server) as connection:
        assert await call(connection, "/drip", timeout={"read": 0.1}) == b"drops"


async def test_a_timer_that_nobody_needs_any_more_ends_by_itself(server: FaultServer) -> None:
    with connection_to(server) as connection:
        await call(connection, "/ok", timeout={"read": 0.05})
        await until(lambda: connection._timer is None)
        assert connection.is_reusable()
        await call(connection, "/ok", timeout={"read": 0.05})
        await call(connection, "/ok", timeout={"read": None})
        connection._on_timer()


@pytest.mark.parametrize("make", BODIES)
async def test_a_server_that_takes_no_more_of_an_upload_ends_in_a_timeout(
    server: FaultServer, make: Callable[[], bytes | AsyncIterator[bytes]]
) -> None:
    server.behaviours["refuse-early"] = take_nothing
    headers = [(b"Content-Length", b"64000000")]
    with connection_to(server) as connection, pytest.raises(httpcore.WriteTimeout):
        await call(
            connection, "/refuse-early", method="PUT", body=make(), headers=headers, timeout={"write": 0.01, "read": 5}
        )


# TLS


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[FaultServer]:
    """A server that does one thing to the first who connects."""

    def serve() -> None:
        with suppress(OSError):
            sock, _ = listener.accept()
            with sock:
                answer(sock)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener, FaultServer(tls=True, accepting=False) as server:
        server.port = listener.getsockname()[1]
        thread = threading.Thread(target=serve)
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


async def test_a_handshake_that_fails_is_a_connect_error() -> None:
    for answer in (
        lambda sock: sock.recv(65536),
        lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    ):
        with listening(answer) as server, connection_to(server) as connection:
            with pytest.raises(httpcore.ConnectError) as caught:
                await call(connection, "/ok")
            assert isinstance(caught.value.__cause__, ssl.SSLError)  # which of them differs with OpenSSL


async def test_a_handshake_that_is_reset_is_a_connect_error() -> None:
    def reset(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    with listening(reset) as server, connection_to(server) as connection:
        with pytest.raises(httpcore.ConnectError) as caught:
            await call(connection, "/ok")
        assert isinstance(caught.value.__cause__, httpcore.ReadError)


async def test_an_answer_that_is_reset_while_the_loop_is_busy_fails_at_once(server: FaultServer) -> None:
    """The loop finds what came and the reset in one; uvloop tells of that once."""

    def begin(ex: Exchange) -> None:
        ex.send(b"HTTP/1.1 20")
        ex.reset()

    def be_busy() -> None:
        while not any(events & select.POLLERR for _, events in connection._poll.poll(5000)):
            pass

    server.behaviours["begin"] = begin
    with connection_to(server) as connection:
        await call(connection, "/ok")
        asyncio.get_running_loop().call_soon(be_busy)
        with anyio.fail_after(5), pytest.raises(httpcore.ReadError):
            await call(connection, "/begin")


async def test_the_end_of_a_body_without_length_is_no_end_where_a_write_was_told_of_a_reset() -> None:
    """The kernel tells of it once: who reads finds an end like any other."""

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf of")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        while not any(events & select.POLLERR for _, events in connection._poll.poll(5000)):
            pass
        yield b"y"

    with listening(serve) as server:
        server.tls = False
        with connection_to(server) as connection, pytest.raises(httpcore.ReadError):
            await call(connection, "/", method="POST", body=body(), headers=[(b"Transfer-Encoding", b"chunked")])


async def test_an_answer_that_is_there_when_the_time_is_up_is_taken(server: FaultServer) -> None:
    """On uvloop timers ring before it looks at what came while another reader kept it busy."""

    def be_busy() -> None:
        loop.remove_reader(mine)
        connection._poll.poll(5000)
        time.sleep(0.008)

    def late(ex: Exchange) -> None:
        ex.pause(0.003)
        ex.respond(b"late")

    server.behaviours["late"] = late
    loop = asyncio.get_running_loop()
    mine, other = socket.socketpair()
    with mine, other, connection_to(server) as connection:
        await call(connection, "/ok/1")
        loop.add_reader(mine, be_busy)
        other.send(b"x")
        assert await call(connection, "/late", timeout={"read": 0.008}) == b"late"


async def test_a_certificate_that_is_refused_can_be_found_behind_the_error() -> None:
    with FaultServer(tls=True) as server:
        with connection_to(server, tls=ssl.create_default_context()) as connection:
            with pytest.raises(httpcore.ConnectError, match="certificate verify failed") as caught:
                await call(connection, "/ok")
            assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        with (
            connection_to(server, server_hostname="elsewhere.invalid") as connection,
            pytest.raises(httpcore.ConnectError, match="certificate"),
        ):
            await call(connection, "/ok")
        with connection_to(server, server_hostname="origin.invalid") as connection:
            assert await call(connection, "/ok") == b"/ok"
        with connection_to(server, server_hostname=".") as connection, pytest.raises(httpcore.ConnectError):
            await call(connection, "/ok")


async def test_what_tls_has_to_say_by_itself_goes_out() -> None:
    """As the answer to a key update does; here, a request that was encrypted and not sent."""
    hidden = b"GET /ok/hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    with FaultServer(tls=True) as server, connection_to(server) as connection:
        await call(connection, "/ok")
        assert connection._tls is not None
        connection._tls.object.write(hidden)
        connection._decrypt(connection._tls, b"\x17")
        await until(lambda: len(server.record.requests) == 2)
    for is_lower in (False, True):
        with FaultServer(tls=True) as server:
            connection = proxied(server, tls=True)
            await call(connection, "/ok")
            tls, lower = connection._tls, connection._lower
            assert tls is not None
            assert lower is not None
            tls.object.write(hidden)
            if is_lower:
                lower.object.write(tls.outgoing.read())
            connection._decrypt(tls, b"")
            await until(lambda: len(server.record.requests) == 3)
            connection.close()


async def test_the_goodbye_of_a_proxy_is_none_of_the_origins() -> None:
    def leave(ex: Exchange) -> None:
        ex.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        pipe: Any = ex.pipe
        pipe.lower.goodbye()
        ex.close()

    with FaultServer(tls=True) as server:
        server.behaviours["leave"] = leave
        with pytest.raises(httpcore.RemoteProtocolError, match="cut"):
            await call(proxied(server, tls=True), "/leave")


async def test_tls_that_cannot_be_written_is_a_failed_write() -> None:
    with FaultServer(tls=True) as server, connection_to(server) as connection:
        await call(connection, "/ok")
        assert connection._tls is not None
        with suppress(ssl.SSLError):
            connection._tls.object.unwrap()  # TLS takes no more
        record = ExchangeRecord()
        with pytest.raises((httpcore.RemoteProtocolError, httpcore.ReadTimeout)):
            await call(connection, "/ok", record=record, timeout={"read": 0.01})
        assert record.bytes_written == 0


# Proxies


def proxied(proxy: FaultServer, *, tls: bool, fields: Fields | None = None) -> WireConnection:
    return WireConnection(
        "origin.invalid",
        443 if tls else 80,
        tls=client_context() if tls else None,
        proxy=Proxy("127.0.0.1", proxy.port, tls=client_context() if proxy.tls else None, fields=fields or []),
    )


@pytest.mark.parametrize("tls", [False, True])
async def test_a_proxy_forwards_or_tunnels(server: FaultServer, tls: bool) -> None:
    connection = proxied(server, tls=tls, fields=[(b"Proxy-Authorization", b"Basic eDp5")])
    record = ExchangeRecord()
    for number in range(3):
        body = await call(connection, f"/ok/{number}", record=record)
        assert body == (f"/ok/{number}" if tls else f"http://origin.invalid/ok/{number}").encode()
        assert connection.is_reusable()
        assert connection.is_alive()
    assert record.reused
    big = os.urandom(500_000)
    assert await call(connection, "/echo", method="PUT", body=big) == big
    if tls:
        with pytest.raises(httpcore.RemoteProtocolError):
            await call(connection, "/truncate-length")
    connection.close()
    assert server.record.connections == 1
    assert server.record.tunnels == ["origin.invalid:443"] * tls
    assert server.record.requests[0].headers["proxy-authorization"] == "Basic eDp5"
    if tls:
        assert "proxy-authorization" not in server.record.requests[1].headers


async def test_the_end_of_a_tunnel_that_the_origin_did_not_announce_is_a_cut() -> None:
    with FaultServer(tls=True) as proxy:
        connection = proxied(proxy, tls=True)
        with pytest.raises(httpcore.RemoteProtocolError, match="cut"):
            await call(connection, "/until-cut")
        connection = proxied(proxy, tls=True)
        assert await call(connection, "/until-end") == b"whole"
        connection.close()


async def test_a_tunnel_that_is_refused_is_a_proxy_error_and_nothing_was_written() -> None:
    with FaultServer(refuse_tunnels="407 Proxy Authentication Required") as proxy:
        record = ExchangeRecord()
        with pytest.raises(httpcore.ProxyError, match="407 Proxy Authentication Required"):
            await call(proxied(proxy, tls=True), "/ok", method="POST", body=b"x", record=record)
        assert facts(record) == (0, False, False, False, "connect")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", httpcore.RemoteProtocolError),
        (b"nonsense", httpcore.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", httpcore.RemoteProtocolError),
        (None, httpcore.ConnectTimeout),
    ],
)
async def test_a_proxy_that_talks_nonsense_or_nothing(answer: bytes | None, error: type[Exception]) -> None:
    done = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        if answer is None:
            done.wait(5)
        else:
            sock.sendall(answer)

    with listening(serve) as proxy:
        proxy.tls = False
        record = ExchangeRecord()
        with pytest.raises(error):
            await call(
                proxied(proxy, tls=True), "/ok", record=record, timeout={"connect": 0.5 if answer is not None else 0.01}
            )
        assert facts(record)[:2] == (0, False)
        done.set()


async def test_a_field_that_a_proxy_cannot_get_is_refused_without_quoting_it() -> None:
    with FaultServer() as proxy:
        with pytest.raises(httpcore.LocalProtocolError) as caught:
            await call(proxied(proxy, tls=True, fields=[(b"X", b"s3cret\n")]), "/ok")
        assert "s3cret" not in str(caught.value)


def test_an_address_in_brackets_is_one() -> None:
    async def main() -> None:
        connection = WireConnection("::1", 8080, tls=None, proxy=Proxy("::1", 1, tls=None))
        assert connection.prefix == b"http://[::1]:8080"
        assert repr(connection) == "<WireConnection [::1]:8080 [not open, idle, exchange 0]>"

    asyncio.run(main())


# Closing


async def test_closing_wakes_up_whoever_waits_and_the_descriptor_is_free_at_once(server: FaultServer) -> None:
    with connection_to(server) as connection:
        async with anyio.create_task_group() as group:

            async def close() -> None:
                await until(lambda: server.record.requests)
                await anyio.wait_all_tasks_blocked()
                number = connection._fd
                connection.close()
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(number)
                connection.close()

            group.start_soon(close)
            with pytest.raises(httpcore.ReadError, match="closed on this side"):
                await call(connection, "/never")


@pytest.mark.parametrize("moment", ["connecting", "shaking hands"])
async def test_closing_ends_the_opening(moment: str) -> None:
    done = threading.Event()
    hang = FaultServer(tls=True, accepting=False) if moment == "connecting" else None
    with hang or listening(lambda sock: done.wait(5)) as server, connection_to(server) as connection:
        async with anyio.create_task_group() as group:

            async def close() -> None:
                await until(lambda: connection._dialer or connection._sock)
                await anyio.wait_all_tasks_blocked()
                connection.close()

            group.start_soon(close)
            with pytest.raises(httpcore.ConnectError):
                await call(connection, "/ok")
        done.set()


async def test_closing_in_the_middle_of_an_upload_is_a_read_error(server: FaultServer) -> None:
    server.behaviours["refuse-early"] = take_nothing
    with connection_to(server) as connection:
        async with anyio.create_task_group() as group:

            async def close() -> None:
                await until(lambda: connection._outbox)
                await anyio.wait_all_tasks_blocked()
                connection.close()

            group.start_soon(close)
            with pytest.raises(httpcore.ReadError, match="closed on this side"):
                await call(connection, "/refuse-early", method="PUT", body=b"x" * 64_000_000)


async def test_an_abandoned_connection_has_its_descriptor_closed_and_nothing_else(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = WireConnection("127.0.0.1", server.port, tls=client_context() if server.tls else None)
    await call(connection, "/ok")
    loop, number = connection._loop, connection._fd
    monkeypatch.setattr(connection, "_loop", None)
    connection.abandon()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    loop.remove_reader(number)


async def test_a_connection_that_is_being_opened_can_be_abandoned() -> None:
    with FaultServer(accepting=False) as server:
        connection = WireConnection("127.0.0.1", server.port, tls=None)
        task = asyncio.create_task(call(connection, "/ok"))
        await until(lambda: connection._dialer and connection._dialer.sockets)
        connection.abandon()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("why", ["loop", "process"])
def test_closing_after_the_loop_or_in_another_process_touches_the_descriptor_only(
    server: FaultServer, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> WireConnection:
        connection = WireConnection("127.0.0.1", server.port, tls=client_context() if server.tls else None)
        await call(connection, "/ok", timeout={"read": 10.0})
        if why == "process":
            connection._pid = -1
            connection._loop.remove_reader(connection._fd)
            connection.close()
        return connection

    connection = asyncio.run(main())
    connection.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(connection._fd)


@pytest.mark.parametrize("timeout", [{"read": 10.0}, {}])
async def test_a_connection_that_is_lost_is_closed_by_the_collector_with_a_warning(
    server: FaultServer, timeout: dict[str, float | None]
) -> None:
    connection = WireConnection("127.0.0.1", server.port, tls=client_context() if server.tls else None)
    await call(connection, "/ok", timeout=timeout)
    number = connection._fd
    with pytest.warns(ResourceWarning, match="unclosed <WireConnection"):
        del connection
    await anyio.sleep(0)
    await anyio.sleep(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_connection_that_is_lost_with_its_loop_is_closed_too(server: FaultServer) -> None:
    async def main() -> WireConnection:
        connection = WireConnection("127.0.0.1", server.port, tls=client_context() if server.tls else None)
        await call(connection, "/ok")
        return connection

    connection = asyncio.run(main())
    number = connection._fd
    with pytest.warns(ResourceWarning, match="unclosed"):
        del connection
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


async def test_events_for_a_connection_that_is_gone_are_nothing(server: FaultServer) -> None:
    connection = WireConnection("127.0.0.1", server.port, tls=client_context() if server.tls else None)
    await call(connection, "/ok")
    reference = connection._ref
    connection._outbox = b"x"
    connection._emit(b"y")
    assert connection._outbox == b"xy"
    sock, connection._sock = connection._sock, Moody(connection._sock, [])  # type: ignore[assignment, arg-type]
    connection._sock.send = lambda data: 1  # type: ignore[union-attr, method-assign]
    connection._on_writable()
    assert connection._outbox == b"y"
    connection._sock = sock
    connection.close()
    with pytest.raises(httpcore.ReadError, match="closed on this side"):
        await connection._wait(0, None)
    connection._on_readable()
    connection._on_writable()
    connection._emit(b"x")
    connection._pause()
    connection._go_on()
    del connection
    gc.collect()
    assert reference() is None
    for event in (_wire._on_readable, _wire._on_writable, _wire._on_timer):
        event(reference)


class Moody:
    """A socket that has its moments."""

    def __init__(self, sock: socket.socket, errors: list[OSError]) -> None:
        self.sock = sock
        self.errors = errors

    def _raise(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    def send(self, data: bytes) -> int:
        self._raise()
        return self.sock.send(data)

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size)

    def close(self) -> None:
        self.sock.close()


async def test_a_socket_that_is_not_ready_or_breaks_later(server: FaultServer) -> None:
    for errors, is_written in (
        ([BlockingIOError(), InterruptedError()], True),
        ([BlockingIOError(), BrokenPipeError(errno.EPIPE, "broken")], False),
    ):
        with connection_to(server) as connection:
            await call(connection, "/ok/1")
            sock: Any = connection._sock
            moody: Any = Moody(sock, list(errors))
            connection._sock = moody
            record = ExchangeRecord()
            if is_written:
                assert await call(connection, "/ok/2", record=record) == b"/ok/2"
                assert record.bytes_written == len(b"GET /ok/2 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            else:
                with pytest.raises(httpcore.ReadTimeout):
                    await call(connection, "/ok/2", record=record, timeout={"read": 0.01, "write": 5.0})
                assert record.bytes_written == 0


# Cancellation


async def streamed(connection: WireConnection) -> None:
    answer = await exchange(connection, "/chunked")
    assert b"".join([piece async for piece in answer]) == b"onetwothree"


async def requested(connection: WireConnection) -> None:
    assert await call(connection, "/slow/1") == b"/slow/1"


async def uploaded(connection: WireConnection) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(12):
            await asyncio.sleep(0)
            yield b"x" * 50_000

    headers = [(b"Transfer-Encoding", b"chunked")]
    assert len(await call(connection, "/echo", method="PUT", body=pieces(), headers=headers)) == 600_000


@pytest.mark.parametrize("way", ["scope", "native"])
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("act", [requested, uploaded, streamed])
async def test_a_cancel_at_every_step_closes_the_connection_and_loses_nothing(
    server: FaultServer, act: Callable[[WireConnection], Awaitable[None]], is_warm: bool, way: str
) -> None:
    before = open_sockets()
    step, ended = 1, False
    while not ended and step < 60:
        connection = WireConnection("127.0.0.1", server.port, tls=client_context() if server.tls else None)
        if is_warm:
            await call(connection, "/ok/warm")
        coroutine: Any = act(connection)
        if way == "scope":
            with anyio.CancelScope() as scope:
                ended = await acting_at(step, scope.cancel, coroutine) < step
        else:

            async def drive(coroutine: Any = coroutine, step: int = step) -> int:
                task = asyncio.current_task()
                assert task is not None
                return await acting_at(step, task.cancel, coroutine)

            try:
                ended = await asyncio.create_task(drive()) < step
            except asyncio.CancelledError:
                ended = False
        if not ended:
            connection.close()  # as the pool does, whose slot is released
        assert connection._waiter is None
        connection.close()
        step += 1
    assert step > 2
    await until(lambda: not server.open_connections)
    assert open_sockets() <= before


# Cheap to keep


MEMORY = """
import asyncio, os, ssl, sys
from layer_async._exchange import ExchangeRecord
from layer_async._wire import WireConnection

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

async def main(port, authority, count):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    connections = [WireConnection("127.0.0.1", port, tls=context) for _ in range(count + 20)]
    for number, connection in enumerate(connections):
        if number == 20:
            before = resident()
        answer = await connection.exchange(b"GET", b"/api", [(b"Host", b"x")], b"", ExchangeRecord(), {})
        assert len(b"".join([piece async for piece in answer])) == 200_000
    print((resident() - before) / count)
    for connection in connections:
        connection.close()

asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read in /proc")
@pytest.mark.promise
def test_a_tls_connection_costs_less_than_100_kib(full: bool, report: list[str]) -> None:
    """In a process of its own; every connection has read 200 KB, so that its buffers have grown."""
    with running_origin(tls=True, latency=0, size=200_000) as origin:
        arguments = [str(origin.port), origin.authority, str(1000 if full else 200)]
        done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    each = float(done.stdout)
    report.append(f"{each / 1024:.0f} KiB each")
    assert 1024 < each < 100 * 1024


async def test_the_loop_keeps_nothing_alive(server: FaultServer) -> None:
    connection = WireConnection("127.0.0.1", server.port, tls=client_context() if server.tls else None)
    await call(connection, "/ok", timeout={"read": 10.0, "write": 10.0})
    reference = connection._ref
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del connection
        assert reference() is None
    finally:
        gc.enable()
    await anyio.sleep(0)


# Where it runs


async def test_it_runs_in_a_task_of_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_on_asyncio()
    found: list[bool] = []
    asyncio.get_running_loop().call_soon(lambda: found.append(is_on_asyncio()))  # where a guest runs
    await anyio.sleep(0.001)
    assert found == [False]
    monkeypatch.setattr(type(asyncio.get_running_loop()), "add_reader", asyncio.AbstractEventLoop.add_reader)
    assert not is_on_asyncio()


def test_it_runs_nowhere_else() -> None:
    assert not is_on_asyncio()


@pytest.mark.parametrize(("extra", "is_ahead"), [("nothing", False), ("data", True), ("garbage", True)])
def test_what_comes_with_the_end_of_the_handshake_is_noticed(extra: str, is_ahead: bool) -> None:
    ours = _wire._TLS(client_context(), "localhost")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = server_context().wrap_bio(incoming, outgoing, server_side=True)
    for _ in range(4):
        for end, source, to in ((ours.object, ours.outgoing, incoming), (theirs, outgoing, ours.incoming)):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
            to.write(source.read())
    assert not ours.is_ahead()
    if extra == "data":
        theirs.write(b"HTTP/1.1 200 OK")
        ours.incoming.write(outgoing.read())
    elif extra == "garbage":
        ours.incoming.write(b"no record of TLS at all")
    assert ours.is_ahead() is is_ahead
