"""What all tests share: both event loops, and a guard that lets no connection leave this machine."""

from __future__ import annotations

import ipaddress
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

for name in [
    name
    for name in os.environ
    if name.upper().startswith(("LAYER_TOKEN", "LAYER_BASE", "PYTEST_ADDOPTS")) or name.upper().endswith("_PROXY")
]:
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


@pytest.fixture
def seed(full: bool) -> int:
    """What chance is drawn from in the promises: fixed, but for --full; LAYER_SEED chooses another."""
    return int(os.environ.get("LAYER_SEED", random.SystemRandom().randrange(10**6) if full else 1))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], seed: int, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What a promise found, for the line that is printed at its end."""
    found: list[str] = []
    started = time.perf_counter()
    yield found
    with capsys.disabled():
        line = f"{request.node.name}: {', '.join(found)}; seed {seed}, {time.perf_counter() - started:.1f} s"
        sys.stdout.write(f"\n    {line}")
