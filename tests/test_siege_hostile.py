"""The hostile corpus (hostile.py), played byte for byte: the right answer or a typed error, in time, and no harm after.

Short by default: every case without TLS on asyncio, every third on trio too, with TLS where that makes a difference;
everything with --full, and on asyncio also through all of httpx's own steps, and over the portable connection.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpcore
import httpx
import pytest

from layer_async import (
    APIStatusError,
    APITimeoutError,
    AsyncLayerClient,
    LayerError,
    MalformedResponseError,
    RetryPolicy,
    TokenPair,
)

from .conftest import PromiseRecord
from .faultserver import Exchange, FaultServer, client_context
from .hostile import BOMB, CASES, Case, End, Outcome, coded, timeout_of

pytestmark = [pytest.mark.anyio, pytest.mark.promise]

PAIR = TokenPair("hostile-token-one", "hostile-token-two")
AGAIN = RetryPolicy(backoff_initial=0.001, backoff_max=0.001)
WITH_TLS = {"cut", "stray"}  # the groups in which TLS makes a difference


def is_in_short(number: int, case: Case, kind: str, way: str) -> bool:
    if way == "trio" and number % 3:
        return False
    return kind != "TLS" or "plain" not in case.kinds or (case.group in WITH_TLS and way == "asyncio")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full")
    ways = ["asyncio", "trio"]
    if full:
        ways += ["through httpx", "portable"]
    given = {
        f"{case.id}, {kind}, {way}": pytest.param(
            *(case, kind, way in ("trio", "portable"), way),
            "trio" if way == "trio" else "asyncio",
        )
        for number, case in enumerate(CASES)
        for kind in case.kinds
        for way in ways
        if full or is_in_short(number, case, kind, way)
    }
    metafunc.parametrize(("case", "kind", "portable", "way", "anyio_backend"), [*given.values()], ids=[*given])


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, FaultServer]]:
    with FaultServer() as plain, FaultServer(tls=True) as tls, FaultServer() as proxy:
        yield {"plain": plain, "TLS": tls, "tunnel": proxy}


@contextlib.contextmanager
def server_for(case: Case, kind: str, servers: dict[str, FaultServer]) -> Iterator[FaultServer]:
    if kind == "handshake":
        assert isinstance(case.answer[0], bytes)
        with FaultServer(tls=True, greeting=case.answer[0]) as server:
            yield server
    else:
        yield servers[kind]


@pytest.fixture
def touched(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tool does: where it has touched httpcore's connection, that one is used; httpx's, all of httpx's steps."""
    owner: Any = {"portable": httpcore.AsyncHTTPConnection, "through httpx": httpx.AsyncHTTPTransport}.get(way)
    if owner is not None:
        original = owner.handle_async_request

        async def handle_async_request(self: Any, request: Any) -> Any:
            return await original(self, request)

        monkeypatch.setattr(owner, "handle_async_request", handle_async_request)


def play(case: Case, played: threading.Event, ex: Exchange) -> None:
    try:
        for step in case.answer:
            if isinstance(step, bytes):
                ex.send(step)
            elif isinstance(step, float):
                ex.pause(step)
            else:
                {End.FINISH: ex.finish, End.CUT: ex.close, End.RESET: ex.reset}[step]()
    finally:
        played.set()


async def outcome_of(client: AsyncLayerClient, case: Case, path: str, timeout: httpx.Timeout) -> Any:
    """Status and body, or the error."""
    try:
        response = await client.request(
            case.method, path, timeout=timeout, deadline=case.deadline, retry=None, max_response_bytes=case.limit
        )
    except APIStatusError as exc:
        return exc.status_code, exc.body
    except LayerError as exc:
        return exc
    return response.status_code, response.content


def fits(outcome: Any, expected: Outcome) -> bool:
    if not isinstance(expected, type):
        return bool(outcome == expected)
    # A timeout is a connection error too, and not what is meant by one.
    return isinstance(outcome, expected) and (
        not isinstance(outcome, APITimeoutError) or issubclass(expected, APITimeoutError)
    )


def shown(outcome: Any) -> str:
    text = repr(outcome)
    return text if len(text) < 300 else f"{text[:300]}… ({len(text)} characters)"


async def wait_until_played(case: Case, played: threading.Event, server: FaultServer) -> None:
    is_ended = isinstance(case.answer[-1], End)
    with anyio.move_on_after(1):
        while not played.is_set() or (is_ended and server.open_connections):
            if case.blocking:
                time.sleep(0.001)
            else:
                await anyio.sleep(0.001)
    if not case.blocking:
        await anyio.sleep(0.002)


@pytest.mark.usefixtures("touched")
async def test_a_hostile_answer_is_read_right_or_a_typed_error_in_time_and_harms_nobody_after(
    case: Case,
    kind: str,
    portable: bool,
    servers: dict[str, FaultServer],
    promise_record: PromiseRecord,
) -> None:
    """Each case's expectation is in hostile.py, with the section of the RFC that it is from."""
    weaker = case.portable if portable else None
    expect, reused = (case.expect, case.reused) if weaker is None else (weaker.expect, weaker.reused)
    timeout = timeout_of(case, expect)
    assert timeout.read is not None
    bound = min(timeout.read, case.deadline) + 0.5
    if weaker is not None and weaker.within is not None:
        bound = weaker.within
    played = threading.Event()
    with server_for(case, kind, servers) as server:
        behaviour = functools.partial(play, case, played)
        server.behaviours["case"] = behaviour
        server.answer_connect = behaviour if kind == "tunnel" else None
        options: dict[str, Any] = {"base_url": server.url}
        if kind == "tunnel":
            options = {"base_url": "https://origin.invalid", "proxy": server.url}
        async with AsyncLayerClient(tokens=PAIR, verify=client_context(), **options) as client:
            started = anyio.current_time()
            with anyio.move_on_after(bound + 1) as scope:
                path = "/case/1" if kind in ("plain", "TLS") else "/ok/case"
                outcome = await outcome_of(client, case, path, timeout)
            assert not scope.cancelled_caught, f"still not ended after {bound + 1:g} s"
            elapsed = anyio.current_time() - started
            assert any(fits(outcome, expected) for expected in expect), f"got {shown(outcome)}"
            assert elapsed <= bound, f"took {elapsed:.3f} s"
            stats = client.pool.stats
            assert (stats.in_use, stats.waiting) == (0, 0), stats
            if case.late:
                await wait_until_played(case, played, server)
            for number in (1, 2):
                response = await client.get(f"/ok/after-{number}", retry=AGAIN)
                assert (response.status_code, response.text) == (200, f"/ok/after-{number}"), "a stray answer"
            stats = client.pool.stats
            assert (stats.in_use, stats.waiting) == (0, 0), stats
            if isinstance(outcome, LayerError) and case.group != "coding":  # whose framing may be whole
                reused = False
            if reused is not None:
                assert (stats.opened == 1) is reused, f"{outcome!r}, {stats}"
    promise_record(
        "hostile answers, on every connection",
        promised="right answer or typed error within timeout + 0.5 s, no stray byte answers another request",
        measured=f"{len(CASES)} cases, {{:,.0f}} runs, all kept",
        total=1,
    )


@pytest.mark.parametrize("what", ["timeout", "deadline"])
async def test_a_handshake_that_nobody_answers_ends_in_time(what: str, servers: dict[str, FaultServer]) -> None:
    """TLS to a server that waits for the end of a head; RFC 9112 section 9.5 leaves the time to the client."""
    url = servers["plain"].url.replace("http:", "https:")
    options: dict[str, Any] = {"timeout": httpx.Timeout(5, connect=0.1)} if what == "timeout" else {"deadline": 0.1}
    async with AsyncLayerClient(tokens=PAIR, base_url=url, verify=client_context(), retry=None, **options) as client:
        started = anyio.current_time()
        with anyio.fail_after(5), pytest.raises(APITimeoutError) as caught:
            await client.get("/ok/1")
        assert anyio.current_time() - started < 0.6
        assert caught.value.phase == "connect"
        assert (client.pool.stats.in_use, client.pool.stats.open) == (0, 0)


async def test_a_bomb_is_stopped_at_the_limit(servers: dict[str, FaultServer], promise_record: PromiseRecord) -> None:
    """The decoded body takes at most the limit and 64 KiB, whatever the ratio: traced, less what a small body takes."""
    server, limit = servers["plain"], 2**20
    small = coded(gzip.compress(random.Random(1).randbytes(len(BOMB)), mtime=0))  # as many bytes on the wire
    measured = threading.Event()

    def sending(answer: bytes) -> Callable[[Exchange], None]:
        def send(ex: Exchange) -> None:
            ex.send(answer)
            measured.wait(5)  # to receive the next request, the server takes memory too

        return send

    server.behaviours |= {"bomb": sending(coded(BOMB)), "small": sending(small)}
    peaks = {}
    async with AsyncLayerClient(tokens=PAIR, base_url=server.url, max_response_bytes=limit, retry=None) as client:
        for path in ("/small", "/bomb", "/small", "/bomb"):  # the first round is for what is made once
            await client.get("/ok/1")
            measured.clear()
            tracemalloc.start()
            with pytest.raises(MalformedResponseError) if path == "/bomb" else contextlib.nullcontext():
                await client.get(path)
            peaks[path] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            measured.set()
    over = peaks["/bomb"] - peaks["/small"] - limit
    assert over <= 64 * 1024
    promise_record(
        "memory of a 1 : 1000 bomb, over max_response_bytes",
        promised="≤ 64 KiB",
        measured="{:.0f} KiB",
        most=max(over / 1024, 0),
    )


def test_the_corpus_has_what_it_promises() -> None:
    groups: dict[str, int] = {}
    for case in CASES:
        groups[case.group] = groups.get(case.group, 0) + 1
    assert len({case.id for case in CASES}) == len(CASES) >= 60
    assert min(groups.values()) >= 5, groups
