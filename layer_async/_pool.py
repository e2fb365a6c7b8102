"""The connection-pool manager: slots, those who wait for one, and idle connections.

A slot is the right to have one attempt on the wire; there are as many as connections. Rules: slots go out first come,
first served, and nobody overtakes; a slot comes back synchronously, whatever ended the attempt, so that no cancellation
can come between; a waiter that was cancelled with a slot already in its hand passes it on. A connection is idle only if
it was given back clean, everything else is closed at once. Each step is O(1) amortised: nothing is ever scanned.

This room knows no HTTP library, no retry and no tokens; a connection is what can be closed and asked for its health.
"""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar, cast

import anyio
import anyio.lowlevel
import attrs

from ._deadline import Watch, asyncio_loop
from ._errors import ClientClosedError, ConfigurationError
from ._values import number, shown

__all__ = ["ConnectionPool", "PoolStats", "Slot", "SlotTimeout"]

Route = Hashable


class Connection(Protocol):
    """One socket (or what will become one), as far as the pool knows it. None of these wait, none of these raise."""

    def close(self) -> None:
        """Close it now, and wake up whoever waits for it."""

    def abandon(self) -> None:
        """Close its file descriptor and touch nothing else: its event loop is gone, or belongs to another process."""

    def is_alive(self) -> bool:
        """Whether it can still serve: the peer has not closed it, and no byte lies there that nobody asked for."""
        ...


class Limits(Protocol):
    """What `httpx.Limits` says."""

    max_connections: int | None
    max_keepalive_connections: int | None
    keepalive_expiry: float | None


C = TypeVar("C", bound=Connection)


class SlotTimeout(TimeoutError):  # noqa: N818 - named after what happens, like TimeoutError's other kin here
    """No slot became free within the time that `acquire` was given."""


@attrs.frozen
class PoolStats:
    """What a pool is doing now, and what it has done so far.

    `open` connections are `idle` or serve one of the slots that are `in_use`; `waiting` counts those who wait for a
    slot. Since the pool was made, `opened` connections were begun, `reused` times an idle one served again, and
    `discarded` were closed for whatever reason: `opened` is always `open` + `discarded`.
    """

    open: int
    idle: int
    in_use: int
    waiting: int
    opened: int
    reused: int
    discarded: int


class Slot:
    """The right to have one attempt on the wire, with the connection that serves it, if there is one yet."""

    __slots__ = ("_connection", "_pool", "_route", "is_revoked")

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool: ConnectionPool | None = pool
        self._route: Route = None
        self._connection: Connection | None = None
        self.is_revoked: bool = False
        """Whether the pool took the slot back by itself: it was closed, or moved to another event loop."""

    @property
    def is_held(self) -> bool:
        """Whether it has not gone back yet."""
        return self._pool is not None

    def is_free_for(self, pool: ConnectionPool) -> bool:
        """Whether it is a slot of `pool` that is held and has no connection yet."""
        return self._pool is pool and self._connection is None

    def take(self, route: Route, connect: Callable[[], C], *, fresh: bool = False) -> C:
        """The most recently used idle connection of `route` that is alive, else a new one from `connect()`.

        `fresh` passes the idle ones over. Raises `ClientClosedError` once the slot is no longer held.
        """
        connection = None if fresh else self.take_idle(route)
        if connection is None:
            pool = self._held()
            connection = pool._open(connect)
            self._route, self._connection = route, connection
        return cast("C", connection)  # a pool holds connections of one kind only

    def take_idle(self, route: Route) -> Connection | None:
        """The most recently used idle connection of `route` that is alive, if there is one; raises as `take` does."""
        connection = self._held()._reuse(route)
        if connection is not None:
            self._route, self._connection = route, connection
        return connection

    def _held(self) -> ConnectionPool:
        pool = self._pool
        if pool is None:
            raise ClientClosedError("the connection pool was closed.")
        assert self._connection is None, "a slot serves one attempt"
        return pool

    def give_back(self) -> None:
        """The attempt ended cleanly and its connection can serve again: keep that one, and free the slot."""
        pool, connection = self._pool, self._connection
        if pool is not None and connection is not None:
            self._connection = None
            pool._attached -= 1
            pool._keep(self._route, connection)
        self.release()

    def release(self) -> None:
        """Free the slot; a connection that is still there is closed. Synchronous, and harmless when already done."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            pool._attached -= 1
            pool._discard(connection)
        pool._slots.discard(self)
        pool._pass_on()

    def __repr__(self) -> str:
        state = "free again" if self._pool is None else "unused" if self._connection is None else repr(self._connection)
        return f"<Slot [{state}]>"


class _Waiter:
    """Somebody in the queue: all that exists of a call while it waits. anyio's event costs asyncio twice its future."""

    __slots__ = ("event", "future", "slot")

    def __init__(self, loop: Any) -> None:
        self.slot: Slot | None = None
        self.future: Any = loop.create_future() if hasattr(loop, "create_future") else None
        self.event: Any = anyio.Event() if self.future is None else None

    def __call__(self) -> None:
        """Wake it."""
        if self.future is None:
            self.event.set()
        elif not self.future.done():
            self.future.set_result(None)

    async def wait(self, timeout: float | None) -> None:
        """On any event loop but asyncio's."""
        with anyio.move_on_after(timeout):
            await self.event.wait()


class ConnectionPool:
    """Hands out slots and keeps idle connections, for one event loop at a time.

    `limits`: as many slots as `max_connections` (None: no bound), at most `max_keepalive_connections` idle connections
    (None: no bound, 0: none kept), none idle for `keepalive_expiry` seconds or longer (None: for ever). `clock` is for
    tests. Raises `ConfigurationError` for limits that make no sense.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_connections: int | None = _checked("max_connections", limits.max_connections, least=1)
        self._max_idle = _checked("max_keepalive_connections", limits.max_keepalive_connections, least=0)
        self._expiry = _checked("keepalive_expiry", limits.keepalive_expiry, least=0)
        self._clock = clock
        self._size = int(min(sys.maxsize if self.max_connections is None else self.max_connections, sys.maxsize))
        self._slots: set[Slot] = set()
        self._waiters: OrderedDict[_Waiter, None] = OrderedDict()
        self._idle: OrderedDict[Connection, tuple[Route, float]] = OrderedDict()  # least recently used first
        self._idle_by_route: dict[Route, dict[Connection, None]] = {}
        self._attached = self._opened = self._reused = self._discarded = 0
        self._closed = False
        self._loop: object = None
        self._watch = Watch(None)
        self._process = _process

    @property
    def stats(self) -> PoolStats:
        """What the pool is doing; a frozen snapshot."""
        idle = len(self._idle)
        return PoolStats(
            open=idle + self._attached,
            idle=idle,
            in_use=len(self._slots),
            waiting=len(self._waiters),
            opened=self._opened,
            reused=self._reused,
            discarded=self._discarded,
        )

    @property
    def loop(self) -> object:
        """The event loop that it serves: asyncio's, a trio token, or None before the first call."""
        return self._loop

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def __repr__(self) -> str:
        s = self.stats
        slots = f"{s.in_use} of {self.max_connections or 'any number'} slots in use, {s.waiting} waiting"
        connections = f"{s.open} open, {s.idle} idle"
        return f"<ConnectionPool [{'closed' if self._closed else slots} | {connections}]>"

    async def acquire(self, timeout: float | None = None) -> Slot:
        """A slot: at once when one is free, else in turn.

        `timeout` bounds the wait in seconds (None: no bound). Raises `SlotTimeout` when it passes, `ClientClosedError`
        when the pool is closed before or meanwhile, and `ConfigurationError` when two live event loops share the pool.
        """
        slot = self.acquire_nowait()
        if slot is not None:
            return slot
        waiter = _Waiter(self._loop)
        self._waiters[waiter] = None
        alarm = None
        try:
            if waiter.future is None:
                await waiter.wait(timeout)
            else:
                if timeout is not None:
                    alarm = self._watch.at(self._watch.loop.time() + timeout, waiter)
                await waiter.future
        except BaseException:
            if waiter.slot is not None:
                waiter.slot.release()
            raise
        finally:
            self._waiters.pop(waiter, None)
            if alarm is not None:
                alarm.cancel()
        if waiter.slot is not None and waiter.slot.is_held:
            return waiter.slot
        if self._closed:
            raise ClientClosedError("the connection pool was closed while this call waited for a slot.")
        raise SlotTimeout(f"no slot became free within {timeout} s")

    def acquire_nowait(self) -> Slot | None:
        """A slot where one is free, else None. Raises as `acquire` does."""
        self._settle()
        if self._closed:
            raise ClientClosedError("the connection pool is closed.")
        # Where not all are out nobody waits: one that comes back goes to the first in the queue.
        return self._hand_out() if len(self._slots) < self._size else None

    async def aclose(self) -> None:
        """Close the pool: the waiting fail with `ClientClosedError`, every socket is closed. Can be called again."""
        self.aclose_nowait()
        # Whoever waited for one of the sockets must let go of its number before anybody opens another with the same.
        await anyio.lowlevel.cancel_shielded_checkpoint()

    def aclose_nowait(self) -> None:
        """The same without an await. Outside of an event loop, file descriptors are closed and nobody is woken up."""
        try:
            self._settle()
        except anyio.NoEventLoopError:
            at_home = False
        else:
            at_home = True
        self._closed = True
        self._empty(at_home=at_home)

    # Slots

    def _hand_out(self) -> Slot:
        slot = Slot(self)
        self._slots.add(slot)
        return slot

    def _pass_on(self) -> None:
        if self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            waiter.slot = self._hand_out()
            waiter()

    # Connections

    def _open(self, connect: Callable[[], Connection]) -> Connection:
        self._expire()
        if len(self._idle) + self._attached >= self._size:
            self._drop_oldest()
        connection = connect()
        self._attached += 1
        self._opened += 1
        return connection

    def _reuse(self, route: Route) -> Connection | None:
        # The others that have been idle for too long are closed when this one comes back.
        while (connections := self._idle_by_route.get(route)) is not None:
            connection = next(reversed(connections))
            since = self._forget(connection)
            if (self._expiry is None or self._clock() - since < self._expiry) and connection.is_alive():
                self._attached += 1
                self._reused += 1
                return connection
            self._discard(connection)
        return None

    def _keep(self, route: Route, connection: Connection) -> None:
        self._idle[connection] = route, self._clock()
        self._idle_by_route.setdefault(route, {})[connection] = None
        if self._max_idle is not None and len(self._idle) > self._max_idle:
            self._drop_oldest()
        self._expire()

    def _expire(self) -> None:
        if self._expiry is None or not self._idle:
            return
        now = self._clock()
        while self._idle:
            _, since = next(iter(self._idle.values()))
            if now - since < self._expiry:
                break
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        connection = next(iter(self._idle))
        self._forget(connection)
        self._discard(connection)

    def _forget(self, connection: Connection) -> float:
        """Take it off the idle ones; since when it was one."""
        route, since = self._idle.pop(connection)
        connections = self._idle_by_route[route]
        del connections[connection]
        if not connections:
            del self._idle_by_route[route]
        return since

    def _discard(self, connection: Connection) -> None:
        self._discarded += 1
        connection.close()

    # Event loops and processes

    def _settle(self) -> None:
        """Make the running event loop (and process) the pool's own; what another one left behind is abandoned."""
        loop = _running_loop()
        if loop is self._loop and self._process is _process:
            return
        if self._process is _process and _is_running(self._loop):
            raise ConfigurationError(
                "this client is in use on another event loop that is still running: make one client per event loop."
            )
        self._empty(at_home=False)
        self._loop, self._process, self._watch = loop, _process, Watch(loop)

    def _empty(self, *, at_home: bool) -> None:
        slots, self._slots = self._slots, set()
        waiters, self._waiters = self._waiters, OrderedDict()
        connections = [*self._idle]
        self._idle, self._idle_by_route = OrderedDict(), {}
        for slot in slots:
            if slot._connection is not None:
                connections.append(slot._connection)
            slot._pool, slot._connection, slot.is_revoked = None, None, True
        self._attached = 0
        for connection in connections:
            self._discarded += 1
            if at_home:
                connection.close()
            else:
                connection.abandon()
        if at_home:
            for waiter in waiters:
                waiter()


_process: object = object()  # another one in each process; asking the system for the process's number costs more


def _begin_process() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):  # pragma: no branch - where there is no fork, nothing is to be done
    os.register_at_fork(after_in_child=_begin_process)


def _running_loop() -> object:
    """The event loop that runs this: asyncio's, or a trio token."""
    loop = asyncio_loop()
    return anyio.lowlevel.current_token().native_token if loop is None else loop


def _is_running(loop: Any) -> bool:
    """Whether an event loop (of asyncio, or a trio token) can still run what it was given."""
    if loop is None:
        return False
    if hasattr(loop, "is_running"):
        return bool(loop.is_running())
    try:
        loop.run_sync_soon(lambda: None)
    except RuntimeError:  # trio.RunFinishedError, without importing trio
        return False
    return True


def _checked(name: str, value: float | None, *, least: int) -> Any:
    if value is None or number(value) >= least:
        return value
    raise ConfigurationError(f"limits: {name} must be at least {least}, or None for no bound; not {shown(value)}.")
