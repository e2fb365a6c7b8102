"""What a whole client promises, under siege: everything on (tokens, retry, gate, deadline), over real sockets.

The pool's own siege is in test_siege_pool.py. Short by default, at the full figures with --full.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import httpx
import pytest

from benchmarks.origin import running_origin
from layer_async import (
    APIConnectionError,
    AsyncLayerClient,
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    LayerError,
    RetryPolicy,
    TokenPair,
)
from layer_async.sandbox import Sandbox, serve

from .conftest import PromiseRecord
from .faultserver import FaultServer, client_context

pytestmark = [pytest.mark.anyio, pytest.mark.promise]

PAIR = TokenPair("siege-token-one-7d1f", "siege-token-two-93ac")
QUICK = RetryPolicy(backoff_initial=0.001, backoff_max=0.001)


def make(server: FaultServer, **options: Any) -> AsyncLayerClient:
    settings: dict[str, Any] = {"tokens": PAIR, "base_url": server.url, "verify": client_context(), "retry": QUICK}
    return AsyncLayerClient(**(settings | options))


def open_sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


async def sockets_left(server: FaultServer, before: int) -> int:
    """How many sockets more than `before` are open once the server's threads have noticed that ours are closed."""
    with anyio.move_on_after(5):
        while server.open_connections or open_sockets() > before:
            await anyio.sleep(0.001)
    return open_sockets() - before


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets are counted in /proc")


# Cancellation


@linux
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize(("way", "anyio_backend"), [("scope", "asyncio"), ("scope", "trio"), ("native", "asyncio")])
async def test_calls_cancelled_at_random_lose_nothing(
    way: str,
    anyio_backend: str,
    tls: bool,
    full: bool,
    seed: int,
    report: list[str],
    no_collector: None,
    promise_record: PromiseRecord,
) -> None:
    total, size = (100_000 if full else 320), 8
    dice = random.Random(seed)
    with FaultServer(tls=tls, closing=0.05, seed=seed) as server:
        before = open_sockets()
        async with make(server, limits=httpx.Limits(max_connections=size)) as client:
            cancelled = 0

            async def call(number: int) -> None:
                path, verb = (f"/slow/{number}", "GET") if number % 2 else ("/echo", "PUT")
                with suppress(APIConnectionError):
                    response = await client.request(verb, path, content=b"x" * number if verb == "PUT" else None)
                    assert response.content.endswith(path.encode() if verb == "GET" else b"x" * number)

            async def worker(share: int) -> None:
                nonlocal cancelled
                for number in range(share):
                    patience = dice.random() * 0.05
                    if way == "scope":
                        with anyio.move_on_after(patience) as scope:
                            await call(number % 500)
                        cancelled += scope.cancelled_caught
                    else:
                        task = asyncio.ensure_future(call(number % 500))
                        await asyncio.sleep(patience)
                        cancelled += task.cancel()
                        with suppress(asyncio.CancelledError):
                            await task

            async with anyio.create_task_group() as tasks:
                for _ in range(size * 4):
                    tasks.start_soon(worker, total // (size * 4))
            stats = client.pool.stats
            assert (stats.in_use, stats.waiting) == (0, 0), repr(client.pool)
            with anyio.fail_after(20):
                await client.fetch_all([f"/ok/{n}" for n in range(size * 3)], workers=size * 3)
        assert await sockets_left(server, before) == 0
        report.append(f"{total} calls, {cancelled} cancelled, nothing lost")
        promise_record(
            "cancellation of whole calls at random points",
            promised="100,000 calls, plain and TLS: 0 slots or sockets lost",
            measured="0 in {:,.0f} cancelled",
            total=cancelled,
        )


# Keep-alive


async def test_connections_closed_at_random_fail_no_safe_call_and_run_no_post_twice(
    full: bool, seed: int, report: list[str], promise_record: PromiseRecord
) -> None:
    total = 10_000 if full else 300
    with FaultServer(closing=0.3, seed=seed) as server:
        lost = 0
        doubtful: list[bool] = []
        async with make(server, limits=httpx.Limits(max_connections=20)) as client:

            async def call(number: int) -> None:
                nonlocal lost
                kind = number % 3
                if kind == 2:
                    try:
                        await client.post(f"/ok/post-{number}", content=b"once")
                    except APIConnectionError as exc:
                        lost += 1
                        doubtful.append(exc.maybe_processed)
                elif kind:
                    await client.put(f"/ok/put-{number}", content=b"again")
                else:
                    assert (await client.get(f"/ok/get-{number}")).text.endswith(f"get-{number}")

            async with client.bulk(range(total), call, workers=20) as outcomes:
                errors = [outcome.error async for outcome in outcomes if outcome.error is not None]
        assert errors == []
        assert all(doubtful)
        posts = {path: times for path, times in server.record.executed.items() if "post-" in path}
        assert [path for path, times in posts.items() if times > 1] == []
        report.append(f"{total} calls, {lost} POSTs without an answer, {server.record.connections} connections")
        promise_record(
            "stale keep-alive",
            promised="0 of 10,000 idempotent calls fail, 0 POSTs executed twice",
            measured="0 and 0 of {:,.0f} calls",
            total=total,
        )


# Many at once


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_thousands_of_calls_at_once_do_not_stall_the_loop_or_open_more_connections(
    full: bool, report: list[str], seed: int
) -> None:
    few, many = (400, 4_000) if full else (200, 1_000)
    cost: dict[int, float] = {}
    stall: dict[str, float] = {}
    with running_origin(tls=False, latency=0, size=2048) as origin:  # in a process of its own: its work is not ours
        for total in (few, many):
            async with AsyncLayerClient(tokens=PAIR, base_url=origin.url) as client:
                started = time.process_time()
                stall["calls"] = await _longest_stall(_calls, client, total)
                cost[total] = (time.process_time() - started) / total
                assert client.pool.stats.opened <= 101
        stall["bare"] = await _longest_stall(_bare_tasks, many)
    assert stall["calls"] <= (4 * stall["bare"] if full else stall["bare"] + 1.5)
    if full:
        assert cost[many] <= 1.3 * cost[few]
    report.append(
        f"{few}: {cost[few] * 1e6:.0f} µs a call, {many}: {cost[many] * 1e6:.0f} µs, "
        f"longest stall {stall['calls'] * 1e3:.0f} ms, of bare tasks {stall['bare'] * 1e3:.0f} ms"
    )


async def _calls(client: AsyncLayerClient, total: int) -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(total):
            tasks.start_soon(client.get, f"/ok/{number}")


async def _bare_tasks(total: int) -> None:
    event = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for _ in range(total):
            tasks.start_soon(event.wait)
        await anyio.sleep(0)
        event.set()


async def _longest_stall(run: Callable[..., Awaitable[None]], *arguments: Any) -> float:
    """The longest time, in seconds, for which a task that only wants to be woken was not."""
    longest, done = 0.0, False

    async def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not done:
            await anyio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last - 0.001), now

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await anyio.sleep(0.005)
        await run(*arguments)
        done = True
    return longest


# Shutdown


@linux
async def test_closing_with_thousands_waiting_is_quick_and_leaves_no_socket(
    full: bool, report: list[str], no_collector: None, promise_record: PromiseRecord
) -> None:
    total = 10_000 if full else 1_000
    with FaultServer() as server:
        before = open_sockets()
        client = make(server, deadline=None)
        outcomes: list[str] = []

        async def call() -> None:
            try:
                await client.get("/stall")
            except LayerError as exc:
                outcomes.append(type(exc).__name__)

        async with anyio.create_task_group() as tasks:
            for _ in range(total):
                tasks.start_soon(call)
            while client.pool.stats.waiting < total - 100 or client.pool.stats.open < 100:
                await anyio.sleep(0.005)
            started = time.perf_counter()
            await client.aclose()
            elapsed = time.perf_counter() - started
            assert await sockets_left(server, before) == 0
        assert outcomes == [ClientClosedError.__name__] * total
        assert elapsed < 1.0
    report.append(f"{total} pending, closed in {elapsed * 1e3:.0f} ms")
    promise_record(
        "closing with 10,000 pending", promised="< 1 s, 0 sockets left", measured="{:.2f} s, 0 left", most=elapsed
    )


# Deadline


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_no_call_outlives_its_deadline(
    tls: bool, full: bool, report: list[str], seed: int, promise_record: PromiseRecord
) -> None:
    waiting = 10_000 if full else 500
    bounds = {"idle": 0.05, "loaded": 0.25} if full else {"idle": 0.5, "loaded": 1.0}
    worst = {}
    gc.collect()  # what thousands of cancelled calls of the test before have left takes longer than the bound
    with FaultServer(tls=tls) as server:
        async with make(server, limits=httpx.Limits(max_connections=10)) as client:
            worst["idle"] = max(
                await _worst_overrun(client, 20, seed), await _worst_overrun(client, 20, seed, is_warm=True)
            )
            async with anyio.create_task_group() as tasks:
                for _ in range(waiting):
                    tasks.start_soon(_until_cancelled, client)
                while client.pool.stats.waiting < waiting - 10:
                    await anyio.sleep(0.005)
                worst["loaded"] = await _worst_overrun(client, 20, seed)
                tasks.cancel_scope.cancel()
            assert client.pool.stats.in_use == 0
    for name, bound in bounds.items():
        assert worst[name] < bound
    report.append(", ".join(f"{name}: {seconds * 1e3:.0f} ms late at most" for name, seconds in worst.items()))
    for name, seconds in worst.items():
        promise_record(
            {"idle": "deadline overrun, idle", "loaded": "deadline overrun, 10,000 calls waiting"}[name],
            promised={"idle": "≤ 50 ms", "loaded": "≤ 250 ms"}[name],
            measured="{:.0f} ms",
            most=seconds * 1e3,
        )


async def _until_cancelled(client: AsyncLayerClient) -> None:
    await client.get("/stall", deadline=None)


async def _worst_overrun(client: AsyncLayerClient, calls: int, seed: int, *, is_warm: bool = False) -> float:
    worst, dice = -math.inf, random.Random(seed)

    async def call(path: str, deadline: float) -> None:
        nonlocal worst
        if is_warm:  # so that the call finds an open connection
            await client.get("/ok")
        started = anyio.current_time()
        with suppress(DeadlineExceededError, APIConnectionError):
            await client.get(path, deadline=deadline)
        worst = max(worst, anyio.current_time() - started - deadline)

    async with anyio.create_task_group() as tasks:
        for _ in range(calls):
            tasks.start_soon(call, dice.choice(["/stall", "/drip", "/half-head"]), 0.05 + dice.random() * 0.1)
    return worst


# Tokens


async def test_a_thousand_calls_that_meet_an_expired_pair_cause_one_refresh(full: bool, report: list[str]) -> None:
    total = 1000 if full else 300
    sandbox = Sandbox(documents=100)
    asked = 0

    def source() -> TokenPair:
        nonlocal asked
        asked += 1
        return TokenPair(*sandbox.tokens)

    with serve(sandbox) as server:
        limits = httpx.Limits(max_connections=300)
        async with AsyncLayerClient(tokens=source, base_url=server.url, retry=QUICK, limits=limits) as client:
            await client.get("/api/customers/1")
            sandbox.rotate()
            paths = [f"/api/customers/{n % 100 + 1}" for n in range(total)]
            await client.fetch_all(paths, workers=total)
            stats = client.pool.stats
    assert asked == 2
    assert (stats.in_use, stats.waiting) == (0, 0)
    assert sandbox.record.mixed == 0
    report.append(f"{asked - 1} refresh, {sandbox.record.statuses[401]} calls sent again")


async def test_a_static_pair_that_lapsed_is_one_clear_error_and_no_storm(report: list[str]) -> None:
    sandbox = Sandbox(documents=100)
    errors: list[Exception | None] = []
    with serve(sandbox) as server:
        async with AsyncLayerClient(
            tokens=TokenPair(*sandbox.tokens), base_url=server.url, limits=httpx.Limits(max_connections=5)
        ) as client:
            sandbox.rotate()
            paths = [f"/api/customers/{n % 100 + 1}" for n in range(1000)]
            with pytest.raises(AuthenticationError, match="Token1 may have lapsed"):  # noqa: PT012 - from the loop
                async with client.bulk(paths, workers=500) as outcomes:
                    async for outcome in outcomes:
                        errors.append(outcome.error)
            with anyio.fail_after(5), pytest.raises(AuthenticationError, match="Token1 may have lapsed"):
                await client.get("/api/customers/1")
    assert {type(error) for error in errors} <= {AuthenticationError}
    assert sandbox.record.requests < 20
    report.append(f"1000 calls, {sandbox.record.requests} requests")


@pytest.mark.parametrize(
    "way",
    [
        "/redirect-away",
        "absolute",
        "//{other}/x",
        "/\\{other}/x",
        "https-to-http",
        "next_request",
        "hook",
        "middleware",
        "injected",
        "link",
    ],
)
@pytest.mark.parametrize("follow", [False, True])
async def test_tokens_reach_no_other_origin(way: str, follow: bool) -> None:
    with FaultServer() as home, FaultServer() as away:
        home.behaviours["redirect-away"] = lambda ex: ex.respond(
            status="307 Temporary Redirect", headers=f"Location: {away.url}/ok/caught\r\n"
        )
        other = away.url.removeprefix("http://")

        async def rewriting(request: httpx.Request, call_next: Any) -> httpx.Response:
            request.url = httpx.URL(f"{away.url}/ok/caught")
            response = await call_next(request)
            assert isinstance(response, httpx.Response)
            return response

        async def hook(request: httpx.Request) -> None:
            request.url = httpx.URL(f"{away.url}/ok/caught")

        options: dict[str, Any] = {"follow_redirects": follow}
        injected = httpx.AsyncClient(follow_redirects=True)
        if way == "injected":
            options |= {"http_client": injected, "verify": None}
        if way == "middleware":
            options |= {"middleware": [rewriting]}
        async with injected, make(home, **options) as client:
            if way == "hook":
                client.http.event_hooks = {"request": [hook]}
            path = {
                "absolute": f"{away.url}/ok/caught",
                "link": f"{away.url}/ok/caught?page=2",
                "https-to-http": f"http://{other}/ok/caught",
                "//{other}/x": f"//{other}/ok/caught",
                "/\\{other}/x": f"/\\{other}/ok/caught",
                "hook": "/ok/1",
                "middleware": "/ok/1",
            }.get(way, "/redirect-away/1")
            for body in (None, b"secret body"):
                with suppress(LayerError):
                    response = await client.request("PUT", path, content=body)
                    if response.next_request is not None:
                        await client.http.send(response.next_request)
        for seen in away.record.requests:
            assert "token1" not in {name.lower() for name in seen.headers}, way
            assert PAIR.token1 not in str(seen)
        if way == "next_request":
            assert away.record.requests
        for seen in home.record.requests:
            assert seen.headers["token1"] == PAIR.token1
