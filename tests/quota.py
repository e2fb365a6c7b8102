"""A day at the API in a moment: workers, a quota and the real gate, on a clock that jumps from one event to the next.

Nothing here sleeps or opens a socket. Workers of one process wait in its line; what is let in or refused is counted
from the first 429 on, since before it nobody can know of a quota.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import httpx

from layer_async._pacing import Gate, Pacing


class Quota(Protocol):
    """What a server grants."""

    def take(self, now: float) -> float:
        """Use one request up: 0, or the seconds until there will be another."""
        ...

    def granted(self, start: float, end: float) -> float:
        """What it grants from a time at which it is used up to another."""
        ...


class TokenBucket:
    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.left, self.then = rate, burst, burst, 0.0

    def rate_at(self, now: float) -> float:
        return self.rate

    def take(self, now: float) -> float:
        self.left = min(self.burst, self.left + (now - self.then) * self.rate_at(now))
        self.then = now
        if self.left < 1:
            return (1 - self.left) / self.rate_at(now)
        self.left -= 1
        return 0.0

    def granted(self, start: float, end: float) -> float:
        return self.rate * (end - start)


class DroppingBucket(TokenBucket):
    """Grants a third from 20 s to 40 s."""

    def rate_at(self, now: float) -> float:
        return self.rate / 3 if 20 <= now < 40 else self.rate

    def granted(self, start: float, end: float) -> float:
        third = max(0.0, min(end, 40.0) - max(start, 20.0))
        return self.rate * (end - start - third * 2 / 3)


class FixedWindow:
    def __init__(self, count: int, seconds: float, phase: float) -> None:
        self.count, self.seconds, self.left = count, seconds, count
        self.began = phase - seconds

    def take(self, now: float) -> float:
        if now - self.began >= self.seconds:
            self.began += (now - self.began) // self.seconds * self.seconds
            self.left = self.count
        if self.left < 1:
            return self.began + self.seconds - now
        self.left -= 1
        return 0.0

    def granted(self, start: float, end: float) -> float:
        # `began` is that of the last window; the one that `start` lies in is used up.
        whole = self.began - math.floor((self.began - start) / self.seconds) * self.seconds
        return self.count * (end - whole) / self.seconds


@attrs.define
class Result:
    """From the first 429 on: what was let in (by process) and refused, what the quota would have granted."""

    granted: float
    admitted: list[int]
    refused: int
    rates: list[float | None]
    by_second: list[int]

    @property
    def used(self) -> float:
        return sum(self.admitted) / self.granted

    @property
    def share_refused(self) -> float:
        return self.refused / (self.refused + sum(self.admitted))

    @property
    def fairness(self) -> float:
        """Jain's index: 1 where all get the same, 1/n where one gets all."""
        return sum(self.admitted) ** 2 / (len(self.admitted) * sum(each**2 for each in self.admitted))


class _Process:
    def __init__(self, gate: Gate, workers: int) -> None:
        self.gate, self.waiting, self.is_asleep = gate, deque(range(workers)), False


class Simulation:
    """`processes` with `workers` each that want as much as they get; `latency` there and back in seconds."""

    def __init__(
        self,
        quota: Quota,
        *,
        seed: int,
        processes: int = 1,
        workers: int = 50,
        latency: tuple[float, float] = (0.01, 0.03),
        says_when: bool = True,
        headers: Callable[[float], dict[str, str]] | None = None,
        pacing: Pacing = Pacing(),  # noqa: B008 - frozen
    ) -> None:
        self.quota, self.now, self.random = quota, 0.0, random.Random(seed)
        self.latency, self.says_when, self.headers = latency, says_when, headers
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.numbers = itertools.count()
        self.first: float | None = None
        self.admitted, self.refused, self.by_second = [0] * processes, 0, list[int]()
        self.processes = [
            _Process(Gate(pacing, clock=self.clock, random=self.random.random), workers) for _ in range(processes)
        ]
        for process in self.processes:
            self.later(self.random.uniform(0, 0.05), self.pump, process)

    def clock(self) -> float:
        return self.now

    def later(self, seconds: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), what, arguments))

    def run(self, seconds: float = 60.0) -> Result:
        """Until so many seconds after the first 429, or after the start where there is none."""
        while self.events[0][0] <= (self.first or 0.0) + seconds:
            self.now, _, what, arguments = heapq.heappop(self.events)
            what(*arguments)
        start = self.first or 0.0
        return Result(
            self.quota.granted(start, start + seconds),
            self.admitted,
            self.refused,
            [process.gate.rate for process in self.processes],
            self.by_second,
        )

    def wake(self, process: _Process) -> None:
        process.is_asleep = False
        self.pump(process)

    def pump(self, process: _Process) -> None:
        """Let in who may go; the head of the line sleeps, and its timer is late by up to a millisecond."""
        gate = process.gate
        while process.waiting:
            wait = 0.0 if gate.is_off else gate._ready_in()
            if wait > 0:
                if not process.is_asleep:
                    process.is_asleep = True
                    self.later(wait + self.random.uniform(0, 0.001), self.wake, process)
                return
            turn = 0 if gate.is_off else gate._pass()
            self.later(self.half_way(), self.arrive, process, process.waiting.popleft(), turn)

    def half_way(self) -> float:
        return self.random.uniform(*self.latency) / 2

    def arrive(self, process: _Process, worker: int, turn: int) -> None:
        wait = self.quota.take(self.now)
        if wait and self.first is None:
            self.first = self.now
        if self.first is not None:
            if wait:
                self.refused += 1
            else:
                self.admitted[self.processes.index(process)] += 1
                second = int(self.now - self.first)
                self.by_second.extend([0] * (second + 1 - len(self.by_second)))
                self.by_second[second] += 1
        said = {} if self.headers is None else self.headers(self.now)
        self.later(self.half_way(), self.answer, process, worker, turn, wait, said)

    def answer(self, process: _Process, worker: int, turn: int, wait: float, said: dict[str, str]) -> None:
        if said:
            process.gate.hear(httpx.Headers(said).raw)
        if wait:
            seconds = float(max(1, math.ceil(wait))) if self.says_when else self.random.uniform(0, 0.5)
            process.gate.slow_down(seconds, turn=turn, is_asked=self.says_when)
        process.waiting.append(worker)  # with the next item, or with the one that was refused
        self.pump(process)


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
