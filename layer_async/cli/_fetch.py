"""`layer-async fetch`: many documents, or the items of many collections, one line of JSON for each.

Rules: an item is settled once its lines are in the output whole, or its failure is told; never before. With `--resume`
each key is in the output exactly once, whatever ended the runs before.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import IO, Annotated, Any, Literal

import anyio
import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from .. import (
    AsyncLayerClient,
    AuthenticationError,
    ConfigurationError,
    Event,
    LayerError,
    MissingTokensError,
    Observer,
    Outcome,
    Pacing,
    ResponseDecodeError,
)
from ._files import FileName, Lines, complain, reading
from ._get import document
from ._items import Item, ObjectReader, PageStrategy, item_of_line, pages_strategy, stop_rule
from ._progress import Tally, showing
from ._resume import Results, open_results

REFUSALS = 1000  # so many may wait for the end to be told
SPOOLED = 2**20  # so much of a collection is kept in memory

FLAG = Parameter(negative="", show_default=False)

Found = bytes | IO[bytes]
Call = Callable[[Item], Awaitable[Found]]


def at_least_one(_: type, value: int | str) -> None:
    """Refuse what is no number of workers."""
    if isinstance(value, int) and value < 1:
        raise ValueError("at least one worker is needed.")


def fetch(
    source: FileName,
    /,
    *,
    out: FileName,
    resume: Annotated[bool, FLAG] = False,
    retry_failed: Annotated[bool, FLAG] = False,
    force: Annotated[bool, FLAG] = False,
    errors: FileName | None = None,
    key: str | None = None,
    path: str | None = None,
    pages: str | None = None,
    items: str | None = None,
    workers: Annotated[Literal["auto"] | int, Parameter(validator=at_least_one)] = "auto",
    rate: Annotated[float | None, Parameter(validator=Number(gt=0))] = None,
    stop_when: str | None = None,
    observer: Annotated[Observer | None, Parameter(parse=False)] = None,
) -> int:
    """GET many documents, concurrently, and write one line of JSON for each.

    A line is {"path": ..., "value": ...}, in the order of completion. Failures are told on stderr and do not end the
    run; it then exits with 3. An outage is waited out. Where the server refuses the tokens for good, the run ends, and
    exits with 1. Whatever ends a run with --resume, the same command goes on with it.

    Parameters
    ----------
    source: str
        A file with one path in each line, or - for stdin. Blank lines and lines that start with # are skipped.
    out: str
        The file to write, or - for stdout. It must not exist yet, but for --resume and --force.
    resume: bool
        Go on where the last run into this file was ended, in whatever way; or begin, if there was none. What is done is
        noted beside the file, in OUT.journal, with the keys as they are; the file gets each key exactly once.
    retry_failed: bool
        With --resume, try those again that failed in an earlier run.
    force: bool
        Begin anew: the file, and its journal, are overwritten.
    errors: str
        A file to write failures to, one line of JSON for each; with --resume they are added to it.
    key: str
        Each line of input is a JSON object, and this field of it names the document; the line of output has it as
        "key".
    path: str
        Each line of input is a JSON object, and this field of it is the path; by default "path".
    pages: str
        Each path is a collection in pages, and each of its items a line: number, offset, cursor, next (a link in the
        page) or link (in the header Link); with settings, as in number:size=100,size_param=page_size.
    items: str
        With --pages: where in a page the items are, such as data.items; by default the page itself is the list.
    workers: int | str
        How many calls at a time, or auto: half the connections.
    rate: float
        The quota, where it is known, in calls a second; by default it is learned.
    stop_when: str
        End the run early, after so many failures (100), or when such a share of the items fails (5%).
    """
    parse = item_of_line if key is None and path is None else ObjectReader(source, key, path or "path")
    strategy = None if pages is None else pages_strategy(pages)
    if items is not None and strategy is None:
        raise ConfigurationError("--items is for --pages.")
    options: dict[str, Any] = {"workers": None if workers == "auto" else workers}
    if stop_when is not None:
        options["stop_when"] = stop_rule(stop_when)
    tally = Tally("fetched")

    def observe(event: Event) -> None:
        tally.observe(event)
        if observer is not None:
            observer(event)

    async def main() -> None:
        pacing = Pacing(rate=rate)
        async with AsyncLayerClient(follow_redirects=True, observer=observe, pacing=pacing) as client:
            tally.pace = lambda: client.pace
            call = pages_call(client, strategy, items) if strategy else document_call(client)
            try:
                with open_results(
                    out, errors=errors, source=file, resume=resume, retry_failed=retry_failed, force=force
                ) as results:
                    tally.lines, tally.results = lines, results
                    bulk = client.bulk(lines.read(), call, key=lambda item: item.key, journal=results.ledger, **options)
                    with showing(tally, is_output_on_terminal=out == "-" and os.isatty(1)):
                        async with bulk as outcomes:
                            tally.outcomes = outcomes
                            await write_outcomes(outcomes, results, tally)
                            tally.has_ended = outcomes.stopped is None
            finally:
                if tally.results is not None:
                    complain(tally.summary(tally.results))

    with reading(source) as file:
        lines = Lines(source, file, parse)
        anyio.run(main)
    return 0 if tally.is_complete else 3


def document_call(client: AsyncLayerClient) -> Call:
    """What makes the one line of an item."""

    async def call(item: Item) -> bytes:
        body = await document(client, sendable(item.path))
        return line_of(item, body)

    return call


def pages_call(client: AsyncLayerClient, strategy: PageStrategy, items: str | None) -> Call:
    """What makes the lines of an item that is a collection: kept, on the disk if need be, until all are there."""

    async def call(item: Item) -> IO[bytes]:
        kept = tempfile.SpooledTemporaryFile(SPOOLED)  # noqa: SIM115 (whoever writes it closes it)
        try:
            async for value in client.paginate(sendable(item.path), pages=strategy, items=items, into=msgspec.Raw):
                kept.write(line_of(item, bytes(value)))
        except BaseException:
            kept.close()
            raise
        return kept

    return call


def sendable(path: str) -> str:
    """`path`; raises `ConfigurationError` when its line was not text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigurationError("this line is not UTF-8.") from None
    return path


def line_of(item: Item, body: bytes) -> bytes:
    """The line for a document: its names, and its body, of which only the white space is changed."""
    try:
        msgspec.json.decode(body)  # `format` does not look into texts and numbers
        value = msgspec.Raw(msgspec.json.format(body, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ResponseDecodeError(
            "the answer is not JSON." if body else "the answer is empty, which no JSON is."
        ) from None
    return msgspec.json.encode({**item.names, "value": value}) + b"\n"


async def write_outcomes(
    outcomes: AsyncIterable[Outcome[str | int, Found, Item]], results: Results, tally: Tally
) -> None:
    """Write each outcome that is a document, and tell of each that is not.

    Refused tokens are told at the end of the run, unless that comes by the one error that says so for all of them.
    """
    refused: deque[Outcome[str | int, Found, Item]] = deque()

    def fail(outcome: Outcome[str | int, Found, Item]) -> None:
        assert isinstance(outcome.error, LayerError)
        tally.fail(str(outcome.key), outcome.error)
        results.write_error(outcome.item.names, outcome.error, outcome.attempts)

    try:
        async for outcome in outcomes:
            error = outcome.error
            if error is None:
                await results.output.write(outcome.unwrap())
                tally.count()
            elif isinstance(error, MissingTokensError):  # from files that went away: no item fares better
                raise error
            elif isinstance(error, AuthenticationError):
                refused.append(outcome)
                if len(refused) > REFUSALS:
                    fail(refused.popleft())
            elif isinstance(error, LayerError):
                fail(outcome)
            else:
                raise error
    except AuthenticationError:
        refused.clear()
        raise
    finally:
        for outcome in refused:
            fail(outcome)
