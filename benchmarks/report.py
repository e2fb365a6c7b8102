"""What a race came to: the result file, and the tables made from it.

`python -m benchmarks.report FILE.json [--markdown]` prints the tables of a file once more. Rules: everything printed
comes from the file; a figure is the median over the rounds, with the least and the most beside it; a ratio is taken
within a round, where both met the same machine, and then the median over the rounds. No path of the machine is in a
file.
"""

from __future__ import annotations

import argparse
import datetime
import html
import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import attrs
import msgspec

from .peers import BASELINES, PEERS
from .runner import Measurement

TIMES = "\N{MULTIPLICATION SIGN}"


@attrs.frozen
class Machine:
    """Where and with what it ran. `load` is the system's load average of the last minute, before the start."""

    cpu: str
    cores: int
    system: str
    load: float
    python: str
    packages: dict[str, str]


@attrs.frozen
class Settings:
    """What was asked for. `connections` is None where it is C; `latency` and `time_limit` are in seconds."""

    rounds: int
    concurrency: tuple[int, ...]
    connections: int | None
    tls: bool
    size: int
    latency: float
    seconds: float
    time_limit: float


@attrs.frozen
class CellResult:
    """One cell: its measurement, or `no_end_in` (seconds after which it was stopped), or neither when it failed."""

    peer: str
    concurrency: int
    round: int
    measurement: Measurement | None = None
    no_end_in: float | None = None


@attrs.frozen
class Spread:
    """Median, least and most over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 2) -> Spread | None:
        """The spread of `values`, or None when there are none."""
        if not values:
            return None
        return cls(*(round(value, digits) for value in (statistics.median(values), min(values), max(values))))


@attrs.frozen
class Row:
    """One peer at one concurrency, over all rounds. `ratios` are those of CPU to each baseline that took part."""

    peer: str
    concurrency: int
    rounds: int
    errors: int
    no_end_in: float | None
    cpu_us: Spread | None
    ratios: dict[str, Spread | None]
    p50_ms: Spread | None
    p99_ms: Spread | None
    calls_per_second: Spread | None
    peak_memory_mib: Spread | None


@attrs.frozen
class Startup:
    """One library: to import it, to construct its first client and the ones after that, in milliseconds."""

    library: str
    import_ms: Spread
    first_construction_ms: Spread | None
    later_construction_ms: Spread | None


@attrs.frozen
class Race:
    """One race: what was asked for, each cell, and the rows made from the cells."""

    title: str
    settings: Settings
    cells: list[CellResult] = attrs.field(factory=list)
    rows: list[Row] = attrs.field(factory=list)


@attrs.frozen
class Result:
    """A whole result file."""

    command: str
    date: str
    machine: Machine
    races: list[Race] = attrs.field(factory=list)
    startup: list[Startup] = attrs.field(factory=list)


def today() -> str:
    """The date, as in 2025-01-31."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command as another would type it: without `--out`, whose value is a path of this machine."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith("--out"):
            kept.append(argument)
        skip = argument == "--out"
    return " ".join(["python -m", module, *kept])


def this_machine(packages: Iterable[str]) -> Machine:
    """The machine and the versions of `packages`, as far as they are installed."""
    versions = {}
    for package in sorted(set(packages)):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    from layer_async import __version__

    versions["layer-async"] = __version__
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Machine(_cpu_model(), cores, system, round(os.getloadavg()[0], 2), python, versions)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def summarise(cells: Sequence[CellResult]) -> list[Row]:
    """One row for each peer and concurrency, in the order of their first cells, grouped by concurrency."""
    rows = []
    for concurrency in dict.fromkeys(cell.concurrency for cell in cells):
        at_this = [cell for cell in cells if cell.concurrency == concurrency]
        for peer in sorted({cell.peer for cell in at_this}, key=list(PEERS).index):
            rows.append(_row(peer, concurrency, at_this))
    return rows


def _row(peer: str, concurrency: int, cells: Sequence[CellResult]) -> Row:
    own = [cell for cell in cells if cell.peer == peer]
    measured = {cell.round: cell.measurement for cell in own if cell.measurement is not None}

    def spread(figure: Callable[[Measurement], float], digits: int = 2) -> Spread | None:
        return Spread.of([figure(measurement) for measurement in measured.values()], digits)

    ratios = {}
    for baseline in BASELINES:
        theirs = {cell.round: cell.measurement for cell in cells if cell.peer == baseline and cell.measurement}
        ratios[baseline] = Spread.of(
            [measured[number].cpu_us / theirs[number].cpu_us for number in measured if number in theirs], 3
        )
    return Row(
        peer=peer,
        concurrency=concurrency,
        rounds=len(measured),
        errors=sum(measurement.errors for measurement in measured.values()),
        no_end_in=next((cell.no_end_in for cell in own if cell.no_end_in is not None), None),
        cpu_us=spread(lambda measurement: measurement.cpu_us, 1),
        ratios=ratios,
        p50_ms=spread(lambda measurement: measurement.p50_ms),
        p99_ms=spread(lambda measurement: measurement.p99_ms),
        calls_per_second=spread(lambda measurement: measurement.calls_per_second, 0),
        peak_memory_mib=spread(lambda measurement: measurement.peak_memory_kib / 1024, 1),
    )


def text(result: Result) -> str:
    """The tables for a terminal."""
    parts = [_heading(result)]
    for race in result.races:
        head = ["client", "C", "CPU us/call", "(min-max)", *(f"x {name}" for name in BASELINES)]
        head += ["p50 ms", "p99 ms", "calls/s", "peak MiB", "errors"]
        previous = None
        lines = []
        for row in race.rows:
            if previous not in (None, row.concurrency):
                lines.append([""] * len(head))
            previous = row.concurrency
            lines.append(_text_row(row))
        parts += [f"{race.title}. {_terms(race.settings)}", _aligned([head, *lines])]
    if result.startup:
        parts.append(_aligned([_STARTUP_HEAD, *map(_startup_row, result.startup)]))
    return "\n\n".join(parts)


def markdown(result: Result) -> str:
    """The tables for the README: a table for each figure, clients down, concurrency across; memory once."""
    parts = [_heading(result)]
    for number, race in enumerate(result.races):
        columns = list(dict.fromkeys(row.concurrency for row in race.rows))
        parts.append(f"**{race.title}.** {_terms(race.settings)}")
        for title, cell in _PIVOTS[: 2 if number else 3]:
            head = [title, *(f"C = {concurrency:,}" for concurrency in columns)]
            lines = []
            for peer in dict.fromkeys(row.peer for row in race.rows):
                found = {row.concurrency: row for row in race.rows if row.peer == peer}
                lines.append([PEERS[peer].title, *(cell(found[c]) if c in found else "-" for c in columns)])
            parts.append(_piped([head, *lines]))
    if result.startup:
        parts.append(_piped([_STARTUP_HEAD, *map(_startup_row, result.startup)]))
    return "\n\n".join(parts)


def _heading(result: Result) -> str:
    machine = result.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.system}, {machine.python}, {result.date}.\n"
        f"{packages}.\n`{result.command}`"
    )


def _terms(settings: Settings) -> str:
    transfer = "TLS 1.3" if settings.tls else "no TLS"
    connections = "C" if settings.connections is None else settings.connections
    rounds = "1 round" if settings.rounds == 1 else f"medians of {settings.rounds} rounds"
    return (
        f"C callers in a closed loop, at most {connections} connections, {transfer}, keep-alive, "
        f"{settings.size:,} bytes of JSON, {settings.latency * 1000:g} ms of server latency; {rounds}."
    )


def _no_figure(row: Row) -> str:
    return "failed" if row.no_end_in is None else f"no end in {row.no_end_in:g} s"


def _text_row(row: Row) -> list[str]:
    name = PEERS[row.peer].title
    if row.cpu_us is None:
        return [name, str(row.concurrency), _no_figure(row), *[""] * (6 + len(BASELINES))]
    return [
        name,
        str(row.concurrency),
        f"{row.cpu_us.median:.0f}",
        f"({row.cpu_us.least:.0f}-{row.cpu_us.most:.0f})",
        *(_number(row.ratios.get(baseline), "{:.2f}") for baseline in BASELINES),
        _number(row.p50_ms, "{:.2f}"),
        _number(row.p99_ms, "{:.2f}"),
        _number(row.calls_per_second, "{:,.0f}"),
        _number(row.peak_memory_mib, "{:.0f}"),
        str(row.errors),
    ]


def _number(spread: Spread | None, form: str) -> str:
    return "-" if spread is None else form.format(spread.median)


def _cpu_cell(row: Row) -> str:
    if row.cpu_us is None:
        return _no_figure(row)
    figure = f"{row.cpu_us.median:,.0f} ({row.cpu_us.least:,.0f}-{row.cpu_us.most:,.0f})"
    ratio = row.ratios.get(BASELINES[0])
    return figure if ratio is None else f"{figure}, {TIMES} {ratio.median:.2f}"


def _latency_cell(row: Row) -> str:
    if row.p50_ms is None or row.p99_ms is None:
        return _no_figure(row)
    return f"{row.p50_ms.median:.1f} / {row.p99_ms.median:.1f}"


def _memory_cell(row: Row) -> str:
    return _no_figure(row) if row.peak_memory_mib is None else f"{row.peak_memory_mib.median:.0f}"


_PIVOTS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    (f"CPU µs per call (min-max), {TIMES} {BASELINES[0]}", _cpu_cell),
    ("p50 / p99 of a call, ms", _latency_cell),
    ("peak memory, MiB", _memory_cell),
)

_STARTUP_HEAD = ["library", "import ms", "first client ms", "later clients ms"]


def _startup_row(startup: Startup) -> list[str]:
    return [
        startup.library,
        _with_range(startup.import_ms, 1),
        _with_range(startup.first_construction_ms, 1),
        _with_range(startup.later_construction_ms, 3),
    ]


def _with_range(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f}-{spread.most:.{digits}f})"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _piped(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    rule = f"| --- |{' ---: |' * (len(lines[0]) - 1)}"
    return "\n".join([head, rule, *rest])


BAR, GAP, LEFT, WIDTH, MOST = 18, 6, 250, 420, 800.0


def chart(race: Race, concurrency: int) -> str:
    """An SVG of the CPU time a call of each client at `concurrency`; bars that would be longer than `MOST` are cut."""
    rows = sorted(
        (row for row in race.rows if row.concurrency == concurrency and row.cpu_us is not None),
        key=lambda row: row.cpu_us.median if row.cpu_us else 0.0,
    )
    height = len(rows) * (BAR + GAP) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 90} {height}" role="img"',
        ' font-family="system-ui, sans-serif" font-size="13">',
        "<style>text{fill:#1f2328}.bar{fill:#8c959f}.ours{fill:#0969da}",
        "@media (prefers-color-scheme: dark){text{fill:#e6edf3}.bar{fill:#6e7681}.ours{fill:#58a6ff}}</style>",
        f'<text x="0" y="16" font-weight="600">CPU time of the client per call, microseconds, C = {concurrency}</text>',
    ]
    for number, row in enumerate(rows):
        assert row.cpu_us is not None
        figure, top = row.cpu_us.median, 30 + number * (BAR + GAP)
        width = min(figure, MOST) / MOST * WIDTH
        kind = "bar ours" if row.peer == "layer_async" else "bar"
        label = f"{figure:,.0f}" if figure <= MOST else f"\N{RIGHTWARDS ARROW} {figure:,.0f}"
        parts += [
            f'<text x="{LEFT - 8}" y="{top + 14}" text-anchor="end">{html.escape(PEERS[row.peer].title)}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2"/>',
            f'<text x="{LEFT + width + 6:.1f}" y="{top + 14}">{label}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def write(result: Result, path: Path) -> None:
    """Write the result file, whole or not at all, and beside it, as SVG, the chart of its first race."""
    text = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    if result.races:
        first = result.races[0]
        concurrency = 100 if 100 in first.settings.concurrency else first.settings.concurrency[-1]
        path.with_suffix(".svg").write_text(chart(first, concurrency), encoding="utf-8")
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(text)
    beside.replace(path)


def output_path(value: str) -> Path:
    """An `--out` that can be written, checked before hours of measuring; its folder is made."""
    path = Path(value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder of {value}: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {value}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="print a result file's tables")
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", action="store_true", help="as the README shows them")
    options = parser.parse_args()
    result = msgspec.json.decode(options.file.read_bytes(), type=Result)
    print(markdown(result) if options.markdown else text(result))


if __name__ == "__main__":
    main()
