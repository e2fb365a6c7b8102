"""Whether a failed attempt is followed by another, and when: `RetryPolicy.decide` says so, `RetryMiddleware` does it.

Rules: `_failures` knows what can go wrong, the policy is pure, the loop is short. Retry decides whether and the gate
decides when: one sleep, never two. Nothing but `httpx.RequestError` and `APIStatusError` is caught, so that
cancellation and the errors of mocking tools pass; no slot is held while a call sleeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import SystemRandom
from typing import Any, Protocol, cast

import anyio
import attrs
import httpx

from ._errors import (
    APIStatusError,
    AttemptInfo,
    ConfigurationError,
    MalformedResponseError,
    RequestInfo,
    ResponseDecodeError,
)
from ._exchange import ExchangeRecord, is_replayable
from ._failures import FREE, NEVER, RATE_LIMITED, Failure, classify_failure, is_safe_to_repeat
from ._telemetry import AttemptFinished, Observer, RetryScheduled, hears_all, notify
from ._values import number, shown

__all__ = [
    "CallNext",
    "Decision",
    "Middleware",
    "RetryBudget",
    "RetryMiddleware",
    "RetryPolicy",
    "Shuttable",
]

CallNext = Callable[[httpx.Request], Awaitable[httpx.Response]]
Middleware = Callable[[httpx.Request, CallNext], Awaitable[httpx.Response]]


PATIENCE = 3600.0
"""The longest that a bulk's item sleeps for one 429, in seconds; then the server is asked again."""


class Shuttable(Protocol):
    """A gate, as far as this room knows it: `call_next` waits there, this room only tells it of each 429."""

    def slow_down(self, seconds: float, *, turn: int, is_asked: bool) -> None:
        """The attempt with number `turn` was answered 429. `seconds`: what the server asks for, else a guess."""


# What follows


@attrs.frozen
class Decision:
    """What follows a failure.

    `retry` says whether there is another attempt, `delay` after how many seconds, `fresh` whether on a new connection.
    `cost` is what the failure takes from the budget, whether or not there is another attempt. `at_gate` means that the
    gate is to hear of it, likewise in either case. `refused` says why there is none: row, often, attempts, body,
    retry-after, deadline, budget, or outage (a bulk waits for its end).
    """

    retry: bool
    delay: float = 0.0
    cost: float = FREE
    at_gate: bool = False
    fresh: bool = False
    refused: str | None = None


def _is_seconds(value: Any) -> bool:
    return number(value) >= 0


def _seconds(_: Any, field: attrs.Attribute[float], value: Any) -> None:
    if not _is_seconds(value):
        raise ConfigurationError(f"RetryPolicy({field.name}=) takes seconds, 0 or more, not {shown(value)}.")


def _count(_: Any, field: attrs.Attribute[int], value: Any) -> None:
    least = 1 if field.name == "attempts" else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(
            f"RetryPolicy({field.name}=) takes a whole number of at least {least}, not {shown(value)}."
        )


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """What is tried again, how often and after how long.

    `attempts`: how many attempts a call makes in all, those that were answered 429 apart. `backoff_initial` and
    `backoff_max`: the n-th wait is drawn from 0 to `backoff_initial` · 2ⁿ seconds, but no more than `backoff_max` (full
    jitter). `retry_after_max`: the longest wait in seconds that a server may ask for (`Retry-After`, RFC 9110 section
    10.2.3); when it asks for more, the call fails at once. `rate_limited_attempts`: how many attempts of a call may be
    answered 429 (1: the first one fails the call; 0: no bound). Raises `ConfigurationError` for anything else.
    """

    attempts: int = attrs.field(default=4, validator=_count)
    backoff_initial: float = attrs.field(default=0.5, validator=_seconds)
    backoff_max: float = attrs.field(default=8.0, validator=_seconds)
    retry_after_max: float = attrs.field(default=60.0, validator=_seconds)
    rate_limited_attempts: int = attrs.field(default=10, validator=_count)

    def backoff(self, number: int, jitter: float) -> float:
        """Seconds before the retry that has `number` backed-off ones before it; `jitter` is from 0 to 1."""
        # 2**64 of anything is past every bound, and further powers would overflow.
        return jitter * min(self.backoff_max, self.backoff_initial * 2.0 ** min(number, 64))

    def decide(
        self,
        failure: Failure,
        earlier: Sequence[Failure] = (),
        *,
        safe: bool,
        replayable: bool = True,
        time_left: float = math.inf,
        attempt_time: float | None = None,
        jitter: float = 1.0,
        patient: bool = False,
    ) -> Decision:
        """What follows `failure` in a call that met `earlier` before.

        `safe`: the request may be sent again although it may have been processed. `replayable`: its body can be.
        `time_left`: seconds to the deadline. `attempt_time`: the read timeout, None for none. `jitter`: a random number
        from 0 to 1. `patient`: a 429 is waited out, however often it comes, whatever the deadline, and however long.
        """
        row = failure.row
        first_stale = failure.stale and not any(past.stale for past in earlier)
        if first_stale or row.at_once:
            delay = 0.0
        elif row.heeds_retry_after and failure.retry_after is not None:
            delay = failure.retry_after
        else:
            delay = self.backoff(_backed_off(earlier), jitter)
        patient = patient and row is RATE_LIMITED
        longest = math.inf if patient else self.retry_after_max
        bound = 0 if patient else self.rate_limited_attempts
        refused = self._refusal(failure, earlier, safe=safe, rate_limited_bound=bound)
        if refused is None and not replayable:
            refused = "body"
        if row.heeds_retry_after and (failure.retry_after or 0.0) > longest:
            refused = refused or "retry-after"
        needed = (attempt_time or 0.0) / 2 if row.needs_half_an_attempt else 0.0
        if refused is None and not patient and (delay >= time_left or delay + needed > time_left):
            refused = "deadline"
        return Decision(
            retry=refused is None,
            delay=delay,
            cost=FREE if first_stale else row.cost,
            at_gate=row is RATE_LIMITED,
            fresh=row.fresh or failure.stale,
            refused=refused,
        )

    def _refusal(
        self, failure: Failure, earlier: Sequence[Failure], *, safe: bool, rate_limited_bound: int
    ) -> str | None:
        """Why the table or the number of attempts allows no other, or None."""
        row = failure.row
        limit = row.safe if safe else row.unsafe
        if limit == NEVER or (failure.redirected and not safe):
            return "row"
        if sum(past.row is row for past in earlier) >= limit:
            return "often"
        limited = sum(past.row is RATE_LIMITED for past in earlier)
        if row is RATE_LIMITED:
            return "attempts" if 0 < rate_limited_bound <= limited + 1 else None
        return "attempts" if len(earlier) - limited + 1 >= self.attempts else None


def _backed_off(earlier: Sequence[Failure]) -> int:
    """How many of the retries so far waited."""
    return len(earlier) - sum(past.row.at_once for past in earlier) - any(past.stale for past in earlier)


class RetryBudget:
    """Stops retries while most of what is sent fails, after gRPC's proposal A6 (retry throttling).

    `capacity` tokens at first and at most; each failed attempt takes what its row of the table costs, each success
    gives `refund` back, and at or below `threshold` nothing that costs is tried again. One budget serves all calls to a
    server. Raises `ConfigurationError` for anything but numbers with 0 ≤ `threshold` < `capacity` and 0 ≤ `refund`.
    """

    def __init__(self, *, capacity: float = 100.0, threshold: float = 50.0, refund: float = 0.1) -> None:
        if not (_is_seconds(capacity) and _is_seconds(threshold) and _is_seconds(refund) and threshold < capacity):
            raise ConfigurationError(
                "RetryBudget takes 0 <= threshold < capacity and refund >= 0, "
                f"not threshold={shown(threshold)}, capacity={shown(capacity)}, refund={shown(refund)}."
            )
        self._capacity = self._tokens = float(capacity)
        self._threshold = float(threshold)
        self._refund = float(refund)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self._tokens:.1f} of {self._capacity:.1f}, retries above {self._threshold:.1f}>"
        )

    @property
    def tokens(self) -> float:
        """What is left."""
        return self._tokens

    def withdraw(self, cost: float) -> bool:
        """Take `cost` for a failed attempt; whether it may be tried again. What costs nothing always may."""
        self._tokens = max(0.0, self._tokens - cost)
        return cost == FREE or self._tokens > self._threshold

    def refund(self) -> None:
        """Give back for a success."""
        self._tokens = min(self._capacity, self._tokens + self._refund)


# The loop


class RetryMiddleware:
    """Sends a request until an attempt succeeds or `policy`, `budget` or the deadline allow no other.

    `await middleware(request, call_next)` returns the last response, whatever its status, or raises the last
    `httpx.RequestError` as it is; `call_next` is `client.send` of any `httpx.AsyncClient`. The deadline is that of the
    anyio scopes around the call. `budget` defaults to one of its own. `gate` is shut when the server says slow down:
    `call_next` must then wait there; without a gate the call waits here. `observer` hears of each attempt and retry.
    What each attempt met is kept in the request's `ExchangeRecord`.
    """

    __slots__ = ("_gate", "_observer", "_random", "_sleep", "budget", "policy")

    def __init__(
        self,
        policy: RetryPolicy = RetryPolicy(),
        budget: RetryBudget | None = None,
        *,
        gate: Shuttable | None = None,
        observer: Observer | None = None,
        # The system's randomness: neither a fork nor a `random.seed()` makes two processes wait in step.
        random: Callable[[], float] = SystemRandom().random,  # noqa: B008 - holds no state
        sleep: Callable[[float], Awaitable[Any]] = anyio.sleep,
    ) -> None:
        if not isinstance(policy, RetryPolicy):
            raise ConfigurationError(f"policy must be a RetryPolicy, not {type(policy).__name__}.")
        if budget is not None and not isinstance(budget, RetryBudget):
            raise ConfigurationError(f"budget must be a RetryBudget, not {type(budget).__name__}.")
        if gate is not None and not callable(getattr(gate, "slow_down", None)):
            raise ConfigurationError(f"gate must have a method `slow_down`, and {type(gate).__name__} has none.")
        if observer is not None and not callable(observer):
            raise ConfigurationError(f"observer must be callable, and {type(observer).__name__} is not.")
        self.policy: RetryPolicy = policy
        self.budget: RetryBudget = RetryBudget() if budget is None else budget
        self._gate = gate
        self._observer = observer
        self._random = random
        self._sleep = sleep

    def with_policy(self, policy: RetryPolicy) -> RetryMiddleware:
        """The same under another policy: budget, gate and observer are shared."""
        return RetryMiddleware(
            policy, self.budget, gate=self._gate, observer=self._observer, random=self._random, sleep=self._sleep
        )

    async def __call__(self, request: httpx.Request, call_next: CallNext) -> httpx.Response:
        """The last response to `request`, of any status; raises what the last attempt raised."""
        record = ExchangeRecord.of(request)
        earlier: list[Failure] = []
        while True:
            if record.sent is None:
                record.begin_attempt()
            try:
                response = await call_next(request)
            except (httpx.RequestError, APIStatusError) as exc:
                if exc is record.source_error:
                    raise
                decision = self._judge(exc, request, record, earlier)
                if not decision.retry:
                    raise
            except (MalformedResponseError, ResponseDecodeError) as exc:
                if exc is not record.source_error:  # it came, and would come again as it is
                    safe = is_safe_to_repeat(request.method, record, headers=request.headers)
                    record.maybe_processed = record.maybe_processed or not safe
                    self._note(request, record, type(exc).__name__, None, None)
                raise
            else:
                if response.status_code < 400:
                    self.succeed(request, record, response.status_code)
                    return response
                decision = self._judge(response, request, record, earlier)
                if not decision.retry:
                    return response
                # That it cannot be closed in order is no reason to give up: its connection is gone either way.
                with suppress(httpx.RequestError):
                    await response.aclose()
                del response  # a call that waits holds on to nothing
            record.release_slot()
            await self._pause(decision, record)

    def succeed(self, request: httpx.Request | None, record: ExchangeRecord, status_code: int) -> None:
        """Take note of an attempt that went well; `request` may be None where `record` knows how it is shown."""
        self.budget.refund()
        self._note(request, record, str(status_code), status_code, None)

    def _judge(
        self,
        outcome: httpx.Response | httpx.RequestError | APIStatusError,
        request: httpx.Request,
        record: ExchangeRecord,
        earlier: list[Failure],
    ) -> Decision:
        """Decide what follows, charge the budget, shut the gate, and note it all; synchronous."""
        failure = classify_failure(outcome, request)
        safe = is_safe_to_repeat(request.method, record, headers=request.headers)
        decision = self.policy.decide(
            failure,
            earlier,
            safe=safe,
            replayable=is_replayable(request),
            time_left=anyio.current_effective_deadline() - anyio.current_time(),
            attempt_time=request.extensions.get("timeout", {}).get("read"),
            jitter=self._random(),
            patient=record.is_patient,
        )
        if not self.budget.withdraw(decision.cost) and decision.retry:
            decision = attrs.evolve(decision, retry=False, refused="budget")
        elif decision.retry and failure.row.outage and record.is_in_outage is not None and record.is_in_outage():
            decision = attrs.evolve(decision, retry=False, refused="outage")
        record.is_cut_short = decision.refused in ("budget", "outage")
        record.is_outage = failure.row.outage or decision.refused == "budget"
        earlier.append(failure)
        record.maybe_processed = record.maybe_processed or (failure.processed and not safe)
        if decision.at_gate and self._gate is not None:
            self._gate.slow_down(decision.delay, turn=record.turn, is_asked=failure.retry_after is not None)
        delay = decision.delay if decision.retry else None
        self._note(request, record, failure.cause, failure.status_code, delay)
        return decision

    async def _pause(self, decision: Decision, record: ExchangeRecord) -> None:
        """Wait for as long as was decided; at a gate it is `call_next` that waits."""
        record.fresh = decision.fresh
        if decision.delay > 0 and not (decision.at_gate and self._gate is not None):
            record.phase = "sleep"
            if decision.at_gate and record.is_patient:
                with record.patiently():
                    await self._sleep(min(decision.delay, PATIENCE))
            else:
                await self._sleep(decision.delay)
            record.phase = "queue"

    def _note(
        self,
        request: httpx.Request | None,
        record: ExchangeRecord,
        outcome: str,
        status_code: int | None,
        delay: float | None,
    ) -> None:
        """Append the attempt to the record, and tell the observer."""
        record.fresh = False
        number = len(record.attempts) + 1
        elapsed = time.perf_counter() - record.started
        record.attempts += (AttemptInfo(number, outcome, status_code, elapsed, delay),)
        if delay is None and not hears_all(self._observer):
            return
        info = record.info = record.info or RequestInfo.of(cast(httpx.Request, request))
        error = None if outcome == str(status_code) else outcome
        notify(self._observer, AttemptFinished(info, number, status_code, error, elapsed, record.reused))
        if delay is not None:
            notify(self._observer, RetryScheduled(info, number, outcome, delay))
