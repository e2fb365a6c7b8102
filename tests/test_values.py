"""Values: events and what errors know."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from layer_async import (
    AttemptFinished,
    AttemptInfo,
    CallFinished,
    GateShut,
    RequestInfo,
    RetryScheduled,
    TokenPair,
    TokensRefreshed,
)
from layer_async._failures import CONNECT, Failure
from layer_async._origin import Origin
from layer_async._values import Value

REQUEST = RequestInfo("GET", "https://host.invalid/x")

EXAMPLES: list[tuple[type[Value], list[tuple[Any, ...]]]] = [
    (RequestInfo, [("GET", "https://a"), ("PUT", "https://a"), ("GET", "https://b")]),
    (AttemptInfo, [(1, "200", 200, 0.5), (1, "200", 200, 0.5, 1.0), (2, "200", 200, 0.5)]),
    (
        AttemptFinished,
        [(REQUEST, 1, 200, None, 0.5, True), (REQUEST, 1, 200, None, 0.5, None), (REQUEST, 1, None, "E", 0.5, True)],
    ),
    (RetryScheduled, [(REQUEST, 1, "503", 0.5), (REQUEST, 1, "503", 0.6)]),
    (GateShut, [(1.0,), (2.0,)]),
    (TokensRefreshed, [(1,), (2,)]),
    (CallFinished, [(REQUEST, 200, None, 1, 0.5), (REQUEST, None, "E", 1, 0.5), (REQUEST, 200, None, 2, 0.5)]),
    (Failure, [(CONNECT, "ConnectError"), (CONNECT, "ConnectError", 200), (CONNECT, "ReadError")]),
    (Origin, [("https", "a", 443), ("http", "a", 443), ("https", "a", 443, "/b/")]),
]


@pytest.mark.parametrize(("cls", "arguments"), EXAMPLES)
def test_a_value_is_equal_by_all_its_fields(cls: type[Value], arguments: list[tuple[Any, ...]]) -> None:
    made, again = [cls(*each) for each in arguments], [cls(*each) for each in arguments]
    assert made == again
    assert len({*made, *again}) == len({hash(value) for value in made}) == len(made)


@pytest.mark.parametrize(("cls", "arguments"), EXAMPLES)
def test_a_value_shows_and_keeps_what_it_was_given(cls: type[Value], arguments: list[tuple[Any, ...]]) -> None:
    for each in arguments:
        value = cls(*each)
        kept = [getattr(value, name) for name in vars(cls)["__match_args__"]]
        assert kept[: len(each)] == list(each)
        shown = ", ".join(f"{name}={field!r}" for name, field in zip(vars(cls)["__match_args__"], kept, strict=True))
        assert repr(value) == f"{cls.__name__}({shown})"
        assert not hasattr(value, "__dict__")
        if cls is not Failure:  # its row is known by identity
            assert pickle.loads(pickle.dumps(value)) == copy.copy(value) == copy.deepcopy(value) == value


class GateOpened(Value):
    __match_args__ = ("delay",)
    __slots__ = __match_args__

    def __init__(self, delay: float) -> None:
        self.delay = delay


def test_values_of_two_classes_are_never_equal() -> None:
    assert GateShut(1) != GateOpened(1)
    assert GateShut(1) != TokensRefreshed(1)
    assert GateShut(1) != 1
    assert GateShut(1) != (1,)
    assert hash(GateShut(1)) != hash(TokensRefreshed(1))


def test_a_value_can_be_taken_apart_by_match() -> None:
    match AttemptInfo(2, "503", 503, 0.5):
        case AttemptInfo(number, "503", status_code=503):
            assert number == 2
        case _:
            raise AssertionError


def test_a_pair_cannot_be_changed() -> None:
    tokens = TokenPair("primary-5ecret", "secondary-5ecret")
    with pytest.raises(AttributeError, match="replaced as a whole: token1") as caught:
        tokens.token1 = "another-5ecret"
    assert "5ecret" not in str(caught.value)
    assert tokens.token1 == "primary-5ecret"
