"""The main job, on the sandbox: fetch a whole account, whatever happens meanwhile, and account for every document.

It happens: 2 % faults, a quota that nobody tells, a rotation of the tokens, a total outage, and the death of the
process that fetches, which the same command then resumes. That is `layer-async fetch --resume`, in a process of its
own, as is the sandbox, which keeps the record; what arrived is read back from the file that was written and held
against that record, document by document.

Rules: knows the door and the sandbox. A difference is reported, never explained away. Whatever ends the demo, its
processes end with it, and so do the files that hold the tokens.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import attrs
import msgspec
from rich.console import Console
from rich.table import Table

from . import AttemptFinished, CallFinished, Event, Journal, LayerError, RetryScheduled, TokensRefreshed
from .sandbox import COLLECTIONS, Faults, Quota, SandboxProcess, digest, document, spawn

FAULT_RATE = 0.02
RETRIED_AT_MOST = 2  # a document's faults end in time for its four attempts
DOCUMENTS_A_SECOND = 400.0  # the quota: most machines are faster, and have to learn it
SECONDS_AT_LEAST = 3.0  # or else a small demo would be over before it can be interrupted
OUTAGE = 1.0  # seconds
PATIENCE = 60.0  # a fetch that takes so many seconds, and one more for 50 documents, is ended
SHOWN_AT_MOST = 10
NEVER_SENT = ("ConnectError", "ConnectTimeout")
FETCH = [sys.executable, "-P", "-m", "layer_async.cli._pull"]  # `layer-async fetch --resume`, telling of its calls


@attrs.define
class Meter:
    """An observer that counts: of a process, or since it last told."""

    attempts: int = 0
    never_sent: int = 0
    opened: int = 0
    reused: int = 0
    rate_limited: int = 0
    refreshes: int = 0
    documents: int = 0
    retries: dict[str, int] = attrs.field(factory=dict[str, int])
    elapsed: list[float] = attrs.field(factory=list[float])

    def __call__(self, event: Event, /) -> None:
        """Count `event`."""
        match event:
            case AttemptFinished():
                self.attempts += 1
                self.never_sent += event.error in NEVER_SENT
                self.opened += event.reused is False
                self.reused += event.reused is True
                self.rate_limited += event.status_code == 429
            case RetryScheduled():
                self.retries[event.cause] = self.retries.get(event.cause, 0) + 1
            case TokensRefreshed():
                self.refreshes += 1
            case CallFinished():
                self.documents += event.error is None
                self.elapsed.append(event.elapsed)
            case _:
                pass

    def __add__(self, other: Meter) -> Meter:
        """What both have counted."""
        summed: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in COUNTS}
        return Meter(**summed, retries=Counter(self.retries) + Counter(other.retries))


COUNTS = [f for f in attrs.fields(Meter) if f.name != "retries"]


class FetchError(LayerError):
    """The process that fetches ended too early: with `code`, after saying `lines`."""

    def __init__(self, message: str, *, code: int = 1, lines: list[str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.lines: list[str] = lines or []


class Fetch:
    """`layer-async fetch --resume`, in a process of its own while the block lasts; it tells of its calls.

    `on_told` is called with what it says; `patience` is after how many seconds it is ended. `said` is a file for what
    it says to people, after what its like said there before: an error shows it all.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        on_told: Callable[[Meter], None],
        patience: float,
        said: IO[bytes],
    ) -> None:
        self.meter: Meter = Meter()
        self._on_told = on_told
        self._said = said
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter, our own arguments)
            [*FETCH, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            start_new_session=True,  # the Ctrl-C of the terminal is for us alone
        )
        self._timer = threading.Timer(patience, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._timer.cancel()

    def kill(self) -> None:
        """End it without a goodbye: by SIGKILL where there are signals."""
        self._process.kill()
        self._process.wait()

    def until(self, reached: Callable[[Meter], object]) -> None:
        """Listen until what it said last has `reached` something. Raises `FetchError` when it ends before."""
        if not self._listen(reached):
            self.until_the_end()
            raise FetchError(f"the fetch was over, with {self.meter.documents:,} documents, before it could be killed.")

    def until_the_end(self) -> None:
        """Listen until it ends. Raises `FetchError` unless it ends well."""
        self._listen(lambda _: False)
        code = self._process.wait()
        if code != 0:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").splitlines()
            raise FetchError(f"the fetch ended with {code}.", code=max(code, 1), lines=lines)

    def _listen(self, reached: Callable[[Meter], object]) -> bool:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):  # or it was killed in the middle of it
                told = msgspec.json.decode(line, type=Meter)
                self.meter += told
                self._on_told(told)
                if reached(told):
                    return True
        return False


@attrs.frozen
class Kill:
    """How things were when the process that fetched had been killed: by its journal, its output and the sandbox."""

    settled: int
    paths: list[str]
    record: dict[str, Any]
    served: dict[str, list[int]]


@attrs.frozen
class Run:
    """All that a report is made from.

    `killed` and `resumed` are what the two processes told: the first one's last moments are not in it. `outage` is for
    how many seconds, from its beginning, no document came.
    """

    seed: int
    each: int
    file: Path
    documents: list[tuple[str, dict[str, Any]]]
    killed: Meter
    resumed: Meter
    kill: Kill
    record: dict[str, Any]
    served: dict[str, list[int]]
    outage: float
    duration: float

    @property
    def turned_away(self) -> int:
        """How many requests the outage met: all that were answered 503 but for faults."""
        statuses: dict[str, int] = self.record["statuses"]
        faults: dict[str, int] = self.record["faults"]
        return statuses.get("503", 0) - faults.get("unavailable", 0) - faults.get("overloaded", 0)

    @property
    def again(self) -> list[str]:
        """The documents that were served after the kill although they were in the output and the journal by then."""
        return [
            path for path in self.kill.paths if times_served(self.served, path) > times_served(self.kill.served, path)
        ]

    def print_to(self, console: Console) -> list[str]:
        """Print the table, then each difference; returns the differences."""
        table = Table(title=f"layer-async demo, seed {self.seed}", title_justify="left", show_header=False)
        for name, value in self.rows():
            table.add_row(name, value)
        console.print(table)
        differences = self.differences()
        for difference in differences[:SHOWN_AT_MOST]:
            console.print(f"DIFFERENCE: {difference}", style="bold red", markup=False, soft_wrap=True)
        if len(differences) > SHOWN_AT_MOST:
            console.print(f"and {len(differences) - SHOWN_AT_MOST} more", style="bold red")
        if not differences:
            console.print(f"Every document is accounted for: {self.file}", markup=False, soft_wrap=True)
        return differences

    def rows(self) -> list[tuple[str, str]]:
        """The table, row by row."""
        meter = self.killed + self.resumed
        cuts = statistics.quantiles(meter.elapsed, n=100) if len(meter.elapsed) > 1 else [0.0] * 99
        retries = sorted(meter.retries.items(), key=lambda each: -each[1])
        untold = self.kill.record["requests"] - requests_of(self.killed, self.kill.record)
        return [
            ("documents fetched and verified", f"{len(self.documents):,}"),
            ("calls", f"{len(meter.elapsed):,}"),
            ("attempts", f"{meter.attempts:,}"),
            ("retries by cause", ", ".join(f"{cause} {count:,}" for cause, count in retries) or "none"),
            ("answered 429", f"{meter.rate_limited:,}" if meter.rate_limited else "0: slower than the quota allows"),
            ("token refreshes", f"{meter.refreshes - 2}"),
            ("connections opened, reused", f"{meter.opened:,}, {meter.reused:,}"),
            ("p50, p99 of a call", f"{cuts[49] * 1000:,.0f} ms, {cuts[98] * 1000:,.0f} ms"),
            ("outage ridden out", f"{self.outage:.1f} s; {self.turned_away:,} requests turned away"),
            ("killed at", f"{self.killed.documents:,} documents; {untold:,} of its requests not counted above"),
            ("resumed with", f"{self.kill.settled:,} documents there; {self.resumed.documents:,} to go"),
            ("duration", f"{self.duration:.1f} s"),
        ]

    def differences(self) -> list[str]:
        """Where what arrived and what was counted differ from what the sandbox's process says."""
        record, before = self.record, self.kill.record
        wanted = {f"/api/{name}/{number}": (name, number) for name in COLLECTIONS for number in range(1, self.each + 1)}
        arrived = Counter(path for path, _ in self.documents)
        wrong = [
            path
            for path, value in self.documents
            if path in wanted and value != document(*wanted[path], seed=self.seed)
        ]
        since = {status: count - before["statuses"].get(status, 0) for status, count in record["statuses"].items()}
        served = sum(times_served(self.served, path) > 0 for path in wanted)
        facts: list[tuple[str, Any, Any]] = [
            ("documents missing", sorted(wanted.keys() - arrived.keys())[:5], []),
            ("documents nobody asked for", sorted(arrived.keys() - wanted.keys())[:5], []),
            ("documents written twice", [path for path, count in arrived.items() if count > 1][:5], []),
            ("documents that belong elsewhere, or nowhere", wrong[:5], []),
            ("digest of all documents", digest(value for _, value in self.documents), record["served_digest"]),
            ("documents that the sandbox says it served", served, len(wanted)),
            ("documents fetched again although they were there", self.again[:5], []),
            ("documents there at the kill", len(self.kill.paths), self.kill.settled),
            ("documents that the resumed fetch fetched", self.resumed.documents, len(wanted) - self.kill.settled),
            (
                "attempts of the resumed fetch, with those sent again after a refusal",
                requests_of(self.resumed, {"statuses": since}),
                record["requests"] - before["requests"],
            ),
            ("answers 429 to the resumed fetch", self.resumed.rate_limited, since.get("429", 0)),
            (
                "attempts of the killed fetch that the sandbox knows nothing of",
                max(0, requests_of(self.killed, before) - before["requests"]),
                0,
            ),
            ("rotations", record["rotations"], 1),
            ("refreshes of the killed and the resumed fetch", (self.killed.refreshes, self.resumed.refreshes), (2, 1)),
            ("an outage that turned requests away", self.turned_away > 0, True),
            ("requests with tokens of two pairs", record["mixed"], 0),
            ("requests without tokens", record["missing"] + record["unknown"], 0),
        ]
        return [f"{name}: {found!r}, not {expected!r}" for name, found, expected in facts if found != expected]


def times_served(served: dict[str, list[int]], path: str) -> int:
    """How often the document at `path` was served."""
    _, _, name, number = path.split("/")
    counts = served.get(name, [])
    return counts[int(number)] if int(number) < len(counts) else 0


def requests_of(meter: Meter, record: dict[str, Any]) -> int:
    """How many requests the counted attempts were: one more where a refused pair was replaced."""
    refused: int = record["statuses"].get("401", 0)
    return meter.attempts - meter.never_sent + refused


def quota_for(documents: int) -> Quota:
    """A quota that a run of so many documents meets, before it is killed and after."""
    rate = min(DOCUMENTS_A_SECOND, documents / SECONDS_AT_LEAST)
    return Quota(rate=rate, burst=max(1, documents // 12))


def run_demo(*, documents: int, seed: int, file: Path, on_told: Callable[[Meter], None] = lambda _: None) -> Run:
    """Fetch at least `documents` documents into `file`, through all that the head of this room tells.

    `on_told` is called with what was counted since it was called last. Raises `FetchError` where the fetch fails,
    `LayerError` where the sandbox's process does not start, or is gone before the end.
    """
    each = -(-documents // len(COLLECTIONS))
    faults = Faults.spread(FAULT_RATE, at_most=RETRIED_AT_MOST)
    try:
        sandbox = spawn(seed=seed, documents=each, faults=faults, quota=quota_for(each * len(COLLECTIONS)))
    except RuntimeError as exc:
        raise LayerError(f"{exc}.") from exc
    try:
        with (
            sandbox,
            tempfile.TemporaryDirectory(prefix="layer-async-tokens-") as private,
            tempfile.TemporaryFile() as said,
        ):
            return fetch_account(sandbox, file, Path(private), said, on_told)
    except (ConnectionError, TimeoutError, HTTPException) as exc:
        raise LayerError(f"the sandbox's process has gone, and its record with it: {exc}.") from exc


def fetch_account(
    sandbox: SandboxProcess, file: Path, private: Path, said: IO[bytes], on_told: Callable[[Meter], None]
) -> Run:
    """Fetch every document of `sandbox`: rotate its tokens, take it away for a while, kill the fetch, resume it."""
    paths = paths_of(sandbox)
    total = len(paths)
    inputs = private / "paths"
    inputs.write_text("\n".join(paths))
    keep_tokens(private, sandbox.tokens())
    arguments = [str(inputs), str(file)]
    environment = environment_for(sandbox, private)
    patience = PATIENCE + total / 50
    started = time.perf_counter()

    with Fetch(arguments, environment, on_told, patience, said) as killed:
        killed.until(lambda _: killed.meter.documents >= total // 6)
        keep_tokens(private, sandbox.next_tokens())
        sandbox.rotate()

        killed.until(lambda _: killed.meter.documents >= total // 3)
        sandbox.outage(OUTAGE)
        began = time.perf_counter()
        killed.until(lambda told: told.documents and time.perf_counter() - began > OUTAGE)
        outage = time.perf_counter() - began

        killed.until(lambda _: killed.meter.documents >= total // 2)
        killed.kill()
    kill = look_after_the_kill(sandbox, file)
    on_told(Meter(documents=kill.settled - killed.meter.documents))  # what was not noted as done is fetched again

    with Fetch(arguments, environment, on_told, patience, said) as resumed:
        resumed.until_the_end()

    return Run(
        seed=sandbox.seed,
        each=sandbox.documents,
        file=file,
        documents=read_back(file),
        killed=killed.meter,
        resumed=resumed.meter,
        kill=kill,
        record=sandbox.record(),
        served=sandbox.served(),
        outage=outage,
        duration=time.perf_counter() - started,
    )


def paths_of(sandbox: SandboxProcess) -> list[str]:
    """Where its documents are."""
    return [f"/api/{name}/{number}" for number in range(1, sandbox.documents + 1) for name in COLLECTIONS]


def keep_tokens(folder: Path, tokens: tuple[str, str]) -> None:
    """Put the tokens where the fetch will read them when it next needs a pair."""
    for name, token in zip(("token1", "token2"), tokens, strict=True):
        (folder / name).write_text(token)


def environment_for(sandbox: SandboxProcess, private: Path) -> dict[str, str]:
    """What the fetch is told by its environment: ours, but for the server and the tokens."""
    return {
        **{name: value for name, value in os.environ.items() if not name.upper().startswith("LAYER_")},
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "LAYER_BASE_URL": sandbox.url,
        "LAYER_TOKEN1_FILE": str(private / "token1"),
        "LAYER_TOKEN2_FILE": str(private / "token2"),
    }


def look_after_the_kill(sandbox: SandboxProcess, file: Path) -> Kill:
    """What is there, by the journal, and what the sandbox had seen."""
    with Journal(f"{file}.journal") as journal:
        settled, offset = journal.settled, journal.offset or 0
    whole = file.read_bytes()[:offset].splitlines()
    paths = [msgspec.json.decode(line)["path"] for line in whole]
    return Kill(settled, paths, sandbox.record(), sandbox.served())


def read_back(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The path and the document of each line of `file`."""
    with file.open("rb") as lines:
        entries = [msgspec.json.decode(line) for line in lines]
    return [(entry["path"], entry["value"]) for entry in entries]
