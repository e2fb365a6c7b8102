"""How long it takes to import this library and to construct its client: `python -m benchmarks.startup`.

Rules: each timing is taken in a fresh interpreter, the libraries in turn in each round, so that caches and the state of
the machine are the same for all; the first round is thrown away, since it may compile bytecode.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import attrs

from . import report
from .origin import ROOT

LATER_CLIENTS = 25


@attrs.frozen
class Library:
    """A library: the expression that constructs its client, and the packages whose versions matter."""

    name: str
    construct: str
    packages: tuple[str, ...]


LIBRARIES = (
    Library("httpx", "httpx.AsyncClient()", ("httpx", "httpcore", "anyio")),
    Library("layer_async", "layer_async.AsyncLayerClient(token1='benchmark-1', token2='benchmark-2')", ("msgspec",)),
    Library("httpx2", "httpx2.AsyncClient()", ("httpx2",)),
    Library("aiohttp", "aiohttp.ClientSession()", ("aiohttp",)),
)

# Run with -c in a fresh interpreter. Clients are kept until the end: construction is timed, not collection.
_PROBE = """
import asyncio, json, sys, time
begin = time.perf_counter()
import {name}
imported = time.perf_counter() - begin

async def construct():
    clients, took = [], []
    for _ in range({count}):
        begin = time.perf_counter()
        clients.append({construct})
        took.append(time.perf_counter() - begin)
    for client in clients:
        await (client.close() if hasattr(client, "close") else client.aclose())
    return took

print(json.dumps([imported, asyncio.run(construct()) if {count} else []]))
"""


def probe(library: Library) -> tuple[float, list[float]] | None:
    """Seconds to import `library`, and to construct each of some clients; None when it cannot be imported."""
    code = _PROBE.format(name=library.name, construct=library.construct, count=1 + LATER_CLIENTS)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{library.name} left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    imported, took = json.loads(done.stdout)
    return imported, took


def measure(rounds: int) -> list[report.Startup]:
    """Time every library that is here, interleaved, over `rounds` rounds."""
    libraries = [library for library in LIBRARIES if probe(library) is not None]
    samples: dict[str, list[tuple[float, list[float]]]] = {library.name: [] for library in libraries}
    for number in range(rounds):
        turn = number % max(1, len(libraries))
        for library in [*libraries[turn:], *libraries[:turn]]:
            sample = probe(library)
            if sample is not None:
                samples[library.name].append(sample)
    return [_summary(name, taken) for name, taken in samples.items() if taken]


def _summary(name: str, samples: list[tuple[float, list[float]]]) -> report.Startup:
    imports = report.Spread.of([imported * 1000 for imported, _ in samples])
    assert imports is not None
    return report.Startup(
        library=name,
        import_ms=imports,
        first_construction_ms=report.Spread.of([took[0] * 1000 for _, took in samples]),
        later_construction_ms=report.Spread.of([second * 1000 for _, took in samples for second in took[1:]], 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=report.output_path, metavar="FILE.json")
    parser.add_argument("--markdown", action="store_true", help="print the table as the README shows it")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    packages = [package for library in LIBRARIES for package in library.packages]
    result = report.Result(
        command=report.command_line("benchmarks.startup", sys.argv[1:]),
        date=report.today(),
        machine=report.this_machine(packages),
        startup=measure(options.rounds),
    )
    if options.out is not None:
        report.write(result, options.out)
    print(report.markdown(result) if options.markdown else report.text(result))


if __name__ == "__main__":
    main()
