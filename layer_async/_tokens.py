"""The pair of tokens, and where it comes from: arguments, the environment, files, the keyring, any callable.

Rules: a pair is one thing, and never half from one place and half from another. Nothing secret is in a repr, a pickle,
an error, or a local variable that a traceback of ours could show: whoever raises deletes first, and flaws are found by
functions that return text.
"""

from __future__ import annotations

import os
from collections.abc import (
    Awaitable,
    Callable,
    Mapping,
)
from pathlib import Path
from typing import NoReturn, TypeAlias, cast

from ._errors import (
    TOKENS_ARE_MADE,
    ConfigurationError,
    MissingTokensError,
)
from ._values import Value

HEADER_NAMES = ("Token1", "Token2")
VARIABLES = ("LAYER_TOKEN1", "LAYER_TOKEN2")
FILE_VARIABLES = ("LAYER_TOKEN1_FILE", "LAYER_TOKEN2_FILE")
HOW_TO_GET_TOKENS = f"Tokens are made in The Layer under {TOKENS_ARE_MADE}."
FILE_READS = 20

HeaderEntry: TypeAlias = tuple[bytes, bytes, bytes]  # as httpx keeps it: name as given, name in lower case, value


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


class TokenPair(Value):
    """The two tokens that authenticate together. Its repr masks them; it refuses to be pickled or copied.

    `token1` is the primary token, `token2` the secondary one. Raises `ConfigurationError`, without quoting the value,
    unless both are non-empty strings of visible ASCII characters.
    """

    __match_args__ = ("token1", "token2")
    __slots__ = (*__match_args__, "entries")
    token1: str
    token2: str
    entries: tuple[HeaderEntry, ...]

    def __init__(self, token1: str, token2: str) -> None:
        flaw = _flaw("Token1", token1) or _flaw("Token2", token2)
        if flaw is not None:
            del self, token1, token2
            raise ConfigurationError(flaw)
        object.__setattr__(self, "token1", token1)
        object.__setattr__(self, "token2", token2)
        entries = ((b"Token1", b"token1", token1.encode()), (b"Token2", b"token2", token2.encode()))
        object.__setattr__(self, "entries", entries)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        del self, value
        raise AttributeError(f"a TokenPair is replaced as a whole: {name} cannot be set")

    def __repr__(self) -> str:
        return "TokenPair(token1=***, token2=***)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a TokenPair is neither pickled nor copied: give the source of the tokens instead")


TokenSource: TypeAlias = Callable[[], TokenPair | Awaitable[TokenPair]]
"""Where pairs come from: any callable. A plain one is called in a worker thread, an async one on the event loop."""


class _Strings(Value):
    """Two strings on their way to become a pair; exists so that no local variable holds them."""

    __match_args__ = ("token1", "token2")
    __slots__ = __match_args__

    def __init__(self, token1: str | None, token2: str | None) -> None:
        self.token1 = token1
        self.token2 = token2

    def __repr__(self) -> str:
        return "_Strings()"

    def pair(self, name1: str, name2: str) -> TokenPair:
        """The pair; `name1` and `name2` say in errors where the strings came from."""
        flaw = _flaw(f"Token1 ({name1})", self.token1) or _flaw(f"Token2 ({name2})", self.token2)
        if flaw is not None:
            raise ConfigurationError(flaw)
        return TokenPair(cast(str, self.token1), cast(str, self.token2))

    def missing(self) -> list[str]:
        return [name for name, value in zip(HEADER_NAMES, (self.token1, self.token2), strict=True) if not value]


class _Environment:
    """The environment, under a repr that does not print it; a source itself."""

    __slots__ = ("environ",)

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

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
            source = file_tokens(*cast(list[str], paths))
            source()  # a service that cannot authenticate should not start; it is read again for the first call
            return source
        where = f"the variables {' and '.join(FILE_VARIABLES)} of the environment"
        if len(unset) == len(paths):
            where = f"token1= and token2=, tokens=, the variables {' and '.join(VARIABLES)}, then {where}"
        raise _missing(unset, where)


class _FileTokens(Value):
    __match_args__ = ("path1", "path2")
    __slots__ = __match_args__

    def __init__(self, path1: Path, path2: Path) -> None:
        self.path1 = path1
        self.path2 = path2

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


class _KeyringTokens:
    __slots__ = ("get_password", "service")

    def __init__(self, service: str, get_password: Callable[[str, str], str | None]) -> None:
        self.service = service
        self.get_password = get_password

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
        raise ConfigurationError(
            "keyring_tokens needs the keyring: "
            "pip install 'layer-async[keyring]' (in a checkout: pip install '.[keyring]')."
        ) from exc
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
    flaw = None if tokens is None else tokens_flaw(tokens)
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


def tokens_flaw(tokens: object) -> str | None:
    if isinstance(tokens, TokenPair) or callable(tokens):
        return None
    return f"tokens must be a TokenPair or a callable that returns one, not {type(tokens).__name__}."
