"""Requests compared by what they mean, and the words for where they differ."""

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
    """Order of fields, labels of the caller and fresh ids make no other request."""
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
    """Each difference is told by the path of its field."""
    different = differences(request(**one), request(**other))

    assert [difference.path for difference in different] == [path]


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("https://api.openai.com/v1/responses", "path"),
        ("https://api.anthropic.com/v1/chat/completions", "host"),
        (f"{URL}?alt=sse", "query"),
    ],
)
def test_another_address_is_another_request(uri: str, path: str) -> None:
    """Host, path and query count."""
    different = differences(as_data("POST", URL, b""), as_data("POST", uri, b""))

    assert [difference.path for difference in different] == [path]


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
    """The free port of the day, an account and a region are no other host."""
    assert host_class(netloc) == kind


def test_fields_can_be_left_out() -> None:
    """A caller names fields that differ in each run, nested ones with dots."""
    body = b'{"seed": 1, "options": {"seed": 2, "top_k": 3}}'

    data = as_data("POST", URL, body, ["seed", "options.seed", "not.there"])

    assert data["body"] == {"options": {"top_k": 3}}


def test_a_body_that_is_no_json_is_compared_as_text() -> None:
    """An upload can be matched too."""
    one, other = as_data("POST", URL, b"\xffabc"), as_data("POST", URL, b"\xffabd")

    assert differences(one, one) == []
    assert [d.path for d in differences(one, other)] == ["body"]


def test_an_item_put_in_is_one_difference() -> None:
    """A message in the middle of a conversation does not make all that follow new."""
    was = [{"content": "a"}, {"content": "b"}, {"content": "c"}]
    now = [{"content": "a"}, {"content": "NEW"}, {"content": "b"}, {"content": "c"}]

    assert differences(was, now) == [Difference("[1]", NOTHING, {"content": "NEW"})]


def test_the_nearest_request_is_the_one_with_the_fewest_differences() -> None:
    """Of equals, it is the one whose text is most alike; an address weighs most."""
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


def test_long_texts_are_shown_where_they_part() -> None:
    """The reader does not search two pages for one word."""
    text = "word " * 100
    different = differences({"m": f"{text}old{text}"}, {"m": f"{text}new{text}"})

    lines = explain(different).splitlines()

    assert lines[0] == "  m"
    assert lines[1].startswith("    recorded: …word word")
    assert "word old" in lines[1]
    assert "word new" in lines[2]
    assert max(map(len, lines)) < 130


def test_many_differences_are_cut() -> None:
    """A wholly different request does not fill the screen."""
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
    """Any provider's request is told by its address, model and last words."""
    assert summary(request(**body)) == line
