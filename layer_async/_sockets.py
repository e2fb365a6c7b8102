"""Sockets that are ours, and TLS over them, as httpcore reads and writes them; on asyncio and trio alike.

Rules: a socket is known from birth, before it connects, so that `close` can close it at any moment, synchronously. TLS
runs in memory over any of our streams, hence also inside of TLS. A TLS connection that ends without its close_notify
has been cut (RFC 8446 section 6.1): no body may end that way. What goes out and comes in is counted in the record of
the exchange.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import math
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import Any

import anyio
import anyio.lowlevel
import httpcore

from ._exchange import ExchangeRecord

CHUNK = 64 * 1024
STAGGER = 0.25  # seconds between two connection attempts: RFC 8305 section 5
UNDER_WAY = {errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EAGAIN}
FAIR_SHARE = 16  # so many times in a row a stream may go on without waiting before others have their turn
EARLY_LOOK = 0.1  # seconds between two looks for an answer while the server does not take the request
EARLY_ANSWER = re.compile(rb"(HTTP/1\.[01] 1\d\d[^\n]*\n([^\r\n]+\r?\n)*\r?\n)*HTTP/1\.[01] ([2-5])\d\d", re.ASCII)

SocketOption = Any  # httpcore's own union of the argument tuples of setsockopt
Address = tuple[socket.AddressFamily, tuple[Any, ...]]


class Wire(httpcore.AsyncNetworkBackend):
    """Opens the sockets of one connection and owns them; keeps the record of the attempt that goes over it.

    `tls_layers` is how many TLS streams lie upon each other where HTTP begins: only what passes the topmost one counts,
    and not while SOCKS `is_greeting` its proxy there.
    """

    def __init__(self, tls_layers: int) -> None:
        self.tls_layers = tls_layers
        self.record = ExchangeRecord()
        self.stream: _Stream | None = None
        self.has_served = False
        self.is_greeting: Callable[[], bool] | None = None
        self.greeted_by = math.inf  # httpcore sets no bound of its own to the greeting
        self.sent = 0
        self.sockets: set[socket.socket] = set()
        self._waits = 0

    def begin(self) -> None:
        """The attempt has come as far as the wire: from here on its record is exact."""
        record = self.record
        if record.bytes_written is None:
            record.bytes_written = 0
            record.response_started = record.head_received = False
            record.reused = self.has_served

    def record_at(self, depth: int) -> ExchangeRecord | None:
        """The record, if what passes a stream of this depth is HTTP to the origin, and no handshake, nor CONNECT."""
        if depth != self.tls_layers or self.greets():
            return None
        return self.record

    def greets(self) -> bool:
        """Whether what passes is for a SOCKS proxy."""
        return self.is_greeting is not None and self.is_greeting()

    @contextlib.contextmanager
    def bounding_greeting(self) -> Generator[None, None, None]:
        """As long as SOCKS greets its proxy, the connect timeout bounds it, from when that has accepted."""
        with anyio.CancelScope(deadline=self.greeted_by if self.greets() else math.inf) as scope:
            yield
        if scope.cancelled_caught:
            raise httpcore.ConnectTimeout("the SOCKS proxy does not answer its greeting")

    def close(self) -> None:
        """Close every socket, and wake up whoever waits for one."""
        for sock in self.sockets:
            if self._waits and sock.fileno() >= 0:
                anyio.notify_closing(sock)
            sock.close()
        self.sockets.clear()

    def abandon(self) -> None:
        """Close every file descriptor; no event loop is told."""
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()

    async def wait(self, ready: Callable[[socket.socket], Awaitable[None]], sock: socket.socket) -> None:
        """Wait until `sock` is `ready`. Raises `OSError` when it is closed meanwhile."""
        self._waits += 1
        try:
            if sock.fileno() < 0:
                raise anyio.ClosedResourceError
            await ready(sock)
        except anyio.ClosedResourceError:
            raise OSError(errno.EBADF, "closed on this side") from None
        finally:
            self._waits -= 1

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address of `host` that answers (RFC 8305)."""
        self.begin()
        self.record.phase = "connect"
        options = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            *(socket_options or ()),
        ]
        with _mapped(OSError, httpcore.ConnectError), _mapped(TimeoutError, httpcore.ConnectTimeout):
            with anyio.fail_after(timeout):
                addresses = await _resolve(host, port)
                sock = await self._race([(address, local_address, options) for address in addresses])
        if timeout is not None:
            self.greeted_by = anyio.current_time() + timeout
        self.stream = SocketStream(self, sock)
        return self.stream

    async def _race(self, attempts: list[tuple[Address, str | None, list[SocketOption]]]) -> socket.socket:
        """Try one address after the other, each a little after the one before, or as soon as that has failed."""
        if len(attempts) == 1:
            return await self._connect(*attempts[0])
        winners: list[socket.socket] = []
        errors: list[OSError] = []

        async def attempt(arguments: tuple[Address, str | None, list[SocketOption]], ended: anyio.Event) -> None:
            try:
                winners.append(await self._connect(*arguments))
                group.cancel_scope.cancel()
            except OSError as exc:
                errors.append(exc)
            ended.set()

        async with anyio.create_task_group() as group:
            for arguments in attempts:
                ended = anyio.Event()
                group.start_soon(attempt, arguments, ended)
                with anyio.move_on_after(STAGGER):
                    await ended.wait()
        for late in winners[1:]:
            self._drop(late)
        if winners:
            return winners[0]
        raise errors[0]

    async def _connect(self, address: Address, local_address: str | None, options: list[SocketOption]) -> socket.socket:
        family, target = address
        sock = socket.socket(family, socket.SOCK_STREAM)
        self.sockets.add(sock)
        try:
            sock.settimeout(0)
            for option in options:
                sock.setsockopt(*option)
            if local_address is not None:
                sock.bind((local_address, 0))
            code = sock.connect_ex(target)
            if code in UNDER_WAY:
                await self.wait(anyio.wait_writable, sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
        except BaseException:
            self._drop(sock)
            raise
        return sock

    def _drop(self, sock: socket.socket) -> None:
        self.sockets.discard(sock)
        sock.close()


async def _resolve(host: str, port: int) -> list[Address]:
    """The addresses of `host`, the two families taking turns (RFC 8305 section 4). Raises `OSError`."""
    name = host.encode()  # httpx has made it ASCII; as bytes it is not looked at once more
    try:  # a numeric address needs no thread
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        found = await anyio.getaddrinfo(name, port, type=socket.SOCK_STREAM)  # type: ignore[assignment]
    first = [(family, target) for family, _, _, _, target in found if family == found[0][0]]
    second = [(family, target) for family, _, _, _, target in found if family != found[0][0]]
    turns = [address for pair in zip(first, second, strict=False) for address in pair]
    shared = len(turns) // 2
    return [*turns, *first[shared:], *second[shared:]]


@contextlib.contextmanager
def _mapped(error: type[Exception], to: type[Exception]) -> Generator[None, None, None]:
    """Raise httpcore's error in place of the system's, which stays its cause."""
    try:
        yield
    except error as exc:
        raise to(str(exc) or type(exc).__name__) from exc


class _Stream(httpcore.AsyncNetworkStream, abc.ABC):
    """What httpcore reads and writes; below it, `receive` and `send` do the work, uncounted."""

    def __init__(self, wire: Wire, depth: int) -> None:
        self._wire = wire
        self._depth = depth

    @abc.abstractmethod
    async def receive(self, max_bytes: int, timeout: float | None) -> bytes:
        """At most `max_bytes`, none at the end. Raises httpcore's read errors."""
        ...

    @abc.abstractmethod
    async def send(self, data: bytes | memoryview, timeout: float | None) -> None:
        """All of `data`. Raises httpcore's write errors."""
        ...

    @abc.abstractmethod
    def take(self) -> bytes | None:
        """What is there without waiting: None when nothing is, no bytes at the end or after an error."""
        ...

    @abc.abstractmethod
    def peek(self) -> bytes:
        """What has come of an answer and was not received yet; it stays there."""
        ...

    @abc.abstractmethod
    def is_quiet(self) -> bool:
        """Whether the peer has neither closed nor sent anything."""
        ...

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        record = self._wire.record_at(self._depth)
        if record is None:
            with self._wire.bounding_greeting():
                return await self.receive(max_bytes, timeout)
        record.phase = "read"
        data = await self.receive(max_bytes, timeout)
        if data:
            record.response_started = True
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:  # twice in each request without a body
            return
        wire = self._wire
        record = wire.record_at(self._depth)
        if record is None:
            await self.send(buffer, timeout)
            return
        wire.begin()
        if not wire.has_served and not record.bytes_written and self.peek():
            # It cannot be the answer, and would leave the answer to the next request (RFC 9112 section 9.2).
            record.response_started = True
            raise httpcore.RemoteProtocolError("the server spoke before it was asked")
        record.phase = "write"
        before = wire.sent
        try:
            await self.send(buffer, timeout)
        finally:
            sent = wire.sent - before
            if sent and self._depth:
                sent = len(buffer)  # some of it went out, encrypted: how much of it the peer can read is not known
            record.bytes_written = (record.bytes_written or 0) + sent

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        with _mapped(TimeoutError, httpcore.ConnectTimeout), anyio.fail_after(timeout):
            try:
                stream = TLSStream(self._wire, self._depth + 1, self, ssl_context, server_hostname)
                await stream.shake_hands()
            except (ssl.SSLError, ValueError, httpcore.ReadError, httpcore.WriteError) as exc:
                raise httpcore.ConnectError(str(exc)) from exc
        self._wire.stream = stream
        return stream

    async def aclose(self) -> None:
        self._wire.close()


class SocketStream(_Stream):
    """The bytes of a socket."""

    def __init__(self, wire: Wire, sock: socket.socket) -> None:
        super().__init__(wire, 0)
        self._sock = sock
        self._unwaited = 0
        self._asked = self._is_reset = False

    async def receive(self, max_bytes: int, timeout: float | None) -> bytes:
        if not self._asked:
            await self._be_fair()
        try:
            while True:
                # What was asked takes a moment to be answered. Waiting for it before looking saves a look, and gives
                # the other tasks their turn once an attempt, however quick the server is.
                if not self._asked:
                    with contextlib.suppress(BlockingIOError, InterruptedError):
                        data = self._sock.recv(max_bytes)
                        if not data and self._is_reset:  # a write was told of it, and then nobody else is
                            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                        return data
                self._asked = False
                await self._wait(anyio.wait_readable, timeout, httpcore.ReadTimeout)
        except OSError as exc:
            raise httpcore.ReadError(str(exc)) from exc

    async def send(self, data: bytes | memoryview, timeout: float | None) -> None:
        await self._be_fair()
        rest = memoryview(data)
        try:
            while rest:
                try:
                    sent = self._sock.send(rest)
                except (BlockingIOError, InterruptedError):
                    await self._wait_until_taken(timeout)
                else:
                    self._wire.sent += sent
                    rest = rest[sent:]
            self._asked = True
        except OSError as exc:
            self._is_reset = isinstance(exc, ConnectionResetError)
            raise httpcore.WriteError(str(exc)) from exc

    async def _wait_until_taken(self, timeout: float | None) -> None:
        """Wait until the peer takes more; look meanwhile whether it has refused already (RFC 9112 section 9.5).

        httpcore answers a `WriteError` by reading what the server says. A success that comes early ends nothing until
        the server takes no more: some begin to answer while they still read.
        """
        if self._wire.record.phase != "write":
            return await self._wait(anyio.wait_writable, timeout, httpcore.WriteTimeout)
        ends_at = None if timeout is None else anyio.current_time() + timeout
        while True:
            assert self._wire.stream is not None
            early = EARLY_ANSWER.match(self._wire.stream.peek())
            is_over = ends_at is not None and anyio.current_time() >= ends_at
            if early is not None and (is_over or early[3] != b"2"):
                raise httpcore.WriteError("the server answered before it took the request")
            if is_over:
                raise httpcore.WriteTimeout("the server does not take the request")
            left = EARLY_LOOK if ends_at is None else min(EARLY_LOOK, ends_at - anyio.current_time())
            with contextlib.suppress(httpcore.WriteTimeout):
                return await self._wait(anyio.wait_writable, left, httpcore.WriteTimeout)

    async def _wait(
        self,
        ready: Callable[[socket.socket], Awaitable[None]],
        timeout: float | None,
        error: type[httpcore.TimeoutException],
    ) -> None:
        self._unwaited = 0
        if timeout is None:
            await self._wire.wait(ready, self._sock)
            return
        with anyio.move_on_after(timeout) as scope:
            await self._wire.wait(ready, self._sock)
        if scope.cancelled_caught:
            raise error(f"nothing moved for {timeout:g} s")

    async def _be_fair(self) -> None:
        self._unwaited += 1
        if self._unwaited > FAIR_SHARE:
            self._unwaited = 0
            await anyio.lowlevel.checkpoint()

    def take(self) -> bytes | None:
        try:
            return self._sock.recv(CHUNK)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""

    def peek(self) -> bytes:
        try:
            return self._sock.recv(4096, socket.MSG_PEEK)
        except OSError:
            return b""

    def is_quiet(self) -> bool:
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            pass
        return False

    def get_extra_info(self, info: str) -> Any:
        if info == "socket":
            return self._sock
        if info == "is_readable":
            return not self.is_quiet()
        with contextlib.suppress(OSError):
            if info == "client_addr":
                return self._sock.getsockname()
            if info == "server_addr":
                return self._sock.getpeername()
        return None


class TLSStream(_Stream):
    """TLS over any of our streams."""

    def __init__(
        self, wire: Wire, depth: int, lower: _Stream, context: ssl.SSLContext, server_hostname: str | None
    ) -> None:
        super().__init__(wire, depth)
        self._lower = lower
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._early = b""  # came while we were still writing

    async def shake_hands(self) -> None:
        """Raises `ssl.SSLError` (a certificate that is refused, above all) and httpcore's read and write errors."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush(None)
                self._feed(await self._lower.receive(CHUNK, None))
            else:
                return await self._flush(None)

    def _feed(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _flush(self, timeout: float | None) -> None:
        if self._outgoing.pending:
            await self._lower.send(self._outgoing.read(), timeout)

    async def receive(self, max_bytes: int, timeout: float | None) -> bytes:
        if self._early:
            data, self._early = self._early[:max_bytes], self._early[max_bytes:]
            return data
        while True:
            try:
                return self._tls.read(max_bytes)  # no bytes: the peer's close_notify
            except ssl.SSLWantReadError:
                await self._flush(timeout)
            except ssl.SSLError as exc:
                raise httpcore.ReadError(str(exc)) from exc
            data = await self._lower.receive(CHUNK, timeout)
            if not data:
                return self._end_of_file()
            self._incoming.write(data)

    def _end_of_file(self) -> bytes:
        """The socket ended and TLS did not: an answer that had begun may have been cut anywhere."""
        record = self._wire.record_at(self._depth)
        if record is not None and record.response_started:
            raise httpcore.RemoteProtocolError("the TLS connection was cut: the answer may be incomplete")
        return b""

    async def send(self, data: bytes | memoryview, timeout: float | None) -> None:
        rest = memoryview(data)
        while rest:
            try:
                taken = self._tls.write(rest[:CHUNK])
            except ssl.SSLError as exc:
                raise httpcore.WriteError(str(exc)) from exc
            rest = rest[taken:]
            await self._lower.send(self._outgoing.read(), timeout)

    def take(self) -> bytes | None:
        while True:
            try:
                return self._tls.read(CHUNK)
            except ssl.SSLWantReadError:
                data = self._lower.take()
            except ssl.SSLError:
                return b""
            if not data:
                return data
            self._incoming.write(data)

    def peek(self) -> bytes:
        while len(self._early) < CHUNK and (data := self.take()):
            self._early += data
        return self._early

    def is_quiet(self) -> bool:
        """Session tickets may still come after the answer; they are taken in, and are no reason to close."""
        data = self.take()
        self._early += data or b""
        return data is None and not self._early

    def get_extra_info(self, info: str) -> Any:
        return self._tls if info == "ssl_object" else self._lower.get_extra_info(info)
