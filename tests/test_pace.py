"""The pace: what is learned from 429s, by itself and in simulation; what the head of an answer says."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs
import pytest

from layer_async._pace import ALLOWANCE, FIRST_RATE, LONGEST_FIELD, Limits, Pace, read_limits
from layer_async._pacing import Pacing

from .quota import DroppingBucket, FixedWindow, Quota, Result, Simulation, TokenBucket, median


def spend(pace: Pace, now: float, count: int) -> tuple[float, int]:
    """Start `count` attempts as soon as the pace allows; the time of the last one, and its number."""
    turn = 0
    for _ in range(count):
        now += pace.ready_in(now)
        turn = pace.take(now)
    return now, turn


# Before and after the first 429


def test_until_the_first_429_nobody_waits() -> None:
    pace = Pace()
    assert (pace.is_on, pace.rate) == (False, None)
    assert spend(pace, 100.0, 1000)[0] == 100.0


def test_after_the_first_429_the_pace_begins_moderately_and_doubles_while_it_is_in_the_way() -> None:
    pace = Pace()
    pace.limited(100.0, 0, 1.0)
    assert (pace.is_on, pace.rate) == (True, None)
    assert pace._current() == FIRST_RATE
    now, _ = spend(pace, 101.0, 100)
    assert 101.5 < now < 101.8
    assert pace._current() > 4 * FIRST_RATE


def test_a_pace_that_is_in_nobodys_way_does_not_grow() -> None:
    pace = Pace()
    pace.limited(100.0, 0, 1.0)
    for second in range(101, 200):
        pace.take(float(second))
    assert pace._current() == FIRST_RATE


def test_all_that_was_under_way_when_the_pace_was_cut_is_no_news() -> None:
    pace = Pace()
    assert pace.limited(100.0, 0, 1.0)
    assert not pace.limited(100.01, 0, 1.0)
    now, turn = spend(pace, 101.0, 60)
    assert pace.limited(now, turn - 5, 1.0)
    assert not pace.limited(now, turn, 1.0)


def test_attempts_are_spaced_evenly_but_for_a_small_allowance() -> None:
    pace = Pace(10.0)
    assert spend(pace, 100.0, 1)[0] == 100.0
    assert spend(pace, 100.0, 1)[0] == pytest.approx(100.1 - ALLOWANCE)
    assert spend(pace, 100.5, 1)[0] == 100.5
    assert pace.rate == 10.0


def test_a_late_timer_is_made_up_for() -> None:
    pace, now = Pace(1000.0), 100.0
    for _ in range(1000):
        now += pace.ready_in(now) + 0.0005
        pace.take(now)
    assert now < 101.01


# What is learned


def cycle(pace: Pace, now: float, count: int, wait: float = 1.0) -> float:
    """Let `count` in, meet a 429 with the next, and wait."""
    now, turn = spend(pace, now, count + 1)
    assert pace.limited(now, turn, wait)
    return now + wait


def test_a_given_rate_is_the_most_from_the_start_and_is_still_cut() -> None:
    pace = Pace(50.0)
    now, turn = spend(pace, 100.0, 100)
    assert now == pytest.approx(102.0, abs=0.1)
    assert pace.limited(now, turn, 1.0)
    assert pace.rate == pytest.approx(48.5)
    now = cycle(pace, now + 1, 20)
    assert pace.rate is not None
    assert pace.rate < 50
    spend(pace, now, 5000)
    assert pace.rate == 50.0


def test_a_429_after_a_long_time_cuts_less_than_one_that_comes_soon() -> None:
    for count, least, most in ((60, 0.85, 0.851), (900, 0.92, 0.97)):
        pace = Pace()
        pace.limited(100.0, 0, 1.0)
        cycle(pace, cycle(pace, 101.0, 200), count)
        assert pace.rate is not None
        assert pace._base is not None
        assert least <= pace.rate / pace._base <= most


def test_while_nothing_is_let_in_the_pace_is_left_alone_and_the_pauses_grow() -> None:
    pace = Pace()
    pace.limited(100.0, 0, 0.25)
    now = cycle(pace, 101.0, 200, 0.25)
    first, base = pace.pause(1.0), pace._base
    for _ in range(3):
        now = cycle(pace, now, 0, 0.25)
    assert base is not None
    assert pace._base is not None
    assert base / 2 < pace._base <= base
    assert pace.pause(1.0) == pytest.approx(first * 1.5**3)
    assert pace.pause(0.0) == pace.pause(1.0) / 2
    for _ in range(20):
        now = cycle(pace, now, 0, 0.25)
    assert pace.pause(1.0) == 1.0
    now = cycle(pace, now, 50, 0.25)
    assert pace.pause(1.0) == first


def test_429s_before_anything_was_let_in_teach_nothing() -> None:
    pace, now = Pace(), 100.0
    pace.limited(now, 0, 1.0)
    for _ in range(5):
        now = cycle(pace, now + 1, 0)
    assert pace.rate is None


def test_a_long_wait_is_taken_for_a_window() -> None:
    pace = Pace()
    pace.limited(100.0, 0, 1.0)
    cycle(pace, 101.0, 1000, 9.0)
    assert pace._base == pytest.approx(100.0, rel=0.08)


def test_a_limit_that_is_met_at_the_same_pace_again_is_kept_away_from() -> None:
    pace = Pace()
    pace.limited(100.0, 0, 1.0)
    now = cycle(pace, 101.0, 120)
    for _ in range(4):  # whatever the pace is by then: always the same
        while pace._current() < 100:
            now, _ = spend(pace, now, 1)
        now = cycle(pace, now, 0) if pace._turns - pace._first < 3 else cycle(pace, now, 2)
    assert pace._streak >= 2
    rates: list[float] = []
    for _ in range(20):
        now, _ = spend(pace, now, 95)
        rates.append(pace._current())
    assert sum(90 < rate < 97 for rate in rates) >= 10  # held below
    now, _ = spend(pace, now, 4000)
    assert pace._current() > 200  # and then faster and faster


# What the head of an answer says


def said(**headers: str) -> Limits | None:
    return read_limits([(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()], 1_700_000_000.0)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"RateLimit": '"default";r=50;t=30'}, (None, 50, 30)),
        ({"RateLimit": '"default";r=50;t=30', "RateLimit_Policy": '"default";q=100;w=60'}, (100, 50, 30)),
        ({"RateLimit": '"a";r=50;t=30, "b";r=3;t=5', "RateLimit_Policy": '"a";q=9;w=60,"b";q=10;w=7'}, (10, 3, 5)),
        ({"RateLimit": '"a";r=3;t=5, "b";r=50;t=30'}, (None, 3, 5)),
        ({"RateLimit": '"b, c;r=1";r=3', "RateLimit_Policy": '"b, c;r=1";q=10;w=7;pk=:YQ==:'}, (10, 3, 7)),
        ({"RateLimit": "limit=100, remaining=50, reset=5"}, (100, 50, 5)),
        ({"RateLimit_Limit": "100", "RateLimit_Remaining": "50", "RateLimit_Reset": "5"}, (100, 50, 5)),
        ({"RateLimit_Limit": "100, 100;w=10", "RateLimit_Remaining": "0", "RateLimit_Reset": "5"}, (100, 0, 5)),
        ({"X_RateLimit_Limit": "100", "X_RateLimit_Remaining": "7", "X_RateLimit_Reset": "5.5"}, (100, 7, 5)),
        ({"X_Rate_Limit_Limit": "100", "X_Rate_Limit_Remaining": "7", "X_Rate_Limit_Reset": "5"}, (100, 7, 5)),
        ({"X_RateLimit_Remaining": "0", "X_RateLimit_Reset": "1700000009"}, (None, 0, 9)),
        ({"X_RateLimit_Remaining": "0", "X_RateLimit_Reset": "1700000009500"}, (None, 0, 9.5)),
        ({"X_RateLimit_Remaining": "0", "X_RateLimit_Reset": "1600000000"}, (None, 0, 0)),
        (
            {"Date": "Tue, 14 Nov 2023 22:13:29 GMT", "X_RateLimit_Remaining": "0", "X_RateLimit_Reset": "1700000019"},
            (None, 0, 10),
        ),
        ({"Date": "yesterday", "X_RateLimit_Remaining": "0", "X_RateLimit_Reset": "1700000019"}, (None, 0, 19)),
        ({"X_RateLimit_Remaining": "7"}, (None, 7, None)),
        ({"X_RateLimit_Remaining": "-1", "X_RateLimit_Reset": "5"}, (None, None, 5)),
    ],
)
def test_what_is_said_in_any_of_the_usual_ways_is_understood(
    headers: dict[str, str], expected: tuple[float | None, ...]
) -> None:
    limits = said(**headers)
    assert limits is not None
    assert (limits.limit, limits.remaining, limits.reset) == expected


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content_Type": "text/plain"},
        {"RateLimit": '"default"'},
        {"RateLimit": "\x00;;;=,,"},
        {"RateLimit": '"unfinished;r=5'},
        {"RateLimit_Limit": "100"},
        {"RateLimit_Remaining": "many", "RateLimit_Reset": "soon"},
        {"RateLimit_Remaining": "1" * 16},
        {"RateLimit_Remaining": "1e5"},
        {"X_RateLimit_Remaining": "0x10", "X_RateLimit_Reset": "NaN"},
        {"X_RateLimit_Remaining": "", "X_RateLimit_Reset": "-5"},
        {"RateLimit_Policy": '"default";q=100;w=60'},
    ],
)
def test_what_cannot_be_understood_is_as_if_it_were_not_there(headers: dict[str, str]) -> None:
    assert said(**headers) is None


def test_what_comes_from_a_stranger_is_read_in_no_time() -> None:
    """Since what is longer than `LONGEST_FIELD` is not read at all."""
    field = ('"a";r=1,' * LONGEST_FIELD)[:LONGEST_FIELD]
    assert said(RateLimit=field) is not None
    assert said(RateLimit=f"{field} ") is None
    for text in ('"', "\\", '"a";r=', ",", '"\\'):
        for size in (LONGEST_FIELD, 10**6):
            field = (text * size)[:size]
            assert said(RateLimit=field, RateLimit_Policy=field) is None


def test_where_nothing_is_left_the_gate_is_to_shut_until_there_is() -> None:
    assert Pace().heed(100.0, Limits(100, 0, 5)) == 5


@pytest.mark.parametrize("limits", [(100, None, 5), (100, 0, None), (100, 0, 0), (100, 50, 5), (None, 50, 5)])
def test_what_says_little_or_that_much_is_left_holds_up_nobody(limits: tuple[float | None, ...]) -> None:
    pace = Pace()
    assert pace.heed(100.0, Limits(*limits)) == 0
    assert not pace.is_capped(100.0)
    assert spend(pace, 100.0, 100)[0] == 100.0


def test_what_little_is_left_is_spread_over_the_time_that_it_must_last() -> None:
    pace = Pace()
    pace.heed(100.0, Limits(100, 20, 5))
    assert pace.is_capped(104.9)
    assert spend(pace, 100.0, 20)[0] == pytest.approx(104.75, abs=0.1)
    assert not pace.is_capped(105.0)
    pace.heed(104.0, Limits(100, 99, 5))
    assert not pace.is_capped(104.1)


# In simulation: what is promised for a quota that nobody told us

QUOTAS: dict[str, Callable[[float, random.Random], Quota]] = {
    "token bucket": lambda rate, _: TokenBucket(rate, rate),
    "small bucket": lambda rate, _: TokenBucket(rate, rate / 5),
    "large bucket": lambda rate, _: TokenBucket(rate, rate * 5),
    "10 s window": lambda rate, chance: FixedWindow(int(rate * 10), 10, chance.uniform(0, 10)),
    "1 s window": lambda rate, chance: FixedWindow(int(rate), 1, chance.uniform(0, 1)),
    "a third": lambda rate, _: DroppingBucket(rate, rate),
}


@attrs.frozen
class Extent:
    """How much is simulated: 20 seeds of 60 s, or less of it, and then `slack` less is asked of the quota."""

    seed: int
    seeds: int
    seconds: float = 60.0
    slack: float = 0.0

    @classmethod
    def of(cls, seed: int, rate: float, *, full: bool) -> Extent:
        return cls(seed, 20) if full else cls(seed, 1) if rate == 100 else cls(seed, 1, 10.0, 0.3)

    def run(self, kind: str, rate: float, *, processes: int = 1, says_when: bool = True) -> list[Result]:
        results: list[Result] = []
        for seed in range(self.seed, self.seed + self.seeds):
            quota = QUOTAS[kind](rate, random.Random(seed))
            simulation = Simulation(quota, seed=seed, processes=processes, says_when=says_when)
            results.append(simulation.run(self.seconds))
        return results

    def __str__(self) -> str:
        return f"{self.seeds} x {self.seconds:.0f} s"


def figures(results: list[Result]) -> tuple[float, float, float]:
    return (
        median([result.used for result in results]),
        median([result.share_refused for result in results]),
        median([result.fairness for result in results]),
    )


def shown(used: float, refused: float, fairness: float) -> str:
    return f"{used:.1%} of the quota used, {refused:.1%} answered 429, Jain {fairness:.3f}"


@pytest.mark.promise
@pytest.mark.parametrize("rate", [100, 1000])
@pytest.mark.parametrize(
    ("kind", "least"), [("token bucket", 0.93), ("large bucket", 0.93), ("10 s window", 0.90), ("1 s window", 0.80)]
)
def test_an_unknown_quota_is_used(kind: str, least: float, rate: int, full: bool, seed: int, report: list[str]) -> None:
    extent = Extent.of(seed, rate, full=full)
    used, refused, fairness = figures(extent.run(kind, rate))
    report.append(f"{extent}: {shown(used, refused, fairness)}")
    assert used >= least - extent.slack
    assert refused <= 0.08


@pytest.mark.promise
@pytest.mark.parametrize("rate", [100, 1000])
@pytest.mark.parametrize(
    ("kind", "least"), [("token bucket", 0.93), ("small bucket", 0.8), ("10 s window", 0.90), ("1 s window", 0.85)]
)
def test_an_unknown_quota_is_used_where_no_answer_says_when_to_come_again(
    kind: str, least: float, rate: int, full: bool, seed: int, report: list[str]
) -> None:
    extent = Extent.of(seed, rate, full=full)
    used, refused, fairness = figures(extent.run(kind, rate, says_when=False))
    report.append(f"{extent}: {shown(used, refused, fairness)}")
    assert used >= least - extent.slack
    assert refused <= 0.08


@pytest.mark.promise
@pytest.mark.parametrize("rate", [100, 1000])
@pytest.mark.parametrize("kind", ["token bucket", "10 s window"])
def test_four_processes_that_know_nothing_of_each_other_share_a_quota_fairly(
    kind: str, rate: int, full: bool, seed: int, report: list[str]
) -> None:
    extent = Extent.of(seed, rate, full=full)
    used, refused, fairness = figures(extent.run(kind, rate, processes=4))
    report.append(f"{extent}: {shown(used, refused, fairness)}")
    assert used >= (0.93 if "bucket" in kind else 0.90) - extent.slack
    assert refused <= 0.08
    # Short of the 0.99 that is aimed at only here: a whole second of Retry-After falls on few at a time, by chance.
    aim = 0.975 if (kind, rate) == ("token bucket", 100) else 0.99
    assert fairness >= (aim if full else 0.95)


@pytest.mark.promise
@pytest.mark.parametrize("says_when", [True, False])
def test_a_quota_that_drops_to_a_third_and_comes_back_is_followed(
    says_when: bool, full: bool, seed: int, report: list[str]
) -> None:
    extent = Extent.of(seed, 100, full=full)
    results = extent.run("a third", 100, says_when=says_when)
    used, refused, fairness = figures(results)
    report.append(f"{extent}: {shown(used, refused, fairness)}")
    assert used >= 0.85
    assert refused <= 0.08
    for result in results:
        assert sum(result.by_second[25:39]) >= 14 * 33 * 0.8
        assert sum(result.by_second[54:59]) >= 5 * 70


def test_a_given_quota_is_used_and_never_exceeded() -> None:
    simulation = Simulation(TokenBucket(1e9, 1e9), seed=1, pacing=Pacing(rate=50))
    simulation.first = 0.0
    result = simulation.run(10.0)
    assert result.refused == 0
    assert 490 <= sum(result.admitted) <= 503


def test_a_window_that_says_what_is_left_is_used_up_without_a_429() -> None:
    window = FixedWindow(1000, 10, 0.0)

    def headers(now: float) -> dict[str, str]:
        reset = window.began + window.seconds - now
        return {
            "RateLimit": f'"w";r={window.left};t={max(1, round(reset + 0.5))}',
            "RateLimit-Policy": '"w";q=1000;w=10',
        }

    simulation = Simulation(window, seed=1, headers=headers)
    simulation.first = 0.0
    result = simulation.run(60.0)
    assert result.refused <= 10
    assert sum(result.admitted) >= 5800
