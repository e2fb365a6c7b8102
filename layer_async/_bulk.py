"""Many calls over many items: `Bulk` and its `Outcome`s, and `run_all` for those who want all or nothing.

This room owns the concurrency over any one-argument call; it knows no HTTP. Rules: never a task per item, but at most
`workers` tasks that pull from one iterator, one pull at a time, and only while there is room in the window (items
pulled whose outcome the loop has not received), so memory does not grow with the number of items. A failed item is an
outcome, not the end of the run; every item that was pulled has its outcome before an error of the iterator is raised.
When the `async with` ends, for whatever reason, no worker is left, the generator is closed, and what is raised is the
thing itself, in no group. All state changes between two awaits, so nothing here needs a lock but the pull.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, Generic, Never, Self, cast, overload

import anyio
import attrs
from typing_extensions import TypeVar

from ._errors import ClientClosedError, ConfigurationError

__all__ = ["Bulk", "Outcome", "Outcomes"]

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T", default=K)  # the item: its own key, unless `key=` makes another
Item = TypeVar("Item")
Result = TypeVar("Result")

# How many items may be under way or waiting for the loop, for each worker. In order, a slow item holds up those behind
# it: a longer window keeps the other workers busy meanwhile.
WINDOW_AS_COMPLETED = 2
WINDOW_IN_ORDER = 4


@attrs.define(eq=False)
class ItemRecord:
    """What a call knows of the bulk that it works for, and tells it.

    `is_patient`: the item is to wait out any number of 429s. `attempts`: how many attempts were made for it (None: its
    call does not say).
    """

    is_patient: bool = True
    attempts: int | None = None


current_item: ContextVar[ItemRecord | None] = ContextVar("layer_async.current_item", default=None)
"""The record of the item that the running code works for, a new one for each item; None outside of a bulk's calls."""


@attrs.frozen
class Outcome(Generic[K, V, T]):
    """What became of one item.

    `item` is the item as it was pulled, `key` what `key=` made of it (else the item itself). `value` is what the call
    returned, or `error` what it raised; the other one is None. `attempts` says how many attempts the call made on the
    wire (None where the call does not tell), `elapsed` how many seconds it took, with all its waits.
    """

    item: T
    key: K
    value: V | None
    error: Exception | None
    attempts: int | None
    elapsed: float
    # As the error was caught. Each raise writes the frames of its caller into the error: the next starts from here.
    _traceback: TracebackType | None = attrs.field(
        init=False, repr=False, eq=False, default=attrs.Factory(lambda self: _traceback_of(self.error), takes_self=True)
    )

    @property
    def ok(self) -> bool:
        """Whether the call returned, so that `value` counts."""
        return self.error is None

    def unwrap(self) -> V:
        """The value; raises the error, as the call raised it, where there is one."""
        if self.error is not None:
            raise self.error.with_traceback(self._traceback)
        return cast(V, self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Tracebacks cannot be pickled or copied.
        return Outcome, (self.item, self.key, self.value, self.error, self.attempts, self.elapsed)


def _traceback_of(error: Exception | None) -> TracebackType | None:
    return None if error is None else error.__traceback__


@attrs.define(eq=False)
class _Place(Generic[K, V, T]):
    """An item's place in the line. Done without an outcome: its call ended the whole run."""

    item: T
    key: K
    done: bool = False
    outcome: Outcome[K, V, T] | None = None


class _HandOver(Generic[K, V, T]):
    """Where the workers hand outcomes to the loop, and stop while the loop is slow.

    A deque, and two events that exist only while somebody waits: cheaper than a memory object stream, and it keeps the
    order. The window bounds how many items have been pulled whose outcome the loop has not received.
    """

    def __init__(
        self, *, window: int, ordered: bool, on_settled: Callable[[Outcome[K, V, T]], None] | None = None
    ) -> None:
        self.window = window
        self.ordered = ordered
        self.on_settled = on_settled
        self.line: deque[_Place[K, V, T]] = deque()  # in order: all that is under way; else: what is done
        self.outstanding = 0
        self.arrival: anyio.Event | None = None  # the loop waits for it
        self.vacancy: anyio.Event | None = None  # the worker whose turn it is to pull waits for it
        self.ended = False  # nothing more is pulled
        self.at_once = False  # whether `error` is raised without waiting for what is under way
        self.error: BaseException | None = None
        self.finished = False  # the loop has met the end
        self.closed = False  # the block has ended
        self.received: Outcome[K, V, T] | None = None  # by the loop, whose body is not known to have ended

    async def wait_for_room(self) -> None:
        if self.outstanding >= self.window:
            self.vacancy = anyio.Event()
            try:
                await self.vacancy.wait()
            finally:
                self.vacancy = None

    def admit(self, item: T, key: K) -> _Place[K, V, T]:
        place: _Place[K, V, T] = _Place(item, key)
        self.outstanding += 1
        if self.ordered:
            self.line.append(place)
        return place

    def put(self, place: _Place[K, V, T], outcome: Outcome[K, V, T] | None) -> None:
        place.outcome = outcome
        place.done = True
        if not self.ordered:
            self.line.append(place)
        if self.line[0].done:
            self.wake()

    def end(self, error: BaseException | None = None, *, at_once: bool = False) -> None:
        """Pull nothing more; the first `error` is raised once all outcomes have been received, or `at_once`."""
        self.ended = True
        self.at_once = self.at_once or at_once
        if self.error is None:
            self.error = error
        self.wake()

    def wake(self) -> None:
        if self.arrival is not None:
            self.arrival.set()

    async def receive(self) -> Outcome[K, V, T] | None:
        """The next outcome; None at the end, where `error` may say why."""
        while (outcome := self.take()) is None:
            if self.ended and (self.outstanding == 0 or (self.at_once and self.error is not None)):
                break
            self.arrival = anyio.Event()
            try:
                await self.arrival.wait()
            finally:
                self.arrival = None
        self.received = outcome
        return outcome

    def take(self) -> Outcome[K, V, T] | None:
        while self.line and self.line[0].done:
            outcome = self.line.popleft().outcome
            self.outstanding -= 1
            if self.vacancy is not None:
                self.vacancy.set()
            if outcome is not None:
                return outcome
        return None

    def settle(self) -> None:
        """An outcome is settled when the loop body that received it has ended."""
        outcome, self.received = self.received, None
        if outcome is not None and self.on_settled is not None:
            self.on_settled(outcome)

    def close(self) -> None:
        self.closed = True
        self.error = None
        self.line.clear()


class Outcomes(AsyncIterator[Outcome[K, V, T]]):
    """The outcomes of a bulk, as they complete or in the order of the items: for `async for` inside the `async with`.

    Leaving the loop early is fine, and so is going on later with another one.
    """

    def __init__(self, hand_over: _HandOver[K, V, T]) -> None:
        self._hand_over = hand_over

    def __aiter__(self) -> Self:
        """These outcomes; raises `ConfigurationError` when all have been received already."""
        if self._hand_over.finished:
            raise ConfigurationError("the outcomes of a bulk come once, and all of them have been received already.")
        return self

    async def __anext__(self) -> Outcome[K, V, T]:
        """The next outcome, or the end.

        At the end, raises what the items' iterator or `key` raised, or `ClientClosedError` when the client was closed
        during the run. Raises `ConfigurationError` outside of the `async with`, and for two tasks at once.
        """
        if self._hand_over.closed:
            raise ConfigurationError("the `async with` of this bulk has ended, and with it its outcomes.")
        if self._hand_over.arrival is not None:
            raise ConfigurationError("another task is waiting for the outcomes of this bulk: one loop receives them.")
        self._hand_over.settle()
        outcome = await self._hand_over.receive()
        if outcome is not None:
            return outcome
        self._hand_over.finished = True
        error, self._hand_over.error = self._hand_over.error, None
        if error is None:
            raise StopAsyncIteration
        try:
            raise error
        finally:
            del error  # else the error and this frame hold each other


class Bulk(Generic[K, V, T]):
    """Calls `call` with each of `items`, `workers` at a time: `async with Bulk(…) as outcomes: async for outcome in …`.

    Arguments:
        items: An iterable or async iterable; it may be a generator, and endless. The workers pull from it one at a
            time, whenever one of them is free. An async generator is advanced by several tasks in turn, so it must not
            hold a cancel scope, timeout or task group open across a `yield`; a generator is closed at the end.
        call: An async function of one argument. An `Exception` that it raises is the item's outcome; only
            `ClientClosedError` ends the run.
        key: Makes the `key` of an outcome from its item; called once an item, in their order. An exception of it ends
            the run, as an exception of `items` does: the loop raises it once it has received all other outcomes.
        workers: How many calls may be under way at once. At most twice as many items (four times with `ordered`) have
            been pulled and not been received by the loop.
        ordered: Whether outcomes come in the order of the items instead of as they complete.

    Leaving the block (by `break`, an exception, a cancellation) cancels the calls under way and waits until they are
    gone. A bulk serves one `async with`. Raises `ConfigurationError` when an argument or its use is wrong.
    """

    @overload
    def __init__(
        self: Bulk[Item, Result, Item],
        items: Iterable[Item] | AsyncIterable[Item],
        call: Callable[[Item], Awaitable[Result]],
        *,
        key: None = None,
        workers: int,
        ordered: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        items: Iterable[T] | AsyncIterable[T],
        call: Callable[[T], Awaitable[V]],
        *,
        key: Callable[[T], K],
        workers: int,
        ordered: bool = False,
    ) -> None: ...

    def __init__(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        call: Callable[[Any], Awaitable[Any]],
        *,
        key: Callable[[Any], Any] | None = None,
        workers: int,
        ordered: bool = False,
    ) -> None:
        _check(items, call, key, workers)
        self._items: Iterable[T] | AsyncIterable[T] | None = items
        self._call: Callable[[T], Awaitable[V]] = call
        self._key: Callable[[T], K] | None = key
        self._workers = workers
        self._ordered = ordered
        self._is_patient = True
        self._on_settled: Callable[[Outcome[K, V, T]], None] | None = None

    def __aiter__(self) -> Never:
        """Refuses: outcomes come from `async with`, which is what ends the workers."""
        raise ConfigurationError(
            "a bulk is entered first: `async with bulk as outcomes: async for outcome in outcomes`."
        )

    async def __aenter__(self) -> Outcomes[K, V, T]:
        """Start the first worker; the others follow as there are items for them."""
        items, self._items = self._items, None
        if items is None:
            raise ConfigurationError("a bulk serves one `async with`: its items have been pulled. Make another.")
        self._iterator: object
        self._pull: Callable[[], Awaitable[T]]
        if isinstance(items, AsyncIterable):
            self._iterator = asynchronous = aiter(items)
            self._pull = asynchronous.__anext__
        else:
            self._iterator = synchronous = iter(items)
            self._pull = partial(_advance, synchronous)
        self._hand_over = _HandOver[K, V, T](
            window=self._workers * (WINDOW_IN_ORDER if self._ordered else WINDOW_AS_COMPLETED),
            ordered=self._ordered,
            on_settled=self._on_settled,
        )
        self._turn = anyio.Lock(fast_acquire=True)
        # A scope for each worker: the group's own holds this task too, and would have to be told from a cancellation
        # that comes from outside.
        self._scopes: list[anyio.CancelScope] = []
        self._unstarted = self._workers
        self._group = await anyio.create_task_group().__aenter__()
        self._start_worker()
        return Outcomes(self._hand_over)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel the calls under way, wait until they are gone, and close the items if they are a generator."""
        self._hand_over.end()
        for scope in self._scopes:
            scope.cancel()
        # From here on this task only waits for workers that are cancelled already. The block's own exception is not
        # shown to the group, which would wrap it, and is not to be replaced by a cancellation from further out.
        self._group.cancel_scope.shield = True
        failure: BaseException | None = None
        try:
            await self._group.__aexit__(None, None, None)
        except BaseExceptionGroup as failures:  # a call raised KeyboardInterrupt or the like
            failure = failures.exceptions[0]
        finally:
            self._hand_over.close()
            await self._close_iterator()
        try:
            if failure is not None:
                raise failure
        finally:
            del failure
        if exc is None:
            self._hand_over.settle()

    async def _close_iterator(self) -> None:
        """Close a generator, which nobody can go on with once it has stopped anywhere; never the caller's files."""
        if isinstance(self._iterator, AsyncGenerator):
            await self._iterator.aclose()
        elif isinstance(self._iterator, Generator):
            self._iterator.close()

    def _start_worker(self) -> None:
        self._unstarted -= 1
        scope = anyio.CancelScope()
        self._scopes.append(scope)
        self._group.start_soon(self._work, scope, name="layer_async bulk worker")

    async def _work(self, scope: anyio.CancelScope) -> None:
        with scope:
            try:
                while (place := await self._next()) is not None:
                    record = ItemRecord(self._is_patient)
                    token = current_item.set(record)
                    outcome = await self._serve(place.item, place.key, record)
                    current_item.reset(token)
                    self._hand_over.put(place, outcome)
            except BaseException as error:
                # It passes; but the loop, which may be shielded from it, must not wait for this worker any more.
                self._hand_over.end(error, at_once=True)
                raise

    async def _next(self) -> _Place[K, V, T] | None:
        """Wait for this worker's turn and for room, then pull; None when there is nothing more to do."""
        if self._turn.locked():
            await self._turn.acquire()
        else:
            self._turn.acquire_nowait()
        try:
            await self._hand_over.wait_for_room()
            if self._hand_over.ended:
                return None
            item = await self._pull()
            key = cast(K, item) if self._key is None else self._key(item)
            # Each item calls two more workers to work: few items have few, and many have all of them soon.
            for _ in range(min(2, self._unstarted)):
                self._start_worker()
            return self._hand_over.admit(item, key)
        except StopAsyncIteration:
            self._hand_over.end()
        except Exception as error:
            # Of the user's iterator or key, whatever it be: it waits until the calls under way have their outcomes, and
            # is raised by the loop then.
            self._hand_over.end(error)
        finally:
            self._turn.release()
        return None

    async def _serve(self, item: T, key: K, record: ItemRecord) -> Outcome[K, V, T] | None:
        """Call once. This frame is part of an error's traceback: it must not hold the error or the outcome."""
        began = anyio.current_time()
        try:
            pending = self._call(item)
            if isinstance(pending, Awaitable):
                value = await pending
                return Outcome(item, key, value, None, record.attempts, anyio.current_time() - began)
        except ClientClosedError as error:  # no other item can fare better
            self._hand_over.end(error)
            return None
        except Exception as error:  # a failed item is an outcome, whatever the user's call raises
            return Outcome(item, key, None, error, record.attempts, anyio.current_time() - began)
        self._hand_over.end(
            ConfigurationError(
                f"`call` must be an async function: it returned {type(pending).__name__}, not an awaitable."
            )
        )
        return None


async def _advance(iterator: Iterator[Item]) -> Item:
    """`anext` for an iterator that is not async."""
    try:
        return next(iterator)
    except StopIteration:
        raise StopAsyncIteration from None


def _check(items: object, call: object, key: object, workers: object) -> None:
    if isinstance(items, str | bytes | bytearray):
        raise ConfigurationError(f"`items` is one {type(items).__name__}: give a list, or another iterable, of them.")
    if not isinstance(items, Iterable | AsyncIterable):
        raise ConfigurationError(f"`items` must be an iterable or async iterable, not {type(items).__name__}.")
    if not callable(call):
        raise ConfigurationError(f"`call` must be an async function of one argument, not {type(call).__name__}.")
    if key is not None and not callable(key):
        raise ConfigurationError(f"`key` must be a function of one argument, not {type(key).__name__}.")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ConfigurationError(f"`workers` must be a whole number, at least 1: it is {workers!r}.")


async def run_all(
    items: Iterable[Item] | AsyncIterable[Item], call: Callable[[Item], Awaitable[Result]], *, workers: int
) -> list[Result]:
    """What `call` returned for each of `items`, in their order; at most `workers` calls are under way at once.

    The first exception, of a call or of `items`, cancels the other calls and is raised as itself. Raises
    `ConfigurationError` when an argument is wrong.
    """
    numbers = itertools.count()
    values: dict[int, Result] = {}
    bulk = Bulk(items, call, key=lambda _: next(numbers), workers=workers)
    async with bulk as outcomes:
        bulk._hand_over.at_once = True
        bulk._is_patient = False  # its caller waits for all of it, within the deadline of each call
        async for outcome in outcomes:
            values[outcome.key] = outcome.unwrap()
    return [values[number] for number in range(len(values))]
