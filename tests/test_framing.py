"""What is made of the bytes that answer a request, and what is let out as one; without a socket."""

from __future__ import annotations

import itertools
import random
from typing import Any

import attrs
import httpcore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_async import _framing
from layer_async._framing import HEAD, IDLE, RAW, AnswerReader, framed, merged, request_head

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@attrs.frozen
class Read:
    """What an answer came to."""

    status: int
    reason: bytes
    version: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes
    keeps_alive: bool
    is_followed: bool


def read(pieces: list[bytes], *, ends: bool = False, has_no_body: bool = False, is_cut: bool = False) -> Read:
    reader = AnswerReader()
    reader.begin(HEAD, has_no_body=has_no_body)
    for piece in pieces:
        reader.feed(piece)
    if ends:
        reader.end(is_cut=is_cut)
    assert reader.is_answered, "the head is not complete"
    assert reader.stage == IDLE, "the answer is not complete"
    head = reader.head
    assert reader.unread == sum(map(len, reader.pieces))
    return Read(
        head.status, head.reason, head.version, head.fields, reader.take(), reader.keeps_alive, reader.is_followed
    )


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


# Name, bytes, body, whether the connection can go on (but for what follows), whether the answer needs the end
CLOSE = OK + b"connection: x\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n"
VALID: dict[str, tuple[bytes, bytes, bool, bool]] = {
    "length": (OK + b"Content-Length: 5\r\nX-Y:  z \r\n\r\nhello", b"hello", True, False),
    "no body": (OK + b"content-length: 0\r\n\r\n", b"", True, False),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx", b"x", True, False),
    "an empty field": (OK + b"X:\r\nContent-Length: 1\r\n\r\nx", b"x", True, False),
    "odd bytes": (OK + b"X: \xff\xfe\r\nContent-Length: 1\r\n\r\nx", b"x", True, False),
    "close": (OK + b"Connection: x, Close\r\nContent-Length: 1\r\n\r\nx", b"x", False, False),
    "two connection fields": (CLOSE + b"Connection: close\r\nContent-Length: 0\r\n\r\n", b"", False, False),
    "keep-alive": (OK + b"Connection: keep-alive\r\nContent-Length: 1\r\n\r\nx", b"x", True, False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx", b"x", False, False),
    "chunked": (CHUNKED + b"3\r\nabc\r\n0005;x=y\r\ndefgh\r\n0\r\n\r\n", b"abcdefgh", True, False),
    "chunked, empty": (CHUNKED + b"0\r\n\r\n", b"", True, False),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\nA: 1\r\nB: 2\r\n\r\n", b"x", True, False),
    "CHUNKED": (OK + b"transfer-encoding: CHUNKED\r\n\r\n1\r\nx\r\n0\r\n\r\n", b"x", True, False),
    "until the end": (OK + b"\r\nall of it", b"all of it", False, True),
    "until the end, empty": (OK + b"\r\n", b"", False, True),
    "204": (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", b"", True, False),
    "304": (b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", b"", True, False),
    "interim": (INTERIM + OK + b"Content-Length: 1\r\n\r\nx", b"x", True, False),
    "a status nobody knows": (b"HTTP/1.1 799 Odd\r\nContent-Length: 1\r\n\r\nx", b"x", True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_a_valid_answer_is_read(name: str) -> None:
    data, body, keeps_alive, ends = VALID[name]
    found = read([data], ends=ends)
    assert (found.body, found.keeps_alive, found.is_followed) == (body, keeps_alive, ends)
    assert (b"Link", b"x") not in found.fields
    assert found.version == data[:8]
    if name == "length":
        assert found == Read(
            200, b"OK", b"HTTP/1.1", [(b"Content-Length", b"5"), (b"X-Y", b"z")], b"hello", True, False
        )


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(VALID)), st.lists(st.integers(0, 1000), max_size=12))
def test_any_split_of_a_valid_answer_gives_the_same(name: str, cuts: list[int]) -> None:
    data, _, _, ends = VALID[name]
    assert read(split(data, cuts), ends=ends) == read([data], ends=ends)


@pytest.mark.parametrize("name", VALID)
def test_byte_by_byte_it_is_the_same(name: str) -> None:
    data, _, _, ends = VALID[name]
    assert read([bytes([byte]) for byte in data], ends=ends) == read([data], ends=ends)


STRAYS = [
    *(b"x", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"0\r\n\r\n"),
    OK + b"Content-Length: 5\r\n\r\nSTRAY",
    CHUNKED + b"1\r\ny\r\n0\r\n\r\n",
]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(name for name in VALID if not VALID[name][3])),
    st.sampled_from(STRAYS),
    st.lists(st.integers(0, 1000), max_size=6),
)
def test_what_follows_an_answer_is_noticed_and_no_part_of_it(name: str, stray: bytes, cuts: list[int]) -> None:
    data = VALID[name][0]
    assert read(split(data + stray, cuts)) == attrs.evolve(read([data]), is_followed=True)


@pytest.mark.parametrize("stray", [b"", *STRAYS])
@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b""])
def test_no_body_answers_a_head_request(framing: bytes, stray: bytes) -> None:
    found = read([OK + framing + b"\r\n" + stray], has_no_body=True)
    assert (found.body, found.is_followed, found.keeps_alive) == (b"", bool(stray), True)


INVALID: dict[str, bytes] = {
    "not HTTP": b"\x00\x01",
    "SSH": b"SSH-2.0-OpenSSH",
    "RTSP": b"RTSP/1.0 200 OK\r\n\r\n",
    "ICY": b"ICY 200 OK\r\n\r\n",
    "H and more": b"Hello\r\n\r\n",
    "line ends first": b"\r\n" + OK,
    "only line ends": b"\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\n\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1 \r\n\r\n",
    "a status of two digits": b"HTTP/1.1 99 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "two spaces": b"HTTP/1.1  200 OK\r\n\r\n",
    "101": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc",
    "101, bare": b"HTTP/1.1 101 Switching\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\n\n",
    "bare LF in a field": OK + b"X: 1\nY: 2\r\n\r\n",
    "bare CR in a field": OK + b"X: 1\rY: 2\r\n\r\n",
    "NUL in a field": OK + b"X: 1\x002\r\n\r\n",
    "space before the colon": OK + b"Content-Length : 5\r\n\r\nhello",
    "no colon": OK + b"nonsense\r\n\r\n",
    "no name": OK + b": x\r\n\r\n",
    "obs-fold": OK + b"X: a\r\n b\r\n\r\n",
    "obs-fold first": OK + b" X: a\r\n\r\n",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "the same length twice": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a list of lengths": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "a negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "a length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "a length in hexadecimals": OK + b"Content-Length: 0x5\r\n\r\nhello",
    "an endless length": OK + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "a length beyond all files": OK + b"Content-Length: 9999999999999999999\r\n\r\n",
    "an empty length": OK + b"Content-Length: \r\n\r\n",
    "length and coding": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding and length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, gzip": OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "identity": OK + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no chunk size": CHUNKED + b"\r\n",
    "a negative chunk": CHUNKED + b"-1\r\n",
    "0x": CHUNKED + b"0x1\r\nx\r\n",
    "space behind the size": CHUNKED + b"1 \r\nx\r\n0\r\n\r\n",
    "bare LF behind the size": CHUNKED + b"1\nx\r\n0\r\n\r\n",
    "a chunk too long": CHUNKED + b"1\r\nxy\r\n0\r\n\r\n",
    "a chunk too short": CHUNKED + b"3\r\nx\r\n0\r\n\r\n",
    "a size beyond all bounds": CHUNKED + b"fffffffffffffffff\r\n",
    "a length among the trailers": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    "a broken trailer": CHUNKED + b"0\r\nbad trailer\r\n\r\n",
    "a long head": OK + b"X: " + b"x" * 200_000,
    "a long status line": b"HTTP/1.1 200 " + b"x" * 200_000,
    "many fields": OK + b"X: y\r\n" * 1100 + b"\r\n",
    "a flood of interim answers": b"HTTP/1.1 102 Wait\r\n\r\n" * 100,
    "long interim answers": (b"HTTP/1.1 103 Hints\r\nLink: " + b"x" * 50_000 + b"\r\n\r\n") * 3,
    "endless trailers": CHUNKED + b"0\r\n" + b"X: y\r\n" * 50_000,
    "an endless chunk extension": CHUNKED + b"1;" + b"x" * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("size", [1 << 30, 4096])
@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_answer_is_an_error(name: str, size: int) -> None:
    data = INVALID[name]
    with pytest.raises(httpcore.RemoteProtocolError):
        read([data[start : start + size] for start in range(0, len(data), size)])


def test_what_an_honest_server_may_send_is_within_the_bounds() -> None:
    assert len(read([OK + b"X: y\r\n" * 256 + b"Content-Length: 0\r\n\r\n"]).fields) == 257
    assert read([OK + b"X: " + b"y" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n"]).status == 200
    tiny = CHUNKED + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"
    assert read([tiny[start : start + 65536] for start in range(0, len(tiny), 65536)]).body == b"x" * 50_000


def test_a_flood_of_tiny_chunks_is_one_piece_for_each_time_something_came() -> None:
    reader = AnswerReader()
    reader.begin(HEAD)
    reader.feed(CHUNKED)
    reader.feed(b"1\r\nx\r\n" * 10_000)
    assert reader.pieces == [b"x" * 10_000]


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("data", [b"", OK, OK + b"Content-Length: 5\r\n\r\nhell", CHUNKED + b"5\r\nhell", INTERIM])
def test_an_answer_that_breaks_off_is_an_error(data: bytes, is_cut: bool) -> None:
    match = "cut" if is_cut and data else "without sending" if not data or data[9:12] == b"100" else "disconn|complete"
    with pytest.raises(httpcore.RemoteProtocolError, match=match):
        read([data] if data else [], ends=True, is_cut=is_cut)


def test_a_body_that_only_the_end_delimits_must_not_be_cut() -> None:
    with pytest.raises(httpcore.RemoteProtocolError, match="cut"):
        read([OK + b"\r\nhalf"], ends=True, is_cut=True)
    assert read([OK + b"Content-Length: 1\r\n\r\nx"], ends=True, is_cut=True).is_followed


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 5), st.lists(st.integers(0, 300), max_size=4), st.booleans())
def test_any_bytes_give_an_answer_or_a_typed_error(tail: bytes, kind: int, cuts: list[int], is_cut: bool) -> None:
    start = [b"", b"HTTP/1.1 ", OK, CHUNKED, OK + b"Content-Length: ", CHUNKED + b"3\r\nabc\r\n"][kind]
    reader = AnswerReader()
    reader.begin(HEAD)
    try:
        for piece in split(start + tail, cuts):
            reader.feed(piece)
        reader.end(is_cut=is_cut)
    except httpcore.RemoteProtocolError:
        return
    assert reader.is_answered
    assert reader.stage == IDLE


def test_mutations_of_valid_answers_give_an_answer_or_a_typed_error() -> None:
    chance, answered = random.Random(1), 0
    for _ in range(1000):
        data = bytearray(chance.choice(list(VALID.values()))[0])
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.choice(b"\r\n\0 :;0159afGH/.,\xff")
        reader = AnswerReader()
        reader.begin(HEAD)
        try:
            for piece in split(bytes(data), [chance.randrange(1000) for _ in range(3)]):
                reader.feed(piece)
            reader.end(is_cut=chance.random() < 0.5)
        except httpcore.RemoteProtocolError:
            continue
        answered += 1
        assert reader.is_answered
        assert reader.stage == IDLE
    assert 100 < answered < 900


def test_a_reader_serves_one_answer_after_the_other() -> None:
    reader = AnswerReader()
    for data in (
        CHUNKED + b"1\r\nx\r\n0\r\nT: u\r\n\r\n",
        OK + b"Content-Length: 1\r\n\r\nx",
        CHUNKED + b"1\r\nx\r\n0\r\n\r\n",
    ):
        reader.begin(HEAD)
        reader.feed(data)
        assert (reader.take(), reader.is_followed, reader.head.reason) == (b"x", False, b"OK")


def test_what_is_no_http_yet_is_passed_on() -> None:
    reader = AnswerReader()
    reader.begin(RAW)
    reader.feed(b"one")
    reader.feed(b"two")
    assert reader.take() == b"onetwo"
    reader.end(is_cut=True)
    assert reader.stage == IDLE


# Requests

HOST = (b"Host", b"x")


def test_a_request_is_written_as_it_was_given() -> None:
    head = request_head(b"GET", b"/a?b=c", [HOST, (b"X-Empty", b""), (b"X", b"a  b\tc \xe9"[:-2])])
    assert head == (b"GET /a?b=c HTTP/1.1\r\nHost: x\r\nX-Empty: \r\nX: a  b\tc\r\n\r\n", b"", 0, True)
    assert request_head(b"M-X", b"*", [HOST, (b"Content-Length", b"7")]) == (
        b"M-X * HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\n", b"", 7, True,
    )  # fmt: skip
    made: Any = request_head(b"PUT", b"/", [HOST, (b"transfer-encoding", b"Chunked"), (b"Connection", b"x, Close")])
    assert made[2:] == (-1, False)
    assert request_head(b"PUT", b"/", [HOST, (b"Connection", b"keep-alive")])[3] is True


SECRET = b"s3cret"
REFUSED: dict[str, tuple[bytes, bytes, list[tuple[bytes, bytes]]]] = {
    "a method": (b"GE T", b"/", [HOST]),
    "a method with a line end": (b"GET\r\n", b"/", [HOST]),
    "no method": (b"", b"/", [HOST]),
    "no target": (b"GET", b"", [HOST]),
    "a space in the target": (b"GET", b"/ s3cret", [HOST]),
    "a line end in the target": (b"GET", b"/\r\ns3cret", [HOST]),
    "a target beyond ASCII": (b"GET", b"/\xe9s3cret", [HOST]),
    "a space in a name": (b"GET", b"/", [HOST, (b"s3cret x", b"y")]),
    "a colon in a name": (b"GET", b"/", [HOST, (b"s3cret:", b"y")]),
    "no name": (b"GET", b"/", [HOST, (b"", b"s3cret")]),
    "a line end in a value": (b"GET", b"/", [HOST, (b"X", b"s3cret\r\nToken1: y")]),
    "LF in a value": (b"GET", b"/", [HOST, (b"X", b"s3cret\nY: z")]),
    "CR in a value": (b"GET", b"/", [HOST, (b"X", b"s3cret\rz")]),
    "LF and CR in two values": (b"GET", b"/", [HOST, (b"X", b"s3cret\n"), (b"Y", b"\r")]),
    "NUL in a value": (b"GET", b"/", [HOST, (b"X", b"s3cret\0")]),
    "DEL in a value": (b"GET", b"/", [HOST, (b"X", b"s3cret\x7f")]),
    "space before a value": (b"GET", b"/", [HOST, (b"X", b" s3cret")]),
    "space behind a value": (b"GET", b"/", [HOST, (b"X", b"s3cret ")]),
    "tab before a value": (b"GET", b"/", [HOST, (b"X", b"\ts3cret")]),
    "no host": (b"GET", b"/", []),
    "two hosts": (b"GET", b"/", [HOST, HOST]),
    "two lengths": (b"PUT", b"/", [HOST, (b"Content-Length", b"5"), (b"Content-Length", b"5")]),
    "length and coding": (b"PUT", b"/", [HOST, (b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")]),
    "no length": (b"PUT", b"/", [HOST, (b"Content-Length", b"s3cret")]),
    "an endless length": (b"PUT", b"/", [HOST, (b"Content-Length", b"9" * 30)]),
    "another coding": (b"PUT", b"/", [HOST, (b"Transfer-Encoding", b"s3cret")]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_and_not_quoted(name: str) -> None:
    refusal = request_head(*REFUSED[name])
    assert isinstance(refusal, str)
    assert "s3cret" not in refusal


@pytest.mark.parametrize(
    ("field", "says_more"),
    [
        (b"Content-Encoding: gzip", True),
        (b"CONTENT-encoding: gzip", True),
        (b"RateLimit: x", True),
        (b"X-Rate-Limit-Reset: 1", True),
        (b"Content-Type: limit", False),
        (b"Host: a", False),
        (b"Connection: limit", False),
    ],
)
def test_fields_that_others_look_for_in_each_answer_are_noticed(field: bytes, says_more: bool) -> None:
    for _ in range(2):  # met for the first time, and known
        reader = AnswerReader()
        reader.begin(HEAD)
        reader.feed(OK + b"Content-Length: 0\r\n" + field + b"\r\n\r\n")
        assert reader.head.says_more is says_more
        reader.begin(HEAD)
        assert not reader.head.says_more


def test_names_of_answers_that_vary_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_framing, "_kinds", {})
    for number in range(1200):
        assert read([OK + b"X-%d: 1\r\ncontent-LENGTH: 1\r\n\r\na" % number]).body == b"a"
    assert len(_framing._kinds) == 1000
    assert read([OK + b"CONTENT-length: 1\r\n\r\na"]).body == b"a"


def test_names_that_vary_are_not_remembered_without_end() -> None:
    before = dict(_framing._names)
    try:
        for number in range(1100):
            assert isinstance(request_head(b"GET", b"/", [HOST, (b"X-%d" % number, b"y")]), tuple)
        assert len(_framing._names) == 1000
    finally:
        _framing._names.clear()
        _framing._names.update(before)


def test_a_body_is_framed_as_its_head_says() -> None:
    assert framed((b"h", b"", 3, True), b"abc") == (b"h", b"abc", 3, True)
    assert framed((b"h", b"", -1, True), b"abc") == (b"h", b"3\r\nabc\r\n0\r\n\r\n", -1, True)
    assert framed((b"h", b"", -1, True), b"") == (b"h", b"0\r\n\r\n", -1, True)
    assert framed((b"h", b"", 3, True), b"s3cret") == "the body of the request has 6 bytes, its head announces 3"


def test_fields_of_the_request_take_the_place_of_a_proxys() -> None:
    assert merged([(b"A", b"1"), (b"B", b"2")], [(b"a", b"3"), (b"C", b"4")]) == [
        (b"B", b"2"), (b"a", b"3"), (b"C", b"4"),
    ]  # fmt: skip
