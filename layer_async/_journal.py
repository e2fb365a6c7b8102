"""The journal of a bulk: which keys are settled, on disk, so that a run that was ended in any way can be resumed.

Rules: a key is in the journal only after whoever settled it said so; a killed run loses at most the keys that it
settled in its last moments, never the rest (at least once). Nothing waits for the disk: a thread of the journal's own
commits what has been settled, many keys at a time. Memory does not grow with the number of keys. One run holds a
journal, by a lock that dies with its process. Keys are stored as they are given, queries included: the file is for its
owner's eyes only, and no key is in a message or repr.

SQLite in WAL mode with `synchronous=NORMAL`: a killed process loses no commit; a power cut may lose the last ones and
breaks nothing. A journal that is behind is safe: its keys are fetched again, and an output is cut back to its offset.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ._errors import ConfigurationError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

__all__ = ["Journal"]

APPLICATION_ID = 0x4C61794A
VERSION = 2
BATCH = 1000  # so many keys are committed at once,
AGE = 0.2  # or, where fewer come, those of so many seconds
BACKLOG = 8 * BATCH  # where the disk is slower than the run, the run waits from here on
# A statement settles so many keys: each statement gives up the interpreter's lock once, which a busy event loop is slow
# to give back. Three parameters each, and old SQLites allow 999.
ROWS = 300
CACHE_KIB = 1024  # of each of two connections
WAL_BYTES = 4 * 2**20  # from this size on, what is in the write-ahead log is moved into the database

SCHEMA = (
    "CREATE TABLE settled (key BLOB PRIMARY KEY, ok INTEGER NOT NULL, run INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE state (settled, failed, place, runs, pulled, in_order, in_any_order, ended)",
    "INSERT INTO state VALUES (0, 0, NULL, 0, 0, x'', x'', 0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


class Journal:
    """Which keys of a bulk are settled, in a file: `client.bulk(paths, journal=Journal("run.db"))`.

    A bulk that is given the journal of an earlier run skips the keys that are settled there. It may be used for that
    alone, or by hand: `with Journal("run.db") as journal`, then `pulled`, `is_settled` and `settle` for each key; a
    bulk calls the whole number 7 `"\\x007"` there, so that it is not "7". All methods may be called from any thread;
    none waits for the disk but `open`, `flush` and `close`.

    Arguments:
        path: The file, an SQLite database, which is made where there is none. Keys are stored in it as they are given:
            where paths carry secrets in their queries, they are in the file, which only its owner can read. Beside it
            are files of SQLite's (`-wal`, `-shm`) and a lock (`-lock`) while a run holds it.
        retry_failed: Whether the keys that failed in an earlier run are not taken as settled, and so tried again.

    `before_commit` may be set to a function: it is called before each commit, in the thread that commits, so that what
    the keys stand for is on the disk before they are (as the command line does with its output). An exception of it
    keeps the keys uncommitted.
    """

    def __init__(self, path: str | os.PathLike[str], *, retry_failed: bool = False) -> None:
        if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes) or not os.fspath(path):
            raise ConfigurationError("a journal needs the path of a file, as text or a Path.")
        self.path: Path = Path(os.path.realpath(path))
        self.retry_failed = retry_failed
        self.before_commit: Callable[[], None] | None = None
        self._lock = threading.Condition()  # of all that follows but the writer's connection
        self._writing = threading.Lock()  # of the writer's connection
        self._reader: sqlite3.Connection | None = None
        self._reset()

    def _reset(self) -> None:
        self._pending: dict[bytes, bool] = {}
        self._committing: dict[bytes, bool] = {}
        self._oldest = 0.0
        self._failure: OSError | None = None
        self._closing = False
        self._settled = self._failed = 0
        self._offset: int | None = None
        self._new_offset: int | None = None
        self._run = 0
        self._repeated = 0
        self._inputs = _Inputs()

    def open(self) -> None:
        """Open the file, or make it.

        Raises `ConfigurationError` when another run holds it, when it is not a journal or one of another version, and
        when it cannot be read or written.
        """
        import sqlite3

        if self._reader is not None:
            raise ConfigurationError(f"{self!r} is open already: one run holds a journal.")
        with contextlib.ExitStack() as opened:
            try:
                lock = _locked(self.path)
                opened.callback(_unlock, lock, self.path)
                _make_private(self.path)
                writer = opened.enter_context(contextlib.closing(_connect(self.path)))
                _prepare(writer, self.path)
                reader = opened.enter_context(contextlib.closing(_connect(self.path)))
                for database in (writer, reader):
                    database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
                reader.execute("PRAGMA query_only = 1")
                state = reader.execute("SELECT * FROM state").fetchone()
            except (sqlite3.Error, OSError) as exc:
                raise ConfigurationError(_why_not(exc, self.path)) from exc
            self._reset()
            self._settled, self._failed, self._offset, runs, *inputs = state
            self._run = runs + 1
            self._inputs = _Inputs(*inputs, settled=self._settled)
            opened.pop_all()
        self._guard, self._writer, self._reader = lock, writer, reader
        self._thread = threading.Thread(target=self._commit_when_due, name="layer_async journal", daemon=True)
        self._thread.start()

    def is_settled(self, key: str) -> bool:
        """Whether `key` is settled: in an earlier run, or already in this one. Some microseconds."""
        raw = _raw(key)
        with self._lock:
            ok, run = 0, self._run
            if raw not in self._pending and raw not in self._committing:
                row = self._opened().execute("SELECT ok, run FROM settled WHERE key = ?", (raw,)).fetchone()
                if row is None:
                    return False
                ok, run = row
            if run == self._run:
                self._repeated += 1
                return True
            self._inputs.known += 1
        return bool(ok) or not self.retry_failed

    def settle(self, key: str, *, ok: bool, offset: int | None = None) -> None:
        """Note that `key` is settled, with a value (`ok`) or as failed; it is committed soon, with others.

        `offset`: how long the output is with this key's part in it, for whoever resumes to cut it back to. Raises
        `OSError` when an earlier commit failed: what was settled since then is not on the disk.
        """
        raw = _raw(key)
        with self._lock:
            self._opened()
            if self._failure is not None:
                raise self._failure
            pending = self._pending
            pending[raw] = ok
            if offset is not None:
                self._new_offset = offset
            count = len(pending)
            if count == 1:
                self._oldest = time.monotonic()
                self._lock.notify()
            elif count == BATCH:
                self._lock.notify()
        if count >= BACKLOG:
            self.flush()

    def pulled(self, key: str) -> None:
        """Note the next key of the inputs, settled or not, so that inputs which changed since are noticed."""
        self._inputs.add(_raw(key))

    def ended(self) -> None:
        """Note that the inputs have ended: all their keys were pulled."""
        self._inputs.ended = True

    def flush(self) -> None:
        """Commit what has been settled so far. Raises `OSError` where that fails; nothing is forgotten then."""
        with self._lock:
            self._opened()
        self._commit()

    def close(self) -> None:
        """Commit what has been settled, and close the file; harmless twice. Raises `OSError` as `flush` does."""
        with self._lock:
            if self._reader is None:
                return
            self._closing = True
            self._lock.notify()
        self._thread.join()
        try:
            self._commit()
        finally:
            with self._lock:
                self._reader.close()
                self._reader = None
            self._writer.close()
            _unlock(self._guard, self.path)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def settled(self) -> int:
        """How many keys are settled, the failed ones included, as of the last commit."""
        return self._settled

    @property
    def failed(self) -> int:
        """How many keys are settled as failed, as of the last commit."""
        return self._failed

    @property
    def repeated(self) -> int:
        """How often a key was asked for that this same run had settled."""
        return self._repeated

    @property
    def offset(self) -> int | None:
        """How long the output is with all that is settled in it, as of the last commit; None if nobody ever said."""
        return self._offset

    @property
    def inputs_changed(self) -> str | None:
        """What of the inputs is not as it was in the earlier run, as a sentence; None while nothing is known of it.

        It is known once as many keys have been pulled as in that run, or the inputs have ended.
        """
        return self._inputs.changed

    def __repr__(self) -> str:
        state = "closed" if self._reader is None else f"{self._settled} settled, {self._failed} failed"
        return f"<Journal {str(self.path)!r}: {state}>"

    def _opened(self) -> sqlite3.Connection:
        if self._reader is None:
            raise ConfigurationError(f"{self!r} is not open: use it in a `with`.")
        return self._reader

    def _commit_when_due(self) -> None:
        """The journal's thread. A failure ends it, and is raised to whoever settles next."""
        while True:
            with self._lock:
                while not self._closing and len(self._pending) < BATCH:
                    left = self._oldest + AGE - time.monotonic() if self._pending else None
                    if left is not None and left <= 0:
                        break
                    self._lock.wait(left)
                if self._closing:
                    return
            try:
                self._commit()
                self._checkpoint()
            except OSError as exc:
                self._failure = exc
                return

    def _commit(self) -> None:
        """Take what is pending, and commit it in one transaction; where that fails, it is still there to be tried."""
        import sqlite3

        with self._writing:
            with self._lock:
                self._committing.update(self._pending)
                self._pending = {}
                offset = self._offset if self._new_offset is None else self._new_offset
                inputs = self._inputs.state()
            if self.before_commit is not None:
                self.before_commit()
            rows = sorted(self._committing.items())
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                settled, failed = self._settled, self._failed
                for start in range(0, len(rows), ROWS):
                    known, known_failed = _settle_rows(self._writer, self._run, chunk := rows[start : start + ROWS])
                    settled += len(chunk) - known
                    failed += sum(not ok for _, ok in chunk) - known_failed
                self._writer.execute(
                    "UPDATE state SET settled = ?, failed = ?, place = ?, runs = ?, pulled = ?, in_order = ?,"
                    " in_any_order = ?, ended = ?",
                    (settled, failed, offset, self._run, *inputs),
                )
                self._writer.execute("COMMIT")
            except sqlite3.Error as exc:
                if self._writer.in_transaction:
                    with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
                        self._writer.execute("ROLLBACK")
                raise OSError(_errno_of(exc), f"the journal cannot be written: {exc}", str(self.path)) from exc
            with self._lock:
                self._committing = {}
                self._settled, self._failed, self._offset = settled, failed, offset
                self._failure = None

    def _checkpoint(self) -> None:
        """Move what is in the write-ahead log into the database: with waits for the disk, so in the thread only."""
        import sqlite3

        with self._writing, contextlib.suppress(sqlite3.Error, OSError):  # what is committed is safe in the log
            if os.stat(f"{self.path}-wal").st_size >= WAL_BYTES:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


class _Inputs:
    """What is known of the keys that a run has pulled: how many, and digests of them in their order and in any.

    Compared with what an earlier run knew when this one has come as far, or its inputs have ended.
    """

    __slots__ = ("_before", "_in_any_order", "_in_order", "count", "difference", "ended", "known", "settled")

    def __init__(
        self, count: int = 0, in_order: bytes = b"", in_any_order: bytes = b"", ended: int = 0, *, settled: int = 0
    ) -> None:
        self._before = (count, in_order, in_any_order, ended)
        self._in_order = blake2b(digest_size=16)
        self._in_any_order = 0
        self.count = 0
        self.ended = False
        self.settled = settled  # by earlier runs
        self.known = 0  # of those, so many came again
        self.difference: str | None = None

    def add(self, raw: bytes) -> None:
        self.count += 1
        self._in_order.update(len(raw).to_bytes(4, "big") + raw)
        self._in_any_order += int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")
        if self.count == self._before[0]:
            _, in_order, in_any_order, _ = self._now()
            if in_order != self._before[1]:
                self.difference = (
                    f"the first {self.count:,} keys are those of the earlier run in another order"
                    if in_any_order == self._before[2]
                    else f"the first {self.count:,} keys are not those of the earlier run"
                )

    @property
    def changed(self) -> str | None:
        found = [] if self.difference is None else [self.difference]
        before, *_, had_ended = self._before
        if self.ended and self.count < before:
            found.append(f"they end after {self.count:,} keys, where the earlier run had pulled {before:,}")
        if had_ended and self.count > before:
            found.append(f"they go on after {before:,} keys, where those of the earlier run ended")
        if found and self.ended and self.settled > self.known:
            found.append(f"{self.settled - self.known:,} settled keys did not come again")
        return f"the inputs have changed: {'; '.join(found)}." if found else None

    def state(self) -> tuple[int, bytes, bytes, int]:
        """What is stored: of the run that knows more of its inputs."""
        return self._now() if self.ended or self.count > self._before[0] else self._before

    def _now(self) -> tuple[int, bytes, bytes, int]:
        return self.count, self._in_order.digest(), (self._in_any_order % 2**128).to_bytes(16, "big"), int(self.ended)


def _raw(key: str) -> bytes:
    if not isinstance(key, str):
        raise ConfigurationError(f"a journal's keys are text, not {type(key).__name__}: give the bulk a key= of yours.")
    return key.encode("utf-8", "surrogatepass")


def _settle_rows(writer: sqlite3.Connection, run: int, rows: list[tuple[bytes, bool]]) -> tuple[int, int]:
    """Settle them, and say how many of them were settled before, and as failed."""
    keys = ",".join(["?"] * len(rows))
    known: int
    known_failed: int
    known, known_failed = writer.execute(
        f"SELECT count(*), total(ok = 0) FROM settled WHERE key IN ({keys})",  # noqa: S608 (question marks only)
        [key for key, _ in rows],
    ).fetchone()
    writer.execute(
        f"INSERT INTO settled VALUES {','.join(['(?,?,?)'] * len(rows))}"  # noqa: S608 (question marks only)
        " ON CONFLICT (key) DO UPDATE SET ok = excluded.ok, run = excluded.run",
        [value for key, ok in rows for value in (key, ok, run)],
    )
    return known, int(known_failed)


def _connect(path: str | os.PathLike[str], timeout: float = 5.0) -> sqlite3.Connection:
    import sqlite3

    return sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)


def _prepare(writer: sqlite3.Connection, path: Path) -> None:
    """Make a new file a journal, and see that an old one is."""
    application_id, version, tables = (
        writer.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    is_new = application_id == version == tables == 0
    if not is_new and application_id != APPLICATION_ID:
        raise ConfigurationError(f"{path} is a database, but not a journal: name another file.")
    if not is_new and version != VERSION:
        which = "a newer" if version > VERSION else "an older"
        raise ConfigurationError(
            f"the journal {path} was written by {which} version of layer_async: resume with that one, or name another."
        )
    writer.execute("PRAGMA journal_mode = WAL").fetchone()
    writer.execute("PRAGMA synchronous = NORMAL")
    writer.execute("PRAGMA wal_autocheckpoint = 0")
    writer.execute("BEGIN IMMEDIATE")  # on a file that is not to be written to, this is where it fails
    if is_new:
        for statement in SCHEMA:
            writer.execute(statement)
    writer.execute("COMMIT")


def _make_private(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _lock_of(path: Path) -> str:
    return f"{path}-lock"


def _locked(path: Path) -> sqlite3.Connection:
    """Take the lock that a run holds: SQLite's own, on an empty database, which works everywhere and dies with us.

    Whoever held it last may be removing its file at this moment; a lock on a file that is gone is none.
    """
    while True:
        before = _inode(path)
        lock = _connect(_lock_of(path), timeout=0)
        try:
            lock.execute("BEGIN EXCLUSIVE")
            if before is not None and before == _inode(path):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


def _inode(path: Path) -> int | None:
    try:
        return os.stat(_lock_of(path)).st_ino
    except FileNotFoundError:
        return None


def _unlock(lock: sqlite3.Connection, path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows keeps it while it is open: an empty file stays
        os.unlink(_lock_of(path))
    lock.close()


def _why_not(exc: Exception, path: Path) -> str:
    import sqlite3

    code = _code_of(exc)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"the journal {path} is held by another run: let it end, or name another journal."
    if code == sqlite3.SQLITE_NOTADB:
        return f"{path} is not a journal: name another file."
    why = exc.strerror if isinstance(exc, OSError) else exc
    return f"the journal {path} cannot be opened: {why}. Its folder must be there and writable, with room on the disk."


def _code_of(exc: Exception) -> int:
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF  # the rest is detail


def _errno_of(exc: Exception) -> int:
    import sqlite3

    return {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS}.get(_code_of(exc), errno.EIO)
