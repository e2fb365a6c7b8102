"""The main job, on the sandbox: fetch a whole account through faults, a quota and a rotation, and account for it all.

The sandbox runs in a process of its own and keeps the record; what arrived here is read back from the file that was
written and held against that record, document by document.

Rules: knows the door and the sandbox. A difference is reported, never explained away.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec
from rich.console import Console
from rich.table import Table

from . import (
    AsyncLayerClient,
    AttemptFinished,
    CallFinished,
    Event,
    LayerError,
    Observer,
    PoolStats,
    RetryScheduled,
    TokenPair,
    TokensRefreshed,
)
from .sandbox import COLLECTIONS, Faults, Quota, SandboxProcess, digest, document, spawn

FAULT_RATE = 0.02
RETRIED_AT_MOST = 2  # a document's faults end in time for its four attempts
WORKERS = 100
DOCUMENTS_A_SECOND = 417  # 5,000 in a window of 12 s
SHARE_OF_A_WINDOW = 0.53  # two windows hold all documents, and what is sent again
WINDOW_AT_MOST = 12.0
SHOWN_AT_MOST = 10
NEVER_SENT = ("ConnectError", "ConnectTimeout")


@attrs.define
class Meter:
    """An observer that counts."""

    also: Observer | None = None
    attempts: int = 0
    never_sent: int = 0
    refreshes: int = 0
    rate_limited: int = 0
    retries: Counter[str] = attrs.field(factory=Counter[str])
    elapsed: list[float] = attrs.field(factory=list[float])

    def __call__(self, event: Event, /) -> None:
        """Count `event`, and pass it on."""
        if self.also is not None:
            self.also(event)
        match event:
            case AttemptFinished():
                self.attempts += 1
                self.never_sent += event.error in NEVER_SENT
                self.rate_limited += event.status_code == 429
            case RetryScheduled():
                self.retries[event.cause] += 1
            case TokensRefreshed():
                self.refreshes += 1
            case CallFinished():
                self.elapsed.append(event.elapsed)
            case _:
                pass


@attrs.frozen
class Report:
    """What a run did, and where it differs from what the sandbox says of it (nowhere, if all is well)."""

    seed: int
    file: Path
    documents: int
    meter: Meter
    pool: PoolStats
    duration: float
    differences: tuple[str, ...]

    def print_to(self, console: Console) -> None:
        """Print the table, then each difference."""
        table = Table(title=f"layer-async demo, seed {self.seed}", title_justify="left", show_header=False)
        for name, value in self.rows():
            table.add_row(name, value)
        console.print(table)
        for difference in self.differences[:SHOWN_AT_MOST]:
            console.print(f"DIFFERENCE: {difference}", style="bold red", markup=False, soft_wrap=True)
        if len(self.differences) > SHOWN_AT_MOST:
            console.print(f"and {len(self.differences) - SHOWN_AT_MOST} more", style="bold red")
        if not self.differences:
            console.print(f"Every document is accounted for: {self.file}", markup=False, soft_wrap=True)

    def rows(self) -> list[tuple[str, str]]:
        """The table, row by row."""
        meter, pool = self.meter, self.pool
        cuts = statistics.quantiles(meter.elapsed, n=100) if len(meter.elapsed) > 1 else [0.0] * 99
        causes = ", ".join(f"{cause} {count}" for cause, count in meter.retries.most_common()) or "none"
        return [
            ("documents fetched and verified", f"{self.documents:,}"),
            ("calls", f"{len(meter.elapsed):,}"),
            ("attempts", f"{meter.attempts:,}"),
            ("retries by cause", causes),
            ("answered 429", f"{meter.rate_limited:,}" if meter.rate_limited else "0: slower than the quota allows"),
            ("token refreshes", f"{meter.refreshes - 1}"),
            ("connections opened, reused", f"{pool.opened:,}, {pool.reused:,}"),
            ("p50, p99 of a call", f"{cuts[49] * 1000:,.0f} ms, {cuts[98] * 1000:,.0f} ms"),
            ("duration", f"{self.duration:.1f} s"),
        ]


def quota_for(documents: int) -> Quota:
    """A quota that a run of so many documents meets once, in its middle, on fast machines and on slow ones.

    A window lets a little more than half of the documents through. Whoever comes that far within it waits for the next,
    which then holds all the rest: fast machines wait for long, slow ones briefly, and both are done in time.
    """
    return Quota(
        rate=SHARE_OF_A_WINDOW * DOCUMENTS_A_SECOND, window=min(documents / DOCUMENTS_A_SECOND, WINDOW_AT_MOST)
    )


def run_demo(
    *,
    documents: int,
    seed: int,
    file: Path,
    write: Callable[[bytes], Awaitable[None]],
    observer: Observer | None = None,
) -> Report:
    """Fetch at least `documents` documents, `write` a line for each, and check what `file` then holds.

    `observer` is told everything, beside the report's own meter. Raises what `write` raises, and `LayerError` where the
    sandbox's process does not start, or is gone at the end.
    """
    each = -(-documents // len(COLLECTIONS))
    try:
        sandbox = spawn(
            seed=seed,
            documents=each,
            faults=Faults.spread(FAULT_RATE, at_most=RETRIED_AT_MOST),
            quota=quota_for(each * len(COLLECTIONS)),
            rotate_after=each * len(COLLECTIONS) // 2,
        )
    except RuntimeError as exc:
        raise LayerError(f"{exc}.") from exc
    with sandbox:
        return anyio.run(fetch_account, sandbox, file, write, Meter(also=observer))


async def fetch_account(
    sandbox: SandboxProcess, file: Path, write: Callable[[bytes], Awaitable[None]], meter: Meter
) -> Report:
    """Fetch every document of `sandbox`, and hold the `file` that came of it against the sandbox's record."""
    failures: list[str] = []
    started = time.perf_counter()
    paths = (f"/api/{name}/{number}" for number in range(1, sandbox.documents + 1) for name in COLLECTIONS)
    async with AsyncLayerClient(
        tokens=lambda: TokenPair(*sandbox.tokens()), base_url=sandbox.url, observer=meter
    ) as client:
        async with client.bulk(paths, into=Any, workers=WORKERS) as outcomes:
            async for outcome in outcomes:
                if outcome.error is None:
                    await write(msgspec.json.encode({"path": outcome.item, "value": outcome.value}) + b"\n")
                else:
                    failures.append(f"{outcome.item}: {outcome.error}")
        pool = client.pool.stats
    duration = time.perf_counter() - started
    try:
        record = await anyio.to_thread.run_sync(sandbox.record)
        served = await anyio.to_thread.run_sync(sandbox.served)
    except (OSError, HTTPException) as exc:
        raise LayerError(f"the sandbox's process has gone, and its record with it: {exc}.") from exc
    documents = read_back(file)
    return Report(
        seed=sandbox.seed,
        file=file,
        documents=len(documents),
        meter=meter,
        pool=pool,
        duration=duration,
        differences=tuple(failures + compare(sandbox.seed, sandbox.documents, documents, meter, pool, record, served)),
    )


def read_back(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The path and the document of each line of `file`."""
    with file.open("rb") as lines:
        entries = [msgspec.json.decode(line) for line in lines]
    return [(entry["path"], entry["value"]) for entry in entries]


def compare(
    seed: int,
    each: int,
    documents: list[tuple[str, dict[str, Any]]],
    meter: Meter,
    pool: PoolStats,
    record: dict[str, Any],
    served: dict[str, list[int]],
) -> list[str]:
    """Where what arrived and what the client counted differ from what the sandbox's process says."""
    refused = record["statuses"].get("401", 0)
    wanted = {f"/api/{name}/{number}": (name, number) for name in COLLECTIONS for number in range(1, each + 1)}
    arrived = Counter(path for path, _ in documents)
    wrong = [path for path, value in documents if path in wanted and value != document(*wanted[path], seed=seed)]
    facts: list[tuple[str, Any, Any]] = [
        ("documents missing", sorted(wanted.keys() - arrived.keys())[:5], []),
        ("documents nobody asked for", sorted(arrived.keys() - wanted.keys())[:5], []),
        ("documents written twice", [path for path, times in arrived.items() if times > 1][:5], []),
        ("documents that belong elsewhere, or nowhere", wrong[:5], []),
        ("digest of all documents", digest(value for _, value in documents), record["served_digest"]),
        (
            "documents that the sandbox says it served",
            sum(times > 0 for name in COLLECTIONS for times in served.get(name, [])),
            len(wanted),
        ),
        (
            "attempts, with those sent again after a refusal",
            meter.attempts - meter.never_sent + refused,
            record["requests"],
        ),
        ("answers 429", meter.rate_limited, record["statuses"].get("429", 0)),
        ("rotations met by refreshes", meter.refreshes - 1, record["rotations"]),
        ("requests with tokens of two pairs", record["mixed"], 0),
        ("requests without tokens", record["missing"] + record["unknown"], 0),
        ("slots and waiters left", pool.in_use + pool.waiting, 0),
    ]
    return [f"{name}: {found!r}, not {expected!r}" for name, found, expected in facts if found != expected]
