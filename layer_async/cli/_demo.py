"""`layer-async demo`: the main job, on the sandbox."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from .. import ConfigurationError
from ._files import OutputError, complain, writing
from ._progress import Tally, showing

if TYPE_CHECKING:
    from ..demo import Meter


class Screen(Console):
    """A console for which a closed stdout is an error like any other.

    rich would end the process with 1, and that is for differences.
    """

    def on_broken_pipe(self) -> None:
        """Raise what is being handled."""
        raise  # it is called where the error was caught


def demo(
    *,
    documents: Annotated[int, Parameter(validator=Number(gte=1))] = 5000,
    seed: int = 1,
    out: Path | None = None,
) -> int:
    """Fetch every document of a sandbox, whatever happens, and check each.

    It happens: 2 % faults, a quota that has to be learned, a rotation of the tokens, an outage, and the death of the
    process that fetches, which the same command then resumes.

    Parameters
    ----------
    documents: int
        How many documents to fetch, at least.
    seed: int
        What data, tokens and faults are drawn from.
    out: Path
        The folder to write documents.ndjson into, and its journal; by default a fresh one.
    """
    try:
        from ..demo import FetchError, run_demo
        from ..sandbox import COLLECTIONS
    except ImportError as exc:
        raise ConfigurationError(f"{exc}.") from exc

    documents += -documents % len(COLLECTIONS)
    tally = Tally("fetched", documents)

    def show(told: Meter) -> None:
        tally.done += told.documents
        tally.retries += sum(told.retries.values())
        tally.show()

    file = fresh_file(out)
    try:
        with showing(tally):
            run = run_demo(documents=documents, seed=seed, file=file, on_told=show)
    except FetchError as exc:
        for line in exc.lines:
            complain(line.removeprefix("layer-async: "))
        complain(str(exc))
        return exc.code
    with writing("stdout"):
        return 1 if run.print_to(Screen(width=100)) else 0


def fresh_file(out: Path | None) -> Path:
    """Where the documents go: into a folder that has none. Raises `OutputError`."""
    with writing("a folder for temporary files" if out is None else str(out)):
        folder = Path(tempfile.mkdtemp(prefix="layer-async-demo-")) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / "documents.ndjson"
    for name in (str(file), f"{file}.journal"):
        if os.path.lexists(name):
            raise OutputError(f"{name} exists already: name another folder, or move it away.")
    return file
