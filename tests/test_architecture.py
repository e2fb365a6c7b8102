"""The shape of the house: which rooms there are, and which may know which."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re

import pytest

import layer_async

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "layer_async"

DOOR = "__init__"
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "_values": set(),
    "_errors": {"_values"},
    "_coding": {"_errors"},
    "_exchange": {"_errors"},
    "_telemetry": {"_errors", "_values", "_version"},
    "_tokens": {"_errors", "_values"},
    "_origin": {"_errors", "_tokens", "_values"},
    "_auth": {"_coding", "_errors", "_exchange", "_origin", "_tokens"},
    "_shapes": {"_errors"},
    "_called": {"_shapes"},
    "_codec": {"_called", "_errors", "_shapes"},
    "_failures": {"_errors", "_exchange", "_values"},
    "_retry": {"_errors", "_exchange", "_failures", "_telemetry", "_values"},
    "_pace": set(),
    "_pacing": {"_errors", "_pace", "_telemetry", "_values"},
    "_pool": {"_deadline", "_errors", "_values"},
    "_sockets": {"_exchange"},
    "_portable": {"_errors", "_exchange", "_sockets"},
    "_seams": set(),
    "_framing": set(),
    "_wire": {"_exchange", "_framing", "_sockets"},
    "_transport": {"_errors", "_exchange", "_pool", "_portable", "_seams", "_wire"},
    "_lean": {
        "_auth",
        "_coding",
        "_errors",
        "_exchange",
        "_framing",
        "_origin",
        "_pool",
        "_seams",
        "_tokens",
        "_transport",
        "_wire",
    },
    "_deadline": set(),
    "_outage": set(),
    "_progress": {"_errors"},
    "_outcomes": {"_errors", "_progress"},
    "_journal": {"_errors"},
    "_bulk": {"_errors", "_journal", "_outage", "_outcomes", "_progress", "_values"},
    "_options": {"_errors", "_pacing", "_retry", "_tokens", "_values"},
    "_call": {
        "_auth",
        "_bulk",
        "_codec",
        "_coding",
        "_deadline",
        "_errors",
        "_exchange",
        "_failures",
        "_options",
        "_origin",
        "_pacing",
        "_pool",
        "_retry",
        "_telemetry",
    },
    "_paging": {"_errors"},
    "_pages": {"_bulk", "_call", "_codec", "_errors", "_options", "_origin", "_paging"},
    "_client": {
        "_auth",
        "_bulk",
        "_call",
        "_codec",
        "_errors",
        "_exchange",
        "_lean",
        "_options",
        "_origin",
        "_pages",
        "_paging",
        "_pacing",
        "_outcomes",
        "_pool",
        "_progress",
        "_retry",
        "_telemetry",
        "_tokens",
        "_transport",
        "_version",
    },
    DOOR: {
        "_auth",
        "_bulk",
        "_client",
        "_codec",
        "_errors",
        "_journal",
        "_options",
        "_pages",
        "_paging",
        "_pacing",
        "_outcomes",
        "_pool",
        "_progress",
        "_retry",
        "_telemetry",
        "_tokens",
        "_transport",
        "_version",
    },
    "demo": {DOOR, "sandbox"},
    "cli._files": {DOOR},
    "cli._items": {DOOR},
    "cli._resume": {DOOR, "cli._files"},
    "cli._progress": {DOOR, "cli._files", "cli._resume"},
    "cli._get": {DOOR, "cli._files"},
    "cli._fetch": {DOOR, "cli._files", "cli._get", "cli._items", "cli._progress", "cli._resume"},
    "cli._sandbox": {DOOR, "sandbox"},
    "cli._pull": {DOOR, "cli", "cli._fetch", "demo"},
    "cli._demo": {DOOR, "cli._files", "cli._progress", "demo", "sandbox"},
    "cli": {DOOR, "cli._demo", "cli._fetch", "cli._files", "cli._get", "cli._sandbox"},
    "__main__": {"cli"},
    "fastapi": {DOOR},
    "testing": {DOOR, "sandbox"},
    "sandbox": set(),
}


def file_of(room: str) -> pathlib.Path:
    place = PACKAGE.joinpath(*room.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def is_room(name: str) -> bool:
    return file_of(name).exists()


def imports_of_ours(room: str) -> set[str]:
    """The rooms that `room` imports, wherever in the file it does."""
    found: set[str] = set()
    home = ["layer_async", *room.split(".")][: None if PACKAGE.joinpath(*room.split(".")).is_dir() else -1]
    for node in ast.walk(ast.parse(file_of(room).read_text())):
        if isinstance(node, ast.ImportFrom):
            base = home[: len(home) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            module, names = "", [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "layer_async":
                inner = [part.removeprefix("layer_async").lstrip(".") or DOOR for part in (name, module) if part]
                found.add(next((part for part in inner if is_room(part)), inner[-1]))
    return found


def rooms() -> list[str]:
    parts = (path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(part[:-1] if part[-1] == DOOR and part[:-1] else part) for part in parts)


def test_the_rooms_are_those_of_the_table() -> None:
    assert rooms() == sorted(ALLOWED)


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    assert imports_of_ours(room) <= ALLOWED[room]


def test_no_arrow_points_back_up() -> None:
    seen: list[str] = []
    rest = dict(ALLOWED)
    while rest:
        free = [room for room, needs in rest.items() if needs <= set(seen)]
        assert free, f"a circle among {sorted(rest)}"
        seen += free
        for room in free:
            del rest[room]


@pytest.mark.parametrize("room", rooms())
def test_a_room_opens_by_saying_what_it_owns(room: str) -> None:
    assert ast.get_docstring(ast.parse(file_of(room).read_text()))


def test_the_door_shows_public_names_and_each_has_a_docstring() -> None:
    for name in layer_async.__all__:
        assert not name.startswith("_") or name == "__version__"
        thing = getattr(layer_async, name)
        if isinstance(thing, type) or callable(thing):
            if getattr(thing, "__module__", "").startswith("layer_async"):
                assert thing.__doc__, name
                assert not thing.__doc__.startswith(f"{name}("), name
            if isinstance(thing, type) and thing.__module__.startswith("layer_async"):
                for attribute, value in vars(thing).items():
                    if not attribute.startswith("_") and callable(value):
                        assert value.__doc__, f"{name}.{attribute}"


def test_the_top_level_holds_what_was_agreed_and_nothing_else() -> None:
    tracked = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and not path.name.endswith(".egg-info") and path.name not in ("build", "dist")
    }
    assert tracked == {
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "benchmarks",
        "layer_async",
        "pyproject.toml",
        "tests",
    }


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    assert "## [Unreleased]" in changelog
    assert versions[:1] == [layer_async.__version__]


def test_importing_the_package_leaves_the_extras_alone() -> None:
    extras = {"cattrs", "cyclopts", "rich", "fastapi", "keyring", "opentelemetry", "starlette", "uvicorn"}
    for room in rooms():
        if room.startswith("_") and room != "__main__":
            for node in ast.parse(file_of(room).read_text()).body:
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
                assert not extras & {name.split(".")[0] for name in names}, room


def test_every_room_can_be_imported() -> None:
    for room in rooms():
        if room != "__main__":
            name = f"layer_async.{room}" if room != DOOR else "layer_async"
            assert importlib.import_module(name).__doc__, name
