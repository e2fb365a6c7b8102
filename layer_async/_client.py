"""`AsyncLayerClient`: the surface of the package.

Rules: options are checked here, before anything is sent; what a call does is in `_call`. Verbs differ in nothing but
their method and whether they take a body. A view made by `with_options` shares the connections and owns nothing.
"""

from __future__ import annotations

import os
import platform
import ssl
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import attrs
import httpx
from typing_extensions import TypeForm, Unpack

from ._auth import DualTokenAuth
from ._bulk import OUTAGE_TIMEOUT, Bulk, BulkOptions, run_all
from ._call import CallSettings, Corridor, Identity, Lane
from ._errors import ClientClosedError, ConfigurationError, LayerError
from ._exchange import StreamedResponse, end_readers
from ._options import (
    BodyOptions,
    CallOptions,
    HeaderValues,
    Quiet,
    ViewOptions,
    checked_bool,
    checked_callable,
    checked_deadline,
    checked_headers,
    checked_middleware,
    checked_pacing,
    checked_proxy_url,
    checked_retry,
    checked_size,
    checked_timeout,
    merged_headers,
)
from ._origin import Origin
from ._outcomes import SettledKeys
from ._pacing import Pacing
from ._pool import ConnectionPool
from ._progress import StopRule
from ._retry import Middleware, RetryPolicy
from ._telemetry import LoggingObserver, Observer, TokensRefreshed, notify
from ._tokens import TokenPair, TokenSource, resolve_tokens
from ._version import __version__

if TYPE_CHECKING:
    from ._pages import ItemKey, ItemsAt, Pages
    from ._paging import PageStrategy

BASE_URL = "https://webapi.thelayer.com"
TIMEOUT = httpx.Timeout(30.0, connect=5.0, pool=None)
LIMITS = httpx.Limits(max_connections=100, keepalive_expiry=30.0)
DEADLINE = 120.0
MAX_RESPONSE_BYTES = 64 * 2**20

T = TypeVar("T")
Item = TypeVar("Item")
Key = TypeVar("Key")


class AsyncLayerClient:
    """A client of The Layer's web API, for asyncio and trio. One a process is enough: share it between tasks.

    Tokens: `token1=` and `token2=`, else `tokens=` (a `TokenPair`, or a callable that gives one, which is asked again
    when the server refuses the pair), else the environment: `LAYER_TOKEN1` and `LAYER_TOKEN2`, else the files that
    `LAYER_TOKEN1_FILE` and `LAYER_TOKEN2_FILE` name.

    `base_url`: else `LAYER_BASE_URL`, else the vendor's. https, or http to loopback, or http with `allow_http=True`.
    `timeout`: seconds for each phase of one attempt (a float sets connect, read and write), or an `httpx.Timeout`.
    `deadline`: seconds from the start of a call to its end, with queue, attempts, sleeps and body; None: no bound.
    `retry`: what is tried again and how often; None: one attempt.
    `pacing`: how the client keeps to the API's quota: by default it is learned; `Pacing(rate=50)` where it is known;
    None: not at all, so that each call waits out its own `Retry-After`.
    `limits`: connections, and so attempts on the wire at once; and how long idle ones are kept, in seconds.
    `middleware`: async callables `(request, call_next) -> httpx.Response`, the first is outermost; once a call.
    `classify`: is asked about each answer below 400, read, and may return the `LayerError` that it really means.
    `headers`: sent with every request. `follow_redirects`: True follows to the client's own origin only.
    `max_response_bytes`: the largest decoded body that is accepted; None: no bound.
    `observer`: is called with each event; by default `LoggingObserver`, under the logger `layer_async`.
    `verify`: True, False, or an `ssl.SSLContext`. `proxy`: a proxy's URL, or an `httpx.Proxy`; else, with `trust_env`,
    the proxies of the environment.
    `transport`: an httpx transport to use in place of ours, closed with the client; `http_client`: a whole
    `httpx.AsyncClient`, never closed by us. With either, `limits`, `verify` and `proxy` are its own matter.

    Raises `ConfigurationError` for a setting that cannot work, and `MissingTokensError` where a token is not found.
    """

    _closed = True  # until construction is over: a client that failed to be made has nothing to close
    _is_view = False
    _root: AsyncLayerClient | None = None
    _origin: Origin | None = None

    def __init__(
        self,
        *,
        token1: str | None = None,
        token2: str | None = None,
        tokens: TokenPair | TokenSource | None = None,
        base_url: str | httpx.URL | None = None,
        allow_http: bool = False,
        timeout: float | httpx.Timeout = TIMEOUT,
        deadline: float | None = DEADLINE,
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008 - frozen
        pacing: Pacing | None = Pacing(),  # noqa: B008 - frozen
        limits: httpx.Limits | None = None,
        middleware: Sequence[Middleware] = (),
        classify: Callable[[httpx.Response], LayerError | None] | None = None,
        headers: HeaderValues | None = None,
        follow_redirects: bool = False,
        max_response_bytes: int | None = MAX_RESPONSE_BYTES,
        observer: Observer | None = None,
        verify: bool | ssl.SSLContext | None = None,
        proxy: str | httpx.URL | httpx.Proxy | None = None,
        trust_env: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        given = Quiet({"tokens": tokens, "base_url": base_url, "headers": headers, "proxy": proxy})
        pair = Quiet({"token1": token1, "token2": token2})
        del token1, token2, tokens, base_url, headers, proxy  # no traceback that shows local variables shows them
        self._allow_http = checked_bool("allow_http", allow_http)
        source = Quiet({"source": _resolved(pair, given)})
        self._origin = Origin.parse(
            given.get("base_url") or os.environ.get("LAYER_BASE_URL") or BASE_URL, allow_http=allow_http
        )
        self._observer: Observer = LoggingObserver() if observer is None else checked_callable("observer", observer)
        settings = CallSettings(
            timeout=checked_timeout(timeout),
            deadline=checked_deadline(deadline),
            retry=checked_retry(retry),
            max_response_bytes=checked_size(max_response_bytes),
        )
        own_headers = checked_headers(given.get("headers"))
        stages = checked_middleware(middleware)
        self._owns_http = http_client is None
        self._http, self._pool = _http_client(
            origin=self._origin,
            transport=transport,
            http_client=http_client,
            limits=limits,
            verify=verify,
            proxy=checked_proxy_url(given.get("proxy")),
            trust_env=checked_bool("trust_env", trust_env),
        )
        self._root = self
        self._corridor = Corridor(
            http=self._http,
            lane=_lane(self._http, self._origin, own_headers),
            pool=self._pool,
            origin=self._origin,
            identity=self._identity(source["source"], checked_pacing(pacing)),
            headers=own_headers,
            settings=settings,
            middleware=stages,
            classify=None if classify is None else checked_callable("classify", classify),
            follow_redirects=checked_bool("follow_redirects", follow_redirects),
            observer=self._observer,
            is_closed=self._is_closed,
            live=set(),
        )
        self._closed = False

    def _identity(self, source: TokenPair | TokenSource, pacing: Pacing | None) -> Identity:
        observer = self._observer
        assert self._origin is not None
        auth = DualTokenAuth(
            source,
            origin=self._origin,
            allow_http=self._allow_http,
            on_refresh=lambda generation: notify(observer, TokensRefreshed(generation)),
        )
        return Identity(auth, pacing, observer)

    def _is_closed(self) -> bool:
        return self._closed or self._root is None or self._root._closed

    # Calls

    @overload
    async def request(
        self, method: str, path: str, *, into: None = None, **options: Unpack[BodyOptions]
    ) -> httpx.Response: ...
    @overload
    async def request(self, method: str, path: str, *, into: TypeForm[T], **options: Unpack[BodyOptions]) -> T: ...
    async def request(self, method: str, path: str, *, into: Any = None, **options: Unpack[BodyOptions]) -> Any:
        """Send a request and return its answer: the `httpx.Response`, read, or with `into=T` a `T` decoded from JSON.

        `path` is relative to the base URL; what would reach another origin is refused. `options`: see `CallOptions` and
        `BodyOptions`.

        Raises `APIStatusError` (by status) for 400 and above, `APIConnectionError` where no usable answer came,
        `ResponseDecodeError` where the answer is no `T`, `ConfigurationError` before anything is sent.
        """
        given = Quiet(options, path=path)
        del path, options  # no traceback that shows local variables shows them; likewise below
        return await self._corridor.begin(method, given, into=into).run()

    @overload
    async def get(self, path: str, *, into: None = None, **options: Unpack[CallOptions]) -> httpx.Response: ...
    @overload
    async def get(self, path: str, *, into: TypeForm[T], **options: Unpack[CallOptions]) -> T: ...
    async def get(self, path: str, *, into: Any = None, **options: Unpack[CallOptions]) -> Any:
        """GET `path`; see `request`."""
        given = Quiet(options, path=path)
        del path, options
        return await self._corridor.begin("GET", given, into=into).run()

    @overload
    async def delete(self, path: str, *, into: None = None, **options: Unpack[CallOptions]) -> httpx.Response: ...
    @overload
    async def delete(self, path: str, *, into: TypeForm[T], **options: Unpack[CallOptions]) -> T: ...
    async def delete(self, path: str, *, into: Any = None, **options: Unpack[CallOptions]) -> Any:
        """DELETE `path`; see `request`."""
        given = Quiet(options, path=path)
        del path, options
        return await self._corridor.begin("DELETE", given, into=into).run()

    @overload
    async def head(self, path: str, *, into: None = None, **options: Unpack[CallOptions]) -> httpx.Response: ...
    @overload
    async def head(self, path: str, *, into: TypeForm[T], **options: Unpack[CallOptions]) -> T: ...
    async def head(self, path: str, *, into: Any = None, **options: Unpack[CallOptions]) -> Any:
        """HEAD `path`; see `request`."""
        given = Quiet(options, path=path)
        del path, options
        return await self._corridor.begin("HEAD", given, into=into).run()

    @overload
    async def options(self, path: str, *, into: None = None, **options: Unpack[CallOptions]) -> httpx.Response: ...
    @overload
    async def options(self, path: str, *, into: TypeForm[T], **options: Unpack[CallOptions]) -> T: ...
    async def options(self, path: str, *, into: Any = None, **options: Unpack[CallOptions]) -> Any:
        """OPTIONS `path`; see `request`."""
        given = Quiet(options, path=path)
        del path, options
        return await self._corridor.begin("OPTIONS", given, into=into).run()

    @overload
    async def post(self, path: str, *, into: None = None, **options: Unpack[BodyOptions]) -> httpx.Response: ...
    @overload
    async def post(self, path: str, *, into: TypeForm[T], **options: Unpack[BodyOptions]) -> T: ...
    async def post(self, path: str, *, into: Any = None, **options: Unpack[BodyOptions]) -> Any:
        """POST to `path`; see `request`. Not retried once the server may have acted on it, unless `idempotent=True`."""
        given = Quiet(options, path=path)
        del path, options
        return await self._corridor.begin("POST", given, into=into).run()

    @overload
    async def put(self, path: str, *, into: None = None, **options: Unpack[BodyOptions]) -> httpx.Response: ...
    @overload
    async def put(self, path: str, *, into: TypeForm[T], **options: Unpack[BodyOptions]) -> T: ...
    async def put(self, path: str, *, into: Any = None, **options: Unpack[BodyOptions]) -> Any:
        """PUT to `path`; see `request`."""
        given = Quiet(options, path=path)
        del path, options
        return await self._corridor.begin("PUT", given, into=into).run()

    @overload
    async def patch(self, path: str, *, into: None = None, **options: Unpack[BodyOptions]) -> httpx.Response: ...
    @overload
    async def patch(self, path: str, *, into: TypeForm[T], **options: Unpack[BodyOptions]) -> T: ...
    async def patch(self, path: str, *, into: Any = None, **options: Unpack[BodyOptions]) -> Any:
        """PATCH `path`; see `request`. Not retried once the server may have acted on it, unless `idempotent=True`."""
        given = Quiet(options, path=path)
        del path, options
        return await self._corridor.begin("PATCH", given, into=into).run()

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, **options: Unpack[BodyOptions]
    ) -> AsyncGenerator[httpx.Response, None]:
        """`async with client.stream("GET", path) as response:` gives an `httpx.Response` whose body is not read yet.

        Its slot is held until the block ends. `deadline` ends with the head of the answer; the body is bounded by the
        read timeout and by your own cancel scope, and by `max_response_bytes` where given here. Raises as `request`
        does, for status 400 and above too, after reading the error's body; an error while the body streams is raised
        as ours and is not retried.
        """
        given = Quiet(options, path=path)
        del path, options
        call = self._corridor.begin(method, given, streamed=True)
        try:
            response: httpx.Response = await call.run()
            if type(response) is httpx.Response:
                response.__class__ = StreamedResponse
            call.watch_body(response)
            try:
                yield response
            finally:
                try:
                    await response.aclose()
                finally:
                    await end_readers(response, is_ours=self._pool is not None)
        finally:
            call.record.release_slot()

    # Pages

    @overload
    def paginate(
        self,
        path: str,
        *,
        pages: PageStrategy,
        items: ItemsAt = None,
        into: None = None,
        key: ItemKey = None,
        remember: int | None = 10,
        prefetch: int = 0,
        **options: Unpack[CallOptions],
    ) -> Pages[Any]: ...
    @overload
    def paginate(
        self,
        path: str,
        *,
        pages: PageStrategy,
        items: ItemsAt = None,
        into: TypeForm[T],
        key: ItemKey = None,
        remember: int | None = 10,
        prefetch: int = 0,
        **options: Unpack[CallOptions],
    ) -> Pages[T]: ...
    def paginate(
        self,
        path: str,
        *,
        pages: PageStrategy,
        items: ItemsAt = None,
        into: Any = None,
        key: ItemKey = None,
        remember: int | None = 10,
        prefetch: int = 0,
        **options: Unpack[CallOptions],
    ) -> Pages[Any]:
        """GET `path` page by page and give the items: `async for customer in client.paginate(…, into=Customer)`.

        `pages` says how pages follow each other: a `PageNumber`, `OffsetLimit`, `Cursor`, `NextLink` or `LinkHeader`.
        `items` says where the list is in a page: a key path ("data.items", or a tuple of keys), a function of the
        decoded document, or None where the page itself is the list. Each item is decoded as `into` (as in `request`);
        without, items are plain JSON.
        `key`, the name of a field or a function of an item, says when two items are the same: a collection that shifts
        while it is read has some items in two pages, and the later ones are dropped, and counted as `duplicates`. Keys
        are remembered for so many pages as `remember` says (None: for ever, and memory grows with the collection).
        `prefetch` is how many pages may be fetched ahead of the loop, inside of an `async with`; behind a `Cursor`,
        `NextLink` or `LinkHeader` one at most, since each is known only from the one before; the first is always
        fetched alone. A page that turns out to lie behind the end counts for nothing, whatever it was answered.
        `options`, see `CallOptions`, hold for the call of each page; `params` go with the first page, and with each
        page that is asked for by parameters rather than by a link.

        Nothing is sent before the first item is asked for, and nothing is left open between two items. A link that
        leads to another origin is not followed. A page of status 404 is the end where the page before it was shorter
        than those before and no total says otherwise. Raises `ConfigurationError` for what cannot work; for the rest
        see `Pages`.
        """
        from ._pages import Pages

        given = Quiet(options, path=path)
        del path, options
        return Pages(
            self._corridor, given, pages, items=items, into=into, key=key, remember=remember, prefetch=prefetch
        )

    # Many calls

    @overload
    def bulk(
        self,
        items: Iterable[str] | AsyncIterable[str],
        call: None = None,
        *,
        into: None = None,
        key: None = None,
        **options: Unpack[BulkOptions],
    ) -> Bulk[str, httpx.Response]: ...
    @overload
    def bulk(
        self,
        items: Iterable[str] | AsyncIterable[str],
        call: None = None,
        *,
        into: None = None,
        key: Callable[[str], Key],
        **options: Unpack[BulkOptions],
    ) -> Bulk[Key, httpx.Response, str]: ...
    @overload
    def bulk(
        self,
        items: Iterable[str] | AsyncIterable[str],
        call: None = None,
        *,
        into: TypeForm[T],
        key: None = None,
        **options: Unpack[BulkOptions],
    ) -> Bulk[str, T]: ...
    @overload
    def bulk(
        self,
        items: Iterable[str] | AsyncIterable[str],
        call: None = None,
        *,
        into: TypeForm[T],
        key: Callable[[str], Key],
        **options: Unpack[BulkOptions],
    ) -> Bulk[Key, T, str]: ...
    @overload
    def bulk(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        call: Callable[[Item], Awaitable[T]],
        *,
        into: None = None,
        key: None = None,
        **options: Unpack[BulkOptions],
    ) -> Bulk[Item, T]: ...
    @overload
    def bulk(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        call: Callable[[Item], Awaitable[T]],
        *,
        into: None = None,
        key: Callable[[Item], Key],
        **options: Unpack[BulkOptions],
    ) -> Bulk[Key, T, Item]: ...
    def bulk(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        call: Callable[[Any], Awaitable[Any]] | None = None,
        *,
        into: Any = None,
        key: Callable[[Any], Any] | None = None,
        workers: int | None = None,
        ordered: bool = False,
        journal: str | os.PathLike[str] | SettledKeys | None = None,
        stop_when: StopRule | None = None,
        outage_timeout: float | None = OUTAGE_TIMEOUT,
    ) -> Bulk[Any, Any]:
        """Run one call for each item, many at a time: `async with client.bulk(paths) as outcomes: async for ...`.

        `items` are paths to GET (with `into`), or whatever `call` takes as its one argument: any iterable, sync or
        async, endless too; it is read only as workers become free, so that memory does not grow with it. Each item
        gives one `Outcome`, a value or an error, as it completes or, with `ordered`, in the order of the items. `key`
        names an item in its outcome (default: the item itself). `workers` run at a time: by default half the slots,
        so that single calls find one free. A 429 makes an item wait at the gate for as long as it takes, and an outage
        makes it wait until the server is back, for at most `outage_timeout` seconds: `call` is then called again for
        it. `stop_when` ends the run early, and `journal` is for runs that go on where the last one ended; see `Bulk`.
        """
        return Bulk(
            items,
            self._item_call(call, into),
            key=key,
            workers=self._worker_count(workers),
            ordered=ordered,
            journal=journal,
            stop_when=stop_when,
            outage_timeout=outage_timeout,
        )

    @overload
    async def fetch_all(
        self, paths: Iterable[str] | AsyncIterable[str], *, into: None = None, workers: int | None = None
    ) -> list[httpx.Response]: ...
    @overload
    async def fetch_all(
        self, paths: Iterable[str] | AsyncIterable[str], *, into: TypeForm[T], workers: int | None = None
    ) -> list[T]: ...
    async def fetch_all(
        self, paths: Iterable[str] | AsyncIterable[str], *, into: Any = None, workers: int | None = None
    ) -> list[Any]:
        """GET all `paths` concurrently and return their answers in order; all or nothing.

        The first failure cancels the rest and is raised as itself. For many items, or where some may fail, use `bulk`.
        """
        pending = run_all(paths, self._item_call(None, into), workers=self._worker_count(workers))
        del paths
        return await pending

    def _item_call(self, call: Callable[[Any], Awaitable[Any]] | None, into: Any) -> Callable[[Any], Awaitable[Any]]:
        if call is not None:
            if into is not None:
                raise ConfigurationError("into= belongs to the default call; your own call= returns what it likes.")
            return checked_callable("call", call)
        if into is not None:
            from ._codec import check_into

            check_into(into)

        async def fetch(path: str) -> Any:
            given = Quiet(path=path)
            del path
            return await self._corridor.begin("GET", given, into=into).run()

        return fetch

    def _worker_count(self, workers: int | None) -> int:
        if workers is not None:
            return workers
        slots = None if self._pool is None else self._pool.max_connections
        return 50 if slots is None else max(1, slots // 2)

    # The client itself

    def with_options(self, **options: Unpack[ViewOptions]) -> AsyncLayerClient:
        """A view of this client with other settings, over the same connections. What is not given stays as it is.

        `headers` are added to the client's. Other `tokens` have their own state, retry budget and gate. Closing a view
        closes nothing; closing the client closes its views.
        """
        given = Quiet(options)
        del options
        settings = self._corridor.settings.updated(given, others=("headers", "tokens"))
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._is_view = True
        headers = merged_headers(self._corridor.headers, given.get("headers"))
        lane = self._corridor.lane
        view._corridor = attrs.evolve(
            self._corridor,
            headers=headers,
            lane=None if lane is None else lane.with_headers(headers),
            settings=settings,
            is_closed=view._is_closed,
        )
        if given.get("tokens") is not None:
            view._corridor.identity = view._identity(
                resolve_tokens(tokens=given.get("tokens")), self._corridor.identity.pacing
            )
        return view

    @property
    def http(self) -> httpx.AsyncClient:
        """The `httpx.AsyncClient` inside. Requests sent with it directly carry no tokens."""
        return self._http

    @property
    def pool(self) -> ConnectionPool:
        """The connection pool; `pool.stats` says what it is doing.

        Raises `ConfigurationError` where the connections are not ours (`transport=` or `http_client=` was given).
        """
        if self._pool is None:
            raise ConfigurationError("this client runs on a transport of yours: its connections are not ours to count.")
        return self._pool

    @property
    def pace(self) -> float | None:
        """Attempts a second that the API's quota seems to allow these tokens, or that `pacing` gave.

        None while nothing is known of a quota, and without `pacing`.
        """
        gate = self._corridor.identity.gate
        return None if gate is None else gate.rate

    async def aclose(self) -> None:
        """Close the client: waiting calls fail with `ClientClosedError`, every socket is closed. Harmless twice."""
        if self._is_view:
            self._closed = True
            return
        if self._pool is not None and self._owns_http:
            self._pool.aclose_nowait()  # first: it refuses when it is another event loop's
        self._closed = True
        for scope in tuple(self._corridor.live):  # those that sleep, refresh, or wait at the gate
            scope.cancel()
        if self._pool is not None and self._owns_http:
            await self._pool.aclose()
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        if self._is_closed():
            raise ClientClosedError("the client is closed.")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._closed and not self._is_view:
            warnings.warn(
                f"{self!r} was not closed: use `async with` or aclose().", ResourceWarning, stacklevel=2, source=self
            )

    def __repr__(self) -> str:
        return f"<AsyncLayerClient {self._origin} {'closed' if self._is_closed() else 'open'}>"

    def __reduce__(self) -> Any:
        raise TypeError("a client holds tokens and sockets: it cannot be pickled or copied.")


def _resolved(pair: Quiet, given: Quiet) -> TokenPair | TokenSource:
    return resolve_tokens(
        token1=pair.get("token1"), token2=pair.get("token2"), tokens=given.get("tokens"), environ=os.environ
    )


def _http_client(
    *,
    origin: Origin,
    transport: httpx.AsyncBaseTransport | None,
    http_client: httpx.AsyncClient | None,
    limits: httpx.Limits | None,
    verify: bool | ssl.SSLContext | None,
    proxy: httpx.Proxy | None,
    trust_env: bool,
) -> tuple[httpx.AsyncClient, ConnectionPool | None]:
    given = {"limits": limits, "verify": verify, "proxy": proxy}
    if transport is not None or http_client is not None:
        for name, value in given.items():
            if value is not None:
                raise ConfigurationError(f"{name}= is a matter of the transport= or http_client= that you give.")
    if limits is not None and not isinstance(limits, httpx.Limits):
        raise ConfigurationError(f"limits= must be httpx.Limits, not {type(limits).__name__}.")
    if http_client is not None:
        if transport is not None:
            raise ConfigurationError("give transport= or http_client=, not both.")
        if not isinstance(http_client, httpx.AsyncClient):
            raise ConfigurationError(f"http_client= must be an httpx.AsyncClient, not {type(http_client).__name__}.")
        return http_client, None
    if transport is not None and not isinstance(transport, httpx.AsyncBaseTransport):
        raise ConfigurationError(f"transport= must be an httpx.AsyncBaseTransport, not {type(transport).__name__}.")
    # What goes to loopback stays here: a proxy of the environment would see tokens that go there by plain http.
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    mounts = {f"all://{host}": None} if origin.is_loopback and proxy is None else None
    from ._transport import HTTPClient  # with httpcore, which is nobody's matter before there is a client

    client = HTTPClient(
        limits=LIMITS if limits is None else limits,
        verify=True if verify is None else verify,
        proxy=proxy,
        trust_env=trust_env,
        transport=transport,
        headers={"User-Agent": _user_agent(), "Accept": "application/json"},
        mounts=mounts,
    )
    return client, client.connection_pool


def _lane(http: httpx.AsyncClient, origin: Origin, headers: httpx.Headers) -> Lane | None:
    """The short way through a client of ours; there is none through another, or to another transport."""
    from ._lean import Lane
    from ._transport import HTTPClient

    return Lane(http, origin, headers) if isinstance(http, HTTPClient) else None


def _user_agent() -> str:
    return f"layer-async/{__version__} python-httpx/{httpx.__version__} {platform.python_implementation().lower()}/" + (
        platform.python_version()
    )
