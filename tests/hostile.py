"""The hostile corpus: what a server may send that it should not, byte for byte, and what has to become of it.

Data only; test_siege_hostile.py plays it. A `Case` is what the server sends in answer to one request, what the caller
must get for it, and whether the connection may serve again. The expectation is the RFCs' (`section`; RFC 9110 is HTTP,
RFC 9112 is HTTP/1.1, RFC 1952 is gzip), stated before the code; where they leave a choice, `expect` lists it. Where
httpcore and h11, on which the portable connection stands, cannot do that, `portable` states what happens there instead,
and why: never a wrong body, never a hang, never an untyped error.
"""

from __future__ import annotations

import enum
import gzip
import zlib
from collections.abc import Callable
from typing import Any

import attrs
import httpx

from layer_async import APIConnectionError, APITimeoutError, DeadlineExceededError, MalformedResponseError

Outcome = tuple[int, bytes] | type[Exception]


class End(enum.Enum):
    """How the server ends the connection after what it sent; else it keeps it, and waits for more requests."""

    FINISH = "with TLS's goodbye"
    CUT = "without TLS's goodbye"
    RESET = "with a reset"


FINISH, CUT, RESET = End.FINISH, End.CUT, End.RESET
Step = bytes | float | End  # bytes to send, seconds to wait, or the end


@attrs.frozen
class Weaker:
    """What the portable connection makes of a case instead, and why it cannot do better. `within` in seconds."""

    why: str
    expect: tuple[Outcome, ...]
    reused: bool | None = False
    within: float | None = None


@attrs.frozen
class Case:
    """One answer and what has to become of it.

    `expect`: status and body, or the class of the error. `reused`: whether the connection must serve again after an
    answer (None: it may); after an error it never does. `timeout` and `deadline` in seconds; where a timeout is
    expected, `timeout` is short. `limit` is max_response_bytes. `late`: wait until everything was sent before the next
    request; `blocking`: so that the event loop has not seen it. `kinds`: the connections on which it makes sense:
    plain, TLS, TLS 1.2 with `answer` in the last packet of the handshake, or as the answer of a proxy to CONNECT.
    """

    group: str
    name: str
    section: str
    answer: tuple[Step, ...]
    expect: tuple[Outcome, ...]
    reused: bool | None = True
    method: str = "GET"
    timeout: float | None = None
    deadline: float = 10.0
    limit: int = 2**20
    late: bool = False
    blocking: bool = False
    kinds: tuple[str, ...] = ("plain", "TLS")
    portable: Weaker | None = None

    @property
    def id(self) -> str:
        """Its name in reports."""
        return f"{self.group}: {self.name}"


CASES: list[Case] = []
LINE = b"HTTP/1.1 200 OK\r\n"
STRAY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nSTRAY"
CHUNKED = LINE + b"Transfer-Encoding: chunked\r\n\r\n"
HELLO = (200, b"hello")
BAD = MalformedResponseError
LOST = APIConnectionError
LATE = APITimeoutError
EITHER = (HELLO, BAD)  # the RFCs allow both


def group(name: str) -> Callable[..., None]:
    def add(case: str, section: str, *answer: Step, expect: Any = BAD, **options: Any) -> None:
        # A pair of status and body is one outcome, any other tuple is a choice of them.
        is_choice = isinstance(expect, tuple) and not isinstance(expect[0], int)
        CASES.append(Case(name, case, section, answer, expect if is_choice else (expect,), **options))

    return add


def head(*fields: bytes, line: bytes = LINE) -> bytes:
    return line + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def sized(body: bytes, *fields: bytes, line: bytes = LINE) -> bytes:
    return head(b"Content-Length: %d" % len(body), *fields, line=line) + body


HELLO_CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"
TWICE_OR_ERROR = "h11 takes Transfer-Encoding before Content-Length, as RFC 9112 section 6.3 allows"
WAITS = "h11 knows no largest number: it waits for the rest, until the timeout"
NO_LINE_YET = "h11 looks at a head once its empty line has come: a timeout in place of an error"

# Framing conflicts

case = group("framing")
case(
    "Transfer-Encoding and Content-Length",
    "9112 6.3",
    head(b"Transfer-Encoding: chunked", b"Content-Length: 5") + HELLO_CHUNKED,
    portable=Weaker(TWICE_OR_ERROR, (HELLO,), reused=None),
)
case(
    "Content-Length and Transfer-Encoding",
    "9112 6.3",
    head(b"Content-Length: 15", b"Transfer-Encoding: chunked") + HELLO_CHUNKED,
    portable=Weaker(TWICE_OR_ERROR, (HELLO,), reused=None),
)
case(
    "two equal Content-Lengths",
    "9112 6.3",
    head(b"Content-Length: 5", b"Content-Length: 5") + b"hello",
    expect=EITHER,
    reused=None,
)
case(
    "a list of equal Content-Lengths", "9112 6.3", head(b"Content-Length: 5, 5") + b"hello", expect=EITHER, reused=None
)
case("two different Content-Lengths", "9112 6.3", head(b"Content-Length: 5", b"Content-Length: 6") + b"hello!")
case("two Content-Lengths, the larger first", "9112 6.3", head(b"Content-Length: 6", b"Content-Length: 5") + b"hello!")
case("a list of different Content-Lengths", "9112 6.3", head(b"Content-Length: 5, 6") + b"hello!")
for value in (b"-5", b"+5", b"5a", b"0x5", b"5.0", b"5 5", b"five", b"", b"\xb2", b"5;", b"1_0"):
    case(f"Content-Length {value.decode('latin-1')!r}", "9110 8.6", head(b"Content-Length: " + value) + b"hello12345")
case("Content-Length 00005", "9110 8.6", head(b"Content-Length: 00005") + b"hello", expect=HELLO)
case(
    "Content-Length 2^64 + 5",
    "9110 8.6",
    head(b"Content-Length: 18446744073709551621") + b"hello",
    portable=Weaker(WAITS, (LATE, BAD)),
)
case(
    "Content-Length of 5,000 digits",
    "9110 8.6",
    head(b"Content-Length: " + b"9" * 5000) + b"hello",
)
for value in (b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"gzip", b"identity", b"xchunked"):
    case(
        f"Transfer-Encoding {value.decode()}", "9112 6.1", head(b"Transfer-Encoding: " + value) + HELLO_CHUNKED, FINISH
    )
case("Transfer-Encoding \\x0bchunked", "9112 6.1", head(b"Transfer-Encoding: \x0bchunked") + HELLO_CHUNKED, FINISH)
case(
    "Transfer-Encoding chunked twice",
    "9112 6.1",
    head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + HELLO_CHUNKED,
)
case("Transfer-Encoding CHUNKED", "9112 7", head(b"Transfer-Encoding: CHUNKED") + HELLO_CHUNKED, expect=HELLO)
case(
    "Transfer-Encoding in HTTP/1.0",
    "9112 6.1",
    head(b"Transfer-Encoding: chunked", line=b"HTTP/1.0 200 OK\r\n") + HELLO_CHUNKED,
    FINISH,
    expect=EITHER,
    reused=False,
)
case("no framing at all, to the end", "9112 6.3", LINE + b"\r\nhello", FINISH, expect=HELLO, reused=False)
case(
    "HTTP/1.0 without keep-alive",
    "9112 9.3",
    sized(b"hello", line=b"HTTP/1.0 200 OK\r\n"),
    expect=HELLO,
    reused=False,
)
case(
    "HTTP/1.0 with keep-alive",
    "9112 9.3",
    sized(b"hello", b"Connection: keep-alive", line=b"HTTP/1.0 200 OK\r\n"),
    expect=HELLO,
    reused=None,
)
case("Connection: close", "9112 9.6", sized(b"hello", b"Connection: close"), expect=HELLO, reused=False)
case(
    "Connection: CLOSE in a list",
    "9112 9.6",
    sized(b"hello", b"Connection: x-thing , CLOSE"),
    expect=HELLO,
    reused=False,
)

# Chunk syntax

case = group("chunks")
case("extension and trailer", "9112 7.1", CHUNKED + b'5;a=b;c="d"\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n', expect=HELLO)
case(
    "leading zeros, capital hex", "9112 7.1", CHUNKED + b"00A\r\nhellohello\r\n000\r\n\r\n", expect=(200, b"hello" * 2)
)
case("byte by byte", "9112 7.1", CHUNKED, *(bytes([byte]) for byte in HELLO_CHUNKED), expect=HELLO)
for name, size in {
    "no hex": b"zz",
    "no size": b"",
    "a negative size": b"-5",
    "a size with plus": b"+5",
    "a size with 0x": b"0x5",
    "a size with underscore": b"0_5",
    "a space before the size": b" 5",
    "a comma after the size": b"5,5",
}.items():
    case(name, "9112 7.1", CHUNKED + size + b"\r\nhello\r\n0\r\n\r\n")
case("no CRLF after the data", "9112 7.1", CHUNKED + b"5\r\nhello0\r\n\r\n")
case("more data than the size", "9112 7.1", CHUNKED + b"5\r\nhelloworld\r\n0\r\n\r\n")
case("less data than the size", "9112 7.1", CHUNKED + b"9\r\nhello\r\n0\r\n\r\n")
case("bare LF after the size", "9112 7.1", CHUNKED + b"5\nhello\r\n0\r\n\r\n", FINISH)
case("bare LF after the data", "9112 7.1", CHUNKED + b"5\r\nhello\n0\r\n\r\n")
case("bare CR after the size", "9112 7.1", CHUNKED + b"5\rhello\r\n0\r\n\r\n", FINISH)
case("a huge size, then the end", "9112 7.1", CHUNKED + b"ffffffffffffff\r\nhello", FINISH)
case(
    "a size of 2^64 + 5",
    "9112 7.1",
    CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    portable=Weaker(WAITS, (LATE, BAD)),
)
case("a size of 5,000 digits", "9112 7.1", CHUNKED + b"1" * 5000 + b"\r\nhello\r\n0\r\n\r\n")
case(
    "an extension of 1 MB",
    "9112 7.1.1",
    CHUNKED + b"5;" + b"x" * 10**6 + b"\r\nhello\r\n0\r\n\r\n",
    expect=EITHER,
    reused=None,
)
case(
    "1,000 extensions of 1 KB",
    "9112 7.1.1",
    CHUNKED + (b"1;" + b"x" * 1000 + b"\r\nh\r\n") * 1000 + b"0\r\n\r\n",
    expect=((200, b"h" * 1000), BAD),
    reused=None,
)
case("5,000 chunks of a byte", "9112 7.1", CHUNKED + b"1\r\nh\r\n" * 5000 + b"0\r\n\r\n", expect=(200, b"h" * 5000))
case(
    "10,000 trailers",
    "9112 7.1.2",
    CHUNKED + b"5\r\nhello\r\n0\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(10_000)) + b"\r\n",
    expect=EITHER,
    reused=None,
)
case("1 MB of trailer", "9112 7.1.2", CHUNKED + b"5\r\nhello\r\n0\r\nX: " + b"y" * 10**6 + b"\r\n\r\n")
case("a trailer without a colon", "9112 5", CHUNKED + b"5\r\nhello\r\n0\r\nnothing\r\n\r\n")
case(
    "Content-Length as a trailer",
    "9110 6.5.1",
    CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 3\r\n\r\n",
    expect=EITHER,
    reused=None,
)

# Limits and syntax of the head

case = group("head")
case("a status line of 1 MB", "9112 4", b"HTTP/1.1 200 " + b"x" * 10**6 + b"\r\nContent-Length: 5\r\n\r\nhello")
case(
    "10,000 headers",
    "9110 5.4",
    sized(b"hello", *(b"X-%d: y" % n for n in range(10_000))),
    portable=Weaker("httpcore bounds a head that is not complete; this one may be by the time it looks", EITHER, None),
)
case("a header of 1 MB", "9110 5.4", sized(b"hello", b"X: " + b"y" * 10**6))
case("a header name of 1 MB", "9110 5.4", sized(b"hello", b"X" * 10**6 + b": y"))
case("a head without end", "9110 5.4", LINE, *([b"X: " + b"y" * 1000 + b"\r\n"] * 1000))
for name, field in {
    "no colon": b"nothing",
    "no name": b": value",
    "a space before the colon": b"X-Thing : value",
    "a space in the name": b"X Thing: value",
    "NUL in the name": b"X\0Thing: value",
    "a control character in the name": b"X\x08Thing: value",
    "a bracket in the name": b"X(Thing): value",
}.items():
    case(name, "9112 5.1", sized(b"hello", field))
for name, field in {
    "NUL in the value": b"X: a\0b",
    "bare CR in the value": b"X: a\rb",
    "a control character in the value": b"X: a\x01b",
}.items():
    case(name, "9110 5.5", sized(b"hello", field), expect=EITHER, reused=None)
case("bytes beyond ASCII in a value", "9110 5.5", sized(b"hello", b"X: caf\xe9"), expect=HELLO)
case("obs-fold", "9112 5.2", sized(b"hello", b"X: a\r\n b"), expect=EITHER, reused=None)
case("obs-fold in Content-Length", "9112 5.2", head(b"Content-Length:\r\n 5") + b"hello", expect=EITHER, reused=None)
case(
    "white space before the first field",
    "9112 2.2",
    sized(b"hello", line=LINE + b" X: y\r\n"),
    expect=EITHER,
    reused=None,
)
case(
    "bare LF everywhere", "9112 2.2", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello", FINISH, expect=EITHER, reused=None
)
case(
    "bare LF before the body",
    "9112 2.2",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\nhello",
    FINISH,
    expect=EITHER,
    reused=None,
)
case("bare CR after the status line", "9112 2.2", b"HTTP/1.1 200 OK\rContent-Length: 5\r\n\r\nhello")
case("bare CR everywhere", "9112 2.2", b"HTTP/1.1 200 OK\rContent-Length: 5\r\rhello", FINISH)
case("an empty line before the status line", "9112 2.2", b"\r\n" + sized(b"hello"), expect=EITHER, reused=None)
for name, line in {
    "a status of two digits": b"HTTP/1.1 20 OK\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n",
    "a status that is no number": b"HTTP/1.1 abc OK\r\n",
    "a negative status": b"HTTP/1.1 -20 OK\r\n",
    "no status": b"HTTP/1.1\r\n",
    "HTTP/11.1": b"HTTP/11.1 200 OK\r\n",
    "HTTP/1": b"HTTP/1 200 OK\r\n",
}.items():
    case(name, "9112 4", sized(b"hello", line=line))
case(
    "HTTP/2.0",
    "9110 2.5",
    sized(b"hello", line=b"HTTP/2.0 200 OK\r\n"),
    portable=Weaker("h11 takes any digit for a version, and the framing is HTTP/1.1's", (HELLO, BAD), None),
)
case("HTTP/1.2", "9110 2.5", sized(b"hello", line=b"HTTP/1.2 200 OK\r\n"), expect=EITHER, reused=None)
case("no reason and no space", "9112 4", sized(b"hello", line=b"HTTP/1.1 200\r\n"), expect=EITHER, reused=None)
case(
    "status 600", "9110 15", sized(b"hello", line=b"HTTP/1.1 600 What\r\n"), expect=((600, b"hello"), BAD), reused=None
)
case("status 000", "9110 15", sized(b"hello", line=b"HTTP/1.1 000 What\r\n"), FINISH)
case("status 099", "9110 15", sized(b"hello", line=b"HTTP/1.1 099 What\r\n"), FINISH)

# Truncation

GZIPPED = gzip.compress(b"hello" * 1000, mtime=0)

case = group("cut")
case("without a byte", "9112 9.5", FINISH, expect=LOST)
case("without a byte, by a reset", "9112 9.5", RESET, expect=LOST)
case("in the status line", "9112 8", b"HTTP/1.1 20", FINISH)
case("after the status line", "9112 8", LINE, FINISH)
case("in a header", "9112 8", LINE + b"Content-Le", FINISH)
case("before the empty line", "9112 8", LINE + b"Content-Length: 5\r\n", FINISH)
case("in the empty line", "9112 8", LINE + b"Content-Length: 5\r\n\r", FINISH)
case("before the body", "9112 8", LINE + b"Content-Length: 5\r\n\r\n", FINISH)
case("in the body", "9112 8", LINE + b"Content-Length: 10\r\n\r\nhello", FINISH)
case("in the body, a byte short", "9112 8", LINE + b"Content-Length: 6\r\n\r\n", 0.002, b"hello", FINISH)
case("in the body, by a reset", "9112 8", LINE + b"Content-Length: 10\r\n\r\nhello", 0.002, RESET, expect=LOST)
case("in the body, without goodbye", "9112 8", LINE + b"Content-Length: 10\r\n\r\nhello", CUT)
case("before the first chunk", "9112 8", CHUNKED, FINISH)
case("in a chunk's size", "9112 8", CHUNKED + b"5\r\nhello\r\n1", FINISH)
case("after a chunk's size", "9112 8", CHUNKED + b"5\r\n", FINISH)
case("in a chunk's data", "9112 8", CHUNKED + b"5\r\nhel", FINISH)
case("after a chunk's data", "9112 8", CHUNKED + b"5\r\nhello", FINISH)
case("before the last chunk", "9112 8", CHUNKED + b"5\r\nhello\r\n", FINISH)
case("in the last chunk", "9112 8", CHUNKED + b"5\r\nhello\r\n0", FINISH)
case("before the last CRLF", "9112 8", CHUNKED + b"5\r\nhello\r\n0\r\n", FINISH)
case("in the last CRLF", "9112 8", CHUNKED + b"5\r\nhello\r\n0\r\n\r", FINISH)
case("in a trailer", "9112 8", CHUNKED + b"5\r\nhello\r\n0\r\nX-Su", FINISH)
case("before the last CRLF, without goodbye", "9112 8", CHUNKED + b"5\r\nhello\r\n0\r\n", CUT)
case("no framing, without goodbye", "9112 9.8", LINE + b"\r\nhello", CUT, kinds=("TLS",))
case("HTTP/1.0, without goodbye", "9112 9.8", b"HTTP/1.0 200 OK\r\n\r\nhello", CUT, kinds=("TLS",))
case("no framing, by a reset", "9112 9.5", LINE + b"\r\nhello", 0.002, RESET, expect=LOST)
case("after the whole answer, without goodbye", "9112 9.8", sized(b"hello"), CUT, expect=HELLO, reused=False)
case(
    "in an error's body",
    "9112 8",
    b"HTTP/1.1 404 No\r\nContent-Length: 9\r\n\r\nhello",
    FINISH,
    expect=(404, b"hello"),
    reused=False,
)

# Early and late bytes

case = group("stray")
case("in the same packet", "9112 9.2", sized(b"hello") + STRAY, expect=HELLO, reused=False)
case("one byte in the same packet", "9112 9.2", sized(b"hello") + b"x", expect=HELLO, reused=False)
case("CRLF in the same packet", "9112 9.2", sized(b"hello") + b"\r\n", expect=HELLO, reused=None)
case("NUL in the same packet", "9112 9.2", sized(b"hello") + b"\0", expect=HELLO, reused=False)
case("after an empty body", "9112 9.2", sized(b"") + STRAY, expect=(200, b""), reused=False)
case("after the last chunk", "9112 9.2", CHUNKED + HELLO_CHUNKED + STRAY, expect=HELLO, reused=False)
case("after Connection: close", "9112 9.6", sized(b"hello", b"Connection: close") + STRAY, expect=HELLO, reused=False)
case("in a packet while idle", "9112 9.2", sized(b"hello"), 0.003, STRAY, expect=HELLO, reused=False, late=True)
case("a byte while idle", "9112 9.2", sized(b"hello"), 0.003, b"x", expect=HELLO, reused=False, late=True)
case(
    "unseen by the loop",
    "9112 9.2",
    sized(b"hello"),
    0.003,
    STRAY,
    expect=HELLO,
    reused=False,
    late=True,
    blocking=True,
)
case(
    "unseen by the loop, after chunks",
    "9112 9.2",
    CHUNKED + HELLO_CHUNKED,
    0.003,
    STRAY,
    expect=HELLO,
    reused=False,
    late=True,
    blocking=True,
)
case(
    "408 while idle",
    "9110 15.5.9",
    sized(b"hello"),
    0.003,
    b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    FINISH,
    expect=HELLO,
    reused=False,
    late=True,
)
case("closed while idle", "9112 9.5", sized(b"hello"), 0.003, FINISH, expect=HELLO, reused=False, late=True)
case(
    "closed, unseen by the loop",
    "9112 9.5",
    sized(b"hello"),
    0.003,
    FINISH,
    expect=HELLO,
    reused=False,
    late=True,
    blocking=True,
)
case("reset while idle", "9112 9.5", sized(b"hello"), 0.003, RESET, expect=HELLO, reused=False, late=True)
for status in (b"204 No Content", b"304 Not Modified"):
    code = int(status[:3])
    line = b"HTTP/1.1 " + status + b"\r\n"
    case(f"after {code}", "9112 6.3", line + b"\r\n" + STRAY, expect=(code, b""), reused=False)
    case(
        f"a packet after {code}", "9112 6.3", line + b"\r\n", 0.003, STRAY, expect=(code, b""), reused=False, late=True
    )
    case(f"{code} with a length and a body", "9112 6.3", sized(b"STRAY", line=line), expect=(code, b""), reused=False)
    case(
        f"{code} with chunks",
        "9112 6.3",
        head(b"Transfer-Encoding: chunked", line=line) + HELLO_CHUNKED,
        expect=((code, b""), BAD),
        reused=False,
    )
case(
    "304 with a length and no body",
    "9110 8.6",
    head(b"Content-Length: 5", line=b"HTTP/1.1 304 Not Modified\r\n"),
    expect=(304, b""),
)
case("204 alone", "9112 6.3", b"HTTP/1.1 204 No Content\r\n\r\n", expect=(204, b""))
case("HEAD with a length and no body", "9110 9.3.2", head(b"Content-Length: 5"), method="HEAD", expect=(200, b""))
case("HEAD with chunks and no body", "9110 9.3.2", CHUNKED, method="HEAD", expect=(200, b""))
case("HEAD with a body", "9112 6.3", sized(b"hello"), method="HEAD", expect=(200, b""), reused=False)
case("HEAD with chunks", "9112 6.3", CHUNKED + HELLO_CHUNKED, method="HEAD", expect=(200, b""), reused=False)
case(
    "a packet after HEAD",
    "9112 6.3",
    head(b"Content-Length: 5"),
    0.003,
    STRAY,
    method="HEAD",
    expect=(200, b""),
    reused=False,
    late=True,
)
case(
    "a body after HEAD, unseen by the loop",
    "9112 6.3",
    head(b"Content-Length: 5"),
    0.003,
    b"hello",
    method="HEAD",
    expect=(200, b""),
    reused=False,
    late=True,
    blocking=True,
)
case(
    "before the request",
    "9112 9.2",
    STRAY,
    expect=LOST,
    kinds=("handshake",),
)
case(
    "after the answer to CONNECT",
    "9110 9.3.6",
    b"HTTP/1.1 200 Yes\r\n\r\n" + STRAY,
    expect=LOST,
    kinds=("tunnel",),
    portable=Weaker(
        "httpcore drops what is behind that answer, and TLS vouches for what follows", ((200, b"/ok/case"), LOST), None
    ),
)

# Interim answers

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

case = group("1xx")
case("100 and 102", "9110 15.2", CONTINUE + b"HTTP/1.1 102 Processing\r\n\r\n" + sized(b"hello"), expect=HELLO)
case(
    "103 with headers",
    "9110 15.2",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
    0.002,
    sized(b"hello"),
    expect=HELLO,
)
case("an unknown one", "9110 15.2", b"HTTP/1.1 199 Whatever\r\n\r\n" + sized(b"hello"), expect=HELLO)
case(
    "100 with a length",
    "9112 6.3",
    head(b"Content-Length: 5", line=b"HTTP/1.1 100 Continue\r\n") + sized(b"hello"),
    expect=EITHER,
    reused=None,
)
case(
    "100 with chunks",
    "9112 6.3",
    head(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 100 Continue\r\n") + sized(b"hello"),
    expect=EITHER,
    reused=None,
)
case(
    "100 a myriad times",
    "9110 15.2",
    CONTINUE * 10_000 + sized(b"hello"),
    portable=Weaker("httpcore skips each, without a bound and slowly", (HELLO,), reused=None, within=20),
)
case(
    "103 a myriad times, with headers",
    "9110 15.2",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 10_000 + sized(b"hello"),
    portable=Weaker("httpcore skips each, without a bound and slowly", (HELLO,), reused=None, within=20),
)
case(
    "100 without end",
    "9110 15.2",
    *([CONTINUE, 0.01] * 30),
    deadline=0.15,
    expect=(DeadlineExceededError, BAD),
)
case("103 of 1 MB", "9110 15.2", b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 10**6 + b"\r\n\r\n" + sized(b"hello"))
case("100, then the end", "9110 15.2", CONTINUE, FINISH)
case("100, then garbage", "9110 15.2", CONTINUE + b"\x00\x01garbage\r\n\r\n")
case("100, then half a head", "9112 8", CONTINUE + LINE + b"Content-", FINISH)
case("after HEAD", "9110 15.2", CONTINUE + head(b"Content-Length: 5"), method="HEAD", expect=(200, b""))
case("after the answer", "9112 9.2", sized(b"hello") + CONTINUE, expect=HELLO, reused=False)
UNASKED = "httpcore hands 101 to its caller, whoever asked for it"
case(
    "101 that nobody asked for",
    "9110 7.8",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\nhello",
    portable=Weaker(UNASKED, ((101, b""), BAD)),
)
case(
    "101, then an answer",
    "9110 7.8",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + sized(b"hello"),
    portable=Weaker(UNASKED, ((101, b""), BAD)),
)

# Upgrade and tunnels

case = group("upgrade")
case(
    "426",
    "9110 15.5.22",
    sized(b"hello", b"Upgrade: h2c", b"Connection: Upgrade", line=b"HTTP/1.1 426 Upgrade Required\r\n"),
    expect=(426, b"hello"),
    reused=None,
)
case(
    "offered with 200", "9110 7.8", sized(b"hello", b"Upgrade: h2c", b"Connection: Upgrade"), expect=HELLO, reused=None
)
case(
    "101 to h2c",
    "9110 7.8",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n\0\0\0\4\0\0\0\0\0",
    portable=Weaker(UNASKED, ((101, b""), BAD)),
)
case(
    "101 by HTTP/1.0",
    "9110 7.8",
    b"HTTP/1.0 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n",
    portable=Weaker(UNASKED, ((101, b""), BAD)),
)
TUNNEL = ("tunnel",)
case(
    "CONNECT: a length with success",
    "9110 9.3.6",
    b"HTTP/1.1 200 Yes\r\nContent-Length: 5\r\n\r\n",
    expect=(200, b"/ok/case"),
    kinds=TUNNEL,
)
case(
    "CONNECT: chunks with success",
    "9110 9.3.6",
    b"HTTP/1.1 200 Yes\r\nTransfer-Encoding: chunked\r\n\r\n",
    expect=(200, b"/ok/case"),
    kinds=TUNNEL,
)
case(
    "CONNECT: 100 before success",
    "9110 15.2",
    CONTINUE + b"HTTP/1.1 200 Yes\r\n\r\n",
    expect=(200, b"/ok/case"),
    kinds=TUNNEL,
)
case(
    "CONNECT: byte by byte",
    "9110 9.3.6",
    *(bytes([byte]) for byte in b"HTTP/1.1 200 Yes\r\n\r\n"),
    expect=(200, b"/ok/case"),
    kinds=TUNNEL,
)
case(
    "CONNECT: refused",
    "9110 15.5.8",
    sized(b"no", line=b"HTTP/1.1 407 Proxy Authentication Required\r\n"),
    CUT,
    expect=LOST,
    kinds=TUNNEL,
)
case(
    "CONNECT: redirected",
    "9110 9.3.6",
    head(b"Location: https://elsewhere.invalid/", line=b"HTTP/1.1 302 Found\r\n"),
    CUT,
    expect=LOST,
    kinds=TUNNEL,
)
case("CONNECT: garbage", "9110 9.3.6", b"\x00\x01garbage\r\n\r\n", CUT, expect=LOST, kinds=TUNNEL)
case("CONNECT: cut", "9112 8", b"HTTP/1.1 200 Y", CUT, expect=LOST, kinds=TUNNEL)
case("CONNECT: closed", "9112 8", CUT, expect=LOST, kinds=TUNNEL)
case(
    "CONNECT: a header of 1 MB",
    "9110 5.4",
    b"HTTP/1.1 200 Yes\r\nX: " + b"y" * 10**6 + b"\r\n\r\n",
    CUT,
    expect=LOST,
    kinds=TUNNEL,
)
case(
    "CONNECT: 101",
    "9110 7.8",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n",
    CUT,
    expect=LOST,
    kinds=TUNNEL,
)

# Content codings

TEXT = b"hello" * 1000
BOMB = gzip.compress(bytes(16 * 2**20), mtime=0)  # 1 : 1000
RAW = zlib.compressobj(wbits=-15)
RAW_DEFLATE = RAW.compress(TEXT) + RAW.flush()


def coded(body: bytes, coding: bytes = b"gzip") -> bytes:
    return sized(body, b"Content-Encoding: " + coding)


case = group("coding")
case("gzip", "9110 8.4.1.3", coded(GZIPPED), expect=(200, TEXT))
case("x-gzip", "9110 8.4.1.3", coded(GZIPPED, b"x-gzip"), expect=((200, TEXT), (200, GZIPPED), BAD), reused=None)
case("GZIP", "9110 8.4.1", coded(GZIPPED, b"GZIP"), expect=(200, TEXT))
case("deflate", "9110 8.4.1.2", coded(zlib.compress(TEXT), b"deflate"), expect=(200, TEXT))
case("raw deflate", "9110 8.4.1.2", coded(RAW_DEFLATE, b"deflate"), expect=((200, TEXT), BAD), reused=None)
case("gzip, byte by byte", "9110 8.4.1.3", *(bytes([byte]) for byte in coded(GZIPPED)), expect=(200, TEXT))
case(
    "gzip in chunks of a byte",
    "9112 7",
    head(b"Transfer-Encoding: chunked", b"Content-Encoding: gzip")
    + b"".join(b"1\r\n%c\r\n" % byte for byte in GZIPPED)
    + b"0\r\n\r\n",
    expect=(200, TEXT),
)
case("gzip of two members", "1952 2.2", coded(GZIPPED + GZIPPED), expect=(200, TEXT * 2))
case("gzip in gzip", "9110 8.4", coded(gzip.compress(GZIPPED, mtime=0), b"gzip, gzip"), expect=(200, TEXT))
case(
    "gzip in gzip, in two fields",
    "9110 8.4",
    sized(gzip.compress(GZIPPED, mtime=0), b"Content-Encoding: gzip", b"Content-Encoding: gzip"),
    expect=(200, TEXT),
)
case("a bomb of 1 : 1000", "9110 17", coded(BOMB), expect=BAD, reused=None)
case("a bomb in a bomb", "9110 17", coded(gzip.compress(BOMB, mtime=0), b"gzip, gzip"), expect=BAD, reused=None)
case("a bomb in two members", "9110 17", coded(GZIPPED + BOMB), expect=BAD, reused=None)
case("gzip, cut", "1952 2.3", coded(GZIPPED[: len(GZIPPED) // 2]), expect=BAD, reused=None)
case("gzip, the checksum cut", "1952 2.3", coded(GZIPPED[:-8]), expect=BAD, reused=None)
case("gzip, a byte short", "1952 2.3", coded(GZIPPED[:-1]), expect=BAD, reused=None)
case("gzip, only its head", "1952 2.3", coded(GZIPPED[:10]), expect=BAD, reused=None)
case("gzip, the second member cut", "1952 2.2", coded(GZIPPED + GZIPPED[:-4]), expect=BAD, reused=None)
case("deflate, cut", "9110 8.4.1.2", coded(zlib.compress(TEXT)[:-4], b"deflate"), expect=BAD, reused=None)
case("gzip, wrong checksum", "1952 2.3", coded(GZIPPED[:-8] + b"\0\0\0\0" + GZIPPED[-4:]), expect=BAD, reused=None)
case(
    "gzip, corrupt within",
    "1952 2.3",
    coded(GZIPPED[:12] + b"\xff\xff\xff\xff" + GZIPPED[16:]),
    expect=BAD,
    reused=None,
)
case("gzip that is none", "9110 8.4", coded(b"hello"), expect=BAD, reused=None)
case("deflate that is gzip", "9110 8.4", coded(GZIPPED, b"deflate"), expect=BAD, reused=None)
case("gzip that is deflate", "9110 8.4", coded(zlib.compress(TEXT)), expect=BAD, reused=None)
case("gzip with garbage behind", "1952 2.2", coded(GZIPPED + b"garbage!"), expect=((200, TEXT), BAD), reused=None)
case("gzip of nothing", "9110 8.4", coded(b""), expect=((200, b""), BAD), reused=None)
case("an unknown coding", "9110 8.4", coded(b"hello", b"x-unheard-of"), expect=EITHER, reused=None)
case("identity", "9110 8.4", coded(b"hello", b"identity"), expect=HELLO)
case("gzip named fifty times", "9110 8.4", coded(GZIPPED, b", ".join([b"gzip"] * 50)), expect=BAD, reused=None)
case("gzip with 204", "9112 6.3", b"HTTP/1.1 204 No Content\r\nContent-Encoding: gzip\r\n\r\n", expect=(204, b""))
case(
    "gzip with HEAD",
    "9112 6.3",
    head(b"Content-Length: 99", b"Content-Encoding: gzip"),
    method="HEAD",
    expect=(200, b""),
)
case("larger than allowed", "9110 17", sized(b"x" * (2**20 + 1)), expect=BAD, reused=None)
case(
    "larger than allowed, in chunks",
    "9110 17",
    CHUNKED + (b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * 17 + b"0\r\n\r\n",
    expect=BAD,
    reused=None,
)
case("as large as allowed", "9110 17", sized(b"x" * 2**20), expect=(200, b"x" * 2**20))

# Slow servers


def drip(data: bytes, pause: float = 0.01) -> tuple[Step, ...]:
    return tuple(step for byte in data for step in (bytes([byte]), pause))


LONG = head(b"Content-Length: 40")
SOON = 0.15
case = group("slow")
case("the head drips", "9112 9.5", *drip(sized(b"hello"), 0.002), expect=HELLO)
case("the body drips", "9112 9.5", head(b"Content-Length: 5"), *drip(b"hello"), expect=HELLO)
case("chunks drip", "9112 9.5", CHUNKED, *drip(HELLO_CHUNKED, 0.002), expect=HELLO)
case("the head drips, the deadline", "9112 9.5", *drip(LONG), deadline=SOON, expect=DeadlineExceededError)
case("the body drips, the deadline", "9112 9.5", LONG, *drip(b"x" * 40), deadline=SOON, expect=DeadlineExceededError)
case(
    "chunks drip, the deadline",
    "9112 9.5",
    CHUNKED,
    *drip(b"1\r\nx\r\n" * 7),
    deadline=SOON,
    expect=DeadlineExceededError,
)
case(
    "trailers drip, the deadline",
    "9112 9.5",
    CHUNKED + b"0\r\n",
    *drip(b"X-Y: z\r\n" * 5),
    deadline=SOON,
    expect=DeadlineExceededError,
)
STALLS = {
    "no answer": b"",
    "in the status line": b"HTTP/1.1 20",
    "in a header": LINE + b"Content-Len",
    "before the body": head(b"Content-Length: 5"),
    "in the body": head(b"Content-Length: 10") + b"hello",
    "in a chunk's size": CHUNKED + b"5",
    "in a chunk": CHUNKED + b"5\r\nhel",
    "before the last chunk": CHUNKED + b"5\r\nhello\r\n",
    "before the last CRLF": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "after 100": CONTINUE,
    "before the end that delimits": LINE + b"\r\nhello",
    "in gzip": head(b"Content-Encoding: gzip", b"Content-Length: 999") + GZIPPED,
}
for name, sent in STALLS.items():
    case(f"stalled: {name}", "9112 9.5", *([sent] if sent else []), expect=LATE)
for name in ("no answer", "in a header", "in the body", "in a chunk"):
    case(
        f"stalled, the deadline: {name}",
        "9112 9.5",
        *([STALLS[name]] if STALLS[name] else []),
        deadline=SOON,
        timeout=5,
        expect=DeadlineExceededError,
    )
case("CONNECT stalled", "9112 9.5", b"HTTP/1.1 200 Y", 0.4, CUT, expect=LATE, kinds=TUNNEL)

# Not HTTP/1.1

case = group("garbage")
case("HTTP/0.9", "9112 2.3", b"<html>hello</html>", FINISH)
case(
    "HTTP/2's first frame",
    "9113 3.4",
    b"\0\0\x12\4\0\0\0\0\0\0\3\0\0\0\x80\0\4\0\1\0\0\0\5\0\xff\xff\xff",
    portable=Weaker(NO_LINE_YET, (LATE, BAD)),
)
case("HTTP/2's preface", "9113 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
case("a TLS alert", "8446 6", b"\x15\x03\x01\x00\x02\x02\x28", portable=Weaker(NO_LINE_YET, (LATE, BAD)))
case("SSH", "4253 4.2", b"SSH-2.0-OpenSSH_9.6\r\n", portable=Weaker(NO_LINE_YET, (LATE, BAD)))
case("SMTP", "5321 4.2", b"220 mail.invalid ESMTP\r\n", portable=Weaker(NO_LINE_YET, (LATE, BAD)))
case("ICY", "9112 2.3", sized(b"hello", line=b"ICY 200 OK\r\n"))
case("http in small letters", "9112 2.3", sized(b"hello", line=b"http/1.1 200 OK\r\n"))
case("a request", "9112 2.1", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
case("NULs", "9112 2.1", bytes(200_000))
case("line ends only", "9112 2.2", b"\r\n" * 100, portable=Weaker(NO_LINE_YET, (LATE, BAD)), expect=(BAD, LATE))
case("random bytes", "9112 2.1", bytes((n * 7919) % 251 for n in range(5000)) + b"\r\n\r\n")
case("a body without a head", "9112 2.1", b'{"hello": 1}\r\n\r\n')
case("the head twice", "9112 2.1", LINE + sized(b"hello"))


def timeout_of(case: Case, outcomes: tuple[Outcome, ...]) -> httpx.Timeout:
    """Short where it is what ends the case."""
    short = case.timeout if case.timeout is not None else 0.1 if LATE in outcomes else 2.0
    return httpx.Timeout(short, pool=None)
