"""Tools that hook into httpx see each attempt of the client, with no setting of ours, and nothing hangs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
import vcr  # type: ignore[import-untyped]
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pytest_httpx import HTTPXMock

from layer_async import AsyncLayerClient, RetryPolicy, TokenPair

from .faultserver import Exchange, FaultServer

pytestmark = pytest.mark.anyio

BASE = "https://webapi.thelayer.com"
PAIR = TokenPair("tools-token-one", "tools-token-two")
AT_ONCE = RetryPolicy(backoff_initial=1e-9, backoff_max=1e-9)


def make(base_url: str = BASE, **options: Any) -> AsyncLayerClient:
    settings: dict[str, Any] = {"limits": httpx.Limits(max_connections=10), **options}
    return AsyncLayerClient(tokens=PAIR, base_url=base_url, retry=AT_ONCE, **settings)


@pytest.mark.parametrize("using", ["httpcore", "httpx"])
async def test_respx_mocks_two_hundred_calls_on_ten_slots_in_both_its_modes(using: str) -> None:
    async with make() as client:
        with respx.mock(base_url=BASE, using=using) as router:
            route = router.get(path__startswith="/api/").mock(
                side_effect=[httpx.Response(503), *[httpx.Response(200, json={"n": 1})] * 200]
            )
            responses = await client.fetch_all([f"/api/{n}" for n in range(200)], workers=200)
            assert [response.json() for response in responses] == [{"n": 1}] * 200
            assert route.call_count == 201
            assert route.calls.last.request.headers["Token1"] == PAIR.token1
        stats = client.pool.stats
        assert (stats.in_use, stats.waiting) == (0, 0)


async def test_respx_lets_through_what_it_is_told_to() -> None:
    with FaultServer() as server, respx.mock() as router:
        router.route(host="127.0.0.1").pass_through()
        async with make(server.url) as client:
            assert (await client.get("/ok/1")).text == "/ok/1"
            assert (await client.get("/ok/2")).text == "/ok/2"
            assert client.pool.stats.in_use == 0


async def test_pytest_httpx_sees_each_attempt(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(status_code=503)
    httpx_mock.add_response(json={"ok": True})
    async with make() as client:
        assert (await client.get("/api/x")).json() == {"ok": True}
        assert client.pool.stats.in_use == 0
    requests = httpx_mock.get_requests()
    assert [request.headers["Token2"] for request in requests] == [PAIR.token2] * 2


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = HTTPXClientInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    yield exporter
    instrumentor.uninstrument()


async def test_opentelemetrys_global_instrumentor_sees_each_attempt(spans: InMemorySpanExporter) -> None:
    answers = iter(["503 Service Unavailable", "200 OK"])

    def flaky(ex: Exchange) -> None:
        ex.respond(b"{}", status=next(answers))

    with FaultServer() as server:
        server.behaviours["flaky"] = flaky
        async with make(server.url) as client:
            await client.get("/flaky/1")
    finished = spans.get_finished_spans()
    assert [(span.name, (span.attributes or {})["http.status_code"]) for span in finished] == [
        ("GET", 503),
        ("GET", 200),
    ]
    assert not any(PAIR.token1 in str(span.attributes) for span in finished)
    assert "traceparent" in server.record.requests[0].headers


async def test_vcr_records_and_replays_and_can_leave_the_tokens_out(tmp_path: Path) -> None:
    recorder = vcr.VCR(filter_headers=["Token1", "Token2"], cassette_library_dir=str(tmp_path))
    with FaultServer() as server, recorder.use_cassette("one.yaml"):
        async with make(server.url) as client:
            assert (await client.get("/ok/1")).text == "/ok/1"
    with recorder.use_cassette("one.yaml", record_mode="none") as cassette:
        async with make(server.url) as client:
            assert (await client.get("/ok/1")).text == "/ok/1"
            assert client.pool.stats.in_use == 0
    assert cassette.play_count == 1
    assert PAIR.token1 not in (tmp_path / "one.yaml").read_text()
