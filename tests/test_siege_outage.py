"""What is promised for outages, over real sockets: a bulk loses nothing, and neither it nor single calls send a storm.

Short by default, at the full figures with --full.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import anyio
import anyio.to_thread
import pytest

from layer_async import AsyncLayerClient, AttemptFinished, Event, LayerError, TokenPair

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


@pytest.mark.parametrize(
    ("kind", "anyio_backend"), [*((kind, "asyncio") for kind in KINDS), ("refused", "trio"), ("503", "trio")]
)
async def test_a_bulk_loses_nothing_in_an_outage_and_sends_hardly_more_than_without(
    kind: str, anyio_backend: str, full: bool, seed: int, report: list[str]
) -> None:
    total, workers = (60_000, 50) if full else (1_000, 20)
    for seconds in (1.0, 10.0, 60.0) if full else (0.3,):
        attempts = Attempts()
        done = 0
        with OutageServer() as server, server.away_for(kind, seconds, when=lambda: done > total // 4):
            async with AsyncLayerClient(
                tokens=PAIR, base_url=server.url, observer=attempts, timeout=1.0 if full else 0.2
            ) as client:
                paths = (f"/api/{number}" for number in range(total))
                async with client.bulk(paths, workers=workers) as outcomes:
                    async for outcome in outcomes:
                        outcome.unwrap()
                        done += 1
                back_again = time.monotonic() - server.ended_at
                assert outcomes.stopped is None
                assert client.pool.stats.in_use == 0
        assert done == total
        assert len(server.served) == total
        assert attempts.count <= 1.10 * total
        report.append(f"{kind} {seconds} s: {attempts.count} attempts for {total}, done {back_again:.1f} s after it")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("kind", ["refused", "503"])
async def test_single_calls_send_no_storm_and_recover_at_once(
    kind: str, anyio_backend: str, full: bool, seed: int, report: list[str]
) -> None:
    rate, seconds, margin = (100, 10.0, 3.0) if full else (600, 0.8, 0.2)
    recovered: dict[str, float] = {}
    sent: dict[str, int] = {}
    for name, options in {"with": {}, "without": {"retry": None}}.items():
        attempts = Attempts()
        calls = 0
        good: list[float] = []
        with OutageServer() as server, server.away_for(kind, seconds, when=lambda: calls > rate * margin):
            async with AsyncLayerClient(
                tokens=PAIR,
                base_url=server.url,
                observer=attempts,
                **options,  # type: ignore[arg-type]
            ) as client:

                async def call(number: int) -> None:
                    began = time.monotonic()
                    try:
                        await client.get(f"/api/{number}")
                    except LayerError:
                        return
                    if began > server.ended_at:
                        good.append(time.monotonic())

                began = time.monotonic()
                async with anyio.create_task_group() as group:
                    for number in itertools.count():
                        calls = number
                        if number >= rate * (seconds + 2 * margin):
                            break
                        await anyio.sleep(max(0.0, began + number / rate - time.monotonic()))
                        group.start_soon(call, number)
        sent[name] = attempts.count
        recovered[name] = min(good) - server.ended_at
    assert sent["with"] <= 1.10 * sent["without"]
    assert recovered["with"] <= recovered["without"] + 3.0
    report.append(
        f"{kind} {seconds} s: {sent['with']} attempts, {sent['without']} without retries; "
        f"the first answer {recovered['with'] * 1e3:.0f} ms after it, {recovered['without'] * 1e3:.0f} ms without"
    )
