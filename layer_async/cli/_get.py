"""`layer-async get`: one document, byte for byte."""

from __future__ import annotations

import sys

import anyio

from .. import APIStatusError, AsyncLayerClient, Event, RequestInfo, RetryScheduled
from ._files import LineWriter, complain


def get(path: str, /) -> int:
    """GET one document and write it to stdout, byte for byte; on a terminal a newline follows.

    Parameters
    ----------
    path: str
        The path below the base URL, with its query, such as /api/customers/42.
    """

    def observe(event: Event) -> None:
        if isinstance(event, RetryScheduled):
            complain(f"{event.request}: attempt {event.number} met {event.cause}, next in {event.delay:.1f} s.")

    async def main() -> None:
        async with AsyncLayerClient(follow_redirects=True, observer=observe) as client:
            body = await document(client, path)
        if sys.stdout is not None and sys.stdout.isatty():
            body = body.removesuffix(b"\n") + b"\n"
        with LineWriter.open("-") as output:
            await output.write(body)

    anyio.run(main)
    return 0


async def document(client: AsyncLayerClient, path: str) -> bytes:
    """The body of what is at `path`; raises for a redirect that leads elsewhere too."""
    response = await client.get(path)
    if response.status_code >= 300:
        raise APIStatusError(
            f"the answer {response.status_code} leads to another place, which is not followed: "
            "the tokens are for the base URL only.",
            status_code=response.status_code,
            request=RequestInfo.of(response.request),
        )
    return response.content
