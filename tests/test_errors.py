"""The error tree: what each error is, says, and keeps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import httpx
import pytest

from layer_async import _errors as errors
from layer_async._errors import (
    APIStatusError,
    AttemptInfo,
    LayerError,
    RequestInfo,
    ResponseDecodeError,
    error_class,
    scrub,
    status_error,
)

REQUEST = RequestInfo("GET", "https://webapi.thelayer.com/api/x")
ATTEMPTS = (AttemptInfo(1, "503", 503, 0.1, 0.5), AttemptInfo(2, "ReadTimeout", None, 30.0))

EXAMPLES: dict[str, dict[str, Any]] = {
    "APITimeoutError": {"phase": "read"},
    "DeadlineExceededError": {"phase": "queue"},
    "ResponseDecodeError": {"path": "$[3].name"},
}


def example(name: str) -> LayerError:
    cls: type[LayerError] = getattr(errors, name)
    own: dict[str, Any] = EXAMPLES.get(name, {})
    if issubclass(cls, APIStatusError):
        own = {
            "status_code": 418,
            "headers": httpx.Headers({"x": "y"}),
            "body": b"b",
            "request_id": "r",
            "retry_after": 1.5,
        }
    return cls("it went wrong.", request=REQUEST, attempts=ATTEMPTS, maybe_processed=True, **own)


NAMES = [name for name in errors.__all__ if name not in ("AttemptInfo", "RequestInfo")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("twin", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy, copy.copy])
def test_an_error_survives_pickle_and_copy_with_all_it_knows(name: str, twin: Any) -> None:
    error = example(name)
    again = twin(error)
    assert type(again) is type(error)
    assert again.args == error.args
    assert again.__dict__ == error.__dict__
    assert str(again) == str(error)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_says_which_call_what_happened_and_what_each_attempt_met(name: str) -> None:
    text = str(example(name))
    assert text == (
        "GET https://webapi.thelayer.com/api/x: it went wrong. (after 2 attempts: 503, ReadTimeout) "
        "The server may have processed the request: look before you send it again."
    )


def test_an_error_without_context_says_just_what_happened() -> None:
    assert str(LayerError("no.")) == "no."
    assert LayerError("no.").attempts == ()
    assert ResponseDecodeError("no.").path == "$"


def test_the_tree_is_as_drawn() -> None:
    def below(cls: type[Exception]) -> dict[str, Any]:
        return {child.__name__: below(child) for child in cls.__subclasses__() if child.__module__ == errors.__name__}

    assert below(LayerError) == {
        "ConfigurationError": {"MissingTokensError": {}},
        "ClientClosedError": {},
        "APIConnectionError": {"APITimeoutError": {"DeadlineExceededError": {}}, "MalformedResponseError": {}},
        "APIStatusError": {
            "BadRequestError": {},
            "AuthenticationError": {},
            "PermissionDeniedError": {},
            "NotFoundError": {},
            "ConflictError": {},
            "UnprocessableEntityError": {},
            "RateLimitError": {},
            "ServerError": {},
        },
        "ResponseDecodeError": {},
    }
    drawing = errors.__doc__ or ""
    assert all(name in drawing for name in NAMES)
    assert issubclass(errors.ConfigurationError, ValueError)
    assert issubclass(errors.APITimeoutError, TimeoutError)


def test_a_status_has_the_class_of_the_table() -> None:
    assert error_class(500) is error_class(599) is errors.ServerError
    assert error_class(418) is error_class(302) is error_class(600) is APIStatusError


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"message": "gone"}', "gone"),
        (b'{"error": {"status": 404, "message": "gone"}}', "gone"),
        (b'{"errors": [{"Detail": "gone"}]}', "gone"),
        (b'[{"title": "gone"}]', "gone"),
        (b'"gone"', "gone"),
        (b'{"code": 7}', '{"code": 7}'),
        (b"[]", "[]"),
        (b"plain\r\n\x1b[31mtext", "plain [31mtext"),
        (b"<!doctype HTML><HTML><style>a{}</style><b>Bad</b> Gateway</HTML>", "Bad Gateway"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 500, "x" * 199 + "\u2026"),
        (b"[" * 30_000 + b"]" * 30_000, "[" * 199 + "\u2026"),
    ],
)
def test_the_servers_own_words_are_found_and_bounded(body: bytes, words: str) -> None:
    error = status_error(httpx.Response(418), body)
    assert str(error) == f"418 I'm a teapot. The server says: {words}"


def test_an_empty_body_says_nothing() -> None:
    assert str(status_error(httpx.Response(418), b"")) == "418 I'm a teapot."
    assert str(status_error(httpx.Response(599), b"")) == "599."


def test_token_values_are_scrubbed_from_all_that_the_server_said() -> None:
    response = httpx.Response(
        400, headers={"X-Echo": "hush-1", "X-Request-Id": "id-hush-2"}, extensions={"reason_phrase": b"hush-1"}
    )
    error = status_error(response, b'{"message": "hush-1 and hush-2"}', secrets=("hush-1", "hush-2"))
    shown = f"{error} {error!r} {error.headers} {error.body!r} {error.request_id} {pickle.dumps(error)!r}"
    assert "hush" not in shown
    assert scrub("a hush-1 b", ["hush-1"]) == "a *** b"


TOKEN = "Qm9i+c2Vj/cmV0"


@pytest.mark.parametrize(
    "echo",
    [
        rb'{"message": "invalid token Qm9i\u002Bc2Vj\/cmV0"}',
        b"token=Qm9i%2Bc2Vj%2fcmV0",
        b"<html><p>Qm9i&#43;c2Vj&#x2F;cmV0</p></html>",
        b"<html><p>Qm9i+c2V<wbr>j/cmV0</p></html>",
        b"<html><p>Qm9i&plus;c2Vj&sol;cmV0</p></html>",
        b"qM9I+C2vJ/CMv0",
        TOKEN.encode("utf-16"),
        b"x" * (64 * 1024 - 9) + TOKEN.encode(),
    ],
)
def test_a_token_that_the_server_echoes_in_another_spelling_is_scrubbed_too(echo: bytes) -> None:
    error = status_error(httpx.Response(401), echo, secrets=(TOKEN,))
    shown = f"{error} {error.body.decode('latin-1')}".lower().replace("\x00", "")
    for spelling in ("qm9i+c2vj", "qm9i\\u002bc2", "qm9i%2bc2", "qm9i&#43;c2", "qm9i&plus;"):
        assert spelling not in shown


def test_a_body_of_any_bytes_is_kept_as_it_came() -> None:
    body = bytes(range(256)) * 10
    assert status_error(httpx.Response(400), body, secrets=("hush-hush",)).body == body
    assert len(status_error(httpx.Response(400), b"x" * 100_000, secrets=("hush-hush",)).body) == 64 * 1024


@pytest.mark.parametrize("body", [b"<html" + b"<" * 65_000, b"<html>" + b"<script" * 9_300, b'{"error":' * 1_500])
def test_an_error_body_keeps_nobody_busy(body: bytes) -> None:
    assert len(str(status_error(httpx.Response(400), body))) < 300


def test_a_very_deep_error_body_is_no_error_of_its_own() -> None:
    assert str(status_error(httpx.Response(400), b"[" * 900 + b"]" * 900)).startswith("400")
    assert str(status_error(httpx.Response(400), b'{"error":' * 900 + b'"x"' + b"}" * 900)).startswith("400")


def test_a_request_is_shown_without_user_query_and_fragment() -> None:
    request = httpx.Request("GET", "https://user:pass@host.invalid:8443/api/x%0AERROR%20forged?q=1#f")
    assert str(RequestInfo.of(request)) == "GET https://host.invalid:8443/api/x%0AERROR%20forged"
