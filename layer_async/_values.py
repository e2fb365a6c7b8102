"""Values: equal by their fields, and shown with them; and the numbers that callers give.

Rules: a value is not changed once it is made, though nothing stops you. attrs would forbid it and write the same
methods, at a millisecond a class whenever the package is imported and at a microsecond for each value that a call
makes: several hold for every attempt. This room imports none of ours.
"""

from __future__ import annotations

import math


def number(given: object) -> float:
    """`given` as a float; NaN, which is neither above nor below anything, for what is none, or too large for one."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        return math.nan
    try:
        return float(given)
    except OverflowError:
        return math.nan


def shown(given: object) -> str:
    """The repr of `given`, or that it has none: Python writes no number of thousands of digits."""
    try:
        return repr(given)
    except ValueError:
        return "a number of thousands of digits"


class Value:
    """Base of classes that are their fields, which `__match_args__` names in the order of their `__init__`."""

    __slots__ = ()

    def _fields(self) -> dict[str, object]:
        names = getattr(self, "__match_args__")  # noqa: B009 - declared here, each class would override it
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value) or type(other) is not type(self):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash((type(self), *self._fields().values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._fields().items())
        return f"{type(self).__name__}({shown})"
