"""What all tests share: both event loops, and a guard that lets no connection leave this machine."""

from __future__ import annotations

import gc
import ipaddress
import os
import random
import signal
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any, Protocol

import pytest

from . import promises

for name in [
    name
    for name in os.environ
    if name.upper().startswith(("LAYER_TOKEN", "LAYER_BASE", "PYTEST_ADDOPTS")) or name.upper().endswith("_PROXY")
]:
    del os.environ[name]

# A shell's background job has Ctrl-C ignored, and so would all that it starts; the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


class PromiseRecord(Protocol):
    """Records a promise that the test has just found kept, for the table in the README; see `promise_record`."""

    def __call__(
        self, promise: str, *, promised: str, measured: str, most: float | None = None, total: float | None = None
    ) -> None: ...


KEPT = pytest.StashKey[list[promises.Kept]]()
BROKEN = pytest.StashKey[set[str]]()


@pytest.fixture
def promise_record(request: pytest.FixtureRequest, seed: int) -> PromiseRecord:
    """Call it after the assertions, with the figure promised and the figure measured, both as the README shows them.

    Where several tests keep the same promise (plain and TLS, asyncio and trio), `measured` is a format of one figure:
    `most`, of which the largest is shown, or `total`, of which the sum is.
    """

    def record(
        promise: str, *, promised: str, measured: str, most: float | None = None, total: float | None = None
    ) -> None:
        test = request.node.nodeid.partition("[")[0]
        kept = promises.Kept(test, promise, promised, measured, seed, most, total)
        request.config.stash.setdefault(KEPT, []).append(kept)

    return record


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No coverage while a siege is on: it takes more than twice the time, and the lines are those of other tests."""
    for item in items:
        if item.path.name.startswith("test_siege_") and item.path.name != "test_siege_hostile.py":
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """Thousands of collected tests are no garbage: no collection in a test is to walk over them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember which promises were broken."""
    result = yield
    if result.failed:
        item.config.stash.setdefault(BROKEN, set()).add(item.nodeid.partition("[")[0])
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave what a full run found."""
    gc.unfreeze()  # who comes after the tests may ask the collector who refers to what, as Hypothesis does
    stash = session.config.stash
    kept, broken = stash.get(KEPT, []), stash.get(BROKEN, set())
    if session.config.getoption("--full") and (kept or broken):
        promises.write(kept, broken)
