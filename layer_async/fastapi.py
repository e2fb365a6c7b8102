"""For FastAPI backends: one client a process, a dependency that hands it out, and answers for our errors.

    app = FastAPI(lifespan=lifespan())
    add_error_handlers(app)

    @app.get("/customers/{number}")
    async def customer(number: int, client: LayerClient) -> Customer: ...

Rules: knows the door only. What the API or an error says is for the log, not for the backend's own callers: they get a
status and a general sentence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Annotated

try:
    from fastapi import Depends, FastAPI, WebSocket
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse
    from fastapi.websockets import WebSocketDisconnect, WebSocketState
except ImportError as _missing:
    raise ImportError(
        "this module needs FastAPI: pip install 'layer-async[fastapi]' (in a checkout: pip install '.[fastapi]')"
    ) from _missing

from . import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncLayerClient,
    ClientClosedError,
    ConflictError,
    LayerError,
    NotFoundError,
    RateLimitError,
    ResponseDecodeError,
    UnprocessableEntityError,
)

__all__ = ["LayerClient", "add_error_handlers", "layer_client", "lifespan"]

logger: logging.Logger = logging.getLogger("layer_async.fastapi")


def lifespan(
    make: Callable[[], AsyncLayerClient] = AsyncLayerClient,
) -> Callable[[FastAPI], AbstractAsyncContextManager[dict[str, AsyncLayerClient]]]:
    """A lifespan for `FastAPI(lifespan=...)`: opens one client for the process and closes it at the end.

    `make` makes the client, by default from the environment. With a lifespan of your own, enter this one inside it:
    `async with lifespan()(app) as state: yield state`. Raises what `make` raises, so that a backend without tokens does
    not start.
    """

    @asynccontextmanager
    async def open_client(app: FastAPI) -> AsyncGenerator[dict[str, AsyncLayerClient]]:
        async with make() as client:
            yield {"layer_client": client}

    return open_client


def layer_client(connection: HTTPConnection) -> AsyncLayerClient:
    """The dependency: the client that `lifespan` opened. Override it in tests with `app.dependency_overrides`.

    Raises RuntimeError where the application runs without that lifespan, as under `httpx.ASGITransport`.
    """
    client = getattr(connection.state, "layer_client", None)
    if not isinstance(client, AsyncLayerClient):
        raise RuntimeError(
            "no client is open: make the application with FastAPI(lifespan=lifespan()), and let its lifespan run."
        )
    return client


INTERNAL_ERROR = 1011

LayerClient = Annotated[AsyncLayerClient, Depends(layer_client)]

ANSWERS: tuple[tuple[type[LayerError], int, str], ...] = (
    (RateLimitError, 503, "The Layer is limiting requests: try again later."),
    (NotFoundError, 404, "The Layer knows no such thing."),
    (ConflictError, 409, "This conflicts with what The Layer holds."),
    (UnprocessableEntityError, 422, "The Layer refuses this content."),
    (APITimeoutError, 504, "The Layer did not answer in time."),
    (APIConnectionError, 502, "The Layer could not be reached."),
    (APIStatusError, 502, "The Layer answered with an error."),
    (ResponseDecodeError, 502, "The Layer answered with something unexpected."),
    (ClientClosedError, 503, "The service is shutting down."),
    (LayerError, 500, "The service is not set up correctly."),
)


def add_error_handlers(app: FastAPI) -> None:
    """Answer for a `LayerError` that leaves an endpoint, and log it in full under `layer_async.fastapi`.

    404, 409 and 422 are passed on as they are; a 429 becomes 503, with `Retry-After`; a timeout 504; everything else of
    the API's, refused tokens first of all, 502: they are this backend's tokens, not its caller's. A websocket is closed
    with 1011 (RFC 6455 section 7.4.1).
    """
    app.add_exception_handler(LayerError, _answer)  # type: ignore[arg-type]


async def _answer(connection: HTTPConnection, error: Exception) -> JSONResponse | None:
    status, detail = next((status, detail) for cls, status, detail in ANSWERS if isinstance(error, cls))
    level = logging.WARNING if status < 500 else logging.ERROR
    logger.log(level, "%s %s: %s", connection.scope.get("method", "WebSocket"), connection.url.path, error)
    if isinstance(connection, WebSocket):
        if connection.application_state is not WebSocketState.DISCONNECTED:
            with suppress(WebSocketDisconnect):
                await connection.close(INTERNAL_ERROR, detail)
        return None
    headers: dict[str, str] = {}
    if isinstance(error, RateLimitError) and error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    return JSONResponse({"detail": detail}, status_code=status, headers=headers)
