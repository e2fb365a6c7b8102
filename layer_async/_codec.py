"""Bytes to typed values and back: what `into=` and `json=` mean. The engine, msgspec, is hidden here.

Rules: an `into` is checked before anything is sent, and a class is decoded as a call of it would make it, or refused,
never half. msgspec fills in the fields of attrs classes and dataclasses without calling `__init__`; where that would
make a difference (converters, aliases, `init=False`, an `__init__` of one's own) the class is called, through cattrs.
Types are never coerced: "5" is no int. A message says what was expected, what came and where, and quotes no value.
This room sends nothing and knows no client.
"""

from __future__ import annotations

import copy
import dataclasses
import decimal
import enum
import math
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import attrs
import httpx
import msgspec
from typing_extensions import TypeForm

from ._called import compile_called
from ._errors import ConfigurationError, RequestInfo, ResponseDecodeError, error_class
from ._shapes import AS_THEY_ARE, USER_ERRORS, Decoder, Mismatch, Refused, engine, name_of, record_of, walk

__all__ = ["decode"]

T = TypeVar("T")

BOM = b"\xef\xbb\xbf"
PLANS_KEPT = 1024


# What the client uses


def check_into(into: Any) -> None:
    """Raise `ConfigurationError`, saying what to do, unless JSON can be decoded into `into`; cheap when asked again."""
    _plan(into)


def decode(response: httpx.Response, into: TypeForm[T]) -> T:
    """The JSON body of `response`, which must have been read, as a `T`.

    `into` is an attrs class, dataclass, TypedDict, NamedTuple or msgspec Struct, a container of these
    (`list[Customer]`, `dict[str, Customer]`), a union with None, or `Any` for plain JSON. Unknown fields are ignored,
    types are not coerced, of a repeated key the last value counts, a UTF-8 byte order mark is skipped. An empty body
    is None where `into` admits None. The keys of an attrs class are the arguments of its `__init__`, so an alias
    counts; a class with aliases or converters needs the extra `cattrs`. A converter is given what its first argument
    is annotated with; where that says nothing, the field's own type if that holds a class or a container, else the
    plain JSON value. A Decimal keeps every digit, but for a JSON number inside a class that needs cattrs, which passes
    through a double (send money as text).

    Raises `ResponseDecodeError`, with the JSON path of the mismatch as `path`, for a body that is not such JSON;
    `ConfigurationError` when nothing can be decoded into `into`; the `APIStatusError` of its status for an answer that
    is not a success (outside 200 to 299), since its body is no `T`.
    """
    code = response.status_code
    if not 200 <= code <= 299:
        raise error_class(code)(
            f"the answer is {code}, not a success: its body is not decoded.",
            status_code=code,
            request=_request_of(response),
        )
    try:
        return decode_bytes(response.content, into)
    except ResponseDecodeError as exc:
        describe_answer(exc, response)
        raise


def describe_answer(error: ResponseDecodeError, response: httpx.Response) -> None:
    """Say in `error` what answer it is about."""
    media = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media in ("text/html", "text/plain", "text/xml", "application/xml"):
        error.args = (f"{error.args[0]} The server calls it {media}.",)
    error.request = _request_of(response)
    error.maybe_processed = error.request is not None and error.request.method not in ("GET", "HEAD", "OPTIONS")


def decode_again(values: list[Any] | tuple[Any, ...], into: TypeForm[T]) -> T:
    """Plain JSON `values` as a `T`, by way of their text. Rules and errors are those of `decode`."""
    try:
        text = msgspec.json.encode(values)
    except (TypeError, ValueError, RecursionError) as exc:
        reason = type(exc).__name__
    else:
        return decode_bytes(text, into)
    raise ConfigurationError(f"a list that is to be decoded holds what is not plain JSON ({reason}).")


def decode_bytes(data: bytes, into: TypeForm[T], *, at: str = "") -> T:
    """The JSON text `data` as a `T`. Rules and errors are those of `decode`; `at` is where in the body it stood."""
    plan = _plan(into)
    try:
        value: T = plan(data)
    except (msgspec.MsgspecError, Mismatch, *USER_ERRORS) as exc:
        mismatch = Mismatch.of(exc)
    else:
        return value
    if data.startswith(BOM) and not data.startswith(BOM * 2):
        rest = [data[len(BOM) :]]
        del data, mismatch  # as below
        return decode_bytes(rest.pop(), into, at=at)
    error = _misfit(data, plan, into, mismatch, at)
    cause = mismatch.cause
    del data, mismatch  # what they show is the server's
    if error is None:
        return typing.cast(T, None)
    try:
        raise error from cause
    finally:
        del error, cause  # they have this frame


def _misfit(data: bytes, plan: Decoder, into: Any, mismatch: Mismatch, at: str) -> ResponseDecodeError | None:
    """Why `data` does not decode; None where it is empty, and may be."""
    name = name_of(into)
    if not data.strip(b" \t\r\n"):
        if _admits_none(plan):
            return None
        return ResponseDecodeError(f"the body is empty, and {name} does not admit None; `{name} | None` would.")
    if mismatch.malformed:
        return ResponseDecodeError(f"the body cannot be read as JSON: {mismatch.detail}.")
    path = f"${at}{mismatch.path}"
    return ResponseDecodeError(f"the body does not fit {name}: {mismatch.detail} at `{path}`.", path=path)


def find_texts(data: bytes, paths: Iterable[Sequence[str]]) -> list[bytes | None]:
    """The JSON text at each of `paths` (keys, from the top) in the JSON text `data`; None where there is nothing.

    What lies beside the paths is passed over, not decoded. Raises `ResponseDecodeError` for what is not JSON.
    """
    opened: dict[Sequence[str], Any] = {(): msgspec.Raw(data.removeprefix(BOM))}
    for path in paths:
        for depth, key in enumerate(path):
            here = tuple(path[: depth + 1])
            if here not in opened:
                opened[here] = _members(opened[here[:-1]]).get(key)
    return [None if (text := opened[tuple(path)]) is None else bytes(text) for path in paths]


_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _members(text: Any) -> dict[str, Any]:
    try:
        return {} if text is None else _object.decode(text)
    except msgspec.ValidationError:  # not an object
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        mismatch = Mismatch.of(exc)
    raise ResponseDecodeError(f"the body cannot be read as JSON: {mismatch.detail}.")


def encode_json(value: Any) -> bytes:
    """`value` as JSON text for a request body: all that `into` could give back, and its own keys for attrs aliases.

    A field of an attrs class is written under its alias, so that what was decoded is encoded alike; Decimals are
    written as strings, datetimes after RFC 3339, bytes as base64. Raises `ConfigurationError`, quoting no value, for
    what JSON cannot hold: NaN and infinities, half a surrogate pair, objects that contain themselves, other classes.
    """
    try:
        return msgspec.json.encode(_plain(value))
    except UnicodeEncodeError:
        reason = "a text in it holds half a surrogate pair, which UTF-8 cannot express"
    except RecursionError:
        reason = "it is nested too deeply, or contains itself"
    except (TypeError, ValueError, Refused) as exc:
        reason = str(exc)
    raise ConfigurationError(f"json= cannot be encoded: {reason.rstrip('.')}.")


def _request_of(response: httpx.Response) -> RequestInfo | None:
    try:
        return RequestInfo.of(response.request)
    except RuntimeError:  # httpx's way to say that the response was made by hand
        return None


# Plans: one decoder a type

_plans: dict[Any, Decoder] = {}  # one step of a dict is atomic: at worst two threads make the same plan


def _plan(into: Any) -> Decoder:
    try:
        plan = _plans.get(into)
    except TypeError:  # not hashable, such as Annotated[int, [1]]
        return _compile(into)
    if plan is None:
        plan = _compile(into)
        if len(_plans) >= PLANS_KEPT:  # types made on the fly: forget all rather than grow for ever
            _plans.clear()
        _plans[into] = plan
    return plan


def _compile(into: Any) -> Decoder:
    try:
        for node in walk(into):
            if (record := record_of(node)) is not None and record.why_called is not None:
                return compile_called(into, record)
        return engine(into).decode
    except Refused as exc:
        reason = str(exc)
    raise ConfigurationError(f"into={name_of(into)} cannot be decoded: {reason}")


def _admits_none(plan: Decoder) -> bool:
    try:
        return plan(b"null") is None
    except (msgspec.MsgspecError, Mismatch, *USER_ERRORS):
        return False


# Values to JSON


def _plain(value: Any) -> Any:
    """`value` as msgspec should see it: attrs classes by their aliases, no NaN, subclasses of str and the like as such.

    Left alone, msgspec writes NaN as null, drops the private fields of attrs classes, and writes what else lies in
    their `__dict__`.
    """
    kind: Any = typing.cast(Any, type(value))
    if kind is dict or issubclass(kind, dict):
        return {
            key if type(key) is str else _plain_key(key): item if type(item) in AS_THEY_ARE else _plain(item)
            for key, item in value.items()
        }
    if kind is list or issubclass(kind, (list, tuple, set, frozenset)):
        return [item if type(item) in AS_THEY_ARE else _plain(item) for item in value]
    if kind in AS_THEY_ARE:
        return value
    if kind is float and math.isfinite(value):
        return value
    if issubclass(kind, enum.Enum):
        return _plain(value.value)
    if issubclass(kind, (float, decimal.Decimal)):
        if not math.isfinite(value):
            raise Refused(f"JSON has no NaN and no infinity, and a {kind.__name__} in it is one")
        return float(value) if issubclass(kind, float) else value
    if issubclass(kind, str):
        return str.__str__(value)
    return int.__int__(value) if issubclass(kind, int) else _plain_record(value, kind)


def _plain_key(key: Any) -> Any:
    return _plain(key) if isinstance(key, str | int | float | enum.Enum | decimal.Decimal) else key


def _plain_record(value: Any, kind: Any) -> Any:
    if attrs.has(kind):
        keys = {field.name: field.alias for field in attrs.fields(kind)}
    elif dataclasses.is_dataclass(kind):
        keys = {field.name: field.name for field in dataclasses.fields(kind)}
    elif issubclass(kind, msgspec.Struct):  # a copy, since its own renames, tags and defaults are msgspec's business
        copied = copy.copy(value)
        for name in kind.__struct_fields__:
            msgspec.structs.force_setattr(copied, name, _plain(getattr(value, name)))
        return copied
    else:
        return value
    # A field that is not set (init=False, and no default) has nothing to say.
    return {key: _plain(getattr(value, name)) for name, key in keys.items() if hasattr(value, name)}
