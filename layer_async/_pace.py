"""The pace: how many attempts a second a quota that nobody told us seems to allow. Pure: times are given, never read.

Rules: off until the first 429. Then the pace grows until the next one, and is cut to less than what was let in before
it: those who had more lose more, which keeps processes that know nothing of each other fair. The attempts that
were under way when the pace was cut are no news. While no attempt gets in, the quota is still used up, and nothing is
learned but how long that lasts. Where the limit is met at the same pace again and again, the pace is held below it
for longer each time, since to find out costs a wait. What is said in the head of an answer is believed; what cannot be
understood there is not.

Additive increase and multiplicative decrease: Chiu and Jain, "Analysis of the increase and decrease algorithms", 1989.
The even spacing with its allowance is the generic cell rate algorithm (ITU-T I.371) in its virtual scheduling form.
"""

from __future__ import annotations

import email.utils
import math
import re
from collections import deque
from collections.abc import Iterable

__all__ = ["Closure", "Limits", "Pace", "read_limits"]

NEWS = 0.1
"""Answers that say "slow down" within so many seconds are one piece of news."""

CUT, LEAST_CUT = 0.15, 0.03
"""By how much the measured rate is cut after a 429: by less, the longer it went well before."""

SOON = 1.5  # seconds; a 429 that comes later than that is no sign of a pace far too high

GROWTH = 2.0
"""Attempts a second, by which the pace grows each second after a full cut; and a fiftieth of itself."""

HASTE = 5.0  # seconds for which it grows evenly, then faster and faster: the quota may have come back
SURE = 2  # so often in a row the limit must be the same before the pace is held below it
HOLD = 8.0  # for so many times the wait that it costs to find out, each time once more
LONGEST_HOLD = 15.0
COSTLY = 0.8  # seconds; a shorter wait is not worth holding the pace for

ALLOWANCE = 0.02
"""How many seconds ahead of its time an attempt may start: timers are late, and bursts of so little harm no quota."""

FIRST_RATE = 50.0
"""Attempts a second after the first 429, doubled every `DOUBLING` seconds until the next."""

DOUBLING = 0.25
SLOWEST = 0.05
LOOK_BACK = 5.0
SAME = 0.06  # two limits that differ by less are one
HELD = 0.95  # where it is known, the pace is held at so much of it
RETRY_AFTER_UNIT = 1.0  # whole seconds: what is asked for may be longer than needed by so much
LONGEST_FIELD = 1000  # bytes; what is longer was not written to be read
EPOCH = 1e9  # a reset above this is a date


class Closure:
    """Until when the gate is shut; times are seconds of any one clock, and nothing here reads it."""

    __slots__ = ("announced", "opens_at")

    def __init__(self) -> None:
        self.opens_at = -math.inf
        self.announced = -math.inf

    def shut(self, now: float, seconds: float) -> bool:
        """Stay shut until `seconds` from `now`, if that is longer than before; whether that is news worth telling."""
        until = now + seconds
        was_open = self.opens_at <= now
        if not (seconds > 0 and until > self.opens_at):
            return False
        self.opens_at = until
        if not was_open and until - self.announced < NEWS:
            return False
        self.announced = until
        return True

    def opens_in(self, now: float) -> float:
        """Seconds from `now` until it opens; 0 when it is open."""
        return max(0.0, self.opens_at - now)


class Limits:
    """What the head of an answer says of the quota: `limit` attempts a window, `remaining` of them, `reset` in seconds.

    Each is None where it is not said.
    """

    __slots__ = ("limit", "remaining", "reset")

    def __init__(self, limit: float | None, remaining: float | None, reset: float | None) -> None:
        self.limit = limit
        self.remaining = remaining
        self.reset = reset


class _Cycle:
    """From one opening to the next 429: how much was let in, how fast, and what was known before."""

    __slots__ = ("admitted", "before", "began", "peak", "peak_before", "rate", "seconds", "streak_before")

    def __init__(self, pace: Pace, *, admitted: int, seconds: float, rate: float, peak: float, began: float) -> None:
        self.admitted, self.seconds, self.rate, self.peak, self.began = admitted, seconds, rate, peak, began
        self.before, self.peak_before, self.streak_before = pace._base, pace._peak, pace._streak


class Pace:
    """Attempts a second, learned from 429s; `given` is what is known beforehand, and never exceeded.

    Whoever starts an attempt asks `ready_in` until it is 0, calls `take`, and tells `limited` the number that `take`
    returned when the attempt is answered 429. Numbers count up from 1; an attempt from before has number 0.
    """

    __slots__ = (
        "_age",
        "_base",
        "_capped_at",
        "_capped_until",
        "_closed",
        "_cycle",
        "_depth",
        "_first",
        "_known",
        "_mark",
        "_misses",
        "_moved_at",
        "_next",
        "_opened_at",
        "_peak",
        "_pressed",
        "_samples",
        "_streak",
        "_turns",
        "given",
        "is_learning",
    )

    def __init__(self, given: float | None = None) -> None:
        self.given = given
        self.is_learning = False  # whether there has been a 429
        self._base: float | None = None  # what was let in a second before the last 429
        self._peak = 0.0  # the pace that met it
        self._known = False  # whether there was a limit before that one
        self._streak = 0  # how often in a row the limit was the same
        self._age = 0.0  # seconds for which attempts have been held up by the pace since
        self._turns = 0
        self._mark = -1  # the last attempt that had started when the pace was cut
        self._first = 0  # the last attempt before the gate opened
        self._opened_at = -math.inf
        self._moved_at = -math.inf
        self._next = -math.inf  # when the next attempt would start, evenly spaced
        self._pressed = False  # whether somebody had to wait
        self._misses = 0
        self._closed = 0.0  # seconds in which nothing was let in, the last time
        self._depth = CUT  # by how much it was cut
        self._cycle: _Cycle | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=int(LOOK_BACK * 4))
        self._capped_at = math.inf
        self._capped_until = -math.inf

    @property
    def rate(self) -> float | None:
        """Attempts a second as learned or given; None while nothing is known."""
        if self.is_learning and self._base is not None:
            return self._current()
        return self.given

    @property
    def is_on(self) -> bool:
        """Whether attempts have to ask."""
        return self.is_learning or self.given is not None

    def is_capped(self, now: float) -> bool:
        """Whether the head of an answer says that little is left."""
        return now < self._capped_until

    def pause(self, jitter: float) -> float:
        """Seconds to wait after a 429 that does not say how long; `jitter` is from 0 to 1.

        Short at first, since a quota may come back any moment; longer while it does not.
        """
        longest = max(1.0, min(60.0, 10.0 / max(self._base or FIRST_RATE, SLOWEST)))
        return min(0.25 * 1.5 ** min(self._misses, 32), longest) * (0.5 + jitter / 2)

    def ready_in(self, now: float) -> float:
        """Seconds from `now` until the next attempt may start; 0: it may."""
        wait = self._next - ALLOWANCE - now
        if wait <= 1e-9:
            return 0.0
        self._pressed = True
        return wait

    def take(self, now: float) -> int:
        """An attempt starts; returns its number."""
        self._turns += 1
        if now > self._moved_at:
            if self._pressed:
                self._age += min(now - self._moved_at, 1.0)
                self._pressed = False
            self._moved_at = now
        rate = self._current()
        if now < self._capped_until:
            rate = min(rate, self._capped_at)
        self._next = max(self._next, now) + 1 / rate
        if self.is_learning and (not self._samples or now - self._samples[-1][0] >= 0.25):
            self._samples.append((now, self._turns))
        return self._turns

    def limited(self, now: float, turn: int, wait: float) -> bool:
        """The attempt with number `turn` was answered 429, and none starts for `wait` seconds; whether that is news."""
        if turn <= self._mark:
            return False
        admitted = turn - self._first - 1
        self._mark = self._turns
        if not self.is_learning:
            self.is_learning = True
            if self.given is not None:
                self._base = self._peak = self.given
        elif admitted < max(2.0, 0.02 * (self._base or 0.0)):
            self._misses += 1
            if self._cycle is not None:
                self._learn(self._cycle, now + wait - self._cycle.began)
        else:
            self._misses = 0
            self._cycle = self._measured(now, turn, admitted)
            self._learn(self._cycle, wait)
        self._depth = min(CUT, max(LEAST_CUT, CUT * SOON / max(now - self._opened_at, SOON)))
        self._age = 0.0
        self._pressed = False
        self._opened_at = self._moved_at = now + wait
        self._first = self._turns
        self._samples.clear()
        return True

    def heed(self, now: float, limits: Limits) -> float:
        """Take note of what an answer says; returns for how many seconds no attempt is to start."""
        left, reset = limits.remaining, limits.reset
        self._capped_until = -math.inf
        if left is None or reset is None or reset <= 0:
            return 0.0
        if left <= 0:
            return reset
        if limits.limit is not None and left < limits.limit / 4:
            self._capped_at, self._capped_until = left / reset, now + reset
        return 0.0

    def _current(self) -> float:
        given = math.inf if self.given is None else self.given
        return min(given, self._grown()) if self.is_learning else given

    def _grown(self) -> float:
        """The pace now, `_age` seconds after it was cut."""
        age, base = self._age, self._base
        if base is None:
            return FIRST_RATE * math.exp2(min(age / DOUBLING, 40.0))
        low = base * (1 - self._depth)
        if not self._known:  # the first guess may be far off
            return low * math.exp(min(0.3 * age, 40.0))
        slope = (GROWTH * min(1.0, self._peak / 12) + 0.02 * self._peak) * self._depth / CUT
        if self._streak < SURE or self._closed < COSTLY:
            return low + slope * age * (1 + (max(0.0, age - HASTE) / HASTE) ** 2)
        top = max(low, HELD * self._peak)
        if low + slope * age < top:
            return low + slope * age
        held = min(HOLD * (self._streak - SURE + 1) * self._closed, LONGEST_HOLD)
        past = max(0.0, age - (top - low) / slope - held)
        return top * (1 + 0.004 * past + (past / 10) ** 3)

    def _measured(self, now: float, turn: int, admitted: int) -> _Cycle:
        seconds = max(now - self._opened_at, 1e-3)
        rate = admitted / seconds
        for then, number in self._samples:
            if now - LOOK_BACK <= then < now - 0.5:
                rate = max(turn - number, 1) / (now - then)
                break
        peak = rate if self._base is None else min(self._current(), rate * 1.4)
        return _Cycle(self, admitted=admitted, seconds=seconds, rate=rate, peak=peak, began=now)

    def _learn(self, cycle: _Cycle, closed: float) -> None:
        """Set the limit by a cycle that was followed by `closed` seconds in which nothing was let in."""
        rate, peak = cycle.rate, cycle.peak
        self._closed = closed
        if cycle.before is None or closed > 2:
            # A first guess, or a window: the rate over the whole cycle is the least that the quota can be (the wait may
            # have been longer than needed), the rate without what the wait may have been too long is the most.
            most = cycle.rate * cycle.seconds / (cycle.seconds + max(0.0, closed - RETRY_AFTER_UNIT))
            least = cycle.admitted / (cycle.seconds + closed)
            rate = math.sqrt(most * least)
            if cycle.before is not None:
                rate = min(cycle.rate, max(rate, cycle.rate / 2))
            peak = rate
        is_same = cycle.before is not None and abs(peak - cycle.peak_before) < SAME * cycle.peak_before
        self._streak = cycle.streak_before + 1 if is_same else 0
        self._known = cycle.before is not None
        self._base = max(rate, SLOWEST)
        self._peak = max(peak, self._base)


# What the head of an answer says

_ITEM = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.?)*+(?:"|\Z))+')  # what a quote opens ends at the latest with the field
_PARAMETER = re.compile(r"[;,]\s*([a-z]+)\s*=\s*([0-9]{1,15})(?![0-9.])", re.ASCII)
_NUMBER = re.compile(r"\s*([0-9]{1,15})(?:\.[0-9]*)?\s*(?:[,;].*)?", re.ASCII)
_NAME = b"ratelimit"


def read_limits(headers: Iterable[tuple[bytes, bytes]], wall_clock: float) -> Limits | None:
    """What an answer says of its quota, or None; `wall_clock` (seconds since 1970) is for those that name a date.

    Understood are `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers, from 08 on as structured
    fields, in 07 as `limit=, remaining=, reset=`), `RateLimit-Limit`, `-Remaining` and `-Reset` (up to 06), and the
    same with `X-`, where the reset is seconds from now, or a date in seconds or milliseconds since 1970. Of several
    quotas the one counts of which the least is left.
    """
    found: dict[str, str] = {}
    date = ""
    for name, value in headers:
        if len(value) > LONGEST_FIELD:
            continue
        lower = name.lower()
        if _NAME in lower.replace(b"-", b""):
            found[lower.decode("latin-1").removeprefix("x-").replace("rate-limit", "ratelimit")] = value.decode(
                "latin-1"
            )
        elif lower == b"date":
            date = value.decode("latin-1")
    if not found:
        return None
    limits = _structured(found.get("ratelimit", ""), found.get("ratelimit-policy", ""))
    if limits is None:
        limits = Limits(*(_number(found.get(f"ratelimit-{part}", "")) for part in ("limit", "remaining", "reset")))
    if limits.remaining is None and limits.reset is None:
        return None
    if limits.reset is not None and limits.reset >= EPOCH:
        seconds = limits.reset / 1000 if limits.reset >= EPOCH * 100 else limits.reset
        limits.reset = max(0.0, seconds - _now(date, wall_clock))
    return limits


def _number(text: str) -> float | None:
    match = _NUMBER.fullmatch(text)
    return float(match[1]) if match else None


def _structured(state: str, policy: str) -> Limits | None:
    """The quota of which the least is left, by `RateLimit`, with its size by `RateLimit-Policy`."""
    if state.count('"') % 2:
        return None
    sizes = {_label(item): _parameters(item) for item in _ITEM.findall(policy)}
    tightest: Limits | None = None
    if "limit" in (whole := _parameters(f",{state}")):
        return Limits(whole["limit"], whole.get("remaining"), whole.get("reset"))
    for item in _ITEM.findall(state):
        given = _parameters(item)
        if "r" not in given:
            continue
        size = sizes.get(_label(item), {})
        limits = Limits(size.get("q"), given["r"], given.get("t", size.get("w")))
        if tightest is None or given["r"] < (tightest.remaining or 0.0):
            tightest = limits
    return tightest


def _label(item: str) -> str:
    return item.partition(";")[0].strip()


def _parameters(item: str) -> dict[str, float]:
    return {name: float(value) for name, value in _PARAMETER.findall(item)}


def _now(date: str, wall_clock: float) -> float:
    """The server's own idea of the time, where it says so."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return wall_clock
