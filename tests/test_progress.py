"""How far a bulk has come: what is counted, at which rate, and when that is reason to stop."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from layer_async import ConfigurationError, Progress
from layer_async._progress import Meter, stop_rule


def counted(meter: Meter, times: list[float], *, failed: int = 0) -> Meter:
    for number, now in enumerate(times):
        meter.count(now, ok=number >= failed)
    return meter


def test_a_meter_counts_what_is_done_and_what_of_it_failed() -> None:
    meter = counted(Meter(0.0, 10), [0.1, 0.2, 0.3], failed=1)
    meter.skipped = 4
    progress = meter.progress(1.0, held=2)
    assert progress == Progress(done=3, failed=1, skipped=4, held=2, rate=3.0, eta=1.0, total=10)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        progress.done = 4  # type: ignore[misc]


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    meter = counted(Meter(0.0, None), [number / 10 for number in range(1000)])  # 10/s for 100 s
    assert meter.progress(100.0).rate == pytest.approx(10.0, rel=0.1)
    counted(meter, [100 + number / 100 for number in range(2000)])  # then 100/s for 20 s
    assert meter.progress(120.0).rate == pytest.approx(100.0, rel=0.1)
    assert meter.progress(125.0).rate == pytest.approx(50.0, rel=0.2)
    meter.progress(131.0)
    assert meter.progress(141.0).rate == 0.0


def test_the_marks_of_a_long_run_are_few() -> None:
    meter = counted(Meter(0.0, None), [float(number) for number in range(10_000)])
    assert len(meter._marks) <= 22


def test_the_rest_takes_as_long_as_the_rate_says_and_nobody_knows_without_one() -> None:
    assert Meter(0.0, 10).progress(0.0).eta is None
    assert Meter(0.0, 10).progress(5.0).eta is None
    assert counted(Meter(0.0, None), [1.0]).progress(2.0).eta is None
    assert counted(Meter(0.0, 5), [1.0]).progress(2.0).eta == 8.0
    assert counted(Meter(0.0, 1), [1.0]).progress(2.0).eta == 0.0
    assert counted(Meter(0.0, 1), [1.0, 1.5]).progress(2.0).eta == 0.0  # a list that grew


def reason(rule: Any, meter: Meter) -> str | None:
    return stop_rule(rule)(meter, lambda: meter.progress(1.0))


def test_a_number_of_failures_is_reason_to_stop() -> None:
    assert reason(3, counted(Meter(0.0, None), [0.1] * 9, failed=2)) is None
    assert reason(3, counted(Meter(0.0, None), [0.1] * 9, failed=3)) == "3 items have failed."


def test_a_failure_rate_is_reason_to_stop_once_enough_is_done() -> None:
    assert reason(0.5, counted(Meter(0.0, None), [0.1] * 19, failed=19)) is None
    assert reason(0.5, counted(Meter(0.0, None), [0.1] * 20, failed=9)) is None
    assert reason(0.5, counted(Meter(0.0, None), [0.1] * 20, failed=10)) == "10 of 20 items have failed."
    assert reason(1.0, counted(Meter(0.0, None), [0.1] * 20, failed=20)) is not None


def test_a_function_of_the_progress_decides() -> None:
    meter = counted(Meter(0.0, None), [0.1] * 9, failed=2)
    assert reason(lambda progress: progress.done == 9, meter) == "stop_when said so."
    assert reason(lambda progress: progress.done == 8, meter) is None


@pytest.mark.parametrize("wrong", [0, -1, True, False, 0.0, -0.1, 1.1, float("nan"), "5", [3]])
def test_what_is_no_rule_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="`stop_when`"):
        stop_rule(wrong)
