"""The short way of a call through httpx: what `httpx.AsyncClient` does and a call of ours can do without is left out.

Rules: the short way is open only while httpx and httpcore are as they were installed and the client as it was made: no
function replaced (on a class or an object, before or after our import), no hook, no cookie, nobody who reads httpx's
log. That is asked anew for each attempt. Else the request goes through `httpx.AsyncClient.send`, or, where only the
transport was touched, through that. On each way answers and errors are the same: real `httpx.Response`s, httpx's own
exceptions. Requests and responses are made without httpx's constructors, of which most asks what is known here: where
those make objects of another shape than this room does, the way stays shut. A first attempt of which nobody could see
the request is made without one; whoever wants to see it afterwards is given what was sent.
"""

from __future__ import annotations

import datetime
import functools
import logging
import sys
import time
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import httpx
from httpx._exceptions import request_context
from httpx._transports.default import AsyncResponseStream, map_httpcore_exceptions

from ._auth import DualTokenAuth, Turn
from ._coding import decode_bounded, read_bounded
from ._errors import BODY_LIMIT
from ._exchange import DeadlinePassed, ExchangeRecord, QuietRequest
from ._origin import LOWER_NAMES, Origin
from ._seams import Seam, are_untouched
from ._tokens import HeaderEntry
from ._transport import AnswerStream, HTTPClient, LayerTransport, PoolAdapter, free, raise_if_revoked

if TYPE_CHECKING:
    from ._framing import Field
    from ._pool import Slot
    from ._wire import Answer, WireConnection

__all__ = ["Lane"]

CLIENT_SEAMS = tuple(
    Seam(owner, name)
    for owner, name in (
        (HTTPClient, "send"),
        (HTTPClient, "_send_handling_auth"),
        (HTTPClient, "_send_handling_redirects"),
        (HTTPClient, "_send_single_request"),
        (httpx.AsyncClient, "_send_single_request"),
        (HTTPClient, "_transport_for_url"),
    )
)
NAMES = frozenset(seam.name for seam in CLIENT_SEAMS)
TRANSPORT_SEAM = Seam(LayerTransport, "handle_async_request")

BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})  # httpx says Content-Length: 0 for the others
NO_BODY = httpx.ByteStream(b"")
NO_EXTENSIONS: Mapping[str, Any] = {}
OWN_NAMES = frozenset({"content-type", "content-length", "cookie", *LOWER_NAMES})  # what the others are built for
AT_ONCE = 2**20  # a body of this size is decoded without giving others their turn

_log = logging.getLogger("httpx")


class Sent:
    """An attempt on a connection of ours that was made before there was a request: its answer, or the error it met."""

    __slots__ = ("answer", "connection", "error", "slot", "turn")

    def __init__(self, turn: Turn, slot: Slot, connection: WireConnection | None) -> None:
        self.turn: Turn = turn
        self.slot: Slot = slot
        self.connection: WireConnection | None = connection
        self.answer: Answer | None = None
        self.error: Exception | None = None

    def body(self, record: ExchangeRecord, limit: int | None) -> bytes | None:
        """The body of a success that can be taken as it is: all there, not coded, and of at most `limit` bytes."""
        answer = self.answer
        if answer is None or answer.body is None or not 200 <= answer.status <= 299:
            return None
        if len(answer.body) > AT_ONCE or (limit is not None and len(answer.body) > limit):
            return None
        if record.says_more and any(name.lower() == b"content-encoding" for name, _ in answer.headers):
            return None
        return answer.body

    def release(self, record: ExchangeRecord) -> None:
        """Give back the slot, and the connection if it can serve again."""
        assert self.connection is not None
        if self.connection.is_reusable():
            self.slot.give_back()
        free(self.slot, record)


class Sendable(Protocol):
    """A call, as far as this room knows it."""

    method: str
    target: bytes | None
    document: bytes | None
    record: ExchangeRecord
    settings: Any


class Lane:
    """The short way of all calls of one client, or of one view of it.

    `http` is the client that is stepped over, `origin` where all of it goes, `headers` those that each request carries.
    """

    def __init__(self, http: HTTPClient, origin: Origin, headers: httpx.Headers) -> None:
        self._http = http
        self._origin = origin
        self._headers = headers
        self._mounted = (*http._mounts.values(),)
        self._default_transport = http._transport
        url = httpx.URL(str(origin))
        transport = http._transport_for_url(url)
        self._transport = transport if type(transport) is LayerTransport else None
        self._scheme, self._host, self._port = url.raw_scheme, url.raw_host, origin.port or 0
        self._seen: list[HeaderEntry] | None = None
        self._entries: list[HeaderEntry] = []
        self._is_plain = False
        self._is_known = self._transport is not None and fits()
        self._adapter: PoolAdapter | None = None if self._transport is None else self._transport._pool
        self._wire_seams = () if self._adapter is None else (TRANSPORT_SEAM, self._adapter.entrance)
        self._fields: tuple[Field, ...] = ()
        self._drawn: object = None  # whose tokens those are
        self._is_likely = True  # that one more can be made: else nobody asks before a request has gone this way

    def with_headers(self, headers: httpx.Headers) -> Lane:
        """The same for requests with other headers."""
        return Lane(self._http, self._origin, headers)

    @property
    def is_open(self) -> bool:
        """Whether the client is as it was made, so that its own code need not be gone through."""
        http = self._http
        hooks = http._event_hooks
        return (
            self._is_known
            and are_untouched(CLIENT_SEAMS)
            and http.__dict__.keys().isdisjoint(NAMES)
            and not hooks["request"]
            and not hooks["response"]
            and (*http._mounts.values(),) == self._mounted
            and http._transport is self._default_transport
            and not http._no_cookies.jar._cookies  # type: ignore[attr-defined]
            and not _log.isEnabledFor(logging.INFO)
        )

    # Attempts without a request: of most calls nobody ever sees one.

    def draw(self, call: Sendable, auth: DualTokenAuth) -> Sent | None:
        """Such an attempt of `call`, which holds a slot, where one can be made now; with a connection, if one is open.

        It is to be sent before anybody else has a turn.
        """
        if not (self._is_likely and self._is_simple(call.method, call.document)):
            return None
        if not (self.is_open and self._is_wired(NO_EXTENSIONS)):
            self._is_likely = False
            return None
        turn = auth.begin()
        if turn is None:
            return None
        assert self._adapter is not None
        slot = cast("Slot", call.record.slot)
        connection = self._adapter.idle(slot, self._scheme, self._host, self._port)
        entries = auth.draw(turn)
        if entries is not self._drawn:
            self._fields = tuple([(name, value) for name, _, value in (*self._entries, *entries)])
            self._drawn = entries
        return Sent(turn, slot, connection)

    async def send(self, sent: Sent, call: Sendable, deadline: float | None) -> None:
        """Make the attempt. Raises only where no other can follow: `DeadlinePassed` after `deadline` seconds.

        That is not looked at where a connection has to be opened first.
        """
        record, connection = call.record, sent.connection
        try:
            if connection is None:
                assert self._adapter is not None
                sent.connection = connection = self._adapter.wired(
                    sent.slot, record, self._scheme, self._host, self._port, NO_EXTENSIONS
                )
            else:
                record.started = time.perf_counter()
            record.phase = "connect"
            sent.answer = await connection.exchange(
                call.method.encode("ascii"),
                cast(bytes, call.target),
                self._fields if call.document is None else self._fields_with(call.document),
                call.document or b"",
                record,
                call.settings.phases,
                deadline,
            )
        except BaseException as exc:
            free(sent.slot, record)
            raise_if_revoked(sent.slot, record, exc)
            if not isinstance(exc, Exception) or isinstance(exc, DeadlinePassed):
                raise
            sent.error = exc

    def answered(
        self, request: httpx.Request, sent: Sent, record: ExchangeRecord, auth: DualTokenAuth
    ) -> httpx.Response:
        """The answer to `request`, made only now that somebody wants to see it; read, as `sent` has all its body."""
        auth.attach(sent.turn, request)
        response = _received(request, sent, record)
        _take_whole(response, None)
        self._round_off(response, record)
        return response

    def _fields_with(self, document: bytes) -> tuple[Field, ...]:
        at = len(self._entries)
        content = (b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(document))
        return *self._fields[:at], *content, *self._fields[at:]

    def _is_wired(self, extensions: Mapping[str, Any]) -> bool:
        """Whether an attempt may go straight to a connection of ours."""
        transport: Any = self._transport
        adapter = self._adapter
        return (
            adapter is not None
            and transport._pool is adapter
            and "handle_async_request" not in transport.__dict__
            and "handle_async_request" not in adapter.__dict__
            and are_untouched(self._wire_seams)
            and adapter.is_wired(self._scheme, extensions)
        )

    def _is_simple(self, method: str, document: bytes | None) -> bool:
        """Whether the headers of a request are known without httpx."""
        http = self._http
        if http._headers._list != self._seen:
            self._look_at_headers()
        return (
            self._is_plain
            and not http._params
            and not http._no_cookies.jar._cookies  # type: ignore[attr-defined]
            and (document is not None or method in BODILESS)
        )

    # Requests

    def request(
        self, method: str, url: httpx.URL, document: bytes | None, timeout: Mapping[str, float | None]
    ) -> httpx.Request | None:
        """A request with the headers of all calls, as the client itself builds it; None where that has to do it.

        `document` is a body of JSON; `timeout` gives seconds, as in the request's extensions.
        """
        if not self._is_simple(method, document):
            return None
        entries = self._entries.copy()
        if document is not None:
            entries.append((b"Content-Type", b"content-type", b"application/json"))
            entries.append((b"Content-Length", b"content-length", b"%d" % len(document)))
        return _request(method, url, entries, document or b"", {"timeout": dict(timeout)})

    def _look_at_headers(self) -> None:
        """Let the client build one request, and remember what headers that has."""
        http = self._http
        self._seen = http._headers._list.copy()
        sample = http.build_request("GET", str(self._origin), headers=self._headers)
        self._entries = sample.headers._list
        self._drawn = None
        self._is_plain = sample.headers._encoding is None and sample.headers.keys().isdisjoint(OWN_NAMES)

    # Attempts

    async def exchange(
        self, request: httpx.Request, record: ExchangeRecord, auth: DualTokenAuth, limit: int | None
    ) -> httpx.Response:
        """Send `request` with the tokens on it, and read the answer: at most `limit` bytes of it, decoded.

        Does what `http.send(request, auth=auth, follow_redirects=False)` and `read_bounded` do, and raises what they
        raise.
        """
        sent, record.sent = record.sent, None
        turn = None if sent is None else sent.turn
        history: list[httpx.Response] = []
        while True:
            if turn is None:
                turn = auth.begin() or await auth.wait_to_begin(request)
            if sent is None:
                auth.draw(turn)
            auth.attach(turn, request)
            response = await self._send(request, record, limit, sent)
            sent = None
            response.history = history.copy()
            if response.has_redirect_location:
                response.next_request = self._http._build_redirect_request(request, response)
            if response.status_code not in (401, 403):
                auth.conclude(turn, response)
                return response
            following = await auth.follow_up(turn, response, sent=request)
            if following is None:
                return response
            history.append(response)
            request = following

    async def _send(
        self, request: httpx.Request, record: ExchangeRecord, limit: int | None, sent: Sent | None
    ) -> httpx.Response:
        if not isinstance(request.stream, httpx.AsyncByteStream):
            raise RuntimeError("Attempted to send an sync request with an AsyncClient instance.")
        if sent is not None:
            response = _received(request, sent, record)
        elif self._is_wired(request.extensions):
            self._is_likely = True
            response = await self._send_on_wire(request, record)
        else:
            assert self._transport is not None
            try:
                response = await self._transport.handle_async_request(request)
            except httpx.RequestError as exc:
                exc.request = request
                raise
            response.request = request
        if not _take_whole(response, limit):
            try:
                if response.status_code >= 400:
                    await read_bounded(response, BODY_LIMIT, truncate=True)
                else:
                    await read_bounded(response, limit)
            except BaseException:
                await response.aclose()
                raise
        self._round_off(response, record)
        return response

    def _round_off(self, response: httpx.Response, record: ExchangeRecord) -> None:
        response.default_encoding = self._http._default_encoding
        response.elapsed = datetime.timedelta(seconds=time.perf_counter() - record.started)

    async def _send_on_wire(self, request: httpx.Request, record: ExchangeRecord) -> httpx.Response:
        stream: Any = request.stream
        adapter, extensions = self._adapter, request.extensions
        assert adapter is not None
        slot: Slot | None = None
        try:
            slot = await adapter.slot(record, extensions)
            connection = adapter.wired(slot, record, self._scheme, self._host, self._port, extensions)
            answer = await connection.exchange(
                request.method.encode("ascii"),
                request.url.raw_path,
                request.headers.raw,
                b"" if stream is NO_BODY else b"".join(stream) if isinstance(stream, httpx.ByteStream) else stream,
                record,
                extensions["timeout"],
            )
        except BaseException as exc:
            if slot is not None:
                free(slot, record)
                raise_if_revoked(slot, record, exc)
            if not isinstance(exc, Exception):
                raise
            with request_context(request=request), map_httpcore_exceptions():
                raise
        return _response(request, answer, AnswerStream(answer, connection, slot, record), connection.network_stream)


def _received(request: httpx.Request, sent: Sent, record: ExchangeRecord) -> httpx.Response:
    """What was `sent` for `request` before that existed."""
    error, sent.error = sent.error, None  # it has the frame that has it
    if error is not None:
        try:
            with request_context(request=request), map_httpcore_exceptions():
                raise error
        finally:
            del error
    answer, connection = sent.answer, sent.connection
    assert answer is not None
    assert connection is not None
    return _response(request, answer, AnswerStream(answer, connection, sent.slot, record), connection.network_stream)


def _take_whole(response: httpx.Response, limit: int | None) -> bool:
    """Make a read response of one whose whole body is there; httpx would go through four generators.

    What is large, or was not sent by a connection of ours, is left to them. Raises what `read_bounded` raises.
    """
    stream = getattr(response.stream, "_httpcore_stream", None)
    raw = stream.whole if type(stream) is AnswerStream else None
    if raw is None or len(raw) > AT_ONCE:
        return False
    assert isinstance(stream, AnswerStream)
    stream.close()
    truncate = response.status_code >= 400
    bound = BODY_LIMIT if truncate else sys.maxsize if limit is None else limit
    codings = b",".join([value for _, name, value in response.headers._list if name == b"content-encoding"])
    if not codings and len(raw) <= bound:
        content = raw
    else:
        with request_context(request=response.request):
            content = decode_bounded(raw, codings.decode("latin-1"), bound, truncate=truncate)
    response.is_closed = response.is_stream_consumed = True
    response.stream = httpx.ByteStream(raw)
    response._content = content
    response._num_bytes_downloaded = len(raw)
    return True


def _headers(entries: list[HeaderEntry]) -> httpx.Headers:
    headers = httpx.Headers.__new__(httpx.Headers)
    headers._list = entries
    headers._encoding = None
    return headers


def _request(
    method: str, url: httpx.URL, entries: list[HeaderEntry], content: bytes, extensions: dict[str, Any]
) -> httpx.Request:
    """What `httpx.Request` makes of this. Not by way of its `__dict__`: who asks for that makes one for good."""
    request = QuietRequest.__new__(QuietRequest)
    request.method = method
    request.url = url
    request.headers = _headers(entries)
    request.extensions = extensions
    request.stream = httpx.ByteStream(content) if content else NO_BODY
    request._content = content
    return request


def _response(request: httpx.Request, answer: Any, stream: Any, network_stream: Any) -> httpx.Response:
    """What httpx makes of an answer that has not been read; without a `__dict__`, as `_request`."""
    response = httpx.Response.__new__(httpx.Response)
    response.status_code = answer.status
    response.headers = _headers([(name, name.lower(), value) for name, value in answer.headers])
    response._request = request
    response.next_request = None
    response.extensions = {
        "http_version": answer.http_version,
        "reason_phrase": answer.reason,
        "network_stream": network_stream,
    }
    response.history = []
    response.is_closed = response.is_stream_consumed = False
    response.default_encoding = "utf-8"
    response.stream = AsyncResponseStream(stream)
    response._num_bytes_downloaded = 0
    return response


@functools.cache
def fits() -> bool:
    """Whether the installed httpx makes requests and responses of the shape that this room gives them."""
    stream = httpx.ByteStream(b"")
    request = httpx.Request("GET", "https://host.invalid/", content=b"")
    response = httpx.Response(200, stream=stream, request=request)
    answer = types.SimpleNamespace(status=200, headers=[], http_version=b"", reason=b"")
    ours = _request("GET", request.url, [], b"", {})
    return (
        vars(request).keys() == vars(ours).keys()
        and vars(response).keys() == vars(_response(ours, answer, stream, None)).keys()
        and hasattr(AsyncResponseStream(stream), "_httpcore_stream")
    )
