"""What type checkers infer for a user's code. Not run: mypy and pyright check it, each assertion as a test."""

from __future__ import annotations

from typing import Any, TypedDict, assert_type

import attrs
import httpx

from layer_async import (
    AsyncLayerClient,
    Bulk,
    Cursor,
    DualTokenAuth,
    LinkHeader,
    NextLink,
    OffsetLimit,
    Outcome,
    PageNumber,
    Pages,
    RetryPolicy,
    TokenPair,
    decode,
)


@attrs.frozen
class Customer:
    id: int


class Site(TypedDict):
    id: int


async def verbs(client: AsyncLayerClient) -> None:
    assert_type(await client.get("/x"), httpx.Response)
    assert_type(await client.get("/x", into=Customer), Customer)
    assert_type(await client.get("/x", into=list[Customer]), list[Customer])
    assert_type(await client.get("/x", into=dict[str, Site]), dict[str, Site])
    assert_type(await client.get("/x", into=Customer | None), Customer | None)
    assert_type(await client.get("/x", into=Any), Any)
    assert_type(await client.post("/x", json=Customer(1), into=Customer, idempotent=True), Customer)
    assert_type(await client.put("/x", content=b"", deadline=None, retry=RetryPolicy(attempts=2)), httpx.Response)
    assert_type(await client.patch("/x", data={"a": 1}, into=Site), Site)
    assert_type(await client.delete("/x", timeout=3), httpx.Response)
    assert_type(await client.request("PURGE", "/x", into=Site), Site)
    async with client.stream("GET", "/x", params={"a": 1}) as response:
        assert_type(response, httpx.Response)


async def many(client: AsyncLayerClient) -> None:
    assert_type(await client.fetch_all(["/x"]), list[httpx.Response])
    assert_type(await client.fetch_all(["/x"], into=Customer), list[Customer])
    async with client.bulk(["/x"], into=Customer) as outcomes:
        async for outcome in outcomes:
            assert_type(outcome, Outcome[str, Customer])
            assert_type(outcome.unwrap(), Customer)

    async def count(number: int) -> float:
        return number / 2

    assert_type(client.bulk(range(3), count), Bulk[int, float])
    assert_type(client.bulk(range(3), count, key=str), Bulk[str, float, int])


async def paging(client: AsyncLayerClient) -> None:
    async for customer in client.paginate("/x", pages=PageNumber(total="total"), items="data", into=Customer):
        assert_type(customer, Customer)
    async with client.paginate("/x", pages=OffsetLimit(size=9), into=Site, key="id", prefetch=4, deadline=9) as sites:
        assert_type(sites, Pages[Site])
        async for site in sites:
            assert_type(site, Site)
    assert_type(client.paginate("/x", pages=LinkHeader(), items=lambda document: document["data"]), Pages[Any])
    cursor = Cursor(at=("a.b", "c"))
    assert_type(client.paginate("/x", pages=cursor, items=("a", "b"), into=int | None), Pages[int | None])

    async def fetch(customer: Customer) -> Site:
        return await client.get(f"/x/{customer.id}", into=Site)

    customers = client.paginate("/x", pages=NextLink(), items="data", into=Customer)
    assert_type(client.bulk(customers, fetch), Bulk[Customer, Site])


async def parts(client: AsyncLayerClient, response: httpx.Response) -> None:
    assert_type(decode(response, list[Customer]), list[Customer])
    assert_type(client.with_options(tokens=TokenPair("a", "b"), retry=None), AsyncLayerClient)
    assert_type(DualTokenAuth(TokenPair("a", "b"), origin="https://host.invalid"), DualTokenAuth)
