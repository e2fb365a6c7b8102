"""What ends a wait in its time, for less than a timer each: a watch for all of them, and scopes that use it.

Rules: a scope is in every respect a cancel scope of anyio's, whatever is done to it. On asyncio anyio asks for each
which library runs, and gives each a timer of its own, which goes through a heap. But most calls of a client have the
same time, so that their deadlines pass in the order in which they began: one timer, for the first of them, does for
all. A deadline out of that order has a timer of its own, as ever; so have all scopes where anyio's class is of another
shape than is known here, and on trio, which has no timers.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import anyio

__all__ = ["Scopes", "Watch", "asyncio_loop"]


def asyncio_loop() -> Any:
    """The event loop of asyncio that runs this, or None: a task of trio's may run as the guest of one."""
    asyncio: Any = sys.modules.get("asyncio")
    loop = None if asyncio is None else asyncio._get_running_loop()
    trio: Any = sys.modules.get("trio")
    return None if loop is None or (trio is not None and trio.lowlevel.in_trio_task()) else loop


class Watch:
    """Calls back at deadlines, on one event loop of asyncio."""

    __slots__ = ("_due", "_places", "_timer", "loop")

    def __init__(self, loop: Any) -> None:
        self.loop: Any = loop
        self._places: OrderedDict[_Place, None] = OrderedDict()  # in the order of their deadlines
        self._timer: Any = None
        self._due = math.inf  # when that rings; uvloop's do not tell where it is at once

    def at(self, deadline: float, call_back: Callable[[], object]) -> Any:
        """Have it called at `deadline`, by the loop's clock, unless what is returned is cancelled before."""
        places = self._places
        if places and deadline < next(reversed(places)).deadline:
            return self.loop.call_at(deadline, call_back)
        place = _Place(places, deadline, call_back)
        places[place] = None
        if self._due > deadline:
            if self._timer is not None:  # it was set for one that has gone
                self._timer.cancel()
            self._ring_at(deadline)
        return place

    def _ring_at(self, deadline: float) -> None:
        self._timer, self._due = self.loop.call_at(deadline, self._look), deadline

    def _look(self) -> None:
        self._timer, self._due = None, math.inf
        now = self.loop.time()
        while self._places:
            place = next(iter(self._places))
            if place.deadline > now:
                self._ring_at(place.deadline)
                return
            place.cancel()
            place.call_back()


class _Place:
    """A place in the order of a watch; stands where a timer would."""

    __slots__ = ("_places", "call_back", "deadline")

    def __init__(self, places: OrderedDict[_Place, None], deadline: float, call_back: Callable[[], object]) -> None:
        self._places: OrderedDict[_Place, None] = places
        self.deadline: float = deadline
        self.call_back: Callable[[], object] = call_back

    def cancel(self) -> None:
        """Nobody has to be called any more."""
        self._places.pop(self, None)


class Scopes:
    """Makes the scopes of the calls of one client."""

    __slots__ = ("_watch",)

    def __init__(self) -> None:
        self._watch: Watch | None = None

    def after(self, seconds: float | None) -> anyio.CancelScope:
        """A scope that ends `seconds` from now, or never by itself."""
        loop = asyncio_loop()
        if loop is None:  # trio
            return anyio.CancelScope(deadline=math.inf if seconds is None else anyio.current_time() + seconds)
        watch = self._watch
        if watch is None or watch.loop is not loop:
            watch = self._watch = Watch(loop)  # another loop's goes on for as long as that has calls
        scope: anyio.CancelScope = _scope_class()(deadline=math.inf if seconds is None else loop.time() + seconds)
        scope.watch = watch  # type: ignore[attr-defined]
        return scope


@functools.cache
def _scope_class() -> Any:
    """On asyncio, which anyio has to be asked about once."""
    return _kind(type(anyio.CancelScope()))


def _kind(base: Any) -> Any:
    """The class of anyio's scopes, but for its timers."""
    if not (hasattr(base, "_timeout") and hasattr(base, "_timeout_handle")):
        return base

    class CallScope(base):  # type: ignore[misc]
        __slots__ = ("watch",)

        def _timeout(self) -> None:
            deadline = self.deadline
            if deadline == math.inf:
                return
            watch = self.watch
            if watch.loop.time() >= deadline:
                super()._timeout()
            else:
                self._timeout_handle = watch.at(deadline, self._timeout)  # type: ignore[misc]  # anyio's own

    return CallScope
