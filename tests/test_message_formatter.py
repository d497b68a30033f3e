"""Messages: who said what, seen from one person's side."""

import copy
from enum import Enum, StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipeo_llm.domain import LLMService, Message, PersonLLMConfig
from dipeo_llm.message_formatter import MessageFormatter
from dipeo_llm.system_prompt_handler import SystemPromptHandler

PICTURE = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
]


def said(by: Any, content: Any, to: Any = "anybody") -> Any:
    """Make what an application's own message looks like."""
    return SimpleNamespace(from_person_id=by, to_person_id=to, content=content)


def format_for(person_id: Any, *messages: Any, **options: Any) -> list[dict[str, Any]]:
    """Format messages as one person sees them."""
    return MessageFormatter().format_messages_for_llm(messages, person_id, **options)


def test_what_i_said_is_the_assistants_and_the_rest_the_users() -> None:
    """A person's own words are the assistant's; everybody else's are the user's."""
    messages = format_for(
        "me",
        said("system", "Begin."),
        said("me", "Hello."),
        said("you", "Hi."),
        said("them", "Hey."),
    )

    assert messages == [
        {"role": "user", "content": "Begin."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Hi."},
        {"role": "user", "content": "Hey."},
    ]


def test_one_conversation_has_two_sides() -> None:
    """The same messages read the other way round for the other person."""
    talk = [said("a", "1"), said("b", "2"), said("a", "3")]

    sides = [[m["role"] for m in format_for(person, *talk)] for person in "ab"]

    assert sides == [
        ["assistant", "user", "assistant"],
        ["user", "assistant", "user"],
    ]


def test_a_person_named_system_is_itself() -> None:
    """The id "system" is like any other: its own words are the assistant's."""
    assert format_for("system", said("system", "x"))[0]["role"] == "assistant"


def test_no_messages_are_no_messages() -> None:
    """An empty conversation without a prompt gives an empty list."""
    assert format_for("me") == []


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("service", [*LLMService, "groq", None])
def test_the_system_prompt_comes_first_in_the_role_it_is_given(
    role: str, service: Any
) -> None:
    """The prompt is in front, under the caller's role, whatever the service."""
    messages = format_for(
        "me",
        said("you", "Hi."),
        system_prompt=" Be\nbrief. ",
        service=service,
        system_role=role,
    )

    assert messages == [
        {"role": role, "content": " Be\nbrief. "},
        {"role": "user", "content": "Hi."},
    ]


@pytest.mark.parametrize("prompt", [None, "", " ", "\n\t"])
def test_a_prompt_that_says_nothing_makes_no_message(prompt: str | None) -> None:
    """Providers refuse an empty system prompt, so none is made."""
    messages = format_for("me", said("you", "Hi."), system_prompt=prompt)

    assert messages == [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize("nothing", ["", "  ", "\n", None, [], ()])
def test_a_message_that_says_nothing_is_left_out(nothing: Any) -> None:
    """An empty message, which Anthropic would refuse, is not formatted."""
    messages = format_for("me", said("you", "a"), said("me", nothing), said("you", "b"))

    assert [message["content"] for message in messages] == ["a", "b"]


@pytest.mark.parametrize("content", [" spaced ", "0", "line\r\n", "🌍", PICTURE])
def test_content_is_passed_on_as_it_is(content: Any) -> None:
    """Text keeps its white space, and content parts keep their form."""
    assert format_for("me", said("you", content))[0]["content"] == content


class _Plain(Enum):
    ME = "me"


class _Text(StrEnum):
    ME = "me"


@pytest.mark.parametrize("person_id", ["me", _Plain.ME, _Text.ME], ids=repr)
@pytest.mark.parametrize("by", ["me", _Plain.ME, _Text.ME], ids=repr)
def test_ids_are_compared_by_their_text(person_id: Any, by: Any) -> None:
    """An id may be a string or an enum on either side."""
    assert format_for(person_id, said(by, "x"))[0]["role"] == "assistant"


def test_our_messages_and_foreign_ones_mix() -> None:
    """A Message and an application's own class stand side by side."""
    ours = Message(from_person_id="me", to_person_id="you", content="a")

    messages = format_for("me", ours, said("you", "b"))

    assert [message["role"] for message in messages] == ["assistant", "user"]


def test_any_iterable_will_do() -> None:
    """Messages may come from a generator."""
    talk = (said("you", text) for text in "ab")

    messages = MessageFormatter().format_messages_for_llm(talk, "me")

    assert [message["content"] for message in messages] == ["a", "b"]


def test_formatting_changes_nothing_that_it_is_given() -> None:
    """Messages and their parts are as they were, and two runs give the same."""
    talk = [said("you", copy.deepcopy(PICTURE)), said("me", ""), said("me", "x")]
    before = copy.deepcopy(talk)

    first = format_for("me", *talk, system_prompt="p")
    second = format_for("me", *talk, system_prompt="p")

    assert talk == before
    assert first == second


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["me", "you", "system"]), st.sampled_from(["", "a", "b"])
        )
    )
)
def test_order_and_neighbours_are_kept(talk: list[tuple[str, str]]) -> None:
    """Every message with content is there, once, in its place, joined to no other."""
    messages = format_for("me", *(said(by, text) for by, text in talk))

    assert messages == [
        {"role": "assistant" if by == "me" else "user", "content": text}
        for by, text in talk
        if text
    ]


@pytest.mark.parametrize(
    ("service", "role"),
    [
        (LLMService.OPENAI, "developer"),
        ("anthropic", "system"),
        (LLMService.GOOGLE, "system"),
        (LLMService.OLLAMA, "system"),
    ],
)
def test_preparing_finds_the_prompt_and_its_role(
    tmp_path: Path, service: Any, role: str
) -> None:
    """One call reads the prompt file and formats the conversation for the service."""
    (tmp_path / "prompt.txt").write_text("Be brief.")
    config = PersonLLMConfig(service=service, model="m", prompt_file="prompt.txt")

    messages = MessageFormatter().prepare_llm_messages(
        [said("you", "Hi.")], "me", config, SystemPromptHandler(tmp_path)
    )

    assert messages == [
        {"role": role, "content": "Be brief."},
        {"role": "user", "content": "Hi."},
    ]


def test_preparing_without_a_prompt_adds_none(tmp_path: Path) -> None:
    """A person without a prompt has only its conversation."""
    config = SimpleNamespace(service="openai", model="m")

    messages = MessageFormatter().prepare_llm_messages(
        [said("you", "Hi.")], "me", config, SystemPromptHandler(tmp_path)
    )

    assert messages == [{"role": "user", "content": "Hi."}]
