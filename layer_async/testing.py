"""For the tests of those who use this package: fixtures over a sandbox in process, or over answers of your own.

Put `pytest_plugins = ["layer_async.testing"]` into the top conftest.py. `layer_client` then talks to `layer_sandbox`,
a stand-in for the API without sockets; `layer_mock` is a respx router for a client that you make yourself.

Rules: knows the door and the sandbox. No fixture opens a socket, and none needs a plugin for async tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from anyio.from_thread import start_blocking_portal

try:
    import pytest
    import respx
except ImportError as _missing:
    raise ImportError(
        "this module needs pytest and respx: "
        "pip install 'layer-async[testing]' (in a checkout: pip install '.[testing]')"
    ) from _missing

from . import AsyncLayerClient, TokenPair
from .sandbox import Sandbox

__all__ = ["BASE_URL", "layer_client", "layer_mock", "layer_sandbox", "layer_tokens"]

BASE_URL = "https://layer.invalid"
"""Where the fixtures' API lives: a host that can exist nowhere (RFC 6761 section 6.4)."""


@pytest.fixture
def layer_tokens() -> TokenPair:
    """The tokens that the fixtures use. Override it to use your own."""
    return TokenPair("test-token-one", "test-token-two")


@pytest.fixture
def layer_sandbox(layer_tokens: TokenPair) -> Sandbox:
    """A sandbox with 100 documents and no faults. Override it for faults, a quota, or a rotation."""
    return Sandbox(documents=100, tokens=(layer_tokens.token1, layer_tokens.token2))


@pytest.fixture
def layer_client(layer_sandbox: Sandbox, layer_tokens: TokenPair) -> Iterator[AsyncLayerClient]:
    """A client over `layer_sandbox`, in process; closed after the test."""
    transport = httpx.ASGITransport(app=layer_sandbox)
    client = AsyncLayerClient(tokens=layer_tokens, base_url=BASE_URL, transport=transport)
    yield client
    # In a thread: in this one the event loop of an async fixture with a wider scope may still be open.
    with start_blocking_portal() as portal:
        portal.call(client.aclose)


@pytest.fixture
def layer_mock() -> Iterator[respx.MockRouter]:
    """A respx router for `BASE_URL`: a client made for it gets the answers set here, and none from outside."""
    with respx.mock(base_url=BASE_URL, assert_all_called=False) as router:
        yield router
