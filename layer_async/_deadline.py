"""The scope that bounds a call: anyio's own, made and timed for less.

Rules: what is given is in every respect a cancel scope of anyio's, whatever is done to it. On asyncio anyio asks for
each which library runs, and gives each a timer of its own, which goes through a heap. But most calls of a client have
the same time, so that their deadlines pass in the order in which they began: one timer, for the first of them, does
for all. A deadline out of that order has a timer of its own, as ever; so have all where anyio's class is of another
shape than is known here, and on trio, which has no timers.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import OrderedDict
from typing import Any, cast

import anyio

__all__ = ["Scopes"]


class Scopes:
    """Makes the scopes of the calls of one client."""

    __slots__ = ("_watch",)

    def __init__(self) -> None:
        self._watch: _Watch | None = None

    def after(self, seconds: float | None) -> anyio.CancelScope:
        """A scope that ends `seconds` from now, or never by itself."""
        asyncio: Any = sys.modules.get("asyncio")
        loop = None if asyncio is None else asyncio._get_running_loop()
        if loop is None:  # trio
            return anyio.CancelScope(deadline=math.inf if seconds is None else anyio.current_time() + seconds)
        watch = self._watch
        if watch is None or watch.loop is not loop:
            watch = self._watch = _Watch(loop)  # another loop's goes on for as long as that has calls
        scope: anyio.CancelScope = watch.kind(deadline=math.inf if seconds is None else loop.time() + seconds)
        scope.watch = watch  # type: ignore[attr-defined]
        return scope


class _Watch:
    """Ends the scopes of one event loop in their time."""

    __slots__ = ("kind", "loop", "places", "timer")

    def __init__(self, loop: Any) -> None:
        self.loop: Any = loop
        self.kind: Any = _kind(cast(Any, type(anyio.CancelScope())))
        self.places: OrderedDict[_Place, None] = OrderedDict()  # in the order of their deadlines
        self.timer: Any = None

    def takes(self, scope: Any) -> bool:
        """Watch over the deadline of `scope`; False where that is not the last of all."""
        deadline, places = scope.deadline, self.places
        if deadline == math.inf:
            return True
        if places and deadline < next(reversed(places)).deadline:
            return False
        scope._timeout_handle = place = _Place(self, scope, deadline)
        places[place] = None
        timer = self.timer
        if timer is None or timer.when() > deadline:
            if timer is not None:  # it was set for one that has gone
                timer.cancel()
            self.timer = self.loop.call_at(deadline, self._look)
        return True

    def _look(self) -> None:
        self.timer = None
        now = self.loop.time()
        while self.places:
            place = next(iter(self.places))
            if place.deadline > now:
                self.timer = self.loop.call_at(place.deadline, self._look)
                return
            place.cancel()
            place.scope.time_out()


class _Place:
    """A scope's place in the order; stands where the scope keeps its timer."""

    __slots__ = ("deadline", "scope", "watch")

    def __init__(self, watch: _Watch, scope: Any, deadline: float) -> None:
        self.watch: _Watch = watch
        self.scope: Any = scope
        self.deadline: float = deadline

    def cancel(self) -> None:
        """Nobody has to watch over it any more."""
        self.watch.places.pop(self, None)


@functools.cache
def _kind(base: Any) -> Any:
    """The class of anyio's scopes, but for its timers."""
    if not (hasattr(base, "_timeout") and hasattr(base, "_timeout_handle")):
        return base

    class CallScope(base):  # type: ignore[misc]
        __slots__ = ("watch",)

        def _timeout(self) -> None:
            if not self.watch.takes(self):
                super()._timeout()

        def time_out(self) -> None:
            super()._timeout()

    return CallScope
