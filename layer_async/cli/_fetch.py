"""`layer-async fetch`: many documents, one line of JSON for each."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from .. import (
    AsyncLayerClient,
    AuthenticationError,
    ConfigurationError,
    LayerError,
    MissingTokensError,
    Outcome,
    ResponseDecodeError,
)
from ._files import FileName, LineWriter, complain, read_lines, reading
from ._get import document
from ._progress import Tally, showing

REFUSALS = 10  # so many items in a row refused for their tokens: the rest would fare no better


def fetch(
    source: FileName,
    /,
    *,
    out: FileName,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
) -> int:
    """GET many documents, concurrently, and write one line of JSON for each.

    A line is {"path": ..., "value": ...}, in the order of completion. Failures are told on stderr and do not end the
    run; it then exits with 3. Where the server refuses the tokens again and again, the run ends, and exits with 1.

    Parameters
    ----------
    source: str
        A file with one path in each line, or - for stdin. Blank lines and lines that start with # are skipped.
    out: str
        The file to write, which must not exist yet, or - for stdout.
    workers: int
        How many calls at a time; by default half the connections.
    """
    tally = Tally("fetched")
    with reading(source) as file:
        anyio.run(fetch_lines, read_lines(source, file), out, workers, tally)
    return 3 if tally.failed else 0


async def fetch_lines(paths: AsyncIterator[str], out: str, workers: int | None, tally: Tally) -> None:
    """GET each of `paths` and write it to `out`; what can be wrong at the start is found before `out` is made."""
    async with AsyncLayerClient(follow_redirects=True, observer=tally.observe) as client:

        async def call(path: str) -> bytes:
            try:
                path.encode()
            except UnicodeEncodeError:
                raise ConfigurationError("this line is not UTF-8.") from None
            return await document(client, path)

        bulk = client.bulk(paths, call, workers=workers)
        with LineWriter.open(out) as output:
            try:
                with showing(tally, is_output_on_terminal=out == "-" and os.isatty(1)):
                    async with bulk as outcomes:
                        await write_outcomes(outcomes, output, tally)
            finally:
                complain(f"{tally}; the documents are in {output.name}." if tally.done else f"{tally}.")


async def write_outcomes(outcomes: AsyncIterator[Outcome[str, bytes, str]], output: LineWriter, tally: Tally) -> None:
    """Write each outcome that is a document, and tell of each that is not."""
    refused = 0
    async for outcome in outcomes:
        try:
            line = line_of(outcome)
        except MissingTokensError:  # from files that went away: no item fares better
            raise
        except LayerError as exc:
            tally.fail(outcome.item, exc)
            refused = refused + 1 if isinstance(exc, AuthenticationError) else 0
            if refused == REFUSALS:
                raise
        else:
            await output.write(line)
            tally.count()
            refused = 0


def line_of(outcome: Outcome[str, bytes, str]) -> bytes:
    """The line for a document: its path, and its body, of which only the white space is changed. Raises its error."""
    body = outcome.unwrap()
    try:
        msgspec.json.decode(body)  # `format` does not look into texts and numbers
        value = msgspec.Raw(msgspec.json.format(body, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ResponseDecodeError(
            "the answer is not JSON." if body else "the answer is empty, which no JSON is."
        ) from None
    return msgspec.json.encode({"path": outcome.item, "value": value}) + b"\n"
