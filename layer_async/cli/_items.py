"""What a fetch reads and calls for: its items, from lines or objects, and the options that are more than a number."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from .. import ConfigurationError, Cursor, LinkHeader, NextLink, OffsetLimit, PageNumber

PageStrategy = PageNumber | OffsetLimit | Cursor | NextLink | LinkHeader
STRATEGIES: dict[str, Any] = {
    "number": PageNumber,
    "offset": OffsetLimit,
    "cursor": Cursor,
    "next": NextLink,
    "link": LinkHeader,
}


@attrs.frozen
class Item:
    """A document, or a collection, to be fetched: where it is, and its name in the journal and the files."""

    key: str | int
    path: str
    has_key: bool = False

    @property
    def names(self) -> dict[str, str | int]:
        """What its lines begin with."""
        return {"key": self.key, "path": self.path} if self.has_key else {"path": self.path}


def item_of_line(line: str, number: int) -> Item:
    """The item of a line that is a path."""
    return Item(line, line)


@attrs.frozen
class ObjectReader:
    """Makes the items of lines that are JSON objects: their field `path`, named by their field `key`."""

    source: str
    key: str | None
    path: str

    def __call__(self, line: str, number: int) -> Item:
        try:
            given = msgspec.json.decode(line.encode("utf-8", "surrogateescape"), type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ConfigurationError(f"{self.source}: line {number} is not a JSON object.") from None
        path, key = given.get(self.path), given.get(self.key or self.path)
        if not isinstance(path, str) or not isinstance(key, str | int) or isinstance(key, bool):
            fields = self.path if self.key is None else f"{self.key} and {self.path}"
            raise ConfigurationError(f"{self.source}: line {number} lacks the field {fields}, as text.")
        return Item(key, path, has_key=self.key is not None)


def pages_strategy(text: str) -> PageStrategy:
    """The strategy that `--pages` names: `number`, or with settings `number:size=100,size_param=page_size`."""
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        field, equals, value = part.partition("=")
        settings[field.strip()] = int(value) if value.isdecimal() else value
        if not equals or field.strip() not in {own.name for own in attrs.fields(STRATEGIES.get(name, PageNumber))}:
            raise ConfigurationError(f"--pages {name} has no setting {part!r}: give name=value, such as size=100.")
    if name not in STRATEGIES:
        raise ConfigurationError(f"--pages knows {', '.join(STRATEGIES)}, not {name!r}.")
    strategy: PageStrategy = STRATEGIES[name](**settings)
    return strategy


def stop_rule(text: str) -> int | float:
    """The rule that `--stop-when` names: a count of failures, or a percentage."""
    try:
        rule = float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        rule = 0
    if not rule > 0 or (isinstance(rule, float) and rule > 1):
        raise ConfigurationError(f"--stop-when takes a count of failures, or their share, such as 5%, not {text!r}.")
    return rule
