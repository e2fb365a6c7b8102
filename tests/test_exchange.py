"""What is known of an exchange: its record, whether its body can be sent again, Retry-After."""

from __future__ import annotations

import email.utils
import io
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import attrs
import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layer_async._errors import AttemptInfo
from layer_async._exchange import (
    EXTENSION,
    ExchangeRecord,
    is_replayable,
    retry_after,
)

URL = "https://api.example/things"
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"

REPEATABLE = settings(derandomize=True, deadline=None, database=None)


# The record


def test_a_request_without_a_record_gets_one_in_which_nothing_is_known() -> None:
    request = httpx.Request("GET", URL)
    record = ExchangeRecord.of(request)
    assert request.extensions[EXTENSION] is record
    assert ExchangeRecord.of(request) is record
    assert (record.bytes_written, record.response_started, record.head_received, record.reused) == (None,) * 4


def test_what_somebody_else_put_in_its_place_is_not_taken_for_a_record() -> None:
    request = httpx.Request("GET", URL, extensions={EXTENSION: "mine"})
    assert isinstance(ExchangeRecord.of(request), ExchangeRecord)


@pytest.mark.anyio
async def test_a_request_that_follows_a_redirect_shares_the_record() -> None:
    records: list[ExchangeRecord] = []

    def handler(request: httpx.Request) -> httpx.Response:
        records.append(ExchangeRecord.of(request))
        return httpx.Response(200) if request.url.path == "/new" else httpx.Response(307, headers={"Location": "/new"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(handler), follow_redirects=True) as client:
        await client.get(URL)
    assert len(records) == 2
    assert records[0] is records[1]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="it is about how CPython keeps attributes")
def test_a_record_has_no_dict_even_where_many_were_made_at_once() -> None:
    # In a process of its own: what the first thirty records of a process have is for all that follow.
    code = (
        "import gc; from layer_async._exchange import ExchangeRecord; "
        "queue = [ExchangeRecord() for _ in range(100)]; "
        "[setattr(queue[0], name, None) for name in ExchangeRecord.__annotations__]; "
        "print(any(type(each) is dict for each in gc.get_referents(queue[0])))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_new_attempt_forgets_the_transports_notes_and_nothing_else() -> None:
    attempt = AttemptInfo(1, "503", 503, 0.1)
    record = ExchangeRecord(
        bytes_written=10,
        response_started=True,
        head_received=True,
        reused=True,
        attempts=(attempt,),
        maybe_processed=True,
        idempotent=True,
        is_patient=True,
        fresh=True,
    )
    record.says_more = False
    record.begin_attempt()
    assert (record.bytes_written, record.response_started, record.head_received, record.reused) == (None,) * 4
    assert record.says_more is None
    assert record.attempts == (attempt,)
    assert (record.maybe_processed, record.idempotent, record.is_patient) == (True, True, True)
    assert record.fresh


@attrs.define
class Slot:
    released: int = 0

    def release(self) -> None:
        self.released += 1


def test_a_slot_is_given_back_once() -> None:
    slot = Slot()
    record = ExchangeRecord(slot=slot)
    record.release_slot()
    record.release_slot()
    assert slot.released == 1
    assert record.slot is None


# Whether a body can be sent once more


async def async_chunks() -> AsyncGenerator[bytes, None]:
    yield b"chunk"


def chunks() -> Iterator[bytes]:
    yield b"chunk"


class Pipe(io.BytesIO):
    """A file that cannot go back."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation


class Unknown(httpx.AsyncByteStream):
    """A body of which httpx knows nothing."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"chunk"  # pragma: no cover - asked about, never read


class ReadOnly:
    """As little of a file as httpx accepts."""

    def read(self, size: int = -1) -> bytes:
        return b""


def put(**options: Any) -> httpx.Request:
    return httpx.Request("PUT", URL, **options)


@pytest.mark.parametrize(
    "request_",
    [
        httpx.Request("GET", URL),
        put(content=b"bytes"),
        put(content="text"),
        put(json={"a": 1}),
        put(data={"a": "1"}),
        put(content=async_chunks()),
        put(content=chunks()),
        put(files={"f": io.BytesIO(b"file")}),
        put(files={"f": ("name", b"bytes")}),
        put(files={"f": ("name", "text")}, data={"a": "1", "b": ["2", "3"]}),
        put(files=[("f", io.BytesIO(b"1")), ("f", io.BytesIO(b"2"))]),
    ],
    ids=[
        "no body",
        "bytes",
        "text",
        "json",
        "form",
        "async generator, not begun",
        "generator, not begun",
        "file",
        "bytes as a file",
        "text as a file, and fields",
        "two files",
    ],
)
def test_bodies_that_can_be_sent_again(request_: httpx.Request) -> None:
    assert is_replayable(request_)


@pytest.mark.parametrize(
    "request_",
    [
        put(stream=Unknown()),
        put(files={"f": Pipe(b"file")}),
        put(files=[("f", io.BytesIO(b"1")), ("f", Pipe(b"2"))]),
        put(files={"f": ReadOnly()}),
    ],
    ids=["unknown", "file that cannot seek", "one of two files", "hardly a file"],
)
def test_bodies_that_cannot(request_: httpx.Request) -> None:
    assert not is_replayable(request_)


@pytest.mark.anyio
async def test_a_body_that_was_begun_cannot_be_sent_again_whoever_began_it() -> None:
    request = put(content=async_chunks())
    assert isinstance(request.stream, httpx.AsyncByteStream)
    stream = request.stream.__aiter__()
    assert isinstance(stream, AsyncGenerator)
    await anext(stream)
    assert not is_replayable(request)
    assert [chunk async for chunk in stream] == []


def test_a_generator_that_was_begun_cannot_be_sent_again() -> None:
    request = put(content=chunks())
    assert isinstance(request.stream, httpx.SyncByteStream)
    assert list(request.stream) == [b"chunk"]
    assert not is_replayable(request)


@pytest.mark.anyio
async def test_a_body_that_was_read_into_memory_can_be_sent_again() -> None:
    request = put(content=async_chunks())
    await request.aread()
    assert is_replayable(request)


def test_a_file_that_was_closed_meanwhile_cannot_be_sent_again() -> None:
    with tempfile.TemporaryFile() as file:
        request = put(files={"f": file})
        assert is_replayable(request)
    assert not is_replayable(request)


# Retry-After


def asked(value: str | bytes, date: str | None = None) -> float | None:
    headers = [(b"Retry-After", value.encode() if isinstance(value, str) else value)]
    if date is not None:
        headers.append((b"Date", date.encode()))
    return retry_after(httpx.Response(503, headers=headers))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1", 1.0), ("120", 120.0), ("007", 7.0), (" 5\t", 5.0), ("9999999999", 9999999999.0)],
)
def test_digits_are_seconds(value: str, seconds: float) -> None:
    assert asked(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0",
        "0000000000",
        "-1",
        "+1",
        "1.5",
        "1e3",
        "1,2",
        "1 2",
        "1s",
        "0x10",
        "1_000",
        "NaN",
        "inf",
        "10000000000",
        "9" * 4000,
        "soon",
        "GMT",
        "99999 GMT",
        "Wed, 99 Oct 2015 07:28:00 GMT",
        "Wed, 21 Oct 99999 07:28:00 GMT",
    ],
)
def test_anything_else_says_nothing_usable(value: str) -> None:
    assert asked(value, DATE) is None


@pytest.mark.parametrize("value", ["\u0661\u0662", "\uff11\uff12", "\u00b2"])
def test_digits_of_other_scripts_say_nothing(value: str) -> None:
    assert asked(value.encode()) is None
    assert asked(value.encode("utf-16-be")) is None


def test_no_retry_after_says_nothing() -> None:
    assert retry_after(httpx.Response(503)) is None


def test_two_of_them_are_a_list_and_say_nothing() -> None:
    assert retry_after(httpx.Response(503, headers=[("Retry-After", "1"), ("Retry-After", "2")])) is None


@pytest.mark.parametrize(
    ("until", "seconds"),
    [
        ("Sun, 06 Nov 1994 08:49:38 GMT", 1.0),
        ("Sun, 06 Nov 1994 08:51:37 GMT", 120.0),
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60.0),
        ("Mon, 06 Nov 1995 08:49:37 GMT", 365 * 86400.0),
    ],
)
def test_a_date_is_measured_against_the_responses_own(until: str, seconds: float) -> None:
    assert asked(until, DATE) == seconds


@pytest.mark.parametrize("until", [DATE, "Sun, 06 Nov 1994 08:49:36 GMT", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_date_that_is_not_ahead_says_nothing(until: str) -> None:
    assert asked(until, DATE) is None


@pytest.mark.parametrize("date", [None, "", "now", "Sun, 06 Nov 1994 08:49:37 +0000"])
def test_a_date_without_a_date_to_measure_it_against_says_nothing(date: str | None) -> None:
    assert asked("Fri, 31 Dec 2100 23:59:59 GMT", date) is None


@given(st.integers(1, 10**9), st.integers(0, 4 * 10**9))
@REPEATABLE
def test_every_date_ahead_is_as_many_seconds_away_as_it_is(ahead: int, now: int) -> None:
    until = email.utils.formatdate(now + ahead, usegmt=True)
    assert asked(until, email.utils.formatdate(now, usegmt=True)) == ahead


ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)


@given(st.one_of(ASCII, ASCII.map(lambda text: text + " GMT"), st.from_regex(r"\A[0-9:, A-Z-]{0,40}GMT\Z")))
@example("Sun, 06 Nov 1994 08:49:37 GMT")
@settings(REPEATABLE, max_examples=50)
def test_whatever_a_server_says_is_a_wait_or_nothing(value: str) -> None:
    for date in (DATE, value):
        seconds = asked(value, date)
        assert seconds is None or seconds > 0
