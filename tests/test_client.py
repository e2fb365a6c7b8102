"""The client as its users meet it, over mocked answers; sockets are in test_client_sockets.py."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import attrs
import httpx
import pytest
import respx

from layer_async import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncLayerClient,
    AttemptFinished,
    AuthenticationError,
    CallFinished,
    CallNext,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    Event,
    LayerError,
    MalformedResponseError,
    MissingTokensError,
    NotFoundError,
    Pacing,
    RateLimitError,
    ResponseDecodeError,
    RetryPolicy,
    RetryScheduled,
    ServerError,
    TokenPair,
    TokensRefreshed,
    _pace,
)
from layer_async import _errors as errors
from layer_async._pacing import Gate

pytestmark = pytest.mark.anyio

BASE = "https://webapi.thelayer.com"
TOKEN1, TOKEN2 = "primary-5ecret-aaaa", "secondary-5ecret-bbbb"
AT_ONCE = RetryPolicy(backoff_initial=1e-9, backoff_max=1e-9)


def gate_of(client: AsyncLayerClient) -> Gate:
    gate = client._corridor.identity.gate
    assert gate is not None
    return gate


@attrs.define
class Customer:
    id: int
    name: str


class NotADocument:
    pass


@pytest.fixture
def router() -> Iterator[respx.MockRouter]:
    with respx.mock(base_url=BASE, assert_all_called=False) as router:
        yield router


def make(**options: Any) -> AsyncLayerClient:
    settings: dict[str, Any] = {"token1": TOKEN1, "token2": TOKEN2, "retry": AT_ONCE, **options}
    return AsyncLayerClient(**settings)


@pytest.fixture
async def client() -> AsyncIterator[AsyncLayerClient]:
    async with make() as client:
        yield client


def sent(router: respx.MockRouter, index: int = -1) -> httpx.Request:
    request = router.calls[index].request
    assert isinstance(request, httpx.Request)
    return request


# Requests


@pytest.mark.parametrize("verb", ["get", "delete", "head", "options", "post", "put", "patch"])
async def test_each_verb_sends_its_method_with_both_tokens(
    client: AsyncLayerClient, router: respx.MockRouter, verb: str
) -> None:
    router.route(path="/api/x").respond(200, json={"ok": True})
    response = await getattr(client, verb)("/api/x")
    assert isinstance(response, httpx.Response)
    assert response.is_closed
    request = sent(router)
    assert request.method == verb.upper()
    assert (request.headers["Token1"], request.headers["Token2"]) == (TOKEN1, TOKEN2)


async def test_a_request_says_who_sends_it(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").respond(200)
    await client.get("api/x")
    headers = sent(router).headers
    assert headers["User-Agent"].startswith("layer-async/")
    assert headers["Accept"] == "application/json"
    assert headers["Accept-Encoding"] == "gzip, deflate"


async def test_query_headers_and_json_go_out_as_given(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.post("/api/x").respond(201, json={})
    await client.post("/api/x", params={"a": 1, "b": ["x", "y"]}, headers={"X-Trace": "7"}, json=Customer(1, "Ä"))
    request = sent(router)
    assert request.url.query == b"a=1&b=x&b=y"
    assert request.headers["X-Trace"] == "7"
    assert request.headers["Content-Type"] == "application/json"
    assert json.loads(request.content) == {"id": 1, "name": "Ä"}


async def test_a_query_in_the_path_and_params_go_together(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get(path="/api/x").respond(200)
    for params, query in (
        ({"b": 2}, b"a=1&b=2"),
        ({"a": 2}, b"a=2"),
        ({}, b"a=1"),
        (None, b"a=1"),
        ([("b", "2"), ("b", "3")], b"a=1&b=2&b=3"),
        ("b=2", b"a=1&b=2"),
    ):
        await client.get("/api/x?a=1", params=params)  # type: ignore[arg-type]
        assert sent(router).url.query == query


async def test_a_form_files_and_raw_content_go_out_as_httpx_sends_them(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.post("/api/x").respond(200)
    await client.post("/api/x", data={"a": "1"})
    assert sent(router).content == b"a=1"
    await client.post("/api/x", data={"a": "1"}, files={"f": ("n.txt", b"payload")})
    assert b"payload" in sent(router).content
    assert b'name="a"' in sent(router).content
    part = ("ä\t.txt", b"payload", 'text/plain; charset="x"', {"X-Own": "a\tä"})
    await client.post("/api/x", files={"f": part, "g": (None, "field")})
    assert b'Content-Type: text/plain; charset="x"' in sent(router).content
    assert "X-Own: a\tä\r\n".encode() in sent(router).content
    await client.post("/api/x", content=b"raw", headers={"Content-Type": "text/csv"})
    assert (sent(router).content, sent(router).headers["Content-Type"]) == (b"raw", "text/csv")
    await client.put("/api/x", content="text") if router.put("/api/x").respond(200) else None
    assert sent(router).content == b"text"


async def test_an_async_iterator_is_streamed_up(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    router.post("/api/x").respond(200)
    await client.post("/api/x", content=chunks())
    assert sent(router).content == b"one two"
    assert sent(router).headers["Transfer-Encoding"] == "chunked"


async def test_the_base_url_may_have_a_path(router: respx.MockRouter) -> None:
    router.get("/v2/api/x").respond(200)
    async with make(base_url=f"{BASE}/v2") as client:
        await client.get("/api/x")
        await client.get("api/x")
    assert len(router.calls) == 2


async def test_the_environment_gives_tokens_and_base_url(
    router: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYER_TOKEN1", "env-one")
    monkeypatch.setenv("LAYER_TOKEN2", "env-two")
    monkeypatch.setenv("LAYER_BASE_URL", "http://localhost:9")
    router.get("http://localhost:9/api/x").respond(200)
    async with AsyncLayerClient() as client:
        await client.get("/api/x")
    assert sent(router).headers["Token1"] == "env-one"


async def test_an_argument_beats_the_environment(router: respx.MockRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYER_TOKEN1", "env-one")
    monkeypatch.setenv("LAYER_BASE_URL", "https://elsewhere.invalid")
    router.get("/api/x").respond(200)
    async with make(base_url=BASE) as client:
        await client.get("/api/x")
    assert sent(router).headers["Token1"] == TOKEN1


async def test_cookies_of_an_answer_are_not_kept(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").respond(200, headers={"Set-Cookie": "session=1; Path=/"})
    await client.get("/api/x")
    await client.get("/api/x")
    assert "Cookie" not in sent(router).headers


# Answers


async def test_into_gives_a_typed_value(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/one").respond(200, json={"id": 1, "name": "A", "unknown": True})
    router.get("/api/all").respond(200, json=[{"id": 1, "name": "A"}])
    router.get("/api/none").respond(200, content=b"null")
    assert await client.get("/api/one", into=Customer) == Customer(1, "A")
    assert await client.get("/api/all", into=list[Customer]) == [Customer(1, "A")]
    assert await client.get("/api/none", into=Customer | None) is None
    assert await client.get("/api/all", into=Any) == [{"id": 1, "name": "A"}]


async def test_what_cannot_be_decoded_names_the_path_and_the_call(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/all").respond(200, json=[{"id": 1, "name": "A"}, {"id": "x", "name": "B"}])
    with pytest.raises(ResponseDecodeError) as caught:
        await client.get("/api/all?secret=1", into=list[Customer])
    error = caught.value
    assert error.path == "$[1].id"
    assert error.request is not None
    assert str(error).startswith(f"GET {BASE}/api/all: ")
    assert "secret" not in str(error)
    assert len(error.attempts) == 1
    assert len(router.calls) == 1


async def test_an_into_that_cannot_work_is_refused_before_anything_is_sent(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    with pytest.raises(ConfigurationError):
        await client.get("/api/x", into=NotADocument)
    with pytest.raises(ConfigurationError):
        await client.fetch_all(["/api/x"], into=NotADocument)
    with pytest.raises(ConfigurationError):
        client.bulk(["/api/x"], into=NotADocument)
    assert not router.calls


@pytest.mark.parametrize(
    ("status", "cls"),
    [(code, cls) for code, cls in errors.STATUS_ERRORS.items()] + [(500, ServerError), (418, APIStatusError)],
)
async def test_a_status_from_400_raises_its_class(
    client: AsyncLayerClient, router: respx.MockRouter, status: int, cls: type[APIStatusError]
) -> None:
    router.get("/api/x").respond(
        status, json={"message": f"no {TOKEN1} here"}, headers={"X-Request-Id": "r-1", "Retry-After": "100000"}
    )
    with pytest.raises(cls) as caught:
        await client.get("/api/x", params={"q": "hidden"})
    error = caught.value
    assert type(error) is cls
    assert error.status_code == status
    assert error.request_id == "r-1"
    assert error.retry_after == 100000
    assert b"message" in error.body
    assert "The server says: no *** here" in str(error)
    assert error.request is not None
    assert error.request.url == f"{BASE}/api/x"
    assert "hidden" not in str(error) + repr(error)
    assert TOKEN1 not in str(error) + repr(error) + repr(error.body) + repr(error.headers)
    assert error.attempts[-1].status_code == status


async def test_the_advice_of_401_and_403_says_what_to_do(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/a").respond(401)
    router.get("/api/b").respond(403)
    with pytest.raises(AuthenticationError, match=r"Token1 may have lapsed.*Token Management"):
        await client.get("/api/a")
    with pytest.raises(APIStatusError, match="lack the access"):
        await client.get("/api/b")


async def test_errors_survive_pickle_and_deepcopy(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").respond(404, json={"message": "gone"})
    with pytest.raises(NotFoundError) as caught:
        await client.get("/api/x")
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.deepcopy(caught.value)):
        assert type(twin) is NotFoundError
        assert str(twin) == str(caught.value)
        assert twin.__dict__ == caught.value.__dict__


async def test_only_the_first_64_kib_of_an_error_body_are_kept(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").respond(404, content=b"x" * 1_000_000)
    with pytest.raises(NotFoundError) as caught:
        await client.get("/api/x")
    assert len(caught.value.body) == 64 * 1024
    assert len(str(caught.value)) < 500


async def test_a_body_over_the_limit_is_refused(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").mock(return_value=httpx.Response(200, stream=Chunks(*[b"x" * 100] * 20)))
    router.get("/api/read").respond(200, content=b"x" * 2000)
    for path in ("/api/x", "/api/read"):
        with pytest.raises(MalformedResponseError, match="max_response_bytes=1000"):
            await client.get(path, max_response_bytes=1000)
    response = await client.get("/api/x", max_response_bytes=2000)
    assert len(response.content) == 2000
    response = await client.get("/api/x", max_response_bytes=None)
    assert len(response.content) == 2000


class Chunks(httpx.AsyncByteStream):
    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk


# Failures


@pytest.mark.parametrize(
    ("raised", "cls", "phase"),
    [
        (httpx.ConnectTimeout("t"), APITimeoutError, "connect"),
        (httpx.ReadTimeout("t"), APITimeoutError, "read"),
        (httpx.WriteTimeout("t"), APITimeoutError, "write"),
        (httpx.PoolTimeout("t"), APITimeoutError, "pool"),
        (httpx.ConnectError("refused"), APIConnectionError, None),
        (httpx.ReadError(""), APIConnectionError, None),
        (httpx.RemoteProtocolError("bad head"), MalformedResponseError, None),
        (httpx.DecodingError("bad gzip"), MalformedResponseError, None),
        (httpx.LocalProtocolError("Illegal header value b'5ecret'"), ConfigurationError, None),
        (httpx.UnsupportedProtocol("ftp"), ConfigurationError, None),
    ],
)
async def test_each_error_of_httpx_becomes_one_of_ours(
    client: AsyncLayerClient, router: respx.MockRouter, raised: Exception, cls: type[LayerError], phase: str | None
) -> None:
    router.get("/api/x").mock(side_effect=raised)
    with pytest.raises(cls) as caught:
        await client.get("/api/x", retry=None)
    assert type(caught.value) is cls
    assert getattr(caught.value, "phase", None) == phase
    assert "5ecret" not in str(caught.value)
    assert caught.value.request is not None


async def test_an_unsafe_request_without_an_answer_may_have_been_processed(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.post("/api/x").mock(side_effect=httpx.ReadError("reset"))
    router.get("/api/x").mock(side_effect=httpx.ReadError("reset"))
    with pytest.raises(APIConnectionError, match="look before you send it again") as caught:
        await client.post("/api/x", json={})
    assert caught.value.maybe_processed
    assert len(router.calls) == 1
    with pytest.raises(APIConnectionError) as caught:
        await client.get("/api/x")
    assert not caught.value.maybe_processed
    assert len(caught.value.attempts) == 4


async def test_what_a_mocking_tool_raises_passes_untouched(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    with pytest.raises(AssertionError):
        await client.get("/api/not-mocked")


async def test_a_failed_attempt_is_followed_by_another(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").mock(side_effect=[httpx.Response(503), httpx.ConnectError("x"), httpx.Response(200)])
    assert (await client.get("/api/x")).status_code == 200
    assert len(router.calls) == 3


async def test_retry_none_means_one_attempt(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").respond(503)
    with pytest.raises(ServerError):
        await client.get("/api/x", retry=None)
    assert len(router.calls) == 1


async def test_idempotent_is_the_callers_word(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.post("/api/x").mock(side_effect=[httpx.ReadError("x"), httpx.Response(200)])
    assert (await client.post("/api/x", json={}, idempotent=True)).status_code == 200
    router.put("/api/x").mock(side_effect=[httpx.ReadError("x"), httpx.Response(200)])
    with pytest.raises(APIConnectionError):
        await client.put("/api/x", json={}, idempotent=False)


async def test_a_429_shuts_the_gate_for_all_and_nothing_is_lost(
    router: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pace, "FIRST_RATE", 1000.0)
    monkeypatch.setattr(_pace.Pace, "pause", lambda self, jitter: 0.001)
    answers = [httpx.Response(429)] * 3 + [httpx.Response(200)] * 20
    router.get(path__startswith="/api/").mock(side_effect=answers)
    async with make() as client:
        await client.fetch_all([f"/api/{n}" for n in range(20)])
        assert client.pool.stats.in_use == 0


async def test_a_429_that_asks_for_too_long_is_raised_at_once(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").respond(429, headers={"Retry-After": "61"})
    with pytest.raises(RateLimitError) as caught:
        await client.get("/api/x")
    assert caught.value.retry_after == 61
    assert len(router.calls) == 1


# Deadline


class Never(httpx.AsyncBaseTransport):
    """Takes a request and never answers."""

    def __init__(self) -> None:
        self.requests = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        await anyio.sleep_forever()
        raise AssertionError


async def test_the_deadline_ends_a_call_and_says_what_it_was_doing() -> None:
    async with make(transport=Never(), deadline=0.005) as client:
        with pytest.raises(DeadlineExceededError, match=r"deadline of 0\.005 s passed in the read phase") as caught:
            await client.post("/api/x", json={})
        assert caught.value.phase == "read"
        assert caught.value.maybe_processed
        assert isinstance(caught.value, TimeoutError)
        with pytest.raises(DeadlineExceededError) as caught:
            await client.get("/api/x", deadline=0.004)
        assert not caught.value.maybe_processed


async def test_the_callers_own_scope_stays_the_callers() -> None:
    async with make(transport=Never(), deadline=None) as client:
        with anyio.move_on_after(0.005) as scope:
            await client.get("/api/x")
        assert scope.cancelled_caught


async def test_a_retry_that_cannot_meet_the_deadline_is_not_begun(router: respx.MockRouter) -> None:
    router.get("/api/x").respond(503, headers={"Retry-After": "30"})
    async with make(deadline=10.0) as client:
        with pytest.raises(ServerError):
            await client.get("/api/x")
    assert len(router.calls) == 1


async def test_a_call_that_finds_the_gate_shut_for_longer_than_it_may_take_fails_at_once(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").respond(429, headers={"Retry-After": "50"})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.get, "/api/x")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(DeadlineExceededError) as caught:
            await client.get("/api/y", deadline=20.0)
        assert caught.value.phase == "gate"
        assert caught.value.request is not None
        tasks.cancel_scope.cancel()
    assert len(router.calls) == 1
    assert client.pool.stats.in_use == 0


async def test_waiting_at_the_gate_uses_up_no_bulk_items_deadline(router: respx.MockRouter) -> None:
    router.get("/api/x").respond(200)
    async with make(deadline=0.002) as client:
        gate_of(client).shut(60)
        with pytest.raises(DeadlineExceededError):
            await client.fetch_all(["/api/x"])
    async with make(deadline=0.002) as client:
        gate_of(client).shut(0.006)
        async with client.with_options(deadline=5).bulk(["/api/x"]) as outcomes:
            assert [outcome.ok async for outcome in outcomes] == [True]


async def hand_on(request: httpx.Request, call_next: CallNext) -> httpx.Response:
    return await call_next(request)


@pytest.mark.parametrize("middleware", [[], [hand_on]], ids=["first in the queue", "first a request"])
async def test_a_call_that_gets_its_slot_while_the_gate_is_shut_gives_it_back_and_waits_there(
    router: respx.MockRouter, middleware: list[Any]
) -> None:
    router.get("/api/x").respond(200)
    async with make(limits=httpx.Limits(max_connections=1), middleware=middleware) as client:
        slot = await client.pool.acquire()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "/api/x")
            await anyio.wait_all_tasks_blocked()
            assert client.pool.stats.waiting == 1
            gate_of(client).shut(0.006)
            slot.release()
            await anyio.wait_all_tasks_blocked()
            assert client.pool.stats.in_use == 0
            assert not router.calls
    assert len(router.calls) == 1


# Middleware, classify, events


async def test_middleware_is_asked_once_a_call_and_the_first_is_outermost(router: respx.MockRouter) -> None:
    seen: list[str] = []

    def named(name: str) -> Callable[[httpx.Request, CallNext], Any]:
        async def middleware(request: httpx.Request, call_next: CallNext) -> httpx.Response:
            seen.append(f"{name} in")
            request.headers["X-Seen"] = name
            response = await call_next(request)
            seen.append(f"{name} out {response.status_code}")
            return response

        return middleware

    router.get("/api/x").mock(side_effect=[httpx.Response(503), httpx.Response(200, json={})])
    async with make(middleware=[named("a"), named("b")]) as client:
        await client.get("/api/x")
    assert seen == ["a in", "b in", "b out 200", "a out 200"]
    assert sent(router).headers["X-Seen"] == "b"


async def test_middleware_sees_httpxs_errors_and_may_answer_itself(router: respx.MockRouter) -> None:
    async def calming(request: httpx.Request, call_next: CallNext) -> httpx.Response:
        try:
            return await call_next(request)
        except httpx.ConnectError:
            return httpx.Response(200, json={"id": 0, "name": "nobody"}, request=request)

    router.get("/api/x").mock(side_effect=httpx.ConnectError("refused"))
    async with make(middleware=[calming]) as client:
        assert await client.get("/api/x", into=Customer) == Customer(0, "nobody")


async def test_classify_turns_an_answer_into_an_error_that_is_retried_as_its_class_is(router: respx.MockRouter) -> None:
    def classify(response: httpx.Response) -> LayerError | None:
        document = response.json()
        if document.get("error") == "busy":
            return ServerError("the answer says busy", status_code=503)
        if document.get("error"):
            elsewhere = errors.RequestInfo("GET", "elsewhere")
            met = (errors.AttemptInfo(1, "no", 200, 0.1),)
            return NotFoundError("the answer says no", status_code=404, request=elsewhere, attempts=met)
        return None

    router.get("/api/busy").mock(
        side_effect=[httpx.Response(200, json={"error": "busy"}), httpx.Response(200, json={"id": 1, "name": "A"})]
    )
    router.get("/api/no").respond(200, json={"error": "no"})
    async with make(classify=classify) as client:
        assert await client.get("/api/busy", into=Customer) == Customer(1, "A")
        with pytest.raises(NotFoundError, match="the answer says no") as caught:
            await client.get("/api/no")
        assert caught.value.request == errors.RequestInfo("GET", "elsewhere")
        assert [attempt.outcome for attempt in caught.value.attempts] == ["no"]
        assert client.pool.stats.in_use == 0


async def test_hooks_that_return_the_wrong_thing_are_told_so(router: respx.MockRouter) -> None:
    async def forgetful(request: httpx.Request, call_next: CallNext) -> httpx.Response:
        await call_next(request)
        return None  # type: ignore[return-value]

    router.get("/api/x").respond(200)
    async with make(middleware=[forgetful]) as client:
        with pytest.raises(TypeError, match=r"a middleware must return an httpx\.Response, not NoneType"):
            await client.get("/api/x")
    async with make(classify=lambda response: True) as client:
        with pytest.raises(TypeError, match="classify must return a LayerError or None, not bool"):
            await client.get("/api/x")
        assert client.pool.stats.in_use == 0


async def test_events_tell_of_attempts_retries_and_calls(router: respx.MockRouter) -> None:
    events: list[Event] = []
    router.get("/api/x").mock(side_effect=[httpx.Response(503), httpx.Response(200)])
    router.get("/api/y").respond(404)
    async with make(observer=events.append) as client:
        await client.get("/api/x?token=hidden")
        with pytest.raises(NotFoundError):
            await client.get("/api/y")
    kinds = [type(event) for event in events]
    assert kinds == [
        AttemptFinished,
        RetryScheduled,
        AttemptFinished,
        CallFinished,
        AttemptFinished,
        CallFinished,
    ]
    last = events[-1]
    assert isinstance(last, CallFinished)
    assert (last.error, last.status_code, last.attempts) == ("NotFoundError", 404, 1)
    assert "hidden" not in repr(events)


async def test_an_observer_that_fails_does_not_fail_the_call(
    router: respx.MockRouter, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("broken meter")

    router.get("/api/x").respond(200)
    async with make(observer=broken) as client:
        await client.get("/api/x")
    assert "the observer failed on AttemptFinished" in caplog.text


async def test_by_default_events_are_logged(
    client: AsyncLayerClient, router: respx.MockRouter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "layer_async")
    router.get("/api/x").mock(
        side_effect=[httpx.Response(503), httpx.Response(429), httpx.ReadError("x"), httpx.Response(200)]
    )
    await client.get("/api/x")
    text = "\n".join(record.getMessage() for record in caplog.records if record.name == "layer_async")
    assert f"GET {BASE}/api/x: attempt 1 met 503, next in" in text
    assert "the server said slow down" in text
    assert "attempt 3: ReadError" in text
    assert "200 after 4 attempts" in text


async def test_a_refresh_is_told(router: respx.MockRouter, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "layer_async")
    events: list[Event] = []
    pairs = iter([TokenPair("old-token-one", "old-token-two"), TokenPair("new-token-one", "new-token-two")])
    router.get("/api/x", headers={"Token1": "old-token-one"}).respond(401)
    router.get("/api/x", headers={"Token1": "new-token-one"}).respond(200)
    async with AsyncLayerClient(tokens=lambda: next(pairs), observer=events.append) as client:
        await client.get("/api/x")
    assert [event.generation for event in events if isinstance(event, TokensRefreshed)] == [1, 2]
    from layer_async import LoggingObserver

    LoggingObserver()(TokensRefreshed(2))
    assert "new tokens, generation 2" in caplog.text


# Redirects


async def test_a_redirect_is_returned_or_raised_where_a_value_was_asked_for(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").respond(302, headers={"Location": "https://other.invalid/secret?x=1"})
    router.get("/api/y").respond(304)
    assert (await client.get("/api/x")).status_code == 302
    with pytest.raises(APIStatusError, match=r"302: a redirect to https://other\.invalid") as caught:
        await client.get("/api/x", into=Customer)
    assert "secret" not in str(caught.value)
    with pytest.raises(APIStatusError, match="304: a redirect to nowhere"):
        await client.get("/api/y", into=Customer)


async def test_follow_redirects_stays_at_the_origin(router: respx.MockRouter) -> None:
    router.get("/api/a").respond(302, headers={"Location": "/api/b"})
    router.get("/api/b").respond(307, headers={"Location": f"{BASE}/api/c"})
    router.get("/api/c").respond(200, json={"id": 1, "name": "A"})
    router.get("/api/out").respond(302, headers={"Location": "https://other.invalid/"})
    router.get("/api/loop").respond(302, headers={"Location": "/api/loop"})
    router.post("/api/p").respond(307, headers={"Location": "/api/q"})
    router.post("/api/q").respond(200)
    async with make(follow_redirects=True) as client:
        response = await client.get("/api/a")
        assert response.status_code == 200
        assert [r.status_code for r in response.history] == [302, 307]
        assert sent(router).headers["Token1"] == TOKEN1
        assert (await client.get("/api/out")).status_code == 302
        assert (await client.get("/api/loop")).status_code == 302
        with pytest.raises(APIStatusError, match=r"Followed are those that stay .* 20 in a row"):
            await client.get("/api/loop", into=dict)
        await client.post("/api/p", json={"a": 1})
        assert json.loads(sent(router).content) == {"a": 1}

        async def once() -> AsyncIterator[bytes]:
            yield b"x"

        assert (await client.post("/api/p", content=once())).status_code == 307


# Streams


async def test_a_stream_gives_the_body_as_it_comes(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").mock(return_value=httpx.Response(200, stream=Chunks(b"a", b"b")))
    async with client.stream("GET", "/api/x") as response:
        assert [chunk async for chunk in response.aiter_raw()] == [b"a", b"b"]
    assert response.is_closed


async def test_a_stream_raises_for_an_error_status_after_reading_its_body(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").mock(return_value=httpx.Response(404, stream=Chunks(b'{"message": "gone"}')))
    with pytest.raises(NotFoundError, match="gone"):
        async with client.stream("GET", "/api/x"):
            raise AssertionError


async def test_a_stream_is_bounded_only_where_asked(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x").mock(side_effect=lambda request: httpx.Response(200, stream=Chunks(b"a" * 600, b"b" * 600)))
    async with client.stream("GET", "/api/x", max_response_bytes=1200) as response:
        assert len(await response.aread()) == 1200
    with pytest.raises(MalformedResponseError, match="max_response_bytes=1000") as caught:
        async with client.stream("GET", "/api/x", max_response_bytes=1000) as response:
            await response.aread()
    assert caught.value.request is not None


class Broken(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"half"
        raise httpx.ReadError("reset")


async def test_an_error_while_the_body_streams_is_ours_and_says_how_much_came(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").mock(side_effect=lambda request: httpx.Response(200, stream=Broken()))
    with pytest.raises(APIConnectionError, match="reset after 4 bytes of the body"):
        async with client.stream("GET", "/api/x") as response:
            await response.aread()
    assert len(router.calls) == 1


@pytest.mark.parametrize("way", ["aiter_bytes", "aiter_raw", "aiter_text", "aiter_lines"])
async def test_an_error_of_a_stream_is_ours_where_it_is_met(
    client: AsyncLayerClient, router: respx.MockRouter, way: str
) -> None:
    router.get("/api/x").mock(side_effect=lambda request: httpx.Response(200, stream=Broken()))
    async with client.stream("GET", "/api/x") as response:
        with pytest.raises(APIConnectionError, match=r"reset after 4 bytes of the body\.$") as caught:
            async for _ in getattr(response, way)():
                pass
    assert caught.value.request == errors.RequestInfo("GET", "https://webapi.thelayer.com/api/x")
    async with client.stream("GET", "/api/x", max_response_bytes=3) as response:
        with pytest.raises(MalformedResponseError, match="max_response_bytes=3") as too_large:
            async for _ in getattr(response, way)():
                pass
    assert too_large.value.request is not None


async def test_a_body_that_a_mock_has_read_already_is_bounded_in_a_stream_too() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=b"x" * 100))
    async with make(transport=transport) as client:
        with pytest.raises(MalformedResponseError, match="max_response_bytes=99") as caught:
            async with client.stream("GET", "/api/x", max_response_bytes=99):
                raise AssertionError
        assert caught.value.request is not None
        async with client.stream("GET", "/api/x", max_response_bytes=100) as response:
            assert [piece async for piece in response.aiter_bytes()] == [b"x" * 100]


async def test_an_endless_body_of_a_transport_of_ones_own_is_stopped_at_the_limit() -> None:
    taken = 0

    class Endless(httpx.AsyncByteStream):
        def __aiter__(self) -> AsyncIterator[bytes]:
            return self

        async def __anext__(self) -> bytes:
            nonlocal taken
            taken += 1
            return b"x" * 1000

    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Endless()))
    async with make(transport=transport, max_response_bytes=10_000) as client:
        with pytest.raises(MalformedResponseError):
            await client.get("/api/x")
        assert taken < 50
        with pytest.raises(MalformedResponseError):
            async with client.stream("GET", "/api/x", max_response_bytes=10_000) as response:
                await response.aread()
        assert taken < 100


async def test_an_answer_that_a_middleware_leaves_unread_is_read(router: respx.MockRouter) -> None:
    async def answer(request: httpx.Request, call_next: CallNext) -> httpx.Response:
        status = int(request.url.path.rpartition("/")[2])
        return httpx.Response(status, stream=Chunks(*[b'{"message": "made here"}', b" " * 1000] * 100), request=request)

    async with make(middleware=[answer], max_response_bytes=200_000) as client:
        for code in ("/404", "/503"):
            with pytest.raises(APIStatusError, match="made here") as caught:
                await client.get(code)
            assert len(caught.value.body) == 64 * 1024
            with pytest.raises(APIStatusError, match="made here"):
                async with client.stream("GET", code):
                    raise AssertionError
        assert len((await client.get("/200")).content) == 102_400
        with pytest.raises(MalformedResponseError):
            await client.get("/200", max_response_bytes=1000)
        async with client.stream("GET", "/200") as response:
            assert not response.is_stream_consumed
            assert len(await response.aread()) == 102_400


async def test_errors_of_others_inside_a_stream_block_pass_untouched(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").mock(side_effect=lambda request: httpx.Response(200, stream=Chunks(b"a")))
    with pytest.raises(httpx.ReadError):
        async with client.stream("GET", "/api/x"):
            raise httpx.ReadError("of another client")
    with pytest.raises(LayerError, match="of another call") as caught:
        async with client.stream("GET", "/api/x"):
            raise LayerError("of another call", request=errors.RequestInfo("GET", "https://x.invalid/"))
    assert caught.value.request == errors.RequestInfo("GET", "https://x.invalid/")

    class Relayed(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"a"
            raise caught.value

    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Relayed()))
    async with make(transport=transport) as relaying, relaying.stream("GET", "/api/x") as response:
        with pytest.raises(LayerError, match="of another call"):
            await response.aread()
    assert caught.value.request == errors.RequestInfo("GET", "https://x.invalid/")


# Many calls


async def test_fetch_all_returns_answers_in_order(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get(path__regex=r"/api/(?P<n>\d+)").mock(
        side_effect=lambda request, n: httpx.Response(200, json={"id": int(n), "name": n})
    )
    customers = await client.fetch_all([f"/api/{n}" for n in range(50)], into=Customer)
    assert [customer.id for customer in customers] == list(range(50))
    responses = await client.fetch_all(["/api/1"], workers=1)
    assert isinstance(responses[0], httpx.Response)
    assert await client.fetch_all([]) == []


async def test_fetch_all_raises_the_first_failure_as_itself(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/bad").respond(404)
    router.get(path__regex="/api/.*").respond(200)
    with pytest.raises(NotFoundError):
        await client.fetch_all(["/api/1", "/api/bad", "/api/2"])
    assert client.pool.stats.in_use == 0


async def test_a_bulk_gives_one_outcome_for_each_item(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/busy").mock(
        side_effect=[httpx.Response(503), httpx.Response(503), httpx.Response(200, json={"id": 7, "name": "B"})]
    )
    router.get("/api/gone").respond(404)
    router.get(path__regex=r"/api/\d").respond(200, json={"id": 1, "name": "A"})
    paths = ["/api/1", "/api/busy", "/api/gone", "/api/2"]
    async with client.bulk(paths, into=Customer, key=lambda path: path[5:], ordered=True) as outcomes:
        got = [outcome async for outcome in outcomes]
    assert [outcome.key for outcome in got] == ["1", "busy", "gone", "2"]
    assert [outcome.attempts for outcome in got] == [1, 3, 1, 1]
    assert got[1].unwrap() == Customer(7, "B")
    assert isinstance(got[2].error, NotFoundError)


async def test_a_bulk_runs_any_call_with_one_argument(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.post("/api/x").respond(200, json={"id": 1, "name": "A"})

    async def create(number: int) -> Customer:
        await client.post("/api/x", json={"n": number}, into=Customer)
        return await client.post("/api/x", json={"n": number}, into=Customer)

    async with client.bulk(range(3), create, workers=2) as outcomes:
        got = [outcome async for outcome in outcomes]
    assert sorted(outcome.item for outcome in got) == [0, 1, 2]
    assert {outcome.attempts for outcome in got} == {2}
    with pytest.raises(ConfigurationError, match="into= belongs to the default call"):
        client.bulk(range(3), create, into=Customer)  # type: ignore[call-overload]


async def test_a_bulk_takes_half_the_slots_by_default() -> None:
    async with make(limits=httpx.Limits(max_connections=10)) as client, make(transport=Never()) as foreign:
        assert client._worker_count(None) == 5
        assert client._worker_count(3) == 3
        assert foreign._worker_count(None) == 50
    async with make(limits=httpx.Limits(max_connections=1)) as client:
        assert client._worker_count(None) == 1


async def test_a_bulk_item_waits_out_a_429_that_a_single_call_would_not(router: respx.MockRouter) -> None:
    router.get("/api/x").mock(side_effect=[httpx.Response(429)] * 12 + [httpx.Response(200)])
    async with make(pacing=None) as client:
        with pytest.raises(RateLimitError):
            await client.get("/api/x")
        router.get("/api/x").mock(side_effect=[httpx.Response(429)] * 12 + [httpx.Response(200)])
        async with client.bulk(["/api/x"]) as outcomes:
            got = [outcome async for outcome in outcomes]
    assert got[0].unwrap().status_code == 200
    assert got[0].attempts == 13


# Views


async def test_a_view_shares_the_connections_and_changes_only_what_is_given(
    client: AsyncLayerClient, router: respx.MockRouter
) -> None:
    router.get("/api/x").respond(503)
    view = client.with_options(headers={"X-Tenant": "7"}, retry=None, timeout=3, deadline=9, max_response_bytes=None)
    assert view.pool is client.pool
    assert view.http is client.http
    with pytest.raises(ServerError):
        await view.get("/api/x")
    assert len(router.calls) == 1
    assert sent(router).headers["X-Tenant"] == "7"
    assert sent(router).headers["Token1"] == TOKEN1
    assert sent(router).extensions["timeout"] == {"connect": 3, "read": 3, "write": 3, "pool": None}
    for option in ("colour", "params", "json"):
        with pytest.raises(TypeError, match=f"there is no option '{option}' here"):
            client.with_options(**{option: 1})  # type: ignore[arg-type]


async def test_a_view_with_other_tokens_has_its_own_state(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.get("/api/x", headers={"Token1": TOKEN1}).respond(429, headers={"Retry-After": "50"})
    router.get("/api/x", headers={"Token1": "other-token-one"}).respond(200)
    view = client.with_options(tokens=TokenPair("other-token-one", "other-token-two"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.get, "/api/x")
        await anyio.wait_all_tasks_blocked()
        assert gate_of(client).is_shut
        with anyio.fail_after(5):
            assert (await view.get("/api/x")).status_code == 200
        assert not gate_of(view).is_shut
        assert view._corridor.identity.budget is not client._corridor.identity.budget
        tasks.cancel_scope.cancel()


async def test_closing_a_view_closes_nothing_and_closing_the_client_closes_its_views(router: respx.MockRouter) -> None:
    router.get("/api/x").respond(200)
    client = make()
    async with client.with_options(timeout=1) as view:
        await view.get("/api/x")
    with pytest.raises(ClientClosedError):
        await view.get("/api/x")
    await client.get("/api/x")
    other = client.with_options(timeout=2)
    await client.aclose()
    await client.aclose()
    for closed in (client, other):
        with pytest.raises(ClientClosedError) as caught:
            await closed.get("/api/x")
        assert caught.value.request is not None
        with pytest.raises(ClientClosedError):
            await closed.__aenter__()


# The client itself


async def test_a_client_left_open_is_told_of_at_its_collection() -> None:
    make()
    with pytest.warns(ResourceWarning, match="was not closed"):
        gc.collect()


async def test_a_client_that_could_not_be_made_has_nothing_to_close() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigurationError):
            make(timeout=-1)
        gc.collect()
        assert repr(object.__new__(AsyncLayerClient)) == "<AsyncLayerClient None closed>"


async def test_a_client_is_readable_and_cannot_be_pickled(client: AsyncLayerClient) -> None:
    assert repr(client) == f"<AsyncLayerClient {BASE} open>"
    await client.aclose()
    assert repr(client) == f"<AsyncLayerClient {BASE} closed>"
    with pytest.raises(TypeError):
        pickle.dumps(client)
    with pytest.raises(TypeError):
        copy.deepcopy(client)


async def test_an_injected_transport_is_used_and_closed() -> None:
    class Transport(httpx.MockTransport):
        closed = False

        async def aclose(self) -> None:
            self.closed = True

    transport = Transport(lambda request: httpx.Response(200))
    async with make(transport=transport) as client:
        await client.get("/api/x")
        with pytest.raises(ConfigurationError, match="transport of yours"):
            _ = client.pool
    assert transport.closed


async def test_an_injected_client_is_used_and_left_open() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(302, headers={"Location": "https://other.invalid/"})

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(answer), auth=("user", "pass"), follow_redirects=True
    ) as http:
        async with make(http_client=http) as client:
            assert (await client.get("/api/x")).status_code == 302
            assert client.http is http
        assert not http.is_closed
    assert len(seen) == 1
    assert "Authorization" not in seen[0].headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token1": None}, "token1"),
        ({"token1": "has space"}, "token1"),
        ({"token2": "line\nbreak"}, "token2"),
        ({"base_url": "http://api.example"}, "https"),
        ({"timeout": -1}, "timeout must be a positive number of seconds, not -1"),
        ({"timeout": True}, "timeout"),
        ({"timeout": httpx.Timeout(5, read=-2.0)}, r"timeout \(read\)"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"deadline": "12"}, "deadline"),
        ({"retry": 3}, "RetryPolicy"),
        ({"max_response_bytes": -1}, "max_response_bytes"),
        ({"follow_redirects": 1}, "follow_redirects"),
        ({"observer": 1}, "observer"),
        ({"middleware": [1]}, "middleware"),
        ({"classify": 1}, "classify"),
        ({"headers": {"token1": "5ecret"}}, "token1 is set by the client"),
        ({"headers": {"X-A": "a\r\nb"}}, "value of header X-A"),
        ({"headers": {"X-A": "\u20ac5ecret"}}, "ASCII"),
        ({"headers": {"X A": "a"}}, "no header name"),
        ({"headers": 7}, "headers must be"),
        ({"allow_http": "no"}, "allow_http must be True or False"),
        ({"trust_env": "no"}, "trust_env must be True or False"),
        ({"middleware": "no"}, "middleware must be a list"),
        ({"limits": 5}, "limits= must be httpx.Limits"),
        ({"proxy": 5}, "proxy must be"),
        ({"proxy": "ftp://user:5ecret@host.invalid"}, "proxy must be"),
        ({"limits": httpx.Limits(), "transport": Never()}, "limits= is a matter"),
        ({"verify": True, "transport": Never()}, "verify= is a matter"),
        ({"proxy": "http://localhost:1", "transport": Never()}, "proxy= is a matter"),
        ({"transport": 1}, "transport= must be"),
        ({"http_client": 1}, "http_client= must be"),
    ],
)
async def test_a_setting_that_cannot_work_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        make(**options)
    assert isinstance(caught.value, ValueError)
    assert "5ecret" not in str(caught.value)


async def test_transport_and_http_client_exclude_each_other() -> None:
    async with httpx.AsyncClient() as http:
        with pytest.raises(ConfigurationError, match="not both"):
            make(transport=Never(), http_client=http)


async def test_missing_tokens_say_which_and_where_they_were_looked_for() -> None:
    with pytest.raises(MissingTokensError, match="LAYER_TOKEN1"):
        AsyncLayerClient()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("https://other.invalid/x", {}, "."),
        ("//other.invalid/x", {}, "."),
        ("/\\other.invalid", {}, "."),
        ("/api/x", {"timeout": 0}, "timeout"),
        ("/api/x", {"deadline": -1}, "deadline"),
        *(
            ("/api/x", options, name)
            for huge in (10**400, 10**9999)
            for name, options in (
                ("timeout", {"timeout": huge}),
                (r"timeout \(read\)", {"timeout": httpx.Timeout(5, read=huge)}),
                ("deadline", {"deadline": huge}),
            )
        ),
        ("/api/x", {"idempotent": "yes"}, "idempotent"),
        ("/api/x", {"max_response_bytes": 1.5}, "max_response_bytes"),
        ("/api/x", {"headers": {"Token2": "5ecret"}}, "Token2 is set by the client"),
        ("/api/x", {"json": {}, "content": b""}, "one body"),
        ("/api/x", {"json": {}, "data": {}}, "one body"),
        ("/api/x", {"content": [b"a"]}, "content must be"),
        ("/api/x", {"json": object()}, "json= cannot be encoded"),
        ("/api/x", {"json": float("nan")}, "NaN"),
        ("/api/x", {"params": {"a": "\ud800"}}, "a parameter must be"),
        ("/api/x", {"params": "\ud800"}, "params must be text"),
        ("/api/x", {"params": 7}, "params must be"),
        ("/api/x", {"params": [1]}, "params must be"),
        ("/api/x", {"params": {"a": b"x"}}, "a parameter must be"),
        ("/api/x", {"params": {"a": [{}]}}, "a parameter must be"),
        ("/api/x", {"params": {1: "x"}}, "a parameter must be"),
        ("/api/x", {"params": {"a": float("nan")}}, "a parameter must be"),
        ("/api/x", {"data": [("a", "b")]}, "data must be a mapping"),
        ("/api/x", {"data": {"a": object()}}, "a field of data"),
        ("/api/x", {"data": {"a": "\ud800"}}, "cannot be encoded"),
        ("/api/x", {"files": 5}, "files must be"),
        ("/api/x", {"json": {}, "headers": {"Content-Length": "50"}}, "Content-Length is set by the client"),
        ("/api/x", {"headers": {"Host": "evil.invalid"}}, "Host is set by the client"),
        ("/api/x", {"headers": ["ab", "cd"]}, "not texts"),
        ("/api/x", {"files": {"a": 7}}, "a file must be"),
        ("/api/x", {"files": {"a": ("n", 7)}}, "a file must be"),
        *(
            ("/api/x", {"files": files}, message)
            for member, message in (
                (("5ecret\r\nX: 1", b""), "the name of a file must be text without control"),
                (("5ecret\x1b", b""), "the name of a file must be"),
                ((7, b""), "the name of a file must be"),
                (("n", b"", "5ecret\r\n\r\nanother part"), "the content type of a file must be text without control"),
                (("n", b"", "5ecret\x00"), "the content type of a file must be"),
                (("n", b"", b"text/plain"), "the content type of a file must be"),
                (("n", b"", None, {"X": "5ecret\nY: 1"}), "the headers of a file must be"),
                (("n", b"", None, {"X: 5ecret\r\nY": "1"}), "the headers of a file must be"),
                (("n", b"", None, {"\ud800": "1"}), "the headers of a file must be"),
                (("n", b"", None, {"": "1"}), "the headers of a file must be"),
                (("n", b"", None, {7: "1"}), "the headers of a file must be"),
                (("n", b"", None, {"X": b"1"}), "the headers of a file must be"),
                (("n", b"", None, [("X", "1")]), "the headers of a file must be"),
            )
            for files in ({"a": member}, [("a", member)])
        ),
    ],
)
async def test_a_call_that_cannot_work_is_refused_before_anything_is_sent(
    client: AsyncLayerClient, router: respx.MockRouter, path: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        await client.post(path, **options)
    assert "5ecret" not in str(caught.value)
    assert not router.calls
    assert client.pool.stats.in_use == 0


async def test_an_unknown_option_or_method_is_refused(client: AsyncLayerClient, router: respx.MockRouter) -> None:
    router.route(method="PURGE").mock(side_effect=httpx.ConnectError("x"))
    with pytest.raises(TypeError, match="there is no option 'jsn'"):
        await client.post("/api/x", jsn={})  # type: ignore[call-overload]
    with pytest.raises(APIConnectionError):
        await client.with_options(retry=None).request("purge", "/api/x")
    methods: list[Any] = ["GE T", "", "CONNECT", 7]
    for method in methods:
        with pytest.raises(ConfigurationError, match="no method"):
            await client.request(method, "/api/x")


@pytest.mark.parametrize("path", ["https://evil.invalid/x?q=5ecret", "//evil.invalid/x?q=5ecret", "\\x", 7, None])
@pytest.mark.parametrize("where", ["gate", "queue"])
async def test_a_path_that_leads_elsewhere_is_refused_before_the_call_waits_for_anything(path: Any, where: str) -> None:
    limits = httpx.Limits(max_connections=1)
    async with make(limits=limits, deadline=None) as client:
        slot = None
        if where == "gate":
            gate_of(client).shut(60)
        else:
            slot = await client.pool.acquire()
        with anyio.fail_after(5), pytest.raises(ConfigurationError) as caught:
            await client.get(path)
        assert "5ecret" not in str(caught.value)
        with anyio.fail_after(5), pytest.raises(ConfigurationError):
            async with client.stream("GET", path):
                pass
        if slot is not None:
            slot.release()


# Pacing


async def test_the_attempt_after_a_refresh_waits_at_the_gate_too(router: respx.MockRouter) -> None:
    pairs = [TokenPair("old-token-1", "old-token-2"), TokenPair("new-token-1", "new-token-2")]
    client = make(token1=None, token2=None, tokens=lambda: pairs.pop(0))

    def refuse(request: httpx.Request) -> httpx.Response:
        gate_of(client).shut(0.006)
        return httpx.Response(401)

    def accept(request: httpx.Request) -> httpx.Response:
        assert not gate_of(client).is_shut
        return httpx.Response(200)

    answers = [refuse, accept]
    router.get("/api/x").mock(side_effect=lambda request: answers.pop(0)(request))
    async with client:
        await client.get("/api/x")
        assert answers == []
        assert client.pool.stats.in_use == 0


async def test_no_slot_is_held_by_a_call_whose_second_attempt_waits_at_the_gate(router: respx.MockRouter) -> None:
    pairs = [TokenPair("old-token-1", "old-token-2"), TokenPair("new-token-1", "new-token-2")]
    client = make(token1=None, token2=None, tokens=lambda: pairs.pop(0))

    def refuse(request: httpx.Request) -> httpx.Response:
        gate_of(client).shut(60.0)
        return httpx.Response(401)

    router.get("/api/x").mock(side_effect=refuse)
    async with client:
        with pytest.raises(DeadlineExceededError) as caught:
            await client.get("/api/x", deadline=5)
        assert (caught.value.phase, client.pool.stats.in_use) == ("gate", 0)


async def test_a_followed_redirect_waits_at_the_gate_too(router: respx.MockRouter) -> None:
    client = make(follow_redirects=True)

    def redirect(request: httpx.Request) -> httpx.Response:
        gate_of(client).shut(0.006)
        return httpx.Response(302, headers={"Location": "/api/y"})

    def arrive(request: httpx.Request) -> httpx.Response:
        assert not gate_of(client).is_shut
        return httpx.Response(200)

    router.get("/api/x").mock(side_effect=redirect)
    router.get("/api/y").mock(side_effect=arrive)
    async with client:
        assert (await client.get("/api/x")).status_code == 200


async def test_a_given_pace_is_kept_and_shown(router: respx.MockRouter) -> None:
    router.get("/api/x").respond(200)
    async with make(pacing=Pacing(rate=1000)) as client:
        assert client.pace == 1000
        await client.fetch_all(["/api/x"] * 20)
        pace = gate_of(client)._pace
        assert pace is not None
        assert pace._turns == 20


async def test_each_attempt_is_counted_once_whoever_has_the_connections() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200))
    async with make(transport=transport, pacing=Pacing(rate=1000)) as client:
        await client.fetch_all(["/api/x"] * 20)
        pace = gate_of(client)._pace
        assert pace is not None
        assert pace._turns == 20


async def test_other_tokens_have_a_pace_of_their_own(router: respx.MockRouter) -> None:
    router.get("/api/x").respond(429, headers={"Retry-After": "50"})
    async with make(retry=None) as client:
        other = client.with_options(tokens=TokenPair("other-token-1", "other-token-2"))
        same = client.with_options(deadline=5)
        with pytest.raises(RateLimitError):
            await client.get("/api/x")
        assert gate_of(client).is_shut
        assert gate_of(same) is gate_of(client)
        assert not gate_of(other).is_shut


async def test_what_an_answer_says_of_the_quota_is_heeded(router: respx.MockRouter) -> None:
    router.get("/api/x").respond(200, headers={"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "50"})
    async with make() as client:
        await client.get("/api/x")
        with pytest.raises(DeadlineExceededError) as caught:
            await client.get("/api/x", deadline=5)
    assert caught.value.phase == "gate"
    assert len(router.calls) == 1


async def test_a_single_call_at_a_gate_shut_for_longer_than_retry_after_max_fails_and_a_bulks_item_waits(
    router: respx.MockRouter,
) -> None:
    router.get("/api/x").respond(429, headers={"Retry-After": "600"})
    async with make(deadline=None) as client:
        with pytest.raises(RateLimitError):
            await client.get("/api/x")
        with pytest.raises(DeadlineExceededError, match=r"600\.0 s, and a call waits for 60 s at most"):
            await client.get("/api/x")
        with anyio.move_on_after(0.005) as scope:
            async with client.bulk(["/api/x"]) as outcomes:
                async for _ in outcomes:
                    raise AssertionError
        assert scope.cancelled_caught
    assert len(router.calls) == 1


async def test_a_bulks_item_outlives_a_retry_after_of_more_than_an_hour(
    router: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layer_async._pacing.PATIENCE", 0.004)
    answers = [httpx.Response(429, headers={"Retry-After": "86400"}), httpx.Response(200)]
    router.get("/api/x").mock(side_effect=answers)
    async with make(deadline=0.003) as client, client.bulk(["/api/x"]) as outcomes:
        assert [outcome.ok async for outcome in outcomes] == [True]


@pytest.mark.parametrize("patient", [True, False])
async def test_without_pacing_each_call_waits_out_its_own_retry_after_and_nobody_elses(
    patient: bool, router: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layer_async._retry.PATIENCE", 0.004)
    said = {"Retry-After": "86400" if patient else "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "50"}
    router.get("/api/x").mock(side_effect=[httpx.Response(429, headers=said), httpx.Response(200, headers=said)])
    router.get("/api/y").respond(200, headers=said)
    async with make(pacing=None, deadline=0.5) as client:
        assert client.pace is None
        if patient:
            async with client.bulk(["/api/x"]) as outcomes:
                assert [outcome.ok async for outcome in outcomes] == [True]
        else:
            with pytest.raises(RateLimitError):
                await client.get("/api/x")
        await client.get("/api/y")
        await client.get("/api/y")
        view = client.with_options(tokens=TokenPair("other-token-1", "other-token-2"))
        assert view._corridor.identity.gate is None


async def test_a_call_that_was_let_by_before_the_pace_began_asks_for_its_turn_when_it_gets_its_slot(
    router: respx.MockRouter,
) -> None:
    router.get("/api/x").respond(200)
    async with make(limits=httpx.Limits(max_connections=1)) as client:
        slot = await client.pool.acquire()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "/api/x")
            await anyio.wait_all_tasks_blocked()
            gate_of(client).slow_down(0.002)
            await anyio.sleep(0.004)
            slot.release()
        pace = gate_of(client)._pace
        assert pace is not None
        assert pace._turns == 1
