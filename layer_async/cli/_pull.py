"""The process that `layer-async demo` kills and resumes: `layer-async fetch --resume`, which tells of its calls.

Rules: stdout gets a line of JSON, from time to time and at the end, with what was counted since the last one. Where
nobody listens any more, the fetch is ended, as by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import msgspec

from .. import Event
from ..demo import Meter
from . import exit_code_of
from ._fetch import fetch

INTERVAL = 0.02


class Teller:
    """An observer that writes what it counts to the descriptor `output`."""

    def __init__(self, output: int) -> None:
        self._output = output
        self._meter = Meter()
        self._told = 0.0

    def __call__(self, event: Event, /) -> None:
        """Count `event`, and tell when it is time to."""
        self._meter(event)
        if time.monotonic() - self._told >= INTERVAL:
            self.tell()

    def tell(self) -> None:
        """Say what was counted, and begin anew."""
        meter, self._meter, self._told = self._meter, Meter(), time.monotonic()
        try:
            os.write(self._output, msgspec.json.encode(meter) + b"\n")
        except BrokenPipeError:
            signal.raise_signal(signal.SIGTERM)


def main(paths: str, out: str, *, output: int = 1) -> int:
    """Fetch, and return the exit code. `output` is the descriptor to tell on."""
    teller = Teller(output)

    def fetch_and_tell() -> int:
        code = fetch(paths, out=out, resume=True, observer=teller)
        teller.tell()
        return code

    return exit_code_of(fetch_and_tell)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
