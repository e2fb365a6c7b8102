"""One HTTP/1.1 connection on asyncio, written for speed and for hostile servers. It knows no pool; `_framing` reads.

Invariants, which hypothesis tests hold: a response is the same however its bytes were split on the way; whatever bytes
come, there is an answer or one of httpcore's errors. What one request got never answers another: a connection serves
again only after a whole request and a whole answer with nothing behind it, and an answer reads from its own exchange
only. `close` is synchronous: when it returns, the descriptor is out of the event loop and closed, and who waited for
it wakes up. Nothing outlives the connection or keeps it alive: the loop holds weak references. Work per event is
bounded: 64 KiB are read, then others have their turn. No frame that an error passes holds a header, query or body.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import math
import os
import select
import socket
import ssl
import warnings
import weakref
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import AsyncIterable, Iterator, Mapping, Sequence
from typing import Any

import anyio
import httpcore
import httpx

from ._exchange import DeadlinePassed, ExchangeRecord
from ._framing import (
    CHUNKS,
    HEAD,
    IDLE,
    LENGTH,
    RAW,
    AnswerReader,
    Field,
    FieldBlock,
    RequestHead,
    chunk,
    field_block,
    framed,
    headed,
    merged,
    request_head,
)
from ._sockets import SocketStream, Wire

RECEIVE = 64 * 1024
RECORD = 16 * 1024  # what a TLS record holds at the most (RFC 8446 section 5.1)
SLICE = 64 * 1024  # of a body that goes out
HIGH_WATER = 256 * 1024  # of a body that nobody reads, then the server has to wait
FAIR_SHARE = 16  # so many slices go out without waiting before others have their turn

# What the task that drives the exchange waits for
ANSWER, BODY, DRAINED = range(3)

Failure = tuple[type[Exception], str, BaseException | None]


class Proxy:
    """An http:// or https:// proxy: where it is, its TLS configuration if any, and the fields that it wants to see."""

    __slots__ = ("fields", "host", "port", "tls")

    def __init__(self, host: str, port: int, *, tls: ssl.SSLContext | None, fields: Sequence[Field] = ()) -> None:
        self.host = host
        self.port = port
        self.tls = tls
        self.fields = list(fields)


class Answer:
    """The final answer to a request.

    `headers` are as they were sent. `body` is the whole body, undecoded, where it came with the head: then nothing is
    left to read; else None. Iterating gives the body in either case.
    """

    __slots__ = (
        "_connection",
        "_serial",
        "_timeout",
        "body",
        "headers",
        "http_version",
        "is_given",
        "reason",
        "status",
    )

    def __init__(self, connection: WireConnection, timeout: float | None) -> None:
        self._connection: WireConnection | None = connection
        self._serial = connection._serial
        self._timeout = timeout
        self.is_given = False
        head = connection._reader.head
        self.status = head.status
        self.reason = head.reason
        self.http_version = head.version
        self.headers = head.fields
        self.body: bytes | None = None

    async def read(self) -> bytes:
        """The next piece of the body, as it came; no bytes at its end.

        Raises `httpcore.ReadTimeout`, `ReadError`, or `RemoteProtocolError` where it was cut or is malformed.
        """
        connection = self._connection
        if connection is None:
            return b""
        piece = await connection._read(self._serial, self._timeout)
        if not piece:
            self._connection = None
        return piece

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        if self.body is not None:
            if self.is_given or not self.body:
                raise StopAsyncIteration
            self.is_given = True
            return self.body
        piece = await self.read()
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Let go of it. Where it was not read to its end, its connection is closed."""
        connection, self._connection = self._connection, None
        if connection is not None and connection._serial == self._serial and not connection.is_reusable():
            connection.close()


class NetworkStream(httpcore.AsyncNetworkStream):
    """What httpx's `network_stream` extension tells about a connection. It is not read, written or upgraded here."""

    def __init__(self, connection: WireConnection) -> None:
        self._connection = connection

    def get_extra_info(self, info: str) -> Any:
        """`ssl_object`, `client_addr`, `server_addr`, `socket`, `is_readable`; None for anything else."""
        return self._connection._extra_info(info)

    async def aclose(self) -> None:
        """Close the connection."""
        self._connection.close()


class _TLS:
    """TLS in memory. The buffers stay small: what is longer than a record goes through in slices."""

    __slots__ = ("incoming", "is_over", "object", "outgoing")

    def __init__(self, context: ssl.SSLContext, server_hostname: str) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_hostname=server_hostname)
        self.is_over = False

    def decrypt(self, data: bytes) -> Iterator[bytes]:
        """What can be read once `data` came. Sets `is_over` at the peer's close_notify; raises `ssl.SSLError`."""
        incoming, read = self.incoming, self.object.read
        for start in range(0, len(data), RECORD):
            incoming.write(data if len(data) <= RECORD else data[start : start + RECORD])
            while incoming.pending or self.object.pending():
                try:
                    plain = read(RECORD)
                except ssl.SSLWantReadError:
                    break
                if not plain:
                    self.is_over = True
                    return
                yield plain

    def is_ahead(self) -> bool:
        """Whether more than the handshake has come, session tickets apart: its bytes are lost then."""
        try:
            self.object.read(1)
        except ssl.SSLError as exc:
            return not isinstance(exc, ssl.SSLWantReadError)
        return True

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """The records that carry `data`. Raises `ssl.SSLError`."""
        if len(data) <= RECORD:
            self.object.write(data)
            return self.outgoing.read()
        rest, out = memoryview(data), list[bytes]()
        while rest:
            rest = rest[self.object.write(rest[:RECORD]) :]
            out.append(self.outgoing.read())
        return b"".join(out)


class WireConnection:
    """One connection to `host` and `port`, opened when the first request needs it.

    `tls`: the origin's TLS configuration, None for http. `server_hostname`: the name to verify and to send as SNI,
    where it is not `host`. `proxy`: https origins are reached through its CONNECT, http ones by absolute targets.
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_context",
        "_deadline",
        "_dialer",
        "_due",
        "_expires",
        "_failure",
        "_fd",
        "_fields",
        "_has_served",
        "_hears_once",
        "_held",
        "_is_closed",
        "_is_paused",
        "_is_reset",
        "_is_sent",
        "_is_write_broken",
        "_loop",
        "_lower",
        "_outbox",
        "_pid",
        "_poll",
        "_reader",
        "_record",
        "_ref",
        "_serial",
        "_sock",
        "_timeout",
        "_timer",
        "_tls",
        "_uncounted",
        "_waiter",
        "_wants",
        "_wants_close",
        "host",
        "port",
        "prefix",
        "proxy",
        "server_hostname",
        "tls",
    )

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None,
        server_hostname: str | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self._sock: socket.socket | None = None
        self.host = host
        self.port = port
        self.tls = tls
        self.server_hostname = server_hostname or host
        self.proxy = proxy
        self.prefix = b""  # of absolute targets (RFC 9112 section 3.2.2)
        if proxy is not None and tls is None:
            self.prefix = f"http://{_authority(host, port, default=80)}".encode("ascii")
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._hears_once = not isinstance(self._loop, BaseSelectorEventLoop)
        self._pid = os.getpid()
        self._ref: weakref.ref[WireConnection] = weakref.ref(self)
        self._context = contextvars.Context()  # not the one of whoever happens to open it
        self._dialer: Wire | None = None
        self._fd = -1
        self._tls: _TLS | None = None
        self._lower: _TLS | None = None  # under it: to the proxy
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # when that rings; uvloop's do not tell where it is at once
        self._timeout: float | None = None
        self._expires = self._deadline = math.inf
        self._waiter: asyncio.Future[None] | None = None
        self._wants = ANSWER
        self._outbox = b""
        self._uncounted = 0
        self._record: ExchangeRecord | None = None
        self._serial = 0
        self._is_closed = self._is_paused = self._is_reset = self._has_served = False
        self._is_sent = self._is_write_broken = self._wants_close = False
        self._reader = AnswerReader()
        self._failure: Failure | None = None
        self._fields: Sequence[Field] | None = None
        self._block: FieldBlock = b"", 0, True
        self._held: Any = None  # a request, while it waits for the connection

    # For who drives an exchange

    async def exchange(
        self,
        method: bytes,
        target: bytes,
        headers: Sequence[Field],
        body: bytes | AsyncIterable[bytes],
        record: ExchangeRecord,
        timeout: Mapping[str, float | None],
        deadline: float | None = None,
    ) -> Answer:
        """Send a request, and return as soon as the head of its final answer is there; `record` is kept.

        `timeout` has seconds or None for `connect` (for the address, for CONNECT and for each TLS handshake), `write`
        and `read` (for each wait). An answer that is no success (300 and above) and comes while the body is still going
        out ends the sending; a success does once the server takes no more. Raises httpcore's errors, and
        `DeadlinePassed` after `deadline` seconds, which only an open connection heeds; then, as when it is cancelled,
        the connection is closed.
        """
        record.bytes_written = 0
        record.response_started = record.head_received = False
        record.reused = self._has_served
        made = self._headed(method, target, headers)
        if not isinstance(made, str) and isinstance(body, bytes):
            made = framed(made, body)
            body = b""
        # Tools show the local variables of the frames that an error passes: none holds a header, query or body then.
        del target, headers
        try:
            if isinstance(made, str):
                raise httpcore.LocalProtocolError(made)
            if self._sock is None:
                self._held, made = made, ""
                await self._open(record, timeout.get("connect"))
                made, self._held = self._held, None
                assert made is not None
            elif self._reader.stage != IDLE or self._waiter is not None:
                raise RuntimeError("a connection serves one exchange at a time")
            head, whole, length, keeps_alive = made
            del made
            self._serial += 1
            reader = self._reader
            reader.begin(HEAD, has_no_body=method == b"HEAD")
            self._is_sent = self._is_write_broken = False
            self._failure = None
            self._wants_close = not keeps_alive
            self._record = record
            self._deadline = math.inf if deadline is None else self._loop.time() + deadline
            record.phase = "write"
            if not isinstance(body, bytes):
                self._push(head)
                del head
                await self._send_stream(body, length, timeout.get("write"))
            elif len(whole) < SLICE:
                self._push(head + whole if whole else head)
                del head, whole
                if self._outbox:
                    await self._drain(timeout.get("write"))
                self._is_sent = not (self._is_write_broken or self._outbox)
            else:
                self._push(head)
                view = memoryview(whole)
                del head, whole
                await self._send_bytes(view, timeout.get("write"))
            record.phase = "read"
            read_timeout = timeout.get("read")
            while not reader.is_answered:
                if self._failure is not None:
                    raise self._error()
                await self._wait(ANSWER, read_timeout)
            if reader.stage >= LENGTH:
                self._on_readable()  # the rest may have come meanwhile
            self._record = None
            record.says_more = reader.head.says_more
            self._deadline = math.inf
            self._has_served = True
            answer = Answer(self, read_timeout)
            if reader.stage == IDLE and self._failure is None:
                answer.body = reader.take()
                answer._connection = None
                if self._is_paused:
                    self._go_on()
        except BaseException:
            self.close()
            raise
        return answer

    def _headed(self, method: bytes, target: bytes, headers: Sequence[Field]) -> RequestHead | str:
        """The head of the request, or what is wrong with it. Fields that are those of the one before stay written."""
        if headers is not self._fields and headers != self._fields:
            sent = headers if not self.prefix or self.proxy is None else merged(self.proxy.fields, headers)
            block = field_block(sent)
            if isinstance(block, str):
                return block
            self._fields, self._block = headers if type(headers) is tuple else [*headers], block
        return headed(method, self.prefix + target, self._block)

    @property
    def network_stream(self) -> NetworkStream:
        """What httpx's extension of that name shows of this connection."""
        return NetworkStream(self)

    async def handle(self, request: httpcore.Request, record: ExchangeRecord) -> httpcore.Response:
        """The same for httpcore's objects: the stream of the response is an `Answer`."""
        stream: Any = request.stream
        answer = await self.exchange(
            request.method,
            request.url.target,
            request.headers,
            b"".join(stream) if isinstance(stream, httpx.ByteStream) else stream,
            record,
            request.extensions.get("timeout", _NO_TIMEOUTS),
        )
        response = httpcore.Response(answer.status)
        response.headers = answer.headers
        response.stream = answer
        response.extensions = {
            "http_version": answer.http_version,
            "reason_phrase": answer.reason,
            "network_stream": self.network_stream,
        }
        return response

    # For the pool

    def is_reusable(self) -> bool:
        """Whether it can serve again after an answer that was read to its end."""
        reader = self._reader
        return (
            reader.stage == IDLE
            and reader.keeps_alive
            and self._is_sent
            and self._has_served
            and not (reader.is_followed or reader.unread or self._wants_close or self._is_closed or self._outbox)
        )

    def is_alive(self) -> bool:
        """Whether the peer has neither closed it nor sent what nobody asked for.

        The loop tells as it happens; but what came since its last turn would be found out too late (a POST that was
        written to a closed connection is not sent again), so the socket is asked, at less than 1 µs.
        """
        if self._sock is None or self._reader.is_followed:
            return False
        if self._poll.poll(0):
            self._on_readable()
        return not (self._is_closed or self._reader.is_followed)

    def close(self) -> None:
        """Close its socket now, and wake up whoever waits for it."""
        if self._is_closed:
            return
        if self._loop.is_closed() or os.getpid() != self._pid:
            self.abandon()
            return
        self._is_closed = True
        if self._dialer is not None:
            self._dialer.close()
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            sock.close()
        if self._failure is None and self._reader.stage != IDLE:
            self._failure = httpcore.ReadError, "closed on this side", None
        self._let_go()
        self._wake()

    def abandon(self) -> None:
        """Close its file descriptors; no event loop is told."""
        self._is_closed = True
        if self._dialer is not None:
            self._dialer.abandon()
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()
        self._waiter = self._timer = None
        self._let_go()

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._tls = self._lower = self._dialer = self._record = self._held = None
        self._outbox = b""

    def __del__(self) -> None:
        sock = self._sock
        if sock is None:
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        self._sock = None
        loop, fd, timer = self._loop, self._fd, self._timer
        if loop.is_closed() or os.getpid() != self._pid:
            sock.close()
        else:  # perhaps in another thread, as the collector likes
            loop.call_soon_threadsafe(_close_late, loop, sock, fd, timer)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "not open" if self._sock is None else "open"
        doing = "idle" if self._reader.stage == IDLE else "busy"
        return f"<WireConnection {_authority(self.host, self.port)} [{state}, {doing}, exchange {self._serial}]>"

    def _extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return None if self._tls is None else self._tls.object
        sock = self._sock
        if info == "socket":
            return sock
        if info == "is_readable":
            return not self.is_alive()
        if sock is not None:
            with contextlib.suppress(OSError):
                if info == "client_addr":
                    return sock.getsockname()
                if info == "server_addr":
                    return sock.getpeername()
        return None

    # Opening

    async def _open(self, record: ExchangeRecord, timeout: float | None) -> None:
        if self._is_closed or self._dialer is not None:
            raise httpcore.ConnectError("closed on this side")
        proxy = self.proxy
        self._dialer = dialer = Wire(0)
        dialer.record = record
        host, port = (self.host, self.port) if proxy is None else (proxy.host, proxy.port)
        stream = await dialer.connect_tcp(host, port, timeout)
        assert isinstance(stream, SocketStream)
        self._dialer = None
        self._sock = sock = stream._sock
        self._fd = sock.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._context.run(self._loop.add_reader, self._fd, _on_readable, self._ref)
        if proxy is not None and proxy.tls is not None:
            await self._secure(proxy.tls, proxy.host, timeout)
        if self.tls is not None:
            if proxy is not None:
                await self._tunnel(proxy, timeout)
            await self._secure(self.tls, self.server_hostname, timeout)

    async def _secure(self, context: ssl.SSLContext, server_hostname: str, timeout: float | None) -> None:
        """Put TLS upon what there is."""
        context.set_alpn_protocols(["http/1.1"])  # as httpcore does
        self._reader.begin(RAW)
        try:
            tls = _TLS(context, server_hostname)
            with anyio.fail_after(timeout):
                while True:
                    try:
                        tls.object.do_handshake()
                    except ssl.SSLWantReadError:
                        self._push(tls.outgoing.read())
                        data = await self._receive()
                        if data:
                            tls.incoming.write(data)
                        else:
                            tls.incoming.write_eof()
                    else:
                        break
        except TimeoutError:
            raise httpcore.ConnectTimeout("the TLS handshake took too long") from None
        except httpcore.ReadError as exc:
            raise httpcore.ConnectError(str(exc)) from exc
        except (ssl.SSLError, ValueError) as exc:  # a name that no certificate can have is a ValueError
            raise httpcore.ConnectError(str(exc)) from exc
        self._push(tls.outgoing.read())
        self._reader.begin(IDLE)
        self._lower, self._tls = self._tls, tls
        if tls.is_ahead():
            raise httpcore.RemoteProtocolError("the server spoke before it was asked (RFC 9112 section 9.2)")

    async def _receive(self) -> bytes:
        """What came, before there is any HTTP; no bytes at the end."""
        reader = self._reader
        while not reader.pieces:
            if self._failure is not None:
                raise self._error()
            if reader.stage == IDLE:
                return b""
            await self._wait(BODY, None)
        return reader.take()

    async def _tunnel(self, proxy: Proxy, timeout: float | None) -> None:
        """Ask the proxy for a tunnel (RFC 9110 section 9.3.6)."""
        authority = _authority(self.host, self.port).encode("ascii")
        made = request_head(b"CONNECT", authority, merged([(b"Host", authority), (b"Accept", b"*/*")], proxy.fields))
        if isinstance(made, str):
            raise httpcore.LocalProtocolError(made)
        reader = self._reader
        reader.begin(HEAD, has_no_body=True)
        try:
            self._push(made[0])
            del made
            with anyio.fail_after(timeout):
                while not reader.is_answered:
                    if self._failure is not None:
                        raise self._error()
                    await self._wait(ANSWER, None)
        except TimeoutError:
            raise httpcore.ConnectTimeout("the proxy did not answer in time") from None
        answer = reader.head
        if not 200 <= answer.status <= 299:
            raise httpcore.ProxyError(f"{answer.status} {answer.reason.decode('ascii', 'ignore')}")
        if reader.is_followed:
            raise httpcore.RemoteProtocolError("bytes came through the tunnel before TLS began")

    # Sending

    async def _send_bytes(self, view: memoryview, timeout: float | None) -> None:
        """Send a large body, slice by slice."""
        await self._drain(timeout)
        for count, start in enumerate(range(0, len(view), SLICE)):
            if self._is_refused():
                return
            self._push(view[start : start + SLICE])
            await self._drain(timeout)
            if count % FAIR_SHARE == FAIR_SHARE - 1:
                await asyncio.sleep(0)
        self._is_sent = not (self._is_refused() or self._outbox)

    async def _send_stream(self, body: AsyncIterable[bytes], length: int, timeout: float | None) -> None:
        """Send `body` as it comes; what makes it is closed if it is not wanted to its end."""
        iterator: Any = body.__aiter__()
        is_at_end = False
        left, count = length, 0
        try:
            await self._drain(timeout)
            while not self._is_refused():
                try:
                    view = memoryview(await iterator.__anext__())
                except StopAsyncIteration:
                    is_at_end = True
                    break
                if length != CHUNKS:
                    left -= len(view)
                    if left < 0:
                        raise httpcore.LocalProtocolError("the body is longer than Content-Length says")
                for start in range(0, len(view), SLICE):
                    part = view[start : start + SLICE]
                    self._push(chunk(part) if length == CHUNKS else part)
                    await self._drain(timeout)
                    if self._is_refused():
                        break
                    count += 1
                    if count % FAIR_SHARE == 0:
                        await asyncio.sleep(0)
            if is_at_end and not self._is_refused():
                if length == CHUNKS:
                    self._push(b"0\r\n\r\n")
                    await self._drain(timeout)
                elif left:
                    raise httpcore.LocalProtocolError("the body is shorter than Content-Length says")
                self._is_sent = not (self._is_refused() or self._outbox)
        except BaseException:
            self.close()
            raise
        finally:
            if not is_at_end and hasattr(iterator, "aclose"):
                await iterator.aclose()

    def _is_refused(self) -> bool:
        """Whether sending on makes no sense: the server has refused the request, or cannot be written to."""
        return (
            self._is_write_broken
            or self._failure is not None
            or self._is_closed
            or (self._reader.is_answered and self._reader.head.status >= 300)
        )

    def _push(self, data: bytes | memoryview) -> None:
        """Send `data` as far as the socket takes it; the rest goes to the outbox."""
        tls = self._tls
        if tls is not None:
            self._uncounted += len(data)
            try:
                data = tls.encrypt(data)
                if self._lower is not None:
                    data = self._lower.encrypt(data)
            except ssl.SSLError:
                self._break_write()
                return
        self._emit(data)

    def _emit(self, data: bytes | memoryview) -> None:
        """The same for what is encrypted already."""
        sock = self._sock
        if sock is None or self._is_write_broken:
            return
        if self._outbox:
            self._outbox += data
            return
        try:
            sent = sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as exc:
            self._is_reset = isinstance(exc, ConnectionResetError)
            self._break_write()
            return
        if sent:
            self._count(sent)
        if sent < len(data):
            self._outbox = bytes(data[sent:])
            self._context.run(self._loop.add_writer, self._fd, _on_writable, self._ref)

    def _count(self, sent: int) -> None:
        """Of what TLS carries all counts as soon as some of it went out: how much the peer can read is not known."""
        if self._tls is not None:
            sent, self._uncounted = self._uncounted, 0
        record = self._record
        if record is not None:
            assert record.bytes_written is not None
            record.bytes_written += sent

    async def _drain(self, timeout: float | None) -> None:
        """Wait until the outbox is empty, or the server wants no more."""
        if self._loop.time() >= self._deadline:  # where the socket takes all, nothing is waited for
            raise DeadlinePassed
        while self._outbox and not self._is_refused():
            try:
                await self._wait(DRAINED, timeout)
            except httpcore.WriteTimeout:
                if not self._reader.is_answered:
                    raise
                self._break_write()  # it has answered, and takes no more: then that is its answer

    def _on_writable(self) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            sent = sock.send(self._outbox)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._is_reset = isinstance(exc, ConnectionResetError)
            self._break_write()
            return
        self._outbox = self._outbox[sent:]
        self._count(sent)
        self._count_anew()
        if not self._outbox:
            self._loop.remove_writer(self._fd)
            self._wake()

    def _break_write(self) -> None:
        """Nothing more can be written; the server may have said why, so it is read on (RFC 9112 section 9.5)."""
        self._is_write_broken = True
        self._outbox = b""
        self._loop.remove_writer(self._fd)
        self._wake()

    # Waiting

    async def _wait(self, wants: int, timeout: float | None) -> None:
        """Wait once; whoever waits looks then whether what it wants is there."""
        if self._is_closed:
            raise httpcore.ReadError("closed on this side")
        if self._waiter is not None:
            raise RuntimeError("two tasks wait for the same connection")
        self._wants = wants
        self._timeout = timeout
        loop = self._loop
        self._waiter = waiter = loop.create_future()
        expires = self._count_anew()
        if self._due > expires:
            if self._timer is not None:
                self._timer.cancel()
            self._ring_at(expires)
        try:
            await waiter
        finally:
            self._waiter = None
            del waiter  # it has the error, and that would have this frame

    def _ring_at(self, when: float) -> None:
        self._timer = self._loop.call_at(when, _on_timer, self._ref, context=self._context)
        self._due = when

    def _count_anew(self) -> float:
        """Something has moved: when the wait ends if nothing does from now on."""
        timeout = self._timeout
        expires = self._deadline
        if timeout is not None:
            expires = min(expires, self._loop.time() + timeout)
        self._expires = expires
        return expires

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _on_timer(self) -> None:
        self._timer, self._due = None, math.inf
        waiter, timeout = self._waiter, self._timeout
        if waiter is None or waiter.done() or self._expires == math.inf:
            return
        now = self._loop.time()
        if now >= self._expires and not self._is_paused and self._poll.poll(0):
            self._on_readable()  # on uvloop timers ring before it looks at what has come while others kept it busy
        if waiter.done():
            return
        if now < self._expires:
            self._ring_at(self._expires)
        elif now >= self._deadline:
            waiter.set_exception(DeadlinePassed())
        elif self._wants == DRAINED:
            waiter.set_exception(httpcore.WriteTimeout(f"the server took nothing for {timeout:g} s"))
        else:
            waiter.set_exception(httpcore.ReadTimeout(f"nothing moved for {timeout:g} s"))

    # Receiving

    def _on_readable(self) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            data = sock.recv(RECEIVE)
            tls = self._tls
            if not data:
                if self._is_reset:  # a write was told of it, and then nobody else is
                    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                self._reader.end(is_cut=tls is not None)
            elif tls is None:
                self._feed(data)
            else:
                self._decrypt(tls, data)
        except (BlockingIOError, InterruptedError):
            return
        except httpcore.RemoteProtocolError as exc:
            self._fail(httpcore.RemoteProtocolError, exc)
        except OSError as exc:  # so are TLS's own
            self._fail(httpcore.ReadError, exc, cause=exc)
        reader = self._reader
        if reader.is_followed:
            self._hang_up()
        elif reader.unread > HIGH_WATER and not self._is_paused:
            self._pause()
        elif self._hears_once and self._sock is not None:
            self._look_again()
        if self._waiter is not None:
            self._wake_if_ready()

    def _look_again(self) -> None:
        """uvloop (libuv's `uv_poll`) tells of a reset once and then of nothing more, whatever is left to read."""
        # A write that failed meanwhile has taken the error with it; the hang-up stays.
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in self._poll.poll(0)):
            self._loop.call_soon(_on_readable, self._ref, context=self._context)

    def _feed(self, data: bytes) -> None:
        """What came, TLS taken off."""
        reader = self._reader
        record = self._record
        if record is None:
            reader.feed(data)
        else:
            record.response_started = True
            reader.feed(data)
            record.head_received = reader.is_answered

    def _wake_if_ready(self) -> None:
        wants = self._wants
        if wants == DRAINED:
            if self._is_refused():
                self._wake()
        elif (
            self._reader.stage == IDLE
            or (wants == ANSWER and self._reader.is_answered)
            or (wants == BODY and self._reader.pieces)
        ):
            self._wake()
        else:
            self._count_anew()

    def _decrypt(self, tls: _TLS, data: bytes) -> None:
        lower = self._lower
        for part in (data,) if lower is None else lower.decrypt(data):
            for plain in tls.decrypt(part):
                self._feed(plain)
        if tls.outgoing.pending:  # what TLS has to say by itself
            records = tls.outgoing.read()
            self._emit(records if lower is None else lower.encrypt(records))
        elif lower is not None and lower.outgoing.pending:
            self._emit(lower.outgoing.read())
        if tls.is_over:
            self._reader.end(is_cut=False)
        elif lower is not None and lower.is_over:
            self._reader.end(is_cut=True)

    def _pause(self) -> None:
        if self._sock is not None:
            self._is_paused = True
            self._loop.remove_reader(self._fd)

    def _go_on(self) -> None:
        """Let the server go on, unless it has said what it had no right to, or its last word."""
        if self._sock is not None and not self._reader.is_followed:
            self._is_paused = False
            self._context.run(self._loop.add_reader, self._fd, _on_readable, self._ref)

    def _hang_up(self) -> None:
        """Nothing more is read; while nobody drives it, the socket is closed. What was received stays to be read."""
        if self._waiter is None and self._record is None and self._reader.stage == IDLE:
            self.close()
        else:
            self._pause()

    def _error(self) -> Exception:
        """What the exchange failed of, made anew: a raised one holds the frames that hold this connection."""
        assert self._failure is not None
        error, message, cause = self._failure
        made = error(message)
        made.__cause__ = cause
        return made

    def _fail(self, error: type[Exception], exc: Exception, cause: Exception | None = None) -> None:
        reader = self._reader
        if reader.stage != IDLE:
            self._failure = error, str(exc), cause and cause.with_traceback(None)
        reader.stage = IDLE
        reader.is_followed = True

    async def _read(self, serial: int, timeout: float | None) -> bytes:
        """For the answer of the exchange `serial`: the next piece of its body."""
        reader = self._reader
        while serial == self._serial:
            if reader.pieces:
                piece = reader.take()
                if self._is_paused:
                    self._go_on()
                return piece
            if self._failure is not None:
                self.close()
                raise self._error()
            if self._reader.stage == IDLE:
                return b""
            await self._wait(BODY, timeout)
        return b""


_NO_TIMEOUTS: Mapping[str, float | None] = {}


def _on_readable(reference: weakref.ref[WireConnection]) -> None:
    connection = reference()
    if connection is not None:
        connection._on_readable()


def _on_writable(reference: weakref.ref[WireConnection]) -> None:
    connection = reference()
    if connection is not None:
        connection._on_writable()


def _on_timer(reference: weakref.ref[WireConnection]) -> None:
    connection = reference()
    if connection is not None:
        connection._on_timer()


def _close_late(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, fd: int, timer: asyncio.TimerHandle | None
) -> None:
    loop.remove_reader(fd)
    loop.remove_writer(fd)
    sock.close()
    if timer is not None:
        timer.cancel()


def _authority(host: str, port: int, *, default: int | None = None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port == default else f"{name}:{port}"


def is_on_asyncio() -> bool:
    """Whether a task of asyncio runs this, on a loop that watches descriptors: not trio, not Windows."""
    try:
        loop = asyncio.get_running_loop()
        # trio may run as a guest of asyncio: then there is a loop and no task of its own.
        if asyncio.current_task() is None:
            return False
    except RuntimeError:
        return False
    return type(loop).add_reader is not asyncio.AbstractEventLoop.add_reader and hasattr(select, "poll")
