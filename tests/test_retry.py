"""The retry loop over `client.send` of a bare `httpx.AsyncClient`: what is sent, slept, noted and raised."""

from __future__ import annotations

import asyncio
import functools
import gc
import io
import math
import socket
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import httpx
import pytest
import respx
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from respx.models import AllMockedAssertionError

from layer_async._errors import (
    APIStatusError,
    AuthenticationError,
    ConfigurationError,
    DeadlineExceededError,
    LayerError,
    MalformedResponseError,
    RateLimitError,
    RequestInfo,
    ResponseDecodeError,
    ServerError,
)
from layer_async._exchange import EXTENSION, ExchangeRecord
from layer_async._retry import CallNext, RetryBudget, RetryMiddleware, RetryPolicy
from layer_async._telemetry import AttemptFinished, Event, RetryScheduled

pytestmark = pytest.mark.anyio

URL = "https://api.example/things"

Step = int | httpx.Response | BaseException | type[BaseException]


class Script:
    """A server that answers as it is told, and writes down what it was sent; the last step stands for all that follow.

    A step is a status, a response, or an exception. Before each answer the record is told what a transport would.
    """

    def __init__(self, *steps: Step, **record: Any) -> None:
        self.steps = list(steps)
        self.told = record
        self.bodies: list[bytes] = []
        self.fresh: list[bool] = []

    @property
    def calls(self) -> int:
        return len(self.bodies)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        record = ExchangeRecord.of(request)
        assert (record.bytes_written, record.reused) == (None, None)
        self.fresh.append(record.fresh)
        step = self.steps[min(len(self.bodies), len(self.steps) - 1)]
        if isinstance(step, httpx.ConnectError):
            self.bodies.append(b"")
            raise step
        assert isinstance(request.stream, httpx.AsyncByteStream)
        self.bodies.append(b"".join([chunk async for chunk in request.stream]))
        for name, value in self.told.items():
            setattr(record, name, value)
        if isinstance(step, int):
            return httpx.Response(step, request=request)
        if isinstance(step, httpx.Response):
            return step
        raise step


@attrs.define
class Sleep:
    """A sleep that takes no time and remembers how long it should have been."""

    slept: list[float] = attrs.field(factory=list)

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


@attrs.define
class FakeGate:
    """Writes down what it was told."""

    shut_for: list[float] = attrs.field(factory=list)
    turns: list[int] = attrs.field(factory=list)
    asked: list[bool] = attrs.field(factory=list)

    def slow_down(self, seconds: float, *, turn: int, is_asked: bool) -> None:
        self.shut_for.append(seconds)
        self.turns.append(turn)
        self.asked.append(is_asked)


class Bench:
    """A middleware whose sleep takes no time and whose jitter is always the most."""

    def __init__(self, **options: Any) -> None:
        self.sleep = Sleep()
        self.events: list[Event] = []
        quiet: dict[str, Any] = {"random": lambda: 1.0, "sleep": self.sleep, "observer": self.events.append}
        self.middleware = RetryMiddleware(**(quiet | options))

    @property
    def slept(self) -> list[float]:
        return self.sleep.slept

    async def send(self, request: httpx.Request, script: CallNext) -> httpx.Response:
        return await self.middleware(request, script)


def get(method: str = "GET", **options: Any) -> httpx.Request:
    return httpx.Request(method, URL, **options)


def wait(status: int, seconds: str) -> httpx.Response:
    return httpx.Response(status, headers={"Retry-After": seconds})


# What is tried again


async def test_a_success_is_one_attempt() -> None:
    bench, script = Bench(), Script(200)
    assert (await bench.send(get(), script)).status_code == 200
    assert script.calls == 1
    assert bench.slept == []


async def test_a_redirect_that_nobody_follows_is_no_failure() -> None:
    script = Script(302)
    assert (await Bench().send(get(), script)).status_code == 302
    assert script.calls == 1


async def test_a_failure_is_tried_again_after_a_wait_that_grows() -> None:
    bench, script = Bench(), Script(503, httpx.ReadError("cut"), httpx.ConnectError("refused"), 200)
    assert (await bench.send(get(), script)).status_code == 200
    assert bench.slept == [0.5, 1.0, 2.0]


async def test_the_waits_are_drawn_from_the_whole_range() -> None:
    draws = iter([0.0, 0.25, 0.5])
    bench, script = Bench(random=lambda: next(draws)), Script(503, 503, 503, 200)
    await bench.send(get(), script)
    assert bench.slept == [0.25, 1.0]


async def test_the_default_randomness_stays_within_the_bounds() -> None:
    sleep = Sleep()
    middleware = RetryMiddleware(sleep=sleep)
    for _ in range(10):
        await middleware(get(), Script(502, 502, 200))
    assert len(sleep.slept) == 20
    assert len(set(sleep.slept)) == 20
    assert all(0 < first <= 0.5 and 0 < second <= 1 for first, second in zip(*[iter(sleep.slept)] * 2, strict=True))


async def test_the_last_response_is_returned_whatever_its_status() -> None:
    script = Script(503)
    assert (await Bench().send(get(), script)).status_code == 503
    assert script.calls == 4


async def test_the_last_exception_is_raised_as_it_is() -> None:
    last = httpx.ReadError("the last")
    script = Script(httpx.ReadError("cut"), httpx.ReadTimeout("slow"), httpx.ConnectError("refused"), last)
    with pytest.raises(httpx.ReadError, match="the last") as caught:
        await Bench().send(get(), script)
    assert caught.value is last
    assert caught.value.__context__ is None
    assert script.calls == 4


async def test_an_unsafe_request_that_may_have_been_processed_is_not_sent_again() -> None:
    steps: list[Step] = [500, 502, 503, 504]
    steps += [httpx.ReadError("cut"), httpx.ReadTimeout("slow"), httpx.WriteError("cut")]
    for step in steps:
        script = Script(step)
        request = get("POST", json={})
        with suppress(httpx.RequestError):
            await Bench().send(request, script)
        assert script.calls == 1
        assert ExchangeRecord.of(request).maybe_processed


async def test_an_unsafe_request_that_was_not_sent_is_sent_again() -> None:
    request, script = get("POST", json={"a": 1}), Script(httpx.ConnectError("refused"), 201)
    assert (await Bench().send(request, script)).status_code == 201
    assert script.bodies == [b"", b'{"a":1}']
    assert not ExchangeRecord.of(request).maybe_processed


@pytest.mark.parametrize("status", [408, 425])
async def test_an_unsafe_request_that_was_turned_away_is_sent_again_once(status: int) -> None:
    request, script = get("POST", json={}), Script(status)
    assert (await Bench().send(request, script)).status_code == status
    assert script.calls == 2
    assert not ExchangeRecord.of(request).maybe_processed


async def test_an_idempotency_key_of_the_callers_makes_an_unsafe_request_safe() -> None:
    request, script = get("POST", json={}, headers={"idempotency-key": "k1"}), Script(502, 201)
    assert (await Bench().send(request, script)).status_code == 201
    assert not ExchangeRecord.of(request).maybe_processed


async def test_no_idempotency_key_is_ever_added() -> None:
    request = get("POST", json={})
    await Bench().send(request, Script(httpx.ConnectError("refused"), 200))
    assert "idempotency-key" not in request.headers


@pytest.mark.parametrize(("method", "word", "calls"), [("POST", True, 4), ("GET", False, 1)])
async def test_the_callers_word_on_idempotence_holds(method: str, word: bool, calls: int) -> None:
    request, script = get(method), Script(502)
    ExchangeRecord.of(request).idempotent = word
    await Bench().send(request, script)
    assert script.calls == calls
    assert ExchangeRecord.of(request).maybe_processed is not word


async def test_a_safe_request_is_never_said_to_need_a_look() -> None:
    request = get("PUT", json={})
    with pytest.raises(httpx.ReadTimeout):
        await Bench().send(request, Script(httpx.ReadTimeout("slow")))
    assert not ExchangeRecord.of(request).maybe_processed


# Stale connections


async def test_a_broken_reused_connection_is_replaced_at_once_and_once_only() -> None:
    script = Script(httpx.ReadError("cut"), reused=True, bytes_written=10, response_started=False)
    bench = Bench()
    with pytest.raises(httpx.ReadError):
        await bench.send(get(), script)
    assert script.fresh == [False, True, True, True]
    assert bench.slept == [0.5, 1.0]
    assert bench.middleware.budget.tokens == 97.0


async def test_a_fresh_connection_is_asked_for_only_where_it_is_needed() -> None:
    script = Script(408, 503, 200)
    request = get()
    await Bench().send(request, script)
    assert script.fresh == [False, True, False]


async def test_a_fresh_connection_is_no_longer_asked_for_once_the_call_is_over() -> None:
    request = get()
    await Bench().send(request, Script(408, 200))
    assert not ExchangeRecord.of(request).fresh


# Slots, responses, phases


@attrs.define
class Diary:
    """Writes down what happens, in order."""

    entries: list[str] = attrs.field(factory=list)

    def release(self) -> None:
        self.entries.append("release")

    async def sleep(self, seconds: float) -> None:
        self.entries.append("sleep")


class Body(httpx.AsyncByteStream):
    def __init__(self, diary: Diary, error: httpx.RequestError | None = None) -> None:
        self.diary, self.error = diary, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"busy"  # pragma: no cover - nobody reads it: that is the point

    async def aclose(self) -> None:
        self.diary.entries.append("close")
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, httpx.CloseError("already gone")])
async def test_the_response_is_closed_and_the_slot_given_back_before_the_sleep(
    error: httpx.RequestError | None,
) -> None:
    diary = Diary()

    async def call_next(request: httpx.Request) -> httpx.Response:
        diary.entries.append("send")
        ExchangeRecord.of(request).slot = diary
        done = len(diary.entries) > 1
        return httpx.Response(200 if done else 503, stream=Body(diary, error))

    await Bench(sleep=diary.sleep).send(get(), call_next)
    assert diary.entries == ["send", "close", "release", "sleep", "send"]


async def test_the_slot_is_given_back_before_the_sleep_when_there_was_no_response() -> None:
    diary = Diary()

    async def call_next(request: httpx.Request) -> httpx.Response:
        ExchangeRecord.of(request).slot = diary
        if not diary.entries:
            raise httpx.ReadError("cut")
        return httpx.Response(200)

    await Bench(sleep=diary.sleep).send(get(), call_next)
    assert diary.entries == ["release", "sleep"]


async def test_the_phase_says_sleep_while_it_sleeps() -> None:
    request, phases = get(), list[str]()

    async def sleep(seconds: float) -> None:
        phases.append(ExchangeRecord.of(request).phase)

    await Bench(sleep=sleep).send(request, Script(503, 200))
    assert phases == ["sleep"]
    assert ExchangeRecord.of(request).phase == "queue"


async def test_a_call_that_sleeps_holds_on_to_nothing_of_what_failed() -> None:
    failed: list[weakref.ref[Any]] = []
    alive: list[object] = []

    class Remembered(httpx.ReadError):
        def __init__(self) -> None:
            super().__init__("cut")
            failed.append(weakref.ref(self))

    async def call_next(request: httpx.Request) -> httpx.Response:
        if len(failed) == 1:
            raise Remembered
        response = httpx.Response(503 if not failed else 200)
        failed.append(weakref.ref(response))
        return response

    async def sleep(seconds: float) -> None:
        alive.extend(ref() for ref in failed)

    gc.collect()
    gc.disable()
    try:
        await Bench(sleep=sleep).send(get(), call_next)
    finally:
        gc.enable()
    assert alive == [None, None, None]


# The server says slow down


async def test_a_429_shuts_the_gate_and_the_call_itself_does_not_sleep() -> None:
    gate = FakeGate()
    bench, script = Bench(gate=gate), Script(wait(429, "3"), 200)
    assert (await bench.send(get("POST"), script)).status_code == 200
    assert gate.shut_for == [3.0]
    assert bench.slept == []


async def test_a_429_that_names_no_time_shuts_the_gate_for_our_own() -> None:
    gate = FakeGate()
    request = get()
    ExchangeRecord.of(request).turn = 7
    await Bench(gate=gate).send(request, Script(429, 429, wait(429, "3"), 200))
    assert gate.shut_for == [0.5, 1.0, 3.0]
    assert (gate.asked, gate.turns) == ([False, False, True], [7, 7, 7])


async def test_without_a_gate_the_call_sleeps_for_as_long_as_the_server_says() -> None:
    bench = Bench()
    await bench.send(get(), Script(wait(429, "3"), wait(503, "4"), 200))
    assert bench.slept == [3.0, 4.0]


async def test_a_503_that_names_a_time_makes_only_this_call_wait() -> None:
    gate = FakeGate()
    bench = Bench(gate=gate)
    await bench.send(get(), Script(wait(503, "3"), 200))
    assert gate.shut_for == []
    assert bench.slept == [3.0]


@pytest.mark.parametrize("status", [429, 503])
async def test_a_wait_longer_than_allowed_returns_the_answer_at_once(status: int) -> None:
    gate = FakeGate()
    bench, script = Bench(gate=gate), Script(wait(status, "3600"), 200)
    assert (await bench.send(get(), script)).status_code == status
    assert (script.calls, bench.slept, gate.shut_for) == (1, [], [3600.0] if status == 429 else [])


async def test_a_call_meets_a_429_ten_times_and_no_more() -> None:
    bench, script = Bench(), Script(429)
    assert (await bench.send(get(), script)).status_code == 429
    assert script.calls == 10
    assert bench.middleware.budget.tokens == 100.0


async def test_429s_leave_the_other_attempts_as_they_are() -> None:
    script = Script(*[429] * 5, *[503] * 4, 200)
    assert (await Bench().send(get(), script)).status_code == 503
    assert script.calls == 9


@pytest.mark.parametrize("gate", [True, False])
async def test_a_patient_call_waits_out_any_number_of_429s(gate: bool) -> None:
    request, script = get(), Script(*[429] * 30, 200)
    ExchangeRecord.of(request).is_patient = True
    await Bench(gate=FakeGate() if gate else None).send(request, script)
    assert script.calls == 31


async def test_a_patient_call_without_a_gate_sleeps_for_an_hour_at_most_and_on_nobodys_time() -> None:
    request, bench = get(), Bench()
    record = ExchangeRecord.of(request)
    record.is_patient = True
    with anyio.CancelScope(deadline=anyio.current_time() + 5) as record.scope:
        deadline = record.scope.deadline

        async def sleep(seconds: float) -> None:
            bench.sleep.slept.append(seconds)
            assert record.scope is not None
            assert record.scope.deadline == math.inf

        bench.middleware._sleep = sleep
        await bench.send(request, Script(wait(429, "86400"), 200))
        assert deadline <= record.scope.deadline < deadline + 1
    assert bench.slept == [3600.0]


# The deadline


async def test_a_retry_that_cannot_meet_the_deadline_is_not_begun() -> None:
    bench, script = Bench(), Script(wait(503, "30"), 200)
    with anyio.fail_after(29.0):
        assert (await bench.send(get(), script)).status_code == 503
    assert (script.calls, bench.slept) == (1, [])


async def test_a_429_that_cannot_meet_the_deadline_shuts_the_gate_for_the_others() -> None:
    gate = FakeGate()
    with anyio.fail_after(29.0):
        assert (await Bench(gate=gate).send(get(), Script(wait(429, "30"), 200))).status_code == 429
    assert gate.shut_for == [30.0]


async def test_the_callers_own_scope_is_foreseen_too() -> None:
    script = Script(httpx.ConnectError("refused"))
    with anyio.fail_after(0.4), anyio.fail_after(120.0), pytest.raises(httpx.ConnectError):
        await Bench().send(get(), script)
    assert script.calls == 1


async def test_a_deadline_that_is_far_away_does_not_matter() -> None:
    script = Script(wait(503, "30"), 200)
    with anyio.fail_after(600.0):
        assert (await Bench().send(get(), script)).status_code == 200


@pytest.mark.parametrize(("left", "calls"), [(20.0, 4), (14.0, 1)])
async def test_a_read_timeout_is_followed_if_half_an_attempts_time_is_left(left: float, calls: int) -> None:
    script = Script(httpx.ReadTimeout("slow"))
    request = get(extensions={"timeout": {"connect": 5.0, "read": 30.0, "write": 30.0, "pool": None}})
    with anyio.fail_after(left), pytest.raises(httpx.ReadTimeout):
        await Bench().send(request, script)
    assert script.calls == calls


# Cancellation


async def test_a_scope_that_is_cancelled_during_the_sleep_ends_the_call() -> None:
    script = Script(503)
    with anyio.CancelScope() as scope:

        async def sleep(seconds: float) -> None:
            scope.cancel()
            await anyio.sleep(seconds)

        await Bench(sleep=sleep).send(get(), script)
    assert scope.cancelled_caught
    assert script.calls == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("where", ["sleep", "attempt"])
async def test_a_native_cancellation_passes(where: str) -> None:
    reached, calls = asyncio.Event(), list[None]()

    async def block(seconds: float = 60.0) -> None:
        reached.set()
        await asyncio.sleep(seconds)

    async def call_next(request: httpx.Request) -> httpx.Response:
        calls.append(None)
        if where == "attempt":
            await block()
        return httpx.Response(503)

    bench = Bench(sleep=block)
    task = asyncio.create_task(bench.send(get(), call_next))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 1
    assert bench.middleware.budget.tokens == (100.0 if where == "attempt" else 99.0)


async def test_a_real_sleep_is_slept_by_default() -> None:
    script = Script(503, 200)
    assert (await RetryMiddleware(RetryPolicy(backoff_max=0.005))(get(), script)).status_code == 200


# What is not ours passes


class Foreign(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("a mocking tool's"),
        AllMockedAssertionError("not mocked"),
        httpx.InvalidURL("bad"),
        httpx.StreamConsumed(),
        DeadlineExceededError("gate", phase="gate"),
        ConfigurationError("yours"),
        ZeroDivisionError(),
        Foreign(),
    ],
    ids=repr,
)
async def test_any_other_exception_passes_untouched(error: BaseException) -> None:
    request, script = get(), Script(error)
    bench = Bench()
    with pytest.raises(type(error)) as caught:
        await bench.send(request, script)
    assert caught.value is error
    assert script.calls == 1
    assert ExchangeRecord.of(request).attempts == ()
    assert bench.events == []


@pytest.mark.parametrize("error", [ResponseDecodeError("not what `into` says"), MalformedResponseError("too large")])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_answer_that_is_of_no_use_is_noted_and_not_asked_for_again(error: LayerError, method: str) -> None:
    request, script = httpx.Request(method, URL), Script(error)
    bench = Bench()
    with pytest.raises(type(error)) as caught:
        await bench.send(request, script)
    assert caught.value is error
    assert script.calls == 1
    record = ExchangeRecord.of(request)
    assert [attempt.outcome for attempt in record.attempts] == [type(error).__name__]
    assert record.maybe_processed is (method == "POST")


async def test_what_the_source_of_the_tokens_raised_is_no_attempt_whatever_its_class() -> None:
    error = MalformedResponseError("of the vault's answer")
    request, script = get("POST"), Script(error)
    request.extensions[EXTENSION] = record = ExchangeRecord(source_error=error)
    bench = Bench()
    with pytest.raises(MalformedResponseError):
        await bench.send(request, script)
    assert record.attempts == ()
    assert not record.maybe_processed


# What the client's `classify` raises is retried as its class is


async def test_an_error_that_classify_made_of_an_answer_is_retried_and_raised_at_last() -> None:
    error = ServerError("half done", status_code=200)
    script = Script(error)
    with pytest.raises(ServerError) as caught:
        await Bench().send(get(), script)
    assert caught.value is error
    assert script.calls == 3


async def test_a_rate_limit_that_classify_saw_shuts_the_gate() -> None:
    gate = FakeGate()
    script = Script(RateLimitError("slow down", status_code=200, retry_after=2.0), 200)
    assert (await Bench(gate=gate).send(get("POST"), script)).status_code == 200
    assert gate.shut_for == [2.0]


@pytest.mark.parametrize("cls", [AuthenticationError, APIStatusError])
async def test_any_other_error_that_classify_made_is_raised_at_once(cls: type[APIStatusError]) -> None:
    script = Script(cls("no", status_code=200))
    with pytest.raises(cls):
        await Bench().send(get(), script)
    assert script.calls == 1


# Bodies


async def chunks() -> AsyncGenerator[bytes, None]:
    yield b"one"
    yield b"two"


async def test_a_one_shot_body_that_was_begun_raises_the_original_error() -> None:
    script = Script(httpx.ReadError("cut"))
    with pytest.raises(httpx.ReadError, match="cut"):
        await Bench().send(get("PUT", content=chunks()), script)
    assert script.bodies == [b"onetwo"]


async def test_a_one_shot_body_that_was_begun_returns_the_original_answer() -> None:
    script = Script(503)
    assert (await Bench().send(get("PUT", content=chunks()), script)).status_code == 503
    assert script.calls == 1


async def test_a_one_shot_body_that_was_not_begun_is_sent_whole() -> None:
    script = Script(httpx.ConnectError("refused"), 200)
    assert (await Bench().send(get("PUT", content=chunks()), script)).status_code == 200
    assert script.bodies == [b"", b"onetwo"]


async def test_a_multipart_body_is_sent_again_from_the_start() -> None:
    script = Script(502, 503, 200)
    request = get("PUT", data={"name": "n"}, files={"file": ("f.txt", io.BytesIO(b"content"))})
    assert (await Bench().send(request, script)).status_code == 200
    assert script.calls == 3
    assert len(set(script.bodies)) == 1
    assert b"content" in script.bodies[0]


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation


async def test_a_multipart_body_with_a_file_that_cannot_seek_is_not_sent_again() -> None:
    script = Script(502)
    request = get("PUT", files={"file": ("f.txt", Pipe(b"content"))}, headers={"content-length": "0"})
    assert (await Bench().send(request, script)).status_code == 502
    assert script.calls == 1


# What is noted and told


async def test_each_attempt_is_noted_in_the_record() -> None:
    request = get()
    await Bench().send(request, Script(httpx.ReadError("cut"), 503, 200))
    attempts = ExchangeRecord.of(request).attempts
    assert [(a.number, a.outcome, a.status_code, a.delay) for a in attempts] == [
        (1, "ReadError", None, 0.5),
        (2, "503", 503, 1.0),
        (3, "200", 200, None),
    ]
    assert all(attempt.elapsed >= 0 for attempt in attempts)


async def test_the_last_attempt_is_noted_without_a_delay() -> None:
    request = get()
    await Bench().send(request, Script(404))
    assert [(a.outcome, a.delay) for a in ExchangeRecord.of(request).attempts] == [("404", None)]


async def test_the_observer_hears_of_each_attempt_and_each_retry_and_no_secret() -> None:
    bench = Bench()
    request = httpx.Request("GET", URL + "?secret=1")
    await bench.send(request, Script(httpx.ReadError("cut"), 503, 200, reused=False, bytes_written=1))
    info = RequestInfo("GET", URL)
    for event in bench.events:
        if isinstance(event, AttemptFinished):
            event.elapsed = 0.0
    assert bench.events == [
        AttemptFinished(info, 1, None, "ReadError", 0.0, False),
        RetryScheduled(info, 1, "ReadError", 0.5),
        AttemptFinished(info, 2, 503, None, 0.0, False),
        RetryScheduled(info, 2, "503", 1.0),
        AttemptFinished(info, 3, 200, None, 0.0, False),
    ]


async def test_an_attempt_that_classify_took_for_an_error_is_told_as_one() -> None:
    bench = Bench()
    with pytest.raises(AuthenticationError):
        await bench.send(get(), Script(AuthenticationError("no", status_code=200)))
    (event,) = bench.events
    assert isinstance(event, AttemptFinished)
    assert (event.status_code, event.error) == (200, "AuthenticationError")


# The budget


async def test_in_an_outage_the_budget_stops_the_retries() -> None:
    budget = RetryBudget()
    attempts = 0

    async def down(request: httpx.Request) -> httpx.Response:
        nonlocal attempts
        attempts += 1
        return httpx.Response(503)

    for _ in range(1000):
        await Bench(budget=budget).send(get(), down)
    # Twelve calls make all four attempts and take 48 tokens, the thirteenth makes two: 37 retries in all.
    assert attempts == 1000 + 12 * 3 + 1
    assert budget.tokens == 0.0


async def test_in_an_outage_met_by_many_at_once_the_budget_stops_the_retries() -> None:
    bench, attempts = Bench(), list[None]()

    async def down(request: httpx.Request) -> httpx.Response:
        attempts.append(None)
        await anyio.lowlevel.checkpoint()
        raise httpx.ConnectError("refused")

    async def call() -> None:
        with pytest.raises(httpx.ConnectError):
            await bench.send(get("POST"), down)

    async with anyio.create_task_group() as tasks:
        for _ in range(500):
            tasks.start_soon(call)
    # Of the first failures of all, 49 are followed by another attempt; the next finds the budget at its threshold.
    assert len(attempts) == 500 + 49


async def test_after_an_outage_successes_bring_the_retries_back() -> None:
    budget = RetryBudget()
    for _ in range(100):
        await Bench(budget=budget).send(get(), Script(503))
    calls = []
    for successes in (500, 20):
        for _ in range(successes):
            await Bench(budget=budget).send(get(), Script(200))
        script = Script(503, 200)
        await Bench(budget=budget).send(get(), script)
        calls.append(script.calls)
    assert calls == [1, 2]


async def test_few_failures_among_many_successes_are_always_retried() -> None:
    bench, failures = Bench(), 0
    for number in range(2000):
        steps: list[Step] = [503, 200] if number % 12 == 0 else [200]
        failures += (await bench.send(get(), Script(*steps))).status_code != 200
    assert failures == 0


@pytest.mark.parametrize("step", [404, 429, 408])
async def test_what_costs_nothing_takes_nothing_and_what_is_no_success_gives_nothing(step: int) -> None:
    budget = RetryBudget()
    budget.withdraw(10)
    await Bench(budget=budget).send(get(), Script(step))
    assert budget.tokens == 90.0


@pytest.mark.parametrize("step", [429, 408, httpx.ReadError("stale")])
async def test_what_costs_nothing_is_tried_again_even_when_the_budget_is_spent(step: Step) -> None:
    budget = RetryBudget()
    budget.withdraw(100)
    script = Script(step, 200, reused=True, bytes_written=10, response_started=False)
    assert (await Bench(budget=budget).send(get(), script)).status_code == 200
    assert script.calls == 2


@pytest.mark.parametrize(
    ("is_in_outage", "is_spent", "attempts", "is_cut_short"),
    [(False, False, 4, False), (True, False, 1, True), (False, True, 1, True)],
)
async def test_only_what_the_budget_or_an_outage_denied_another_attempt_is_cut_short(
    is_in_outage: bool, is_spent: bool, attempts: int, is_cut_short: bool
) -> None:
    budget, script, request = RetryBudget(), Script(503), get()
    budget.withdraw(100 * is_spent)
    record = ExchangeRecord.of(request)
    record.is_in_outage = lambda: is_in_outage
    assert (await Bench(budget=budget).send(request, script)).status_code == 503
    assert (script.calls, record.is_cut_short) == (attempts, is_cut_short)


async def test_timeouts_cost_twice() -> None:
    bench = Bench()
    with pytest.raises(httpx.ConnectTimeout):
        await bench.send(get("POST"), Script(httpx.ConnectTimeout("slow")))
    assert bench.middleware.budget.tokens == 92.0


async def test_a_failure_that_is_not_tried_again_costs_too() -> None:
    bench = Bench()
    await bench.send(get("POST"), Script(502))
    assert bench.middleware.budget.tokens == 99.0


# Composition


async def test_another_policy_shares_all_the_rest() -> None:
    gate = FakeGate()
    bench = Bench(gate=gate)
    once = bench.middleware.with_policy(RetryPolicy(attempts=2))
    assert once.budget is bench.middleware.budget
    script = Script(429, 503)
    assert (await once(get(), script)).status_code == 503
    assert script.calls == 3
    assert gate.shut_for == [0.5]
    assert bench.slept == [1.0]
    assert len(bench.events) == 5
    assert bench.middleware.policy == RetryPolicy()


def test_each_middleware_has_a_budget_of_its_own_unless_it_is_given_one() -> None:
    assert RetryMiddleware().budget is not RetryMiddleware().budget


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="RetryPolicy"):
        RetryMiddleware(3)  # type: ignore[arg-type]


# Over a real `httpx.AsyncClient`


def replies(*steps: Step) -> Callable[[httpx.Request], httpx.Response]:
    remaining = iter(steps)

    def handler(request: httpx.Request) -> httpx.Response:
        step = next(remaining)
        if isinstance(step, int):
            return httpx.Response(step, json={"status": step})
        assert isinstance(step, BaseException)
        raise step

    return handler


async def test_a_bare_client_is_enough() -> None:
    bench = Bench()
    transport = httpx.MockTransport(replies(httpx.ConnectError("refused"), 503, 200))
    async with httpx.AsyncClient(transport=transport) as client:
        response = await bench.send(client.build_request("GET", URL), client.send)
        assert response.json() == {"status": 200}
    assert bench.slept == [0.5, 1.0]


@respx.mock
async def test_respx_sees_each_attempt() -> None:
    route = respx.post(URL).mock(side_effect=[httpx.ConnectError, httpx.Response(429), httpx.Response(201)])
    async with httpx.AsyncClient() as client:
        response = await Bench().send(client.build_request("POST", URL, json={}), client.send)
    assert response.status_code == 201
    assert route.call_count == 3


@respx.mock
async def test_what_respx_does_not_know_stays_an_assertion_error() -> None:
    async with httpx.AsyncClient() as client:
        with pytest.raises(AllMockedAssertionError):
            await Bench().send(client.build_request("GET", URL), client.send)


class Renewing(httpx.Auth):
    """An auth that gives each attempt the token of the day, and a new one where that is refused."""

    def __init__(self) -> None:
        self.day = 1

    def auth_flow(self, request: httpx.Request) -> Any:
        request.headers["Token1"] = f"day-{self.day}"
        response = yield request
        if response.status_code == 401:
            self.day += 1
            request.headers["Token1"] = f"day-{self.day}"
            yield request


async def test_the_auth_runs_on_each_attempt_and_a_401_is_its_affair() -> None:
    seen: list[str] = []
    statuses = iter([503, 401, 503, 200])

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Token1"])
        return httpx.Response(next(statuses))

    bench = Bench()
    async with httpx.AsyncClient(transport=httpx.MockTransport(handler), auth=Renewing()) as client:
        response = await bench.send(client.build_request("GET", URL), client.send)
    assert response.status_code == 200
    assert seen == ["day-1", "day-1", "day-2", "day-2"]
    assert bench.slept == [0.5, 1.0]


async def test_a_401_that_is_left_is_never_tried_again() -> None:
    script = Script(401)
    assert (await Bench().send(get(), script)).status_code == 401
    assert script.calls == 1


@pytest.mark.parametrize("last", [429, 503, httpx.ConnectError("refused")], ids=str)
async def test_a_post_that_was_answered_by_a_redirect_runs_once_whatever_came_of_the_redirect(last: Step) -> None:
    posts = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal posts
        if request.method == "POST":
            posts += 1
            return httpx.Response(303, headers={"Location": URL + "/1"})
        return replies(last)(request)

    async with httpx.AsyncClient(transport=httpx.MockTransport(handler), follow_redirects=True) as client:
        request = client.build_request("POST", URL, json={})
        with suppress(httpx.ConnectError):
            assert (await Bench().send(request, client.send)).status_code == last
    assert posts == 1
    assert ExchangeRecord.of(request).maybe_processed


class CutBody(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"half"
        raise httpx.ReadError("cut")


async def test_a_body_that_breaks_while_we_read_it_is_fetched_again() -> None:
    answers = iter([httpx.Response(200, stream=CutBody()), httpx.Response(200, content=b"whole")])
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: next(answers))) as client:
        response = await Bench().send(client.build_request("GET", URL), client.send)
    assert response.content == b"whole"


async def test_a_body_that_breaks_while_the_caller_streams_it_is_the_callers_to_see() -> None:
    calls: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        return httpx.Response(200, stream=CutBody())

    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
        send = functools.partial(client.send, stream=True)
        response = await Bench().send(client.build_request("GET", URL), send)
        got = []
        with pytest.raises(httpx.ReadError):
            got.extend([chunk async for chunk in response.aiter_bytes()])
    assert len(calls) == 1


# Real sockets: what the operating system and OpenSSL say is told apart


def listener() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(5.0)
    return server


@pytest.fixture
def untrusted_server() -> Iterator[tuple[int, list[None]]]:
    """A TLS server whose certificate nobody trusts: its port, and the connections it had."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server, connections = listener(), list[None]()

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5.0)
                if connection.recv(1, socket.MSG_PEEK) != b"\x16":  # not a TLS handshake: the fixture's goodbye
                    return
                connections.append(None)
                try:
                    context.wrap_socket(connection, server_side=True)
                except (ssl.SSLError, OSError):
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1], connections
    finally:
        socket.create_connection(server.getsockname()).close()
        thread.join()
        server.close()


async def test_a_certificate_that_is_not_trusted_is_met_once(untrusted_server: tuple[int, list[None]]) -> None:
    port, connections = untrusted_server
    bench = Bench()
    async with httpx.AsyncClient(trust_env=False) as client:
        request = client.build_request("GET", f"https://127.0.0.1:{port}/")
        with pytest.raises(httpx.ConnectError):
            await bench.send(request, client.send)
    assert len(connections) == 1
    assert bench.slept == []
    assert bench.middleware.budget.tokens == 100.0


async def test_a_refused_connection_is_tried_again_even_for_a_post() -> None:
    server = listener()
    port = server.getsockname()[1]
    server.close()
    bench = Bench()
    async with httpx.AsyncClient(trust_env=False) as client:
        request = client.build_request("POST", f"http://127.0.0.1:{port}/", json={})
        with pytest.raises(httpx.ConnectError):
            await bench.send(request, client.send)
    assert bench.slept == [0.5, 1.0, 2.0]
    assert not ExchangeRecord.of(request).maybe_processed


# A property over whole calls


EXECUTED: Sequence[Callable[[], Step]] = [
    lambda: 200,
    lambda: 500,
    lambda: 502,
    lambda: 503,
    lambda: httpx.ReadError("after"),
    lambda: httpx.ReadTimeout("after"),
    lambda: httpx.RemoteProtocolError("after"),
    lambda: httpx.WriteError("after"),
]
NOT_EXECUTED: Sequence[Callable[[], Step]] = [
    lambda: 408,
    lambda: 425,
    lambda: 429,
    lambda: httpx.ConnectError("before"),
]


@given(
    plan=st.lists(st.tuples(st.booleans(), st.integers(0, 7)), min_size=1, max_size=15),
    written=st.sampled_from([None, 1, 100]),
    started=st.sampled_from([None, False, True]),
    reused=st.sampled_from([None, False, True]),
)
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
def test_no_post_runs_twice(
    plan: list[tuple[bool, int]], written: int | None, started: bool | None, reused: bool | None
) -> None:
    kinds = [EXECUTED[which] if executed else NOT_EXECUTED[which % 4] for executed, which in plan]
    script = Script(*[kind() for kind in kinds], 200, bytes_written=written, response_started=started, reused=reused)
    bench = Bench()

    async def call() -> None:
        try:
            await bench.send(get("POST", json={}), script)
        except httpx.RequestError:
            return

    anyio.run(call)
    met = [kinds[number] if number < len(kinds) else EXECUTED[0] for number in range(script.calls)]
    assert sum(kind in EXECUTED for kind in met) <= 1
    limited = sum(kind is NOT_EXECUTED[2] for kind in met)
    assert limited <= 10
    assert len(met) - limited <= 4
    assert len(bench.slept) <= len(met) - 1


async def test_a_policy_or_a_budget_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="policy must be"):
        RetryMiddleware(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="budget must be"):
        RetryMiddleware(RetryPolicy(), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": 3}, "policy must be a RetryPolicy, not int"),
        ({"budget": 3}, "budget must be a RetryBudget, not int"),
        ({"gate": 3}, "gate must have a method `slow_down"),
        ({"gate": type("Odd", (), {"slow_down": 1})()}, "gate must have a method `slow_down"),
        ({"observer": 3}, "observer must be callable, and int is not"),
    ],
)
async def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RetryMiddleware(**arguments)
