"""The clients that race, each one small function: open the client for a cell, and yield its `get`.

Rules: a `get` fetches one path, reads the whole body and checks that it is the right one; nothing else is in it. Peers
are bare: no tokens, no retry, whole URLs, at most as many connections as the cell says, generous timeouts. Ours runs as
its users run it: everything on, both tokens, decoding included. A peer that is not installed is skipped. To add one,
write its function and its line in `PEERS`; nothing else knows the names, except that ratios are taken to `BASELINES`.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import attrs

from .document import Document, WrongAnswerError, check

Get = Callable[[str], Awaitable[None]]

BASELINES = ("aiohttp", "httpx")
PATIENCE = 300.0  # seconds for any phase: the race bounds a cell itself


@attrs.frozen
class Cell:
    """One peer under one load.

    `url` is the origin's, `authority` the PEM to trust there (empty: no TLS). `concurrency` workers make calls over at
    most `connections` connections, for `seconds` and at least `least_calls` calls. `size` is the length of a body.
    """

    peer: str
    url: str
    authority: str
    concurrency: int
    connections: int
    seconds: float
    least_calls: int
    size: int

    def context(self) -> ssl.SSLContext:
        """A context that trusts the origin and nobody else (nobody at all without TLS)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.authority:
            context.load_verify_locations(cadata=self.authority)
        return context


Open = Callable[[Cell], AbstractAsyncContextManager[Get]]


@attrs.frozen
class Peer:
    """A client that takes part.

    `title` is what tables call it; `needs` is what must be importable ("module" or "module:name"); `packages` are those
    whose versions matter. `often`: it takes part in every round, the others in each third.
    """

    title: str
    open: Open
    needs: str
    packages: tuple[str, ...]
    often: bool = False

    def missing(self) -> str | None:
        """Why this peer cannot take part here, or None."""
        try:
            pkgutil.resolve_name(self.needs)
        except (ImportError, AttributeError) as error:
            return str(error)
        return None


@asynccontextmanager
async def _layer_async(cell: Cell) -> AsyncIterator[Get]:
    import httpx

    from layer_async import AsyncLayerClient

    async with AsyncLayerClient(
        token1="benchmark-token-1",
        token2="benchmark-token-2",
        base_url=cell.url,
        timeout=PATIENCE,
        verify=cell.context(),
        limits=httpx.Limits(max_connections=cell.connections),
    ) as client:

        async def get(path: str) -> None:
            document = await client.get(path, into=Document)
            if document.path != path:
                raise WrongAnswerError(f"GET {path} was answered with {document.path}")

        yield get


def _with_a_tool_at(owner: str, name: str) -> Open:
    """Ours, with a function of httpx replaced by one that only passes on, as tracing and mocking tools do."""

    @asynccontextmanager
    async def touched(cell: Cell) -> AsyncIterator[Get]:
        where = pkgutil.resolve_name(owner)
        original = getattr(where, name)

        async def passing_on(self: Any, *args: Any, **options: Any) -> Any:
            return await original(self, *args, **options)

        setattr(where, name, passing_on)
        async with _layer_async(cell) as get:
            yield get

    return touched


@asynccontextmanager
async def _layer_transport(cell: Cell) -> AsyncIterator[Get]:
    import httpx

    from layer_async import LayerTransport

    limits = httpx.Limits(max_connections=cell.connections)
    transport = LayerTransport(limits=limits, verify=cell.context())
    async with httpx.AsyncClient(transport=transport, timeout=PATIENCE) as client:
        yield _httpx_get(cell, client)


@asynccontextmanager
async def _httpx(cell: Cell) -> AsyncIterator[Get]:
    import httpx

    async with httpx.AsyncClient(verify=cell.context(), timeout=PATIENCE) as client:
        yield _httpx_get(cell, client)


@asynccontextmanager
async def _httpx_limits(cell: Cell) -> AsyncIterator[Get]:
    import httpx

    limits = httpx.Limits(max_connections=cell.connections, max_keepalive_connections=cell.connections)
    async with httpx.AsyncClient(verify=cell.context(), timeout=PATIENCE, limits=limits) as client:
        yield _httpx_get(cell, client)


@asynccontextmanager
async def _httpx2(cell: Cell) -> AsyncIterator[Get]:
    import httpx2

    limits = httpx2.Limits(max_connections=cell.connections, max_keepalive_connections=cell.connections)
    async with httpx2.AsyncClient(verify=cell.context(), timeout=PATIENCE, limits=limits) as client:
        yield _httpx_get(cell, client)


@asynccontextmanager
async def _httpx_aiohttp(cell: Cell) -> AsyncIterator[Get]:
    import httpx

    library: Any = importlib.import_module("httpx_aiohttp")
    limits = httpx.Limits(max_connections=cell.connections, max_keepalive_connections=cell.connections)
    async with library.HttpxAiohttpClient(verify=cell.context(), timeout=PATIENCE, limits=limits) as client:
        yield _httpx_get(cell, client)


def _httpx_get(cell: Cell, client: Any) -> Get:
    url, size = cell.url, cell.size

    async def get(path: str) -> None:
        response = await client.get(url + path)
        check(path, response.status_code, response.content, size)

    return get


@asynccontextmanager
async def _aiohttp(cell: Cell) -> AsyncIterator[Get]:
    import aiohttp

    url, size = cell.url, cell.size
    connector = aiohttp.TCPConnector(limit=cell.connections, ssl=cell.context())
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def get(path: str) -> None:
            async with session.get(url + path) as response:
                check(path, response.status, await response.read(), size)

        yield get


@asynccontextmanager
async def _niquests(cell: Cell) -> AsyncIterator[Get]:
    library: Any = importlib.import_module("niquests")
    url, size, verify = cell.url, cell.size, cell.authority or True
    async with library.AsyncSession(pool_maxsize=cell.connections, timeout=PATIENCE) as session:

        async def get(path: str) -> None:
            response = await session.get(url + path, verify=verify)
            check(path, response.status_code, response.content, size)

        yield get


@asynccontextmanager
async def _aiosonic(cell: Cell) -> AsyncIterator[Get]:
    library: Any = importlib.import_module("aiosonic")
    pools: Any = importlib.import_module("aiosonic.pools")
    times: Any = importlib.import_module("aiosonic.timeout")
    url, size = cell.url, cell.size
    context = cell.context() if cell.authority else None  # given one, it speaks TLS to http URLs too
    connector = library.TCPConnector(
        pool_configs={":default": pools.PoolConfig(size=cell.connections)},
        timeouts=times.Timeouts(sock_connect=PATIENCE, sock_read=PATIENCE, request_timeout=PATIENCE),
    )
    async with library.HTTPClient(connector) as client:

        async def get(path: str) -> None:
            response = await client.get(url + path, ssl=context)
            check(path, response.status_code, await response.content(), size)

        yield get


@asynccontextmanager
async def _pyreqwest(cell: Cell) -> AsyncIterator[Get]:
    library: Any = importlib.import_module("pyreqwest.client")
    url, size = cell.url, cell.size
    builder = library.ClientBuilder().max_connections(cell.connections).http1_only()
    if cell.authority:
        builder = builder.add_root_certificate_pem(cell.authority.encode())
    async with builder.build() as client:

        async def get(path: str) -> None:
            response = await client.get(url + path).build().send()
            check(path, response.status, bytes(await response.bytes()), size)

        yield get


class _Exchange(asyncio.Protocol):
    """HTTP by hand: as little as it takes to send one request at a time and to know where its answer ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.parser: Any = None

    def send(self, request: bytes) -> asyncio.Future[bytes]:
        import httptools

        self.parser = httptools.HttpResponseParser(self)
        self.pieces: list[bytes] = []
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        self.answer.set_result(b"".join(self.pieces))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.parser is not None and not self.answer.done():
            self.answer.set_exception(exc or ConnectionError("closed"))


@asynccontextmanager
async def _by_hand(cell: Cell) -> AsyncIterator[Get]:
    url: Any = urllib.parse.urlsplit(cell.url)
    context = cell.context() if cell.authority else None
    slots = asyncio.Semaphore(cell.connections)
    idle: list[_Exchange] = []
    loop, host, port = asyncio.get_running_loop(), url.hostname, url.port

    async def get(path: str) -> None:
        async with slots:
            if idle:
                exchange = idle.pop()
            else:
                _, exchange = await loop.create_connection(_Exchange, host, port, ssl=context)
            body = await exchange.send(f"GET {path} HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode())
            check(path, exchange.parser.get_status_code(), body, cell.size)
            idle.append(exchange)

    yield get
    for exchange in idle:
        exchange.transport.abort()


OURS = "layer_async:AsyncLayerClient"
PEERS: dict[str, Peer] = {
    "layer_async": Peer("layer_async, whole call", _layer_async, OURS, ("httpx", "httptools", "msgspec"), often=True),
    "transport-seam": Peer(
        "layer_async, a tool at httpx's transport",
        _with_a_tool_at("httpx:AsyncHTTPTransport", "handle_async_request"),
        OURS,
        ("httpx",),
        often=True,
    ),
    "client-seam": Peer(
        "layer_async, a tool at httpx's client",
        _with_a_tool_at("httpx:AsyncClient", "send"),
        OURS,
        ("httpx",),
        often=True,
    ),
    "LayerTransport": Peer("httpx over LayerTransport", _layer_transport, "layer_async:LayerTransport", ("httpx",)),
    "httpx": Peer("httpx, default limits", _httpx, "httpx", ("httpx", "httpcore")),
    "httpx-limits": Peer("httpx, limits = C", _httpx_limits, "httpx", ("httpx", "httpcore")),
    "httpx2": Peer("httpx2", _httpx2, "httpx2", ("httpx2", "httpcore2")),
    "aiohttp": Peer("aiohttp", _aiohttp, "aiohttp", ("aiohttp",), often=True),
    "httpx-aiohttp": Peer("httpx over aiohttp", _httpx_aiohttp, "httpx_aiohttp", ("httpx-aiohttp", "aiohttp")),
    "niquests": Peer("niquests", _niquests, "niquests", ("niquests",)),
    "aiosonic": Peer("aiosonic", _aiosonic, "aiosonic", ("aiosonic",)),
    "pyreqwest": Peer("pyreqwest (Rust)", _pyreqwest, "pyreqwest.client", ("pyreqwest",)),
    "by-hand": Peer("asyncio and httptools by hand", _by_hand, "httptools", ("httptools",)),
}
