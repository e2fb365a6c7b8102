"""The parts of the README that are made from the code. `python -m tests.readme` writes them; a test holds them."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

from . import promises

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RACE = ROOT / "benchmarks" / "results" / "race.json"


def cli_help() -> str:
    """What `--help` of each command says, as one block."""
    from layer_async.cli import app

    parts = []
    for command in ([], ["get"], ["fetch"], ["sandbox"], ["demo"]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            app.help_print(command, console=_console(out))
        parts.append(f"$ layer-async {' '.join([*command, '--help'])}\n{out.getvalue().strip()}")
    text = "\n\n".join(parts)
    return "```\n" + "\n".join(line.rstrip() for line in text.splitlines()) + "\n```"


def _console(file: io.StringIO):  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console(file=file, width=100, force_terminal=False, color_system=None)


def race() -> str:
    """The table of the committed race."""
    command = [sys.executable, "-m", "benchmarks.report", str(RACE), "--markdown"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def render(text: str) -> str:
    """`text` with its generated parts made anew."""
    for name, make in (("cli-help", cli_help), ("race", race), ("promises", promises.table)):
        before, marker, rest = text.partition(f"<!-- {name} -->\n")
        after = re.search(r"^##+ ", rest, re.MULTILINE)
        assert after is not None
        text = f"{before}{marker}{make()}\n\n{rest[after.start() :]}"
    return text


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    README.write_text(render(README.read_text()))
