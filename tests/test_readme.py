"""The README tells the truth: its blocks run, its generated parts are current, its set-up commands are two."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator

import pytest

from layer_async.sandbox import Sandbox, serve

from . import readme

TEXT = readme.README.read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
TOKENS = ("sandbox-token-one", "sandbox-token-two")


@pytest.fixture
def sandbox_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serve(Sandbox(documents=300, tokens=TOKENS)) as server:
        monkeypatch.setenv("LAYER_BASE_URL", server.url)
        monkeypatch.setenv("LAYER_TOKEN1", TOKENS[0])
        monkeypatch.setenv("LAYER_TOKEN2", TOKENS[1])
        yield server.url


def execute(block: str, url: str) -> types.ModuleType:
    module = types.ModuleType("readme_block")
    sys.modules["readme_block"] = module  # annotations are looked up there
    exec(compile(block.replace("http://127.0.0.1:8010", url), "README.md", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("block", [block for block in BLOCKS if "FastAPI(" not in block])
def test_a_block_of_the_readme_runs(block: str, sandbox_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    execute(block, sandbox_url)
    assert capsys.readouterr().out.strip()


def test_the_fastapi_block_serves(sandbox_url: str) -> None:
    from fastapi.testclient import TestClient

    [block] = [block for block in BLOCKS if "FastAPI(" in block]
    module = execute(block, sandbox_url)
    with TestClient(module.app) as http:
        assert http.get("/customers/42").json()["id"] == 42
        assert http.get("/customers/999999").status_code == 404
        assert http.post("/customers/42/visits").status_code == 202


def test_the_readme_has_eight_examples_and_two_set_up_commands() -> None:
    assert len(BLOCKS) == 8
    commands = re.findall(r"^```sh\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert commands[0].rstrip().endswith("layer-async demo")
    assert commands[1].rstrip().endswith("pytest")


def test_the_generated_parts_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert readme.render(TEXT) == TEXT, "run: python -m tests.readme"
