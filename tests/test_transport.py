"""httpx above, our pool below: whole requests over real sockets, and the tools that hook in between."""

from __future__ import annotations

import asyncio
import gc
import os
import pathlib
import socket
import ssl
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import httpcore
import httpx
import pytest
import pytest_httpx
import respx
import trio
import vcr  # type: ignore[import-untyped]
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from layer_async import _transport
from layer_async._errors import ClientClosedError, ConfigurationError
from layer_async._exchange import EXTENSION, ExchangeRecord
from layer_async._pool import ConnectionPool
from layer_async._transport import HTTPClient, LayerTransport, ssl_context

from .faultserver import Exchange, FaultServer, client_context

pytestmark = pytest.mark.anyio
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest) -> Iterator[FaultServer]:
    with FaultServer(tls=request.param == "https") as server:
        yield server


@pytest.fixture
def plain() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


def limits(size: int) -> httpx.Limits:
    return httpx.Limits(max_connections=size, keepalive_expiry=30)


def transport_for(size: int = 10, **options: Any) -> LayerTransport:
    return LayerTransport(limits=limits(size), verify=client_context(), **options)


def record_of(response: httpx.Response) -> ExchangeRecord:
    record = response.request.extensions[EXTENSION]
    assert isinstance(record, ExchangeRecord)
    return record


def assert_nothing_in_use(pool: ConnectionPool) -> None:
    stats = pool.stats
    assert (stats.in_use, stats.waiting) == (0, 0), repr(pool)
    assert stats.open == stats.idle


# Whole requests


async def test_a_bare_httpx_client_works_over_it_and_reuses_its_connection(server: FaultServer) -> None:
    transport = transport_for()
    async with httpx.AsyncClient(transport=transport) as client:
        for number in range(3):
            response = await client.get(f"{server.url}/ok/{number}", params={"q": "1"})
            assert response.text == f"/ok/{number}?q=1"
        assert record_of(response).reused
        assert repr(transport) == "<LayerTransport <ConnectionPool [0 of 10 slots in use, 0 waiting | 1 open, 1 idle]>>"
        assert repr(transport._pool) == repr(transport.pool)
    assert server.record.connections == 1
    assert transport.pool.stats.open == 0


async def test_bodies_go_up_and_come_down_as_streams(server: FaultServer) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"one", b"two", b"three"):
            yield piece

    async with httpx.AsyncClient(transport=transport_for()) as client:
        async with client.stream("PUT", f"{server.url}/echo", content=pieces()) as response:
            assert b"".join([part async for part in response.aiter_bytes()]) == b"onetwothree"
        assert (await client.post(f"{server.url}/echo", json={"a": 1})).json() == {"a": 1}


async def test_the_slot_is_free_as_soon_as_the_last_byte_was_read(server: FaultServer) -> None:
    transport = transport_for(1)
    async with (
        httpx.AsyncClient(transport=transport) as client,
        client.stream("GET", f"{server.url}/large/200000") as response,
    ):
        assert transport.pool.stats.in_use == 1
        async for _ in response.aiter_raw():
            pass
        assert_nothing_in_use(transport.pool)
        assert (await client.get(f"{server.url}/ok")).status_code == 200


async def test_a_response_that_is_left_early_costs_its_connection_and_frees_its_slot(server: FaultServer) -> None:
    transport = transport_for(1)
    async with httpx.AsyncClient(transport=transport) as client:
        for _ in range(3):
            async with client.stream("GET", f"{server.url}/large/3000000") as response:
                assert response.status_code == 200
            assert transport.pool.stats.open == 0
    assert server.record.connections == 3


async def test_a_response_that_is_left_in_the_middle_leaves_nothing_for_a_collector_to_end(server: FaultServer) -> None:
    """trio warns of an asynchronous generator that was not exhausted, and warnings are errors here."""
    transport = transport_for(1)
    for path in ("large/3000000", "stall", "chunked"):
        url = httpx.URL(f"{server.url}/{path}")
        response = await transport.handle_async_request(httpx.Request("GET", url))
        stream: Any = response.stream
        inner = stream._httpcore_stream
        assert await inner.__anext__()
        await inner.aclose()
        await inner.aclose()
        with pytest.raises(StopAsyncIteration):
            await inner.__anext__()
        if path != "chunked":  # which may have come to its end before anybody read it
            assert transport.pool.stats.open == 0
    await transport.aclose()


async def test_a_response_that_is_closed_while_another_task_reads_it_ends_both(server: FaultServer) -> None:
    transport = transport_for(1)
    response = await transport.handle_async_request(httpx.Request("GET", f"{server.url}/stall"))
    stream: Any = response.stream
    inner = stream._httpcore_stream
    assert await inner.__anext__() == b"half."

    async def read() -> None:
        with pytest.raises(httpcore.ReadError):
            await inner.__anext__()

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        await inner.aclose()
    assert_nothing_in_use(transport.pool)
    await transport.aclose()


async def test_a_body_that_fails_or_is_cancelled_frees_its_slot_before_anybody_closes_it(server: FaultServer) -> None:
    transport = transport_for(1)
    timeout = {"timeout": {"read": 0.01}}
    for extensions, seconds in ((timeout, 5.0), ({}, 0.005)):
        request = httpx.Request("GET", f"{server.url}/stall", extensions=extensions)
        stream: Any = (await transport.handle_async_request(request)).stream
        inner = stream._httpcore_stream
        await inner.__anext__()
        with anyio.move_on_after(seconds):
            try:
                await inner.__anext__()
            except httpcore.ReadTimeout:
                pass
            finally:
                assert_nothing_in_use(transport.pool)
                assert transport.pool.stats.open == 0
        await inner.aclose()
    await transport.aclose()


@pytest.mark.parametrize("path", ["extra", "extra-chunked", "extra-204", "extra-304", "extra-later", "lie"])
async def test_no_stray_byte_answers_another_request(server: FaultServer, path: str) -> None:
    transport = transport_for(1)
    async with httpx.AsyncClient(transport=transport) as client:
        for number in range(5):
            await client.get(f"{server.url}/{path}")
            with anyio.fail_after(5):  # what comes only after the next request cannot be told from its answer
                while any(connection.is_alive() for connection in transport.pool._idle):
                    await anyio.sleep(0.001)
            response = await client.get(f"{server.url}/ok/{number}")
            assert response.text == f"/ok/{number}"
            assert not record_of(response).reused


async def test_a_body_after_head_answers_no_other_request(server: FaultServer) -> None:
    async with httpx.AsyncClient(transport=transport_for(1)) as client:
        assert (await client.head(f"{server.url}/extra-head")).headers["content-length"] == "5"
        assert (await client.get(f"{server.url}/ok/1")).text == "/ok/1"


async def test_an_idle_connection_that_the_server_closed_is_not_used(server: FaultServer) -> None:
    transport = transport_for(5)
    async with httpx.AsyncClient(transport=transport) as client:
        for number in range(3):
            await client.get(f"{server.url}/ok/{number}")
            server.drop_connections()
            while server.open_connections:
                await anyio.sleep(0.001)
        assert (transport.pool.stats.opened, transport.pool.stats.reused) == (3, 0)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("close", httpx.RemoteProtocolError),
        ("reset", httpx.ReadError),
        ("half-head", httpx.RemoteProtocolError),
        ("truncate-length", httpx.RemoteProtocolError),
        ("truncate-chunked", httpx.RemoteProtocolError),
        ("garbage", httpx.RemoteProtocolError),
        ("never", httpx.ReadTimeout),
        ("stall", httpx.ReadTimeout),
    ],
)
async def test_a_failed_attempt_raises_httpxs_error_and_frees_its_slot(
    server: FaultServer, path: str, error: type[Exception]
) -> None:
    transport = transport_for(1)
    async with httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(5, read=0.01)) as client:
        with pytest.raises(error):
            await client.get(f"{server.url}/{path}")
        assert_nothing_in_use(transport.pool)
        assert transport.pool.stats.open == 0


async def test_a_call_that_gets_no_slot_in_time_is_a_pool_timeout_that_wrote_nothing(server: FaultServer) -> None:
    transport = transport_for(1)
    async with httpx.AsyncClient(transport=transport) as client:
        async with client.stream("GET", f"{server.url}/ok"):
            request = client.build_request("GET", f"{server.url}/ok", timeout=httpx.Timeout(5, pool=0.001))
            with pytest.raises(httpx.PoolTimeout):
                await client.send(request)
        record = request.extensions[EXTENSION]
        assert (record.bytes_written, record.response_started, record.phase) == (0, False, "queue")


async def test_other_schemes_are_refused() -> None:
    async with httpx.AsyncClient(transport=transport_for()) as client:
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")


# Slots that the caller holds


async def test_a_slot_that_the_caller_holds_is_used_and_freed_with_the_response(server: FaultServer) -> None:
    transport = transport_for(1)
    async with httpx.AsyncClient(transport=transport) as client:
        record = ExchangeRecord(slot=await transport.pool.acquire())
        request = client.build_request("GET", f"{server.url}/ok", extensions={EXTENSION: record})
        response = await client.send(request, stream=True)
        assert transport.pool.stats.in_use == 1
        await response.aread()
        assert record.slot is None
        assert_nothing_in_use(transport.pool)
        await client.send(request)  # as an auth flow does: the slot is spent, another one is taken
        assert record.slot is None
        assert record.reused
        assert_nothing_in_use(transport.pool)


async def test_a_slot_of_another_pool_is_left_alone(plain: FaultServer) -> None:
    other = ConnectionPool(limits(1))
    slot = await other.acquire()
    async with httpx.AsyncClient(transport=transport_for()) as client:
        await client.get(f"{plain.url}/ok", extensions={EXTENSION: ExchangeRecord(slot=slot)})
    assert slot.is_held


async def test_the_caller_can_free_the_slot_by_force_in_the_middle_of_a_body(server: FaultServer) -> None:
    transport = transport_for(1)
    async with (
        httpx.AsyncClient(transport=transport) as client,
        client.stream("GET", f"{server.url}/large/3000000") as response,
    ):
        record_of(response).release_slot()
        assert_nothing_in_use(transport.pool)
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await response.aread()


async def test_a_fresh_connection_can_be_asked_for(plain: FaultServer) -> None:
    async with httpx.AsyncClient(transport=transport_for()) as client:
        await client.get(f"{plain.url}/ok")
        record = ExchangeRecord()
        record.fresh = True
        await client.get(f"{plain.url}/ok", extensions={EXTENSION: record})
        assert record.reused is False
    assert plain.record.connections == 2


# Closing


async def test_calls_in_flight_and_in_the_queue_fail_with_our_own_error_when_the_client_closes(
    server: FaultServer,
) -> None:
    transport = transport_for(3)
    client = httpx.AsyncClient(transport=transport)
    errors: list[str] = []

    async def get(path: str) -> None:
        try:
            await client.get(f"{server.url}/{path}")
        except ClientClosedError as exc:
            errors.append(str(exc))

    async with anyio.create_task_group() as group:
        for path in ("never", "stall", "never", "stall"):
            group.start_soon(get, path)
        while len(server.record.requests) < 3 or transport.pool.stats.waiting < 1:
            await anyio.sleep(0.001)
        await anyio.sleep(0.002)
        with anyio.fail_after(5):
            await client.aclose()
    assert sorted(errors) == [
        *["the client was closed during the call, in its read phase."] * 3,
        "the connection pool was closed while this call waited for a slot.",
    ]
    again = httpx.AsyncClient(transport=transport)
    with pytest.raises(ClientClosedError):
        await again.get(f"{server.url}/ok")
    await again.aclose()


async def test_whoever_gets_the_file_descriptor_of_a_closed_connection_next_is_not_mistaken_for_it(
    plain: FaultServer,
) -> None:
    """On asyncio a task that waited for a descriptor takes the next one's registration away, if it wakes up later."""
    transport = transport_for(1)

    async def get() -> None:
        with pytest.raises(ClientClosedError):
            await transport.handle_async_request(httpx.Request("GET", f"{plain.url}/never"))

    async with anyio.create_task_group() as group:
        group.start_soon(get)
        while not plain.record.requests:
            await anyio.sleep(0.001)
        await anyio.wait_all_tasks_blocked()
        await transport.aclose()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(b"x")
            with anyio.fail_after(2):
                await anyio.wait_readable(ours)


# Limits, queues, routes


async def test_no_more_connections_than_slots_and_every_call_its_own_answer(server: FaultServer) -> None:
    transport = transport_for(5)
    async with httpx.AsyncClient(transport=transport, timeout=None) as client:

        async def get(number: int) -> None:
            assert (await client.get(f"{server.url}/ok/{number}")).text == f"/ok/{number}"

        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(get, number)
    assert server.record.connections == 5
    assert len(server.record.requests) == 200


async def test_connections_are_told_apart_by_what_was_verified() -> None:
    """A request with another server name must not go over a connection on which that name was not verified."""
    with FaultServer(tls=True) as server:
        async with httpx.AsyncClient(transport=transport_for()) as client:
            await client.get(f"{server.url}/ok")
            await client.get(f"{server.url}/ok", extensions={"sni_hostname": "origin.invalid"})
            with pytest.raises(httpx.ConnectError, match="certificate"):
                await client.get(f"{server.url}/ok", extensions={"sni_hostname": "elsewhere.invalid"})
        assert server.record.connections == 3


async def test_transports_that_share_a_pool_share_its_slots_and_not_their_connections(plain: FaultServer) -> None:
    pool = ConnectionPool(limits(1))
    one, other = (transport_for(pool=pool) for _ in range(2))
    async with httpx.AsyncClient(transport=one) as client, httpx.AsyncClient(transport=other) as second:
        for caller in (client, second, client):
            await caller.get(f"{plain.url}/ok")
    assert (pool.stats.opened, pool.stats.reused) == (3, 0)


# TLS


async def test_a_certificate_that_is_not_trusted_is_refused_and_can_be_found_behind_the_error() -> None:
    with FaultServer(tls=True) as server:
        async with httpx.AsyncClient(transport=LayerTransport()) as client:
            with pytest.raises(httpx.ConnectError) as caught:
                await client.get(f"{server.url}/ok")
        cause = caught.value.__cause__
        assert isinstance(cause, httpcore.ConnectError)
        assert isinstance(cause.__cause__, ssl.SSLCertVerificationError)
        async with httpx.AsyncClient(transport=LayerTransport(verify=False)) as client:
            assert (await client.get(f"{server.url}/ok")).status_code == 200


def test_the_tls_configuration_is_made_once_for_each_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    assert ssl_context() is ssl_context()
    assert ssl_context(False) is ssl_context(False)
    assert ssl_context(False).verify_mode == ssl.CERT_NONE
    own = ssl.create_default_context()
    assert ssl_context(own) is own
    default = ssl_context()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    assert ssl_context(trust_env=False).verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
        ssl_context()
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert ssl_context() is not default


def test_construction_after_the_first_is_quick() -> None:
    """A context would be made anew in 20 ms; a hundred transports are made in less than five of those."""
    LayerTransport()
    started = time.process_time()
    for _ in range(100):
        LayerTransport()
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("verify", ["/etc/ssl/certs", None, 1])
def test_anything_but_a_bool_or_a_context_is_refused(verify: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"pass an ssl\.SSLContext"):
        LayerTransport(verify=verify)


# Proxies


@pytest.mark.parametrize("proxy_tls", [False, True])
async def test_plain_requests_are_forwarded_by_a_proxy(proxy_tls: bool) -> None:
    with FaultServer(tls=proxy_tls) as proxy:
        async with httpx.AsyncClient(
            transport=transport_for(proxy=proxy.url.replace("://", "://user:pass@"))
        ) as client:
            for number in range(2):
                response = await client.get(f"http://origin.invalid/ok/{number}")
                assert response.text == f"http://origin.invalid/ok/{number}"
                written = record_of(response).bytes_written
                assert written is not None
                assert written > 50
    assert proxy.record.connections == 1
    assert proxy.record.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpwYXNz"


@pytest.mark.parametrize("proxy_tls", [False, True])
async def test_requests_over_tls_go_through_a_tunnel(proxy_tls: bool) -> None:
    with FaultServer(tls=proxy_tls) as proxy:
        async with httpx.AsyncClient(transport=transport_for(proxy=proxy.url)) as client:
            for number in range(3):
                assert (await client.get(f"https://origin.invalid/ok/{number}")).text == f"/ok/{number}"
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("https://origin.invalid/truncate-length")
    assert proxy.record.connections == 1
    assert proxy.record.tunnels == ["origin.invalid:443"]


async def test_a_tunnel_that_is_refused_is_a_proxy_error_and_no_byte_of_the_request_was_written() -> None:
    with FaultServer(refuse_tunnels="407 Proxy Authentication Required") as proxy:
        transport = transport_for(proxy=proxy.url)
        async with httpx.AsyncClient(transport=transport) as client:
            request = client.build_request("POST", "https://origin.invalid/ok", content=b"x")
            with pytest.raises(httpx.ProxyError, match="407"):
                await client.send(request)
            record = request.extensions[EXTENSION]
            assert (record.bytes_written, record.response_started, record.phase) == (0, False, "connect")
            assert_nothing_in_use(transport.pool)


async def test_an_https_proxy_is_verified_with_the_clients_own_configuration_unless_it_has_one() -> None:
    with FaultServer(tls=True) as proxy:
        own = httpx.Proxy(proxy.url, ssl_context=ssl.create_default_context())
        async with httpx.AsyncClient(transport=transport_for(proxy=own)) as client:
            with pytest.raises(httpx.ConnectError, match="certificate"):
                await client.get("http://origin.invalid/ok")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_socks_proxy_serves_too(scheme: str) -> None:
    pytest.importorskip("socksio")
    with FaultServer() as proxy:
        url = proxy.url.replace("http", "socks5")
        async with httpx.AsyncClient(transport=transport_for(proxy=url)) as client:
            for number in range(2):
                response = await client.get(f"{scheme}://origin.invalid/ok/{number}", headers={"Accept": "x" * 50})
                assert response.text == f"/ok/{number}"
        assert record_of(response).reused
    assert proxy.record.connections == 1
    assert "origin.invalid" in proxy.record.tunnels[0]


async def test_of_a_socks_proxy_that_hangs_up_nothing_is_counted() -> None:
    pytest.importorskip("socksio")

    class Deaf(FaultServer):
        def _socks(self, pipe: Any, sock: Any, chance: Any) -> Any:
            pipe.send(b"\x05\x00")
            pipe.recv()
            Exchange.close(None)  # type: ignore[arg-type]

    with Deaf() as proxy:
        transport = transport_for(proxy=proxy.url.replace("http", "socks5"))
        async with httpx.AsyncClient(transport=transport) as client:
            request = client.build_request("POST", "http://origin.invalid/ok")
            with pytest.raises(httpx.ProxyError, match="SOCKS"):
                await client.send(request)
        record = request.extensions[EXTENSION]
        assert (record.bytes_written, record.response_started, record.phase) == (0, False, "connect")


@pytest.mark.parametrize("answers", [[], [b"\x05\x00"]])
async def test_a_socks_proxy_that_does_not_go_on_ends_in_a_connect_timeout(answers: list[bytes]) -> None:
    pytest.importorskip("socksio")

    class Silent(FaultServer):
        def _socks(self, pipe: Any, sock: Any, chance: Any) -> Any:
            for answer in answers:
                pipe.send(answer)
                pipe.recv()
            pipe.recv()
            Exchange.close(None)  # type: ignore[arg-type]

    with Silent() as proxy:
        transport = transport_for(proxy=proxy.url.replace("http", "socks5"))
        async with httpx.AsyncClient(transport=transport) as client:
            request = client.build_request("POST", "http://origin.invalid/ok", timeout=httpx.Timeout(30, connect=0.01))
            with anyio.fail_after(10), pytest.raises(httpx.ConnectTimeout, match="SOCKS"):
                await client.send(request)
        record = request.extensions[EXTENSION]
        assert (record.bytes_written, record.phase) == (0, "connect")
        assert_nothing_in_use(transport.pool)


@pytest.mark.parametrize("proxy", ["gopher://127.0.0.1", "http://user:hunter2@host:port", 7, "127.0.0.1:80"])
def test_what_is_no_proxy_is_refused_without_quoting_it(proxy: Any) -> None:
    for make in (LayerTransport, HTTPClient):
        with pytest.raises(ConfigurationError) as caught:
            make(proxy=proxy)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(("name", "words"), [("pool", "a ConnectionPool"), ("limits", "httpx.Limits")])
def test_a_pool_and_limits_of_another_kind_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be {words}, not int"):
        LayerTransport(**{name: 7})  # type: ignore[arg-type]


# The client


async def test_the_client_shares_one_pool_between_the_environments_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as proxy, FaultServer() as direct:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        async with HTTPClient(limits=limits(4), verify=client_context()) as client:
            assert (await client.get("http://origin.invalid/ok")).text == "http://origin.invalid/ok"
            assert (await client.get("https://origin.invalid/ok")).text == "/ok"
            assert (await client.get(f"{direct.url}/ok")).text == "/ok"
            assert client.connection_pool is not None
            assert client.connection_pool.stats.open == 3
        assert client.connection_pool.stats.open == 0
        assert (proxy.record.connections, direct.record.connections) == (2, 1)
        async with HTTPClient(trust_env=False) as client:
            assert (await client.get(f"{direct.url}/ok")).text == "/ok"
            assert not client._mounts


async def test_the_client_takes_a_proxy_as_an_argument(plain: FaultServer) -> None:
    async with HTTPClient(proxy=plain.url) as client:
        assert (await client.get("http://origin.invalid/ok")).text == "http://origin.invalid/ok"


async def test_the_client_goes_with_another_transport_and_then_has_no_pool() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="mocked"))
    async with HTTPClient(transport=transport) as client:
        assert (await client.get("http://origin.invalid/")).text == "mocked"
        assert client.connection_pool is None


async def test_the_client_leaves_keep_alive_to_http_unless_told_otherwise() -> None:
    async with HTTPClient() as client, HTTPClient(headers={"Connection": "close"}) as closing:
        assert "connection" not in client.headers
        assert closing.headers["connection"] == "close"


async def test_the_client_keeps_no_cookies_and_names_the_codings_it_surely_knows(plain: FaultServer) -> None:
    def bake(ex: Exchange) -> None:
        ex.respond(b"", headers="Set-Cookie: a=b; Path=/\r\n")

    plain.behaviours["bake"] = bake
    async with HTTPClient(headers={"X-Mine": "1"}) as client:
        assert (await client.get(f"{plain.url}/bake")).headers["set-cookie"]
        await client.get(f"{plain.url}/ok")
    assert not client.cookies
    last = plain.record.requests[-1].headers
    assert "cookie" not in last
    assert (last["accept-encoding"], last["x-mine"]) == ("gzip, deflate", "1")
    async with HTTPClient(headers={"accept-encoding": "identity"}) as client:
        client.cookies = {"mine": "1"}
        await client.get(f"{plain.url}/ok")
    assert plain.record.requests[-1].headers["cookie"] == "mine=1"
    assert plain.record.requests[-1].headers["accept-encoding"] == "identity"


async def test_a_response_that_is_closed_is_nothing_for_the_garbage_collector(server: FaultServer) -> None:
    async with HTTPClient(verify=client_context()) as client:
        gc.collect()
        gc.disable()
        try:
            response = await client.get(f"{server.url}/ok/1")
            request, last = weakref.ref(response.request), weakref.ref(response)
            stream = response.stream
            assert isinstance(stream, httpx.AsyncByteStream)
            assert response.elapsed
            await response.aclose()
            with pytest.raises(httpx.StreamClosed):
                stream.__aiter__()
            await stream.aclose()
            del response, stream
            assert last() is None
            assert request() is None
        finally:
            gc.enable()


# Other event loops, other processes

RUNS = [pytest.param(lambda main: asyncio.run(main()), id="asyncio"), pytest.param(trio.run, id="trio")]
Run = Callable[[Callable[[], Any]], Any]


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_a_client_goes_on_under_a_second_event_loop(server: FaultServer, first: Run, second: Run) -> None:
    client = HTTPClient(verify=client_context())
    pool = client.connection_pool
    assert pool is not None

    async def work() -> None:
        response = await client.get(f"{server.url}/ok/1")
        assert response.text == "/ok/1"
        assert not record_of(response).reused
        assert pool.stats.open == 1

    first(work)
    second(work)
    asyncio.run(client.aclose())
    assert pool.stats.open == 0


FORK = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from layer_async._transport import HTTPClient

async def get(client, url, number):
    response = await client.get(f"{url}/ok/{number}")
    assert response.text == f"/ok/{number}", response.text
    return response.request.extensions["layer_async"].reused

async def work(client, url):
    assert not await get(client, url, 0)
    child = os.fork()
    if child == 0:
        try:  # a loop of its own, as every child must have
            asyncio._set_running_loop(None)
            asyncio.run(in_child(client, url))
        except BaseException as exc:
            print(repr(exc))
            os._exit(1)
        os._exit(0)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert status == 0, status
    for number in range(3):
        assert await get(client, url, number), "the parent's connection was spoilt"
    await client.aclose()

async def in_child(client, url):
    assert not await get(client, url, 10), "the child used its parent's connection"
    assert await get(client, url, 11)
    await client.aclose()

asyncio.run(work(HTTPClient(verify=False), sys.argv[2]))
"""


def test_after_a_fork_parent_and_child_go_on_with_connections_of_their_own(server: FaultServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(ROOT), server.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.record.connections == 2


# Other tools


@pytest.mark.parametrize("using", ["httpcore", "httpx"])
async def test_respx_needs_no_setting_and_mocked_calls_use_up_no_slot(using: str) -> None:
    with respx.mock(using=using) as mock:
        route = mock.get("https://origin.invalid/mocked").mock(return_value=httpx.Response(200, json={"mocked": True}))
        async with HTTPClient(limits=limits(10)) as client:
            for _ in range(200):
                with anyio.fail_after(5):
                    assert (await client.get("https://origin.invalid/mocked")).json() == {"mocked": True}
            pool = client.connection_pool
            assert pool is not None
            assert_nothing_in_use(pool)
            assert pool.stats.open == 0
    assert route.call_count == 200


@pytest.mark.parametrize("using", ["httpcore", "httpx"])
async def test_what_respx_passes_through_goes_over_our_pool(server: FaultServer, using: str) -> None:
    async with HTTPClient(limits=limits(1), verify=client_context()) as client:
        pool = client.connection_pool
        assert pool is not None
        await client.get(f"{server.url}/ok/0")
        with respx.mock(using=using) as mock:
            mock.get("https://origin.invalid/mocked").mock(side_effect=httpx.ConnectError)
            mock.route(host="127.0.0.1").pass_through()
            for number in range(3):
                response = await client.post(f"{server.url}/echo", content=f"{number}")
                assert response.text == f"{number}"
                request = client.build_request("GET", "https://origin.invalid/mocked")
                with pytest.raises(httpx.ConnectError):
                    await client.send(request)
                record = ExchangeRecord.of(request)
                assert record.bytes_written is None, "a mocked failure says nothing about the wire"
                assert_nothing_in_use(pool)
    assert server.record.connections == 1 if using == "httpx" else len(server.record.requests) == 4


async def test_an_endless_mocked_body_can_be_left_early() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x"

    transport = transport_for(1)
    body = endless()
    with respx.mock() as mock:
        mock.get("https://origin.invalid/").mock(return_value=httpx.Response(200, stream=Stream(body)))
        async with httpx.AsyncClient(transport=transport) as client:
            async with client.stream("GET", "https://origin.invalid/") as response:
                assert response.status_code == 200
            assert_nothing_in_use(transport.pool)


class Stream(httpx.AsyncByteStream):
    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self.body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.body


async def test_an_endless_stream_below_ours_is_not_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool at the connection's own seam: its stream is closed, not exhausted."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x"

    body = endless()

    async def mocked(self: Any, request: httpcore.Request) -> httpcore.Response:
        return httpcore.Response(200, content=body)

    monkeypatch.setattr(httpcore.AsyncHTTPConnection, "handle_async_request", mocked)
    transport = transport_for(1)
    response = await transport.handle_async_request(httpx.Request("GET", "https://origin.invalid/"))
    stream: Any = response.stream
    assert await stream._httpcore_stream.__anext__() == b"x"
    await stream.aclose()
    assert_nothing_in_use(transport.pool)
    with pytest.raises(StopAsyncIteration):
        await anext(body)


async def test_pytest_httpx_sees_every_call(httpx_mock: pytest_httpx.HTTPXMock) -> None:
    httpx_mock.add_response(text="mocked")
    async with HTTPClient() as client:
        assert (await client.get("https://origin.invalid/")).text == "mocked"
    assert len(httpx_mock.get_requests()) == 1


async def test_vcr_records_and_plays(server: FaultServer, tmp_path: pathlib.Path) -> None:
    cassette = str(tmp_path / "cassette.yaml")
    async with HTTPClient(limits=limits(1), verify=client_context()) as client:
        for _ in range(2):
            with vcr.use_cassette(cassette):
                assert (await client.get(f"{server.url}/ok/1")).text == "/ok/1"
        pool = client.connection_pool
        assert pool is not None
        assert_nothing_in_use(pool)
    assert len(server.record.requests) == 1


@pytest.mark.parametrize("proxied", [False, True])
async def test_a_function_in_place_of_httpcores_pools_own_is_gone_through(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, proxied: bool
) -> None:
    """As older tools do it: a recorder around the pool; what it lets through ends in our pool, slots and all."""
    owner: Any = httpcore.AsyncHTTPProxy if proxied else httpcore.AsyncConnectionPool
    real = owner.handle_async_request
    seen: list[tuple[str, type]] = []

    async def recorder(self: Any, request: httpcore.Request) -> httpcore.Response:
        seen.append((request.url.target.decode(), type(self)))
        response: httpcore.Response = await real(self, request)
        (connection,) = self._connections
        assert connection.info() == repr(transport.pool)
        assert connection.can_handle_request(request.url.origin)
        assert not connection.is_available()
        return response

    transport = transport_for(1, proxy=server.url if proxied else None)
    monkeypatch.setattr(owner, "handle_async_request", recorder)
    url = "https://origin.invalid" if proxied else server.url
    async with httpx.AsyncClient(transport=transport) as client:
        for number in range(3):
            assert (await client.get(f"{url}/ok/{number}")).text == f"/ok/{number}"
            assert_nothing_in_use(transport.pool)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(f"{url}/truncate-length")
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(f"{url}/close")
        assert_nothing_in_use(transport.pool)
    assert seen[:3] == [(f"/ok/{number}", owner) for number in range(3)]
    assert server.record.connections == 2


async def test_a_tools_callable_object_is_gone_through_as_well(
    plain: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replacement:
        async def __call__(self, pool: Any, request: httpcore.Request) -> httpcore.Response:
            return httpcore.Response(200, content=b"replaced")

    monkeypatch.setattr(httpcore.AsyncConnectionPool, "handle_async_request", Replacement())
    async with httpx.AsyncClient(transport=transport_for()) as client:
        assert (await client.get(f"{plain.url}/ok")).text == "replaced"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_open_telemetrys_instrumentor_sees_every_call(server: FaultServer) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    client = HTTPClient(verify=client_context())
    HTTPXClientInstrumentor().instrument(tracer_provider=provider)
    try:
        for number in range(3):
            await client.get(f"{server.url}/ok/{number}")
    finally:
        HTTPXClientInstrumentor().uninstrument()
    await client.aclose()
    spans = exporter.get_finished_spans()
    assert [span.attributes["http.status_code"] for span in spans if span.attributes] == [200] * 3


async def test_a_function_set_on_the_transport_object_is_gone_through(plain: FaultServer) -> None:
    transport = transport_for()
    real = transport.handle_async_request
    seen: list[str] = []

    async def wrapped(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        return await real(request)

    transport.handle_async_request = wrapped  # type: ignore[method-assign]
    async with httpx.AsyncClient(transport=transport) as client:
        await client.get(f"{plain.url}/ok")
    assert seen == ["/ok"]


async def test_httpcores_own_trace_extension_works(plain: FaultServer) -> None:
    events: list[str] = []

    async def trace(name: str, info: dict[str, Any]) -> None:
        events.append(name)

    async with httpx.AsyncClient(transport=transport_for()) as client:
        await client.get(f"{plain.url}/ok", extensions={"trace": trace})
    assert events[0] == "connection.connect_tcp.started"
    assert events[-1] == "http11.response_closed.complete"


# Which connections


def kinds(transport: LayerTransport) -> list[str]:
    return [type(connection).__name__ for connection in transport.pool._idle]


async def test_on_asyncio_the_connections_are_of_our_own_making(
    server: FaultServer, anyio_backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = "WireConnection" if anyio_backend_name == "asyncio" else "PortableConnection"
    for proxy, url in (
        (None, server.url),
        (server.url, "http://origin.invalid"),
        (server.url, "https://origin.invalid"),
    ):
        transport = transport_for(proxy=proxy)
        async with httpx.AsyncClient(transport=transport) as client:
            for number in range(2):
                response = await client.get(f"{url}/ok/{number}")
                assert response.text.endswith(f"/ok/{number}")
                assert kinds(transport) == [ours]
            assert record_of(response).reused
            stream = response.extensions["network_stream"]
            assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
    # Without the names that asyncio would have, none can be of ours.
    monkeypatch.delitem(sys.modules, "asyncio")
    assert not transport_for()._pool.is_wired(b"http", {})


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (httpcore.AsyncHTTPConnection, "handle_async_request"),
        (httpcore.AsyncHTTP11Connection, "handle_async_request"),
        (httpcore.AsyncConnectionPool, "create_connection"),
        (httpcore.AsyncHTTPProxy, "create_connection"),
    ],
)
async def test_a_tool_below_the_pool_sees_httpcores_own_connections(
    plain: FaultServer, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """Also one that comes while connections of ours are idle; and when it goes, those serve again."""
    proxied = owner is httpcore.AsyncHTTPProxy
    transport = transport_for(proxy=plain.url if proxied else None)
    url = "http://origin.invalid" if proxied else plain.url
    real = getattr(owner, name)
    calls: list[object] = []

    def wrapped(self: Any, *args: Any) -> Any:
        calls.append(self)
        return real(self, *args)

    async with httpx.AsyncClient(transport=transport) as client:
        await client.get(f"{url}/ok/1")
        before = kinds(transport)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrapped)
            for number in range(2):
                await client.get(f"{url}/ok/{number}")
            assert calls or "create" in name  # on trio, an idle one needs not be made
        assert kinds(transport)[-1] == "PortableConnection"
        await client.get(f"{url}/ok/2")
        assert kinds(transport)[-1:] == before


@pytest.mark.parametrize("proxied", [False, True])
async def test_a_proxy_gets_its_fields_and_the_origin_does_not(server: FaultServer, proxied: bool) -> None:
    url = server.url.replace("://", "://user:pass@")
    proxy = httpx.Proxy(url, headers={"X-Proxy": "1"}, ssl_context=client_context() if server.tls else None)
    async with httpx.AsyncClient(transport=transport_for(proxy=proxy)) as client:
        await client.get(f"{'http' if proxied else 'https'}://origin.invalid/ok")
    first, last = server.record.requests[0].headers, server.record.requests[-1].headers
    assert (first["proxy-authorization"], first["x-proxy"]) == ("Basic dXNlcjpwYXNz", "1")
    assert ("proxy-authorization" in last, "x-proxy" in last) == (proxied, proxied)


async def test_a_body_that_came_with_its_head_can_be_closed_and_iterated_in_any_order(plain: FaultServer) -> None:
    transport = transport_for(1)
    for path in ("ok/1", "chunked"):
        response = await transport.handle_async_request(httpx.Request("GET", f"{plain.url}/{path}"))
        inner: Any = response.stream
        inner = inner._httpcore_stream
        assert inner.__aiter__() is inner
        await inner.aclose()
        await inner.aclose()
        with pytest.raises(StopAsyncIteration):
            await inner.__anext__()
        assert_nothing_in_use(transport.pool)
    await transport.aclose()


# Private names


def test_the_private_names_that_this_room_leans_on_are_there() -> None:
    assert not _transport.missing()
    assert _transport.missing(((httpx.AsyncClient, "_gone"), (LayerTransport.__init__, "_away"))) == [
        "AsyncClient: _gone",
        "LayerTransport.__init__: _away",
    ]


def test_httpxs_own_entrance_is_not_overridden() -> None:
    assert "handle_async_request" not in vars(LayerTransport)
    assert (
        os.path.basename(httpcore.AsyncConnectionPool.handle_async_request.__code__.co_filename) == "connection_pool.py"
    )
