"""A local stand-in for the API, since its vendor offers no public one: illustrative, never a description of it.

Only the two headers `Token1` and `Token2` are the real API's. Its endpoints, schemas, status codes and quotas are not
public: every path, field and limit here is made up, so that there is something to try a client on.

Rules: imports none of ours. A document is a pure function of (seed, collection, id); only changes are kept. A fault is
a pure function of (seed, request, how often that request came), so a run does not depend on the order of concurrent
requests. Tokens and the control key are in no error, record, repr or command line; `GET /_sandbox/tokens` alone tells.
"""

from __future__ import annotations

import asyncio
import base64
import bisect
import contextlib
import datetime
import functools
import hashlib
import hmac
import http.client
import itertools
import math
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, cast

import anyio
import attrs
import httpx
import msgspec

try:
    import uvicorn
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send
except ImportError as _missing:
    raise ImportError(
        "the sandbox needs starlette and uvicorn: "
        "pip install 'layer-async[sandbox]' (in a checkout: pip install '.[sandbox]')"
    ) from _missing

__all__ = [
    "COLLECTIONS",
    "FAULT_KINDS",
    "PAGING_KINDS",
    "Faults",
    "Quota",
    "Record",
    "Sandbox",
    "SandboxProcess",
    "SandboxServer",
    "digest",
    "document",
    "run",
    "serve",
    "spawn",
]

T = TypeVar("T")
Document = dict[str, Any]

NOTE = (
    "A local stand-in for The Layer's web API, for trying clients on. Illustrative: the real list of endpoints is not "
    "public, and the paths, fields and limits here are made up."
)
FORBIDDEN = "invoices"  # a resource whose level no pair of the sandbox has
BODY_LIMIT = 2**20
PAGE_LIMIT = 200
PAGING_KINDS = ("steady", "shifting", "repeating", "circular")
DRIPS = 8

# --- the data: invented firms; telephone numbers from the ranges that Ofcom keeps free for fiction -------------------

TOWNS = (
    ("Leeds", "LS", "0113 496 0"),
    ("Sheffield", "S", "0114 496 0"),
    ("Nottingham", "NG", "0115 496 0"),
    ("Leicester", "LE", "0116 496 0"),
    ("Bristol", "BS", "0117 496 0"),
    ("Birmingham", "B", "0121 496 0"),
    ("Edinburgh", "EH", "0131 496 0"),
    ("Glasgow", "G", "0141 496 0"),
    ("Liverpool", "L", "0151 496 0"),
    ("Manchester", "M", "0161 496 0"),
    ("Newcastle", "NE", "0191 498 0"),
    ("London", "E", "020 7946 0"),
    ("Cardiff", "CF", "029 2018 0"),
)
FIRM_FIRST = ("Amber", "Beacon", "Calder", "Dale", "Ember", "Fenwick", "Granby", "Kestrel", "Larch", "Pennine")
FIRM_SECOND = ("Bakery", "Dental", "Fabrications", "Freight", "Interiors", "Joinery", "Legal", "Motors", "Optics")
FIRM_LAST = ("Ltd", "LLP", "Group", "Partners", "plc")
FIRST_NAMES = ("Aisha", "Bronwen", "Callum", "Deepa", "Ewan", "Farah", "Gareth", "Hannah", "Imran", "Joan", "Zoë")
LAST_NAMES = ("Ahmed", "Bell", "Clarke", "Davies", "Evans", "Fraser", "Green", "Hughes", "Iqbal", "Jones", "O'Neill")
STREETS = ("Albion Street", "Canal Road", "Foundry Lane", "High Street", "Mill Lane", "Victoria Road")
PRODUCTS = (
    ("FTTP 160/30 broadband", 3499, 0),
    ("SoGEA 80/20 broadband", 2650, 4900),
    ("Leased line 1 Gb/s", 28900, 150000),
    ("Hosted voice seat", 1199, 999),
    ("SIP trunk channel", 450, 0),
    ("Mobile SIM, 50 GB", 1399, 0),
    ("Managed router", 899, 12500),
)
SUBJECTS = ("No dial tone", "Slow broadband", "Number port query", "Handset offline", "Billing query", "Site move")


class _Draw:
    """Choices drawn one after another from a single hash of what they are for."""

    def __init__(self, *what: object) -> None:
        text = "\0".join(map(str, what)).encode()
        self._rest = int.from_bytes(hashlib.blake2b(text, digest_size=64).digest(), "big")

    def below(self, bound: int) -> int:
        self._rest, value = divmod(self._rest, bound)
        return value

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def fraction(self) -> float:
        return self.below(2**53) / 2**53

    def day(self) -> str:
        return (datetime.date(2019, 1, 1) + datetime.timedelta(days=self.below(2400))).isoformat()


def _place(draw: _Draw) -> tuple[Document, str]:
    town, area, dialling = draw.pick(TOWNS)
    letters = "ABDEFGHJLNPQRSTUWXYZ"
    postcode = f"{area}{1 + draw.below(20)} {draw.below(10)}{draw.pick(letters)}{draw.pick(letters)}"
    address = {"line1": f"{1 + draw.below(250)} {draw.pick(STREETS)}", "town": town, "postcode": postcode}
    return address, f"{dialling}{draw.below(1000):03}"


def _lines(draw: _Draw) -> tuple[list[Document], int]:
    lines: list[Document] = []
    for _ in range(1 + draw.below(4)):
        product, monthly, setup = draw.pick(PRODUCTS)
        quantity = 1 + draw.below(25)
        lines.append({"product": product, "quantity": quantity, "monthly_pence": monthly, "setup_pence": setup})
    return lines, sum(line["quantity"] * line["monthly_pence"] for line in lines)


def _customer(draw: _Draw, number: int) -> Document:
    address, phone = _place(draw)
    first, second = draw.pick(FIRM_FIRST), draw.pick(FIRM_SECOND)
    return {
        "name": f"{first} {second} {draw.pick(FIRM_LAST)}",
        "status": draw.pick(("active", "active", "active", "prospect", "closed")),
        "account_manager": f"{draw.pick(FIRST_NAMES)} {draw.pick(LAST_NAMES)}",
        "email": f"office{number}@{first}-{second}.example".lower(),
        "phone": phone,
        "billing_address": address,
        "credit_limit_pence": 10_000 * draw.below(500),
        "customer_since": draw.day(),
    }


def _site(draw: _Draw, number: int) -> Document:
    address, phone = _place(draw)
    return {
        "customer_id": 1 + draw.below(number),
        "name": f"{address['town']} {draw.pick(('head office', 'branch', 'depot', 'warehouse', 'showroom'))}",
        "address": address,
        "phone": phone,
        "access": draw.pick(("FTTP", "FTTC", "SoGEA", "leased line", "4G")),
        "installed_on": draw.day(),
    }


def _contact(draw: _Draw, number: int) -> Document:
    first, last = draw.pick(FIRST_NAMES), draw.pick(LAST_NAMES)
    return {
        "customer_id": 1 + draw.below(number),
        "first_name": first,
        "last_name": last,
        "role": draw.pick(("director", "office manager", "IT manager", "accounts", "facilities")),
        "email": f"contact{number}@firm{draw.below(10_000)}.example",
        "mobile": f"07700 900{draw.below(1000):03}",
        "may_be_called": bool(draw.below(2)),
    }


def _quotation(draw: _Draw, number: int) -> Document:
    lines, total = _lines(draw)
    return {
        "customer_id": 1 + draw.below(number),
        "contact_id": 1 + draw.below(number),
        "status": draw.pick(("draft", "sent", "accepted", "declined", "lapsed")),
        "valid_until": draw.day(),
        "lines": lines,
        "total_monthly_pence": total,
    }


def _order(draw: _Draw, number: int) -> Document:
    lines, total = _lines(draw)
    return {
        "customer_id": 1 + draw.below(number),
        "site_id": 1 + draw.below(number),
        "quotation_id": 1 + draw.below(number),
        "status": draw.pick(("placed", "surveying", "committed", "delayed", "live", "cancelled")),
        "required_by": draw.day(),
        "lines": lines,
        "total_monthly_pence": total,
    }


def _case(draw: _Draw, number: int) -> Document:
    return {
        "customer_id": 1 + draw.below(number),
        "site_id": 1 + draw.below(number),
        "contact_id": 1 + draw.below(number),
        "subject": draw.pick(SUBJECTS),
        "priority": draw.pick(("low", "normal", "normal", "high", "urgent")),
        "status": draw.pick(("open", "with supplier", "with customer", "closed")),
        "opened_on": draw.day(),
        "owner": None if draw.below(4) == 0 else f"{draw.pick(FIRST_NAMES)} {draw.pick(LAST_NAMES)}",
    }


_MAKERS: dict[str, tuple[str, Callable[[_Draw, int], Document]]] = {
    "customers": ("CUS", _customer),
    "sites": ("SIT", _site),
    "contacts": ("CON", _contact),
    "quotations": ("QUO", _quotation),
    "orders": ("ORD", _order),
    "cases": ("CAS", _case),
}

COLLECTIONS: tuple[str, ...] = tuple(_MAKERS)


def document(collection: str, number: int, *, seed: int = 1) -> Document:
    """The document with id `number` (from 1) of `collection`, as a sandbox with this `seed` first serves it.

    Pure: the same arguments give an equal, new dict, in any process. Documents that it refers to (`customer_id` and the
    like) have ids of at most `number`, so they exist wherever it does. Raises KeyError for an unknown collection.
    """
    prefix, make = _MAKERS[collection]
    return {"id": number, "reference": f"{prefix}-{number:06}", **make(_Draw(seed, collection, number), number)}


def digest(documents: Iterable[Mapping[str, Any]]) -> str:
    """A sum over documents, as 16 hexadecimal digits, that depends on their content and not on their order.

    `Record.served_digest` is the same sum over every document that a sandbox has served, each taken once: equal texts
    mean that exactly those documents arrived, unchanged.
    """
    return f"{sum(map(_digest, documents)) % 2**64:016x}"


def _digest(document: Mapping[str, Any]) -> int:
    text = msgspec.json.encode(document, order="sorted")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class _Collection:
    """Documents 1 to `last`, made on demand; what was changed or deleted (None) lies over them."""

    def __init__(self, name: str, *, seed: int, size: int) -> None:
        self.name = name
        self.last = size
        self._make = functools.partial(document, name, seed=seed)
        self._changed: dict[int, Document | None] = {}
        self._deleted: list[int] = []

    def __len__(self) -> int:
        return self.last - len(self._deleted)

    def get(self, number: int) -> Document | None:
        if number in self._changed:
            return self._changed[number]
        return self._make(number) if 1 <= number <= self.last else None

    def create(self, fields: Document) -> Document:
        self.last += 1
        return self.put(self.last, fields)

    def put(self, number: int, fields: Document) -> Document:
        self._changed[number] = written = {**fields, "id": number}
        return written

    def delete(self, number: int) -> None:
        self._changed[number] = None
        bisect.insort(self._deleted, number)

    def after(self, number: int, count: int) -> list[Document]:
        """The first `count` documents with an id above `number`."""
        living = (self.get(candidate) for candidate in range(number + 1, self.last + 1))
        return list(itertools.islice((each for each in living if each is not None), count))

    def skip(self, count: int) -> int:
        """The id after which to go on when `count` documents have been passed."""
        number = count
        for gone in self._deleted:
            if gone > number:
                break
            number += 1
        return number


# --- quota, faults, record ------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Quota:
    """How many requests a second the sandbox serves; those above it get 429 with `Retry-After` in whole seconds.

    `rate` is requests a second. Without `window` a token bucket that holds `burst` requests (default: one second's
    worth); with `window` (seconds) a fixed window of `rate * window` requests. `headers` adds `X-RateLimit-Limit`,
    `-Remaining` and `-Reset` (whole seconds). `drop` is from when to when, in seconds since the first request, there
    is only a third of it. `retry_after=False` leaves that header out. Raises ValueError for anything that is not above
    zero, and for a `drop` that does not end after it began.
    """

    rate: float
    burst: int | None = None
    window: float | None = None
    headers: bool = False
    drop: tuple[float, float] | None = None
    retry_after: bool = True

    def __attrs_post_init__(self) -> None:
        for name in ("rate", "burst", "window"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0")
        if self.drop is not None and not 0 <= self.drop[0] < self.drop[1]:
            raise ValueError("drop must be two numbers of seconds, the second one above the first")

    @property
    def capacity(self) -> int:
        """How many requests may come at once."""
        if self.window is not None:
            return max(1, int(self.rate * self.window))
        return self.burst or max(1, int(self.rate))


class _Meter:
    """What is left of a quota at a time."""

    def __init__(self, quota: Quota, now: float) -> None:
        self.quota = quota
        self._left = float(quota.capacity)
        self._then = now
        self._first: float | None = None

    def take(self, now: float) -> float:
        """Use one request up; the seconds to wait when there is none, else 0."""
        if self._first is None:
            self._first = now
        self._refill(now)
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return self._reset(now)

    def headers(self, now: float) -> dict[str, str]:
        if not self.quota.headers:
            return {}
        return {
            "X-RateLimit-Limit": str(self.quota.capacity),
            "X-RateLimit-Remaining": str(int(self._left)),
            "X-RateLimit-Reset": str(math.ceil(self._reset(now))),
        }

    def _refill(self, now: float) -> None:
        window = self.quota.window
        if window is None:
            self._left = min(self.quota.capacity, self._left + (now - self._then) * self._rate(now))
            self._then = now
        elif now - self._then >= window:
            self._then += (now - self._then) // window * window
            self._left = float(max(1, int(self._rate(self._then) * window)))

    def _rate(self, now: float) -> float:
        drop, first = self.quota.drop, self._first
        is_low = drop is not None and first is not None and drop[0] <= now - first < drop[1]
        return self.quota.rate / 3 if is_low else self.quota.rate

    def _reset(self, now: float) -> float:
        if self.quota.window is not None:
            return self._then + self.quota.window - now
        return max(0.0, 1 - self._left) / self._rate(now)


@attrs.frozen(kw_only=True)
class Faults:
    """What goes wrong, each as a probability from 0 to 1 of a request; together at most 1, at most one a request.

    `unavailable`: 503. `overloaded`: 503 with `Retry-After: retry_after` (seconds). `internal_error`: 500. `expired`:
    the pair lapses (as by `Sandbox.rotate`) and the request is refused with 401. `latency`: the answer begins `delay`
    seconds late. `slow_body`: its body comes in 8 pieces over `delay` seconds. `cut_body`: the connection closes in the
    middle of the body, after the request was executed; in process, `httpx.RemoteProtocolError` is raised. The 5xx and
    `expired` come before the request is executed. `at_most` is how often one request (method and target) can meet a
    fault before it is spared for good; None: always. Raises ValueError for what is out of range.
    """

    unavailable: float = 0.0
    overloaded: float = 0.0
    internal_error: float = 0.0
    expired: float = 0.0
    latency: float = 0.0
    slow_body: float = 0.0
    cut_body: float = 0.0
    retry_after: int = 1
    delay: float = 0.05
    at_most: int | None = 2

    def __attrs_post_init__(self) -> None:
        odds = [getattr(self, kind) for kind in FAULT_KINDS]
        if any(not 0 <= each <= 1 for each in odds) or sum(odds) > 1 + 1e-9:
            raise ValueError("the probabilities of faults must lie between 0 and 1, and so must their sum")
        if self.retry_after < 1 or not 0 <= self.delay < math.inf or (self.at_most is not None and self.at_most < 0):
            raise ValueError("retry_after must be at least 1, delay and at_most at least 0")

    @classmethod
    def spread(cls, rate: float, **others: Any) -> Faults:
        """Faults at `rate` (0.02 is 2 % of requests) in all, spread evenly over every kind but `expired`."""
        kinds = [kind for kind in FAULT_KINDS if kind != "expired"]
        odds: dict[str, Any] = dict.fromkeys(kinds, rate / len(kinds))
        return cls(**odds, **others)

    def draw(self, seed: int, target: str, number: int) -> str | None:
        """The kind of fault that request `target` meets when it comes for the time `number` (from 1), or None."""
        left = _Draw(seed, "fault", target, number).fraction()
        for kind in FAULT_KINDS:
            left -= getattr(self, kind)
            if left < 0:
                return kind
        return None


FAULT_KINDS = ("unavailable", "overloaded", "internal_error", "expired", "latency", "slow_body", "cut_body")


@attrs.define(eq=False)
class Record:
    """What a sandbox has seen and done. Requests outside `/api/` are not counted.

    `requests`, `admitted` (those within the quota, or all that came to it), `statuses` (by status), `paths` (by method
    and path, as "GET /api/sites/7"). `generations`: requests by the generation of the pair that they bore (a pair once
    valid counts here also when it is refused by now); `mixed`:
    tokens of two different pairs; `missing`: one or both tokens absent; `unknown`: never valid, or sent twice.
    `rotations`. `posts`: POSTs executed, `executions`: the same by the `request_key` of their bodies. `faults`: by
    kind. `served`: for each collection an array of how often the document with that id was sent whole, in a page or
    by itself. `in_flight` now, and `max_concurrency` so far. `seed` is what data and faults were drawn from.
    """

    seed: int
    requests: int = 0
    admitted: int = 0
    statuses: Counter[int] = attrs.field(factory=Counter[int])
    paths: Counter[str] = attrs.field(factory=Counter[str])
    generations: Counter[int] = attrs.field(factory=Counter[int])
    mixed: int = 0
    missing: int = 0
    unknown: int = 0
    rotations: int = 0
    posts: int = 0
    executions: Counter[str] = attrs.field(factory=Counter[str])
    faults: Counter[str] = attrs.field(factory=Counter[str])
    served: dict[str, array[int]] = attrs.field(factory=dict[str, "array[int]"], repr=False)
    in_flight: int = 0
    max_concurrency: int = 0
    _digest: int = 0

    @property
    def executed_twice(self) -> list[str]:
        """The `request_key`s of POSTs that were executed more than once."""
        return [key for key, times in self.executions.items() if times > 1]

    @property
    def rate_limited(self) -> int:
        """How many requests were answered 429."""
        return self.statuses[429]

    @property
    def served_digest(self) -> str:
        """`digest` of every document served, each taken once, as it was when it was first served."""
        return f"{self._digest % 2**64:016x}"

    def note_served(self, collection: str, document: Document) -> None:
        """Count a document that went out whole."""
        counts, number = self.served.setdefault(collection, array("I")), document["id"]
        if number >= len(counts):
            counts.extend(itertools.repeat(0, number + 1 - len(counts)))
        if not counts[number]:
            self._digest += _digest(document)
        counts[number] += 1

    def summary(self) -> dict[str, Any]:
        """The record as JSON can hold it. `served` is summed up: `documents` (different ones) and `times` of each."""
        fields = [f.name for f in attrs.fields(Record) if f.name not in {"_digest", "paths", "served", "executions"}]
        return {
            **{name: getattr(self, name) for name in fields},
            "rate_limited": self.rate_limited,
            "executed_twice": self.executed_twice,
            "served": {
                name: {"documents": len(counts) - counts.count(0), "times": sum(counts)}
                for name, counts in self.served.items()
            },
            "served_digest": self.served_digest,
        }


# --- the application ------------------------------------------------------------------------------------------------


@attrs.frozen
class _Answer:
    status: int
    value: Any = None  # None: no body
    headers: dict[str, str] = attrs.field(factory=dict[str, str])
    documents: Sequence[Document] = ()
    collection: str = ""


@attrs.frozen(repr=False)
class _Pair:
    generation: int
    read_only: bool


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(each, str) and each for each in value)


class Sandbox:
    """The stand-in, as an ASGI application: for uvicorn (`serve`, `run`, `spawn`) or for `httpx.ASGITransport`.

    `seed` decides data, tokens and faults. `documents` is how many each of the six `COLLECTIONS` holds at first, with
    ids from 1. `tokens` is the valid (Token1, Token2); None makes a pair from the seed. `quota` and `faults` say what
    it refuses and breaks. `rotate_after` replaces the pair after so many requests whose tokens were accepted (several
    numbers: after each of them). `control_key` opens `/_sandbox/` to requests that bear it as `X-Sandbox-Key`; None
    keeps that closed. `clock` (seconds) and `sleep` are for tests. Raises ValueError for what cannot be.

    `paging` is one of `PAGING_KINDS`. "shifting": as if before each page but the first one more document had been put
    before all others, so that a page by number or offset begins with the last document of the page before.
    "repeating": the last page once more in place of an empty one behind the end. "circular": the cursor and the links
    of the last page lead to the first.

    Below `/api/`: GET, HEAD, POST on `/api/{collection}`; GET, HEAD, PUT, PATCH, DELETE on `/api/{collection}/{id}`.
    Lists page by `page` and `page_size`, by `offset` and `limit`, or by `cursor` (empty at first) and `limit`, always
    with a link to the next, in the header `Link` and as `next`. `/api/invoices` needs a level that no pair has (403);
    the pair `read_only_tokens` gets 403 for all but GET, HEAD and OPTIONS. The `request_key` in a POST's body tells
    `record` which POSTs are the same.
    `record` says what happened.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        documents: int = 5_000,
        tokens: tuple[str, str] | None = None,
        quota: Quota | None = None,
        faults: Faults = Faults(),
        rotate_after: int | Sequence[int] | None = None,
        paging: str = "steady",
        control_key: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        after = tuple(rotate_after) if isinstance(rotate_after, Sequence) else (rotate_after,)
        if not _is_count(documents, 0) or not (rotate_after is None or all(_is_count(each, 1) for each in after)):
            raise ValueError("documents must be a number of at least 0, rotate_after of at least 1")
        if tokens is not None and not _is_pair(tokens):
            raise ValueError("tokens must be two texts, Token1 and Token2")  # and is not quoted
        for name, value, kind in (
            ("quota", quota, Quota),
            ("faults", faults, Faults),
            ("control_key", control_key, str),
        ):
            if not isinstance(value, kind) and (value is not None or name == "faults"):
                raise ValueError(f"{name} must be {kind.__name__}, not {type(value).__name__}")
        if paging not in PAGING_KINDS:
            raise ValueError(f"paging must be one of {', '.join(PAGING_KINDS)}")
        self.seed = seed
        self.documents = documents
        self.record: Record = Record(seed)
        self.faults = faults
        self.generation: int = 0
        self._collections = {name: _Collection(name, seed=seed, size=documents) for name in COLLECTIONS}
        self._meter = None if quota is None else _Meter(quota, clock())
        self._rotate_after = frozenset(each for each in after if each is not None)
        self._paging = paging
        self._accepted = 0
        self._drawn: Counter[str] = Counter()
        self._outage_until = -math.inf
        self._control_key = control_key
        self._clock = clock
        self._sleep = sleep
        self._known: tuple[dict[str, _Pair], dict[str, _Pair]] = ({}, {})
        self._adopt(tokens or self._made("full"))

    def __repr__(self) -> str:
        return f"<Sandbox seed={self.seed} documents={self.documents} generation={self.generation}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Sandbox holds tokens and cannot be pickled or copied")

    @property
    def tokens(self) -> tuple[str, str]:
        """The pair (Token1, Token2) that is valid now."""
        return self._tokens

    @property
    def read_only_tokens(self) -> tuple[str, str]:
        """The pair (Token1, Token2) that may only read, as valid now; rotated together with `tokens`."""
        return self._read_only_tokens

    @property
    def next_tokens(self) -> tuple[str, str]:
        """The pair (Token1, Token2) that will be valid after the next rotation: made beforehand, refused until then."""
        return self._made("full")

    def rotate(self) -> int:
        """Replace both pairs; the old ones are refused from now on. Returns the new generation."""
        self.record.rotations += 1
        self._adopt(self.next_tokens)
        return self.generation

    def outage(self, seconds: float) -> None:
        """Answer 503 to everything below `/api/` for the next `seconds`."""
        self._outage_until = self._clock() + seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope: http, or lifespan (which has nothing to do here)."""
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            raise ValueError("the sandbox speaks only http")
        request, path = Request(scope, receive), scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith("/api/"):
            with contextlib.suppress(ClientDisconnect):
                await self._serve(request, path, send)
        else:
            try:
                answer = self._outside(request, path)
            except HTTPException as refusal:
                answer = _refused(refusal)
            for message in _messages(answer):
                await send(message)
        return None

    # The tokens

    def _made(self, level: str) -> tuple[str, str]:
        """The pair of the generation to come."""
        made = [
            hashlib.blake2b(f"{self.seed} {level} {self.generation + 1} {n}".encode(), digest_size=20) for n in "12"
        ]
        return made[0].hexdigest(), made[1].hexdigest()

    def _adopt(self, tokens: tuple[str, str]) -> None:
        self._tokens, self._read_only_tokens = tokens, self._made("read-only")
        self.generation += 1
        for pair, read_only in ((self._tokens, False), (self._read_only_tokens, True)):
            for known, token in zip(self._known, pair, strict=True):
                known[token] = _Pair(self.generation, read_only)

    def _pair(self, request: Request) -> _Pair | None:
        """The pair that a request bears, if it was ever valid; what else it bears goes on record."""
        first, second = (request.headers.getlist(name) for name in ("token1", "token2"))
        if not first or not second:
            self.record.missing += 1
            return None
        pairs = [known.get(",".join(values)) for known, values in zip(self._known, (first, second), strict=True)]
        if None in pairs:
            self.record.unknown += 1
        elif pairs[0] != pairs[1]:
            self.record.mixed += 1
        else:
            return pairs[0]
        return None

    def _admit(self, request: Request, path: str) -> None:
        """Raise 503, 401, 429 or 403, in this order, unless the request may go on."""
        if self._clock() < self._outage_until:
            raise HTTPException(503, "The service is down.")
        pair = self._pair(request)
        if pair is not None:
            self.record.generations[pair.generation] += 1
        if pair is None or pair.generation != self.generation:
            raise HTTPException(401, "Authentication failed: a valid Token1 and Token2 are needed.")
        self._accepted += 1
        if self._accepted in self._rotate_after:
            self.rotate()
        wait = self._meter.take(self._clock()) if self._meter else 0.0
        if wait > 0:
            says_when = self._meter is not None and self._meter.quota.retry_after
            raise HTTPException(
                429, "Too many requests.", {"Retry-After": str(max(1, math.ceil(wait)))} if says_when else None
            )
        self.record.admitted += 1
        if pair.read_only and request.method not in {"GET", "HEAD", "OPTIONS"}:
            raise HTTPException(403, "These tokens may only read.")
        if path.split("/")[2] == FORBIDDEN:
            raise HTTPException(403, "These tokens lack the level that this resource needs.")

    # Below /api/

    async def _serve(self, request: Request, path: str, send: Send) -> None:
        record = self.record
        record.requests += 1
        record.paths[f"{request.method} {path}"] += 1
        record.in_flight += 1
        record.max_concurrency = max(record.max_concurrency, record.in_flight)
        request_id = f"sandbox-{record.requests}"
        try:
            fault = None
            try:
                self._admit(request, path)
                fault = self._draw_fault(request)
                await self._misbehave(fault)
                answer = await self._resource(request, path)
            except HTTPException as refusal:
                answer = _refused(refusal)
            answer.headers["X-Request-Id"] = request_id
            if self._meter:
                answer.headers.update(self._meter.headers(self._clock()))
            record.statuses[answer.status] += 1
            rest = await self._begin(_messages(answer), fault, send)
            if request.method == "GET":
                for served in answer.documents:
                    record.note_served(answer.collection, served)
        finally:
            record.in_flight -= 1
        for message in rest:  # only now, so that whoever has an answer finds it on record
            await send(message)

    def _draw_fault(self, request: Request) -> str | None:
        target = f"{request.method} {request.scope['path']}?{request.scope['query_string'].decode('latin-1')}"
        self._drawn[target] += 1
        number, most = self._drawn[target], self.faults.at_most
        return None if most is not None and number > most else self.faults.draw(self.seed, target, number)

    async def _misbehave(self, fault: str | None) -> None:
        if fault is None or fault in {"slow_body", "cut_body"}:
            return
        self.record.faults[fault] += 1
        if fault == "latency":
            await self._sleep(self.faults.delay)
        elif fault == "internal_error":
            raise HTTPException(500, "Something broke.")
        elif fault == "expired":
            self.rotate()
            raise HTTPException(401, "Authentication failed: the tokens have lapsed.")
        else:
            after = {"Retry-After": str(self.faults.retry_after)} if fault == "overloaded" else None
            raise HTTPException(503, "The service is busy.", after)

    async def _begin(self, messages: list[Message], fault: str | None, send: Send) -> list[Message]:
        """Send what a fault makes of an answer's messages; returns those that are left, the last one at least."""
        head, whole = messages
        body = bytes(whole["body"])
        if fault not in {"slow_body", "cut_body"} or not body:
            return messages
        self.record.faults[fault] += 1
        await send(head)
        if fault == "cut_body":
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            raise httpx.RemoteProtocolError("the sandbox cut the body short")
        size = -(-len(body) // DRIPS)
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        for piece in pieces[:-1]:
            await self._sleep(self.faults.delay / DRIPS)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._sleep(self.faults.delay / DRIPS)
        return [{"type": "http.response.body", "body": pieces[-1]}]

    async def _resource(self, request: Request, path: str) -> _Answer:
        name, _, number = path.removeprefix("/api/").partition("/")
        collection, method = self._collections.get(name), request.method
        if collection is None or (number and not _is_whole(number)):
            raise HTTPException(404, "There is nothing at this path.")
        allowed = "GET, HEAD, OPTIONS, " + ("PUT, PATCH, DELETE" if number else "POST")
        if method == "OPTIONS":
            return _Answer(204, headers={"Allow": allowed})
        if method not in allowed.split(", "):
            raise HTTPException(405, "This method is not allowed here.", {"Allow": allowed})
        if not number:
            if method == "POST":
                return await self._create(request, collection)
            return _page(request, collection, self._paging)
        return await self._document(request, collection, int(number))

    async def _create(self, request: Request, collection: _Collection) -> _Answer:
        fields = await _fields(request)
        created = collection.create(fields)
        self.record.posts += 1
        if isinstance(key := fields.get("request_key"), str):
            self.record.executions[key] += 1
        return _Answer(201, created, {"Location": f"{_root(request)}/api/{collection.name}/{created['id']}"})

    async def _document(self, request: Request, collection: _Collection, number: int) -> _Answer:
        fields = await _fields(request) if request.method in {"PUT", "PATCH"} else None
        found = collection.get(number)  # after the body: another request may have deleted it meanwhile
        if found is None:
            raise HTTPException(404, "There is no such document.")
        if fields is not None:
            return _Answer(200, collection.put(number, {**found, **fields} if request.method == "PATCH" else fields))
        if request.method == "DELETE":
            collection.delete(number)
            return _Answer(204)
        return _Answer(200, found, documents=[found], collection=collection.name)

    # Outside /api/

    def _outside(self, request: Request, path: str) -> _Answer:
        if path == "/":
            about = {"name": "layer_async sandbox", "illustrative": True, "note": NOTE, "seed": self.seed}
            return _Answer(200, {**about, "collections": {n: f"/api/{n}" for n in COLLECTIONS}})
        prefix, _, action = path.removeprefix("/").partition("/")
        if prefix != "_sandbox" or self._control_key is None:
            raise HTTPException(404, "There is nothing at this path.")
        if not hmac.compare_digest(request.headers.get("x-sandbox-key", "").encode(), self._control_key.encode()):
            raise HTTPException(403, "X-Sandbox-Key is missing or wrong.")
        return _Answer(200, self._control(f"{request.method} {action}", request))

    def _control(self, action: str, request: Request) -> Any:
        match action:
            case "GET record":
                return self.record.summary()
            case "GET paths":
                return self.record.paths
            case "GET served":
                return {name: counts.tolist() for name, counts in self.record.served.items()}
            case "GET tokens":
                return {
                    "generation": self.generation,
                    "tokens": self.tokens,
                    "next_tokens": self.next_tokens,
                    "read_only_tokens": self.read_only_tokens,
                }
            case "POST rotate":
                return {"generation": self.rotate()}
            case "POST outage":
                seconds = _whole(request, "milliseconds", 1000, most=3_600_000) / 1000
                self.outage(seconds)
                return {"seconds": seconds}
            case _:
                raise HTTPException(404, "There is no such control.")


async def _lifespan(receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


def _refused(refusal: HTTPException) -> _Answer:
    value = {"error": {"status": refusal.status_code, "message": refusal.detail}}
    return _Answer(refusal.status_code, value, dict(refusal.headers or {}))


def _messages(answer: _Answer) -> list[Message]:
    """The two ASGI messages, head and body, that an answer makes."""
    if answer.value is None:
        response = Response(status_code=answer.status, headers=answer.headers)
    else:
        body = msgspec.json.encode(answer.value)
        response = Response(body, answer.status, answer.headers, media_type="application/json")
    head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    return [head, {"type": "http.response.body", "body": response.body}]


async def _fields(request: Request) -> Document:
    """The JSON object that a request bears; raises 413, 400 or 422."""
    body = bytearray()
    async for chunk in request.stream():  # to its end, also when it is too long: an unread body breaks the connection
        if len(body) <= BODY_LIMIT:
            body += chunk
    if len(body) > BODY_LIMIT:
        raise HTTPException(413, f"At most {BODY_LIMIT} bytes are taken.")
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise HTTPException(400, "The body is not JSON.") from None
    if not isinstance(fields, dict):
        raise HTTPException(422, "The body is not a JSON object.")
    return cast(Document, fields)


def _root(request: Request) -> str:
    """The path at which the sandbox is mounted, if it is."""
    return str(request.scope.get("root_path", ""))


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _whole(request: Request, name: str, default: int, *, least: int = 1, most: int = 10**9 - 1) -> int:
    text = request.query_params.get(name, str(default))
    if not _is_whole(text) or not least <= int(text) <= most:
        raise HTTPException(400, f"{name} must be a whole number from {least} to {most}.")
    return int(text)


def _page(request: Request, collection: _Collection, paging: str) -> _Answer:
    """One page of a collection, in the way that the query asks for."""
    query, is_circular = request.query_params, paging == "circular"
    if "cursor" in query:
        size = _whole(request, "limit", 50, most=PAGE_LIMIT)
        found = collection.after(_position(query["cursor"]), size + 1)
        found, more = found[:size], len(found) > size
        last = found[-1]["id"] if more else 0
        cursor = base64.urlsafe_b64encode(str(last).encode()).decode() if more or is_circular else None
        value: Document = {"data": found, "next_cursor": cursor}
        following, size_param = f"cursor={cursor}", "limit"
    elif "offset" in query or "limit" in query:
        offset, size = _whole(request, "offset", 0, least=0), _whole(request, "limit", 50, most=PAGE_LIMIT)
        found, more, total = _slice(collection, offset, size, paging)
        value = {"data": found, "offset": offset, "limit": size, "total": total}
        following, size_param = f"offset={offset + size if more else 0}", "limit"
    else:
        page, size = _whole(request, "page", 1), _whole(request, "page_size", 50, most=PAGE_LIMIT)
        found, more, total = _slice(collection, (page - 1) * size, size, paging)
        value = {"data": found, "page": page, "page_size": size, "pages": -(-total // size), "total": total}
        following, size_param = f"page={page + 1 if more else 1}", "page_size"
    target = f"{_root(request)}/api/{collection.name}?{following}&{size_param}={size}" if more or is_circular else None
    value["next"] = target
    link = {} if target is None else {"Link": f'<{target}>; rel="next"'}
    return _Answer(200, value, link, documents=found, collection=collection.name)


def _slice(collection: _Collection, offset: int, size: int, paging: str) -> tuple[list[Document], bool, int]:
    """The documents of the page that begins behind `offset` others, whether more follow, and how many there are."""
    total = len(collection)
    if paging == "shifting":  # the new ones, which nobody has seen, are never shown
        new = offset // size
        offset, total = offset - new, total + new
        return collection.after(collection.skip(offset), size), offset + new + size < total, total
    if paging == "repeating":
        offset = min(offset, max(0, total - 1) // size * size)
    return collection.after(collection.skip(offset), size), offset + size < total, total


def _position(cursor: str) -> int:
    with contextlib.suppress(ValueError):
        text = base64.urlsafe_b64decode(cursor).decode("ascii") or "0"
        if _is_whole(text):
            return int(text)
    raise HTTPException(400, "This cursor is not one of ours.")


# --- serving --------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn, quiet, over one listening socket, and gone at once when it is told to stop."""

    def __init__(self, sandbox: Sandbox, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                sandbox,
                loop="asyncio",
                http="httptools",
                ws="none",
                lifespan="off",
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=1,
                log_config=None,
                log_level="critical",  # a body cut short on purpose is an error to uvicorn, with a traceback
                access_log=False,
            )
        )
        self._listener = listener

    def run_here(self) -> None:
        """Serve in this thread until `should_exit` is set."""
        asyncio.run(self.serve(sockets=[self._listener]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, drop what is open and under way, and end."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for task in list(self.server_state.tasks):
            task.cancel()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket whose protocol is named: asyncio sets TCP_NODELAY on the accepted ones only if it is.

    Without that an answer, which uvicorn writes in two pieces, waits for 40 ms for the client's delayed ACK.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # elsewhere it would let two servers share the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@attrs.frozen
class SandboxServer:
    """A sandbox that is being served: at `url` (http://host:port, no slash at its end), by the `sandbox` itself."""

    url: str
    sandbox: Sandbox


@contextlib.contextmanager
def serve(sandbox: Sandbox, *, host: str = "127.0.0.1", port: int = 0) -> Generator[SandboxServer]:
    """Serve `sandbox` from a thread of this process while the block lasts; `port` 0 takes a free one.

    Connections and requests still open at its end are dropped. Raises OSError when it cannot listen there.
    """
    with _listen(host, port) as listener:
        server = _Server(sandbox, listener)
        thread = threading.Thread(target=server.run_here, name="layer_async sandbox")
        thread.start()
        try:
            yield SandboxServer(_url(listener), sandbox)
        finally:
            server.should_exit = True
            thread.join()


def run(
    sandbox: Sandbox, *, host: str = "127.0.0.1", port: int = 8010, on_start: Callable[[str], object] | None = None
) -> None:
    """Serve `sandbox` in this thread until Ctrl-C; `on_start` is called with the URL once it can be reached.

    Raises OSError when it cannot listen there. SIGTERM ends the process as it does any other, after the same goodbye.
    """
    with _listen(host, port) as listener, contextlib.suppress(KeyboardInterrupt):
        if on_start is not None:
            on_start(_url(listener))
        _Server(sandbox, listener).run_here()


# --- a process of its own -------------------------------------------------------------------------------------------


@attrs.define(kw_only=True)
class _Order:
    """What a child is told on its standard input: nothing secret is on its command line or in its environment."""

    host: str
    port: int
    control_key: str
    seed: int
    documents: int
    tokens: tuple[str, str] | None
    quota: Quota | None
    faults: Faults
    rotate_after: int | tuple[int, ...] | None


class SandboxProcess:
    """A sandbox in a process of its own, made by `spawn`; ended by `close` or by leaving its `with` block.

    `url` is where it listens (http://host:port), `pid` its process id, `seed` and `documents` what it was made with.
    The methods ask it over HTTP and block while they do: call them from a thread when an event loop runs. They raise
    OSError or http.client.HTTPException when it cannot be asked.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], *, url: str, seed: int, documents: int, control_key: str
    ) -> None:
        self.url = url
        self.pid: int = process.pid
        self.seed = seed
        self.documents = documents
        self._process = process
        self._control_key = control_key

    def __repr__(self) -> str:
        return f"<SandboxProcess pid={self.pid} url={self.url} seed={self.seed}>"

    def __enter__(self) -> SandboxProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def tokens(self) -> tuple[str, str]:
        """The (Token1, Token2) that are valid now: wrapped in a `TokenPair`, a source of tokens."""
        first, second = self._ask("GET", "tokens")["tokens"]
        return first, second

    def next_tokens(self) -> tuple[str, str]:
        """The (Token1, Token2) that will be valid after the next rotation."""
        first, second = self._ask("GET", "tokens")["next_tokens"]
        return first, second

    def read_only_tokens(self) -> tuple[str, str]:
        """The (Token1, Token2) that may only read, as valid now."""
        first, second = self._ask("GET", "tokens")["read_only_tokens"]
        return first, second

    def rotate(self) -> int:
        """Replace the tokens; the old ones are refused from now on. Returns the new generation."""
        generation: int = self._ask("POST", "rotate")["generation"]
        return generation

    def outage(self, seconds: float) -> None:
        """Answer 503 to everything for the next `seconds` (from 0.001 to 3600)."""
        self._ask("POST", f"outage?milliseconds={round(seconds * 1000)}")

    def record(self) -> dict[str, Any]:
        """What `Record.summary` says there. JSON has text for keys: `record()["statuses"]["429"]`."""
        record: dict[str, Any] = self._ask("GET", "record")
        return record

    def paths(self) -> dict[str, int]:
        """How often each method and path was requested."""
        paths: dict[str, int] = self._ask("GET", "paths")
        return paths

    def served(self) -> dict[str, list[int]]:
        """For each collection, how often the document with that id was sent whole (index 0 stands for no document)."""
        served: dict[str, list[int]] = self._ask("GET", "served")
        return served

    def close(self, *, timeout: float = 5.0) -> None:
        """End the process: by closing its standard input, and by killing it if it is not gone in `timeout` seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what it did not read before it died
            self._process.stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, method: str, action: str) -> Any:
        with contextlib.closing(http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=10)) as connection:
            connection.request(method, f"/_sandbox/{action}", headers={"X-Sandbox-Key": self._control_key})
            response = connection.getresponse()
            body = response.read()
        if response.status != 200:
            raise http.client.HTTPException(f"{method} /_sandbox/{action} was answered {response.status}")
        return msgspec.json.decode(body)


def spawn(
    *,
    seed: int = 1,
    documents: int = 5_000,
    tokens: tuple[str, str] | None = None,
    quota: Quota | None = None,
    faults: Faults = Faults(),
    rotate_after: int | Sequence[int] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> SandboxProcess:
    """Start a sandbox in a process of its own and return once it can be reached; `port` 0 takes a free one.

    The arguments are those of `Sandbox`. The child ends when `SandboxProcess.close` is called or this process dies.
    It does not see the Ctrl-C of this terminal. Raises RuntimeError when it does not start.
    """
    order = _Order(
        host=host,
        port=port,
        control_key=secrets.token_urlsafe(32),
        seed=seed,
        documents=documents,
        tokens=tokens,
        quota=quota,
        faults=faults,
        rotate_after=rotate_after if isinstance(rotate_after, int | None) else tuple(rotate_after),
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "layer_async.sandbox"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # the child is dead already, as the next line to come shows
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.flush()
    url = process.stdout.readline().decode().strip()
    child = SandboxProcess(process, url=url, seed=seed, documents=documents, control_key=order.control_key)
    if not url:
        child.close()
        raise RuntimeError(f"the sandbox's process ended with {process.returncode} before it served")
    return child


def main() -> None:
    """Be the child of `spawn`: an order on standard input, the URL on standard output, the end with standard input."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Order)
    options = {f.name: getattr(order, f.name) for f in attrs.fields(_Order) if f.name not in {"host", "port"}}
    with _listen(order.host, order.port) as listener:
        server = _Server(Sandbox(**options), listener)

        def stop_with_stdin() -> None:
            os.read(sys.stdin.fileno(), 1)  # nothing more is written to it: this returns when it closes
            server.should_exit = True

        threading.Thread(target=stop_with_stdin, daemon=True).start()
        sys.stdout.write(f"{_url(listener)}\n")
        sys.stdout.flush()
        server.run_here()


if __name__ == "__main__":
    main()
