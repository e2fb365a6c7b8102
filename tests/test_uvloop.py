"""The connection of ours on uvloop, which tells of sockets and timers in ways of its own."""

from __future__ import annotations

from typing import Any

import pytest

from .test_wire import *  # noqa: F403 - its tests are collected here once more

pytest.importorskip("uvloop", reason="uvloop is there for CPython, and not for Windows")


@pytest.fixture  # type: ignore[no-redef] # in place of the one that came with them
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}
