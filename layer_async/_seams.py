"""Where other tools hook into httpx and httpcore: their functions, and whether somebody has put another in their place.

Rules: a function counts as the library's own only if it is a plain function whose code lies in the file of its own
module there; who put it there, and whether before our import or after, does not matter. It is looked up at each call.
"""

from __future__ import annotations

import types
from typing import Any

__all__ = ["Seam", "are_untouched"]


class Seam:
    """The function `name` of the class `owner`, which a tool may have replaced."""

    __slots__ = ("code", "function", "name", "owner")

    def __init__(self, owner: type, name: str) -> None:
        self.owner: type = owner
        self.name: str = name
        self.function: Any = None
        self.code: Any = None

    def is_untouched(self) -> bool:
        """Whether the library's own code runs when the function is called."""
        function: Any = getattr(self.owner, self.name)
        if function is self.function and function.__code__ is self.code:
            return True
        if not _is_own(function, self.name):
            return False
        self.function, self.code = function, function.__code__
        return True


def are_untouched(seams: tuple[Seam, ...]) -> bool:
    """Whether all of them are; as quick as it can be, since it is asked at each attempt."""
    for seam in seams:
        function: Any = getattr(seam.owner, seam.name)
        if (function is not seam.function or function.__code__ is not seam.code) and not seam.is_untouched():
            return False
    return True


def _is_own(function: Any, name: str) -> bool:
    if type(function) is not types.FunctionType:
        return False
    home, code = function.__globals__, function.__code__
    return (
        home.get("__name__", "").partition(".")[0] in ("httpx", "httpcore", "layer_async")
        and code.co_filename == home.get("__file__")
        and code.co_name == name
    )
