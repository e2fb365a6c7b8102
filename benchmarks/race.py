"""The races of this client against its peers: `python -m benchmarks.race [--quick] [--out FILE.json] [--markdown]`.

Without options that say what is asked of the clients, all of `RACES` are run; with one of those, the race that they
describe. This file owns the order of the cells, their processes and their time limit. Rules: each cell runs in a fresh
process, so that CPU and memory are its own; in each round every peer that takes part meets every concurrency, in an
order that turns with the round, so that nobody always runs after the same neighbour; a cell that does not end in its
time is told so, not waited for, and not tried again. The status is 1 when any call failed.
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

FULL: dict[str, Any] = {"seconds": 0.5, "time_limit": 20.0}
QUICK: dict[str, Any] = {"seconds": 0.3, "time_limit": 20.0, "rounds": 3}
TERMS: dict[str, Any] = {"connections": None, "tls": True, "size": 2048, "latency": 0.0}
RACES: dict[str, dict[str, Any]] = {
    "A connection for each caller": {"rounds": 15, "concurrency": (1, 10, 100, 1000)},
    "A hundred connections for all": {"rounds": 5, "concurrency": (1000, 10_000), "connections": 100},
    "A distant server": {"rounds": 3, "concurrency": (100, 1000), "latency": 0.05},
    "Large documents": {"rounds": 3, "concurrency": (10, 100), "size": 204_800},
}
EACH = 3  # a peer that does not run often takes part in each third round


def least_calls(concurrency: int) -> int:
    """Enough calls for a p99, and three for each caller, however slow the client is."""
    return max(300, 3 * concurrency)


def schedule(peers: Sequence[str], settings: report.Settings) -> Iterator[tuple[int, int, str]]:
    """Round, concurrency and peer of each cell, in the order in which they run."""
    for number in range(settings.rounds):
        running = [peer for peer in peers if number % EACH == 0 or (peer in PEERS and PEERS[peer].often)]
        for place, concurrency in enumerate(settings.concurrency):
            turn = (number + place) % len(running) if running else 0
            for peer in [*running[turn:], *running[:turn]]:
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
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--rounds", type=int, help="of each race; quick: 3")
    parser.add_argument("--concurrency", type=_numbers, metavar="C,C,...", help="callers of the one race to run")
    parser.add_argument("--peers", type=lambda value: value.split(","), metavar="NAME,...", help=", ".join(PEERS))
    parser.add_argument("--connections", type=int, metavar="N", help="connections of each client; default: C")
    parser.add_argument("--plain", action="store_true", help="no TLS")
    parser.add_argument("--size", type=int, metavar="BYTES", help="length of a body; default: 2048")
    parser.add_argument("--latency", type=float, metavar="SECONDS", help="of the server; default: 0")
    parser.add_argument("--seconds", type=float, help=f"of a cell, after its warm-up; default: {FULL['seconds']:g}")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help=f"default: {FULL['time_limit']:g}")
    parser.add_argument("--no-startup", action="store_true", help="leave out import and construction times")
    parser.add_argument("--out", type=report.output_path, metavar="FILE.json", help="write a result file")
    parser.add_argument("--markdown", action="store_true", help="print tables as the README shows them")
    return parser


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(","))


def _races(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[report.Race]:
    """What is to be run: all races, or the one that the options describe."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    own: dict[str, Any] = {
        name: given[name] for name in ("concurrency", "connections", "size", "latency") if name in given
    }
    if options.plain:
        own["tls"] = False
    asked = {"As asked for": {"rounds": 5, "concurrency": (1, 10, 100, 1000), **own}}
    chosen: dict[str, dict[str, Any]] = asked if own else RACES
    common = {**FULL, **(QUICK if options.quick else {})}
    common.update({name: given[name] for name in ("rounds", "seconds", "time_limit") if name in given})
    races = [report.Race(title, report.Settings(**{**TERMS, **race, **common})) for title, race in chosen.items()]
    for settings in (race.settings for race in races):
        if min(settings.rounds, *settings.concurrency, settings.connections or 1) < 1:
            parser.error("rounds, concurrency and connections are at least 1")
        if min(settings.seconds, settings.latency) < 0 or settings.time_limit <= 0:
            parser.error("times are not negative")
    return races


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
    races = _races(parser, options)
    peers = _take_part(parser, options.peers)
    startups = [] if options.no_startup else startup.measure(3 if options.quick else 11)
    stopped = False
    for one in races:
        settings = one.settings
        try:
            with running_origin(tls=settings.tls, latency=settings.latency, size=settings.size) as origin:
                race(peers, settings, origin, one.cells)
        except KeyboardInterrupt:
            stopped = True  # what was measured until now is still worth its table
            break
    result = report.Result(
        command=report.command_line("benchmarks.race", sys.argv[1:]),
        date=report.today(),
        machine=report.this_machine(package for peer in peers for package in PEERS[peer].packages),
        races=[attrs.evolve(one, rows=report.summarise(one.cells)) for one in races if one.cells],
        startup=startups,
    )
    if options.out is not None and not stopped:
        report.write(result, options.out)
    print(report.markdown(result) if options.markdown else report.text(result))
    if stopped:
        return 130
    cells = [cell for one in races for cell in one.cells]
    failed = any(cell.measurement is None and cell.no_end_in is None for cell in cells)
    return int(failed or any(row.errors for one in result.races for row in one.rows))


if __name__ == "__main__":
    sys.exit(main())
