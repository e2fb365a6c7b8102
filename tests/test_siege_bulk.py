"""What a bulk promises: no item lost to an outage and no storm sent, memory that does not grow, turns for all.

Short by default, at the full figures with --full.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import anyio
import anyio.lowlevel
import pytest

from benchmarks.origin import running_origin
from layer_async import AsyncLayerClient, AttemptFinished, Bulk, Event, LayerError, TokenPair, _outage

pytestmark = [pytest.mark.anyio, pytest.mark.promise]

PAIR = TokenPair("outage-token-one-51be", "outage-token-two-08af")
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
KINDS = ("refused", "closed", "503", "black hole")


class Conversation(asyncio.Protocol):
    """One connection to a server that may be away."""

    transport: asyncio.Transport

    def __init__(self, server: OutageServer) -> None:
        self.server = server
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.connections.add(transport)
        if self.server.outage == "closed":
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        *requests, self.rest = (self.rest + data).split(b"\r\n\r\n")
        for request in requests:
            if self.server.outage is None:
                self.server.served[request.split(b" ", 2)[1].decode()] += 1
                self.transport.write(ANSWER)
            elif self.server.outage == "503":
                self.transport.write(UNAVAILABLE)


class OutageServer:
    """A server on loopback, in a thread of its own, that can be away in several ways."""

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self.connections: set[asyncio.Transport] = set()
        self.outage: str | None = None
        self.ended_at = float("inf")
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self.thread.start()
        self.run(self.listen())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.away("refused"))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    def run(self, step: Any) -> None:
        asyncio.run_coroutine_threadsafe(step, self.loop).result(5)

    async def listen(self) -> None:
        sock = socket.create_server(("127.0.0.1", self.port), backlog=1000)
        self.port = sock.getsockname()[1]
        self.listener = await self.loop.create_server(lambda: Conversation(self), sock=sock)

    async def away(self, kind: str) -> None:
        self.outage = kind
        if kind == "refused":
            self.listener.close()
        if kind in ("refused", "closed"):
            for transport in self.connections:
                transport.abort()
            await asyncio.sleep(0)

    async def back(self) -> None:
        if self.outage == "refused":
            await self.listen()
        elif self.outage == "black hole":  # what was swallowed stays so
            for transport in self.connections:
                transport.abort()
        self.outage = None
        self.ended_at = time.monotonic()

    @contextmanager
    def away_for(self, kind: str, seconds: float, *, when: Callable[[], bool]) -> Iterator[None]:
        """While the block runs: away for so long as soon as `when` says so."""

        def act() -> None:
            while not when():
                time.sleep(0.002)
            self.run(self.away(kind))
            time.sleep(seconds)
            self.run(self.back())

        actor = threading.Thread(target=act, daemon=True)
        actor.start()
        yield
        actor.join(seconds + 5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Attempts:
    """An observer that counts what a client tried to send."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: Event) -> None:
        self.count += isinstance(event, AttemptFinished)


async def bulk_through(kind: str, seconds: float, *, total: int, workers: int, timeout: float) -> tuple[int, float]:
    """How many attempts a bulk of so many items makes that meets such an outage, and when it was done after it."""
    attempts = Attempts()
    done = 0
    with OutageServer() as server, server.away_for(kind, seconds, when=lambda: done > total // 4):
        async with AsyncLayerClient(tokens=PAIR, base_url=server.url, observer=attempts, timeout=timeout) as client:
            async with client.bulk((f"/api/{number}" for number in range(total)), workers=workers) as outcomes:
                async for outcome in outcomes:
                    outcome.unwrap()
                    done += 1
            afterwards = time.monotonic() - server.ended_at
            assert outcomes.stopped is None
            assert client.pool.stats.in_use == 0
    assert done == total
    assert len(server.served) == total
    return attempts.count, afterwards


@pytest.mark.parametrize(("kind", "anyio_backend"), [*((kind, "asyncio") for kind in KINDS), ("503", "trio")])
async def test_a_bulk_loses_nothing_in_an_outage_and_sends_hardly_more_than_without(
    kind: str, anyio_backend: str, full: bool, seed: int, report: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    total, workers = (60_000, 50) if full else (400, 8)
    if not full:  # probes that wait for as long as they do would make a longer test, and no other
        monkeypatch.setattr(_outage, "LONGEST_WAIT", 0.1)
    for seconds in (1.0, 10.0, 60.0) if full else (0.2,):
        sent, afterwards = await bulk_through(kind, seconds, total=total, workers=workers, timeout=1.0 if full else 0.1)
        assert sent <= 1.10 * total
        report.append(f"{kind} {seconds} s: {sent} attempts for {total}, done {afterwards:.1f} s after it")


async def calls_through(kind: str, seconds: float, *, rate: float, margin: float, **options: Any) -> tuple[int, float]:
    """How many attempts single calls at this rate make that meet such an outage, and how long after it one succeeds."""
    attempts = Attempts()
    begun = 0
    good: list[float] = []
    with OutageServer() as server, server.away_for(kind, seconds, when=lambda: begun > rate * margin):
        async with AsyncLayerClient(tokens=PAIR, base_url=server.url, observer=attempts, **options) as client:

            async def call(number: int) -> None:
                began = time.monotonic()
                with suppress(LayerError):
                    await client.get(f"/api/{number}")
                    if began > server.ended_at:
                        good.append(time.monotonic())

            beginning = time.monotonic()
            async with anyio.create_task_group() as group:
                for number in range(int(rate * (seconds + 2 * margin))):
                    begun = number
                    await anyio.sleep(max(0.0, beginning + number / rate - time.monotonic()))
                    group.start_soon(call, number)
    return attempts.count, min(good) - server.ended_at


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("kind", ["refused", "503"])
async def test_single_calls_send_no_storm_and_recover_at_once(
    kind: str, anyio_backend: str, full: bool, seed: int, report: list[str]
) -> None:
    figures: dict[str, Any] = (
        {"seconds": 10.0, "rate": 100, "margin": 3.0} if full else {"seconds": 0.8, "rate": 600, "margin": 0.1}
    )
    sent, recovered = await calls_through(kind, **figures)
    plain, plainly = await calls_through(kind, **figures, retry=None)
    assert sent <= 1.10 * plain
    assert recovered <= plainly + 3.0
    report.append(
        f"{kind} {figures['seconds']} s: {sent} attempts, {plain} without retries; "
        f"the first answer {recovered * 1e3:.0f} ms after it, {plainly * 1e3:.0f} ms without"
    )


# Memory and turns


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read in /proc")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("ordered", [False, True])
async def test_the_memory_of_a_bulk_does_not_grow_with_its_items(
    ordered: bool, anyio_backend: str, full: bool, seed: int, report: list[str]
) -> None:
    total, settled, size = (1_000_000, 10_000, 1_000) if full else (10_000, 5_000, 4_000)  # kept, it would be 20 MB

    async def call(number: int) -> bytes:
        await anyio.lowlevel.checkpoint()
        if number % 100 == 0:
            raise ValueError(number)
        return bytes(size)

    early = done = 0
    async with Bulk(range(total), call, workers=50, ordered=ordered, stop_when=lambda _: False) as outcomes:
        async for _ in outcomes:
            done += 1
            if done == settled:
                early = resident()
        late = resident()
    assert done == total
    assert late - early < 10 * 2**20
    report.append(f"{(late - early) / 2**20:.1f} MiB more after {total:,} items than after {settled:,}")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_bulk_of_many_items_does_not_stall_the_loop(
    anyio_backend: str, full: bool, seed: int, report: list[str]
) -> None:
    total = 100_000 if full else 1_500
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            worst, last = max(worst, now - last), now

    with running_origin(tls=False, latency=0, size=2048) as origin:  # in a process of its own
        client = AsyncLayerClient(tokens=PAIR, base_url=origin.url)
        async with client, anyio.create_task_group() as group:
            group.start_soon(watch)
            async with client.bulk((f"/ok/{number}" for number in range(total)), workers=100) as outcomes:
                assert all([outcome.ok async for outcome in outcomes])
            group.cancel_scope.cancel()
    assert worst < (0.1 if full else 0.5)
    report.append(f"longest stall of {total} items {worst * 1e3:.0f} ms")
