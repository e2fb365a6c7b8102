"""Async client SDK for The Layer's web API: two tokens in, a typed answer out.

    async with AsyncLayerClient() as client:                       # tokens from LAYER_TOKEN1 and LAYER_TOKEN2
        customer = await client.get("/api/customers/42", into=Customer)

The door: the public names, and nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._auth import DualTokenAuth
from ._bulk import Bulk, BulkOptions
from ._client import AsyncLayerClient
from ._errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AttemptInfo,
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
    RequestInfo,
    ResponseDecodeError,
    ServerError,
    UnprocessableEntityError,
)
from ._journal import Journal
from ._options import BodyOptions, CallOptions, ViewOptions
from ._outcomes import Outcome, Outcomes, SettledKeys
from ._pacing import Pacing
from ._pool import ConnectionPool, PoolStats
from ._progress import Progress
from ._retry import CallNext, Middleware, RetryBudget, RetryMiddleware, RetryPolicy
from ._telemetry import (
    AttemptFinished,
    CallFinished,
    Event,
    GateShut,
    LoggingObserver,
    Observer,
    OpenTelemetryObserver,
    PaceChanged,
    RetryScheduled,
    TokensRefreshed,
)
from ._tokens import TokenPair, TokenSource, env_tokens, file_tokens, keyring_tokens
from ._version import __version__

if TYPE_CHECKING:
    from ._codec import decode
    from ._pages import Pages
    from ._paging import Cursor, LinkHeader, NextLink, OffsetLimit, PageNumber
    from ._transport import LayerTransport

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncLayerClient",
    "AttemptFinished",
    "AttemptInfo",
    "AuthenticationError",
    "BadRequestError",
    "BodyOptions",
    "Bulk",
    "BulkOptions",
    "CallFinished",
    "CallNext",
    "CallOptions",
    "ClientClosedError",
    "ConfigurationError",
    "ConflictError",
    "ConnectionPool",
    "Cursor",
    "DeadlineExceededError",
    "DualTokenAuth",
    "Event",
    "GateShut",
    "Journal",
    "LayerError",
    "LayerTransport",
    "LinkHeader",
    "LoggingObserver",
    "MalformedResponseError",
    "Middleware",
    "MissingTokensError",
    "NextLink",
    "NotFoundError",
    "Observer",
    "OffsetLimit",
    "OpenTelemetryObserver",
    "Outcome",
    "Outcomes",
    "PaceChanged",
    "Pacing",
    "PageNumber",
    "Pages",
    "PermissionDeniedError",
    "PoolStats",
    "Progress",
    "RateLimitError",
    "RequestInfo",
    "ResponseDecodeError",
    "RetryBudget",
    "RetryMiddleware",
    "RetryPolicy",
    "RetryScheduled",
    "ServerError",
    "SettledKeys",
    "TokenPair",
    "TokenSource",
    "TokensRefreshed",
    "UnprocessableEntityError",
    "ViewOptions",
    "__version__",
    "decode",
    "env_tokens",
    "file_tokens",
    "keyring_tokens",
]


_LATER = {
    "LayerTransport": "_transport",
    "decode": "_codec",
    "Pages": "_pages",
    **dict.fromkeys(("Cursor", "LinkHeader", "NextLink", "OffsetLimit", "PageNumber"), "_paging"),
}


def __getattr__(name: str) -> Any:
    """Some names bring what a program may not need, or not yet: httpcore (as with httpx, the first client loads it),
    the engine that decodes, and paging.
    """
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
