"""The scopes of calls: anyio's own in every respect, with one timer for all deadlines that pass in order."""

from __future__ import annotations

import asyncio
import functools
import math
import sys
from contextlib import ExitStack
from typing import Any

import anyio
import httpx
import pytest
import trio

from layer_async import AsyncLayerClient, DeadlineExceededError
from layer_async import _deadline as deadlines
from layer_async._deadline import Scopes, Watch

from .faultserver import FaultServer

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


class Blunt(asyncio.SelectorEventLoop):
    """As uvloop does, it has no timer for what is due within a millisecond, and calls that too early."""

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        if when - self.time() < 0.001:
            return self.call_soon(callback, *args, context=context)
        return super().call_at(when, callback, *args, context=context)


def test_a_deadline_that_is_due_at_once_has_no_timer_to_be_asked() -> None:
    async def main() -> None:
        watch, rung = Watch(asyncio.get_running_loop()), list[float]()
        begun = watch.loop.time()
        for seconds in (0.0005, 0.0005, 0.0002, 0.004, 0.004, 0.003):
            watch.at(begun + seconds, functools.partial(rung.append, seconds))
        while len(rung) < 6:
            await asyncio.sleep(0)
        assert sorted(rung) == [0.0002, 0.0005, 0.0005, 0.003, 0.004, 0.004]
        assert watch.loop.time() - begun >= 0.003

    with asyncio.Runner(loop_factory=Blunt) as runner:
        runner.run(main())


def test_calls_whose_time_is_nearly_over_fail_alone() -> None:
    async def main(server: FaultServer) -> list[Any]:
        limits = httpx.Limits(max_connections=1)
        async with AsyncLayerClient(token1="one", token2="two", base_url=server.url, limits=limits) as client:
            await client.get("/connection-close/1")
            slot = await client.pool.acquire()
            waiting = [asyncio.ensure_future(client.get("/ok", deadline=each)) for each in (0.0002, 0.0002, 5, 5)]
            await asyncio.sleep(0.003)
            slot.release()
            queued = await asyncio.gather(*waiting, return_exceptions=True)
            never = asyncio.gather(*(client.get("/never", deadline=0.0008) for _ in range(2)), return_exceptions=True)
            sent = [*await never, *await asyncio.gather(client.get("/ok", deadline=5), client.get("/ok", deadline=6))]
            assert client.pool.stats.in_use == 0
        return [*queued, *sent]

    with FaultServer() as server, asyncio.Runner(loop_factory=Blunt) as runner:
        results = runner.run(main(server))
    failed, fine = [results[n] for n in (0, 1, 4, 5)], [results[n] for n in (2, 3, 6, 7)]
    assert all(isinstance(each, DeadlineExceededError) for each in failed)
    assert all(each.status_code == 200 for each in fine)


@pytest.mark.parametrize("is_guest_first", [True, False])
def test_a_guest_and_its_host_have_each_their_own(is_guest_first: bool) -> None:
    """trio may run within asyncio's loop."""

    async def get(server: FaultServer) -> int:
        limits = httpx.Limits(max_connections=1)
        async with AsyncLayerClient(token1="one", token2="two", base_url=server.url, limits=limits) as client:
            with anyio.fail_after(5):
                slot = await client.pool.acquire()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(client.get, "/ok")
                    await anyio.wait_all_tasks_blocked() if is_guest_first else await anyio.sleep(0.001)
                    slot.release()
                return (await client.get("/ok")).status_code

    async def guest(server: FaultServer) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        trio.lowlevel.start_guest_run(
            get,
            server,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        return (await done).unwrap()

    async def main(server: FaultServer) -> None:
        for run in (guest, get) if is_guest_first else (get, guest):
            assert await run(server) == 200

    deadlines._scope_class.cache_clear()
    with FaultServer() as server:
        asyncio.run(main(server))


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
