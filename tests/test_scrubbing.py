"""Keys, and other secrets, found and removed wherever they are."""

import base64
import json
import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipeo_llm.key_shapes import is_like_key, pattern_of
from dipeo_llm.testing.cassette_file import Exchange, scrub
from dipeo_llm.testing.exchange import Answer, Request
from dipeo_llm.testing.scrubbing import (
    PLACEHOLDER,
    Secrets,
    is_secret_header,
    join_events,
)

KEY = 'my"own/key+of=this\\run'


@pytest.mark.parametrize(
    "text",
    [
        "sk-proj-abcdefghijklmnop1234",
        "sk-ant-api03-abcdefghijklmnop-1234_AA",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "gsk_abcdefghij0123456789",
        "nvapi-abcdefghij-0123456789_AB",
        "key-0123456789abcdef0123456789abcdef",
        "xoxb-1234567890-abcdef",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijkl",
        "Bearer abcdefghij0123456789",
        "bearer  abc.def-123456",
        "org-abcdefghij0123456789",
        "req_011CabcdefghijKLM123",
        '"api_key": "whatever it is"',
        r'{"arguments": "{\"api_key\": \"nested\"}"}',
        '"Authorization":"Basic dXNlcjpwYXNz"',
        '"request_id":"anything"',
        "https://host/path?key=abc&alt=sse",
        "https://host/path?alt=sse&X-Amz-Signature=abc",
        "https://user:password@host/path",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str) -> None:
    """A secret of a known shape needs no list of keys."""
    secrets = Secrets()

    clean = secrets.scrub(f"before {text} after")

    assert secrets.find(f"before {text} after")
    assert PLACEHOLDER in clean
    assert secrets.find(clean) == []
    assert clean.startswith("before ")
    assert clean.endswith(" after")


@pytest.mark.parametrize(
    "text",
    [
        "task-management-with-a-long-name",
        "a basic understanding of bearer certificates",
        "the user-authentication and org-structure pages",
        '{"authorization": {"type": "string"}, "api_key": 7}',
        "https://host/path?alt=sse&keyword=abc",
        "https://host:8080/a@b",
        "call_abcdefghij0123456789 chatcmpl-abcdefghij0123456789",
        "sk-short",
        '<div class="sk-toggleable__content" id="sk-estimator-id-123">',
        "key-value-pairs-of-a-long-configuration",
        f'"api_key": "{PLACEHOLDER}"',
    ],
)
def test_what_only_sounds_like_a_secret_stays(text: str) -> None:
    """Ordinary words stay in a prompt."""
    assert Secrets().find(text) == []
    assert Secrets().scrub(text) == text


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"it is {KEY}!",
        json.dumps({"content": f"the key is {KEY}"}),
        json.dumps({"arguments": json.dumps({"k": KEY})}),
        f"https://host/{quote(KEY, safe='')}/x",
        f"https://host/{re.sub('%..', lambda c: c[0].lower(), quote(KEY, safe=''))}/x",
        json.dumps({"content": KEY}).replace("/", "\\/"),
        json.dumps({"a": json.dumps({"k": KEY}).replace("/", "\\/")}),
        json.dumps({"a": json.dumps({"k": KEY})}).replace("/", "\\/"),
        json.dumps({"a": json.dumps({"k": KEY}).replace("/", "\\/")}).replace(
            "/", "\\/"
        ),
    ],
)
def test_a_known_key_is_taken_out_wherever_it_stands(text: str) -> None:
    """In text, in JSON, in JSON inside JSON and in a URL."""
    secrets = Secrets([KEY])

    clean = secrets.scrub(text)

    assert PLACEHOLDER in clean
    assert secrets.find(clean) == []
    assert not re.search(r"own.{1,4}key", clean)


@pytest.mark.parametrize("before", ["", "u:", "user:"])
def test_a_known_key_in_base64_is_found_and_left(before: str) -> None:
    """It cannot be removed without breaking the data around it, so it is reported."""
    secrets = Secrets([KEY])
    text = base64.b64encode(f"{before}{KEY}:after".encode()).decode()

    found = [finding.what for finding in secrets.find(text)]

    assert found == ["a key of this run, in Base64"]
    assert secrets.scrub(text) == text


@pytest.mark.parametrize(
    "value",
    [
        "",
        "short",
        " sk-1 ",
        "lm-studio",
        "not-needed",
        "no_key_required",
        "anonymous",
        PLACEHOLDER,
    ],
)
def test_a_value_that_any_text_may_hold_is_replaced_only_where_a_key_stands(
    value: str,
) -> None:
    """A local server's dummy key does not take every such word out of a prompt."""
    secrets = Secrets([value])
    secrets.learn_from_headers({"authorization": f"Bearer {value}"})
    text = f"I use {value} here"

    assert len(secrets) == 0
    assert secrets.scrub(text) == text
    if value:
        url = secrets.scrub(f"https://host/?key={value.strip()}")
        assert url == f"https://host/?key={PLACEHOLDER}"
        field = secrets.scrub(json.dumps({"api_key": value}))
        assert json.loads(field) == {"api_key": PLACEHOLDER}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sk-1", True),
        ("nvapi-x", True),
        ("AKIAIOSFODNN7EXAMPLE", True),
        ("0123456789abcdef0123456789abcdef", True),
        ("x" * 65, True),
        ("openai", False),
        ("anthropic-team-a", False),
        ("task-key", False),
    ],
)
def test_a_key_in_place_of_its_id_is_recognised(text: str, expected: bool) -> None:
    """A message then does not repeat it."""
    assert is_like_key(text) is expected


def test_a_pattern_finds_every_spelling_and_short_keys_as_words() -> None:
    """A key of one letter does not take that letter out of every word."""
    pattern = pattern_of({KEY, "a"})
    assert pattern is not None
    texts = [KEY, json.dumps(KEY), quote(KEY, safe=""), "a, a-b and ab"]

    assert [pattern.sub("*", text) for text in texts] == [
        "*",
        '"*"',
        "*",
        "*, a-b and ab",
    ]
    assert pattern_of(set()) is pattern_of({""}) is None


def test_keys_are_learned_from_headers_and_environment() -> None:
    """The value counts without its scheme; other values are not secrets."""
    secrets = Secrets()
    secrets.learn_from_headers(
        {
            "Authorization": "Bearer value-one",
            "X-Api-Key": "value-two",
            "x-goog-api-key": "value-three",
            "Cookie": "value-four",
            "accept": "application/json",
        }
    )
    secrets.learn_from_environment(
        {"GROQ_API_KEY": "value-five", "HOME": "/home/somebody"}
    )

    text = "value-one value-two value-three value-four value-five"
    kept = "application/json /home/somebody Bearer"
    assert secrets.scrub(f"{text} {kept}") == f"{' '.join([PLACEHOLDER] * 5)} {kept}"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("Authorization", True),
        ("x-api-key", True),
        ("X-Goog-Api-Key", True),
        ("api-key", True),
        ("Set-Cookie", True),
        ("OpenAI-Organization", True),
        ("anthropic-organization-id", True),
        ("X-Request-ID", True),
        ("cf-ray", True),
        ("content-type", False),
        ("x-ratelimit-remaining-tokens", False),
        ("retry-after", False),
    ],
)
def test_headers_with_secrets_are_known(name: str, secret: bool) -> None:
    """Keys, cookies, organisations and request ids, by any provider's name."""
    assert is_secret_header(name) is secret


KEPT_OF_A_REQUEST = {"Content-Type": "application/json", "anthropic-version": "1"}
KEPT_OF_AN_ANSWER = {"Content-Type": ["text/plain"], "retry-after": ["7"]}


def kept(secrets: Secrets) -> Exchange:
    """Scrub an exchange that holds more than may be kept."""
    request = Request(
        "POST",
        f"https://host/{quote(KEY, safe='')}/x?key=short&alt=sse",
        {**KEPT_OF_A_REQUEST, "Authorization": "a", "user-agent": "b", "x-new": "c"},
        b"{}",
    )
    headers = {
        **KEPT_OF_AN_ANSWER,
        "set-cookie": ["a=b"],
        "x-new": ["c"],
        "x-request-id": ["d"],
    }
    answer = Answer(200, "OK", headers, [(b"{}", 0)], failure=None)
    return scrub(Exchange(request, answer), secrets)


def test_of_a_requests_headers_only_the_harmless_are_kept() -> None:
    """An unknown header may hold a key."""
    assert dict(kept(Secrets()).request.headers) == KEPT_OF_A_REQUEST


def test_of_an_answers_headers_only_the_harmless_are_kept() -> None:
    """A request id stays by its name only."""
    headers = kept(Secrets()).answer.headers

    assert headers == {**KEPT_OF_AN_ANSWER, "x-request-id": [PLACEHOLDER]}


def test_the_address_is_scrubbed() -> None:
    """A key in the path and a key in the query are removed."""
    uri = kept(Secrets([KEY])).request.uri

    assert uri == f"https://host/{PLACEHOLDER}/x?key={PLACEHOLDER}&alt=sse"


def test_overlapping_secrets_become_one() -> None:
    """A key inside a secret field leaves one placeholder."""
    secrets = Secrets(["abcdefghij", "my-sk-abcdefgh"])

    clean = secrets.scrub(
        '{"api_key": "x-abcdefghij-y", "a": "my-sk-abcdefghijklmnop9"}'
    )

    assert clean == f'{{"api_key": "{PLACEHOLDER}", "a": "{PLACEHOLDER}"}}'


def test_the_text_of_other_languages_is_not_touched() -> None:
    """A key between characters of several bytes is cut out exactly."""
    secrets = Secrets(["clé-sécrète"])

    clean = secrets.scrub("é sk-abcdefghijklmnop1234é 日本 clé-sécrète 日本")

    assert clean == f"é {PLACEHOLDER}é 日本 {PLACEHOLDER} 日本"


@given(
    parts=st.lists(st.sampled_from(["aé", "-", KEY, "日 ", "x" * 9]), max_size=8),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_pieces_stay_pieces_of_the_clean_body(
    parts: list[str], cuts: list[int]
) -> None:
    """However a body was cut, the pieces join to it, and the text outside stays."""
    body = "".join(parts).encode()
    ends = sorted(min(cut, len(body)) for cut in cuts)

    clean, moved = Secrets([KEY]).scrub_pieces(body, ends)

    assert clean.decode() == "".join(parts).replace(KEY, PLACEHOLDER)
    assert list(moved) == sorted(moved)
    assert all(0 <= cut <= len(clean) for cut in moved)
    inside = {
        at
        for key in re.finditer(re.escape(KEY.encode()), body)
        for at in range(key.start() + 1, key.end())
    }
    for cut, new in zip(ends, moved, strict=True):
        if cut not in inside:
            assert clean[:new] == Secrets([KEY]).scrub_pieces(body[:cut], ())[0]


def test_the_text_of_a_streams_events_is_joined() -> None:
    """A key that a model repeats in pieces is found."""
    events = [
        {"choices": [{"delta": {"content": piece}}], "id": "x"}
        for piece in ("my ", "sk-abcd", "efghijkl", "mnop1234")
    ]
    sse = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    lines = "".join(f"{json.dumps(event)}\n" for event in events)

    for body in (f"{sse}data: [DONE]\n\n", lines):
        assert "my sk-abcdefghijklmnop1234" in join_events(body)
        assert Secrets().find(body) == []
