"""Input and output of the command line: lines come in, whole lines go out.

Rules: a line of output is written whole or not at all, so that whatever ends a run leaves a valid file. Neither a slow
producer on stdin nor a slow consumer on stdout stops the event loop. What is said goes to stderr, with nothing in it
that a terminal would obey.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import AsyncIterator, Generator
from typing import Annotated, Any

import anyio
from cyclopts import Parameter

from .. import ConfigurationError

LINE_LIMIT = 64 * 1024
PIPE_BUF = 4096  # as much as a pipe that is ready takes without blocking


class OutputError(Exception):
    """The output cannot be written."""


def complain(message: str) -> None:
    """Say `message` on stderr, in one line and with nothing in it that a terminal would obey."""
    if sys.stderr is not None:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        with contextlib.suppress(OSError):  # there is nobody left to tell
            print(f"layer-async: {text}", file=sys.stderr, flush=True)


def no_option(_: type, value: str) -> None:
    """Refuse what looks like an option, which a file that may be called `-` could swallow."""
    if value.startswith("-") and value != "-":
        raise ValueError(f"{value} is neither an option of this command nor a file; call a file ./{value}.")


FileName = Annotated[str, Parameter(allow_leading_hyphen=True, validator=no_option)]


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
