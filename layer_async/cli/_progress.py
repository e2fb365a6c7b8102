"""How far a run of the command line is, and how that is shown: a live line on a terminal, a plain one elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import Event, GateShut, LayerError, RetryScheduled
from ._files import complain

PLAIN_INTERVAL = 5.0
NOTABLE_WAIT = 5.0


class Tally:
    """How far a run is. `show` is called after each item."""

    def __init__(self, verb: str, total: int | None = None) -> None:
        self.verb = verb
        self.total = total
        self.done = self.failed = self.retries = 0
        self.show: Callable[[], None] = lambda: None

    def __str__(self) -> str:
        return f"{self.done:,} {self.verb}, {self.failed:,} failed, {self.retries:,} retries"

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
    console = Console(stderr=True)
    if is_output_on_terminal:
        yield
        return
    if sys.stderr is None or not sys.stderr.isatty() or console.is_dumb_terminal:
        shown = clock()

        def show_line() -> None:
            nonlocal shown
            if clock() - shown >= PLAIN_INTERVAL:
                shown = clock()
                complain(f"{tally}.")

        tally.show = show_line
        yield
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(str(tally), total=tally.total)
        tally.show = lambda: progress.update(bar, completed=tally.done + tally.failed, description=str(tally))
        yield
