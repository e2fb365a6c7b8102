"""HTTP/1.1 without a socket: the head of a request, and what is to be made of the bytes that answer it.

Pure, and without guesses. llhttp, strict, parses heads and chunks; framing is decided here (RFC 9112 section 6.3).
Errors (`httpcore.RemoteProtocolError`) are: Transfer-Encoding beside Content-Length, in HTTP/1.0, or other than
`chunked` alone; a Content-Length twice, as a list, or as anything but digits; obs-fold (section 5.2 lets it be read as
a space, but who still sends it is not trusted to frame); bare LF, whitespace before a colon, control characters; any
version but 1.0 and 1.1; 101, which nobody asked for here; too many interim answers, fields or bytes (see the
constants). To HEAD, and with 204 and 304, there is no body whatever the fields say. Trailers are checked and dropped.
What comes behind an answer's end is noticed, never read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import httpcore
import httptools

HEAD_BYTES = 100 * 1024  # of a head and the interim ones before it, or of trailers and chunk extensions in a row
HEAD_FIELDS = 1000
INTERIM_ANSWERS = 64

# What is expected of the bytes that come
IDLE, RAW, HEAD, LENGTH, CHUNKED, UNTIL_END = range(6)

Field = tuple[bytes, bytes]


class AnswerHead:
    """What llhttp found in the head that comes, or came last.

    `says_more`: a field is there that others than this room look for in each answer, a coding or a limit.
    """

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
        "says_more",
        "status",
        "version",
    )

    def __init__(self) -> None:
        self.clear([])

    def clear(self, pieces: list[bytes]) -> None:
        self.fields: list[Field] = []
        self.status = 0
        self.version = self.reason = b""
        self.is_complete = self.says_more = False
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
        kind = _kinds.get(name)
        if kind is None:
            kind = _kind_of(name)
        if kind == _PLAIN:
            return
        if kind == _LENGTH:
            self.length = value
        elif kind == _CODING:
            self.coding = value if self.coding is None else self.coding + b"," + value
        elif kind == _CONNECTION:
            self.connection += value.lower() + b","
        else:
            self.says_more = True

    def on_headers_complete(self) -> None:
        self.is_complete = True

    def on_message_complete(self) -> None:
        if self.ends_at < 0:
            self.ends_at = len(self.pieces)


_PLAIN, _LENGTH, _CODING, _CONNECTION, _HOST, _MORE = range(6)
_FRAMING = {b"content-length": _LENGTH, b"transfer-encoding": _CODING, b"connection": _CONNECTION}
_kinds: dict[bytes, int] = {}  # what fields of answers are, by their names as they were written


def _kind_of(name: bytes) -> int:
    lower = name.lower()
    kind = _MORE if lower == b"content-encoding" or b"limit" in lower else _FRAMING.get(lower, _PLAIN)
    if len(_kinds) < 1000:  # names that vary are none to remember
        _kinds[name] = kind
    return kind


class AnswerReader:
    """Takes bytes as they come, and has an answer in pieces. One serves all answers of a connection, one at a time.

    `stage` is `IDLE` again at the end of an answer; `is_answered` tells that the final head is there, in `head`;
    `is_followed` that bytes came which belong to no request; `unread` how many bytes of a body wait in `pieces`.
    `keeps_alive` is the peer's word on the connection.
    """

    __slots__ = (
        "_has_no_body",
        "_head_bytes",
        "_interim",
        "_left",
        "_overhead",
        "_parser",
        "_tail",
        "head",
        "is_answered",
        "is_followed",
        "keeps_alive",
        "pieces",
        "stage",
        "unread",
    )

    def __init__(self) -> None:
        self.head = AnswerHead()
        self._parser = httptools.HttpResponseParser(self.head)
        self.is_followed = False
        self.begin(IDLE)

    def begin(self, stage: int, *, has_no_body: bool = False) -> None:
        """Forget the last answer. `has_no_body`: the request was a HEAD (or a CONNECT, which no body follows)."""
        self.stage = stage
        self.pieces: list[bytes] = []
        self.unread = 0
        self.is_answered = False
        self.keeps_alive = True
        self._has_no_body = has_no_body
        self._left = self._overhead = self._head_bytes = self._interim = 0
        self._begin_head()

    def _begin_head(self) -> None:
        self._tail = b""
        self.head.clear(self.pieces)
        # On the same parser: that costs a third of a new one.
        self._parser.__init__(self.head)  # type: ignore[misc]

    def take(self) -> bytes:
        """What there is of the body."""
        pieces = self.pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self.unread = 0
        return data

    def feed(self, data: bytes) -> None:
        """Take in what came. Raises `httpcore.RemoteProtocolError`."""
        while data:
            stage = self.stage
            if stage == HEAD:
                data = self._feed_head(data)
            elif stage == LENGTH:
                left = self._left
                body = data if len(data) <= left else data[:left]
                self.pieces.append(body)
                self.unread += len(body)
                if len(data) < left:
                    self._left = left - len(data)
                    return
                self.stage = IDLE
                data = data[left:]
            elif stage == CHUNKED:
                self._feed_chunked(data)
                return
            elif stage == IDLE:
                self.is_followed = True
                return
            else:
                self.pieces.append(data)
                self.unread += len(data)
                return

    def end(self, *, is_cut: bool) -> None:
        """The peer has closed; `is_cut`: without TLS's goodbye, so that it may have been anybody.

        Raises `httpcore.RemoteProtocolError` where something is missing.
        """
        stage = self.stage
        if stage == HEAD and not (is_cut and self._head_bytes):
            raise httpcore.RemoteProtocolError("Server disconnected without sending a response.")
        if is_cut and stage in (HEAD, LENGTH, CHUNKED, UNTIL_END):
            raise httpcore.RemoteProtocolError("the TLS connection was cut: the answer may be incomplete")
        if stage in (LENGTH, CHUNKED):
            raise httpcore.RemoteProtocolError("the peer closed the connection before the body was complete")
        self.stage = IDLE
        self.is_followed = True

    def _feed_head(self, data: bytes) -> bytes:
        """Take the head, or what came of it, off `data`; returns the rest."""
        tail, head = self._tail, self.head
        if not head.begun and data[0] != 72:  # llhttp knows other protocols, and skips line ends
            raise httpcore.RemoteProtocolError("the answer is not HTTP")
        end = (tail + data if tail else data).find(b"\r\n\r\n")
        if end < 0:
            self._tail = (tail + data)[-3:]
            part, rest = data, b""
        else:
            end += 4 - len(tail)
            part, rest = data[:end], data[end:]
        self._head_bytes += len(part)
        if self._head_bytes > HEAD_BYTES:
            raise httpcore.RemoteProtocolError(f"the head of the answer is longer than {HEAD_BYTES} bytes")
        problem = None
        try:
            self._parser.feed_data(part)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            problem = exc
        is_at_end = end >= 0
        if head.is_complete is not is_at_end or (problem and not is_at_end):
            raise httpcore.RemoteProtocolError(f"the answer is not HTTP/1.1: {problem or 'where does its head end?'}")
        if len(head.fields) > HEAD_FIELDS:
            raise httpcore.RemoteProtocolError(f"the answer has more than {HEAD_FIELDS} fields")
        if is_at_end:
            self._tail = b""
            self._on_head()
        return rest

    def _on_head(self) -> None:
        """A head is complete: decide what follows it."""
        head = self.head
        head.status = status = self._parser.get_status_code()
        version = self._parser.get_http_version()
        coding, length = head.coding, head.length
        if version == "1.1":
            head.version = b"HTTP/1.1"
            if head.connection and b"close" in tokens(head.connection):
                self.keeps_alive = False
        elif version == "1.0":
            head.version = b"HTTP/1.0"
            self.keeps_alive = False
        else:
            raise httpcore.RemoteProtocolError(f"the answer says that it is HTTP/{version}")
        if status < 200:
            if status < 100 or status == 101:
                raise httpcore.RemoteProtocolError(f"the answer has the status {status}, which nobody asked for")
            self._interim += 1
            if self._interim > INTERIM_ANSWERS:
                raise httpcore.RemoteProtocolError(f"more than {INTERIM_ANSWERS} interim answers came")
            self._begin_head()
            return
        if coding is not None and (coding.lower() != b"chunked" or length is not None or version == "1.0"):
            raise httpcore.RemoteProtocolError(
                "the answer has a Transfer-Encoding other than chunked alone in HTTP/1.1"
            )
        if length is not None and not (length.isdigit() and len(length) < 19):
            raise httpcore.RemoteProtocolError("the answer has a Content-Length that is no length")
        self.is_answered = True
        if self._has_no_body or status == 204 or status == 304:
            self.stage = IDLE
        elif coding is not None:
            self.stage = CHUNKED
        elif length is None:
            self.stage = UNTIL_END
            self.keeps_alive = False
        else:
            self._left = int(length)
            self.stage = LENGTH if self._left else IDLE

    def _feed_chunked(self, data: bytes) -> None:
        head, pieces = self.head, self.pieces
        before = len(pieces)
        is_followed = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if head.ends_at < 0:
                raise httpcore.RemoteProtocolError(f"the chunks of the answer are malformed: {exc}") from None
            is_followed = True
        if head.ends_at >= 0:
            del pieces[head.ends_at :]  # the body of what came behind
        self._tail = end = (self._tail + data)[-5:]
        if len(pieces) > before:
            self._overhead = 0
            pieces[before:] = [b"".join(pieces[before:])]
            self.unread += len(pieces[-1])
        else:
            self._overhead += len(data)
            if self._overhead > HEAD_BYTES:
                raise httpcore.RemoteProtocolError(f"{HEAD_BYTES} bytes of chunks came without any body")
        if head.ends_at >= 0:
            self.stage = IDLE
            # llhttp passes over line ends behind a message: there must be exactly the two that end it.
            self.is_followed |= is_followed or head.begun > 1 or end[1:] != b"\r\n\r\n" or end[:1] == b"\n"


def tokens(value: bytes) -> list[bytes]:
    """The members of a list field (RFC 9110 section 5.6.1)."""
    return [token.strip(b" \t") for token in value.split(b",")]


def merged(fields: Sequence[Field], overriding: Sequence[Field]) -> list[Field]:
    """`fields` but for those that `overriding` has too, and then `overriding`: as httpcore merges a proxy's."""
    names = {name.lower() for name, _ in overriding}
    return [*(field for field in fields if field[0].lower() not in names), *overriding]


# Requests

CHUNKS = -1
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
_VISIBLE = bytes(range(0x21, 0x7F))
_ALLOWED = bytes([0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0x100)])
_names: dict[bytes, tuple[bytes, int]] = {}  # as they are written, and what they mean here


def _learned(name: bytes) -> tuple[bytes, int] | None:
    if not _TOKEN.fullmatch(name):
        return None
    lower = name.lower()
    known = name + b": ", _HOST if lower == b"host" else _FRAMING.get(lower, _PLAIN)
    if len(_names) < 1000:  # names that vary are none to remember
        _names[name] = known
    return known


RequestHead = tuple[bytes, bytes, int, bool]


def request_head(method: bytes, target: bytes, headers: Sequence[Field]) -> RequestHead | str:
    """The head of a request, an empty body, the length it announces (-1 for chunks), and if it keeps the connection.

    Or what is wrong with it, quoting nothing: what is no token, target or field value (RFC 9112 sections 3 and 5), and
    framing that contradicts itself. Not raised, since the frame of this function would be in the traceback.
    """
    block = field_block(headers)
    return block if isinstance(block, str) else headed(method, target, block)


FieldBlock = tuple[bytes, int, bool]


def headed(method: bytes, target: bytes, block: FieldBlock) -> RequestHead | str:
    """What `request_head` gives, for fields that are checked and written already."""
    if method not in _METHODS and not _TOKEN.fullmatch(method):
        return "the method of the request is illegal"
    if not target or target.translate(None, _VISIBLE):
        return "the target of the request has illegal characters"
    fields, length, keeps_alive = block
    return b"".join((method, b" ", target, b" HTTP/1.1\r\n", fields)), b"", length, keeps_alive


def field_block(headers: Sequence[Field]) -> FieldBlock | str:
    """The fields of a request as they are sent, with the empty line; the rest as for `request_head`."""
    lines: list[bytes] = []
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
                keeps_alive = keeps_alive and b"close" not in tokens(value.lower())
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
    count = len(headers) + 1
    if head.count(b"\n") != count or head.count(b"\r") != count or head.translate(None, _ALLOWED):
        return "a header of the request has illegal characters"
    if (b"  " in head or b"\t" in head or b" \r" in head) and any(value != value.strip(b" \t") for _, value in headers):
        return "a header of the request has whitespace round its value"
    if hosts != 1:
        return "the request needs one Host header"
    return head, length, keeps_alive


def framed(made: RequestHead, body: bytes) -> RequestHead | str:
    """`made` with `body` as it goes out, or what is wrong with that."""
    head, _, length, keeps_alive = made
    if length == CHUNKS:
        body = chunk(body) + b"0\r\n\r\n" if body else b"0\r\n\r\n"
    elif length != len(body):
        return f"the body of the request has {len(body)} bytes, its head announces {length}"
    return head, body, length, keeps_alive


_METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE"})


def _announced(kind: int, value: bytes) -> int | None:
    if kind == _CODING:
        return CHUNKS if value.lower() == b"chunked" else None
    return int(value) if value.isdigit() and len(value) < 19 else None


def chunk(data: bytes | memoryview) -> bytes:
    """`data` as one chunk (RFC 9112 section 7.1)."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))
