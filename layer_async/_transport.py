"""httpx above, our pool below: `LayerTransport`, and the `httpx.AsyncClient` that uses it for its proxies too.

Rules: httpx's own entrance, `AsyncHTTPTransport.handle_async_request`, is not overridden, and httpcore's pool and
connection classes are looked up at each call: a tool that has put its own function there, before our import or after
it, is always gone through. A slot goes back when the response is closed, whoever acquired it, without an await between
the end of the answer and that; a connection whose answer did not end well is closed before anything is awaited.

Private names of httpx and httpcore on which this room leans are in `PRIVATE`, and looked for at import.
"""

from __future__ import annotations

import base64
import functools
import os
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import httpcore
import httpx
from typing_extensions import override

from ._errors import ClientClosedError, ConfigurationError
from ._exchange import ExchangeRecord
from ._pool import ConnectionPool, Slot, SlotTimeout
from ._portable import PortableConnection
from ._seams import Seam, are_untouched

if TYPE_CHECKING:
    from ._wire import Proxy, WireConnection

__all__ = ["AnswerStream", "HTTPClient", "LayerTransport", "PoolAdapter", "free", "raise_if_revoked"]

LIMITS = httpx.Limits(max_connections=100, keepalive_expiry=30.0)
SCHEMES = {b"http": 80, b"https": 443, b"ws": 80, b"wss": 443}
ACCEPT_ENCODING = "gzip, deflate"  # the codings that every installation of httpx can decode

PRIVATE: tuple[tuple[Any, str], ...] = (  # a class that has the name, or a function that sets or reads it
    (httpx.AsyncClient, "_send_single_request"),
    (httpx.AsyncClient, "_build_redirect_request"),
    (httpx.AsyncClient, "_init_transport"),
    (httpx.AsyncClient, "_init_proxy_transport"),
    (httpx.AsyncHTTPTransport.__init__, "_pool"),
    (httpcore.AsyncConnectionPool.create_connection, "_network_backend"),
    (httpcore.AsyncHTTPProxy.create_connection, "_network_backend"),
    (httpcore.AsyncHTTPProxy.create_connection, "_proxy_url"),
)


def missing(names: tuple[tuple[Any, str], ...] = PRIVATE) -> list[str]:
    """Which of `names` the installed httpx and httpcore do not have."""
    return [
        f"{owner.__qualname__}: {name}"
        for owner, name in names
        if not (name in owner.__code__.co_names if hasattr(owner, "__code__") else hasattr(owner, name))
    ]


if missing():  # pragma: no cover - the versions that pyproject.toml admits have them all
    raise ImportError(f"httpx {httpx.__version__} or httpcore {httpcore.__version__} has changed: {missing()}")

_contexts: dict[tuple[object, ...], ssl.SSLContext] = {}


def ssl_context(verify: bool | ssl.SSLContext = True, *, trust_env: bool = True) -> ssl.SSLContext:  # noqa: FBT001, FBT002 - httpx's own argument
    """The TLS configuration for `verify`, made once a process: reading the certificates takes tens of milliseconds.

    With `trust_env`, SSL_CERT_FILE and SSL_CERT_DIR name the certificates to trust, as in httpx. Raises
    `ConfigurationError` for anything but a bool or an `ssl.SSLContext`, and where the certificates cannot be read.
    """
    if isinstance(verify, ssl.SSLContext):
        return verify
    if not isinstance(verify, bool):
        raise ConfigurationError(
            f"verify must be True, False or an ssl.SSLContext, not {type(verify).__name__}: "
            "pass an ssl.SSLContext, such as ssl.create_default_context(cafile=...)."
        )
    environment = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")) if trust_env else ()
    key = (verify, *environment)
    if key not in _contexts:
        try:
            _contexts[key] = httpx.create_ssl_context(verify=verify, trust_env=trust_env)
        except OSError as exc:
            raise ConfigurationError(
                f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR name cannot be read: {exc}."
            ) from exc
    return _contexts[key]


def checked_proxy(proxy: str | httpx.URL | httpx.Proxy, context: ssl.SSLContext) -> httpx.Proxy:
    """`proxy` with the client's own TLS configuration for an https:// one; `ConfigurationError` for no proxy URL."""
    try:
        given = proxy if isinstance(proxy, httpx.Proxy) else httpx.Proxy(proxy)
    except (ValueError, httpx.InvalidURL, TypeError):
        # The cause would quote the URL, and with it the password.
        raise ConfigurationError(
            "proxy must be a URL that begins with http://, https://, socks5:// or socks5h://."
        ) from None
    if given.url.scheme == "https" and given.ssl_context is None:
        return httpx.Proxy(given.url, ssl_context=context, auth=given.auth, headers=given.headers)
    return given


class LayerTransport(httpx.AsyncHTTPTransport):
    """A transport for any `httpx.AsyncClient`, over a pool that does not leak, does not rescan, and keeps the order.

    `limits`: connections in all (100), idle ones (no bound), and for how many seconds those are kept (30). `verify`:
    True, False or an `ssl.SSLContext`. `proxy`: its URL, or an `httpx.Proxy`; the environment's proxies are a matter of
    the client, not of a transport. `trust_env`: whether SSL_CERT_FILE and SSL_CERT_DIR count. `pool`: share the pool of
    another transport; then `limits` are that one's. HTTP/1.1 only.

    Raises `ConfigurationError` for arguments that make no sense. Its requests raise httpx's errors, and
    `ClientClosedError` once it is closed.
    """

    def __init__(
        self,
        *,
        limits: httpx.Limits = LIMITS,
        verify: bool | ssl.SSLContext = True,
        proxy: str | httpx.URL | httpx.Proxy | None = None,
        trust_env: bool = True,
        pool: ConnectionPool | None = None,
    ) -> None:
        if pool is not None and not isinstance(pool, ConnectionPool):
            raise ConfigurationError(f"pool must be a ConnectionPool, not {type(pool).__name__}.")
        if not isinstance(limits, httpx.Limits):
            raise ConfigurationError(f"limits must be httpx.Limits, not {type(limits).__name__}.")
        self.pool: ConnectionPool = ConnectionPool(limits) if pool is None else pool
        context = ssl_context(verify, trust_env=trust_env)
        if proxy is not None:
            proxy = checked_proxy(proxy, context)
        super().__init__(verify=context, trust_env=trust_env, limits=limits, proxy=proxy)
        self._pool: Any = PoolAdapter(self._pool, self.pool, proxy, context)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pool!r}>"


class PoolAdapter:
    """Stands where `httpx.AsyncHTTPTransport` keeps httpcore's pool; that one, `factory`, only makes connections."""

    def __init__(self, factory: Any, pool: ConnectionPool, proxy: httpx.Proxy | None, context: ssl.SSLContext) -> None:
        self._factory = factory
        self._pool = pool
        self._context = context
        self._proxy = proxy
        self._proxy_layers = int(proxy is not None and proxy.url.scheme == "https")
        # SOCKS is httpcore's affair.
        self.entrance: Seam = Seam(type(factory), "handle_async_request")
        self._asyncio_loop: object = self  # none that runs
        self._can_be_wired = proxy is None or proxy.url.scheme in ("http", "https")

    async def __aenter__(self) -> PoolAdapter:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the pool."""
        await self._pool.aclose()

    def __repr__(self) -> str:
        return repr(self._pool)

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        """Send `request` on a slot of the pool, through whatever a tool has put before httpcore's own pool."""
        if self.entrance.is_untouched():
            return await self.send(request)
        seam: Any = type(self._factory).handle_async_request
        return await seam(_stand_in(self._factory, self), request)  # type: ignore[no-any-return]

    async def send(self, request: httpcore.Request) -> httpcore.Response:
        """Send `request` on a slot of the pool."""
        if request.url.scheme not in SCHEMES:
            raise httpcore.UnsupportedProtocol("the URL is neither http:// nor https://")
        record, origin = ExchangeRecord.of(request), request.url.origin  # no local variable shows a query
        slot = await self.slot(record, request.extensions)
        try:
            if self.is_wired(origin.scheme, request.extensions):
                answer = self.wired(slot, record, origin.scheme, origin.host, origin.port, request.extensions)
                response = await answer.handle(request, record)
                response.stream = AnswerStream(response.stream, answer, slot, record)
            else:
                connection = self._portable(slot, record, origin, request.extensions)
                response = await connection.handle(request, record)
                response.stream = _ResponseStream(response.stream, connection, slot, record)
        except BaseException as exc:
            free(slot, record)
            raise_if_revoked(slot, record, exc)
            raise
        return response

    async def slot(self, record: ExchangeRecord, extensions: Mapping[str, Any]) -> Slot:
        """The slot that the caller holds already, else the next one. Raises `httpcore.PoolTimeout`."""
        slot = record.slot
        if isinstance(slot, Slot) and slot.is_free_for(self._pool):
            return slot
        record.bytes_written, record.response_started, record.head_received, record.reused = 0, False, False, False
        phase, record.phase = record.phase, "queue"
        try:
            slot = await self._pool.acquire(extensions.get("timeout", {}).get("pool"))
        except SlotTimeout as exc:
            raise httpcore.PoolTimeout(str(exc)) from exc
        record.slot, record.phase = slot, phase
        return slot

    # Connections differ by their kind, the transport that made them (its TLS, its proxy), and the name that was
    # verified: all that is in their route.

    def wired(
        self, slot: Slot, record: ExchangeRecord, scheme: bytes, host: bytes, port: int, extensions: Mapping[str, Any]
    ) -> WireConnection:
        """A connection of our own making, on `slot`; only where `is_wired`."""
        name: str | None = extensions.get("sni_hostname")
        record.begin_attempt()

        def connect() -> WireConnection:
            return self._wire(scheme, host.decode("ascii"), port, name)

        return slot.take((self, scheme, host, port, name), connect, fresh=record.fresh)

    def idle(self, slot: Slot, scheme: bytes, host: bytes, port: int) -> WireConnection | None:
        """The same where that is open already, else None."""
        return cast("WireConnection | None", slot.take_idle((self, scheme, host, port, None)))

    def _portable(
        self, slot: Slot, record: ExchangeRecord, origin: httpcore.Origin, extensions: Mapping[str, Any]
    ) -> PortableConnection:
        name = extensions.get("sni_hostname")
        record.begin_attempt()

        def connect() -> PortableConnection:
            layers = self._proxy_layers + (origin.scheme in (b"https", b"wss"))
            return PortableConnection(self._factory, origin, tls_layers=layers)

        return slot.take((None, self, origin.scheme, origin.host, origin.port, name), connect, fresh=record.fresh)

    def is_wired(self, scheme: bytes, extensions: Mapping[str, Any]) -> bool:
        """Whether nothing is lost by a connection of our own making: on asyncio, where no tool looks at httpcore's."""
        return (
            scheme in WIRED_SCHEMES
            and "trace" not in extensions
            and are_untouched(STEPPED_OVER)
            and (self._pool.loop is self._asyncio_loop or self._is_on_asyncio())
        )

    def _is_on_asyncio(self) -> bool:
        """Asked once for each event loop: a call has been to the pool by now, which so knows the one that runs."""
        if not (self._can_be_wired and "asyncio" in sys.modules and _wire_room().is_on_asyncio()):
            return False
        self._asyncio_loop = self._pool.loop
        return True

    def _wire(self, scheme: bytes, host: str, port: int, server_name: str | None) -> WireConnection:
        connection: WireConnection = _wire_room().WireConnection(
            host,
            port,
            tls=self._context if scheme == b"https" else None,
            server_hostname=server_name,
            proxy=None if self._proxy is None else self._wire_proxy(self._proxy),
        )
        return connection

    def _wire_proxy(self, proxy: httpx.Proxy) -> Proxy:
        url = proxy.url
        fields = proxy.headers.raw
        if proxy.raw_auth is not None:
            user, password = proxy.raw_auth
            fields = [(b"Proxy-Authorization", b"Basic " + base64.b64encode(user + b":" + password)), *fields]
        tls = proxy.ssl_context if url.scheme == "https" else None
        port = url.port or SCHEMES[url.raw_scheme]
        made: Proxy = _wire_room().Proxy(url.raw_host.decode("ascii"), port, tls=tls, fields=fields)
        return made


@functools.cache
def _wire_room() -> Any:
    """Loaded where asyncio is already: a program on trio needs neither."""
    from . import _wire

    return _wire


WIRED_SCHEMES = (b"http", b"https")
# What connections of ours step over: where a tool has put its own function, httpcore's are made.
STEPPED_OVER = (
    Seam(httpcore.AsyncHTTPConnection, "handle_async_request"),
    Seam(httpcore.AsyncHTTP11Connection, "handle_async_request"),
    Seam(httpcore.AsyncConnectionPool, "create_connection"),
    Seam(httpcore.AsyncHTTPProxy, "create_connection"),
)


def free(slot: Slot, record: ExchangeRecord) -> None:
    slot.release()
    if record.slot is slot:
        record.slot = None


def raise_if_revoked(slot: Slot, record: ExchangeRecord, error: BaseException) -> None:
    """A connection error is the closing of the pool, where that took the slot."""
    if slot.is_revoked and isinstance(error, Exception):
        raise ClientClosedError(f"the client was closed during the call, in its {record.phase} phase.") from error


def _stand_in(factory: Any, adapter: PoolAdapter) -> Any:
    """A pool of httpcore's own class with one connection: our pool. A tool's function is called on it, as on any."""
    options: dict[str, Any] = {"max_connections": 1, "max_keepalive_connections": 0}
    if isinstance(factory, httpcore.AsyncHTTPProxy | httpcore.AsyncSOCKSProxy):
        options["proxy_url"] = factory._proxy_url
    pool: Any = type(factory)(**options)
    pool.create_connection = functools.partial(_AdapterConnection, adapter)
    return pool


class _AdapterConnection(httpcore.AsyncConnectionInterface):
    """Our pool, as httpcore's own pool sees a connection: it takes one request, and then it is gone."""

    def __init__(self, adapter: PoolAdapter, origin: httpcore.Origin) -> None:
        self._adapter = adapter
        self._origin = origin

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        """Send `request` through our pool."""
        return await self._adapter.send(request)

    async def aclose(self) -> None:
        """Nothing is open here."""

    def info(self) -> str:
        """Where the requests really go."""
        return repr(self._adapter)

    def can_handle_request(self, origin: httpcore.Origin) -> bool:
        """Whether it was made for `origin`."""
        return origin == self._origin

    def is_available(self) -> bool:
        """Never a second time."""
        return False

    def has_expired(self) -> bool:
        """Never."""
        return False

    def is_idle(self) -> bool:
        """Never."""
        return False

    def is_closed(self) -> bool:
        """Never, as long as its request is under way."""
        return False


class _ResponseStream:
    """The body of a response; when it is closed, its slot is free. Not a generator: nothing is left to finalise."""

    def __init__(self, stream: Any, connection: PortableConnection, slot: Slot, record: ExchangeRecord) -> None:
        self._stream: Any = stream
        self._connection = connection
        self._slot = slot
        self._record = record
        self._iterator: Any = None
        self._is_reading = self._is_complete = self._is_closed = False

    def __aiter__(self) -> _ResponseStream:
        return self

    async def __anext__(self) -> bytes:
        if self._iterator is None:
            if self._is_closed:
                raise StopAsyncIteration
            self._iterator = self._stream.__aiter__()
        self._is_reading = True
        try:
            part: bytes = await self._iterator.__anext__()
        except StopAsyncIteration:
            self._is_complete = True
            raise
        except BaseException as exc:
            free(self._slot, self._record)
            raise_if_revoked(self._slot, self._record, exc)
            raise
        finally:
            self._is_reading = False
        return part

    async def aclose(self) -> None:
        """Free the slot; the connection is kept if the answer was read to its end and nothing else came."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._is_complete:
            free(self._slot, self._record)  # first of all, before anything is awaited
            await self._run_out()
        try:
            await self._stream.aclose()
            if self._connection.is_reusable():  # never so when it was closed above
                self._slot.give_back()
        finally:
            free(self._slot, self._record)
            self._stream = self._iterator = None

    async def _run_out(self) -> None:
        """Let the generators inside of httpcore end: their socket is closed, so that they soon notice.

        Left as they are they would be finalised by the garbage collector, which trio warns of. While another task is
        reading they end there; a tool's own stream, which may be endless, is none of ours.
        """
        if self._iterator is None or self._is_reading or not type(self._stream).__module__.startswith("httpcore."):
            return
        try:
            while True:
                await self._iterator.__anext__()
        except (StopAsyncIteration, httpcore.NetworkError, httpcore.ProtocolError):
            pass


class AnswerStream:
    """The body of a response from a connection of ours; when it is closed, its slot is free."""

    __slots__ = ("_answer", "_connection", "_is_closed", "_record", "_slot")

    def __init__(self, answer: Any, connection: WireConnection, slot: Slot, record: ExchangeRecord) -> None:
        self._answer: Any = answer
        self._connection = connection
        self._slot = slot
        self._record = record
        self._is_closed = False

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> bytes:
        if self._is_closed:
            raise StopAsyncIteration
        try:
            part: bytes = await self._answer.__anext__()
        except StopAsyncIteration:
            raise
        except BaseException as exc:
            free(self._slot, self._record)
            raise_if_revoked(self._slot, self._record, exc)
            raise
        return part

    async def aclose(self) -> None:
        """Free the slot; the connection is kept if the answer was read to its end and nothing else came."""
        self.close()

    def close(self) -> None:
        """The same at once: nothing here waits."""
        if not self._is_closed:
            self._is_closed = True
            if self._connection.is_reusable():
                self._slot.give_back()
            free(self._slot, self._record)
            self._answer = None

    @property
    def whole(self) -> bytes | None:
        """The whole body, where it came with the head and nobody has read it yet."""
        return None if self._is_closed or self._answer.is_given else self._answer.body


class _NoCookies(httpx.Cookies):
    """Cookies that an API sets are not kept: with several identities on one client they would mix those up."""

    @override
    def extract_cookies(self, response: httpx.Response) -> None:
        """Leave them, which also saves the time of looking for them."""


class _LooseStream(httpx.AsyncByteStream):
    """httpx's stream of a response, let go of once it is closed.

    That stream and its response know each other, so that the body and all that hangs on it would wait for the garbage
    collector (at a hundred calls at once a seventh of their time).
    """

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream: httpx.AsyncByteStream | None = stream

    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._stream is None:
            raise httpx.StreamClosed
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()


class HTTPClient(httpx.AsyncClient):
    """An `httpx.AsyncClient` whose transports, those for the environment's proxies included, share one pool.

    `limits`, `verify`, `proxy` and `trust_env` as for `LayerTransport`; `transport` goes in its place (then there is no
    pool, and no proxy); `options` are httpx's own. It keeps no cookies, and asks for the codings gzip and deflate only.
    """

    connection_pool: ConnectionPool | None

    def __init__(
        self,
        *,
        limits: httpx.Limits = LIMITS,
        verify: bool | ssl.SSLContext = True,
        proxy: str | httpx.URL | httpx.Proxy | None = None,
        trust_env: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Any,
    ) -> None:
        context = ssl_context(verify, trust_env=trust_env)
        self.connection_pool = None if transport is not None else ConnectionPool(limits)
        self._no_cookies = _NoCookies()
        super().__init__(
            limits=limits,
            verify=context,
            proxy=None if proxy is None else checked_proxy(proxy, context),
            trust_env=trust_env,
            transport=transport,
            **options,
        )
        if "accept-encoding" not in httpx.Headers(options.get("headers")):
            self.headers["Accept-Encoding"] = ACCEPT_ENCODING
        if "connection" not in httpx.Headers(options.get("headers")):
            del self.headers["Connection"]  # HTTP/1.1 keeps connections alive by itself (RFC 9112 section 9.3)

    @property
    @override
    def cookies(self) -> httpx.Cookies:
        """Always empty, unless you put one in."""
        return self._no_cookies

    @cookies.setter
    def cookies(self, cookies: Any) -> None:
        self._no_cookies = _NoCookies(cookies)

    @override
    async def _send_single_request(self, request: httpx.Request) -> httpx.Response:
        response = await super()._send_single_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _LooseStream(response.stream)
        return response

    @override
    def _build_redirect_request(self, request: httpx.Request, response: httpx.Response) -> httpx.Request:
        """As httpx does. A Location that cannot be read is one corrupt answer, which httpx's errors quote."""
        with suppress(httpx.RemoteProtocolError, httpx.InvalidURL, ValueError):  # the last is idna's
            return super()._build_redirect_request(request, response)
        raise httpx.DecodingError("its Location is no URL to go to", request=request)

    @override
    def _init_transport(
        self,
        verify: Any = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: httpx.Limits = LIMITS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> httpx.AsyncBaseTransport:
        if transport is not None:
            return transport
        return LayerTransport(limits=limits, verify=verify, trust_env=trust_env, pool=self.connection_pool)

    @override
    def _init_proxy_transport(
        self,
        proxy: httpx.Proxy,
        verify: Any = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: httpx.Limits = LIMITS,
    ) -> httpx.AsyncBaseTransport:
        return LayerTransport(limits=limits, verify=verify, proxy=proxy, trust_env=trust_env, pool=self.connection_pool)
