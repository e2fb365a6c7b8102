"""How far a run of the command line is, and how that is shown: a live line on a terminal, a plain one elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import Event, GateShut, LayerError, Outcomes, RetryScheduled
from ._files import Lines, complain
from ._resume import Results

PLAIN_INTERVAL = 5.0
LIVE_INTERVAL = 0.1
NOTABLE_WAIT = 5.0


class Tally:
    """How far a run is. `show` is called after each item.

    `lines` is what the run reads, `results` where it writes, both for `fetch`; `total` how many items there are, where
    that is known.
    """

    def __init__(self, verb: str, total: int | None = None) -> None:
        self.verb = verb
        self.total = total
        self.done: int = 0
        self.failed: int = 0
        self.retries: int = 0
        self.show: Callable[[], None] = lambda: None
        self.lines: Lines[Any] | None = None
        self.results: Results | None = None
        self.outcomes: Outcomes[Any, Any, Any] | None = None
        self.pace: Callable[[], float | None] = lambda: None
        self.has_ended = False

    def __str__(self) -> str:
        ledger = None if self.results is None else self.results.ledger
        repeated = 0 if ledger is None else ledger.repeated
        before = self.skipped - repeated
        return (
            f"{self.done:,} {self.verb}, {self.failed:,} failed, {self.retries:,} retries"
            + (f", {before:,} already there" if before else "")
            + (f", {repeated:,} named twice" if repeated else "")
        )

    @property
    def skipped(self) -> int:
        """How many items were settled before, or came before in this run."""
        return 0 if self.outcomes is None else self.outcomes.progress.skipped

    @property
    def share(self) -> float | None:
        """How much of the work is done, from 0 to 1; None where that is not known."""
        if self.total is not None:
            return (self.done + self.failed) / self.total
        return None if self.lines is None else self.lines.share

    def live(self) -> str:
        """All that is known at this moment."""
        parts = [str(self)]
        if self.outcomes is not None:
            progress = self.outcomes.progress
            parts.append(f"{progress.rate:,.0f}/s")
            if (pace := self.pace()) is not None:
                parts.append(f"quota {pace:,.0f}/s")
            if progress.held:
                parts.append(f"{progress.held:,} held until the server is back")
            seen, share = progress.done + progress.skipped, self.share
            if share and progress.rate > 0:
                parts.append(f"ETA {timedelta(seconds=round(seen * (1 / share - 1) / progress.rate))}")
        return ", ".join(parts)

    def summary(self, results: Results) -> str:
        """What became of the run, and what to do where something is missing."""
        output, journal = results.output, results.journal
        there = f"the documents are in {output.name}" if output.size or self.done else f"{output.name} is empty"
        told = [f"{self}; {there}." if self.has_ended or output.size else f"{self}."]
        if self.outcomes is not None and self.outcomes.stopped is not None:
            told.append(f"The run was stopped: {self.outcomes.stopped}")
        if journal is not None:
            if journal.inputs_changed is not None:
                told.append(f"Note that {journal.inputs_changed}")
            if not self.has_ended:
                told.append("The same command goes on from here.")
            elif journal.failed:
                told.append(f"{journal.failed:,} noted as failed: --retry-failed tries again.")
        return " ".join(told)

    @property
    def is_complete(self) -> bool:
        """Whether the run has come to its end and nothing is missing, of what earlier runs did neither."""
        journal = None if self.results is None else self.results.journal
        return self.has_ended and not self.failed and not (journal and journal.failed)

    def count(self) -> None:
        """Count an item that is done."""
        self.done += 1
        self.show()

    def fail(self, item: str, error: LayerError) -> None:
        """Count an item that failed, and say why."""
        self.failed += 1
        complain(f"{item}: {str(error).removeprefix(f'{error.request}: ')}")
        self.show()

    def observe(self, event: Event, /) -> None:
        """Take note of what the client tells."""
        if isinstance(event, RetryScheduled):
            self.retries += 1
        elif isinstance(event, GateShut) and event.delay >= NOTABLE_WAIT:
            complain(f"the server said slow down: going on in {event.delay:.0f} s.")


@contextlib.contextmanager
def showing(
    tally: Tally, *, is_output_on_terminal: bool = False, clock: Callable[[], float] = time.monotonic
) -> Generator[None]:
    """Show `tally` while the block runs: a bar where stderr is a terminal, elsewhere a plain line from time to time.

    `is_output_on_terminal`: the lines of output are progress enough, and a bar would be in their way.
    """
    if is_output_on_terminal:
        yield
        return
    console = Console(stderr=True)
    is_live = sys.stderr is not None and sys.stderr.isatty() and not console.is_dumb_terminal
    interval = LIVE_INTERVAL if is_live else PLAIN_INTERVAL
    shown = clock()

    def show_by(show: Callable[[str], object]) -> Callable[[], None]:
        def show_when_due() -> None:
            nonlocal shown
            now = clock()
            if now - shown >= interval:
                shown = now
                show(tally.live())

        return show_when_due

    if not is_live:
        tally.show = show_by(lambda text: complain(f"{text}."))
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(str(tally), total=None)

        def show(text: str) -> None:
            share = tally.share
            progress.update(bar, description=text, completed=share or 0.0, total=None if share is None else 1.0)

        tally.show = show_by(show)
        yield
        show(tally.live())
