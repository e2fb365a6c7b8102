"""One call, top to bottom: the corridor that joins the other rooms, each step knowing only the next.

    run          open the deadline scope, make the error tree, tell the observer
      _respond     wait for the first slot, only then build the request; the user's middleware
        RetryMiddleware
          _attempt   gate, slot, httpx send (DualTokenAuth attaches the tokens), same-origin redirects, read, classify

Rules: a call holds at most one slot, and none while it sleeps, refreshes tokens or waits at the gate; whatever ends a
call, its slot is free when the call returns, without an await. There is no second path: verbs, stream, bulk and the
command line all come through here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import attrs
import httpx

from ._auth import DualTokenAuth
from ._bulk import current_item
from ._errors import (
    BODY_LIMIT,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    ErrorContext,
    LayerError,
    RequestInfo,
    ResponseDecodeError,
    raise_translated,
    scrub,
    status_error,
)
from ._exchange import EXTENSION, ExchangeRecord, is_replayable, read_bounded, retry_after
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
from ._pool import ConnectionPool
from ._retry import CallNext, Middleware, RetryBudget, RetryMiddleware, RetryPolicy
from ._telemetry import CallFinished, Observer, notify

MAX_REDIRECTS = 20


class QuietRequest(httpx.Request):
    """A request whose repr leaves out the query: a traceback that shows local variables shows it."""

    def __repr__(self) -> str:
        return f"<Request({self.method!r}, {RequestInfo.of(self).url!r})>"


class Identity:
    """One pair of tokens as the server sees it: its auth, its retry budget, its gate. Not shared with other tokens.

    Without `pacing` there is no gate: each call waits out what it was answered itself.
    """

    def __init__(self, auth: DualTokenAuth, pacing: Pacing | None, observer: Observer) -> None:
        self.auth = auth
        self.pacing = pacing
        self.budget = RetryBudget()
        self.gate = None if pacing is None else Gate(pacing, observer=observer)


@attrs.frozen(kw_only=True)
class CallSettings:
    """What a call obeys, after the client's settings and the call's own are merged."""

    timeout: httpx.Timeout
    deadline: float | None
    retry: RetryPolicy | None
    max_response_bytes: int | None
    idempotent: bool | None = None

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


@attrs.define(eq=False, kw_only=True, repr=False)
class Corridor:
    """What all calls of a client share. `pool` is None where slots are not ours (an injected transport or client)."""

    http: httpx.AsyncClient
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

    def begin(self, method: str, given: Quiet, *, into: Any = None, streamed: bool = False) -> Call:
        """A call to be run once; `given` is its path and options. Raises `ConfigurationError` for what cannot work."""
        if into is not None:
            from ._codec import check_into  # here as below: who decodes nothing does not load the engine

            check_into(into)
        settings = self.settings.updated(given) if len(given) > 1 else self.settings
        document = None
        if given.get("json") is not None:
            from ._codec import encode_json

            # Up front: what the caller does to it while the call waits is none of the call's.
            document = encode_json(given["json"])
        return Call(
            corridor=self,
            method=checked_method(method),
            given=given,
            settings=settings,
            into=into,
            streamed=streamed,
            document=document,
        )


@attrs.define(eq=False, kw_only=True, repr=False)
class Call:
    """One call: what the user awaits. While it waits for its slot, little more than this exists of it."""

    corridor: Corridor
    method: str
    given: Quiet
    settings: CallSettings
    into: Any
    streamed: bool
    document: bytes | None
    record: ExchangeRecord = attrs.field(factory=ExchangeRecord)
    scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope)
    request: httpx.Request | None = None

    async def run(self) -> Any:
        """The answer, read and below 400, or decoded where `into` was given; for a stream, an open response.

        Raises a `LayerError` for everything that goes wrong with the call, and nothing else but cancellation and what
        the user's own hooks raise.
        """
        record, settings, item = self.record, self.settings, current_item.get()
        record.idempotent = settings.idempotent
        record.is_patient = item is not None and item.is_patient
        record.gate, record.scope = self.corridor.identity.gate, self.scope
        if settings.retry is not None:
            record.gate_limit = settings.retry.retry_after_max
        started = time.perf_counter()
        if settings.deadline is not None:
            self.scope.deadline = anyio.current_time() + settings.deadline
        status: int | None = None
        error: str | None = None
        value: Any = None
        done = False
        self.corridor.live.add(self.scope)
        try:
            with self.scope:
                response = await self._translated()
                status = response.status_code
                self._raise_for_status(response)
                value = response if self.into is None else self._decode(response)
                done = True
            if not done:
                raise self._ended_early()
        except BaseException as exc:
            error = type(exc).__name__
            if isinstance(exc, LayerError):
                self._complete(exc)
            raise
        finally:
            self.corridor.live.discard(self.scope)
            if not (done and self.streamed):
                record.release_slot()
            if item is not None:
                item.attempts = (item.attempts or 0) + len(record.attempts)
            elapsed = time.perf_counter() - started
            notify(self.corridor.observer, CallFinished(self.info, status, error, len(record.attempts), elapsed))
        return value

    @property
    def info(self) -> RequestInfo:
        """The method and the URL without its query."""
        record = self.record
        if record.info is None and self.request is not None:
            record.info = RequestInfo.of(self.request)
        if record.info is not None:
            return record.info
        try:
            return RequestInfo.of_url(self.method, self.corridor.origin.resolve(self.given["path"]))
        except ConfigurationError:
            return RequestInfo(self.method, f"{self.corridor.origin}/")

    @contextmanager
    def translating_body(self, response: httpx.Response) -> Generator[None, None, None]:
        """While the caller streams `response`, its errors become ours, and say how much had come."""
        try:
            yield
        except httpx.RequestError as exc:
            if exc._request is not response.request:
                raise
            exc.args = (f"{exc} after {response.num_bytes_downloaded} bytes of the body",)
            raise_translated(exc, self._context())
        except LayerError as exc:
            if exc.request is None:
                self._complete(exc)
            raise

    def _context(self) -> ErrorContext:
        record = self.record
        return ErrorContext(self.info, tuple(record.attempts), record.maybe_processed, record.response_started)

    # The steps

    async def _translated(self) -> httpx.Response:
        try:
            return await self._respond()
        except (httpx.RequestError, httpx.InvalidURL) as exc:
            raise_translated(exc, self._context())

    async def _respond(self) -> httpx.Response:
        corridor = self.corridor
        if not corridor.middleware and corridor.pool is not None:
            # A middleware needs a request, and may wait for other calls of this client, so that it must not hold a
            # slot: with one, calls build their requests and queue then.
            await self._admit()
        self.request = request = self._build()
        request.extensions[EXTENSION] = self.record
        send: CallNext = self._attempt
        policy = self.settings.retry or RetryPolicy(attempts=1, rate_limited_attempts=1)
        identity = corridor.identity
        send = _wrap(RetryMiddleware(policy, identity.budget, gate=identity.gate, observer=corridor.observer), send)
        for middleware in reversed(corridor.middleware):
            send = _wrap(middleware, send)
        response = await send(request)
        if not isinstance(response, httpx.Response):
            raise TypeError(f"a middleware must return an httpx.Response, not {type(response).__name__}")
        return response

    def _build(self) -> httpx.Request:
        """The request. Raises `ConfigurationError` for what cannot be sent, quoting none of it."""
        try:
            request = self.corridor.http.build_request(
                self.method,
                self.corridor.origin.resolve(self.given["path"]),
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

    async def _admit(self) -> None:
        """Wait at the gate while it is shut, then for a slot; no slot is held at the gate."""
        record, gate, pool = self.record, self.corridor.identity.gate, self.corridor.pool
        while record.slot is None:
            asked = gate is not None and not gate.is_off
            if asked:
                await record.pass_gate()
            if self.corridor.is_closed():
                raise ClientClosedError("the client is closed.")
            if pool is None:
                return
            record.phase = "queue"
            record.slot = await pool.acquire()
            if gate is not None and not gate.is_off and (gate.is_shut or not asked):
                record.release_slot()  # the gate shut while the call stood in the queue

    async def _attempt(self, request: httpx.Request) -> httpx.Response:
        record, corridor = self.record, self.corridor
        await self._admit()
        record.phase = "read" if corridor.pool is None else "connect"
        response: httpx.Response | None = None
        try:
            response = await self._send(request)
            if corridor.identity.gate is not None:
                corridor.identity.gate.hear(response.headers)
            while corridor.follow_redirects and self._may_follow(response):
                history = [*response.history, response]
                assert response.next_request is not None
                await read_bounded(response, BODY_LIMIT, truncate=True)
                await record.pass_gate()
                response = await self._send(response.next_request)
                response.history = history
            if not self.streamed or response.status_code >= 400:
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

    # What the user gets instead of an answer

    def _raise_for_status(self, response: httpx.Response) -> None:
        code = response.status_code
        if code >= 400:
            raise status_error(
                response,
                response.content,
                retry_after=retry_after(response),
                secrets=self.corridor.identity.auth.secrets,
            )
        if self.into is not None and 300 <= code <= 399:
            target = response.next_request
            where = "nowhere" if target is None else str(Origin.of_url(target.url))
            error = status_error(response, response.content, secrets=self.corridor.identity.auth.secrets)
            message = (
                f"{code}: a redirect to {where} that was not followed, so there is no document to read. "
                "follow_redirects=True follows those that stay at the client's own origin."
            )
            error.args = (message,)
            raise error

    def _decode(self, response: httpx.Response) -> Any:
        from ._codec import decode

        return decode(response, self.into)

    def _ended_early(self) -> LayerError:
        """The scope was cancelled: by its deadline, or by the closing of the client."""
        if self.corridor.is_closed():
            return ClientClosedError(f"the client was closed during the call, in its {self.record.phase} phase.")
        return self._deadline_exceeded()

    def _deadline_exceeded(self) -> DeadlineExceededError:
        record = self.record
        headers = None if self.request is None else self.request.headers
        sent = record.phase in ("write", "read") and record.bytes_written != 0
        if sent and not is_safe_to_repeat(self.method, record, headers=headers):
            record.maybe_processed = True
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
            error.attempts = tuple(record.attempts)
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


def _wrap(middleware: Middleware, call_next: CallNext) -> CallNext:
    async def send(request: httpx.Request) -> httpx.Response:
        return await middleware(request, call_next)

    return send
