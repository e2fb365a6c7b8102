"""The items of all pages, one after another: `Pages`, which joins the strategies of `_paging` with calls.

Rules: each page is one call of the client, with its own deadline and retries, and what a page says is read as part of
that call. Nothing is fetched ahead but inside of an `async with`, which ends every task it began. What a reading knows
changes only when a page has been taken in whole, so after any error, or a cancellation, going on asks for that page
again. A page's items are given before what is wrong with the way to the next is raised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import anyio
import httpx

from ._bulk import current_source
from ._call import Corridor
from ._codec import check_into, decode_again, decode_bytes, describe_answer, find_texts
from ._errors import ConfigurationError, MalformedResponseError, NotFoundError, RequestInfo, ResponseDecodeError
from ._options import Quiet, merged_headers, merged_params
from ._origin import Origin
from ._paging import (
    Course,
    Cursor,
    KeyPath,
    LinkHeader,
    NextLink,
    Page,
    PageStrategy,
    Step,
    find_link,
    key_path,
)

__all__ = ["Pages"]

T = TypeVar("T")

ItemsAt = KeyPath | Callable[[Any], Sequence[Any]] | None
ItemKey = str | Callable[[Any], Hashable] | None


class Pages(AsyncIterator[T]):
    """The items of a collection that comes in pages: what `AsyncLayerClient.paginate` gives, for one `async for`.

    `pages` counts the pages that were taken in, `duplicates` the items that were dropped since their key had come
    before, `total` is the latest count of all items that the server gave (None: none).
    """

    def __init__(
        self,
        corridor: Corridor,
        given: Quiet,
        strategy: PageStrategy,
        *,
        items: ItemsAt,
        into: Any,
        key: ItemKey,
        remember: int | None,
        prefetch: int,
    ) -> None:
        _check(corridor, given, strategy)
        _check_own(strategy, items, key, remember, prefetch)
        self._corridor = corridor
        self._given = given
        self._reader = _Reader(strategy, items, into, corridor.origin)
        self._course = Course(strategy)
        self._known = _KnownKeys(key, remember, self._reader.place)
        self._rest: deque[T] = deque()  # of the latest page
        self._prefetch = prefetch
        self._line: deque[_Fetch] = deque()  # in order: pages under way, and those that have come too early
        self._group: anyio.abc.TaskGroup | None = None
        self._entered = False
        self._waiting = False
        self._finished = False
        self._closed = False

    @property
    def pages(self) -> int:
        """How many pages have been taken in."""
        return self._course.pages

    @property
    def total(self) -> int | None:
        """How many items there are in all, as the latest page said; None where `pages=` names no total."""
        return self._course.total

    @property
    def duplicates(self) -> int:
        """How many items were dropped because an item of the same `key` had come before."""
        return self._known.duplicates

    def __aiter__(self) -> Self:
        """These items; raises `ConfigurationError` when all of them have come, or `prefetch` lacks its `async with`."""
        if self._finished:
            raise ConfigurationError("the items of these pages come once, and all of them have come already.")
        self._check_usable()
        return self

    async def __anext__(self) -> T:
        """The next item; turns the page where need be.

        Raises what the call of a page raises; `MalformedResponseError` where the pages go round in a circle, end too
        early or lead to another origin; `ResponseDecodeError` for a page that is not as `items`, `into`, `key` and
        `pages` say; `ConfigurationError` for two tasks at once, and after the end of the `async with`. After an error,
        going on asks for the same page again.
        """
        if not self._rest:
            await self._refill()
        return self._rest.popleft()

    async def aclose(self) -> None:
        """Stop reading: what was fetched ahead is dropped. Harmless twice."""
        self._close()

    async def __aenter__(self) -> Self:
        if self._entered or self._closed:
            raise ConfigurationError("pages serve one `async with`. Call paginate again.")
        self._entered = True
        if self._prefetch:
            self._group = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
        group, self._group = self._group, None
        if group is None:
            return
        # From here on this task only waits for calls that are cancelled already. The block's own exception is not shown
        # to the group, which would wrap it, and is not to be replaced by a cancellation from further out.
        group.cancel_scope.shield = True
        failure: BaseException | None = None
        try:
            await group.__aexit__(None, None, None)
        except BaseExceptionGroup as failures:  # a call was ended by KeyboardInterrupt or the like
            failure = failures.exceptions[0]
        try:
            if failure is not None:
                raise failure
        finally:
            del failure

    def _close(self) -> None:
        self._closed = True
        self._rest.clear()
        self._drop_line()

    def _check_usable(self) -> None:
        if self._closed:
            raise ConfigurationError("the reading of these pages was closed, or its `async with` has ended.")
        if self._prefetch and self._group is None:
            raise ConfigurationError(
                "prefetch= runs calls ahead of the loop, so it needs a block that ends them: "
                "`async with client.paginate(…, prefetch=4) as items: async for item in items`."
            )

    # One page after another

    async def _refill(self) -> None:
        if self._finished:
            raise StopAsyncIteration
        self._check_usable()
        if self._waiting:
            raise ConfigurationError("another task is waiting for the next page: one loop receives these items.")
        self._waiting = True
        try:
            while not self._rest:
                await self._turn_page()
        finally:
            self._waiting = False

    async def _turn_page(self) -> None:
        course = self._course
        if course.flaw is not None:
            raise course.flaw.with_traceback(None)
        step = course.following
        page = None if step is None else await self._arrival(step)
        if step is None or page is None:
            self._finished = True
            self._drop_line()
            raise StopAsyncIteration
        fresh, keys = self._known.sift(page.items)
        course.take(step, page)
        self._known.add(keys, dropped=len(page.items) - len(fresh))
        self._rest.extend(fresh)
        self._fill_line()

    async def _arrival(self, step: Step) -> Page | None:
        """The page that `step` asks for; None where it turns out to lie behind the end."""
        try:
            return await (self._fetch(step) if self._group is None else self._prefetched())
        except NotFoundError:
            if self._course.may_be_behind_the_end():
                return None
            raise

    async def _fetch(self, step: Step) -> Page:
        given = Quiet(self._given)
        if step.link is not None:
            given["path"], given["params"] = step.link, None
        elif step.params:
            given["params"] = httpx.QueryParams(given.get("params")).merge(step.params)

        async def call() -> Any:
            return await self._corridor.begin("GET", given, reader=self._reader).run()

        source = current_source.get()
        page: Page = await (call() if source is None else source(call))
        return page

    # Ahead of the loop

    async def _prefetched(self) -> Page:
        self._fill_line()
        fetch = self._line[0]
        await fetch.done.wait()
        self._check_usable()  # it may have been closed meanwhile
        self._line.popleft()
        error, fetch.error = fetch.error, None
        if error is None:
            assert fetch.page is not None
            return fetch.page
        try:
            raise error
        finally:
            del error  # else the error and this frame hold each other

    def _fill_line(self) -> None:
        """Let what is under way begin with the step that is to be taken next, and go on with what is likely to follow.

        A guess that was wrong, as after a page of fewer items than those before, is dropped with all behind it.
        """
        step = self._course.following
        if self._group is None or step is None or (self._line and self._line[0].step.mark != step.mark):
            self._drop_line()
        if self._group is None:
            return
        while step is not None and len(self._line) < self._prefetch:
            if self._line:
                step = self._course.ahead(self._line[-1].step)
            if step is not None:
                fetch = _Fetch(step)
                self._line.append(fetch)
                self._group.start_soon(self._run, fetch, name="layer_async page")

    async def _run(self, fetch: _Fetch) -> None:
        with fetch.scope:
            try:
                fetch.page = await self._fetch(fetch.step)
            except BaseException as exc:
                fetch.error = exc  # raised by the loop when it comes to this page
                if not isinstance(exc, Exception):
                    raise
            finally:
                fetch.done.set()

    def _drop_line(self) -> None:
        for fetch in self._line:
            fetch.scope.cancel()
        self._line.clear()


class _Fetch:
    """A page that is fetched ahead."""

    __slots__ = ("done", "error", "page", "scope", "step")

    def __init__(self, step: Step) -> None:
        self.step = step
        self.scope = anyio.CancelScope()
        self.done = anyio.Event()
        self.page: Page | None = None
        self.error: BaseException | None = None


class _Reader:
    """Makes a `Page` from an answer, within its call."""

    __slots__ = ("_counted", "_into", "_items", "_origin", "_strategy", "_wanted", "place")

    def __init__(self, strategy: PageStrategy, items: ItemsAt, into: Any, origin: Origin) -> None:
        if into is not None:
            check_into(into)
        self._into = into
        self._wanted: Any = list[Any] if into is None else cast(Any, list)[into]
        self._items = items if items is None or callable(items) else key_path(items)
        self._strategy = strategy
        self._origin = origin
        self._counted = False  # whether a page had the total
        self.place = "".join(f".{key}" for key in self._items) if isinstance(self._items, tuple) else ""

    def __call__(self, response: httpx.Response) -> Page:
        try:
            page = Page([]) if response.status_code == 204 else self._read(response.content)
        except ResponseDecodeError as exc:
            describe_answer(exc, response)
            raise
        page.request = RequestInfo.of(response.request)
        if isinstance(self._strategy, LinkHeader):
            page.found = find_link(response.headers.get_list("link"), self._strategy.rel)
        if page.found and isinstance(self._strategy, NextLink | LinkHeader):
            try:
                page.found = str(self._origin.resolve_link(str(page.found), response.url))
            except MalformedResponseError as flaw:
                flaw.request = page.request
                page.flaw = flaw.with_traceback(None)  # raised when its items have been given
        return page

    def _read(self, data: bytes) -> Page:
        if not data.strip():
            raise ResponseDecodeError("the body is empty: a page without items has an empty list, or status 204.")
        strategy, items = self._strategy, self._items
        at = strategy.at if isinstance(strategy, Cursor | NextLink) else None
        wanted = [items if isinstance(items, tuple) else None, at, strategy.total, strategy.total_pages]
        texts = iter(find_texts(data, [path for path in wanted if path is not None]))
        listed, found, total, total_pages = (None if path is None else next(texts) for path in wanted)
        text = data if items is None or callable(items) else listed
        if callable(items):
            values = self._picked(items, data)
        else:
            if text is None:
                raise ResponseDecodeError(f"the page has no list at `${self.place}`.", path=f"${self.place}")
            values = decode_bytes(text, self._wanted, at=self.place)
        return Page(
            values,
            digest=hash(text),
            found=_value(found, at, str | int | None if isinstance(strategy, Cursor) else str | None),
            total=self._count(total, strategy.total),
            total_pages=self._count(total_pages, strategy.total_pages),
        )

    def _picked(self, items: Callable[[Any], Sequence[Any]], data: bytes) -> list[Any]:
        values = cast(object, items(decode_bytes(data, Any)))
        if not isinstance(values, list | tuple):
            raise ResponseDecodeError(f"items= found no list in the page, but {type(values).__name__}.")
        return list(values) if self._into is None else decode_again(values, self._wanted)

    def _count(self, text: bytes | None, path: tuple[str, ...] | None) -> int | None:
        """A total: the first page has one where pages= says so, or that is a mistake; others may go without."""
        if path is None or (text is None and self._counted):
            return None
        place = "$" + "".join(f".{key}" for key in path)
        if text is None:
            raise ResponseDecodeError(f"the page has no total at `{place}`, where pages= looks for it.", path=place)
        count: int | None = _value(text, path, int | None)
        if count is not None and count < 0:
            raise ResponseDecodeError(f"the total at `{place}` is below zero.", path=place)
        self._counted = True
        return count


def _value(text: bytes | None, path: tuple[str, ...] | None, into: Any) -> Any:
    if text is None or path is None:
        return None
    return decode_bytes(text, into, at="".join(f".{key}" for key in path))


class _KnownKeys:
    """The keys of the items of the latest pages, and how many items were dropped because theirs was among them.

    The keys themselves, since two may have one hash, and a dropped item is lost.
    """

    __slots__ = ("_key", "_known", "_pages", "_place", "_remember", "duplicates")

    def __init__(self, key: ItemKey, remember: int | None, place: str) -> None:
        self._key = key
        self._remember = remember
        self._place = place
        self._known: set[Hashable] = set()
        self._pages: deque[set[Hashable]] = deque()  # what `_known` consists of: none of them holds a key of another
        self.duplicates = 0

    def sift(self, items: list[Any]) -> tuple[list[Any], set[Hashable]]:
        """Those of `items` whose key is new, and their keys."""
        if self._key is None:
            return items, set()
        fresh: list[Any] = []
        keys: set[Hashable] = set()
        for index, item in enumerate(items):
            key = self._key(item) if callable(self._key) else self._member(item, self._key, index)
            try:
                is_known = key in keys or key in self._known
            except TypeError:
                raise ConfigurationError(f"key= gives {type(key).__name__}, which cannot be hashed.") from None
            if not is_known:
                keys.add(key)
                fresh.append(item)
        return fresh, keys

    def add(self, keys: set[Hashable], *, dropped: int) -> None:
        """Remember the keys of a page that was taken in, and forget those of the oldest."""
        self.duplicates += dropped
        self._known |= keys
        if self._remember is not None:
            self._pages.append(keys)
            if len(self._pages) > self._remember:
                self._known -= self._pages.popleft()

    def _member(self, item: Any, name: str, index: int) -> Hashable:
        missing = object()
        found = item.get(name, missing) if isinstance(item, Mapping) else getattr(item, name, missing)
        if found is missing:
            path = f"${self._place}[{index}]"
            raise ResponseDecodeError(f"an item has no {name!r} to be its key, at `{path}`.", path=f"{path}.{name}")
        return cast(Hashable, found)


def _check(corridor: Corridor, given: Quiet, strategy: object) -> None:
    """Raise `ConfigurationError` for what cannot be sent, before any page is."""
    if not isinstance(strategy, PageStrategy):
        raise ConfigurationError(
            "pages= must be PageNumber, OffsetLimit, Cursor, NextLink or LinkHeader, as the API's pages are; not "
            f"{type(strategy).__name__}."
        )
    corridor.settings.updated(given)
    corridor.origin.resolve(given["path"])
    merged_headers(corridor.headers, given.get("headers"))
    merged_params(given["path"], given.get("params"))
    own = {getattr(strategy, "param", None), getattr(strategy, "size_param", None) if strategy.size else None}
    for name in own & _query_names(given):
        raise ConfigurationError(f"the parameter {name!r} is set by pages=: say there where to start, and the size.")


def _query_names(given: Quiet) -> set[str]:
    query = given["path"].partition("#")[0].partition("?")[2]
    return {*httpx.QueryParams(query), *httpx.QueryParams(given.get("params"))}


def _check_own(strategy: PageStrategy, items: object, key: object, remember: object, prefetch: object) -> None:
    if items is None and (strategy.total or strategy.total_pages or isinstance(strategy, Cursor | NextLink)):
        raise ConfigurationError(
            "pages= reads more from a page than its items, so a page is no plain list: say with items= where the list "
            "is, as a key path or a function of the document."
        )
    if key is not None and not (isinstance(key, str) and key) and not callable(key):
        raise ConfigurationError(f"key= must be the name of a field, or a function of an item, not {key!r}.")
    for name, value, least in (("remember", remember, 1), ("prefetch", prefetch, 0)):
        if name == "remember" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{name}= must be a number of pages, at least {least}: it is {value!r}.")
