"""The races and timings run, and their result files say what they must; how fast anything is, is not tested here."""

from __future__ import annotations

import io
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import attrs
import msgspec
import pytest

from benchmarks import micro, race, report, runner, startup
from benchmarks.document import PATH_ROOM, Document, Template, WrongAnswerError, check
from benchmarks.origin import ROOT, OriginAddress, running_origin
from benchmarks.peers import PEERS, Cell, Peer
from layer_async._retry import Decision

SETTINGS = report.Settings(
    rounds=3, concurrency=(1, 10), connections=None, tls=True, size=2048, latency=0.0, seconds=1.0, time_limit=60.0
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def measurement(cpu_us: float, errors: int = 0) -> runner.Measurement:
    return runner.Measurement(
        calls=300,
        errors=errors,
        error="OSError: no" if errors else None,
        cpu_us=cpu_us,
        p50_ms=cpu_us / 1000,
        p99_ms=cpu_us / 100,
        calls_per_second=1e6 / cpu_us,
        peak_memory_kib=40 * 1024,
        memory_before_kib=30 * 1024,
    )


# --- the document and the origin ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [400, 2048, 204_800])
@pytest.mark.parametrize("path", ["/", "/api/documents/123", "/" + "p" * (PATH_ROOM - 1)])
def test_a_body_is_as_long_as_asked_and_decodes_to_its_own_path(size: int, path: str) -> None:
    body = Template.of(size).body(path.encode())
    assert len(body) == size
    assert msgspec.json.decode(body, type=Document).path == path
    check(path, 200, body, size)


def test_a_body_too_small_for_a_document_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        Template.of(100)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (503, Template.of(2048).body(b"/a")),
        (200, Template.of(2048).body(b"/b")),
        (200, Template.of(2048).body(b"/ab")),
        (200, Template.of(2048).body(b"/a")[:-1]),
    ],
    ids=["status", "another path", "a longer path", "cut"],
)
def test_a_wrong_answer_is_noticed(status: int, body: bytes) -> None:
    with pytest.raises(WrongAnswerError, match="GET /a"):
        check("/a", status, body, 2048)


def test_the_origin_answers_pieces_and_pipelines_and_refuses_what_is_not_a_get() -> None:
    with running_origin(tls=False, latency=0.0, size=2048) as origin:
        assert origin.url == f"http://127.0.0.1:{origin.port}"
        with socket.create_connection(("127.0.0.1", origin.port)) as sock, sock.makefile("rb") as answers:
            sock.sendall(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHo")
            assert _next_body(answers).startswith(b'{"path":"/1"')
            sock.sendall(b"st: a\r\n\r\n")
            assert _next_body(answers).startswith(b'{"path":"/2"')
            sock.sendall(b"DELETE /3 HTTP/1.1\r\nHost: a\r\n\r\n")
            assert answers.readline() == b"HTTP/1.1 400 Bad Request\r\n"
            assert answers.read().endswith(b"\r\n\r\n")


def _next_body(answers: io.BufferedReader, size: int = 2048) -> bytes:
    assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
    while answers.readline() != b"\r\n":
        pass
    return answers.read(size)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_the_origin_keeps_what_a_slow_reader_does_not_take(tls: bool) -> None:
    with running_origin(tls=tls, latency=0.0, size=204_800) as origin:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", origin.port))
        if tls:
            context = Cell("aiohttp", origin.url, origin.authority, 1, 1, 0.0, 1, 204_800).context()
            sock = context.wrap_socket(sock, server_hostname="127.0.0.1")
        with sock, sock.makefile("rb") as answers:
            # 40 answers of 200 KB are more than the sockets' buffers hold: all are asked for before any is read.
            sock.sendall(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(40)))
            time.sleep(0.01)
            for number in range(40):
                body = _next_body(answers, 204_800)
                check(f"/{number}", 200, body, 204_800)
                assert len(body) == 204_800


def test_the_origin_ends_when_its_input_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.origin", "--plain"],
        cwd=ROOT,
        input="",
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["authority"] == ""


def test_the_origin_sends_large_bodies_late_and_over_tls_and_is_gone_after_its_block() -> None:
    with running_origin(tls=True, latency=0.001, size=204_800) as origin:
        context = Cell("aiohttp", origin.url, origin.authority, 1, 1, 0.0, 1, 204_800).context()
        with urllib.request.urlopen(f"{origin.url}/late", context=context, timeout=10) as answer:
            check("/late", answer.status, answer.read(), 204_800)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{origin.port}/", timeout=10)


# --- the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_loop_makes_the_calls_it_was_told_to_and_never_a_path_twice() -> None:
    paths: list[str] = []

    async def get(path: str) -> None:
        paths.append(path)
        if path.endswith("/5"):
            raise OSError("broken")

    numbers = itertools.count(1)
    lap = await runner.closed_loop(get, workers=3, seconds=0.0, least_calls=20, numbers=numbers)
    again = await runner.closed_loop(get, workers=3, seconds=0.0, least_calls=20, numbers=numbers)
    assert len(lap.latencies) >= 20
    assert lap.errors == ["OSError: broken"]
    assert again.errors == []
    assert len(paths) == len(set(paths)) == len(lap.latencies) + len(again.latencies)


# --- the race ----------------------------------------------------------------------------------------------------


def test_every_peer_meets_every_concurrency_in_every_round_in_turning_order() -> None:
    peers = [name for name, peer in PEERS.items() if peer.often][:3]
    order = list(race.schedule(peers, SETTINGS))
    assert len(order) == len(set(order)) == 3 * 2 * 3
    firsts = [order[index][2] for index in range(0, len(order), 3)]
    assert set(firsts) == set(peers)


def test_a_peer_that_is_slow_to_run_takes_part_in_each_third_round() -> None:
    settings = attrs.evolve(SETTINGS, rounds=7, concurrency=(10,))
    order = list(race.schedule(["layer_async", "httpx"], settings))
    assert [number for number, _, peer in order if peer == "layer_async"] == list(range(7))
    assert [number for number, _, peer in order if peer == "httpx"] == [0, 3, 6]


def test_without_terms_all_races_are_run_and_with_one_the_race_that_it_describes() -> None:
    parser = race._arguments()
    everything = race._races(parser, parser.parse_args(["--quick"]))
    assert [one.title for one in everything] == list(race.RACES)
    assert {one.settings.rounds for one in everything} == {race.QUICK["rounds"]}
    (one,) = race._races(parser, parser.parse_args(["--concurrency", "7", "--plain", "--latency", "0.5"]))
    assert (one.settings.concurrency, one.settings.tls, one.settings.latency) == ((7,), False, 0.5)


def test_a_chart_has_a_bar_for_each_peer_and_cuts_the_longest() -> None:
    figures = {"layer_async": 60.0, "httpx": 2000.0, "aiohttp": 120.0}
    cells = [report.CellResult(peer, 100, 0, measurement(cpu_us)) for peer, cpu_us in figures.items()]
    drawn = report.chart(report.Race("A race", SETTINGS, cells, report.summarise(cells)), 100)
    root = ElementTree.fromstring(drawn)
    bars = root.findall("{http://www.w3.org/2000/svg}rect")
    assert [bar.get("class") for bar in bars] == ["bar ours", "bar", "bar"]
    assert [float(bar.get("width", "0")) for bar in bars] == [31.5, 63.0, report.WIDTH]
    assert "prefers-color-scheme: dark" in drawn


def test_a_cell_without_end_is_stopped_told_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def run_cell(cell: Cell, time_limit: float) -> runner.Measurement | float | None:
        tried.append(cell.peer)
        return time_limit if cell.peer == "httpx" else measurement(100.0)

    monkeypatch.setattr(race, "run_cell", run_cell)
    monkeypatch.setattr(race, "EACH", 1)
    cells: list[report.CellResult] = []
    race.race(["httpx", "aiohttp"], attrs.evolve(SETTINGS, concurrency=(1000,)), OriginAddress(9, ""), cells)
    assert tried.count("httpx") == 1
    assert tried.count("aiohttp") == 3
    row = report.summarise(cells)[0]
    assert (row.no_end_in, row.cpu_us) == (60.0, None)
    races = [report.Race("A race", SETTINGS, cells, report.summarise(cells))]
    result = report.Result("command", "date", report.this_machine([]), races)
    assert "no end in 60 s" in report.text(result)
    assert "no end in 60 s" in report.markdown(result)


def test_the_time_limit_of_a_cell_holds() -> None:
    with running_origin(tls=False, latency=0.0, size=2048) as origin:
        cell = Cell("aiohttp", origin.url, origin.authority, 1, 1, 60.0, 1, 2048)
        assert race.run_cell(cell, 0.05) == 0.05


def test_a_cell_that_crashes_has_failed(capfd: pytest.CaptureFixture[str]) -> None:
    assert race.run_cell(Cell("nobody", "http://127.0.0.1:9", "", 1, 1, 0.0, 1, 2048), 30.0) is None
    assert "KeyError" in capfd.readouterr().err


def test_a_ratio_is_taken_within_its_round() -> None:
    figures = {"aiohttp": (100.0, 200.0, 400.0), "httpx": (200.0, 200.0, 2000.0)}
    cells = [
        report.CellResult(peer, 10, number, measurement(cpu_us))
        for peer, all_rounds in figures.items()
        for number, cpu_us in enumerate(all_rounds)
    ]
    row = next(row for row in report.summarise(cells) if row.peer == "httpx")
    assert row.cpu_us == report.Spread(200.0, 200.0, 2000.0)
    assert row.ratios["aiohttp"] == report.Spread(2.0, 1.0, 5.0)
    assert row.ratios["httpx"] == report.Spread(1.0, 1.0, 1.0)


def test_the_command_is_told_without_the_path_of_its_result_file() -> None:
    told = report.command_line("benchmarks.race", ["--out", "/home/me/a.json", "--quick", "--out=/home/me/b.json"])
    assert told == "python -m benchmarks.race --quick"


def test_a_peer_that_is_not_installed_says_what_is_missing() -> None:
    assert Peer("nobody", PEERS["httpx"].open, "no_such_module", ()).missing() is not None
    assert Peer("nobody", PEERS["httpx"].open, "json:no_such_name", ()).missing() is not None
    assert PEERS["httpx"].missing() is None


def test_a_quick_race_prints_its_table_and_writes_its_result_file(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    out = tmp_path / "results" / "race.json"
    quick = ["--quick", "--rounds", "1", "--concurrency", "2", "--seconds", "0", "--no-startup"]
    done = run("benchmarks.race", *quick, "--peers", "httpx,aiohttp", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("us/call") == 2
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("httpx, default", "aiohttp  "))]
    assert len(lines) == 2
    assert all(line[-1] == "0" for line in lines), "errors"

    written = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in written
    assert str(ROOT) not in written
    result = msgspec.json.decode(written, type=report.Result)
    assert result.command == f"python -m benchmarks.race {' '.join(quick)} --peers httpx,aiohttp"
    assert result.machine.cores >= 1
    assert {"httpx", "aiohttp", "layer-async"} <= set(result.machine.packages)
    (one,) = result.races
    assert {(row.peer, row.concurrency) for row in one.rows} == {("httpx", 2), ("aiohttp", 2)}
    for cell in one.cells:
        assert cell.measurement is not None
        assert cell.measurement.calls >= 300
        assert cell.measurement.errors == 0
        assert cell.measurement.cpu_us > 0
        assert cell.measurement.peak_memory_kib > cell.measurement.memory_before_kib > 0

    again = run("benchmarks.report", str(out), "--markdown")
    assert again.returncode == 0, again.stderr
    assert "| C = 2 |" in again.stdout
    assert again.stdout.count("| aiohttp |") == 3


def test_a_race_with_failing_calls_has_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_cell(cell: Cell, time_limit: float) -> runner.Measurement | float | None:
        return measurement(100.0, errors=2)

    monkeypatch.setattr(race, "run_cell", run_cell)
    monkeypatch.setattr(sys, "argv", ["race", "--quick", "--plain", "--no-startup", "--peers", "httpx"])
    assert race.main() == 1
    assert "2 ERRORS, the first: OSError: no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--peers", "nobody"], "there is no peer nobody"),
        (["--rounds", "0"], "at least 1"),
        (["--concurrency", "1,0"], "at least 1"),
        (["--concurrency", "many"], "invalid"),
        (["--seconds", "-1"], "not negative"),
        (["--out", "."], "cannot write"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["race", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        race.main()
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


# --- import and construction -------------------------------------------------------------------------------------


def test_startup_times_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = startup.Library("no_such_module", "None", ())
    monkeypatch.setattr(startup, "LIBRARIES", (startup.LIBRARIES[0], absent))
    out = tmp_path / "startup.json"
    monkeypatch.setattr(sys, "argv", ["startup", "--rounds", "1", "--out", str(out)])
    startup.main()
    printed = capsys.readouterr()
    assert "no_such_module left out: ModuleNotFoundError" in printed.err
    assert any(line.startswith("httpx ") for line in printed.out.splitlines())
    (entry,) = json.loads(out.read_bytes())["startup"]
    assert entry["library"] == "httpx"
    assert all(entry[part]["median"] > 0 for part in ("import_ms", "first_construction_ms", "later_construction_ms"))


# --- the parts of a call -----------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_each_part_does_what_it_is_timed_for() -> None:
    decision, document = micro.policy()(), micro.codec()()
    assert isinstance(decision, Decision)
    assert decision.retry
    assert isinstance(document, Document)
    assert document.path == "/api/documents/1"
    parse = micro.parse()
    assert parse() == parse() == Template.of(micro.SIZE).body(b"/api/documents/1")
    micro.slot()()
    micro.auth()()


def test_the_parts_are_timed_and_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(micro, "CALLS", 10)
    monkeypatch.setattr(sys, "argv", ["micro", "--rounds", "1"])
    micro.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["policy", "codec", "slot", "auth", "parse"]
    assert all(float(line.split()[1]) > 0 for line in printed)
    monkeypatch.setattr(sys, "argv", ["micro", "--rounds", "0"])
    with pytest.raises(SystemExit):
        micro.main()
