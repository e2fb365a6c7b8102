"""httpcore's connection, over sockets that are ours, on asyncio and trio alike.

HTTP itself is httpcore's. Rules: a connection serves again only if httpcore calls it idle, nothing is left of what
came, and nothing has come since. It knows no pool. httpcore's private names are used here only: see `_http11` and
`_LOCKS`; where they are missing, a connection is not reused, and httpcore's locks stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h11
import httpcore
import httpx

from ._exchange import ExchangeRecord
from ._sockets import Wire


class _OpenLock:
    """Stands in for httpcore's locks: a connection of ours serves one attempt at a time, by its slot."""

    async def __aenter__(self) -> None:
        """Go on at once."""

    async def __aexit__(self, *_: object) -> None:
        """Go on at once."""


_OPEN = _OpenLock()
_LOCKS = ("_request_lock", "_connect_lock", "_state_lock")


class _Body:
    """The body of a request; what makes it is closed if the request ends before it does, not left to a collector."""

    def __init__(self, stream: Any) -> None:
        is_bytes = isinstance(stream, httpx.ByteStream)  # then no generator is needed
        self._pieces: Iterator[bytes] = iter(stream if is_bytes else ())
        self._iterator: Any = None if is_bytes else stream.__aiter__()
        self._is_done = is_bytes

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        if self._iterator is None:
            raise StopAsyncIteration
        try:
            part: bytes = await self._iterator.__anext__()
        except StopAsyncIteration:
            self._is_done = True
            raise
        return part

    async def aclose(self) -> None:
        """Close what makes it."""
        if not self._is_done and hasattr(self._iterator, "aclose"):
            await self._iterator.aclose()


class PortableConnection:
    """One connection of httpcore's making (direct, through a proxy, through a tunnel), with its sockets in our hands.

    `factory` is httpcore's own pool object, used for nothing but `create_connection`; `tls_layers` as for `Wire`.
    """

    def __init__(self, factory: Any, origin: httpcore.Origin, *, tls_layers: int) -> None:
        self._wire = Wire(tls_layers)
        factory._network_backend = self._wire
        self._connection: Any = factory.create_connection(origin)
        self._http11: Any = None
        self._is_doubtful = False
        # All but SOCKS have their connection by the time they write; there, it comes after the greeting.
        self._wire.is_greeting = lambda: getattr(self._connection, "_connection", self) is None
        self._find()

    def _find(self) -> None:
        """Look for the innermost connection, which speaks HTTP/1.1, and open the locks on the way."""
        connection = self._connection
        while connection is not None:
            for name in _LOCKS:
                if hasattr(connection, name):
                    setattr(connection, name, _OPEN)
            if hasattr(connection, "_h11_state"):
                self._http11 = connection
            connection = getattr(connection, "_connection", None)

    async def handle(self, request: httpcore.Request, record: ExchangeRecord) -> httpcore.Response:
        """Send `request`, read the head of its answer, and keep `record`. Raises httpcore's errors."""
        self._wire.record = record
        request.stream = body = _Body(request.stream)
        try:
            response: httpcore.Response = await self._connection.handle_async_request(request)
            if record.response_started:
                self._check_head(response)
        except BaseException as exc:
            self.close()
            await body.aclose()
            if isinstance(exc, h11.LocalProtocolError):  # of the body
                raise httpcore.LocalProtocolError(str(exc)) from exc
            if type(exc).__module__.startswith("socksio."):  # httpcore lets those of its SOCKS library through
                raise httpcore.ProxyError(f"the SOCKS proxy does not speak SOCKS: {exc}") from exc
            raise
        await body.aclose()
        if not self._wire.has_served:
            self._wire.has_served = True
            self._wire.is_greeting = None
            self._find()
        if record.response_started:
            record.head_received = True
        return response

    def _check_head(self, response: httpcore.Response) -> None:
        """What h11 lets pass: another major version, and two ways to tell the length (RFC 9112 section 6.3)."""
        version: bytes = response.extensions["http_version"]
        if not version.startswith(b"HTTP/1."):
            raise httpcore.RemoteProtocolError(f"the server answers with {version.decode()}, not with HTTP/1.1")
        names = {name.lower() for name, _ in response.headers}
        self._is_doubtful = {b"transfer-encoding", b"content-length"} <= names

    def is_reusable(self) -> bool:
        """Whether it can serve again after an answer that was read to its end."""
        if self._is_doubtful or not self._connection.is_idle():
            return False
        h11_state = getattr(self._http11, "_h11_state", None)
        left_over = getattr(h11_state, "trailing_data", (b"unknown", True))
        return left_over == (b"", False) and self.is_alive()

    def is_alive(self) -> bool:
        """Whether the peer has neither closed it nor sent what nobody asked for."""
        stream = self._wire.stream
        return stream is not None and stream.is_quiet()

    def close(self) -> None:
        """Close its sockets now, and wake up whoever waits for one."""
        self._wire.close()

    def abandon(self) -> None:
        """Close its file descriptors and touch nothing else."""
        self._wire.abandon()

    def __repr__(self) -> str:
        return f"<PortableConnection {self._connection.info()}>"
