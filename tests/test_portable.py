"""Sockets, TLS and what is counted of an exchange; over real sockets."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import httpcore
import httpx
import pytest

from layer_async import _sockets
from layer_async._exchange import ExchangeRecord
from layer_async._portable import PortableConnection
from layer_async._sockets import SocketStream, Wire

from .faultserver import Exchange, FaultServer, client_context

pytestmark = pytest.mark.anyio

KINDS = ["http", "https"]


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[FaultServer]:
    with FaultServer(tls=request.param == "https") as server:
        yield server


@contextmanager
def connection_to(server: FaultServer, **options: Any) -> Iterator[PortableConnection]:
    factory = httpcore.AsyncConnectionPool(ssl_context=client_context(), **options)
    connection = PortableConnection(factory, httpcore.URL(server.url).origin, tls_layers=int(server.tls))
    try:
        yield connection
    finally:
        connection.close()
        assert not connection._wire.sockets


async def call(
    connection: PortableConnection,
    url: str,
    *,
    method: str = "GET",
    content: bytes | None = None,
    record: ExchangeRecord | None = None,
    timeout: dict[str, float] | None = None,
) -> bytes:
    headers: list[tuple[str | bytes, str | bytes]] = [("Host", "127.0.0.1")]
    if content is not None:
        headers.append(("Content-Length", str(len(content))))
    request = httpcore.Request(method, url, headers=headers, content=content, extensions={"timeout": timeout or {}})
    response = await connection.handle(request, record or ExchangeRecord())
    async with aclosing(response):
        return await response.aread()


def facts(record: ExchangeRecord) -> tuple[int | None, bool | None, bool | None, bool | None, str]:
    return record.bytes_written, record.response_started, record.head_received, record.reused, record.phase


# What is counted


async def test_a_write_that_fails_says_how_much_went_out(server: FaultServer) -> None:
    """The socket is shut for writing behind its back: httpcore then reads what the server has to say."""
    record = ExchangeRecord()
    with connection_to(server) as connection:
        await call(connection, f"{server.url}/ok/1")
        (sock,) = connection._wire.sockets
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(httpcore.RemoteProtocolError):
            await call(connection, f"{server.url}/ok/2", record=record)
    assert facts(record) == (0, False, False, True, "read")


async def test_what_opens_a_tunnel_is_not_counted() -> None:
    record = ExchangeRecord()
    with FaultServer() as server:
        factory = httpcore.AsyncHTTPProxy(server.url, ssl_context=client_context())
        origin = httpcore.URL("https://origin.invalid").origin
        connection = PortableConnection(factory, origin, tls_layers=1)
        assert await call(connection, "https://origin.invalid/ok/1", record=record) == b"/ok/1"
        assert connection.is_reusable()
        connection.close()
        assert server.record.tunnels == ["origin.invalid:443"]
    assert facts(record) == (len(b"GET /ok/1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"), True, True, False, "read")


async def test_of_an_answer_that_never_touched_the_wire_nothing_is_claimed(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a tool has put its own function in place of httpcore's."""

    async def mocked(self: Any, request: httpcore.Request) -> httpcore.Response:
        return httpcore.Response(200, content=b"mocked")

    monkeypatch.setattr(httpcore.AsyncHTTPConnection, "handle_async_request", mocked)
    record = ExchangeRecord()
    with connection_to(server) as connection:
        assert await call(connection, f"{server.url}/ok", record=record) == b"mocked"
        assert not connection.is_reusable()
    assert facts(record)[:4] == (None, None, None, None)


async def test_an_error_of_the_socks_library_becomes_one_of_httpcores(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpcore lets it through as it is, and it would reach the user untyped."""

    class ProtocolError(Exception):
        __module__ = "socksio.exceptions"

    async def babble(self: Any, request: httpcore.Request) -> httpcore.Response:
        raise ProtocolError("Malformed reply")

    monkeypatch.setattr(httpcore.AsyncHTTPConnection, "handle_async_request", babble)
    with connection_to(server) as connection, pytest.raises(httpcore.ProxyError, match="SOCKS: Malformed reply"):
        await call(connection, f"{server.url}/ok")


# When a connection serves again


async def test_without_the_private_names_nothing_serves_again(server: FaultServer) -> None:
    with connection_to(server) as connection:
        await call(connection, f"{server.url}/ok/1")
        connection._http11 = object()
        assert not connection.is_reusable()


async def test_an_unread_answer_does_not_leave_a_reusable_connection(server: FaultServer) -> None:
    with connection_to(server) as connection:
        request = httpcore.Request("GET", f"{server.url}/large/300000", headers={"Host": "x"})
        response = await connection.handle(request, ExchangeRecord())
        assert not connection.is_reusable()
        await response.aclose()
        assert not connection.is_alive()


# Bodies


async def test_an_answer_framed_twice_is_the_last_one_on_its_connection(server: FaultServer) -> None:
    """RFC 9112 section 6.3: Transfer-Encoding overrides Content-Length, and somebody may be smuggling."""
    for number, headers in enumerate(["Transfer-Encoding: chunked", "transfer-encoding: chunked\r\nCONTENT-LENGTH: 7"]):
        answer = b"HTTP/1.1 200 OK\r\n" + headers.encode() + b"\r\n\r\n2\r\nok\r\n0\r\n\r\n"
        server.behaviours["framed"] = lambda ex, answer=answer: ex.send(answer)  # type: ignore[misc]
        with connection_to(server) as connection:
            assert await call(connection, f"{server.url}/framed") == b"ok"
            assert connection.is_reusable() is (number == 0)


@pytest.mark.parametrize(
    ("version", "is_known"), [("1.0", True), ("1.1", True), ("1.2", True), ("2.0", False), ("0.9", False)]
)
async def test_an_answer_of_another_major_version_is_not_believed(
    server: FaultServer, version: str, is_known: bool
) -> None:
    answer = f"HTTP/{version} 200 OK\r\nContent-Length: 2\r\n\r\nok".encode()
    server.behaviours["version"] = lambda ex: ex.send(answer)
    record = ExchangeRecord()
    with connection_to(server) as connection:
        if is_known:
            assert await call(connection, f"{server.url}/version") == b"ok"
        else:
            with pytest.raises(httpcore.RemoteProtocolError, match=f"HTTP/{version}"):
                await call(connection, f"{server.url}/version", record=record)
            assert not connection.is_alive()
            assert (record.response_started, record.head_received) == (True, False)


async def test_a_large_upload_arrives_whole(server: FaultServer) -> None:
    body = os.urandom(3_000_000)
    with connection_to(server) as connection:
        assert await call(connection, f"{server.url}/echo", method="POST", content=body) == body


async def test_bytes_are_sent_without_a_generator(server: FaultServer) -> None:
    headers: list[tuple[str | bytes, str | bytes]] = [("Host", "x"), ("Content-Length", "5")]
    request = httpcore.Request("PUT", f"{server.url}/echo", headers=headers, content=httpx.ByteStream(b"bytes"))
    with connection_to(server) as connection:
        response = await connection.handle(request, ExchangeRecord())
        assert await response.aread() == b"bytes"
        await response.aclose()


async def endless() -> AsyncIterator[bytes]:
    for _ in range(1000):
        yield b"x" * 64_000


async def test_a_refusal_in_the_middle_of_an_upload_is_read_at_once(server: FaultServer) -> None:
    """The server answers 413 and takes nothing more: neither the upload's end nor a timeout is waited for."""
    record = ExchangeRecord()
    request = httpcore.Request(
        "PUT",
        f"{server.url}/refuse-early",
        headers={"Host": "x", "Content-Length": "64000000"},
        content=endless(),
        extensions={"timeout": {"write": 60.0}},
    )
    with connection_to(server) as connection:
        with anyio.fail_after(5):
            response = await connection.handle(request, record)
        assert response.status == 413
        assert await response.aread() == b"too large"
        await response.aclose()
    assert 0 < (record.bytes_written or 0) < 64_000_000


async def test_a_success_that_begins_early_does_not_end_an_upload(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sockets, "EARLY_LOOK", 0.001)
    request = httpcore.Request(
        "PUT",
        f"{server.url}/accept-early",
        headers={"Host": "x", "Content-Length": "6400000"},
        content=(piece async for piece in _first(100)),
    )
    with connection_to(server) as connection:
        response = await connection.handle(request, ExchangeRecord())
        assert await response.aread() == b"all of it"
        await response.aclose()


async def _first(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 64_000


# Timeouts


async def test_each_phase_has_its_own_timeout(server: FaultServer) -> None:
    with connection_to(server) as connection, pytest.raises(httpcore.ReadTimeout, match=r"0\.01 s"):
        await call(connection, f"{server.url}/never", timeout={"read": 0.01})
    with connection_to(server) as connection, pytest.raises(httpcore.ReadTimeout):
        await call(connection, f"{server.url}/stall", timeout={"read": 0.01})


@pytest.mark.parametrize("look", [0.001, 1.0])
async def test_a_server_that_takes_no_more_of_an_upload_ends_in_a_timeout(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, look: float
) -> None:
    """httpcore passes over the error of the write, to see whether there is an answer; there is none."""
    monkeypatch.setattr(_sockets, "EARLY_LOOK", look)

    def take_nothing(ex: Exchange) -> None:
        ex.server.stopped.wait(5)

    server.behaviours["refuse-early"] = take_nothing
    request = httpcore.Request(
        "PUT",
        f"{server.url}/refuse-early",
        headers={"Host": "x", "Content-Length": "64000000"},
        content=endless(),
        extensions={"timeout": {"write": 0.01, "read": 5.0}},
    )
    with connection_to(server) as connection, pytest.raises(httpcore.WriteTimeout):
        await connection.handle(request, ExchangeRecord())


# TLS


async def test_a_handshake_that_is_cut_is_a_connect_error() -> None:
    factory = httpcore.AsyncConnectionPool(ssl_context=client_context())
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        connection = PortableConnection(factory, httpcore.URL(url).origin, tls_layers=1)

        async def hang_up() -> None:
            sock, _ = await anyio.to_thread.run_sync(listener.accept)
            sock.recv(65536)
            sock.close()

        async with anyio.create_task_group() as group:
            group.start_soon(hang_up)
            with pytest.raises(httpcore.ConnectError) as caught:
                await call(connection, url)
        assert isinstance(caught.value.__cause__, ssl.SSLError)  # which of them differs with OpenSSL
        connection.close()


async def test_a_name_that_no_certificate_can_have_is_a_connect_error() -> None:
    with FaultServer(tls=True) as server:
        wire = Wire(1)
        stream = await wire.connect_tcp("127.0.0.1", server.port)
        with pytest.raises(httpcore.ConnectError):
            await stream.start_tls(client_context(), "")
        wire.close()


# Connecting


async def test_a_name_is_looked_up_and_its_addresses_are_tried_in_turn() -> None:
    with FaultServer() as server:
        wire = Wire(0)
        stream = await wire.connect_tcp("localhost", server.port)
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
        assert len(wire.sockets) == 1
        wire.close()


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that every name has."""
    addresses: list[Any] = []

    async def resolve(host: str, port: int) -> list[Any]:
        return addresses

    monkeypatch.setattr(_sockets, "_resolve", resolve)
    monkeypatch.setattr(_sockets, "STAGGER", 0.001)
    return addresses


async def test_an_address_that_refuses_or_hangs_does_not_hide_one_that_answers(resolved: list[Any]) -> None:
    with FaultServer(accepting=False) as hanging, FaultServer() as server:
        resolved += [(socket.AF_INET, ("127.0.0.1", port)) for port in (1, hanging.port, server.port)]
        wire = Wire(0)
        stream = await wire.connect_tcp("anywhere", 80)
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
        assert len(wire.sockets) == 1
        wire.close()


async def test_of_two_addresses_that_answer_at_once_one_is_kept(
    resolved: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sockets, "STAGGER", 0)
    with FaultServer() as one, FaultServer() as other:
        resolved += [(socket.AF_INET, ("127.0.0.1", port)) for port in (one.port, other.port)]
        wire = Wire(0)
        connect, arrived, both = wire._connect, list[None](), anyio.Event()

        async def together(*args: Any) -> socket.socket:
            """Neither can cancel the other before that one is connected too."""
            sock = await connect(*args)
            arrived.append(None)
            if len(arrived) == 2:
                both.set()
            with anyio.CancelScope(shield=True):
                await both.wait()
            return sock

        monkeypatch.setattr(wire, "_connect", together)
        await wire.connect_tcp("anywhere", 80)
        assert len(wire.sockets) == 1
        wire.close()


async def test_where_no_address_answers_the_first_refusal_is_the_error(resolved: list[Any]) -> None:
    resolved += [(socket.AF_INET, ("127.0.0.1", 1)), (socket.AF_INET6, ("::1", 1))]
    wire = Wire(0)
    with pytest.raises(httpcore.ConnectError) as caught:
        await wire.connect_tcp("anywhere", 80)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert not wire.sockets


async def test_an_address_that_fails_at_once_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(socket.socket):
        def connect_ex(self, address: Any) -> int:
            return errno.ENETUNREACH

    monkeypatch.setattr(socket, "socket", Unreachable)
    wire = Wire(0)
    with pytest.raises(httpcore.ConnectError, match="unreachable"):
        await wire.connect_tcp("127.0.0.1", 1)
    assert not wire.sockets


async def test_the_address_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    six: Any = socket.AF_INET6
    four: Any = socket.AF_INET

    async def getaddrinfo(host: bytes, port: int, **_: Any) -> list[Any]:
        families = [six, six, six, four] if host == b"sixes.invalid" else [four, six, six]
        return [(family, None, None, "", number) for number, family in enumerate(families)]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    resolve: Any = _sockets._resolve
    assert await resolve("sixes.invalid", 80) == [(six, 0), (four, 3), (six, 1), (six, 2)]
    assert await resolve("fours.invalid", 80) == [(four, 0), (six, 1), (six, 2)]


async def test_a_host_that_is_not_known_can_be_found_behind_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    with pytest.raises(httpcore.ConnectError) as caught:
        await Wire(0).connect_tcp("nowhere.invalid", 80)
    assert isinstance(caught.value.__cause__, socket.gaierror)


async def test_options_and_the_local_address_are_honoured() -> None:
    with FaultServer() as server:
        wire = Wire(0)
        stream = await wire.connect_tcp(
            "127.0.0.1",
            server.port,
            local_address="127.0.0.2",
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)],
        )
        sock: socket.socket = stream.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert stream.get_extra_info("client_addr")[0] == "127.0.0.2"
        wire.close()


async def test_a_stream_tells_about_its_socket(server: FaultServer) -> None:
    with connection_to(server) as connection:
        request = httpcore.Request("GET", f"{server.url}/ok", headers={"Host": "x"})
        response = await connection.handle(request, ExchangeRecord())
        await response.aread()
        await response.aclose()
        stream = response.extensions["network_stream"]
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
        assert stream.get_extra_info("client_addr")[0] == "127.0.0.1"
        assert isinstance(stream.get_extra_info("socket"), socket.socket)
        assert stream.get_extra_info("is_readable") is False
        assert stream.get_extra_info("unheard of") is None
        assert (stream.get_extra_info("ssl_object") is not None) is server.tls
        assert "HTTP/1.1, IDLE" in repr(connection)
        connection.close()
        assert stream.get_extra_info("client_addr") is None
        assert stream.get_extra_info("server_addr") is None
        assert stream.get_extra_info("is_readable") is True


# Closing


async def test_closing_wakes_up_whoever_waits_for_the_socket(server: FaultServer) -> None:
    with connection_to(server) as connection:
        async with anyio.create_task_group() as group:

            async def close() -> None:
                while not server.record.requests:
                    await anyio.sleep(0.001)
                await anyio.wait_all_tasks_blocked()
                connection.close()

            group.start_soon(close)
            with pytest.raises(httpcore.ReadError, match="closed on this side"):
                await call(connection, f"{server.url}/never")
            group.cancel_scope.cancel()


async def test_a_closed_connection_is_neither_alive_nor_read_nor_written(server: FaultServer) -> None:
    with connection_to(server) as connection:
        await call(connection, f"{server.url}/ok")
        stream = connection._wire.stream
        assert stream is not None
        connection.close()
        assert not connection.is_alive()
        with pytest.raises(httpcore.ReadError):
            await stream.read(1)
        with pytest.raises(httpcore.WriteError):
            await stream.write(b"x")


async def test_a_socket_that_was_closed_is_not_waited_for() -> None:
    sock = socket.socket()
    sock.close()
    with pytest.raises(OSError, match="closed on this side"):
        await Wire(0).wait(anyio.wait_readable, sock)


async def test_an_abandoned_connection_has_its_descriptor_closed_and_nothing_else(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connection_to(server) as connection:
        await call(connection, f"{server.url}/ok")
        (sock,) = connection._wire.sockets
        number = sock.fileno()
        monkeypatch.delattr(anyio, "notify_closing")
        connection.abandon()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


async def test_a_cancelled_attempt_leaves_no_socket_once_its_connection_is_closed(server: FaultServer) -> None:
    with connection_to(server) as connection:
        with anyio.move_on_after(0.01):
            await call(connection, f"{server.url}/never")
    with anyio.fail_after(5):
        while server.open_connections:
            await anyio.sleep(0.001)
    assert server.record.connections == 1
    assert not connection._wire.sockets


# Being fair


async def test_a_stream_that_never_waits_lets_others_run_all_the_same() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    ran: list[None] = []

    async def note() -> None:
        ran.append(None)

    with ours, theirs:
        theirs.sendall(b"x" * 100)
        stream = SocketStream(Wire(1), ours)
        async with anyio.create_task_group() as group:
            group.start_soon(note)
            for _ in range(40):
                assert await stream.read(1) == b"x"
            assert ran


async def test_what_is_no_request_just_waits_until_it_is_taken() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    with ours, theirs:
        wire = Wire(1)
        wire.record.phase = "connect"
        with pytest.raises(httpcore.WriteTimeout):
            await SocketStream(wire, ours).write(b"x" * 10_000_000, timeout=0.005)
        assert wire.sent > 0
        assert wire.record.bytes_written is None


# Upgrades


async def test_a_connection_that_was_upgraded_is_read_and_written_as_a_stream(server: FaultServer) -> None:
    with connection_to(server) as connection:
        request = httpcore.Request(
            "GET", f"{server.url}/upgrade", headers={"Host": "x", "Upgrade": "echo", "Connection": "upgrade"}
        )
        response = await connection.handle(request, ExchangeRecord())
        assert response.status == 101
        stream = response.extensions["network_stream"]
        for word in (b"one", b"two"):
            await stream.write(word)
            assert await stream.read(100) == word
        await response.aclose()
        assert not connection.is_reusable()
