"""Whether the server is away, and how the items of a bulk wait until it is back.

Rules: an outage is some failures in a row that look like it, with no answer between, or a server that wants to be left
alone for long. While it lasts, one item at a time is tried, a probe, after a wait drawn from 0 to a bound that doubles
up to 10 s (full jitter); all others wait in line, in the order of their arrival. The first answer to what was sent
after its beginning ends it. An item has its own trouble, is settled as it is, and holds up nobody, where others have
been answered that were sent after it, with no outage on: after the last of all the attempts that one call may make, or
after it had failed before, a few times. Times are seconds of one clock. This room knows neither calls nor outcomes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from random import SystemRandom

import anyio

__all__ = ["Outage", "Setback"]

MISSES = 3  # so many failures in a row, with no answer between, are an outage
STRIKES = 3  # so often may an item fail again while others are answered
FIRST_WAIT = 0.5
LONGEST_WAIT = 10.0


class Setback:
    """What an item that waits has met: when it failed last, how often, and how often while others were answered."""

    __slots__ = ("failed_at", "strikes", "tries")

    def __init__(self) -> None:
        self.failed_at = math.inf
        self.tries = 0
        self.strikes = 0


class Outage:
    """The state of the server as one bulk sees it. `timeout`: how long an outage is waited out, in seconds.

    `on_end` is told why when that time is up, and is to call `give_up`, after which nothing waits any more.
    """

    __slots__ = (
        "_asked_until",
        "_clock",
        "_last_answered",
        "_misses",
        "_on_end",
        "_probe",
        "_probes",
        "_random",
        "_timeout",
        "_wake",
        "_witnessed",
        "began",
        "given_up",
        "held",
        "wants_witness",
    )

    def __init__(
        self,
        timeout: float,
        *,
        on_end: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
        random: Callable[[], float] = SystemRandom().random,  # noqa: B008 - holds no state
    ) -> None:
        self._timeout = timeout
        self._on_end = on_end
        self._clock = clock
        self._random = random
        self._misses = 0
        self._last_answered = -math.inf  # when that was sent whose answer is the latest
        self._asked_until = -math.inf  # before this the server wants no probe
        self._probes = self._witnessed = 0  # how many have failed, and had when another item was tried
        self._probe = anyio.Lock(fast_acquire=True)
        self._wake = anyio.Event()
        self.began: float | None = None
        self.given_up = False
        self.held = 0
        self.wants_witness = False  # all that wait have failed as probes: another item might tell more

    @property
    def is_on(self) -> bool:
        """Whether items are to wait because the server is away."""
        return self.began is not None and not self.given_up

    # What the calls met

    def answered(self, sent: float) -> None:
        """The server gave an answer, of whatever kind, to what was `sent` then."""
        self._misses = 0
        self._last_answered = max(self._last_answered, sent)
        if self.began is not None and sent >= self.began:
            self.began = None
            self._asked_until = -math.inf
            self._wake_all()

    def missed(self, setback: Setback, *, sent: float, tried_again: bool, asked: float | None = None) -> bool:
        """An item met what may be an outage; whether it is held. False: it is its own trouble.

        `sent` is when the last attempt of its call was, `tried_again` whether that was not the first, and its call was
        denied no other; `asked` is for how long the server wants to be left alone.
        """
        now = self._clock()
        if tried_again and self.began is None and self._last_answered > sent:
            return False
        if self._last_answered > setback.failed_at:
            setback.strikes += 1
            if setback.strikes >= STRIKES:
                return False
        setback.failed_at = now
        setback.tries += 1
        self._misses += 1
        if asked is not None:
            self._asked_until = max(self._asked_until, now + asked)
        if self.began is None and (self._misses >= MISSES or (asked or 0.0) > LONGEST_WAIT):
            self.began = now
            self._probes = self._witnessed = 0
            self.wants_witness = False
        return True

    # Waiting

    async def wait_before(self, setback: Setback | None) -> bool:
        """Wait until an item may be tried that has met `setback` (None: nothing yet). True: it is the probe.

        Then `probed` must be called once its call has ended.
        """
        if self.given_up:
            return False
        self.held += 1
        try:
            if setback is not None and not self.is_on:
                await self._sleep(max(self._jitter(setback.tries - 1), self._asked_until - self._clock()))
            if not self.is_on:
                return False
            await self._probe.acquire()
            try:
                await self._wait_as_the_first()
            except BaseException:
                self._probe.release()
                raise
            if not self.is_on:
                self._probe.release()
            return self.is_on
        finally:
            self.held -= 1

    async def _wait_as_the_first(self) -> None:
        if self.began is None or self.given_up:
            return
        ends_at = self.began + self._timeout
        if self._asked_until >= ends_at:
            wanted = f"{self._asked_until - self.began:.0f} s"
            self._on_end(f"the server wants to be left alone for {wanted}, longer than {self._named_timeout}.")
            return
        now = self._clock()
        probes_at = max(now + self._jitter(self._probes), self._asked_until)
        await self._sleep(min(probes_at, ends_at) - now)
        if self.is_on and probes_at >= ends_at:
            self._on_end(f"the server was away for longer than {self._named_timeout}.")

    @property
    def _named_timeout(self) -> str:
        return f"outage_timeout={self._timeout:g} s"

    def probed(self) -> None:
        """The call of the probe has ended, however it did."""
        self._probes += 1
        self.wants_witness = self._probes - self._witnessed > self.held
        self._wake_all()
        self._probe.release()

    async def wait_for_the_end(self) -> None:
        """Wait, with no item yet, until it is over, given up, or an item more is wanted as a probe."""
        while self.is_on and not self.wants_witness and (self.held or self._probe.locked()):
            await self._wake.wait()
        self.wants_witness = False
        self._witnessed = self._probes

    def give_up(self) -> None:
        """Let nothing wait any more."""
        self.given_up = True
        self._wake_all()

    def _wake_all(self) -> None:
        wake, self._wake = self._wake, anyio.Event()
        wake.set()

    async def _sleep(self, seconds: float) -> None:
        """For so long, or until something changes."""
        with anyio.move_on_after(seconds):
            await self._wake.wait()

    def _jitter(self, number: int) -> float:
        return self._random() * min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(number, 64))
