"""How pages follow each other: the strategies, and the course that a reading takes through them. Knows no HTTP.

The API's paging is not public, so its user says how pages look. Rules: a strategy is frozen and decides by what a page
says, never by waiting; what asks for a page is a `Step`. A reading ends where the collection does, and says so where it
cannot know: a total that was not reached, a page or a link that came before is an error, neither an endless pull nor a
silent end. The course is taken in order, one page after another, so that what was fetched ahead is only a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

import attrs

from ._errors import ConfigurationError, MalformedResponseError, RequestInfo

__all__ = ["Cursor", "LinkHeader", "NextLink", "OffsetLimit", "PageNumber"]

Keys = tuple[str, ...]
KeyPath = str | Sequence[str]
Found = str | int | None

VISITED_KEPT = 1000


class Step:
    """What asks for one page: parameters of the query, or a link. Shows nothing of itself: both may hold secrets.

    `number` is that of the page, `position` how many items of the collection come before it.
    """

    __slots__ = ("link", "number", "params", "position")

    def __init__(self, params: dict[str, Any], *, number: int = 0, position: int = 0, link: str | None = None) -> None:
        self.params = params
        self.number = number
        self.position = position
        self.link = link

    @property
    def mark(self) -> int:
        """The same for two steps that ask for the same page."""
        return hash(repr((sorted(self.params.items()), self.link)))


class Page:
    """What one answer holds: its `items`, and what it says of the others.

    `digest` is equal for equal pages, `found` is the cursor or link to the next one, `total` and `total_pages` are
    counts of the collection; each None where there is none.
    """

    __slots__ = ("digest", "flaw", "found", "items", "request", "total", "total_pages")

    def __init__(
        self,
        items: list[Any],
        *,
        digest: int = 0,
        found: Found = None,
        total: int | None = None,
        total_pages: int | None = None,
        request: RequestInfo | None = None,
    ) -> None:
        self.items = items
        self.digest = digest
        self.found = found
        self.total = total
        self.total_pages = total_pages
        self.request = request
        self.flaw: MalformedResponseError | None = None  # of the link to the next one


# Checks of what a user writes


def key_path(value: KeyPath) -> Keys:
    """The keys that lead from the top of a document to a place in it: "data.items", or a list of keys with dots."""
    keys = tuple(value.split(".")) if isinstance(value, str) else value
    if not isinstance(keys, tuple | list) or not keys or not all(isinstance(key, str) and key for key in keys):
        raise ConfigurationError(f'{value!r} is no key path: write "data.items", or ("data", "a key.with dots").')
    return tuple(keys)


def optional_key_path(value: KeyPath | None) -> Keys | None:
    """The same, where None is allowed."""
    return None if value is None else key_path(value)


def _check_name(what: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{what} must be the name of a query parameter, not {value!r}.")


def _check_count(what: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{what} must be a whole number, at least {least}: it is {value!r}.")


def _check_sizes(size_param: object, size: object) -> None:
    if size_param is not None:
        _check_name("size_param", size_param)
    if size is not None:
        _check_count("size", size, least=1)


def _sized(param: str, value: Found, size_param: str | None, size: int | None) -> dict[str, Any]:
    params: dict[str, Any] = {param: value}
    if size_param is not None and size is not None:
        params[size_param] = size
    return params


# The strategies


@attrs.frozen
class PageNumber:
    """Pages have numbers: `?page=1`, `?page=2`, …

    `param` is the parameter with the number, `start` the number of the first page. `size` is how many items a full page
    has; `size_param`, the parameter that asks for so many. `total` says at which key path of a page the count of all
    items stands, `total_pages` where that of all pages does.

    The last page is the one that reaches the total. Where there is none, an empty page ends the reading, and so does a
    page of fewer than `size` items, once a full one has shown that the server does give so many.

    Raises `ConfigurationError` for what cannot work.
    """

    param: str = "page"
    start: int = attrs.field(default=1, kw_only=True)
    size_param: str | None = attrs.field(default=None, kw_only=True)
    size: int | None = attrs.field(default=None, kw_only=True)
    total: Keys | None = attrs.field(default=None, kw_only=True, converter=optional_key_path)
    total_pages: Keys | None = attrs.field(default=None, kw_only=True, converter=optional_key_path)

    is_counted: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        _check_name("param", self.param)
        _check_count("start", self.start, least=0)
        _check_sizes(self.size_param, self.size)
        if self.size_param is not None and self.size is None:
            raise ConfigurationError("size_param asks for pages of a size: give size= too.")
        if self.total is not None and self.total_pages is not None:
            raise ConfigurationError("total and total_pages both say where the end is: give one.")
        if self.total is not None and self.start > 1:
            raise ConfigurationError("a reading that starts behind the first page never reaches a total of all items.")

    def _first(self) -> Step:
        return self._following(self.start, 0, None)

    def _following(self, number: int, position: int, found: Found) -> Step:
        params = _sized(self.param, number, self.size_param, self.size)
        return Step(params, number=number, position=position)

    def _last_page(self, total_pages: int) -> int:
        return total_pages - 1 if self.start == 0 else total_pages


@attrs.frozen
class OffsetLimit:
    """Pages begin behind so many items: `?offset=0&limit=50`, `?offset=50&limit=50`, …

    `param` is the parameter with the offset, `start` the first offset. `size` is how many items a full page has, asked
    for as `size_param`; None asks for no size. `total` says at which key path of a page the count of all items stands.
    The end is found as with `PageNumber`; each offset is the count of the items that have come, so that a server that
    gives fewer than were asked for loses none.

    Raises `ConfigurationError` for what cannot work.
    """

    param: str = "offset"
    start: int = attrs.field(default=0, kw_only=True)
    size_param: str = attrs.field(default="limit", kw_only=True)
    size: int | None = attrs.field(default=None, kw_only=True)
    total: Keys | None = attrs.field(default=None, kw_only=True, converter=optional_key_path)

    is_counted: ClassVar[bool] = True
    total_pages: ClassVar[None] = None

    def __attrs_post_init__(self) -> None:
        _check_name("param", self.param)
        _check_count("start", self.start, least=0)
        _check_name("size_param", self.size_param)
        _check_sizes(self.size_param, self.size)

    def _first(self) -> Step:
        return self._following(0, self.start, None)

    def _following(self, number: int, position: int, found: Found) -> Step:
        params = _sized(self.param, position, self.size_param, self.size)
        return Step(params, number=number, position=position)


@attrs.frozen
class Cursor:
    """Each page names the next: what stands at key path `at` is sent as parameter `param` to get it.

    No cursor there (no such key, null or "") ends the reading. `start` is what the first page is asked for with, where
    that needs a cursor too. `size` items a page are asked for as `size_param`. `total` says at which key path the count
    of all items stands: a reading that ends before is an error.

    Raises `ConfigurationError` for what cannot work.
    """

    param: str = "cursor"
    at: Keys = attrs.field(default=("next_cursor",), kw_only=True, converter=key_path)
    start: str | int | None = attrs.field(default=None, kw_only=True, repr=False)
    size_param: str | None = attrs.field(default=None, kw_only=True)
    size: int | None = attrs.field(default=None, kw_only=True)
    total: Keys | None = attrs.field(default=None, kw_only=True, converter=optional_key_path)

    is_counted: ClassVar[bool] = False
    total_pages: ClassVar[None] = None

    def __attrs_post_init__(self) -> None:
        _check_name("param", self.param)
        _check_sizes(self.size_param, self.size)
        if (self.size_param is None) != (self.size is None):
            raise ConfigurationError("size and size_param ask for pages of a size together: give both or none.")
        if not isinstance(self.start, str | int | None) or isinstance(self.start, bool):
            raise ConfigurationError(f"start must be a cursor, as text or number, not {type(self.start).__name__}.")

    def _first(self) -> Step:
        params = _sized(self.param, self.start, self.size_param, self.size)
        if self.start is None:
            del params[self.param]
        return Step(params)

    def _following(self, number: int, position: int, found: Found) -> Step | None:
        if found is None or found == "":
            return None
        return Step(_sized(self.param, found, self.size_param, self.size), number=number, position=position)


@attrs.frozen
class NextLink:
    """Each page has a link to the next, at key path `at` ("next", "links.next", ("@odata.nextLink",)).

    It is followed as it stands, relative to the page's URL, and only to the client's own origin. No link there (no such
    key, null or "") ends the reading. `total` says at which key path the count of all items stands: a reading that ends
    before is an error.

    Raises `ConfigurationError` for what is no key path.
    """

    at: Keys = attrs.field(default=("next",), converter=key_path)
    total: Keys | None = attrs.field(default=None, kw_only=True, converter=optional_key_path)

    is_counted: ClassVar[bool] = False
    total_pages: ClassVar[None] = None
    size: ClassVar[None] = None

    def _first(self) -> Step:
        return Step({})

    def _following(self, number: int, position: int, found: Found) -> Step | None:
        return Step({}, number=number, position=position, link=str(found)) if found else None


@attrs.frozen
class LinkHeader:
    """Each answer has a header `Link: <…>; rel="next"` (RFC 8288) that leads to the next page; the last one has none.

    `rel` is the relation that is followed. The rest is as with `NextLink`. Raises `ConfigurationError` for what is no
    relation, or no key path.
    """

    rel: str = "next"
    total: Keys | None = attrs.field(default=None, kw_only=True, converter=optional_key_path)

    is_counted: ClassVar[bool] = False
    total_pages: ClassVar[None] = None
    size: ClassVar[None] = None

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.rel, str) or not self.rel or " " in self.rel:
            raise ConfigurationError(f"rel must be one link relation, such as 'next', not {self.rel!r}.")

    def _first(self) -> Step:
        return Step({})

    def _following(self, number: int, position: int, found: Found) -> Step | None:
        return Step({}, number=number, position=position, link=str(found)) if found else None


PageStrategy = PageNumber | OffsetLimit | Cursor | NextLink | LinkHeader


# The course


class Course:
    """How far a reading has come, and where it goes on: fed with each page, in order.

    `following` asks for the next page (None: the end is reached); `flaw` says why it cannot go on although the end was
    not reached. `pages` and `seen` count what was taken in, `total` is the latest count of all items.
    """

    __slots__ = (
        *("_digests", "_largest", "_last_number", "_was_full", "_was_short", "_way"),
        *("flaw", "following", "pages", "seen", "strategy", "total"),
    )

    def __init__(self, strategy: PageStrategy) -> None:
        self.strategy: Final = strategy
        self.following: Step | None = strategy._first()
        self.flaw: MalformedResponseError | None = None
        self.pages = 0
        self.seen = self.following.position
        self.total: int | None = None
        self._last_number: int | None = None
        self._largest = 0
        self._was_full = False
        self._was_short = False  # the latest page
        self._digests: tuple[int, ...] = ()  # of the first page and the latest
        self._way = _Way()
        self._way.leads_back(self.following.mark)

    def take(self, step: Step, page: Page) -> None:
        """Take in the page that `step` asked for. Raises `MalformedResponseError` for one that has come before."""
        count = len(page.items)
        if page.digest in self._digests:
            raise MalformedResponseError(self._repeated(page), request=page.request)
        if count:
            self._digests = (*self._digests[:1], page.digest)
        self.pages += 1
        self.seen += count
        if page.total is not None:
            self.total = page.total
        if isinstance(self.strategy, PageNumber) and page.total_pages is not None:
            self._last_number = self.strategy._last_page(page.total_pages)
        size = self.strategy.size
        self._was_short = count < (self._largest if size is None else size)
        self._was_full = self._was_full or (size is not None and count >= size)
        self._largest = max(self._largest, count)
        self.flaw = None
        self.following = None if self._is_over(step, page) else self._find_following(step, page)

    def may_be_behind_the_end(self) -> bool:
        """Whether there may be no such page as the next: the latest was short, and no total says that there is more."""
        return self.strategy.is_counted and self._was_short and self.total is None and self._last_number is None

    def ahead(self, step: Step) -> Step | None:
        """What most likely follows `step`, before its page has come; None where that cannot be known."""
        strategy, position = self.strategy, step.position + self._largest
        if not strategy.is_counted or not self._largest or self.may_be_behind_the_end():
            return None
        if self.total is not None and position >= self.total:
            return None
        if self._last_number is not None and step.number >= self._last_number:
            return None
        return strategy._following(step.number + 1, position, None)

    def _is_over(self, step: Step, page: Page) -> bool:
        count = len(page.items)
        if not self.strategy.is_counted:
            return False  # its cursor or link decides, and may lead on from an empty page
        if self.total is not None:
            return self.seen >= self.total
        if self._last_number is not None:
            return step.number >= self._last_number
        return count == 0 or (self._was_short and self._was_full)

    def _find_following(self, step: Step, page: Page) -> Step | None:
        if self.strategy.is_counted and not page.items:
            self._fail(page, self._incomplete())
            return None
        following = self.strategy._following(step.number + 1, self.seen, page.found)
        if following is None:
            if self.total is not None and self.seen < self.total:
                self._fail(page, self._incomplete())
        elif page.flaw is not None:
            self.flaw = page.flaw
        elif self._way.leads_back(following.mark):
            self._fail(page, self._circular())
        else:
            return following
        return None

    def _fail(self, page: Page, message: str) -> None:
        self.flaw = MalformedResponseError(message, request=page.request)

    def _repeated(self, page: Page) -> str:
        strategy = self.strategy
        told = f"page {self.pages + 1} is equal to one that came before: {len(page.items)} items again"
        if isinstance(strategy, NextLink | LinkHeader):
            where = "at=" if isinstance(strategy, NextLink) else "rel="
            return f"{told}, so this would go on for ever. Is the link that {where} names the one to the next page?"
        asked = f"Does the server know {self._names()}?"
        if not strategy.is_counted:
            return f"{told}, so this would go on for ever. {asked}"
        if strategy.total is None and strategy.total_pages is None:
            return (
                f"{told}, so this would go on for ever. {asked} Where it repeats its last page instead of ending, say "
                "with total= where the count of the items stands."
            )
        return (
            f"{told}, though the end is not reached by what it says itself. {asked} Where items are rightly so equal, "
            "ask for each page with get, which looks at none."
        )

    def _circular(self) -> str:
        return (
            f"page {self.pages} leads back to a page that was read before, so this would go on for ever; "
            f"{self.seen} items have come. The server's paging goes round in a circle: is {self._names()} right?"
        )

    def _incomplete(self) -> str:
        total = f"there are {self.total} items" if self._last_number is None else "there are more pages"
        return (
            f"the pages end before the collection does: the server says that {total}, and page {self.pages} is the "
            f"last with {self.seen} read. Some may be hidden from these tokens, or have been deleted meanwhile; read "
            "again, or leave the total out of pages= to take what comes."
        )

    def _names(self) -> str:
        strategy = self.strategy
        if isinstance(strategy, NextLink | LinkHeader):
            return "the link"
        return f"the parameter {strategy.param!r}"


class _Way:
    """The steps that were taken, as far as they are remembered: the latest thousand, the first, and one in between.

    Memory does not grow with the pages. A circle of up to a thousand pages is noticed at once, and so is one that leads
    to the start; of a longer one, at most the third round (R. P. Brent's method: the one in between is set anew
    whenever the number of steps has doubled).
    """

    __slots__ = ("_between", "_count", "_first", "_latest")

    def __init__(self) -> None:
        self._latest: dict[int, None] = {}
        self._first: int | None = None
        self._between: int | None = None
        self._count = 0

    def leads_back(self, mark: int) -> bool:
        """Whether the step with this `mark` was taken before; it is now."""
        if mark in self._latest or mark in (self._first, self._between):
            return True
        if self._first is None:
            self._first = mark
        self._count += 1
        if self._count & (self._count - 1) == 0:
            self._between = mark
        self._latest[mark] = None
        if len(self._latest) > VISITED_KEPT:
            del self._latest[next(iter(self._latest))]
        return False


# The Link header

_LINK = re.compile(r"[\s,]*<([^>]*)>")
_PARAMETER = re.compile(
    r"\s*;\s*(?:([!#$&+\-.^_`|~0-9A-Za-z]+\*?)\s*(?:=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s\";,]*)))?)?"
)


def find_link(values: Iterable[str], rel: str) -> str | None:
    """The target of the first link of relation `rel` in the `Link` headers `values` (RFC 8288 section 3); None: none.

    Only the first `rel` of a link counts, and may name several relations; their case does not matter. A link with an
    `anchor` is one from somewhere else. What is no link ends the header that it stands in.
    """
    for value in values:
        position = 0
        while (target := _LINK.match(value, position)) is not None:
            position = target.end()
            params: dict[str, str] = {}
            while (parameter := _PARAMETER.match(value, position)) is not None:
                position = parameter.end()
                name, quoted, plain = parameter.groups()
                if name is not None:
                    text = plain or "" if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                    params.setdefault(name.lower(), text)
            if rel.lower() in params.get("rel", "").lower().split() and "anchor" not in params:
                return target[1]
    return None
