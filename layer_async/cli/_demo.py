"""`layer-async demo`: the main job, on the sandbox."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from .. import ConfigurationError
from ._files import LineWriter, writing
from ._progress import Tally, showing


def demo(
    *,
    documents: Annotated[int, Parameter(validator=Number(gte=1))] = 5000,
    seed: int = 1,
    out: Path | None = None,
) -> int:
    """Fetch every document of a sandbox through faults, a quota and a rotation of the tokens, and check each.

    Parameters
    ----------
    documents: int
        How many documents to fetch, at least.
    seed: int
        What data, tokens and faults are drawn from.
    out: Path
        The folder to write documents.ndjson into; by default a fresh one.
    """
    try:
        from ..demo import run_demo
        from ..sandbox import COLLECTIONS
    except ImportError as exc:
        raise ConfigurationError(f"{exc}.") from exc

    documents += -documents % len(COLLECTIONS)
    with writing("a folder for temporary files" if out is None else str(out)):
        folder = Path(tempfile.mkdtemp(prefix="layer-async-demo-")) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / "documents.ndjson"
    with LineWriter.open(str(file)) as output:
        tally = Tally("fetched", documents)

        async def write(line: bytes) -> None:
            await output.write(line)
            tally.count()

        with showing(tally):
            report = run_demo(documents=documents, seed=seed, file=file, write=write, observer=tally.observe)
    with writing("stdout"):
        report.print_to(Console(width=100))
    return 1 if report.differences else 0
