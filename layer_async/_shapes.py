"""What is known of a type that somebody wants to decode into: its parts, and whether its class must be called.

Rules: nothing is decoded here. msgspec fills in the fields of attrs classes and dataclasses without calling `__init__`;
`Record.why_called` says where that would make a difference (converters, aliases, `init=False`, an `__init__` of one's
own). What cannot be decoded is `Refused`, what does not fit is a `Mismatch`; neither quotes a value.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import inspect
import re
import types
import typing
import uuid
from collections import abc
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import attrs
import msgspec
import typing_extensions

Decoder = Callable[[bytes], Any]
Hook = Callable[[Any], Any]

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


class Refused(Exception):  # noqa: N818
    """A type or value that cannot be decoded or encoded, as text that names it."""


@attrs.frozen
class Record:
    """A class with fields: what the JSON of each is decoded into, and why it must be called, if it must.

    `required` is filled in for TypedDicts only.
    """

    cls: type
    inputs: dict[str, Any]
    why_called: str | None = None
    required: frozenset[str] = frozenset()


def walk(annotation: Any, *, into_records: bool = True) -> list[Any]:
    """`annotation` and every annotation inside it, once each; `Refused` if one of them cannot be decoded."""
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
    if origin in MAPPINGS and not all(is_scalar(key) for key in walk(arguments[0], into_records=False)):
        raise Refused(f"{name_of(node)} has keys that no JSON object has: they are text, or made of text.")
    if origin is not None:
        return [origin, *(argument for argument in arguments if argument is not ...)]
    if isinstance(node, TypeVar):
        return [part for part in (node.__bound__, *node.__constraints__) if part is not None]
    if isinstance(node, typing.NewType):
        return [node.__supertype__]
    if is_type_alias(node):
        return [node.__value__]
    if not isinstance(node, type):
        raise Refused(f"{name_of(node)} is not a type that JSON can be decoded into. {SUPPORTED}")
    if hasattr(node, "__pydantic_validator__"):
        raise Refused(
            f"{name_of(node)} is a pydantic model: leave `into` out and give the response's content to its "
            "`model_validate_json`, or use an attrs class, a dataclass or a TypedDict."
        )
    if node in SCALARS or node in BUILDERS or node in MAPPINGS or issubclass(node, enum.Enum):
        return ()
    if not is_record(node):
        raise Refused(f"{name_of(node)} is not a type that JSON can be decoded into. {SUPPORTED}")
    record = record_of(node) if into_records else None
    return () if record is None else record.inputs.values()


def is_type_alias(node: Any) -> bool:
    return type(node).__name__ == "TypeAliasType"  # there are two: that of typing and that of typing_extensions


def is_record(cls: Any) -> bool:
    return isinstance(cls, type) and (
        attrs.has(cls)
        or dataclasses.is_dataclass(cls)
        or typing_extensions.is_typeddict(typing.cast(Any, cls))
        or issubclass(cls, msgspec.Struct)
        or is_namedtuple(cls)
    )


def is_namedtuple(cls: Any) -> bool:
    return issubclass(cls, tuple) and hasattr(typing.cast(Any, cls), "_fields")


def record_of(cls: Any) -> Record | None:
    """What is known of a class with fields; None for anything else. `Refused` where its fields cannot be known."""
    if not is_record(cls):
        return None
    try:
        hints = typing_extensions.get_type_hints(cls, include_extras=True)
    except (*USER_ERRORS, NameError, SyntaxError) as exc:
        raise Refused(
            f"the annotations of {name_of(cls)} cannot be resolved ({exc}). Define the classes that they name at the "
            "top of a module and import them there, neither inside a function nor under TYPE_CHECKING."
        ) from None
    if typing_extensions.is_typeddict(cls):
        return _typed_dict(cls, hints)
    if issubclass(cls, msgspec.Struct):
        return Record(cls, {name: hints[name] for name in cls.__struct_fields__})
    if is_namedtuple(cls):
        if not _is_generated(cls, "__new__"):
            raise Refused(f"{name_of(cls)} has its own `__new__`, which would not be called. Decode into a dataclass.")
        return Record(cls, {name: hints.get(name, Any) for name in cls._fields})
    fields = fields_of(cls)
    for field in fields:
        if field.name not in hints:
            raise Refused(f"field `{field.name}` of {name_of(cls)} has no annotation: give it one.")
    _check_arguments(cls, {getattr(field, "alias", field.name) for field in fields if field.init})
    inputs = {field.name: input_of(field, hints[field.name]) for field in fields if field.init}
    return Record(cls, inputs, _why_called(cls, fields))


def fields_of(cls: Any) -> tuple[Any, ...]:
    return tuple(attrs.fields(cls)) if attrs.has(cls) else dataclasses.fields(cls)


def is_scalar(node: Any) -> bool:
    return not (node in BUILDERS or node in MAPPINGS or is_record(node))


def _typed_dict(cls: Any, hints: dict[str, Any]) -> Record:
    # Its own `__required_keys__` is wrong about qualifiers in a module with postponed annotations.
    required = set(cls.__required_keys__)
    for name in hints:
        while (qualifier := typing.get_origin(hints[name])) in QUALIFIERS:
            if qualifier in (typing.Required, typing_extensions.Required):
                required.add(name)
            if qualifier in (typing.NotRequired, typing_extensions.NotRequired):
                required.discard(name)
            (hints[name],) = typing.get_args(hints[name])
    return Record(cls, hints, required=frozenset(required))


def _check_arguments(cls: Any, names: set[str]) -> None:
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if taken != names or len(taken) != len(parameters):
        raise Refused(
            f"the `__init__` of {name_of(cls)} takes other arguments than its fields, so what to give it is not known "
            "(an InitVar, or an `__init__` of its own). Decode into a class of plain fields and make it from that."
        )


def input_of(field: Any, hint: Any) -> Any:
    """What the JSON value of a field is decoded into before the class, and so its converter, is given it."""
    converter = getattr(field, "converter", None)
    if converter is None:
        return hint
    wanted = first_annotation(getattr(converter, "converter", converter))  # attrs.Converter wraps the function
    try:
        walk(wanted, into_records=False)
        engine(wanted)
    except Refused:
        wanted = None
    if wanted is not None:
        return wanted
    try:
        structured = not all(is_scalar(node) for node in walk(hint, into_records=False))
    except Refused:
        structured = False
    return hint if structured else Any


def first_annotation(function: Any) -> Any:
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


def name_of(annotation: Any) -> str:
    """How a message calls a type: without its module, as far as that is possible."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation.__name__
    return re.sub(r"\b(?:\w+\.)+(?:<locals>\.)*(?=\w)", "", repr(annotation))[:200]


def engine(annotation: Any) -> msgspec.json.Decoder[Any]:
    try:
        return msgspec.json.Decoder(annotation)
    except (*USER_ERRORS, NameError) as exc:
        raise Refused(f"{exc}.") from None


# Where a body does not fit


class Mismatch(Exception):  # noqa: N818
    """`detail` says what was expected and what came, at `path` below `$`; `cause` is what the class's code raised."""

    def __init__(self, detail: str, path: str = "", *, cause: Exception | None = None, malformed: bool = False) -> None:
        super().__init__(detail)
        self.detail, self.path, self.cause, self.malformed = detail, path, cause, malformed

    @classmethod
    def of(cls, exc: Exception) -> Mismatch:
        """The same, less any value of the body: msgspec quotes enum values and tags, and a class's own code may all."""
        if isinstance(exc, Mismatch):
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
