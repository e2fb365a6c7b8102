"""What can become of an attempt, as a table of rows, and which row an attempt met.

Rules: all of it is pure. A request that may have been processed is sent again only if that is safe (RFC 9110 section
9.2.2) or its caller says so. Where the transport did not say how far an attempt came, the strictest reading holds.
"""

from __future__ import annotations

import math
import re
import socket
import ssl

import httpx

from ._errors import APIStatusError, RateLimitError, ServerError
from ._exchange import ExchangeRecord, retry_after
from ._values import Value


class Row:
    """One row of the table: how often a call is tried again after this failure, when, and what that costs.

    `safe` and `unsafe` bound how often one call is tried again for this failure, for requests that can be repeated
    safely and for the others. `cost` is what each such failure takes from the budget. `fresh` asks for a new
    connection. `at_once` waits for nothing. `outage`: so it looks when the server, or the way to it, is away.
    """

    __slots__ = (
        "at_once",
        "cost",
        "fresh",
        "heeds_retry_after",
        "name",
        "needs_half_an_attempt",
        "outage",
        "safe",
        "unsafe",
    )

    def __init__(
        self,
        name: str,
        safe: float,
        unsafe: float,
        *,
        cost: float = 1.0,
        at_once: bool = False,
        fresh: bool = False,
        heeds_retry_after: bool = False,
        needs_half_an_attempt: bool = False,
        outage: bool = False,
    ) -> None:
        self.name: str = name
        self.safe: float = safe
        self.unsafe: float = unsafe
        self.cost: float = cost
        self.at_once: bool = at_once
        self.fresh: bool = fresh
        self.heeds_retry_after: bool = heeds_retry_after
        self.needs_half_an_attempt: bool = needs_half_an_attempt
        self.outage: bool = outage


NEVER, ONCE, TWICE, YES = 0, 1, 2, math.inf
FREE = 0.0

CONNECT = Row("no connection", YES, YES, outage=True)
CONNECT_TIMEOUT = Row("connect timeout", YES, YES, cost=2, outage=True)
PERMANENT = Row("certificate, unknown host, bad URL, own bounds", NEVER, NEVER, cost=FREE)
UNSENT = Row("nothing was written", YES, YES, outage=True)
CUT_REQUEST = Row("the request was cut", YES, NEVER, outage=True)
DISCONNECT = Row("no answer began", YES, NEVER, outage=True)
READ_TIMEOUT = Row("read timeout before the answer", YES, NEVER, cost=2, needs_half_an_attempt=True, outage=True)
CUT_RESPONSE = Row("the answer was cut", YES, NEVER)
MALFORMED = Row("malformed head or corrupt coding", ONCE, NEVER, fresh=True)
REQUEST_TIMEOUT = Row("408", ONCE, ONCE, cost=FREE, at_once=True, fresh=True)
TOO_EARLY = Row("425", ONCE, ONCE)
RATE_LIMITED = Row("429", YES, YES, cost=FREE, heeds_retry_after=True)
SERVER_ERROR = Row("500", TWICE, NEVER)
BAD_GATEWAY = Row("502, 504", YES, NEVER, outage=True)
UNAVAILABLE = Row("503", YES, NEVER, heeds_retry_after=True, outage=True)
DETERMINISTIC = Row("would meet the same again", NEVER, NEVER, cost=FREE)

STATUS_ROWS: dict[int, Row] = {
    408: REQUEST_TIMEOUT,
    425: TOO_EARLY,
    429: RATE_LIMITED,
    502: BAD_GATEWAY,
    503: UNAVAILABLE,
    504: BAD_GATEWAY,
    # Not Implemented, HTTP Version, Variant Also Negotiates, Loop Detected, Not Extended, Network Authentication
    **dict.fromkeys((501, 505, 506, 508, 510, 511), DETERMINISTIC),
}


def status_row(status_code: int) -> Row:
    """The row for an answer of 400 or above; other 5xx are like a 500."""
    return STATUS_ROWS.get(status_code) or (SERVER_ERROR if 500 <= status_code <= 599 else DETERMINISTIC)


# What an attempt met


class Failure(Value):
    """What one failed attempt met.

    `cause` is the status, or the name of the exception. `stale` means that a connection that had served before broke
    ahead of the answer: most likely the server had closed it while it was idle. `redirected` means that the failure
    belongs to a request that followed a redirect, so the first one had been answered. `processed` means that the server
    may have acted on the request. `retry_after` is what the server asks to wait, in seconds.
    """

    __match_args__ = ("row", "cause", "status_code", "retry_after", "stale", "redirected", "processed")
    __slots__ = __match_args__

    def __init__(
        self,
        row: Row,
        cause: str,
        status_code: int | None = None,
        retry_after: float | None = None,
        *,
        stale: bool = False,
        redirected: bool = False,
        processed: bool = False,
    ) -> None:
        self.row = row
        self.cause = cause
        self.status_code = status_code
        self.retry_after = retry_after
        self.stale: bool = stale
        self.redirected: bool = redirected
        self.processed: bool = processed


def classify_failure(outcome: httpx.Response | httpx.RequestError | APIStatusError, request: httpx.Request) -> Failure:
    """Which row of the table `outcome` of an attempt at `request` belongs to. An answer has a status of 400 or above.

    What the transport noted in the request's `ExchangeRecord` is used; what it left out is taken in the strictest way.
    """
    if isinstance(outcome, httpx.Response):
        redirected = any(300 <= answer.status_code < 400 for answer in outcome.history)
        code = outcome.status_code
        return _answered(code, str(code), code, retry_after(outcome), redirected=redirected)
    if isinstance(outcome, APIStatusError):
        shown, code = outcome.status_code, _effective_status(outcome)
        cause = str(shown) if shown == code else type(outcome).__name__
        return _answered(code, cause, shown, outcome.retry_after, redirected=False)
    record = ExchangeRecord.of(request)
    row = _exception_row(outcome, record)
    broke = row in (UNSENT, CUT_REQUEST, DISCONNECT) and not isinstance(outcome, httpx.TimeoutException)
    redirected = _is_of_another_request(outcome, request)
    return Failure(
        row,
        type(outcome).__name__,
        stale=broke and record.reused is True,
        redirected=redirected,
        processed=redirected
        or row not in (CONNECT, CONNECT_TIMEOUT, UNSENT, PERMANENT)
        or bool(row is PERMANENT and record.bytes_written),
    )


def _answered(code: int, cause: str, shown: int, wait: float | None, *, redirected: bool) -> Failure:
    row = status_row(code)
    return Failure(row, cause, shown, wait, redirected=redirected, processed=redirected or code >= 500)


def _effective_status(error: APIStatusError) -> int:
    """The status that `error` stands for: its own, or, below 400, what its class says."""
    if error.status_code >= 400:
        return error.status_code
    if isinstance(error, RateLimitError):
        return 429
    if isinstance(error, ServerError):
        return 500 if error.retry_after is None else 503
    return 400


def _is_of_another_request(error: httpx.RequestError, request: httpx.Request) -> bool:
    """Whether `error` met a request that took the place of `request`: after a redirect, or one that an auth sent."""
    # Not `error.request`, which raises where it is unset, as mocks leave it.
    failed: httpx.Request | None = getattr(error, "_request", None)
    return failed is not None and failed is not request and (failed.method, failed.url) != (request.method, request.url)


def _exception_row(error: httpx.RequestError, record: ExchangeRecord) -> Row:
    match error:
        case httpx.ProxyError():
            return _proxy_row(error)
        case httpx.ConnectTimeout():
            return CONNECT_TIMEOUT
        case httpx.ConnectError():
            return PERMANENT if _is_permanent(error) else CONNECT
        case httpx.DecodingError():
            return MALFORMED
        case httpx.UnsupportedProtocol() | httpx.LocalProtocolError() | httpx.PoolTimeout():
            return PERMANENT
        case httpx.TransportError():
            return _wire_row(error, record)
        case _:
            return PERMANENT


def _wire_row(error: httpx.TransportError, record: ExchangeRecord) -> Row:
    """The row of an error that met an open connection."""
    if record.response_started:
        is_malformed = isinstance(error, httpx.RemoteProtocolError) and not record.head_received
        return MALFORMED if is_malformed else CUT_RESPONSE
    if _is_permanent(error):  # TLS 1.3 has shaken hands before a server says that it wants the client's certificate
        return PERMANENT
    if record.bytes_written == 0:
        return UNSENT
    if isinstance(error, httpx.WriteError | httpx.WriteTimeout):
        return CUT_REQUEST
    return READ_TIMEOUT if isinstance(error, httpx.TimeoutException) else DISCONNECT


def _proxy_row(error: httpx.ProxyError) -> Row:
    """A proxy's refusal of CONNECT, of which httpx keeps the status as text; nothing has reached the server."""
    return CONNECT if str(error)[:3] in ("502", "503", "504") else PERMANENT


_CERTIFICATE_ALERT = re.compile("ALERT_.*(CERTIFICATE|UNKNOWN_CA)")  # RFC 8446 section 6.2, as OpenSSL names them
UNKNOWN_HOST = {getattr(socket, name, None) for name in ("EAI_NONAME", "EAI_NODATA")}


def _is_permanent(error: BaseException) -> bool:
    """Whether the operating system's or OpenSSL's error below `error` would come again: certificate, unknown host."""
    seen: set[int] = set()
    root: BaseException | None = error
    while root is not None and id(root) not in seen:
        if isinstance(root, ssl.SSLCertVerificationError):
            return True
        if isinstance(root, ssl.SSLError) and _CERTIFICATE_ALERT.search(root.reason or ""):
            return True  # it is ours that they refuse, or miss
        if isinstance(root, socket.gaierror):
            return root.errno in UNKNOWN_HOST
        if isinstance(root, OSError):
            # The end of the story: what lies below may be the caller's own affair, handled while it made this call.
            return False
        seen.add(id(root))
        root = root.__cause__ or root.__context__
    return False


IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})


def is_safe_to_repeat(method: str, record: ExchangeRecord, *, headers: httpx.Headers | None = None) -> bool:
    """Whether a request may be sent again although it may have been processed.

    The caller's own word (`record.idempotent`) comes first, then an `Idempotency-Key` among `headers`, then the method
    (RFC 9110 section 9.2.2).
    """
    if record.idempotent is not None:
        return record.idempotent
    return method.upper() in IDEMPOTENT_METHODS or (headers is not None and "idempotency-key" in headers)
