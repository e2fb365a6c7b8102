"""What becomes of the items of a bulk: an `Outcome` each, handed from the workers to the loop that receives them.

Rules: outcomes come once, to one loop, as they complete or in the order of the items. An item is settled, in the
journal too, when the loop body that received its outcome has ended. This room starts nothing and calls nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Protocol, Self, cast

import anyio
import attrs
from typing_extensions import TypeVar

from ._errors import ConfigurationError
from ._progress import Progress

__all__ = ["HandOver", "Outcome", "Outcomes", "Place", "SettledKeys"]

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T", default=K)  # the item: its own key, unless `key=` makes another


class SettledKeys(Protocol):
    """What a bulk needs of a journal; `Journal` is one. `open` and `close` are called in a worker thread.

    Keys are names here: of text the text itself, of a whole number a NUL character and its digits (a text that begins
    with NUL gets another one).
    """

    @property
    def inputs_changed(self) -> str | None:
        """What of the inputs is not as it was in an earlier run, as a sentence; it is logged as a warning."""
        ...

    def open(self) -> None:
        """Begin; raises `ConfigurationError` when another run holds the journal."""

    def close(self) -> None:
        """Put on the disk what was settled, and end; harmless twice."""

    def pulled(self, key: str) -> None:
        """The next key of the inputs, settled or not."""

    def ended(self) -> None:
        """The inputs have ended."""

    def is_settled(self, key: str) -> bool:
        """Whether the item is to be passed over; quick."""
        ...

    def settle(self, key: str, *, ok: bool) -> None:
        """The loop body that received the outcome has ended."""


def _without_query(value: object) -> str:
    """The repr of an item or a key, which is mostly a path: its query may hold what no log should."""
    if isinstance(value, str) and "?" in value:
        return repr(f"{value.partition('?')[0]}?...")
    return repr(value)


@attrs.frozen
class Outcome(Generic[K, V, T]):
    """What became of one item.

    `item` is the item as it was pulled, `key` what `key=` made of it (else the item itself). `value` is what the call
    returned, or `error` what it raised; the other one is None. `attempts` says how many attempts the call made on the
    wire (None where the call does not tell), `elapsed` how many seconds it took, with all its waits.
    """

    item: T = attrs.field(repr=_without_query)
    key: K = attrs.field(repr=_without_query)
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


class Place(Generic[K, V, T]):
    """An item's place in the line. Done without an outcome: its call ended the whole run.

    `name`: its key in the journal. `settles`: whether the loop body that receives the outcome settles it.
    """

    __slots__ = ("done", "item", "key", "name", "outcome", "settles")

    def __init__(self, item: T, key: K, name: str | None) -> None:
        self.item: T = item
        self.key: K = key
        self.name: str | None = name
        self.done: bool = False
        self.settles: bool = True
        self.outcome: Outcome[K, V, T] | None = None


class HandOver(Generic[K, V, T]):
    """Where the workers hand outcomes to the loop, and stop while the loop is slow.

    A deque, and two events that exist only while somebody waits: cheaper than a memory object stream, and it keeps the
    order. The window bounds how many items have been pulled whose outcome the loop has not received.
    """

    def __init__(self, *, window: int, ordered: bool, journal: SettledKeys | None = None) -> None:
        self.window: int = window
        self.ordered: bool = ordered
        self.journal: SettledKeys | None = journal
        self.line: deque[Place[K, V, T]] = deque()  # in order: all that is under way; else: what is done
        self.outstanding: int = 0
        self.arrival: anyio.Event | None = None  # the loop waits for it
        self.vacancy: anyio.Event | None = None  # the worker whose turn it is to pull waits for it
        self.ended: bool = False  # nothing more is pulled
        self.at_once: bool = False  # whether `error` is raised without waiting for what is under way
        self.error: BaseException | None = None
        self.finished: bool = False  # the loop has met the end
        self.closed: bool = False  # the block has ended
        self.stopped: str | None = None
        self.received: Place[K, V, T] | None = None  # by the loop, whose body is not known to have ended

    @property
    def has_room(self) -> bool:
        return self.outstanding < self.window

    async def wait_for_room(self) -> None:
        if not self.has_room:
            self.vacancy = anyio.Event()
            try:
                await self.vacancy.wait()
            finally:
                self.vacancy = None

    def admit(self, place: Place[K, V, T]) -> None:
        self.outstanding += 1
        if self.ordered:
            self.line.append(place)

    def put(self, place: Place[K, V, T], outcome: Outcome[K, V, T] | None) -> None:
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
        while (place := self.take()) is None:
            if self.ended and (self.outstanding == 0 or (self.at_once and self.error is not None)):
                break
            self.arrival = anyio.Event()
            try:
                await self.arrival.wait()
            finally:
                self.arrival = None
        self.received = place
        return None if place is None else place.outcome

    def take(self) -> Place[K, V, T] | None:
        while self.line and self.line[0].done:
            place = self.line.popleft()
            self.outstanding -= 1
            if self.vacancy is not None:
                self.vacancy.set()
            if place.outcome is not None:
                return place
        return None

    def settle(self) -> None:
        """An outcome is settled when the loop body that received it has ended."""
        place, self.received = self.received, None
        if place is not None and place.name is not None and place.settles:
            assert self.journal is not None
            assert place.outcome is not None
            self.journal.settle(place.name, ok=place.outcome.ok)

    def close(self) -> None:
        self.closed = True
        self.error = None
        self.line.clear()


class Outcomes(AsyncIterator[Outcome[K, V, T]]):
    """The outcomes of a bulk, as they complete or in the order of the items: for `async for` inside the `async with`.

    Leaving the loop early is fine, and so is going on later with another one.
    """

    def __init__(
        self, hand_over: HandOver[K, V, T], *, progress: Callable[[], Progress], stop: Callable[[str], None]
    ) -> None:
        self._hand_over = hand_over
        self._progress = progress
        self._stop = stop

    @property
    def progress(self) -> Progress:
        """How far the bulk has come; cheap, and there after the block too."""
        return self._progress()

    @property
    def stopped(self) -> str | None:
        """Why the bulk has stopped, or is about to, before its items ended: `stop_when`, an outage, `drain`; else None.

        Items that were not pulled have been left where they are. The loop ends as it does when there are no more.
        """
        return self._hand_over.stopped

    def drain(self) -> None:
        """Pull nothing more, let what is under way finish, and then end the loop; may be called from anywhere in it.

        Items that are held in an outage have their last error as their outcome, and those that wait because the server
        said slow down an error that says so; neither is settled. For services that shut down, and for Ctrl-C. Harmless
        twice.
        """
        self._stop("drained.")

    def __aiter__(self) -> Self:
        """These outcomes; raises `ConfigurationError` when all have been received already."""
        if self._hand_over.finished:
            raise ConfigurationError("the outcomes of a bulk come once, and all of them have been received already.")
        return self

    async def __anext__(self) -> Outcome[K, V, T]:
        """The next outcome, or the end.

        At the end, raises what the items' iterator, `key` or `stop_when` raised, `ClientClosedError` when the client
        was closed during the run, and `AuthenticationError` when the tokens are refused for good. Raises
        `ConfigurationError` outside of the `async with`, and for two tasks at once.
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
