"""One cell of a race, in a fresh process: a cell as JSON on standard input, its measurement as JSON on standard output.

It owns the closed loop and the clocks. Rules: the loop does nothing per call but take a number, read the clock and keep
the difference, the same for every peer; connections are opened and code is warm before the clocks start; what is
worked out from the numbers is worked out after they stop.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import pkgutil
import resource
import sys
import time
from pathlib import Path

import attrs
import msgspec

from .origin import allow_many_sockets
from .peers import PEERS, Cell, Get


@attrs.frozen
class Measurement:
    """What one cell came to.

    `cpu_us` is the client's CPU time (user and system) per call, in microseconds; `p50_ms` and `p99_ms` are latencies
    of a call in milliseconds; `peak_memory_kib` is the most memory that the process ever held, `memory_before_kib` what
    it held after the import, before the client was opened. `error` is the first of the `errors`, as text.
    """

    calls: int
    errors: int
    error: str | None
    cpu_us: float
    p50_ms: float
    p99_ms: float
    calls_per_second: float
    peak_memory_kib: int
    memory_before_kib: int


@attrs.define
class Lap:
    """What the workers wrote down, and what the clocks said around them."""

    latencies: list[float] = attrs.field(factory=list)
    errors: list[str] = attrs.field(factory=list)
    cpu: float = 0.0
    elapsed: float = 0.0


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory_kib(field: str) -> int:
    """`VmHWM` (the most there ever was) or `VmRSS` (now) of this process.

    Not `ru_maxrss` where it can be helped: on Linux that starts at the size of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // 1024 if sys.platform == "darwin" else most
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


async def closed_loop(
    get: Get, *, workers: int, seconds: float, least_calls: int, numbers: itertools.count[int]
) -> Lap:
    """Let `workers` call one after the other, for `seconds` and at least `least_calls` calls in all."""
    lap = Lap()
    latencies, errors, clock = lap.latencies, lap.errors, time.perf_counter
    first = next(numbers)

    async def worker() -> None:
        began = clock()
        while True:
            number = next(numbers)
            if began > end and number - first > least_calls:
                return
            try:
                await get(f"/api/documents/{number}")
            except Exception as error:  # counted and told: a peer may raise what it likes, and the race fails then
                errors.append(f"{type(error).__name__}: {error}"[:300])
            ended = clock()
            latencies.append(ended - began)
            began = ended

    cpu, start = cpu_seconds(), clock()
    end = start + seconds
    await asyncio.gather(*(worker() for _ in range(workers)))
    lap.elapsed, lap.cpu = clock() - start, cpu_seconds() - cpu
    return lap


async def measure(cell: Cell) -> Measurement:
    """Open the cell's peer, warm it up, and take its time."""
    numbers = itertools.count(1)
    peer = PEERS[cell.peer]
    pkgutil.resolve_name(peer.needs)  # what its import takes is not what its connections take
    before = memory_kib("VmRSS")
    async with peer.open(cell) as get:
        # One call for each connection, and as many as it takes until the interpreter has specialised the code.
        warm = await closed_loop(
            get, workers=cell.concurrency, seconds=0.0, least_calls=cell.concurrency + 100, numbers=numbers
        )
        gc.collect()
        lap = await closed_loop(
            get, workers=cell.concurrency, seconds=cell.seconds, least_calls=cell.least_calls, numbers=numbers
        )
    errors = warm.errors + lap.errors
    calls = len(lap.latencies)
    ordered = sorted(lap.latencies)
    return Measurement(
        calls=calls,
        errors=len(errors),
        error=errors[0] if errors else None,
        cpu_us=round(lap.cpu / calls * 1e6, 2),
        p50_ms=round(ordered[calls // 2] * 1e3, 3),
        p99_ms=round(ordered[min(calls - 1, calls * 99 // 100)] * 1e3, 3),
        calls_per_second=round(calls / lap.elapsed, 1),
        peak_memory_kib=memory_kib("VmHWM"),
        memory_before_kib=before,
    )


def main() -> None:
    cell = msgspec.json.decode(sys.stdin.buffer.read(), type=Cell)
    allow_many_sockets()
    measurement = asyncio.run(measure(cell))
    sys.stdout.buffer.write(msgspec.json.encode(measurement))
    sys.stdout.flush()
    os._exit(0)  # a peer with threads of its own may crash an interpreter that shuts down, when all is measured


if __name__ == "__main__":
    main()
