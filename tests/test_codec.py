"""Bytes to typed values and back: what `into=` and `json=` mean, and that nothing is half-honoured."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import math
import pathlib
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Protocol,
    Required,
    TypedDict,
    TypeVar,
    assert_type,
)

import attrs
import httpx
import hypothesis
import hypothesis.strategies as st
import msgspec
import pytest
from typing_extensions import ReadOnly, TypeAliasType

from layer_async import _codec
from layer_async._codec import check_into, decode, decode_bytes, encode_json
from layer_async._errors import (
    APIStatusError,
    ConfigurationError,
    NotFoundError,
    RequestInfo,
    ResponseDecodeError,
)

T = TypeVar("T")
Number = TypeVar("Number", bound=float)
SECRET = "s3cr3t-value"


def decoded(text: str | bytes, into: Any) -> Any:
    """`text` decoded, for types that a checker would rightly refuse."""
    return decode_bytes(text.encode() if isinstance(text, str) else text, into)


def refusal(into: Any) -> str:
    """What `check_into` says against `into`."""
    with pytest.raises(ConfigurationError) as caught:
        check_into(into)
    return str(caught.value)


def mismatch(text: str | bytes, into: Any) -> ResponseDecodeError:
    """The error that decoding `text` gives, which quotes no value of it."""
    with pytest.raises(ResponseDecodeError) as caught:
        decoded(text, into)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    return caught.value


# Types that msgspec decodes by itself


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@attrs.define
class Customer:
    name: str
    sites: list[Site] = attrs.Factory(list)
    parent: Customer | None = None


@attrs.frozen(kw_only=True)
class Site:
    id: int
    postcode: str = "unknown"


@dataclasses.dataclass
class Order:
    number: int
    placed: datetime.datetime
    total: decimal.Decimal
    key: uuid.UUID
    colour: Colour = Colour.RED
    kind: Literal["new", "change"] = "new"
    buyer: Customer | None = None
    currency: ClassVar[str] = "GBP"


class Quotation(TypedDict, total=False):
    id: Required[int]
    site: Site
    note: str


class Case(msgspec.Struct, rename="camel"):
    opened_by: str
    level: Level = Level.LOW


class Point(NamedTuple):
    x: int
    y: int = 0


class Bare(collections.namedtuple("Bare", "a b")):
    __slots__ = ()


@attrs.define
class Page(Generic[T]):
    items: list[T]
    total: int = 0


CustomerId = NewType("CustomerId", int)

ORDER = (
    '{"number": 1, "placed": "2024-05-01T10:00:00Z", "total": "12.50", '
    '"key": "6f1c0b7e-2f3a-4c52-9f52-0d6c1f6f2f10", "buyer": {"name": "Ann"}, "unheard of": {"a": [1]}}'
)


def test_an_attrs_class_is_decoded_with_its_nested_classes_and_unknown_fields_are_ignored() -> None:
    got = decoded('{"name": "Ann", "sites": [{"id": 7, "new": 1}], "parent": {"name": "Bo"}, "more": null}', Customer)
    assert got == Customer("Ann", [Site(id=7)], Customer("Bo"))


def test_a_dataclass_is_decoded_with_dates_decimals_uuids_enums_and_literals() -> None:
    got = decoded(ORDER, Order)
    assert got.placed == datetime.datetime(2024, 5, 1, 10, tzinfo=datetime.UTC)
    assert got.total == decimal.Decimal("12.50")
    assert got.key == uuid.UUID("6f1c0b7e-2f3a-4c52-9f52-0d6c1f6f2f10")
    assert got.colour is Colour.RED
    assert got.buyer == Customer("Ann")


@pytest.mark.parametrize(
    ("text", "into", "value"),
    [
        ('{"id": 1, "site": {"id": 2}, "note": "n", "x": 1}', Quotation, {"id": 1, "site": Site(id=2), "note": "n"}),
        ('{"openedBy": "Ann", "level": 1}', Case, Case("Ann")),
        ("[1, 2]", Point, Point(1, 2)),
        ('[1, "b"]', Bare, Bare(1, "b")),
        ('[{"id": 1}]', list[Site], [Site(id=1)]),
        ('[{"id": 1}]', Sequence[Site], [Site(id=1)]),
        ('[{"id": 1}]', tuple[Site, ...], (Site(id=1),)),
        ('[{"id": 1}]', frozenset[Site], frozenset({Site(id=1)})),
        ("[1, 1]", AbstractSet[int], {1}),
        ('{"a": {"id": 1}}', dict[str, Site], {"a": Site(id=1)}),
        ('{"1": {"id": 1}}', Mapping[int, Site], {1: Site(id=1)}),
        ('{"2024-05-01": 1}', dict[datetime.date, int], {datetime.date(2024, 5, 1): 1}),
        ("null", Site | None, None),
        ('{"id": 1}', Site | None, Site(id=1)),
        ('{"items": [{"id": 1}]}', Page[Site], Page([Site(id=1)])),
        ('{"items": [1, "a"]}', Page, Page([1, "a"])),
        ("1.5", Number, 1.5),
        ("5", CustomerId, 5),
        ("5", Annotated[int, msgspec.Meta(ge=5)], 5),
        ("5", Annotated[int, ["metadata that cannot be hashed"]], 5),
        ('"YWI="', bytes, b"ab"),
        ("1.10", decimal.Decimal, decimal.Decimal("1.10")),
        ('"PT5S"', datetime.timedelta, datetime.timedelta(seconds=5)),
        ('{"a": [1, null, 2.5]}', Any, {"a": [1, None, 2.5]}),
        ('{"a": 1}', object, {"a": 1}),
        ("[]", list, []),
        ("null", None, None),
        ("1", int | str, 1),
        ("12345678901234567890123", int, 12345678901234567890123),
    ],
)
def test_what_can_be_decoded(text: str, into: Any, value: Any) -> None:
    check_into(into)
    got = decoded(text, into)
    assert got == value
    assert type(got) is type(value)


def test_the_last_of_a_repeated_key_counts() -> None:
    assert decoded('{"id": 1, "id": 2}', Site) == Site(id=2)


def test_a_byte_order_mark_is_skipped_once() -> None:
    assert decoded(b'\xef\xbb\xbf{"id": 1}', Site) == Site(id=1)
    assert decoded(b"\xef\xbb\xbf", Site | None) is None
    mismatch(b"\xef\xbb\xbf" * 2 + b"1", int)


# A body that does not fit


@pytest.mark.parametrize(
    ("text", "into", "path", "says"),
    [
        ('[{"id": 1}, {"id": "s3cr3t-value"}]', list[Site], "$[1].id", "expected `int`, got `str`"),
        ('{"a": [{"id": true}]}', dict[str, list[Site]], "$[...][0].id", "expected `int`, got `bool`"),
        ("[]", Site, "$", "does not fit Site: expected `object`, got `array` at `$`"),
        ("[{}]", list[Site], "$[0]", "object missing required field `id`"),
        ('{"s3cr3t-value": 1}', dict[int, int], "$", "expected `int`, got `str` as a key"),
        ('["s3cr3t-value"]', list[Colour], "$[0]", "none of those that are allowed"),
        ('"s3cr3t-value"', Literal["a", "b"], "$", "none of those that are allowed"),
        ('"x` - at `$.elsewhere` s3cr3t-value"', Literal["a"], "$", "none of those that are allowed"),
        ('["s3cr3t-value"]', list[datetime.datetime], "$[0]", "invalid RFC3339"),
        ('["s3cr3t-value"]', list[decimal.Decimal], "$[0]", "invalid decimal"),
        ('["s3cr3t-value"]', list[uuid.UUID], "$[0]", "invalid UUID"),
        ('"1"', int, "$", "expected `int`, got `str`"),
        ("1.0", int, "$", "expected `int`, got `float`"),
        ("1", Annotated[int, msgspec.Meta(ge=5)], "$", "expected `int` >= 5"),
        ("[1e400]", list[float], "$[0]", "out of range"),
        ("1" * 5000, Any, "$", "out of range"),
    ],
)
def test_a_mismatch_names_its_path_and_what_was_expected_and_quotes_nothing(
    text: str, into: Any, path: str, says: str
) -> None:
    error = mismatch(text, into)
    assert error.path == path
    assert says in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cut short or malformed"),
        ("{}}", "trailing characters"),
        ("[NaN]", "invalid character"),
        ("[Infinity]", "invalid character"),
        ("<html>", "invalid character"),
        ("é".encode("latin-1"), "invalid character"),
        ('["é"]'.encode("latin-1"), "not UTF-8"),
        ("[1]".encode("utf-16"), "invalid character"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
)
def test_a_body_that_is_not_json_says_so(text: str | bytes, says: str) -> None:
    error = mismatch(text, Any)
    assert "cannot be read as JSON" in str(error)
    assert says in str(error)
    assert error.path == "$"


@pytest.mark.parametrize("empty", [b"", b" \r\n\t"])
def test_an_empty_body_is_none_only_where_the_type_admits_none(empty: bytes) -> None:
    assert decode_bytes(empty, Site | None) is None
    assert decode_bytes(empty, Any) is None
    for into in (Site, list[Site], str, Odd):
        assert "the body is empty" in str(mismatch(empty, into))
    assert "Site | None" in str(mismatch(empty, Site))


class Odd(enum.Enum):
    """Makes something of anything, of null as well: that is no admission of None."""

    ONE = 1

    @classmethod
    def _missing_(cls, value: object) -> Odd:
        return cls.ONE


@hypothesis.given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789.eE+-ntrufalsid \\', max_size=60))
def test_any_bytes_are_a_value_or_the_one_typed_error(data: bytes | str) -> None:
    for into in (Any, list[Site], Renamed):
        try:
            decoded(data, into)
        except ResponseDecodeError as error:
            assert error.path.startswith("$")  # noqa: PT017


# What a class says for itself


def positive(_: Any, attribute: Any, value: int) -> None:
    if value < 0:
        raise ValueError(f"{attribute.name} is {value} {SECRET}")


def odd(_: Any, __: Any, value: int) -> None:
    if value < 0:
        raise LookupError(SECRET)


@attrs.define
class Validated:
    x: int = attrs.field(validator=positive)
    y: int = attrs.field(default=0, validator=odd)
    doubled: int = 0

    def __attrs_post_init__(self) -> None:
        self.doubled = self.x * 2


@dataclasses.dataclass
class Checked:
    x: int

    def __post_init__(self) -> None:
        assert self.x > 0, SECRET


def test_validators_and_post_init_run() -> None:
    assert decoded('{"x": 2}', Validated).doubled == 4
    error = mismatch('[{"x": 1}, {"x": -1}]', list[Validated])
    assert error.path == "$[1]"
    assert "own code raised ValueError" in str(error)


def test_what_the_classes_own_code_raised_is_the_cause_of_the_typed_error() -> None:
    assert isinstance(mismatch('{"x": -1}', Validated).__cause__, ValueError)
    assert isinstance(mismatch('{"x": 1, "y": -1}', Validated).__cause__, LookupError)
    assert isinstance(mismatch('{"x": -1}', Checked).__cause__, AssertionError)


# What is refused before anything is sent


class Plain:
    x: int


class HasX(Protocol):
    x: int


class Text(str):
    __slots__ = ()


class Struct1(msgspec.Struct):
    a: int


class Struct2(msgspec.Struct):
    b: int


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"


@attrs.define
class Unannotated:
    x = attrs.field(default=1)  # type: ignore[var-annotated]


@dataclasses.dataclass
class WithInitVar:
    x: int
    y: dataclasses.InitVar[int] = 0


@attrs.define
class OtherArguments:
    x: int

    def __init__(self, row: str) -> None:
        self.__attrs_init__(len(row))  # type: ignore[attr-defined]


@dataclasses.dataclass
class AnyArguments:
    x: int

    def __init__(self, **values: int) -> None:
        self.x = values["x"]


class OwnNew(Point):
    def __new__(cls, x: int, y: int = 0) -> OwnNew:
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (Plain, "Plain is not a type that JSON can be decoded into. Supported are attrs classes"),
        (list[dict[str, Plain]], "Plain is not"),
        (Page[Plain], "Plain is not"),
        (HasX, "HasX is not"),
        (Text, "Text is not"),
        (pathlib.Path, "Path is not"),
        (complex, "complex is not"),
        (Callable[[int], str], "Callable is not"),
        (Iterator[int], "Iterator is not"),
        (Iterable[int], "Iterable is not"),
        (Generator[int, None, None], "Generator is not"),
        (collections.deque[int], "deque is not"),
        (collections.OrderedDict[str, int], "OrderedDict is not"),
        (ClassVar[int], "ClassVar is not"),
        (5, "5 is not"),
        ("int", "'int' is not"),
        (..., "Ellipsis is not"),
        (Required[int], "not supported"),
        (dict[Site, int], "keys that no JSON object has"),
        (Struct1 | Struct2, "must be tagged"),
        (Customer | Site, "more than one dataclass or attrs type"),
        (datetime.datetime | str, "more than one str-like type"),
        (Mixed, "either all str or all int"),
        (Unannotated, "field `x` of Unannotated has no annotation"),
        (WithInitVar, "`__init__` of WithInitVar takes other arguments"),
        (OtherArguments, "`__init__` of OtherArguments takes other arguments"),
        (AnyArguments, "`__init__` of AnyArguments takes other arguments"),
        (OwnNew, "OwnNew has its own `__new__`"),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_named(into: Any, says: str) -> None:
    text = refusal(into)
    assert text.startswith("into=")
    assert says in text
    with pytest.raises(ConfigurationError):
        decoded("{}", into)


def test_a_class_in_a_function_that_names_another_one_is_refused_with_advice() -> None:
    @attrs.define
    class Inner:
        x: int

    @attrs.define
    class Outer:
        inner: list[Inner]

    assert decoded('{"x": 1}', Inner) == Inner(1)
    text = refusal(list[Outer])
    assert "annotations of Outer cannot be resolved (name 'Inner' is not defined)" in text
    assert "top of a module" in text


def test_a_pydantic_model_is_refused_with_what_to_do_instead() -> None:
    class Model:
        """What tells a pydantic model or dataclass apart, so that the suite needs no pydantic."""

        __pydantic_validator__ = object()

    assert "model_validate_json" in refusal(list[Model])


def test_a_refused_type_is_looked_at_again_and_an_accepted_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    _codec._plans.clear()
    compiled: list[Any] = []
    compile_ = _codec._compile

    def note_and_compile(into: Any) -> Any:
        compiled.append(into)
        return compile_(into)

    monkeypatch.setattr(_codec, "_compile", note_and_compile)
    for _ in range(3):
        check_into(list[Site])
        with pytest.raises(ConfigurationError):
            check_into(Plain)
    assert compiled == [list[Site], Plain, Plain, Plain]


def test_types_made_on_the_fly_do_not_pile_up() -> None:
    for number in range(_codec.PLANS_KEPT + 10):
        check_into(Annotated[int, number])
    assert len(_codec._plans) <= _codec.PLANS_KEPT


def test_threads_may_decode_at_once() -> None:
    _codec._plans.clear()
    results: list[Any] = []

    def work() -> None:
        for _ in range(50):
            results.append(decoded('[{"y": 1}]', list[Renamed]))
            results.append(decoded('[{"id": 1}]', list[Site]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 800
    assert all(result in ([Renamed(1)], [Site(id=1)]) for result in results)


# Classes that must be called: converters, aliases and the like


def uk_date(text: str) -> datetime.date:
    return datetime.datetime.strptime(text, "%d/%m/%Y").replace(tzinfo=datetime.UTC).date()


def from_either(value: str | datetime.date) -> datetime.date:
    return uk_date(value) if isinstance(value, str) else value


def unresolvable(value: NoSuchName) -> int:  # type: ignore[name-defined]  # noqa: F821
    return int(value) + 1


def reversed_(values: Any) -> list[Any]:
    return list(values[::-1])


reversed_.__annotations__.clear()


class Pence:
    def __init__(self, pounds: decimal.Decimal) -> None:
        self.amount = int(pounds * 100)


@attrs.define
class Renamed:
    x: int = attrs.field(alias="y")


@attrs.frozen
class FrozenRenamed:
    x: int = attrs.field(alias="y")


@attrs.define
class Private:
    _id: int
    name: str = ""


FREE: Any = decimal.Decimal(0)


def times_length(value: Any, field: Any) -> int:
    return int(value * len(field.name))


def times_seven(value: Any) -> int:
    return int(value * 7)


# attrs.Converter came with attrs 24.1.
WRAPPED: Any = attrs.Converter(times_length, takes_field=True) if hasattr(attrs, "Converter") else times_seven


@attrs.define
class Converted:
    loose: int = attrs.field(default=0, converter=int)
    date: datetime.date | None = attrs.field(default=None, converter=attrs.converters.optional(uk_date))
    either: datetime.date = attrs.field(default=datetime.date(2024, 1, 1), converter=from_either)
    path: pathlib.Path = attrs.field(factory=pathlib.Path, converter=pathlib.Path)
    sites: tuple[Site, ...] = attrs.field(default=(), converter=tuple)
    ids: tuple[int, ...] = attrs.field(default=(), converter=tuple)
    price: Pence = attrs.field(default=FREE, converter=Pence)
    renamed: list[Renamed] = attrs.field(factory=list, converter=reversed_)
    more: int = attrs.field(default=0, converter=unresolvable)
    wrapped: int = attrs.field(default=0, converter=WRAPPED)  # type: ignore[misc]


@attrs.define
class Computed:
    x: int
    length: int = attrs.field(init=False, default=9)
    unset: int = attrs.field(init=False)


@attrs.define
class TakesSelf:
    x: int
    y: int = attrs.field(default=attrs.Factory(lambda self: self.x + 1, takes_self=True))


@attrs.define
class OwnInit:
    x: int

    def __init__(self, x: int) -> None:
        self.__attrs_init__(x * 100)  # type: ignore[attr-defined]


@attrs.define
class OwnSetattr:
    x: int

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value * 100)


@attrs.frozen(cache_hash=True)
class CachedHash:
    x: int


@attrs.define
class Failure(Exception):
    x: int


@dataclasses.dataclass
class Twice:
    x: int
    twice: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.twice = self.x * 2


@dataclasses.dataclass
class Holder:
    one: Renamed
    number: int = 0


class HolderDict(TypedDict):
    one: Renamed
    two: NotRequired[ReadOnly[Annotated[Renamed, "anything"]]]


class LooseDict(TypedDict, total=False):
    one: Required[Renamed]
    two: Renamed


@attrs.define
class Tree:
    n: int = attrs.field(alias="N")
    kids: list[Tree] = attrs.Factory(list)
    by_name: dict[str, Tree] = attrs.Factory(dict)
    up: Tree | None = None


@attrs.define
class RenamedPage(Generic[T]):
    items: list[T] = attrs.field(alias="Items")
    first: T | None = None
    total: int = 0


@attrs.define
class RenamedBox(Generic[T]):
    content: T = attrs.field(alias="Content")


@attrs.define
class Sites(RenamedPage[Site]):
    extra: int = 0


@attrs.define
class Shadowing(RenamedPage[int], Generic[T]):
    mine: T | None = None


RenamedAlias = TypeAliasType("RenamedAlias", list[Renamed])
RenamedId = NewType("RenamedId", Renamed)


class StructHolder(msgspec.Struct):
    one: Renamed


class TupleHolder(NamedTuple):
    one: Renamed


@attrs.define
class FieldCalledCl:
    cl: int = attrs.field(alias="class_")


@attrs.define
class Unique:
    x: int = attrs.field(alias="y", validator=positive)


@pytest.mark.parametrize(
    ("text", "into", "value"),
    [
        ('{"y": 1, "z": 2}', Renamed, Renamed(1)),
        ('{"id": 1}', Private, Private(1)),
        ('{"x": 1, "length": 5, "unset": 7}', TakesSelf, TakesSelf(1, 2)),
        ('{"x": 1}', OwnInit, OwnInit(1)),
        ('{"x": 1}', OwnSetattr, OwnSetattr(1)),
        ('{"x": 1}', CachedHash, CachedHash(1)),
        ('{"x": 1, "twice": 7}', Twice, Twice(1)),
        ('[{"y": 1}]', list[Renamed], [Renamed(1)]),
        ('[{"y": 1}]', Sequence[Renamed], [Renamed(1)]),
        ('[{"y": 1}]', tuple[Renamed, ...], (Renamed(1),)),
        ('[{"y": 1}, {"y": 1}]', set[FrozenRenamed], {FrozenRenamed(1)}),
        ('{"1": {"y": 1}}', dict[int, Renamed], {1: Renamed(1)}),
        ("null", Renamed | None, None),
        ('[null, {"y": 1}]', list[Renamed | None], [None, Renamed(1)]),
        ('{"y": 1}', Annotated[Renamed, ["not hashable"]], Renamed(1)),
        ('{"y": 1}', Final[Renamed], Renamed(1)),
        ('[{"y": 1}]', RenamedAlias, [Renamed(1)]),
        ('{"y": 1}', RenamedId, Renamed(1)),
        ('{"one": {"y": 1}, "extra": 1}', Holder, Holder(Renamed(1))),
        ('{"one": {"y": 1}, "two": {"y": 2}, "x": 1}', HolderDict, {"one": Renamed(1), "two": Renamed(2)}),
        ('{"one": {"y": 1}}', HolderDict, {"one": Renamed(1)}),
        ('{"one": {"y": 1}}', LooseDict, {"one": Renamed(1)}),
        ('{"items": [{"y": 1}]}', Page[Renamed], Page([Renamed(1)])),
        ('{"Items": [{"id": 1}], "first": {"id": 2}}', RenamedPage[Site], RenamedPage([Site(id=1)], Site(id=2))),
        ('{"Items": [1, "a"]}', RenamedPage, RenamedPage([1, "a"])),
        ('{"Items": [{"id": 1}]}', Sites, Sites([Site(id=1)])),
        ('{"Content": {"y": 1}}', RenamedBox[Renamed], RenamedBox(Renamed(1))),
        ('{"Content": 1}', RenamedBox, RenamedBox(1)),
        ('{"N": 1, "kids": [{"N": 2, "up": {"N": 3}}]}', Tree, Tree(1, [Tree(2, up=Tree(3))])),
        ('{"by_name": {"a": {"N": 4}}, "N": 1}', Tree, Tree(1, by_name={"a": Tree(4)})),
    ],
)
def test_a_class_that_must_be_called_is_called(text: str, into: Any, value: Any) -> None:
    check_into(into)
    got = decoded(text, into)
    assert got == value
    assert type(got) is type(value)


def test_a_field_that_is_no_argument_is_not_taken_from_the_answer() -> None:
    got = decoded('{"x": 1, "length": 5, "unset": 7}', Computed)
    assert got.length == 9
    assert not hasattr(got, "unset")


def test_a_hash_that_init_prepares_is_there() -> None:
    assert hash(decoded('{"x": 1}', CachedHash)) == hash(CachedHash(1))


def test_an_exception_class_is_called_as_it_keeps_its_arguments_in_new() -> None:
    assert decoded('{"x": 1}', Failure).args == (1,) == Failure(1).args


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('{"loose": "5"}', "loose", 5),
        ('{"date": "31/12/2024"}', "date", datetime.date(2024, 12, 31)),
        ('{"date": null}', "date", None),
        ('{"either": "31/12/2024"}', "either", datetime.date(2024, 12, 31)),
        ('{"path": "a/b"}', "path", pathlib.Path("a/b")),
        ('{"sites": [{"id": 1}]}', "sites", (Site(id=1),)),
        ('{"ids": [1, 2]}', "ids", (1, 2)),
        ('{"renamed": [{"y": 1}, {"y": 2}]}', "renamed", [Renamed(2), Renamed(1)]),
        ('{"more": "41"}', "more", 42),
        ('{"wrapped": 3}', "wrapped", 21),
    ],
)
def test_a_converter_is_given_what_it_asks_for(text: str, name: str, value: Any) -> None:
    assert getattr(decoded(text, Converted), name) == value


def test_a_converter_that_is_a_class_is_given_what_its_init_asks_for() -> None:
    assert decoded('{"price": "12.50"}', Converted).price.amount == 1250
    assert mismatch('{"price": []}', Converted).path == "$.price"


@pytest.mark.parametrize(
    ("text", "into", "path", "says"),
    [
        ('[{"y": 1}, {"y": "s3cr3t-value"}]', list[Renamed], "$[1].y", "expected `int`, got `str`"),
        ('{"k": {"y": "5"}}', dict[str, Renamed], "$[...].y", "expected `int`, got `str`"),
        ('{"y": true}', Renamed, "$.y", "expected `int`, got `bool`"),
        ('"s3cr3t-value"', list[Renamed], "$", "expected `array`, got `str`"),
        ("{}", list[Renamed], "$", "expected `array`, got `object`"),
        ("[[]]", list[Renamed], "$[0]", "expected `object`, got `array`"),
        ("[null]", list[Renamed], "$[0]", "expected `object`, got `null`"),
        ("[]", dict[str, Renamed], "$", "expected `object`, got `array`"),
        ('{"s3cr3t-value": {"y": 1}}', dict[int, Renamed], "$", "expected `int`, got `str` as a key"),
        ("[{}]", list[Renamed], "$[0]", "object missing required field `y`"),
        ('{"one": {}}', Holder, "$.one", "object missing required field `y`"),
        ('{"one": {"y": 1}, "number": "s3cr3t-value"}', Holder, "$.number", "expected `int`, got `str`"),
        ('{"two": {"y": 1}}', HolderDict, "$", "object missing required field `one`"),
        ('{"two": {"y": 1}}', LooseDict, "$", "object missing required field `one`"),
        ('{"one": {"y": "a"}}', HolderDict, "$.one.y", "expected `int`, got `str`"),
        ('{"Items": [{"id": "a"}]}', RenamedPage[Site], "$.Items[0].id", "expected `int`, got `str`"),
        ('{"Content": "a"}', RenamedBox[int], "$.Content", "expected `int`, got `str`"),
        ('{"Items": [{"id": "a"}]}', Sites, "$.Items[0].id", "expected `int`, got `str`"),
        ('{"N": 1, "kids": [{"N": 2}, {"N": 3, "by_name": {"a": {"N": "x"}}}]}', Tree, "$.kids[1].by_name[...].N", ""),
        ('{"sites": [{"id": 1}, {"id": "s3cr3t-value"}]}', Converted, "$.sites[1].id", "expected `int`, got `str`"),
        ('{"ids": [1, "a"]}', Converted, "$.ids[1]", "expected `int`, got `str`"),
    ],
)
def test_inside_a_called_class_types_are_as_strict_and_paths_as_exact(
    text: str, into: Any, path: str, says: str
) -> None:
    error = mismatch(text, into)
    assert error.path == path
    assert says in str(error)


def test_what_a_converter_or_validator_of_a_called_class_raises_is_the_cause() -> None:
    error = mismatch('[{"loose": "s3cr3t-value"}]', list[Converted])
    assert error.path == "$[0]"
    assert isinstance(error.__cause__, ValueError)
    assert isinstance(mismatch('{"y": -1}', Unique).__cause__, ValueError)
    assert isinstance(mismatch('{"N": 1}', WithLookup).__cause__, KeyError)
    assert isinstance(mismatch('{"one": {"x": 1, "y": -1}, "two": {"y": 1}}', Nested).__cause__, LookupError)


LOOKED_UP = {"a": 1}


@attrs.define
class WithLookup:
    n: int = attrs.field(alias="N", converter=LOOKED_UP.__getitem__)  # type: ignore[misc]


@attrs.define
class Nested:
    one: Validated
    two: Renamed


def test_nesting_deeper_than_the_interpreter_goes_is_a_typed_error() -> None:
    depth = 900
    error = mismatch('{"N": 1, "up":' * depth + "null" + "}" * depth, Tree)
    assert "nested too deeply" in str(error)
    assert error.path == "$"


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (StructHolder, "StructHolder holds Renamed, which is made by calling it"),
        (TupleHolder, "TupleHolder holds Renamed"),
        (tuple[Renamed, int], "tuple[Renamed, int] holds Renamed"),
        (Renamed | Private, "a union of Renamed and Private"),
        (Renamed | int | None, "a union of Renamed and int"),
        (Annotated[list[Renamed], msgspec.Meta(min_length=1)], "a constraint (msgspec.Meta) on list[Renamed]"),
        (FieldCalledCl, "a field of it is called `cl` or `converter`"),
        (Shadowing[str], "a type variable of Shadowing means something else in its base RenamedPage"),
        (list[Renamed | Customer | Struct1], "a union of"),
        (RenamedPage[Mixed], "either all str or all int"),
    ],
)
def test_where_a_called_class_cannot_stand_it_is_refused(into: Any, says: str) -> None:
    assert says in refusal(into)


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (Renamed, "Renamed is made by calling it, since its field `x` has the alias `y`"),
        (dict[str, list[Holder | None]], "Renamed is made by calling it"),
        (Page[Renamed], "Renamed is made by calling it"),
        (StructHolder, "Renamed is made by calling it"),
        (Private, "field `_id` has the alias `id` (attrs drops leading underscores by itself)"),
        (Converted, "field `loose` has a converter"),
        (Computed, "field `length` is no argument of `__init__`"),
        (Twice, "field `twice` is no argument of `__init__`"),
        (TakesSelf, "default of its field `y` is made from the instance"),
        (OwnInit, "it has its own `__init__`"),
        (OwnSetattr, "it has its own `__setattr__`"),
        (Failure, "it has its own `__new__`"),
        (CachedHash, "it caches its hash"),
    ],
)
def test_without_the_extra_it_is_refused_and_named(into: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _codec._plans.clear()
    monkeypatch.setitem(sys.modules, "cattrs", None)
    text = refusal(into)
    assert says in text
    assert "pip install 'layer-async[cattrs]'" in text
    check_into(list[Customer])
    check_into(Validated)


# decode(response)


def response(body: bytes = b'{"id": 1}', *, method: str = "GET", status: int = 200, media: str = "") -> httpx.Response:
    request = httpx.Request(method, "https://webapi.thelayer.com/api/sites?key=s3cr3t-value")
    return httpx.Response(status, content=body, request=request, headers={"Content-Type": media} if media else {})


def test_decode_gives_the_typed_value_of_a_response() -> None:
    assert decode(response(), Site) == Site(id=1)
    assert decode(httpx.Response(204), Site | None) is None


def test_a_decode_error_names_the_request_and_whether_it_may_have_been_processed() -> None:
    with pytest.raises(ResponseDecodeError) as caught:
        decode(response(b'{"id": "a"}'), Site)
    assert caught.value.request == RequestInfo("GET", "https://webapi.thelayer.com/api/sites")
    assert not caught.value.maybe_processed
    with pytest.raises(ResponseDecodeError, match="may have processed") as caught:
        decode(response(b"", method="POST", status=201), Site)
    assert caught.value.maybe_processed


def test_a_response_that_was_made_by_hand_has_no_request_to_name() -> None:
    with pytest.raises(ResponseDecodeError) as caught:
        decode(httpx.Response(200, content=b"["), Site)
    assert caught.value.request is None
    assert not caught.value.maybe_processed


def test_a_page_in_place_of_json_is_called_what_it_is() -> None:
    with pytest.raises(ResponseDecodeError, match=r"invalid character.*The server calls it text/html\."):
        decode(response(b"<html>", media="Text/HTML; charset=utf-8"), Site)
    with pytest.raises(ResponseDecodeError) as caught:
        decode(response(b"<html>", media=SECRET), Site)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("status", "error"), [(404, NotFoundError), (302, APIStatusError), (304, APIStatusError)])
def test_the_body_of_an_answer_that_is_no_success_is_never_taken_for_the_value(
    status: int, error: type[APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        decode(response(b'{"id": 1}', status=status), Site)
    assert caught.value.status_code == status
    assert caught.value.request == RequestInfo("GET", "https://webapi.thelayer.com/api/sites")


def infer(answer: httpx.Response) -> None:
    """Read by mypy and pyright, and never run: what they infer for `into`, without a flag or plugin."""
    assert_type(decode(answer, Customer), Customer)
    assert_type(decode(answer, Quotation), Quotation)
    assert_type(decode(answer, list[Customer]), list[Customer])
    assert_type(decode(answer, dict[str, Customer]), dict[str, Customer])
    assert_type(decode(answer, Mapping[str, Customer]), Mapping[str, Customer])
    assert_type(decode(answer, Customer | None), Customer | None)
    assert_type(decode(answer, list[Customer | None]), list[Customer | None])
    assert_type(decode(answer, Page[Customer]), Page[Customer])
    assert_type(decode(answer, Literal["a", "b"]), Literal["a", "b"])
    assert_type(decode(answer, Any), Any)
    assert_type(decode_bytes(b"", list[Customer]), list[Customer])
    decode(answer, 5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# Values to JSON


class Shout(str):
    __slots__ = ()


class Count(int):
    pass


class Ratio(float):
    pass


class Nothing(enum.Enum):
    NAN = math.nan


@dataclasses.dataclass
class PrivateData:
    _id: int
    later: int = dataclasses.field(init=False)


class Envelope(msgspec.Struct, rename="camel", omit_defaults=True, frozen=True):
    the_one: Any
    left_out: int = 0


@attrs.define(slots=False)
class Loose:
    x: int


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, None, True, "é"]}, '{"a":[1,2.5,null,true,"é"]}'),
        (Customer("Ann", [Site(id=1)]), '{"name":"Ann","sites":[{"id":1,"postcode":"unknown"}],"parent":null}'),
        ([Renamed(1), Private(2)], '[{"y":1},{"id":2,"name":""}]'),
        (Holder(Renamed(1)), '{"one":{"y":1},"number":0}'),
        (PrivateData(1), '{"_id":1}'),
        (Computed(1), '{"x":1,"length":9}'),
        (Envelope(Renamed(1)), '{"theOne":{"y":1}}'),
        (Envelope([{"a": Renamed(1)}], left_out=2), '{"theOne":[{"a":{"y":1}}],"leftOut":2}'),
        ({"d": datetime.date(2024, 5, 1), "u": uuid.UUID(int=1)}, None),
        (decimal.Decimal("1.10"), '"1.10"'),
        (b"ab", '"YWI="'),
        (Colour.RED, '"red"'),
        ({Colour.RED: Level.LOW}, '{"red":1}'),
        ({1: "a", 2.5: "b"}, '{"1":"a","2.5":"b"}'),
        ({datetime.date(2024, 5, 1): 1}, '{"2024-05-01":1}'),
        ((1, {2}, frozenset({3}), Point(1, 2)), "[1,[2],[3],[1,2]]"),
        (collections.defaultdict(list, {Shout("a"): [Shout("b")]}), '{"a":["b"]}'),
        (collections.OrderedDict(a=Count(1), b=Ratio(1.5)), '{"a":1,"b":1.5}'),
        (10**30, "1" + "0" * 30),
        (-(10**30), "-1" + "0" * 30),
        (msgspec.Raw(b'{"a": 1}'), '{"a": 1}'),
    ],
)
def test_what_can_be_encoded(value: Any, text: str | None) -> None:
    encoded = encode_json(value)
    assert text is None or encoded == text.encode()
    assert msgspec.json.decode(encoded) is not msgspec.UNSET


def test_what_was_decoded_is_encoded_alike() -> None:
    for text, into in (('[{"y":1}]', list[Renamed]), ('{"id":1,"name":"n"}', Private), ('{"one":{"y":1}}', HolderDict)):
        assert encode_json(decoded(text, into)) == text.encode()


def test_encoding_changes_nothing_in_the_value() -> None:
    envelope = Envelope([Renamed(1)])
    encode_json(envelope)
    assert envelope.the_one == [Renamed(1)]


def test_only_the_fields_of_a_class_are_encoded() -> None:
    loose = Loose(1)
    loose.note = SECRET  # type: ignore[attr-defined]
    assert encode_json(loose) == b'{"x":1}'


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "no NaN and no infinity, and a float in it is one"),
        ({"a": [-math.inf]}, "a float in it is one"),
        ({math.nan: 1}, "a float in it is one"),
        ([Ratio("nan")], "a Ratio in it is one"),
        (Site(id=math.inf), "a float in it is one"),  # type: ignore[arg-type]
        (Envelope([math.nan]), "a float in it is one"),
        (Nothing.NAN, "a float in it is one"),
        (decimal.Decimal("NaN"), "a Decimal in it is one"),
        (decimal.Decimal("Infinity"), "a Decimal in it is one"),
        (Plain(), "type Plain is unsupported"),
        (Site, "type"),
        (object(), "type object is unsupported"),
        (1j, "type complex is unsupported"),
        ((x for x in [1]), "type generator is unsupported"),
        ({(1, 2): SECRET}, "Only dicts with str-like or number-like keys"),
        ({None: SECRET}, "Only dicts with str-like or number-like keys"),
        (f"{SECRET}\ud800", "half a surrogate pair"),
        ({f"{SECRET}\ud800": 1}, "half a surrogate pair"),
        ([10**5000], "Exceeds the limit"),
        (endless(), "nested too deeply, or contains itself"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_quoted_nowhere(value: Any, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        encode_json(value)
    assert str(caught.value).startswith("json= cannot be encoded: ")
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None


# Parts of a body


def test_parts_of_a_body_are_found_without_reading_the_rest() -> None:
    body = b'{"a": {"b": [1, {"c": 2}], "d.e": null}, "f": "g", "a.b": 3}'
    paths = [("a", "b"), ("a", "d.e"), ("f",), ("a.b",), ("a",), ("x",), ("a", "x", "y"), ("f", "x"), ()]
    found = _codec.find_texts(body, paths)
    assert found == [b'[1, {"c": 2}]', b"null", b'"g"', b"3", b'{"b": [1, {"c": 2}], "d.e": null}', *[None] * 3, body]
    assert _codec.find_texts(_codec.BOM + b'{"a": 1}', [("a",)]) == [b"1"]
    assert _codec.find_texts(b"[1]", [("a",)]) == [None]
    assert _codec.find_texts(b'{"a": 1, "a": 2}', [("a",)]) == [b"2"]


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": tru}', b'{"a": 1} x', b'{"\xff": 1}', b'{"a": ' + b"[" * 100_000])
def test_no_part_is_found_in_what_is_not_json(body: bytes) -> None:
    with pytest.raises(ResponseDecodeError, match="cannot be read as JSON"):
        _codec.find_texts(body, [("a", "b")])


def test_a_part_says_where_in_the_body_it_stood() -> None:
    with pytest.raises(ResponseDecodeError, match=r"at `\$\.a\[1\]`") as raised:
        _codec.decode_bytes(b'[1, "2"]', list[int], at=".a")
    assert raised.value.path == "$.a[1]"
    with pytest.raises(ResponseDecodeError) as raised:
        _codec.decode_bytes(_codec.BOM + b'["2"]', list[int], at=".a")
    assert raised.value.path == "$.a[0]"


def test_plain_values_are_decoded_by_way_of_their_text() -> None:
    assert _codec.decode_again([{"id": 1}], list[dict[str, int]]) == [{"id": 1}]
    for value in (object(), {1: object()}, "\ud800"):
        with pytest.raises(ConfigurationError, match="not plain JSON"):
            _codec.decode_again([value], list[Any])
