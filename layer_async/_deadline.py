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

    __slots__ = ("_kind", "_latest", "_loop", "_places", "_timer")

    def __init__(self) -> None:
        self._settle(None)

    def _settle(self, loop: Any) -> None:
        self._loop: Any = loop
        self._kind: Any = None if loop is None else _kind(cast(Any, type(anyio.CancelScope())))
        self._places: OrderedDict[_Place, None] = OrderedDict()  # in the order of their deadlines
        self._latest: float = -math.inf
        self._timer: Any = None

    def after(self, seconds: float | None) -> anyio.CancelScope:
        """A scope that ends `seconds` from now, or never by itself."""
        asyncio: Any = sys.modules.get("asyncio")
        loop = None if asyncio is None else asyncio._get_running_loop()
        if loop is None:  # trio
            return anyio.CancelScope(deadline=math.inf if seconds is None else anyio.current_time() + seconds)
        if loop is not self._loop:
            self._settle(loop)
        scope: anyio.CancelScope = self._kind(deadline=math.inf if seconds is None else loop.time() + seconds)
        scope.scopes = self  # type: ignore[attr-defined]
        return scope

    def take(self, scope: Any) -> bool:
        """Watch over the deadline of `scope`; False where its turn is not the last of all."""
        deadline = scope.deadline
        if deadline < self._latest:
            return False
        if deadline < math.inf:
            scope._timeout_handle = place = _Place(self._places, scope)
            self._places[place] = None
            self._latest = deadline
            if self._timer is None:
                self._timer = self._loop.call_at(deadline, self._look)
        return True

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._places:
            place = next(iter(self._places))
            if place.deadline > now:
                self._timer = self._loop.call_at(place.deadline, self._look)
                return
            place.cancel()
            place.end()
        self._latest = -math.inf


class _Place:
    """A scope's place in the order; stands where the scope keeps its timer."""

    __slots__ = ("_places", "_scope", "deadline")

    def __init__(self, places: OrderedDict[_Place, None], scope: Any) -> None:
        self._places = places
        self._scope = scope
        self.deadline: float = scope.deadline

    def cancel(self) -> None:
        """Nobody has to watch over it any more."""
        self._places.pop(self, None)

    def end(self) -> None:
        """Its time has come."""
        self._scope.time_out()


@functools.cache
def _kind(base: Any) -> Any:
    """The class of anyio's scopes, but for its timers."""
    if not (hasattr(base, "_timeout") and hasattr(base, "_timeout_handle")):
        return base

    class CallScope(base):  # type: ignore[misc]
        __slots__ = ("scopes",)

        def _timeout(self) -> None:
            if not self.scopes.take(self):
                super()._timeout()

        def time_out(self) -> None:
            super()._timeout()

    return CallScope
