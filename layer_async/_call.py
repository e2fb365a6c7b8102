"""One call, top to bottom: the corridor that joins the other rooms, each step knowing only the next.

    run            make the error tree, tell the observer; wait for the first slot, where no gate has to be asked
      _unseen        a first attempt without a request, where nobody could see one; at once, if an open connection is at
                     hand, else in here:
      _bounded       open the scope of the deadline
        _value         wait for the first slot behind the gate; build the request; the user's middleware
          RetryMiddleware
            _attempt     gate, slot, httpx send (DualTokenAuth attaches the tokens), same-origin redirects, read

Rules: a call holds at most one slot, and none while it sleeps, refreshes tokens or waits at the gate; whatever ends a
call, its slot is free when the call returns, without an await. There is no second path: verbs, stream, bulk and the
command line all come through here; and an attempt that was made without a request, but did not end the call, is judged
where all others are, as the first of that loop.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self, cast

import anyio
import attrs
import httpx

from ._auth import DualTokenAuth
from ._bulk import ItemRecord, current_item
from ._coding import bound_body, read_bounded
from ._deadline import Scopes
from ._errors import (
    BODY_LIMIT,
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    ErrorContext,
    LayerError,
    RateLimitError,
    RequestInfo,
    ResponseDecodeError,
    raise_translated,
    scrub,
    status_error,
)
from ._exchange import EXTENSION, DeadlinePassed, ExchangeRecord, QuietRequest, is_replayable, retry_after
from ._failures import is_safe_to_repeat
from ._options import (
    CALL_CHECKS,
    REQUEST_OPTIONS,
    Quiet,
    checked_body,
    checked_method,
    merged_headers,
    merged_params,
)
from ._origin import Origin
from ._pacing import Gate, Pacing
from ._pool import ConnectionPool, SlotTimeout
from ._retry import CallNext, Middleware, RetryBudget, RetryMiddleware, RetryPolicy
from ._telemetry import CallFinished, Observer, hears_all, notify

MAX_REDIRECTS = 20
ONE_ATTEMPT = RetryPolicy(attempts=1, rate_limited_attempts=1)

Reader = Callable[[httpx.Response], Any]
MORE: Any = object()  # than the first attempt is needed

PECULIAR = REQUEST_OPTIONS - {"path", "json"}  # what makes a request differ from that of any other call


class Lane(Protocol):
    """The short way through httpx, as far as this room knows it."""

    @property
    def is_open(self) -> bool:
        """Whether it may be taken now."""
        ...

    def request(
        self, method: str, url: httpx.URL, document: bytes | None, timeout: Mapping[str, float | None]
    ) -> httpx.Request | None:
        """A request without anything of its own but a document; None where httpx has to build it."""
        ...

    def draw(self, call: Any, auth: DualTokenAuth) -> Any:
        """An attempt without a request, where that can be made now; it has a `connection`, where one is open."""
        ...

    async def send(self, sent: Any, call: Any, deadline: float | None) -> None:
        """Make that attempt."""
        ...

    def answered(
        self, request: httpx.Request, sent: Any, record: ExchangeRecord, auth: DualTokenAuth
    ) -> httpx.Response:
        """Its answer."""
        ...

    async def exchange(
        self, request: httpx.Request, record: ExchangeRecord, auth: DualTokenAuth, limit: int | None
    ) -> httpx.Response:
        """The answer to a request, read; to one that was sent before it existed, too."""
        ...

    def with_headers(self, headers: httpx.Headers) -> Self:
        """The same for requests with other headers."""
        ...


class Identity:
    """One pair of tokens as the server sees it: its auth, its retry budget, its gate. Not shared with other tokens.

    Without `pacing` there is no gate: each call waits out what it was answered itself.
    """

    def __init__(self, auth: DualTokenAuth, pacing: Pacing | None, observer: Observer) -> None:
        self.auth = auth
        self.pacing = pacing
        self.budget: RetryBudget = RetryBudget()
        self.gate: Gate | None = None if pacing is None else Gate(pacing, observer=observer)
        self._retry = RetryMiddleware(budget=self.budget, gate=self.gate, observer=observer)

    def retry(self, policy: RetryPolicy | None) -> RetryMiddleware:
        """The loop under `policy`; None: one attempt."""
        if policy is not self._retry.policy:  # the last one is most likely the next one
            self._retry = self._retry.with_policy(ONE_ATTEMPT if policy is None else policy)
        return self._retry


@attrs.frozen(kw_only=True)
class CallSettings:
    """What a call obeys, after the client's settings and the call's own are merged."""

    timeout: httpx.Timeout
    deadline: float | None
    retry: RetryPolicy | None
    max_response_bytes: int | None
    idempotent: bool | None = None
    phases: Mapping[str, float | None] = attrs.field(  # `timeout`, as httpx has it
        default=attrs.Factory(lambda self: _phases_of(self), takes_self=True), init=False, eq=False, repr=False
    )

    def updated(self, options: Mapping[str, Any], others: Collection[str] = REQUEST_OPTIONS) -> CallSettings:
        """These settings, with those of a call or a view put in place of them; `others` are none of the settings.

        Raises `ConfigurationError` for values that cannot work, TypeError for names that are not known.
        """
        changes: dict[str, Any] = {}
        for name in options:
            if name in CALL_CHECKS:
                changes[name] = CALL_CHECKS[name](options[name])
            elif name not in others:
                raise TypeError(f"there is no option {name!r} here")
        return attrs.evolve(self, **changes) if changes else self


def _phases_of(settings: CallSettings) -> Mapping[str, float | None]:
    return settings.timeout.as_dict()


@attrs.define(eq=False, kw_only=True, repr=False)
class Corridor:
    """What all calls of a client share. `pool` is None where slots are not ours (an injected transport or client)."""

    http: httpx.AsyncClient
    lane: Lane | None
    pool: ConnectionPool | None
    origin: Origin
    identity: Identity
    headers: httpx.Headers
    settings: CallSettings
    middleware: Sequence[Middleware]
    classify: Callable[[httpx.Response], LayerError | None] | None
    follow_redirects: bool
    observer: Observer
    is_closed: Callable[[], bool]
    live: set[anyio.CancelScope]
    scopes: Scopes = attrs.field(factory=Scopes)

    def begin(
        self, method: str, given: Quiet, *, into: Any = None, reader: Reader | None = None, streamed: bool = False
    ) -> Call:
        """A call to be run once; `given` is its path and options. Raises `ConfigurationError` for what cannot work.

        `reader` makes its value from the answer, in place of `into`.
        """
        if into is not None:
            _codec().check_into(into)
        settings = self.settings.updated(given) if len(given) > 1 else self.settings
        document = None
        if given.get("json") is not None:
            # Up front: what the caller does to it while the call waits is none of the call's.
            document = _codec().encode_json(given["json"])
        target = self.origin.target(given["path"])
        return Call(
            self,
            checked_method(method),
            target,
            self.origin.resolve(given["path"])
            if target is None
            else None,  # up front too: what leads elsewhere waits for nothing
            given,
            settings,
            into=into,
            reader=reader,
            streamed=streamed,
            document=document,
        )


class Call:
    """One call: what the user awaits. While it waits for its slot, little more than this exists of it."""

    __slots__ = (
        "_url",
        "corridor",
        "document",
        "given",
        "into",
        "method",
        "reader",
        "record",
        "request",
        "settings",
        "status",
        "streamed",
        "target",
    )

    def __init__(
        self,
        corridor: Corridor,
        method: str,
        target: bytes | None,
        url: httpx.URL | None,
        given: Quiet,
        settings: CallSettings,
        *,
        into: Any,
        reader: Reader | None,
        streamed: bool,
        document: bytes | None,
    ) -> None:
        self.corridor: Corridor = corridor
        self.method: str = method
        self.target: bytes | None = target
        self._url: httpx.URL | None = url
        self.status: int | None = None
        self.given: Quiet = given
        self.settings: CallSettings = settings
        self.into: Any = into
        self.reader: Reader | None = reader
        self.streamed: bool = streamed
        self.document: bytes | None = document
        self.record: ExchangeRecord = ExchangeRecord()
        self.request: httpx.Request | None = None

    async def run(self) -> Any:
        """The answer, read and below 400, or decoded where `into` was given; for a stream, an open response.

        Raises a `LayerError` for everything that goes wrong with the call, and nothing else but cancellation and what
        the user's own hooks raise.
        """
        record, settings, item = self.record, self.settings, current_item.get()
        record.idempotent = settings.idempotent
        if settings.retry is not None:
            record.gate_limit = settings.retry.retry_after_max
        if item is not None and item.is_open:
            record.is_patient, record.waiting = item.is_patient, item.waiting
            record.is_in_outage = item.is_in_outage
        else:  # a task that was begun for an item, and outlives it, is nobody's
            item = None
        started = time.perf_counter()
        record.gate = self.corridor.identity.gate
        error: str | None = None
        value: Any = MORE
        done = False
        try:
            # What waits for its slot, or for an open connection, is bounded by those: that takes no scope.
            sent, pool = None, self._queue()
            if pool is not None:
                record.slot = pool.acquire_nowait()
                has_waited = record.slot is None
                if has_waited:
                    try:  # here, since a coroutine more would be one for each of a hundred thousand that may wait
                        record.slot = await pool.acquire(settings.deadline)
                    except SlotTimeout:
                        raise self._deadline_exceeded() from None
                if not has_waited or self._may_go_on(started):
                    sent = self._drawn()
            if sent is not None and sent.connection is not None:
                value, sent = await self._unseen(sent, self._seconds_left(started)), None
            if value is MORE:
                value = await self._bounded(started, sent)
            done = True
        except BaseException as exc:
            error = type(exc).__name__
            # What the source of the tokens raised about a request of its own is not about this one.
            if isinstance(exc, LayerError) and (exc is not record.source_error or exc.request is None):
                self._complete(exc)
            if item is not None and isinstance(exc, Exception):
                self._blame(item, exc)
            raise
        finally:
            if not (done and self.streamed):
                record.release_slot()
            if item is not None:
                self._report(item, done=done)
            if hears_all(self.corridor.observer):
                elapsed = time.perf_counter() - started
                notify(
                    self.corridor.observer, CallFinished(self.info, self.status, error, len(record.attempts), elapsed)
                )
        return value

    @property
    def url(self) -> httpx.URL:
        """Where it goes."""
        url = self._url
        if url is None:
            url = self._url = self.corridor.origin.at(cast(bytes, self.target))
        return url

    @property
    def info(self) -> RequestInfo:
        """The method and the URL without its query."""
        record = self.record
        if record.info is None:
            if self.request is None:
                return RequestInfo.of_url(self.method, self.url)
            record.info = RequestInfo.of(self.request)
        return record.info

    def watch_body(self, response: httpx.Response) -> None:
        """Let the caller stream `response`: its errors are ours, wherever they are met, and say how much had come.

        It is held to `max_response_bytes` only where the call itself was given that.
        """
        border = functools.partial(self._translating_body, response)
        with border():
            bound_body(response, self.given.get("max_response_bytes"), border=border)

    @contextmanager
    def _translating_body(self, response: httpx.Response) -> Generator[None, None, None]:
        try:
            yield
        except httpx.RequestError as exc:
            self.record.maybe_processed = not self._is_safe()  # its head was answered
            exc.args = (f"{exc} after {response.num_bytes_downloaded} bytes of the body",)
            raise_translated(exc, self._context())
        except LayerError as exc:
            self.record.maybe_processed = not self._is_safe()
            if exc.request is None:
                self._complete(exc)
            raise

    def _context(self) -> ErrorContext:
        record = self.record
        return ErrorContext(self.info, record.attempts, record.maybe_processed, record.response_started)

    # The steps

    def _is_queued(self) -> bool:
        """Whether it stands in the queue first.

        A middleware needs a request, and may wait for other calls of this client, so that it must not hold a slot: with
        one, calls build their requests and queue then.
        """
        return self.corridor.pool is not None and not self.corridor.middleware

    def _queue(self) -> ConnectionPool | None:
        """Where it waits for its slot first of all; None where a gate has to be asked before."""
        gate = self.corridor.identity.gate
        if not self._is_queued() or not (gate is None or gate.is_off):
            return None
        self._be_open()
        return self.corridor.pool

    def _may_go_on(self, started: float) -> bool:
        """Whether nothing happened while it stood in the queue: no time may be left, or a gate may ask."""
        gate = self.corridor.identity.gate
        if self._seconds_left(started) == 0:  # others kept the event loop busy for as long
            raise self._deadline_exceeded()
        if gate is not None and not gate.is_off:
            self.record.release_slot()
            return False
        return True

    def _drawn(self) -> Any:
        lane = self.corridor.lane
        return None if lane is None or not self._is_simple() else lane.draw(self, self.corridor.identity.auth)

    async def _unseen(self, sent: Any, deadline: float | None) -> Any:
        """What the call gives, if its first attempt, made without a request, ends it; else `MORE`."""
        lane = self.corridor.lane
        assert lane is not None
        try:
            await lane.send(sent, self, deadline)
        except DeadlinePassed:
            raise self._deadline_exceeded() from None
        if sent.body(self.record, self.settings.max_response_bytes) is not None:
            return self._concluded(lane, sent)
        self.record.sent = sent
        return MORE

    async def _bounded(self, started: float, sent: Any) -> Any:
        """What the call gives; all that it may wait for is bounded by its deadline, or by the closing of the client."""
        corridor = self.corridor
        self.record.scope = scope = corridor.scopes.after(self._seconds_left(started))
        corridor.live.add(scope)
        try:
            with scope:
                return await self._value(sent)
        finally:
            corridor.live.discard(scope)
        raise self._ended_early()

    async def _value(self, sent: Any) -> Any:
        """The same, unbounded. Raises errors of the tree only, but for those of the user's own hooks."""
        record = self.record
        try:
            if record.slot is None and record.sent is None and self._is_queued():
                await self._admit()
                sent = self._drawn()
            if sent is not None:
                value = await self._unseen(sent, None)
                if value is not MORE:
                    return value
            request, retry = self._prepared(), self.corridor.identity.retry(self.settings.retry)
            if self.corridor.middleware:
                response = await self._through_middleware(request, retry)
            else:
                response = await retry(request, self._attempt)
        except (httpx.RequestError, httpx.InvalidURL) as exc:
            if exc is self.record.source_error:
                raise
            raise_translated(exc, self._context())
        self.status = response.status_code
        error = self._error_in(response)
        if error is not None:
            del response  # its repr shows the server's own words
            try:
                raise error
            finally:
                del error  # it has this frame
        return self._of(response)

    def _is_simple(self) -> bool:
        """Whether there is nothing about it that takes an httpx.Request to say."""
        return (
            self.target is not None
            and not self.streamed
            and self.corridor.classify is None
            and self.given.keys().isdisjoint(PECULIAR)
        )

    def _concluded(self, lane: Lane, sent: Any) -> Any:
        """What the call gives whose first attempt was `sent` without a request, and answered with all that there is."""
        record, identity = self.record, self.corridor.identity
        self.status = sent.answer.status
        if identity.gate is not None and record.says_more:
            identity.gate.hear(sent.answer.headers)
        identity.auth.succeed(sent.turn)
        if hears_all(self.corridor.observer):
            record.info = self.info
        identity.retry(self.settings.retry).succeed(None, record, sent.answer.status)
        if self._gives_response or self.reader is not None:
            return self._of(self._response_to(lane, sent))
        sent.release(record)
        try:
            return _codec().decode_bytes(sent.answer.body, self.into)
        except ResponseDecodeError:
            return self._of(self._response_to(lane, sent))  # that error tells more

    def _response_to(self, lane: Lane, sent: Any) -> httpx.Response:
        return lane.answered(self._prepared(), sent, self.record, self.corridor.identity.auth)

    def _prepared(self) -> httpx.Request:
        self.request = request = self._build()
        request.extensions[EXTENSION] = self.record
        return request

    def _of(self, response: httpx.Response) -> Any:
        if self._gives_response:
            return response
        return self.reader(response) if self.reader is not None else _codec().decode(response, self.into)

    async def _through_middleware(self, request: httpx.Request, retry: RetryMiddleware) -> httpx.Response:
        send = _wrap(retry, self._attempt)
        for middleware in reversed(self.corridor.middleware):
            send = _wrap(middleware, send)
        response = await send(request)
        if not isinstance(response, httpx.Response):
            raise TypeError(f"a middleware must return an httpx.Response, not {type(response).__name__}")
        if not response.is_closed and self._is_to_be_read(response):
            # It made the answer itself, or had it from elsewhere.
            await self._read(response)
        return response

    def _build(self) -> httpx.Request:
        """The request. Raises `ConfigurationError` for what cannot be sent, quoting none of it."""
        lane = self.corridor.lane
        if lane is not None and self.given.keys().isdisjoint(PECULIAR):
            request = lane.request(self.method, self.url, self.document, self.settings.phases)
            if request is not None:
                return request
        try:
            request = self.corridor.http.build_request(
                self.method,
                self.url,
                timeout=self.settings.timeout,
                **self._content(),
            )
        except ConfigurationError:
            raise
        except (TypeError, ValueError, AttributeError) as exc:  # httpx quotes the value, which may be a secret
            what = f"data or files cannot be encoded ({type(exc).__name__})"
        else:
            request.__class__ = QuietRequest
            return request
        raise ConfigurationError(f"{what}: names and values are text, numbers, True, False or None; files are bytes.")

    def _content(self) -> Quiet:
        given = self.given
        content = Quiet(checked_body(given))
        content["params"] = merged_params(given["path"], given.get("params"))
        content["headers"] = merged_headers(self.corridor.headers, given.get("headers"))
        if self.document is not None:
            content["content"] = self.document
            content["headers"].setdefault("Content-Type", "application/json")
        return content

    def _seconds_left(self, started: float) -> float | None:
        seconds = self.settings.deadline
        return None if seconds is None else max(0.0, seconds + started - time.perf_counter())

    def _be_open(self) -> None:
        if self.corridor.is_closed():
            raise ClientClosedError("the client is closed.")

    async def _admit(self) -> None:
        """Wait at the gate while it is shut, then for a slot; no slot is held at the gate."""
        record, gate, pool = self.record, self.corridor.identity.gate, self.corridor.pool
        while record.slot is None:
            asked = gate is not None and not gate.is_off
            if asked:
                await record.pass_gate()
            self._be_open()
            if pool is None:
                return
            record.phase = "queue"
            record.slot = await pool.acquire()
            if gate is not None and not gate.is_off and (gate.is_shut or not asked):
                record.release_slot()  # the gate shut while the call stood in the queue

    async def _attempt(self, request: httpx.Request) -> httpx.Response:
        record, corridor = self.record, self.corridor
        if record.sent is None:
            if record.slot is None:
                await self._admit()
            record.phase = "read" if corridor.pool is None else "connect"
        response: httpx.Response | None = None
        lane = corridor.lane
        is_read = record.sent is not None or (
            lane is not None and not self.streamed and corridor.origin.admits(request.url) and lane.is_open
        )
        try:
            if is_read:
                assert lane is not None
                auth, limit = corridor.identity.auth, self.settings.max_response_bytes
                response = await lane.exchange(request, record, auth, limit)
            else:
                response = await self._send(request)
            if corridor.identity.gate is not None and record.says_more is not False:
                corridor.identity.gate.hear(response.headers.raw)
            while corridor.follow_redirects and self._may_follow(response):
                history = [*response.history, response]
                assert response.next_request is not None
                await read_bounded(response, BODY_LIMIT, truncate=True)
                record.maybe_processed = record.maybe_processed or not self._is_safe()
                await record.pass_gate()
                response = await self._send(response.next_request)
                response.history = history
                is_read = False
            if self._is_to_be_read(response):
                if not is_read:
                    await self._read(response)
                record.release_slot()
                self._classify(response)
        except BaseException:
            try:
                if response is not None:
                    await response.aclose()
            finally:
                record.release_slot()
            raise
        return response

    async def _send(self, request: httpx.Request) -> httpx.Response:
        auth = self.corridor.identity.auth
        return await self.corridor.http.send(request, auth=auth, stream=True, follow_redirects=False)

    def _may_follow(self, response: httpx.Response) -> bool:
        """Only to the origin itself, only where the body can be sent again, and not for ever."""
        following = response.next_request
        return (
            following is not None
            and len(response.history) < MAX_REDIRECTS
            and self.corridor.origin.admits(following.url)
            and is_replayable(following)
        )

    def _is_to_be_read(self, response: httpx.Response) -> bool:
        return not self.streamed or response.status_code >= 400

    async def _read(self, response: httpx.Response) -> None:
        if response.status_code >= 400:
            await read_bounded(response, BODY_LIMIT, truncate=True)
        else:
            await read_bounded(response, self.settings.max_response_bytes)

    def _classify(self, response: httpx.Response) -> None:
        classify = self.corridor.classify
        if classify is not None and response.status_code < 400:
            error = classify(response)
            if error is not None and not isinstance(error, LayerError):
                raise TypeError(f"classify must return a LayerError or None, not {type(error).__name__}")
            if error is not None:
                raise error

    # What a bulk is told

    def _report(self, item: ItemRecord, *, done: bool) -> None:
        record = self.record
        item.attempts = (item.attempts or 0) + len(record.attempts)
        item.last_attempts = record.attempts
        item.is_cut_short = record.is_cut_short
        if record.maybe_processed or (done and not self._is_safe()):
            item.has_acted = True

    def _blame(self, item: ItemRecord, error: Exception) -> None:
        """Say whether `error` is the item's own, or one that any other would meet now."""
        record = self.record
        if isinstance(error, AuthenticationError) and self.corridor.identity.auth.is_refused:
            item.refusal = error
        elif record.phase == "refresh":  # the source of the tokens has trouble
            if not isinstance(error, ConfigurationError):
                item.outage = error
        elif record.is_outage or isinstance(error, RateLimitError):
            item.outage = error

    def _is_safe(self) -> bool:
        headers = self.corridor.headers if self.request is None else self.request.headers
        return is_safe_to_repeat(self.method, self.record, headers=headers)

    # What the user gets instead of an answer

    def _error_in(self, response: httpx.Response) -> LayerError | None:
        """What `response` means, where that is no answer: its status, or a redirect where a document is wanted."""
        code = response.status_code
        if code < 300:
            return None
        secrets = self.corridor.identity.auth.secrets
        if code >= 400:
            return status_error(response, response.content, retry_after=retry_after(response), secrets=secrets)
        if self._gives_response:
            return None
        target = response.next_request
        where = "nowhere" if target is None else str(Origin.of_url(target.url))
        error = status_error(response, response.content, secrets=secrets)
        advice = f"follow_redirects=True follows those that stay at the client's own origin, {MAX_REDIRECTS} in a row."
        if self.corridor.follow_redirects:
            advice = f"Followed are those that stay at the client's own origin, {MAX_REDIRECTS} in a row."
        error.args = (
            f"{code}: a redirect to {where} that was not followed, so there is no document to read. {advice}",
        )
        error.maybe_processed = not self._is_safe()
        return error

    @property
    def _gives_response(self) -> bool:
        return self.into is None and self.reader is None

    def _ended_early(self) -> LayerError:
        """The scope was cancelled: by its deadline, or by the closing of the client."""
        if self.corridor.is_closed():
            return ClientClosedError(f"the client was closed during the call, in its {self.record.phase} phase.")
        return self._deadline_exceeded()

    def _deadline_exceeded(self) -> DeadlineExceededError:
        record = self.record
        sent = record.phase in ("write", "read") and record.bytes_written != 0
        if sent and not self._is_safe():
            record.maybe_processed = True
        if record.phase in ("connect", "write", "read"):
            record.is_outage = record.response_started is not True
        return DeadlineExceededError(
            f"the deadline of {self.settings.deadline:g} s passed in the {record.phase} phase. {ADVICE[record.phase]}",
            phase=record.phase,
        )

    def _complete(self, error: LayerError) -> None:
        """Tell `error` what only the call knows, where it does not say so itself."""
        record, secrets = self.record, self.corridor.identity.auth.secrets
        error.args = (scrub(str(error.args[0]), secrets),)
        if isinstance(error, ResponseDecodeError):
            error.path = scrub(error.path, secrets)
        if error.request is None:
            error.request = self.info
        if not error.attempts:
            error.attempts = record.attempts
        error.maybe_processed = error.maybe_processed or record.maybe_processed


ADVICE = {
    "queue": "All slots were busy: start fewer calls at once, or raise `limits` or `deadline`.",
    "gate": "The server asked all calls to wait: slow down, or raise `deadline`.",
    "refresh": "The source of the tokens did not answer in time.",
    "connect": "No connection could be made in time: is the host right, and reachable from here?",
    "write": "The server took the request too slowly.",
    "read": "The server did not answer in time, or too slowly.",
    "sleep": "Earlier attempts had failed; see `attempts`.",
}


@functools.cache
def _codec() -> Any:
    """Loaded with its engine by the first call that decodes or encodes; an import at each call would cost more."""
    from . import _codec

    return _codec


def _wrap(middleware: Middleware, call_next: CallNext) -> CallNext:
    async def send(request: httpx.Request) -> httpx.Response:
        return await middleware(request, call_next)

    return send
