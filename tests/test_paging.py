"""Paging: the strategies by tables, the reading over the sandbox and over model servers."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, cast

import anyio
import attrs
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layer_async import (
    AsyncLayerClient,
    ClientClosedError,
    ConfigurationError,
    Cursor,
    LinkHeader,
    MalformedResponseError,
    NextLink,
    NotFoundError,
    OffsetLimit,
    PageNumber,
    Pages,
    ResponseDecodeError,
    RetryPolicy,
    ServerError,
)
from layer_async._paging import Course, Page, Step, _Way, find_link, key_path
from layer_async.sandbox import Sandbox, document, serve

pytestmark = pytest.mark.anyio

BASE = "https://webapi.thelayer.com"
TOKEN1, TOKEN2 = "primary-5ecret-aaaa", "secondary-5ecret-bbbb"
AT_ONCE = RetryPolicy(backoff_initial=1e-9, backoff_max=1e-9)

Answer = Callable[[httpx.Request], httpx.Response]
AsyncAnswer = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


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


async def read(pages: Pages[Any], into: list[Any] | None = None) -> list[Any]:
    """All that comes, into a list that is there still when an error does."""
    found = [] if into is None else into
    async with pages as items:
        await read_on(items, found)
    return found


async def read_on(items: Pages[Any], found: list[Any]) -> None:
    async for item in items:
        found.append(item)


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
        lambda: PageNumber(cast(Any, 1)),
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
        lambda: Cursor(at=cast(Any, None)),
        lambda: Cursor(at=cast(Any, [1])),
        lambda: Cursor(size=3),
        lambda: Cursor(size_param="limit"),
        lambda: Cursor(start=True),
        lambda: Cursor(start=cast(Any, 1.5)),
        lambda: NextLink(""),
        lambda: NextLink(cast(Any, 3)),
        lambda: LinkHeader(""),
        lambda: LinkHeader("next prev"),
        lambda: LinkHeader(cast(Any, None)),
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


def likely(course: Course, most: int = 9) -> list[Step]:
    """The steps that are still to come, as far as `course` can guess."""
    steps: list[Step] = []
    step = course.following
    while step is not None and len(steps) < most:
        steps.append(step)
        step = course.ahead(step)
    return steps


def test_what_lies_ahead_is_known_as_far_as_the_total() -> None:
    course = Course(OffsetLimit(size=10, total="total"))
    assert course.following is not None
    assert course.ahead(course.following) is None  # before the first page
    course.take(course.following, Page([0] * 10, digest=1, total=35))
    assert [step.params["offset"] for step in likely(course)] == [10, 20, 30]


def test_what_lies_ahead_is_known_as_far_as_the_last_page() -> None:
    course = Course(PageNumber(start=0, total_pages="pages"))
    assert course.following is not None
    course.take(course.following, Page([0] * 10, digest=1, total_pages=3))
    assert [step.params["page"] for step in likely(course)] == [1, 2]


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
    found: list[Any] = []
    async with asking(sandbox) as client:
        path = "/api/sites" if isinstance(strategy, Cursor) else "/api/sites?page=1&page_size=5"
        pages = client.paginate(path, pages=strategy, items="data", prefetch=prefetch)
        with pytest.raises(MalformedResponseError, match=r"go on for ever.*parameter|go on for ever.*the link"):
            await read(pages, found)
    assert [site["id"] for site in found] == list(range(1, 24))
    assert sandbox.record.requests == 6


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("strategy", [PageNumber(), OffsetLimit()])
async def test_a_page_that_comes_again_is_an_error(strategy: Any, prefetch: int) -> None:
    found: list[Any] = []
    async with (
        asking(Sandbox(documents=100, paging="repeating")) as client,
        client.paginate("/api/sites", pages=strategy, items="data", prefetch=prefetch) as items,
    ):
        for _ in range(2):  # and again, when asked again
            with pytest.raises(MalformedResponseError, match=r"page 3 is equal .* total=") as raised:
                await read_on(items, found)
    assert [site["id"] for site in found] == list(range(1, 101))
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
        names = {"items": "total", "pages": "total_pages"}
        total: dict[str, Any] = {names[kind]: f"meta.{names[kind]}" for kind in names if server["total"] == kind}
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
        meta = {
            "total": server["items"],
            "total_pages": pages,
            "next": link if server["style"] == "link" else following,
        }
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# What pages say


@pytest.mark.parametrize(
    ("items", "body", "path"),
    [
        ("data.items", {"data": {"items": [{"id": 1, "name": "a"}, {"id": 2}]}}, "$.data.items[1]"),
        ("data.items", {"data": {"items": [{"id": 1, "name": "a"}, {"id": 2, "name": 3}]}}, "$.data.items[1].name"),
        ("data.items", {"data": {"items": {"id": 1}}}, "$.data.items"),
        ("data.items", {"data": {"items": None}}, "$.data.items"),
        ("data.items", {"data": {"item": []}}, "$.data.items"),
        ("data.items", {"data": [1]}, "$.data.items"),
        ("data.items", {}, "$.data.items"),
        ("data.items", [], "$.data.items"),
        (None, {"id": 1, "name": "a"}, "$"),
        (None, [{"id": 1, "name": "a"}, {"id": "1", "name": "a"}], "$[1].id"),
        (lambda page: page["data"], {"data": {"id": 1}}, "$"),
        (lambda page: page["data"], {"data": [{"id": 1}]}, "$[0]"),
        (("data", "the.items"), {"data": {"the.items": [0]}}, "$.data.the.items[0]"),
    ],
)
async def test_a_page_that_is_not_as_was_said_is_an_error_with_the_path(items: Any, body: Any, path: str) -> None:
    async with make(Script(body)) as client:
        pages = client.paginate("/x", pages=PageNumber(), items=items, into=Customer)
        with pytest.raises(ResponseDecodeError) as raised:
            await anext(pages)
    assert raised.value.path == path
    assert str(raised.value.request) == f"GET {BASE}/x"
    assert raised.value.attempts[0].status_code == 200


@pytest.mark.parametrize("items", ["data", lambda page: page["data"]])
async def test_a_page_that_is_not_json_is_an_error(items: Any) -> None:
    for body in (b"", b"<html>", b'{"data": [1', b'{"data": [\xff]}', b'{"data": tru}', b"[" * 100_000):
        answer = httpx.Response(200, content=body, headers={"Content-Type": "text/html"})
        async with make(Script(answer)) as client:
            with pytest.raises(ResponseDecodeError, match="text/html"):
                await anext(client.paginate("/x", pages=PageNumber(), items=items))


@pytest.mark.parametrize(
    ("strategy", "body"),
    [
        (Cursor(), {"data": [1], "next_cursor": True}),
        (Cursor(), {"data": [1], "next_cursor": [1]}),
        (NextLink(), {"data": [1], "next": 3}),
        (NextLink(), {"data": [1], "next": {"href": "/x"}}),
        (PageNumber(total="meta.total"), {"data": [1], "meta": {"total": "1"}}),
        (PageNumber(total="meta.total"), {"data": [1], "meta": {"total": -1}}),
        (PageNumber(total="meta.total"), {"data": [1], "meta": {}}),
        (PageNumber(total_pages="meta.total"), {"data": [1]}),
    ],
)
async def test_a_cursor_link_or_total_of_another_kind_is_an_error_with_its_path(strategy: Any, body: Any) -> None:
    async with make(Script(body)) as client:
        with pytest.raises(ResponseDecodeError) as raised:
            await anext(client.paginate("/x", pages=strategy, items="data"))
    place = strategy.total or strategy.total_pages or strategy.at
    assert raised.value.path == "$." + ".".join(place)


async def test_a_body_with_a_byte_order_mark_is_read() -> None:
    content = b'\xef\xbb\xbf{"data": [1, 2], "next": null}'
    for items in ("data", lambda page: page["data"]):
        async with make(Script(httpx.Response(200, content=content))) as client:
            assert await read(client.paginate("/x", pages=NextLink(), items=items)) == [1, 2]


async def test_no_content_is_an_empty_page() -> None:
    async with make(Script(httpx.Response(204))) as client:
        assert await read(client.paginate("/x", pages=PageNumber(total="total"), items="data")) == []


async def test_a_redirect_is_no_page() -> None:
    async with make(Script(httpx.Response(302, headers={"Location": "/y"}))) as client:
        with pytest.raises(Exception, match="302: a redirect to"):
            await anext(client.paginate("/x", pages=PageNumber()))


async def test_a_class_with_converters_is_called() -> None:
    pytest.importorskip("cattrs")

    def upper(text: str) -> str:
        return text.upper()

    @attrs.frozen
    class Called:
        name: str = attrs.field(converter=upper)

    body = {"data": [{"name": "a"}, {"name": "b"}], "next": None}
    for items in ("data", lambda page: page["data"]):
        async with make(Script(body)) as client:
            pages = client.paginate("/x", pages=NextLink(), items=items, into=Called)
            assert await read(pages) == [Called("A"), Called("B")]


async def test_a_function_may_make_the_items() -> None:
    body = {"a": [{"id": 1}], "b": [{"id": 2}], "next": None}
    async with make(Script(body, body)) as client:
        pages = client.paginate("/x", pages=NextLink(), items=lambda page: (*page["a"], *page["b"]))
        assert await read(pages) == [{"id": 1}, {"id": 2}]
        odd = client.paginate("/x", pages=NextLink(), items=lambda _: [object()], into=Customer)
        with pytest.raises(ConfigurationError, match="what is not plain JSON"):
            await anext(odd)


async def test_the_error_of_a_function_is_its_own() -> None:
    async with make(Script({"next": None})) as client:
        with pytest.raises(KeyError, match="data"):
            await anext(client.paginate("/x", pages=NextLink(), items=lambda page: page["data"]))


# Where it ends


async def targets(pages: Any, *answers: Any, items: str | None = "data", **options: Any) -> tuple[list[str], list[Any]]:
    script = Script(*answers)
    async with make(script) as client:
        found = await read(client.paginate("/x", pages=pages, items=items, **options))
    assert script.answers == []
    return script.targets, found


async def test_a_page_shorter_than_a_full_one_ends_the_reading() -> None:
    pages = PageNumber(size_param="n", size=2)
    assert await targets(pages, [1, 2], [3], items=None) == (["/x?page=1&n=2", "/x?page=2&n=2"], [1, 2, 3])


async def test_a_short_first_page_may_be_a_servers_limit_so_it_does_not_end_the_reading() -> None:
    sent, found = await targets(OffsetLimit(size=500), [1, 2], [3, 4], [5], [], items=None)
    assert found == [1, 2, 3, 4, 5]
    assert sent == [f"/x?offset={offset}&limit=500" for offset in (0, 2, 4, 5)]


async def test_404_behind_a_short_page_is_the_end() -> None:
    gone = httpx.Response(404)
    assert (await targets(PageNumber(size=5), [1, 2], gone, items=None))[1] == [1, 2]
    assert (await targets(PageNumber(), [1, 2], [3], gone, items=None))[1] == [1, 2, 3]


@pytest.mark.parametrize(
    ("strategy", "answers"),
    [
        (PageNumber(), [{"data": [1, 2]}]),
        (PageNumber(), []),
        (PageNumber(size=2), [{"data": [1, 2]}, {"data": [3, 4]}]),
        (PageNumber(total="total"), [{"data": [1, 2], "total": 4}, {"data": [3], "total": 4}]),
        (PageNumber(total_pages="total"), [{"data": [1, 2], "total": 4}, {"data": [3], "total": 4}]),
        (Cursor(), [{"data": [1, 2], "next_cursor": 1}, {"data": [3], "next_cursor": 2}]),
    ],
)
async def test_404_is_an_error_elsewhere(strategy: Any, answers: list[Any]) -> None:
    async with make(Script(*answers, httpx.Response(404))) as client:
        with pytest.raises(NotFoundError):
            await read(client.paginate("/x", pages=strategy, items="data"))


@pytest.mark.parametrize(
    ("strategy", "last"),
    [
        (PageNumber(total="total"), {"data": [], "total": 5}),
        (OffsetLimit(total="total", size=2), {"data": [], "total": 5}),
        (PageNumber(total_pages="total"), {"data": [], "total": 5}),
        (Cursor(total="total", at="next"), {"data": [], "total": 5, "next": None}),
        (NextLink(total="total"), {"data": [], "total": 5}),
        (LinkHeader(total="total"), {"data": [], "total": 5}),
    ],
)
async def test_an_end_before_the_total_is_an_error_after_the_items(strategy: Any, last: Any) -> None:
    first = httpx.Response(200, json={"data": [1, 2], "total": 5, "next": "/x?2"}, headers={"Link": "</x?2>;rel=next"})
    found: list[Any] = []
    async with make(Script(first, last)) as client:
        with pytest.raises(MalformedResponseError, match="end before the collection does") as raised:
            await read(client.paginate("/x", pages=strategy, items="data"), found)
    assert found == [1, 2]
    assert str(raised.value.request) == f"GET {BASE}/x"


async def test_a_short_page_in_the_middle_does_not_end_what_has_a_total() -> None:
    answers = [{"data": data, "total": 6} for data in ([1, 2], [3], [4, 5], [6])]
    sent, found = await targets(OffsetLimit(size=2, total="total"), *answers)
    assert found == [1, 2, 3, 4, 5, 6]
    assert [target.split("&")[0] for target in sent] == [f"/x?offset={offset}" for offset in (0, 2, 3, 5)]


async def test_the_latest_total_counts() -> None:
    shrinking = [{"data": [1, 2], "total": 6}, {"data": [3, 4], "total": 4}]
    assert (await targets(PageNumber(total="total"), *shrinking))[1] == [1, 2, 3, 4]
    for silent in ({"data": [3, 4], "total": None}, {"data": [3, 4]}):
        first = {"data": [1, 2], "total": 4}
        assert (await targets(PageNumber(total="total"), first, silent))[1] == [1, 2, 3, 4]


async def test_a_reading_may_start_later() -> None:
    sent, found = await targets(OffsetLimit(start=3, total="total"), {"data": [3, 4], "total": 5})
    assert (sent, found) == (["/x?offset=3"], [3, 4])
    sent, found = await targets(PageNumber(start=2, total_pages="n"), {"data": [3, 4], "n": 3}, {"data": [5], "n": 3})
    assert (sent, found) == (["/x?page=2", "/x?page=3"], [3, 4, 5])
    sent, _ = await targets(Cursor(start=7, at="next"), {"data": [1], "next": 8}, {"data": [2], "next": ""})
    assert sent == ["/x?cursor=7", "/x?cursor=8"]


async def test_an_empty_page_with_a_cursor_leads_on() -> None:
    answers = [{"data": data, "next": cursor} for data, cursor in (([1], 0), ([], "b"), ([], "c"), ([2], None))]
    sent, found = await targets(Cursor("after", at="next"), *answers, params={"sort": "id"})
    assert sent == ["/x?sort=id", "/x?sort=id&after=0", "/x?sort=id&after=b", "/x?sort=id&after=c"]
    assert found == [1, 2]


async def test_a_cursor_that_stays_the_same_is_an_error_even_when_pages_are_empty() -> None:
    async with make(Script({"data": [], "next": "a"}, {"data": [], "next": "a"})) as client:
        with pytest.raises(MalformedResponseError, match="leads back"):
            await read(client.paginate("/x", pages=Cursor(at="next"), items="data"))


async def test_a_server_that_begins_anew_is_noticed() -> None:
    async with make(Script([1, 2], [3, 4], [1, 2])) as client:
        with pytest.raises(MalformedResponseError, match="page 3 is equal to one that came before"):
            await read(client.paginate("/x", pages=PageNumber()))


SAME = {"data": [1, 2], "next": "/x?page=7", "total": 9, "pages": 5}
ASKS = "Does the server know the parameter '{}'?"
ENDLESS = "page 2 is equal to one that came before: 2 items again, so this would go on for ever. "


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            PageNumber(),
            ENDLESS + ASKS.format("page") + " Where it repeats its last page instead of ending, say with total=",
        ),
        (
            OffsetLimit(),
            ENDLESS + ASKS.format("offset") + " Where it repeats its last page instead of ending, say with total=",
        ),
        (PageNumber(total="total"), "though the end is not reached by what it says itself. " + ASKS.format("page")),
        (PageNumber(total_pages="pages"), "though the end is not reached by what it says itself. "),
        (OffsetLimit(total="total"), "though the end is not reached by what it says itself. "),
        (Cursor(at="next", total="total"), ENDLESS + ASKS.format("cursor")),
        (NextLink(total="total"), ENDLESS + "Is the link that at= names the one to the next page?"),
        (LinkHeader(total="total"), ENDLESS + "Is the link that rel= names the one to the next page?"),
    ],
    ids=repr,
)
async def test_equal_pages_are_refused_with_advice_that_can_be_followed(strategy: Any, message: str) -> None:
    answer = httpx.Response(200, json=SAME, headers={"Link": '</x?page=7>; rel="next"'})
    async with make(Script(answer, answer)) as client:
        with pytest.raises(MalformedResponseError) as caught:
            await read(client.paginate("/x", pages=strategy, items="data"))
    assert message in str(caught.value)
    assert ("total=" in str(caught.value)) == ("total=" in message)


async def test_a_link_in_a_circle_is_called_one() -> None:
    async with make(Script(*({"data": [number], "next": "/x?page=7"} for number in range(2)))) as client:
        with pytest.raises(MalformedResponseError, match=r"leads back .* is the link right"):
            await read(client.paginate("/x", pages=NextLink(), items="data"))


# Links


async def test_a_link_is_relative_to_its_page_and_takes_no_params_along() -> None:
    answers = [{"data": [n], "next": link} for n, link in enumerate(("?p=2", "y/z?p=3", f"{BASE}/w?p=4#here", None))]
    script = Script(*answers)
    async with make(script, base_url=f"{BASE}/api/v1") as client:
        pages = client.paginate("x", pages=NextLink(), items="data", params={"q": "a b"}, headers={"X-Own": "1"})
        assert await read(pages) == [0, 1, 2, 3]
    assert script.targets == ["/api/v1/x?q=a+b", "/api/v1/x?p=2", "/api/v1/y/z?p=3", "/w?p=4"]
    assert all(request.headers["X-Own"] == "1" for request in script.requests)
    assert all(request.headers["Token1"] == TOKEN1 for request in script.requests)


ELSEWHERE = [
    "https://evil.invalid/x?page=2&key=5ecret",
    "//evil.invalid/x?key=5ecret",
    "http://webapi.thelayer.com/x?key=5ecret",
    "https://webapi.thelayer.com:8443/x?key=5ecret",
    "https://webapi.thelayer.com@evil.invalid/x?key=5ecret",
    "https://5ecret:pass@webapi.thelayer.com/x",
    "https:\\\\evil.invalid/5ecret",
    "/\\evil.invalid/5ecret",
    "https://webapi.thelayer.com.evil.invalid/x",
    "https://webapi.thelayer.com//evil.invalid/x?5ecret",
    "javascript:5ecret",
    "https://[::1/5ecret",
    "https://h:99999999/5ecret",
    " /x?5ecret",
    "/x?5ecret\n",
    "/x\u0000?5ecret",
]


def assert_hidden(secret: str, error: BaseException) -> None:
    """Neither the message nor a local variable of ours in the traceback shows `secret`."""
    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
    frames = [frame for frame in trace.stack if "/layer_async/" in frame.filename]
    assert frames
    assert secret not in f"{error} {[frame.locals for frame in frames]}"


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("link", "style"),
    [
        *((link, "body") for link in ELSEWHERE),
        *((link, "header") for link in ELSEWHERE if link.isprintable() and link == link.strip()),
    ],
)
async def test_a_link_elsewhere_is_refused_before_it_is_sent(link: str, style: str, prefetch: int) -> None:
    headers = {"Link": f"<{link}>; rel=next"} if style == "header" else {}
    script = Script(httpx.Response(200, json={"data": [1, 2], "next": link}, headers=headers))
    found: list[Any] = []
    async with make(script) as client:
        strategy = NextLink() if style == "body" else LinkHeader()
        with pytest.raises(MalformedResponseError, match="link to the next page") as raised:
            await read(client.paginate("/x", pages=strategy, items="data", prefetch=prefetch), found)
    assert found == [1, 2]
    assert len(script.requests) == 1
    assert_hidden("5ecret", raised.value)


async def test_a_link_elsewhere_is_named_by_its_origin() -> None:
    async with make(Script({"data": [], "next": ELSEWHERE[0]})) as client:
        with pytest.raises(MalformedResponseError) as raised:
            await read(client.paginate("/x", pages=NextLink(), items="data"))
    assert str(raised.value) == (
        f"GET {BASE}/x: the link to the next page leads to https://evil.invalid, and tokens go to {BASE} only. "
        "It was not followed."
    )


# Keys


async def test_items_that_come_twice_are_dropped_by_a_field_or_a_function() -> None:
    answers = [{"data": [{"id": n, "name": "x"} for n in ids]} for ids in ((1, 2, 2), (2, 3, 1), (4,), ())]
    for key in ("id", lambda customer: customer.id):
        async with make(Script(*answers)) as client:
            pages = client.paginate("/x", pages=PageNumber(), items="data", into=Customer, key=key)
            assert [each.id for each in await read(pages)] == [1, 2, 3, 4]
            assert (pages.duplicates, pages.pages) == (3, 4)


@pytest.mark.parametrize(("remember", "duplicates"), [(1, 0), (2, 1), (10, 1), (None, 1)])
async def test_keys_are_remembered_for_so_many_pages(remember: int | None, duplicates: int) -> None:
    async with make(Script([1, 2], [3, 4], [1, 5], [])) as client:
        pages = client.paginate("/x", pages=PageNumber(), key=lambda item: item, remember=remember)
        assert len(await read(pages)) == 6 - duplicates
        assert pages.duplicates == duplicates


async def test_keys_of_one_hash_are_told_apart() -> None:
    async with make(Script([-1, -2], [])) as client:
        assert await read(client.paginate("/x", pages=PageNumber(), key=lambda item: item)) == [-1, -2]


async def test_a_page_of_nothing_new_is_passed_over() -> None:
    async with make(Script([1, 2, 3], [2, 3], [4], [])) as client:
        assert await read(client.paginate("/x", pages=PageNumber(), key=lambda item: item)) == [1, 2, 3, 4]


@pytest.mark.parametrize("into", [None, Customer])
async def test_an_item_without_its_key_is_an_error_with_the_path(into: Any) -> None:
    async with make(Script({"data": [{"id": 1, "name": "a"}]})) as client:
        with pytest.raises(ResponseDecodeError, match="no 'reference' to be its key") as raised:
            await anext(client.paginate("/x", pages=PageNumber(), items="data", into=into, key="reference"))
    assert raised.value.path == "$.data[0].reference"


async def test_a_key_that_cannot_be_hashed_is_refused() -> None:
    async with make(Script([{"id": []}])) as client:
        with pytest.raises(ConfigurationError, match="list, which cannot be hashed"):
            await anext(client.paginate("/x", pages=PageNumber(), key="id"))


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        {"pages": None},
        {"pages": PageNumber},
        {"pages": PageNumber(), "items": ""},
        {"pages": PageNumber(), "items": 3},
        {"pages": PageNumber(), "into": Script},
        {"pages": PageNumber(), "key": ""},
        {"pages": PageNumber(), "key": 3},
        {"pages": PageNumber(), "remember": 0},
        {"pages": PageNumber(), "remember": True},
        {"pages": PageNumber(), "prefetch": -1},
        {"pages": PageNumber(), "prefetch": None},
        {"pages": PageNumber(total="total")},
        {"pages": PageNumber(total_pages="pages")},
        {"pages": Cursor()},
        {"pages": NextLink()},
        {"pages": LinkHeader(total="total")},
        {"pages": PageNumber(), "params": {"page": 3}},
        {"pages": PageNumber(size_param="n", size=3), "params": [("n", 3)]},
        {"pages": Cursor(), "items": "data", "params": "cursor=5ecret"},
        {"pages": PageNumber("q")},
        {"pages": PageNumber(), "params": object()},
        {"pages": PageNumber(), "headers": {"Token1": "x"}},
        {"pages": PageNumber(), "deadline": -1},
    ],
)
async def test_what_cannot_work_is_refused_before_anything_is_sent(options: Any) -> None:
    script = Script()
    async with make(script) as client:
        with pytest.raises(ConfigurationError) as raised:
            client.paginate("/x?q=1", **options)
    assert_hidden("5ecret", raised.value)
    assert script.requests == []


async def test_a_path_elsewhere_and_an_unknown_option_are_refused() -> None:
    async with make(Script()) as client:
        with pytest.raises(ConfigurationError):
            client.paginate("https://evil.invalid/", pages=PageNumber())
        with pytest.raises(TypeError, match="no option 'jsom'"):
            client.paginate("/x", pages=PageNumber(), jsom=1)  # type: ignore[call-overload]


async def test_a_size_that_is_not_asked_for_leaves_its_parameter_to_the_caller() -> None:
    sent, _ = await targets(OffsetLimit(), [1], [], items=None, params={"limit": 7})
    assert sent == ["/x?limit=7&offset=0", "/x?limit=7&offset=1"]


# One loop, one block


async def test_a_reading_that_was_left_can_be_gone_on_with() -> None:
    async with make(Script([1, 2, 3], [4], [])) as client:
        pages = client.paginate("/x", pages=PageNumber())
        async for item in pages:
            if item == 2:
                break
        assert [item async for item in pages] == [3, 4]
        with pytest.raises(StopAsyncIteration):
            await anext(pages)
        with pytest.raises(ConfigurationError, match="come once"):
            aiter(pages)


@pytest.mark.parametrize("prefetch", [0, 3])
async def test_after_an_error_the_same_page_is_asked_for_again(prefetch: int) -> None:
    fails = {2: 1}

    def answer(request: httpx.Request) -> httpx.Response:
        page = page_of(request)
        if fails.get(page):
            fails[page] -= 1
            return httpx.Response(500)
        return httpx.Response(200, json=[page] if page < 5 else [])

    found: list[Any] = []
    async with (
        make(answer, retry=None) as client,
        client.paginate("/x", pages=PageNumber(), prefetch=prefetch) as items,
    ):
        with pytest.raises(ServerError):
            await read_on(items, found)
        assert found == [1]
        await read_on(items, found)
    assert found == [1, 2, 3, 4]


async def test_each_page_is_retried_like_any_call() -> None:
    script = Script([1], httpx.Response(503), httpx.Response(503), [2], httpx.ReadError("cut"), [])
    async with make(script) as client:
        assert await read(client.paginate("/x", pages=PageNumber())) == [1, 2]
    assert script.targets == ["/x?page=1", "/x?page=2", "/x?page=2", "/x?page=2", "/x?page=3", "/x?page=3"]


async def test_two_tasks_cannot_read_at_once() -> None:
    started = anyio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        started.set()
        await anyio.sleep_forever()
        raise AssertionError

    async with make(answer) as client, anyio.create_task_group() as group:
        pages = client.paginate("/x", pages=PageNumber())
        group.start_soon(pages.__anext__)
        await started.wait()
        with pytest.raises(ConfigurationError, match="one loop"):
            await anext(pages)
        group.cancel_scope.cancel()


async def test_prefetch_without_its_block_is_refused() -> None:
    async with make(Script()) as client:
        pages = client.paginate("/x", pages=PageNumber(), prefetch=2)
        with pytest.raises(ConfigurationError, match=r"async with client\.paginate"):
            aiter(pages)
        with pytest.raises(ConfigurationError, match=r"async with client\.paginate"):
            await anext(pages)


@pytest.mark.parametrize("prefetch", [0, 2])
async def test_a_block_that_has_ended_gives_nothing_more(prefetch: int) -> None:
    async with make(lambda request: httpx.Response(200, json=[page_of(request)])) as client:
        async with client.paginate("/x", pages=PageNumber(), prefetch=prefetch) as items:
            assert await anext(items) == 1
        with pytest.raises(ConfigurationError, match="has ended"):
            aiter(items)
        for again in (items.__anext__, items.__aenter__):
            with pytest.raises(ConfigurationError):
                await again()
        async with client.paginate("/x", pages=PageNumber(), prefetch=prefetch) as items:
            with pytest.raises(ConfigurationError, match="one `async with`"):
                await items.__aenter__()
            await items.aclose()
            await items.aclose()
            with pytest.raises(ConfigurationError, match="was closed"):
                await anext(items)


async def test_a_wait_ends_when_another_task_closes_the_pages() -> None:
    gauge = Gauge(9)
    gauge.stuck = {1}
    async with make(gauge) as client, client.paginate("/x", pages=PageNumber(), prefetch=2) as items:

        async def wait() -> None:
            with pytest.raises(ConfigurationError, match="was closed"):
                await anext(items)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await settle()
            assert gauge.under_way == {1}
            await items.aclose()


async def test_a_closed_client_ends_the_reading() -> None:
    async with make(Script([1])) as client:
        pages = client.paginate("/x", pages=PageNumber())
        assert await anext(pages) == 1
    with pytest.raises(ClientClosedError):
        await anext(pages)


# Ahead


class Gauge:
    """A server of `last` pages that counts what is under way, holds each page until it is let go, and may fail."""

    def __init__(self, last: int, *, fail: dict[int, int] | None = None, reverse: bool = False) -> None:
        self.last = last
        self.fail = fail or {}
        self.under_way: set[int] = set()
        self.asked: list[int] = []
        self.most = 0
        self.stuck: set[int] = set()
        self.rounds = 9 if reverse else 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        page = page_of(request)
        self.asked.append(page)
        self.under_way.add(page)
        self.most = max(self.most, len(self.under_way))
        try:
            for _ in range(max(0, self.rounds - page)):
                await anyio.lowlevel.checkpoint()
            if page in self.stuck:
                await anyio.sleep_forever()
        finally:
            self.under_way.remove(page)
        if page in self.fail:
            return httpx.Response(self.fail[page])
        return httpx.Response(200, json=[page] if page <= self.last else [])


async def settle() -> None:
    for _ in range(60):
        await anyio.lowlevel.checkpoint()


async def test_pages_come_in_order_whichever_answer_comes_first() -> None:
    gauge = Gauge(9, reverse=True)
    async with make(gauge) as client:
        assert await read(client.paginate("/x", pages=PageNumber(), prefetch=4)) == list(range(1, 10))
    assert gauge.most == 4


async def test_at_most_so_many_pages_are_ahead_of_the_loop() -> None:
    gauge = Gauge(50)
    async with make(gauge) as client, client.paginate("/x", pages=PageNumber(), prefetch=3) as items:
        assert gauge.asked == []
        for page in range(1, 10):
            assert await anext(items) == page
            await settle()
            assert sorted(gauge.asked) == list(range(1, page + 4))


async def test_behind_a_cursor_one_page_is_ahead() -> None:
    sandbox = Sandbox(documents=100)
    async with asking(sandbox) as client:
        pages = client.paginate(
            "/api/sites", pages=Cursor(start="", size_param="limit", size=10), items="data", prefetch=4
        )
        async with pages as items:
            await anext(items)
            await settle()
            assert sandbox.record.requests == 2


@pytest.mark.parametrize("status", [404, 500, 400])
async def test_what_lies_behind_the_end_counts_for_nothing(status: int) -> None:
    gauge = Gauge(5, fail=dict.fromkeys(range(7, 20), status))
    async with make(gauge, retry=None) as client:
        assert await read(client.paginate("/x", pages=PageNumber(), prefetch=4)) == [1, 2, 3, 4, 5]
    assert max(gauge.asked) >= 7


async def test_nothing_behind_a_total_is_asked_for() -> None:
    sandbox = Sandbox(documents=40)
    async with asking(sandbox) as client:
        pages = client.paginate("/api/sites", pages=OffsetLimit(size=10, total="total"), items="data", prefetch=9)
        assert len(await read(pages)) == 40
    assert sandbox.record.requests == 4


async def test_an_error_ahead_is_raised_in_its_turn() -> None:
    gauge = Gauge(9, fail={4: 400})
    found: list[Any] = []
    async with make(gauge) as client:
        with pytest.raises(Exception, match="400"):
            await read(client.paginate("/x", pages=PageNumber(), prefetch=5), found)
    assert found == [1, 2, 3]
    assert gauge.under_way == set()


async def test_a_guess_that_was_wrong_is_dropped() -> None:
    asked: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        offset = page_of(request, "offset")
        asked.append(offset)
        size = 3 if offset == 10 else 10  # a short page in the middle
        return httpx.Response(200, json={"data": list(range(offset, min(50, offset + size))), "total": 50})

    async with make(answer) as client:
        pages = client.paginate("/x", pages=OffsetLimit(total="total"), items="data", prefetch=2)
        assert await read(pages) == list(range(50))
    assert {13, 23, 33, 43} <= set(asked)
    assert 20 in asked


@pytest.mark.parametrize("how", ["break", "error", "cancel", "aclose"])
async def test_leaving_early_leaves_nothing(how: str) -> None:
    gauge = Gauge(50)
    gauge.stuck = {3, 4, 5}
    async with make(gauge) as client:
        with anyio.CancelScope() as scope:
            try:
                async with client.paginate("/x", pages=PageNumber(), prefetch=4) as items:
                    async for _ in items:
                        await settle()
                        assert gauge.under_way == {3, 4, 5}
                        if how == "break":
                            break
                        if how == "error":
                            raise ZeroDivisionError
                        if how == "cancel":
                            scope.cancel()
                        if how == "aclose":
                            await items.aclose()
                            await settle()
                            assert gauge.under_way == set()
                            break
                        await anyio.lowlevel.checkpoint()
            except ZeroDivisionError:
                assert how == "error"
        assert scope.cancelled_caught == (how == "cancel")
        assert gauge.under_way == set()


async def test_a_wait_that_was_cancelled_can_be_taken_up_again() -> None:
    gauge = Gauge(4)
    for prefetch in (0, 3):
        gauge.stuck = {2}
        async with make(gauge) as client, client.paginate("/x", pages=PageNumber(), prefetch=prefetch) as items:
            assert await anext(items) == 1
            with anyio.move_on_after(0.005):
                await anext(items)
            gauge.stuck = set()
            if prefetch:  # its call goes on: only the wait for it was cancelled
                assert 2 in gauge.under_way
            else:
                assert [item async for item in items] == [2, 3, 4]


async def test_an_error_of_the_block_is_not_lost_to_a_cancellation_from_further_out() -> None:
    gauge = Gauge(50)
    gauge.stuck = {2, 3, 4}
    async with make(gauge) as client:
        with anyio.CancelScope() as scope, pytest.raises(ZeroDivisionError):  # noqa: PT012 - where it is raised matters
            async with client.paginate("/x", pages=PageNumber(), prefetch=3) as items:
                await anext(items)
                await settle()
                scope.cancel()
                raise ZeroDivisionError
        assert gauge.under_way == set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_takes_its_pages_with_it() -> None:
    gauge = Gauge(50)
    gauge.stuck = {3, 4, 5}
    async with make(gauge) as client:
        before = asyncio.all_tasks()
        task = asyncio.create_task(read(client.paginate("/x", pages=PageNumber(), prefetch=4)))
        while gauge.under_way != {3, 4, 5}:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gauge.under_way == set()
        assert asyncio.all_tasks() == before


class Fatal(BaseException):
    pass


async def test_what_ends_a_call_for_good_comes_through_alone() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if page_of(request) == 3:
            raise Fatal
        return httpx.Response(200, json=[page_of(request)])

    async with make(answer) as client:
        with pytest.raises(Fatal):
            await read(client.paginate("/x", pages=PageNumber(), prefetch=2))


async def test_over_sockets_nothing_is_left_in_use() -> None:
    sandbox = Sandbox(documents=200)
    token1, token2 = sandbox.tokens
    with serve(sandbox) as server:
        async with AsyncLayerClient(token1=token1, token2=token2, base_url=server.url) as client:
            for prefetch in (0, 5):
                pages = client.paginate("/api/sites", pages=OffsetLimit(size=10), items="data", prefetch=prefetch)
                async with pages as items:
                    async for site in items:
                        if site["id"] == 35:
                            break
                assert client.pool.stats.in_use == client.pool.stats.waiting == 0
            pages = client.paginate("/api/sites", pages=OffsetLimit(size=10), items="data", prefetch=5)
            assert [site["id"] for site in await read(pages)] == list(range(1, 201))
            assert client.pool.stats.in_use == 0


def test_what_nobody_pages_is_not_imported() -> None:
    code = "import sys, layer_async; assert 'layer_async._paging' not in sys.modules; layer_async.PageNumber()"
    subprocess.run([sys.executable, "-c", code], check=True)
