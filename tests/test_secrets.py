"""No token, header or query value is in an error, a log line, a repr, or a local variable of ours in a traceback."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import attrs
import httpx
import msgspec
import pytest

from layer_async import AsyncLayerClient, LayerError, NotFoundError, RetryPolicy, TokenPair
from layer_async._exchange import ExchangeRecord

from .faultserver import Exchange, FaultServer

pytestmark = pytest.mark.anyio

ONE, TWO = "5ecret-token-one-7d1f", "5ecret-token-two-93ac"
HEADER, QUERY, BODY = "5ecret-header", "5ecret-query", "5ecret-body"


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    id: int


@attrs.define
class Customer:
    id: int


def echo(kind: str) -> Callable[[Exchange], None]:
    """A server that says the tokens back, in one place or another."""

    def behave(ex: Exchange) -> None:
        token = ex.request.headers.get("token1", ONE)
        if kind == "status":
            ex.respond(b'{"message": "%s"}' % token.encode(), status=f"400 {token}", headers=f"X-Echo: {token}\r\n")
        elif kind == "head":
            ex.send(b"HTTP/1.1 200 OK\r\nEcho " + token.encode() + b"\r\n\r\n")
            ex.close()
        elif kind == "location":
            ex.respond(b"", status="302 Found", headers=f"Location: https://evil.invalid:{token}/\r\n")
        elif kind == "query":
            ex.respond(b"", status="302 Found", headers=f"Location: /elsewhere?was={token}\r\n")
        elif kind == "redirect":
            ex.respond(
                token.encode(), status="302 Found", headers=f"Location: https://{token}.evil.invalid/{token}\r\n"
            )
        else:
            ex.respond(b'%s{"%s": 1}' % (b"\xef\xbb\xbf" if kind == "marked" else b"", token.encode()))

    return behave


def shown(error: BaseException, *, with_frames: bool = True) -> str:
    """All that an error tells, and all that a reporter of errors would take along from frames of ours."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    parts = [f"{link!s} {link!r} {link.__dict__!r}" for link in chain]
    for link in chain if with_frames else ():
        summary = traceback.TracebackException.from_exception(link, capture_locals=True)
        for frame in summary.stack:
            if "/layer_async/" in frame.filename and frame.locals:
                parts.append(f"{frame.name}: {frame.locals}")
    if isinstance(error, LayerError):
        parts.append(repr(pickle.loads(pickle.dumps(error)).__dict__))
    return "\n".join(parts)


@pytest.mark.parametrize("kind", ["status", "head", "location", "redirect", "query", "unknown-field", "marked"])
async def test_what_a_server_echoes_is_in_no_error_and_no_log(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "layer_async")
    with FaultServer() as server:
        server.behaviours["echo"] = echo(kind)
        async with AsyncLayerClient(token1=ONE, token2=TWO, base_url=server.url, retry=None) as client:
            into: Any = Strict if kind in ("unknown-field", "marked") else Customer
            with pytest.raises(LayerError) as caught:
                await client.get("/echo/1", into=into)
    assert ONE not in shown(caught.value)
    assert ONE not in caplog.text


@pytest.mark.parametrize("behaviour", ["status/500", "reset", "garbage", "truncate-length", "status/200"])
@pytest.mark.parametrize("verb", ["get", "post", "request", "stream"])
async def test_the_frames_of_a_failed_call_hold_no_secret(behaviour: str, verb: str) -> None:
    retry = RetryPolicy(attempts=2, backoff_initial=1e-9)
    with FaultServer() as server:
        async with AsyncLayerClient(
            token1=ONE, token2=TWO, base_url=server.url, retry=retry, headers={"X-Own": HEADER}
        ) as client:
            path = f"/{behaviour}?q={QUERY}"
            options: dict[str, Any] = {"headers": {"X-Key": HEADER}, "params": {"p": QUERY}}
            try:
                if verb == "stream":
                    async with client.stream("POST", path, content=BODY, **options) as response:
                        await response.aread()
                elif verb == "request":
                    await client.request("PUT", path, json={"b": BODY}, into=Customer, **options)
                elif verb == "post":
                    await client.post(path, data={"b": BODY}, into=Customer, **options)
                else:
                    await client.get(path, into=Customer, **options)
            except LayerError as exc:
                text = shown(exc)
            else:
                text = ""
    assert "5ecret" not in text


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": -1},
        {"headers": {"Token1": HEADER}},
        {"headers": {"X A": HEADER}},
        {"base_url": "https://user:5ecret@host.invalid"},
        {"proxy": "ftp://user:5ecret@host.invalid"},
        {"tokens": lambda: TokenPair(ONE, TWO)},
        {"token2": f"{TWO}\n"},
        {"limits": 7, "proxy": "http://user:5ecret@host.invalid:1"},
    ],
)
async def test_a_client_that_cannot_be_made_leaves_no_secret_in_its_frames(options: dict[str, Any]) -> None:
    with pytest.raises(LayerError) as caught:
        AsyncLayerClient(**({"token1": ONE, "token2": TWO} | options))
    assert "5ecret" not in shown(caught.value)


async def test_a_view_that_cannot_be_made_leaves_no_secret_in_its_frames() -> None:
    async with AsyncLayerClient(token1=ONE, token2=TWO) as client:
        for options in ({"tokens": (ONE, TWO)}, {"headers": {"X A": HEADER}}, {"headers": {"X": HEADER}, "timeout": 0}):
            with pytest.raises(LayerError) as caught:
                client.with_options(**options)
            assert "5ecret" not in shown(caught.value)


async def test_what_a_401_echoes_is_in_no_frame_when_the_source_fails_then() -> None:
    pairs = [TokenPair(ONE, TWO)]

    def source() -> TokenPair:
        return pairs.pop()  # the second time, an IndexError

    def refuse(ex: Exchange) -> None:
        ex.respond(ex.request.headers["token1"].encode(), status="401 Unauthorized")

    with FaultServer() as server:
        server.behaviours["refuse"] = refuse
        async with AsyncLayerClient(tokens=source, base_url=server.url) as client:
            with pytest.raises(IndexError) as caught:
                await client.get("/refuse/1")
    assert "5ecret" not in shown(caught.value)


async def test_a_request_of_a_call_is_shown_without_its_query() -> None:
    seen: list[httpx.Request] = []

    async def note(request: httpx.Request, call_next: Any) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, request=request)

    async with AsyncLayerClient(token1=ONE, token2=TWO, middleware=[note]) as client:
        await client.get("/api/x", params={"q": QUERY})
    assert repr(seen[0]) == "<Request('GET', 'https://webapi.thelayer.com/api/x')>"
    assert seen[0].url.params["q"] == QUERY
    assert QUERY not in repr(ExchangeRecord.of(seen[0]))
    assert isinstance(pickle.loads(pickle.dumps(httpx.Request("GET", seen[0].url))), httpx.Request)


@pytest.mark.parametrize("way", ["bulk", "fetch_all", "own call"])
async def test_the_frames_of_a_failed_item_hold_no_secret(way: str) -> None:
    path = f"/status/404?q={QUERY}"
    with FaultServer() as server:
        async with AsyncLayerClient(token1=ONE, token2=TWO, base_url=server.url, headers={"X-Own": HEADER}) as client:

            async def call(number: int) -> None:
                await client.get(path)

            async def fail() -> None:
                if way == "fetch_all":
                    await client.fetch_all([path])
                bulk: Any = client.bulk([path]) if way == "bulk" else client.bulk([1], call)
                async with bulk as outcomes:
                    async for outcome in outcomes:
                        outcome.unwrap()

            with pytest.raises(NotFoundError) as caught:
                await fail()
    assert "5ecret" not in shown(caught.value)
