"""The command line: get one document, fetch many, serve the sandbox, run the demo.

Rules: knows the door, the sandbox and the demo. Tokens come from the environment, never from arguments, which any user
of the machine can read. Documents go to stdout or `--out`, everything else to stderr. A line of output is written whole
or not at all, so that whatever ends a run leaves a valid file. Neither a slow producer on stdin nor a slow consumer on
stdout stops the event loop. Exit codes are in `EXIT_CODES`, for scripts; no exception of ours leaves `run`.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import (
    APIStatusError,
    AsyncLayerClient,
    AuthenticationError,
    ConfigurationError,
    Event,
    GateShut,
    LayerError,
    MissingTokensError,
    Outcome,
    RequestInfo,
    ResponseDecodeError,
    RetryScheduled,
    __version__,
)

EXIT_CODES = """\
Exit codes:

- 0: complete
- 1: the call failed, the tokens were refused, or the demo found a difference
- 2: wrong usage, configuration or input
- 3: incomplete, some items failed
- 4: the output could not be written, or its file exists already
- 130: interrupted (143 by SIGTERM)
"""

REFUSALS = 10  # so many items in a row refused for their tokens: the rest would fare no better
LINE_LIMIT = 64 * 1024
PIPE_BUF = 4096  # as much as a pipe that is ready takes without blocking
PLAIN_INTERVAL = 5.0
NOTABLE_WAIT = 5.0

app: App = App(
    name="layer-async",
    help=(
        "Call The Layer's web API. Tokens are read from LAYER_TOKEN1 and LAYER_TOKEN2, or from the files that "
        "LAYER_TOKEN1_FILE and LAYER_TOKEN2_FILE name; the base URL from LAYER_BASE_URL.\n\n" + EXIT_CODES
    ),
    version=__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    with terminating() as terminated:
        try:
            code = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
        except CycloptsError:
            return 2
        except ConfigurationError as exc:
            complain(str(exc))
            return 2
        except LayerError as exc:
            complain(str(exc))
            return 1
        except OutputError as exc:
            if not isinstance(exc.__cause__, BrokenPipeError):  # who reads us has had enough, and knows it
                complain(str(exc))
            return 4
        except OSError as exc:
            complain(f"input or output failed: {exc.strerror or exc}.")
            return 4
        except KeyboardInterrupt:
            complain("interrupted.")
            return 143 if terminated else 130
        return 143 if terminated else code if isinstance(code, int) else 0


@contextlib.contextmanager
def terminating() -> Generator[list[int]]:
    """In here SIGTERM does what Ctrl-C does, and is noted in the list.

    Not where Ctrl-C is ignored, as in a shell's background jobs: there SIGTERM ends the process at once, as ever.
    """
    noted: list[int] = []

    def terminate(number: int, _: object) -> None:
        noted.append(number)
        signal.raise_signal(signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield noted
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


class OutputError(Exception):
    """The output cannot be written."""


def complain(message: str) -> None:
    """Say `message` on stderr, in one line and with nothing in it that a terminal would obey."""
    if sys.stderr is not None:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        with contextlib.suppress(OSError):  # there is nobody left to tell
            print(f"layer-async: {text}", file=sys.stderr, flush=True)


# One document


@app.command
def get(path: str, /) -> int:
    """GET one document and write it to stdout, byte for byte; on a terminal a newline follows.

    Parameters
    ----------
    path: str
        The path below the base URL, with its query, such as /api/customers/42.
    """

    def observe(event: Event) -> None:
        if isinstance(event, RetryScheduled):
            complain(f"{event.request}: attempt {event.number} met {event.cause}, next in {event.delay:.1f} s.")

    async def main() -> None:
        async with AsyncLayerClient(follow_redirects=True, observer=observe) as client:
            body = await document(client, path)
        if sys.stdout is not None and sys.stdout.isatty():
            body = body.removesuffix(b"\n") + b"\n"
        with LineWriter.open("-") as output:
            await output.write(body)

    anyio.run(main)
    return 0


async def document(client: AsyncLayerClient, path: str) -> bytes:
    """The body of what is at `path`; raises for a redirect that leads elsewhere too."""
    response = await client.get(path)
    if response.status_code >= 300:
        raise APIStatusError(
            f"the answer {response.status_code} leads to another place, which is not followed: "
            "the tokens are for the base URL only.",
            status_code=response.status_code,
            request=RequestInfo.of(response.request),
        )
    return response.content


# Many documents


def no_option(_: type, value: str) -> None:
    """Refuse what looks like an option, which a file that may be called `-` could swallow."""
    if value.startswith("-") and value != "-":
        raise ValueError(f"{value} is neither an option of this command nor a file; call a file ./{value}.")


FileName = Annotated[str, Parameter(allow_leading_hyphen=True, validator=no_option)]


@app.command
def fetch(
    source: FileName,
    /,
    *,
    out: FileName,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
) -> int:
    """GET many documents, concurrently, and write one line of JSON for each.

    A line is {"path": ..., "value": ...}, in the order of completion. Failures are told on stderr and do not end the
    run; it then exits with 3. Where the server refuses the tokens again and again, the run ends, and exits with 1.

    Parameters
    ----------
    source: str
        A file with one path in each line, or - for stdin. Blank lines and lines that start with # are skipped.
    out: str
        The file to write, which must not exist yet, or - for stdout.
    workers: int
        How many calls at a time; by default half the connections.
    """
    tally = Tally("fetched")
    with reading(source) as file:
        anyio.run(fetch_lines, read_lines(source, file), out, workers, tally)
    return 3 if tally.failed else 0


async def fetch_lines(paths: AsyncIterator[str], out: str, workers: int | None, tally: Tally) -> None:
    """GET each of `paths` and write it to `out`; what can be wrong at the start is found before `out` is made."""
    async with AsyncLayerClient(follow_redirects=True, observer=tally.observe) as client:

        async def call(path: str) -> bytes:
            try:
                path.encode()
            except UnicodeEncodeError:
                raise ConfigurationError("this line is not UTF-8.") from None
            return await document(client, path)

        bulk = client.bulk(paths, call, workers=workers)
        with LineWriter.open(out) as output:
            try:
                with showing(tally, is_output_on_terminal=out == "-" and os.isatty(1)):
                    async with bulk as outcomes:
                        await write_outcomes(outcomes, output, tally)
            finally:
                complain(f"{tally}; the documents are in {output.name}." if tally.done else f"{tally}.")


async def write_outcomes(outcomes: AsyncIterator[Outcome[str, bytes, str]], output: LineWriter, tally: Tally) -> None:
    """Write each outcome that is a document, and tell of each that is not."""
    refused = 0
    async for outcome in outcomes:
        try:
            line = line_of(outcome)
        except MissingTokensError:  # from files that went away: no item fares better
            raise
        except LayerError as exc:
            tally.fail(outcome.item, exc)
            refused = refused + 1 if isinstance(exc, AuthenticationError) else 0
            if refused == REFUSALS:
                raise
        else:
            await output.write(line)
            tally.count()
            refused = 0


def line_of(outcome: Outcome[str, bytes, str]) -> bytes:
    """The line for a document: its path, and its body, of which only the white space is changed. Raises its error."""
    body = outcome.unwrap()
    try:
        msgspec.json.decode(body)  # `format` does not look into texts and numbers
        value = msgspec.Raw(msgspec.json.format(body, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ResponseDecodeError(
            "the answer is not JSON." if body else "the answer is empty, which no JSON is."
        ) from None
    return msgspec.json.encode({"path": outcome.item, "value": value}) + b"\n"


# Input and output


@contextlib.contextmanager
def reading(name: str) -> Generator[io.FileIO]:
    """The file of that name, or stdin for `-`."""
    try:
        file = standard(0, sys.stdin) if name == "-" else io.FileIO(name)
    except OSError as exc:
        raise ConfigurationError(f"{name} cannot be read: {exc.strerror}.") from exc
    with file:
        yield file


async def read_lines(name: str, file: io.FileIO) -> AsyncIterator[str]:
    """The lines of `file`, without blank ones and comments. What is not UTF-8 becomes surrogates."""
    waits = can_be_awaited(file)
    rest: bytes | None = b""
    is_first = True
    while rest is not None:
        try:
            if waits:
                await anyio.wait_readable(file)
            chunk = os.read(file.fileno(), LINE_LIMIT)
        except OSError as exc:
            raise ConfigurationError(f"{name} cannot be read: {exc.strerror}.") from exc
        *lines, last = (rest + chunk).split(b"\n")
        if not chunk:
            lines, rest = [last], None
        elif len(last) > LINE_LIMIT:
            raise ConfigurationError(f"{name} has a line of more than {LINE_LIMIT} bytes: it is no list of paths.")
        else:
            rest = last
        for line in lines:
            text = line.removeprefix(codecs.BOM_UTF8 if is_first else b"").decode("utf-8", "surrogateescape").strip()
            is_first = False
            if text and not text.startswith("#"):
                yield text


def standard(number: int, stream: Any) -> io.FileIO:
    """stdin or stdout without its buffers. A process may be started without it: another file has its number then."""
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return io.FileIO(number, "rb" if number == 0 else "wb", closefd=False)


def can_be_awaited(file: io.FileIO) -> bool:
    """Whether the event loop can wait for it: for pipes, sockets and terminals, not for files and /dev/null."""
    mode = os.fstat(file.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or file.isatty()


@contextlib.contextmanager
def writing(name: str) -> Generator[None]:
    """What fails to be written in here is an `OutputError` that names the file."""
    try:
        yield
    except FileExistsError as exc:
        raise OutputError(f"{name} exists already: name another file, or move this one away.") from exc
    except OSError as exc:
        raise OutputError(f"{name} cannot be written: {exc.strerror or exc}.") from exc


class LineWriter:
    """Writes whole lines to a file: one that does not fit on the disk is taken back."""

    def __init__(self, name: str, file: io.FileIO) -> None:
        self.name = name
        self._file = file
        self._can_be_awaited = can_be_awaited(file)

    @classmethod
    @contextlib.contextmanager
    def open(cls, name: str) -> Generator[LineWriter]:
        """A writer to a new file, or to stdout for `-`. Raises `OutputError`.

        An error that ends the run before anything was written leaves no file, so that the same command can be given
        again.
        """
        with writing("stdout" if name == "-" else name):
            is_device = os.path.exists(name) and not os.path.isfile(name)  # a pipe too: there is nothing to overwrite
            file = standard(1, sys.stdout) if name == "-" else io.FileIO(name, "wb" if is_device else "xb")
        try:
            yield cls("stdout" if name == "-" else name, file)
        except BaseException:
            if name != "-" and not is_device and os.fstat(file.fileno()).st_size == 0:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            raise
        finally:
            with writing(name):
                file.close()

    async def write(self, line: bytes) -> None:
        """Write `line`, or nothing of it and raise `OutputError`."""
        with writing(self.name):
            if self._can_be_awaited:
                await self._write_when_ready(line)
            else:
                self._write_at_once(line)

    def _write_at_once(self, line: bytes) -> None:
        number, left = self._file.fileno(), memoryview(line)
        try:
            while left:
                left = left[os.write(number, left) :]
        except OSError:
            with contextlib.suppress(OSError):  # devices have no size
                os.ftruncate(number, os.fstat(number).st_size - (len(line) - len(left)))
            raise

    async def _write_when_ready(self, line: bytes) -> None:
        await anyio.wait_writable(self._file)
        left = memoryview(line)
        with anyio.CancelScope(shield=True):  # a pipe takes nothing back
            while left:
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(self._file.fileno(), left[:PIPE_BUF]) :]
                if left:
                    await anyio.wait_writable(self._file)


# Progress


class Tally:
    """How far a run is. `show` is called after each item."""

    def __init__(self, verb: str, total: int | None = None) -> None:
        self.verb = verb
        self.total = total
        self.done: int = 0
        self.failed: int = 0
        self.retries: int = 0
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


# The sandbox


@app.command
def sandbox(
    *,
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 8010,
    seed: int = 1,
    documents: int = 1000,
    faults: float = 0.0,
    rate: float | None = None,
    burst: int | None = None,
    window: float | None = None,
    drop: tuple[float, float] | None = None,
    retry_after: bool = True,
    rate_headers: bool = False,
    rotate_after: int | None = None,
) -> int:
    """Serve a local stand-in for the API until Ctrl-C. It is illustrative: the real endpoints are not public.

    Parameters
    ----------
    port: int
        The loopback port; 0 takes a free one.
    seed: int
        What data, tokens and faults are drawn from.
    documents: int
        How many documents each collection holds.
    faults: float
        The share of requests that meet a fault, from 0 to 1.
    rate: float
        A quota, in requests a second; over it the answer is 429.
    burst: int
        How many requests the quota lets in at once; default: one second's worth.
    window: float
        Makes it a fixed window of so many seconds.
    drop: tuple[float, float]
        From when to when, in seconds since the first request, there is only a third of the quota.
    retry_after: bool
        Whether a 429 says when to come again.
    rate_headers: bool
        Whether each answer says what is left, in X-RateLimit headers.
    rotate_after: int
        Replace the tokens after so many requests.
    """
    try:
        from .sandbox import Faults, Sandbox
        from .sandbox import run as serve

        app = Sandbox(
            seed=seed,
            documents=documents,
            faults=Faults.spread(faults),
            quota=_quota(rate, burst=burst, window=window, drop=drop, retry_after=retry_after, headers=rate_headers),
            rotate_after=rotate_after,
        )
    except (ImportError, ValueError) as exc:
        raise ConfigurationError(f"{exc}.") from exc

    def announce(url: str) -> None:
        token1, token2 = app.tokens
        print(
            f"The sandbox serves invented data at {url} (seed {seed}). In another terminal:\n\n"
            f"  export LAYER_BASE_URL={url} LAYER_TOKEN1={token1} LAYER_TOKEN2={token2}\n"
            "  layer-async get /api/customers/1\n",
            file=sys.stderr,
            flush=True,
        )

    try:
        serve(app, port=port, on_start=announce)
    except OSError as exc:
        raise ConfigurationError(f"port {port} cannot be used: {exc.strerror}.") from exc
    return 0


def _quota(rate: float | None, **shape: Any) -> Any:
    from .sandbox import Quota

    if rate is not None:
        return Quota(rate=rate, **shape)
    if shape != {"burst": None, "window": None, "drop": None, "retry_after": True, "headers": False}:
        raise ConfigurationError("say how large the quota is, with --rate.")
    return None


# The demo


@app.command
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
        from .demo import run_demo
        from .sandbox import COLLECTIONS
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
