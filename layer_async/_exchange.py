"""What our layers know of one exchange (a request and its response) beyond what httpx itself keeps.

Rules: this room decides nothing. The record of a call lives in `request.extensions["layer_async"]`, which httpx copies
by reference into a redirected request; a request without one is read in the strictest way (it may have been processed,
its body cannot be sent again unless httpx holds it in memory).
"""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeVar

import anyio
import httpx

from ._errors import AttemptInfo, LayerError, RequestInfo

EXTENSION = "layer_async"

S = TypeVar("S", str, bytes)


class QuietRequest(httpx.Request):
    """A request whose repr leaves out the query: a traceback that shows local variables shows it."""

    def __repr__(self) -> str:
        return f"<Request({self.method!r}, {RequestInfo.of(self).url!r})>"


class Releasable(Protocol):
    """The right to have one attempt on the wire, as far as the layers above the pool know it."""

    def release(self) -> None:
        """Give it back, closing what is still open under it; synchronous, and harmless when already done."""


class Passable(Protocol):
    """A gate, as far as one attempt knows it."""

    @property
    def is_off(self) -> bool:
        """Whether nobody has to ask."""
        ...

    async def wait(self, *, patient: bool, longest: float) -> int:
        """Return when the attempt may start, with its number."""
        ...


class DeadlinePassed(Exception):  # noqa: N818 - named after what happens
    """The call has no time left: the one that no scope bounds is told so by its connection."""


class ExchangeRecord:
    """What is known of a call, kept across its attempts.

    The transport writes for the attempt under way (None means unknown): `bytes_written`, how many bytes of the request
    went out (a TLS handshake or CONNECT does not count); `response_started`, whether a byte of the answer came;
    `head_received`, whether its head was complete; `says_more`, whether that tells of a coding or a limit; `reused`,
    whether the connection had served before. `phase` says what the call is doing, `slot` is the slot it holds,
    `attempts` and `maybe_processed` grow with each attempt. `info` is the request as errors and events show it, once
    somebody has wanted it. `idempotent` is the caller's word on an unsafe method. `is_patient`: the call belongs to a
    bulk, and waits out any number of 429s, each in a block of `waiting`, which may end it. `is_in_outage` says whether
    that bulk waits for the server to come back, so that the call is not to try again by itself. `is_outage`: its last
    failure may be one of many like it. `is_cut_short`: only the budget, or that bulk's outage, denied it another
    attempt. `fresh` asks the transport for a new connection, since an idle one has just turned out to be dead.
    `source_error` is what the source of the tokens raised: no matter of the API's, whatever its class. `gate` is where
    each attempt asks, `gate_limit` for how many seconds it may be shut, `turn` the number that the last attempt got
    there; `scope` bounds the call. `started` is when the attempt began. `sent` is a first attempt that was made before
    there was a request. What is not set yet costs nothing: it is the class's.
    """

    bytes_written: int | None = None
    response_started: bool | None = None
    head_received: bool | None = None
    reused: bool | None = None
    says_more: bool | None = None
    info: RequestInfo | None = None
    phase: str = "queue"
    slot: Releasable | None = None
    attempts: tuple[AttemptInfo, ...] = ()
    maybe_processed: bool = False
    idempotent: bool | None = None
    is_patient: bool = False
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    is_in_outage: Callable[[], bool] | None = None
    is_outage: bool = False
    is_cut_short: bool = False
    fresh: bool = False
    source_error: Exception | None = None
    gate: Passable | None = None
    gate_limit: float = math.inf
    turn: int = 0
    scope: anyio.CancelScope | None = None
    started: float = 0.0
    sent: Any = None

    def __init__(self, **known: Any) -> None:
        if known:
            self.__dict__.update(known)

    @classmethod
    def of(cls, request: Any) -> ExchangeRecord:
        """The record of an httpx or httpcore request; made and attached when there is none yet."""
        record = request.extensions.get(EXTENSION)
        if not isinstance(record, cls):
            record = request.extensions[EXTENSION] = cls()
        return record

    def begin_attempt(self) -> None:
        """Forget what the transport wrote for the attempt before."""
        self.bytes_written = self.response_started = self.head_received = self.says_more = self.reused = None
        self.is_outage = self.is_cut_short = False
        self.started = time.perf_counter()

    def release_slot(self) -> None:
        """Give the slot back, if one is held; synchronous."""
        slot, self.slot = self.slot, None
        if slot is not None:
            slot.release()

    async def pass_gate(self) -> None:
        """Wait at the gate until an attempt may start, holding no slot; a bulk's item for as long as it takes."""
        gate = self.gate
        if gate is None or gate.is_off:
            return
        self.release_slot()
        phase, self.phase = self.phase, "gate"
        if self.is_patient:
            with self.patiently():
                self.turn = await gate.wait(patient=True, longest=math.inf)
        else:
            self.turn = await gate.wait(patient=False, longest=self.gate_limit)
        self.phase = phase  # only now: an error that ends the wait is to find the phase that it ended

    @contextmanager
    def patiently(self) -> Generator[None, None, None]:
        """Wait in here as a bulk's item does: at no cost of the call's time, and no longer than its bulk."""
        with self.deadline_at_rest(), self.waiting():
            yield

    @contextmanager
    def deadline_at_rest(self) -> Generator[None, None, None]:
        """What happens meanwhile uses up none of the call's time."""
        scope = self.scope
        if scope is None:
            yield
            return
        since, deadline = anyio.current_time(), scope.deadline
        scope.deadline = math.inf
        try:
            yield
        finally:
            scope.deadline = deadline + anyio.current_time() - since


def is_replayable(request: httpx.Request) -> bool:
    """Whether the body of `request` can be sent once more.

    Bytes can; an iterator can as long as nobody has begun it; multipart can when each of its files can seek.
    """
    stream = request.stream
    if isinstance(stream, httpx.ByteStream):
        return True
    consumed = getattr(stream, "_is_stream_consumed", None)
    if consumed is not None:
        return consumed is False
    fields = getattr(stream, "fields", None)
    if fields is None:
        return False
    return all(_can_go_back(field.file) for field in fields if hasattr(field, "file"))


def _can_go_back(file: Any) -> bool:
    if isinstance(file, str | bytes):
        return True
    # A closed file does not say that it cannot seek, it raises.
    return hasattr(file, "seekable") and not getattr(file, "closed", False) and bool(file.seekable())


def retry_after(response: httpx.Response) -> float | None:
    """The seconds that `Retry-After` asks for (RFC 9110 section 10.2.3), or None where it says nothing usable.

    At most 10 ASCII digits, or an HTTP-date measured against the response's own `Date`. Zero, a date that is past, and
    everything else (negative, fraction, list, unit) say nothing usable.
    """
    value = response.headers.get("retry-after", "").strip(" \t")
    if re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
        return float(value) or None
    until, now = _http_date(value), _http_date(response.headers.get("date", ""))
    if until is None or now is None or until <= now:
        return None
    return until - now


def _show_all_attributes() -> None:
    """Have one record with all that a record can have.

    CPython gives instances a table in place of a dict for the attributes that it has seen in the first thirty of them.
    Where those are of a crowd that queues they have few, and all records there ever are would have a dict too.
    """
    record = ExchangeRecord()
    for name in ExchangeRecord.__annotations__:
        setattr(record, name, getattr(ExchangeRecord, name))


_show_all_attributes()

READERS = "layer_async.readers"  # in the extensions of a response, which no pickle of it takes along


class StreamedResponse(httpx.Response):
    """A response whose readers may be left half-way: they are kept, to be ended by `end_readers`.

    httpx's readers are generators, and theirs hold others. Dropped by a `break`, they would be the garbage collector's,
    which trio warns of.
    """

    def aiter_raw(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        return self._kept(super().aiter_raw(chunk_size))

    def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        return self._kept(super().aiter_bytes(chunk_size))

    def aiter_text(self, chunk_size: int | None = None) -> AsyncIterator[str]:
        return self._kept(super().aiter_text(chunk_size))

    def aiter_lines(self) -> AsyncIterator[str]:
        return self._kept(super().aiter_lines())

    def _kept(self, reader: AsyncIterator[S]) -> AsyncIterator[S]:
        self.extensions.setdefault(READERS, []).append(reader)
        return reader


async def end_readers(response: httpx.Response, *, is_ours: bool) -> None:
    """End what still reads a closed response. Streams of ours (`is_ours`) soon run out then, others may be endless."""
    for reader in response.extensions.pop(READERS, ()):
        if reader.ag_running:  # another task is reading; it will see
            continue
        with suppress(httpx.HTTPError, httpx.StreamError, LayerError):
            if not is_ours:
                await reader.aclose()
            async for _ in reader:
                pass


def _http_date(value: str) -> float | None:
    if not value.endswith("GMT"):
        return None
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
