"""The FastAPI side: one client a process, a dependency, and answers that tell a caller no more than it should know."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import fastapi
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket

import layer_async
from layer_async import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncLayerClient,
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    DeadlineExceededError,
    LayerError,
    MalformedResponseError,
    MissingTokensError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ResponseDecodeError,
    ServerError,
    TokenPair,
    UnprocessableEntityError,
)
from layer_async.fastapi import LayerClient, add_error_handlers, layer_client, lifespan

pytestmark = pytest.mark.anyio

TOKENS = TokenPair("first-secret-of-the-tests", "second-secret-of-the-tests")
UPSTREAM = "https://upstream.invalid"


def client_that_answers(answer: Callable[[httpx.Request], httpx.Response]) -> AsyncLayerClient:
    return AsyncLayerClient(tokens=TOKENS, base_url=UPSTREAM, transport=httpx.MockTransport(answer))


def fine(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"path": request.url.path})


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, whose lifespan runs meanwhile, as a server would have it."""
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            scope["state"] = dict(state or {})
            await app(scope, receive, send)

        transport = httpx.ASGITransport(app=with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://backend.invalid") as http:
            yield http


def backend(raises: Exception | None = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan(lambda: client_that_answers(fine)))
    add_error_handlers(app)

    @app.get("/things/{number}")
    async def thing(number: int, client: LayerClient) -> Any:
        if raises is not None:
            raise raises
        return (await client.get(f"/api/things/{number}")).json()

    return app


# The client


async def test_the_lifespan_opens_one_client_and_closes_it() -> None:
    made: list[AsyncLayerClient] = []

    def make() -> AsyncLayerClient:
        made.append(client_that_answers(fine))
        return made[-1]

    app = FastAPI(lifespan=lifespan(make))
    seen: list[AsyncLayerClient] = []

    @app.get("/")
    async def root(client: LayerClient) -> None:
        seen.append(client)

    assert made == []
    async with running(app) as http:
        for _ in range(3):
            assert (await http.get("/")).status_code == 200
    assert seen == made * 3
    with pytest.raises(ClientClosedError):
        await made[0].get("/api/things/1")


async def test_by_default_the_client_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    app = FastAPI(lifespan=lifespan())
    with pytest.raises(MissingTokensError):
        async with running(app):
            pass  # pragma: no cover - a backend without tokens does not start
    monkeypatch.setenv("LAYER_TOKEN1", TOKENS.token1)
    monkeypatch.setenv("LAYER_TOKEN2", TOKENS.token2)
    async with running(app):
        pass


async def test_the_dependency_hands_the_client_to_endpoints_and_background_tasks() -> None:
    app = backend()
    done: list[Any] = []

    async def later(client: AsyncLayerClient) -> None:
        done.append((await client.get("/api/later")).json())

    @app.post("/later", status_code=202)
    async def begin(client: LayerClient, tasks: BackgroundTasks) -> None:
        tasks.add_task(later, client)

    async with running(app) as http:
        assert (await http.get("/things/7")).json() == {"path": "/api/things/7"}
        assert (await http.post("/later")).status_code == 202
    assert done == [{"path": "/api/later"}]


async def test_a_test_can_put_its_own_client_in_the_place_of_the_dependency() -> None:
    app = backend()
    async with client_that_answers(lambda _: httpx.Response(200, json="mine")) as mine:
        app.dependency_overrides[layer_client] = lambda: mine
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://backend.invalid") as http:
            assert (await http.get("/things/7")).json() == "mine"


async def test_a_lifespan_of_ones_own_enters_this_one() -> None:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, object]]:
        async with lifespan(lambda: client_that_answers(fine))(app) as state:
            yield {**state, "own": "too"}

    app = FastAPI(lifespan=own)

    @app.get("/")
    async def root(request: fastapi.Request, client: LayerClient) -> list[object]:
        return [request.state.own, (await client.get("/api/x")).status_code]

    async with running(app) as http:
        assert (await http.get("/")).json() == ["too", 200]


@pytest.mark.parametrize("state", [None, {"layer_client": "no client"}])
async def test_without_the_lifespan_the_dependency_says_what_to_do(state: dict[str, object] | None) -> None:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(layer_client)])
    async def root() -> None:
        """Never reached."""

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app(scope if state is None else {**scope, "state": state}, receive, send)

    transport = httpx.ASGITransport(app=with_state)
    async with httpx.AsyncClient(transport=transport, base_url="http://backend.invalid") as http:
        with pytest.raises(RuntimeError, match=r"FastAPI\(lifespan=lifespan\(\)\)"):
            await http.get("/")


# Errors


STATUS: dict[str, Any] = {"status_code": 400}
TABLE: list[tuple[LayerError, int, str]] = [
    (LayerError("x"), 500, "not set up"),
    (ConfigurationError("x"), 500, "not set up"),
    (MissingTokensError("x"), 500, "not set up"),
    (ClientClosedError("x"), 503, "shutting down"),
    (APIConnectionError("x"), 502, "could not be reached"),
    (MalformedResponseError("x"), 502, "could not be reached"),
    (APITimeoutError("x", phase="read"), 504, "in time"),
    (DeadlineExceededError("x", phase="queue"), 504, "in time"),
    (APIStatusError("x", status_code=418), 502, "with an error"),
    (BadRequestError("x", status_code=400), 502, "with an error"),
    (AuthenticationError("x", status_code=401), 502, "with an error"),
    (PermissionDeniedError("x", status_code=403), 502, "with an error"),
    (NotFoundError("x", status_code=404), 404, "no such thing"),
    (ConflictError("x", status_code=409), 409, "conflicts"),
    (UnprocessableEntityError("x", status_code=422), 422, "refuses"),
    (RateLimitError("x", status_code=429), 503, "limiting"),
    (ServerError("x", status_code=503), 502, "with an error"),
    (ResponseDecodeError("x"), 502, "unexpected"),
]


def test_the_table_has_every_error_of_the_tree() -> None:
    tree = {each for each in vars(layer_async).values() if isinstance(each, type) and issubclass(each, LayerError)}
    assert {type(error) for error, _, _ in TABLE} == tree


@pytest.mark.parametrize(("error", "status", "detail"), TABLE, ids=lambda value: type(value).__name__)
async def test_an_error_that_leaves_an_endpoint_is_answered(error: LayerError, status: int, detail: str) -> None:
    error.args = ("what the upstream said",)
    async with running(backend(raises=error)) as http:
        response = await http.get("/things/1")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["detail"]
    assert detail in response.json()["detail"]
    assert "upstream" not in response.text
    assert "retry-after" not in response.headers


@pytest.mark.parametrize(("wait", "header"), [(0.2, "1"), (3.0, "3"), (7.5, "8")])
async def test_a_caller_is_told_how_long_to_wait_in_whole_seconds(wait: float, header: str) -> None:
    error = RateLimitError("x", status_code=429, retry_after=wait)
    async with running(backend(raises=error)) as http:
        response = await http.get("/things/1")
    assert response.status_code == 503
    assert response.headers["retry-after"] == header


async def test_the_log_says_it_in_full_and_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        told = f"no luck with {request.headers['Token1']} and {request.headers['Token2']}"
        return httpx.Response(404 if request.url.path.endswith("/4") else 400, json={"message": told})

    app = FastAPI(lifespan=lifespan(lambda: client_that_answers(refuse)))
    add_error_handlers(app)

    @app.get("/things/{number}")
    async def thing(number: int, client: LayerClient) -> None:
        await client.get(f"/api/things/{number}", params={"key": "a-query-secret"})

    caplog.set_level(logging.DEBUG, "layer_async.fastapi")
    async with running(app) as http:
        answers = [await http.get("/things/4?own=a-query-secret"), await http.get("/things/5")]
    assert [answer.status_code for answer in answers] == [404, 502]
    records = [record for record in caplog.records if record.name == "layer_async.fastapi"]
    assert [record.levelno for record in records] == [logging.WARNING, logging.ERROR]
    assert records[0].getMessage() == (
        "GET /things/4: GET https://upstream.invalid/api/things/4: 404 Not Found. "
        "The server says: no luck with *** and ***"
    )
    for text in (*(record.getMessage() for record in records), *(answer.text for answer in answers)):
        assert "secret" not in text


async def test_other_errors_are_left_to_the_backend() -> None:
    async with running(backend(raises=KeyError("mine"))) as http:
        with pytest.raises(KeyError, match="mine"):
            await http.get("/things/1")


class Wire:
    """A websocket's two ends, without a server."""

    def __init__(self, state: dict[str, Any], *, breaks: bool) -> None:
        self.sent: list[dict[str, Any]] = []
        self.breaks = breaks
        self.scope = {
            "type": "websocket",
            "path": "/live",
            "raw_path": b"/live",
            "root_path": "",
            "scheme": "ws",
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "subprotocols": [],
            "state": state,
        }

    async def receive(self) -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(self, message: Any) -> None:
        if self.breaks and self.sent:
            raise OSError("the other side has gone")
        self.sent.append(message)


async def live(
    accept: bool, work: Callable[[AsyncLayerClient, WebSocket], Awaitable[None]], *, breaks: bool = False
) -> list[dict[str, Any]]:
    app = backend()

    @app.websocket("/live")
    async def endpoint(socket: WebSocket, client: LayerClient) -> None:
        if accept:
            await socket.accept()
        await work(client, socket)
        await socket.close()

    async with app.router.lifespan_context(app) as state:
        wire = Wire(dict(state or {}), breaks=breaks)
        await app(wire.scope, wire.receive, wire.send)
    return wire.sent


async def test_a_websocket_gets_the_client_too() -> None:
    async def work(client: AsyncLayerClient, _: WebSocket) -> None:
        assert (await client.get("/api/x")).status_code == 200

    sent = await live(True, work)
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"]
    assert sent[-1]["code"] == 1000


@pytest.mark.parametrize("accept", [True, False])
async def test_an_error_that_leaves_a_websocket_closes_it(accept: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: AsyncLayerClient, _: WebSocket) -> None:
        raise AuthenticationError("what the upstream said", status_code=401)

    sent = await live(accept, work)
    assert sent[-1]["type"] == "websocket.close"
    assert sent[-1]["code"] == 1011
    assert "upstream" not in str(sent)
    assert "/live: what the upstream said" in caplog.text


@pytest.mark.parametrize("closed_by", ["us", "them"])
async def test_an_error_on_a_closed_websocket_is_logged_and_no_more(
    closed_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(_: AsyncLayerClient, socket: WebSocket) -> None:
        if closed_by == "us":
            await socket.close()
        raise LayerError("too late")

    sent = await live(True, work, breaks=closed_by == "them")
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"][: 1 + (closed_by == "us")]
    assert "/live: too late" in caplog.text


def test_without_fastapi_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "layer_async.fastapi")
    with pytest.raises(ImportError) as caught:
        importlib.import_module("layer_async.fastapi")
    assert str(caught.value) == (
        "this module needs FastAPI: pip install 'layer-async[fastapi]' (in a checkout: pip install '.[fastapi]')"
    )
