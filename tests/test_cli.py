"""The command line: what it writes, what it says, how it ends.

It runs in this process, and where signals and terminals must be real in one of its own, against a sandbox over sockets.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pty
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anyio
import attrs
import httpx
import pytest

from layer_async import (
    AuthenticationError,
    GateShut,
    LayerError,
    MissingTokensError,
    Outcome,
    Progress,
    RequestInfo,
    RetryMiddleware,
    RetryScheduled,
    TokensRefreshed,
    __version__,
    cli,
)
from layer_async.__main__ import main
from layer_async.cli import _fetch as fetching
from layer_async.cli import _files as files
from layer_async.cli import _progress as progress
from layer_async.cli._items import Item
from layer_async.cli._resume import Results
from layer_async.sandbox import Faults, Sandbox, document, serve

TOKENS = ("first-secret-of-the-tests", "second-secret-of-the-tests")
PIPE_LINES = 40


class Odd(Sandbox):
    """A sandbox with some paths that answer in ways a sandbox does not."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answers: dict[str, tuple[int, list[tuple[bytes, bytes]], bytes]] = {
            "/odd/html": (200, [], b"<html>no JSON</html>"),
            "/odd/latin": (200, [], b'{"name": "\xff"}'),
            "/odd/empty": (204, [], b""),
            "/odd/spaced": (200, [], b'{\n  "price": 1.10,\n  "id": 123456789012345678901234567890\n}\n'),
            "/odd/here": (302, [(b"location", b"/api/sites/7")], b""),
            "/odd/elsewhere": (302, [(b"location", b"http://elsewhere.invalid/x")], b""),
        }
        if scope["path"] not in answers:
            await super().__call__(scope, receive, send)
            return
        status, headers, body = answers[scope["path"]]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(Odd(documents=300, tokens=TOKENS)) as server:
        yield server.url


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYER_BASE_URL", url)
    monkeypatch.setenv("LAYER_TOKEN1", TOKENS[0])
    monkeypatch.setenv("LAYER_TOKEN2", TOKENS[1])
    defaults = RetryMiddleware.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "random", lambda: 0.0)  # no test waits for a retry
    monkeypatch.chdir(tmp_path)


@attrs.frozen
class Ran:
    """How a run of the command line ended, and what it wrote."""

    code: int
    out: bytes
    err: str

    def __attrs_post_init__(self) -> None:
        for token in TOKENS:
            assert token not in self.err
            assert token.encode() not in self.out
        assert "Traceback" not in self.err


Layer = Callable[..., Ran]


@pytest.fixture
def layer(capfdbinary: pytest.CaptureFixture[bytes]) -> Layer:
    """Runs the command line in this process."""

    def layer(*arguments: str) -> Ran:
        code = cli.run(list(arguments))
        out, err = capfdbinary.readouterr()
        return Ran(code, out, err.decode())

    return layer


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Runs the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "layer_async", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        **options,
    )


def paths(*lines: str) -> str:
    """The name of a file of these lines."""
    Path("paths").write_text("".join(f"{line}\n" for line in lines))
    return "paths"


def lines_of(file: str) -> list[dict[str, Any]]:
    """The lines of an NDJSON file; the last one must be whole."""
    text = Path(file).read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def customers(count: int) -> list[str]:
    return [f"/api/customers/{number}" for number in range(1, count + 1)]


@contextlib.contextmanager
def descriptor_replaced(number: int, by: int) -> Iterator[None]:
    """In here, `by` is the descriptor `number` too."""
    before = os.dup(number)
    os.dup2(by, number)
    try:
        yield
    finally:
        os.dup2(before, number)
        os.close(before)


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """In here no file of this process can grow beyond `size` bytes, as on a full disk. (Python ignores SIGXFSZ.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def until(condition: Callable[[], object]) -> None:
    """Wait until it holds, for half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# get


def test_get_writes_the_document_byte_for_byte(layer: Layer) -> None:
    ran = layer("get", "/odd/spaced")
    assert ran == Ran(0, b'{\n  "price": 1.10,\n  "id": 123456789012345678901234567890\n}\n', "")
    assert json.loads(layer("get", "/api/customers/42").out) == document("customers", 42)


@pytest.mark.parametrize("path", ["/odd/spaced", "/odd/html"])
def test_get_ends_the_document_with_one_newline_on_a_terminal(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = layer("get", path).out
    assert out.endswith(b"\n")
    assert not out.endswith(b"\n\n")


def test_get_of_what_is_not_there_says_so_and_exits_with_1(layer: Layer, url: str) -> None:
    ran = layer("get", "/api/customers/9999?secret=1")
    assert ran.code == 1
    assert ran.out == b""
    assert ran.err == (
        f"layer-async: GET {url}/api/customers/9999: 404 Not Found. The server says: There is no such document.\n"
    )


def test_without_tokens_the_message_names_what_is_missing(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYER_TOKEN1")
    ran = layer("get", "/api/customers/1")
    assert ran.code == 2
    assert "Token1 is missing" in ran.err
    assert "LAYER_TOKEN1" in ran.err


def test_refused_tokens_come_with_advice(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYER_TOKEN2", "a-stale-secret")
    ran = layer("get", "/api/customers/1")
    assert ran.code == 1
    assert "Token2 be stale" in ran.err
    assert "a-stale-secret" not in ran.err


def test_get_refuses_another_host_and_a_base_url_without_https(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer("get", "https://elsewhere.invalid/x").code == 2
    monkeypatch.setenv("LAYER_BASE_URL", "http://elsewhere.invalid")
    ran = layer("get", "/x")
    assert ran.code == 2
    assert "https" in ran.err


def test_a_redirect_is_followed_at_home_and_never_elsewhere(layer: Layer) -> None:
    assert json.loads(layer("get", "/odd/here").out) == document("sites", 7)
    ran = layer("get", "/odd/elsewhere")
    assert ran.code == 1
    assert "/odd/elsewhere: the answer 302 leads to another place" in ran.err
    assert "elsewhere.invalid" not in ran.err


def test_get_tells_of_retries_and_gives_up_in_the_end(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LAYER_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        ran = layer("get", "/api/customers/1")
    assert ran.code == 1
    assert ran.err.count("met ConnectError, next in 0.0 s.") == 3
    assert "refused" in ran.err


def test_a_reader_that_goes_away_is_no_matter_for_a_message(layer: Layer) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with descriptor_replaced(1, writer):
        ran = layer("get", "/api/customers?page_size=100")
    os.close(writer)
    assert ran == Ran(4, b"", "")


def test_a_full_disk_below_stdout_is_told(layer: Layer) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with descriptor_replaced(1, full):
        ran = layer("get", "/api/customers/1")
    os.close(full)
    assert ran == Ran(4, b"", "layer-async: stdout cannot be written: No space left on device.\n")


def test_without_a_stdout_nothing_is_written_to_whatever_has_its_number(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    ran = layer("get", "/api/customers/1")
    assert ran == Ran(4, b"", "layer-async: stdout cannot be written: Bad file descriptor.\n")


def test_without_a_stderr_the_exit_code_tells(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert layer("get", "/api/customers/9999") == Ran(1, b"", "")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert layer("get", "/api/customers/9999") == Ran(1, b"", "")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


# fetch


def test_fetch_writes_a_line_for_each_path(layer: Layer) -> None:
    ran = layer("fetch", paths("# the first", *customers(60), "", "  /api/sites/3\r"), "--out", "out", "--workers", "7")
    assert ran == Ran(0, b"", "layer-async: 61 fetched, 0 failed, 0 retries; the documents are in out.\n")
    found = {line["path"]: line["value"] for line in lines_of("out")}
    assert found == {
        **{f"/api/customers/{number}": document("customers", number) for number in range(1, 61)},
        "/api/sites/3": document("sites", 3),
    }


def test_a_line_keeps_the_document_as_it_came_but_for_white_space(layer: Layer) -> None:
    ran = layer("fetch", paths("/odd/spaced"), "--out", "-")
    assert ran.code == 0
    assert ran.out == b'{"path":"/odd/spaced","value":{"price":1.10,"id":123456789012345678901234567890}}\n'


def test_failures_are_told_and_do_not_end_the_run(layer: Layer) -> None:
    Path("paths").write_bytes(
        b"\xef\xbb\xbf/api/customers/1\n/api/customers/9999\n/odd/html\n/odd/latin\n/odd/empty\n/odd/elsewhere\n"
        b"https://elsewhere.invalid/x\n//elsewhere.invalid/x\n/api/\xff\n/api/\x1b[31m\n/api/sites/2"
    )
    ran = layer("fetch", "paths", "--out", "out")
    assert ran.code == 3
    assert {line["path"] for line in lines_of("out")} == {"/api/customers/1", "/api/sites/2"}
    for part in (
        "/api/customers/9999: 404 Not Found.",
        "/odd/html: the answer is not JSON.",
        "/odd/latin: the answer is not JSON.",
        "/odd/empty: the answer is empty",
        "/odd/elsewhere: the answer 302 leads to another place",
        "https://elsewhere.invalid/x: ",
        "//elsewhere.invalid/x: ",
        "/api/\\udcff: this line is not UTF-8.",
        "/api/\\x1b[31m: ",
        "2 fetched, 9 failed, 0 retries; the documents are in out.",
    ):
        assert f"layer-async: {part}" in ran.err
    assert "\x1b" not in ran.err


def test_an_empty_list_makes_an_empty_file(layer: Layer) -> None:
    ran = layer("fetch", "/dev/null", "--out", "out")
    assert ran == Ran(0, b"", "layer-async: 0 fetched, 0 failed, 0 retries; out is empty.\n")
    assert Path("out").read_bytes() == b""


def test_stdin_is_read_as_it_comes_while_calls_go_on(layer: Layer) -> None:
    reader, writer = os.pipe()

    def produce() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            pipe.write(b"/api/customers/1\n/api/cust")
            until(lambda: Path("out").exists() and len(lines_of("out")) == 1)  # nobody waits for the second line
            pipe.write(b"omers/2\n")

    thread = threading.Thread(target=produce)
    thread.start()
    with descriptor_replaced(0, reader):
        ran = layer("fetch", "-", "--out", "out")
    thread.join()
    os.close(reader)
    assert ran.code == 0
    assert [line["path"] for line in lines_of("out")] == customers(2)


def test_a_file_that_exists_is_left_alone(layer: Layer) -> None:
    Path("out").write_text("precious")
    ran = layer("fetch", paths("/api/customers/1"), "--out", "out")
    assert ran == Ran(4, b"", "layer-async: out exists already: name another file, or move this one away.\n")
    assert Path("out").read_text() == "precious"


@pytest.mark.parametrize("name", ["nowhere/out", "/proc/out"])
def test_an_output_that_cannot_be_made_is_found_before_anything_is_sent(layer: Layer, name: str) -> None:
    ran = layer("fetch", paths("/api/customers/1"), "--out", name)
    assert ran.code == 4
    assert ran.err.startswith(f"layer-async: {name} cannot be written: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere", "nowhere cannot be read: No such file or directory."),
        ("/", "/ cannot be read: Is a directory."),
        ("/proc/self/mem", "/proc/self/mem cannot be read: Input/output error."),
        ("/dev/zero", "/dev/zero has a line of more than 65536 bytes: it is no list of paths."),
    ],
)
def test_an_input_that_cannot_be_read_is_told_and_leaves_no_file(layer: Layer, name: str, why: str) -> None:
    ran = layer("fetch", name, "--out", "out")
    assert ran.code == 2
    assert ran.err.endswith(f"layer-async: {why}\n")
    assert not Path("out").exists()


def test_without_a_stdin_it_is_told(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert layer("fetch", "-", "--out", "out") == Ran(2, b"", "layer-async: - cannot be read: Bad file descriptor.\n")


def test_missing_tokens_leave_no_file_behind(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYER_TOKEN2")
    assert layer("fetch", paths(*customers(3)), "--out", "out").code == 2
    assert not Path("out").exists()
    monkeypatch.delenv("LAYER_TOKEN1")
    monkeypatch.setenv("LAYER_TOKEN1_FILE", "gone1")
    monkeypatch.setenv("LAYER_TOKEN2_FILE", "gone2")
    ran = layer("fetch", paths(*customers(300)), "--out", "out")
    assert ran.code == 2
    assert "gone1" in ran.err
    assert ran.err.count("\n") <= 2
    assert not Path("out").exists()


def test_refused_tokens_end_the_run_instead_of_failing_each_item(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYER_TOKEN1", "a-lapsed-secret")
    ran = layer("fetch", paths(*customers(300)), "--out", "out")
    assert ran.code == 1
    assert ran.err.splitlines()[0] == "layer-async: 0 fetched, 0 failed, 0 retries."
    assert "Token1 may have lapsed" in ran.err.splitlines()[1]
    assert ran.err.count("\n") == 2
    assert not Path("out").exists()


def written(outcomes: Any) -> progress.Tally:
    """What becomes of a run with these outcomes."""

    async def write() -> None:
        with files.LineWriter.open("out") as output:
            await fetching.write_outcomes(outcomes, Results(output, None, None), tally)

    tally = progress.Tally("fetched")
    anyio.run(write)
    return tally


@pytest.mark.parametrize("ends_by", [None, KeyError("other"), AuthenticationError("for good", status_code=401)])
def test_refusals_are_told_at_the_end_but_where_it_comes_by_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ends_by: Exception | None
) -> None:
    monkeypatch.setattr(fetching, "REFUSALS", 2)
    refusal = AuthenticationError("refused", status_code=401)

    async def given() -> Any:
        for key in ("/a", "/b", "/c"):
            assert capsys.readouterr().err == ""
            yield Outcome(Item("/x", "/x"), key, None, refusal, 1, 0.0)
        assert capsys.readouterr().err == "layer-async: /a: refused\n"
        yield Outcome(Item("/x", "/x"), "/d", b"1\n", None, 1, 0.0)
        if ends_by is not None:
            raise ends_by

    with contextlib.suppress(KeyError, AuthenticationError):
        written(given())
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert told == ([] if isinstance(ends_by, AuthenticationError) else ["/b:", "/c:"])


@pytest.mark.parametrize("error", [MissingTokensError("Token1 is missing."), OSError("no disk")])
def test_what_no_other_item_survives_ends_the_run(error: Exception) -> None:
    async def given() -> Any:
        yield Outcome(Item("/x", "/x"), "/x", None, error, 1, 0.0)

    with pytest.raises(type(error)):
        written(given())
    assert not Path("out").exists()


def test_a_device_can_be_written_to_though_it_exists(layer: Layer) -> None:
    ran = layer("fetch", paths(*customers(3)), "--out", "/dev/null")
    assert ran.code == 0


def test_a_full_disk_ends_the_run_with_whole_lines_and_says_how_many(layer: Layer) -> None:
    with files_limited_to(5000):
        ran = layer("fetch", paths(*customers(100)), "--out", "out")
    count = len(lines_of("out"))
    assert ran.code == 4
    assert ran.err.splitlines() == [
        f"layer-async: {count} fetched, 0 failed, 0 retries; the documents are in out.",
        "layer-async: out cannot be written: File too large.",
    ]
    assert 4000 < Path("out").stat().st_size <= 5000


def test_a_full_disk_takes_nothing_from_a_file_that_is_appended_to(layer: Layer) -> None:
    Path("old").write_text('{"old": 1}\n')
    old = os.open("old", os.O_WRONLY | os.O_APPEND)
    with files_limited_to(3000), descriptor_replaced(1, old):
        ran = layer("fetch", paths(*customers(100)), "--out", "-")
    os.close(old)
    assert ran.code == 4
    assert lines_of("old")[0] == {"old": 1}
    assert len(lines_of("old")) > 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_a_valid_file_and_a_summary(layer: Layer, number: int, code: int) -> None:
    reader, writer = os.pipe()

    def produce() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            pipe.write("".join(f"{path}\n" for path in customers(PIPE_LINES)).encode())
            until(lambda: Path("out").exists() and len(Path("out").read_bytes().splitlines()) == PIPE_LINES)
            os.kill(os.getpid(), number)
            until(ended.is_set)  # the pipe stays open: only the signal can end the run

    ended = threading.Event()
    thread = threading.Thread(target=produce)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ran = layer("fetch", f"/dev/fd/{reader}", "--out", "out")
    finally:
        ended.set()
        thread.join()
        os.close(reader)
    assert ran.code == code
    assert len(lines_of("out")) == PIPE_LINES
    assert ran.err.splitlines() == [
        f"layer-async: {PIPE_LINES} fetched, 0 failed, 0 retries; the documents are in out.",
        "layer-async: interrupted.",
    ]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_anything_began_is_told_too(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setattr(anyio, "run", lambda *_: signal.raise_signal(number))
    assert layer("get", "/api/customers/1") == Ran(code, b"", "layer-async: interrupted.\n")


def test_where_ctrl_c_is_ignored_sigterm_is_left_as_it_is() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cli.terminating() as noted:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert noted == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_real_process_at_once() -> None:
    process = start("fetch", "-", "--out", "out", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("".join(f"{path}\n" for path in customers(20)).encode())
    process.stdin.flush()
    until(lambda: Path("out").exists() and len(lines_of("out")) == 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    ran = Ran(process.returncode, b"", err.decode())
    assert ran.code == 130
    assert "20 fetched" in ran.err
    assert len(lines_of("out")) == 20


def test_retries_and_long_waits_are_told(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Sandbox(documents=50, tokens=TOKENS, faults=Faults(unavailable=1.0, at_most=1))) as server:
        monkeypatch.setenv("LAYER_BASE_URL", server.url)
        ran = layer("fetch", paths(*customers(20)), "--out", "out")
    assert ran.err == "layer-async: 20 fetched, 0 failed, 20 retries; the documents are in out.\n"


def test_a_tally_counts_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tally = progress.Tally("fetched")
    tally.observe(RetryScheduled(RequestInfo("GET", "http://h/x"), 1, "503", 0.5))
    tally.observe(TokensRefreshed(2))
    tally.observe(GateShut(1.0))
    assert capsys.readouterr().err == ""
    tally.observe(GateShut(12.4))
    assert capsys.readouterr().err == "layer-async: the server said slow down: going on in 12 s.\n"
    tally.count()
    tally.fail("/x?page=2", LayerError("no luck.", request=RequestInfo("GET", "http://h/x")))
    assert capsys.readouterr().err == "layer-async: /x?page=2: no luck.\n"
    assert str(tally) == "1 fetched, 1 failed, 1 retries"


# Writing


@pytest.mark.anyio
async def test_a_slow_reader_holds_up_no_other_task_and_loses_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    size = 300_000
    received = bytearray()

    async def read() -> None:
        while len(received) < 2 * size:
            await anyio.wait_readable(reader)
            await anyio.lowlevel.checkpoint()
            received.extend(os.read(reader, 10_000))

    output = files.LineWriter("stdout", io.FileIO(writer, "wb"))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await output.write(b"a" * size)
            await output.write(b"b" * size)
    assert received == b"a" * size + b"b" * size
    os.close(reader)
    output._file.close()


@pytest.mark.anyio
async def test_a_cancelled_write_to_a_pipe_is_finished_or_not_begun() -> None:
    reader, writer = os.pipe()
    output = files.LineWriter("stdout", io.FileIO(writer, "wb"))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await output.write(b"never begun")
    received = bytearray()
    async with anyio.create_task_group() as group:
        group.start_soon(output.write, b"x" * 200_000)
        await anyio.wait_readable(reader)
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            while len(received) < 200_000:
                await anyio.wait_readable(reader)
                received += os.read(reader, 10_000)
    output._file.close()
    assert os.read(reader, 1) == b""
    assert received == b"x" * 200_000
    os.close(reader)


@pytest.mark.anyio
async def test_a_line_that_does_not_fit_is_taken_back() -> None:
    with files.LineWriter.open("out") as output, files_limited_to(100):
        await output.write(b"a" * 59 + b"\n")
        with pytest.raises(files.OutputError, match="out cannot be written: File too large"):
            await output.write(b"b" * 59 + b"\n")
    assert Path("out").read_bytes() == b"a" * 59 + b"\n"


def test_an_empty_file_that_went_away_by_itself_is_no_trouble() -> None:
    def interrupted() -> None:
        with files.LineWriter.open("out"):
            os.unlink("out")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_plain_line_every_five_seconds_at_most(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = iter([100.0, 101.0, 104.9, 105.0, 109.9, 111.0])
    tally = progress.Tally("fetched")
    with progress.showing(tally, clock=lambda: next(times)):
        for _ in range(5):
            tally.count()
    assert capsys.readouterr().err == (
        "layer-async: 3 fetched, 0 failed, 0 retries.\nlayer-async: 5 fetched, 0 failed, 0 retries.\n"
    )


@attrs.frozen
class SomeOutcomes:
    progress: Progress


@attrs.frozen
class HalfRead:
    share: float | None = 0.5


def test_how_much_of_the_input_was_read_is_known_of_a_file_and_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "paths").write_text("/a\n/b\n")

    async def shares(file: io.FileIO) -> list[float | None]:
        lines = files.Lines("paths", file, lambda line, _: line)
        found = [lines.share]
        async for _ in lines.read():
            found.append(lines.share)
        return found

    with open(tmp_path / "paths", "rb", buffering=0) as file:
        assert anyio.run(shares, file) == [0.0, 0.5, 1.0]
    reading, writing = os.pipe()
    os.write(writing, b"/a\n")
    os.close(writing)
    with open(reading, "rb", buffering=0) as file:
        assert anyio.run(shares, file) == [None, None]


def test_a_live_line_tells_the_rate_and_what_is_left() -> None:
    def live(lines: Any, *, pace: float | None = None, **values: Any) -> str:
        known = {"done": 0, "failed": 0, "skipped": 0, "held": 0, "rate": 0.0, "eta": None, "total": None}
        tally = progress.Tally("fetched")
        tally.outcomes = cast(Any, SomeOutcomes(Progress(**(known | values))))
        tally.lines = lines
        tally.pace = lambda: pace
        return tally.live()

    nothing = "0 fetched, 0 failed, 0 retries"
    assert live(None) == f"{nothing}, 0/s"
    assert live(HalfRead(None), rate=20.0) == f"{nothing}, 20/s"
    assert live(None, rate=20.0, pace=23.4) == f"{nothing}, 20/s, quota 23/s"
    assert live(HalfRead(), done=1000, rate=20.0) == f"{nothing}, 20/s, ETA 0:00:50"
    assert live(HalfRead(), done=1000, skipped=200, held=8) == (
        f"{nothing}, 200 already there, 0/s, 8 held until the server is back"
    )


def test_on_a_terminal_there_is_a_bar_with_the_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    tally = progress.Tally("fetched", total=2)
    with progress.showing(tally):
        tally.count()
        files.complain("a message")
        tally.count()
    assert "2 fetched, 0 failed" in terminal.getvalue()
    assert "layer-async: a message" in terminal.getvalue()
    assert sys.stderr is terminal


@pytest.mark.parametrize("kind", ["dumb", "output"])
def test_there_is_no_bar_where_it_would_be_in_the_way(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb" else "xterm")
    tally = progress.Tally("fetched")
    with progress.showing(tally, is_output_on_terminal=kind == "output"):
        tally.count()
    assert terminal.getvalue() == ""


def test_a_real_terminal_shows_the_bar_and_then_the_summary() -> None:
    master, slave = pty.openpty()
    process = start("fetch", paths(*customers(50)), "--out", "out", stderr=slave, stdin=subprocess.DEVNULL)
    os.close(slave)
    shown = bytearray()
    with contextlib.suppress(OSError):  # Linux: EIO at the end of a terminal
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    ran = Ran(process.wait(10), b"", shown.decode())
    assert ran.code == 0
    assert "━" in ran.err
    assert "layer-async: 50 fetched, 0 failed, 0 retries; the documents are in out." in ran.err


# sandbox


class Announcement(io.StringIO):
    """A stderr that does something once the address of a sandbox is written to it."""

    def __init__(self, then: Callable[[str], None]) -> None:
        super().__init__()
        self.then = then

    def flush(self) -> None:
        found = re.search(r"export LAYER_BASE_URL=(\S+) LAYER_TOKEN1=(\w+) LAYER_TOKEN2=(\w+)", self.getvalue())
        if found:
            self.found = found.groups()
            then, self.then = self.then, lambda _: None
            then(found[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_sandbox_serves_until_it_is_told_to_end(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    answers: list[httpx.Response] = []

    def visit(url: str) -> None:
        headers = {"Token1": announced.found[1], "Token2": announced.found[2]}
        answers.append(httpx.get(f"{url}/api/customers/3", headers=headers, trust_env=False))
        os.kill(os.getpid(), number)

    threads: list[threading.Thread] = []

    def begin(url: str) -> None:
        threads.append(threading.Thread(target=visit, args=(url,)))
        threads[0].start()

    announced = Announcement(begin)
    monkeypatch.setattr(sys, "stderr", announced)
    ran = layer(
        "sandbox",
        "--port",
        "0",
        "--seed",
        "5",
        "--rate",
        "100",
        "--drop",
        "10",
        "20",
        "--rate-headers",
        "--rotate-after",
        "50",
    )
    threads[0].join()
    assert ran == Ran(code, b"", "")
    assert answers[0].json() == document("customers", 3, seed=5)
    assert "layer-async get /api/customers/1" in announced.getvalue()


def test_a_port_in_use_is_told(layer: Layer, url: str) -> None:
    ran = layer("sandbox", "--port", url.rpartition(":")[2])
    assert ran.code == 2
    assert ran.err.startswith("layer-async: port ")
    assert "in use" in ran.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["sandbox", "--faults", "2"], "probabilities"),
        (["sandbox", "--rate", "0"], "rate must be above 0"),
        (["sandbox", "--rate", "5", "--drop", "9", "3"], "drop must be"),
        (["sandbox", "--window", "10"], "say how large the quota is, with --rate"),
        (["sandbox", "--no-retry-after"], "say how large the quota is, with --rate"),
        (["sandbox", "--documents", "-1"], "documents must be a number of at least 0"),
        (["sandbox", "--port", "65536"], "65535"),
        (["fetch", "-", "--out", "x", "--workers", "0"], "--workers"),
        (["fetch", "--outt", "x"], "--outt"),
        (["fetch", "-", "--out", "--workers", "3"], "--workers is neither an option of this command nor a file"),
        (["fetch", "-"], "--out"),
        (["get"], "PATH"),
        (["got"], "got"),
        (["get", "/x", "--token1", "x"], "--token1"),
        (["demo", "--documents", "0"], "--documents"),
    ],
)
def test_wrong_usage_is_told_and_exits_with_2(layer: Layer, arguments: list[str], why: str) -> None:
    ran = layer(*arguments)
    assert ran.code == 2
    assert ran.out == b""
    assert why in re.sub(r"[\s│]+", " ", ran.err)


@pytest.mark.parametrize("command", ["sandbox", "demo"])
def test_without_the_extra_a_command_says_what_to_install(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for room in ("sandbox", "demo"):
        monkeypatch.delitem(sys.modules, f"layer_async.{room}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ran = layer(command)
    assert ran.code == 2
    assert "pip install 'layer-async[sandbox]'" in ran.err


# The way in and out


def test_help_and_version_are_output(layer: Layer) -> None:
    assert layer("--version") == Ran(0, f"{__version__}\n".encode(), "")
    for arguments in ((), ("--help",)):
        ran = layer(*arguments)
        assert ran.code == 0
        assert ran.err == ""
        assert b"LAYER_TOKEN1" in ran.out
        for code in (b"0:", b"1:", b"2:", b"3:", b"4:", b"130:"):
            assert code in ran.out


def test_an_output_that_fails_outside_of_a_command_is_told(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        ran = layer("--help")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert ran.code == 4
    assert ran.err == "layer-async: input or output failed: No space left on device.\n"


def enter(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["layer-async", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_main_exits_with_the_code_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enter(monkeypatch, "--version") == 0
    assert enter(monkeypatch, "get", "/api/customers/9999") == 1
    monkeypatch.setattr(sys, "stdout", None)
    assert enter(monkeypatch, "get", "/api/customers/9999") == 1


def test_main_ends_quietly_on_ctrl_c_while_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert enter(monkeypatch) == 130


def test_main_leaves_nothing_in_a_buffer_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)

        def succeed(_: list[str]) -> int:
            full.write("never flushed")
            return 0

        monkeypatch.setattr(cli, "run", succeed)
        assert enter(monkeypatch) == 4
        monkeypatch.undo()


def test_main_without_the_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "layer_async.cli")
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert enter(monkeypatch) == 2
    assert capsys.readouterr().err == (
        "layer-async: cyclopts is missing, which the extra `cli` brings: "
        "pip install 'layer-async[cli]' (in a checkout: pip install '.[cli]')\n"
    )


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["layer-async", "--version"])
    monkeypatch.delitem(sys.modules, "layer_async.__main__")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("layer_async", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_the_readme_shows_the_help_in_plain_text() -> None:
    readme = importlib.import_module("tests.readme")
    block = readme.cli_help()
    assert "\x1b" not in block
    assert max(map(len, block.splitlines())) <= 100
