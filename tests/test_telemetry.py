"""Events and who listens to them; what a client tells is in test_client.py."""

from __future__ import annotations

import logging
import sys

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from layer_async._errors import ConfigurationError, RequestInfo
from layer_async._telemetry import (
    AttemptFinished,
    CallFinished,
    GateShut,
    LoggingObserver,
    OpenTelemetryObserver,
    PaceChanged,
    RetryScheduled,
    TokensRefreshed,
    notify,
)

REQUEST = RequestInfo("GET", "https://host.invalid/x")


def test_without_an_observer_nothing_is_told_and_nothing_goes_wrong(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "layer_async")
    notify(None, GateShut(1.0))
    assert caplog.records == []


def test_the_logging_observer_says_each_event_in_a_line_at_its_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "layer_async")
    log = LoggingObserver()
    log(AttemptFinished(REQUEST, 1, 503, None, 0.5, reused=True))
    log(AttemptFinished(REQUEST, 2, None, "ReadError", 0.5, reused=None))
    log(RetryScheduled(REQUEST, 1, "503", 0.25))
    log(GateShut(2.0))
    log(PaceChanged(42.123))
    log(TokensRefreshed(2))
    log(CallFinished(REQUEST, 200, None, 2, 1.0))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "GET https://host.invalid/x: attempt 1: 503 in 0.500 s"),
        ("DEBUG", "GET https://host.invalid/x: attempt 2: ReadError in 0.500 s"),
        ("WARNING", "GET https://host.invalid/x: attempt 1 met 503, next in 0.25 s"),
        ("WARNING", "the server said slow down: all attempts wait for 2.00 s"),
        ("INFO", "the quota seems to allow 42.1 attempts a second"),
        ("INFO", "new tokens, generation 2"),
        ("DEBUG", "GET https://host.invalid/x: 200 after 2 attempts in 1.000 s"),
    ]


def test_the_opentelemetry_observer_counts_each_event_and_names_no_url() -> None:
    reader = InMemoryMetricReader()
    observe = OpenTelemetryObserver(MeterProvider([reader]).get_meter("test"))
    observe(AttemptFinished(REQUEST, 1, 503, None, 0.5, reused=True))
    observe(RetryScheduled(REQUEST, 1, "503", 0.25))
    observe(AttemptFinished(REQUEST, 2, None, "ReadError", 0.5, reused=None))
    observe(GateShut(2.0))
    observe(PaceChanged(42.0))
    observe(TokensRefreshed(2))
    observe(CallFinished(REQUEST, 200, None, 2, 1.0))
    data = reader.get_metrics_data()
    assert data is not None
    metrics = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    assert set(metrics) == {
        "layer.attempts",
        "layer.call.duration",
        "layer.gate.shut",
        "layer.pace",
        "layer.retries",
        "layer.token.refreshes",
    }
    outcomes = [(point.attributes or {})["layer.outcome"] for point in metrics["layer.attempts"].data.data_points]
    assert sorted(map(str, outcomes)) == ["503", "ReadError"]
    assert "host.invalid" not in data.to_json()


def test_the_opentelemetry_observer_takes_the_global_provider_and_says_which_extra_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    OpenTelemetryObserver()(GateShut(1.0))
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with pytest.raises(
        ConfigurationError,
        match=r"needs the extra `otel`: pip install 'layer-async\[otel\]' \(in a checkout: pip install '\.\[otel\]'\)",
    ):
        OpenTelemetryObserver()


def test_an_observer_that_fails_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: object) -> None:
        raise RuntimeError("broken meter")

    notify(broken, GateShut(1.0))
    assert "the observer failed on GateShut" in caplog.text
