"""What was promised and what was measured: the file that a full run leaves, and the table that the README shows of it.

`python -m tests.promises` runs all promises at their full figures (hours, on a small machine) and renders the README.
Any other run with --full updates the rows of the promises that it keeps, and drops those that it breaks.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from benchmarks.report import this_machine

RESULTS = pathlib.Path(__file__).parent / "promises.json"


@attrs.frozen
class Kept:
    """One promise that a test kept: see `promise_record` in conftest.py."""

    test: str
    promise: str
    promised: str
    measured: str
    seed: int
    most: float | None = None
    total: float | None = None


def merged(kept: Iterable[Kept]) -> dict[str, Kept]:
    """One row for each promise: the worst figure, or the sum, of all its tests."""
    rows: dict[str, Kept] = {}
    for new in kept:
        old = rows.get(new.promise)
        if old is None:
            rows[new.promise] = new
        elif new.total is not None:
            rows[new.promise] = attrs.evolve(old, total=(old.total or 0) + new.total)
        elif new.most is not None and new.most > (old.most or 0):
            rows[new.promise] = new
    return rows


def measured(row: Kept) -> str:
    """The figure, in the words of its test."""
    figure = row.most if row.total is None else row.total
    return row.measured if figure is None else row.measured.format(figure)


def updated(results: Mapping[str, Any], kept: Iterable[Kept], broken: Iterable[str], *, date: str, machine: str) -> Any:
    """`results` with the rows of `kept`, and without those whose test is among `broken`."""
    gone = set(broken)
    rows = {name: dict(row) for name, row in results.items() if row["test"] not in gone}
    for name, row in merged(kept).items():
        if row.test not in gone:
            rows[name] = {
                "promised": row.promised,
                "measured": measured(row),
                "seed": row.seed,
                "date": date,
                "machine": machine,
                "test": row.test,
            }
    return dict(sorted(rows.items()))


def read() -> dict[str, Any]:
    """The rows of the last full run; none where there was none."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(kept: Iterable[Kept], broken: Iterable[str]) -> None:
    """Update the file."""
    machine = this_machine(())
    described = f"{machine.cpu}, {machine.cores} cores, {machine.system}, {machine.python}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = updated(read(), kept, broken, date=today, machine=described)
    RESULTS.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def table(rows: Mapping[str, Any] | None = None) -> str:
    """The rows as Markdown, with when and where they were measured."""
    rows = read() if rows is None else rows
    if not rows:
        return "No full run has been recorded yet."
    lines = ["| promise | promised | measured | seed |", "| --- | --- | --- | ---: |"]
    lines += [f"| {name} | {row['promised']} | {row['measured']} | {row['seed']} |" for name, row in rows.items()]
    where = sorted({f"{row['machine']}, {row['date']}." for row in rows.values()})
    return "\n".join([*where, "", *lines])


if __name__ == "__main__":
    root = RESULTS.parent.parent
    status = subprocess.run([sys.executable, "-m", "pytest", "-m", "promise", "--full", "tests"], cwd=root).returncode
    subprocess.run([sys.executable, "-m", "tests.readme"], cwd=root, check=True)
    sys.exit(status)
