"""A server on loopback that does what it is told, byte for byte: closing, resetting, dripping, truncating.

    with FaultServer(tls=True) as server:
        async with httpx.AsyncClient(transport=LayerTransport(verify=server.client_context)) as client:
            await client.get(f"{server.url}/ok/1")
        assert server.record.connections == 1

The first segment of a path chooses a behaviour from `BEHAVIOURS` (or from `server.behaviours`, to which a test may add
its own: a function of an `Exchange`). `/ok` answers with its own target, so that a body can be told from any other.
`FaultServer(closing=0.3, seed=1)` closes keep-alive connections at random, also as the next request arrives, which is
then not executed. The server is a proxy too: it answers for every host, after CONNECT by TLS, in TLS if it must, and
after a SOCKS5 greeting. `server.record` says what came: connections, CONNECT targets, requests, and how many times each
was executed. It runs in threads of its own, plain sockets and nothing else, and stops with its block.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, Self

import attrs
import trustme


@functools.cache
def authority() -> trustme.CA:
    """The one that signs the servers' certificates."""
    return trustme.CA()


@functools.cache
def server_context() -> ssl.SSLContext:
    """What servers need for TLS, made once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("localhost", "127.0.0.1", "origin.invalid").configure_cert(context)
    return context


@functools.cache
def distrustful_context() -> ssl.SSLContext:
    """The same for servers that want to see a certificate of the client's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    authority().issue_cert("127.0.0.1").configure_cert(context)
    authority().configure_trust(context)
    return context


@functools.cache
def older_context() -> ssl.SSLContext:
    """The same for TLS 1.2, where the last packet of the handshake is the server's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    authority().issue_cert("127.0.0.1").configure_cert(context)
    return context


@functools.cache
def client_context() -> ssl.SSLContext:
    """What a client needs to trust the servers, made once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    return context


@attrs.frozen
class Seen:
    """One request, as it came. `body` is empty where the behaviour answered before it was read."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        """The path, also out of the absolute target that a proxy gets."""
        return re.sub(r"^https?://[^/]*", "", self.target).partition("?")[0]


@attrs.define
class Record:
    """What a server has met."""

    connections: int = 0
    tunnels: list[str] = attrs.field(factory=list)
    requests: list[Seen] = attrs.field(factory=list)
    executed: Counter[str] = attrs.field(factory=Counter)


class Pipe(Protocol):
    def recv(self) -> bytes: ...
    def send(self, data: bytes) -> None: ...
    def goodbye(self) -> None: ...


class SocketPipe:
    def __init__(self, sock: socket.socket, first: bytes = b"") -> None:
        self.sock = sock
        self.first = first

    def recv(self) -> bytes:
        if self.first:
            data, self.first = self.first, b""
            return data
        return self.sock.recv(65536)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def goodbye(self) -> None: ...


class TLSPipe:
    """TLS in memory, so that it can lie upon TLS, and so that a close without goodbye is really one."""

    def __init__(self, lower: Pipe, context: ssl.SSLContext, greeting: bytes = b"") -> None:
        self.lower = lower
        self.greeting = greeting
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self._run(self._shake_hands)

    def _shake_hands(self) -> None:
        self.tls.do_handshake()
        if self.greeting:
            self.tls.write(self.greeting)  # in one packet with the end of the handshake

    def _run(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                result = call()
            except ssl.SSLWantReadError:
                self._flush()
                if not (data := self.lower.recv()):
                    raise ConnectionAbortedError from None
                self.incoming.write(data)
            except ssl.SSLError:
                self._flush()  # the alert
                raise
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if data := self.outgoing.read():
            self.lower.send(data)

    def recv(self) -> bytes:
        data: bytes = self._run(lambda: self.tls.read(65536))
        return data

    def send(self, data: bytes) -> None:
        while data:
            data = data[self.tls.write(data) :]
            self._flush()

    def goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        self._flush()


class Closed(Exception):
    """The behaviour has closed the connection."""


class Exchange:
    """One request and what a behaviour does about it. `close`, `finish` and `reset` end the connection, and it."""

    def __init__(self, server: FaultServer, pipe: Pipe, sock: socket.socket, request: Seen) -> None:
        self.server = server
        self.pipe = pipe
        self.sock = sock
        self.request = request

    def send(self, *packets: bytes) -> None:
        """Send each of `packets` as it is."""
        for packet in packets:
            self.pipe.send(packet)

    def respond(self, body: bytes = b"", *, status: str = "200 OK", headers: str = "", after: bytes = b"") -> None:
        """A complete answer in one packet, with `after` behind it."""
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        self.send(head.encode() + body + after)

    def pause(self, seconds: float = 0.005) -> None:
        """Wait, so that what follows comes in a packet of its own."""
        time.sleep(seconds)

    def close(self) -> NoReturn:
        """Close the connection, without TLS's goodbye."""
        raise Closed

    def finish(self) -> NoReturn:
        """Close the connection, saying goodbye."""
        self.pipe.goodbye()
        raise Closed

    def reset(self) -> NoReturn:
        """Reset the connection."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Closed

    def hang(self) -> NoReturn:
        """Do nothing until the client closes, or the server stops."""
        while self.pipe.recv():
            pass
        raise Closed


Behaviour = Callable[[Exchange], None]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
STRAY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nSTRAY"


def ok(ex: Exchange) -> None:
    """The target of the request as the body."""
    ex.respond(ex.request.target.encode())


def slow(ex: Exchange) -> None:
    """The same a moment later, so that the client has to wait for it."""
    ex.pause(0.002)
    ok(ex)


def echo(ex: Exchange) -> None:
    """The body of the request as the body."""
    ex.respond(ex.request.body)


def status(ex: Exchange) -> None:
    """`/status/503`: that status."""
    ex.respond(b"said so", status=f"{ex.request.path.split('/')[2]} Said So")


def large(ex: Exchange) -> None:
    """`/large/100000`: so many bytes."""
    ex.respond(b"x" * int(ex.request.path.split("/")[2]))


def chunked(ex: Exchange) -> None:
    """Three chunks in packets of their own."""
    ex.send(CHUNKED)
    for word in (b"one", b"two", b"three"):
        ex.pause(0.001)
        ex.send(b"%x\r\n%b\r\n" % (len(word), word))
    ex.send(b"0\r\n\r\n")


def drip(ex: Exchange) -> None:
    """An answer that comes byte by byte."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ndrops":
        ex.send(bytes([byte]))
        ex.pause(0.0005)


def stall(ex: Exchange) -> None:
    """A head, half a body, and then nothing."""
    ex.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf.")
    ex.hang()


def half_head(ex: Exchange) -> None:
    """Half a head, and then the end."""
    ex.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    ex.close()


def truncate_length(ex: Exchange) -> None:
    """Less than Content-Length says."""
    ex.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf.")
    ex.close()


def truncate_chunked(ex: Exchange) -> None:
    """Chunks without the last one."""
    ex.send(CHUNKED, b"5\r\nhalf.\r\n")
    ex.close()


def truncate_reset(ex: Exchange) -> None:
    """Half a body, then a reset."""
    ex.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf.")
    ex.pause()
    ex.reset()


def until_end(ex: Exchange) -> None:
    """A body that the end of the connection delimits, properly."""
    ex.send(b"HTTP/1.1 200 OK\r\n\r\nwhole")
    ex.finish()


def until_cut(ex: Exchange) -> None:
    """The same, cut: over TLS, without close_notify."""
    ex.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
    ex.close()


def extra(ex: Exchange) -> None:
    """A whole second answer in the same packet."""
    ex.respond(ex.request.target.encode(), after=STRAY)


def extra_later(ex: Exchange) -> None:
    """A whole second answer in a later packet."""
    ex.respond(ex.request.target.encode())
    ex.pause(0.002)
    ex.send(STRAY)


def extra_chunked(ex: Exchange) -> None:
    """A second answer behind the last chunk."""
    ex.send(CHUNKED + b"2\r\nok\r\n0\r\n\r\n" + STRAY)


def extra_204(ex: Exchange) -> None:
    """A body where there can be none."""
    ex.send(b"HTTP/1.1 204 No Content\r\n\r\n" + STRAY)


def extra_304(ex: Exchange) -> None:
    """A body where there can be none, of the length that is named."""
    ex.send(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nSTRAY")


def extra_head(ex: Exchange) -> None:
    """A body in answer to HEAD."""
    ex.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nSTRAY")


def connection_close(ex: Exchange) -> None:
    """An answer that says it is the last."""
    ex.respond(b"last", headers="Connection: close\r\n")
    ex.finish()


def lie(ex: Exchange) -> None:
    """An answer that promises to keep the connection, and its end."""
    ex.respond(b"lied")
    ex.finish()


def http10(ex: Exchange) -> None:
    """HTTP/1.0, delimited by the end."""
    ex.send(b"HTTP/1.0 200 OK\r\n\r\nold")
    ex.finish()


def early_hints(ex: Exchange) -> None:
    """Interim answers first (RFC 9110 section 15.2)."""
    ex.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
    ex.pause(0.001)
    ex.respond(b"after all")


def garbage(ex: Exchange) -> None:
    """Not HTTP."""
    ex.send(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
    ex.close()


def refuse_early(ex: Exchange) -> None:
    """413 as soon as the head is there; nothing more is read."""
    ex.respond(b"too large", status="413 Content Too Large", headers="Connection: close\r\n")
    ex.server.stopped.wait(30)
    ex.close()


def accept_early(ex: Exchange) -> None:
    """An interim answer and the head of a success at once, then the body is read, and then its length is the answer."""
    ex.send(b"HTTP/1.1 102 Processing\r\n\r\n")
    ex.pause(0.01)
    ex.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    left = int(ex.request.headers["content-length"]) - len(ex.request.body)
    while left > 0:
        left -= len(ex.pipe.recv())
    ex.send(b"all of it")
    ex.finish()


def upgrade(ex: Exchange) -> None:
    """101, and then whatever comes is sent back."""
    ex.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n")
    while data := ex.pipe.recv():
        ex.send(data)
    ex.close()


BEHAVIOURS: dict[str, Behaviour] = {
    "close": Exchange.close,
    "reset": Exchange.reset,
    "never": Exchange.hang,
}
for _behaviour in (
    *(ok, slow, echo, status, large, chunked, drip, stall, half_head),
    *(truncate_length, truncate_chunked, truncate_reset, until_end, until_cut),
    *(extra, extra_later, extra_chunked, extra_204, extra_304, extra_head),
    *(connection_close, lie, http10, early_hints, garbage, refuse_early, accept_early, upgrade),
):
    BEHAVIOURS[_behaviour.__name__.replace("_", "-")] = _behaviour
BEFORE_THE_BODY = {"refuse-early", "accept-early"}


class FaultServer:
    """See the head of this file.

    `tls`: TLS from the first byte. `closing`: how probable it is, after each answer, that the connection is closed at
    some moment before the next one; drawn from `seed`. `accepting=False`: connections are never accepted, and the queue
    is full. `refuse_tunnels`: the status line that answers CONNECT. `greeting`: what the first connection gets before
    any request, in the last packet of a TLS 1.2 handshake. `answer_connect`, set at any time, answers the next CONNECT.
    `receive_buffer`: how many bytes a connection takes in before anybody reads them. `wants_certificate`: it speaks TLS
    with nobody who has none.
    """

    def __init__(
        self,
        *,
        tls: bool = False,
        closing: float = 0.0,
        seed: int = 0,
        accepting: bool = True,
        refuse_tunnels: str | None = None,
        greeting: bytes = b"",
        receive_buffer: int | None = None,
        wants_certificate: bool = False,
    ) -> None:
        self.tls = tls
        self.context = distrustful_context() if wants_certificate else older_context() if greeting else server_context()
        self.closing = closing
        self.seed = seed
        self.refuse_tunnels = refuse_tunnels
        self.greeting = greeting
        self.answer_connect: Behaviour | None = None
        self.record = Record()
        self.behaviours = dict(BEHAVIOURS)
        self.stopped = threading.Event()
        self.client_context = client_context()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._fillers: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=5000 if accepting else 0)
        if receive_buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.port: int = self._listener.getsockname()[1]
        if accepting:
            self._start(self._accept)
        else:
            self._fill_up()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close everything, and wait for the threads."""
        self.stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for sock in self._fillers:
            sock.close()
        for thread in self._threads:
            thread.join(5)

    def drop_connections(self) -> None:
        """Close every connection that is open now, from this side."""
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def open_connections(self) -> int:
        """How many connections are open on this side."""
        return len(self._sockets)

    def _fill_up(self) -> None:
        for _ in range(3):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(sock)

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.record.connections += 1
            with self._lock:
                self._sockets.add(sock)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._start(self._serve, sock, random.Random(f"{self.seed}/{self.record.connections}"))

    def _serve(self, sock: socket.socket, chance: random.Random) -> None:
        try:
            pipe: Pipe = SocketPipe(sock)
            if self.tls:
                greeting, self.greeting = self.greeting, b""
                pipe = TLSPipe(pipe, self.context, greeting)
            self._converse(pipe, sock, chance)
        except (OSError, Closed):  # ssl.SSLError is an OSError
            pass
        finally:
            sock.close()
            with self._lock:
                self._sockets.discard(sock)

    def _converse(self, pipe: Pipe, sock: socket.socket, chance: random.Random) -> NoReturn:
        rest = b""
        is_first = True
        while True:
            if not is_first and chance.random() < self.closing:
                self._close_some_time(sock, chance)
            while b"\r\n\r\n" not in rest:
                if not (data := pipe.recv()):
                    raise Closed
                rest += data
                if is_first and rest[0] == 5:
                    self._socks(pipe, sock, chance)
            head, _, rest = rest.partition(b"\r\n\r\n")
            is_first = False
            request = _parsed(head)
            if request.method == "CONNECT":
                self._tunnel(request, pipe, sock, chance)
            name = request.path.split("/")[1]
            if name not in BEFORE_THE_BODY:
                body, rest = _read_body(request, rest, pipe)
                request = attrs.evolve(request, body=body)
            else:
                request = attrs.evolve(request, body=rest)
            with self._lock:
                self.record.requests.append(request)
                self.record.executed[f"{request.method} {request.target}"] += 1
            self.behaviours[name](Exchange(self, pipe, sock, request))

    def _close_some_time(self, sock: socket.socket, chance: random.Random) -> None:
        """At once, a little later, or just as the next request comes (peeked at, never executed)."""
        kind = chance.randrange(3)
        if kind == 1:
            time.sleep(chance.random() * 0.005)
        elif kind == 2:
            sock.recv(1, socket.MSG_PEEK)
        raise Closed

    def _tunnel(self, request: Seen, pipe: Pipe, sock: socket.socket, chance: random.Random) -> NoReturn:
        self.record.tunnels.append(request.target)
        self.record.requests.append(request)
        if self.refuse_tunnels is not None:
            pipe.send(f"HTTP/1.1 {self.refuse_tunnels}\r\nContent-Length: 0\r\n\r\n".encode())
            raise Closed
        answer, self.answer_connect = self.answer_connect, None
        if answer is None:
            pipe.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            answer(Exchange(self, pipe, sock, request))
        self._converse(TLSPipe(pipe, server_context()), sock, chance)

    def _socks(self, pipe: Pipe, sock: socket.socket, chance: random.Random) -> NoReturn:
        """SOCKS5 without authentication (RFC 1928), to a host name or an IPv4 address."""
        pipe.send(b"\x05\x00")
        wanted = pipe.recv()
        self.record.tunnels.append(repr(wanted))
        pipe.send(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
        first = pipe.recv()
        pipe = SocketPipe(sock, first)
        self._converse(TLSPipe(pipe, server_context()) if first[:1] == b"\x16" else pipe, sock, chance)


def _parsed(head: bytes) -> Seen:
    line, *fields = head.decode("latin-1").split("\r\n")
    method, target, _ = line.split(" ")
    pairs = [field.partition(":") for field in fields]
    return Seen(method, target, {name.lower(): value.strip() for name, _, value in pairs})


def _read_body(request: Seen, rest: bytes, pipe: Pipe) -> tuple[bytes, bytes]:
    def more() -> bytes:
        if not (data := pipe.recv()):
            raise Closed
        return data

    if "chunked" in request.headers.get("transfer-encoding", ""):
        body = b""
        while True:
            while b"\r\n" not in rest:
                rest += more()
            size_line, _, rest = rest.partition(b"\r\n")
            size = int(size_line, 16)
            while len(rest) < size + 2:
                rest += more()
            body, rest = body + rest[:size], rest[size + 2 :]
            if not size:
                return body, rest
    length = int(request.headers.get("content-length", 0))
    pieces = [rest]
    while sum(map(len, pieces)) < length:
        pieces.append(more())
    data = b"".join(pieces)
    return data[:length], data[length:]
