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
import datetime
import decimal
import enum
import inspect
import math
import re
import types
import typing
import uuid
from collections import abc
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import attrs
import httpx
import msgspec
import typing_extensions
from typing_extensions import TypeForm

from ._errors import ConfigurationError, RequestInfo, ResponseDecodeError, error_class

__all__ = ["decode"]

T = TypeVar("T")
Decoder = Callable[[bytes], Any]
Hook = Callable[[Any], Any]

BOM = b"\xef\xbb\xbf"
PLANS_KEPT = 1024
SUPPORTED = (
    "Supported are attrs classes, dataclasses, TypedDicts, NamedTuples, msgspec Structs, enums, Literal, datetime, "
    "date, time, timedelta, Decimal, UUID, bytes (base64), str, int, float, bool, None, Any, lists, tuples, sets and "
    "dicts of these, and unions."
)

SCALARS: frozenset[Any] = frozenset(
    {object, str, int, float, bool, bytes, bytearray, memoryview, type(None), decimal.Decimal, uuid.UUID}
    | {datetime.datetime, datetime.date, datetime.time, datetime.timedelta, msgspec.Raw, msgspec.UnsetType}
)
BUILDERS: dict[Any, Callable[[list[Any]], Any]] = {
    **dict.fromkeys((list, abc.Collection, abc.Sequence, abc.MutableSequence), list),
    **dict.fromkeys((set, abc.Set, abc.MutableSet), set),
    frozenset: frozenset,
    tuple: tuple,
}
MAPPINGS: frozenset[Any] = frozenset({dict, abc.Mapping, abc.MutableMapping})
AS_THEY_ARE = SCALARS - {float, decimal.Decimal}
UNIONS: frozenset[Any] = frozenset({typing.Union, types.UnionType})
QUALIFIERS: frozenset[Any] = frozenset(
    {typing.Required, typing.NotRequired, typing.Final, typing_extensions.ReadOnly}
    | {typing_extensions.Required, typing_extensions.NotRequired}
)

# What the code of a user's class (validators, converters, __post_init__) may raise over a value that it does not like.
# msgspec turns ValueError and TypeError into its own error, with the path; the others come through as they are.
USER_ERRORS = (ValueError, TypeError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError)


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
        media = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media in ("text/html", "text/plain", "text/xml", "application/xml"):
            exc.args = (f"{exc.args[0]} The server calls it {media}.",)
        exc.request = _request_of(response)
        exc.maybe_processed = exc.request is not None and exc.request.method not in ("GET", "HEAD", "OPTIONS")
        raise


def decode_bytes(data: bytes, into: TypeForm[T]) -> T:
    """The JSON text `data` as a `T`. Rules and errors are those of `decode`."""
    plan = _plan(into)
    try:
        value: T = plan(data)
    except (msgspec.MsgspecError, _Mismatch, *USER_ERRORS) as exc:
        mismatch = _Mismatch.of(exc)
    else:
        return value
    if data.startswith(BOM) and not data.startswith(BOM * 2):
        return decode_bytes(data[len(BOM) :], into)
    name = _name(into)
    if not data.strip(b" \t\r\n"):
        if _admits_none(plan):
            return typing.cast(T, None)
        raise ResponseDecodeError(f"the body is empty, and {name} does not admit None; `{name} | None` would.")
    if mismatch.malformed:
        raise ResponseDecodeError(f"the body cannot be read as JSON: {mismatch.detail}.")
    path = f"${mismatch.path}"
    raise ResponseDecodeError(
        f"the body does not fit {name}: {mismatch.detail} at `{path}`.", path=path
    ) from mismatch.cause


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
    except (TypeError, ValueError, _Refused) as exc:
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
        for node in _walk(into):
            if (record := _record(node)) is not None and record.why_called is not None:
                return _compile_called(into, record)
        return _engine(into).decode
    except _Refused as exc:
        reason = str(exc)
    raise ConfigurationError(f"into={_name(into)} cannot be decoded: {reason}")


def _engine(annotation: Any) -> msgspec.json.Decoder[Any]:
    try:
        return msgspec.json.Decoder(annotation)
    except (*USER_ERRORS, NameError) as exc:
        raise _Refused(f"{exc}.") from None


def _admits_none(plan: Decoder) -> bool:
    try:
        return plan(b"null") is None
    except (msgspec.MsgspecError, _Mismatch, *USER_ERRORS):
        return False


# What is known of a type


class _Refused(Exception):  # noqa: N818
    """A type or value that cannot be decoded or encoded, as text that names it."""


@attrs.frozen
class _Record:
    """A class with fields: what the JSON of each is decoded into, and why it must be called, if it must.

    `required` is filled in for TypedDicts only.
    """

    cls: type
    inputs: dict[str, Any]
    why_called: str | None = None
    required: frozenset[str] = frozenset()


def _walk(annotation: Any, *, into_records: bool = True) -> list[Any]:
    """`annotation` and every annotation inside it, once each; `_Refused` if one of them cannot be decoded."""
    found: dict[int, Any] = {}
    waiting = [annotation]
    for node in waiting:
        if id(node) not in found:
            found[id(node)] = node
            waiting.extend(_parts(node, into_records=into_records))
    return list(found.values())


def _parts(node: Any, *, into_records: bool) -> Iterable[Any]:
    origin, arguments = typing.get_origin(node), typing.get_args(node)
    if node is Any or node is None or origin is typing.Literal:
        return ()
    if origin is typing.Annotated:
        return arguments[:1]
    if origin in UNIONS or origin in QUALIFIERS:
        return arguments
    if origin in MAPPINGS and not all(_is_scalar(key) for key in _walk(arguments[0], into_records=False)):
        raise _Refused(f"{_name(node)} has keys that no JSON object has: they are text, or made of text.")
    if origin is not None:
        return [origin, *(argument for argument in arguments if argument is not ...)]
    if isinstance(node, TypeVar):
        return [part for part in (node.__bound__, *node.__constraints__) if part is not None]
    if isinstance(node, typing.NewType):
        return [node.__supertype__]
    if _is_type_alias(node):
        return [node.__value__]
    if not isinstance(node, type):
        raise _Refused(f"{_name(node)} is not a type that JSON can be decoded into. {SUPPORTED}")
    if hasattr(node, "__pydantic_validator__"):
        raise _Refused(
            f"{_name(node)} is a pydantic model: leave `into` out and give the response's content to its "
            "`model_validate_json`, or use an attrs class, a dataclass or a TypedDict."
        )
    if node in SCALARS or node in BUILDERS or node in MAPPINGS or issubclass(node, enum.Enum):
        return ()
    if not _is_record(node):
        raise _Refused(f"{_name(node)} is not a type that JSON can be decoded into. {SUPPORTED}")
    record = _record(node) if into_records else None
    return () if record is None else record.inputs.values()


def _is_type_alias(node: Any) -> bool:
    return type(node).__name__ == "TypeAliasType"  # there are two: that of typing and that of typing_extensions


def _is_record(cls: Any) -> bool:
    return isinstance(cls, type) and (
        attrs.has(cls)
        or dataclasses.is_dataclass(cls)
        or typing_extensions.is_typeddict(typing.cast(Any, cls))
        or issubclass(cls, msgspec.Struct)
        or _is_namedtuple(cls)
    )


def _is_namedtuple(cls: Any) -> bool:
    return issubclass(cls, tuple) and hasattr(typing.cast(Any, cls), "_fields")


def _record(cls: Any) -> _Record | None:
    """What is known of a class with fields; None for anything else. `_Refused` where its fields cannot be known."""
    if not _is_record(cls):
        return None
    try:
        hints = typing_extensions.get_type_hints(cls, include_extras=True)
    except (*USER_ERRORS, NameError, SyntaxError) as exc:
        raise _Refused(
            f"the annotations of {_name(cls)} cannot be resolved ({exc}). Define the classes that they name at the top "
            "of a module and import them there, neither inside a function nor under TYPE_CHECKING."
        ) from None
    if typing_extensions.is_typeddict(cls):
        return _typed_dict(cls, hints)
    if issubclass(cls, msgspec.Struct):
        return _Record(cls, {name: hints[name] for name in cls.__struct_fields__})
    if _is_namedtuple(cls):
        if not _is_generated(cls, "__new__"):
            raise _Refused(f"{_name(cls)} has its own `__new__`, which would not be called. Decode into a dataclass.")
        return _Record(cls, {name: hints.get(name, Any) for name in cls._fields})
    fields = _fields(cls)
    for field in fields:
        if field.name not in hints:
            raise _Refused(f"field `{field.name}` of {_name(cls)} has no annotation: give it one.")
    _check_arguments(cls, {getattr(field, "alias", field.name) for field in fields if field.init})
    inputs = {field.name: _input(field, hints[field.name]) for field in fields if field.init}
    return _Record(cls, inputs, _why_called(cls, fields))


def _fields(cls: Any) -> tuple[Any, ...]:
    return tuple(attrs.fields(cls)) if attrs.has(cls) else dataclasses.fields(cls)


def _is_scalar(node: Any) -> bool:
    return not (node in BUILDERS or node in MAPPINGS or _is_record(node))


def _typed_dict(cls: Any, hints: dict[str, Any]) -> _Record:
    # Its own `__required_keys__` is wrong about qualifiers in a module with postponed annotations.
    required = set(cls.__required_keys__)
    for name in hints:
        while (qualifier := typing.get_origin(hints[name])) in QUALIFIERS:
            if qualifier in (typing.Required, typing_extensions.Required):
                required.add(name)
            if qualifier in (typing.NotRequired, typing_extensions.NotRequired):
                required.discard(name)
            (hints[name],) = typing.get_args(hints[name])
    return _Record(cls, hints, required=frozenset(required))


def _check_arguments(cls: Any, names: set[str]) -> None:
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if taken != names or len(taken) != len(parameters):
        raise _Refused(
            f"the `__init__` of {_name(cls)} takes other arguments than its fields, so what to give it is not known "
            "(an InitVar, or an `__init__` of its own). Decode into a class of plain fields and make it from that."
        )


def _input(field: Any, hint: Any) -> Any:
    """What the JSON value of a field is decoded into before the class, and so its converter, is given it."""
    converter = getattr(field, "converter", None)
    if converter is None:
        return hint
    wanted = _first_annotation(getattr(converter, "converter", converter))  # attrs.Converter wraps the function
    try:
        _walk(wanted, into_records=False)
        _engine(wanted)
    except _Refused:
        wanted = None
    if wanted is not None:
        return wanted
    try:
        structured = not all(_is_scalar(node) for node in _walk(hint, into_records=False))
    except _Refused:
        structured = False
    return hint if structured else Any


def _first_annotation(function: Any) -> Any:
    """The annotation of the first argument of a converter; None when there is none to be found."""
    try:
        name = next(iter(inspect.signature(function).parameters), "")
        target = getattr(function, "__init__") if isinstance(function, type) else function  # noqa: B009 - mypy
        return typing_extensions.get_type_hints(target, include_extras=True).get(name)
    except (*USER_ERRORS, NameError, SyntaxError):
        return None


def _why_called(cls: Any, fields: Iterable[Any]) -> str | None:
    """Why only a call makes a proper instance of a dataclass or attrs class; None where filling in its fields does."""
    for field in fields:
        if not field.init:
            return f"its field `{field.name}` is no argument of `__init__` (init=False)"
        if getattr(field, "converter", None) is not None:
            return f"its field `{field.name}` has a converter"
        if (alias := getattr(field, "alias", field.name)) != field.name:
            return f"its field `{field.name}` has the alias `{alias}` (attrs drops leading underscores by itself)"
        if getattr(field.default, "takes_self", False):
            return f"the default of its field `{field.name}` is made from the instance"
    for method in ("__init__", "__new__", "__setattr__"):
        if not _is_generated(cls, method):
            return f"it has its own `{method}`"
    if "_attrs_cached_hash" in getattr(getattr(cls.__hash__, "__code__", None), "co_names", ()):
        return "it caches its hash, which `__init__` prepares"
    return None


def _is_generated(cls: Any, method: str) -> bool:
    """Whether `method` is object's own, or was written by attrs or by dataclasses."""
    function = getattr(cls, method)
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    by_attrs = file.startswith("<attrs generated") or file == attrs.fields.__code__.co_filename
    return by_attrs or file == "<string>" or function is getattr(object, method)


def _name(annotation: Any) -> str:
    """How a message calls a type: without its module, as far as that is possible."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation.__name__
    return re.sub(r"\b(?:\w+\.)+(?:<locals>\.)*(?=\w)", "", repr(annotation))[:200]


# Where a body does not fit


class _Mismatch(Exception):  # noqa: N818
    """`detail` says what was expected and what came, at `path` below `$`; `cause` is what the class's code raised."""

    def __init__(self, detail: str, path: str = "", *, cause: Exception | None = None, malformed: bool = False) -> None:
        super().__init__(detail)
        self.detail, self.path, self.cause, self.malformed = detail, path, cause, malformed

    @classmethod
    def of(cls, exc: Exception) -> _Mismatch:
        """The same, less any value of the body: msgspec quotes enum values and tags, and a class's own code may all."""
        if isinstance(exc, _Mismatch):
            return exc.with_traceback(None)
        if isinstance(exc, RecursionError):
            return cls("it is nested too deeply", malformed=True)
        if isinstance(exc, UnicodeDecodeError):
            return cls("it is not UTF-8 (RFC 8259 section 8.1)", malformed=True)
        if not isinstance(exc, msgspec.ValidationError):
            if isinstance(exc, msgspec.MsgspecError):
                text = _lowered(str(exc).removeprefix("JSON is malformed: "))
                return cls("it is cut short or malformed" if "truncated" in text else text, malformed=True)
            return cls(f"the class's own code raised {type(exc).__name__}", cause=exc)
        text, path = str(exc), ""
        if located := re.fullmatch(r"(.*?) - at (`key` in )?`\$([^`]*)`", text, re.DOTALL):
            text, path = located[1] + (" as a key" if located[2] else ""), located[3]
        if isinstance(exc.__cause__, Exception):
            return cls(f"the class's own code raised {type(exc.__cause__).__name__}", path, cause=exc.__cause__)
        if text.startswith(("Invalid enum value", "Invalid value")):
            text = "the value is none of those that are allowed"
        return cls(_lowered(text)[:200], path)


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


# Classes that must be called: cattrs calls them, msgspec still decodes everything in them


def _compile_called(into: Any, first: _Record) -> Decoder:
    try:
        import cattrs
    except ImportError:
        raise _Refused(
            f"{_name(first.cls)} is made by calling it, since {first.why_called}. Install the extra "
            "(pip install 'layer-async[cattrs]'), or decode into a class without."
        ) from None
    hook = _Forge(cattrs.Converter(detailed_validation=True)).hook(into)
    parse = msgspec.json.Decoder().decode

    def plan(data: bytes) -> Any:
        return hook(parse(data))

    return plan


def _is_called(node: Any) -> bool:
    record = _record(node)
    return record is not None and record.why_called is not None


class _Forge:
    """Makes the functions that turn plain JSON values into what is asked for, one a type; they raise `_Mismatch`.

    cattrs would coerce ("5" to 5, any iterable to a list), so it makes the classes only, and not what is in them.
    """

    def __init__(self, converter: Any) -> None:
        self.converter = converter
        self.hooks: dict[Any, Hook] = {}

    def is_native(self, annotation: Any) -> bool:
        """Whether msgspec alone can decode it, since no class in it must be called."""
        return not any(_is_called(node) for node in _walk(annotation))

    def hook(self, annotation: Any) -> Hook:
        """The function for `annotation`; one that looks it up when called, while it is still being made."""
        try:
            if annotation not in self.hooks:
                self.hooks[annotation] = lambda value: self.hooks[annotation](value)
                self.hooks[annotation] = self.make(annotation)
            return self.hooks[annotation]
        except TypeError:  # not hashable
            return self.make(annotation)

    def make(self, annotation: Any) -> Hook:
        """A new function for `annotation`."""
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        cls: Any = origin or annotation
        if self.is_native(annotation):
            return self.native(annotation)
        if origin is typing.Annotated:
            if any(isinstance(extra, msgspec.Meta) for extra in annotation.__metadata__):
                raise _Refused(f"a constraint (msgspec.Meta) on {_name(arguments[0])}, which holds a called class.")
            return self.hook(arguments[0])
        if origin in QUALIFIERS:
            return self.hook(arguments[0])
        if origin in UNIONS:
            return self.optional([member for member in arguments if member is not type(None)])
        if isinstance(annotation, typing.NewType):
            return self.hook(annotation.__supertype__)
        if _is_type_alias(annotation):
            return self.hook(annotation.__value__)
        if cls in BUILDERS and (cls is not tuple or arguments[1:] == (...,)):
            return self.array(arguments[0], BUILDERS[cls])
        if cls in MAPPINGS:
            return self.object(*arguments)
        record = _record(cls)
        if record is not None and typing_extensions.is_typeddict(typing.cast(Any, cls)):
            return self.typed_dict(record, arguments)
        if record is not None and (attrs.has(cls) or dataclasses.is_dataclass(cls)):
            return self.record(record, arguments)
        inside = next(node for node in _walk(annotation) if _is_called(node))
        raise _Refused(
            f"{_name(annotation)} holds {_name(inside)}, which is made by calling it. Such a class may stand in attrs "
            "classes, dataclasses, TypedDicts, lists, sets, tuples of one type, values of dicts, and unions with None."
        )

    def native(self, annotation: Any) -> Hook:
        """Everything that msgspec decodes by itself, exactly as strict as it is alone."""
        _engine(annotation)

        def structure(value: Any) -> Any:
            try:
                return msgspec.convert(value, annotation, str_keys=True)
            except (msgspec.MsgspecError, *USER_ERRORS) as exc:
                mismatch = _Mismatch.of(exc)
            raise mismatch

        return structure

    def optional(self, members: list[Any]) -> Hook:
        """A union with None; others would have to guess which class a JSON object is."""
        if len(members) != 1:
            raise _Refused(f"a union of {' and '.join(_name(m) for m in members)}: which one JSON means is not known.")
        inner = self.hook(members[0])
        return lambda value: None if value is None else inner(value)

    def array(self, element: Any, build: Callable[[list[Any]], Any]) -> Hook:
        """A JSON array, as whatever `build` makes of a list."""
        inner = self.hook(element)

        def structure(values: Any) -> Any:
            _expect(list, values)
            result: list[Any] = []
            try:
                for value in values:
                    result.append(inner(value))  # its length is the index of a mismatch
            except _Mismatch as exc:
                exc.path = f"[{len(result)}]{exc.path}"
                raise
            return build(result)

        return structure

    def object(self, key: Any, element: Any) -> Hook:
        """A JSON object whose keys are data, so that no message may name them."""
        inner, keys = self.hook(element), self.native(dict[key, Any])

        def structure(values: Any) -> Any:
            result = keys(values)
            try:
                return {name: inner(value) for name, value in result.items()}
            except _Mismatch as exc:
                exc.path = f"[...]{exc.path}"
                raise

        return structure

    def typed_dict(self, record: _Record, arguments: tuple[Any, ...]) -> Hook:
        """A TypedDict that holds a called class somewhere; what it does not know is dropped, as msgspec does."""
        given = _bindings(record.cls, arguments)
        hooks = {name: self.hook(_bound(hint, given)) for name, hint in record.inputs.items()}

        def structure(value: Any) -> Any:
            _expect(dict, value)
            result: dict[str, Any] = {}
            for name, inner in hooks.items():
                if name in value:
                    try:
                        result[name] = inner(value[name])
                    except _Mismatch as exc:
                        exc.path = f".{name}{exc.path}"
                        raise
                elif name in record.required:
                    raise _Mismatch(f"object missing required field `{name}`")
            return result

        return structure

    def record(self, record: _Record, arguments: tuple[Any, ...]) -> Hook:
        """A class with fields, made by cattrs: by its aliases, and with what its converters want to be given."""
        from cattrs import ClassValidationError
        from cattrs.gen import make_dict_structure_fn, override

        cls: Any = record.cls
        given = _bindings(cls, arguments)
        options: dict[str, Any] = {"_cattrs_use_linecache": False, "_cattrs_use_alias": True}
        for name, hint in record.inputs.items():
            options[name] = override(struct_hook=_ignoring_type(self.hook(_bound(hint, given))))
        # cattrs wants to know what each type variable stands for, though it decodes no field by itself.
        known = cls[tuple(Any for _ in cls.__parameters__)] if getattr(cls, "__parameters__", ()) else cls
        try:
            fill: Callable[[Any, Any], Any] = make_dict_structure_fn(known, self.converter, **options)
        except TypeError:
            raise _Refused(f"cattrs cannot make {_name(cls)}: a field of it is called `cl` or `converter`.") from None
        keys = {field.name: getattr(field, "alias", field.name) for field in _fields(cls)}

        def structure(value: Any) -> Any:
            _expect(dict, value)
            try:
                return fill(value, cls)
            except ClassValidationError as group:
                mismatch = _first_of(group.exceptions[0], keys)
            raise mismatch

        return structure


def _ignoring_type(hook: Hook) -> Callable[[Any, Any], Any]:
    return lambda value, _: hook(value)


def _bindings(cls: Any, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """What the type variables of a generic class and of its bases stand for."""
    given = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))
    for base in getattr(cls, "__orig_bases__", ()):
        origin = typing.get_origin(base)
        if origin is not None and origin is not typing.Generic:
            inner = _bindings(origin, tuple(_bound(argument, given) for argument in typing.get_args(base)))
            if any(given.get(variable, bound) != bound for variable, bound in inner.items()):
                raise _Refused(f"a type variable of {_name(cls)} means something else in its base {_name(origin)}.")
            given |= inner
    return given


def _bound(hint: Any, given: dict[Any, Any]) -> Any:
    if isinstance(hint, TypeVar):
        return given.get(hint, hint)
    variables = getattr(hint, "__parameters__", ())
    if not variables or isinstance(hint, type):
        return hint
    return hint[tuple(given.get(variable, variable) for variable in variables)]


def _expect(kind: type, value: Any) -> None:
    if type(value) is not kind:
        names = {"dict": "object", "list": "array", "NoneType": "null"}
        came = type(value).__name__
        raise _Mismatch(f"expected `{names[kind.__name__]}`, got `{names.get(came, came)}`")


def _first_of(exc: Exception, keys: dict[str, str]) -> _Mismatch:
    """The first thing that cattrs met in a class: at a field, which its note names, or in the call of the class."""
    notes = [note for note in getattr(exc, "__notes__", ()) if hasattr(note, "name")]
    inner = _Mismatch.of(exc)
    if not notes:
        return inner
    key = keys[notes[-1].name]  # the last one is of this class, those before it are of classes inside
    if isinstance(exc, KeyError):  # from looking the field up: what decodes its value raises nothing but _Mismatch
        return _Mismatch(f"object missing required field `{key}`")
    inner.path = f".{key}{inner.path}"
    return inner


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
            raise _Refused(f"JSON has no NaN and no infinity, and a {kind.__name__} in it is one")
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
