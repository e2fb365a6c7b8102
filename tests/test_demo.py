"""The demo: it accounts for every document, through a kill too, says so in a table, and finds what does not add up."""

from __future__ import annotations

import copy
import io
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
from rich.console import Console

from layer_async import (
    AttemptFinished,
    CallFinished,
    Event,
    GateShut,
    RequestInfo,
    RetryScheduled,
    TokensRefreshed,
    cli,
    demo,
)
from layer_async.cli import _pull
from layer_async.sandbox import COLLECTIONS, Quota, Sandbox, SandboxProcess, document, serve, spawn

from .test_cli import lines_of, until

INFO = RequestInfo("GET", "http://h/x")


@attrs.frozen
class Done:
    """A run of the demo, and all that it told meanwhile."""

    run: demo.Run
    told: demo.Meter


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    file = tmp_path_factory.mktemp("demo") / "documents.ndjson"
    told = [demo.Meter()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SECONDS_AT_LEAST", 1.0)
        patch.setattr(demo, "OUTAGE", 0.2)
        patch.setenv("LAYER_TOKEN1", "somebody's own")  # which are none of the sandbox's business
        run = demo.run_demo(documents=235, seed=3, file=file, on_told=told.append)
    return Done(run, sum(told, demo.Meter()))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that the demo has started: sandboxes, and fetches."""
    started: list[Any] = []

    def spawn_and_note(**options: Any) -> SandboxProcess:
        sandbox = spawn(**options)
        started.append(sandbox)
        return sandbox

    class Noted(demo.Fetch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(demo, "spawn", spawn_and_note)
    monkeypatch.setattr(demo, "Fetch", Noted)
    return started


def all_ended(children: list[Any]) -> bool:
    return bool(children) and all(child._process.returncode is not None for child in children)


def fetch_by(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Each fetch of the demo is one of these programs, in turn; an empty one is the real fetch."""
    left = list(programs)
    true_init = demo.Fetch.__init__

    def init(self: demo.Fetch, arguments: list[str], *others: Any) -> None:
        program = left.pop(0)
        with pytest.MonkeyPatch.context() as patch:
            if program:
                patch.setattr(demo, "FETCH", [sys.executable, "-c", program])
            true_init(self, arguments, *others)

    monkeypatch.setattr(demo.Fetch, "__init__", init)


# A run


def test_a_run_accounts_for_every_document(done: Done) -> None:
    run = done.run
    assert run.differences() == []
    assert sorted(path for path, _ in run.documents) == sorted(
        f"/api/{name}/{number}"
        for name in COLLECTIONS
        for number in range(1, 41)  # rounded up to as many of each
    )
    assert run.record["rotations"] == 1
    assert run.turned_away > 0
    assert run.outage > 0.2
    assert 120 <= run.killed.documents < 240
    assert 0 < run.kill.settled < 240
    assert run.resumed.documents == 240 - run.kill.settled


def test_the_quota_is_met_and_nobody_tells_it(done: Done) -> None:
    assert done.run.record["rate_limited"] > 0
    assert not demo.quota_for(240).headers


def test_what_is_told_meanwhile_is_what_is_counted(done: Done) -> None:
    counted = done.run.killed + done.run.resumed
    assert attrs.evolve(done.told, documents=counted.documents) == counted
    assert done.told.documents == 240
    assert len(counted.elapsed) >= counted.documents >= 240


def printed(run: demo.Run, width: int = 100) -> str:
    out = io.StringIO()
    run.print_to(Console(file=out, width=width))
    return out.getvalue()


def test_the_table_has_a_row_for_each_figure(done: Done) -> None:
    text = printed(done.run)
    for row in (
        r"documents fetched and verified │ 240 ",
        r"calls +│ \d\d\d ",
        r"attempts +│ \d\d\d ",
        r"retries by cause +│ \S+ \d",
        r"answered 429 +│ \d",
        r"token refreshes +│ 1 ",
        r"connections opened, reused +│ \d+, \d+ ",
        r"p50, p99 of a call +│ [\d,]+ ms, [\d,]+ ms ",
        r"outage ridden out +│ \d\.\d s; \d+ requests turned away ",
        r"killed at +│ 1\d\d documents; \d+ of its requests not counted above ",
        r"resumed with +│ \d+ documents there; \d+ to go ",
        r"duration +│ \d+\.\d s ",
    ):
        assert re.search(row, text), row
    assert text.endswith(f"Every document is accounted for: {done.run.file}\n")


def test_a_table_of_nothing_can_be_printed_too(done: Done) -> None:
    text = printed(attrs.evolve(done.run, killed=demo.Meter(), resumed=demo.Meter()))
    assert "none" in text
    assert "0: slower than the quota allows" in text


def test_differences_are_printed_but_not_thousands_of_them(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.Run, "differences", lambda _: [f"[no markup] {number}" for number in range(5000)])
    text = printed(done.run)
    assert "DIFFERENCE: [no markup] 0\n" in text
    assert text.count("DIFFERENCE") == demo.SHOWN_AT_MOST
    assert text.endswith("and 4990 more\n")
    assert "accounted for" not in text


# What is compared


def missing(run: Any) -> None:
    run.documents.pop()


def twice(run: Any) -> None:
    run.documents.append(run.documents[0])


def unasked(run: Any) -> None:
    run.documents.append(("/api/customers/41", {}))


def altered(run: Any) -> None:
    run.documents[0][1]["id"] += 1


def swapped(run: Any) -> None:
    (first, one), (second, other) = run.documents[:2]
    run.documents[:2] = [(first, other), (second, one)]


def never_served(run: Any) -> None:
    run.served["sites"][1] = 0


def lost_collection(run: Any) -> None:
    del run.served["sites"]


def not_resumed(run: Any) -> None:
    _, _, name, number = run.kill.paths[0].split("/")
    run.served[name][int(number)] += 1


def journal_of_another(run: Any) -> None:
    run.kill.paths.pop()


def fetched_more(run: Any) -> None:
    run.resumed.documents += 1


def unknown_attempt(run: Any) -> None:
    run.resumed.attempts -= 1


def invented_attempts(run: Any) -> None:
    run.killed.attempts += 10_000


def other_refusals(run: Any) -> None:
    run.record["statuses"]["429"] = 10_000


def other_rotations(run: Any) -> None:
    run.record["rotations"] += 1


def no_refresh(run: Any) -> None:
    run.killed.refreshes -= 1


def no_outage(run: Any) -> None:
    run.record["statuses"].pop("503")
    run.record["faults"] = {}


def mixed_tokens(run: Any) -> None:
    run.record["mixed"] += 1


def no_tokens(run: Any) -> None:
    run.record["missing"] += 1


def unknown_tokens(run: Any) -> None:
    run.record["unknown"] += 1


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (missing, "documents missing"),
        (twice, "documents written twice"),
        (unasked, "documents nobody asked for: ['/api/customers/41'], not []"),
        (altered, "digest of all documents"),
        (swapped, "documents that belong elsewhere, or nowhere: ['/api/"),
        (never_served, "documents that the sandbox says it served: 239, not 240"),
        (lost_collection, "documents that the sandbox says it served: 200, not 240"),
        (not_resumed, "documents fetched again although they were there: ['/api/"),
        (journal_of_another, "documents there at the kill"),
        (fetched_more, "documents that the resumed fetch fetched"),
        (unknown_attempt, "attempts of the resumed fetch"),
        (invented_attempts, "attempts of the killed fetch that the sandbox knows nothing of"),
        (other_refusals, "answers 429 to the resumed fetch"),
        (other_rotations, "rotations: 2, not 1"),
        (no_refresh, "refreshes of the killed and the resumed fetch: (1, 1), not (2, 1)"),
        (no_outage, "an outage that turned requests away: False, not True"),
        (mixed_tokens, "requests with tokens of two pairs: 1, not 0"),
        (no_tokens, "requests without tokens: 1, not 0"),
        (unknown_tokens, "requests without tokens: 1, not 0"),
    ],
)
def test_a_difference_is_found(done: Done, tamper: Callable[[Any], None], expected: str) -> None:
    run = copy.deepcopy(done.run)
    tamper(run)
    assert any(difference.startswith(expected) for difference in run.differences())


def test_a_meter_counts_what_it_hears() -> None:
    meter = demo.Meter()
    events: list[Event] = [
        TokensRefreshed(1),
        AttemptFinished(INFO, 1, None, "ConnectTimeout", 5.0, None),
        RetryScheduled(INFO, 1, "ConnectTimeout", 0.1),
        AttemptFinished(INFO, 2, 429, None, 0.1, False),
        RetryScheduled(INFO, 2, "429", 0.1),
        GateShut(1.0),
        AttemptFinished(INFO, 3, 200, None, 0.1, True),
        CallFinished(INFO, 200, None, 3, 0.3),
        CallFinished(INFO, 404, "NotFoundError", 1, 0.1),
    ]
    for event in events:
        meter(event)
    assert meter == demo.Meter(
        attempts=3,
        never_sent=1,
        opened=1,
        reused=1,
        rate_limited=1,
        refreshes=1,
        documents=1,
        retries={"ConnectTimeout": 1, "429": 1},
        elapsed=[0.3, 0.1],
    )
    assert meter + demo.Meter() == meter
    assert (meter + meter).retries == {"ConnectTimeout": 2, "429": 2}


@pytest.mark.parametrize("documents", [6, 600, 5004])
def test_the_quota_is_one_that_a_run_meets(documents: int) -> None:
    quota = demo.quota_for(documents)
    assert 1 <= quota.capacity < documents / 4  # before the kill, and after
    assert quota.rate <= demo.DOCUMENTS_A_SECOND
    assert documents / quota.rate < 13  # and does not wait for long


# The process that fetches


def fetched(tmp_path: Path, sandbox: Any, monkeypatch: pytest.MonkeyPatch, output: int) -> int:
    (tmp_path / "paths").write_text("/api/customers/1\n/api/customers/2\n")
    monkeypatch.setenv("LAYER_BASE_URL", sandbox.url)
    for name, token in zip(("LAYER_TOKEN1", "LAYER_TOKEN2"), sandbox.sandbox.tokens, strict=True):
        monkeypatch.setenv(name, token)
    return _pull.main(str(tmp_path / "paths"), str(tmp_path / "out"), output=output)


def test_the_fetch_tells_all_that_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with serve(Sandbox(documents=2)) as sandbox, open(reading, "rb") as told:
        assert fetched(tmp_path, sandbox, monkeypatch, writing) == 0
        os.close(writing)
        meter = sum((msgspec.json.decode(line, type=demo.Meter) for line in told), demo.Meter())
    assert (meter.documents, meter.attempts, meter.refreshes) == (2, 2, 0)
    assert {line["path"]: line["value"] for line in lines_of(str(tmp_path / "out"))} == {
        f"/api/customers/{number}": document("customers", number) for number in (1, 2)
    }


def test_a_fetch_that_nobody_listens_to_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with serve(Sandbox(documents=2)) as sandbox:
        assert fetched(tmp_path, sandbox, monkeypatch, writing) == 143
    os.close(writing)
    assert "interrupted" in capfd.readouterr().err


# On the command line

PULL = "import sys, time; from pathlib import Path; from layer_async.cli._pull import main; paths, out = sys.argv[1:]; "
FAILS = "import sys; print('layer-async: it hurts', file=sys.stderr); print('here', file=sys.stderr); sys.exit(4)"
TAMPERS = (
    PULL
    + """
code = main(paths, out)
first, second, *others, last = Path(out).read_bytes().splitlines(keepends=True)
Path(out).write_bytes(b"".join([second, second, *others, last.replace(b'"id":', b'"id":9')]))
sys.exit(code)
"""
)
HANGS = "import time; time.sleep(60)"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def run_small(monkeypatch: pytest.MonkeyPatch, temporary: Path, children: list[Any]) -> Callable[..., int]:
    """A small demo, without quota, on the command line: afterwards no process and no token is left."""

    def run(*arguments: str, documents: int = 600) -> int:
        monkeypatch.setattr(demo, "quota_for", lambda _: Quota(rate=1e6))
        monkeypatch.setattr(demo, "OUTAGE", 0.05)
        code = cli.run(["demo", "--documents", str(documents), *arguments])
        assert all_ended(children)
        assert list(temporary.glob("layer-async-tokens-*")) == []
        return code

    return run


def test_the_demo_writes_into_a_fresh_folder_and_exits_with_0(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    temporary: Path,
    children: list[Any],
    run_small: Callable[..., int],
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # the sandbox is next door: no proxy leads there
    assert run_small("--seed", "7") == 0
    out, err = capfd.readouterr()
    [file] = temporary.glob("layer-async-demo-*/documents.ndjson")
    assert f"Every document is accounted for: {file}" in out
    assert "demo, seed 7" in out
    assert len(lines_of(str(file))) == 600
    assert len(children) == 3
    for token in re.findall(r"[0-9a-f]{40}", out + err):
        raise AssertionError(token)


def test_what_is_lost_doubled_and_changed_in_the_file_makes_the_demo_exit_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_small: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    fetch_by(monkeypatch, "", TAMPERS)
    assert run_small("--out", str(tmp_path)) == 1
    out = capfd.readouterr().out
    for difference in ("documents missing: ['/api", "documents written twice: ['/api", "elsewhere, or nowhere: ['/api"):
        assert difference in out
    assert "accounted for" not in out


def test_a_fetch_that_never_resumes_makes_the_demo_exit_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_small: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    fetch_by(monkeypatch, "", "pass")
    assert run_small("--out", str(tmp_path)) == 1
    out = capfd.readouterr().out
    assert "DIFFERENCE: documents missing: ['/api/" in out
    assert "DIFFERENCE: documents that the resumed fetch fetched: 0, not " in out


@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        (FAILS, 4, "layer-async: it hurts\nlayer-async: here\nlayer-async: the fetch ended with 4.\n"),
        ("import os; os.kill(os.getpid(), 15)", 1, "layer-async: the fetch ended with -15.\n"),
        (HANGS, 1, "layer-async: the fetch ended with -9.\n"),
        ("print('half a line', end='')", 1, "the fetch was over, with 0 documents, before it could be killed.\n"),
    ],
)
def test_a_fetch_that_fails_is_told_with_all_that_it_said(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run_small: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    program: str,
    code: int,
    told: str,
) -> None:
    monkeypatch.setattr(demo, "PATIENCE", 0.5)
    fetch_by(monkeypatch, program)
    assert run_small("--out", str(tmp_path), documents=6) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith(told)


def test_a_resumed_fetch_that_fails_is_told_with_what_the_killed_one_said_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_small: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    fetch_by(monkeypatch, f"{PULL} print('it is lost', file=sys.stderr, flush=True); sys.exit(main(paths, out))", FAILS)
    assert run_small("--out", str(tmp_path)) == 4
    err = capfd.readouterr().err
    assert err.startswith("layer-async: it is lost\n")
    assert err.endswith("layer-async: it hurts\nlayer-async: here\nlayer-async: the fetch ended with 4.\n")


def test_a_folder_that_cannot_be_used_is_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, children: list[Any]
) -> None:
    (tmp_path / "file").touch()
    assert cli.run(["demo", "--out", f"{tmp_path}/file"]) == 4
    assert (
        capfd.readouterr().err
        == f"layer-async: {tmp_path}/file exists already: name another file, or move this one away.\n"
    )
    assert cli.run(["demo", "--out", f"{tmp_path}/file/below"]) == 4
    assert capfd.readouterr().err == f"layer-async: {tmp_path}/file/below cannot be written: Not a directory.\n"
    (tmp_path / "documents.ndjson.journal").touch()
    assert cli.run(["demo", "--out", str(tmp_path)]) == 4
    assert (
        capfd.readouterr().err == f"layer-async: {tmp_path}/documents.ndjson.journal exists already: "
        "name another folder, or move it away.\n"
    )
    assert children == []


def test_a_full_disk_ends_the_demo(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_small: Callable[..., int]
) -> None:
    fetch_by(
        monkeypatch,
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000,) * 2);"
        + PULL
        + "sys.exit(main(paths, out))",
    )
    assert run_small("--out", str(tmp_path)) == 4
    err = capfd.readouterr().err
    assert "cannot be written" in err
    assert err.endswith("the fetch ended with 4.\n")


@pytest.mark.parametrize("moment", ["at first", "in the outage", "when resumed"])
def test_ctrl_c_ends_the_demo_and_its_processes(
    moment: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    children: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    run_small: Callable[..., int],
) -> None:
    outages: list[float] = []
    true_outage = SandboxProcess.outage

    def outage(self: SandboxProcess, seconds: float) -> None:
        true_outage(self, seconds)
        outages.append(seconds)

    monkeypatch.setattr(SandboxProcess, "outage", outage)

    def tells(fetch: slice) -> bool:
        return any(each.meter.attempts for each in children[fetch])

    # Where nothing is being opened: what an interrupt finds half made, nobody can close.
    reached = {
        "at first": lambda: tells(slice(1, 2)),
        "in the outage": lambda: outages,
        "when resumed": lambda: tells(slice(2, 3)),
    }

    def interrupt() -> None:
        until(reached[moment])
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = run_small("--out", str(tmp_path))
    thread.join()
    assert code == 130
    assert capfd.readouterr().err == "layer-async: interrupted.\n"


def test_a_reader_that_has_gone_is_no_difference(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda **_: done.run)
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.MonkeyPatch.context() as patch, open(writing, "w") as closed:
        patch.setattr(sys, "stdout", closed)
        assert cli.run(["demo", "--out", str(tmp_path)]) == 4
        patch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for what is in the buffer still
    assert capfd.readouterr() == ("", "")


def test_a_sandbox_that_does_not_start_is_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> SandboxProcess:
        raise RuntimeError("the sandbox's process ended with 1 before it served")

    monkeypatch.setattr(demo, "spawn", fail)
    assert cli.run(["demo", "--out", str(tmp_path)]) == 1
    assert capfd.readouterr().err == "layer-async: the sandbox's process ended with 1 before it served.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_is_gone_before_the_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_small: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    true_rotate = SandboxProcess.rotate

    def rotate(self: SandboxProcess) -> int:
        self.close()
        return true_rotate(self)

    monkeypatch.setattr(SandboxProcess, "rotate", rotate)
    assert run_small("--out", str(tmp_path)) == 1
    assert "the sandbox's process has gone, and its record with it: " in capfd.readouterr().err
