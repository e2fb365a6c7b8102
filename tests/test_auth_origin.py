"""Where tokens may go: the origin rule, the headers that carry them, and the ten ways to lead them astray."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_async._auth import DualTokenAuth
from layer_async._errors import ConfigurationError, MalformedResponseError
from layer_async._origin import MaskedHeaders, Origin, check_headers_shape
from layer_async._tokens import TokenPair

ONE, TWO = "primary-4711", "secondary-0815"
PAIR = TokenPair(ONE, TWO)
BASE = "https://webapi.thelayer.com"


# The origin


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://webapi.thelayer.com", "https://webapi.thelayer.com"),
        ("HTTPS://WebApi.TheLayer.com:443/", "https://webapi.thelayer.com"),
        ("https://webapi.thelayer.com:8443", "https://webapi.thelayer.com:8443"),
        ("http://localhost:8010", "http://localhost:8010"),
        ("http://127.0.0.1", "http://127.0.0.1"),
        ("http://127.8.9.1:80", "http://127.8.9.1"),
        ("http://[::1]:8010", "http://[::1]:8010"),
        ("http://[0:0:0:0:0:0:0:1]:8010", "http://[::1]:8010"),
        ("https://[2001:DB8::1]", "https://[2001:db8::1]"),
    ],
)
def test_an_origin_is_https_or_loopback_and_normalised(url: str, text: str) -> None:
    assert str(Origin.parse(url)) == text
    assert str(Origin.parse(httpx.URL(url))) == text


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://webapi.thelayer.com", "not https"),
        ("http://127.0.0.1.evil.example", "not https"),
        ("http://localhost.evil.example", "not https"),
        ("http://128.0.0.1", "not https"),
        ("http://[::2]", "not https"),
        ("http://0.0.0.0", "not https"),
        ("ftp://webapi.thelayer.com", "must be absolute"),
        ("webapi.thelayer.com", "must be absolute"),
        ("/api", "must be absolute"),
        ("", "must be absolute"),
        ("https://", "must be absolute"),
        ("https://we%62api.thelayer.com", "must be absolute"),
        ("https://user:hush@webapi.thelayer.com", "neither user"),
        ("https://webapi.thelayer.com/?key=hush", "neither user"),
        ("https://webapi.thelayer.com/#hush", "neither user"),
        ("https://webapi.thelayer.com:port", "not valid"),
        (" https://webapi.thelayer.com", "white space"),
        ("https://webapi.thelayer.com\n", "white space"),
        ("https://webapi.thelayer.com\\@evil.example", "backslash"),
        (b"https://webapi.thelayer.com", "not bytes"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_safe_base_url_is_refused_without_quoting_it(url: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        Origin.parse(url)
    assert "hush" not in str(caught.value)


def test_plain_http_to_another_machine_must_be_asked_for() -> None:
    assert str(Origin.parse("http://gateway.internal:8080", allow_http=True)) == "http://gateway.internal:8080"


@pytest.mark.parametrize(
    ("url", "admitted"),
    [
        ("https://webapi.thelayer.com/api?x=1", True),
        ("https://WEBAPI.THELAYER.COM:443", True),
        ("http://webapi.thelayer.com/api", False),
        ("http://webapi.thelayer.com:443/api", False),
        ("https://webapi.thelayer.com:8443/api", False),
        ("https://webapi.thelayer.com:0/api", False),
        ("https://webapi.thelayer.com./api", False),
        ("https://webapi.thelayer.com@evil.example/api", False),
        ("https://webapi.thelayer.com\\.evil.example/api", False),
        ("https://evil.example/webapi.thelayer.com", False),
        ("https://[::1]/api", False),
        ("/api", False),
    ],
)
def test_an_origin_admits_its_own_urls_only(url: str, admitted: bool) -> None:
    assert Origin.parse(BASE).admits(httpx.URL(url)) is admitted


def test_an_ipv6_origin_admits_every_spelling_of_itself() -> None:
    origin = Origin.parse("https://[2001:db8::1]:8443/base")
    assert origin.admits(httpx.URL("https://[2001:DB8:0:0:0:0:0:1]:8443/x"))
    assert str(origin.resolve("x")) == "https://[2001:db8::1]:8443/base/x"


def test_the_origin_of_any_url_can_be_named() -> None:
    assert str(Origin.of_url(httpx.URL("https://user:pw@evil.example:99/secret?q=1"))) == "https://evil.example:99"


@pytest.mark.parametrize(
    ("base", "path", "url"),
    [
        (BASE, "/api/x", f"{BASE}/api/x"),
        (BASE, "api/x", f"{BASE}/api/x"),
        (BASE, "", f"{BASE}/"),
        (BASE, "/", f"{BASE}/"),
        (BASE, "?q=a\\b", f"{BASE}/?q=a\\b"),
        (BASE, "api/x?next=https://evil.example/", f"{BASE}/api/x?next=https://evil.example/"),
        (BASE, "api/x#part", f"{BASE}/api/x"),
        (BASE, "api/a b/ü", f"{BASE}/api/a%20b/%C3%BC"),
        (BASE, "/api//x", f"{BASE}/api//x"),
        (BASE, "/12:30/x", f"{BASE}/12:30/x"),
        (BASE, "12:30/x", f"{BASE}/12:30/x"),
        (BASE, f"{BASE}/api/x?y=1", f"{BASE}/api/x?y=1"),
        (BASE, "https://WEBAPI.THELAYER.COM:443/api", f"{BASE}/api"),
        (BASE, "HTTPS://WEBAPI.THELAYER.COM:443/api", "HTTPS://webapi.thelayer.com:443/api"),
        (f"{BASE}/v1", "/api/x", f"{BASE}/v1/api/x"),
        (f"{BASE}/v1/", "api/x", f"{BASE}/v1/api/x"),
        (f"{BASE}/v1", "../api", f"{BASE}/api"),
        (f"{BASE}/v1", "../../../api", f"{BASE}/api"),
        (f"{BASE}/v1", f"{BASE}/api/x", f"{BASE}/api/x"),
        # These look like a way out and are a path at the origin all the same.
        (BASE, "@evil.example/x", f"{BASE}/@evil.example/x"),
        (BASE, ".evil.example/x", f"{BASE}/.evil.example/x"),
        (BASE, ":8443/x", f"{BASE}/:8443/x"),
        (BASE, "/%2f%2fevil.example", f"{BASE}/%2f%2fevil.example"),
        (BASE, "/%5c%5cevil.example", f"{BASE}/%5c%5cevil.example"),
        (BASE, "/%2e%2e/%2e%2e/x", f"{BASE}/%2e%2e/%2e%2e/x"),
        (BASE, "https%3a//evil.example", f"{BASE}/https%3a//evil.example"),
    ],
)
def test_a_path_is_resolved_below_the_base_path_and_stays_at_the_origin(base: str, path: str, url: str) -> None:
    resolved = Origin.parse(base).resolve(path)
    assert str(resolved) == str(httpx.URL(url))
    assert Origin.parse(BASE).admits(resolved)


@pytest.mark.parametrize("path", ["/api/x?y=1", "api/x", "a/../b", ""])
@pytest.mark.parametrize("base", [BASE, f"{BASE}/v1", f"{BASE}/v1/"])
def test_a_path_means_what_it_means_to_httpx(base: str, path: str) -> None:
    expected = httpx.Client(base_url=base).build_request("GET", path).url
    assert Origin.parse(base).resolve(path) == expected


WAYS_OUT = [
    "//evil.example/x",
    "///evil.example/x",
    "//webapi.thelayer.com/x",
    "/\\evil.example/x",
    "\\\\evil.example\\x",
    "https:\\\\evil.example/x",
    "https://evil.example/x",
    "https://evil.example:443/x?token=hush",
    "http://webapi.thelayer.com/x",
    "https://webapi.thelayer.com:8443/x",
    "https://webapi.thelayer.com@evil.example/x",
    "https://webapi.thelayer.com:443@evil.example/x",
    "https://user:hush@webapi.thelayer.com/x",
    "https://webapi.thelayer.com.evil.example/x",
    "https://webapi.thelayer.com%2eevil.example/x",
    "https://webapi.thelayer.com%2f@evil.example/x",
    "https:evil.example/x",
    "https:/evil.example/x",
    "https:///evil.example/x",
    "https:%2f%2fevil.example/x",
    "javascript:alert(1)",
    "file:///etc/passwd",
    "webapi.thelayer.com:8443/x",
    "customers:search?q=hush",
    ".//evil.example/x",
    "x/..//evil.example/x",
    " //evil.example/x",
    " /api/x",
    "/api/x ",
    "/api/x\n",
    "/api/\r\nHost: evil.example",
    "\thttps://evil.example/x",
    "ht\ntps://evil.example/x",
    "/api/\x00",
    "/api/\x7f",
    "/api/\u200bx",
    "/api/\ud800",
    "https://[::1/x",
    "https://[evil.example]/x",
    "https://webapi.thelayer.com:99999999999999999999x/",
    "/api/" + "x" * 70_000,
]


@pytest.mark.parametrize("path", WAYS_OUT)
def test_a_path_that_leads_elsewhere_is_refused_without_quoting_secrets(path: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Origin.parse(BASE).resolve(path)
    assert "hush" not in str(caught.value)


def test_the_refusal_of_a_path_names_the_foreign_origin() -> None:
    with pytest.raises(ConfigurationError, match=r"leads to https://evil\.example:99; calls go to https://webapi"):
        Origin.parse(BASE).resolve("https://evil.example:99/x?q=1")


@pytest.mark.parametrize("base", [BASE, f"{BASE}/v1"])
def test_two_slashes_at_the_head_of_a_path_name_a_host_whatever_the_base_path(base: str) -> None:
    with pytest.raises(ConfigurationError, match="which names another host"):
        Origin.parse(base).resolve("//evil.example/x")


@pytest.mark.parametrize("path", [None, b"/api", 7, httpx.URL("/api")])
def test_a_path_is_a_str(path: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"not {type(path).__name__}"):
        Origin.parse(BASE).resolve(path)


# The headers


def masked(url: str = f"{BASE}/api", **headers: str) -> tuple[httpx.Request, MaskedHeaders]:
    request = httpx.Request("GET", url, headers=headers)
    request.headers = MaskedHeaders(request, PAIR, Origin.parse(BASE))
    return request, request.headers


def test_every_way_of_reading_the_headers_shows_the_tokens() -> None:
    request, headers = masked(accept="*/*")
    assert headers.raw == [
        (b"Host", b"webapi.thelayer.com"),
        (b"accept", b"*/*"),
        (b"Token1", ONE.encode()),
        (b"Token2", TWO.encode()),
    ]
    assert headers["TOKEN1"] == ONE
    assert headers["accept"] == "*/*"
    assert headers.get("token2") == TWO
    assert headers.get("token3", "none") == "none"
    assert "Token1" in headers
    assert "accept" in headers
    assert "Token3" not in headers
    assert list(headers) == list(headers.keys()) == ["host", "accept", "token1", "token2"]
    assert list(headers.values()) == ["webapi.thelayer.com", "*/*", ONE, TWO]
    assert dict(headers.items())["token1"] == ONE
    assert ("token2", TWO) in headers.multi_items()
    assert headers.get_list("Token1") == [ONE]
    assert headers.get_list("accept", split_commas=True) == ["*/*"]
    assert len(headers) == 4
    assert request.headers is headers


def test_equality_compares_what_can_be_seen() -> None:
    request, headers = masked()
    _, other = masked()
    assert headers == other
    assert headers == {"host": "webapi.thelayer.com", "token1": ONE, "token2": TWO}
    assert headers != httpx.Headers(headers)
    request.url = httpx.URL("https://evil.example")
    assert headers != other
    with pytest.raises(TypeError):
        hash(headers)


def test_the_repr_masks_the_tokens_and_keeps_the_rest() -> None:
    _, headers = masked(accept="*/*", authorization="Basic hush")
    assert ONE not in f"{headers!r}{headers!s}{headers}"
    assert TWO not in f"{headers!r}{headers!s}{headers}"
    assert "'token1': '[secure]'" in repr(headers)
    assert "'accept': '*/*'" in repr(headers)
    assert "hush" not in repr(headers)


@pytest.mark.parametrize(
    "copied",
    [
        httpx.Headers,
        lambda headers: headers.copy(),
        copy.copy,
        copy.deepcopy,
        lambda headers: pickle.loads(pickle.dumps(headers)),
        lambda headers: httpx.Request("GET", "https://evil.example", headers=headers).headers,
        lambda headers: httpx.Client(headers=headers).headers,
    ],
)
def test_a_copy_of_the_headers_lacks_the_tokens(copied: Callable[[Any], httpx.Headers]) -> None:
    _, headers = masked(accept="*/*")
    result = copied(headers)
    assert not isinstance(result, MaskedHeaders)
    assert ONE not in str(result.raw)
    assert TWO not in str(result.raw)
    assert result["accept"] == "*/*"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda request: pickle.loads(pickle.dumps(request))])
def test_a_copied_request_lacks_the_tokens(copied: Callable[[Any], httpx.Request]) -> None:
    request, _ = masked()
    assert ONE.encode() not in pickle.dumps(request)
    assert "token1" not in copied(request).headers


def test_the_tokens_vanish_while_the_url_of_the_request_is_elsewhere() -> None:
    request, headers = masked()
    for url in (httpx.URL("https://evil.example/"), httpx.URL("http://webapi.thelayer.com/"), "https://webapi"):
        request.url = url  # type: ignore[assignment]  # a hook that puts text there
        assert ONE not in str([headers.raw, headers.multi_items(), list(headers.values())])
        assert "Token1" not in headers
        assert len(headers) == 1
        with pytest.raises(KeyError):
            headers["Token1"]
        with pytest.raises(KeyError):
            del headers["Token1"]
    request.url = httpx.URL(f"{BASE}/back")
    assert headers["Token1"] == ONE


def test_the_tokens_vanish_with_the_request() -> None:
    request, headers = masked()
    del request
    gc.collect()
    assert headers.raw == [(b"Host", b"webapi.thelayer.com")]


def test_tokens_that_others_put_there_are_replaced() -> None:
    _, headers = masked(Token1="theirs", TOKEN2="theirs", accept="*/*")
    assert headers.get_list("token1") == [ONE]
    assert "theirs" not in str(httpx.Headers(headers).raw)


def test_a_token_that_is_set_on_the_headers_stays_out_of_copies_too() -> None:
    _, headers = masked()
    headers["token1"] = "another"
    headers.update({"TOKEN2": "other", "accept": "*/*"})
    headers.setdefault("x-new", "1")
    assert (headers["Token1"], headers["Token2"], headers["accept"]) == ("another", "other", "*/*")
    assert len(headers) == 5
    assert list(httpx.Headers(headers)) == ["host", "accept", "x-new"]
    assert "another" not in repr(headers)


def test_headers_can_be_taken_off() -> None:
    _, headers = masked(accept="*/*")
    del headers["accept"]
    del headers["Token1"]
    assert headers.pop("token2") == TWO
    assert list(headers) == ["host"]


def test_the_encoding_of_the_headers_is_kept() -> None:
    request = httpx.Request("GET", f"{BASE}/api")
    request.headers = httpx.Headers([(b"x-name", "Zoë".encode("latin-1"))], encoding="latin-1")
    headers = MaskedHeaders(request, PAIR, Origin.parse(BASE))
    assert headers["x-name"] == "Zoë"
    assert ("x-name", "Zoë") in headers.multi_items()


def test_a_httpx_that_keeps_headers_otherwise_is_noticed_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    check_headers_shape()
    monkeypatch.setattr(httpx, "Headers", dict)
    with pytest.raises(ImportError, match="how httpx"):
        check_headers_shape()


# The ten ways. Another origin is whatever is not https://webapi.thelayer.com:443.

Headers = list[tuple[bytes, bytes]]


class Network:
    """A transport that answers by a table of URLs and writes down what would have gone over the wire, and where to."""

    def __init__(self, redirects: Mapping[str, tuple[int, str]] | None = None) -> None:
        self.redirects = dict(redirects or {})
        self.seen: list[tuple[str, str, Headers, bytes]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        url = str(request.url)
        origin = str(Origin.of_url(request.url))
        self.seen.append((origin, request.method, list(request.headers.raw), body))
        status, location = self.redirects.get(url, (0, ""))
        if status:
            return httpx.Response(status, headers={"location": location})
        return httpx.Response(200 if self.has_tokens(-1) or origin != BASE else 401, json={"url": url})

    def has_tokens(self, index: int) -> bool:
        names = {name.lower() for name, _ in self.seen[index][2]}
        values = {value for _, value in self.seen[index][2]}
        assert ({b"token1", b"token2"} <= names) == bool({ONE.encode(), TWO.encode()} & values)
        return b"token1" in names

    def origins(self) -> list[str]:
        return [origin for origin, *_ in self.seen]

    def assert_kept(self) -> None:
        """Every request at the origin had the tokens, and none elsewhere had anything of them."""
        for index, (origin, _, headers, body) in enumerate(self.seen):
            if origin == BASE:
                assert self.has_tokens(index)
            else:
                assert ONE not in f"{headers}{body!r}"
                assert TWO not in f"{headers}{body!r}"
                assert not self.has_tokens(index)


def bare_client(network: Network, **settings: Any) -> httpx.AsyncClient:
    settings = {"auth": DualTokenAuth(PAIR, origin=BASE), "base_url": BASE, "follow_redirects": True, **settings}
    return httpx.AsyncClient(transport=httpx.MockTransport(network), **settings)


ELSEWHERE = [
    "https://evil.example/x",
    "http://webapi.thelayer.com/x",  # (3) https to http
    "https://webapi.thelayer.com:8443/x",  # (4) another port
    "https://webapi.thelayer.com@evil.example/x",
    "//evil.example/x",
    "https://webapi.thelayer.com.evil.example/x",
]


@pytest.mark.anyio
@pytest.mark.parametrize("location", ELSEWHERE)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_elsewhere_goes_without_tokens(status: int, location: str) -> None:
    """Ways 1, 3, 4 and 8: a bare client that follows."""
    network = Network({f"{BASE}/x": (status, location)})
    async with bare_client(network) as client:
        response = await client.get("/x")
    assert response.status_code == 200
    assert len(network.seen) == 2
    assert network.origins()[1] != BASE
    network.assert_kept()


@pytest.mark.anyio
@pytest.mark.parametrize("location", ELSEWHERE)
@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_with_its_body_goes_without_tokens(status: int, location: str) -> None:
    """Way 2."""
    network = Network({f"{BASE}/x": (status, location)})
    async with bare_client(network) as client:
        await client.post("/x", json={"order": 1})
    assert network.seen[1][1] == "POST"
    assert network.seen[1][3] == b'{"order":1}'
    network.assert_kept()


@pytest.mark.anyio
@pytest.mark.parametrize("url", ["https://evil.example/x", "http://webapi.thelayer.com/x", f"{BASE}:8443/x"])
async def test_an_absolute_url_elsewhere_goes_without_tokens(url: str) -> None:
    """Way 5, and 10: a next-page link is such a URL. Tokens that the client has as default headers are taken off."""
    network = Network()
    async with bare_client(network, headers={"Token1": ONE, "token2": TWO, "x-kept": "1"}) as client:
        assert (await client.get(url)).status_code == 200
        assert (await client.get("/x")).status_code == 200
    network.assert_kept()
    assert network.origins()[1] == BASE
    assert all((b"x-kept", b"1") in headers for _, _, headers, _ in network.seen)
    assert [name.lower() for name, _ in network.seen[1][2]].count(b"token1") == 1


@pytest.mark.anyio
@pytest.mark.parametrize("path", [path for path in WAYS_OUT if path.isascii() and path.isprintable()])
async def test_no_path_trick_takes_tokens_elsewhere_even_unresolved(path: str) -> None:
    """Way 6: `Origin.resolve` refuses these (above); a bare client that never asks it sends no tokens elsewhere."""
    network = Network()
    async with bare_client(network) as client:
        try:
            await client.get(path)
        except httpx.InvalidURL:
            assert network.seen == []
    network.assert_kept()


@pytest.mark.anyio
@pytest.mark.parametrize("location", ELSEWHERE)
@pytest.mark.parametrize("with_our_auth", [True, False])
async def test_the_next_request_sent_by_hand_goes_without_tokens(location: str, with_our_auth: bool) -> None:
    """Way 7."""
    network = Network({f"{BASE}/x": (307, location)})
    async with bare_client(network, follow_redirects=False) as client:
        response = await client.post("/x", content=b"body")
        assert response.next_request is not None
        if with_our_auth:
            await client.send(response.next_request)
        else:
            await client.send(response.next_request, auth=httpx.Auth())
    assert network.origins() == [BASE, network.origins()[1]]
    network.assert_kept()


@pytest.mark.anyio
async def test_the_next_request_sent_by_hand_within_the_origin_gets_the_tokens() -> None:
    network = Network({f"{BASE}/x": (307, "/y")})
    async with bare_client(network, follow_redirects=False) as client:
        response = await client.get("/x")
        assert response.next_request is not None
        assert (await client.send(response.next_request)).status_code == 200
    network.assert_kept()


@pytest.mark.anyio
@pytest.mark.parametrize("url", ["https://evil.example/x", "http://webapi.thelayer.com/x", f"{BASE}:8443/x"])
async def test_a_hook_that_rewrites_the_url_sends_no_tokens(url: str) -> None:
    """Way 9: after our flow, before the transport."""
    network = Network()

    async def rewrite(request: httpx.Request) -> None:
        request.url = httpx.URL(url)

    async with bare_client(network, event_hooks={"request": [rewrite]}) as client:
        assert (await client.get("/x")).status_code == 200
    assert network.origins() == [str(Origin.of_url(httpx.URL(url)))]
    network.assert_kept()


@pytest.mark.anyio
async def test_a_request_that_is_sent_again_elsewhere_loses_its_tokens() -> None:
    """Way 9, by middleware: the same request object goes to the origin first, then elsewhere."""
    network = Network()
    async with bare_client(network) as client:
        request = client.build_request("GET", "/x")
        await client.send(request)
        request.url = httpx.URL("https://evil.example/x")
        await client.send(request)
        await client.send(request, auth=httpx.Auth())
        copied = client.build_request("GET", "https://evil.example/y", headers=request.headers)
        await client.send(copied, auth=httpx.Auth())
    assert len(network.seen) == 4
    network.assert_kept()


@pytest.mark.anyio
async def test_a_redirect_back_and_forth_shows_the_tokens_at_the_origin_only() -> None:
    network = Network({f"{BASE}/x": (302, "https://evil.example/x"), "https://evil.example/x": (302, f"{BASE}/y")})
    async with bare_client(network) as client:
        response = await client.get("/x")
    # The other origin chose the second path here: tokens on it would let that origin act in the user's name.
    assert response.status_code == 401
    assert network.origins() == [BASE, "https://evil.example", BASE]
    assert [network.has_tokens(index) for index in range(3)] == [True, False, False]


@pytest.mark.anyio
@pytest.mark.parametrize("refusal", [401, 403])
async def test_a_redirect_within_the_origin_gets_the_tokens_that_the_copy_lacks(refusal: int) -> None:
    network = Network({f"{BASE}/x": (307, "/y"), f"{BASE}/y": (308, "/z")})

    async def answer(request: httpx.Request) -> httpx.Response:
        response = await network(request)
        if not network.has_tokens(-1):
            return httpx.Response(refusal)
        return response

    auth = DualTokenAuth(PAIR, origin=BASE)
    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, auth=auth, base_url=BASE, follow_redirects=True) as client:
        response = await client.post("/x", content=b"body")
    assert response.status_code == 200
    assert str(response.url) == f"{BASE}/z"
    assert [network.has_tokens(index) for index in range(5)] == [True, False, True, False, True]
    assert {body for *_, body in network.seen} == {b"body"}


@pytest.mark.anyio
async def test_a_redirected_body_that_cannot_be_sent_again_is_not() -> None:
    """What cannot be replayed after the tokenless copy was refused stays refused."""

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/x":
            return httpx.Response(307, headers={"location": "/y"})
        assert b"".join([part async for part in request.stream]) == b"body"  # type: ignore[union-attr]
        return httpx.Response(401)

    async def body() -> AsyncIterator[bytes]:
        yield b"body"

    auth = DualTokenAuth(PAIR, origin=BASE)
    transport = httpx.MockTransport(answer)
    transport.handle_async_request = answer  # type: ignore[method-assign]  # which leaves the body unread
    async with httpx.AsyncClient(transport=transport, auth=auth, base_url=BASE, follow_redirects=True) as client:
        response = await client.post("/x", content=body())
    assert response.status_code == 401


# The short way


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(path=st.from_regex(r"/?[A-Za-z0-9._~/?&=,+:%@!$ -]{0,20}", fullmatch=True), base=st.sampled_from(["", "/v2"]))
def test_the_short_way_to_a_url_gives_what_the_long_way_gives(path: str, base: str) -> None:
    origin = Origin.parse(f"https://api.example:8443{base}")
    target, long = origin.target(path), origin._locate(path)
    short = None if target is None else origin.at(target)
    if short is not None:
        assert isinstance(long, httpx.URL)
        assert short == long
        assert (str(short), short.raw_path, short.query, short.params) == (
            str(long),
            long.raw_path,
            long.query,
            long.params,
        )
        assert origin.admits(short)


@pytest.mark.parametrize("path", ["/api/x", "api/x/", "/api/v1.2/x?a=1&b=2", "/a-b_c~d"])
def test_the_short_way_is_taken_by_plain_paths(path: str) -> None:
    origin, url = Origin.parse("https://api.example"), httpx.URL(f"https://api.example/{path.lstrip('/')}")
    target = origin.target(path)
    assert target == url.raw_path
    assert origin.at(target) == url


@pytest.mark.parametrize("path", ["/../x", "/a/./b", "//x/y", "/a//b", "/a?", "/a%2f", "/a:b", "/a b", "", "/a?b#c", 7])
def test_the_short_way_leaves_all_else_to_the_long_one(path: Any) -> None:
    assert Origin.parse("https://api.example").target(path) is None


def test_without_httpxs_private_name_there_is_only_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = httpx.URL("https://api.example/x"), httpx.URL("https://api.example:444/x")
    with monkeypatch.context() as patch:
        patch.setattr(httpx, "URL", type("URL", (), {"__init__": lambda self, url: None}))
        origin = Origin("https", "api.example", 443)
    assert origin.target("/x") is None
    assert origin.resolve("/x") == here
    assert origin.admits(here)
    assert not origin.admits(elsewhere)


# Links that a server gives

PAGE = httpx.URL(f"{BASE}/api/v1/sites?page=1")


@pytest.mark.parametrize(
    ("link", "url"),
    [
        ("?page=2", f"{BASE}/api/v1/sites?page=2"),
        ("sites/2", f"{BASE}/api/v1/sites/2"),
        ("../x?a=%2F", f"{BASE}/api/x?a=%2F"),
        ("/x#part", f"{BASE}/x"),
        ("//webapi.thelayer.com/x", f"{BASE}/x"),
        ("HTTPS://WEBAPI.thelayer.com:443/x", f"{BASE}/x"),
        ("?redirect=https://evil.invalid\\x", f"{BASE}/api/v1/sites?redirect=https://evil.invalid\\x"),
    ],
)
def test_a_link_is_relative_to_its_page(link: str, url: str) -> None:
    assert Origin.parse(f"{BASE}/api/v1").resolve_link(link, PAGE) == httpx.URL(url)


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("https://evil.invalid/s3cret", "leads to https://evil.invalid, and tokens go to https://webapi"),
        ("//evil.invalid/s3cret", "leads to https://evil.invalid, "),
        ("http://webapi.thelayer.com/s3cret", "leads to http://webapi.thelayer.com, "),
        ("https://webapi.thelayer.com:8443/s3cret", "leads to https://webapi.thelayer.com:8443, "),
        ("https://webapi.thelayer.com@evil.invalid/s3cret", "leads to https://evil.invalid, "),
        ("data:s3cret", "leads to no clear host, "),
        ("https://s3cret@webapi.thelayer.com/", "a user in it"),
        ("https://webapi.thelayer.com//evil.invalid", "two slashes"),
        ("/\\evil.invalid/s3cret", "a backslash"),
        ("\\\\evil.invalid\\s3cret", "a backslash"),
        ("/s3cret ", "white space"),
        ("/s3\ncret", "cannot be printed"),
        ("https://[::1/s3cret", "a valid URL"),
        ("https://h:99999999/s3cret", "leads to https://h:99999999, "),
    ],
)
def test_a_link_that_leads_elsewhere_is_refused_and_not_quoted(link: str, words: str) -> None:
    with pytest.raises(MalformedResponseError, match="It was not followed") as raised:
        Origin.parse(BASE).resolve_link(link, PAGE)
    assert words in str(raised.value)
    assert "s3cret" not in str(raised.value)
