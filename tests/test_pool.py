"""Slots, those who wait for one, and idle connections; with connections that are no sockets."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import httpx
import pytest
import trio

from layer_async import _pool as pools
from layer_async._errors import ClientClosedError, ConfigurationError
from layer_async._pool import ConnectionPool, PoolStats, Slot, SlotTimeout

pytestmark = pytest.mark.anyio


@attrs.define(eq=False)
class Wire:
    """A connection that notes what is done to it."""

    name: str = ""
    alive: bool = True
    closed: int = 0
    abandoned: int = 0

    def close(self) -> None:
        self.closed += 1

    def abandon(self) -> None:
        self.abandoned += 1

    def is_alive(self) -> bool:
        return self.alive


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pool_of(
    size: int | None = 1, *, idle: int | None = None, expiry: float | None = None, clock: Clock | None = None
) -> ConnectionPool:
    limits = httpx.Limits(max_connections=size, max_keepalive_connections=idle, keepalive_expiry=expiry)
    return ConnectionPool(limits, clock=Clock() if clock is None else clock)


async def kept(pool: ConnectionPool, *routes: str) -> list[Wire]:
    """One idle connection for each of `routes`, in this order."""
    slots = [await pool.acquire() for _ in routes]
    wires = [slot.take(route, Wire, fresh=True) for slot, route in zip(slots, routes, strict=True)]
    for slot in slots:
        slot.give_back()
    return wires


async def settle() -> None:
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


# Slots


async def test_a_free_slot_is_given_at_once_without_letting_others_run() -> None:
    pool = pool_of(2)
    ran: list[None] = []
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: _note(ran))
        slots = [await pool.acquire(), await pool.acquire()]
        assert not ran
    assert pool.stats.in_use == 2
    for slot in slots:
        slot.release()
    assert pool.stats.in_use == 0


async def _note(ran: list[None]) -> None:
    ran.append(None)


async def test_slots_go_out_first_come_first_served_and_nobody_overtakes() -> None:
    pool = pool_of(1)
    order: list[int] = []

    async def wait(number: int) -> None:
        slot = await pool.acquire()
        order.append(number)
        await anyio.lowlevel.checkpoint()
        slot.release()

    async with anyio.create_task_group() as group:
        first = await pool.acquire()
        for number in range(20):
            group.start_soon(wait, number)
            await settle()
        first.release()
        # The slot is not free now, it is on its way to the first in the queue: a newcomer gets in line.
        group.start_soon(wait, 20)
    assert order == list(range(21))


async def test_a_slot_is_handed_over_as_it_is_released_and_not_later() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    async with anyio.create_task_group() as group:
        group.start_soon(_hold_for_a_moment, pool)
        await settle()
        assert pool.stats.waiting == 1
        slot.release()
        assert (pool.stats.waiting, pool.stats.in_use) == (0, 1)
    assert pool.stats.in_use == 0


async def _hold_for_a_moment(pool: ConnectionPool) -> None:
    slot = await pool.acquire()
    await anyio.lowlevel.checkpoint()
    slot.release()


async def test_a_slot_released_twice_comes_back_once() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    slot.release()
    slot.release()
    await pool.acquire()
    with pytest.raises(SlotTimeout):
        await pool.acquire(0)


async def test_a_waiter_gives_up_when_its_time_is_over() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    with pytest.raises(SlotTimeout, match=r"0\.001 s"):
        await pool.acquire(0.001)
    assert pool.stats.waiting == 0
    slot.release()
    assert pool.stats.in_use == 0


async def test_a_thousand_that_wait_give_up_each_in_its_time_whoever_came_first() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    delays = [0.001, 0.004, 0.002, *(0.003 for _ in range(1000)), 0.001]
    gave_up: list[float] = []
    began = anyio.current_time()

    async def wait(seconds: float) -> None:
        with pytest.raises(SlotTimeout):
            await pool.acquire(seconds)
        assert anyio.current_time() - began >= seconds
        gave_up.append(seconds)

    async with anyio.create_task_group() as group:
        for seconds in delays:
            group.start_soon(wait, seconds)
    assert sorted(gave_up) == sorted(delays)
    assert pool.stats.waiting == 0
    slot.release()
    assert (await pool.acquire()).is_held


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_all_that_wait_for_as_long_have_one_timer_and_leave_no_other_behind() -> None:
    loop: Any = asyncio.get_running_loop()

    def timers() -> int:
        return sum(not handle.cancelled() for handle in loop._scheduled)

    pool = pool_of(1)
    slot = await pool.acquire()
    before = timers()
    tasks = [asyncio.create_task(pool.acquire(60)) for _ in range(100)]
    await settle()
    assert (pool.stats.waiting, timers()) == (100, before + 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    slot.release()
    assert (pool.stats.waiting, pool.stats.in_use, timers()) == (0, 0, before + 1)
    assert not pool._watch._places


async def test_a_slot_that_comes_in_time_is_given_to_one_who_waits_with_a_timeout() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            (await pool.acquire(10)).release()

        group.start_soon(wait)
        await settle()
        slot.release()
    assert pool.stats.in_use == 0


@pytest.mark.parametrize("ticks", range(6))
async def test_a_cancelled_waiter_leaves_the_queue_or_passes_its_slot_on(ticks: int) -> None:
    """At every tick: before it waits, while it waits, with the slot in its hand."""
    pool = pool_of(1)
    slot = await pool.acquire()
    served: list[str] = []
    scope = anyio.CancelScope()

    async def wait(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            held = await pool.acquire()
            served.append(name)
            held.release()

    async with anyio.create_task_group() as group:
        group.start_soon(wait, "cancelled", scope)
        group.start_soon(wait, "next", anyio.CancelScope())
        for tick in range(6):
            await anyio.lowlevel.checkpoint()
            if tick == 3:
                slot.release()
            if tick == ticks:
                scope.cancel()
    assert "next" in served
    assert pool.stats == PoolStats(open=0, idle=0, in_use=0, waiting=0, opened=0, reused=0, discarded=0)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("is_cancelled_first", [False, True])
async def test_a_natively_cancelled_waiter_with_the_slot_in_its_hand_passes_it_on(is_cancelled_first: bool) -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    first, second = (asyncio.create_task(pool.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    if is_cancelled_first:
        first.cancel()
    slot.release()
    first.cancel()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).is_held
    assert pool.stats.in_use == 1


async def test_without_a_bound_nobody_waits() -> None:
    pool = pool_of(None)
    for _ in range(1000):
        await pool.acquire()
    assert pool.stats.in_use == 1000


async def test_a_queue_of_thousands_can_be_left_from_any_place_in_no_time() -> None:
    """A scan of the queue for each that leaves it would take 20,000² / 2 steps."""
    pool = pool_of(1)
    await pool.acquire()
    async with anyio.create_task_group() as group:
        for _ in range(20_000 if sys.gettrace() is None else 2000):
            group.start_soon(pool.acquire)
        await settle()
        assert pool.stats.waiting in (20_000, 2000)
        group.cancel_scope.cancel()
    assert pool.stats.waiting == 0


# Connections


async def test_the_most_recently_used_connection_of_the_route_serves_again() -> None:
    pool = pool_of(4)
    _, b, c, _ = await kept(pool, "here", "here", "here", "there")
    slot = await pool.acquire()
    assert slot.take("here", Wire) is c
    other = await pool.acquire()
    assert other.take("here", Wire) is b
    assert pool.stats == PoolStats(open=4, idle=2, in_use=2, waiting=0, opened=4, reused=2, discarded=0)


async def test_a_route_without_an_idle_connection_gets_a_new_one() -> None:
    pool = pool_of(4)
    (here,) = await kept(pool, "here")
    slot = await pool.acquire()
    assert slot.take("there", lambda: Wire("new")).name == "new"
    assert here.closed == 0


async def test_a_fresh_connection_can_be_asked_for() -> None:
    pool = pool_of(4)
    (idle,) = await kept(pool, "here")
    slot = await pool.acquire()
    assert slot.take("here", Wire, fresh=True) is not idle
    assert (pool.stats.open, pool.stats.idle, idle.closed) == (2, 1, 0)


async def test_an_idle_connection_that_died_is_dropped_and_the_next_one_taken() -> None:
    pool = pool_of(4)
    a, b, c = await kept(pool, "here", "here", "here")
    b.alive = c.alive = False
    slot = await pool.acquire()
    assert slot.take("here", Wire) is a
    assert (a.closed, b.closed, c.closed) == (0, 1, 1)
    assert (pool.stats.open, pool.stats.reused, pool.stats.discarded) == (1, 1, 2)


async def test_where_all_idle_connections_died_a_new_one_is_opened() -> None:
    pool = pool_of(4)
    (old,) = await kept(pool, "here")
    old.alive = False
    slot = await pool.acquire()
    assert slot.take("here", Wire) is not old
    assert (pool.stats.open, pool.stats.opened, pool.stats.discarded) == (1, 2, 1)


async def test_no_more_connections_are_open_than_allowed_the_oldest_idle_one_of_any_route_goes() -> None:
    pool = pool_of(2)
    a, b = await kept(pool, "a", "b")
    slot = await pool.acquire()
    slot.take("c", Wire)
    assert (a.closed, b.closed, pool.stats.open) == (1, 0, 2)
    slot.give_back()
    slot = await pool.acquire()
    slot.take("b", Wire)
    slot.give_back()
    (await pool.acquire()).take("d", Wire)
    assert (b.closed, pool.stats.open) == (0, 2)


async def test_only_idle_connections_count_against_the_keepalive_limit_and_the_oldest_goes() -> None:
    pool = pool_of(10, idle=2)
    slots = [await pool.acquire() for _ in range(4)]
    wires = [slot.take("here", Wire) for slot in slots]
    slots[0].give_back()
    assert pool.stats.open == 4
    slots[1].give_back()
    slots[2].give_back()
    assert [wire.closed for wire in wires] == [1, 0, 0, 0]
    assert (pool.stats.open, pool.stats.idle, pool.stats.in_use) == (3, 2, 1)


async def test_a_keepalive_limit_of_zero_keeps_none() -> None:
    pool = pool_of(10, idle=0)
    (wire,) = await kept(pool, "here")
    assert (wire.closed, pool.stats.open) == (1, 0)


async def test_idle_connections_expire_the_oldest_first_whatever_is_done_next() -> None:
    clock = Clock()
    pool = pool_of(10, expiry=5.0, clock=clock)
    (old,) = await kept(pool, "old")
    clock.now += 3
    (young,) = await kept(pool, "young")
    clock.now += 2
    slot = await pool.acquire()
    other = slot.take("other", Wire)
    assert (old.closed, young.closed) == (1, 0)
    clock.now += 3
    slot.give_back()
    assert (young.closed, other.closed, pool.stats.idle) == (1, 0, 1)
    clock.now += 5
    slot = await pool.acquire()
    assert slot.take("other", Wire) is not other
    assert other.closed == 1


async def test_all_that_is_too_old_is_closed_before_another_is_opened() -> None:
    clock = Clock()
    pool = pool_of(10, expiry=5.0, clock=clock)
    wires = await kept(pool, "one", "two")
    clock.now += 5
    slot = await pool.acquire()
    slot.take("three", Wire)
    assert [wire.closed for wire in wires] == [1, 1]
    assert (pool.stats.open, pool.stats.idle) == (1, 0)


async def test_a_connection_that_serves_again_lives_as_long_again() -> None:
    clock = Clock()
    pool = pool_of(10, expiry=5.0, clock=clock)
    (wire,) = await kept(pool, "here")
    for _ in range(5):
        clock.now += 4
        slot = await pool.acquire()
        assert slot.take("here", Wire) is wire
        slot.give_back()


async def test_a_connection_whose_attempt_did_not_end_cleanly_is_closed_as_the_slot_is_released() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    wire = slot.take("here", Wire)
    slot.release()
    assert wire.closed == 1
    assert (pool.stats.open, pool.stats.idle, pool.stats.in_use, pool.stats.discarded) == (0, 0, 0, 1)


async def test_a_slot_serves_one_attempt() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    assert slot.is_free_for(pool)
    assert not slot.is_free_for(pool_of(1))
    slot.take("here", Wire)
    assert not slot.is_free_for(pool)
    with pytest.raises(AssertionError):
        slot.take("here", Wire)
    slot.give_back()
    slot.give_back()
    assert not slot.is_free_for(pool)
    with pytest.raises(ClientClosedError):
        slot.take("here", Wire)
    assert pool.stats.idle == 1


async def test_the_slot_comes_back_when_connecting_raises() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    with pytest.raises(ZeroDivisionError):
        slot.take("here", lambda: Wire(str(1 / 0)))
    slot.release()
    assert pool.stats == PoolStats(open=0, idle=0, in_use=0, waiting=0, opened=0, reused=0, discarded=0)


async def test_what_was_opened_is_open_or_was_discarded() -> None:
    pool = pool_of(3, idle=1)
    for step in range(50):
        slots = [await pool.acquire() for _ in range(1 + step % 3)]
        for number, slot in enumerate(slots):
            slot.take(step * 7 % 4, Wire, fresh=step % 5 == 0)
            (slot.release if (step + number) % 3 == 0 else slot.give_back)()
        s = pool.stats
        assert s.opened == s.open + s.discarded
        assert s.open == s.idle + s.in_use <= 3


# As text


async def test_pool_and_slot_are_readable_as_text() -> None:
    pool = pool_of(5)
    assert repr(pool) == "<ConnectionPool [0 of 5 slots in use, 0 waiting | 0 open, 0 idle]>"
    await kept(pool, "here")
    slot = await pool.acquire()
    assert repr(slot) == "<Slot [unused]>"
    assert repr(pool) == "<ConnectionPool [1 of 5 slots in use, 0 waiting | 1 open, 1 idle]>"
    slot.take("there", lambda: Wire("w"))
    assert repr(slot) == "<Slot [Wire(name='w', alive=True, closed=0, abandoned=0)]>"
    slot.release()
    assert repr(slot) == "<Slot [free again]>"
    assert "any number" in repr(pool_of(None))
    await pool.aclose()
    assert repr(pool) == "<ConnectionPool [closed | 0 open, 0 idle]>"


def test_statistics_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        pool_of(1).stats.open = 7  # type: ignore[misc]


def test_there_may_be_connections_without_a_bound() -> None:
    for bound in (None, math.inf, 10**300):
        pool = ConnectionPool(httpx.Limits(max_connections=bound))  # type: ignore[arg-type]
        assert pool.stats.in_use == 0


@pytest.mark.parametrize(
    "limits",
    [
        httpx.Limits(max_connections=0),
        httpx.Limits(max_connections=-1),
        httpx.Limits(max_keepalive_connections=-1),
        httpx.Limits(keepalive_expiry=-0.5),
        httpx.Limits(max_connections="many"),  # type: ignore[arg-type]
        httpx.Limits(max_connections=10**9999),
        httpx.Limits(keepalive_expiry=10**400),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: httpx.Limits) -> None:
    with pytest.raises(ConfigurationError, match="limits: "):
        ConnectionPool(limits)


# Closing


async def test_closing_fails_the_waiting_and_closes_every_connection_and_can_be_repeated() -> None:
    pool = pool_of(2)
    errors: list[Exception] = []

    async def wait() -> None:
        try:
            await pool.acquire()
        except ClientClosedError as exc:
            errors.append(exc)

    idle, _ = await kept(pool, "here", "there")
    slot, unused = await pool.acquire(), await pool.acquire()
    busy = slot.take("there", Wire)
    async with anyio.create_task_group() as group:
        for _ in range(10_000 if sys.gettrace() is None else 100):
            group.start_soon(wait)
        await settle()
        await pool.aclose()
        assert pool.is_closed
        assert (idle.closed, busy.closed) == (1, 1)
        assert (pool.stats.open, pool.stats.in_use, pool.stats.waiting, pool.stats.discarded) == (0, 0, 0, 2)
    assert len(errors) in (10_000, 100)
    assert slot.is_revoked
    assert not slot.is_held
    slot.release()
    slot.give_back()
    unused.release()
    assert busy.closed == 1
    await pool.aclose()
    with pytest.raises(ClientClosedError):
        await pool.acquire()
    with pytest.raises(ClientClosedError):
        slot.take("here", Wire)


async def test_a_slot_that_was_on_its_way_when_the_pool_closed_does_not_arrive() -> None:
    pool = pool_of(1)
    slot = await pool.acquire()
    errors: list[Exception] = []

    async def wait() -> None:
        try:
            await pool.acquire()
        except ClientClosedError as exc:
            errors.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await settle()
        slot.release()
        pool.aclose_nowait()
    assert len(errors) == 1


def test_closing_outside_of_any_event_loop_only_closes_file_descriptors() -> None:
    pool = pool_of(1)
    (wire,) = asyncio.run(kept(pool, "here"))
    pool.aclose_nowait()
    assert (wire.closed, wire.abandoned) == (0, 1)


# Event loops and processes

Run = Callable[[Callable[[], Any]], Any]
RUNS = [
    pytest.param(lambda main: asyncio.run(main()), id="asyncio"),
    pytest.param(trio.run, id="trio"),
]


@pytest.fixture
def stopped_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_under_a_second_event_loop_the_pool_works_and_what_the_dead_one_left_is_abandoned(
    first: Run, second: Run
) -> None:
    pool = pool_of(2)
    left: list[tuple[Wire, Slot, Wire]] = []

    async def leave() -> None:
        (idle,) = await kept(pool, "here")
        slot = await pool.acquire()
        await pool.acquire()
        left.append((idle, slot, slot.take("there", Wire)))

    async def work() -> None:
        slot = await pool.acquire()
        old_idle, old_slot, old_busy = left[0]
        assert slot.take("here", Wire) is not old_idle
        for wire in (old_idle, old_busy):
            assert (wire.closed, wire.abandoned) == (0, 1)
        old_slot.release()
        old_slot.give_back()
        assert pool.stats == PoolStats(open=1, idle=0, in_use=1, waiting=0, opened=3, reused=0, discarded=2)
        slot.give_back()

    first(leave)
    second(work)


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_under_each_event_loop_those_who_wait_give_up_in_time(first: Run, second: Run) -> None:
    pool = pool_of(1)

    async def wait() -> None:
        slot = await pool.acquire()
        with pytest.raises(SlotTimeout):
            await pool.acquire(0.001)
        slot.release()

    first(wait)
    second(wait)


def test_a_loop_that_is_stopped_and_not_closed_counts_as_dead(stopped_loop: asyncio.AbstractEventLoop) -> None:
    pool = pool_of(1)
    (wire,) = stopped_loop.run_until_complete(kept(pool, "here"))
    asyncio.run(kept(pool, "here"))
    assert wire.abandoned == 1


def test_one_loop_that_is_run_twice_keeps_its_connections(stopped_loop: asyncio.AbstractEventLoop) -> None:
    pool = pool_of(1)
    (wire,) = stopped_loop.run_until_complete(kept(pool, "here"))
    slot = stopped_loop.run_until_complete(pool.acquire())
    assert slot.take("here", Wire) is wire


@pytest.mark.parametrize("other", RUNS)
async def test_two_live_event_loops_at_once_are_refused(other: Run) -> None:
    pool = pool_of(1)
    (wire,) = await kept(pool, "here")
    refused: list[Exception] = []

    async def intrude() -> None:
        try:
            await pool.acquire()
        except ConfigurationError as exc:
            refused.append(exc)

    thread = threading.Thread(target=other, args=(intrude,))
    thread.start()
    await anyio.to_thread.run_sync(thread.join)
    assert "one client per event loop" in str(refused[0])
    assert (await pool.acquire()).take("here", Wire) is wire


async def test_after_a_fork_the_child_abandons_what_is_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it only seems so; test_transport forks in earnest."""
    pool = pool_of(1)
    (wire,) = await kept(pool, "here")
    monkeypatch.setattr(pools, "_process", pools._process)  # and back, at the end
    pools._begin_process()
    slot = await pool.acquire()
    assert slot.take("here", Wire) is not wire
    assert (wire.closed, wire.abandoned) == (0, 1)
