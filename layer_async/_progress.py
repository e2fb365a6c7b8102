"""How far a bulk has come, and when it is to stop: `Progress`, its `Meter`, and the rules of `stop_when=`.

Rules: counting an item costs next to nothing, a snapshot is made when somebody asks. Times are seconds of one clock,
which the caller reads. This room knows neither calls nor outcomes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs

from ._errors import ConfigurationError

__all__ = ["Meter", "Progress", "StopRule", "stop_rule"]

WINDOW = 10.0  # the rate is that of the last so many seconds,
STEP = 0.5  # noted so often
ENOUGH = 20  # so many items must be done before their failure rate says anything


@attrs.frozen(kw_only=True)
class Progress:
    """How far a bulk has come, as of one moment.

    `done`: how many items have their outcome, of which `failed` an error; `skipped`: how many the journal knew as
    settled, so that they give none; `held`: how many wait for the end of an outage, or to be tried again after one.
    `rate`: items done a second, over the last ten seconds; `total`: how many items there are, None where `items` has no
    length; `eta`: the seconds that the rest will take at this rate, None where that is not known.
    """

    done: int
    failed: int
    skipped: int
    held: int
    rate: float
    eta: float | None
    total: int | None


class Meter:
    """Counts, and knows the rate."""

    __slots__ = ("_marks", "_next_mark", "done", "failed", "skipped", "total")

    def __init__(self, now: float, total: int | None) -> None:
        self.done = self.failed = self.skipped = 0
        self.total = total
        self._marks: deque[tuple[float, int]] = deque([(now, 0)])
        self._next_mark = now + STEP

    def count(self, now: float, *, ok: bool) -> None:
        """One item more is done."""
        if now >= self._next_mark:
            self._mark(now)
        self.done += 1
        self.failed += not ok

    def _mark(self, now: float) -> None:
        marks = self._marks
        marks.append((now, self.done))
        self._next_mark = now + STEP
        while len(marks) > 1 and marks[1][0] <= now - WINDOW:
            marks.popleft()

    def progress(self, now: float, held: int = 0) -> Progress:
        """The snapshot."""
        if now >= self._next_mark:
            self._mark(now)
        since, before = self._marks[0]
        rate = (self.done - before) / (now - since) if now > since else 0.0
        eta = None
        if self.total is not None:
            left = max(0, self.total - self.done - self.skipped)
            eta = 0.0 if not left else left / rate if rate > 0 else None
        return Progress(
            done=self.done,
            failed=self.failed,
            skipped=self.skipped,
            held=held,
            rate=rate,
            eta=eta,
            total=self.total,
        )


StopRule = Callable[[Progress], bool] | int | float


def stop_rule(given: StopRule) -> Callable[[Meter, Callable[[], Progress]], str | None]:
    """What says, after each item, why the bulk is to stop, or None. Raises `ConfigurationError` for what is no rule."""
    if callable(given):
        predicate = given
        return lambda _, progress: "stop_when said so." if predicate(progress()) else None
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return lambda meter, _: f"{meter.failed} items have failed." if meter.failed >= given else None
    if isinstance(given, float) and 0.0 < given <= 1.0:
        return lambda meter, _: (
            f"{meter.failed} of {meter.done} items have failed."
            if meter.done >= ENOUGH and meter.failed >= given * meter.done
            else None
        )
    raise ConfigurationError(
        "`stop_when` is a number of failures (a whole number, at least 1), a failure rate (above 0, up to 1.0) or a "
        f"function of the progress: it is {given!r}."
    )
