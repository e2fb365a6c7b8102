"""Where tokens may go, and how they ride on a request.

Rules: tokens are shown to one origin only, over https (or to loopback), and that is asked anew each time that somebody
looks, since a hook may have rewritten the URL. They never lie in a list that httpx copies, so a copy of a request lacks
them.
"""

from __future__ import annotations

import ipaddress
import re
import weakref
from collections.abc import (
    ItemsView,
    Iterator,
    KeysView,
    ValuesView,
)
from typing import Any, cast

import httpx

from ._errors import (
    ConfigurationError,
    MalformedResponseError,
)
from ._tokens import HEADER_NAMES, HeaderEntry, TokenPair
from ._values import Value

LOWER_NAMES = frozenset(name.lower() for name in HEADER_NAMES)
RAW_NAMES = frozenset(name.encode() for name in LOWER_NAMES)

DEFAULT_PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")
PLAIN = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+/?(?:\?[A-Za-z0-9._~&=,+-]+)?")
LONGEST_PLAIN = 2048  # httpx refuses URLs of more than 64 KiB
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Origin(Value):
    """The one place that tokens may go to: scheme, host and port (RFC 6454), and the path that calls are relative to.

    `port` is None only where the scheme has no default. `base_path` begins and ends with a slash.
    """

    __match_args__ = ("scheme", "host", "port", "base_path")
    __slots__ = (*__match_args__, "_base")

    def __init__(self, scheme: str, host: str, port: int | None, base_path: str = "/") -> None:
        self.scheme = scheme
        self.host = host
        self.port = port
        self.base_path: str = base_path
        base = httpx.URL(str(self)) if HOST.fullmatch(host) else None
        self._base = base if hasattr(getattr(base, "_uri_reference", None), "_replace") else None

    @classmethod
    def parse(cls, url: str | httpx.URL, *, allow_http: bool = False) -> Origin:
        """The origin and base path of `url`, if tokens may go there.

        Raises `ConfigurationError` unless `url` is https, or http to this machine itself (`localhost`, 127.0.0.0/8,
        `::1`), or http at all where `allow_http` is True; and where it has a user, a query or a fragment.
        """
        origin = read_origin(url, allow_http=allow_http)
        if isinstance(origin, str):
            del url
            raise ConfigurationError(origin)
        return origin

    @classmethod
    def of_url(cls, url: httpx.URL) -> Origin:
        """The origin of any absolute `url`, whether or not tokens may go there; its path does not matter."""
        port = DEFAULT_PORTS.get(url.scheme) if url.port is None else url.port
        return cls(url.scheme, _host(url), port)

    def admits(self, url: httpx.URL) -> bool:
        """Whether `url` is at this origin."""
        base = self._base
        if base is not None:  # else httpx has another shape
            ours, its = base._uri_reference, url._uri_reference
            if its.host is ours.host and its.scheme is ours.scheme and its.port == ours.port:
                return True
        if url.scheme != self.scheme or _host(url) != self.host:
            return False
        return (DEFAULT_PORTS[self.scheme] if url.port is None else url.port) == self.port

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine itself."""
        return _is_loopback(self.host)

    def resolve(self, path: str) -> httpx.URL:
        """The URL that `path` means.

        `/api/x` and `api/x` both mean the same below the base path, as with httpx's `base_url`; an absolute URL must be
        at this origin. Raises `ConfigurationError`, quoting neither query nor user, for anything that leads elsewhere
        or is not clearly a path: `//host`, a backslash, a user, a scheme without a host, white space at an end, a
        control character.
        """
        target = self.target(path)
        url = self._locate(path) if target is None else self.at(target)
        del target
        if isinstance(url, str):
            del path
            raise ConfigurationError(url)
        return url

    def target(self, path: object) -> bytes | None:
        """The target of a request to `path` (RFC 9112 section 3.2.1), where nothing in it needs a second look.

        The base path is likewise then, so that `at` can make a URL of it without parsing.
        """
        if self._base is None or not isinstance(path, str) or len(path) > LONGEST_PLAIN or path.startswith("//"):
            return None
        whole = f"{self.base_path}{path.removeprefix('/')}"
        return None if PLAIN.fullmatch(whole) is None else whole.encode("ascii")

    def at(self, target: bytes) -> httpx.URL:
        """The URL of what `target` gave.

        It is put into a copy of the base URL: parsing that again for each call costs as much as decoding an answer.
        The private name is httpx's; where it is missing there are no such targets.
        """
        path, _, query = target.decode("ascii").partition("?")
        url = httpx.URL.__new__(httpx.URL)
        url._uri_reference = cast(httpx.URL, self._base)._uri_reference._replace(path=path, query=query or None)
        return url

    def _locate(self, path: object) -> httpx.URL | str:
        if not isinstance(path, str):
            return f"a path must be a str, not {type(path).__name__}."
        if path != path.strip() or not path.isprintable():
            return "the path has white space at an end, or a character that cannot be printed: percent-encode it."
        if "\\" in re.split("[?#]", path, maxsplit=1)[0]:
            return "the path contains a backslash, which some take for a slash: percent-encode it as %5C."
        if path.startswith("//"):
            return f"the path begins with two slashes, which names another host; calls go to {self} only."
        if SCHEME.match(path) is None:
            path = f"{self}{self.base_path}{path.removeprefix('/')}".partition("#")[0]
        try:
            url = httpx.URL(path)
        except httpx.InvalidURL:
            return "the path does not make a valid URL."
        if not self.admits(url):
            return f"the path leads to {_describe(url)}; calls go to {self} only. (A colon needs a slash before it.)"
        if url.userinfo:
            return "the path is a URL with a user in it, which is not how this API authenticates."
        if url.raw_path.startswith(b"//"):
            return "the path comes down to one that begins with two slashes, which others may take for another host."
        return url

    def resolve_link(self, link: str, page: httpx.URL) -> httpx.URL:
        """The URL that `link` means in an answer from the URL `page` (RFC 3986 section 5), without its fragment.

        Raises `MalformedResponseError`, quoting neither query nor user, for one that leads to another origin or is not
        clearly a link: tokens are not sent wherever a server likes.
        """
        url = self._locate_link(link, page)
        if isinstance(url, str):
            del link, page
            raise MalformedResponseError(f"the link to the next page {url} It was not followed.")
        return url

    def _locate_link(self, link: str, page: httpx.URL) -> httpx.URL | str:
        if link != link.strip() or not link.isprintable() or "\\" in re.split("[?#]", link, maxsplit=1)[0]:
            return "has white space at an end, a character that cannot be printed, or a backslash."
        try:
            url = page.join(link).copy_with(fragment=None)
        except (httpx.InvalidURL, ValueError):
            return "does not make a valid URL."
        if not self.admits(url):
            return f"leads to {_describe(url)}, and tokens go to {self} only."
        if url.userinfo or url.raw_path.startswith(b"//"):
            return "is a URL with a user in it, or a path that begins with two slashes."
        return url

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS.get(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


def _host(url: httpx.URL) -> str:
    host = url.raw_host.decode("ascii")  # in lower case already, unless it is an IPv6 address
    return ipaddress.IPv6Address(host).compressed if ":" in host else host


def _describe(url: httpx.URL) -> str:
    """The origin of a refused URL as text, where that is safe to print."""
    return str(Origin.of_url(url)) if HOST.fullmatch(_host(url)) else "no clear host"


def read_origin(url: object, *, allow_http: bool) -> Origin | str:
    if isinstance(url, str):
        if url != url.strip() or not url.isprintable() or "\\" in url:
            return "the base URL has white space at an end, a control character or a backslash."
        try:
            url = httpx.URL(url)
        except httpx.InvalidURL:
            return "the base URL is not valid."
    if not isinstance(url, httpx.URL):
        return f"the base URL must be a str or httpx.URL, not {type(url).__name__}."
    if url.scheme not in DEFAULT_PORTS or HOST.fullmatch(_host(url)) is None:
        return "the base URL must be absolute, such as https://webapi.thelayer.com."
    if url.userinfo or url.query or url.fragment:
        return "the base URL may have neither user, query nor fragment."
    origin = Origin.of_url(url)
    if url.scheme == "http" and not allow_http and not _is_loopback(origin.host):
        return (
            f"the base URL {origin} is not https, so the tokens would travel in the clear. Use https; "
            "allow_http=True is for networks that you trust with them."
        )
    return Origin(origin.scheme, origin.host, origin.port, url.raw_path.decode("ascii").rstrip("?/") + "/")


def _is_loopback(host: str) -> bool:
    if host in ("localhost", "::1"):
        return True
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


# How tokens ride on a request


def check_headers_shape() -> None:
    """Raise ImportError unless httpx keeps headers as `MaskedHeaders` supposes: else tokens could not be kept apart."""
    headers = httpx.Headers([("Some-Name", "value")])
    shape = getattr(headers, "_list", None), getattr(headers, "_encoding", "missing")
    if shape != ([(b"Some-Name", b"some-name", b"value")], None):
        raise ImportError(f"layer_async does not know how httpx {httpx.__version__} keeps headers: install httpx 0.28")


check_headers_shape()


class MaskedHeaders(httpx.Headers):
    """The headers of one request, with the tokens kept outside the list that httpx copies.

    Reading (`raw`, `[]`, `items`, …) shows them for as long as the URL of that request is at the origin; every copy,
    pickle, redirect and rewritten URL goes without; `repr` masks them.
    """

    def __init__(self, request: httpx.Request, pair: TokenPair, origin: Origin) -> None:
        headers = request.headers
        self._list = [entry for entry in headers._list if entry[1] not in RAW_NAMES]
        self._encoding = headers._encoding
        self._request = weakref.ref(request)  # a plain reference would make a cycle of every request
        self._held = pair.entries
        self._origin = origin
        self._checked: object = None
        self._admitted = False

    def shown(self) -> tuple[HeaderEntry, ...]:
        """The tokens, if they may be seen now, else nothing."""
        request = self._request()
        if request is None:
            return ()
        url = cast(object, request.url)  # a hook may have put anything there
        if url is not self._checked:
            self._admitted = isinstance(url, httpx.URL) and self._origin.admits(url)
            self._checked = url
        return self._held if self._admitted else ()

    def plain(self) -> httpx.Headers:
        """An ordinary copy of what can be seen now, tokens included."""
        headers = httpx.Headers(self, encoding=self._encoding)
        headers._list.extend(self.shown())
        return headers

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        return [(name, value) for name, _, value in (*self._list, *self.shown())]

    def keys(self) -> KeysView[str]:
        return self.plain().keys()

    def values(self) -> ValuesView[str]:
        return self.plain().values()

    def items(self) -> ItemsView[str, str]:
        return self.plain().items()

    def multi_items(self) -> list[tuple[str, str]]:
        return self.plain().multi_items()

    def get_list(self, key: str, split_commas: bool = False) -> list[str]:  # noqa: FBT001, FBT002 - httpx's signature
        return self.plain().get_list(key, split_commas)

    def update(self, headers: Any = None) -> None:  # type: ignore[override]  # httpx's signature
        new = httpx.Headers(headers)
        for name in LOWER_NAMES & set(new):
            self[name] = new.pop(name)
        super().update(new)

    def __getitem__(self, key: str) -> str:
        return self.plain()[key] if key.lower() in LOWER_NAMES else super().__getitem__(key)

    def __setitem__(self, key: str, value: str) -> None:
        if key.lower() in LOWER_NAMES:
            name, lower = key.encode(), key.lower().encode()
            self._held = (*(entry for entry in self._held if entry[1] != lower), (name, lower, value.encode()))
        else:
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if key.lower() in LOWER_NAMES:
            if key not in self:
                raise KeyError(key)
            lower = key.lower().encode()
            self._held = tuple(entry for entry in self._held if entry[1] != lower)
        else:
            super().__delitem__(key)

    def __contains__(self, key: Any) -> bool:
        return key in self.plain() if str(key).lower() in LOWER_NAMES else super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._list) + len(self.shown())

    def __eq__(self, other: object) -> bool:
        return self.plain() == (other.plain() if isinstance(other, MaskedHeaders) else other)

    __hash__ = None  # type: ignore[assignment]  # as httpx.Headers

    def __repr__(self) -> str:
        headers = self.plain()
        for name in LOWER_NAMES & set(headers):
            headers[name] = "[secure]"
        return f"Masked{headers!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return httpx.Headers, ([(name, value) for name, _, value in self._list], self._encoding)


def carries_tokens(request: httpx.Request) -> bool:
    headers = request.headers
    return isinstance(headers, MaskedHeaders) and len(headers.shown()) == len(HEADER_NAMES)


def strip_tokens(request: httpx.Request) -> None:
    """Take off what looks like tokens: the request goes elsewhere."""
    headers = request.headers.copy()
    for name in LOWER_NAMES & set(headers):
        del headers[name]
    request.headers = headers
