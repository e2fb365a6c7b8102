"""A bulk over a client: what its calls tell it of outages, refused tokens and what must not be done twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import respx

from layer_async import (
    APITimeoutError,
    AsyncLayerClient,
    AttemptFinished,
    AuthenticationError,
    DeadlineExceededError,
    Event,
    LayerError,
    Outcome,
    Pacing,
    PageNumber,
    Progress,
    RateLimitError,
    ResponseDecodeError,
    RetryPolicy,
    RetryScheduled,
    ServerError,
    TokenPair,
    _outage,
)
from layer_async._bulk import ItemRecord, current_item

pytestmark = pytest.mark.anyio

BASE = "https://webapi.thelayer.com"
AT_ONCE = RetryPolicy(backoff_initial=1e-9, backoff_max=1e-9)
PATHS = [f"/api/{number}" for number in range(30)]


@pytest.fixture
def router() -> Iterator[respx.MockRouter]:
    with respx.mock(base_url=BASE, assert_all_called=False) as router:
        yield router


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outage, "FIRST_WAIT", 0.0005)
    monkeypatch.setattr(_outage, "LONGEST_WAIT", 0.0005)


def make(**options: Any) -> AsyncLayerClient:
    settings: dict[str, Any] = {"token1": "primary-5ecret-aaaa", "token2": "secondary-5ecret-bbbb", "retry": AT_ONCE}
    return AsyncLayerClient(**(settings | options))


class Away:
    """An answer for each request: from the `first` to the `last` of them, what `fail` makes of it."""

    def __init__(self, fail: Any, first: int = 5, last: int = 100) -> None:
        self.fail = fail
        self.first = first
        self.last = last
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.first <= len(self.requests) <= self.last:
            if isinstance(self.fail, httpx.Response):
                return httpx.Response(self.fail.status_code, headers=self.fail.headers)
            raise self.fail(f"{len(self.requests)}", request=request)
        return httpx.Response(200, json={})


@pytest.mark.parametrize(
    "fail",
    [
        httpx.ConnectError,
        httpx.ConnectTimeout,
        httpx.ReadTimeout,
        httpx.ReadError,
        httpx.RemoteProtocolError,
        *(httpx.Response(code) for code in (502, 503, 504)),
    ],
    ids=str,
)
async def test_no_item_is_lost_to_an_outage_of_any_kind(router: respx.MockRouter, fail: Any) -> None:
    away = Away(fail, last=40)
    router.route().mock(side_effect=away)
    async with make() as client, client.bulk(PATHS, workers=5) as outcomes:
        got = [outcome async for outcome in outcomes]
    assert sorted(outcome.item for outcome in got) == sorted(PATHS)
    assert all(outcome.ok for outcome in got)
    assert outcomes.stopped is None
    assert sum(outcome.attempts or 0 for outcome in got) == len(away.requests)


async def test_while_an_outage_lasts_no_call_tries_again_by_itself(router: respx.MockRouter) -> None:
    away = Away(httpx.Response(503), first=1, last=40)
    router.route().mock(side_effect=away)
    during: list[Event] = []
    numbers: list[int] = []

    def observe(event: Event) -> None:
        if isinstance(event, AttemptFinished):
            numbers.append(event.number)
        if isinstance(event, RetryScheduled) and bulk._outage is not None and bulk._outage.is_on:
            during.append(event)

    policy = RetryPolicy(attempts=3, backoff_initial=1e-9, backoff_max=1e-9)
    async with make(observer=observe, retry=policy) as client:
        bulk = client.bulk(PATHS, workers=3)
        async with bulk as outcomes:
            async for outcome in outcomes:
                outcome.unwrap()
    assert during == []
    # Three calls had to fail for the outage to begin; two more workers may have been between two attempts then.
    assert numbers.count(2) <= 5
    assert numbers.count(3) <= 5
    assert len(numbers) == 70


async def test_what_fails_for_want_of_budget_only_is_held(router: respx.MockRouter) -> None:
    away = Away(httpx.Response(500), first=1, last=60)
    router.route().mock(side_effect=away)
    async with make() as client:
        client._corridor.identity.budget.withdraw(60)
        async with client.bulk(PATHS, workers=5) as outcomes:
            assert all([outcome.ok async for outcome in outcomes])


async def attempts_of_the_last(client: AsyncLayerClient, others: anyio.Event) -> int | None:
    """Fetch all, which must go well; of the one that is the last, since it waits for `others`."""
    paths = PATHS[:20]
    async with client.bulk(paths, workers=2) as outcomes:
        got = []
        async for outcome in outcomes:
            got.append(outcome)
            if len(got) == len(paths) - 1:
                others.set()
    assert all(outcome.ok for outcome in got)
    assert got[-1].item == "/api/0"
    return got[-1].attempts


async def test_what_was_denied_an_attempt_is_held_though_others_were_answered_meanwhile(
    router: respx.MockRouter,
) -> None:
    """An outage that begins with the second attempt of an item: it is no trouble of its own."""
    others = anyio.Event()
    answers = iter([500, 503, 200])

    async def answer(request: httpx.Request) -> httpx.Response:
        code = next(answers)
        if code == 503:
            await others.wait()  # all of them were sent since it failed first
            client._corridor.identity.budget.withdraw(60)
        return httpx.Response(code, json={})

    router.get("/api/0").mock(side_effect=answer)
    router.route().mock(httpx.Response(200, json={}))
    policy = RetryPolicy(attempts=3, backoff_initial=1e-9, backoff_max=1e-9)
    async with make(retry=policy) as client:
        assert await attempts_of_the_last(client, others) == 3


async def test_what_met_an_outage_with_its_last_attempt_is_held_though_others_were_answered_before(
    router: respx.MockRouter,
) -> None:
    others = anyio.Event()

    async def sleep_until_the_others_are_done(seconds: float) -> None:
        await others.wait()

    router.get("/api/0").mock(side_effect=[httpx.Response(code, json={}) for code in (500, 503, 200)])
    router.route().mock(httpx.Response(200, json={}))
    async with make(retry=RetryPolicy(attempts=2)) as client:
        client._corridor.identity._retry._sleep = sleep_until_the_others_are_done
        assert await attempts_of_the_last(client, others) == 3


@pytest.mark.parametrize("fail", [httpx.Response(500), httpx.Response(501), httpx.Response(404)], ids=str)
async def test_an_answer_that_is_final_is_an_outcome(router: respx.MockRouter, fail: httpx.Response) -> None:
    router.route().mock(side_effect=Away(fail))
    async with make() as client, client.bulk(PATHS, workers=5) as outcomes:
        got = [outcome async for outcome in outcomes]
    assert len(got) == len(PATHS)
    assert not all(outcome.ok for outcome in got)


async def test_what_is_wrong_with_an_answer_after_an_outage_is_the_items_own(router: respx.MockRouter) -> None:
    router.get("/api/x").mock(side_effect=[httpx.Response(503), httpx.Response(200, text="[")])
    async with make() as client, client.bulk(["/api/x"], into=list[int]) as outcomes:
        (outcome,) = [outcome async for outcome in outcomes]
    assert isinstance(outcome.error, ResponseDecodeError)
    assert outcome.attempts == 2


async def test_a_post_that_may_have_been_processed_is_settled_as_it_is_and_a_refused_one_is_held(
    router: respx.MockRouter,
) -> None:
    away = Away(httpx.Response(503), first=1, last=1)
    router.route().mock(side_effect=away)

    async def create(path: str) -> httpx.Response:
        return await client.post(path, json={})

    async with make() as client:
        async with client.bulk(PATHS[:3], create, workers=1) as outcomes:
            errors = [outcome.error async for outcome in outcomes]
        assert isinstance(errors[0], ServerError)
        assert errors[0].maybe_processed
        assert errors[1:] == [None, None]
        assert len(away.requests) == 3
        router.route().mock(side_effect=Away(httpx.ConnectError, first=2, last=30))
        async with client.bulk(PATHS, create, workers=3) as outcomes:
            assert all([outcome.ok async for outcome in outcomes])


async def test_an_item_whose_first_step_was_taken_is_not_begun_again(router: respx.MockRouter) -> None:
    posted = router.post("/api/orders").respond(201)
    router.get("/api/orders/1").respond(503)

    async def order(number: int) -> httpx.Response:
        await client.post("/api/orders", json={"number": number})
        return await client.get("/api/orders/1")

    async with make() as client, client.bulk([1], order) as outcomes:
        (outcome,) = [outcome async for outcome in outcomes]
    assert isinstance(outcome.error, ServerError)
    assert posted.call_count == 1


async def test_a_deadline_that_passes_while_nothing_comes_is_an_outage(router: respx.MockRouter) -> None:
    asked = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked < 4:
            await anyio.sleep_forever()
        return httpx.Response(200)

    router.route().mock(side_effect=answer)
    async with make(deadline=0.005) as client:
        with pytest.raises(DeadlineExceededError):
            await client.get("/api/x")
        async with client.bulk(["/api/x"]) as outcomes:
            (outcome,) = [outcome async for outcome in outcomes]
    assert outcome.ok


async def test_a_429_that_asks_for_too_long_burns_no_items(router: respx.MockRouter) -> None:
    away = Away(httpx.Response(429, headers={"Retry-After": "86400"}), first=3, last=10**6)
    router.route().mock(side_effect=away)
    got: list[Outcome[str, httpx.Response]] = []
    async with make() as client:
        with anyio.move_on_after(0.01):
            async with client.bulk(PATHS, workers=2) as outcomes:
                async for outcome in outcomes:
                    got.append(outcome)
    assert [outcome.ok for outcome in got] == [True, True]  # all others wait at the gate
    assert len(away.requests) <= 5


class Settled:
    """A journal in memory."""

    inputs_changed: str | None = None

    def __init__(self) -> None:
        self.settled: dict[str, bool] = {}

    def open(self) -> None: ...
    def close(self) -> None: ...
    def pulled(self, key: str) -> None: ...
    def ended(self) -> None: ...

    def is_settled(self, key: str) -> bool:
        return key in self.settled

    def settle(self, key: str, *, ok: bool) -> None:
        self.settled[key] = ok


@pytest.mark.parametrize("pacing", [Pacing(), None])
@pytest.mark.parametrize("how", ["drain", "stop_when"])
@pytest.mark.parametrize("count", [5, 30])
async def test_a_bulk_that_is_stopped_gives_up_what_waits_for_the_server_and_lets_the_rest_finish(
    router: respx.MockRouter, pacing: Pacing | None, how: str, count: int
) -> None:
    """By an hour's Retry-After. What is given up is not settled; what is sent after the stop does not wait either."""
    away = Away(httpx.Response(429, headers={"Retry-After": "3600"}), first=3, last=10**6)
    router.route().mock(side_effect=away)
    journal, may_go_on = Settled(), anyio.Event()
    got: dict[str, Outcome[str, Any]] = {}
    async with make(pacing=pacing) as client:

        async def call(path: str) -> Any:
            if path == PATHS[2]:
                await may_go_on.wait()
                return "finished"
            if path == PATHS[3]:
                await may_go_on.wait()
                await anyio.lowlevel.checkpoint()
            return await client.get(path)

        def is_enough(progress: Progress) -> bool:
            return progress.done >= 3

        paths = PATHS[:count]
        rule = is_enough if how == "stop_when" else None
        async with anyio.create_task_group() as group:

            async def stop() -> None:
                while len(got) < 2 or len(away.requests) < 3:
                    await anyio.sleep(0)
                await anyio.wait_all_tasks_blocked()
                if how == "drain":
                    outcomes.drain()
                may_go_on.set()

            with anyio.fail_after(5):
                async with client.bulk(paths, call, workers=5, journal=journal, stop_when=rule) as outcomes:
                    group.start_soon(stop)
                    async for outcome in outcomes:
                        got[outcome.key] = outcome
    assert {path: outcome.ok for path, outcome in got.items()} == {
        path: path in PATHS[:3] for path in PATHS[: len(got)]
    }
    assert journal.settled == dict.fromkeys(PATHS[:3], True)
    assert outcomes.stopped == ("drained." if how == "drain" else "stop_when said so.")
    assert len(got) == 5 if count == 5 else len(got) < 12
    with pytest.raises(LayerError, match="the bulk was stopped while this waited"):
        got[PATHS[4]].unwrap()


async def test_an_item_that_waits_behind_a_redirect_of_what_must_not_be_done_twice_is_settled(
    router: respx.MockRouter,
) -> None:
    journal = Settled()
    async with make(follow_redirects=True) as client:

        def redirect(_: httpx.Request) -> httpx.Response:
            gate = client._corridor.identity.gate
            assert gate is not None
            gate.shut(3600)
            outcomes.drain()
            return httpx.Response(303, headers={"Location": "/api/done"})

        router.route().mock(side_effect=redirect)
        with anyio.fail_after(5):
            async with client.bulk(
                ["POST", "PUT"], lambda method: client.request(method, "/api/x"), workers=1, journal=journal
            ) as outcomes:
                (outcome,) = [outcome async for outcome in outcomes]
    assert isinstance(outcome.error, LayerError)
    assert outcome.error.maybe_processed
    assert journal.settled == {"POST": False}


# Fed by pages


def paged(away: Any, count: int = 12) -> Any:
    """So many pages of two paths each, then an empty one; `away` decides what becomes of each request."""

    def answer(request: httpx.Request) -> httpx.Response:
        met: httpx.Response = away(request)
        if met.status_code != 200 or request.url.path != "/api/list":
            return met
        number = int(request.url.params["page"])
        return httpx.Response(200, json=PATHS[2 * number - 2 : 2 * number] if number <= count else [])

    return answer


@pytest.mark.parametrize("fail", [httpx.ConnectError, httpx.Response(503), httpx.Response(502)], ids=str)
@pytest.mark.parametrize(("first", "last"), [(1, 40), (9, 60), (29, 90)])
@pytest.mark.parametrize("prefetch", [0, 3])
async def test_an_outage_is_waited_out_by_the_pages_that_a_bulk_is_fed_by(
    router: respx.MockRouter, fail: Any, first: int, last: int, prefetch: int
) -> None:
    away = Away(fail, first=first, last=last)
    router.route().mock(side_effect=paged(away))
    with anyio.fail_after(5):
        async with make() as client, client.paginate("/api/list", pages=PageNumber(), prefetch=prefetch) as pages:

            async def items() -> AsyncIterator[str]:
                async for path in pages:
                    yield path

            async with client.bulk(items() if first == 9 else pages, workers=4) as outcomes:
                got = [outcome async for outcome in outcomes]
    assert sorted(outcome.item for outcome in got) == sorted(PATHS[:24])
    assert all(outcome.ok for outcome in got)
    assert outcomes.stopped is None


async def test_a_collection_that_an_items_call_reads_is_read_anew_after_an_outage(router: respx.MockRouter) -> None:
    """As `fetch --pages` does: the item is held, and its call begins with the first page."""
    away = Away(httpx.Response(503), first=4, last=40)
    router.route().mock(side_effect=paged(away))
    async with make() as client:

        async def call(path: str) -> list[str]:
            return [found async for found in client.paginate(path, pages=PageNumber())]

        with anyio.fail_after(5):
            async with client.bulk(["/api/list"], call) as outcomes:
                (outcome,) = [outcome async for outcome in outcomes]
    assert outcome.unwrap() == PATHS[:24]


@pytest.mark.parametrize("status", [500, 503])
async def test_a_page_whose_trouble_is_its_own_ends_the_bulk_with_its_error(
    router: respx.MockRouter, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(_outage.Outage, "missed", lambda *_, **__: False)  # others are answered
    router.route(path="/api/list", params={"page": "3"}).respond(status)
    router.route().mock(side_effect=paged(Away(None, first=10**6)))
    got: list[str] = []
    async with make() as client, client.bulk(client.paginate("/api/list", pages=PageNumber()), workers=4) as outcomes:

        async def read() -> None:
            async for outcome in outcomes:
                got.append(outcome.item)

        with pytest.raises(ServerError):
            await read()
    assert sorted(got) == PATHS[:4]
    assert outcomes.stopped is None


@pytest.mark.parametrize("how", ["outage_timeout", "drain in an outage", "drain at the gate"])
async def test_a_bulk_that_is_stopped_does_not_raise_what_its_next_page_met(router: respx.MockRouter, how: str) -> None:
    headers = {"Retry-After": "3600"} if how == "drain at the gate" else {}
    away = Away(httpx.Response(429 if headers else 503, headers=headers), first=3, last=10**6)
    router.route().mock(side_effect=paged(away))
    got: list[Outcome[str, Any]] = []
    may_go_on = anyio.Event()
    async with make() as client, anyio.create_task_group() as group:

        async def call(path: str) -> Any:
            if path == PATHS[1]:  # under way until the page is given up, so that the loop waits
                return await may_go_on.wait()
            return await client.get(path)

        async def stop() -> None:
            while len(away.requests) < (3 if headers else 12):
                await anyio.sleep(0)
            await anyio.wait_all_tasks_blocked()
            if how != "outage_timeout":
                outcomes.drain()
                await anyio.wait_all_tasks_blocked()
            may_go_on.set()

        pages = client.paginate("/api/list", pages=PageNumber())
        timeout = 0.02 if how == "outage_timeout" else 600
        with anyio.fail_after(5):
            async with client.bulk(pages, call, workers=2, outage_timeout=timeout) as outcomes:
                group.start_soon(stop)
                async for outcome in outcomes:
                    got.append(outcome)
    assert [outcome.ok for outcome in got] == [True, True]
    assert outcomes.stopped is not None


# Tokens


async def test_static_tokens_that_lapse_end_a_bulk_with_one_clear_error(router: respx.MockRouter) -> None:
    away = Away(httpx.Response(401), first=10, last=10**6)
    router.route().mock(side_effect=away)
    pulled = 0

    def paths() -> Iterator[str]:
        nonlocal pulled
        for number in range(10_000):
            pulled += 1
            yield f"/api/{number}"

    got: list[Outcome[str, httpx.Response]] = []

    async def run() -> None:
        async with make() as client, client.bulk(paths(), workers=5) as outcomes:
            async for outcome in outcomes:
                got.append(outcome)

    with pytest.raises(AuthenticationError, match="create or regenerate"):
        await run()
    assert sum(outcome.ok for outcome in got) == 9
    assert len(got) <= 9 + 5
    assert pulled <= 25


async def test_a_rotating_source_loses_no_item(router: respx.MockRouter) -> None:
    current = ["pair-0"]

    def answer(request: httpx.Request) -> httpx.Response:
        served = len(router.calls)
        if served % 40 == 39:
            current[0] = f"pair-{served}"
        return httpx.Response(200 if request.headers["Token1"] == current[0] else 401)

    router.route().mock(side_effect=answer)
    client = make(token1=None, token2=None, tokens=lambda: TokenPair(current[0], "secondary"))
    async with client, client.bulk([f"/api/{number}" for number in range(150)], workers=5) as outcomes:
        assert all([outcome.ok async for outcome in outcomes])


async def test_a_source_that_has_trouble_for_a_while_loses_no_item(
    router: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layer_async._auth.SETBACK_SECONDS", 0.001)
    asked = 0

    async def source() -> TokenPair:
        nonlocal asked
        asked += 1
        if asked < 4:
            raise OSError("the vault is sealed")
        return TokenPair("primary", "secondary")

    router.route().respond(200)
    async with make(token1=None, token2=None, tokens=source) as client, client.bulk(PATHS, workers=5) as outcomes:
        assert all([outcome.ok async for outcome in outcomes])


async def test_a_source_that_is_no_source_is_every_items_own_error(router: respx.MockRouter) -> None:
    async def source() -> Any:
        return "a pair"

    router.route().respond(200)
    client = make(token1=None, token2=None, tokens=source)
    async with client, client.bulk(PATHS[:2], workers=1) as outcomes:
        errors = [type(outcome.error).__name__ async for outcome in outcomes]
    assert errors == ["ConfigurationError"] * 2


# A task that an item's call began


async def test_a_task_that_outlives_its_item_is_not_patient_and_counts_for_nobody(router: respx.MockRouter) -> None:
    router.get("/api/late").respond(429)
    router.get("/api/x").respond(200)
    left = anyio.Event()
    met: list[Exception] = []
    records: list[ItemRecord | None] = []

    async def late() -> None:
        await left.wait()
        try:
            await client.get("/api/late")
        except RateLimitError as exc:
            met.append(exc)

    async with make(pacing=None) as client, anyio.create_task_group() as group:

        async def call(path: str) -> httpx.Response:
            records.append(current_item.get())
            group.start_soon(late)
            return await client.get(path)

        async with client.bulk(["/api/x"], call) as outcomes:
            (outcome,) = [outcome async for outcome in outcomes]
        left.set()
    assert len(met) == 1
    assert outcome.attempts == 1
    assert records[0] is not None
    assert records[0].attempts == 1


async def test_timeouts_of_a_call_in_a_bulk_are_typed_as_ever(router: respx.MockRouter) -> None:
    router.route().mock(side_effect=httpx.ReadTimeout)
    async with make() as client, client.bulk(PATHS[:1], outage_timeout=None) as outcomes:
        (outcome,) = [outcome async for outcome in outcomes]
    assert isinstance(outcome.error, APITimeoutError)
