"""The table of failures, row by row and cell by cell: no event loop, no clock, no randomness."""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Callable
from typing import Any

import attrs
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_async._errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestInfo,
    ServerError,
    UnprocessableEntityError,
)
from layer_async._exchange import ExchangeRecord
from layer_async._failures import Failure, classify_failure, is_safe_to_repeat
from layer_async._retry import Decision, RetryBudget, RetryPolicy

Outcome = httpx.Response | httpx.RequestError | APIStatusError

REPEATABLE = settings(derandomize=True, deadline=None, database=None)

YES = math.inf
URL = "https://api.example/things"


def request(method: str = "GET", **record: Any) -> httpx.Request:
    """A request whose attempt left `record` behind."""
    made = httpx.Request(method, URL)
    made.extensions["layer_async"] = ExchangeRecord(**record)
    return made


def because_of(error: httpx.RequestError, *causes: BaseException) -> httpx.RequestError:
    """`error`, raised from `causes`, the innermost last."""
    outer: BaseException = error
    for cause in causes:
        outer.__cause__ = cause
        outer = cause
    return error


def answer(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def api_error(cls: type[APIStatusError], status: int, wait: float | None = None) -> APIStatusError:
    return cls("no", status_code=status, retry_after=wait)


CERTIFICATE = ssl.SSLCertVerificationError(1, "certificate verify failed")
NO_CERTIFICATE = ssl.SSLError(1, "alert certificate required")
NO_CERTIFICATE.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
UNKNOWN_HOST = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
NO_ADDRESS = socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")
TEMPORARY_DNS = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

# How a row waits, told by the delays of its first retries when the jitter is 1 (the most).
BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
AT_ONCE_THEN_BACKOFF = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
AT_ONCE = (0.0,)


@attrs.frozen
class Case:
    """One row: what is met, what the transport knows of it, and what each cell promises.

    `safe` and `unsafe`: how many times it is tried again. `delays` of the retries in turn. `costs` of the failures in
    turn, the last one standing for all that follow. `fresh`: each retry asks for a new connection.
    """

    name: str
    outcome: Outcome
    safe: float
    unsafe: float
    delays: tuple[float, ...] = ()
    costs: tuple[float, ...] = (0.0,)
    fresh: bool = False
    at_gate: bool = False
    record: dict[str, Any] = attrs.field(factory=dict)


FRESH_CONNECTION: dict[str, Any] = {"reused": False}
REUSED_CONNECTION: dict[str, Any] = {"reused": True}
UNSENT: dict[str, Any] = {"bytes_written": 0, "response_started": False, "head_received": False}
PARTLY_SENT: dict[str, Any] = {"bytes_written": 10, "response_started": False, "head_received": False}
IN_THE_HEAD: dict[str, Any] = {"bytes_written": 10, "response_started": True, "head_received": False}
IN_THE_BODY: dict[str, Any] = {"bytes_written": 10, "response_started": True, "head_received": True}

TABLE = [
    # refused, reset, unreachable, temporary DNS, connect timeout
    Case(
        "refused",
        because_of(httpx.ConnectError("refused"), ConnectionRefusedError(111, "refused")),
        YES,
        YES,
        BACKOFF,
        (1,),
    ),
    Case(
        "reset in the handshake",
        because_of(httpx.ConnectError("reset"), ConnectionResetError(104, "reset")),
        YES,
        YES,
        BACKOFF,
        (1,),
    ),
    Case(
        "unreachable", because_of(httpx.ConnectError("gone"), OSError(113, "no route to host")), YES, YES, BACKOFF, (1,)
    ),
    Case("temporary DNS", because_of(httpx.ConnectError("later"), TEMPORARY_DNS), YES, YES, BACKOFF, (1,)),
    Case("no connection, no reason given", httpx.ConnectError("mocked"), YES, YES, BACKOFF, (1,)),
    Case("connect timeout", httpx.ConnectTimeout("slow"), YES, YES, BACKOFF, (2,)),
    Case("proxy says 502", httpx.ProxyError("502 Bad Gateway"), YES, YES, BACKOFF, (1,)),
    Case("proxy says 503", httpx.ProxyError("503 Service Unavailable"), YES, YES, BACKOFF, (1,)),
    Case("proxy says 504", httpx.ProxyError("504 Gateway Timeout"), YES, YES, BACKOFF, (1,)),
    # certificate error, unknown host, bad URL
    Case("certificate", because_of(httpx.ConnectError("tls"), CERTIFICATE), 0, 0),
    Case("certificate, deep below", because_of(httpx.ConnectError("tls"), RuntimeError(), CERTIFICATE), 0, 0),
    Case("a certificate of ours that they miss", because_of(httpx.ReadError("tls"), NO_CERTIFICATE), 0, 0),
    Case("unknown host", because_of(httpx.ConnectError("dns"), UNKNOWN_HOST), 0, 0),
    Case("host without an address", because_of(httpx.ConnectError("dns"), NO_ADDRESS), 0, 0),
    Case("neither http nor https", httpx.UnsupportedProtocol("gopher"), 0, 0),
    Case("illegal header", httpx.LocalProtocolError("illegal"), 0, 0),
    Case("proxy wants a password", httpx.ProxyError("407 Proxy Authentication Required"), 0, 0),
    Case("proxy forbids", httpx.ProxyError("403 Forbidden"), 0, 0),
    Case("too many redirects", httpx.TooManyRedirects("20"), 0, 0),
    Case("the caller's own bound on waiting for a connection", httpx.PoolTimeout("busy"), 0, 0),
    Case("an error of nobody's kind", httpx.RequestError("?"), 0, 0),
    # zero request bytes written
    Case("unsent, fresh", httpx.WriteError("cut"), YES, YES, BACKOFF, (1,), record=UNSENT | FRESH_CONNECTION),
    Case("unsent, not known whether fresh", httpx.ReadError("cut"), YES, YES, BACKOFF, (1,), record=UNSENT),
    Case(
        "unsent, reused",
        httpx.WriteError("cut"),
        YES,
        YES,
        AT_ONCE_THEN_BACKOFF,
        (0, 1),
        fresh=True,
        record=UNSENT | REUSED_CONNECTION,
    ),
    # write error, some bytes written
    Case("cut request, fresh", httpx.WriteError("cut"), YES, 0, BACKOFF, (1,), record=PARTLY_SENT | FRESH_CONNECTION),
    Case("cut request, unknown", httpx.WriteError("cut"), YES, 0, BACKOFF, (1,)),
    Case(
        "cut request, reused",
        httpx.WriteError("cut"),
        YES,
        0,
        AT_ONCE_THEN_BACKOFF,
        (0, 1),
        fresh=True,
        record=PARTLY_SENT | REUSED_CONNECTION,
    ),
    # A server that stopped reading has not closed the connection: a new one at once would not help it.
    Case(
        "write timeout, reused",
        httpx.WriteTimeout("slow"),
        YES,
        0,
        BACKOFF,
        (1,),
        record=PARTLY_SENT | REUSED_CONNECTION,
    ),
    # read error or disconnect before the first byte
    Case(
        "disconnect, reused",
        httpx.RemoteProtocolError("disconnected"),
        YES,
        0,
        AT_ONCE_THEN_BACKOFF,
        (0, 1),
        fresh=True,
        record=PARTLY_SENT | REUSED_CONNECTION,
    ),
    Case(
        "read error, reused",
        httpx.ReadError("reset"),
        YES,
        0,
        AT_ONCE_THEN_BACKOFF,
        (0, 1),
        fresh=True,
        record=PARTLY_SENT | REUSED_CONNECTION,
    ),
    Case(
        "disconnect, fresh",
        httpx.RemoteProtocolError("disconnected"),
        YES,
        0,
        BACKOFF,
        (1,),
        record=PARTLY_SENT | FRESH_CONNECTION,
    ),
    Case("read error, fresh", httpx.ReadError("reset"), YES, 0, BACKOFF, (1,), record=PARTLY_SENT | FRESH_CONNECTION),
    Case("disconnect, unknown", httpx.RemoteProtocolError("disconnected"), YES, 0, BACKOFF, (1,)),
    Case("read error, unknown", httpx.ReadError("reset"), YES, 0, BACKOFF, (1,)),
    Case("close error, unknown", httpx.CloseError("closed"), YES, 0, BACKOFF, (1,)),
    # read timeout before the first byte
    Case("read timeout", httpx.ReadTimeout("slow"), YES, 0, BACKOFF, (2,), record=PARTLY_SENT | FRESH_CONNECTION),
    Case(
        "read timeout, reused", httpx.ReadTimeout("slow"), YES, 0, BACKOFF, (2,), record=PARTLY_SENT | REUSED_CONNECTION
    ),
    Case("read timeout, unknown", httpx.ReadTimeout("slow"), YES, 0, BACKOFF, (2,)),
    # any error after the first byte, body buffered by us
    Case("cut body", httpx.RemoteProtocolError("incomplete"), YES, 0, BACKOFF, (1,), record=IN_THE_BODY),
    Case("read error in the body", httpx.ReadError("reset"), YES, 0, BACKOFF, (1,), record=IN_THE_BODY),
    Case("read timeout in the body", httpx.ReadTimeout("slow"), YES, 0, BACKOFF, (1,), record=IN_THE_BODY),
    Case("read timeout in the head", httpx.ReadTimeout("slow"), YES, 0, BACKOFF, (1,), record=IN_THE_HEAD),
    Case("cut body, reused", httpx.ReadError("cut"), YES, 0, BACKOFF, (1,), record=IN_THE_BODY | REUSED_CONNECTION),
    # malformed head; corrupt content coding
    Case("malformed head", httpx.RemoteProtocolError("illegal"), 1, 0, BACKOFF, (1,), fresh=True, record=IN_THE_HEAD),
    Case("corrupt coding", httpx.DecodingError("gzip"), 1, 0, BACKOFF, (1,), fresh=True, record=IN_THE_BODY),
    # statuses
    Case("408", answer(408), 1, 1, AT_ONCE, fresh=True),
    Case("425", answer(425), 1, 1, BACKOFF, (1,)),
    Case("429", answer(429), YES, YES, BACKOFF, at_gate=True),
    Case("429, Retry-After", answer(429, retry_after="7"), YES, YES, (7.0,) * 6, at_gate=True),
    Case("500", answer(500), 2, 0, BACKOFF, (1,)),
    Case("500, Retry-After", answer(500, retry_after="7"), 2, 0, BACKOFF, (1,)),
    Case("502", answer(502), YES, 0, BACKOFF, (1,)),
    Case("504", answer(504), YES, 0, BACKOFF, (1,)),
    Case("503", answer(503), YES, 0, BACKOFF, (1,)),
    Case("503, Retry-After", answer(503, retry_after="7"), YES, 0, (7.0,) * 6, (1,)),
    Case("503, Retry-After: 0", answer(503, retry_after="0"), YES, 0, BACKOFF, (1,)),
    *[Case(str(code), answer(code), 2, 0, BACKOFF, (1,)) for code in (507, 509, 520, 522, 599)],
    *[Case(str(code), answer(code), 0, 0) for code in (501, 505, 506, 508, 510, 511)],
    *[
        Case(str(code), answer(code, retry_after="1"), 0, 0)
        for code in (400, 401, 402, 403, 404, 405, 407, 409, 410, 413, 422, 423, 451, 499, 600)
    ],
    # what the user's `classify` made of an answer: its status, or below 400 its class
    Case("RateLimitError 200", api_error(RateLimitError, 200), YES, YES, BACKOFF, at_gate=True),
    Case("RateLimitError 200, 7 s", api_error(RateLimitError, 200, 7.0), YES, YES, (7.0,) * 6, at_gate=True),
    Case("ServerError 200", api_error(ServerError, 200), 2, 0, BACKOFF, (1,)),
    Case("ServerError 200, 7 s", api_error(ServerError, 200, 7.0), YES, 0, (7.0,) * 6, (1,)),
    Case("ServerError 502", api_error(ServerError, 502), YES, 0, BACKOFF, (1,)),
    Case("a status error of the user's own kind, 503", api_error(APIStatusError, 503), YES, 0, BACKOFF, (1,)),
    Case("RateLimitError 429", api_error(RateLimitError, 429), YES, YES, BACKOFF, at_gate=True),
    *[
        Case(f"{cls.__name__} 200", api_error(cls, 200, 1.0), 0, 0)
        for cls in (
            APIStatusError,
            AuthenticationError,
            BadRequestError,
            ConflictError,
            NotFoundError,
            PermissionDeniedError,
            UnprocessableEntityError,
        )
    ],
]

PATIENT = RetryPolicy(attempts=7, rate_limited_attempts=7)


def decisions(case: Case, *, safe: bool) -> list[Decision]:
    """What follows when a call meets the same failure again and again, up to the first refusal."""
    failure = classify_failure(case.outcome, request(**case.record))
    earlier: list[Failure] = []
    made: list[Decision] = []
    while not made or made[-1].retry:
        made.append(PATIENT.decide(failure, earlier, safe=safe))
        earlier.append(failure)
    return made


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_each_row_of_the_table_holds_in_every_cell(case: Case, safe: bool) -> None:
    made = decisions(case, safe=safe)
    limit = case.safe if safe else case.unsafe
    retries = [decision for decision in made if decision.retry]
    assert len(retries) == min(limit, 6)
    assert [decision.delay for decision in retries] == list(case.delays[: len(retries)])
    assert [decision.fresh for decision in retries] == [case.fresh] * len(retries)
    assert [decision.at_gate for decision in made] == [case.at_gate] * len(made)
    costs = case.costs + case.costs[-1:] * len(made)
    assert [decision.cost for decision in made] == list(costs[: len(made)])
    assert made[-1].refused == ("row" if limit == 0 else "attempts" if limit == YES else "often")


def test_every_error_that_httpx_may_raise_for_a_request_has_a_row() -> None:
    def tree(cls: type[httpx.RequestError]) -> list[type[httpx.RequestError]]:
        return [cls, *(below for child in cls.__subclasses__() for below in tree(child))]

    classes = [cls for cls in tree(httpx.RequestError) if cls.__module__ == "httpx"]
    assert len(classes) > 15
    for cls in classes:
        records: list[dict[str, Any]] = [{}, UNSENT, PARTLY_SENT, IN_THE_HEAD, IN_THE_BODY]
        for record in records:
            failure = classify_failure(cls("mocked"), request(**record))
            assert failure.cause == cls.__name__
            assert failure.status_code is None


# Only what certainly did not reach the server is sent again where that is unsafe


TRANSPORT_ERRORS = [
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.ReadTimeout,
    httpx.WriteTimeout,
    httpx.RemoteProtocolError,
    httpx.DecodingError,
    httpx.TransportError,
    httpx.NetworkError,
    httpx.TimeoutException,
    httpx.ProtocolError,
]
MAYBE = st.sampled_from([None, False, True])


@given(
    cls=st.sampled_from(TRANSPORT_ERRORS),
    written=st.sampled_from([None, 1, 10_000]),
    started=MAYBE,
    head=MAYBE,
    reused=MAYBE,
)
@REPEATABLE
def test_once_a_byte_may_have_gone_out_no_broken_exchange_is_repeated_unless_safe(
    cls: type[httpx.RequestError], written: int | None, started: bool | None, head: bool | None, reused: bool | None
) -> None:
    sent = request("POST", bytes_written=written, response_started=started, head_received=head, reused=reused)
    failure = classify_failure(cls("broken"), sent)
    assert failure.processed
    decision = RetryPolicy().decide(failure, safe=False)
    assert not decision.retry
    assert decision.refused == "row"


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_what_an_unsafe_request_is_repeated_after_was_surely_not_processed(case: Case) -> None:
    failure = classify_failure(case.outcome, request("POST", **case.record))
    assert not (failure.processed and case.unsafe)


@pytest.mark.parametrize(
    ("outcome", "record", "processed"),
    [
        (httpx.ConnectError("refused"), {}, False),
        (httpx.ConnectTimeout("slow"), {}, False),
        (httpx.PoolTimeout("busy"), {}, False),
        (httpx.LocalProtocolError("illegal"), {}, False),
        (httpx.LocalProtocolError("too much data"), PARTLY_SENT, True),
        (httpx.WriteError("cut"), UNSENT, False),
        (httpx.WriteError("cut"), PARTLY_SENT, True),
        (httpx.WriteError("cut"), {}, True),
        (httpx.ReadTimeout("slow"), {}, True),
        (httpx.RemoteProtocolError("cut"), IN_THE_BODY, True),
        (answer(400), {}, False),
        (answer(408), {}, False),
        (answer(429), {}, False),
        (answer(500), {}, True),
        (answer(503, retry_after="1"), {}, True),
        (api_error(RateLimitError, 200), {}, False),
        (api_error(ServerError, 200), {}, True),
    ],
    ids=str,
)
def test_whether_the_server_may_have_acted(outcome: Outcome, record: dict[str, Any], processed: bool) -> None:
    assert classify_failure(outcome, request("POST", **record)).processed is processed


# Redirects: the first request was answered, so an unsafe one is not begun again


def followed(status: int) -> httpx.Response:
    response = answer(status)
    response.history = [answer(303, location="/elsewhere")]
    return response


def elsewhere(error: httpx.RequestError) -> httpx.RequestError:
    error.request = httpx.Request("GET", URL + "/elsewhere")
    return error


@pytest.mark.parametrize("outcome", [followed(429), followed(408), elsewhere(httpx.ConnectError("refused"))], ids=str)
def test_a_failure_behind_a_redirect_begins_no_unsafe_request_again(outcome: Outcome) -> None:
    failure = classify_failure(outcome, request("POST"))
    assert failure.redirected
    assert failure.processed
    assert not RetryPolicy().decide(failure, safe=False).retry
    assert RetryPolicy().decide(failure, safe=True).retry


def test_an_answer_after_fresh_tokens_is_not_taken_for_a_redirect() -> None:
    response = answer(429)
    response.history = [answer(401)]
    assert not classify_failure(response, request("POST")).redirected


def test_a_copy_of_the_request_is_not_taken_for_another() -> None:
    error = httpx.ConnectError("refused", request=httpx.Request("POST", URL))
    assert not classify_failure(error, request("POST")).redirected


# What lies below a connect error


def test_what_the_caller_was_handling_is_not_taken_for_the_cause() -> None:
    refused = ConnectionRefusedError(111, "refused")
    refused.__context__ = CERTIFICATE
    failure = classify_failure(because_of(httpx.ConnectError("refused"), refused), request())
    assert RetryPolicy().decide(failure, safe=True).retry


def test_a_cause_that_was_not_declared_is_found_too() -> None:
    error = httpx.ConnectError("tls")
    error.__context__ = CERTIFICATE
    assert not RetryPolicy().decide(classify_failure(error, request()), safe=True).retry


def test_causes_that_go_in_a_circle_come_to_an_end() -> None:
    first, second = httpx.ConnectError("first"), RuntimeError("second")
    because_of(first, second, first)
    assert RetryPolicy().decide(classify_failure(first, request()), safe=True).retry


# S and N


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "get"])
def test_idempotent_methods_are_safe_to_repeat_unless_the_caller_says_no(method: str) -> None:
    assert is_safe_to_repeat(method, ExchangeRecord())
    assert is_safe_to_repeat(method, ExchangeRecord(idempotent=True))
    assert not is_safe_to_repeat(method, ExchangeRecord(idempotent=False))


@pytest.mark.parametrize("method", ["POST", "PATCH", "PROPFIND", "CONNECT"])
def test_other_methods_are_not_unless_the_caller_says_yes(method: str) -> None:
    assert not is_safe_to_repeat(method, ExchangeRecord())
    assert is_safe_to_repeat(method, ExchangeRecord(idempotent=True))


def test_an_idempotency_key_is_the_callers_word_too_but_a_plain_no_weighs_more() -> None:
    headers = httpx.Headers({"Idempotency-Key": "k1"})
    assert is_safe_to_repeat("POST", ExchangeRecord(), headers=headers)
    assert not is_safe_to_repeat("POST", ExchangeRecord(), headers=httpx.Headers())
    assert not is_safe_to_repeat("POST", ExchangeRecord(idempotent=False), headers=headers)


# Attempts, waits, deadline, body


def failed(status: int, **headers: str) -> Failure:
    return classify_failure(answer(status, **headers), request())


STALE = classify_failure(httpx.ReadError("cut"), request(**(PARTLY_SENT | REUSED_CONNECTION)))
SLOW = classify_failure(httpx.ReadTimeout("slow"), request(**PARTLY_SENT))


def test_four_attempts_in_all() -> None:
    policy, failure = RetryPolicy(), failed(503)
    assert [policy.decide(failure, [failure] * n, safe=True).retry for n in range(4)] == [True, True, True, False]


def test_attempts_that_were_rate_limited_are_counted_apart() -> None:
    policy, limited, other = RetryPolicy(attempts=2, rate_limited_attempts=3), failed(429), failed(503)
    assert policy.decide(other, [limited] * 50, safe=True).retry
    assert policy.decide(other, [limited, other], safe=True).refused == "attempts"
    assert policy.decide(limited, [other, limited], safe=True).retry
    assert policy.decide(limited, [limited, other, limited], safe=True).refused == "attempts"


def test_one_attempt_is_one_attempt_even_on_a_stale_connection() -> None:
    policy = RetryPolicy(attempts=1, rate_limited_attempts=1)
    for failure in (STALE, failed(408), failed(429), failed(503)):
        assert policy.decide(failure, safe=True).refused == "attempts"


@pytest.mark.parametrize("past", [0, 1, 10, 5000])
def test_no_bound_on_rate_limited_attempts_is_no_bound(past: int) -> None:
    limited = failed(429)
    assert RetryPolicy(rate_limited_attempts=0).decide(limited, [limited] * past, safe=False).retry


def test_a_patient_call_waits_out_any_429_and_is_like_others_in_everything_else() -> None:
    limited = failed(429, retry_after="3600")
    decision = RetryPolicy().decide(limited, [limited] * 5000, safe=False, time_left=1.0, patient=True)
    assert (decision.retry, decision.at_gate, decision.delay) == (True, True, 3600.0)
    too_long = RetryPolicy().decide(failed(429, retry_after="3601"), safe=False, patient=True)
    assert (too_long.refused, too_long.at_gate, too_long.delay) == (None, True, 3601.0)
    assert RetryPolicy().decide(failed(503, retry_after="61"), safe=True, patient=True).refused == "retry-after"
    assert RetryPolicy().decide(failed(503), safe=True, time_left=0.1, patient=True).refused == "deadline"


def test_a_stale_connection_is_replaced_at_once_only_the_first_time_whatever_it_broke() -> None:
    unsent = classify_failure(httpx.WriteError("cut"), request(**(UNSENT | REUSED_CONNECTION)))
    decision = RetryPolicy().decide(unsent, [STALE], safe=True)
    assert decision == Decision(retry=True, delay=0.5, cost=1.0, fresh=True)


def test_retries_at_once_do_not_lengthen_the_waits_that_follow() -> None:
    policy = RetryPolicy(attempts=9)
    assert policy.decide(failed(503), [STALE, failed(408)], safe=True).delay == 0.5
    assert policy.decide(failed(503), [STALE, STALE, failed(502)], safe=True).delay == 2.0


def test_a_body_that_cannot_be_sent_again_is_not() -> None:
    assert RetryPolicy().decide(failed(503), safe=True, replayable=False).refused == "body"


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_more_than_the_longest_wait_is_not_asked_again(status: int) -> None:
    assert RetryPolicy().decide(failed(status, retry_after="60"), safe=True).retry
    decision = RetryPolicy().decide(failed(status, retry_after="61"), safe=True)
    assert decision.refused == "retry-after"
    assert decision.at_gate == (status == 429)


def test_the_longest_wait_that_a_server_may_ask_for_does_not_bound_our_own() -> None:
    assert RetryPolicy(retry_after_max=0.0).decide(failed(503), safe=True).delay == 0.5


def test_retry_after_counts_only_where_the_table_says_so() -> None:
    assert RetryPolicy().decide(failed(502, retry_after="999"), safe=True).delay == 0.5


@pytest.mark.parametrize("failure", [failed(429, retry_after="5"), failed(503, retry_after="5")])
def test_a_wait_that_does_not_end_before_the_deadline_is_not_begun(failure: Failure) -> None:
    assert RetryPolicy().decide(failure, safe=True, time_left=5.1).retry
    assert RetryPolicy().decide(failure, safe=True, time_left=5.0).refused == "deadline"


def test_the_gate_is_shut_for_the_others_even_when_this_call_gives_up() -> None:
    limited = failed(429, retry_after="5")
    hurried = RetryPolicy().decide(limited, safe=True, time_left=1.0)
    assert (hurried.retry, hurried.at_gate, hurried.delay) == (False, True, 5.0)
    worn_out = RetryPolicy().decide(limited, [limited] * 9, safe=True)
    assert (worn_out.retry, worn_out.at_gate, worn_out.delay) == (False, True, 5.0)


@pytest.mark.parametrize("failure", [STALE, failed(408)])
def test_no_time_left_is_no_time_for_a_retry_at_once_either(failure: Failure) -> None:
    assert RetryPolicy().decide(failure, safe=True, time_left=0.0).refused == "deadline"
    assert RetryPolicy().decide(failure, safe=True, time_left=-math.inf).refused == "deadline"
    assert RetryPolicy().decide(failure, safe=True, time_left=0.1).retry


def test_a_read_timeout_is_followed_only_if_half_an_attempts_time_is_left_after_the_wait() -> None:
    decide: Callable[..., Decision] = RetryPolicy().decide
    assert decide(SLOW, safe=True, attempt_time=30.0, time_left=15.5).retry
    assert decide(SLOW, safe=True, attempt_time=30.0, time_left=15.4).refused == "deadline"
    assert decide(SLOW, safe=True, attempt_time=None, time_left=0.6).retry
    assert decide(failed(503), safe=True, attempt_time=30.0, time_left=0.6).retry


def test_the_longer_a_call_has_failed_the_longer_it_waits_and_never_longer_than_the_bound() -> None:
    policy = RetryPolicy(backoff_initial=0.25, backoff_max=3.0)
    assert [policy.backoff(number, 1.0) for number in range(6)] == [0.25, 0.5, 1.0, 2.0, 3.0, 3.0]
    assert policy.backoff(100_000, 1.0) == 3.0
    assert policy.backoff(3, 0.5) == 1.0
    assert policy.backoff(3, 0.0) == 0.0


# Properties over everything a call may meet


FAILURES = st.sampled_from([classify_failure(case.outcome, request(**case.record)) for case in TABLE])
POLICIES = st.builds(
    RetryPolicy,
    attempts=st.integers(1, 6),
    backoff_initial=st.floats(0, 10),
    backoff_max=st.floats(0, 100),
    retry_after_max=st.floats(0, 10),
    rate_limited_attempts=st.integers(1, 6),
)


@given(
    policy=POLICIES,
    met=st.lists(FAILURES, min_size=20, max_size=20),
    safe=st.booleans(),
    jitter=st.floats(0, 1),
    time_left=st.floats(0, 100),
)
@REPEATABLE
def test_no_call_goes_on_for_ever_or_waits_for_longer_than_it_may(
    policy: RetryPolicy, met: list[Failure], safe: bool, jitter: float, time_left: float
) -> None:
    earlier: list[Failure] = []
    for failure in met:
        decision = policy.decide(failure, earlier, safe=safe, jitter=jitter, time_left=time_left)
        earlier.append(failure)
        assert decision.retry == (decision.refused is None)
        if not decision.retry:
            break
        bound = policy.backoff_max if failure.retry_after is None else max(policy.backoff_max, policy.retry_after_max)
        assert 0.0 <= decision.delay <= bound
        assert decision.delay < time_left
        assert safe or not failure.processed
    limited = sum(failure.cause in ("429", "RateLimitError") for failure in earlier)
    assert len(earlier) - limited <= policy.attempts
    assert limited <= policy.rate_limited_attempts


# What a policy and a budget take


@pytest.mark.parametrize("name", ["backoff_initial", "backoff_max", "retry_after_max"])
@pytest.mark.parametrize("value", [-1, -0.1, math.nan, "1", None, True, 10**400, pytest.param(10**9999, id="huge")])
def test_seconds_that_are_none_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        RetryPolicy(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["attempts", "rate_limited_attempts"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True, pytest.param(-(10**9999), id="huge")])
def test_counts_that_are_none_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        RetryPolicy(**{name: value})  # type: ignore[arg-type]


def test_no_attempt_at_all_is_refused_and_no_bound_on_rate_limits_is_not() -> None:
    with pytest.raises(ConfigurationError, match="attempts"):
        RetryPolicy(attempts=0)
    assert RetryPolicy(rate_limited_attempts=0).rate_limited_attempts == 0


def test_a_policy_is_a_value() -> None:
    assert RetryPolicy() == RetryPolicy(attempts=4)
    assert hash(RetryPolicy()) == hash(RetryPolicy())
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        RetryPolicy().attempts = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "arguments",
    [
        {"capacity": 0.0},
        {"capacity": 50.0},
        {"threshold": 100.0},
        {"threshold": -1.0},
        {"refund": -0.1},
        {"refund": math.nan},
        {"capacity": "100"},
        {"capacity": 10**400},
        {"refund": 10**9999},
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="RetryBudget"):
        RetryBudget(**arguments)


def test_a_budget_allows_nothing_that_costs_at_or_below_its_threshold() -> None:
    budget = RetryBudget()
    assert [budget.withdraw(1) for _ in range(51)] == [True] * 49 + [False] * 2
    assert budget.tokens == 49.0
    assert budget.withdraw(0)


def test_a_success_gives_a_tenth_back_and_never_more_than_there_was() -> None:
    budget = RetryBudget()
    budget.refund()
    assert budget.tokens == 100.0
    for _ in range(50):
        budget.withdraw(1)
    for _ in range(9):
        budget.refund()
    assert budget.tokens == pytest.approx(50.9)
    assert not budget.withdraw(1)
    for _ in range(20):
        budget.refund()
    assert budget.withdraw(1)


def test_a_budget_never_owes() -> None:
    budget = RetryBudget(capacity=3, threshold=1, refund=1)
    for _ in range(10):
        budget.withdraw(2)
    assert budget.tokens == 0.0
    assert repr(budget) == "<RetryBudget 0.0 of 3.0, retries above 1.0>"


def test_a_budget_without_end_allows_everything() -> None:
    budget = RetryBudget(capacity=math.inf)
    assert all(budget.withdraw(2) for _ in range(1000))


def test_a_status_error_that_classify_made_is_shown_by_its_status_or_else_by_its_name() -> None:
    error = APIStatusError("no", status_code=503, request=RequestInfo("GET", URL))
    assert classify_failure(error, request()).cause == "503"
    failure = classify_failure(api_error(ServerError, 200), request())
    assert (failure.cause, failure.status_code) == ("ServerError", 200)
