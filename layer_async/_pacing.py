"""The gate: where all attempts wait when the server says slow down, and where they keep the pace of its quota.

Rules: the `_pace` room decides and is told the time; the `Gate` gives it a clock and holds those who wait. It only ever
shuts for longer, never for less. Single calls leave before a bulk's items, and both in the order of arrival, one after
the other: only the head of the line sleeps. A wait that cannot end before the caller's deadline is refused at once
instead of being sat out. The clock is the process's own, not the event loop's, so a gate that was shut under one loop
opens on time under the next.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from random import SystemRandom
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import httpx

from ._errors import ConfigurationError, DeadlineExceededError
from ._pace import Closure, Pace, read_limits
from ._telemetry import GateShut, Observer, PaceChanged, notify
from ._values import number, shown

__all__ = ["PATIENCE", "Gate", "Pacing"]

PATIENCE = 3600.0
"""The longest that the gate stays shut by one answer, in seconds; then the server is asked again."""

NOTABLE = 1.25  # the rate has changed by such a factor: worth telling


def _rate(_: Any, field: attrs.Attribute[float | None], value: Any) -> None:
    if value is None:
        return
    if not 0 < number(value) < math.inf:
        raise ConfigurationError(
            f"Pacing({field.name}=) takes attempts a second, above 0, or None, not {shown(value)}."
        )


@attrs.frozen(kw_only=True)
class Pacing:
    """How a client keeps to the quota of the API.

    By default it learns: until the first 429 attempts start as they come; from then on all calls with the same tokens
    wait at one gate for `Retry-After`, and start at a pace that is cut with each 429 and grows in between. What
    `RateLimit`, `RateLimit-*` and `X-RateLimit-*` say is heeded. `rate`: attempts a second, where the quota is known;
    they are paced from the start, never faster, and slower where 429s come all the same. Raises `ConfigurationError`
    for anything but a number above 0.
    """

    rate: float | None = attrs.field(default=None, validator=_rate)


class _Waiter:
    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = anyio.Event()


class _Lines:
    """Who waits under one event loop: single calls, and behind them those of a bulk, each in the order of arrival."""

    __slots__ = ("bulk", "singles")

    def __init__(self) -> None:
        self.singles: OrderedDict[_Waiter, None] = OrderedDict()
        self.bulk: OrderedDict[_Waiter, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.singles) + len(self.bulk)

    @property
    def head(self) -> _Waiter | None:
        return next(iter(self.singles or self.bulk), None)


class Gate:
    """Where attempts wait while the server wants none, or fewer.

    `pacing` says how it learns; without, it is only shut and opened. `clock` gives seconds and never goes back; it must
    be the same under every event loop of the process. `observer` is told with a `GateShut` when the gate shuts, and
    when it stays shut for noticeably longer; with a `PaceChanged` when another pace has been learned.

    `is_off` is True while nobody has to ask: whoever finds it so goes by.
    """

    __slots__ = (
        "_clock",
        "_closure",
        "_lines",
        "_loop",
        "_observer",
        "_pace",
        "_random",
        "_told",
        "_wall_clock",
        "is_off",
    )

    def __init__(
        self,
        pacing: Pacing | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        random: Callable[[], float] = SystemRandom().random,  # noqa: B008 - holds no state
        observer: Observer | None = None,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._random = random
        self._observer = observer
        self._closure = Closure()
        self._pace = None if pacing is None else Pace(pacing.rate)
        self._told: float | None = None
        self._lines = _Lines()
        self._loop: object = None
        self.is_off: bool = self._pace is None or not self._pace.is_on

    def __repr__(self) -> str:
        state = f"shut for {self.opens_in:.2f} s" if self.is_shut else "open"
        pace = "" if self.rate is None else f", {self.rate:.3g} attempts/s"
        return f"<{type(self).__name__} {state}{pace}, {len(self._lines)} waiting>"

    @property
    def is_shut(self) -> bool:
        """Whether the server wants no attempt now."""
        return self._closure.opens_at > self._clock()

    @property
    def opens_in(self) -> float:
        """Seconds until the gate opens, as things stand; 0 when it is open."""
        return self._closure.opens_in(self._clock())

    @property
    def rate(self) -> float | None:
        """Attempts a second that the quota seems to allow, or that were given; None while nothing is known."""
        return None if self._pace is None else self._pace.rate

    # What it is told

    def shut(self, seconds: float) -> None:
        """Let no attempt through for `seconds` from now; a gate that is shut for longer stays so."""
        seconds = min(seconds, PATIENCE)
        if self._closure.shut(self._clock(), seconds):
            notify(self._observer, GateShut(seconds))
        if self.is_shut:
            self.is_off = False

    def slow_down(self, seconds: float, *, turn: int = 0, is_asked: bool = True) -> None:
        """The attempt with number `turn` was answered 429. `seconds`: what the server asks for, else a guess."""
        pace, now = self._pace, self._clock()
        if pace is None:
            self.shut(seconds)
            return
        seconds = min(seconds, PATIENCE) if is_asked else pace.pause(self._random())
        is_news = pace.limited(now, turn, max(seconds, self._closure.opens_in(now)))
        if is_asked or is_news:
            self.shut(seconds)
        self.is_off = False
        self._tell()

    def hear(self, headers: httpx.Headers) -> None:
        """Heed what the head of an answer says of the quota, if anything."""
        if self._pace is None:
            return
        # Most answers say nothing, and each is looked at: at all names in one, in lower case, as httpx keeps them.
        if b"limit" not in b"".join([entry[1] for entry in headers._list]):
            return
        limits = read_limits(headers.raw, self._wall_clock())
        if limits is None:
            return
        now = self._clock()
        self.shut(self._pace.heed(now, limits))
        if self._pace.is_capped(now):
            self.is_off = False

    def _tell(self) -> None:
        rate = self.rate
        if rate is not None and (self._told is None or not 1 / NOTABLE < rate / self._told < NOTABLE):
            self._told = rate
            notify(self._observer, PaceChanged(rate))

    # Waiting

    async def wait(self, *, patient: bool = False, longest: float = math.inf) -> int:
        """Return when an attempt may start, with its number: at once, or when the turn comes, first come, first gone.

        `patient`: a bulk's item. It lets single calls go first, waits in any case, and leaves it to the scopes around
        the caller to end that. Otherwise raises `DeadlineExceededError` (phase `gate`) at once when the turn comes only
        after the deadline of those scopes, or the gate is shut for more than `longest` seconds.
        """
        lines = self._lines_of_this_loop()
        line = lines.bulk if patient else lines.singles
        if not lines.singles and not (patient and line) and self._ready_in() <= 0:
            return self._pass()
        if not patient:
            self._foresee(longest, len(line))
        waiter = _Waiter()
        line[waiter] = None
        try:
            while True:
                if lines.head is not waiter:
                    await waiter.event.wait()
                    waiter.event = anyio.Event()
                    continue
                # The head of the line sleeps for all. It looks again, since much may have changed meanwhile.
                wait = self._ready_in()
                if wait <= 0:
                    return self._pass()
                if not patient:
                    self._foresee(longest)
                await anyio.sleep(wait)
        finally:
            del line[waiter]
            head = lines.head
            if head is not None:
                head.event.set()

    def _pass(self) -> int:
        pace = self._pace
        if pace is None:
            self.is_off = not self._lines
            return 0
        now = self._clock()
        turn = pace.take(now)
        if pace.is_on:
            self._tell()
        else:
            self.is_off = not (pace.is_capped(now) or self._lines)
        return turn

    def _ready_in(self) -> float:
        now = self._clock()
        shut = self._closure.opens_in(now)
        return shut if shut > 0 or self._pace is None else self._pace.ready_in(now)

    def _foresee(self, longest: float, ahead: int = 0) -> None:
        shut, left = self.opens_in, anyio.current_effective_deadline() - anyio.current_time()
        if left == -math.inf:
            return  # the caller has been cancelled, and hears of it at the wait that follows
        # The pace may grow meanwhile: what is foreseen would be late at twice its rate.
        wait = shut + ahead / (2 * self.rate) if ahead and self.rate is not None else shut
        if wait >= left:
            raise DeadlineExceededError(
                f"the server said slow down: no attempt may start for another {wait:.1f} s, and the deadline comes "
                "before that. Raise `deadline`, or start fewer calls at a time.",
                phase="gate",
            )
        if shut > longest:
            raise DeadlineExceededError(
                f"the server said slow down: no attempt may start for another {shut:.1f} s, and a call waits for "
                f"{longest:g} s at most. Try again later, or raise `retry_after_max` of the RetryPolicy.",
                phase="gate",
            )

    def _lines_of_this_loop(self) -> _Lines:
        """A line whose head belongs to a loop that has died would never move."""
        loop = anyio.lowlevel.current_token()
        if loop != self._loop:
            self._loop, self._lines = loop, _Lines()
        return self._lines
