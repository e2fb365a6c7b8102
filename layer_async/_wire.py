"""One HTTP/1.1 connection on asyncio, written for speed and for hostile servers. It knows no pool.

Invariants, which hypothesis tests hold: a response is the same however its bytes were split on the way; whatever bytes
come, there is an answer or one of httpcore's errors. What one request got never answers another: a connection serves
again only after a whole request and a whole answer with nothing behind it, and an answer reads from its own exchange
only. `close` is synchronous: the descriptor is gone from the event loop and closed when it returns, and who waited for
it wakes up. Nothing outlives the connection or keeps it alive: the loop holds weak references. Work per event is
bounded: 64 KiB are read, then others have their turn.

Framing is decided here (RFC 9112 section 6.3); llhttp, strict, parses heads and chunks. An error, and never a guess,
are: Transfer-Encoding beside Content-Length, in HTTP/1.0 or other than `chunked` alone; a Content-Length twice, as a
list or as anything but digits; obs-fold (section 5.2 lets it be read as a space; who sends it is not trusted to frame);
bare LF, whitespace before a colon, control characters; any version but 1.0 and 1.1; 101, which nobody asked for here;
too many interim answers, fields or bytes (the constants below). To HEAD, and with 204 and 304, there is no body
whatever the fields say. Anything behind an answer's end closes the connection. Trailers are checked and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import re
import select
import socket
import ssl
import warnings
import weakref
from collections.abc import AsyncIterable, Iterator, Mapping, Sequence
from typing import Any

import anyio
import httpcore
import httptools
import httpx

from ._exchange import ExchangeRecord
from ._sockets import SocketStream, Wire

RECEIVE = 64 * 1024
RECORD = 16 * 1024  # what a TLS record holds at the most (RFC 8446 section 5.1)
SLICE = 64 * 1024  # of a body that goes out
HIGH_WATER = 256 * 1024  # of a body that nobody reads, then the server has to wait
HEAD_BYTES = 100 * 1024  # of a head and the interim ones before it, or of trailers and chunk extensions in a row
HEAD_FIELDS = 1000
INTERIM_ANSWERS = 64
FAIR_SHARE = 16  # so many slices go out without waiting before others have their turn

# What is expected of the bytes that come
IDLE, RAW, HEAD, LENGTH, CHUNKED, UNTIL_END = range(6)
# What the task that drives the exchange waits for
ANSWER, BODY, DRAINED = range(3)

Field = tuple[bytes, bytes]
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
        "_is_given",
        "_serial",
        "_timeout",
        "body",
        "headers",
        "http_version",
        "reason",
        "status",
    )

    def __init__(self, connection: WireConnection, timeout: float | None) -> None:
        self._connection: WireConnection | None = connection
        self._serial = connection._serial
        self._timeout = timeout
        self._is_given = False
        head = connection._head
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
            if self._is_given or not self.body:
                raise StopAsyncIteration
            self._is_given = True
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


class _Head:
    """What llhttp found in the head that comes, or came last."""

    __slots__ = (
        "begun",
        "coding",
        "connection",
        "ends_at",
        "fields",
        "is_complete",
        "length",
        "on_body",
        "pieces",
        "reason",
        "status",
        "version",
    )

    def __init__(self) -> None:
        self.clear([])

    def clear(self, pieces: list[bytes]) -> None:
        self.fields: list[Field] = []
        self.status = 0
        self.version = self.reason = b""
        self.is_complete = False
        self.begun = 0
        self.ends_at = -1  # how many pieces there were when the message ended
        self.length: bytes | None = None
        self.coding: bytes | None = None
        self.connection = b""
        self.pieces = pieces
        self.on_body = pieces.append  # chunks pass no Python on their way

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_status(self, part: bytes) -> None:
        if not self.is_complete:  # else it is what came behind the message
            self.reason += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.is_complete:  # a trailer, or behind the message
            return
        value = value.strip(b" \t")
        self.fields.append((name, value))
        if len(name) in _FRAMING_LENGTHS:
            lower = name.lower()
            if lower == b"content-length":
                self.length = value
            elif lower == b"transfer-encoding":
                self.coding = value if self.coding is None else self.coding + b"," + value
            elif lower == b"connection":
                self.connection += value.lower() + b","

    def on_headers_complete(self) -> None:
        self.is_complete = True

    def on_message_complete(self) -> None:
        if self.ends_at < 0:
            self.ends_at = len(self.pieces)


_FRAMING_LENGTHS = frozenset(map(len, (b"content-length", b"transfer-encoding", b"connection")))


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

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """The records that carry `data`. Raises `ssl.SSLError`."""
        taken = self.object.write(data)
        if taken == len(data):
            return self.outgoing.read()
        rest, out = memoryview(data)[taken:], [self.outgoing.read()]
        while rest:
            rest = rest[self.object.write(rest) :]
            out.append(self.outgoing.read())
        return b"".join(out)


class WireConnection:
    """One connection to `host` and `port`, opened when the first request needs it.

    `tls`: the origin's TLS configuration, None for http. `server_hostname`: the name to verify and to send as SNI,
    where it is not `host`. `proxy`: https origins are reached through its CONNECT, http ones by absolute targets.
    """

    __slots__ = (
        "__weakref__",
        "_context",
        "_dialer",
        "_expires",
        "_failure",
        "_fd",
        "_has_no_body",
        "_has_served",
        "_head",
        "_head_bytes",
        "_interim",
        "_is_answered",
        "_is_closed",
        "_is_dirty",
        "_is_draining",
        "_is_paused",
        "_is_sent",
        "_is_write_broken",
        "_keeps_alive",
        "_left",
        "_loop",
        "_lower",
        "_outbox",
        "_overhead",
        "_parser",
        "_pid",
        "_pieces",
        "_poll",
        "_record",
        "_ref",
        "_serial",
        "_sock",
        "_stage",
        "_tail",
        "_timeout",
        "_timer",
        "_tls",
        "_uncounted",
        "_unread",
        "_waiter",
        "_wants",
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
        self._pid = os.getpid()
        self._ref: weakref.ref[WireConnection] = weakref.ref(self)
        self._context = contextvars.Context()  # not the one of whoever happens to open it
        self._dialer: Wire | None = None
        self._fd = -1
        self._tls: _TLS | None = None
        self._lower: _TLS | None = None  # under it: to the proxy
        self._timer: asyncio.TimerHandle | None = None
        self._timeout: float | None = None
        self._expires = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._wants = ANSWER
        self._outbox = b""
        self._uncounted = 0
        self._record: ExchangeRecord | None = None
        self._serial = 0
        self._is_closed = self._is_dirty = self._is_draining = self._is_paused = self._has_served = False
        self._head = _Head()
        self._parser = httptools.HttpResponseParser(self._head)
        self._reset(IDLE)

    def _reset(self, stage: int) -> None:
        self._stage = stage
        self._pieces: list[bytes] = []
        self._unread = 0
        self._left = self._overhead = self._head_bytes = self._interim = 0
        self._tail = b""
        self._failure: Failure | None = None
        self._is_answered = False  # the head of the final answer is there
        self._is_sent = self._is_write_broken = self._keeps_alive = self._has_no_body = False
        self._begin_head()

    def _begin_head(self) -> None:
        self._head.clear(self._pieces)
        # On the same parser: that costs a third of a new one.
        self._parser.__init__(self._head)  # type: ignore[misc]

    # For who drives an exchange

    async def exchange(
        self,
        method: bytes,
        target: bytes,
        headers: Sequence[Field],
        body: bytes | AsyncIterable[bytes],
        record: ExchangeRecord,
        timeout: Mapping[str, float | None],
    ) -> Answer:
        """Send a request, and return as soon as the head of its final answer is there; `record` is kept.

        `timeout` has seconds or None for `connect` (for the address, for CONNECT and for each TLS handshake), `write`
        and `read` (for each wait). A refusal (400 and above) that comes while the body is still going out ends the
        sending. Raises httpcore's errors; then, as when it is cancelled, the connection is closed.
        """
        record.bytes_written = 0
        record.response_started = record.head_received = False
        record.reused = self._has_served
        # Tools show the local variables of the frames that an error passes: none holds a header, query or body then.
        if self.prefix:
            assert self.proxy is not None
            made = request_head(method, self.prefix + target, merged(self.proxy.fields, headers))
        else:
            made = request_head(method, target, headers)
        del target, headers
        try:
            if isinstance(made, str):
                raise httpcore.LocalProtocolError(made)
            if self._sock is None:
                await self._open(record, timeout.get("connect"))
            elif self._stage != IDLE or self._waiter is not None:
                raise RuntimeError("a connection serves one exchange at a time")
            head, length, keeps_alive = made
            self._serial += 1
            self._reset(HEAD)
            self._keeps_alive = keeps_alive
            self._has_no_body = method == b"HEAD"
            self._record = record
            record.phase = "write"
            del made
            if isinstance(body, bytes):
                if length == _CHUNKS:
                    body = _chunk(body) + b"0\r\n\r\n" if body else b"0\r\n\r\n"
                elif length != len(body):
                    size, body = len(body), b""
                    raise httpcore.LocalProtocolError(f"the body has {size} bytes, Content-Length says {length}")
                if len(body) < SLICE:
                    self._push(head + body if body else head)
                    del head, body
                    if self._outbox:
                        await self._drain(timeout.get("write"))
                    self._is_sent = not (self._is_write_broken or self._outbox)
                else:
                    self._push(head)
                    view = memoryview(body)
                    del head, body
                    await self._send_bytes(view, timeout.get("write"))
            else:
                self._push(head)
                del head
                await self._send_stream(body, length, timeout.get("write"))
            record.phase = "read"
            read_timeout = timeout.get("read")
            while not self._is_answered:
                if self._failure is not None:
                    raise self._error()
                await self._wait(ANSWER, read_timeout)
            if self._stage >= LENGTH:
                self._on_readable()  # the rest may have come meanwhile
            self._record = None
            self._has_served = True
            answer = Answer(self, read_timeout)
            if self._stage == IDLE and self._failure is None:
                pieces = self._pieces
                answer.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                answer._connection = None
                self._take()
        except BaseException:
            self.close()
            raise
        return answer

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
            "network_stream": NetworkStream(self),
        }
        return response

    # For the pool

    def is_reusable(self) -> bool:
        """Whether it can serve again after an answer that was read to its end."""
        return (
            self._stage == IDLE
            and self._has_served
            and self._keeps_alive
            and self._is_sent
            and not (self._is_dirty or self._is_closed or self._unread or self._outbox)
        )

    def is_alive(self) -> bool:
        """Whether the peer has neither closed it nor sent what nobody asked for.

        The loop tells as it happens; but what came since its last turn would be found out too late (a POST that was
        written to a closed connection is not sent again), so the socket is asked, at less than 1 µs.
        """
        if self._sock is None or self._is_dirty:
            return False
        if self._poll.poll(0):
            self._on_readable()
        return not (self._is_closed or self._is_dirty)

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
        if self._failure is None and self._stage != IDLE:
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
        self._timer = self._tls = self._lower = self._dialer = self._record = None
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
        doing = "idle" if self._stage == IDLE else "busy"
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
        early = b"".join(self._pieces)
        self._reset(RAW)
        try:
            tls = _TLS(context, server_hostname)
            tls.incoming.write(early)
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
        self._reset(IDLE)
        self._lower, self._tls = self._tls, tls

    async def _receive(self) -> bytes:
        """What came, before there is any HTTP; no bytes at the end."""
        while not self._pieces:
            if self._failure is not None:
                raise self._error()
            if self._stage == IDLE:
                return b""
            await self._wait(BODY, None)
        data = b"".join(self._pieces)
        self._take()
        return data

    async def _tunnel(self, proxy: Proxy, timeout: float | None) -> None:
        """Ask the proxy for a tunnel (RFC 9110 section 9.3.6)."""
        authority = _authority(self.host, self.port).encode("ascii")
        made = request_head(b"CONNECT", authority, merged([(b"Host", authority), (b"Accept", b"*/*")], proxy.fields))
        if isinstance(made, str):
            raise httpcore.LocalProtocolError(made)
        self._reset(HEAD)
        self._has_no_body = True  # whatever it says of a body, bytes behind the head are the tunnel's
        try:
            self._push(made[0])
            del made
            with anyio.fail_after(timeout):
                while not self._is_answered:
                    if self._failure is not None:
                        raise self._error()
                    await self._wait(ANSWER, None)
        except TimeoutError:
            raise httpcore.ConnectTimeout("the proxy did not answer in time") from None
        answer = self._head
        if not 200 <= answer.status <= 299:
            raise httpcore.ProxyError(f"{answer.status} {answer.reason.decode('ascii', 'ignore')}")
        if self._is_dirty:
            raise httpcore.RemoteProtocolError("bytes came through the tunnel before TLS began")

    # Sending

    async def _send_bytes(self, view: memoryview, timeout: float | None) -> None:
        """Send a large body, slice by slice."""
        if self._outbox:
            await self._drain(timeout)
        for count, start in enumerate(range(0, len(view), SLICE)):
            if self._is_refused():
                return
            self._push(view[start : start + SLICE])
            if self._outbox:
                await self._drain(timeout)
            elif count % FAIR_SHARE == FAIR_SHARE - 1:
                await asyncio.sleep(0)
        self._is_sent = not (self._is_refused() or self._outbox)

    async def _send_stream(self, body: AsyncIterable[bytes], length: int, timeout: float | None) -> None:
        """Send `body` as it comes; what makes it is closed if it is not wanted to its end."""
        iterator: Any = body.__aiter__()
        is_at_end = False
        left, count = length, 0
        try:
            if self._outbox:
                await self._drain(timeout)
            while not self._is_refused():
                try:
                    view = memoryview(await iterator.__anext__())
                except StopAsyncIteration:
                    is_at_end = True
                    break
                if length != _CHUNKS:
                    left -= len(view)
                    if left < 0:
                        raise httpcore.LocalProtocolError("the body is longer than Content-Length says")
                for start in range(0, len(view), SLICE):
                    if self._is_refused():
                        break
                    part = view[start : start + SLICE]
                    self._push(_chunk(part) if length == _CHUNKS else part)
                    count += 1
                    if self._outbox:
                        await self._drain(timeout)
                    elif count % FAIR_SHARE == 0:
                        await asyncio.sleep(0)
            if is_at_end and not self._is_refused():
                if length == _CHUNKS:
                    self._push(b"0\r\n\r\n")
                    if self._outbox:
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
            or (self._is_answered and self._head.status >= 400)
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
        except OSError:
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
        while self._outbox and not self._is_refused():
            await self._wait(DRAINED, timeout)

    def _on_writable(self) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            sent = sock.send(self._outbox)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._break_write()
            return
        self._outbox = self._outbox[sent:]
        self._count(sent)
        self._expires = self._loop.time() + (self._timeout or 0.0)
        if not self._outbox:
            self._loop.remove_writer(self._fd)
            if self._wants == DRAINED:
                self._wake()

    def _break_write(self) -> None:
        """Nothing more can be written; the server may have said why, so it is read on (RFC 9112 section 9.5)."""
        self._is_write_broken = True
        self._outbox = b""
        self._loop.remove_writer(self._fd)
        if self._wants == DRAINED:
            self._wake()

    # Waiting

    async def _wait(self, wants: int, timeout: float | None) -> None:
        """Wait once, until something of what is wanted may be there."""
        if self._is_closed:
            raise httpcore.ReadError("closed on this side")
        if self._waiter is not None:
            raise RuntimeError("two tasks wait for the same connection")
        self._wants = wants
        self._timeout = timeout
        loop = self._loop
        self._waiter = waiter = loop.create_future()
        if timeout is not None:
            self._expires = expires = loop.time() + timeout
            timer = self._timer
            if timer is None or timer.when() > expires:
                if timer is not None:
                    timer.cancel()
                self._timer = loop.call_at(expires, _on_timer, self._ref, context=self._context)
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _on_timer(self) -> None:
        self._timer = None
        waiter, timeout = self._waiter, self._timeout
        if waiter is None or timeout is None or waiter.done():
            return
        if self._loop.time() < self._expires:
            self._timer = self._loop.call_at(self._expires, _on_timer, self._ref, context=self._context)
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
                self._end(is_cut=tls is not None)
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
        if self._waiter is not None:
            self._wake_if_ready()

    def _wake_if_ready(self) -> None:
        wants = self._wants
        if wants == DRAINED:
            if self._is_refused():
                self._wake()
        elif self._stage == IDLE or (wants == ANSWER and self._is_answered) or (wants == BODY and self._pieces):
            self._wake()
        elif self._timeout is not None:
            self._expires = self._loop.time() + self._timeout

    def _decrypt(self, tls: _TLS, data: bytes) -> None:
        lower = self._lower
        for part in (data,) if lower is None else lower.decrypt(data):
            for plain in tls.decrypt(part):
                self._feed(plain)
                if self._sock is None:
                    return
        if tls.outgoing.pending:  # what TLS has to say by itself
            records = tls.outgoing.read()
            self._emit(records if lower is None else lower.encrypt(records))
        elif lower is not None and lower.outgoing.pending:
            self._emit(lower.outgoing.read())
        if tls.is_over:
            self._end(is_cut=False)
        elif lower is not None and lower.is_over:
            self._end(is_cut=True)

    def _feed(self, data: bytes) -> None:
        """What came, TLS taken off. Raises `httpcore.RemoteProtocolError`."""
        record = self._record
        if record is not None:
            record.response_started = True
        while data:
            stage = self._stage
            if stage == HEAD:
                data = self._feed_head(data)
            elif stage == LENGTH:
                left = self._left
                if len(data) < left:
                    self._left = left - len(data)
                    self._keep(data)
                    return
                self._keep(data if len(data) == left else data[:left])
                data = data[left:]
                self._finish()
            elif stage == CHUNKED:
                self._feed_chunked(data)
                return
            elif stage == IDLE:
                self._soil()
                return
            else:
                self._keep(data)
                return

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        self._unread += len(data)
        if self._unread > HIGH_WATER:
            self._pause()

    def _pause(self) -> None:
        if not self._is_paused and self._sock is not None:
            self._is_paused = True
            self._loop.remove_reader(self._fd)

    def _take(self) -> None:
        """The pieces are somebody else's now; let the server go on."""
        self._pieces.clear()
        self._unread = 0
        if self._is_paused and self._sock is not None and not self._is_dirty:
            self._is_paused = False
            self._context.run(self._loop.add_reader, self._fd, _on_readable, self._ref)

    def _feed_head(self, data: bytes) -> bytes:
        """Take the head, or what came of it, off `data`; returns the rest."""
        if not self._head.begun and data[0] != 72:  # llhttp knows other protocols, and skips line ends
            raise httpcore.RemoteProtocolError("the answer is not HTTP")
        tail, head = self._tail, self._head
        end = (tail + data if tail else data).find(b"\r\n\r\n")
        if end < 0:
            self._tail = (tail + data)[-3:]
            part, rest = data, b""
        else:
            end += 4 - len(tail)
            self._tail = b""
            part, rest = data[:end], data[end:]
        self._head_bytes += len(part)
        if self._head_bytes > HEAD_BYTES:
            raise httpcore.RemoteProtocolError(f"the head of the answer is longer than {HEAD_BYTES} bytes")
        try:
            self._parser.feed_data(part)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not head.is_complete:
                raise httpcore.RemoteProtocolError(f"the answer is not HTTP/1.1: {exc}") from None
        if len(head.fields) > HEAD_FIELDS:
            raise httpcore.RemoteProtocolError(f"the answer has more than {HEAD_FIELDS} fields")
        if end < 0:
            return b""
        if not head.is_complete:
            raise httpcore.RemoteProtocolError("the head of the answer does not end where it should")
        self._on_head()
        return rest

    def _on_head(self) -> None:
        """A head is complete: decide what follows it (RFC 9112 section 6.3)."""
        head = self._head
        head.status = status = self._parser.get_status_code()
        version = self._parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise httpcore.RemoteProtocolError(f"the answer says that it is HTTP/{version}")
        if status < 200:
            if status < 100 or status == 101:
                raise httpcore.RemoteProtocolError(f"the answer has the status {status}, which nobody asked for")
            self._interim += 1
            if self._interim > INTERIM_ANSWERS:
                raise httpcore.RemoteProtocolError(f"more than {INTERIM_ANSWERS} interim answers came")
            self._begin_head()
            return
        coding, length = head.coding, head.length
        if version == "1.1":
            head.version = b"HTTP/1.1"
            if head.connection and b"close" in _tokens(head.connection):
                self._keeps_alive = False
        else:
            head.version = b"HTTP/1.0"
            self._keeps_alive = False
            if coding is not None:
                raise httpcore.RemoteProtocolError("the answer has a Transfer-Encoding in HTTP/1.0")
        if coding is not None and (coding.lower() != b"chunked" or length is not None):
            raise httpcore.RemoteProtocolError("the answer has a Transfer-Encoding that is not chunked alone")
        if length is not None and not (length.isdigit() and len(length) < 19):
            raise httpcore.RemoteProtocolError("the answer has a Content-Length that is no length")
        self._is_answered = True
        record = self._record
        if record is not None:
            record.head_received = True
        if self._has_no_body or status == 204 or status == 304:
            self._finish()
        elif coding is not None:
            self._stage = CHUNKED
        elif length is None:
            self._stage = UNTIL_END
            self._keeps_alive = False
        elif self._set_length(int(length)):
            self._stage = LENGTH
        else:
            self._finish()

    def _set_length(self, length: int) -> int:
        self._left = length
        return length

    def _feed_chunked(self, data: bytes) -> None:
        head, pieces = self._head, self._pieces
        before = len(pieces)
        is_followed = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if head.ends_at < 0:
                raise httpcore.RemoteProtocolError(f"the chunks of the answer are malformed: {exc}") from None
            is_followed = True
        if head.ends_at >= 0:
            del pieces[head.ends_at :]
        self._tail = end = (self._tail + data)[-5:]
        if len(pieces) > before:
            self._overhead = 0
            pieces[before:] = [b"".join(pieces[before:])]
            self._unread += len(pieces[-1])
            if self._unread > HIGH_WATER:
                self._pause()
        else:
            self._overhead += len(data)
            if self._overhead > HEAD_BYTES:
                raise httpcore.RemoteProtocolError(f"{HEAD_BYTES} bytes of chunks came without any body")
        if head.ends_at >= 0:
            self._finish()
            # llhttp passes over line ends behind a message: there must be exactly the two that end it.
            if is_followed or head.begun > 1 or not end.endswith(b"\r\n\r\n") or end[:1] == b"\n":
                self._soil()

    def _finish(self) -> None:
        """The answer is complete."""
        self._stage = IDLE

    def _soil(self) -> None:
        """Bytes came that belong to no request: nothing more is read, and it never serves again."""
        self._is_dirty = True
        self._hang_up()

    def _hang_up(self) -> None:
        """Close the socket while nobody drives it; what was received stays to be read."""
        if self._waiter is None and self._record is None and self._stage == IDLE:
            self.close()
        else:
            self._pause()

    def _end(self, *, is_cut: bool) -> None:
        """The peer has closed; `is_cut`: without TLS's goodbye, so that the end may be anybody's."""
        stage = self._stage
        if stage == HEAD:
            record = self._record
            if is_cut and record is not None and record.response_started:
                raise httpcore.RemoteProtocolError(_CUT)
            raise httpcore.RemoteProtocolError("Server disconnected without sending a response.")
        if stage == UNTIL_END and is_cut:
            raise httpcore.RemoteProtocolError(_CUT)
        if stage in (LENGTH, CHUNKED):
            raise httpcore.RemoteProtocolError("the peer closed the connection before the body was complete")
        self._finish()
        self._soil()

    def _error(self) -> Exception:
        """What the exchange failed of, made anew: a raised one holds the frames that hold this connection."""
        assert self._failure is not None
        error, message, cause = self._failure
        made = error(message)
        made.__cause__ = cause
        return made

    def _fail(self, error: type[Exception], exc: Exception, cause: Exception | None = None) -> None:
        if self._stage == IDLE:
            self._soil()
            return
        self._failure = error, str(exc), cause and cause.with_traceback(None)
        self._stage = IDLE
        self._is_dirty = True
        self._pause()

    async def _read(self, serial: int, timeout: float | None) -> bytes:
        """For the answer of the exchange `serial`: the next piece of its body."""
        while serial == self._serial:
            pieces = self._pieces
            if pieces:
                piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                self._take()
                return piece
            if self._failure is not None:
                self.close()
                raise self._error()
            if self._stage == IDLE:
                return b""
            await self._wait(BODY, timeout)
        return b""


_CUT = "the TLS connection was cut: the answer may be incomplete"
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


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip(b" \t") for token in value.split(b",")]


def merged(fields: Sequence[Field], overriding: Sequence[Field]) -> list[Field]:
    """`fields` but for those that `overriding` has too, and then `overriding`: as httpcore merges a proxy's."""
    names = {name.lower() for name, _ in overriding}
    return [*(field for field in fields if field[0].lower() not in names), *overriding]


# Requests

_CHUNKS = -1
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
_VISIBLE = bytes(range(0x21, 0x7F))
_ALLOWED = bytes([0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0x100)])
_PLAIN, _LENGTH, _CODING, _CONNECTION, _HOST = range(5)
_KINDS = {
    b"content-length": _LENGTH,
    b"transfer-encoding": _CODING,
    b"connection": _CONNECTION,
    b"host": _HOST,
}
_names: dict[bytes, tuple[bytes, int]] = {}  # as they are written, and what they mean here


def _learned(name: bytes) -> tuple[bytes, int] | None:
    if not _TOKEN.fullmatch(name):
        return None
    known = name + b": ", _KINDS.get(name.lower(), _PLAIN)
    if len(_names) < 1000:  # names that vary are none to remember
        _names[name] = known
    return known


def request_head(method: bytes, target: bytes, headers: Sequence[Field]) -> tuple[bytes, int, bool] | str:
    """The head of a request, the length of the body that it announces (-1 for chunks), whether it keeps the connection.

    Or what is wrong with it, quoting nothing: what is no token, target or field value (RFC 9112 sections 3 and 5), and
    framing that contradicts itself. Not raised, since the frame of this function would be in the traceback.
    """
    if method not in _METHODS and not _TOKEN.fullmatch(method):
        return "the method of the request is illegal"
    if not target or target.translate(None, _VISIBLE):
        return "the target of the request has illegal characters"
    lines = [method, b" ", target, b" HTTP/1.1\r\n"]
    length, hosts, keeps_alive = 0, 0, True
    has_framing = False
    for name, value in headers:
        known = _names.get(name) or _learned(name)
        if known is None:
            return "the request has an illegal header name"
        prefix, kind = known
        lines += (prefix, value, b"\r\n")
        if kind:
            if kind == _HOST:
                hosts += 1
            elif kind == _CONNECTION:
                keeps_alive = keeps_alive and b"close" not in _tokens(value.lower())
            elif has_framing:
                return "the request has more than one of Content-Length and Transfer-Encoding"
            else:
                has_framing = True
                announced = _announced(kind, value)
                if announced is None:
                    return "the request has a Content-Length that is no length, or a coding other than chunked"
                length = announced
    lines.append(b"\r\n")
    head = b"".join(lines)
    count = len(headers) + 2
    if head.count(b"\n") != count or head.count(b"\r") != count or head.translate(None, _ALLOWED):
        return "a header of the request has illegal characters"
    if (b"  " in head or b"\t" in head or b" \r" in head) and any(value != value.strip(b" \t") for _, value in headers):
        return "a header of the request has whitespace round its value"
    if hosts != 1:
        return "the request needs one Host header"
    return head, length, keeps_alive


_METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE"})


def _announced(kind: int, value: bytes) -> int | None:
    if kind == _CODING:
        return _CHUNKS if value.lower() == b"chunked" else None
    return int(value) if value.isdigit() and len(value) < 19 else None


def _chunk(data: bytes | memoryview) -> bytes:
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


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
