"""What the pool promises, under siege: cancels everywhere, a server that closes at random, thousands at once.

Short by default, at the full figures with --full; seed and duration are printed, and LAYER_SEED chooses another seed.
Sockets are counted in /proc with the garbage collector off: nothing may be left for it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import httpx
import pytest

from layer_async._errors import ClientClosedError
from layer_async._exchange import EXTENSION, ExchangeRecord
from layer_async._pool import ConnectionPool
from layer_async._transport import LayerTransport

from .conftest import PromiseRecord
from .faultserver import FaultServer, client_context

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.promise,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets are counted in /proc"),
]

SIZE = 8
KINDS = ["plain", "TLS", "proxy", "tunnel"]
WAYS = [("scope", "asyncio"), ("scope", "trio"), ("native", "asyncio"), ("wait_for", "asyncio")]


def open_sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


@attrs.define
class Siege:
    """A server, and a client whose pool must come out of it whole."""

    server: FaultServer
    client: httpx.AsyncClient
    pool: ConnectionPool
    url: str

    async def call(self, path: str, *, method: str = "GET", content: bytes | None = None) -> None:
        """One call, which gets its own answer or fails."""
        response = await self.client.request(method, f"{self.url}{path}", content=content)
        assert response.status_code == 200
        if path.startswith(("/ok", "/slow")):
            assert response.text.endswith(path)
        if path == "/echo":
            assert response.content == content

    async def call_until_answered(self, path: str) -> None:
        """The server that lies may be closing a connection just as it is used: that says nothing about slots."""
        for _ in range(SIZE):
            with suppress(httpx.TransportError):
                await self.call(path)
                return
        await self.call(path)

    async def assert_whole(self) -> None:
        """Nothing is in use, and every slot serves, all of them at the same time."""
        stats = self.pool.stats
        assert (stats.in_use, stats.waiting) == (0, 0), repr(self.pool)
        assert stats.open == stats.idle <= SIZE
        slots = [await self.pool.acquire(0) for _ in range(SIZE)]
        for slot in slots:
            slot.release()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                for number in range(SIZE * 2):
                    group.start_soon(self.call_until_answered, f"/ok/{number}")


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@asynccontextmanager
async def siege(kind: str, *, size: int = SIZE, closing: float = 0, seed: int = 0) -> AsyncIterator[Siege]:
    with FaultServer(tls=kind == "TLS", closing=closing, seed=seed) as server, no_collector():
        before = open_sockets()
        proxied = kind in ("proxy", "tunnel")
        transport = LayerTransport(
            limits=httpx.Limits(max_connections=size),
            verify=client_context(),
            proxy=server.url if proxied else None,
        )
        url = {"proxy": "http://origin.invalid", "tunnel": "https://origin.invalid"}.get(kind, server.url)
        client = httpx.AsyncClient(transport=transport, timeout=30)
        yield Siege(server, client, transport.pool, url)
        await client.aclose()
        assert transport.pool.stats.open == 0
        with anyio.fail_after(10):
            while server.open_connections:
                await anyio.sleep(0.001)
        await anyio.sleep(0.001)
        assert open_sockets() == before, "a socket was left for the garbage collector"


# Cancellation


async def cancel_by_scope(call: Callable[[], Awaitable[None]], delay: float, chance: random.Random) -> bool:
    with anyio.move_on_after(delay) as scope:
        await call()
    return scope.cancelled_caught


async def cancel_natively(call: Callable[[], Coroutine[Any, Any, None]], delay: float, chance: random.Random) -> bool:
    task = asyncio.create_task(call())
    await asyncio.wait([task], timeout=delay)
    for _ in range(chance.randrange(1, 4)):
        task.cancel()
        await asyncio.sleep(0)
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


async def cancel_by_wait_for(call: Callable[[], Awaitable[None]], delay: float, chance: random.Random) -> bool:
    try:
        await asyncio.wait_for(call(), delay)
    except TimeoutError:
        return True
    return False


CANCELS: dict[str, Callable[..., Awaitable[bool]]] = {
    "scope": cancel_by_scope,
    "native": cancel_natively,
    "wait_for": cancel_by_wait_for,
}


@pytest.mark.parametrize(("way", "anyio_backend"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
async def test_cancels_at_random_points_lose_no_slot_no_socket_and_no_place_in_the_queue(
    kind: str, way: str, full: bool, seed: int, report: list[str], promise_record: PromiseRecord
) -> None:
    wanted = (100_000 if full else 1500) // (len(KINDS) * len(WAYS))
    chance = random.Random(seed)
    cancelled = calls = 0
    async with siege(kind) as at:

        async def worker() -> None:
            nonlocal cancelled, calls
            while cancelled < wanted:
                calls += 1
                path = chance.choice([f"/ok/{calls}", f"/ok/{calls}", "/echo", "/large/100000", "/chunked", "/lie"])
                body = b"x" * chance.randrange(100_000) if path == "/echo" else None

                async def call(path: str = path, body: bytes | None = body) -> None:
                    with suppress(httpx.TransportError):  # the server that lies may be met in the act
                        await at.call(path, method="PUT" if body is not None else "GET", content=body)

                delay = chance.choice([0, *(chance.expovariate(1 / mean) for mean in (0.001, 0.005, 0.02, 0.1))])
                was_cancelled = await CANCELS[way](call, delay, chance)
                cancelled += was_cancelled

        async with anyio.create_task_group() as group:
            for _ in range(SIZE * 3):
                group.start_soon(worker)
        await at.assert_whole()
    report.append(f"{cancelled} of {calls} calls cancelled")
    promise_record(
        "cancellation at random points: plain, TLS, proxy, tunnel; scope, native, wait_for; asyncio, trio",
        promised="100,000 cancels: 0 slots, sockets or places lost",
        measured="0 in {:,.0f}",
        total=cancelled,
    )


@types.coroutine
def acting_at(step: int, act: Callable[[], object], coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, int]:
    """Drive `coroutine`, and `act` as it waits for the `step`-th time; returns how many times it waited."""
    count = 0
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            waits_for = coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration:
            return count
        count += 1
        if count == step:
            act()
        value = error = None
        try:
            value = yield waits_for
        except BaseException as exc:
            error = exc


async def run_out(way: str, step: int, call: Callable[[], Coroutine[Any, Any, None]]) -> bool:
    """Cancel `call` as it waits for the `step`-th time; whether it waited as often as that."""
    if way == "scope":
        with anyio.CancelScope() as scope:
            return await acting_at(step, scope.cancel, call()) >= step
        return True

    async def drive() -> int:
        task = asyncio.current_task()
        assert task is not None
        return await acting_at(step, task.cancel, call())

    try:
        return await asyncio.create_task(drive()) >= step
    except asyncio.CancelledError:
        return True


@pytest.mark.parametrize(("way", "anyio_backend"), WAYS[:3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/slow/1", "/chunked", "/lie", "/echo"])
async def test_a_cancel_at_every_step_of_a_call_loses_nothing(
    kind: str, way: str, path: str, anyio_backend: str, full: bool, report: list[str]
) -> None:
    """On a new connection, on one that has served, and in the queue.

    In short at the first three and at every fourth of the others, which kind and way choose.
    """
    steps: list[int] = []
    chosen = (KINDS.index(kind) + WAYS.index((way, anyio_backend))) % 4
    taken = [step for step in range(1, 61) if full or step <= 3 or step % 4 == chosen]
    async with siege(kind, size=2) as at:
        content = b"x" * (3_000_000 if full else 1_000_000) if path == "/echo" else None

        async def call() -> None:
            with suppress(httpx.TransportError) if path == "/lie" else nullcontext():
                await at.call(path, method="GET" if content is None else "PUT", content=content)

        async def call_from_the_queue() -> None:
            held = [await at.pool.acquire(), await at.pool.acquire()]
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(release_soon, held)
                    await call()
            finally:
                for slot in held:
                    slot.release()

        for is_warm, make in ((False, call), (True, call), (True, call_from_the_queue)):
            count = 0
            for step in taken:
                if is_warm:
                    await at.call_until_answered("/ok/warm")
                    if path == "/lie":
                        await anyio.sleep(0.002)
                if not await run_out(way, step, make):
                    break
                assert (at.pool.stats.in_use, at.pool.stats.waiting) == (0, 0), f"step {step}: {at.pool!r}"
                if not is_warm:
                    assert at.pool.stats.open == at.pool.stats.idle
                    at.server.drop_connections()
                    while at.server.open_connections:
                        await anyio.lowlevel.checkpoint()
                count += 1
            steps.append(count)
    assert steps[0] >= 1
    report.append(f"{steps} steps")


async def release_soon(slots: list[Any]) -> None:
    for slot in slots:
        await anyio.lowlevel.checkpoint()
        slot.release()


# A server that closes


async def call_again_if_stale(at: Siege, method: str, path: str, content: bytes | None) -> str | None:
    """What a retry loop does at the least: once more and fresh, where the connection was an old one."""
    record = ExchangeRecord()
    for _ in range(2):
        record.begin_attempt()
        request = at.client.build_request(
            method, f"{at.url}{path}", content=content, extensions={EXTENSION: record, "timeout": {}}
        )
        try:
            response = await at.client.send(request)
        except httpx.TransportError as exc:
            may_repeat = method != "POST" or record.bytes_written == 0
            if record.reused and not record.fresh and may_repeat:
                record.fresh = True
                continue
            return type(exc).__name__
        assert response.content == (content if path.startswith("/echo") else path.encode())
        return None
    raise AssertionError("unreachable")


@pytest.mark.parametrize("kind", ["plain", "TLS"])
async def test_a_server_that_closes_idle_connections_at_random_fails_no_idempotent_call_and_executes_no_post_twice(
    kind: str, full: bool, seed: int, report: list[str]
) -> None:
    count = 15_500 if full else 250  # a third of them POST
    chance = random.Random(seed)
    failed: list[str] = []
    posts = 0
    async with siege(kind, closing=0.3, seed=seed) as at:
        numbers = iter(range(count))

        async def worker() -> None:
            nonlocal posts
            for number in numbers:
                method = chance.choice(["GET", "PUT", "POST"])
                if method == "GET":
                    error = await call_again_if_stale(at, method, f"/ok/{number}", None)
                else:
                    error = await call_again_if_stale(at, method, f"/echo/{number}", b"%d" % number)
                posts += method == "POST"
                if error is not None and method != "POST":
                    failed.append(f"{method} {number}: {error}")
                if chance.random() < 0.1:
                    await anyio.sleep(0.003)

        async with anyio.create_task_group() as group:
            for _ in range(SIZE * 2):
                group.start_soon(worker)
        executed = at.server.record.executed
        stats = at.pool.stats
    assert not failed
    twice = [target for target, times in executed.items() if times > 1 and target.startswith("POST")]
    assert not twice
    assert stats.discarded > count // 10, "the server did not close enough for this to show anything"
    report.append(f"{count} calls, {posts} of them POST, {stats.opened} connections, {stats.reused} reused")


# Thousands at once


@pytest.mark.parametrize("kind", ["plain", "TLS"])
async def test_thousands_of_calls_at_once_open_no_more_connections_than_there_are_slots(
    kind: str, full: bool, report: list[str]
) -> None:
    count = 4000 if full else 400
    async with siege(kind, size=100) as at:
        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(at.call, f"/ok/{number}")
        opened = at.pool.stats.opened
        assert opened <= 101
        assert at.server.record.connections <= 101
    report.append(f"{count} calls, {opened} connections")


@pytest.mark.parametrize("kind", ["plain", "TLS"])
async def test_closing_with_ten_thousand_pending_takes_less_than_a_second(
    kind: str, full: bool, report: list[str]
) -> None:
    pending = 10_000 if full else 2_000
    ended: list[bool] = []
    async with siege(kind, size=50) as at:

        async def call() -> None:
            try:
                await at.client.get(f"{at.url}/never", timeout=None)
            except ClientClosedError:
                ended.append(True)

        async def wait() -> None:
            try:
                await at.pool.acquire()
            except ClientClosedError:
                ended.append(True)

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(call)
            while len(at.server.record.requests) < 50:
                await anyio.sleep(0.001)
            for _ in range(pending):
                group.start_soon(wait)
            while at.pool.stats.waiting < pending:
                await anyio.sleep(0.001)
            started = time.perf_counter()
            await at.client.aclose()
            elapsed = time.perf_counter() - started
    assert len(ended) == pending + 50
    assert elapsed < 1
    report.append(f"{pending} pending, closed in {elapsed * 1000:.0f} ms")
