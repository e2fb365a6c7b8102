"""The scopes of calls: anyio's own in every respect, with one timer for all deadlines that pass in order."""

from __future__ import annotations

import asyncio
import math
import sys
from contextlib import ExitStack
from typing import Any

import anyio
import pytest

from layer_async import _deadline as deadlines
from layer_async._deadline import Scopes

pytestmark = pytest.mark.anyio

SOON = 0.002


def timers() -> int:
    """How many the running loop of asyncio has and will not skip."""
    loop: Any = asyncio.get_running_loop()
    return sum(not handle.cancelled() for handle in loop._scheduled)


async def test_a_scope_ends_by_its_deadline_and_only_by_that() -> None:
    scopes = Scopes()
    with scopes.after(SOON) as short:
        await anyio.sleep_forever()
    with scopes.after(60.0) as long, scopes.after(None) as endless:
        await anyio.sleep(0)
    assert short.cancelled_caught
    assert not long.cancel_called
    assert not endless.cancel_called
    assert endless.deadline == math.inf


async def test_the_deadline_is_seen_from_inside_and_from_within_the_callers_own_scope() -> None:
    scopes = Scopes()
    now = anyio.current_time()
    with scopes.after(60.0):
        assert 59 < anyio.current_effective_deadline() - now < 61
        with anyio.move_on_after(30.0):
            assert anyio.current_effective_deadline() - now < 31
    with anyio.move_on_after(10.0), scopes.after(60.0):
        assert anyio.current_effective_deadline() - now < 11


async def test_deadlines_out_of_order_all_pass_and_none_too_early() -> None:
    scopes = Scopes()
    ended: list[float] = []
    early: list[float] = []

    async def wait(seconds: float) -> None:
        with scopes.after(seconds) as scope:
            await anyio.sleep_forever()
        ended.append(seconds)
        if anyio.current_time() < scope.deadline - 0.0001:
            early.append(seconds)

    delays = (0.003, 0.009, 0.006, 0.001, 0.009)
    async with anyio.create_task_group() as group:
        for seconds in delays:
            group.start_soon(wait, seconds)
    assert sorted(ended) == sorted(delays)
    assert not early


async def test_a_deadline_that_is_moved_counts_from_then_on() -> None:
    scopes = Scopes()
    with scopes.after(SOON) as later, scopes.after(60.0) as sooner:
        later.deadline = anyio.current_time() + 60.0
        sooner.deadline = anyio.current_time() + 2 * SOON
        await anyio.sleep_forever()
    assert sooner.cancelled_caught
    assert not later.cancel_called
    with scopes.after(60.0) as never:
        never.deadline = math.inf
        await anyio.sleep(0)
    with scopes.after(60.0) as past:
        past.deadline = anyio.current_time() - 1
        await anyio.sleep_forever()
    assert past.cancelled_caught


async def test_a_scope_is_cancelled_by_hand_and_shields_like_any_other() -> None:
    scopes = Scopes()
    with scopes.after(60.0) as scope:
        scope.cancel()
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    with anyio.CancelScope() as outer, scopes.after(60.0) as inner:
        outer.cancel()
        inner.shield = True
        await anyio.sleep(0)
    assert not inner.cancelled_caught


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_thousand_deadlines_take_one_timer() -> None:
    scopes, before = Scopes(), timers()

    async def wait() -> None:
        with scopes.after(60.0):
            await anyio.Event().wait()  # a sleep has a timer of its own

    async with anyio.create_task_group() as group:
        for _ in range(1000):
            group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert timers() == before + 1
        group.cancel_scope.cancel()
    assert timers() == before + 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("others", [0, 1])
async def test_one_long_deadline_leaves_the_others_their_timer_once_it_has_gone(others: int) -> None:
    scopes, before = Scopes(), timers()
    with ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(scopes.after(30.0))
        with scopes.after(1e9):
            with scopes.after(60.0):
                assert timers() == before + 2
            assert timers() == before + 1
        with scopes.after(60.0), scopes.after(60.0), scopes.after(SOON) as short:
            assert timers() == before + 2
            await anyio.Event().wait()
    assert short.cancelled_caught


def test_a_second_event_loop_leaves_the_first_its_deadlines() -> None:
    """It is refused, but not before it has a scope."""
    scopes = Scopes()

    async def elsewhere() -> None:
        with scopes.after(60.0):
            await anyio.sleep(0)

    async def here() -> bool:
        with anyio.fail_after(10), scopes.after(5 * SOON) as scope:
            await anyio.to_thread.run_sync(asyncio.run, elsewhere())
            await anyio.Event().wait()
        return scope.cancelled_caught

    assert asyncio.run(here())


def test_each_event_loop_has_its_own_timer() -> None:
    scopes = Scopes()

    async def run() -> bool:
        with scopes.after(SOON) as scope:
            await anyio.sleep_forever()
        with scopes.after(60.0):  # whose timer is left to a loop that ends
            await anyio.sleep(0)
        return scope.cancelled_caught

    assert [anyio.run(run, backend=backend) for backend in ("asyncio", "trio", "asyncio")] == [True] * 3


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_class_of_another_shape_is_left_as_it_is() -> None:
    class Other:
        def __init__(self, deadline: float) -> None:
            self.deadline = deadline

    assert deadlines._kind(Other) is Other


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_without_asyncio_anyio_makes_the_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "asyncio")
    with Scopes().after(SOON) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert type(scope) is type(anyio.CancelScope())
