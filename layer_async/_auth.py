"""`DualTokenAuth`: attaches the pair to each attempt, and replaces it for all callers at once.

Rules: a pair is replaced as one, with a generation that counts up: never an old Token1 with a new Token2. The source is
asked by one caller for all who wait. Nothing secret is in a repr, an error, or a local variable that a traceback of
ours could show. This room waits for nothing but the source, and knows neither retry nor pool.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections import OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    Callable,
    Generator,
)
from contextvars import ContextVar
from types import TracebackType
from typing import Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx

from ._coding import read_bounded
from ._errors import (
    BODY_LIMIT,
    AuthenticationError,
    ConfigurationError,
    RequestInfo,
    status_error,
)
from ._exchange import EXTENSION, ExchangeRecord, is_replayable
from ._origin import MaskedHeaders, Origin, carries_tokens, strip_tokens
from ._tokens import HeaderEntry, TokenPair, TokenSource, tokens_flaw

_pause = anyio.sleep
SETBACK_SECONDS = 1.0  # so long is a source left alone that raised or had nothing new
PROBE_SECONDS = 30.0  # so often is one call let through an open circuit
SOURCE_THREADS = 4
PAIRS_REMEMBERED = 4

CIRCUIT_ADVICE = (
    "Nothing was sent this time: these tokens were refused before, with no success since. "
    f"One call is let through every {PROBE_SECONDS:.0f} s, and all of them once there are new tokens."
)


async def _read_briefly(response: httpx.Response) -> bytes | None:
    """Read at most 64 KiB, so that the connection is free; None where a hook has taken the body already."""
    try:
        await read_bounded(response, BODY_LIMIT, truncate=True)
        return response.content
    except httpx.StreamError:
        await response.aclose()
        return None


async def _pass_gate(request: httpx.Request) -> None:
    """The loop above does not see the attempt that follows here: ask its gate, where it has one."""
    record = request.extensions.get(EXTENSION)
    if isinstance(record, ExchangeRecord):
        await record.pass_gate()


# How tokens are replaced


class _Issue:
    """A pair and its number; replaced as one, never changed."""

    __slots__ = ("generation", "pair")

    def __init__(self, pair: TokenPair | None, generation: int) -> None:
        self.pair: TokenPair | None = pair
        self.generation: int = generation


_NOTHING = _Issue(None, 0)


class Turn:
    """One request's way through the auth: which pair it carries, and whether it has been sent once more already.

    `is_probe`: it is the one call that an open circuit lets through.
    """

    __slots__ = ("is_probe", "is_second", "issue")

    def __init__(self) -> None:
        self.issue: _Issue = _NOTHING
        self.is_second: bool = False
        self.is_probe: bool = False


class _Circuit:
    """Whether the tokens are refused so clearly that sending more calls is pointless; decides, and is told the time.

    `fresh` counts the pairs in a row, from generation `first` on, that were refused without ever having met success;
    `proven` and `counted` are the newest generations that met success and that were counted. `paths` holds where the
    current pair was refused for good. While `error` is set the circuit is open.
    """

    def __init__(self) -> None:
        self.proven: int = 0
        self.counted: int = 0
        self.first: int = 0
        self.fresh: int = 0
        self.paths: set[str] = set()
        self.error: AuthenticationError | None = None
        self.probe_at: float = 0.0

    def is_moved_by(self, issue: _Issue) -> bool:
        """Whether a success of the current `issue` is news."""
        return self.proven != issue.generation or self.fresh > 0 or bool(self.paths) or self.error is not None

    def meet_success(self, generation: int) -> None:
        """The current pair is fine."""
        self.proven = generation
        if self.fresh or self.paths or self.error is not None:
            self.fresh, self.error = 0, None
            self.paths.clear()

    def meet_late_success(self, generation: int) -> None:
        """A call still under way when its pair was replaced; it was one between, if sent with a pair new enough.

        The pair before the first that was refused is new enough to keep the circuit closed, not to close it: the call
        may have been answered before the server changed its mind.
        """
        self.proven = max(self.proven, generation)
        if generation >= self.first - (self.error is None):
            self.fresh = 0
            if len(self.paths) < 2:  # else it is open for what the current pair met
                self.error = None

    def meet_new_pair(self) -> None:
        self.error = None
        self.paths.clear()

    def meet_refusal(self, generation: int) -> bool:
        """A 401 for a pair of `generation`; True when enough is known to open."""
        if generation > max(self.proven, self.counted):
            self.counted = generation
            self.first = self.first if self.fresh else generation
            self.fresh += 1
        return self.fresh >= 2

    def meet_final_refusal(self, path: str) -> bool:
        """A 401 at `path` with no newer pair in sight; True when enough is known to open."""
        if len(self.paths) < 2:
            self.paths.add(path)
        return len(self.paths) >= 2

    def open(self, error: AuthenticationError, now: float) -> None:
        self.error, self.probe_at = error, now + PROBE_SECONDS

    def lets_through(self, now: float) -> bool:
        """Whether a call may go out although the circuit is open: one may, every 30 s.

        A time, not a turn that is given back: so a probe that is cancelled cannot leave the circuit stuck.
        """
        if now < self.probe_at:
            return False
        self.probe_at = now + PROBE_SECONDS
        return True


class _Waiter:
    """Somebody who waits for a flight to land."""

    def __init__(self) -> None:
        self.event: anyio.Event = anyio.Event()
        self.leads: bool = False


class _Setback:
    """The last asking brought nothing new: nothing at all, or an error."""

    def __init__(self, until: float, error: Exception | None = None, traceback: TracebackType | None = None) -> None:
        self.until: float = until
        self.error: Exception | None = error
        self.traceback: TracebackType | None = traceback

    def reraise(self) -> None:
        if self.error is not None:
            # Each raising would lengthen the traceback, were it shared by all who wait.
            raise _twin(self.error).with_traceback(self.traceback)


def _twin(error: Exception) -> Exception:
    """Another error just like `error`, for another who waits; `error` itself where none can be made."""
    try:
        twin = copy.copy(error)
        is_like = type(twin) is type(error) and bool(twin.args == error.args)
    except Exception:  # whatever a class of the user's raises that cannot be copied
        return error
    if not is_like:
        return error
    twin.__cause__, twin.__suppress_context__ = error.__cause__, error.__suppress_context__
    return twin


class _Flight:
    """One asking of the source, for all who wait for it on one event loop.

    One caller leads. Cancelled, it hands over to the next who waits, in O(1); the last one out ends the flight.
    """

    def __init__(self, auth: DualTokenAuth, loop: object, generation: int) -> None:
        self.auth: DualTokenAuth = auth
        self.loop: object = loop
        self.generation: int = generation
        self.asking: bool = True
        self.setback: _Setback | None = None
        self.waiters: OrderedDict[_Waiter, None] = OrderedDict()

    def wake(self) -> None:
        """It is over, for all who wait."""
        for waiter in self.waiters:
            waiter.event.set()
        self.waiters.clear()

    def hand_over(self) -> bool:
        """Make the next who waits lead; False where nobody waits."""
        if not self.waiters:
            return False
        heir, _ = self.waiters.popitem(last=False)
        heir.leads = True
        heir.event.set()
        return True


_asking: ContextVar[tuple[_Flight, ...]] = ContextVar("layer_async_asking", default=())


class DualTokenAuth(httpx.Auth):
    """Puts both tokens on each request to `origin`, on no other, and replaces them when they are refused.

    Works with any `httpx.AsyncClient(auth=…)`. `tokens` is a `TokenPair`, or a callable that returns one (or an
    awaitable of one); a plain callable is called in a worker thread. A 401 makes one caller ask the source for all who
    wait; each then tries once more, if there is a newer pair and its body can be sent again. A source that gives the
    refused pair once more may be behind: it is asked again 1 s later, if the scopes around the caller last so long.
    What the source raises, they all raise, each a copy where there can be one; it is asked again after 1 s at the
    earliest. `origin` is a URL,
    read by `Origin.parse` with `allow_http`. `on_refresh` is called with each new generation and must not raise;
    `clock` gives monotonic seconds.

    Raises `ConfigurationError` at construction for a wrong `tokens` or `origin`; in a flow for a source that gives
    something else than a `TokenPair` or calls the client that it serves; `AuthenticationError` in a flow, before
    anything is sent, once two fresh pairs in a row, or one pair on two different paths, were refused with no success
    between. From then one call is let through every 30 s, until one succeeds or there is a newer pair; a source that
    had none is asked each second that somebody calls.
    """

    def __init__(
        self,
        tokens: TokenPair | TokenSource,
        *,
        origin: str | httpx.URL | Origin,
        allow_http: bool = False,
        on_refresh: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        flaw = tokens_flaw(tokens)
        self._source: TokenSource | None = None
        self._pairs: deque[TokenPair] = deque(maxlen=PAIRS_REMEMBERED)
        self._issue = _Issue(None, 0)
        self._circuit = _Circuit()
        self._flight: _Flight | None = None
        self._setback: _Setback | None = None
        self._threads: set[object] = set()
        self._clock = clock
        self.on_refresh = on_refresh
        if isinstance(tokens, TokenPair):
            self._install(tokens)
        else:
            self._source = tokens
        del tokens
        if flaw is None and on_refresh is not None and not callable(on_refresh):
            flaw = f"on_refresh must be callable, and {type(on_refresh).__name__} is not."
        if flaw is not None:
            raise ConfigurationError(flaw)
        self.origin: Origin = origin if isinstance(origin, Origin) else Origin.parse(origin, allow_http=allow_http)

    def __repr__(self) -> str:
        # A traceback may show it while it is half made.
        return f"DualTokenAuth(origin='{self.__dict__.get('origin')}', generation={self.generation})"

    @property
    def generation(self) -> int:
        """The number of the current pair: 0 before a source was first asked, one more with each new pair."""
        return self._issue.generation

    @property
    def is_refused(self) -> bool:
        """Whether the auth circuit is open: the tokens are refused, and calls fail before anything is sent."""
        return self._circuit.error is not None

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values of the current and the last few pairs, longest first, to be scrubbed from text."""
        values = {value for pair in self._pairs for value in (pair.token1, pair.token2)}
        return tuple(sorted(values, key=lambda value: (-len(value), value)))

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Not offered: raises RuntimeError."""
        raise RuntimeError("DualTokenAuth is for httpx.AsyncClient; it cannot serve a synchronous httpx.Client")

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """What httpx drives: attach, send, and after a 401 perhaps once more. See the class for what is raised."""
        if not self.origin.admits(request.url):
            strip_tokens(request)
            yield request
            return
        turn = self.begin() or await self.wait_to_begin(request)
        following: httpx.Request | None = request
        while following is not None:
            self.draw(turn)
            self.attach(turn, following)
            response = yield following
            if response.status_code not in (401, 403):
                self.conclude(turn, response)
                return
            following = await self.follow_up(turn, response, sent=following)

    def begin(self) -> Turn | None:
        """What a request at the origin needs before it is sent, where nobody has to wait for it: else None."""
        if self._issue.pair is None or self._circuit.error is not None or _asking.get():
            return None
        return Turn()

    async def wait_to_begin(self, request: httpx.Request) -> Turn:
        """The same, where the source has to be asked, or the circuit is open. See the class for what is raised."""
        if _asking.get():
            self._refuse_own_source(request)
        is_behind = self._source is not None and len(self._circuit.paths) >= 2
        if self._issue.pair is None or (is_behind and self._setback_left() <= 0):
            await self._renew(request)
        turn = Turn()
        turn.is_probe = self._circuit.error is not None and self._enter_open_circuit(request)
        return turn

    def draw(self, turn: Turn) -> tuple[HeaderEntry, ...]:
        """What the next request of `turn` carries: the pair of now."""
        turn.issue = issue = self._issue
        return cast(TokenPair, issue.pair).entries

    def attach(self, turn: Turn, request: httpx.Request) -> None:
        """Put what was drawn on `request`, which goes to the origin."""
        request.headers = MaskedHeaders(request, cast(TokenPair, turn.issue.pair), self.origin)

    def conclude(self, turn: Turn, response: httpx.Response) -> None:
        """Take note of an answer that is neither 401 nor 403; nothing follows."""
        if self._is_news(turn) and response.is_success and carries_tokens(response.request):
            self._meet_success(turn)

    def succeed(self, turn: Turn) -> None:
        """Take note of a success of what was drawn."""
        if self._is_news(turn):
            self._meet_success(turn)

    def _is_news(self, turn: Turn) -> bool:
        issue = turn.issue
        return issue is not self._issue or self._circuit.is_moved_by(issue)

    def _meet_success(self, turn: Turn) -> None:
        issue = turn.issue
        meet = self._circuit.meet_success if issue is self._issue else self._circuit.meet_late_success
        meet(issue.generation)

    async def follow_up(self, turn: Turn, response: httpx.Response, *, sent: httpx.Request) -> httpx.Request | None:
        """What is to be sent after a 401 or 403 to `sent`, if anything; where that is so, the answer has been read."""
        answered = response.request
        if not carries_tokens(answered):
            lost = self._lost_tokens_on_the_way(sent, response)
            return answered if lost and await _read_briefly(response) is not None else None
        if response.status_code == 403 or await _read_briefly(response) is None:
            return None
        if not await self._has_newer(turn, response) or turn.is_second or not is_replayable(answered):
            return None
        turn.is_second = True
        await _pass_gate(answered)
        return answered

    def _lost_tokens_on_the_way(self, request: httpx.Request, response: httpx.Response) -> bool:
        """Whether `response` refuses a request that httpx, below us, redirected within the origin, as a copy.

        Then the tokens belong on that one too; unless another origin had its hand in the way there.
        """
        answered = response.request
        return (
            answered is not request
            and all(self.origin.admits(hop.request.url) for hop in (*response.history, response))
            and is_replayable(answered)
        )

    async def _has_newer(self, turn: Turn, response: httpx.Response) -> bool:
        """Take note that the pair of `turn` met a 401; whether a newer pair is there now, and worth trying."""
        issue = turn.issue
        if issue is self._issue and self._circuit.meet_refusal(issue.generation):
            self._open_circuit(response)
        may_ask = not turn.is_second and (turn.is_probe or self._circuit.error is None)
        if issue is self._issue and may_ask and self._source is not None:
            await self._renew(response.request)
            if issue is self._issue and self._sits_out_setback():  # it may be behind: a cache, a secret being mounted
                await self._renew(response.request, sits_out=True)
        if issue is not self._issue:
            return self._circuit.error is None
        if self._circuit.meet_final_refusal(response.request.url.path):
            self._open_circuit(response)
        return False

    def _open_circuit(self, response: httpx.Response) -> None:
        if self._circuit.error is None:
            error = cast(AuthenticationError, status_error(response, response.content, secrets=self.secrets))
            error.args = (f"{error.args[0]} {CIRCUIT_ADVICE}",)
            self._circuit.open(error, self._clock())

    def _enter_open_circuit(self, request: httpx.Request) -> bool:
        """True for the one call that is let through; raises for all others."""
        if self._circuit.lets_through(self._clock()):
            return True
        error = copy.copy(cast(AuthenticationError, self._circuit.error))
        error.request = RequestInfo.of(request)
        del request
        raise error

    def _refuse_own_source(self, request: httpx.Request) -> None:
        if any(flight.auth is self and flight.asking for flight in _asking.get()):
            info = RequestInfo.of(request)
            del request
            raise ConfigurationError(
                "the source of the tokens called the client that it serves, which would wait for itself for ever. "
                "Give the source a client of its own.",
                request=info,
            )

    def _setback_left(self) -> float:
        """For how many seconds the source is not asked again."""
        return 0.0 if self._setback is None else self._setback.until - self._clock()

    def _sits_out_setback(self) -> bool:
        """Whether there is time to ask the source once more."""
        return anyio.current_time() + self._setback_left() < anyio.current_effective_deadline()

    async def _renew(self, request: httpx.Request, *, sits_out: bool = False) -> None:
        """Wait until the source has been asked for what comes after the current pair, holding no slot meanwhile.

        `sits_out`: where it has just been asked, not before it may be asked again.
        """
        record = request.extensions.get(EXTENSION)
        if not isinstance(record, ExchangeRecord):
            record = ExchangeRecord()
        phase, record.phase = record.phase, "refresh"
        record.release_slot()
        try:
            generation = self.generation
            if sits_out and (setback := self._setback) is not None:
                await _pause(self._setback_left())
                if self._setback is setback:
                    self._setback = None
            # Somebody may have been faster.
            await (self._join_flight() if generation == self.generation else anyio.lowlevel.checkpoint())
        except Exception as error:  # whatever a source may raise
            record.source_error = error
            raise
        record.phase = phase  # only now: an error that ends the wait is to find the phase that it ended

    async def _join_flight(self) -> None:
        if self._setback is not None and self._clock() < self._setback.until:
            self._setback.reraise()
            return
        self._setback = None
        loop = anyio.lowlevel.current_token().native_token
        flight = self._flight
        if flight is None or flight.loop is not loop:  # a flight on another loop, dead perhaps, cannot be waited for
            flight = self._flight = _Flight(self, loop, self.generation)
            await self._lead(flight)
            return
        waiter = _Waiter()
        flight.waiters[waiter] = None
        try:
            await waiter.event.wait()
        except BaseException:
            flight.waiters.pop(waiter, None)
            if waiter.leads:
                self._hand_over(flight)
            raise
        if waiter.leads:
            await self._lead(flight)
        elif flight.setback is not None:
            flight.setback.reraise()

    async def _lead(self, flight: _Flight) -> None:
        flight.asking = True
        mark = _asking.set((*_asking.get(), flight))
        try:
            pair = await self._ask()
        except BaseException as error:  # cleaned up after and raised again, whatever it is
            if isinstance(error, Exception):
                flight.setback = _Setback(self._clock() + SETBACK_SECONDS, _twin(error), error.__traceback__)
                self._land(flight)
            else:
                self._hand_over(flight)
            raise
        finally:
            flight.asking = False
            _asking.reset(mark)
        is_new = self.generation == flight.generation and self._install(pair)  # else another loop was faster
        if not is_new:
            flight.setback = _Setback(self._clock() + SETBACK_SECONDS)
        self._land(flight)
        if is_new and self.on_refresh is not None:
            self.on_refresh(self.generation)

    def _land(self, flight: _Flight) -> None:
        if self._flight is flight:
            self._flight, self._setback = None, flight.setback
        flight.wake()

    def _hand_over(self, flight: _Flight) -> None:
        if not flight.hand_over() and self._flight is flight:
            self._flight = None

    async def _ask(self) -> TokenPair:
        # No local variable holds the source: the repr of a partial, say, shows its arguments.
        if inspect.iscoroutinefunction(self._source) or inspect.iscoroutinefunction(cast(Any, self._source).__call__):
            given: object = cast(TokenSource, self._source)()
        elif len(self._threads) < SOURCE_THREADS:
            # Abandoned when cancelled, so that no deadline waits for it; a limiter of its own, so that a source that
            # hangs takes none of the threads that the application counts on.
            (given,) = await anyio.to_thread.run_sync(
                self._ask_in_thread, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
            )
        else:
            raise ConfigurationError(
                f"the source of the tokens hangs: {SOURCE_THREADS} calls of it were given up and have not come back."
            )
        if inspect.isawaitable(given):
            given = cast(object, await given)
        if isinstance(given, TokenPair):
            return given
        kind = type(given).__name__
        del given
        raise ConfigurationError(f"the source of the tokens gave {kind}, not a TokenPair.")

    def _ask_in_thread(self) -> tuple[object]:
        thread = object()
        self._threads.add(thread)
        try:
            return (cast(TokenSource, self._source)(),)  # wrapped, since trio lets no coroutine out of a thread
        finally:
            self._threads.discard(thread)

    def _install(self, pair: TokenPair) -> bool:
        """Make `pair` the current one; False where it already is."""
        if pair == self._issue.pair:
            return False
        self._pairs.append(pair)
        self._issue = _Issue(pair, self._issue.generation + 1)
        self._circuit.meet_new_pair()
        return True
