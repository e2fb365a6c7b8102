"""The local stand-in for the API: what it serves, refuses, breaks and remembers."""

from __future__ import annotations

import contextlib
import copy
import http.client
import importlib.util
import io
import json
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from layer_async import sandbox as room
from layer_async.sandbox import (
    COLLECTIONS,
    Faults,
    Quota,
    Sandbox,
    SandboxProcess,
    SandboxServer,
    digest,
    document,
    run,
    serve,
    spawn,
)

pytestmark = pytest.mark.anyio

KEY = "a control key"


class Clock:
    """A clock that stands still until it is told to move, and a sleep that moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def headers_of(tokens: tuple[str, str]) -> dict[str, str]:
    return {"Token1": tokens[0], "Token2": tokens[1]}


def talk_to(sandbox: Sandbox, tokens: tuple[str, str] | None = None) -> httpx.AsyncClient:
    """A plain httpx client that reaches `sandbox` in process, with its valid pair if no other is given."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(sandbox), base_url="http://sandbox", headers=headers_of(tokens or sandbox.tokens)
    )


async def ids_by_links(client: httpx.AsyncClient, path: str) -> list[int]:
    """The ids of all documents that following `Link: …; rel="next"` from `path` leads through."""
    found: list[int] = []
    while True:
        response = await client.get(path)
        assert response.status_code == 200
        found += [each["id"] for each in response.json()["data"]]
        if "next" not in response.links:
            return found
        path = response.links["next"]["url"]


# --- documents


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_a_document_is_a_pure_function_of_seed_collection_and_id(collection: str) -> None:
    made = document(collection, 7, seed=3)
    assert made == document(collection, 7, seed=3)
    assert made is not document(collection, 7, seed=3)
    assert made != document(collection, 7, seed=4)
    assert made != document(collection, 8, seed=3)
    assert made["id"] == 7
    assert made["reference"].endswith("-000007")
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_what_a_document_refers_to_exists_wherever_it_does(collection: str) -> None:
    for number in (1, 2, 50, 100_000):
        made = document(collection, number)
        references = {name: value for name, value in made.items() if name.endswith("_id")}
        assert all(1 <= value <= number for value in references.values())
        assert bool(references) is (collection != "customers")


def test_a_document_of_an_unknown_collection_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        document("invoices", 1)


def test_the_first_document_never_changes_between_versions_and_machines() -> None:
    assert digest(document(name, number) for name in COLLECTIONS for number in range(1, 101)) == "757dbd34d66cb444"


def test_a_digest_depends_on_content_and_neither_on_order_nor_on_the_order_of_fields() -> None:
    first, second = document("customers", 1), document("customers", 2)
    assert digest([first, second]) == digest([dict(reversed(second.items())), first])
    assert digest([first, second]) != digest([first, first])
    assert digest([first]) != digest([{**first, "name": "Other"}])
    assert digest([]) == "0" * 16


# --- tokens


async def test_the_right_pair_is_let_in() -> None:
    sandbox = Sandbox(tokens=("one", "two"))
    async with talk_to(sandbox, ("one", "two")) as client:
        response = await client.get("/api/customers/3")
    assert response.status_code == 200
    assert response.json() == document("customers", 3)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "sandbox-1"
    assert sandbox.record.generations == {1: 1}


def test_tokens_come_from_the_seed_unless_they_are_given() -> None:
    assert Sandbox(seed=5).tokens == Sandbox(seed=5).tokens != Sandbox(seed=6).tokens
    assert Sandbox(tokens=("one", "two")).tokens == ("one", "two")
    four = {*Sandbox().tokens, *Sandbox().read_only_tokens}
    assert len(four) == 4


@pytest.mark.parametrize(
    ("headers", "counted"),
    [
        ([], "missing"),
        ([("Token1", "{1}")], "missing"),
        ([("Token2", "{2}")], "missing"),
        ([("Token1", "nonsense"), ("Token2", "{2}")], "unknown"),
        ([("Token1", "{1}"), ("Token2", "nonsense")], "unknown"),
        ([("Token1", "{2}"), ("Token2", "{1}")], "unknown"),
        ([("Token1", "{1}"), ("Token1", "{1}"), ("Token2", "{2}")], "unknown"),
        ([("Token1", "{1}"), ("Token2", "{read-only 2}")], "mixed"),
        ([("Token1", "{old 1}"), ("Token2", "{2}")], "mixed"),
        ([("Token1", "{old 1}"), ("Token2", "{old 2}")], "generations"),
    ],
)
async def test_anything_but_the_valid_pair_is_refused_with_401_and_counted_and_never_echoed(
    headers: list[tuple[str, str]], counted: str
) -> None:
    sandbox = Sandbox()
    old = sandbox.tokens
    assert sandbox.rotate() == 2
    names = {
        "{1}": sandbox.tokens[0],
        "{2}": sandbox.tokens[1],
        "{read-only 2}": sandbox.read_only_tokens[1],
        "{old 1}": old[0],
        "{old 2}": old[1],
    }
    filled = [(name, names.get(value, value)) for name, value in headers]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(sandbox), base_url="http://sandbox") as client:
        response = await client.get("/api/customers/1", headers=filled)
    assert response.status_code == 401
    assert response.json()["error"]["status"] == 401
    assert not any(value in response.text for _, value in filled)
    record = sandbox.record
    seen = {"missing": record.missing, "unknown": record.unknown, "mixed": record.mixed}
    assert seen == {"missing": 0, "unknown": 0, "mixed": 0, **({} if counted == "generations" else {counted: 1})}
    assert record.generations == ({1: 1} if counted == "generations" else {})
    assert record.statuses == {401: 1}


async def test_after_so_many_accepted_requests_the_pair_is_replaced_and_the_old_one_refused() -> None:
    sandbox = Sandbox(rotate_after=3)
    first = sandbox.tokens
    async with talk_to(sandbox, first) as client:
        statuses = [(await client.get(f"/api/sites/{n}")).status_code for n in range(1, 6)]
    assert statuses == [200, 200, 200, 401, 401]
    assert sandbox.tokens != first
    async with talk_to(sandbox) as client:
        assert [(await client.get(f"/api/sites/{n}")).status_code for n in range(1, 6)] == [200] * 5
    assert sandbox.record.rotations == 1
    assert sandbox.record.generations == {1: 5, 2: 5}


async def test_several_rotations_come_after_each_of_the_numbers_given() -> None:
    sandbox = Sandbox(rotate_after=[1, 2])
    for _ in range(4):
        async with talk_to(sandbox) as client:
            assert (await client.get("/api/sites/1")).status_code == 200
    assert sandbox.generation == 3


async def test_the_read_only_pair_may_read_and_nothing_else() -> None:
    sandbox = Sandbox()
    async with talk_to(sandbox, sandbox.read_only_tokens) as client:
        for method in ("GET", "HEAD", "OPTIONS"):
            assert (await client.request(method, "/api/orders/1")).is_success
        for method in ("PUT", "PATCH", "DELETE"):
            assert (await client.request(method, "/api/orders/1", json={})).status_code == 403
        assert (await client.post("/api/orders", json={})).status_code == 403
        assert (await client.get("/api/orders/1")).json() == document("orders", 1)
    sandbox.rotate()
    async with talk_to(sandbox, sandbox.read_only_tokens) as client:
        assert (await client.get("/api/orders/1")).status_code == 200


@pytest.mark.parametrize("path", ["/api/invoices", "/api/invoices/1"])
async def test_no_pair_has_the_level_that_invoices_need(path: str) -> None:
    async with talk_to(Sandbox()) as client:
        response = await client.get(path)
    assert response.status_code == 403
    assert "level" in response.json()["error"]["message"]


def test_a_sandbox_shows_its_tokens_to_nobody_who_did_not_ask() -> None:
    sandbox = Sandbox(tokens=("secret one", "secret two"), control_key="secret three")
    assert repr(sandbox) == "<Sandbox seed=1 documents=5000 generation=1>"
    assert "secret" not in str(sandbox.record)
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="holds tokens"):
            take(sandbox)


# --- collections


@pytest.mark.parametrize(
    "path",
    [
        "/api/customers/0",
        "/api/customers/11",
        "/api/customers/-1",
        "/api/customers/1.0",
        "/api/customers/१",
        "/api/customers/1/sites",
        "/api/nothing",
        "/api/",
        "/",
        "/apix/customers/1",
        "/_sandbox/record",
    ],
)
async def test_what_does_not_exist_is_a_404(path: str) -> None:
    async with talk_to(Sandbox(documents=10)) as client:
        response = await client.get(path)
        assert response.status_code == (200 if path == "/" else 404)


async def test_the_root_says_that_all_this_is_illustrative_and_needs_no_token() -> None:
    sandbox = Sandbox(seed=9)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(sandbox), base_url="http://sandbox") as client:
        about = (await client.get("/")).json()
    assert about["illustrative"] is True
    assert "not public" in about["note"]
    assert about["seed"] == 9
    assert set(about["collections"]) == set(COLLECTIONS)
    assert sandbox.record.requests == 0


@pytest.mark.parametrize("query", ["page_size=7", "limit=7", "offset=0", "cursor=&limit=7", "page=1", "cursor="])
@pytest.mark.parametrize("documents", [0, 1, 7, 21, 60])
async def test_every_way_of_paging_leads_through_every_document_once(query: str, documents: int) -> None:
    async with talk_to(Sandbox(documents=documents)) as client:
        assert await ids_by_links(client, f"/api/contacts?{query}") == list(range(1, documents + 1))


async def test_pages_say_where_they_are() -> None:
    async with talk_to(Sandbox(documents=60)) as client:
        plain = (await client.get("/api/cases")).json()
        paged = (await client.get("/api/cases?page=3&page_size=25")).json()
        sliced = (await client.get("/api/cases?offset=58&limit=5")).json()
        behind = (await client.get("/api/cases?page=4&page_size=25")).json()
        chained = (await client.get("/api/cases?cursor=&limit=50")).json()
        last = (await client.get(f"/api/cases?cursor={chained['next_cursor']}")).json()
    assert [len(each["data"]) for each in (plain, paged, sliced, behind, chained, last)] == [50, 10, 2, 0, 50, 10]
    assert {name: paged[name] for name in ("page", "page_size", "pages", "total")} == {
        "page": 3,
        "page_size": 25,
        "pages": 3,
        "total": 60,
    }
    assert (sliced["offset"], sliced["limit"], sliced["total"]) == (58, 5, 60)
    assert last["next_cursor"] is None
    assert plain["data"][4] == document("cases", 5)


@pytest.mark.parametrize("query", ["page_size=7", "limit=7", "cursor=&limit=7"])
async def test_the_link_to_the_next_page_is_in_the_header_and_in_the_body(query: str) -> None:
    async with talk_to(Sandbox(documents=10)) as client:
        first = await client.get(f"/api/sites?{query}")
        last = await client.get(first.json()["next"])
    assert first.headers["Link"] == f'<{first.json()["next"]}>; rel="next"'
    assert len(last.json()["data"]) == 3
    assert last.json()["next"] is None
    assert "Link" not in last.headers


async def test_pages_can_be_made_to_shift() -> None:
    async with talk_to(Sandbox(documents=7, paging="shifting")) as client:
        pages = [(await client.get(f"/api/sites?page={page}&page_size=3")).json() for page in (1, 2, 3, 4)]
        slices = [(await client.get(f"/api/sites?offset={offset}&limit=3")).json() for offset in (0, 3, 6, 9)]
    for shifting in (pages, slices):
        assert [[each["id"] for each in page["data"]] for page in shifting] == [[1, 2, 3], [3, 4, 5], [5, 6, 7], [7]]
        assert [page["total"] for page in shifting] == [7, 8, 9, 10]
        assert [page["next"] is None for page in shifting] == [False, False, True, True]


@pytest.mark.parametrize("documents", [0, 6, 7])
async def test_the_last_page_can_be_made_to_repeat(documents: int) -> None:
    async with talk_to(Sandbox(documents=documents, paging="repeating")) as client:
        last = (await client.get(f"/api/sites?page={max(1, -(-documents // 3))}&page_size=3")).json()
        for behind in ("page=4&page_size=3", "offset=300&limit=3"):
            assert (await client.get(f"/api/sites?{behind}")).json()["data"] == last["data"]


@pytest.mark.parametrize("query", ["page_size=7", "limit=7", "cursor=&limit=7"])
async def test_the_pages_can_be_made_to_go_round_in_a_circle(query: str) -> None:
    async with talk_to(Sandbox(documents=10, paging="circular")) as client:
        first = (await client.get(f"/api/sites?{query}")).json()
        last = (await client.get(first["next"])).json()
        again = (await client.get(last["next"])).json()
        assert again["data"] == first["data"]
        if "next_cursor" in last:
            assert (await client.get(f"/api/sites?cursor={last['next_cursor']}")).json()["data"][:7] == first["data"]


def test_another_way_of_paging_is_refused() -> None:
    with pytest.raises(ValueError, match="paging must be one of steady, "):
        Sandbox(paging="odd")


@pytest.mark.parametrize(
    "query",
    [
        *("page=0", "page=-1", "page=x", "page=", "page=9999999999", "page_size=201", "page_size=0"),
        *("limit=201", "offset=-1", "offset=1e3", "cursor=AAAAA", "cursor=%C3%A9", "cursor=eA==", "cursor=&limit=0"),
    ],
)
async def test_a_page_that_cannot_be_is_a_400(query: str) -> None:
    async with talk_to(Sandbox()) as client:
        response = await client.get(f"/api/customers?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["message"]


async def test_created_changed_and_deleted_documents_are_seen_by_everything_after() -> None:
    sandbox = Sandbox(documents=5)
    async with talk_to(sandbox) as client:
        created = await client.post("/api/customers", json={"name": "New Ltd", "id": 999})
        assert created.status_code == 201
        assert created.json() == {"name": "New Ltd", "id": 6}
        assert created.headers["location"] == "/api/customers/6"
        assert (await client.get("/api/customers/6")).json() == created.json()
        put = await client.put("/api/customers/2", json={"name": "Whole"})
        assert put.json() == {"name": "Whole", "id": 2} == (await client.get("/api/customers/2")).json()
        patched = await client.patch("/api/customers/3", json={"name": "Part"})
        assert patched.json() == {**document("customers", 3), "name": "Part"}
        for gone in (4, 1):
            deleted = await client.delete(f"/api/customers/{gone}")
            assert (deleted.status_code, deleted.content) == (204, b"")
            for method in ("GET", "PUT", "PATCH", "DELETE"):
                response = await client.request(method, f"/api/customers/{gone}", json={})
                assert response.status_code == 404
        for query in ("page_size=1", "limit=1", "limit=2", "limit=3&offset=0", "cursor=&limit=1", ""):
            assert await ids_by_links(client, f"/api/customers?{query}") == [2, 3, 5, 6]
        assert (await client.get("/api/customers")).json()["total"] == 4
        assert (await client.get("/api/sites/4")).status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"", 400), (b'{"a": "\xff"}', 400), (b"[1]", 422), (b"null", 422), (b"x" * (2**20 + 1), 413)],
)
async def test_a_body_that_is_no_json_object_is_refused_and_nothing_is_executed(content: bytes, status: int) -> None:
    sandbox = Sandbox(documents=1)
    async with talk_to(sandbox) as client:
        assert (await client.post("/api/orders", content=content)).status_code == status
        assert (await client.put("/api/orders/1", content=content)).status_code == status
        assert (await client.get("/api/orders")).json()["total"] == 1
    assert sandbox.record.posts == 0


async def test_methods_that_a_path_does_not_know_are_a_405_that_names_the_others() -> None:
    async with talk_to(Sandbox()) as client:
        for method, path in (("PUT", "/api/orders"), ("POST", "/api/orders/1"), ("BREW", "/api/orders")):
            response = await client.request(method, path, json={})
            assert response.status_code == 405
            assert method not in response.headers["allow"].split(", ")
        options = await client.options("/api/orders/1")
        assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, PUT, PATCH, DELETE")


async def test_head_tells_the_length_and_serves_nothing() -> None:
    sandbox = Sandbox()
    async with talk_to(sandbox) as client:
        head, get = await client.head("/api/orders/1"), await client.get("/api/orders/1")
    assert head.headers["content-length"] == get.headers["content-length"]
    assert sandbox.record.served["orders"].tolist() == [0, 1]


async def test_below_another_path_links_still_lead_to_the_sandbox() -> None:
    sandbox = Sandbox(documents=60)
    app = Starlette(routes=[Mount("/base", sandbox)])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://sandbox", headers=headers_of(sandbox.tokens)
    ) as client:
        assert await ids_by_links(client, "/base/api/orders") == list(range(1, 61))
        location = (await client.post("/base/api/orders", json={})).headers["location"]
        assert (await client.get(location)).json() == {"id": 61}


# --- quota


async def test_above_the_quota_requests_are_told_to_wait_whole_seconds_and_then_let_in() -> None:
    clock = Clock()
    sandbox = Sandbox(quota=Quota(rate=0.5, burst=2), clock=clock)
    async with talk_to(sandbox) as client:
        assert [(await client.get("/api/sites/1")).status_code for _ in range(2)] == [200, 200]
        refused = await client.get("/api/sites/1")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "2"
        assert not [name for name in refused.headers if name.startswith("x-ratelimit")]
        clock.now += 1.9
        again = await client.get("/api/sites/1")
        assert (again.status_code, again.headers["retry-after"]) == (429, "1")
        clock.now += 0.1
        assert (await client.get("/api/sites/1")).status_code == 200
    assert sandbox.record.rate_limited == 2


async def test_a_fixed_window_opens_again_when_it_is_over() -> None:
    clock = Clock()
    sandbox = Sandbox(quota=Quota(rate=0.2, window=10, headers=True), clock=clock)
    async with talk_to(sandbox) as client:
        clock.now += 4
        seen = [await client.get("/api/sites/1") for _ in range(3)]
        assert [each.status_code for each in seen] == [200, 200, 429]
        assert seen[2].headers["retry-after"] == "6"
        assert [each.headers["x-ratelimit-remaining"] for each in seen] == ["1", "0", "0"]
        assert {each.headers["x-ratelimit-limit"] for each in seen} == {"2"}
        assert {each.headers["x-ratelimit-reset"] for each in seen} == {"6"}
        clock.now += 23
        late = [await client.get("/api/sites/1") for _ in range(3)]
        assert [each.status_code for each in late] == [200, 200, 429]
        assert late[2].headers["retry-after"] == "3"


async def test_a_quota_can_drop_to_a_third_and_come_back() -> None:
    clock = Clock()
    bucket = Sandbox(quota=Quota(rate=3, burst=3, drop=(10, 20)), clock=clock)
    window = Sandbox(quota=Quota(rate=3, window=2, drop=(10, 20)), clock=clock)
    clock.now += 100  # it counts from the first request

    async def admitted(sandbox: Sandbox, tries: int) -> int:
        before = sandbox.record.admitted
        async with talk_to(sandbox) as client:
            for _ in range(tries):
                await client.get("/api/sites/1")
        return sandbox.record.admitted - before

    for wait, in_bucket, in_window in ((0, 3, 6), (9, 3, 6), (2, 2, 2), (1, 1, 2), (9, 3, 6)):
        clock.now += wait
        assert (await admitted(bucket, 9), await admitted(window, 9)) == (in_bucket, in_window)
    assert bucket.record.admitted == bucket.record.statuses[200] == 12
    assert bucket.record.rate_limited == 9 * 5 - 12
    assert bucket.record.summary()["admitted"] == 12


async def test_a_quota_need_not_say_when_to_come_again() -> None:
    sandbox = Sandbox(quota=Quota(rate=1, retry_after=False), clock=Clock())
    async with talk_to(sandbox) as client:
        await client.get("/api/sites/1")
        refused = await client.get("/api/sites/1")
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers


@pytest.mark.parametrize("drop", [(5, 5), (5, 4), (-1, 4), (1, float("nan"))])
def test_a_drop_ends_after_it_began(drop: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="drop must be two numbers of seconds"):
        Quota(rate=1, drop=drop)


async def test_a_bucket_tells_what_is_left_of_it_and_never_holds_more_than_its_burst() -> None:
    clock = Clock()
    sandbox = Sandbox(quota=Quota(rate=10, headers=True), clock=clock)
    async with talk_to(sandbox) as client:
        first = await client.get("/api/sites/1")
        assert (first.headers["x-ratelimit-remaining"], first.headers["x-ratelimit-reset"]) == ("9", "0")
        clock.now += 3600
        assert [(await client.get("/api/sites/1")).status_code for _ in range(11)] == [200] * 10 + [429]


async def test_requests_with_refused_tokens_use_up_no_quota() -> None:
    sandbox = Sandbox(quota=Quota(rate=1), clock=Clock())
    async with talk_to(sandbox, ("wrong", "pair")) as client:
        assert [(await client.get("/api/sites/1")).status_code for _ in range(3)] == [401] * 3
    async with talk_to(sandbox) as client:
        assert [(await client.get("/api/sites/1")).status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize(
    ("quota", "capacity"),
    [
        (Quota(rate=10), 10),
        (Quota(rate=0.1), 1),
        (Quota(rate=10, burst=3), 3),
        (Quota(rate=10, window=2), 20),
        (Quota(rate=0.1, window=2), 1),
    ],
)
def test_a_quota_admits_at_once_what_it_holds_and_at_least_one(quota: Quota, capacity: int) -> None:
    assert quota.capacity == capacity


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"rate": float("nan")}, {"rate": 1, "burst": 0}, {"rate": 1, "window": -1}]
)
def test_a_quota_of_nothing_is_a_value_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Quota(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"documents": -1},
        {"documents": "5"},
        {"documents": True},
        {"documents": None},
        {"rotate_after": 0},
        {"rotate_after": [5, 0]},
        {"rotate_after": "7"},
        {"tokens": "hush"},
        {"tokens": ("hush",)},
        {"tokens": ("hush", "")},
        {"tokens": ("hush", 7)},
        {"quota": 7},
        {"faults": None},
        {"control_key": b"hush"},
    ],
)
def test_a_sandbox_of_the_impossible_is_a_value_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must be|, {next(iter(wrong))} of at least") as caught:
        Sandbox(**wrong)
    assert "hush" not in str(caught.value)


# --- faults


@pytest.mark.parametrize(
    ("faults", "status", "retry_after"),
    [
        (Faults(unavailable=1.0), 503, None),
        (Faults(overloaded=1.0, retry_after=7), 503, "7"),
        (Faults(internal_error=1.0), 500, None),
        (Faults(expired=1.0), 401, None),
    ],
)
async def test_a_refusing_fault_comes_before_the_request_is_executed(
    faults: Faults, status: int, retry_after: str | None
) -> None:
    sandbox = Sandbox(faults=faults)
    async with talk_to(sandbox) as client:
        response = await client.post("/api/orders", json={"request_key": "a"})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert sandbox.record.posts == 0
    assert sandbox.record.faults.total() == 1


async def test_expired_tokens_are_replaced_so_that_only_a_newer_pair_is_let_in() -> None:
    sandbox = Sandbox(faults=Faults(expired=1.0, at_most=1))
    old = sandbox.tokens
    async with talk_to(sandbox, old) as client:
        assert [(await client.get("/api/orders/1")).status_code for _ in range(3)] == [401, 401, 401]
    async with talk_to(sandbox) as client:
        assert (await client.get("/api/orders/1")).status_code == 200
    assert sandbox.record.rotations == 1


async def test_latency_and_a_slow_body_take_the_time_they_are_given_and_change_nothing() -> None:
    for faults, naps in ((Faults(latency=1.0, delay=0.4), [0.4]), (Faults(slow_body=1.0, delay=0.4), [0.05] * 8)):
        clock = Clock()
        sandbox = Sandbox(faults=faults, clock=clock, sleep=clock.sleep)
        async with talk_to(sandbox) as client:
            assert (await client.get("/api/orders/1")).json() == document("orders", 1)
        assert clock.slept == pytest.approx(naps)
        assert sandbox.record.served["orders"].tolist() == [0, 1]


async def test_a_cut_body_comes_after_the_request_was_executed_and_is_not_counted_as_served() -> None:
    sandbox = Sandbox(documents=2, faults=Faults(cut_body=1.0, at_most=1))
    async with talk_to(sandbox) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/api/orders/1")
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/api/orders", json={"request_key": "a"})
        assert sandbox.record.served == {}
        assert sandbox.record.posts == 1
        await client.post("/api/orders", json={"request_key": "a"})
        await client.post("/api/orders", json={"request_key": "b"})
        await client.post("/api/orders", json={"request_key": 7})
    assert sandbox.record.posts == 4
    assert sandbox.record.executions == {"a": 2, "b": 1}
    assert sandbox.record.executed_twice == ["a"]
    assert sandbox.record.faults == {"cut_body": 2}
    assert sandbox.record.in_flight == 0


@pytest.mark.parametrize("faults", [Faults(cut_body=1.0), Faults(slow_body=1.0)])
async def test_an_answer_without_a_body_can_be_neither_cut_nor_slow(faults: Faults) -> None:
    sandbox = Sandbox(faults=faults)
    async with talk_to(sandbox) as client:
        assert (await client.delete("/api/orders/1")).status_code == 204
    assert sandbox.record.faults == {}


async def test_what_a_request_meets_does_not_depend_on_the_order_of_the_others() -> None:
    async def fetch(order: list[int]) -> dict[int, list[int]]:
        clock = Clock()
        faults = Faults(unavailable=0.2, overloaded=0.1, internal_error=0.1, latency=0.1, at_most=None)
        sandbox = Sandbox(seed=11, faults=faults, sleep=clock.sleep)
        met: dict[int, list[int]] = {}
        async with talk_to(sandbox) as client:
            for number in order:
                met.setdefault(number, []).append((await client.get(f"/api/orders/{number}")).status_code)
        return met

    forwards, backwards = await fetch([*range(1, 41)] * 2), await fetch([n for n in range(40, 0, -1) for _ in range(2)])
    assert forwards == backwards
    assert {status for statuses in forwards.values() for status in statuses} == {200, 500, 503}


async def test_after_so_many_faults_a_request_is_spared() -> None:
    sandbox = Sandbox(faults=Faults(unavailable=1.0))
    async with talk_to(sandbox) as client:
        assert [(await client.get("/api/orders/1")).status_code for _ in range(4)] == [503, 503, 200, 200]
        assert (await client.get("/api/orders/1?again")).status_code == 503


def test_faults_are_as_frequent_as_their_probabilities() -> None:
    faults = Faults.spread(0.6, delay=0.0)
    drawn = [faults.draw(1, f"GET /api/orders/{number}", 1) for number in range(6000)]
    for kind in room.FAULT_KINDS:
        assert drawn.count(kind) == (0 if kind == "expired" else pytest.approx(600, abs=90))
    assert faults.delay == 0.0
    assert drawn != [faults.draw(2, f"GET /api/orders/{number}", 1) for number in range(6000)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"unavailable": -0.1},
        {"unavailable": 1.1},
        {"unavailable": float("nan")},
        {"unavailable": 0.6, "latency": 0.6},
        {"retry_after": 0},
        {"delay": -1.0},
        {"delay": float("inf")},
        {"at_most": -1},
    ],
)
def test_faults_that_cannot_be_are_a_value_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Faults(**wrong)


async def test_an_outage_refuses_everything_until_it_is_over() -> None:
    clock = Clock()
    sandbox = Sandbox(clock=clock)
    sandbox.outage(5)
    async with talk_to(sandbox) as client:
        assert (await client.get("/api/orders/1")).status_code == 503
        clock.now += 5
        assert (await client.get("/api/orders/1")).status_code == 200
    assert sandbox.record.generations == {1: 1}


# --- the record


async def test_the_record_knows_what_was_served_and_its_digest_is_that_of_the_documents() -> None:
    sandbox = Sandbox(documents=60)
    async with talk_to(sandbox) as client:
        fetched = [(await client.get(f"/api/sites/{number}")).json() for number in (3, 9)]
        assert sandbox.record.served_digest == digest(fetched)
        await client.get("/api/sites/9")
        await client.get("/api/sites/61")
        assert sandbox.record.served_digest == digest(fetched)
        paged = (await client.get("/api/cases?page_size=5")).json()["data"]
    record = sandbox.record
    assert record.served_digest == digest(fetched + paged)
    assert [number for number, times in enumerate(record.served["sites"]) for _ in range(times)] == [3, 9, 9]
    assert record.paths["GET /api/sites/9"] == 2
    assert record.paths["GET /api/cases"] == 1
    assert record.requests == 5
    assert record.statuses == {200: 4, 404: 1}
    summary = json.loads(json.dumps(record.summary()))
    assert summary["served"] == {"sites": {"documents": 2, "times": 3}, "cases": {"documents": 5, "times": 5}}
    assert summary["served_digest"] == record.served_digest
    assert summary["seed"] == 1
    assert "paths" not in summary


async def test_the_record_knows_how_many_requests_were_under_way_at_once() -> None:
    gate = anyio.Event()
    waiting = 0

    async def wait(_: float) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 3:
            gate.set()
        await gate.wait()

    sandbox = Sandbox(faults=Faults(latency=1.0), sleep=wait)
    async with talk_to(sandbox) as client:
        async with anyio.create_task_group() as tasks:
            for number in (1, 2, 3):
                tasks.start_soon(client.get, f"/api/sites/{number}")
        await client.get("/api/sites/4")
    assert sandbox.record.max_concurrency == 3
    assert sandbox.record.in_flight == 0


async def test_a_cancelled_request_is_no_longer_in_flight() -> None:
    sandbox = Sandbox(faults=Faults(latency=1.0), sleep=lambda _: anyio.sleep_forever())
    async with talk_to(sandbox) as client:
        with anyio.move_on_after(0.005) as scope:
            await client.get("/api/sites/1")
    assert scope.cancelled_caught
    assert sandbox.record.in_flight == 0


async def test_a_caller_that_leaves_while_it_sends_executes_nothing() -> None:
    sandbox = Sandbox()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(name.lower().encode(), value.encode()) for name, value in headers_of(sandbox.tokens).items()]
    scope = {"type": "http", "method": "POST", "path": "/api/orders", "query_string": b"", "headers": headers}
    await sandbox(scope, receive, send)
    assert sent == []
    assert (sandbox.record.posts, sandbox.record.in_flight) == (0, 0)


async def test_a_server_may_start_it_and_stop_it_but_speaks_http_to_it() -> None:
    sandbox = Sandbox()
    told: list[str] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        told.append(message["type"])

    await sandbox({"type": "lifespan"}, receive, send)
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(ValueError, match="only http"):
        await sandbox({"type": "websocket"}, receive, send)


# --- control


async def test_without_a_control_key_there_is_no_control() -> None:
    sandbox = Sandbox()
    async with talk_to(sandbox) as client:
        for key in ("", "None", KEY):
            assert (await client.get("/_sandbox/tokens", headers={"X-Sandbox-Key": key})).status_code == 404


@pytest.mark.parametrize("headers", [{}, {"X-Sandbox-Key": "wrong"}, {"X-Sandbox-Key": ""}])
async def test_with_a_wrong_control_key_there_is_no_control_either(headers: dict[str, str]) -> None:
    sandbox = Sandbox(control_key=KEY)
    async with talk_to(sandbox) as client:
        for method, path in (("GET", "tokens"), ("GET", "record"), ("POST", "rotate"), ("POST", "outage")):
            response = await client.request(method, f"/_sandbox/{path}", headers=headers)
            assert response.status_code == 403
            assert sandbox.tokens[0] not in response.text
    assert sandbox.generation == 1


async def test_with_the_control_key_everything_can_be_asked_and_done() -> None:
    clock = Clock()
    sandbox = Sandbox(control_key=KEY, clock=clock)
    async with talk_to(sandbox) as client:
        await client.get("/api/sites/2")

    async def ask(method: str, action: str) -> Any:
        async with talk_to(sandbox) as client:
            response = await client.request(method, f"/_sandbox/{action}", headers={"X-Sandbox-Key": KEY})
        return response.json() if response.status_code == 200 else response.status_code

    assert await ask("GET", "record") == json.loads(json.dumps(sandbox.record.summary()))
    assert await ask("GET", "paths") == {"GET /api/sites/2": 1}
    assert await ask("GET", "served") == {"sites": [0, 0, 1]}
    assert await ask("POST", "rotate") == {"generation": 2}
    to_come = (await ask("GET", "tokens"))["next_tokens"]
    assert await ask("POST", "rotate") == {"generation": 3}
    assert to_come == list(sandbox.tokens)
    assert await ask("GET", "tokens") == {
        "generation": 3,
        "tokens": list(sandbox.tokens),
        "next_tokens": list(sandbox.next_tokens),
        "read_only_tokens": list(sandbox.read_only_tokens),
    }
    assert await ask("POST", "outage?milliseconds=250") == {"seconds": 0.25}
    assert await ask("POST", "outage?milliseconds=x") == 400
    assert await ask("GET", "rotate") == 404
    assert await ask("GET", "nothing") == 404
    async with talk_to(sandbox) as client:
        assert (await client.get("/api/sites/2")).status_code == 503
        clock.now += 0.25
        assert (await client.get("/api/sites/2")).status_code == 200


# --- a real server in a thread


@pytest.fixture(scope="module")
def server() -> Iterator[SandboxServer]:
    with serve(Sandbox(documents=200, faults=Faults(delay=0.005))) as served:
        yield served


async def test_over_a_socket_it_serves_what_it_serves_in_process(server: SandboxServer) -> None:
    headers = headers_of(server.sandbox.tokens)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as client:
        assert (await client.get("/api/customers/5")).json() == document("customers", 5)
        assert (await client.head("/api/customers/5")).content == b""
        created = await client.post("/api/customers", json={"name": "New"})
        assert (created.status_code, created.json()["name"]) == (201, "New")
        assert (await client.delete(f"/api/customers/{created.json()['id']}")).status_code == 204
        assert (await client.get("/api/customers/5", headers={"Token2": "wrong"})).status_code == 401
        assert len(await ids_by_links(client, "/api/customers?limit=150")) == 200
    assert server.sandbox.record.in_flight == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_over_a_socket_a_cut_body_is_a_connection_closed_before_its_content_length() -> None:
    sandbox = Sandbox(faults=Faults(cut_body=1.0, at_most=1))
    with serve(sandbox) as server:
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers_of(sandbox.tokens), trust_env=False
        ) as client:
            async with client.stream("GET", "/api/customers/1") as response:
                received: list[bytes] = []

                async def read() -> None:
                    async for chunk in response.aiter_raw():
                        received.append(chunk)

                with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
                    await read()
            assert len(b"".join(received)) == int(response.headers["content-length"]) // 2
            assert (await client.get("/api/customers/1")).json() == document("customers", 1)


def test_over_a_socket_a_slow_body_arrives_whole() -> None:
    sandbox = Sandbox(faults=Faults(slow_body=1.0, delay=0.008))
    with serve(sandbox) as server:
        response = httpx.get(f"{server.url}/api/customers/1", headers=headers_of(sandbox.tokens), trust_env=False)
    assert response.json() == document("customers", 1)
    assert sandbox.record.faults == {"slow_body": 1}


def test_the_end_of_serve_drops_what_is_under_way_and_leaves_no_thread_and_no_port(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sandbox = Sandbox(faults=Faults(latency=1.0, delay=3600))
    before = set(threading.enumerate())
    with serve(sandbox) as server:
        host, _, port = server.url.removeprefix("http://").partition(":")
        idle = socket.create_connection((host, int(port)))
        busy = socket.create_connection((host, int(port)))
        lines = [f"{name}: {value}" for name, value in headers_of(sandbox.tokens).items()]
        busy.sendall("\r\n".join(["GET /api/sites/1 HTTP/1.1", "Host: x", *lines, "", ""]).encode())
        while not sandbox.record.in_flight:
            time.sleep(0.001)
        caplog.set_level("ERROR", "uvicorn.error")
    for connection in (idle, busy):
        with connection, contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert "graceful" not in caplog.text  # uvicorn did not have to wait for anything
    assert set(threading.enumerate()) == before
    assert sandbox.record.in_flight == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_what_fails_inside_serve_ends_it_and_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError), serve(Sandbox()):
        raise KeyError


def test_a_port_in_use_is_an_os_error_at_once(server: SandboxServer) -> None:
    with (
        pytest.raises(OSError, match="already in use"),
        serve(Sandbox(), port=int(server.url.rpartition(":")[2])),
    ):
        pass


def test_answers_do_not_wait_for_a_delayed_ack() -> None:
    """asyncio sets TCP_NODELAY on an accepted socket only if the listening one names its protocol."""
    with room._listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_an_ipv6_address_is_served_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serve(Sandbox(), host="::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert httpx.get(server.url, trust_env=False).status_code == 200


def test_run_serves_until_ctrl_c_and_then_returns() -> None:
    answers: list[int] = []

    def interrupt(url: str) -> None:
        answers.append(httpx.get(url, trust_env=False).status_code)
        os.kill(os.getpid(), signal.SIGINT)

    threads: list[threading.Thread] = []

    def on_start(url: str) -> None:
        threads.append(threading.Thread(target=interrupt, args=(url,)))
        threads[0].start()

    run(Sandbox(), port=0, on_start=on_start)
    threads[0].join()
    assert answers == [200]


def test_run_needs_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(room._Server, "run_here", lambda server: ran.append(server))
    run(Sandbox(), port=0)
    assert len(ran) == 1


# --- a process of its own


def test_the_child_serves_what_it_was_ordered_until_its_standard_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    answers: list[Any] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            url = self.getvalue().strip()

            def ask() -> None:
                answers.append(httpx.get(f"{url}/api/orders/3", headers=headers_of(("a", "b")), trust_env=False))
                os.close(writing)

            threading.Thread(target=ask).start()

    order = {"host": "127.0.0.1", "port": 0, "control_key": "key", "seed": 4, "documents": 5, "tokens": ["a", "b"]}
    order |= {"quota": None, "faults": {}, "rotate_after": None}
    os.write(writing, json.dumps(order).encode() + b"\n")
    with open(reading, "rb", buffering=0) as buffer:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=buffer, fileno=buffer.fileno))
        monkeypatch.setattr(sys, "stdout", Output())
        room.main()
    assert [answer.json() for answer in answers] == [document("orders", 3, seed=4)]


@pytest.fixture(scope="module")
def process() -> Iterator[SandboxProcess]:
    with spawn(seed=4, documents=50, tokens=("the first", "the second"), rotate_after=[1000]) as child:
        yield child


def test_a_process_of_its_own_serves_and_can_be_asked(process: SandboxProcess) -> None:
    assert process.tokens() == ("the first", "the second")
    assert process.pid != os.getpid()
    with httpx.Client(base_url=process.url, headers=headers_of(process.tokens()), trust_env=False) as client:
        fetched = [client.get(f"/api/orders/{number}").json() for number in range(1, 4)]
        assert fetched == [document("orders", number, seed=process.seed) for number in range(1, 4)]
        assert client.get(f"/api/orders/{process.documents + 1}").status_code == 404
        record = process.record()
        assert record["statuses"] == {"200": 3, "404": 1}
        assert record["served_digest"] == digest(fetched)
        assert process.served() == {"orders": [0, 1, 1, 1]}
        assert process.paths()["GET /api/orders/1"] == 1
        assert process.rotate() == 2
        assert process.tokens() != ("the first", "the second")
        assert client.get("/api/orders/1").status_code == 401
        client.headers.update(headers_of(process.read_only_tokens()))
        assert client.delete("/api/orders/1").status_code == 403
        process.outage(30)
        assert client.get("/api/orders/1").status_code == 503


def test_a_process_shows_no_secret_to_those_who_look_at_it(process: SandboxProcess) -> None:
    assert repr(process) == f"<SandboxProcess pid={process.pid} url={process.url} seed=4>"
    proc = pathlib.Path("/proc", str(process.pid))
    if not proc.exists():
        pytest.skip("this system has no /proc")
    seen = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
    for secret in ("the first", "the second", process._control_key):
        assert secret.encode() not in seen


def test_quota_and_faults_reach_the_process() -> None:
    quota, faults = Quota(rate=0.001, burst=3, headers=True, drop=(1, 2)), Faults(unavailable=1.0, at_most=1)
    with spawn(quota=quota, faults=faults, rotate_after=4) as child:
        headers = headers_of(child.tokens())
        met = [httpx.get(f"{child.url}/api/sites/1", headers=headers, trust_env=False) for _ in range(5)]
        assert [each.status_code for each in met] == [503, 200, 200, 429, 401]
        assert met[2].headers["x-ratelimit-limit"] == "3"
        assert child.record()["rotations"] == 1


def test_a_control_that_is_refused_is_an_error() -> None:
    with spawn(documents=1) as child:
        with pytest.raises(http.client.HTTPException, match="was answered 400"):
            child.outage(0)
        child._control_key = "wrong"
        with pytest.raises(http.client.HTTPException, match="was answered 403"):
            child.tokens()
    with pytest.raises(OSError, match="refused"):
        child.record()


def test_a_process_that_does_not_start_is_an_error_that_names_its_end(
    server: SandboxServer, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="ended with 1"):
        spawn(port=int(server.url.rpartition(":")[2]))
    assert "already in use" in capfd.readouterr().err


def test_a_process_that_is_dead_before_its_order_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(subprocess.Popen[bytes]):
        def __init__(self, args: list[str], **options: Any) -> None:
            super().__init__([args[0], "-c", ""], **options)
            self.wait()

    monkeypatch.setattr(subprocess, "Popen", Dead)
    with pytest.raises(RuntimeError, match="ended with 0"):
        spawn()


def test_a_process_that_does_not_end_when_asked_is_killed() -> None:
    child = spawn(documents=1)
    os.kill(child.pid, signal.SIGSTOP)
    child.close(timeout=0.01)
    assert child._process.returncode == -signal.SIGKILL


def test_a_process_ends_when_the_one_that_made_it_dies() -> None:
    script = "import signal; from layer_async import sandbox; child = sandbox.spawn(documents=1)\n"
    script += "print(child.url, flush=True); signal.pause()"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().decode().strip()
        assert httpx.get(url, trust_env=False).status_code == 200
        parent.kill()
    host, _, port = url.removeprefix("http://").partition(":")
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    pytest.fail("the child outlived its parent")


# --- what it needs


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.requests"])
def test_without_the_extra_the_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location("sandbox_without_extra", room.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'layer-async\[sandbox\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_hundred_thousand_documents_cost_nothing_until_they_are_asked_for() -> None:
    sandbox = Sandbox(documents=100_000)
    assert all(not each._changed and not each._deleted for each in sandbox._collections.values())
    assert len(sandbox._collections["orders"]) == 100_000
