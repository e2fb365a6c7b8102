"""What the parts of a call cost by themselves: `python -m benchmarks.micro [--rounds N]`.

Warm code, in a loop, on one core: a part costs two to three times as much in a call, between system calls. So these
figures say which part has become dearer, the race what a call costs. Each is the median of its rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

import httpx

from layer_async import DualTokenAuth, RetryPolicy, TokenPair, decode
from layer_async._failures import classify_failure
from layer_async._framing import HEAD, AnswerReader
from layer_async._pool import ConnectionPool

from .document import Document, Template

CALLS = 1000  # in a round
SIZE = 2048
URL = "https://origin.invalid/api/documents/1"

Part = Callable[[], object]


def policy() -> Part:
    """What follows a 503: the row of the table, and the decision."""
    request, response, rules = httpx.Request("GET", URL), httpx.Response(503), RetryPolicy()

    def judge() -> object:
        return rules.decide(
            classify_failure(response, request),
            [],
            safe=True,
            replayable=True,
            time_left=60.0,
            attempt_time=30.0,
            jitter=0.5,
            patient=False,
        )

    return judge


def codec() -> Part:
    """A document of 2 KB, from an answer to a value."""
    response = httpx.Response(200, content=Template.of(SIZE).body(b"/api/documents/1"))
    return lambda: decode(response, Document)


def slot() -> Part:
    """A slot that is free, taken and given back."""
    pool = ConnectionPool(httpx.Limits(max_connections=100))

    def take() -> None:
        given = pool.acquire_nowait()
        assert given is not None
        given.release()

    return take


def auth() -> Part:
    """Both tokens onto a request."""
    tokens = DualTokenAuth(TokenPair("micro-token-1", "micro-token-2"), origin=URL)
    request = httpx.Request("GET", URL)

    def attach() -> None:
        turn = tokens.begin()
        assert turn is not None
        tokens.draw(turn)
        tokens.attach(turn, request)

    return attach


def parse() -> Part:
    """An answer of 2 KB, from bytes to its head and body."""
    reader = AnswerReader()
    body = Template.of(SIZE).body(b"/api/documents/1")
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = head.encode("ascii") + body

    def feed() -> bytes:
        reader.begin(HEAD)
        reader.feed(answer)
        return reader.take()

    return feed


PARTS: dict[str, Callable[[], Part]] = {"policy": policy, "codec": codec, "slot": slot, "auth": auth, "parse": parse}


async def measure(rounds: int) -> dict[str, float]:
    """Microseconds of each part, the rounds of one between those of the others."""
    parts = {name: make() for name, make in PARTS.items()}
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            started = time.process_time()
            for _ in range(CALLS):
                part()
            found[name].append((time.process_time() - started) / CALLS * 1e6)
    return {name: statistics.median(took) for name, took in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    for name, took in asyncio.run(measure(rounds)).items():
        print(f"{name:8}{took:8.2f} µs  {(PARTS[name].__doc__ or '').strip()}")


if __name__ == "__main__":
    main()
