"""The origin server of the races, in a process of its own: `python -m benchmarks.origin`.

It owns sockets, TLS and the clock of its latency; it knows HTTP/1.1 only as far as keep-alive GETs without a body need.
Rules: it must never be what a race measures, so there is no event loop framework and no parser between the selector and
the socket (OpenSSL works on the file descriptor itself), and a body is a few pieces joined. One line of JSON on its
standard output says the port and the certificate authority once it listens; it ends when its standard input closes, so
it cannot outlive who started it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import selectors
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from .document import PATH_ROOM, Template

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[1]
_CHUNK = 65536
_REFUSAL = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@attrs.frozen
class OriginAddress:
    """Where an origin listens, and the PEM of the authority to trust there (empty without TLS)."""

    port: int
    authority: str

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"{'https' if self.authority else 'http'}://{HOST}:{self.port}"


@contextlib.contextmanager
def running_origin(*, tls: bool, latency: float, size: int) -> Iterator[OriginAddress]:
    """Start an origin, and end it when the block ends."""
    command = [sys.executable, "-m", "benchmarks.origin", "--latency", str(latency), "--size", str(size)]
    process = subprocess.Popen(
        command if tls else [*command, "--plain"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            raise RuntimeError(f"the origin ended with status {process.wait()} before it was ready")
        yield OriginAddress(**json.loads(ready))
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@attrs.define(eq=False)
class _Connection:
    sock: socket.socket
    inbox: bytes = b""
    outbox: bytes = b""
    closing: bool = False


class Origin:
    """Answers every GET on `listener`, `latency` seconds after it came, until `stop` says so."""

    def __init__(
        self, listener: socket.socket, *, context: ssl.SSLContext | None, latency: float, template: Template
    ) -> None:
        self._listener = listener
        self._context = context
        self._latency = latency
        self._template = template
        self._head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % template.size
        self._selector = selectors.DefaultSelector()
        # The latency is the same for all, so answers fall due in the order of their requests: a queue, not a heap.
        self._due: collections.deque[tuple[float, _Connection, bytes]] = collections.deque()

    def serve(self, stop: int) -> None:
        """Serve until the file descriptor `stop` is at its end, or has something to read."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(stop, selectors.EVENT_READ, "stop")
        select = self._selector.select
        while True:
            timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, events in select(timeout):
                connection = key.data
                if isinstance(connection, _Connection):
                    self._advance(connection, events)
                elif connection == "stop":
                    return
                else:
                    self._accept()
            while self._due and self._due[0][0] <= time.monotonic():
                _, connection, answer = self._due.popleft()
                self._send(connection, answer)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                # Reading shakes hands by itself (SSL_read), so there is no state for that here.
                sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._selector.register(sock, selectors.EVENT_READ, _Connection(sock))

    def _advance(self, connection: _Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE and connection.outbox:
            self._send(connection, b"")
        if events & selectors.EVENT_READ:
            self._receive(connection)

    def _receive(self, connection: _Connection) -> None:
        sock = connection.sock
        while True:
            try:
                data = sock.recv(_CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError:  # reset, or a failed handshake (SSLError)
                data = b""
            if not data:
                self._close(connection)
                return
            self._answer(connection, data)
            # What OpenSSL has decrypted already does not wake the selector again.
            if connection.closing or not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
                return

    def _answer(self, connection: _Connection, data: bytes) -> None:
        data = connection.inbox + data
        end = data.find(b"\r\n\r\n")
        while end >= 0:
            method, path, _ = (*data[: data.find(b"\r")].split(b" ", 2), b"", b"")[:3]
            if method != b"GET" or not path or len(path) > PATH_ROOM:
                connection.closing = True
                self._send(connection, _REFUSAL)
                return
            answer = self._head + self._template.body(path)
            if self._latency:
                self._due.append((time.monotonic() + self._latency, connection, answer))
            else:
                self._send(connection, answer)
            data = data[end + 4 :]
            end = data.find(b"\r\n\r\n")
        connection.inbox = data

    def _send(self, connection: _Connection, answer: bytes) -> None:
        sock = connection.sock
        waiting = bool(connection.outbox)
        rest = connection.outbox + answer if waiting else answer
        sent = 0
        try:
            sent = sock.send(rest)
            if sent < len(rest):  # OpenSSL takes a record at a time
                view = memoryview(rest)
                while sent < len(rest):
                    sent += sock.send(view[sent:])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:  # the client is gone, or its descriptor is closed while the answer waited
            self._close(connection)
            return
        connection.outbox = rest = rest[sent:]
        if rest or waiting:
            self._selector.modify(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if rest else 0), connection)
        if connection.closing and not rest:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        connection.closing = True
        connection.outbox = b""
        with contextlib.suppress(KeyError, ValueError):  # closed before
            self._selector.unregister(connection.sock)
        connection.sock.close()


def _issue() -> tuple[ssl.SSLContext, str]:
    """A TLS 1.3 context with a fresh certificate for `HOST`, and the PEM of its authority."""
    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    authority.issue_cert(HOST, "localhost").configure_cert(context)
    return context, authority.cert_pem.bytes().decode()


def allow_many_sockets() -> None:
    """Raise the process's own bound on open files as far as the system lets it: 1,000 connections need 1,000."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 8192:
        wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.origin", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plain", action="store_true", help="no TLS")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="from request to answer")
    parser.add_argument("--size", type=int, default=2048, metavar="BYTES", help="length of a body")
    options = parser.parse_args()
    allow_many_sockets()
    context, authority = (None, "") if options.plain else _issue()
    with socket.create_server((HOST, options.port), backlog=4096) as listener:
        listener.setblocking(False)
        origin = Origin(listener, context=context, latency=options.latency, template=Template.of(options.size))
        print(json.dumps({"port": listener.getsockname()[1], "authority": authority}), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            origin.serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
