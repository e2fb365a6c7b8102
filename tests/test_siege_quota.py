"""What is promised for a quota that nobody told us, through real sockets: a bulk against a sandbox of its own process.

With --full, what is let in and refused is counted from the first 429 on. In short it is shown that a client which has
met its first 429 lets no herd out when the gate opens, and soon goes as fast as the quota allows; the figures
themselves are in test_pace.py, in simulation.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import anyio
import attrs
import pytest

from layer_async import AsyncLayerClient, Event
from layer_async._telemetry import AttemptFinished
from layer_async.sandbox import Quota, spawn

pytestmark = [pytest.mark.promise, pytest.mark.anyio]

RATE, WORKERS = 100, 50


@attrs.define
class Count:
    """An observer that counts attempts from the first 429 on, and notes when each of those let in was over."""

    since: float | None = None
    refused: int = 0
    let_in: list[float] = attrs.Factory(list)

    def __call__(self, event: Event) -> None:
        if not isinstance(event, AttemptFinished):
            return
        now = time.monotonic()
        if event.status_code == 429 and self.since is None:
            self.since = now
        if self.since is not None:
            self.refused += event.status_code == 429
            if event.status_code == 200:
                self.let_in.append(now - self.since)


async def bulk_against(quota: Quota, until: Callable[[Count], bool]) -> Count:
    """What a bulk without end meets until there is enough of it; none of its items may fail."""
    count = Count()
    with spawn(quota=quota, documents=200) as sandbox:
        token1, token2 = await anyio.to_thread.run_sync(sandbox.tokens)
        paths = (f"/api/customers/{n % 40 + 1}" for n in itertools.count())
        async with (
            AsyncLayerClient(token1=token1, token2=token2, base_url=sandbox.url, observer=count) as client,
            client.bulk(paths, workers=WORKERS) as outcomes,
        ):
            async for outcome in outcomes:
                assert outcome.ok
                if until(count):
                    break
    return count


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("kind", "least"), [("token bucket", 0.93), ("fixed window", 0.90)])
async def test_an_unknown_quota_is_used_through_sockets(
    kind: str, least: float, full: bool, anyio_backend: str, report: list[str]
) -> None:
    if not full:
        await lets_no_herd_out_and_soon_goes_as_fast_as_it_may(kind, report)
        return
    window, seconds = (None, 60.0) if kind == "token bucket" else (10.0, 72.0)
    count = await bulk_against(
        Quota(rate=RATE, window=window), lambda count: bool(count.let_in) and count.let_in[-1] >= seconds
    )
    let_in, elapsed = count.let_in, count.let_in[-1]
    if window is not None:
        # Of a window nothing is left when it meets its first 429: whole ones count, from when the next one lets in.
        first = next(at for at in let_in if at > 0.5)
        elapsed = (elapsed - first) // window * window
        let_in = [at for at in let_in if first <= at < first + elapsed]
    used, refused = len(let_in) / (RATE * elapsed), count.refused / (count.refused + len(count.let_in))
    report.append(f"{kind}, {elapsed:.0f} s: {used:.1%} used, {refused:.1%} answered 429")
    assert used >= least
    assert refused <= 0.08


async def lets_no_herd_out_and_soon_goes_as_fast_as_it_may(kind: str, report: list[str]) -> None:
    """The gate opens a second after the first 429; there are `RATE` to be had then, of a bucket as of a window."""
    wanted = RATE * 8 // 10

    def after_opening(count: Count) -> list[float]:
        return [at for at in count.let_in if at > 0.5]  # the others were under way at the first 429

    count = await bulk_against(
        Quota(rate=RATE, window=None if kind == "token bucket" else 1.0),
        lambda count: len(after_opening(count)) >= wanted,
    )
    times = after_opening(count)
    herd = times[WORKERS - 1] - times[0]
    report.append(
        f"{kind}: the first {WORKERS} let in again within {herd:.2f} s, {wanted} after {times[-1]:.2f} s, "
        f"{count.refused} answered 429"
    )
    assert times[0] > 0.9
    assert herd > 0.35  # 0.48 at 50/s, doubled every 0.25 s; without a pace, a few milliseconds
    assert times[-1] < 2.4  # 1.6 where the pace is doubled, 2.6 where it is not
