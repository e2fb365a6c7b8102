"""The gate: who waits, for how long, in which order, and what the observer hears of it."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_async import AsyncLayerClient, ConfigurationError
from layer_async._errors import APITimeoutError, DeadlineExceededError
from layer_async._pace import NEWS, Closure
from layer_async._pacing import PATIENCE, Gate, Pacing
from layer_async._telemetry import Event, GateShut, PaceChanged

REPEATABLE = settings(derandomize=True, deadline=None, database=None)

SECONDS = st.floats(min_value=-10, max_value=1e6, allow_nan=False)


@attrs.define
class Clock:
    """A clock that stands still until it is told otherwise."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


# The pure core


def test_a_new_gate_is_open() -> None:
    gate = Gate()
    assert not gate.is_shut
    assert gate.opens_in == 0.0
    assert repr(gate) == "<Gate open, 0 waiting>"


def test_a_shut_gate_opens_when_the_seconds_are_over() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    gate.shut(2.0)
    assert gate.is_shut
    assert gate.opens_in == 2.0
    assert repr(gate) == "<Gate shut for 2.00 s, 0 waiting>"
    clock.now += 1.5
    assert gate.is_shut
    assert gate.opens_in == 0.5
    clock.now += 0.5
    assert not gate.is_shut
    assert gate.opens_in == 0.0


def test_a_shut_gate_can_be_shut_for_longer_but_never_for_less() -> None:
    gate = Gate(clock=Clock())
    gate.shut(2.0)
    gate.shut(1.0)
    assert gate.opens_in == 2.0
    gate.shut(3.0)
    assert gate.opens_in == 3.0


@pytest.mark.parametrize("seconds", [0.0, -1.0, -math.inf, math.nan])
def test_no_time_or_less_than_none_leaves_the_gate_as_it_is(seconds: float) -> None:
    events: list[Event] = []
    gate = Gate(clock=Clock(), observer=events.append)
    gate.shut(seconds)
    assert not gate.is_shut
    assert events == []


@given(st.lists(st.tuples(st.floats(0, 100), SECONDS), max_size=20))
@REPEATABLE
def test_the_gate_opens_at_the_latest_time_that_anybody_asked_for(steps: list[tuple[float, float]]) -> None:
    closure, now, latest = Closure(), 0.0, -math.inf
    for passed, seconds in steps:
        now += passed
        closure.shut(now, seconds)
        if seconds > 0:
            latest = max(latest, now + seconds)
        assert closure.opens_in(now) == max(0.0, latest - now)


# What the observer hears


def test_the_observer_hears_when_the_gate_shuts_and_for_how_long() -> None:
    events: list[Event] = []
    gate = Gate(clock=Clock(), observer=events.append)
    gate.shut(2.5)
    assert events == [GateShut(2.5)]


def test_a_hundred_answers_within_a_moment_are_one_piece_of_news() -> None:
    clock, events = Clock(), list[Event]()
    gate = Gate(clock=clock, observer=events.append)
    for _ in range(100):
        gate.shut(1.0)
        clock.now += NEWS / 101
    assert events == [GateShut(1.0)]


def test_small_extensions_are_news_once_they_have_added_up() -> None:
    clock, events = Clock(), list[Event]()
    gate = Gate(clock=clock, observer=events.append)
    for _ in range(100):
        gate.shut(1.0)
        clock.now += 0.01
    assert 9 <= len(events) <= 11


def test_each_time_an_open_gate_shuts_is_news_however_short() -> None:
    clock, events = Clock(), list[Event]()
    gate = Gate(clock=clock, observer=events.append)
    for _ in range(3):
        gate.shut(0.01)
        clock.now += 0.01
    assert events == [GateShut(0.01)] * 3


def test_an_observer_that_fails_does_not_keep_the_gate_from_shutting(caplog: pytest.LogCaptureFixture) -> None:
    def observer(event: Event) -> None:
        raise ZeroDivisionError

    gate = Gate(observer=observer)
    gate.shut(60.0)
    assert gate.is_shut
    assert "observer failed" in caplog.text


# Waiting


class Waiters:
    """Tasks that wait at a gate and write down in which order they came through."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.through: list[int] = []

    async def wait(self, number: int) -> None:
        await self.gate.wait()
        self.through.append(number)


async def settle() -> None:
    """Let every task run until it waits for something."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_an_open_gate_lets_through_without_giving_way_to_others() -> None:
    gate, ran = Gate(), list[str]()

    async def other() -> None:
        ran.append("other")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        await gate.wait()
        assert ran == []


@pytest.mark.anyio
async def test_who_waits_comes_through_when_the_gate_opens() -> None:
    gate = Gate()
    gate.shut(0.005)
    await gate.wait()
    assert not gate.is_shut
    assert repr(gate) == "<Gate open, 0 waiting>"


@pytest.mark.anyio
async def test_who_waits_leaves_in_the_order_of_arrival() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    waiters = Waiters(gate)
    gate.shut(0.005)
    async with anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(waiters.wait, number)
            await settle()
        clock.now += 1
    assert waiters.through == list(range(50))


@pytest.mark.anyio
async def test_a_gate_that_is_shut_for_longer_while_they_wait_keeps_them_waiting() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    waiters = Waiters(gate)
    gate.shut(0.004)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waiters.wait, 0)
        await settle()
        clock.now += 0.003
        gate.shut(0.004)
        await anyio.sleep(0.009)
        assert waiters.through == []
        clock.now += 1
    assert waiters.through == [0]


@pytest.mark.anyio
async def test_a_gate_that_shuts_between_two_of_them_stops_the_second() -> None:
    gate = Gate()
    waiters = Waiters(gate)
    passed = anyio.Event()

    async def shuts_behind_itself() -> None:
        await gate.wait()
        gate.shut(60.0)
        passed.set()

    gate.shut(0.005)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shuts_behind_itself)
        await settle()
        tasks.start_soon(waiters.wait, 1)
        await passed.wait()
        await settle()
        assert waiters.through == []
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("leaving", [0, 1, 2])
async def test_one_that_is_cancelled_holds_up_nobody(leaving: int) -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    waiters = Waiters(gate)
    scopes: list[anyio.CancelScope] = []

    async def wait(number: int) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await waiters.wait(number)

    gate.shut(0.005)
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(wait, number)
            await settle()
        scopes[leaving].cancel()
        await settle()
        clock.now += 1
    assert waiters.through == [number for number in range(3) if number != leaving]
    assert "0 waiting" in repr(gate)


@pytest.mark.anyio
async def test_a_thousand_that_are_cancelled_at_once_leave_nothing_behind() -> None:
    gate = Gate()
    gate.shut(60.0)
    async with anyio.create_task_group() as tasks:
        for _ in range(1_000):
            tasks.start_soon(gate.wait)
        await settle()
        assert "1000 waiting" in repr(gate)
        tasks.cancel_scope.cancel()
    assert "0 waiting" in repr(gate)


# The deadline


@pytest.mark.anyio
async def test_a_wait_that_cannot_end_before_the_deadline_is_refused_at_once() -> None:
    gate = Gate(clock=Clock())
    gate.shut(30.0)
    with anyio.fail_after(29.0), pytest.raises(DeadlineExceededError) as caught:
        await gate.wait()
    assert caught.value.phase == "gate"
    assert isinstance(caught.value, APITimeoutError | TimeoutError)
    assert "another 30.0 s" in str(caught.value)
    assert "Raise `deadline`" in str(caught.value)


@pytest.mark.anyio
async def test_one_who_stands_behind_others_is_refused_at_once_too() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    gate.shut(0.005)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(gate.wait)
        await settle()
        gate.shut(30.0)
        with anyio.fail_after(29.0), pytest.raises(DeadlineExceededError):
            await gate.wait()
        assert "1 waiting" in repr(gate)
        clock.now += 60


@pytest.mark.anyio
async def test_the_callers_own_scope_is_foreseen_too() -> None:
    gate = Gate(clock=Clock())
    gate.shut(30.0)
    with anyio.fail_after(5.0), anyio.fail_after(120.0), pytest.raises(DeadlineExceededError):
        await gate.wait()


@pytest.mark.anyio
async def test_a_deadline_after_the_opening_does_not_matter() -> None:
    gate = Gate()
    gate.shut(0.005)
    with anyio.fail_after(60.0):
        await gate.wait()
    assert not gate.is_shut


@pytest.mark.anyio
async def test_a_gate_that_is_shut_past_the_deadline_in_mid_wait_is_refused_when_it_would_have_opened() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    caught: list[DeadlineExceededError] = []

    async def wait() -> None:
        with anyio.fail_after(30.0):
            try:
                await gate.wait()
            except DeadlineExceededError as exc:
                caught.append(exc)

    gate.shut(0.005)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await settle()
        gate.shut(60.0)
    assert [exc.phase for exc in caught] == ["gate"]


@pytest.mark.anyio
async def test_one_that_was_cancelled_before_is_cancelled_and_not_told_of_a_deadline() -> None:
    gate = Gate(clock=Clock())
    gate.shut(30.0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await gate.wait()
    assert scope.cancelled_caught


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_native_cancellation_passes() -> None:
    gate = Gate()
    gate.shut(60.0)
    task = asyncio.create_task(gate.wait())
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "0 waiting" in repr(gate)


# More than one event loop


def runs(backend: str) -> Callable[..., Any]:
    return functools.partial(anyio.run, backend=backend)


@pytest.mark.parametrize("first", ["asyncio", "trio"])
@pytest.mark.parametrize("second", ["asyncio", "trio"])
def test_a_gate_that_was_shut_under_one_loop_opens_on_time_under_the_next(first: str, second: str) -> None:
    gate = Gate()

    async def shut() -> None:
        gate.shut(0.008)
        await gate.wait()
        gate.shut(0.008)

    runs(first)(shut)
    assert gate.opens_in <= 0.008
    runs(second)(gate.wait)
    assert not gate.is_shut


def test_those_who_died_waiting_with_their_loop_stand_in_nobodys_way() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    gate.shut(0.005)
    dead = asyncio.new_event_loop()
    task = dead.create_task(gate.wait())
    dead.call_later(0.001, dead.stop)
    dead.run_forever()
    assert "1 waiting" in repr(gate)

    async def wait() -> None:
        with anyio.fail_after(5.0):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(gate.wait)
                await settle()
                clock.now += 1

    anyio.run(wait)
    assert "0 waiting" in repr(gate)
    task.cancel()
    dead.run_until_complete(asyncio.gather(task, return_exceptions=True))
    dead.close()


# What may be said


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan, True, "50", 10**400, pytest.param(10**9999, id="huge")])
def test_a_rate_that_is_no_number_above_none_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Pacing\(rate=\) takes attempts a second"):
        Pacing(rate=rate)


def test_a_client_takes_a_pacing_or_none() -> None:
    with pytest.raises(ConfigurationError, match="pacing must be a Pacing or None, not int"):
        AsyncLayerClient(token1="a" * 8, token2="b" * 8, pacing=50)  # type: ignore[arg-type]


# The pace at the gate


def learned(clock: Clock, **options: Any) -> Gate:
    """A gate that has learned a pace of about 85 a second."""
    gate = Gate(Pacing(), clock=clock, random=lambda: 1.0, **options)
    gate.slow_down(1.0)
    clock.now += 1
    for _ in range(101):
        turn = gate._pass()
        clock.now += 0.01
    gate.slow_down(0.001, turn=turn)
    clock.now += 0.001
    assert gate.rate == pytest.approx(85, rel=0.05)
    return gate


def test_until_the_first_429_a_gate_is_off() -> None:
    gate = Gate(Pacing(), clock=Clock())
    assert gate.is_off
    assert gate.rate is None
    gate.slow_down(1.0)
    assert not gate.is_off
    assert gate.is_shut
    assert not Gate(Pacing(rate=5), clock=Clock()).is_off


def test_a_gate_that_learns_nothing_is_off_again_when_it_has_opened() -> None:
    clock = Clock()
    gate = Gate(clock=clock)
    gate.slow_down(1.0)
    assert not gate.is_off
    clock.now += 1
    assert gate._pass() == 0
    assert gate.is_off


def test_no_answer_shuts_the_gate_for_more_than_an_hour() -> None:
    gate = Gate(Pacing(), clock=Clock())
    gate.slow_down(86_400.0)
    assert gate.opens_in == PATIENCE == 3600
    gate = Gate(Pacing(), clock=Clock())
    gate.hear(httpx.Headers({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "86400"}))
    assert gate.opens_in == PATIENCE


def test_a_429_that_names_no_time_shuts_the_gate_for_a_moment_once_for_all_that_were_under_way() -> None:
    gate = Gate(Pacing(), clock=Clock(), random=lambda: 1.0)
    for _ in range(50):
        gate.slow_down(8.0, is_asked=False)
    assert gate.opens_in == 0.25


def test_what_the_server_asks_for_counts_also_from_those_that_were_under_way() -> None:
    gate = Gate(Pacing(), clock=Clock())
    gate.slow_down(1.0)
    gate.slow_down(3.0)
    assert gate.opens_in == 3.0


def test_the_observer_hears_of_each_notable_change_of_the_pace_and_of_no_other() -> None:
    clock, events = Clock(), list[Event]()
    gate = learned(clock, observer=events.append)
    rates = [event.rate for event in events if isinstance(event, PaceChanged)]
    assert rates == [pytest.approx(85, rel=0.05)]
    for _ in range(400):
        clock.now += gate._ready_in()
        gate._pass()
    rates = [event.rate for event in events if isinstance(event, PaceChanged)]
    assert len(rates) >= 2
    assert all(1.2 < after / before < 1.5 for before, after in itertools.pairwise(rates))
    assert f"open, {gate.rate:.3g} attempts/s, 0 waiting" in repr(gate)


def test_an_answer_that_says_that_nothing_is_left_shuts_the_gate() -> None:
    events: list[Event] = []
    gate = Gate(Pacing(), clock=Clock(), observer=events.append)
    gate.hear(httpx.Headers({"Content-Type": "text/plain"}))
    gate.hear(httpx.Headers({"X-RateLimit-Remaining": "9", "X-RateLimit-Reset": "5"}))
    gate.hear(httpx.Headers({"X-RateLimit-Remaining": "what"}))
    assert (gate.is_off, events) == (True, [])
    gate.hear(httpx.Headers({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "5"}))
    assert (gate.is_off, gate.opens_in, events) == (False, 5.0, [GateShut(5.0)])


def test_a_gate_that_learns_nothing_heeds_no_answer() -> None:
    gate = Gate(clock=Clock())
    gate.hear(httpx.Headers({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "5"}))
    assert gate.is_off


def test_an_answer_that_says_that_little_is_left_sets_a_pace_until_there_is_more() -> None:
    clock = Clock()
    gate = Gate(Pacing(), clock=clock)
    headers = httpx.Headers({"RateLimit": '"a";r=10;t=5', "RateLimit-Policy": '"a";q=100;w=60'})
    gate.hear(headers)
    assert not gate.is_off
    gate._pass()
    assert gate._ready_in() == pytest.approx(0.48)
    clock.now += 5
    gate._pass()
    assert gate.is_off


@pytest.mark.anyio
async def test_single_calls_leave_before_those_of_a_bulk_whenever_they_came() -> None:
    clock, order = Clock(), list[str]()
    gate = Gate(Pacing(rate=1e6), clock=clock)

    async def wait(name: str) -> None:
        await gate.wait(patient=name.startswith("bulk"))
        order.append(name)

    gate.shut(0.005)
    async with anyio.create_task_group() as tasks:
        for name in ("bulk 1", "single 1", "bulk 2", "single 2"):
            tasks.start_soon(wait, name)
            await settle()
        clock.now += 1
    assert order == ["single 1", "single 2", "bulk 1", "bulk 2"]
    assert "0 waiting" in repr(gate)


@pytest.mark.anyio
async def test_a_single_call_passes_those_of_a_bulk_that_wait_for_the_pace() -> None:
    clock, order = Clock(), list[str]()
    gate = Gate(Pacing(rate=1), clock=clock)

    async def wait(name: str) -> None:
        await gate.wait(patient=name.startswith("bulk"))
        order.append(name)

    await wait("first")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "bulk 1")
        tasks.start_soon(wait, "bulk 2")
        await settle()
        clock.now += 0.99
        await wait("single")
        assert order == ["first", "single"]
        tasks.cancel_scope.cancel()
    assert "0 waiting" in repr(gate)


@pytest.mark.anyio
async def test_when_the_gate_opens_no_herd_is_let_out() -> None:
    clock = Clock()
    gate = Gate(Pacing(rate=1000), clock=clock)
    waiters = Waiters(gate)
    gate.shut(0.003)
    async with anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(waiters.wait, number)
        await settle()
        clock.now += 1
        await anyio.sleep(0.008)
        await settle()
        assert 20 <= len(waiters.through) <= 21  # 20 ms ahead of time, and then one a millisecond
        clock.now += 0.01
        await anyio.sleep(0.008)
        await settle()
        assert 30 <= len(waiters.through) <= 31
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_turn_that_comes_after_the_deadline_even_at_twice_the_pace_is_not_waited_for() -> None:
    gate = Gate(Pacing(rate=2), clock=Clock())
    async with anyio.create_task_group() as tasks:
        await gate.wait()
        for _ in range(20):
            tasks.start_soon(gate.wait)
        await settle()
        with anyio.fail_after(4.9), pytest.raises(DeadlineExceededError) as caught:
            await gate.wait()
        assert caught.value.phase == "gate"
        assert "another 5.0 s" in str(caught.value)
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_gate_that_is_shut_for_longer_than_a_call_waits_refuses_it_and_names_the_wait() -> None:
    clock = Clock()
    gate = Gate(Pacing(), clock=clock)
    gate.slow_down(600.0)
    with pytest.raises(DeadlineExceededError, match=r"another 600\.0 s, and a call waits for 60 s at most") as caught:
        await gate.wait(longest=60.0)
    assert caught.value.phase == "gate"
    with anyio.move_on_after(0.002) as scope:
        await gate.wait(patient=True)
    assert scope.cancelled_caught
    assert "0 waiting" in repr(gate)
