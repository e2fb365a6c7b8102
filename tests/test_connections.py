"""What both connections promise, ours on asyncio and httpcore's on asyncio and trio; over real sockets.

What only one of them does is in test_wire.py and test_portable.py.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, closing, contextmanager

import anyio
import httpcore
import pytest

from layer_async._exchange import ExchangeRecord
from layer_async._portable import PortableConnection
from layer_async._wire import WireConnection

from .faultserver import Exchange, FaultServer, client_context

pytestmark = pytest.mark.anyio

Connection = WireConnection | PortableConnection
Connecting = Callable[..., AbstractContextManager[Connection]]


@pytest.fixture(params=["wire, asyncio", "portable, asyncio", "portable, trio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> str:
    return kind.partition(", ")[2]


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultServer]:
    with FaultServer(tls=request.param == "https") as server:
        yield server


@pytest.fixture
def connection_to(kind: str) -> Connecting:
    @contextmanager
    def connection_to(server: FaultServer, context: ssl.SSLContext | None = None) -> Iterator[Connection]:
        context = context or client_context()
        connection: Connection
        if kind.startswith("wire"):
            connection = WireConnection("127.0.0.1", server.port, tls=context if server.tls else None)
        else:
            factory = httpcore.AsyncConnectionPool(ssl_context=context)
            connection = PortableConnection(factory, httpcore.URL(server.url).origin, tls_layers=int(server.tls))
        try:
            yield connection
        finally:
            connection.close()
            assert not connection.is_alive()

    return connection_to


async def call(
    connection: Connection,
    url: str,
    *,
    method: str = "GET",
    content: bytes | AsyncIterator[bytes] | None = None,
    length: int | None = None,
    record: ExchangeRecord | None = None,
    timeout: dict[str, float] | None = None,
) -> bytes:
    headers: list[tuple[str | bytes, str | bytes]] = [("Host", "127.0.0.1")]
    if isinstance(content, bytes):
        length = len(content)
    if length is not None:
        headers.append(("Content-Length", str(length)))
    request = httpcore.Request(method, url, headers=headers, content=content, extensions={"timeout": timeout or {}})
    response = await connection.handle(request, record or ExchangeRecord())
    async with aclosing(response):
        return await response.aread()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.001)


def facts(record: ExchangeRecord) -> tuple[int | None, bool | None, bool | None, bool | None, str]:
    return record.bytes_written, record.response_started, record.head_received, record.reused, record.phase


# What is counted


async def test_the_bytes_of_the_request_are_counted_and_nothing_of_the_handshake(
    server: FaultServer, connection_to: Connecting
) -> None:
    first, second = ExchangeRecord(), ExchangeRecord()
    with connection_to(server) as connection:
        assert await call(connection, f"{server.url}/ok/1", record=first) == b"/ok/1"
        assert facts(first) == (len(b"GET /ok/1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"), True, True, False, "read")
        assert connection.is_reusable()
        assert connection.is_alive()
        assert await call(connection, f"{server.url}/ok/22", record=second) == b"/ok/22"
        assert facts(second) == (len(b"GET /ok/22 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"), True, True, True, "read")
    assert server.record.connections == 1


async def test_a_connection_that_cannot_be_made_has_written_nothing(connection_to: Connecting) -> None:
    with FaultServer() as server:
        pass
    record = ExchangeRecord()
    with connection_to(server) as connection:
        with pytest.raises(httpcore.ConnectError) as caught:
            await call(connection, server.url, record=record)
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        assert facts(record) == (0, False, False, False, "connect")
        assert not connection.is_reusable()
        assert not connection.is_alive()


async def test_an_answer_that_never_begins_is_told_from_one_that_was_cut(
    server: FaultServer, connection_to: Connecting
) -> None:
    record = ExchangeRecord()
    with connection_to(server) as connection, pytest.raises(httpcore.RemoteProtocolError, match="without sending"):
        await call(connection, f"{server.url}/close", record=record)
    assert record.bytes_written
    assert facts(record)[1:] == (False, False, False, "read")
    with connection_to(server) as connection, pytest.raises(httpcore.RemoteProtocolError):
        await call(connection, f"{server.url}/half-head", record=record)
    assert (record.response_started, record.head_received) == (True, False)


async def test_the_record_says_what_the_attempt_is_doing(server: FaultServer, connection_to: Connecting) -> None:
    record = ExchangeRecord()
    phases: list[str] = []

    async def body() -> AsyncIterator[bytes]:
        phases.append(record.phase)
        yield b"x"

    with connection_to(server) as connection:
        assert await call(connection, f"{server.url}/echo", method="POST", content=body(), length=1, record=record)
    assert [*phases, record.phase] == ["write", "read"]


# When a connection serves again


@pytest.mark.parametrize("path", ["extra", "extra-chunked", "extra-204", "extra-304"])
async def test_a_connection_with_something_left_over_does_not_serve_again(
    server: FaultServer, connection_to: Connecting, path: str
) -> None:
    with connection_to(server) as connection:
        assert b"STRAY" not in await call(connection, f"{server.url}/{path}")
        assert not connection.is_reusable()


async def test_a_body_in_answer_to_head_is_left_over(server: FaultServer, connection_to: Connecting) -> None:
    with connection_to(server) as connection:
        assert await call(connection, f"{server.url}/extra-head", method="HEAD") == b""
        assert not connection.is_reusable()


@pytest.mark.parametrize("path", ["extra-later", "lie"])
async def test_what_comes_after_the_answer_is_noticed_when_it_comes(
    server: FaultServer, connection_to: Connecting, path: str
) -> None:
    with connection_to(server) as connection:
        await call(connection, f"{server.url}/{path}")
        await until(lambda: not connection.is_reusable())
        assert not connection.is_alive()


async def test_session_tickets_that_come_late_are_no_reason_to_close(connection_to: Connecting) -> None:
    with FaultServer(tls=True) as server, connection_to(server) as connection:
        await call(connection, f"{server.url}/ok/1")
        await anyio.sleep(0.005)
        assert connection.is_alive()
        assert connection.is_reusable()


# Bodies


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("drip", b"drops"),
        ("chunked", b"onetwothree"),
        ("early-hints", b"after all"),
        ("large/100000", b"x" * 10**5),
        ("large/3000000", b"x" * 3 * 10**6),
        ("until-end", b"whole"),
        ("http10", b"old"),
        ("connection-close", b"last"),
        ("large/0", b""),
    ],
)
async def test_bodies_come_whole_in_whatever_pieces(
    server: FaultServer, connection_to: Connecting, path: str, body: bytes
) -> None:
    with connection_to(server) as connection:
        assert await call(connection, f"{server.url}/{path}") == body
        is_last = path in ("until-end", "http10", "connection-close")
        assert connection.is_reusable() is not is_last
        if not is_last:
            assert await call(connection, f"{server.url}/ok/next") == b"/ok/next"


@pytest.mark.parametrize("path", ["truncate-length", "truncate-chunked", "truncate-reset"])
async def test_a_body_that_was_cut_is_an_error(server: FaultServer, connection_to: Connecting, path: str) -> None:
    with connection_to(server) as connection:
        with pytest.raises((httpcore.RemoteProtocolError, httpcore.ReadError)):
            await call(connection, f"{server.url}/{path}")
        assert not connection.is_reusable()


async def test_a_body_that_only_the_end_delimits_must_end_with_tls_own_goodbye(connection_to: Connecting) -> None:
    with (
        FaultServer(tls=True) as server,
        connection_to(server) as connection,
        pytest.raises(httpcore.RemoteProtocolError, match="cut"),
    ):
        await call(connection, f"{server.url}/until-cut")


async def test_a_body_that_is_longer_than_was_declared_is_an_error_of_this_side(
    server: FaultServer, connection_to: Connecting
) -> None:
    """Of httpcore's own, also where h11 raises one that httpcore lets through."""

    async def body() -> AsyncIterator[bytes]:
        yield b"abcdef"

    with connection_to(server) as connection, pytest.raises(httpcore.LocalProtocolError):
        await call(connection, f"{server.url}/echo", method="PUT", content=body(), length=3)


@pytest.mark.parametrize(("status", "write"), [("200 OK", 0.01), ("303 See Other", 60.0), ("413 Too Large", 60.0)])
async def test_an_answer_to_an_upload_that_is_taken_no_further_is_delivered(
    server: FaultServer, connection_to: Connecting, status: str, write: float
) -> None:
    """A success only once the time to write is over: some servers begin to answer while they still read."""

    def answer(ex: Exchange) -> None:
        ex.respond(b"all there", status=status)
        ex.server.stopped.wait(10)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 64_000

    server.behaviours["refuse-early"] = answer
    with connection_to(server) as connection, anyio.fail_after(10):
        timeout = {"write": write, "read": 5.0}
        url = f"{server.url}/refuse-early"
        assert (
            await call(connection, url, method="PUT", content=body(), length=64_000_000, timeout=timeout)
            == b"all there"
        )
        assert not connection.is_reusable()


# Errors


async def test_what_is_not_http_is_an_error(server: FaultServer, connection_to: Connecting) -> None:
    with connection_to(server) as connection, pytest.raises(httpcore.RemoteProtocolError):
        await call(connection, f"{server.url}/garbage")


async def test_corrupt_tls_is_a_read_error(connection_to: Connecting) -> None:
    def corrupt(ex: Exchange) -> None:
        ex.sock.sendall(b"\x17\x03\x03\x00\x20" + b"\x00" * 32)
        ex.hang()

    def answer_then_corrupt(ex: Exchange) -> None:
        ex.respond(b"ok")
        corrupt(ex)

    with FaultServer(tls=True) as server:
        server.behaviours["corrupt"] = corrupt
        server.behaviours["answer-then-corrupt"] = answer_then_corrupt
        with connection_to(server) as connection, pytest.raises(httpcore.ReadError) as caught:
            await call(connection, f"{server.url}/corrupt")
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        with connection_to(server) as connection:
            await call(connection, f"{server.url}/answer-then-corrupt")
            await until(lambda: not connection.is_alive())
            if isinstance(connection, PortableConnection):  # which notices no earlier
                with pytest.raises((httpcore.WriteError, httpcore.ReadError, httpcore.RemoteProtocolError)):
                    await call(connection, f"{server.url}/ok")


async def test_a_reset_is_a_read_error_and_an_idle_connection_that_was_reset_is_dead(
    server: FaultServer, connection_to: Connecting
) -> None:
    def answer_then_reset(ex: Exchange) -> None:
        ex.respond(b"ok")
        ex.pause()
        ex.reset()

    server.behaviours["answer-then-reset"] = answer_then_reset
    with connection_to(server) as connection, pytest.raises(httpcore.ReadError) as caught:
        await call(connection, f"{server.url}/reset")
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    with connection_to(server) as connection:
        await call(connection, f"{server.url}/answer-then-reset")
        await until(lambda: not connection.is_alive())


async def test_a_connection_that_is_not_accepted_times_out(connection_to: Connecting) -> None:
    with FaultServer(accepting=False) as server, connection_to(server) as connection:
        record = ExchangeRecord()
        with pytest.raises(httpcore.ConnectTimeout):
            await call(connection, server.url, timeout={"connect": 0.01}, record=record)
        assert facts(record) == (0, False, False, False, "connect")


async def test_a_handshake_that_does_not_go_on_times_out(connection_to: Connecting) -> None:
    with FaultServer(tls=True, accepting=False) as server, closing(socket.create_server(("127.0.0.1", 0))) as silent:
        server.port = silent.getsockname()[1]
        with connection_to(server) as connection, pytest.raises(httpcore.ConnectTimeout):
            await call(connection, server.url, timeout={"connect": 0.01})


async def test_a_certificate_that_is_refused_can_be_found_behind_the_error(connection_to: Connecting) -> None:
    with FaultServer(tls=True) as server, connection_to(server, ssl.create_default_context()) as connection:
        with pytest.raises(httpcore.ConnectError, match="certificate verify failed") as caught:
            await call(connection, server.url)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
