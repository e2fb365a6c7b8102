"""`fetch --resume`: whatever ended the runs before, each key is in the output exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from layer_async import Journal
from layer_async.sandbox import Faults, Sandbox, digest, document, serve, spawn

from .test_cli import (
    TOKENS,
    Layer,
    Ran,
    customers,
    descriptor_replaced,
    environment,  # noqa: F401 (a fixture)
    files_limited_to,
    layer,  # noqa: F401 (a fixture)
    lines_of,
    paths,
    start,
    until,
    url,  # noqa: F401 (a fixture)
)


def found(file: str = "out") -> list[str]:
    """The paths in the output, sorted; each of its documents must be the right one."""
    for line in lines_of(file):
        collection, _, number = line["path"].removeprefix("/api/").partition("/")
        assert line["value"] == document(collection, int(number))
    return sorted(line["path"] for line in lines_of(file))


def test_a_run_begins_and_the_next_has_nothing_to_do(layer: Layer) -> None:  # noqa: F811
    command = ("fetch", paths(*customers(60)), "--out", "out", "--resume")
    assert layer(*command) == Ran(0, b"", "layer-async: 60 fetched, 0 failed, 0 retries; the documents are in out.\n")
    before = Path("out").read_bytes()
    ran = layer(*command)
    assert ran == Ran(
        0, b"", "layer-async: 0 fetched, 0 failed, 0 retries, 60 already there; the documents are in out.\n"
    )
    assert Path("out").read_bytes() == before
    assert sorted(os.listdir()) == ["out", "out.journal", "paths"]


def test_a_resumed_run_fetches_what_is_missing_and_says_that_the_inputs_changed(layer: Layer) -> None:  # noqa: F811
    layer("fetch", paths(*customers(20)), "--out", "out", "--resume")
    ran = layer("fetch", paths(*customers(30)), "--out", "out", "--resume")
    assert ran.code == 0
    assert "10 fetched, 0 failed, 0 retries, 20 already there" in ran.err
    assert "Note that the inputs have changed: they go on after 20 keys" in ran.err
    assert found() == sorted(customers(30))


def test_failures_stay_failed_until_they_are_to_be_tried_again(layer: Layer) -> None:  # noqa: F811
    command = ("fetch", paths("/api/customers/1", "/api/customers/9999"), "--out", "out", "--resume", "--errors", "bad")
    ran = layer(*command)
    assert ran.code == 3
    assert ran.err.endswith("1 noted as failed: --retry-failed tries again.\n")
    assert [(line["path"], line["error"], line["status"], line["attempts"]) for line in lines_of("bad")] == [
        ("/api/customers/9999", "NotFoundError", 404, 1)
    ]
    assert "no such document" in lines_of("bad")[0]["message"]
    again = layer(*command)
    assert again.code == 3
    assert "0 fetched, 0 failed, 0 retries, 2 already there" in again.err
    assert len(lines_of("bad")) == 1
    assert layer(*command, "--retry-failed").code == 3
    assert len(lines_of("bad")) == 2
    paths("/api/customers/1", "/api/customers/2")
    with Journal("out.journal") as journal:
        journal.settle("/api/customers/2", ok=False)
    with Journal("out.journal") as journal:
        journal.settle("/api/customers/9999", ok=True)
    assert layer(*command, "--retry-failed").code == 0
    assert found() == customers(2)


def test_lines_behind_what_the_journal_knows_are_cut_off(layer: Layer) -> None:  # noqa: F811
    layer("fetch", paths(*customers(20)), "--out", "out", "--resume")
    with open("out", "a") as out:
        out.write('{"path":"/api/customers/21","value":{}}\n{"path":"/api/cu')
    assert layer("fetch", paths(*customers(25)), "--out", "out", "--resume").code == 0
    assert found() == sorted(customers(25))


def test_the_output_is_on_the_disk_before_the_journal_says_so(
    layer: Layer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synced: list[int] = []

    def sync(number: int) -> None:
        with sqlite3.connect("file:out.journal?mode=ro", uri=True) as database:
            settled, offset = database.execute("SELECT settled, place FROM state").fetchone()
        database.close()
        assert settled <= (synced[-1] if synced else 0) // 40  # no line is shorter
        assert (offset or 0) <= (synced[-1] if synced else 0)
        synced.append(os.fstat(number).st_size)

    monkeypatch.setattr(os, "fsync", sync)
    assert layer("fetch", paths(*customers(300)), "--out", "out", "--resume").code == 0
    assert synced[-1] == Path("out").stat().st_size


def test_the_same_line_twice_is_one_item(layer: Layer) -> None:  # noqa: F811
    ran = layer("fetch", paths(*customers(3) * 50), "--out", "out", "--resume")
    assert ran.code == 0
    assert found() == customers(3)
    assert "3 fetched, 0 failed, 0 retries, 147 named twice" in ran.err
    ran = layer("fetch", "paths", "--out", "out", "--resume")
    assert "0 fetched, 0 failed, 0 retries, 150 already there" in ran.err


def test_what_cannot_be_resumed_is_refused_and_left_as_it_is(layer: Layer) -> None:  # noqa: F811
    command = ("fetch", paths(*customers(5)), "--out", "out", "--resume")
    Path("out").write_text("precious")
    ran = layer(*command)
    assert ran == Ran(
        4, b"", "layer-async: out exists already, but not its journal, to go on with it: name another file.\n"
    )
    assert Path("out").read_text() == "precious"
    os.unlink("out")
    layer(*command)
    whole = Path("out").read_bytes()
    Path("out").write_bytes(whole[:100])
    ran = layer(*command)
    assert ran.code == 4
    assert f"100 bytes, where its journal knows of {len(whole):,}" in ran.err
    assert Path("out").read_bytes() == whole[:100]
    os.unlink("out")
    assert layer(*command).code == 4
    assert not Path("out").exists()
    ran = layer(*command[:-1])
    assert ran.code == 4
    assert "out.journal is there, of a run that --resume goes on with; --force begins anew" in ran.err


def test_force_begins_anew(layer: Layer) -> None:  # noqa: F811
    command = ("fetch", paths(*customers(5)), "--out", "out", "--errors", "bad")
    layer(*command, "--resume")
    paths(*customers(7))
    assert layer(*command, "--force", "--resume").code == 0
    assert found() == customers(7)
    paths(*customers(3))
    assert layer(*command, "--force").code == 0
    assert found() == customers(3)
    assert not Path("out.journal").exists()
    assert layer(*command, "--force").code == 0
    Path("-.journal").write_text("of no concern")
    assert layer("fetch", "paths", "--out", "-", "--force").code == 0
    Path("out.journal").write_text("precious " * 200)
    ran = layer(*command, "--force")
    assert ran.code == 2
    assert "is not a journal" in ran.err
    assert found() == customers(3)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--out", "-", "--resume"], "--resume needs a file"),
        (["--out", "/dev/null", "--resume"], "--resume needs a file"),
        (["--out", "out", "--retry-failed"], "--retry-failed is for --resume"),
        (["--out", "out", "--errors", "out"], "--errors and --out are one file: each takes a file of its own"),
        (["--out", "out", "--errors", "-"], "--errors takes a file of its own"),
        (["--out", "out", "--items", "data"], "--items is for --pages"),
        (["--out", "out", "--pages", "leaf"], "--pages knows number, offset, cursor, next, link, not 'leaf'"),
        (["--out", "out", "--pages", "number:wide=1"], "--pages number has no setting 'wide=1'"),
        (["--out", "out", "--pages", "number:size"], "--pages number has no setting 'size'"),
        (["--out", "out", "--pages", "number:start=x"], "start"),
        (["--out", "out", "--stop-when", "0"], "--stop-when takes a count of failures"),
        (["--out", "out", "--stop-when", "101%"], "--stop-when takes a count of failures"),
        (["--out", "out", "--stop-when", "often"], "--stop-when takes a count of failures"),
        (["--out", "out", "--workers", "0"], "at least one worker"),
        (["--out", "out", "--rate", "0"], "--rate"),
    ],
)
def test_what_does_not_fit_together_is_told_before_anything_is_done(
    layer: Layer,  # noqa: F811
    arguments: list[str],
    why: str,
) -> None:
    ran = layer("fetch", paths(*customers(1)), *arguments)
    assert ran.code == 2
    assert why in " ".join(ran.err.replace("│", " ").split())
    assert os.listdir() == ["paths"]


@pytest.mark.parametrize("name", ["nowhere/bad", "/proc/bad"])
def test_a_file_for_errors_that_cannot_be_made_is_told(layer: Layer, name: str) -> None:  # noqa: F811
    ran = layer("fetch", paths(*customers(1)), "--out", "out", "--errors", name)
    assert ran.code == 4
    assert f"{name} cannot be written" in ran.err
    assert not Path("out").exists()


@pytest.mark.parametrize("more", [("--force",), ("--resume",)])
@pytest.mark.parametrize(
    ("source", "out", "errors"),
    [
        ("paths", "paths", None),
        ("paths", "./symbolic", None),
        ("paths", "hard", None),
        ("paths", "out", "paths"),
        ("paths", "out", "hard"),
        ("symbolic", "out", "hard"),
        ("other.journal", "other", None),
        ("paths", "out", "out.journal"),
        ("paths", "new", "to_new"),
        ("-", "paths", None),
        ("-", "out", "hard"),
    ],
)
def test_no_file_is_written_over_another_that_the_run_needs(
    layer: Layer,  # noqa: F811
    source: str,
    out: str,
    errors: str | None,
    more: tuple[str, ...],
) -> None:
    """By whatever name it is called: another spelling, a link of either kind, stdin."""
    paths(*customers(1))
    os.symlink("paths", "symbolic")
    os.symlink("new", "to_new")
    os.link("paths", "hard")
    os.link("paths", "other.journal")
    before = {name: Path(name).read_bytes() for name in os.listdir() if Path(name).exists()}
    with open("paths", "rb") as file, descriptor_replaced(0, file.fileno()):
        ran = layer("fetch", source, "--out", out, *(("--errors", errors) if errors else ()), *more)
    assert ran.code == 2
    assert "are one file: each takes a file of its own" in ran.err
    assert {name: Path(name).read_bytes() for name in os.listdir() if Path(name).exists()} == before


@pytest.mark.parametrize("arguments", [("--out", "-"), ("--out", "/dev/stdout"), ("--out", "out", "--errors", "both")])
def test_stdout_may_be_one_of_the_files_too(layer: Layer, arguments: tuple[str, ...]) -> None:  # noqa: F811
    Path("both").write_text("/api/customers/1\n")
    os.link("both", "paths")
    with open("both", "ab") as file, descriptor_replaced(1, file.fileno()):
        ran = layer("fetch", "paths", *arguments)
    assert ran.code == 2
    assert "are one file: each takes a file of its own" in ran.err
    assert Path("both").read_text() == "/api/customers/1\n"


def test_without_a_stdout_the_input_may_have_its_number(  # the command `fetch paths --out - >&-`
    layer: Layer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("paths").write_text("/api/customers/1\n")
    monkeypatch.setattr(sys, "stdout", None)
    with open("paths", "rb") as file, descriptor_replaced(1, file.fileno()):
        ran = layer("fetch", "paths", "--out", "-")
    assert ran == Ran(4, b"", "layer-async: stdout cannot be written: Bad file descriptor.\n")
    assert Path("paths").read_text() == "/api/customers/1\n"


def test_devices_are_nobodys_own(layer: Layer) -> None:  # noqa: F811
    assert layer("fetch", "/dev/null", "--out", "/dev/null").code == 0


# How runs end


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_valid_file_and_the_same_command_goes_on(number: int, code: int) -> None:
    command = ("fetch", "-", "--out", "out", "--resume")
    process = start(*command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("".join(f"{path}\n" for path in customers(20)).encode())
    process.stdin.flush()
    until(lambda: Path("out").exists() and len(lines_of("out")) == 20)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    ran = Ran(process.returncode, b"", err.decode())
    assert ran.code == code
    assert "20 fetched, 0 failed, 0 retries; the documents are in out. The same command goes on from here." in ran.err
    assert found() == sorted(customers(20))
    with Journal("out.journal") as journal:
        assert (journal.settled, journal.offset) == (20, Path("out").stat().st_size)
    process = start(*command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate("".join(f"{path}\n" for path in customers(25)).encode(), timeout=10)
    assert process.returncode == 0
    assert b"5 fetched, 0 failed, 0 retries, 20 already there" in err
    assert found() == sorted(customers(25))


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(layer: Layer) -> None:  # noqa: F811
    command = ("fetch", paths(*customers(300)), "--out", "out", "--resume")
    with files_limited_to(70_000):  # the journal needs less
        ran = layer(*command)
    assert ran.code == 4
    assert "out cannot be written: File too large" in ran.err or "the journal cannot be written" in ran.err
    assert "The same command goes on from here." in ran.err
    count = len(found())
    assert 0 < count < 300
    with Journal("out.journal") as journal:
        assert journal.settled <= count
    assert layer(*command).code == 0
    assert found() == sorted(customers(300))


def test_a_journal_that_cannot_be_written_ends_the_run_and_loses_nothing(layer: Layer) -> None:  # noqa: F811
    command = ("fetch", paths(*(f"{path}?{'x' * 2000}" for path in customers(120))), "--out", "out", "--resume")
    layer("fetch", "/dev/null", "--out", "out", "--resume")
    with files_limited_to(70_000):  # the output needs less, the journal's log more
        ran = layer(*command)
    assert ran.code == 4
    assert "the journal cannot be written" in ran.err
    ran = layer(*command)
    assert ran.code == 0
    assert Counter(line["path"].partition("?")[0] for line in lines_of("out")) == Counter(customers(120))


def test_two_runs_into_one_file_are_refused(layer: Layer) -> None:  # noqa: F811
    with Journal("out.journal"):
        Path("out").touch()
        for more in ((), ("--force",)):
            ran = layer("fetch", paths(*customers(3)), "--out", "out", "--resume", *more)
            assert ran.code == 2
            assert "held by another run" in ran.err
    assert Path("out").read_bytes() == b""


def test_tokens_that_lapse_end_the_run_with_one_error_and_new_ones_complete_it(
    layer: Layer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sandbox = Sandbox(documents=600, tokens=TOKENS, rotate_after=[150])
    with serve(sandbox) as server:
        monkeypatch.setenv("LAYER_BASE_URL", server.url)
        command = ("fetch", paths(*customers(600)), "--out", "out", "--resume", "--errors", "bad")
        ran = layer(*command)
        assert ran.code == 1
        summary, error = ran.err.splitlines()
        assert "0 failed" in summary
        assert "The same command goes on from here." in summary
        assert "Token1 may have lapsed" in error
        assert not Path("bad").exists()
        count = len(found())
        assert 100 <= count < 200
        for name, token in zip(("LAYER_TOKEN1", "LAYER_TOKEN2"), sandbox.tokens, strict=True):
            monkeypatch.setenv(name, token)
        assert layer(*command).code == 0
    assert found() == sorted(customers(600))
    assert sandbox.record.requests < 800


def test_a_run_can_be_stopped_by_its_failures(layer: Layer) -> None:  # noqa: F811
    missing = [f"/api/customers/{number}" for number in range(9000, 9500)]
    ran = layer("fetch", paths(*missing), "--out", "out", "--resume", "--stop-when", "5", "--workers", "2")
    assert ran.code == 3
    assert "The run was stopped: 5 items have failed. The same command goes on from here." in ran.err
    ran = layer("fetch", paths(*missing), "--out", "rate", "--stop-when", "50%", "--workers", "auto")
    assert ran.code == 3
    assert "items have failed" in ran.err
    assert "The same command" not in ran.err


def test_a_known_quota_is_kept_to(layer: Layer) -> None:  # noqa: F811
    began = time.perf_counter()
    assert layer("fetch", paths(*customers(60)), "--out", "out", "--rate", "200").code == 0
    assert found() == sorted(customers(60))
    assert time.perf_counter() - began > 0.1  # a burst goes first


# What is read


def objects(*lines: Any) -> str:
    Path("objects").write_text("".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines))
    return "objects"


def test_a_field_names_the_document_and_another_one_says_where_it_is(layer: Layer) -> None:  # noqa: F811
    source = objects(
        {"id": 7, "path": "/api/sites/7"}, "\n", {"id": "7", "path": "/api/sites/8"}, {"id": 7, "path": "/api/sites/9"}
    )
    ran = layer("fetch", source, "--out", "out", "--key", "id", "--resume", "--errors", "bad")
    assert ran.code == 0
    assert "2 fetched, 0 failed, 0 retries, 1 named twice; the documents are in out." in ran.err
    ran = layer("fetch", source, "--out", "out", "--key", "id", "--resume")
    assert "0 fetched, 0 failed, 0 retries, 3 already there; the documents are in out." in ran.err
    assert [
        (line["key"], line["path"], line["value"]["id"])
        for line in sorted(lines_of("out"), key=lambda line: line["path"])
    ] == [
        (7, "/api/sites/7", 7),
        ("7", "/api/sites/8", 8),
    ]
    source = objects({"where": "/api/sites/1"}, {"where": "/api/sites/9999"})
    ran = layer("fetch", source, "--out", "out2", "--path", "where", "--errors", "bad2")
    assert ran.code == 3
    assert [line["path"] for line in lines_of("out2")] == ["/api/sites/1"]
    assert [line["path"] for line in lines_of("bad2")] == ["/api/sites/9999"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[]\n", "line 2 is not a JSON object"),
        ("{\n", "line 2 is not a JSON object"),
        ({"id": 8}, "line 2 lacks the field id and path, as text"),
        ({"path": "/x"}, "line 2 lacks the field id and path, as text"),
        ({"id": None, "path": "/x"}, "line 2 lacks the field id and path, as text"),
        ({"id": 1, "path": 3}, "line 2 lacks the field id and path, as text"),
    ],
)
def test_a_line_that_is_no_such_object_ends_the_run_and_can_be_mended(
    layer: Layer,  # noqa: F811
    line: Any,
    why: str,
) -> None:
    command = ("fetch", "objects", "--out", "out", "--key", "id", "--resume")
    objects({"id": 7, "path": "/api/sites/7"}, line)
    ran = layer(*command)
    assert ran.code == 2
    assert why in ran.err
    objects({"id": 7, "path": "/api/sites/7"}, {"id": 8, "path": "/api/sites/8"})
    assert layer(*command).code == 0
    assert found() == ["/api/sites/7", "/api/sites/8"]


# Pages


@pytest.mark.parametrize(
    "pages",
    [
        "number:size=50,size_param=page_size,total=total",
        "offset:size=70",
        "cursor:start=",
        "next",
        "link",
    ],
)
def test_the_items_of_a_collection_are_lines(layer: Layer, pages: str) -> None:  # noqa: F811
    source = paths("/api/customers", "/api/nothing")
    ran = layer("fetch", source, "--out", "out", "--pages", pages, "--items", "data", "--resume")
    assert ran.code == 3
    assert "1 fetched, 1 failed" in ran.err
    assert [line["value"] for line in lines_of("out")] == [document("customers", number) for number in range(1, 301)]
    assert {line["path"] for line in lines_of("out")} == {"/api/customers"}
    assert layer("fetch", source, "--out", "out", "--pages", pages, "--items", "data", "--resume").code == 3
    assert len(lines_of("out")) == 300


def test_a_collection_that_breaks_off_leaves_no_line(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with serve(Sandbox(documents=300, tokens=TOKENS, rotate_after=3)) as server:
        monkeypatch.setenv("LAYER_BASE_URL", server.url)
        ran = layer("fetch", paths("/api/customers"), "--out", "-", "--pages", "next", "--items", "data")
    assert ran.code in (1, 3)
    assert ran.out == b""


def test_a_large_collection_waits_on_the_disk(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("layer_async.cli._fetch.SPOOLED", 1000)
    monkeypatch.setattr("layer_async.cli._files.CHUNK", 1000)
    for out in ("out", "-"):
        ran = layer("fetch", paths("/api/sites"), "--out", out, "--pages", "next", "--items", "data")
        assert ran.code == 0
    lines = ran.out.splitlines()
    assert Path("out").read_bytes().splitlines() == lines
    assert [json.loads(line)["value"] for line in lines] == [document("sites", number) for number in range(1, 301)]


def test_a_collection_that_does_not_fit_is_taken_back_whole(
    layer: Layer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layer_async.cli._files.CHUNK", 1000)
    with files_limited_to(40_000):
        ran = layer("fetch", paths("/api/sites"), "--out", "out", "--pages", "next", "--items", "data", "--resume")
    assert ran.code == 4
    assert not Path("out").exists()


# Killed at any moment


@pytest.mark.promise
def test_every_key_is_there_exactly_once_though_runs_are_killed(
    full: bool, seed: int, report: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments, faults on, until it is through; then the same again with another output."""
    wanted, documents = (200, 3000) if full else (2, 120)
    draw = random.Random(seed)
    faults = Faults(unavailable=0.02, internal_error=0.02, cut_body=0.02, latency=0.05, slow_body=0.02, delay=0.02)
    kills = Counter[str]()
    completed = starts = 0
    with spawn(seed=seed, documents=documents, tokens=TOKENS, faults=faults) as sandbox:
        monkeypatch.setenv("LAYER_BASE_URL", sandbox.url)
        source = paths(*customers(documents))
        while kills.total() < wanted or not completed:
            out = f"out{completed}"
            while True:
                before = settled(out)
                process = start("fetch", source, "--out", out, "--resume", "--workers", "8", stderr=subprocess.PIPE)
                starts += 1
                if kills.total() < wanted:
                    if draw.random() < 0.8:  # else while it starts, too
                        until(partial(has_begun, process, out))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(draw.uniform(0.0, 1.0 if full else 0.4))
                    process.kill()
                _, err = process.communicate(timeout=120)
                if process.returncode == 0:
                    break
                assert process.returncode == -signal.SIGKILL, err
                now = settled(out)
                kills["that left more settled" if now > before else "that left nothing"] += 1
            completed += 1
            lines = lines_of(out)
            assert sorted(line["path"] for line in lines) == sorted(customers(documents))
            assert digest(line["value"] for line in lines) == sandbox.record()["served_digest"]
    assert min(kills.values()) > 0 or not full
    report += [f"{kills.total()} kills {dict(kills)}, {starts} starts, {completed} times {documents:,} keys, each once"]


@pytest.mark.promise
def test_lapsed_tokens_end_the_run_within_a_second_and_new_ones_complete_it(
    full: bool, seed: int, report: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static pair, replaced by the server in mid-run; the second ends with the process."""
    took: list[float] = []
    documents, workers = (4000, "50") if full else (200, "10")
    for place in range(10 if full else 1):
        out = f"out{place}"
        with spawn(
            seed=seed, documents=documents, tokens=TOKENS, faults=Faults(latency=1.0, delay=0.05 if full else 0.03)
        ) as sandbox:
            monkeypatch.setenv("LAYER_BASE_URL", sandbox.url)
            command = ("fetch", paths(*customers(documents)), "--out", out, "--resume", "--workers", workers)
            process = start(*command, stderr=subprocess.PIPE)
            until(partial(is_longer, out, 2 * documents))
            began = time.perf_counter()
            sandbox.rotate()
            _, err = process.communicate(timeout=60)
            took.append(time.perf_counter() - began)
            assert process.returncode == 1
            assert err.count(b"\n") == 2
            assert b"Token1 may have lapsed" in err.splitlines()[1]
            for name, token in zip(("LAYER_TOKEN1", "LAYER_TOKEN2"), sandbox.tokens(), strict=True):
                monkeypatch.setenv(name, token)
            process = start(*command, stderr=subprocess.PIPE)
            assert process.wait(60) == 0
            assert process.stderr is not None
            process.stderr.close()
            for name, token in zip(("LAYER_TOKEN1", "LAYER_TOKEN2"), TOKENS, strict=True):
                monkeypatch.setenv(name, token)
            assert found_by(out, seed) == sorted(customers(documents))
    report += [f"{len(took)} times, ended {max(took):.2f} s after the rotation at the latest"]
    assert max(took) < (1.0 if full else 10.0)


def found_by(out: str, seed: int) -> list[str]:
    """The paths in an output of a sandbox with that seed."""
    lines = lines_of(out)
    for line in lines:
        assert line["value"] == document("customers", int(line["path"].rpartition("/")[2]), seed=seed)
    return sorted(line["path"] for line in lines)


def is_longer(out: str, size: int) -> bool:
    """Whether there is more than so many bytes of it."""
    return Path(out).exists() and Path(out).stat().st_size > size


def has_begun(process: subprocess.Popen[bytes], out: str) -> bool:
    """Whether it holds its journal, or is through."""
    return Path(f"{out}.journal-lock").exists() or process.poll() is not None


def settled(out: str) -> int:
    """How many keys its journal knows."""
    if not Path(f"{out}.journal").exists():
        return 0
    with Journal(f"{out}.journal") as journal:
        return journal.settled
