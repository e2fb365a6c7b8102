"""Bulk: workers over one iterator, one outcome for each item, and nothing left behind however it ends."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import pathlib
import pickle
import sys
import threading
import traceback
import types
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any, Self, assert_type

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_async import _bulk, _outage
from layer_async._bulk import Bulk, ItemRecord, current_item, run_all
from layer_async._errors import (
    AttemptInfo,
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    LayerError,
    NotFoundError,
    ServerError,
)
from layer_async._outcomes import Outcome, Outcomes

pytestmark = pytest.mark.anyio

BACKENDS = ("asyncio", "trio")
checkpoint = anyio.lowlevel.checkpoint


async def double(number: int) -> int:
    await checkpoint()
    return 2 * number


async def ticks(count: int) -> None:
    for _ in range(count):
        await checkpoint()


async def rest() -> None:
    """Let everything run until it waits: anyio's own `wait_all_tasks_blocked` polls asyncio every 100 ms."""
    await ticks(50)


def living() -> int:
    """How many tasks there are, on either event loop."""
    return len(anyio.get_running_tasks())


async def drain(bulk: Bulk[Any, Any, Any], received: list[Any] | None = None) -> list[Any]:
    """Receive all outcomes; `received` has the items of those that came, even if it ends in an exception."""
    received = [] if received is None else received
    async with bulk as outcomes:
        async for outcome in outcomes:
            received.append(outcome.item)
    return received


class Crew:
    """A call that counts how many of it are under way, and can be held up."""

    def __init__(self) -> None:
        self.active = 0
        self.most = 0
        self.begun: list[int] = []
        self.gate = anyio.Event()

    async def __call__(self, number: int) -> int:
        self.begun.append(number)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await self.gate.wait()
        finally:
            self.active -= 1
        return number


class Numbers:
    """An endless generator in a box: knows how many items were pulled, and whether it was closed."""

    def __init__(self, last: int | None = None, *, error: Exception | None = None) -> None:
        self.pulled = 0
        self.closed = False
        self.pulling = False
        self.last = last
        self.error = error

    def numbers(self) -> Iterator[int]:
        for number in itertools.count():
            if number == self.last:
                return
            self.pulled += 1
            yield number

    def sync(self) -> Iterator[int]:
        try:
            yield from self.numbers()
            if self.error:
                raise self.error
        finally:
            self.closed = True

    async def asynchronous(self) -> AsyncIterator[int]:
        try:
            for number in self.numbers():
                assert not self.pulling, "two pulls at once"
                self.pulling = True
                await checkpoint()
                self.pulling = False
                yield number
            if self.error:
                raise self.error
        finally:
            self.closed = True
            with anyio.CancelScope(shield=True):
                await ticks(3)


def sources(numbers: Numbers) -> dict[str, Callable[[], Iterable[int] | AsyncIterable[int]]]:
    return {"sync": numbers.sync, "async": numbers.asynchronous}


both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])


# Outcomes


async def test_each_item_gives_one_outcome_and_a_failed_one_does_not_end_the_run() -> None:
    async def call(number: int) -> int:
        await checkpoint()
        if number % 3 == 0:
            raise ValueError(number)
        return 2 * number

    async with Bulk(range(10), call, workers=4) as outcomes:
        got = {outcome.item: outcome async for outcome in outcomes}
    assert sorted(got) == list(range(10))
    for number, outcome in got.items():
        assert outcome.key == number
        assert outcome.ok == (number % 3 != 0)
        assert outcome.elapsed >= 0
        assert outcome.attempts is None
        if outcome.ok:
            assert outcome.unwrap() == outcome.value == 2 * number
            assert outcome.error is None
        else:
            assert outcome.value is None
            with pytest.raises(ValueError, match=str(number)) as caught:
                outcome.unwrap()
            assert caught.value is outcome.error


async def test_an_exception_of_the_call_before_its_first_await_is_an_outcome_too() -> None:
    def call(number: int) -> Awaitable[int]:
        raise AssertionError("a mocking tool says no")

    async with Bulk([1], call, workers=1) as outcomes:
        (outcome,) = [outcome async for outcome in outcomes]
    assert isinstance(outcome.error, AssertionError)


async def test_outcomes_come_as_they_complete() -> None:
    first_may_end = anyio.Event()

    async def call(number: int) -> int:
        if number == 0:
            await first_may_end.wait()
        return number

    got = []
    async with Bulk(range(5), call, workers=2) as outcomes:
        async for outcome in outcomes:
            got.append(outcome.item)
            if len(got) == 4:
                first_may_end.set()
    assert got == [1, 2, 3, 4, 0]


async def test_ordered_outcomes_come_in_the_order_of_the_items() -> None:
    async def call(number: int) -> int:
        await ticks(20 - number)
        return number

    async with Bulk(range(20), call, workers=5, ordered=True) as outcomes:
        assert [outcome.unwrap() async for outcome in outcomes] == list(range(20))


async def test_key_names_the_outcomes_and_is_asked_once_an_item_in_their_order() -> None:
    asked = []

    def key(number: int) -> str:
        asked.append(number)
        return f"n{number}"

    async with Bulk(Numbers(30).asynchronous(), double, key=key, workers=3) as outcomes:
        assert_type(outcomes, Outcomes[str, int, int])
        async for outcome in outcomes:
            assert_type(outcome.key, str)
            assert_type(outcome.item, int)
            assert outcome.key == f"n{outcome.item}"
    assert asked == list(range(30))


async def test_without_key_the_item_is_its_own_key_and_the_types_say_so() -> None:
    bulk = Bulk([1], double, workers=1)
    assert_type(bulk, Bulk[int, int])
    async with bulk as outcomes:
        async for outcome in outcomes:
            assert_type(outcome, Outcome[int, int])
            assert_type(outcome.unwrap(), int)
            assert outcome.key is outcome.item


@pytest.mark.parametrize("items", [[3, 4], (3, 4), {3: "x", 4: "y"}, range(3, 5), {3, 4}])
async def test_any_iterable_will_do(items: Iterable[int]) -> None:
    async with Bulk(items, double, workers=2, ordered=True) as outcomes:
        assert [outcome.unwrap() async for outcome in outcomes] == [6, 8]


async def test_bare_iterators_that_cannot_be_iterated_themselves_will_do() -> None:
    """`iter` and `aiter` ask only for `__next__` and `__anext__` of what they return."""

    class Countdown:
        left = 3

        def __next__(self) -> int:
            if not self.left:
                raise StopIteration
            self.left -= 1
            return self.left

    class AsyncCountdown(Countdown):
        async def __anext__(self) -> int:
            try:
                return next(self)
            except StopIteration:
                raise StopAsyncIteration from None

    class Items:
        def __iter__(self) -> Countdown:
            return Countdown()

    class AsyncItems:
        def __aiter__(self) -> AsyncCountdown:
            return AsyncCountdown()

    items: Any
    for items in (Items(), AsyncItems()):
        async with Bulk(items, double, workers=2, ordered=True) as outcomes:
            assert [outcome.unwrap() async for outcome in outcomes] == [4, 2, 0]


@pytest.mark.parametrize("ordered", [False, True])
@both_kinds
async def test_no_items_give_no_outcomes(kind: str, ordered: bool) -> None:
    async with Bulk(sources(Numbers(0))[kind](), double, workers=3, ordered=ordered) as outcomes:
        assert [outcome async for outcome in outcomes] == []


async def test_an_async_iterable_that_is_also_sync_is_iterated_asynchronously() -> None:
    class Rows:
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("this blocks")

        async def __aiter__(self) -> AsyncIterator[int]:
            yield 1

    async with Bulk(Rows(), double, workers=1) as outcomes:
        assert [outcome.unwrap() async for outcome in outcomes] == [2]


async def test_unwrapping_twice_does_not_grow_the_traceback() -> None:
    async def call(number: int) -> int:
        raise ValueError(number)

    async with Bulk([1], call, workers=1) as outcomes:
        (outcome,) = [outcome async for outcome in outcomes]

    def names() -> list[str]:
        with pytest.raises(ValueError, match="1") as caught:
            outcome.unwrap()
        return [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    once = names()
    assert once[-1] == "call"
    assert once == names() == names()


async def test_an_error_is_not_held_by_the_frames_of_its_own_traceback() -> None:
    async def call(number: int) -> int:
        raise ValueError(number)

    async with Bulk([1], call, workers=1) as outcomes:
        (outcome,) = [outcome async for outcome in outcomes]
    assert outcome.error is not None
    frames = [frame for frame, _ in traceback.walk_tb(outcome.error.__traceback__)]
    assert [frame.f_code.co_name for frame in frames] == ["call"]
    for frame in frames:
        assert not any(isinstance(held, Outcome | BaseException) for held in frame.f_locals.values())


async def test_outcomes_are_frozen_and_can_be_pickled_and_copied() -> None:
    async def call(number: int) -> int:
        raise NotFoundError("gone", status_code=404)

    async with Bulk([1], call, workers=1) as outcomes:
        (outcome,) = [outcome async for outcome in outcomes]
    for twin in (pickle.loads(pickle.dumps(outcome)), copy.deepcopy(outcome), copy.copy(outcome)):
        assert (twin.item, twin.key, twin.elapsed) == (1, 1, outcome.elapsed)
        with pytest.raises(NotFoundError, match="gone"):
            twin.unwrap()
    with pytest.raises(AttributeError):
        outcome.value = 3  # type: ignore[misc]
    assert repr(outcome).startswith("Outcome(item=1, key=1, value=None, error=NotFoundError")


def test_the_query_of_a_path_is_not_in_the_repr_of_its_outcome() -> None:
    path = "/x?token=5ecret"
    outcome: Outcome[str, None, str] = Outcome(path, path, None, None, 1, 0.0)
    assert repr(outcome) == "Outcome(item='/x?...', key='/x?...', value=None, error=None, attempts=1, elapsed=0.0)"


async def test_elapsed_is_the_time_of_the_call_in_seconds_on_the_loops_own_clock() -> None:
    async def call(number: int) -> float:
        began = anyio.current_time()
        await anyio.sleep(0.002)
        return anyio.current_time() - began

    async with Bulk([1], call, workers=1) as outcomes:
        outcome = await anext(outcomes)
    assert outcome.elapsed >= outcome.unwrap() > 0


# The record of the item


async def test_a_call_tells_its_attempts_through_the_record_of_its_item_from_child_tasks_too() -> None:
    seen: list[ItemRecord] = []

    async def attempt() -> None:
        record = current_item.get()
        assert record is not None
        assert record.is_patient
        record.attempts = (record.attempts or 0) + 1
        seen.append(record)

    async def call(number: int) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(number):
                group.start_soon(attempt)
        if number == 3:
            raise ValueError

    async with Bulk(range(6), call, workers=2, ordered=True) as outcomes:
        attempts = [outcome.attempts async for outcome in outcomes]
    assert attempts == [None, 1, 2, 3, 4, 5]
    assert len({id(record) for record in seen}) == 5


async def test_the_items_the_key_and_the_loop_body_work_for_no_item() -> None:
    async def items() -> AsyncIterator[int]:
        for number in range(6):
            assert current_item.get() is None
            await checkpoint()
            yield number

    def key(number: int) -> int:
        assert current_item.get() is None
        return number

    async with Bulk(items(), double, key=key, workers=2) as outcomes:
        async for _ in outcomes:
            assert current_item.get() is None


async def test_a_bulk_inside_a_call_pulls_its_items_for_the_outer_item() -> None:
    async def inner(number: int) -> ItemRecord | None:
        return current_item.get()

    async def outer(number: int) -> None:
        mine = current_item.get()
        assert mine is not None

        async def items() -> AsyncIterator[int]:
            assert current_item.get() is mine
            yield 1
            assert current_item.get() is mine

        assert mine not in await run_all(items(), inner, workers=1)
        assert current_item.get() is mine

    await run_all(range(3), outer, workers=2)


# Workers, window, memory


@pytest.mark.parametrize("workers", [1, 3, 7])
async def test_at_most_workers_calls_are_under_way(workers: int) -> None:
    crew = Crew()
    before = living()
    async with Bulk(itertools.count(), crew, workers=workers) as outcomes:
        await rest()
        assert living() == before + workers
        assert crew.begun == list(range(workers))
        crew.gate.set()
        for _ in range(100):
            await anext(outcomes)
            assert living() == before + workers
    assert crew.most == workers
    assert crew.active == 0
    assert living() == before


async def test_few_items_call_few_workers_to_work() -> None:
    crew = Crew()
    before = living()
    bulk = Bulk(range(2), crew, workers=1000)
    async with bulk as outcomes:
        await rest()
        assert len(bulk._scopes) == 5
        assert living() == before + 2  # the others have found no item, and are gone
        crew.gate.set()
        assert len([outcome async for outcome in outcomes]) == 2


@both_kinds
async def test_nothing_is_pulled_before_a_worker_is_free(kind: str) -> None:
    numbers, crew = Numbers(), Crew()
    async with Bulk(sources(numbers)[kind](), crew, workers=3):
        await rest()
        assert numbers.pulled == 3


@pytest.mark.parametrize(("ordered", "window"), [(False, 6), (True, 12)])
@both_kinds
async def test_workers_stop_when_the_loop_is_slow_and_go_on_with_it(kind: str, ordered: bool, window: int) -> None:
    numbers = Numbers()
    async with Bulk(sources(numbers)[kind](), double, workers=3, ordered=ordered) as outcomes:
        for received in range(1, 50):
            await anext(outcomes)
            await rest()
            assert numbers.pulled == received + window


async def test_a_slow_item_at_the_head_holds_up_a_bounded_number_of_ordered_outcomes() -> None:
    head = anyio.Event()
    numbers = Numbers(100)

    async def call(number: int) -> int:
        if number == 0:
            await head.wait()
        return number

    async with Bulk(numbers.sync(), call, workers=3, ordered=True) as outcomes:
        await rest()
        assert numbers.pulled == 12
        with anyio.move_on_after(0.001):
            await anext(outcomes)
            raise AssertionError("the head has no outcome yet")
        head.set()
        assert [outcome.item async for outcome in outcomes] == list(range(100))


@pytest.mark.parametrize("ordered", [False, True])
async def test_memory_does_not_grow_with_the_number_of_items(ordered: bool) -> None:
    """No more than the window is ever held; and Python holds no more objects late in the run than early in it."""
    count = 5_000
    bulk = Bulk(range(count), _echo, workers=10, ordered=ordered)
    received, early = 0, 0
    async with bulk as outcomes:
        async for _ in outcomes:
            received += 1
            assert len(bulk._hand_over.line) <= bulk._hand_over.window
            if received == 1000:
                gc.collect()
                early = sys.getallocatedblocks()
        gc.collect()
        late = sys.getallocatedblocks()
    assert received == count
    assert late - early < 1000


async def _echo(item: int) -> int:
    return item


async def test_a_run_of_calls_and_a_loop_body_that_never_wait_can_be_cancelled() -> None:
    with anyio.move_on_after(0.005) as scope:
        async with Bulk(itertools.count(), _echo, workers=2) as outcomes:
            async for _ in outcomes:
                pass
    assert scope.cancelled_caught


# Errors that end the run


@pytest.mark.parametrize("ordered", [False, True])
@both_kinds
async def test_an_exception_of_the_items_is_raised_after_the_outcomes_of_all_before_it(
    kind: str, ordered: bool
) -> None:
    error = OSError("page 7 is gone")
    numbers = Numbers(7, error=error)
    got: list[int] = []
    before = living()
    with pytest.raises(OSError, match="page 7") as caught:
        await drain(Bulk(sources(numbers)[kind](), double, workers=4, ordered=ordered), got)
    assert caught.value is error
    assert sorted(got) == list(range(7))
    assert living() == before


async def test_an_exception_of_the_key_ends_the_run_as_itself() -> None:
    got: list[int] = []
    numbers = Numbers()
    with pytest.raises(ZeroDivisionError):
        await drain(Bulk(numbers.sync(), double, key=lambda number: 1 // (5 - number), workers=3), got)
    assert sorted(got) == [0, 1, 2, 3, 4]
    assert numbers.pulled == 6
    assert numbers.closed


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_closed_client_ends_the_run_after_the_calls_under_way(ordered: bool) -> None:
    release = anyio.Event()
    numbers = Numbers()

    pulled = 0

    async def call(number: int) -> int:
        nonlocal pulled
        if number == 2:
            await rest()
            pulled = numbers.pulled
            raise ClientClosedError("the client is closed.")
        if number == 3:
            await release.wait()
        return number

    async def release_later() -> None:
        await ticks(200)
        release.set()

    got: list[int] = []
    async with anyio.create_task_group() as group:
        group.start_soon(release_later)
        with pytest.raises(ClientClosedError) as caught:
            await drain(Bulk(numbers.sync(), call, workers=4, ordered=ordered), got)
    assert caught.value.__context__ is None
    assert numbers.pulled == pulled, "nothing is pulled once the client is closed"
    assert sorted(got) == [number for number in range(pulled) if number != 2]
    assert 3 in got


async def test_the_error_is_raised_once_and_the_outcomes_are_over() -> None:
    async with Bulk(Numbers(0, error=OSError()).sync(), double, workers=1) as outcomes:
        with pytest.raises(OSError):  # noqa: PT011
            await anext(outcomes)
        with pytest.raises(StopAsyncIteration):
            await anext(outcomes)


async def test_a_call_that_is_not_async_is_refused_with_a_clear_error() -> None:
    numbers = Numbers()
    call: Any = lambda number: number  # noqa: E731
    with pytest.raises(ConfigurationError, match="must be an async function: it returned int"):
        await drain(Bulk(numbers.sync(), call, workers=2))
    assert numbers.pulled <= 2


class Interrupted(BaseException):
    """As KeyboardInterrupt, which asyncio lets fall out of the event loop itself."""


async def test_a_base_exception_of_a_call_ends_the_block_at_once_and_comes_out_as_itself() -> None:
    async def call(number: int) -> int:
        await ticks(5)
        raise Interrupted

    before = living()
    with pytest.raises(Interrupted) as caught:
        async with Bulk(itertools.count(), call, workers=3):
            await anyio.sleep_forever()
    assert not isinstance(caught.value.__context__, BaseExceptionGroup)
    with pytest.raises(Interrupted):
        await drain(Bulk(itertools.count(), call, workers=3))
    assert living() == before


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_future_that_somebody_else_cancels_is_the_items_trouble_alone() -> None:
    async def call(number: int) -> int:
        if number == 2:
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other
        return await double(number)

    before = living()
    async with Bulk(range(5), call, workers=3, ordered=True) as outcomes:
        errors = [outcome.error async for outcome in outcomes]
    assert living() == before
    error = errors.pop(2)
    assert errors == [None] * 4
    assert isinstance(error, LayerError)
    assert "somebody else cancelled" in str(error)
    assert isinstance(error.__cause__, asyncio.CancelledError)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_cancellation_that_is_nobodys_is_the_items_trouble_alone_on_trio_too() -> None:
    stray: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except BaseException as exc:
            stray.append(exc)
            raise

    async def call(number: int) -> int:
        if number == 1:
            raise stray[0]
        return await double(number)

    async with Bulk(range(3), call, workers=2, ordered=True) as outcomes:
        errors = [outcome.error async for outcome in outcomes]
    assert [type(error) for error in errors] == [type(None), LayerError, type(None)]


# Leaving


@both_kinds
@pytest.mark.parametrize("ordered", [False, True])
async def test_break_cancels_the_workers_and_closes_the_generator(kind: str, ordered: bool) -> None:
    numbers, crew = Numbers(), Crew()
    crew.gate.set()
    before = living()
    async with Bulk(sources(numbers)[kind](), crew, workers=3, ordered=ordered) as outcomes:
        async for outcome in outcomes:
            if outcome.item == 10:
                crew.gate = anyio.Event()
                await rest()
                break
    assert crew.active == 0
    assert numbers.closed
    assert living() == before


@both_kinds
async def test_an_exception_of_the_loop_body_comes_out_as_itself(kind: str) -> None:
    numbers = Numbers()
    error = ValueError("mine")
    before = living()

    async def scenario() -> None:
        async with Bulk(sources(numbers)[kind](), double, workers=3) as outcomes:
            async for _ in outcomes:
                raise error

    with pytest.raises(ValueError, match="mine") as caught:
        await scenario()
    assert caught.value is error
    assert error.__context__ is None
    assert error.__cause__ is None
    assert "__aexit__" not in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert numbers.closed
    assert living() == before


async def test_the_block_can_be_left_without_receiving_anything() -> None:
    numbers = Numbers()
    async with Bulk(numbers.asynchronous(), double, workers=3):
        pass
    assert numbers.pulled <= 3


async def test_an_iterator_that_is_no_generator_stays_open_for_its_owner(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "paths.txt"
    path.write_text("a\nb\nc\n")
    with path.open() as lines:
        async with Bulk(lines, _length, workers=1) as outcomes:
            async for _ in outcomes:
                break
        assert not lines.closed
    send, receive = anyio.create_memory_object_stream[str](1)
    async with send, receive:
        send.send_nowait("x")
        async with Bulk(receive, _length, workers=1) as strings:
            async for _ in strings:
                break
        send.send_nowait("y")
        assert receive.receive_nowait() == "y"


async def _length(text: str) -> int:
    return len(text)


async def test_a_generator_may_await_while_it_is_closed() -> None:
    """No worker's cancellation reaches into it: it is closed when they are gone, in the caller's own scope."""
    steps = []

    async def items() -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
        finally:
            await checkpoint()
            steps.append("closed")

    async with Bulk(items(), double, workers=2) as outcomes:
        async for _ in outcomes:
            break
    assert steps == ["closed"]


async def test_what_a_generator_raises_while_it_is_closed_is_raised() -> None:
    def items() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            raise OSError("cannot close")

    bulk = Bulk(items(), double, workers=2)
    before = living()
    await anext(await bulk.__aenter__())
    with pytest.raises(OSError, match="cannot close"):
        await bulk.__aexit__(None, None, None)
    assert living() == before


async def test_a_generator_that_swallows_the_cancellation_is_asked_for_nothing_more() -> None:
    pulled = 0

    async def items() -> AsyncIterator[int]:
        nonlocal pulled
        while True:
            pulled += 1
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                pass  # wrong, and it happens
            yield pulled

    async with aclosing(items()) as generator:  # type: ignore[type-var]
        with anyio.fail_after(5):
            async with Bulk(generator, double, workers=3):
                await rest()
    assert pulled == 1


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_an_exception_of_the_body_survives_a_cancellation_that_comes_while_the_workers_end() -> None:
    async def call(number: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                scope.cancel()
                await ticks(3)

    with pytest.raises(ValueError, match="mine"), anyio.CancelScope() as scope:  # noqa: PT012
        async with Bulk([1], call, workers=1):
            await rest()
            raise ValueError("mine")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_body_that_turns_a_native_cancellation_into_its_own_exception_has_its_way() -> None:
    async def scenario() -> None:
        async with Bulk(itertools.count(), Crew(), workers=2):
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                raise ValueError("mine") from None

    task = asyncio.create_task(scenario())
    await ticks(5)
    task.cancel()
    with pytest.raises(ValueError, match="mine"):
        await task


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_native_cancellation_while_the_workers_end_is_not_lost_and_not_early() -> None:
    crew_is_gone = False

    async def call(number: int) -> None:
        nonlocal crew_is_gone
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                task.cancel()
                await ticks(5)
                crew_is_gone = True

    async def scenario() -> None:
        async with Bulk([1], call, workers=1):
            await rest()

    task = asyncio.create_task(scenario())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert crew_is_gone


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_asyncio_timeout_around_the_block_is_a_timeout_and_leaves_the_task_uncancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    before = living()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.002), Bulk(itertools.count(), Crew(), workers=3) as outcomes:
            await anext(outcomes)
    assert task.cancelling() == 0
    assert living() == before
    await checkpoint()


async def test_a_loop_that_is_shielded_does_not_wait_for_workers_that_were_cancelled() -> None:
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        async with Bulk(itertools.count(), Crew(), workers=2) as outcomes:
            await rest()
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await rest()
                async for _ in outcomes:
                    raise AssertionError("there is no outcome")
    assert scope.cancelled_caught


async def _scenario(numbers: Numbers, kind: str, ordered: bool) -> int:
    """Everything a run meets: items that wait, calls that wait and fail, a body that waits, an early end."""
    received = 0

    async def call(number: int) -> int:
        await ticks(number % 4)
        if number % 5 == 4:
            raise ValueError(number)
        return number

    async with Bulk(sources(numbers)[kind](), call, workers=3, ordered=ordered) as outcomes:
        async for outcome in outcomes:
            await ticks(received % 3)
            received += 1
            if outcome.item == 12:
                break
    return received


@pytest.mark.parametrize("ordered", [False, True])
@both_kinds
async def test_a_cancelled_scope_leaves_nothing_behind_at_any_tick(kind: str, ordered: bool) -> None:
    before = living()
    cancelled = 0
    for tick in itertools.count():
        numbers = Numbers()
        finished = False
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()

            async def cancel_later(scope: anyio.CancelScope = scope, tick: int = tick) -> None:
                await ticks(tick)
                scope.cancel()

            group.start_soon(cancel_later)
            with scope:
                await _scenario(numbers, kind, ordered)
                finished = True
            group.cancel_scope.cancel()
        assert living() == before
        assert numbers.closed or numbers.pulled == 0
        assert scope.cancelled_caught or finished
        if finished:
            break
        cancelled += 1
    assert cancelled > 10


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("ordered", [False, True])
@both_kinds
async def test_a_native_cancel_leaves_nothing_behind_at_any_tick(kind: str, ordered: bool) -> None:
    before = asyncio.all_tasks()
    for tick in itertools.count():
        numbers = Numbers()
        task = asyncio.create_task(_scenario(numbers, kind, ordered))
        for _ in range(tick):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before
        assert numbers.closed or numbers.pulled == 0
    assert tick > 10


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_all_tasks_may_be_cancelled_at_once_as_the_end_of_asyncio_run_does() -> None:
    before = asyncio.all_tasks()
    numbers, crew = Numbers(), Crew()
    task = asyncio.create_task(drain(Bulk(numbers.asynchronous(), crew, workers=3)))
    await rest()
    assert crew.active == 3
    for each in asyncio.all_tasks() - before:
        each.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
    assert crew.active == 0
    assert numbers.closed


# Wrong use


@pytest.mark.parametrize("items", ["/api/x", b"/api/x", bytearray(b"/api/x"), 5, None, object(), double])
def test_items_that_are_not_many_are_refused(items: Any) -> None:
    with pytest.raises(ConfigurationError, match="`items`"):
        Bulk(items, double, workers=1)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, None, "4", float("inf")])
def test_workers_must_be_a_positive_whole_number(workers: Any) -> None:
    with pytest.raises(ConfigurationError, match="`workers`"):
        Bulk([1], double, workers=workers)


def test_call_and_key_must_be_functions() -> None:
    wrong: Any = "get"
    with pytest.raises(ConfigurationError, match="`call`"):
        Bulk([1], wrong, workers=1)
    with pytest.raises(ConfigurationError, match="`key`"):
        Bulk([1], double, key=wrong, workers=1)


async def test_iterating_without_entering_is_refused() -> None:
    bulk = Bulk([1], double, workers=1)
    with pytest.raises(ConfigurationError, match="async with"):
        async for _ in bulk:
            pass


async def test_entering_twice_is_refused() -> None:
    bulk = Bulk([1], double, workers=1)
    async with bulk:
        with pytest.raises(ConfigurationError, match="serves one"):
            await bulk.__aenter__()
    with pytest.raises(ConfigurationError, match="serves one"):
        await bulk.__aenter__()


async def test_outcomes_that_have_all_come_are_not_iterated_again() -> None:
    async with Bulk([1], double, workers=1) as outcomes:
        assert len([outcome async for outcome in outcomes]) == 1
        with pytest.raises(ConfigurationError, match="come once"):
            aiter(outcomes)


async def test_a_loop_that_was_left_can_be_gone_on_with() -> None:
    async with Bulk(range(9), double, workers=2, ordered=True) as outcomes:
        async for outcome in outcomes:
            if outcome.item == 3:
                break
        assert [outcome.item async for outcome in outcomes] == [4, 5, 6, 7, 8]


async def test_outcomes_are_not_received_after_the_block() -> None:
    async with Bulk(range(9), double, workers=2) as outcomes:
        await anext(outcomes)
    with pytest.raises(ConfigurationError, match="has ended"):
        async for _ in outcomes:
            pass


async def test_two_tasks_cannot_receive_outcomes_at_once() -> None:
    crew = Crew()
    async with Bulk(range(4), crew, workers=2) as outcomes, anyio.create_task_group() as group:
        group.start_soon(anext, outcomes)
        await rest()
        with pytest.raises(ConfigurationError, match="another task"):
            await anext(outcomes)
        crew.gate.set()


async def test_an_outcome_is_not_lost_when_waiting_for_it_is_given_up() -> None:
    crew = Crew()
    async with Bulk(range(4), crew, workers=2, ordered=True) as outcomes:
        with anyio.move_on_after(0.001):
            await anext(outcomes)
        crew.gate.set()
        assert [outcome.item async for outcome in outcomes] == [0, 1, 2, 3]


# Settled, and the journal


class Keys:
    """A journal in memory."""

    inputs_changed: str | None = None

    def __init__(self, *settled: str) -> None:
        self.known = dict.fromkeys(settled, True)
        self.settled: dict[str, bool] = {}
        self.seen: list[str] = []
        self.state: list[str] = []

    def open(self) -> None:
        self.state.append("open")

    def close(self) -> None:
        self.state.append("closed")

    def pulled(self, key: str) -> None:
        self.seen.append(key)

    def ended(self) -> None:
        self.state.append("ended")

    def is_settled(self, key: str) -> bool:
        return key in self.known

    def settle(self, key: str, *, ok: bool) -> None:
        assert self.state[0] == "open"
        assert self.state[-1] != "closed"
        self.settled[key] = ok


def names(keys: Iterable[int]) -> list[str]:
    """The names of keys that are whole numbers."""
    return [f"\0{key}" for key in keys]


async def test_an_outcome_is_settled_when_the_loop_body_that_received_it_has_ended() -> None:
    journal = Keys()
    async with Bulk(range(5), double, workers=2, ordered=True, journal=journal) as outcomes:
        async for outcome in outcomes:
            assert list(journal.settled) == names(range(outcome.item))
    assert journal.settled == dict.fromkeys(names(range(5)), True)
    assert journal.state == ["open", "ended", "closed"]
    assert journal.seen == names(range(5))


@pytest.mark.parametrize("leave", ["break", "raise"])
async def test_the_last_outcome_is_settled_by_a_break_and_not_by_an_exception(leave: str) -> None:
    journal = Keys()
    try:
        async with Bulk(range(5), double, workers=2, ordered=True, journal=journal) as outcomes:
            async for outcome in outcomes:
                if outcome.item == 2:
                    if leave == "break":
                        break
                    raise ValueError
    except ValueError:
        pass
    assert list(journal.settled) == names(range(3 if leave == "break" else 2))
    assert journal.state[-1] == "closed"


async def test_a_body_that_is_cancelled_does_not_settle_its_outcome_and_the_journal_is_closed() -> None:
    journal = Keys()
    with anyio.CancelScope() as scope:
        async with Bulk(range(5), double, workers=2, ordered=True, journal=journal) as outcomes:
            async for outcome in outcomes:
                if outcome.item == 2:
                    scope.cancel()
                    await checkpoint()
    assert list(journal.settled) == names(range(2))
    assert journal.state[-1] == "closed"


async def test_settled_items_are_passed_over_and_counted_and_failed_ones_are_settled_too() -> None:
    async def call(path: str) -> int:
        if path == "/api/3":
            raise ValueError
        return len(path)

    journal = Keys("/api/0", "/api/2")
    async with Bulk([f"/api/{number}" for number in range(5)], call, workers=2, journal=journal) as outcomes:
        items = [outcome.item async for outcome in outcomes]
        progress = outcomes.progress
    assert sorted(items) == ["/api/1", "/api/3", "/api/4"]
    assert journal.settled == {"/api/1": True, "/api/3": False, "/api/4": True}
    assert journal.seen == [f"/api/{number}" for number in range(5)]
    assert (progress.done, progress.failed, progress.skipped, progress.total, progress.eta) == (3, 1, 2, 5, 0.0)


async def test_passing_over_a_million_settled_items_lets_others_have_their_turn() -> None:
    journal = Keys()
    journal.is_settled = lambda key: True  # type: ignore[method-assign]
    seen, most = 0, 0

    async def other() -> None:
        nonlocal seen, most
        while True:
            await checkpoint()
            seen, most = len(journal.seen), max(most, len(journal.seen) - seen)

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        async with Bulk(range(1000), double, workers=2, journal=journal) as outcomes:
            assert [outcome async for outcome in outcomes] == []
        group.cancel_scope.cancel()
    assert 0 < most <= 200


async def test_a_drain_ends_the_passing_over_too() -> None:
    journal = Keys()
    journal.is_settled = lambda key: True  # type: ignore[method-assign]
    async with Bulk(itertools.count(), double, workers=2, journal=journal) as outcomes:
        await rest()
        outcomes.drain()
        await rest()
        seen = len(journal.seen)
        await rest()
        assert len(journal.seen) == seen
        assert [outcome async for outcome in outcomes] == []
    assert outcomes.progress.skipped > 0


async def test_each_key_has_a_name_of_its_own_in_the_journal(tmp_path: pathlib.Path) -> None:
    """Whole numbers are no texts, and no text is taken for one."""

    async def call(key: int | str) -> None:
        await checkpoint()

    keys: list[int | str] = [1, "1", "\x001", "\x00\x001", -1, "-1", "", "\x00", 0]
    for key in keys:
        async with Bulk([key], call, workers=1, journal=tmp_path / "run.db") as outcomes:
            assert [outcome.key async for outcome in outcomes] == [key]
    async with Bulk(keys, call, workers=1, journal=tmp_path / "run.db") as outcomes:
        assert [outcome.key async for outcome in outcomes] == []


@pytest.mark.parametrize("key", [1.5, None, True, b"x", ("a", 1)])
async def test_keys_that_a_journal_cannot_know_are_refused(key: Any) -> None:
    with pytest.raises(ConfigurationError, match="give the bulk a `key`"):
        await drain(Bulk([1], double, key=lambda _: key, workers=1, journal=Keys()))


async def test_a_journal_that_another_run_holds_is_refused_before_anything_is_pulled() -> None:
    journal, numbers = Keys(), Numbers()

    def refuse() -> None:
        raise ConfigurationError("another run holds it.")

    journal.open = refuse  # type: ignore[method-assign]
    before = living()
    with pytest.raises(ConfigurationError, match="another run"):
        await drain(Bulk(numbers.sync(), double, workers=2, journal=journal))
    assert numbers.pulled == 0
    assert journal.settled == {}
    assert living() == before


async def test_a_journal_that_cannot_be_written_says_so_and_is_closed() -> None:
    journal = Keys()

    def fail(key: str, *, ok: bool) -> None:
        raise OSError("the disk is full")

    journal.settle = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk is full"):
        await drain(Bulk(range(5), double, workers=2, journal=journal))
    assert journal.state[-1] == "closed"


async def test_a_last_outcome_that_cannot_be_settled_says_so_and_the_journal_is_closed() -> None:
    journal = Keys()

    def fail(key: str, *, ok: bool) -> None:
        raise OSError("the disk is full")

    journal.settle = fail  # type: ignore[method-assign]

    async def scenario() -> None:
        async with Bulk(range(5), double, workers=2, journal=journal) as outcomes:
            async for _ in outcomes:
                break

    with pytest.raises(OSError, match="disk is full"):
        await scenario()
    assert journal.state[-1] == "closed"


async def test_inputs_that_have_changed_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    journal = Keys()
    journal.inputs_changed = "the inputs have changed."
    await drain(Bulk(range(5), double, workers=2, journal=journal))
    assert caplog.messages == ["the inputs have changed."]


async def test_a_path_names_a_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    opened: list[Any] = []

    class Journal(Keys):
        def __init__(self, path: str) -> None:
            super().__init__()
            opened.append((path, self))

    monkeypatch.setitem(sys.modules, "layer_async._journal", types.SimpleNamespace(Journal=Journal))
    for path in (str(tmp_path / "run.db"), tmp_path / "run.db"):
        await drain(Bulk(range(3), double, workers=2, journal=path))
        assert opened[-1][0] == path
        assert sorted(opened[-1][1].settled) == names(range(3))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_run_that_is_cancelled_while_its_journal_opens_leaves_it_closed() -> None:
    journal, began, may_open = Keys(), threading.Event(), threading.Event()

    def slowly() -> None:
        began.set()
        may_open.wait(5)
        journal.state.append("open")

    journal.open = slowly  # type: ignore[method-assign]
    task = asyncio.create_task(drain(Bulk(range(3), double, workers=2, journal=journal)))
    while not began.is_set():
        await checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_open.set()
    with anyio.fail_after(5):
        while journal.state != ["closed", "open", "closed"]:
            await checkpoint()


# Progress, stopping, draining


async def test_progress_says_how_far_a_bulk_has_come_and_stays_after_it() -> None:
    crew = Crew()
    crew.gate.set()
    async with Bulk(range(10), crew, workers=2, ordered=True) as outcomes:
        assert outcomes.progress.done == 0
        async for outcome in outcomes:
            progress = outcomes.progress
            assert outcome.item < progress.done <= 10
            assert progress.total == 10
    assert (outcomes.progress.done, outcomes.progress.eta, outcomes.progress.held) == (10, 0.0, 0)


async def test_items_of_no_length_have_no_total() -> None:
    class Odd:
        def __len__(self) -> int:
            raise OSError("who knows")

        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    items: Any
    for items in (Odd(), Numbers(3).sync(), Numbers(3).asynchronous()):
        async with Bulk(items, double, workers=2) as outcomes:
            assert len([outcome async for outcome in outcomes]) == 3
        assert (outcomes.progress.total, outcomes.progress.eta) == (None, None)


@pytest.mark.parametrize("rule", [3, 0.1, lambda progress: progress.failed == 3], ids=["count", "rate", "function"])
async def test_a_bulk_that_is_told_to_stop_delivers_what_it_has_begun_and_pulls_nothing_more(rule: Any) -> None:
    async def call(number: int) -> int:
        await ticks(number % 3)
        if number % 7 == 6:
            raise ValueError(number)
        return number

    numbers = Numbers()
    before = living()
    bulk = Bulk(numbers.sync(), call, workers=4, stop_when=rule)
    async with bulk as outcomes:
        got = [outcome.item async for outcome in outcomes]
    assert sorted(got) == list(range(numbers.pulled))
    assert numbers.pulled < 40
    assert outcomes.stopped is not None
    assert outcomes.progress.failed >= 2
    assert living() == before


async def test_an_error_of_the_predicate_ends_the_run_and_is_raised() -> None:
    got: list[int] = []
    with pytest.raises(ZeroDivisionError):
        await drain(
            Bulk(itertools.count(), double, workers=2, stop_when=lambda progress: 2 // (5 - progress.done) > 2), got
        )
    assert len(got) >= 5


async def test_a_bulk_that_comes_to_its_end_has_not_stopped() -> None:
    async with Bulk(range(5), double, workers=2, stop_when=3) as outcomes:
        assert len([outcome async for outcome in outcomes]) == 5
        outcomes.drain()
    assert outcomes.stopped is None


@pytest.mark.parametrize("ordered", [False, True])
async def test_draining_lets_what_is_under_way_finish_and_ends_the_loop(ordered: bool) -> None:
    numbers, crew = Numbers(), Crew()
    async with Bulk(numbers.sync(), crew, workers=3, ordered=ordered) as outcomes:
        await rest()
        outcomes.drain()
        outcomes.drain()
        crew.gate.set()
        assert sorted([outcome.item async for outcome in outcomes]) == [0, 1, 2]
    assert numbers.pulled == 3
    assert outcomes.stopped == "drained."


async def test_draining_does_not_wait_for_items_that_do_not_come() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with Bulk(items(), double, workers=3) as outcomes:
            async for _ in outcomes:
                outcomes.drain()
    assert outcomes.stopped == "drained."


# Outages


class Server:
    """A call to a server that is away now and then, as a client's call tells a bulk of it."""

    def __init__(self) -> None:
        self.is_away = False
        self.broken: set[int] = set()
        self.sent: list[int] = []
        self.active = 0
        self.most = 0
        self.acts = False
        self.on_call: Callable[[int], None] = lambda number: None

    async def __call__(self, number: int) -> int:
        record = current_item.get()
        assert record is not None
        self.sent.append(number)
        self.active += 1
        self.most = max(self.most, self.active)
        self.on_call(number)
        try:
            record.attempts = (record.attempts or 0) + 1
            await ticks(2)
            if self.is_away or number in self.broken:
                error = ServerError("away", status_code=503)
                record.outage = error
                record.has_acted = self.acts
                raise error
            return number
        finally:
            self.active -= 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that are drawn from less than a millisecond."""
    monkeypatch.setattr(_outage, "FIRST_WAIT", 0.0005)
    monkeypatch.setattr(_outage, "LONGEST_WAIT", 0.0005)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("ordered", [False, True])
@both_kinds
async def test_an_outage_loses_no_item_and_sends_one_probe_at_a_time(kind: str, ordered: bool, workers: int) -> None:
    server, numbers = Server(), Numbers(40)
    before = living()

    def fail_for_a_while(number: int) -> None:
        server.is_away = 30 <= len(server.sent) < 60
        if 30 + 2 * workers + 2 < len(server.sent) <= 60:
            assert server.active == 1

    server.on_call = fail_for_a_while
    async with Bulk(sources(numbers)[kind](), server, workers=workers, ordered=ordered) as outcomes:
        got = {outcome.item: outcome async for outcome in outcomes}
    assert sorted(got) == list(range(40))
    assert all(outcome.ok for outcome in got.values())
    attempts = sum(outcome.attempts or 0 for outcome in got.values())
    assert attempts == len(server.sent)
    assert server.most <= workers
    assert outcomes.stopped is None
    assert living() == before


@pytest.mark.usefixtures("quick")
async def test_what_is_held_is_no_more_than_the_workers_had_and_progress_tells() -> None:
    server, numbers, journal = Server(), Numbers(), Keys()
    server.is_away = True
    async with Bulk(numbers.sync(), server, workers=4, key=str, journal=journal) as outcomes:
        while len(server.sent) < 12:
            await checkpoint()
        assert numbers.pulled <= 6
        assert 4 <= outcomes.progress.held <= 6
        assert outcomes.progress.done == 0
        server.is_away = False
        async for outcome in outcomes:
            assert outcome.ok
            if outcomes.progress.held == 0:
                break
        assert outcomes.progress.done >= 4


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("workers", [1, 3])
async def test_an_item_with_a_trouble_of_its_own_is_no_outage_and_holds_up_nobody(workers: int) -> None:
    server = Server()
    server.broken = {5, 6, 11}
    journal = Keys()
    async with Bulk(range(200), server, workers=workers, journal=journal) as outcomes:
        failed = {outcome.item: outcome async for outcome in outcomes if not outcome.ok}
    assert sorted(failed) == [5, 6, 11]
    assert max(outcome.attempts or 0 for outcome in failed.values()) <= 20
    assert journal.settled["\x005"] is False
    assert outcomes.stopped is None


@pytest.mark.usefixtures("quick")
async def test_an_item_is_held_whose_own_trouble_an_outage_followed() -> None:
    server = Server()

    def fail_once(number: int) -> None:
        record = current_item.get()
        assert record is not None
        server.is_away = server.sent == [0, 1]
        if server.is_away:  # its first attempt failed before item 0 was answered, the others since
            record.last_attempts = [
                AttemptInfo(n, "503", 503, 0.0, delay) for n, delay in ((1, 100.0), (2, 0.0), (3, None))
            ]

    server.on_call = fail_once
    async with Bulk(range(2), server, workers=1) as outcomes:
        assert all([outcome.ok async for outcome in outcomes])
    assert server.sent == [0, 1, 1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ordered", [False, True])
async def test_after_outage_timeout_the_held_have_their_errors_and_the_rest_stays_unread(ordered: bool) -> None:
    server, numbers, journal = Server(), Numbers(), Keys()
    server.broken = set(range(10, 100))
    before = living()
    bulk = Bulk(numbers.sync(), server, workers=3, ordered=ordered, outage_timeout=0.01, journal=journal)
    async with bulk as outcomes:
        got = {outcome.item: outcome async for outcome in outcomes}
    assert sorted(got) == list(range(numbers.pulled))
    assert numbers.pulled <= 10 + 3 + 8 + 1
    assert outcomes.stopped is not None
    assert "outage_timeout=0.01" in outcomes.stopped
    for number, outcome in got.items():
        assert isinstance(outcome.error, ServerError) == (number >= 10)
    assert sorted(journal.settled) == names(range(10))  # the others are for the next run
    assert living() == before


@pytest.mark.usefixtures("quick")
async def test_draining_ends_the_wait_of_the_held() -> None:
    server = Server()
    server.is_away = True
    async with Bulk(range(3), server, workers=3) as outcomes:
        while len(server.sent) < 10:
            await checkpoint()
        outcomes.drain()
        got = [outcome async for outcome in outcomes]
    assert sorted(outcome.item for outcome in got) == [0, 1, 2]
    assert all(isinstance(outcome.error, ServerError) for outcome in got)
    assert outcomes.stopped == "drained."


@pytest.mark.usefixtures("quick")
async def test_an_item_pulled_slowly_while_an_outage_begins_is_tried_before_it_is_given_up() -> None:
    server = Server()
    server.is_away = True

    async def items() -> AsyncIterator[int]:
        yield 0
        yield 1
        yield 2
        while len(server.sent) < 8:
            await checkpoint()
        yield 3
        await anyio.sleep_forever()

    async with Bulk(items(), server, workers=4, outage_timeout=0.02) as outcomes:
        got = [outcome async for outcome in outcomes]
    assert sorted(outcome.item for outcome in got) == [0, 1, 2, 3]
    assert 3 in server.sent


@pytest.mark.usefixtures("quick")
async def test_what_must_not_be_done_twice_is_settled_as_it_is_and_the_others_are_spared() -> None:
    server, numbers, journal = Server(), Numbers(), Keys()
    server.is_away = server.acts = True
    async with Bulk(numbers.sync(), server, workers=3, outage_timeout=0.01, journal=journal) as outcomes:
        got = [outcome async for outcome in outcomes]
    assert sorted(outcome.item for outcome in got) == sorted(server.sent) == list(range(numbers.pulled))
    assert numbers.pulled < 100  # one at a time, with waits between
    assert len(journal.settled) == numbers.pulled
    assert outcomes.stopped is not None


async def test_without_outage_timeout_nothing_is_held() -> None:
    server = Server()
    server.is_away = True
    async with Bulk(range(30), server, workers=3, outage_timeout=None) as outcomes:
        assert [outcome.ok async for outcome in outcomes] == [False] * 30
    assert len(server.sent) == 30


@pytest.mark.usefixtures("quick")
async def test_an_answer_of_any_kind_ends_an_outage_and_a_local_error_does_not() -> None:
    server = Server()
    first = True

    def act(number: int) -> None:
        nonlocal first
        server.is_away = len(server.sent) < 8
        if number == 3:
            raise ValueError("of the user's own")
        if not server.is_away and first:
            first = False
            raise NotFoundError("gone", status_code=404)

    server.on_call = act
    async with Bulk(range(20), server, workers=4) as outcomes:
        errors = [type(outcome.error) async for outcome in outcomes if outcome.error is not None]
    assert sorted(error.__name__ for error in errors) == ["NotFoundError", "ValueError"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("way", ["break", "raise", "cancel"])
async def test_leaving_while_items_are_held_and_one_probes_leaves_nothing_behind(way: str) -> None:
    server, numbers = Server(), Numbers()
    server.is_away = True
    before = living()
    with anyio.CancelScope() as scope:
        try:
            async with Bulk(numbers.sync(), server, workers=4):
                while len(server.sent) < 10:
                    await checkpoint()
                if way == "raise":
                    raise ValueError
                if way == "cancel":
                    scope.cancel()
                    await checkpoint()
        except ValueError:
            pass
    assert server.active == 0
    assert numbers.closed
    assert living() == before


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("native", [False, True])
async def test_a_cancellation_at_any_tick_of_an_outage_leaves_nothing_behind(native: bool, anyio_backend: str) -> None:
    if native and anyio_backend == "trio":
        return
    before = living()

    async def scenario(server: Server, numbers: Numbers) -> None:
        def act(number: int) -> None:
            server.is_away = 5 <= len(server.sent) < 14

        server.on_call = act
        async with Bulk(numbers.asynchronous(), server, workers=3) as outcomes:
            async for outcome in outcomes:
                if outcome.item == 8:
                    outcomes.drain()

    for tick in itertools.count(0, 3):
        server, numbers = Server(), Numbers()
        finished = False
        if native:
            task = asyncio.create_task(scenario(server, numbers))
            for _ in range(tick):
                await asyncio.sleep(0)
            finished = task.done()
            task.cancel()
            await asyncio.wait([task])
        else:
            async with anyio.create_task_group() as group:
                scope = anyio.CancelScope()

                async def cancel_later(scope: anyio.CancelScope = scope, tick: int = tick) -> None:
                    await ticks(tick)
                    scope.cancel()

                group.start_soon(cancel_later)
                with scope:
                    await scenario(server, numbers)
                    finished = True
                group.cancel_scope.cancel()
        assert server.active == 0
        assert living() == before
        assert numbers.closed or numbers.pulled == 0
        if finished:
            break
    assert tick > 20


async def test_a_task_that_outlives_its_item_works_for_nobody() -> None:
    records: list[ItemRecord] = []

    async def call(number: int) -> None:
        record = current_item.get()
        assert record is not None
        assert record.is_open
        records.append(record)

    await drain(Bulk(range(3), call, workers=2))
    assert not any(record.is_open for record in records)


# Refused tokens


class Door:
    """A call whose tokens are refused from some item on."""

    def __init__(self, lapses_at: int, *, circuit: bool) -> None:
        self.lapses_at = lapses_at
        self.circuit = circuit
        self.refused = 0

    async def __call__(self, number: int) -> int:
        record = current_item.get()
        assert record is not None
        await checkpoint()
        if number < self.lapses_at:
            return number
        self.refused += 1
        error = AuthenticationError("refused", status_code=401)
        if self.circuit and self.refused > 2:
            record.refusal = error
        raise error


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("circuit", [True, False], ids=["circuit", "one path only"])
async def test_refused_tokens_end_the_run_with_one_error_and_settle_nothing(circuit: bool, workers: int) -> None:
    door, numbers, journal = Door(10, circuit=circuit), Numbers(), Keys()
    got: list[int] = []
    with pytest.raises(AuthenticationError):
        await drain(Bulk(numbers.sync(), door, workers=workers, journal=journal), got)
    assert set(range(10)) <= set(got)
    assert len(got) <= 10 + 2 * workers  # the last successes may come after the first refusals
    assert numbers.pulled <= 10 + 2 * workers + 1
    assert sorted(journal.settled) == names(range(10))
    assert numbers.closed


async def test_a_401_now_and_then_is_the_items_own() -> None:
    async def call(number: int) -> int:
        if number % 2:
            raise AuthenticationError("refused", status_code=401)
        return number

    async with Bulk(range(20), call, workers=1) as outcomes:
        assert [outcome.ok async for outcome in outcomes] == [True, False] * 10


async def test_refused_tokens_do_not_wait_for_slow_calls_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bulk, "GRACE", 0.001)
    crew = Crew()

    async def call(number: int) -> int:
        record = current_item.get()
        assert record is not None
        if number < 2:
            return await crew(number)
        record.refusal = AuthenticationError("refused", status_code=401)
        raise record.refusal

    with anyio.fail_after(5), pytest.raises(AuthenticationError):
        await drain(Bulk(itertools.count(), call, workers=4))
    assert crew.active == 0


# What is no end


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
async def test_an_end_that_is_none_is_an_error(error: type[Exception]) -> None:
    def key(number: int) -> int:
        if number == 3:
            raise error
        return number

    class Faulty:
        """An iterator whose parts raise what only an end may."""

        def __init__(self) -> None:
            self.left = 3

        def __iter__(self) -> Self:
            return self

        def __next__(self) -> int:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return self.left

    class AsyncFaulty:
        def __init__(self) -> None:
            self.left = 3

        def __aiter__(self) -> Self:
            return self

        def __anext__(self) -> Awaitable[int]:
            if not self.left:
                raise StopIteration
            self.left -= 1
            return double(self.left)

    cases: list[tuple[Any, dict[str, Any]]] = [(range(9), {"key": key}), (Faulty(), {}), (AsyncFaulty(), {})]
    for items, options in cases:
        got: list[int] = []
        with pytest.raises(RuntimeError, match="raised Stop"):
            await drain(Bulk(items, double, workers=2, **options), got)
        assert len(got) == 3


@pytest.mark.parametrize("wrong", [5, b"run.db", object(), Keys, {"open": 1}, pytest.param(10**9999, id="huge")])
def test_what_is_no_journal_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="`journal` takes a Journal, the path of one"):
        Bulk([1], double, workers=1, journal=wrong)


@pytest.mark.parametrize("wrong", [-1, "5", True, float("nan"), 10**400, pytest.param(10**9999, id="huge")])
def test_outage_timeout_takes_seconds(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="`outage_timeout`"):
        Bulk([1], double, workers=1, outage_timeout=wrong)


# All or nothing


@both_kinds
async def test_run_all_returns_the_values_in_the_order_of_the_items(kind: str) -> None:
    async def call(number: int) -> int:
        await ticks(20 - number)
        return 2 * number

    assert await run_all(sources(Numbers(20))[kind](), call, workers=6) == [2 * number for number in range(20)]
    assert_type(await run_all([], double, workers=6), list[int])
    assert await run_all([], double, workers=6) == []


async def test_the_first_failure_of_run_all_cancels_the_rest_and_is_raised_as_itself() -> None:
    crew = Crew()
    error = ValueError("mine")
    numbers = Numbers()
    before = living()

    async def call(number: int) -> int:
        if number == 2:
            await rest()
            raise error
        return await crew(number)

    with pytest.raises(ValueError, match="mine") as caught:
        await run_all(numbers.asynchronous(), call, workers=4)
    assert caught.value is error
    assert traceback.extract_tb(error.__traceback__)[-1].name == "call"
    assert error.__context__ is None
    assert crew.begun[:3] == [0, 1, 3]
    assert numbers.pulled <= 5  # the worker that failed may have begun another pull before the loop heard of it
    assert crew.active == 0
    assert numbers.closed
    assert living() == before


async def test_run_all_does_not_wait_for_calls_when_the_items_fail_or_the_client_is_closed() -> None:
    crew = Crew()
    with pytest.raises(OSError, match="no more"):
        await run_all(Numbers(3, error=OSError("no more")).sync(), crew, workers=5)
    assert crew.active == 0

    async def call(number: int) -> int:
        if number == 2:
            raise ClientClosedError("closed")
        return await crew(number)

    with pytest.raises(ClientClosedError):
        await run_all(itertools.count(), call, workers=5)
    assert crew.active == 0


@pytest.mark.parametrize("workers", [0, None])
async def test_run_all_refuses_what_bulk_refuses(workers: Any) -> None:
    with pytest.raises(ConfigurationError, match="`workers`"):
        await run_all([1], double, workers=workers)


# Whatever happens


@settings(deadline=None, max_examples=150)
@given(
    backend=st.sampled_from(BACKENDS),
    latencies=st.lists(st.integers(0, 6), max_size=40),
    failing=st.sets(st.integers(0, 40)),
    workers=st.integers(1, 8),
    ordered=st.booleans(),
    kind=st.sampled_from(["sync", "async"]),
    pauses=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    breaks_off=st.booleans(),
)
def test_every_item_has_exactly_one_outcome(
    backend: str,
    latencies: list[int],
    failing: set[int],
    workers: int,
    ordered: bool,
    kind: str,
    pauses: list[int],
    breaks_off: bool,
) -> None:
    error = OSError("the items break off") if breaks_off else None
    numbers = Numbers(len(latencies), error=error)

    async def call(number: int) -> int:
        await ticks(latencies[number])
        if number in failing:
            raise ValueError(number)
        return 2 * number

    async def run() -> list[Outcome[int, int]]:
        got: list[Outcome[int, int]] = []
        pause = itertools.cycle(pauses)
        before = living()
        bulk = Bulk(sources(numbers)[kind](), call, workers=workers, ordered=ordered)
        try:
            async with bulk as outcomes:
                async for outcome in outcomes:
                    got.append(outcome)
                    assert numbers.pulled - len(got) <= bulk._hand_over.window
                    await ticks(next(pause))
        except OSError:
            assert error is not None
        else:
            assert error is None
        assert living() == before
        return got

    got = anyio.run(run, backend=backend)
    items = [outcome.item for outcome in got]
    assert (items if ordered else sorted(items)) == list(range(len(latencies)))
    for outcome in got:
        assert outcome.ok == (outcome.item not in failing)
        assert outcome.value == (2 * outcome.item if outcome.ok else None)
        assert isinstance(outcome.error, ValueError) == (not outcome.ok)
