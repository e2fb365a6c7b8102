"""The one answer that every race fetches: what the origin writes, what peers check, what our client decodes.

Rules: a body is exactly as long as was asked for, and opens with the path that it answers, so that a client that hands
out a body of another call is caught. The path is padded with JSON whitespace: a body is put together from three pieces.
"""

from __future__ import annotations

import json

import attrs

PATH_ROOM = 64  # the longest path that a body has room for, in bytes
_OPENING = b'{"path":"'
_SPACES = b" " * PATH_ROOM


@attrs.frozen
class Line:
    """One line of a document."""

    description: str
    quantity: int
    price: float


@attrs.frozen
class Document:
    """The body as our client decodes it."""

    path: str
    id: int
    status: str
    customer: str
    lines: list[Line]
    notes: str


class WrongAnswerError(Exception):
    """A call got something other than the body that belongs to its path."""


@attrs.frozen
class Template:
    """A body of `size` bytes with a hole for the path."""

    size: int
    _rest: bytes

    @classmethod
    def of(cls, size: int) -> Template:
        """A template for bodies of `size` bytes; ValueError when that is too small for a document."""
        room = size - len(_OPENING) - len(_SPACES) - 1
        # About half of the body is lines: that decodes as real records do, neither all text nor all structure.
        lines: list[bytes] = []
        while sum(map(len, lines)) < room // 2 - 100:
            number = len(lines)
            line = {"description": f"Broadband line {number:05}", "quantity": number % 9 + 1, "price": 24.5}
            lines.append(json.dumps(line, separators=(",", ":")).encode())
        start = (
            b',"id":7,"status":"open","customer":"Example Telecom Ltd","lines":[' + b",".join(lines) + b'],"notes":"'
        )
        missing = room - len(start) - 2
        if missing < 0:
            raise ValueError(f"a document has at least {size - missing} bytes, not {size}")
        return cls(size, start + b"n" * missing + b'"}')

    def body(self, path: bytes) -> bytes:
        """The body that answers `path`, which is ASCII of at most `PATH_ROOM` bytes without quotes."""
        return b"".join((_OPENING, path, b'"', _SPACES[len(path) :], self._rest))


def check(path: str, status: int, body: bytes, size: int) -> None:
    """Raise WrongAnswerError unless this is the whole and right answer to `path`."""
    if status != 200 or len(body) != size or not body.startswith(b'{"path":"%b"' % path.encode()):
        raise WrongAnswerError(f"GET {path}: status {status}, {len(body)} bytes, {body[:80]!r}")
