"""The two tokens: where they come from, how they ride on a request, where they may go, and how they are replaced.

Rules: tokens are shown to one origin only, over https (or to loopback). They never lie in a list that httpx copies, so
a copy of a request lacks them. A pair is replaced as one, with a generation that counts up: never an old Token1 with a
new Token2. The source is asked by one caller for all who wait. Nothing secret is in a repr, a pickle, an error, or a
local variable that a traceback of ours could show: whoever raises deletes first, and flaws are found by functions that
return text. This room waits for nothing but the source, and knows neither retry nor pool.
"""

from __future__ import annotations

import copy
import inspect
import ipaddress
import os
import re
import time
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeAlias, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import httpx

from ._errors import (
    BODY_LIMIT,
    TOKENS_ARE_MADE,
    AuthenticationError,
    ConfigurationError,
    MissingTokensError,
    RequestInfo,
    status_error,
)
from ._exchange import EXTENSION, ExchangeRecord, is_replayable

__all__ = [
    "DualTokenAuth",
    "Origin",
    "TokenPair",
    "TokenSource",
    "env_tokens",
    "file_tokens",
    "keyring_tokens",
    "resolve_tokens",
]

HEADER_NAMES = ("Token1", "Token2")
LOWER_NAMES = frozenset(name.lower() for name in HEADER_NAMES)
RAW_NAMES = frozenset(name.encode() for name in LOWER_NAMES)
VARIABLES = ("LAYER_TOKEN1", "LAYER_TOKEN2")
FILE_VARIABLES = ("LAYER_TOKEN1_FILE", "LAYER_TOKEN2_FILE")
HOW_TO_GET_TOKENS = f"Tokens are made in The Layer under {TOKENS_ARE_MADE}."

SETBACK_SECONDS = 1.0  # so long is a source left alone that raised or had nothing new
PROBE_SECONDS = 30.0  # so often is one call let through an open circuit
FILE_READS = 20
SOURCE_THREADS = 4
PAIRS_REMEMBERED = 4

CIRCUIT_ADVICE = (
    "Nothing was sent this time: these tokens were refused before, with no success since. "
    f"One call is let through every {PROBE_SECONDS:.0f} s, and all of them once there are new tokens."
)

HeaderEntry: TypeAlias = tuple[bytes, bytes, bytes]  # as httpx keeps it: name as given, name in lower case, value


# The pair and its sources


def _flaw(name: str, value: object) -> str | None:
    """What is wrong with a token, without quoting it, or None."""
    if not isinstance(value, str):
        return f"{name} must be a str, not {type(value).__name__}."
    if not value:
        return f"{name} is empty."
    if value != value.strip():
        return f"{name} has white space at one of its ends: strip it."
    if any(not "!" <= character <= "~" for character in value):
        return f"{name} contains white space, a control character or one outside ASCII: is it a token?"
    return None


@attrs.frozen(init=False)
class TokenPair:
    """The two tokens that authenticate together. Its repr masks them; it refuses to be pickled or copied.

    `token1` is the primary token, `token2` the secondary one. Raises `ConfigurationError`, without quoting the value,
    unless both are non-empty strings of visible ASCII characters.
    """

    token1: str = attrs.field(repr=lambda _: "***")
    token2: str = attrs.field(repr=lambda _: "***")
    entries: tuple[HeaderEntry, ...] = attrs.field(repr=False, eq=False)

    def __init__(self, token1: str, token2: str) -> None:
        flaw = _flaw("Token1", token1) or _flaw("Token2", token2)
        if flaw is not None:
            del self, token1, token2
            raise ConfigurationError(flaw)
        object.__setattr__(self, "token1", token1)
        object.__setattr__(self, "token2", token2)
        entries = ((b"Token1", b"token1", token1.encode()), (b"Token2", b"token2", token2.encode()))
        object.__setattr__(self, "entries", entries)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a TokenPair is neither pickled nor copied: give the source of the tokens instead")


TokenSource: TypeAlias = Callable[[], TokenPair | Awaitable[TokenPair]]
"""Where pairs come from: any callable. A plain one is called in a worker thread, an async one on the event loop."""


@attrs.frozen
class _Strings:
    """Two strings on their way to become a pair; exists so that no local variable holds them."""

    token1: str | None = attrs.field(repr=False)
    token2: str | None = attrs.field(repr=False)

    def pair(self, name1: str, name2: str) -> TokenPair:
        """The pair; `name1` and `name2` say in errors where the strings came from."""
        flaw = _flaw(f"Token1 ({name1})", self.token1) or _flaw(f"Token2 ({name2})", self.token2)
        if flaw is not None:
            raise ConfigurationError(flaw)
        return TokenPair(cast(str, self.token1), cast(str, self.token2))

    def missing(self) -> list[str]:
        return [name for name, value in zip(HEADER_NAMES, (self.token1, self.token2), strict=True) if not value]


@attrs.frozen
class _Environment:
    """The environment, under a repr that does not print it; a source itself."""

    environ: Mapping[str, str] = attrs.field(repr=False)

    def __call__(self) -> TokenPair:
        strings = _Strings(*(self.environ.get(name) for name in VARIABLES))
        if missing := strings.missing():
            raise _missing(missing, f"the environment variables {' and '.join(VARIABLES)}")
        return strings.pair(*VARIABLES)

    def choose(self) -> TokenPair | TokenSource:
        """The pair that the environment holds, or the source of the files that it names."""
        if any(self.environ.get(name) for name in VARIABLES):
            return self()
        paths = [self.environ.get(name) for name in FILE_VARIABLES]
        unset = [name for name, path in zip(HEADER_NAMES, paths, strict=True) if not path]
        if not unset:
            return file_tokens(*cast(list[str], paths))
        where = f"the variables {' and '.join(FILE_VARIABLES)} of the environment"
        if len(unset) == len(paths):
            where = f"token1= and token2=, tokens=, the variables {' and '.join(VARIABLES)}, then {where}"
        raise _missing(unset, where)


@attrs.frozen
class _FileTokens:
    path1: Path
    path2: Path

    def __call__(self) -> TokenPair:
        strings = self._read()
        for _ in range(FILE_READS):
            again = self._read()
            if again == strings:
                return again.pair(str(self.path1), str(self.path2))
            strings = again
        raise ConfigurationError(f"the token files {self.path1} and {self.path2} change faster than they can be read.")

    def _read(self) -> _Strings:
        return _Strings(_read_token("Token1", self.path1), _read_token("Token2", self.path2))


def _read_token(name: str, path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = None
    except OSError as exc:
        raise ConfigurationError(f"{name}: the file {path} cannot be read ({exc.strerror}).") from exc
    if content is None:
        raise _missing([name], f"the file {path}")
    # What is not ASCII is replaced by what the pair refuses, so that no decoding error carries the content away.
    return content.decode("ascii", "replace").removesuffix("\n").removesuffix("\r")


@attrs.frozen
class _KeyringTokens:
    service: str
    get_password: Callable[[str, str], str | None] = attrs.field(repr=False)

    def __call__(self) -> TokenPair:
        strings = _Strings(self.get_password(self.service, "token1"), self.get_password(self.service, "token2"))
        if missing := strings.missing():
            raise _missing(missing, f"the keyring, service {self.service!r}, user names 'token1' and 'token2'")
        return strings.pair("keyring", "keyring")


def _missing(names: list[str], where: str) -> MissingTokensError:
    verb = "is" if len(names) == 1 else "are"
    return MissingTokensError(f"{' and '.join(names)} {verb} missing. Looked for in {where}. {HOW_TO_GET_TOKENS}")


def env_tokens(environ: Mapping[str, str] = os.environ) -> TokenSource:
    """A source that reads `LAYER_TOKEN1` and `LAYER_TOKEN2` of `environ` whenever it is asked.

    Asked, it raises `MissingTokensError` where one is unset or empty, `ConfigurationError` where one is no token.
    """
    return _Environment(environ)


def file_tokens(path1: str | os.PathLike[str], path2: str | os.PathLike[str]) -> TokenSource:
    """A source that reads Token1 from the file `path1` and Token2 from `path2` whenever it is asked.

    One trailing line break is dropped. Both files are read, and again until neither changed in between, so a pair that
    is swapped while it is read is never mixed. Asked, it raises `MissingTokensError` where a file is missing,
    `ConfigurationError` where it cannot be read or holds no token.
    """
    return _FileTokens(Path(path1), Path(path2))


def keyring_tokens(service: str = "layer-async") -> TokenSource:
    """A source that asks the system's keyring for the user names `token1` and `token2` of `service`.

    Needs the extra `keyring`; raises `ConfigurationError` without it. Asked, it raises `MissingTokensError` where the
    keyring holds no such entry.
    """
    try:
        import keyring
    except ImportError as exc:
        raise ConfigurationError("keyring_tokens needs the keyring: pip install 'layer-async[keyring]'.") from exc
    return _KeyringTokens(service, keyring.get_password)


def resolve_tokens(
    *,
    token1: str | None = None,
    token2: str | None = None,
    tokens: TokenPair | TokenSource | None = None,
    environ: Mapping[str, str] | None = None,
) -> TokenPair | TokenSource:
    """The pair or source that a client is to use.

    In this order: the strings `token1` and `token2`; `tokens`; `LAYER_TOKEN1` and `LAYER_TOKEN2`; the files that
    `LAYER_TOKEN1_FILE` and `LAYER_TOKEN2_FILE` name. `environ` stands in for the process's environment. An empty
    variable counts as unset. Raises `MissingTokensError` where there is nothing, or only half a pair (halves of two
    places are never put together), `ConfigurationError` where `tokens` is given beside strings or is neither pair nor
    callable, and where a string is no token.
    """
    strings, environment = _Strings(token1, token2), _Environment(os.environ if environ is None else environ)
    given = token1 is not None or token2 is not None
    flaw = None if tokens is None else _tokens_flaw(tokens)
    if given and tokens is not None:
        flaw = "give either token1= and token2=, or tokens=, not both."
    if flaw is None and tokens is not None:
        return tokens
    del token1, token2, tokens, environ
    if flaw is not None:
        raise ConfigurationError(flaw)
    if not given:
        return environment.choose()
    if missing := strings.missing():
        raise _missing(missing, "the arguments token1= and token2=; half a pair is never completed from elsewhere")
    return strings.pair("token1=", "token2=")


def _tokens_flaw(tokens: object) -> str | None:
    if isinstance(tokens, TokenPair) or callable(tokens):
        return None
    return f"tokens must be a TokenPair or a callable that returns one, not {type(tokens).__name__}."


# Where tokens may go

DEFAULT_PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@attrs.frozen
class Origin:
    """The one place that tokens may go to: scheme, host and port (RFC 6454), and the path that calls are relative to.

    `port` is None only where the scheme has no default. `base_path` begins and ends with a slash.
    """

    scheme: str
    host: str
    port: int | None
    base_path: str = "/"

    @classmethod
    def parse(cls, url: str | httpx.URL, *, allow_http: bool = False) -> Origin:
        """The origin and base path of `url`, if tokens may go there.

        Raises `ConfigurationError` unless `url` is https, or http to this machine itself (`localhost`, 127.0.0.0/8,
        `::1`), or http at all where `allow_http` is True; and where it has a user, a query or a fragment.
        """
        origin = _read_origin(url, allow_http=allow_http)
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
        if url.scheme != self.scheme or _host(url) != self.host:
            return False
        return (DEFAULT_PORTS[self.scheme] if url.port is None else url.port) == self.port

    def resolve(self, path: str) -> httpx.URL:
        """The URL that `path` means.

        `/api/x` and `api/x` both mean the same below the base path, as with httpx's `base_url`; an absolute URL must be
        at this origin. Raises `ConfigurationError`, quoting neither query nor user, for anything that leads elsewhere
        or is not clearly a path: `//host`, a backslash, a user, a scheme without a host, white space at an end, a
        control character.
        """
        url = self._locate(path)
        if isinstance(url, str):
            del path
            raise ConfigurationError(url)
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


def _read_origin(url: object, *, allow_http: bool) -> Origin | str:
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
    return attrs.evolve(origin, base_path=url.raw_path.decode("ascii").rstrip("?/") + "/")


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


def _carries_tokens(request: httpx.Request) -> bool:
    headers = request.headers
    return isinstance(headers, MaskedHeaders) and len(headers.shown()) == len(HEADER_NAMES)


def _strip(request: httpx.Request) -> None:
    """Take off what looks like tokens: the request goes elsewhere."""
    headers = request.headers.copy()
    for name in LOWER_NAMES & set(headers):
        del headers[name]
    request.headers = headers


class _BriefBody(httpx.AsyncByteStream):
    """At most `BODY_LIMIT` bytes of a body, decoded here, since a decoder above would not know where to stop.

    gzip and deflate are decoded; what comes under another coding is left out.
    """

    def __init__(self, stream: httpx.AsyncByteStream, coding: str) -> None:
        self._stream = stream
        self._plain = coding in ("", "identity")
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32) if coding in ("gzip", "x-gzip", "deflate") else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = given = 0
        chunks = self._stream.__aiter__()
        async for chunk in chunks:
            piece = self._decoded(chunk[: BODY_LIMIT - read], BODY_LIMIT - given)
            read, given = read + len(chunk), given + len(piece)
            yield piece
            if max(read, given) >= BODY_LIMIT:
                break
        if isinstance(chunks, AsyncGenerator):  # left half read, it would be the garbage collector's
            await chunks.aclose()

    def _decoded(self, chunk: bytes, limit: int) -> bytes:
        if self._plain:
            return chunk
        if self._decoder is None:
            return b""
        try:
            return self._decoder.decompress(chunk, limit)
        except zlib.error:
            self._decoder = None
            return b""

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _read_briefly(response: httpx.Response) -> bytes | None:
    """Read at most 64 KiB, so that the connection is free; None where a hook has taken the body already."""
    if not response.is_closed:
        coding = response.headers.pop("content-encoding", "").strip().lower()
        response.stream = _BriefBody(cast(httpx.AsyncByteStream, response.stream), coding)
    try:
        return await response.aread()
    except httpx.StreamError:
        await response.aclose()
        return None


# How tokens are replaced


@attrs.frozen
class _Issue:
    """A pair and its number; replaced as one."""

    pair: TokenPair | None
    generation: int


@attrs.define
class _Circuit:
    """Whether the tokens are refused so clearly that sending more calls is pointless; decides, and is told the time.

    `fresh` counts the pairs in a row that were refused without ever having met success, `paths` holds where the current
    pair was refused for good. While `error` is set the circuit is open.
    """

    proven: int = 0
    counted: int = 0
    fresh: int = 0
    paths: set[str] = attrs.field(factory=set[str])
    error: AuthenticationError | None = None
    probe_at: float = 0.0

    def meet_success(self, generation: int) -> None:
        self.proven = generation
        if self.fresh or self.paths or self.error is not None:
            self.fresh, self.error = 0, None
            self.paths.clear()

    def meet_new_pair(self) -> None:
        self.error = None
        self.paths.clear()

    def meet_refusal(self, generation: int) -> bool:
        """A 401 for a pair of `generation`; True when enough is known to open."""
        if generation not in (self.proven, self.counted):
            self.counted = generation
            self.fresh += 1
        return self.fresh >= 2

    def meet_final_refusal(self, path: str) -> bool:
        """A 401 at `path` with no newer pair in sight; True when enough is known to open."""
        if len(self.paths) < 2:
            self.paths.add(path)
        return len(self.paths) >= 2

    def open(self, error: AuthenticationError, now: float) -> None:
        self.error, self.probe_at = error, now + PROBE_SECONDS

    def lets_through(self, now: float) -> bool:
        """Whether a call may go out although the circuit is open: one may, every 30 s.

        A time, not a turn that is given back: so a probe that is cancelled cannot leave the circuit stuck.
        """
        if now < self.probe_at:
            return False
        self.probe_at = now + PROBE_SECONDS
        return True


@attrs.define(eq=False)
class _Waiter:
    event: anyio.Event = attrs.field(factory=anyio.Event)
    leads: bool = False


@attrs.define(eq=False)
class _Setback:
    """The last asking brought nothing new: nothing at all, or an error."""

    until: float
    error: Exception | None = attrs.field(default=None, repr=False)
    traceback: TracebackType | None = attrs.field(default=None, repr=False)

    def reraise(self) -> None:
        if self.error is not None:
            # Each raising would lengthen the traceback that all who wait share.
            raise self.error.with_traceback(self.traceback)


@attrs.define(eq=False)
class _Flight:
    """One asking of the source, for all who wait for it on one event loop.

    One caller leads. Cancelled, it hands over to the next who waits, in O(1); the last one out ends the flight.
    """

    auth: DualTokenAuth
    loop: object
    generation: int
    asking: bool = True
    setback: _Setback | None = None
    waiters: OrderedDict[_Waiter, None] = attrs.field(factory=OrderedDict[_Waiter, None], repr=False)

    def wake(self) -> None:
        """It is over, for all who wait."""
        for waiter in self.waiters:
            waiter.event.set()
        self.waiters.clear()

    def hand_over(self) -> bool:
        """Make the next who waits lead; False where nobody waits."""
        if not self.waiters:
            return False
        heir, _ = self.waiters.popitem(last=False)
        heir.leads = True
        heir.event.set()
        return True


_asking: ContextVar[tuple[_Flight, ...]] = ContextVar("layer_async_asking", default=())


class DualTokenAuth(httpx.Auth):
    """Puts both tokens on each request to `origin`, on no other, and replaces them when they are refused.

    Works with any `httpx.AsyncClient(auth=…)`. `tokens` is a `TokenPair`, or a callable that returns one (or an
    awaitable of one); a plain callable is called in a worker thread. A 401 makes one caller ask the source for all who
    wait; each then tries once more, if there is a newer pair and its body can be sent again. What the source raises,
    they all raise; it is asked again after 1 s at the earliest. `origin` is a URL, read by `Origin.parse` with
    `allow_http`. `on_refresh` is called with each new generation and must not raise; `clock` gives monotonic seconds.

    Raises `ConfigurationError` at construction for a wrong `tokens` or `origin`; in a flow for a source that gives
    something else than a `TokenPair` or calls the client that it serves; `AuthenticationError` in a flow, before
    anything is sent, once two fresh pairs in a row, or one pair on two different paths, were refused with no success
    between. From then one call is let through every 30 s, until one succeeds or there is a newer pair.
    """

    def __init__(
        self,
        tokens: TokenPair | TokenSource,
        *,
        origin: str | httpx.URL | Origin,
        allow_http: bool = False,
        on_refresh: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        flaw = _tokens_flaw(tokens)
        self._source: TokenSource | None = None
        self._pairs: deque[TokenPair] = deque(maxlen=PAIRS_REMEMBERED)
        self._issue = _Issue(None, 0)
        self._circuit = _Circuit()
        self._flight: _Flight | None = None
        self._setback: _Setback | None = None
        self._threads: set[object] = set()
        self._clock = clock
        self.on_refresh = on_refresh
        if isinstance(tokens, TokenPair):
            self._install(tokens)
        else:
            self._source = tokens
        del tokens
        if flaw is not None:
            raise ConfigurationError(flaw)
        self.origin = origin if isinstance(origin, Origin) else Origin.parse(origin, allow_http=allow_http)

    def __repr__(self) -> str:
        # A traceback may show it while it is half made.
        return f"DualTokenAuth(origin='{self.__dict__.get('origin')}', generation={self.generation})"

    @property
    def generation(self) -> int:
        """The number of the current pair: 0 before a source was first asked, one more with each new pair."""
        return self._issue.generation

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values of the current and the last few pairs, longest first, to be scrubbed from text."""
        values = {value for pair in self._pairs for value in (pair.token1, pair.token2)}
        return tuple(sorted(values, key=lambda value: (-len(value), value)))

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Not offered: raises RuntimeError."""
        raise RuntimeError("DualTokenAuth is for httpx.AsyncClient; it cannot serve a synchronous httpx.Client")

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """What httpx drives: attach, send, and after a 401 perhaps once more. See the class for what is raised."""
        if not self.origin.admits(request.url):
            _strip(request)
            yield request
            return
        if _asking.get():
            self._refuse_own_source(request)
        if self._issue.pair is None:
            await self._renew(request)
        probing = self._circuit.error is not None and self._enter_open_circuit(request)
        retried = False
        while True:
            issue = self._issue
            request.headers = MaskedHeaders(request, cast(TokenPair, issue.pair), self.origin)
            response = yield request
            answered = response.request
            if response.status_code not in (401, 403):
                if response.is_success and issue is self._issue and _carries_tokens(answered):
                    self._circuit.meet_success(issue.generation)
                return
            if not _carries_tokens(answered):
                if not self._lost_tokens_on_the_way(request, response) or await _read_briefly(response) is None:
                    return
                request = answered
                continue
            if response.status_code == 403 or (body := await _read_briefly(response)) is None:
                return
            if not await self._has_newer(issue, response, body, may_ask=not retried, probing=probing):
                return
            if retried or not is_replayable(answered):
                return
            request, retried = answered, True

    def _lost_tokens_on_the_way(self, request: httpx.Request, response: httpx.Response) -> bool:
        """Whether `response` refuses a request that httpx, below us, redirected within the origin, as a copy.

        Then the tokens belong on that one too; unless another origin had its hand in the way there.
        """
        answered = response.request
        return (
            answered is not request
            and all(self.origin.admits(hop.request.url) for hop in (*response.history, response))
            and is_replayable(answered)
        )

    async def _has_newer(
        self, issue: _Issue, response: httpx.Response, body: bytes, *, may_ask: bool, probing: bool
    ) -> bool:
        """Take note that the pair of `issue` met a 401; whether a newer pair is there now, and worth trying."""
        if issue is self._issue and self._circuit.meet_refusal(issue.generation):
            self._open_circuit(response, body)
        may_ask = may_ask and (probing or self._circuit.error is None)
        if issue is self._issue and may_ask and self._source is not None:
            await self._renew(response.request)
        if issue is not self._issue:
            return self._circuit.error is None
        if self._circuit.meet_final_refusal(response.request.url.path):
            self._open_circuit(response, body)
        return False

    def _open_circuit(self, response: httpx.Response, body: bytes) -> None:
        if self._circuit.error is None:
            error = cast(AuthenticationError, status_error(response, body, secrets=self.secrets))
            error.args = (f"{error.args[0]} {CIRCUIT_ADVICE}",)
            self._circuit.open(error, self._clock())

    def _enter_open_circuit(self, request: httpx.Request) -> bool:
        """True for the one call that is let through; raises for all others."""
        if self._circuit.lets_through(self._clock()):
            return True
        error = copy.copy(cast(AuthenticationError, self._circuit.error))
        error.request = RequestInfo.of(request)
        del request
        raise error

    def _refuse_own_source(self, request: httpx.Request) -> None:
        if any(flight.auth is self and flight.asking for flight in _asking.get()):
            info = RequestInfo.of(request)
            del request
            raise ConfigurationError(
                "the source of the tokens called the client that it serves, which would wait for itself for ever. "
                "Give the source a client of its own.",
                request=info,
            )

    async def _renew(self, request: httpx.Request) -> None:
        """Wait until the source has been asked for what comes after the current pair, holding no slot meanwhile."""
        record = request.extensions.get(EXTENSION)
        if not isinstance(record, ExchangeRecord):
            await self._join_flight()
            return
        phase, record.phase = record.phase, "refresh"
        record.release_slot()
        await self._join_flight()
        record.phase = phase  # only now: an error that ends the wait is to find the phase that it ended

    async def _join_flight(self) -> None:
        if self._setback is not None and self._clock() < self._setback.until:
            self._setback.reraise()
            return
        self._setback = None
        loop = anyio.lowlevel.current_token().native_token
        flight = self._flight
        if flight is None or flight.loop is not loop:  # a flight on another loop, dead perhaps, cannot be waited for
            flight = self._flight = _Flight(self, loop, self.generation)
            await self._lead(flight)
            return
        waiter = _Waiter()
        flight.waiters[waiter] = None
        try:
            await waiter.event.wait()
        except BaseException:
            flight.waiters.pop(waiter, None)
            if waiter.leads:
                self._hand_over(flight)
            raise
        if waiter.leads:
            await self._lead(flight)
        elif flight.setback is not None:
            flight.setback.reraise()

    async def _lead(self, flight: _Flight) -> None:
        flight.asking = True
        mark = _asking.set((*_asking.get(), flight))
        try:
            pair = await self._ask()
        except BaseException as error:  # cleaned up after and raised again, whatever it is
            if isinstance(error, Exception):
                flight.setback = _Setback(self._clock() + SETBACK_SECONDS, error, error.__traceback__)
                self._land(flight)
            else:
                self._hand_over(flight)
            raise
        finally:
            flight.asking = False
            _asking.reset(mark)
        is_new = self.generation == flight.generation and self._install(pair)  # else another loop was faster
        if not is_new:
            flight.setback = _Setback(self._clock() + SETBACK_SECONDS)
        self._land(flight)
        if is_new and self.on_refresh is not None:
            self.on_refresh(self.generation)

    def _land(self, flight: _Flight) -> None:
        if self._flight is flight:
            self._flight, self._setback = None, flight.setback
        flight.wake()

    def _hand_over(self, flight: _Flight) -> None:
        if not flight.hand_over() and self._flight is flight:
            self._flight = None

    async def _ask(self) -> TokenPair:
        # No local variable holds the source: the repr of a partial, say, shows its arguments.
        if inspect.iscoroutinefunction(self._source) or inspect.iscoroutinefunction(cast(Any, self._source).__call__):
            given: object = cast(TokenSource, self._source)()
        elif len(self._threads) < SOURCE_THREADS:
            # Abandoned when cancelled, so that no deadline waits for it; a limiter of its own, so that a source that
            # hangs takes none of the threads that the application counts on.
            (given,) = await anyio.to_thread.run_sync(
                self._ask_in_thread, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
            )
        else:
            raise ConfigurationError(
                f"the source of the tokens hangs: {SOURCE_THREADS} calls of it were given up and have not come back."
            )
        if inspect.isawaitable(given):
            given = cast(object, await given)
        if isinstance(given, TokenPair):
            return given
        kind = type(given).__name__
        del given
        raise ConfigurationError(f"the source of the tokens gave {kind}, not a TokenPair.")

    def _ask_in_thread(self) -> tuple[object]:
        thread = object()
        self._threads.add(thread)
        try:
            return (cast(TokenSource, self._source)(),)  # wrapped, since trio lets no coroutine out of a thread
        finally:
            self._threads.discard(thread)

    def _install(self, pair: TokenPair) -> bool:
        """Make `pair` the current one; False where it already is."""
        if pair == self._issue.pair:
            return False
        self._pairs.append(pair)
        self._issue = _Issue(pair, self._issue.generation + 1)
        self._circuit.meet_new_pair()
        return True
