"""Where a fetch puts what it found, and how the next run goes on from there.

Rules: the output first, then the journal, with the output's length; who resumes cuts the output back to that length.
The output is on the disk before the journal says so. Nobody else's file is overwritten, unless that is asked for.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Generator

import attrs
import msgspec

from .. import ConfigurationError, Journal
from ._files import LineWriter, OutputError, writing


class Ledger:
    """The journal as a bulk sees it: what is settled, is settled together with the output as long as it is by then.

    A key that is under way is passed over too: the same line twice is one item. The journal is opened and closed by
    whoever opens and closes the output.
    """

    def __init__(self, journal: Journal, output: LineWriter) -> None:
        self.journal = journal
        self._output = output
        self._under_way: set[str] = set()
        self._met_under_way = 0

    @property
    def repeated(self) -> int:
        """How often a key came that had come in this run before."""
        return self._met_under_way + self.journal.repeated

    @property
    def inputs_changed(self) -> None:
        """Told in the summary."""

    def open(self) -> None:
        """It is open."""

    def close(self) -> None:
        """It stays open."""

    def pulled(self, key: str) -> None:
        """The next key of the inputs."""
        self.journal.pulled(key)

    def ended(self) -> None:
        """The inputs have ended."""
        self.journal.ended()

    def is_settled(self, key: str) -> bool:
        """Whether the item is to be passed over."""
        if key in self._under_way:
            self._met_under_way += 1
            return True
        if self.journal.is_settled(key):
            return True
        self._under_way.add(key)
        return False

    def settle(self, key: str, *, ok: bool) -> None:
        """The item's lines are in the output, or its failure is told."""
        self._under_way.discard(key)
        self.journal.settle(key, ok=ok, offset=self._output.size)


@attrs.frozen
class Results:
    """The files of a fetch: its output, its failures, and what it knows of earlier runs."""

    output: LineWriter
    errors: LineWriter | None
    ledger: Ledger | None

    @property
    def journal(self) -> Journal | None:
        """The journal of a run that can be resumed."""
        return None if self.ledger is None else self.ledger.journal

    def write_error(self, names: dict[str, str | int], error: Exception, attempts: int | None) -> None:
        """One line of JSON for an item that failed."""
        if self.errors is not None:
            told = {
                **names,
                "error": type(error).__name__,
                "status": getattr(error, "status_code", None),
                "message": str(error),
                "attempts": attempts,
            }
            text = {
                name: value.encode(errors="replace").decode() if isinstance(value, str) else value
                for name, value in told.items()
            }
            self.errors.write_at_once(msgspec.json.encode(text) + b"\n")


@contextlib.contextmanager
def open_results(
    out: str, *, errors: str | None, source: io.FileIO, resume: bool, retry_failed: bool, force: bool
) -> Generator[Results]:
    """Open them all, or raise `OutputError` or `ConfigurationError` and leave everything as it is.

    `source` is what the run reads, which none of them may be.
    """
    journal = f"{out}.journal"
    if errors == "-":
        raise ConfigurationError("--errors takes a file of its own.")
    _refuse_one_for_two(source, out, errors, journal)
    if retry_failed and not resume:
        raise ConfigurationError("--retry-failed is for --resume.")
    is_file = out != "-" and (os.path.isfile(out) or not os.path.exists(out))
    if resume and not is_file:
        raise ConfigurationError("--resume needs a file to go on with: stdout, pipes and devices cannot be cut back.")
    with contextlib.ExitStack() as opened:
        if force and is_file:
            _forget(journal)
        if resume:
            output, ledger = opened.enter_context(
                _resumed(out, Journal(journal, retry_failed=retry_failed), force=force)
            )
        else:
            if is_file and os.path.exists(journal):
                raise OutputError(f"{journal} is there, of a run that --resume goes on with; --force begins anew.")
            output, ledger = opened.enter_context(LineWriter.open(out, overwrite=force)), None
        writer = None
        if errors is not None:
            writer = opened.enter_context(LineWriter.open(errors, overwrite=force, append=resume and not force))
        yield Results(output, writer, ledger)


def _refuse_one_for_two(source: io.FileIO, out: str, errors: str | None, journal: str) -> None:
    """Nothing is written over the input, or by two writers: whatever they are called, links and redirections too."""
    files: list[tuple[str, str | int]] = [("the input", source.fileno())]
    if out != "-":
        files.append(("--out", out))
        files += [(f"the journal {journal}", f"{journal}{end}") for end in ("", "-wal", "-shm", "-lock")]
    elif sys.stdout is not None:  # else the input may have its number
        files.append(("--out", 1))
    if errors is not None:
        files.append(("--errors", errors))
    owners: dict[object, str] = {}
    for role, file in files:
        for mark in _marks(file):
            owner = owners.setdefault(mark, role)
            if owner != role:
                raise ConfigurationError(f"{role} and {owner} are one file: each takes a file of its own.")


def _marks(file: str | int) -> Generator[object]:
    """What two names of one file have in common. Devices and pipes may be shared."""
    try:
        status = os.stat(file)
    except OSError:  # there is none yet, or it will be told when it is opened
        status = None
    if status is None or stat.S_ISREG(status.st_mode):
        if isinstance(file, str):
            yield os.path.realpath(file)
        if status is not None:
            yield status.st_dev, status.st_ino


@contextlib.contextmanager
def _resumed(out: str, journal: Journal, *, force: bool) -> Generator[tuple[LineWriter, Ledger]]:
    is_new = not journal.path.exists()
    length = os.path.getsize(out) if os.path.exists(out) else None
    if is_new and length and not force:
        raise OutputError(f"{out} exists already, but not its journal, to go on with it: name another file.")
    with journal:
        offset = journal.offset or 0
        if offset > (length or 0):
            raise OutputError(
                f"{out} is not as the last run left it: {length or 0:,} bytes, where its journal knows of {offset:,}. "
                "Put it back, or begin anew with --force."
            )
        with LineWriter.open(out, at=offset) as output:
            journal.before_commit = output.sync
            try:
                yield output, Ledger(journal, output)
            finally:
                journal.close()  # before the output, which it puts on the disk


def _forget(path: str) -> None:
    """Remove the journal there, unless it is none, or another run's at this moment."""
    if os.path.exists(path):
        with Journal(path):
            pass
        with writing(path):
            os.unlink(path)
