"""The short way through httpx and the whole way give the same; a tool that touched a seam always sees each attempt."""

from __future__ import annotations

import gzip
import logging
import pickle
import re
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpcore
import httpx
import pytest

from layer_async import (
    APITimeoutError,
    AsyncLayerClient,
    AuthenticationError,
    DeadlineExceededError,
    LayerError,
    MalformedResponseError,
    NotFoundError,
    RetryPolicy,
    ServerError,
    TokenPair,
)
from layer_async import _lean as lean
from layer_async._seams import Seam
from layer_async._wire import WireConnection

from .faultserver import Exchange, FaultServer

pytestmark = pytest.mark.anyio

PAIR = TokenPair("lean-token-one", "lean-token-two")
AT_ONCE = RetryPolicy(backoff_initial=1e-9, backoff_max=1e-9)
ROOT = Path(__file__).parent.parent


def make(server: FaultServer, **options: Any) -> AsyncLayerClient:
    settings: dict[str, Any] = {"tokens": PAIR, "base_url": server.url, "retry": AT_ONCE}
    return AsyncLayerClient(**(settings | options))


@contextmanager
def short_way() -> Iterator[list[Any]]:
    """What takes the short way inside of the block: requests, and calls for which none was made."""
    taken: list[Any] = []
    send, exchange = lean.Lane.send, lean.Lane.exchange

    async def spy_on_send(self: lean.Lane, sent: Any, call: Any, deadline: Any) -> None:
        taken.append(call)
        await send(self, sent, call, deadline)

    async def spy_on_exchange(self: lean.Lane, request: httpx.Request, record: Any, *args: Any) -> httpx.Response:
        if record.sent is None:
            taken.append(request)
        return await exchange(self, request, record, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean.Lane, "send", spy_on_send)
        patch.setattr(lean.Lane, "exchange", spy_on_exchange)
        yield taken


def flaky() -> Callable[[Exchange], None]:
    """503, then 200, and again."""
    answers = iter(["503 Service Unavailable", "200 OK"] * 8)
    return lambda ex: ex.respond(b'{"n": 1}', status=next(answers), headers="Content-Type: application/json\r\n")


# The table of tools: how each of them hooks in, and what it sees


def on_class(owner: type, name: str) -> Callable[[AsyncLayerClient, pytest.MonkeyPatch, list[str]], None]:
    def touch(client: AsyncLayerClient, patch: pytest.MonkeyPatch, seen: list[str]) -> None:
        original = getattr(owner, name)

        def spy(self: Any, *args: Any, **options: Any) -> Any:
            seen.append(name)
            return original(self, *args, **options)

        patch.setattr(owner, name, spy)

    return touch


def on_object(pick: Callable[[AsyncLayerClient], Any], name: str) -> Any:
    def touch(client: AsyncLayerClient, patch: pytest.MonkeyPatch, seen: list[str]) -> None:
        target = pick(client)
        original = getattr(target, name)

        def spy(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return original(*args, **options)

        patch.setattr(target, name, spy, raising=False)

    return touch


def by_hook(event: str) -> Any:
    def touch(client: AsyncLayerClient, patch: pytest.MonkeyPatch, seen: list[str]) -> None:
        async def hook(_: Any) -> None:
            seen.append(event)

        client.http.event_hooks = {event: [hook]}

    return touch


def by_code(client: AsyncLayerClient, patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    """As a debugger or profiler does that leaves the function and changes what it runs."""
    function = httpx.AsyncClient._transport_for_url
    original = httpx.AsyncClient.__dict__["_transport_for_url"].__code__
    kept = types.FunctionType(original, function.__globals__, "kept")

    def spy(self: Any, url: httpx.URL) -> Any:
        from tests import test_lean

        test_lean.SEEN.append("code")
        return test_lean.KEPT(self, url)

    global KEPT, SEEN
    KEPT, SEEN = kept, seen
    patch.setattr(function, "__code__", spy.__code__)


KEPT: Any = None
SEEN: list[str] = []


class Wrapped(httpx.AsyncBaseTransport):
    """A transport that wraps another, as caches do."""

    def __init__(self, inner: httpx.AsyncBaseTransport, seen: list[str]) -> None:
        self.inner = inner
        self.seen = seen

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append("wrapped")
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


def by_wrapping(client: AsyncLayerClient, patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    http: Any = client.http
    patch.setattr(http, "_transport", Wrapped(http._transport, seen))
    patch.setattr(http, "_mounts", {})


def by_mount(client: AsyncLayerClient, patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    http: Any = client.http
    pattern = next(iter(http._mounts))
    patch.setitem(http._mounts, pattern, Wrapped(http._transport, seen))


TOUCHES: dict[str, Any] = {
    "send, on the class": on_class(httpx.AsyncClient, "send"),
    "_send_single_request, on the class": on_class(httpx.AsyncClient, "_send_single_request"),
    "_transport_for_url, on the class": on_class(httpx.AsyncClient, "_transport_for_url"),
    "handle_async_request of the transport's class": on_class(httpx.AsyncHTTPTransport, "handle_async_request"),
    "handle_async_request of httpcore's pool": on_class(httpcore.AsyncConnectionPool, "handle_async_request"),
    "handle_async_request of httpcore's connection": on_class(httpcore.AsyncHTTPConnection, "handle_async_request"),
    "send, on the object": on_object(lambda client: client.http, "send"),
    "_transport_for_url, on the object": on_object(lambda client: client.http, "_transport_for_url"),
    "handle_async_request, on the object": on_object(
        lambda client: client.http._transport,
        "handle_async_request",
    ),
    "handle_async_request, on the pool's object": on_object(
        lambda client: client.http._transport._pool,  # type: ignore[attr-defined]
        "handle_async_request",
    ),
    "a request hook": by_hook("request"),
    "a response hook": by_hook("response"),
    "the code of a function": by_code,
    "a transport around ours": by_wrapping,
    "a mount": by_mount,
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
async def test_a_tool_that_touched_a_seam_sees_each_attempt_and_no_more_once_it_is_gone(touch: Any) -> None:
    seen: list[str] = []
    with FaultServer() as server:
        server.behaviours["flaky"] = flaky()
        async with make(server) as client:
            assert (await client.get("/flaky/1")).json() == {"n": 1}
            with pytest.MonkeyPatch.context() as patch:
                touch(client, patch, seen)
                assert (await client.get("/flaky/2")).json() == {"n": 1}
                assert len(seen) == 2
                client.http.event_hooks = {}
            with short_way() as taken:
                assert (await client.get("/flaky/3")).json() == {"n": 1}
            assert (len(seen), len(taken)) == (2, 2)
            assert client.pool.stats.in_use == 0
        assert [request.headers["token1"] for request in server.record.requests] == [PAIR.token1] * 6


BEFORE = """
import asyncio, sys
import {module}
owner = {module}.{owner}
original, seen = owner.{name}, []
def spy(self, *args, **options):
    seen.append(1)
    return original(self, *args, **options)
owner.{name} = spy
from layer_async import AsyncLayerClient
async def main():
    async with AsyncLayerClient(token1="lean-one", token2="lean-two", base_url=sys.argv[1]) as client:
        await client.get("/ok/1")
        await client.get("/ok/2")
asyncio.run(main())
print(len(seen))
"""


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("httpx", "AsyncClient", "send"),
        ("httpx", "AsyncHTTPTransport", "handle_async_request"),
        ("httpcore", "AsyncConnectionPool", "handle_async_request"),
        ("httpcore", "AsyncHTTPConnection", "handle_async_request"),
    ],
)
def test_a_tool_that_came_before_us_sees_each_attempt_too(module: str, owner: str, name: str) -> None:
    script = BEFORE.format(module=module, owner=owner, name=name)
    with FaultServer() as server:
        done = subprocess.run(
            [sys.executable, "-c", script, server.url], capture_output=True, text=True, check=True, cwd=ROOT
        )
    assert done.stdout.strip() == "2"


async def test_what_httpx_logs_is_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    with FaultServer() as server, caplog.at_level(logging.INFO, logger="httpx"):
        async with make(server) as client:
            await client.get("/ok/1")
    assert [record.getMessage() for record in caplog.records if record.name == "httpx"] == [
        f'HTTP Request: GET {server.url}/ok/1 "HTTP/1.1 200 OK"'
    ]


async def test_a_cookie_or_header_or_parameter_that_was_set_on_the_client_inside_is_sent() -> None:
    with FaultServer() as server:
        async with make(server) as client:
            await client.get("/ok/1")
            client.http.headers["X-Late"] = "late"
            await client.get("/ok/2")
            client.http.params = {"q": "1"}
            await client.get("/ok/3")
            client.http.cookies.set("c", "1")
            await client.get("/ok/4")
    one, two, three, four = server.record.requests
    assert "x-late" not in one.headers
    assert two.headers["x-late"] == "late"
    assert three.target.endswith("/ok/3?q=1")
    assert four.headers["cookie"] == "c=1"


async def test_a_cookie_that_is_put_in_between_is_sent_and_a_token_is_not() -> None:
    heads: list[bytes] = []
    with FaultServer() as server:
        async with make(server, middleware=[]) as client:
            await client.get("/ok/1")
            client.http.cookies.set("c", "1")
            await client.get("/ok/2")
            client.http.cookies.clear()
            client.http.headers["Token1"] = "another"
            original = WireConnection._headed

            def spy(self: Any, method: bytes, target: bytes, headers: Any) -> Any:
                heads.extend(value for name, value in headers if name.lower() == b"token1")
                return original(self, method, target, headers)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(WireConnection, "_headed", spy)
                await client.get("/ok/3")
    _, two, three = server.record.requests
    assert two.headers["cookie"] == "c=1"
    assert three.headers["token1"] == PAIR.token1
    assert b"another" not in heads


async def test_views_send_their_own_headers() -> None:
    with FaultServer() as server:
        async with make(server, headers={"X-Client": "1"}) as client:
            view = client.with_options(headers={"X-View": "2"})
            with short_way() as taken:
                await view.get("/ok/1")
                await client.get("/ok/2")
            assert len(taken) == 2
    one, two = (dict(request.headers) for request in server.record.requests)
    assert (one.get("x-client"), one.get("x-view")) == ("1", "2")
    assert (two.get("x-client"), two.get("x-view")) == ("1", None)


# Both ways give the same


def request_and_answer(response: httpx.Response, server: FaultServer) -> dict[str, Any]:
    request = response.request
    copy = pickle.loads(pickle.dumps(response))
    return {
        "status": response.status_code,
        "headers": [pair for pair in response.headers.raw if pair[0].lower() != b"date"],
        "encoding": (response.headers.encoding, response.encoding, response.charset_encoding),
        "content": response.content,
        "text": response.text,
        "extensions": {name: value for name, value in response.extensions.items() if name != "network_stream"},
        "network_stream": hasattr(response.extensions["network_stream"], "get_extra_info"),
        "versions": (response.http_version, response.reason_phrase),
        "state": (response.is_closed, response.is_stream_consumed, response.num_bytes_downloaded > 0),
        "elapsed": response.elapsed.total_seconds() >= 0,
        "history": [earlier.status_code for earlier in response.history],
        "next": None if response.next_request is None else str(response.next_request.url),
        "url": str(response.url).replace(server.url, ""),
        "links": (response.links, response.has_redirect_location, response.is_success),
        "cookies": dict(response.cookies),
        "text of it": (repr(response), repr(request).replace(server.url, ""), repr(request.headers)),
        "request": (request.method, sorted(request.headers.raw), request.content, sorted(request.extensions)),
        "pickled": (copy.content, copy.status_code, copy.headers.raw == response.headers.raw),
        "raises": _error_of(response, server),
    }


def _error_of(response: httpx.Response, server: FaultServer) -> str | None:
    try:
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        return str(error).replace(server.url, "")
    return None


def answers() -> dict[str, Callable[[Exchange], None]]:
    def redirect(ex: Exchange) -> None:
        ex.respond(b"elsewhere", status="302 Found", headers="Location: /ok/9\r\n")

    return {
        "json": lambda ex: ex.respond(b'{"a": "\xc3\xa4"}', headers="Content-Type: application/json\r\nX-A: 1\r\n"),
        "latin": lambda ex: ex.respond(b"\xe4", headers="Content-Type: text/plain; charset=latin-1\r\nX-U: \xe4\r\n"),
        "empty": lambda ex: ex.respond(b""),
        "created": lambda ex: ex.respond(b"{}", status="201 Made to order"),
        "packed": lambda ex: ex.respond(gzip.compress(b"x" * 9000), headers="Content-Encoding: gzip\r\n"),
        "redirect": redirect,
        "cookie": lambda ex: ex.respond(b"{}", headers="Set-Cookie: a=1; Path=/\r\nLink: </ok/2>; rel=next\r\n"),
        "twice": lambda ex: ex.respond(b"{}", headers="X-Twice: 1\r\nx-twice: 2\r\n"),
    }


BEHAVIOURS = [*answers(), "ok", "chunked", "large", "drip", "until-end", "connection-close", "http10", "early-hints"]
CALLS: dict[str, dict[str, Any]] = {
    "get": {"method": "GET"},
    "post": {"method": "POST", "json": {"a": [1, None]}},
    "bare post": {"method": "POST"},
    "options": {"method": "GET", "params": {"q": ["1", "2"]}, "headers": {"X-Own": "1"}},
    "content": {"method": "PUT", "content": b"raw", "headers": {"Content-Type": "text/plain"}},
    "form": {"method": "PATCH", "data": {"a": "1"}},
    "head": {"method": "HEAD"},
}


@pytest.mark.parametrize(
    ("behaviour", "call"),
    [
        pytest.param(behaviour, call, id=f"{name} {behaviour}")
        for name, call in CALLS.items()
        for behaviour in BEHAVIOURS
        if name != "head" or behaviour not in ("chunked", "drip")  # the server would send a body, in pieces
    ],
)
async def test_both_ways_give_equal_requests_and_responses(
    behaviour: str, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultServer() as server:
        server.behaviours.update(answers())
        async with make(server, headers={"X-Client": "c"}) as client:
            with short_way() as taken:
                short = request_and_answer(await client.request(path=f"/{behaviour}/1", **call), server)
            assert len(taken) == 1
            for seam in ("handle_async_request of the transport's class", "send, on the class"):
                TOUCHES[seam](client, monkeypatch, [])
                assert request_and_answer(await client.request(path=f"/{behaviour}/1", **call), server) == short
        first, *others = server.record.requests
    assert len(others) == 2
    for other in others:
        assert other.target == first.target
        assert list(other.headers.items()) == list(first.headers.items())
        assert other.body == first.body


FAULTS = [
    "truncate-length",
    "truncate-chunked",
    "truncate-reset",
    "half-head",
    "garbage",
    "status/404",
    "status/500",
    "status/401",
    "upgrade",
    "stall",
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_both_ways_raise_equal_errors(fault: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(error: LayerError) -> list[Any]:
        message = re.sub(r":\d+", "", str(error))
        met = [(attempt.outcome, attempt.status_code) for attempt in error.attempts]
        return [type(error), message, met, error.maybe_processed, type(error.__cause__), getattr(error, "body", None)]

    found: list[list[Any]] = []
    with FaultServer() as server:
        for _ in range(2):
            async with make(server, timeout=httpx.Timeout(0.05, connect=5)) as client:
                with pytest.raises(LayerError) as caught:
                    await client.request(method, f"/{fault}/1")
                found.append(known(caught.value))
                stats = client.pool.stats
                assert (stats.in_use, stats.waiting) == (0, 0)
                touch: Any = TOUCHES["send, on the class"]
                touch(client, monkeypatch, [])
    assert found[0] == found[1]


@pytest.mark.parametrize("fault", ["ok", "status/404", "status/500", "flaky", "truncate-length", "extra"])
async def test_both_ways_tell_an_observer_the_same(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    with FaultServer() as server:
        server.behaviours["flaky"] = flaky()
        for _ in range(2):
            events: list[Any] = []
            async with make(server, observer=events.append) as client:
                with suppress(LayerError):
                    await client.get(f"/{fault}/1?q=secret", into=Any)
                touch: Any = TOUCHES["send, on the class"]
                touch(client, monkeypatch, [])
            assert "secret" not in repr(events)
            port = server.url.rpartition(":")[2]
            seen.append(
                [re.sub(r"(elapsed|delay)=[0-9.e-]+", r"\1", repr(event)).replace(port, "port") for event in events]
            )
    assert seen[0] == seen[1]
    assert seen[0]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("into", "made"), [(Any, 0), (None, 1)])
async def test_a_request_is_made_only_where_somebody_can_see_it(
    into: Any, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []
    original = lean._request

    def spy(method: str, *args: Any) -> httpx.Request:
        requests.append(method)
        return original(method, *args)

    monkeypatch.setattr(lean, "_request", spy)
    with FaultServer() as server:
        server.behaviours |= answers() | {"flaky": flaky()}
        async with make(server) as client:
            await client.get("/json/1", into=into)
            await client.post("/json/1", json={"n": 1}, into=into)
            assert len(requests) == 2 * made
            requests.clear()
            await client.get("/flaky/1", into=into)
    assert requests == ["GET"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_tool_that_stays_is_looked_for_once_a_call_and_one_that_goes_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[bool] = []
    requests: list[Any] = []
    is_wired, request = lean.Lane._is_wired, lean._request

    def look(self: lean.Lane, extensions: Any) -> bool:
        looks.append(is_wired(self, extensions))
        return looks[-1]

    def make_request(*args: Any) -> httpx.Request:
        requests.append(args)
        return request(*args)

    monkeypatch.setattr(lean.Lane, "_is_wired", look)
    monkeypatch.setattr(lean, "_request", make_request)
    with FaultServer() as server:
        server.behaviours |= answers()
        async with make(server) as client:
            with pytest.MonkeyPatch.context() as patch:
                original = httpx.AsyncHTTPTransport.handle_async_request

                async def passing_on(self: Any, request: httpx.Request) -> httpx.Response:
                    return await original(self, request)

                patch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", passing_on)
                for _ in range(3):
                    await client.get("/json/1", into=Any)
                assert looks == [False] * 4  # twice in the first
            looks.clear()
            await client.get("/json/1", into=Any)
            requests.clear()
            await client.get("/json/1", into=Any)
            assert looks == [True, True]
            assert not requests


async def test_a_refusal_counts_against_the_pair_that_was_sent_not_the_one_that_came_meanwhile() -> None:
    asked: list[int] = []
    held, renewed = threading.Event(), threading.Event()

    def source() -> TokenPair:
        asked.append(1)
        return TokenPair(f"lean-first-{len(asked)}", f"lean-second-{len(asked)}")

    def guarded(ex: Exchange) -> None:
        if ex.request.headers["token1"] != "lean-first-1" or ex.request.path.endswith("/first"):
            ex.respond(b"{}")
        elif ex.request.path.endswith("/slow"):
            held.set()
            renewed.wait(5)
            ex.respond(status="401 Unauthorized")
        else:
            held.wait(5)
            ex.respond(status="401 Unauthorized")

    with FaultServer() as server:
        server.behaviours["guarded"] = guarded
        async with make(server, tokens=source) as client:
            await client.get("/guarded/first")

            async def quick() -> None:
                assert await client.get("/guarded/quick", into=Any) == {}
                renewed.set()

            async with anyio.create_task_group() as group:
                group.start_soon(quick)
                assert await client.get("/guarded/slow", into=Any) == {}
    assert len(asked) == 2


# What the first attempt without a request must not forget


@pytest.mark.parametrize("into", [None, list[int]])
async def test_a_coded_body_is_decoded_and_asked_for_again_where_it_is_corrupt(into: Any) -> None:
    bodies = iter([b"garbage", gzip.compress(b"[1]")])
    with FaultServer() as server:
        server.behaviours["packed"] = lambda ex: ex.respond(next(bodies), headers="content-ENCODING: gzip\r\n")
        async with make(server) as client:
            found = await client.get("/packed/1", into=into)
    assert (found if into else found.json()) == [1]


async def test_without_pacing_there_is_no_gate_to_hear_of_it() -> None:
    with FaultServer() as server:
        server.behaviours["quota"] = lambda ex: ex.respond(b"{}", headers="X-RateLimit-Remaining: 0\r\n")
        async with make(server, pacing=None) as client:
            for number in range(2):
                assert await client.get(f"/quota/{number}", into=Any) == {}


@pytest.mark.parametrize("into", [None, Any])
async def test_a_body_over_the_limit_is_refused(into: Any) -> None:
    with FaultServer() as server:
        server.behaviours["long"] = lambda ex: ex.respond(b"[%s]" % (b" " * 98))
        async with make(server, max_response_bytes=100, retry=None) as client:
            await client.get("/long/1", into=into)
            with pytest.raises(MalformedResponseError, match="99"):
                await client.get("/long/2", into=into, max_response_bytes=99)
            view = client.with_options(max_response_bytes=99)
            with pytest.raises(MalformedResponseError, match="99"):
                await view.get("/long/3", into=into)
            assert client.pool.stats.in_use == 0


async def test_an_answer_is_classified() -> None:
    def classify(response: httpx.Response) -> LayerError | None:
        return ServerError("busy", status_code=503) if response.json()["n"] == 0 else None

    numbers = iter(range(9))
    with FaultServer() as server:
        server.behaviours["busy"] = lambda ex: ex.respond(b'{"n": %d}' % next(numbers))
        async with make(server, classify=classify) as client:
            assert await client.get("/busy/1", into=Any) == {"n": 1}


async def test_what_an_answer_says_of_the_quota_is_heeded() -> None:
    said = "X-RateLimit-Limit: 5\r\nX-RateLimit-Remaining: 0\r\nX-RateLimit-Reset: 3600\r\n"
    with FaultServer() as server:
        server.behaviours["quota"] = lambda ex: ex.respond(b"{}", headers=said)
        async with make(server, deadline=5.0) as client:
            await client.get("/quota/1", into=Any)
            with pytest.raises(DeadlineExceededError) as caught:
                await client.get("/quota/2", into=Any)
        assert caught.value.phase == "gate"
    assert len(server.record.requests) == 1


async def test_a_success_between_two_refusals_keeps_the_auth_circuit_closed() -> None:
    with FaultServer() as server:
        server.behaviours["json"] = answers()["json"]
        async with make(server) as client:
            for path in ("/status/401", "/json/1", "/status/401/other", "/json/2"):
                with suppress(AuthenticationError):
                    await client.get(path, into=Any)
    assert len(server.record.requests) == 4


@pytest.mark.parametrize("way", ["short", "whole"])
async def test_a_body_for_synchronous_clients_is_refused_as_httpx_refuses_it(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blocking(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"x"

    async def swap(request: httpx.Request, call_next: Any) -> httpx.Response:
        request.stream = Blocking()
        response: httpx.Response = await call_next(request)
        return response

    if way == "whole":
        on_class(httpx.AsyncClient, "_send_single_request")(None, monkeypatch, [])  # type: ignore[arg-type]
    with FaultServer() as server, short_way() as taken:
        async with make(server, middleware=[swap]) as client:
            with pytest.raises(RuntimeError, match="Attempted to send an sync request"):
                await client.post("/ok/1", content=b"y")
            assert client.pool.stats.in_use == 0
    assert server.record.requests == []
    assert len(taken) == (way == "short")


async def test_a_call_that_gets_no_slot_after_a_refresh_times_out_and_holds_none() -> None:
    taken, pairs = anyio.Event(), iter([PAIR, TokenPair("lean-second-one", "lean-second-two")])

    async def source() -> TokenPair:
        pair = next(pairs)
        if pair is not PAIR:
            await taken.wait()  # meanwhile the other call takes the only slot
        return pair

    def refuse(ex: Exchange) -> None:
        ex.respond(status="401 Unauthorized")

    async with AsyncExitStack() as stack:
        server = stack.enter_context(FaultServer())
        server.behaviours["refuse"] = refuse
        limits, timeout = httpx.Limits(max_connections=1), httpx.Timeout(5.0, pool=0.001)
        client = await stack.enter_async_context(
            make(server, tokens=source, limits=limits, timeout=timeout, retry=None)
        )
        tasks = await stack.enter_async_context(anyio.create_task_group())

        async def hold() -> None:
            async with client.stream("GET", "/ok/1"):
                taken.set()
                await anyio.sleep_forever()

        tasks.start_soon(hold)  # it begins once the other waits for its answer
        with pytest.raises(APITimeoutError) as caught:
            await client.get("/refuse/1")
        assert caught.value.phase == "pool"
        tasks.cancel_scope.cancel()
    assert client.pool.stats.in_use == client.pool.stats.waiting == 0


CODINGS = {
    "\xff": b'{"n": 1}',
    "gzip\xff": b'{"n": 1}',
    "g\xc3\xafp": b'{"n": 1}',  # UTF-8
    "identity, \xff\xfe": b'{"n": 1}',
    "gzip, \xe4": gzip.compress(b'{"n": 1}'),
    "\x80, gzip": gzip.compress(b'{"n": 1}'),
}


@pytest.mark.parametrize("coding", CODINGS, ids=ascii)
@pytest.mark.parametrize("touched", [None, "handle_async_request of the transport's class", "send, on the class"])
async def test_a_content_coding_that_is_no_ascii_is_one_that_nobody_knows(
    coding: str, touched: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left as it is, on every way, and what else the body is in is undone."""

    body = CODINGS[coding]

    def answer(status: str, framing: str, *parts: bytes) -> Callable[[Exchange], None]:
        head = f"HTTP/1.1 {status}\r\n{framing}\r\nContent-Encoding: {coding}\r\n\r\n".encode("latin-1")
        return lambda ex: ex.send(head, *parts)

    behaviours = {
        "of-length": answer("200 OK", f"Content-Length: {len(body)}", body),
        "in-chunks": answer(
            "200 OK", "Transfer-Encoding: chunked", *(b"1\r\n%c\r\n" % byte for byte in body), b"0\r\n\r\n"
        ),
        "not-found": answer("404 Not Found", f"Content-Length: {len(body)}", body),
    }
    with FaultServer() as server:
        server.behaviours.update(behaviours)
        async with make(server) as client:
            if touched:
                TOUCHES[touched](client, monkeypatch, [])
            for path in ("/of-length/1", "/in-chunks/1"):
                assert (await client.get(path)).content == b'{"n": 1}'
                assert await client.get(path, into=dict[str, int]) == {"n": 1}
                async with client.stream("GET", path) as response:
                    assert await response.aread() == b'{"n": 1}'
            with pytest.raises(NotFoundError) as caught:
                await client.get("/not-found/1")
            assert caught.value.body == b'{"n": 1}'


@pytest.mark.parametrize("touched", [None, "handle_async_request of the transport's class", "send, on the class"])
@pytest.mark.parametrize(
    "location",
    ["http://host:5ecret/", "http://[::5ecret", "x-5ecret:path", "http://xn--a/5ecret", "//\xad/5ecret"],
    ids=ascii,
)
async def test_a_location_that_cannot_be_read_is_one_corrupt_answer_and_not_quoted(
    location: str, touched: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def redirect(ex: Exchange) -> None:
        ex.send(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location.encode("latin-1") + b"\r\n\r\n")

    with FaultServer() as server:
        server.behaviours["redirect"] = redirect
        async with make(server, follow_redirects=True) as client:
            if touched:
                TOUCHES[touched](client, monkeypatch, [])
            for method, attempts in (("GET", 2), ("POST", 1)):
                with pytest.raises(MalformedResponseError, match="its Location is no URL") as caught:
                    await client.request(method, "/redirect/1")
                assert len(caught.value.attempts) == attempts
                assert caught.value.maybe_processed is (method == "POST")
                assert "5ecret" not in "".join(traceback.format_exception(caught.value))
            stats = client.pool.stats
            assert (stats.in_use, stats.waiting) == (0, 0)
    assert len(server.record.requests) == 3


def test_only_a_librarys_own_plain_function_counts_as_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seam = Seam(httpx.AsyncClient, "send")
    assert seam.is_untouched()
    assert seam.is_untouched()
    original = httpx.AsyncClient.send
    for other in (lambda *_: None, print, httpx.AsyncClient.get, object()):
        monkeypatch.setattr(httpx.AsyncClient, "send", other)
        assert not seam.is_untouched(), other
    monkeypatch.setattr(httpx.AsyncClient, "send", original)
    assert seam.is_untouched()


async def test_with_an_httpx_of_another_shape_the_short_way_stays_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lean.fits()
    lean.fits.cache_clear()
    original = httpx.Response.__init__

    def init(self: httpx.Response, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.__dict__["_another"] = 1

    monkeypatch.setattr(httpx.Response, "__init__", init)
    try:
        with FaultServer() as server, short_way() as taken:
            async with make(server) as client:
                assert (await client.get("/ok/1")).text == "/ok/1"
        assert not taken
    finally:
        lean.fits.cache_clear()
