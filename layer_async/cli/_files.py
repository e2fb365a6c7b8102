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
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from functools import partial
from typing import IO, Annotated, Any, Generic, TypeVar

import anyio
from cyclopts import Parameter

from .. import ConfigurationError

LINE_LIMIT = 64 * 1024
CHUNK = 256 * 1024
PIPE_BUF = 4096  # as much as a pipe that is ready takes without blocking

T = TypeVar("T")


class OutputError(Exception):
    """The output cannot be written."""


def complain(message: str) -> None:
    """Say `message` on stderr, in one line and with nothing in it that a terminal would obey."""
    if sys.stderr is not None:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        with contextlib.suppress(OSError):  # there is nobody left to tell
            print(f"layer-async: {text}", file=sys.stderr, flush=True)


def no_option(_: object, value: str | None) -> None:
    """Refuse what looks like an option, which a file that may be called `-` could swallow."""
    if value is not None and value.startswith("-") and value != "-":
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


class Lines(Generic[T]):
    """What `parse` makes of the lines of `file`, and of their numbers, without blank ones and comments.

    What is not UTF-8 becomes surrogates.
    """

    def __init__(self, name: str, file: io.FileIO, parse: Callable[[str, int], T]) -> None:
        self._name = name
        self._file = file
        self._parse = parse
        status = os.fstat(file.fileno())
        self._size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        self._used = 0

    @property
    def share(self) -> float | None:
        """How much of the file has been given away, from 0 to 1; None where nobody knows how long it is."""
        return min(1.0, self._used / self._size) if self._size else None

    async def read(self) -> AsyncGenerator[T]:
        """Give them, one by one."""
        waits = can_be_awaited(self._file)
        rest: bytes | None = b""
        number = 0
        while rest is not None:
            try:
                if waits:
                    await anyio.wait_readable(self._file)
                chunk = os.read(self._file.fileno(), LINE_LIMIT)
            except OSError as exc:
                raise ConfigurationError(f"{self._name} cannot be read: {exc.strerror}.") from exc
            *lines, last = (rest + chunk).split(b"\n")
            if not chunk:
                lines, rest = [last], None
            elif len(last) > LINE_LIMIT:
                raise ConfigurationError(
                    f"{self._name} has a line of more than {LINE_LIMIT} bytes: it is no list of paths."
                )
            else:
                rest = last
            for line in lines:
                number += 1
                self._used += len(line) + 1
                raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                text = raw.decode("utf-8", "surrogateescape").strip()
                if text and not text.startswith("#"):
                    yield self._parse(text, number)


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
    """Writes whole lines to a file: one that does not fit on the disk is taken back.

    `size` is how long the file is by that, or how much went to where there is no length.
    """

    def __init__(self, name: str, file: io.FileIO, size: int = 0) -> None:
        self.name = name
        self.size = size
        self._file = file
        self._can_be_awaited = can_be_awaited(file)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, name: str, *, overwrite: bool = False, append: bool = False, at: int | None = None
    ) -> Generator[LineWriter]:
        """A writer to a new file, or to stdout for `-`. Raises `OutputError`.

        A file that exists is refused, unless it is to be overwritten, appended to, or cut back to so many bytes (`at`).
        An error that ends the run before anything was written leaves no file, so that the same command can be given
        again.
        """
        with writing("stdout" if name == "-" else name):
            is_device = os.path.exists(name) and not os.path.isfile(name)  # a pipe too: there is nothing to overwrite
            if name == "-":
                file = standard(1, sys.stdout)
            elif at is None and not append:
                file = io.FileIO(name, "wb" if is_device or overwrite else "xb")
            else:
                file = io.FileIO(os.open(name, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
                at = os.fstat(file.fileno()).st_size if at is None else at
                file.truncate(at)
                file.seek(at)
        try:
            yield cls("stdout" if name == "-" else name, file, at or 0)
        except BaseException:
            if name != "-" and not is_device and os.fstat(file.fileno()).st_size == 0:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            raise
        finally:
            with writing(name):
                file.close()

    def sync(self) -> None:
        """Wait until what was written is on the disk. Raises `OSError`."""
        os.fsync(self._file.fileno())

    async def write(self, lines: bytes | IO[bytes]) -> None:
        """Write `lines`, or nothing of them and raise `OutputError`. A file is read from its start, and closed."""
        if isinstance(lines, bytes):
            await self._write([lines])
        else:
            with lines:
                lines.seek(0)
                await self._write(iter(partial(lines.read, CHUNK), b""))

    def write_at_once(self, line: bytes) -> None:
        """`write`, to a file."""
        with writing(self.name):
            self._write_to_file([line])

    async def _write(self, chunks: Iterable[bytes]) -> None:
        with writing(self.name):
            if self._can_be_awaited:
                await self._write_when_ready(chunks)
            else:
                self._write_to_file(chunks)

    def _write_to_file(self, chunks: Iterable[bytes]) -> None:
        number, written = self._file.fileno(), 0
        try:
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    count = os.write(number, left)
                    left = left[count:]
                    written += count
        except OSError:
            with contextlib.suppress(OSError):  # devices have no size
                os.ftruncate(number, os.fstat(number).st_size - written)
            raise
        self.size += written

    async def _write_when_ready(self, chunks: Iterable[bytes]) -> None:
        await anyio.wait_writable(self._file)
        with anyio.CancelScope(shield=True):  # a pipe takes nothing back
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    with contextlib.suppress(BlockingIOError):
                        left = left[os.write(self._file.fileno(), left[:PIPE_BUF]) :]
                    if left:
                        await anyio.wait_writable(self._file)
