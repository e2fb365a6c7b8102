"""The demo: it accounts for every document, says so in a table, and finds what does not add up."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from rich.console import Console

from layer_async import AttemptFinished, CallFinished, Event, GateShut, LayerError, PoolStats, RequestInfo, cli, demo
from layer_async.sandbox import COLLECTIONS, SandboxProcess, spawn

from .test_cli import files_limited_to, lines_of

Compared = tuple[
    int, int, list[tuple[str, dict[str, Any]]], demo.Meter, PoolStats, dict[str, Any], dict[str, list[int]]
]


@attrs.frozen
class Done:
    """A run of the demo: its report, what was compared in it, and what an observer heard."""

    report: demo.Report
    compared: Compared
    events: list[Event]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    file = tmp_path_factory.mktemp("demo") / "documents.ndjson"
    compared: list[Compared] = []
    events: list[Event] = []

    def compare(*arguments: Any) -> list[str]:
        compared.append(arguments)
        return true_compare(*arguments)

    async def write(line: bytes) -> None:
        output.write(line)

    true_compare = demo.compare
    with pytest.MonkeyPatch.context() as patch, file.open("wb", buffering=0) as output:
        patch.setattr(demo, "compare", compare)
        report = demo.run_demo(documents=115, seed=3, file=file, write=write, observer=events.append)
    return Done(report, compared[0], events)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[SandboxProcess]:
    """The sandboxes that the demo has started."""
    started: list[SandboxProcess] = []

    def spawn_and_note(**options: Any) -> SandboxProcess:
        started.append(spawn(**options))
        return started[-1]

    monkeypatch.setattr(demo, "spawn", spawn_and_note)
    return started


def has_ended(child: SandboxProcess) -> bool:
    return child._process.returncode is not None


# A run


def test_a_run_accounts_for_every_document(done: Done) -> None:
    report = done.report
    assert report.differences == ()
    assert report.documents == 120  # rounded up to as many of each collection
    assert report.meter.refreshes == 2  # the first pair, and the rotation
    assert len(report.meter.elapsed) == 120
    assert report.meter.attempts > 120
    assert {line["path"] for line in lines_of(str(report.file))} == {
        f"/api/{name}/{number}" for name in COLLECTIONS for number in range(1, 21)
    }


def test_an_observer_hears_what_the_meter_counts(done: Done) -> None:
    assert sum(isinstance(event, CallFinished) for event in done.events) == 120
    assert sum(isinstance(event, AttemptFinished) for event in done.events) == done.report.meter.attempts


def printed(report: demo.Report) -> str:
    out = io.StringIO()
    report.print_to(Console(file=out, width=100))
    return out.getvalue()


def test_the_table_has_a_row_for_each_figure(done: Done) -> None:
    text = printed(done.report)
    for row in (
        r"documents fetched and verified │ 120 ",
        r"calls +│ 120 ",
        r"attempts +│ 1\d\d ",
        r"retries by cause +│ \S+ \d",
        r"answered 429 +│ \d",
        r"token refreshes +│ 1 ",
        r"connections opened, reused +│ \d+, \d+ ",
        r"p50, p99 of a call +│ [\d,]+ ms, [\d,]+ ms ",
        r"duration +│ \d+\.\d s ",
    ):
        assert re.search(row, text), row
    assert text.endswith(f"Every document is accounted for: {done.report.file}\n")


def test_a_table_of_nothing_can_be_printed_too(done: Done) -> None:
    text = printed(attrs.evolve(done.report, meter=demo.Meter(), documents=0))
    assert "none" in text
    assert "0: slower than the quota allows" in text


def test_differences_are_printed_but_not_thousands_of_them(done: Done) -> None:
    text = printed(attrs.evolve(done.report, differences=tuple(f"[no markup] {number}" for number in range(5000))))
    assert "DIFFERENCE: [no markup] 0\n" in text
    assert text.count("DIFFERENCE") == demo.SHOWN_AT_MOST
    assert text.endswith("and 4990 more\n")
    assert "accounted for" not in text


# What is compared


def missing(compared: Any) -> None:
    compared[2].pop()


def twice(compared: Any) -> None:
    compared[2].append(compared[2][0])


def unasked(compared: Any) -> None:
    compared[2].append(("/api/customers/21", {}))


def altered(compared: Any) -> None:
    compared[2][0][1]["id"] += 1


def swapped(compared: Any) -> None:
    (first, one), (second, other) = compared[2][:2]
    compared[2][:2] = [(first, other), (second, one)]


def never_served(compared: Any) -> None:
    compared[6]["sites"][1] = 0


def lost_collection(compared: Any) -> None:
    del compared[6]["sites"]


def unknown_attempt(compared: Any) -> None:
    compared[3].attempts -= 1


def other_refusals(compared: Any) -> None:
    compared[5]["statuses"]["429"] = 10_000


def other_rotations(compared: Any) -> None:
    compared[5]["rotations"] += 1


def mixed_tokens(compared: Any) -> None:
    compared[5]["mixed"] += 1


def no_tokens(compared: Any) -> None:
    compared[5]["missing"] += 1


def unknown_tokens(compared: Any) -> None:
    compared[5]["unknown"] += 1


def held_slot(compared: Any) -> None:
    compared[4] = attrs.evolve(compared[4], in_use=1)


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (missing, "documents missing"),
        (twice, "documents written twice"),
        (unasked, "documents nobody asked for: ['/api/customers/21'], not []"),
        (altered, "digest of all documents"),
        (swapped, "documents that belong elsewhere, or nowhere: ['/api/"),
        (never_served, "documents that the sandbox says it served: 119, not 120"),
        (lost_collection, "documents that the sandbox says it served: 100, not 120"),
        (unknown_attempt, "attempts"),
        (other_refusals, "answers 429"),
        (other_rotations, "rotations met by refreshes: 1, not 2"),
        (mixed_tokens, "requests with tokens of two pairs: 1, not 0"),
        (no_tokens, "requests without tokens: 1, not 0"),
        (unknown_tokens, "requests without tokens: 1, not 0"),
        (held_slot, "slots and waiters left: 1, not 0"),
    ],
)
def test_a_difference_is_found(done: Done, tamper: Callable[[Any], None], expected: str) -> None:
    compared: Any = [
        copy.deepcopy(each) if not isinstance(each, demo.Meter) else copy.copy(each) for each in done.compared
    ]
    assert demo.compare(*compared) == []
    tamper(compared)
    assert any(difference.startswith(expected) for difference in demo.compare(*compared))


def test_an_attempt_that_found_no_server_is_not_looked_for_in_its_record() -> None:
    meter = demo.Meter()
    info = RequestInfo("GET", "http://h/x")
    meter(AttemptFinished(info, 1, None, "ConnectTimeout", 5.0, None))
    meter(AttemptFinished(info, 2, 429, None, 0.1, True))
    meter(GateShut(1.0))
    assert (meter.attempts, meter.never_sent, meter.rate_limited) == (2, 1, 1)


# The quota


@pytest.mark.parametrize("documents", [120, 600, 5004])
def test_the_quota_stops_a_run_once_in_its_middle(documents: int) -> None:
    quota = demo.quota_for(documents)
    assert documents / 2 < quota.capacity < documents  # whoever is fast meets it; the next window holds the rest
    assert 2 * quota.capacity >= documents * (1 + demo.FAULT_RATE * 2)  # with what is sent again
    assert quota.rate < 250  # a slow machine meets it too
    assert quota.window is not None
    assert quota.window <= 12.1  # and a fast one does not wait for long


# On the command line


def test_the_demo_writes_into_a_fresh_folder_and_exits_with_0(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, children: list[SandboxProcess]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # the sandbox is next door: no proxy leads there
    assert cli.run(["demo", "--documents", "60", "--seed", "7"]) == 0
    out, err = capfd.readouterr()
    [file] = tmp_path.glob("layer-async-demo-*/documents.ndjson")
    assert f"Every document is accounted for: {file}" in out
    assert "demo, seed 7" in out
    assert len(lines_of(str(file))) == 60
    assert all(map(has_ended, children))
    for token in re.findall(r"[0-9a-f]{40}", out + err):
        raise AssertionError(token)


def test_a_difference_makes_the_demo_exit_with_1(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: Done
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda **_: attrs.evolve(done.report, differences=("one too many",)))
    assert cli.run(["demo", "--out", str(tmp_path)]) == 1
    assert "DIFFERENCE: one too many" in capfd.readouterr().out


def test_a_failed_document_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "COLLECTIONS", (*COLLECTIONS[:5], "invoices"))  # which no tokens may read
    file = tmp_path / "documents.ndjson"

    async def write(line: bytes) -> None:
        with file.open("ab") as output:
            output.write(line)

    report = demo.run_demo(documents=12, seed=1, file=file, write=write)
    assert report.documents == 10
    assert any("/api/invoices/1: GET " in difference and "403" in difference for difference in report.differences)


def test_a_folder_that_cannot_be_used_is_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, children: list[SandboxProcess]
) -> None:
    (tmp_path / "file").touch()
    assert cli.run(["demo", "--out", f"{tmp_path}/file"]) == 4
    assert (
        capfd.readouterr().err
        == f"layer-async: {tmp_path}/file exists already: name another file, or move this one away.\n"
    )
    assert cli.run(["demo", "--out", f"{tmp_path}/file/below"]) == 4
    assert capfd.readouterr().err == f"layer-async: {tmp_path}/file/below cannot be written: Not a directory.\n"
    (tmp_path / "documents.ndjson").touch()
    assert cli.run(["demo", "--out", str(tmp_path)]) == 4
    assert "documents.ndjson exists already" in capfd.readouterr().err
    assert children == []


def test_a_full_disk_ends_the_demo_and_its_sandbox(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[SandboxProcess] = []
    with contextlib.ExitStack() as stack:

        def spawn_and_fill_the_disk(**options: Any) -> SandboxProcess:
            children.append(spawn(**options))
            stack.enter_context(files_limited_to(4000))  # only now: the limit is this process's alone
            return children[-1]

        monkeypatch.setattr(demo, "spawn", spawn_and_fill_the_disk)
        code = cli.run(["demo", "--documents", "60", "--out", str(tmp_path)])
    assert code == 4
    err = capfd.readouterr().err
    assert err == f"layer-async: {tmp_path}/documents.ndjson cannot be written: File too large.\n"
    assert lines_of(f"{tmp_path}/documents.ndjson")
    assert all(map(has_ended, children))


def test_ctrl_c_ends_the_demo_and_its_sandbox(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, children: list[SandboxProcess]
) -> None:
    file = tmp_path / "documents.ndjson"

    def interrupt() -> None:
        end = time.monotonic() + 30
        while not (file.exists() and file.stat().st_size) and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = cli.run(["demo", "--documents", "3000", "--out", str(tmp_path)])
    thread.join()
    assert code == 130
    assert capfd.readouterr().err == "layer-async: interrupted.\n"
    assert 0 < len(lines_of(str(file))) < 3000
    assert all(map(has_ended, children))


def test_a_sandbox_that_does_not_start_is_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> SandboxProcess:
        raise RuntimeError("the sandbox's process ended with 1 before it served")

    monkeypatch.setattr(demo, "spawn", fail)
    assert cli.run(["demo", "--out", str(tmp_path)]) == 1
    assert capfd.readouterr().err == "layer-async: the sandbox's process ended with 1 before it served.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_is_gone_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(_: SandboxProcess) -> dict[str, Any]:
        raise ConnectionRefusedError("refused")

    async def write(_: bytes) -> None:
        return

    monkeypatch.setattr(SandboxProcess, "record", record)
    with pytest.raises(LayerError, match="has gone, and its record with it: refused"):
        demo.run_demo(documents=6, seed=1, file=tmp_path / "documents.ndjson", write=write)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "documents.ndjson"
    file.write_text(json.dumps({"path": "/x", "value": {"id": 1}}) + "\n")
    assert demo.read_back(file) == [("/x", {"id": 1})]
