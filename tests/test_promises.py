"""The table of promises says what the tests found."""

from __future__ import annotations

from .promises import Kept, merged, table, updated


def kept(promise: str, test: str = "t", measured: str = "{:.0f} ms", **figures: float) -> Kept:
    return Kept(test, promise, "<= 50 ms", measured, 7, **figures)


def test_the_worst_figure_of_a_promise_is_shown_or_the_sum() -> None:
    rows = merged([kept("late", most=5), kept("late", most=9), kept("late", most=8)])
    assert rows["late"].most == 9
    rows = merged([kept("cancels", total=5), kept("cancels", total=9)])
    assert rows["cancels"].total == 14
    assert list(merged([kept("words", measured="none"), kept("words", measured="none")])) == ["words"]


def test_a_run_updates_the_rows_that_it_kept_and_drops_those_that_it_broke() -> None:
    now = {"date": "2026-01-02", "machine": "a machine"}
    old = updated({}, [kept("one", "a", most=1), kept("two", "b", most=2)], [], date="2026-01-01", machine="another")
    rows = updated(old, [kept("one", "a", most=3), kept("three", "c", most=3)], ["b", "c"], **now)
    assert rows == {"one": {"promised": "<= 50 ms", "measured": "3 ms", "seed": 7, "test": "a", **now}}


def test_the_table_names_machine_and_date() -> None:
    rows = updated({}, [kept("one", most=1)], [], date="2026-01-01", machine="a machine")
    assert table(rows).splitlines()[0] == "a machine, 2026-01-01."
    assert "| one | <= 50 ms | 1 ms | 7 |" in table(rows)
    assert table({}).startswith("No full run")
