"""What a client tells of its work: frozen events, and who listens to them.

Rules: an event carries no secret (no header, no query, no body). An observer is called synchronously on the event loop:
it must be quick, and what it raises is logged and goes no further, since a broken meter must not fail a call.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from ._errors import ConfigurationError, RequestInfo
from ._values import Value
from ._version import __version__

__all__ = [
    "AttemptFinished",
    "CallFinished",
    "Event",
    "GateShut",
    "LoggingObserver",
    "Observer",
    "OpenTelemetryObserver",
    "PaceChanged",
    "RetryScheduled",
    "TokensRefreshed",
]

logger = logging.getLogger("layer_async")


class AttemptFinished(Value):
    """One attempt came back: with `status_code`, or with `error` (the name of the httpx exception) instead.

    `number` counts from 1, `elapsed` is in seconds, `reused` tells whether the connection had served before (None: the
    transport does not say).
    """

    __match_args__ = ("request", "number", "status_code", "error", "elapsed", "reused")
    __slots__ = __match_args__

    def __init__(
        self,
        request: RequestInfo,
        number: int,
        status_code: int | None,
        error: str | None,
        elapsed: float,
        reused: bool | None,  # noqa: FBT001 - a field
    ) -> None:
        self.request = request
        self.number = number
        self.status_code = status_code
        self.error = error
        self.elapsed = elapsed
        self.reused = reused


class RetryScheduled(Value):
    """Attempt `number` met `cause` (a status or an exception's name), and another follows in `delay` seconds."""

    __match_args__ = ("request", "number", "cause", "delay")
    __slots__ = __match_args__

    def __init__(self, request: RequestInfo, number: int, cause: str, delay: float) -> None:
        self.request = request
        self.number = number
        self.cause = cause
        self.delay = delay


class GateShut(Value):
    """The server said slow down: no attempt of this client starts for the next `delay` seconds."""

    __match_args__ = ("delay",)
    __slots__ = __match_args__

    def __init__(self, delay: float) -> None:
        self.delay = delay


class PaceChanged(Value):
    """The quota seems to allow `rate` attempts a second, noticeably more or less than was thought before."""

    __match_args__ = ("rate",)
    __slots__ = __match_args__

    def __init__(self, rate: float) -> None:
        self.rate = rate


class TokensRefreshed(Value):
    """The source of the tokens was asked and gave a new pair; `generation` counts the pairs, from 1."""

    __match_args__ = ("generation",)
    __slots__ = __match_args__

    def __init__(self, generation: int) -> None:
        self.generation = generation


class CallFinished(Value):
    """A call is over: with `status_code`, or with `error` (the name of our exception), after `attempts` attempts.

    `elapsed` is in seconds and includes the queue, sleeps and the body.
    """

    __match_args__ = ("request", "status_code", "error", "attempts", "elapsed")
    __slots__ = __match_args__

    def __init__(
        self, request: RequestInfo, status_code: int | None, error: str | None, attempts: int, elapsed: float
    ) -> None:
        self.request = request
        self.status_code = status_code
        self.error = error
        self.attempts = attempts
        self.elapsed = elapsed


Event = AttemptFinished | RetryScheduled | GateShut | PaceChanged | TokensRefreshed | CallFinished


class Observer(Protocol):
    """Anything that can be called with an event. Called on the event loop: be quick, do not block."""

    def __call__(self, event: Event, /) -> None:
        """Take note of `event`."""


def hears_all(observer: Observer | None) -> bool:
    """Whether `observer` does anything with the events of calls that went well: those need not be made otherwise."""
    if type(observer) is LoggingObserver:
        return logger.isEnabledFor(logging.DEBUG)
    return observer is not None


def notify(observer: Observer | None, event: Event) -> None:
    """Give `event` to `observer`; what the observer raises is logged and goes no further."""
    if observer is None:
        return
    try:
        observer(event)
    except Exception:  # the one place where everything is caught: see the rules above
        logger.exception("the observer failed on %s", type(event).__name__)


class LoggingObserver:
    """Logs events under the logger `layer_async`: retries and a shut gate as warnings, the rest as debug messages."""

    def __call__(self, event: Event, /) -> None:
        """Log `event`."""
        match event:
            case RetryScheduled():
                logger.warning(
                    "%s: attempt %d met %s, next in %.2f s", event.request, event.number, event.cause, event.delay
                )
            case GateShut():
                logger.warning("the server said slow down: all attempts wait for %.2f s", event.delay)
            case PaceChanged():
                logger.info("the quota seems to allow %.3g attempts a second", event.rate)
            case TokensRefreshed():
                logger.info("new tokens, generation %d", event.generation)
            case AttemptFinished():
                logger.debug(
                    "%s: attempt %d: %s in %.3f s",
                    event.request,
                    event.number,
                    event.error or event.status_code,
                    event.elapsed,
                )
            case _:
                logger.debug(
                    "%s: %s after %d attempts in %.3f s",
                    event.request,
                    event.error or event.status_code,
                    event.attempts,
                    event.elapsed,
                )


class OpenTelemetryObserver:
    """Counts events with OpenTelemetry: give it as `observer=`. Needs the extra `otel`, and a meter provider.

    `layer.call.duration` (seconds) and `layer.attempts` by method and outcome (a status, or an error's name),
    `layer.retries` by cause, `layer.gate.shut` (seconds), `layer.pace` (attempts a second) and
    `layer.token.refreshes`. `meter` is an OpenTelemetry
    meter; by default that of the global provider. No URL becomes an attribute: there may be as many as documents. For
    spans use OpenTelemetry's own instrumentation of httpx, which sees each attempt. Raises `ConfigurationError` without
    the extra.
    """

    def __init__(self, meter: Any = None) -> None:
        if meter is None:
            try:
                from opentelemetry.metrics import get_meter
            except ImportError:
                raise ConfigurationError(
                    "OpenTelemetryObserver needs the extra `otel`: "
                    "pip install 'layer-async[otel]' (in a checkout: pip install '.[otel]')."
                ) from None
            meter = get_meter("layer_async", __version__)
        self._duration = meter.create_histogram("layer.call.duration", "s", "from the start of a call to its end")
        self._attempts = meter.create_counter("layer.attempts", "1", "attempts that came back")
        self._retries = meter.create_counter("layer.retries", "1", "attempts that followed a failed one")
        self._shut = meter.create_histogram("layer.gate.shut", "s", "for how long the server wanted no attempt")
        self._pace = meter.create_histogram("layer.pace", "1/s", "attempts a second that the quota seems to allow")
        self._refreshes = meter.create_counter("layer.token.refreshes", "1", "pairs of tokens taken from the source")

    def __call__(self, event: Event, /) -> None:
        """Count `event`."""
        match event:
            case CallFinished():
                self._duration.record(event.elapsed, _attributes(event))
            case AttemptFinished():
                self._attempts.add(1, _attributes(event))
            case RetryScheduled():
                self._retries.add(1, {"http.request.method": event.request.method, "layer.cause": event.cause})
            case GateShut():
                self._shut.record(event.delay)
            case PaceChanged():
                self._pace.record(event.rate)
            case _:
                self._refreshes.add(1)


def _attributes(event: CallFinished | AttemptFinished) -> dict[str, str]:
    return {"http.request.method": event.request.method, "layer.outcome": event.error or str(event.status_code)}
