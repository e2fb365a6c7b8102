"""What is promised for a quota that nobody told us, through real sockets: a bulk against a sandbox of its own process.

Short by default, at the full figures with --full. What is let in and refused is counted from the first 429 on.
"""

from __future__ import annotations

import itertools
import time

import anyio
import attrs
import pytest

from layer_async import AsyncLayerClient, Event
from layer_async._telemetry import AttemptFinished
from layer_async.sandbox import Quota, spawn

pytestmark = [pytest.mark.promise, pytest.mark.anyio]

RATE = 100


@attrs.define
class Count:
    """An observer that counts attempts from the first 429 on."""

    since: float | None = None
    admitted: int = 0
    refused: int = 0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, AttemptFinished):
            return
        if event.status_code == 429 and self.since is None:
            self.since = time.monotonic()
        if self.since is not None:
            self.refused += event.status_code == 429
            self.admitted += event.status_code == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("kind", "least"), [("token bucket", 0.93), ("fixed window", 0.90)])
async def test_an_unknown_quota_is_used_through_sockets(
    kind: str, least: float, full: bool, anyio_backend: str, report: list[str]
) -> None:
    window = None if kind == "token bucket" else 10.0 if full else 2.0
    seconds = 60.0 if full else 4.0
    count, failed = Count(), 0
    with spawn(quota=Quota(rate=RATE, window=window)) as sandbox:
        token1, token2 = await anyio.to_thread.run_sync(sandbox.tokens)
        paths = (f"/api/customers/{n % sandbox.documents + 1}" for n in itertools.count())
        async with (
            AsyncLayerClient(token1=token1, token2=token2, base_url=sandbox.url, observer=count) as client,
            client.bulk(paths) as outcomes,
        ):
            async for outcome in outcomes:
                failed += not outcome.ok
                if count.since is not None and time.monotonic() - count.since >= seconds:
                    break
            elapsed = time.monotonic() - (count.since or 0.0)
            pace = client.pace or 0.0
    # Of a window nothing is left when it meets its first 429; the next begins when it ends, and all of it is granted.
    granted = RATE * elapsed if window is None else RATE * window * (elapsed // window)
    used, refused = count.admitted / granted, count.refused / (count.refused + count.admitted)
    report.append(f"{kind}, {elapsed:.0f} s: {used:.1%} used, {refused:.1%} answered 429, pace {pace:.0f}/s")
    assert failed == 0
    assert used >= (least if full else least - 0.5)
    assert refused <= (0.08 if full else 0.5)
