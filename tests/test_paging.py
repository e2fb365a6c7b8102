"""Paging: the strategies by tables, the reading over the sandbox and over model servers."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import attrs
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layer_async import (
    AsyncLayerClient,
    ConfigurationError,
    Cursor,
    LinkHeader,
    MalformedResponseError,
    NextLink,
    OffsetLimit,
    PageNumber,
    Pages,
    RetryPolicy,
)
from layer_async._paging import Course, Page, _Way, find_link, key_path
from layer_async.sandbox import Sandbox, document

pytestmark = pytest.mark.anyio

BASE = "https://webapi.thelayer.com"
TOKEN1, TOKEN2 = "primary-5ecret-aaaa", "secondary-5ecret-bbbb"
AT_ONCE = RetryPolicy(backoff_initial=1e-9, backoff_max=1e-9)

Answer = Callable[[httpx.Request], httpx.Response]
AsyncAnswer = Callable[[httpx.Request], Awaitable[httpx.Response]]


@attrs.frozen
class Customer:
    id: int
    name: str


def make(answer: Answer | AsyncAnswer | httpx.AsyncBaseTransport, **options: Any) -> AsyncLayerClient:
    transport = answer if isinstance(answer, httpx.AsyncBaseTransport) else httpx.MockTransport(answer)
    defaults: dict[str, Any] = {"token1": TOKEN1, "token2": TOKEN2, "base_url": BASE, "retry": AT_ONCE}
    return AsyncLayerClient(transport=transport, **{**defaults, **options})


def asking(sandbox: Sandbox, **options: Any) -> AsyncLayerClient:
    token1, token2 = sandbox.tokens
    return make(httpx.ASGITransport(app=sandbox), token1=token1, token2=token2, **options)


async def read(pages: Pages[Any]) -> list[Any]:
    async with pages as items:
        return [item async for item in items]


def page_of(request: httpx.Request, name: str = "page", default: int = 1) -> int:
    return int(request.url.params.get(name, default))


class Script:
    """A server that gives these answers, one after another, and keeps the requests."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    @property
    def targets(self) -> list[str]:
        return [str(request.url).removeprefix(BASE) for request in self.requests]


# Strategies


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: PageNumber(""),
        lambda: PageNumber(1),
        lambda: PageNumber(start=-1),
        lambda: PageNumber(start=True),
        lambda: PageNumber(size=0, size_param="n"),
        lambda: PageNumber(size_param="n"),
        lambda: PageNumber(size_param="", size=1),
        lambda: PageNumber(total="a", total_pages="b"),
        lambda: PageNumber(total="a", start=2),
        lambda: PageNumber(total=""),
        lambda: PageNumber(total="a..b"),
        lambda: OffsetLimit(""),
        lambda: OffsetLimit(start=-1),
        lambda: OffsetLimit(size_param=""),
        lambda: OffsetLimit(size=0),
        lambda: OffsetLimit(total=()),
        lambda: Cursor(""),
        lambda: Cursor(at=None),
        lambda: Cursor(at=[1]),
        lambda: Cursor(size=3),
        lambda: Cursor(size_param="limit"),
        lambda: Cursor(start=True),
        lambda: Cursor(start=1.5),
        lambda: NextLink(""),
        lambda: NextLink(3),
        lambda: LinkHeader(""),
        lambda: LinkHeader("next prev"),
        lambda: LinkHeader(None),
    ],
)
def test_a_strategy_that_cannot_work_is_refused(strategy: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError):
        strategy()


def test_a_strategy_is_frozen_and_equal_to_its_like() -> None:
    assert Cursor(at="a.b") == Cursor(at=["a", "b"])
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        NextLink().at = ("x",)  # type: ignore[misc]


def test_a_cursor_to_start_from_is_not_shown() -> None:
    assert "secret" not in repr(Cursor(start="secret"))


def test_a_key_with_dots_is_written_in_a_tuple() -> None:
    assert key_path("data.items") == ("data", "items")
    assert key_path(("@odata.nextLink",)) == ("@odata.nextLink",)


@pytest.mark.parametrize(
    ("values", "target"),
    [
        (['<https://h/x?page=2>; rel="next"'], "https://h/x?page=2"),
        (["</x>; rel=next"], "/x"),
        (["</x>;rel=NEXT"], "/x"),
        (['</a>; rel="prev", </b>; rel="next last"'], "/b"),
        (['</a>; rel="prev"', '</b>; rel="next"'], "/b"),
        (['</a,b;c>; title="a, <b>; rel=\\"next\\""; rel="next"'], "/a,b;c"),
        (['</a>; rel=prev; rel=next, </b>; title=x; rel="next"'], "/b"),
        (['</a>; rel="next"; anchor="#x", </b>; rel=next'], "/b"),
        (["</a>, , </b> ; rel = next ; hreflang"], "/b"),
        (["</a>;; rel=next"], "/a"),
        (["</a>; rel*=x; rel=next"], "/a"),
        (['</a>; rel="nextly"'], None),
        (["</a>"], None),
        (["</a>; rel=prev"], None),
        (["nonsense", "</b>; rel=next"], "/b"),
        (["<unclosed; rel=next"], None),
        ([""], None),
        ([], None),
    ],
)
def test_a_link_header_is_read_as_rfc_8288_says(values: list[str], target: str | None) -> None:
    assert find_link(values, "next") == target


@pytest.mark.parametrize(("lead", "circle"), [(0, 1), (0, 3000), (5, 999), (700, 1500), (3000, 4000)])
def test_a_circle_of_any_length_is_noticed(lead: int, circle: int) -> None:
    way = _Way()
    for step in range(lead + circle):
        assert not way.leads_back(step)
    for step in range(2 * (lead + circle) + 2 * circle):
        if way.leads_back(lead + step % circle):
            assert step == 0 or circle > 1000
            return
    pytest.fail("went round for ever")


def test_the_memory_of_the_way_does_not_grow() -> None:
    way = _Way()
    for step in range(5000):
        way.leads_back(step)
    assert len(way._latest) == 1000


def test_what_lies_ahead_is_known_as_far_as_the_total() -> None:
    course = Course(OffsetLimit(size=10, total="total"))
    assert course.following is not None
    assert course.ahead(course.following) is None  # before the first page
    course.take(course.following, Page([0] * 10, digest=1, total=35))
    offsets = []
    step: Any = course.following
    while step is not None:
        offsets.append(step.params["offset"])
        step = course.ahead(step)
    assert offsets == [10, 20, 30]


def test_what_lies_ahead_is_known_as_far_as_the_last_page() -> None:
    course = Course(PageNumber(start=0, total_pages="pages"))
    assert course.following is not None
    course.take(course.following, Page([0] * 10, digest=1, total_pages=3))
    numbers = []
    step: Any = course.following
    while step is not None:
        numbers.append(step.params["page"])
        step = course.ahead(step)
    assert numbers == [1, 2]


# Reading, over the sandbox

STYLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "number": (PageNumber(size_param="page_size", size=7), {}),
    "number, total": (PageNumber(size_param="page_size", size=7, total="total"), {}),
    "number, pages": (PageNumber(size_param="page_size", size=7, total_pages="pages"), {}),
    "offset": (OffsetLimit(size=7), {}),
    "offset, total": (OffsetLimit(size=7, total=("total",)), {}),
    "cursor": (Cursor(start="", size_param="limit", size=7), {}),
    "link": (NextLink(), {"page_size": 7}),
    "link, total": (NextLink(total="total"), {"offset": 0, "limit": 7}),
    "header": (LinkHeader(), {"page_size": 7}),
}


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("documents", [0, 3, 7, 40])
@pytest.mark.parametrize("style", STYLES)
async def test_every_style_gives_every_document_once_in_order(style: str, documents: int, prefetch: int) -> None:
    strategy, params = STYLES[style]
    sandbox = Sandbox(documents=documents)
    async with asking(sandbox) as client:
        pages = client.paginate("/api/sites", pages=strategy, items="data", params=params, prefetch=prefetch)
        found = await read(pages)
    assert found == [document("sites", number) for number in range(1, documents + 1)]
    assert pages.duplicates == 0
    if "total" in style:
        assert pages.total == documents
        assert sandbox.record.requests == max(1, -(-documents // 7))


async def test_items_are_decoded_into_a_class() -> None:
    async with asking(Sandbox(documents=5)) as client:
        pages = client.paginate("api/customers", pages=Cursor(start=""), items="data", into=Customer)
        found = [item async for item in pages]
    assert [(type(each), each.id) for each in found] == [(Customer, number) for number in range(1, 6)]
    assert pages.pages == 1
    assert repr(pages) == "<Pages by Cursor, 1 read>"


async def test_nothing_is_sent_before_the_first_item_is_asked_for_and_nothing_ahead() -> None:
    sandbox = Sandbox(documents=30)
    async with asking(sandbox) as client:
        pages = client.paginate("/api/sites", pages=OffsetLimit(size=10), items="data")
        assert sandbox.record.requests == 0
        for number in range(10):
            assert (await anext(pages))["id"] == number + 1
            assert sandbox.record.requests == 1
        await anext(pages)
        assert sandbox.record.requests == 2


async def test_pages_feed_a_bulk() -> None:
    async with asking(Sandbox(documents=30)) as client:

        async def fetch(site: dict[str, Any]) -> Any:
            return await client.get(f"/api/sites/{site['id']}", into=Any)

        sites = client.paginate("/api/sites", pages=NextLink(), items="data", params={"page_size": 7})
        async with client.bulk(sites, fetch, key=lambda site: site["id"]) as outcomes:
            found = {outcome.key: outcome.unwrap()["id"] async for outcome in outcomes}
    assert found == {number: number for number in range(1, 31)}


async def test_pages_that_are_fetched_ahead_feed_a_bulk() -> None:
    async with asking(Sandbox(documents=30)) as client:

        async def fetch(site: dict[str, Any]) -> Any:
            return await client.get(f"/api/sites/{site['id']}", into=Any)

        pages = client.paginate("/api/sites", pages=OffsetLimit(size=4), items="data", prefetch=3)
        async with pages as sites, client.bulk(sites, fetch) as outcomes:
            found = {outcome.unwrap()["id"] async for outcome in outcomes}
    assert found == set(range(1, 31))


@pytest.mark.parametrize("prefetch", [0, 3])
async def test_a_collection_that_shifts_gives_each_item_once_and_counts_the_others(prefetch: int) -> None:
    for strategy in (PageNumber(size_param="page_size", size=5), OffsetLimit(size=5, total="total")):
        async with asking(Sandbox(documents=23, paging="shifting")) as client:
            pages = client.paginate("/api/sites", pages=strategy, items="data", key="id", prefetch=prefetch)
            found = await read(pages)
            shifted = await read(client.paginate("/api/sites", pages=strategy, items="data"))
        assert [site["id"] for site in found] == list(range(1, 24))
        assert pages.duplicates == len(shifted) - 23 > 3


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize(
    "strategy",
    [Cursor(start="", size_param="limit", size=5), NextLink(), LinkHeader()],
)
async def test_pages_that_go_round_in_a_circle_are_an_error(strategy: Any, prefetch: int) -> None:
    sandbox = Sandbox(documents=23, paging="circular")
    found = []
    async with asking(sandbox) as client:
        path = "/api/sites" if isinstance(strategy, Cursor) else "/api/sites?page=1&page_size=5"
        async with client.paginate(path, pages=strategy, items="data", prefetch=prefetch) as items:
            with pytest.raises(MalformedResponseError, match=r"go on for ever.*parameter|go on for ever.*the link"):
                async for site in items:
                    found.append(site["id"])
    assert found == list(range(1, 24))
    assert sandbox.record.requests == 6


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("strategy", [PageNumber(), OffsetLimit()])
async def test_a_page_that_comes_again_is_an_error(strategy: Any, prefetch: int) -> None:
    found = []
    async with asking(Sandbox(documents=100, paging="repeating")) as client:
        async with client.paginate("/api/sites", pages=strategy, items="data", prefetch=prefetch) as items:
            for _ in range(2):  # and again, when asked again
                with pytest.raises(MalformedResponseError, match=r"page 3 is equal .* total=") as raised:
                    async for site in items:
                        found.append(site["id"])
    assert found == list(range(1, 101))
    assert str(raised.value.request) == f"GET {BASE}/api/sites"


async def test_a_server_that_repeats_its_last_page_is_read_with_its_total() -> None:
    async with asking(Sandbox(documents=100, paging="repeating")) as client:
        pages = client.paginate("/api/sites", pages=PageNumber(total="total"), items="data")
        assert len(await read(pages)) == 100


# Reading, over model servers


@st.composite
def servers(draw: st.DrawFn) -> dict[str, Any]:
    style = draw(st.sampled_from(["number", "offset", "cursor", "link", "header"]))
    counted = style in ("number", "offset")
    return {
        "style": style,
        "items": draw(st.integers(0, 40)),
        "asked": draw(st.one_of(st.none(), st.integers(1, 12))),
        "most": draw(st.integers(1, 12)),  # items a page that the server gives at most
        "total": draw(st.sampled_from([None, "items", "pages"] if style == "number" else [None, "items"])),
        "bare": draw(st.booleans()) if style == "header" or counted else False,
        "start": draw(st.sampled_from([0, 1])),
        "behind": draw(st.sampled_from([200, 404])),
        "prefetch": draw(st.integers(0, 5)),
        "seed": draw(st.integers(0, 1000)),
    }


class Model:
    """A server of numbers, in the style and with the quirks that are drawn."""

    def __init__(self, server: dict[str, Any]) -> None:
        self.server = server
        self.chance = random.Random(server["seed"])
        self.under_way = self.most_under_way = 0
        self.size = min(server["asked"] or server["most"], server["most"])

    @property
    def strategy(self) -> Any:
        server = self.server
        if server["bare"]:
            server["total"] = None
        total = {"items": {"total": "meta.total"}, "pages": {"total_pages": "meta.pages"}, None: {}}[server["total"]]
        sized: dict[str, Any] = {} if server["asked"] is None else {"size_param": "size", "size": server["asked"]}
        match server["style"]:
            case "number":
                return PageNumber("page", start=server["start"], **sized, **total)
            case "offset":
                return OffsetLimit(**sized, **total)
            case "cursor":
                return Cursor(at="meta.next", **sized, **total)
            case "link":
                return NextLink("meta.next", **total)
            case _:
                return LinkHeader(**total)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        for _ in range(self.chance.randrange(4)):
            await anyio.lowlevel.checkpoint()
        self.under_way -= 1
        server, params, size = self.server, request.url.params, self.size
        match server["style"]:
            case "number":
                begin = (int(params["page"]) - server["start"]) * size
            case "offset":
                begin = int(params["offset"])
            case _:
                begin = int(params.get("cursor", 0))
        found = list(range(begin, min(begin + size, server["items"])))
        if not found and begin and server["behind"] == 404 and self.may_be_404:
            return httpx.Response(404, json={})
        following = begin + size if begin + size < server["items"] else None
        link = None if following is None else f"?cursor={following}"
        pages = -(-server["items"] // size)
        meta = {"total": server["items"], "pages": pages, "next": link if server["style"] == "link" else following}
        headers = {} if link is None else {"Link": f'<{link}>; rel="next"'}
        return httpx.Response(200, json=found if server["bare"] else {"meta": meta, "data": found}, headers=headers)

    @property
    def may_be_404(self) -> bool:
        """Whether its user has said enough for a 404 behind the end to be told from one that matters."""
        server = self.server
        if server["total"]:
            return True
        asked = server["asked"]
        return asked is not None and (asked > self.size or server["items"] % self.size != 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(server=servers())
def test_whatever_the_server_every_item_comes_once_in_order(anyio_backend: str, server: dict[str, Any]) -> None:
    model = Model(server)

    async def main() -> None:
        strategy = model.strategy
        async with make(model) as client:
            items = None if server["bare"] else "data"
            pages = client.paginate("/x", pages=strategy, items=items, into=int, prefetch=server["prefetch"])
            assert await read(pages) == list(range(server["items"]))
            assert model.most_under_way <= max(1, server["prefetch"])
            if server["total"] == "items":
                assert pages.total == server["items"]

    anyio.run(main, backend=anyio_backend)
