"""The journal: what is settled stays settled, whatever ends the run; one run holds it; changed inputs are told."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import layer_async
from layer_async import ConfigurationError, Journal, _journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def run(path: Path, keys: list[str], **options: Any) -> str | None:
    """One run over `keys`, which settles what is not settled; returns what it says of its inputs."""
    with Journal(path, **options) as journal:
        for key in keys:
            journal.pulled(key)
            if not journal.is_settled(key):
                journal.settle(key, ok=True)
        journal.ended()
        return journal.inputs_changed


def keys_of(path: Path) -> list[str]:
    """What another program reads in the file."""
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT key FROM settled").fetchall()
    database.close()
    return sorted(key.decode("utf-8", "surrogatepass") for (key,) in rows)


def until(condition: Callable[[], object]) -> None:
    """Wait until it holds, for half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# What is settled


def test_a_key_is_settled_at_once_and_in_the_next_run_too(path: Path) -> None:
    with Journal(path) as journal:
        assert not journal.is_settled("/a")
        journal.settle("/a", ok=True)
        assert journal.is_settled("/a")
        journal.flush()
        assert journal.is_settled("/a")
        assert not journal.is_settled("/b")
        assert (journal.settled, journal.failed, journal.offset) == (1, 0, None)
    with Journal(path) as journal:
        assert journal.is_settled("/a")
        assert not journal.is_settled("/b")
        assert (journal.settled, journal.failed) == (1, 0)


@pytest.mark.parametrize("retry_failed", [False, True])
def test_failed_keys_are_tried_again_by_choice(path: Path, retry_failed: bool) -> None:
    with Journal(path) as journal:
        journal.settle("/bad", ok=False)
        journal.settle("/good", ok=True)
    with Journal(path, retry_failed=retry_failed) as journal:
        assert (journal.settled, journal.failed) == (2, 1)
        assert journal.is_settled("/good")
        assert journal.is_settled("/bad") is not retry_failed
        journal.settle("/bad", ok=True)
        journal.flush()
        assert (journal.settled, journal.failed) == (2, 0)
        assert journal.is_settled("/bad")


def test_counts_are_of_keys_not_of_calls(path: Path) -> None:
    with Journal(path) as journal:
        for number in range(1700):
            journal.settle(f"/{number % 850}", ok=number % 2 == 0)
            if number % 300 == 0:
                journal.flush()
        journal.flush()
        assert (journal.settled, journal.failed) == (850, 425)


def test_any_text_is_a_key_and_nothing_else_is(path: Path) -> None:
    odd = ["", "/a?x=1", "/\udcff", "/\ud800", "/é", "/\x00"]
    run(path, odd)
    assert keys_of(path) == sorted(odd)
    with Journal(path) as journal:
        keys: list[Any] = [1, b"/a", None]
        for key in keys:
            with pytest.raises(ConfigurationError, match="keys are text"):
                journal.is_settled(key)


def test_the_offset_is_that_of_the_last_commit(path: Path) -> None:
    with Journal(path) as journal:
        journal.settle("/a", ok=True, offset=10)
        assert journal.offset is None
        journal.flush()
        assert journal.offset == 10
        journal.settle("/b", ok=False)
    with Journal(path) as journal:
        assert journal.offset == 10


# When it is written


def test_many_keys_are_committed_without_being_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_journal, "AGE", 1e9)
    with Journal(path) as journal:
        for number in range(_journal.BATCH - 1):
            journal.settle(f"/{number}", ok=True)
        until(lambda: vars(journal._lock)["_waiters"])
        assert journal.settled == 0
        journal.settle("/last", ok=True)
        until(lambda: journal.settled == _journal.BATCH)
        assert len(keys_of(path)) == _journal.BATCH


def test_few_keys_are_committed_when_the_first_is_old_enough(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_journal, "AGE", 0.01)

    def committed(journal: Journal, count: int) -> bool:
        return journal.settled == count

    with Journal(path) as journal:
        for number in range(3):
            journal.settle(f"/{number}", ok=True)
            until(partial(committed, journal, number + 1))
            assert keys_of(path) == [f"/{number}" for number in range(number + 1)]


def test_keys_wait_for_each_other(path: Path) -> None:
    commits = 0

    def count() -> None:
        nonlocal commits
        commits += 1

    with Journal(path) as journal:
        journal.before_commit = count
        for number in range(10_000):
            journal.settle(f"/{number}", ok=True)
    assert commits <= 10_000 // _journal.BATCH + 1 + 10_000 * 1e-3  # by number, at the end, and by age


def test_what_a_key_stands_for_is_on_the_disk_before_it(path: Path) -> None:
    seen: list[int] = []
    with Journal(path) as journal:
        journal.before_commit = lambda: seen.append(journal.settled)
        journal.settle("/a", ok=True)
        journal.flush()
        assert seen == [0]
        journal.before_commit = None

        def fail() -> None:
            raise OSError(errno.EIO, "no disk")

        journal.before_commit = fail
        journal.settle("/b", ok=True)
        with pytest.raises(OSError, match="no disk"):
            journal.flush()
        assert journal.settled == 1
        assert journal.is_settled("/b")
        journal.before_commit = None


def test_what_is_settled_during_a_commit_is_in_the_next(path: Path) -> None:
    with Journal(path) as journal:
        journal.settle("/a", ok=True, offset=1)

        def settle_more() -> None:
            journal.before_commit = None
            journal.settle("/b", ok=True, offset=2)
            assert journal.is_settled("/a")

        journal.before_commit = settle_more
        journal.flush()
        assert (journal.settled, journal.offset) == (1, 1)
        journal.flush()
        assert (journal.settled, journal.offset) == (2, 2)


def test_where_the_disk_is_slower_than_the_run_the_run_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_journal, "BATCH", 10**9)
    monkeypatch.setattr(_journal, "BACKLOG", 50)
    with Journal(path) as journal:
        for number in range(50):
            journal.settle(f"/{number}", ok=True)
        assert journal.settled == 50


def test_the_log_is_moved_into_the_database_now_and_then(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_journal, "WAL_BYTES", 10_000)
    monkeypatch.setattr(_journal, "AGE", 0.0)
    log = Path(f"{path}-wal")
    with Journal(path) as journal:
        for number in range(500):
            journal.settle(f"/{number:0100}", ok=True)
        journal.flush()

        def is_moved() -> bool:
            journal.settle("/again", ok=True)
            return log.stat().st_size < 10_000

        until(is_moved)
    assert not log.exists()


def test_many_threads_may_settle(path: Path) -> None:
    def settle(name: int) -> None:
        for number in range(500):
            journal.settle(f"/{name}/{number}", ok=True)
            assert journal.is_settled(f"/{name}/{number}")
            if number % 100 == 0:
                journal.flush()

    with Journal(path) as journal:
        threads = [threading.Thread(target=settle, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        journal.flush()
        assert journal.settled == 2000


# Disks that fail


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """In here no file of this process grows beyond what the journal's have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{path}-wal").stat().st_size + 100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_what_was_settled_can_be_committed_later(path: Path) -> None:
    with Journal(path) as journal:
        journal.settle("/a", ok=True, offset=5)
        journal.flush()
        with full_disk(path):
            journal.settle("/b", ok=True, offset=9)
            with pytest.raises(OSError, match="the journal cannot be written") as caught:
                journal.flush()
        assert "/b" not in str(caught.value)
        assert journal.is_settled("/b")
        assert (journal.settled, journal.offset) == (1, 5)
    assert keys_of(path) == ["/a", "/b"]


def test_a_commit_that_failed_by_itself_is_told_to_who_settles_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_journal, "AGE", 0.0)
    with Journal(path) as journal:
        with full_disk(path):
            journal.settle("/a", ok=True)
            until(lambda: not journal._thread.is_alive())
            with pytest.raises(OSError, match="the journal cannot be written"):
                journal.settle("/b", ok=True)
        journal.flush()
        journal.settle("/b", ok=True)
    assert keys_of(path) == ["/a", "/b"]


def test_a_journal_that_cannot_be_written_at_its_end_is_closed_all_the_same(path: Path) -> None:
    journal = Journal(path)
    journal.open()
    with full_disk(path):
        journal.settle("/a", ok=True)
        with pytest.raises(OSError, match="the journal cannot be written"):
            journal.close()
    journal.close()
    assert not Path(f"{path}-lock").exists()


def test_a_commit_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path) as journal:
        for number in range(2 * _journal.ROWS):
            journal.settle(f"/{number}", ok=True, offset=number)
        settle_rows = _journal._settle_rows
        calls: list[int] = []

        def break_off(writer: sqlite3.Connection, run: int, rows: list[tuple[bytes, bool]]) -> tuple[int, int]:
            calls.append(len(rows))
            if len(calls) == 2:
                raise sqlite3.OperationalError("x")
            return settle_rows(writer, run, rows)

        monkeypatch.setattr(_journal, "_settle_rows", break_off)
        with pytest.raises(OSError, match="the journal cannot be written: x"):
            journal.flush()
        assert keys_of(path) == []
        assert (journal.settled, journal.offset) == (0, None)
        journal.flush()
        assert journal.settled == len(keys_of(path)) == 2 * _journal.ROWS


@pytest.mark.parametrize(
    ("code", "number"),
    [(sqlite3.SQLITE_FULL, errno.ENOSPC), (sqlite3.SQLITE_READONLY, errno.EROFS), (sqlite3.SQLITE_IOERR, errno.EIO)],
)
def test_an_error_of_the_database_is_one_of_the_disk(code: int, number: int) -> None:
    error = sqlite3.OperationalError("x")
    error.sqlite_errorcode = code | 0x100
    assert _journal._errno_of(error) == number


# Who holds it


def test_two_runs_on_one_journal_are_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(path)
    with Journal(path) as journal:
        journal.settle("/a", ok=True)
        for name in (path, tmp_path / "alias"):
            for _ in range(2):
                with pytest.raises(ConfigurationError, match="held by another run"):
                    Journal(name).open()
        with pytest.raises(ConfigurationError, match="open already"):
            journal.open()
        refused = subprocess.run(
            [sys.executable, "-c", f"from layer_async import Journal; Journal({str(path)!r}).open()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            capture_output=True,
            text=True,
        )
        assert "held by another run" in refused.stderr
    with Journal(path) as journal:
        assert journal.is_settled("/a")


HOLDER = """
import sys
from layer_async import Journal
journal = Journal(sys.argv[1])
journal.open()
for number in range(int(sys.argv[2])):
    journal.settle(f"/{number}", ok=True)
    if number % 100 == 99:
        journal.flush()
        print(number, flush=True)
sys.stdin.read()
"""


def test_a_killed_run_holds_nothing_and_what_it_committed_is_there(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), "1050"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    while process.stdout.readline() != b"999\n":
        pass
    with pytest.raises(ConfigurationError, match="held by another run"):
        Journal(path).open()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    with Journal(path) as journal:
        assert 1000 <= journal.settled <= 1050
        assert all(journal.is_settled(f"/{number}") for number in range(1000))


def test_a_lock_on_a_file_that_its_holder_removed_is_not_taken_for_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inodes = iter([7, None, 7, 8, 9, 9])
    monkeypatch.setattr(_journal, "_inode", lambda _: next(inodes))
    with Journal(path):
        assert list(inodes) == []


def test_nothing_but_the_journal_is_left(path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    run(path, ["/a"])
    assert os.listdir(path.parent) == ["run.db"]
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # the listing's own
    assert threading.active_count() == threads


# What it is


def test_only_its_owner_can_read_it(path: Path) -> None:
    with Journal(path) as journal:
        journal.settle("/secret", ok=True)
        journal.flush()
        for name in (path, Path(f"{path}-wal")):
            assert stat.S_IMODE(name.stat().st_mode) == 0o600


def test_no_key_is_in_a_repr(path: Path) -> None:
    journal = Journal(path)
    assert repr(journal) == f"<Journal '{path}': closed>"
    with journal:
        journal.settle("/a?secret=1", ok=False)
        journal.flush()
        assert repr(journal) == f"<Journal '{path}': 1 settled, 1 failed>"


def test_what_is_no_journal_is_refused_and_left_as_it_is(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE precious (x)")
    database.close()
    foreign = path.read_bytes()
    with pytest.raises(ConfigurationError, match="a database, but not a journal"):
        Journal(path).open()
    assert path.read_bytes() == foreign
    path.write_text("some text, which is precious too" * 99)
    with pytest.raises(ConfigurationError, match="is not a journal: name another file"):
        Journal(path).open()
    assert path.read_text() == "some text, which is precious too" * 99
    assert os.listdir(path.parent) == ["run.db"]


def test_what_comes_again_in_one_run_is_told_from_what_earlier_runs_settled(path: Path) -> None:
    with Journal(path) as journal:
        journal.settle("/good", ok=True)
        journal.settle("/bad", ok=False)
    with Journal(path, retry_failed=True) as journal:
        assert journal.is_settled("/good")
        assert not journal.is_settled("/bad")
        assert journal.repeated == 0
        for count, key in enumerate(("/bad", "/new"), 1):
            journal.settle(key, ok=False)
            assert journal.is_settled(key)
            journal.flush()
            assert journal.is_settled(key)
            assert journal.repeated == 2 * count
        assert journal.is_settled("/good")
        assert journal.repeated == 4
    with Journal(path) as journal:
        assert journal.is_settled("/new")
        assert journal.repeated == 0


@pytest.mark.parametrize(("step", "which"), [(1, "a newer"), (-1, "an older")])
def test_a_journal_of_another_version_is_refused(path: Path, step: int, which: str) -> None:
    run(path, ["/a"])
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {_journal.VERSION + step}")
    database.close()
    with pytest.raises(ConfigurationError, match=f"{which} version of layer_async"):
        Journal(path).open()


def test_a_place_where_no_journal_can_be_is_told(path: Path, tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere" / "run.db", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be opened: unable to open database file"):
            Journal(name).open()
    monkey = tmp_path / "folder"
    monkey.mkdir()
    (monkey / "run.db-lock").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        Journal(monkey / "run.db").open()


def test_a_file_that_cannot_be_made_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigurationError, match="cannot be opened: Permission denied"):
        Journal(path).open()


def test_a_file_that_is_empty_becomes_a_journal(path: Path) -> None:
    path.touch()
    run(path, ["/a"])
    assert keys_of(path) == ["/a"]


@pytest.mark.parametrize("name", ["", b"run.db", 7])
def test_a_path_is_text_or_a_path(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="needs the path of a file"):
        Journal(name)


def test_a_journal_that_is_not_open_says_so(path: Path) -> None:
    journal = Journal(path)
    uses: list[Callable[[], object]] = [
        lambda: journal.is_settled("/a"),
        lambda: journal.settle("/a", ok=True),
        journal.flush,
    ]
    for use in uses:
        with pytest.raises(ConfigurationError, match="not open"):
            use()
    journal.close()
    assert not path.exists()


def test_it_can_be_opened_again(path: Path) -> None:
    journal = Journal(path)
    for _ in range(2):
        with journal:
            journal.settle("/a", ok=True)
    assert journal.settled == 1


def test_importing_the_package_leaves_sqlite_alone() -> None:
    code = "import sys; import layer_async; layer_async.Journal('x'); print('sqlite3' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(layer_async.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


# Changed inputs

ALL = [f"/{number}" for number in range(20)]


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        (ALL, ALL, None),
        (ALL, [*ALL[:5], ALL[6], ALL[5], *ALL[7:]], "the first 20 keys are those of the earlier run in another order"),
        (ALL, ["/new", *ALL[1:]], "the first 20 keys are not those of the earlier run; 1 settled keys did not come"),
        (ALL, ["/new", *ALL], "the first 20 keys are not those of the earlier run; they go on after 20 keys"),
        (ALL, [*ALL, "/new"], "they go on after 20 keys, where those of the earlier run ended"),
        (ALL, ALL[:-3], "they end after 17 keys, where the earlier run had pulled 20; 3 settled keys did not come"),
        ([], ALL, "they go on after 0 keys"),
        (["1", "23"], ["12", "3"], "are not those"),
    ],
)
def test_inputs_that_changed_are_told(path: Path, first: list[str], then: list[str], told: str | None) -> None:
    assert run(path, first) is None
    changed = run(path, then)
    if told is None:
        assert changed is None
    else:
        assert changed is not None
        assert changed.startswith("the inputs have changed: ")
        assert told in changed
    assert run(path, then) is None  # told once
    assert set(keys_of(path)) == {*first, *then}


def test_a_run_that_was_ended_early_does_not_forget_what_the_inputs_were(path: Path) -> None:
    run(path, ALL)
    with Journal(path) as journal:
        for key in ALL[:3]:
            journal.pulled(key)
        assert journal.inputs_changed is None
    assert run(path, ALL) is None
    assert "another order" in str(run(path, ALL[::-1]))


def test_inputs_that_had_not_ended_may_go_on(path: Path) -> None:
    with Journal(path) as journal:
        for key in ALL[:7]:
            journal.pulled(key)
            journal.settle(key, ok=True)
    assert run(path, ALL) is None


# Figures


@pytest.mark.promise
def test_a_journal_costs_little_holds_up_nobody_and_does_not_grow(
    path: Path, full: bool, seed: int, report: list[str]
) -> None:
    """Per item a look-up, a key of the inputs and a settlement: microseconds, and no stop at a commit.

    Keys come in order but for one in ten, which comes from anywhere, and not faster than calls can be made. What else
    holds up this process is seen by stops where there is nothing to do.
    """
    count, warm = (1_000_000, 10_000) if full else (4_000, 1_000)
    draw = random.Random(seed)
    numbers = [number if draw.random() < 0.9 else draw.randrange(10**7, 10**8) for number in range(count + warm)]
    stops: list[float] = []
    other_stops: list[float] = []
    cpu = 0.0
    with Journal(path) as journal:
        for start in range(0, len(numbers), 100):
            if start == warm:
                resident = memory()
                cpu = 0.0
            began, cpu_began = time.perf_counter(), time.thread_time()
            for number in numbers[start : start + 100]:
                key = f"/api/customers/{number}"
                journal.pulled(key)
                if not journal.is_settled(key):
                    journal.settle(key, ok=True, offset=start)
            cpu += time.thread_time() - cpu_began
            stops.append(time.perf_counter() - began)
            began = time.perf_counter()
            while time.perf_counter() < began + 0.004:
                pass
            other_stops.append(time.perf_counter() - began - 0.004)
            time.sleep(0.004)
        grown = memory() - resident
    assert journal.settled == len(set(numbers))
    cpu *= 1e6 / count
    report += [
        f"{count:,} keys: {cpu:.1f} µs CPU an item",
        f"a hundred at once {max(stops) * 1e3:.1f} ms at most, {sorted(stops)[-len(stops) // 100] * 1e3:.1f} at p99",
        f"with nothing to do, stopped for up to {max(other_stops) * 1e3:.1f} ms",
        f"grew by {grown / 2**20:.1f} MB",
    ]
    assert cpu < 30  # µs; 9 where the machine is ours
    assert grown < 10 * 2**20


def memory() -> int:
    """What is resident, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
