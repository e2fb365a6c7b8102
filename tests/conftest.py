"""What all tests share: both event loops, and a guard that lets no connection leave this machine."""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import Any

import pytest

for name in [name for name in os.environ if name.upper().startswith("LAYER_") or name.upper().endswith("_PROXY")]:
    del os.environ[name]


def _refuse_foreign_connects(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook sees every connect of the process, whichever library makes it (PEP 578)."""
    if event == "socket.connect":
        address = args[1]
    elif event == "socket.getaddrinfo":
        address = args
    else:
        return
    if not isinstance(address, tuple):  # a Unix socket
        return
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    if host is None or host == "localhost" or host.endswith((".localhost", ".invalid")):
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise AssertionError(f"a test tried to reach {host}: nothing may leave loopback")


sys.addaudithook(_refuse_foreign_connects)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every async test runs on both event loops, unless it names one."""
    return str(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the promises at their full figures")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the promises run at their full figures."""
    return bool(request.config.getoption("--full"))
