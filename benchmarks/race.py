"""The race of this client against its peers: `python -m benchmarks.race [--quick] [--out FILE.json] [--markdown]`.

It owns the order of the cells, their processes and their time limit. Rules: each cell runs in a fresh process, so that
CPU and memory are its own; in each round every peer meets every concurrency, in an order that turns with the round, so
that nobody always runs after the same neighbour; a cell that does not end in its time is told so, not waited for, and
not tried again. The status is 1 when any call failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import msgspec

from . import report, startup
from .origin import ROOT, OriginAddress, running_origin
from .peers import PEERS, Cell
from .runner import Measurement

FULL: dict[str, Any] = {"rounds": 5, "concurrency": (1, 10, 100, 1000), "seconds": 1.0, "time_limit": 60.0}
QUICK: dict[str, Any] = {"rounds": 3, "concurrency": (1, 10, 100), "seconds": 0.3, "time_limit": 30.0}


def least_calls(concurrency: int) -> int:
    """Enough calls for a p99, and three for each caller, however slow the client is."""
    return max(300, 3 * concurrency)


def schedule(peers: Sequence[str], settings: report.Settings) -> Iterator[tuple[int, int, str]]:
    """Round, concurrency and peer of each cell, in the order in which they run."""
    for number in range(settings.rounds):
        for place, concurrency in enumerate(settings.concurrency):
            turn = (number + place) % len(peers)
            for peer in [*peers[turn:], *peers[:turn]]:
                yield number, concurrency, peer


def run_cell(cell: Cell, time_limit: float) -> Measurement | float | None:
    """Run `cell` in a fresh process: its measurement, or the seconds after which it was stopped, or None: it failed."""
    environ = {name: value for name, value in os.environ.items() if not _steers_a_client(name)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.runner"],
            input=msgspec.json.encode(cell),
            capture_output=True,
            timeout=time_limit,
            cwd=ROOT,
            env=environ,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return time_limit
    if done.returncode:
        print(done.stderr.decode(errors="replace"), file=sys.stderr)
        return None
    return msgspec.json.decode(done.stdout, type=Measurement)


def _steers_a_client(name: str) -> bool:
    return name.upper().startswith(("LAYER_", "SSL_CERT_")) or name.upper().endswith("_PROXY")


def race(
    peers: Sequence[str], settings: report.Settings, origin: OriginAddress, cells: list[report.CellResult]
) -> None:
    """Run all cells, and append each one's result to `cells` as it comes."""
    hopeless: set[tuple[str, int]] = set()
    for number, concurrency, peer in schedule(peers, settings):
        result = report.CellResult(peer, concurrency, number, no_end_in=settings.time_limit)
        if (peer, concurrency) not in hopeless:
            cell = Cell(
                peer=peer,
                url=origin.url,
                authority=origin.authority,
                concurrency=concurrency,
                connections=settings.connections or concurrency,
                seconds=settings.seconds,
                least_calls=least_calls(concurrency),
                size=settings.size,
            )
            met = run_cell(cell, settings.time_limit)
            if isinstance(met, float):
                hopeless.add((peer, concurrency))
            else:
                result = attrs.evolve(result, measurement=met, no_end_in=None)
        cells.append(result)
        _tell(result, settings)


def _tell(result: report.CellResult, settings: report.Settings) -> None:
    place = f"round {result.round + 1}/{settings.rounds}  C={result.concurrency:<5} {result.peer:<15}"
    measurement = result.measurement
    if measurement is None:
        fate = "failed" if result.no_end_in is None else f"no end in {result.no_end_in:g} s"
    else:
        fate = f"{measurement.cpu_us:8.1f} us/call  {measurement.calls} calls"
        if measurement.errors:
            fate += f"  {measurement.errors} ERRORS, the first: {measurement.error}"
    print(f"{place} {fate}", file=sys.stderr, flush=True)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, no C = 1000")
    parser.add_argument("--rounds", type=int, help=f"default: {FULL['rounds']}, quick: {QUICK['rounds']}")
    parser.add_argument("--concurrency", type=_numbers, metavar="C,C,...", help="default: 1,10,100,1000")
    parser.add_argument("--peers", type=lambda value: value.split(","), metavar="NAME,...", help=", ".join(PEERS))
    parser.add_argument("--connections", type=int, metavar="N", help="connections of each client; default: C")
    parser.add_argument("--plain", action="store_true", help="no TLS")
    parser.add_argument("--size", type=int, default=2048, metavar="BYTES", help="length of a body; default: 2048")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="of the server; default: 0")
    parser.add_argument("--seconds", type=float, help=f"of a cell, after its warm-up; default: {FULL['seconds']:g}")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help=f"default: {FULL['time_limit']:g}")
    parser.add_argument("--no-startup", action="store_true", help="leave out import and construction times")
    parser.add_argument("--out", type=report.output_path, metavar="FILE.json", help="write a result file")
    parser.add_argument("--markdown", action="store_true", help="print tables as the README shows them")
    return parser


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(","))


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> report.Settings:
    chosen = dict(QUICK if options.quick else FULL)
    chosen.update({name: getattr(options, name) for name in chosen if getattr(options, name) is not None})
    settings = report.Settings(
        connections=options.connections, tls=not options.plain, size=options.size, latency=options.latency, **chosen
    )
    if min(settings.rounds, *settings.concurrency, settings.connections or 1) < 1:
        parser.error("rounds, concurrency and connections are at least 1")
    if min(settings.seconds, settings.latency) < 0 or settings.time_limit <= 0:
        parser.error("times are not negative")
    return settings


def _take_part(parser: argparse.ArgumentParser, wanted: Sequence[str] | None) -> list[str]:
    """The names of the peers that race: those wanted, which must be here, or all that are here."""
    if wanted is not None:
        for name in wanted:
            if name not in PEERS:
                parser.error(f"there is no peer {name}; there are {', '.join(PEERS)}")
            if missing := PEERS[name].missing():
                parser.error(f"{name} cannot take part: {missing}")
        return list(dict.fromkeys(wanted))
    here = []
    for name, peer in PEERS.items():
        if missing := peer.missing():
            print(f"{name} left out: {missing}", file=sys.stderr)
        else:
            here.append(name)
    return here


def main() -> int:
    parser = _arguments()
    options = parser.parse_args()
    settings = _settings(parser, options)
    peers = _take_part(parser, options.peers)
    result = report.Result(
        command=report.command_line("benchmarks.race", sys.argv[1:]),
        date=report.today(),
        machine=report.this_machine(package for peer in peers for package in PEERS[peer].packages),
        settings=settings,
        startup=[] if options.no_startup else startup.measure(settings.rounds),
    )
    stopped = False
    try:
        with running_origin(tls=settings.tls, latency=settings.latency, size=settings.size) as origin:
            race(peers, settings, origin, result.cells)
    except KeyboardInterrupt:
        stopped = True  # what was measured until now is still worth its table
    result = attrs.evolve(result, rows=report.summarise(result.cells))
    if options.out is not None and not stopped:
        report.write(result, options.out)
    print(report.markdown(result) if options.markdown else report.text(result))
    failed = any(cell.measurement is None and cell.no_end_in is None for cell in result.cells)
    if stopped:
        return 130
    return int(failed or any(row.errors for row in result.rows))


if __name__ == "__main__":
    sys.exit(main())
