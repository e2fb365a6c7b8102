"""The gate: where all attempts wait when the server says slow down.

Rules: a `Closure` is pure and holds the times; the `Gate` gives it a clock and holds those who wait. It only ever shuts
for longer, never for less. Who waits leaves in the order of arrival, one after the other. A wait that cannot end before
the caller's deadline is refused at once instead of being sat out. The clock is the process's own, not the event loop's,
so a gate that was shut under one loop opens on time under the next.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

import anyio
import anyio.lowlevel
import attrs

from ._errors import DeadlineExceededError
from ._telemetry import GateShut, Observer, notify

__all__ = ["Closure", "Gate"]

# A hundred answers that say "slow down" within a moment are one piece of news.
NEWS = 0.1


@attrs.define(eq=False)
class Closure:
    """Until when the gate is shut; times are seconds of any one clock, and nothing here reads it."""

    opens_at: float = -math.inf
    announced: float = -math.inf

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


class Gate:
    """Where attempts wait while the server wants none.

    `clock` gives seconds and never goes back; it must be the same under every event loop of the process. `observer` is
    told with a `GateShut` when the gate shuts, and when it stays shut for noticeably longer.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, observer: Observer | None = None) -> None:
        self._clock = clock
        self._observer = observer
        self._closure = Closure()
        self._line: OrderedDict[anyio.Event, None] = OrderedDict()
        self._loop: object = None

    def __repr__(self) -> str:
        state = f"shut for {self.opens_in:.2f} s" if self.is_shut else "open"
        return f"<{type(self).__name__} {state}, {len(self._line)} waiting>"

    @property
    def is_shut(self) -> bool:
        """Whether an attempt has to wait now."""
        return self._closure.opens_at > self._clock()

    @property
    def opens_in(self) -> float:
        """Seconds until the gate opens, as things stand; 0 when it is open."""
        return self._closure.opens_in(self._clock())

    def shut(self, seconds: float) -> None:
        """Let no attempt through for `seconds` from now; a gate that is shut for longer stays so."""
        if self._closure.shut(self._clock(), seconds):
            notify(self._observer, GateShut(seconds))

    async def wait(self, *, patient: bool = False) -> None:
        """Return at once when the gate is open, else when it opens: first come, first gone.

        `patient`: wait in any case, and leave it to the scopes around the caller to end that. Otherwise raises
        `DeadlineExceededError` (phase `gate`) at once when it opens only after the deadline of those scopes.
        """
        if not self.is_shut:
            return
        if not patient:
            self._foresee()
        line, turn = self._line_of_this_loop(), anyio.Event()
        line[turn] = None
        try:
            if next(iter(line)) is not turn:
                await turn.wait()
            # The first in line sleeps for all. It looks again, since the gate may have been shut for longer meanwhile.
            while self.is_shut:
                if not patient:
                    self._foresee()
                await anyio.sleep(self.opens_in)
        finally:
            del line[turn]
            if line:
                next(iter(line)).set()

    def _foresee(self) -> None:
        wait, deadline = self.opens_in, anyio.current_effective_deadline()
        # -inf: the caller has been cancelled, and hears of it at the wait that follows.
        if deadline > -math.inf and wait >= deadline - anyio.current_time():
            raise DeadlineExceededError(
                f"the server said slow down: no attempt may start for another {wait:.1f} s, and the deadline comes "
                "before that. Raise `deadline`, or start fewer calls at a time.",
                phase="gate",
            )

    def _line_of_this_loop(self) -> OrderedDict[anyio.Event, None]:
        """A line whose head belongs to a loop that has died would never move."""
        loop = anyio.lowlevel.current_token()
        if loop != self._loop:
            self._loop, self._line = loop, OrderedDict()
        return self._line
