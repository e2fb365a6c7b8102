"""Where other tools hook into httpx and httpcore: their functions, and whether somebody has put another in their place.

Rules: a function counts as the library's own only if it is a plain function whose code lies in the file of its own
module there; who put it there, and whether before our import or after, does not matter. It is looked up at each call.
"""

from __future__ import annotations

import types
from typing import Any

__all__ = ["Seam"]


class Seam:
    """The function `name` of the class `owner`, which a tool may have replaced."""

    __slots__ = ("_code", "_function", "_owner", "name")

    def __init__(self, owner: type, name: str) -> None:
        self._owner = owner
        self.name = name
        self._function: Any = None
        self._code: Any = None

    def is_untouched(self) -> bool:
        """Whether the library's own code runs when the function is called."""
        function: Any = getattr(self._owner, self.name)
        if function is self._function and function.__code__ is self._code:
            return True
        if not _is_own(function, self.name):
            return False
        self._function, self._code = function, function.__code__
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
