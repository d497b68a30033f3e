"""Requests compared by what they mean, and the description of a difference."""

import json
from typing import Any

import pytest

from dipeo_llm.testing.matching import (
    NOTHING,
    Difference,
    as_data,
    differences,
    explain,
    host_class,
    nearest,
    summary,
)

URL = "https://api.openai.com/v1/chat/completions"


def request(**body: Any) -> dict[str, Any]:
    """Make the data of a request with this JSON."""
    return as_data("POST", URL, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1.0}),
        ({"a": 1}, {"a": 1, "seed": None}),
        ({"a": 1}, {"a": 1, "stream": False}),
        ({"a": 1, "user": "ann"}, {"a": 1, "user": "bob"}),
        ({"a": 1}, {"a": 1, "metadata": {"run": "7"}}),
        ({"a": 1}, {"a": 1, "prompt_cache_key": "x", "safety_identifier": "y"}),
        (
            {"messages": [{"tool_calls": [{"type": "function", "id": "call_a"}]}]},
            {"messages": [{"tool_calls": [{"type": "function", "id": "call_b"}]}]},
        ),
        (
            {"m": [{"type": "tool_use", "id": "t1"}, {"tool_use_id": "t1"}]},
            {"m": [{"type": "tool_use", "id": "t9"}, {"tool_use_id": "t9"}]},
        ),
    ],
)
def test_what_does_not_change_the_meaning_does_not_count(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Order of fields, labels of the caller and fresh ids do not count."""
    assert differences(request(**one), request(**other)) == []


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        ({"model": "a"}, {"model": "b"}, "body.model"),
        ({"stream": False}, {"stream": True}, "body.stream"),
        ({"n": 1}, {"n": True}, "body.n"),
        ({}, {"tools": [{"name": "x"}]}, "body.tools"),
        ({"tools": [1]}, {}, "body.tools"),
        ({"m": [{"role": "user"}]}, {"m": [{"role": "system"}]}, "body.m[0].role"),
        (
            {"m": [{"type": "tool_use", "id": "1"}, {"tool_use_id": "1"}]},
            {"m": [{"type": "tool_use", "id": "1"}, {"tool_use_id": "2"}]},
            "body.m[1].tool_use_id",
        ),
        ({"nested": {"user": "a"}}, {"nested": {"user": "b"}}, "body.nested.user"),
    ],
)
def test_what_changes_the_meaning_is_named(
    one: dict[str, Any], other: dict[str, Any], path: str
) -> None:
    """Each difference has the path of its field."""
    different = differences(request(**one), request(**other))

    assert [difference.path for difference in different] == [path]


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("https://api.openai.com/v1/responses", "path"),
        ("https://api.anthropic.com/v1/chat/completions", "host"),
        (f"{URL}?alt=sse", "query"),
        (f"{URL}?a=1&a=2", "query"),
    ],
)
def test_another_address_is_another_request(uri: str, path: str) -> None:
    """Host, path and query count."""
    different = differences(as_data("POST", URL, b""), as_data("POST", uri, b""))

    assert [difference.path for difference in different] == [path]


@pytest.mark.parametrize(
    ("one", "other", "paths"),
    [
        ("a=1&a=2", "a=1&a=2", []),
        ("a=1&b=2", "b=2&a=1", []),
        ("a=1&a=2", "a=3&a=2", ["query.a[0]"]),
        ("a=1&a=2", "a=2", ["query.a"]),
        ("key=one&a=1", "a=1", []),
        ("a=1&sig=one", "a=1&sig=two", []),
    ],
)
def test_every_value_of_a_query_counts(one: str, other: str, paths: list[str]) -> None:
    """Also of a repeated parameter; only one that carries a key does not."""
    different = differences(
        as_data("GET", f"{URL}?{one}", b""), as_data("GET", f"{URL}?{other}", b"")
    )

    assert [difference.path for difference in different] == paths


FORM = "application/x-www-form-urlencoded"


def upload(boundary: str, content: str) -> dict[str, Any]:
    """Make the data of an upload."""
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1'
        f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="file"; '
        'filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        f"{content}\r\n--{boundary}--\r\n"
    )
    kind = f"multipart/form-data; boundary={boundary}"
    return as_data("POST", URL, body.encode(), content_type=kind)


def test_an_upload_is_compared_by_its_parts() -> None:
    """The boundary is new each time; a file is a field."""
    assert differences(upload("one", "la"), upload("two", "la")) == []
    assert differences(upload("one", "la"), upload("two", "li")) == [
        Difference("body.file.content", "la", "li")
    ]


def test_a_form_is_compared_by_its_fields() -> None:
    """In any order; the values of a repeated field in theirs."""
    one = as_data("POST", URL, b"a=1&b=x+y&a=2", content_type=FORM)
    other = as_data("POST", URL, b"b=x%20y&a=1&a=2", content_type=FORM)

    assert one["body"] == {"a": ["1", "2"], "b": "x y"}
    assert differences(one, other) == []


@pytest.mark.parametrize(
    ("netloc", "kind"),
    [
        ("127.0.0.1:43117", "loopback"),
        ("localhost", "loopback"),
        ("[::1]:80", "loopback"),
        ("API.openai.com:443", "api.openai.com"),
        ("user:secret@api.openai.com", "api.openai.com"),
        ("gateway.example:8443", "gateway.example:8443"),
        ("my-team.openai.azure.com", "*.openai.azure.com"),
        (
            "bedrock-runtime.us-east-1.amazonaws.com",
            "bedrock-runtime.*.amazonaws.com",
        ),
        (
            "us-central1-aiplatform.googleapis.com",
            "*-aiplatform.googleapis.com",
        ),
    ],
)
def test_hosts_are_compared_by_kind(netloc: str, kind: str) -> None:
    """A free port, an account and a region do not count."""
    assert host_class(netloc) == kind


def test_fields_can_be_left_out() -> None:
    """A caller lists fields that differ in each run, nested ones with dots."""
    body = b'{"seed": 1, "options": {"seed": 2, "top_k": 3}}'

    data = as_data("POST", URL, body, ["seed", "options.seed", "not.there"])

    assert data["body"] == {"options": {"top_k": 3}}


def test_a_binary_body_is_compared_as_text() -> None:
    """Bytes that are not UTF-8 are compared too."""
    one, other = as_data("POST", URL, b"\xffabc"), as_data("POST", URL, b"\xffabd")

    assert differences(one, one) == []
    assert [d.path for d in differences(one, other)] == ["body"]


def test_an_inserted_item_is_one_difference() -> None:
    """The messages after a new one are still the same."""
    was = [{"content": "a"}, {"content": "b"}, {"content": "c"}]
    now = [{"content": "a"}, {"content": "NEW"}, {"content": "b"}, {"content": "c"}]

    assert differences(was, now) == [Difference("[1]", NOTHING, {"content": "NEW"})]


def test_the_nearest_request_is_the_one_with_the_fewest_differences() -> None:
    """Among equals the most similar text wins; an address weighs most."""
    asked = request(model="a", messages=["Say hello to Ann."])
    elsewhere = as_data(
        "POST", f"{URL}/x", b'{"model":"a","messages":["Say hello to A."]}'
    )
    candidates = [
        elsewhere,
        request(model="b", messages=["Say hello to Bob."]),
        request(model="a", messages=["Count to ten."]),
        request(model="a", messages=["Say hello to Bob."]),
    ]

    assert nearest(asked, candidates) == 3


def test_long_texts_are_shown_around_their_first_difference() -> None:
    """Nobody has to search two pages for one word."""
    text = "word " * 100
    different = differences({"m": f"{text}old{text}"}, {"m": f"{text}new{text}"})

    lines = explain(different).splitlines()

    assert lines[0] == "  m"
    assert lines[1].startswith("    recorded: …word word")
    assert "word old" in lines[1]
    assert "word new" in lines[2]
    assert max(map(len, lines)) < 130


def test_many_differences_are_cut() -> None:
    """A completely different request does not fill the screen."""
    different = differences({}, {f"field{i}": i for i in range(20)})

    assert explain(different, most=3).splitlines()[-1] == "  … and 17 more"


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            {"model": "m", "messages": [{"role": "user", "content": "Hi  there"}]},
            "POST api.openai.com/v1/chat/completions, model m: 'Hi there'",
        ),
        (
            {"contents": [{"parts": [{"text": "Hi"}]}]},
            "POST api.openai.com/v1/chat/completions: 'Hi'",
        ),
        (
            {"model": "m", "input": "Hi"},
            "POST api.openai.com/v1/chat/completions, model m: 'Hi'",
        ),
        ({"messages": [{}]}, "POST api.openai.com/v1/chat/completions"),
    ],
)
def test_a_request_fits_in_one_line(body: dict[str, Any], line: str) -> None:
    """A request of any provider has its address, model and last message."""
    assert summary(request(**body)) == line
