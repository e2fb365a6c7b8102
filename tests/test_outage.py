"""The outage: when a server is taken to be away, who is held, who probes, and when it is over."""

from __future__ import annotations

import math

import anyio
import anyio.lowlevel
import pytest

from layer_async import _outage
from layer_async._outage import MISSES, STRIKES, Outage, Setback

pytestmark = pytest.mark.anyio

checkpoint = anyio.lowlevel.checkpoint


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Server:
    """An outage under a clock of ours; `chance` is what jitter draws."""

    def __init__(self, timeout: float = 600.0, chance: float = 0.0) -> None:
        self.clock = Clock()
        self.reasons: list[str] = []
        self.drawn = 0
        self.chance = chance
        self.outage = Outage(timeout, on_end=self.end, clock=self.clock, random=self.draw)

    def draw(self) -> float:
        self.drawn += 1
        return self.chance

    def end(self, why: str) -> None:
        self.reasons.append(why)
        self.outage.give_up()

    def miss(self, setback: Setback | None = None, *, tail: float = 0.0, asked: float | None = None) -> bool:
        """An item fails now, which was sent, for a second time, `tail` seconds ago."""
        return self.outage.missed(setback or Setback(), sent=self.clock.now - tail, tried_again=tail > 0, asked=asked)

    def break_down(self) -> None:
        for _ in range(MISSES):
            assert self.miss()
        assert self.outage.is_on


# When there is one


async def test_some_failures_in_a_row_are_an_outage_and_fewer_are_not() -> None:
    server = Server()
    for _ in range(MISSES - 1):
        assert server.miss()
        assert not server.outage.is_on
    server.outage.answered(server.clock.now)
    for _ in range(MISSES - 1):
        assert server.miss()
        assert not server.outage.is_on
    assert server.miss()
    assert server.outage.is_on


async def test_a_server_that_wants_to_be_left_alone_for_long_is_away_at_once() -> None:
    server = Server()
    assert server.miss(asked=10.0)
    assert not server.outage.is_on
    assert server.miss(asked=10.1)
    assert server.outage.is_on


async def test_an_answer_ends_it_only_if_it_is_to_what_was_sent_since_it_began() -> None:
    server = Server()
    server.break_down()
    server.clock.now += 1
    server.outage.answered(server.clock.now - 1.1)
    assert server.outage.is_on
    server.outage.answered(server.clock.now)
    assert not server.outage.is_on


# Who is held


async def test_an_item_that_fails_while_others_are_answered_has_its_own_trouble() -> None:
    server = Server()
    server.clock.now += 3
    server.outage.answered(server.clock.now - 1)
    assert not server.miss(tail=2.0)
    assert server.miss(tail=0.5)  # the others were sent before
    assert server.miss()  # no second attempt: the budget was spent


async def test_an_item_that_had_its_own_trouble_when_the_outage_began_is_held_too() -> None:
    server = Server()
    server.clock.now += 3
    server.outage.answered(server.clock.now - 1)
    server.break_down()
    assert server.miss(tail=2.0)  # what was answered in between says nothing of now


async def test_an_item_that_fails_again_and_again_while_others_are_answered_is_held_so_often_only() -> None:
    server = Server()
    setback = Setback()
    assert server.miss(setback)
    for _ in range(STRIKES - 1):
        server.clock.now += 1
        server.outage.answered(server.clock.now)
        server.clock.now += 1
        assert server.miss(setback)
    for _ in range(10):  # as long as nobody is answered it is held
        server.clock.now += 1
        assert server.miss(setback)
    server.outage.answered(server.clock.now + 1)
    assert not server.miss(setback)


# Waiting


async def test_an_item_that_has_met_nothing_does_not_wait_while_the_server_is_there() -> None:
    server = Server()
    assert not await server.outage.wait_before(None)
    assert server.outage.held == 0


async def test_an_item_with_a_setback_rests_alone_for_a_growing_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    server = Server(chance=1.0)

    async def sleep(self: Outage, seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(Outage, "_sleep", sleep)
    setback = Setback()
    for _ in range(2):
        server.miss(setback)
        server.outage.answered(server.clock.now)
        assert not await server.outage.wait_before(setback)
    server.miss(setback, asked=7.0)
    assert not await server.outage.wait_before(setback)
    setback.tries = 100
    assert not await server.outage.wait_before(setback)
    assert slept == [0.5, 1.0, 7.0, 10.0]


async def test_one_item_probes_at_a_time_in_the_order_of_arrival_and_an_answer_frees_all() -> None:
    server = Server()
    server.break_down()
    log: list[tuple[int, bool]] = []
    turn = anyio.Event()

    async def item(number: int) -> None:
        setback = Setback()
        while True:
            is_probe = await server.outage.wait_before(setback)
            log.append((number, is_probe))
            if not is_probe:
                return
            await turn.wait()
            if len(log) == 5:
                server.outage.answered(server.clock.now)
                server.outage.probed()
                return
            server.miss(setback)
            server.outage.probed()

    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(item, number)
            await checkpoint()
        for _ in range(20):
            await checkpoint()
        assert len(log) == 1
        assert server.outage.held == 2
        turn.set()
    first = [number for number, _ in log[:3]]
    assert sorted(first) == [0, 1, 2]
    assert [number for number, _ in log[3:5]] == first[:2]
    assert [is_probe for _, is_probe in log] == [True] * 5 + [False] * 2
    assert server.outage.held == 0


async def test_probes_come_after_growing_waits_and_not_before_the_server_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    server = Server(chance=1.0)

    async def sleep(self: Outage, seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(Outage, "_sleep", sleep)
    server.break_down()
    setback = Setback()
    for number in range(7):
        assert await server.outage.wait_before(setback)
        server.miss(setback, asked=30.0 if number == 6 else None)
        server.outage.probed()
    assert await server.outage.wait_before(setback)
    server.outage.probed()
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 30.0]


async def test_what_the_server_asked_for_is_forgotten_once_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    server = Server()

    async def sleep(self: Outage, seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(Outage, "_sleep", sleep)
    setback = Setback()
    server.miss(setback, asked=60.0)
    server.outage.answered(server.clock.now)
    await server.outage.wait_before(setback)
    assert slept == [0.0]


async def test_after_its_time_the_wait_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(timeout=20.0, chance=1.0)

    async def sleep(self: Outage, seconds: float) -> None:
        server.clock.now += seconds

    monkeypatch.setattr(Outage, "_sleep", sleep)
    server.break_down()
    setback = Setback()
    probes = 0
    while await server.outage.wait_before(setback):
        probes += 1
        server.miss(setback)
        server.outage.probed()
    assert server.clock.now == 120.0
    assert probes == 5  # after 0.5, 1, 2, 4 and 8 s
    assert server.reasons == ["the server was away for longer than outage_timeout=20 s."]
    assert server.outage.given_up
    assert not server.outage.is_on
    assert not await server.outage.wait_before(setback)


async def test_a_server_that_wants_longer_than_that_is_not_waited_for() -> None:
    server = Server(timeout=20.0)
    server.miss(asked=7200.0)
    assert not await server.outage.wait_before(Setback())
    assert server.reasons == ["the server wants to be left alone for 7200 s, longer than outage_timeout=20 s."]


async def test_an_outage_may_be_waited_out_for_ever() -> None:
    server = Server(timeout=math.inf)
    server.break_down()
    server.clock.now += 1e9
    assert await server.outage.wait_before(Setback())


async def test_giving_up_wakes_all_that_wait() -> None:
    server = Server(chance=1.0)
    woken: list[bool] = []

    async def item() -> None:
        woken.append(await server.outage.wait_before(setback))

    setback = Setback()
    async with anyio.create_task_group() as group:
        server.miss(setback)
        group.start_soon(item)  # rests
        for _ in range(5):
            await checkpoint()
        server.miss()
        server.miss()
        for _ in range(2):
            group.start_soon(item)  # is to probe; waits in line
        for _ in range(5):
            await checkpoint()
        group.start_soon(server.outage.wait_for_the_end)
        for _ in range(5):
            await checkpoint()
        assert server.outage.held == 3
        server.outage.give_up()
    assert woken == [False] * 3
    assert server.outage.held == 0


async def test_a_probe_that_is_cancelled_while_it_waits_passes_the_turn_on() -> None:
    server = Server(chance=1.0)
    server.break_down()
    with anyio.move_on_after(0.001):
        await server.outage.wait_before(Setback())
    server.chance = 0.0
    assert await server.outage.wait_before(Setback())
    assert server.outage.held == 0


async def test_another_item_is_wanted_once_all_that_wait_have_failed_as_probes() -> None:
    server = Server()
    server.break_down()
    outage = server.outage
    assert await outage.wait_before(Setback())
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(outage.wait_before, Setback())
        while outage.held < 2:
            await checkpoint()
        outage.probed()
        assert not outage.wants_witness
        group.cancel_scope.cancel()


async def test_who_has_no_item_yet_waits_while_others_probe_and_then_goes() -> None:
    server = Server()
    server.break_down()
    outage = server.outage
    await outage.wait_for_the_end()  # nobody is held: this one is to find out
    assert await outage.wait_before(None)
    with anyio.move_on_after(0.001) as scope:
        await outage.wait_for_the_end()
    assert scope.cancelled_caught
    outage.probed()
    assert outage.wants_witness
    await outage.wait_for_the_end()
    assert not outage.wants_witness


def test_the_bounds_are_those_of_the_design() -> None:
    assert (_outage.FIRST_WAIT, _outage.LONGEST_WAIT) == (0.5, 10.0)
