"""Classes that must be called to be made: cattrs calls them, msgspec still decodes everything in them.

Rules: a class is decoded as a call of it would make it, or refused, never half. Types are never coerced. cattrs is an
extra: without it such classes are refused, and named.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import msgspec
import typing_extensions

from ._shapes import (
    BUILDERS,
    MAPPINGS,
    QUALIFIERS,
    UNIONS,
    USER_ERRORS,
    Decoder,
    Hook,
    Mismatch,
    Record,
    Refused,
    engine,
    fields_of,
    is_type_alias,
    name_of,
    record_of,
    walk,
)


def compile_called(into: Any, first: Record) -> Decoder:
    try:
        import cattrs
    except ImportError:
        raise Refused(
            f"{name_of(first.cls)} is made by calling it, since {first.why_called}. Install the extra: "
            "pip install 'layer-async[cattrs]' (in a checkout: pip install '.[cattrs]'). Or decode into a class "
            "without."
        ) from None
    hook = _Forge(cattrs.Converter(detailed_validation=True)).hook(into)
    parse = msgspec.json.Decoder().decode

    def plan(data: bytes) -> Any:
        return hook(parse(data))

    return plan


def is_called(node: Any) -> bool:
    record = record_of(node)
    return record is not None and record.why_called is not None


class _Forge:
    """Makes the functions that turn plain JSON values into what is asked for, one a type; they raise `Mismatch`.

    cattrs would coerce ("5" to 5, any iterable to a list), so it makes the classes only, and not what is in them.
    """

    def __init__(self, converter: Any) -> None:
        self.converter = converter
        self.hooks: dict[Any, Hook] = {}

    def is_native(self, annotation: Any) -> bool:
        """Whether msgspec alone can decode it, since no class in it must be called."""
        return not any(is_called(node) for node in walk(annotation))

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
                raise Refused(f"a constraint (msgspec.Meta) on {name_of(arguments[0])}, which holds a called class.")
            return self.hook(arguments[0])
        if origin in QUALIFIERS:
            return self.hook(arguments[0])
        if origin in UNIONS:
            return self.optional([member for member in arguments if member is not type(None)])
        if isinstance(annotation, typing.NewType):
            return self.hook(annotation.__supertype__)
        if is_type_alias(annotation):
            return self.hook(annotation.__value__)
        if cls in BUILDERS and (cls is not tuple or arguments[1:] == (...,)):
            return self.array(arguments[0], BUILDERS[cls])
        if cls in MAPPINGS:
            return self.object(*arguments)
        record = record_of(cls)
        if record is not None and typing_extensions.is_typeddict(typing.cast(Any, cls)):
            return self.typed_dict(record, arguments)
        if record is not None and (attrs.has(cls) or dataclasses.is_dataclass(cls)):
            return self.record(record, arguments)
        inside = next(node for node in walk(annotation) if is_called(node))
        raise Refused(
            f"{name_of(annotation)} holds {name_of(inside)}, which is made by calling it. Such a class may stand in "
            "attrs classes, dataclasses, TypedDicts, lists, sets, tuples of one type, values of dicts, and unions with "
            "None."
        )

    def native(self, annotation: Any) -> Hook:
        """Everything that msgspec decodes by itself, exactly as strict as it is alone."""
        engine(annotation)

        def structure(value: Any) -> Any:
            try:
                return msgspec.convert(value, annotation, str_keys=True)
            except (msgspec.MsgspecError, *USER_ERRORS) as exc:
                mismatch = Mismatch.of(exc)
            raise mismatch

        return structure

    def optional(self, members: list[Any]) -> Hook:
        """A union with None; others would have to guess which class a JSON object is."""
        if len(members) != 1:
            raise Refused(f"a union of {' and '.join(name_of(m) for m in members)}: which one JSON means is not known.")
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
            except Mismatch as exc:
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
            except Mismatch as exc:
                exc.path = f"[...]{exc.path}"
                raise

        return structure

    def typed_dict(self, record: Record, arguments: tuple[Any, ...]) -> Hook:
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
                    except Mismatch as exc:
                        exc.path = f".{name}{exc.path}"
                        raise
                elif name in record.required:
                    raise Mismatch(f"object missing required field `{name}`")
            return result

        return structure

    def record(self, record: Record, arguments: tuple[Any, ...]) -> Hook:
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
            raise Refused(f"cattrs cannot make {name_of(cls)}: a field of it is called `cl` or `converter`.") from None
        keys = {field.name: getattr(field, "alias", field.name) for field in fields_of(cls)}

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
                raise Refused(f"a type variable of {name_of(cls)} means something else in its base {name_of(origin)}.")
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
        raise Mismatch(f"expected `{names[kind.__name__]}`, got `{names.get(came, came)}`")


def _first_of(exc: Exception, keys: dict[str, str]) -> Mismatch:
    """The first thing that cattrs met in a class: at a field, which its note names, or in the call of the class."""
    notes = [note for note in getattr(exc, "__notes__", ()) if hasattr(note, "name")]
    inner = Mismatch.of(exc)
    if not notes:
        return inner
    key = keys[notes[-1].name]  # the last one is of this class, those before it are of classes inside
    if isinstance(exc, KeyError):  # from looking the field up: what decodes its value raises nothing but Mismatch
        return Mismatch(f"object missing required field `{key}`")
    inner.path = f".{key}{inner.path}"
    return inner
