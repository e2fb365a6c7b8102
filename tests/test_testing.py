"""The fixtures for users' suites: in process here, and in suites of a user's own, each in a process of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
import respx

from layer_async import AsyncLayerClient, ClientClosedError, TokenPair, testing
from layer_async.sandbox import Sandbox, document

# As fixtures of this module, not as a plugin, which would lend them to the tests of all other rooms too.
layer_client = testing.layer_client
layer_mock = testing.layer_mock
layer_sandbox = testing.layer_sandbox
layer_tokens = testing.layer_tokens

ROOT = Path(__file__).parent.parent

kept: list[AsyncLayerClient] = []


# The fixtures


@pytest.mark.anyio
async def test_the_client_talks_to_the_sandbox(layer_client: AsyncLayerClient, layer_sandbox: Sandbox) -> None:
    kept.append(layer_client)
    assert (await layer_client.get("/api/customers/100")).json() == document("customers", 100)
    assert layer_sandbox.record.paths == {"GET /api/customers/100": 1}


def test_the_client_of_the_test_before_is_closed() -> None:
    with pytest.raises(ClientClosedError):
        anyio.run(kept.pop().get, "/api/customers/1")


def test_a_test_that_is_not_async_can_use_it_too(layer_client: AsyncLayerClient, layer_tokens: TokenPair) -> None:
    async def main() -> int:
        return (await layer_client.get("/api/sites/1")).status_code

    assert anyio.run(main) == 200
    assert anyio.run(main, backend="trio") == 200


@pytest.mark.anyio
async def test_the_mock_answers_for_the_base_url_and_nothing_else(
    layer_mock: respx.MockRouter, layer_tokens: TokenPair
) -> None:
    layer_mock.get("/api/customers/1").respond(json={"id": 1})
    layer_mock.get("/api/customers/2").respond(json={"id": 2})  # a route that is not called is no fault
    async with AsyncLayerClient(tokens=layer_tokens, base_url=testing.BASE_URL) as client:
        assert (await client.get("/api/customers/1")).json() == {"id": 1}
        with pytest.raises(respx.models.AllMockedAssertionError):
            await client.get("/api/customers/3")
    sent = layer_mock.calls[0].request
    assert (sent.headers["Token1"], sent.headers["Token2"]) == (layer_tokens.token1, layer_tokens.token2)


# A user's suite

CONFTEST = 'pytest_plugins = ["layer_async.testing"]\n'

SUITE = """
import pytest
from layer_async import AsyncLayerClient, LayerError, NotFoundError, TokenPair
from layer_async.sandbox import Faults, Sandbox
from layer_async.testing import BASE_URL


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


@pytest.fixture(scope="module")
async def kept_open(anyio_backend):  # an async fixture that keeps the runner alive while layer_client is closed
    yield 1


@pytest.fixture
def layer_tokens():
    return TokenPair("my-token-one", "my-token-two")


@pytest.mark.anyio
async def test_async(layer_client, kept_open):
    assert (await layer_client.get("/api/customers/1")).json()["id"] == 1
    with pytest.raises(NotFoundError):
        await layer_client.get("/api/customers/101")
    async with layer_client.bulk(f"/api/sites/{number}" for number in range(1, 101)) as outcomes:
        assert len([outcome.unwrap() async for outcome in outcomes]) == 100


class TestFaults:
    @pytest.fixture
    def layer_sandbox(self, layer_tokens):
        faults = Faults(cut_body=1.0, at_most=1)
        return Sandbox(documents=10, tokens=(layer_tokens.token1, layer_tokens.token2), faults=faults)

    @pytest.mark.anyio
    async def test_a_fault_is_retried(self, layer_client, layer_sandbox):
        assert (await layer_client.get("/api/customers/1")).json()["id"] == 1
        assert layer_sandbox.record.faults["cut_body"] == 1


@pytest.mark.anyio
async def test_mock(layer_mock, layer_tokens):
    layer_mock.get("/api/x").respond(418)
    async with AsyncLayerClient(tokens=layer_tokens, base_url=BASE_URL) as client:
        with pytest.raises(LayerError):
            await client.get("/api/x")
"""


SYNC_SUITE = """
import anyio
import pytest
from layer_async import TokenPair


@pytest.fixture
def layer_tokens():
    return TokenPair("my-token-one", "my-token-two")


def test_sync(layer_client, layer_sandbox):
    async def main():
        return await layer_client.post("/api/customers", json={"name": "x", "request_key": "once"})

    assert anyio.run(main).status_code == 201
    assert layer_sandbox.tokens == ("my-token-one", "my-token-two")
    assert not layer_sandbox.record.executed_twice
"""


def run_suite(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "test_sync_suite.py").write_text(SYNC_SUITE)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider"], cwd=folder, capture_output=True, text=True
    )


def test_a_users_suite_passes_on_both_event_loops_and_on_none(tmp_path: Path) -> None:
    ran = run_suite(tmp_path)
    assert ran.returncode == 0, ran.stdout
    assert "7 passed" in ran.stdout


@pytest.mark.parametrize(
    ("blocked", "why"),
    [
        (
            "respx",
            "needs pytest and respx: pip install 'layer-async[testing]' (in a checkout: pip install '.[testing]')",
        ),
        (
            "uvicorn",
            "needs starlette and uvicorn: pip install 'layer-async[sandbox]' (in a checkout: pip install '.[sandbox]')",
        ),
    ],
)
def test_a_missing_extra_is_named(blocked: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (blocked, "layer_async.sandbox", "layer_async.testing"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "layer_async.sandbox")
    monkeypatch.delitem(sys.modules, "layer_async.testing")
    with pytest.raises(ImportError) as caught:
        importlib.import_module("layer_async.testing")
    assert str(caught.value).endswith(why)
