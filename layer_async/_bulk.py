"""Many calls over many items: `Bulk` and its `Outcome`s, and `run_all` for those who want all or nothing.

This room owns the concurrency over any one-argument call; it knows no HTTP. Rules: never a task per item, but at most
`workers` tasks that pull from one iterator, one pull at a time, and only while there is room in the window (items
pulled whose outcome the loop has not received), so memory does not grow with the number of items. A failed item is an
outcome, not the end of the run; every item that was pulled has its outcome before an error of the iterator is raised.
What fails because the server is away is no outcome yet: its worker keeps the item until the `Outage` is over or given
up. An item is settled, in the journal too, when the loop body that received its outcome has ended; one that was given
up in an outage, or met refused tokens, has an outcome and is not settled.
When the `async with` ends, for whatever reason, no worker is left, the generator and the journal are closed, and what
is raised is the thing itself, in no group. All state changes between two awaits, so nothing here needs a lock but the
pull.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Generic, Never, TypedDict, cast, overload

import anyio
import anyio.lowlevel
import anyio.to_thread
from typing_extensions import TypeVar

from ._errors import (
    APIStatusError,
    AttemptInfo,
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    LayerError,
    ResponseDecodeError,
)
from ._outage import Outage, Setback
from ._outcomes import HandOver, Outcome, Outcomes, Place, SettledKeys
from ._progress import Meter, Progress, StopRule, stop_rule
from ._values import number, shown

__all__ = ["OUTAGE_TIMEOUT", "Bulk", "BulkOptions", "ItemRecord", "current_item", "run_all"]

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T", default=K)  # the item: its own key, unless `key=` makes another
Item = TypeVar("Item")
Result = TypeVar("Result")

# How many items may be under way or waiting for the loop, for each worker. In order, a slow item holds up those behind
# it: a longer window keeps the other workers busy meanwhile.
WINDOW_AS_COMPLETED = 2
WINDOW_IN_ORDER = 4

OUTAGE_TIMEOUT = 600.0
logger = logging.getLogger("layer_async")

GRACE = 0.5  # seconds for what is under way when the tokens are refused: nothing else will come of it
SPARE = 8  # so many items at least may be put aside, so that others show whether the server is away
JOURNAL_METHODS = ("open", "close", "pulled", "ended", "is_settled", "settle")
SKIPPED_AT_ONCE = 64  # so many items of a journal may be passed over before others have their turn


class BulkOptions(TypedDict, total=False):
    """What a bulk can be told beside its items, its call and their `key`; see `Bulk`."""

    workers: int | None
    ordered: bool
    journal: str | PathLike[str] | SettledKeys | None
    stop_when: StopRule | None
    outage_timeout: float | None


class ItemRecord:
    """What a call knows of the bulk that it works for, and tells it.

    For the call: `is_open` until the call for the item has ended; `is_patient`: the item is to wait out any number of
    429s, each in a block of `waiting()`; `is_in_outage` says whether the bulk waits for the server to come back.

    From the call: `attempts`, how many were made for the item (None: its call does not say), and `last_attempts`, what
    the latest request met; `is_cut_short`: only the budget or an outage denied it another; `has_acted`: something was
    done for it that must not be done twice; `outage`: this exception says that the server is away; `refusal`: this one
    that it refuses everything. `is_given_up`: it was still waiting when the bulk was stopped.
    """

    __slots__ = (
        "attempts",
        "has_acted",
        "is_cut_short",
        "is_given_up",
        "is_in_outage",
        "is_open",
        "is_patient",
        "last_attempts",
        "outage",
        "refusal",
        "waits",
    )

    def __init__(
        self,
        *,
        is_patient: bool = True,
        is_in_outage: Callable[[], bool] | None = None,
        waits: Waits | None = None,
    ) -> None:
        self.is_open = True
        self.is_patient = is_patient
        self.is_in_outage = is_in_outage
        self.attempts: int | None = None
        self.last_attempts: Sequence[AttemptInfo] = ()
        self.is_cut_short = False
        self.has_acted = False
        self.outage: Exception | None = None
        self.refusal: Exception | None = None
        self.is_given_up = False
        self.waits: Waits = Waits() if waits is None else waits

    @contextmanager
    def waiting(self) -> Generator[None]:
        """In here the call waits, for as long as it takes, or until the bulk is stopped; then raises `LayerError`."""
        waits = self.waits
        with anyio.CancelScope() as scope:
            waits.scopes.add(scope)
            if waits.are_over:
                scope.cancel()
            try:
                yield
            finally:
                waits.scopes.discard(scope)
        if scope.cancelled_caught:
            self.is_given_up = True
            raise LayerError("the bulk was stopped while this waited, since the server had said slow down.")


class Waits:
    """The waits of one bulk's calls for the server, which end when it is stopped."""

    __slots__ = ("are_over", "scopes")

    def __init__(self) -> None:
        self.are_over = False
        self.scopes: set[anyio.CancelScope] = set()

    def end(self) -> None:
        self.are_over = True
        for scope in self.scopes:
            scope.cancel()


current_item: ContextVar[ItemRecord | None] = ContextVar("layer_async.current_item", default=None)
"""The record of the item that the running code works for, a new one for each item; None outside of a bulk's calls."""

Source = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]
current_source: ContextVar[Source | None] = ContextVar("layer_async.current_source", default=None)
"""While a bulk pulls its next item: what makes a call for that, so that it waits out an outage. Else None."""


class _Case(Place[K, V, T]):
    """An item and what it has met. While it is held, it has a `setback`, and its last `failure` to show for it."""

    __slots__ = ("attempts", "began", "failure", "setback")

    def __init__(self, item: T, key: K, name: str | None) -> None:
        super().__init__(item, key, name)
        self.began = 0.0
        self.attempts: int | None = None
        self.setback: Setback | None = None
        self.failure: Outcome[K, V, T] | None = None


class Bulk(Generic[K, V, T]):
    """Calls `call` with each of `items`, `workers` at a time: `async with Bulk(…) as outcomes: async for outcome in …`.

    Arguments:
        items: An iterable or async iterable; it may be a generator, and endless. The workers pull from it one at a
            time, whenever one of them is free. An async generator is advanced by several tasks in turn, so it must not
            hold a cancel scope, timeout or task group open across a `yield`; a generator is closed at the end. Pages of
            `AsyncLayerClient.paginate` that are read for it wait out an outage, and any number of 429s, as items do.
        call: An async function of one argument. An `Exception` that it raises is the item's outcome; only
            `ClientClosedError`, and tokens that are refused for good, end the run.
        key: Makes the `key` of an outcome from its item; called once an item, in their order. An exception of it ends
            the run, as an exception of `items` does: the loop raises it once it has received all other outcomes.
        workers: How many calls may be under way at once. At most twice as many items (four times with `ordered`) have
            been pulled and not been received by the loop.
        ordered: Whether outcomes come in the order of the items instead of as they complete.
        journal: Knows which keys are settled, so that a run can be resumed: a `Journal`, or the path of one. Items
            whose key is settled are passed over; an item is settled once the loop body that received its outcome has
            ended. Keys are then text or whole numbers (1 and "1" are two).
        stop_when: Ends the run early: a number of failures, a failure rate (a float up to 1.0, once 20 items are done),
            or a function of the `Progress`. Nothing more is pulled then, what is under way has its outcomes (an error
            for what only waits because the server said slow down, which does not settle it), and the loop ends, with
            `outcomes.stopped` saying why.
        outage_timeout: For how many seconds an outage is waited out. While the server is away (refused, unreachable,
            silent, or 502, 503, 504), the items that met it are held, one at a time is tried as a probe, and all go on
            at the first answer: `call` is called again for them. Those for which something was done already that must
            not be done twice are not held. After that time the held ones have their last error as their outcome,
            nothing more is pulled, and the loop ends, with `outcomes.stopped` saying why; they are not settled, so
            that a resumed run tries them again. None: nothing is held.

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
        journal: str | PathLike[str] | SettledKeys | None = None,
        stop_when: StopRule | None = None,
        outage_timeout: float | None = OUTAGE_TIMEOUT,
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
        journal: str | PathLike[str] | SettledKeys | None = None,
        stop_when: StopRule | None = None,
        outage_timeout: float | None = OUTAGE_TIMEOUT,
    ) -> None: ...

    def __init__(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        call: Callable[[Any], Awaitable[Any]],
        *,
        key: Callable[[Any], Any] | None = None,
        workers: int,
        ordered: bool = False,
        journal: str | PathLike[str] | SettledKeys | None = None,
        stop_when: StopRule | None = None,
        outage_timeout: float | None = OUTAGE_TIMEOUT,
    ) -> None:
        _check(items, call, key, workers)
        self._items: Iterable[T] | AsyncIterable[T] | None = items
        self._call: Callable[[T], Awaitable[V]] = call
        self._key: Callable[[T], K] | None = key
        self._workers = workers
        self._ordered = ordered
        self._journal = _journal_of(journal)
        self._stops = None if stop_when is None else stop_rule(stop_when)
        self._outage_timeout = _checked_timeout(outage_timeout)
        self._is_patient = True

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
        self._meter = Meter(time.perf_counter(), _length(items))
        self._last_progress: Progress | None = None
        self._iterator: object
        self._pull: Callable[[], Awaitable[T]]
        if isinstance(items, AsyncIterable):
            self._iterator = asynchronous = aiter(items)
            self._pull = asynchronous.__anext__
        else:
            self._iterator = synchronous = iter(items)
            self._pull = partial(_advance, synchronous)
        if self._journal is not None:
            await _open_journal(self._journal)
        self._hand_over = HandOver[K, V, T](
            window=self._workers * (WINDOW_IN_ORDER if self._ordered else WINDOW_AS_COMPLETED),
            ordered=self._ordered,
            journal=self._journal,
        )
        self._outage: Outage | None = None
        self._is_in_outage: Callable[[], bool] | None = None
        if self._outage_timeout is not None:
            self._outage = outage = Outage(self._outage_timeout, on_end=self._stop)
            self._is_in_outage = lambda: outage.began is not None
        self._aside: deque[_Case[K, V, T]] = deque()  # held, while their workers try others
        self._spare = max(SPARE, self._workers)
        self._active = 0  # calls under way
        self._held = 0  # items with a setback
        self._refusals = 0
        self._unfed: Exception | None = None  # of a call for the next item, which the stop of the bulk has ended
        self._waits = Waits()
        self._turn = anyio.Lock(fast_acquire=True)
        # A scope for each worker: the group's own holds this task too, and would have to be told from a cancellation
        # that comes from outside.
        self._scopes: list[anyio.CancelScope] = []
        self._unstarted = self._workers
        self._group = await anyio.create_task_group().__aenter__()
        self._start_worker()
        return Outcomes(self._hand_over, progress=self._progress, stop=self._stop)

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
            self._last_progress = self._progress()
            self._hand_over.close()
            if self._outage is not None:
                self._outage.give_up()  # pages that are fetched ahead may outlive the bulk
            try:
                await self._close_iterator()
            finally:
                await self._close_journal(is_settled=exc is None and failure is None)
        try:
            if failure is not None:
                raise failure
        finally:
            del failure

    async def _close_iterator(self) -> None:
        """Close a generator, which nobody can go on with once it has stopped anywhere; never the caller's files."""
        if isinstance(self._iterator, AsyncGenerator):
            await self._iterator.aclose()
        elif isinstance(self._iterator, Generator):
            self._iterator.close()

    async def _close_journal(self, *, is_settled: bool) -> None:
        if self._journal is None:
            return
        try:
            if is_settled:
                self._hand_over.settle()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._journal.close)
            if self._journal.inputs_changed is not None:
                logger.warning(self._journal.inputs_changed)

    # Progress, and stopping before the end

    def _progress(self) -> Progress:
        if self._last_progress is not None:
            return self._last_progress
        return self._meter.progress(time.perf_counter(), self._held)

    def _stop(self, why: str) -> None:
        """Pull nothing more, and hold nothing; the loop ends when what is under way has its outcome."""
        if self._held or self._waits.scopes or not self._hand_over.ended:
            self._hand_over.stopped = self._hand_over.stopped or why
        self._waits.end()
        self._end()

    def _end(self, error: BaseException | None = None, *, at_once: bool = False) -> None:
        self._hand_over.end(error, at_once=at_once)
        if self._outage is not None:
            self._outage.give_up()
        while self._aside:
            self._give_up(self._aside.popleft())

    def _give_up(self, place: _Case[K, V, T]) -> None:
        """An item that was held has its last error for an outcome, and is for the next run to try again."""
        place.settles = False
        self._finish(place, place.failure)

    # The workers

    def _start_worker(self) -> None:
        self._unstarted -= 1
        scope = anyio.CancelScope()
        self._scopes.append(scope)
        self._group.start_soon(self._work, scope, name="layer_async bulk worker")

    async def _work(self, scope: anyio.CancelScope) -> None:
        current_source.set(None)  # of a bulk that is pulling here
        with scope:
            try:
                wants_another = False
                while (place := await self._next(wants_another=wants_another)) is not None:
                    wants_another = await self._carry(place)
            except BaseException as error:
                # It passes; but the loop, which may be shielded from it, must not wait for this worker any more.
                self._end(error, at_once=True)
                raise

    async def _next(self, *, wants_another: bool) -> _Case[K, V, T] | None:
        """Wait for this worker's turn and for room, then pull; None when there is nothing more to do.

        Items that were put aside come first, unless it `wants_another`.
        """
        if self._turn.locked():
            if self._aside and not wants_another:  # the pull may take for ever
                return self._aside.popleft()
            await self._turn.acquire()
        else:
            self._turn.acquire_nowait()
        try:
            if self._outage is not None and self._outage.is_on:
                await self._outage.wait_for_the_end()
                wants_another = self._outage.is_on
            if self._aside and not (wants_another and len(self._aside) <= self._spare and not self._hand_over.ended):
                return self._aside.popleft()
            if not self._aside:
                await self._hand_over.wait_for_room()
            if not self._hand_over.ended and (place := await self._pull_next()) is not None:
                return place
            return self._aside.popleft() if self._aside else None
        except Exception as error:
            # Of the user's iterator or key, whatever it be: it waits until the calls under way have their outcomes, and
            # is raised by the loop then.
            if error is not self._unfed:
                self._end(error)
            self._unfed = None
            return self._aside.popleft() if self._aside else None
        finally:
            self._turn.release()

    async def _pull_next(self) -> _Case[K, V, T] | None:
        """The next item that is not settled; None where there is no more."""
        journal, name = self._journal, None
        while True:
            token = current_source.set(self._ride_out)
            try:
                item = await self._pull()
            except StopAsyncIteration:
                self._hand_over.end()
                if journal is not None:
                    journal.ended()
                return None
            except StopIteration as error:
                raise _not_an_end("the items", error) from error
            finally:
                current_source.reset(token)
            try:
                key = cast(K, item) if self._key is None else self._key(item)
            except (StopIteration, StopAsyncIteration) as error:
                raise _not_an_end("`key`", error) from error
            if journal is None:
                break
            name = _name_of(key)
            journal.pulled(name)
            if not journal.is_settled(name):
                break
            self._meter.skipped += 1
            if self._meter.skipped % SKIPPED_AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()
            if self._hand_over.ended:
                return None
        # Each item calls two more workers to work: few items have few, and many have all of them soon.
        for _ in range(min(2, self._unstarted)):
            self._start_worker()
        place: _Case[K, V, T] = _Case(item, key, name)
        self._hand_over.admit(place)
        return place

    async def _ride_out(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call on which the next item depends, and make it again after an outage."""
        outage = self._outage
        setback: Setback | None = None
        failure: Exception | None = None
        try:
            while True:
                is_probe = False
                if outage is not None and (outage.is_on or setback is not None):
                    is_probe = await outage.wait_before(setback)
                    if outage.given_up and failure is not None:
                        self._unfed = failure
                        raise failure
                record = ItemRecord(is_patient=self._is_patient, is_in_outage=self._is_in_outage, waits=self._waits)
                began = time.perf_counter()
                token = current_item.set(record)
                try:
                    value = await call()
                except Exception as error:  # of whatever kind: it is raised, but for an outage
                    self._heed(record, error, began, time.perf_counter())
                    if record.is_given_up:
                        self._unfed = error
                    if outage is None or outage.given_up or record.outage is not error:
                        raise
                    setback = setback or Setback()
                    if not self._is_outage(setback, record, error):
                        raise
                    failure = error
                else:
                    self._heed(record, None, began, time.perf_counter())
                    return value
                finally:
                    record.is_open = False
                    current_item.reset(token)
                    if is_probe:
                        cast(Outage, outage).probed()
        finally:
            del failure  # else the error and this frame hold each other

    async def _carry(self, place: _Case[K, V, T]) -> bool:
        """Call for an item, and again after an outage, until it has its outcome. True: it is aside, to let another try.

        Where the only calls are those for items that fail, nobody can tell an outage from their own trouble.
        """
        outage = self._outage
        while True:
            is_probe = False
            if outage is not None and (outage.is_on or place.setback is not None):
                is_probe = await outage.wait_before(place.setback)
                if outage.given_up and place.setback is not None:
                    self._give_up(place)
                    return False
            try:
                is_held = await self._try(place)
            finally:
                if is_probe:
                    cast(Outage, outage).probed()
            if not is_held:
                return False
            if not self._turn.locked() and (
                cast(Outage, outage).wants_witness if is_probe else not (self._active or self._aside)
            ):
                self._aside.append(place)
                return True

    async def _try(self, place: _Case[K, V, T]) -> bool:
        """Call once; whether the item is held, and to be tried again."""
        began = time.perf_counter()
        if place.setback is None:
            place.began = began
        record = ItemRecord(is_patient=self._is_patient, is_in_outage=self._is_in_outage, waits=self._waits)
        record.attempts = place.attempts
        token = current_item.set(record)
        self._active += 1
        try:
            outcome = await self._serve(place.item, place.key, place.began, record)
        finally:
            self._active -= 1
            record.is_open = False
            current_item.reset(token)
        if outcome is None:
            self._finish(place, None)
            return False
        error = outcome.error
        ended = place.began + outcome.elapsed
        if error is not None:
            if isinstance(error, AuthenticationError):
                if record.refusal is error or self._refusals + 1 >= max(2, self._workers):
                    await self._refuse(place, error)
                    return False
                self._refusals += 1
                place.settles = False
            elif record.is_given_up and not record.has_acted:
                place.settles = False
            elif record.outage is error and self._is_held(place, record, outcome):
                return True
        if error is None:
            self._refusals = 0
        self._heed(record, error, began, ended)
        self._finish(place, outcome)
        return False

    def _heed(self, record: ItemRecord, error: Exception | None, began: float, ended: float) -> None:
        """An answer of any kind ends an outage."""
        if self._outage is not None and (
            error is None or (record.outage is not error and isinstance(error, APIStatusError | ResponseDecodeError))
        ):
            self._outage.answered(ended - record.last_attempts[-1].elapsed if record.last_attempts else began)

    def _is_held(self, place: _Case[K, V, T], record: ItemRecord, outcome: Outcome[K, V, T]) -> bool:
        """Whether an item that met what may be an outage waits for its end; else the failure is its outcome."""
        outage = self._outage
        if outage is None:
            return False
        if outage.given_up and not record.has_acted:
            place.settles = False
            return False
        setback = place.setback or Setback()
        if not self._is_outage(setback, record, outcome.error) or record.has_acted:
            return False
        self._held += place.setback is None
        place.setback, place.attempts, place.failure = setback, record.attempts, outcome
        return True

    def _is_outage(self, setback: Setback, record: ItemRecord, error: Exception | None) -> bool:
        attempts = record.last_attempts
        return cast(Outage, self._outage).missed(
            setback,
            sent=time.perf_counter() - (attempts[-1].elapsed if attempts else 0.0),
            tried_again=len(attempts) > 1 and not record.is_cut_short,
            asked=getattr(error, "retry_after", None),
        )

    async def _refuse(self, place: _Case[K, V, T], error: Exception) -> None:
        """The tokens are refused: nothing more can come of any item. A moment for what is under way, then the end."""
        self._end(error)
        self._finish(place, None)
        await anyio.sleep(GRACE)
        self._end(at_once=True)

    def _finish(self, place: _Case[K, V, T], outcome: Outcome[K, V, T] | None) -> None:
        self._held -= place.setback is not None
        if outcome is not None:
            self._meter.count(place.began + outcome.elapsed, ok=outcome.error is None)
        self._hand_over.put(place, outcome)
        if self._stops is not None and not self._waits.are_over and (self._waits.scopes or not self._hand_over.ended):
            try:
                why = self._stops(self._meter, self._progress)
            except Exception as error:  # of the user's function; the loop raises it
                self._end(error)
            else:
                if why is not None:
                    self._stop(why)

    async def _serve(self, item: T, key: K, began: float, record: ItemRecord) -> Outcome[K, V, T] | None:
        """Call once. This frame is part of an error's traceback: it must not hold the error or the outcome."""
        try:
            pending = self._call(item)
            if isinstance(pending, Awaitable):
                value = await pending
                return Outcome(item, key, value, None, record.attempts, time.perf_counter() - began)
        except ClientClosedError as error:  # no other item can fare better
            self._end(error)
            return None
        except Exception as error:  # a failed item is an outcome, whatever the user's call raises
            error.__traceback__ = cast(TracebackType, error.__traceback__).tb_next  # this frame shows the item
            return Outcome(item, key, None, error, record.attempts, time.perf_counter() - began)
        except anyio.get_cancelled_exc_class() as error:
            if _is_cancelled(error):
                raise
            elapsed = time.perf_counter() - began
            return Outcome(item, key, None, _cancelled_elsewhere(error), record.attempts, elapsed)
        self._end(
            ConfigurationError(
                f"`call` must be an async function: it returned {type(pending).__name__}, not an awaitable."
            )
        )
        return None


def _name_of(key: object) -> str:
    """The journal's name for a key. Whole numbers have names that no text has: 1 and "1" are two items."""
    if isinstance(key, str):
        return f"\0{key}" if key.startswith("\0") else key
    if isinstance(key, int) and not isinstance(key, bool):
        return f"\0{int(key)}"
    raise ConfigurationError(
        f"a journal knows items by text or whole numbers, not by {type(key).__name__}: give the bulk a `key`."
    )


async def _advance(iterator: Iterator[Item]) -> Item:
    """`anext` for an iterator that is not async."""
    try:
        return next(iterator)
    except StopIteration:
        raise StopAsyncIteration from None
    except StopAsyncIteration as error:  # which would end the run as if there were no more
        raise _not_an_end("the items", error) from error


def _not_an_end(culprit: str, error: Exception) -> RuntimeError:
    """What Python makes of them in generators too (PEP 479)."""
    return RuntimeError(f"{culprit} raised {type(error).__name__}")


def _is_cancelled(error: BaseException) -> bool:
    """Whether the running task itself, or a scope around it, has been cancelled, so that `error` has to pass.

    If not, `error` comes from a task or future that the call awaited and somebody else cancelled.
    """
    import asyncio  # not at the top: trio's users may do without

    if isinstance(error, asyncio.CancelledError) and cast("asyncio.Task[Any]", asyncio.current_task()).cancelling():
        return True
    return anyio.current_effective_deadline() == -math.inf


def _cancelled_elsewhere(cause: BaseException) -> LayerError:
    error = LayerError("the call awaited something that somebody else cancelled; the bulk itself was not.")
    error.__cause__ = cause
    return error


def _length(items: object) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except Exception:  # whatever somebody's __len__ does, it is no reason not to run
        return None


async def _open_journal(journal: SettledKeys) -> None:
    is_left = False

    def open_in_thread() -> None:
        journal.open()
        if is_left:
            journal.close()

    try:
        await anyio.to_thread.run_sync(open_in_thread)
    except BaseException:  # a native cancellation does not wait for the thread, which may be done or not
        is_left = True
        journal.close()
        raise


def _journal_of(journal: str | PathLike[str] | SettledKeys | None) -> SettledKeys | None:
    if isinstance(journal, str | PathLike):
        from ._journal import Journal  # with SQLite, which few need

        return Journal(journal)
    if journal is not None and (
        isinstance(journal, type) or not all(callable(getattr(journal, name, None)) for name in JOURNAL_METHODS)
    ):
        raise ConfigurationError(
            f"`journal` takes a Journal, the path of one, or an object with its methods, not {shown(journal)}."
        )
    return journal


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


def _checked_timeout(outage_timeout: object) -> float | None:
    if outage_timeout is None:
        return None
    if number(outage_timeout) >= 0:
        return number(outage_timeout)
    raise ConfigurationError(f"`outage_timeout` takes seconds, 0 or more, or None, not {shown(outage_timeout)}.")


async def run_all(
    items: Iterable[Item] | AsyncIterable[Item], call: Callable[[Item], Awaitable[Result]], *, workers: int
) -> list[Result]:
    """What `call` returned for each of `items`, in their order; at most `workers` calls are under way at once.

    The first exception, of a call or of `items`, cancels the other calls and is raised as itself. Raises
    `ConfigurationError` when an argument is wrong.
    """
    numbers = itertools.count()
    values: dict[int, Result] = {}
    bulk = Bulk(items, call, key=lambda _: next(numbers), workers=workers, outage_timeout=None)
    del items  # they are paths, mostly, with their queries
    async with bulk as outcomes:
        bulk._hand_over.at_once = True
        bulk._is_patient = False  # its caller waits for all of it, within the deadline of each call
        async for outcome in outcomes:
            values[outcome.key] = outcome.unwrap()
    return [values[number] for number in range(len(values))]
