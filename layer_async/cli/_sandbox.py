"""`layer-async sandbox`: serve the stand-in for the API."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from .. import ConfigurationError


def sandbox(
    *,
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 8010,
    seed: int = 1,
    documents: int = 1000,
    faults: float = 0.0,
    rate: float | None = None,
    burst: int | None = None,
    window: float | None = None,
    drop: tuple[float, float] | None = None,
    retry_after: bool = True,
    rate_headers: bool = False,
    rotate_after: int | None = None,
) -> int:
    """Serve a local stand-in for the API until Ctrl-C. It is illustrative: the real endpoints are not public.

    Parameters
    ----------
    port: int
        The loopback port; 0 takes a free one.
    seed: int
        What data, tokens and faults are drawn from.
    documents: int
        How many documents each collection holds.
    faults: float
        The share of requests that meet a fault, from 0 to 1.
    rate: float
        A quota, in requests a second; over it the answer is 429.
    burst: int
        How many requests the quota lets in at once; default: one second's worth.
    window: float
        Makes it a fixed window of so many seconds.
    drop: tuple[float, float]
        From when to when, in seconds since the first request, there is only a third of the quota.
    retry_after: bool
        Whether a 429 says when to come again.
    rate_headers: bool
        Whether each answer says what is left, in X-RateLimit headers.
    rotate_after: int
        Replace the tokens after so many requests.
    """
    try:
        from ..sandbox import Faults, Sandbox
        from ..sandbox import run as serve

        app = Sandbox(
            seed=seed,
            documents=documents,
            faults=Faults.spread(faults),
            quota=_quota(rate, burst=burst, window=window, drop=drop, retry_after=retry_after, headers=rate_headers),
            rotate_after=rotate_after,
        )
    except (ImportError, ValueError) as exc:
        raise ConfigurationError(f"{exc}.") from exc

    def announce(url: str) -> None:
        token1, token2 = app.tokens
        print(
            f"The sandbox serves invented data at {url} (seed {seed}). In another terminal:\n\n"
            f"  export LAYER_BASE_URL={url} LAYER_TOKEN1={token1} LAYER_TOKEN2={token2}\n"
            "  layer-async get /api/customers/1\n",
            file=sys.stderr,
            flush=True,
        )

    try:
        serve(app, port=port, on_start=announce)
    except OSError as exc:
        raise ConfigurationError(f"port {port} cannot be used: {exc.strerror}.") from exc
    return 0


def _quota(rate: float | None, **shape: Any) -> Any:
    from ..sandbox import Quota

    if rate is not None:
        return Quota(rate=rate, **shape)
    if shape != {"burst": None, "window": None, "drop": None, "retry_after": True, "headers": False}:
        raise ConfigurationError("say how large the quota is, with --rate.")
    return None
