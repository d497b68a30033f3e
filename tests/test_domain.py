"""The words of a conversation, and a person that holds one."""

import asyncio
import math
import typing
import warnings
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dipeo_llm.domain import (
    OPTIONS,
    CallOptions,
    ChatResult,
    ImageGenerationResult,
    LLMRequestOptions,
    LLMService,
    Message,
    Person,
    PersonLLMConfig,
    ServiceName,
    TokenUsage,
    ToolCall,
    ToolConfig,
    ToolOutput,
    ToolType,
    WebSearchResult,
    person_defaults,
    request_from_options,
)
from dipeo_llm.errors import DiPeOLLMError, InvalidRequestError, RateLimitError
from dipeo_llm.ports import LLMServicePort
from dipeo_llm.service import LLMInfraService
from tests.provider_server import Answer, ProviderServer, error

USER = [{"role": "user", "content": "hello"}]


class PlainService(Enum):
    """An application's own enum of services."""

    OPENAI = "openai"


class TextService(StrEnum):
    """Another one, whose members are strings."""

    OPENAI = "openai"


class Weather(BaseModel):
    """A form for an answer."""

    sunny: bool


class Climate(BaseModel):
    """Another form."""

    warm: bool


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": Weather}, Weather),
    ({"text_format": Weather}, Weather),
    ({"response_format": Weather, "text_format": Climate}, Weather),
    ({"response_format": None, "text_format": Climate}, Climate),
    ({"options": LLMRequestOptions(response_format=Weather)}, Weather),
    ({"options": SimpleNamespace(text_format=Weather)}, Weather),
    (
        {
            "options": LLMRequestOptions(response_format=Weather),
            "text_format": Climate,
        },
        Climate,
    ),
]


class Port:
    """Stands in for a service: it remembers one call and answers by a function."""

    def __init__(self, answer: Callable[[], ChatResult]) -> None:
        self.answer = answer
        self.called: dict[str, Any] = {}

    async def complete_with_person(self, **call: Any) -> ChatResult:
        """Answer as the function does."""
        self.called = call
        await asyncio.sleep(0)
        return self.answer()


def person(*messages: Message) -> Person:
    """Make a person with a memory."""
    config = PersonLLMConfig(
        service=LLMService.OPENAI, model="gpt-4.1-nano", api_key_id="openai"
    )
    return Person("ada", "Ada", config, messages)


def port(answer: Callable[[], ChatResult]) -> Any:
    """Make a port as a Person takes it."""
    return Port(answer)


def spoken(messages: list[Any]) -> list[tuple[str, str, Any]]:
    """Say of messages who spoke to whom, and what."""
    return [(m.from_person_id, m.to_person_id, m.content) for m in messages]


# --- the models


def test_the_services_have_their_names() -> None:
    """The services that DiPeO names are all there, under their values."""
    assert {service.value for service in LLMService} == {
        "openai",
        "anthropic",
        "google",
        "gemini",
        "ollama",
        "bedrock",
        "vertex",
        "deepseek",
    }
    assert [f"{LLMService.OPENAI}", str(LLMService.GEMINI)] == ["openai", "gemini"]


def test_a_message_needs_a_speaker_a_listener_and_a_content() -> None:
    """The three fields that a message cannot do without are required."""
    with pytest.raises(ValidationError) as caught:
        Message.model_validate({})

    missing = {problem["loc"][0] for problem in caught.value.errors()}
    assert missing == {"from_person_id", "to_person_id", "content"}


def test_a_message_holds_text_or_parts() -> None:
    """Content is text or a list of content parts, kept as it is."""
    parts = [{"type": "text", "text": "Hi."}]

    contents = [
        Message(from_person_id="system", to_person_id="ada", content=content).content
        for content in ("Hi.", parts)
    ]

    assert contents == ["Hi.", parts]


@pytest.mark.parametrize(
    "service",
    ["openai", LLMService.OPENAI, PlainService.OPENAI, TextService.OPENAI],
    ids=repr,
)
def test_a_configuration_takes_a_service_in_any_form(service: Any) -> None:
    """A service may be a string, ours, or a member of an application's own enum."""
    config = PersonLLMConfig(service=service, model="gpt-4.1-nano")

    assert getattr(config.service, "value", config.service) == "openai"


@pytest.mark.parametrize("service", ["groq", None])
def test_a_configuration_takes_services_that_have_no_name_here(service: Any) -> None:
    """A service that only LiteLLM knows is kept; none lets the model string decide."""
    assert PersonLLMConfig(service=service, model="x").service == service


@pytest.mark.parametrize(
    "output",
    [
        ToolOutput(
            type=ToolType.WEB_SEARCH,
            result=[WebSearchResult(url="https://x.org", title="X", score=0.5)],
        ),
        ToolOutput(
            type=ToolType.IMAGE_GENERATION,
            result=ImageGenerationResult(image_data="AAAA", width=1, height=1),
        ),
        ToolOutput(type=ToolType.VOICE, result="said"),
        ToolOutput(type=ToolType.WEB_SEARCH_PREVIEW, result={"own": "form"}),
    ],
)
def test_a_tools_output_survives_json(output: ToolOutput) -> None:
    """What a provider's tool brought can be stored and read again, type and all."""
    assert ToolOutput.model_validate_json(output.model_dump_json()) == output


def test_a_result_survives_json() -> None:
    """A result without the raw response can be stored and read again."""
    result = ChatResult(
        text="Hi.",
        token_usage=TokenUsage(input=1, output=2, total=3),
        tool_calls=[ToolCall(id="1", name="f", arguments={"a": 1})],
        cost_usd=0.5,
        finish_reason="tool_calls",
    )

    assert ChatResult.model_validate_json(result.model_dump_json()) == result


def test_results_start_empty_and_apart() -> None:
    """What is unknown is None, never 0, and no two results share a list."""
    first, second = ChatResult(), ChatResult()

    first.tool_calls.append(ToolCall(id="1", name="f"))

    assert second.tool_calls == []
    assert (second.text, second.token_usage, second.cost_usd) == ("", None, None)
    assert (second.tool_outputs, second.parsed, second.cached) == (None, None, False)


def test_the_raw_response_is_not_printed() -> None:
    """Printing a result does not print all that came over the wire."""
    assert "everything" not in repr(ChatResult(raw_response="everything"))


def test_a_tool_is_asked_for_by_its_name() -> None:
    """A tool's type may be given as text; an unknown one is refused."""
    assert ToolConfig.model_validate({"type": "web_search"}).type is ToolType.WEB_SEARCH
    with pytest.raises(ValidationError):
        ToolConfig.model_validate({"type": "time_travel"})


@pytest.mark.parametrize(
    ("output", "content"),
    [
        ("sunny", "sunny"),
        ("", ""),
        ({"sunny": True}, '{"sunny":true}'),
        (Weather(sunny=True), '{"sunny":true}'),
        ([1, None], "[1,null]"),
        ("Grüße", "Grüße"),
    ],
)
def test_a_tool_call_is_answered_by_a_message(output: Any, content: str) -> None:
    """What a tool gave goes back as text, or as JSON where it is not text."""
    message = ToolCall(id="call_1", name="weather").to_message(output)

    assert message["role"] == "tool"
    assert message["tool_call_id"] == "call_1"
    assert message["content"] == content


def test_an_answer_goes_back_into_the_conversation() -> None:
    """A text answer becomes one assistant message."""
    assert ChatResult(text="Hi.").to_messages() == [
        {"role": "assistant", "content": "Hi."}
    ]


def test_what_the_provider_wants_back_is_in_the_message() -> None:
    """Tool calls, their seals and the thoughts before them are sent back as they came."""
    thoughts = [{"type": "thinking", "thinking": "Hm.", "signature": "s1"}]
    call = ToolCall(
        id="1",
        name="f",
        arguments={"a": 1},
        arguments_text='{"a": 1}',
        thought_signature="s2",
    )

    (message,) = ChatResult(tool_calls=[call], thinking_blocks=thoughts).to_messages()

    (sent,) = message["tool_calls"]
    assert message["thinking_blocks"] == thoughts
    assert (sent["id"], sent["type"]) == ("1", "function")
    assert sent["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert sent["provider_specific_fields"] == {"thought_signature": "s2"}


@pytest.mark.parametrize(
    ("call", "sent"),
    [
        (ToolCall(id="1", name="f", arguments={}, arguments_text=""), "{}"),
        (ToolCall(id="1", name="f", arguments={}, arguments_text=" \n"), "{}"),
        (ToolCall(id="1", name="f", arguments=None, arguments_text="null"), "{}"),
        (ToolCall(id="1", name="f"), "{}"),
        (ToolCall(id="1", name="f", arguments={"a": 1}), '{"a":1}'),
        (ToolCall(id="1", name="f", arguments_text='{"a": 1}'), '{"a": 1}'),
    ],
    ids=str,
)
def test_arguments_go_back_as_json(call: ToolCall, sent: str) -> None:
    """A call without arguments is an empty object: servers fail on an empty text."""
    (message,) = ChatResult(tool_calls=[call]).to_messages()

    assert message["tool_calls"][0]["function"]["arguments"] == sent


# --- options


def test_an_unknown_option_is_named() -> None:
    """A misspelt keyword is a TypeError that says which one, and where the rest goes."""
    with pytest.raises(TypeError, match=r"'warmth'.*extra_body"):
        request_from_options(USER, {"warmth": 1}, default_timeout=5)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"temprature": 1}, "temperature"),
        ({"max_token": 1}, "max_tokens"),
        ({"tool": []}, "tools"),
        ({"servce": "openai"}, "service"),
        ({"options": {"temprature": 1}}, "temperature"),
        ({"options": {"options": {}}}, "options"),
    ],
    ids=str,
)
def test_the_nearest_known_option_is_named(given: Any, meant: str) -> None:
    """A typo is answered with what was meant, also in an object of options."""
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        request_from_options(USER, given, default_timeout=5)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": "hot"},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": True},
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": "no"},
        {"n": True},
        {"top_p": 2},
        {"stop": 5},
        {"seed": "x"},
        {"tools": 3},
        {"tool_choice": "maybe"},
        {"extra_body": "x"},
        {"deadline": 0},
        {"idle_timeout": math.inf},
    ],
    ids=str,
)
async def test_a_value_that_cannot_be_sent_is_refused_before_it_is_sent(
    service: LLMInfraService, server: ProviderServer, option: dict[str, Any]
) -> None:
    """The error names the option and the value, however it was given."""
    (name,) = option
    for given in (option, {"options": option}, {"options": SimpleNamespace(**option)}):
        with pytest.raises(InvalidRequestError, match=f"^{name}=") as caught:
            await service.complete(USER, "gpt-4o", "openai", **given)
        assert "\n" not in str(caught.value)

    assert server.requests == []


def test_a_whole_float_is_a_count() -> None:
    """A number of tokens that was computed is sent as an integer."""
    request = request_from_options(USER, {"max_tokens": 256.0}, default_timeout=5)

    assert repr(request.sampling["max_tokens"]) == "256"


def test_a_persons_defaults_give_way_to_the_call() -> None:
    """A keyword wins over the options object, and that over the person's defaults."""
    given = {"options": {"max_tokens": 2}, "seed": 3}
    defaults = {"temperature": 0.1, "max_tokens": 1, "seed": 1}

    request = request_from_options(USER, given, default_timeout=5, defaults=defaults)

    assert request.sampling == {"temperature": 0.1, "max_tokens": 2, "seed": 3}


@pytest.mark.parametrize(
    ("config", "defaults"),
    [
        (PersonLLMConfig(model="m"), {}),
        (
            PersonLLMConfig(
                model="m", temperature=0, max_tokens=9, reasoning_effort="low"
            ),
            {"temperature": 0, "max_tokens": 9, "reasoning_effort": "low"},
        ),
        (SimpleNamespace(model="m", temperature=0.5, seed=1), {"temperature": 0.5}),
        (SimpleNamespace(model="m", max_tokens=None), {}),
    ],
    ids=str,
)
def test_a_configuration_of_any_class_may_have_defaults(
    config: Any, defaults: dict[str, Any]
) -> None:
    """What a configuration does not have, or has as None, is no default."""
    assert person_defaults(config) == defaults


async def test_a_persons_defaults_are_sent(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """A person keeps its temperature in every call and stream, unless told otherwise."""
    config = SimpleNamespace(
        model="gpt-4.1-nano", api_key_id="openai", temperature=0.25, max_tokens=9
    )
    said = [Message(from_person_id="system", to_person_id="ada", content="Hello?")]

    await service.complete_with_person(said, "ada", config, max_tokens=7)
    async with service.stream_with_person(said, "ada", config) as stream:
        await stream.result()

    sent = [(r.json["temperature"], r.json["max_tokens"]) for r in server.requests]
    assert sent == [(0.25, 7), (0.25, 9)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"promptfile": "x"},
        {"temprature": 1},
        {"temperature": "hot"},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_our_own_configuration_takes_no_field_it_does_not_know(wrong: Any) -> None:
    """A typo is an error, also where the configuration is given as a mapping."""
    (name,) = wrong

    with pytest.raises(ValidationError, match=name):
        PersonLLMConfig(model="m", **wrong)
    with pytest.raises(ValidationError, match=name):
        Person("ada", llm_config={"model": "m", **wrong})


async def test_an_unknown_option_of_a_call_sends_nothing(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """A call with a misspelt keyword fails before anything is sent."""
    with pytest.raises(TypeError, match="'warmth'"):
        await service.complete(USER, "gpt-4o", "openai", warmth=1)  # type: ignore[call-overload]

    assert server.requests == []


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {}),
        ({"temperature": 0, "n": 1}, {"temperature": 0, "n": 1}),
        ({"temperature": None}, {}),
        ({"options": LLMRequestOptions(seed=7)}, {"seed": 7}),
        ({"options": LLMRequestOptions(seed=7), "seed": 8}, {"seed": 8}),
        ({"options": LLMRequestOptions(seed=7), "seed": 0}, {"seed": 0}),
        ({"options": LLMRequestOptions(seed=7), "seed": None}, {"seed": 7}),
        ({"options": LLMRequestOptions(seed=7), "top_p": 1}, {"seed": 7, "top_p": 1}),
        ({"options": SimpleNamespace(seed=7, colour="red")}, {"seed": 7}),
        ({"options": {"seed": 7, "stop": None}}, {"seed": 7}),
        ({"options": None, "seed": 7}, {"seed": 7}),
    ],
)
def test_keywords_win_over_the_options_object(
    options: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """Options may come in one object, ours or foreign; a keyword beside it wins."""
    request = request_from_options(USER, options, default_timeout=5)

    assert request.sampling == sampling


@pytest.mark.parametrize(("options", "form"), FORMS)
def test_text_format_is_the_older_name_of_response_format(
    options: dict[str, Any], form: Any
) -> None:
    """Either name will do; a keyword wins over the object under either name."""
    request = request_from_options(USER, options, default_timeout=5)

    assert request.response_format is form


@pytest.mark.parametrize(
    ("options", "timeout"),
    [
        ({}, 5.0),
        ({"timeout": 2}, 2.0),
        ({"timeout": None}, 5.0),
        ({"options": LLMRequestOptions(timeout=3)}, 3.0),
        ({"options": LLMRequestOptions(timeout=3), "timeout": 2}, 2.0),
    ],
)
def test_the_timeout_of_a_call_wins(options: dict[str, Any], timeout: float) -> None:
    """A call's own timeout counts, then the object's, then the settings'."""
    request = request_from_options(USER, options, default_timeout=5)

    assert request.timeout == timeout


def test_labels_are_taken_and_never_sent() -> None:
    """The application's own labels are accepted and travel nowhere."""
    names = ("execution_phase", "execution_id", "trace_id", "person_name", "node_id")
    labels = dict.fromkeys(names, "a")

    request = request_from_options(USER, labels, default_timeout=5)

    assert request == request_from_options(USER, {}, default_timeout=5)


def test_what_is_not_known_travels_in_extra_body() -> None:
    """extra_body is the way to send what has no keyword."""
    body = {"service_tier": "flex"}

    request = request_from_options(USER, {"extra_body": body}, default_timeout=5)

    assert request.extra_body == body


# --- a person


async def test_a_person_remembers_what_it_heard_and_what_it_said() -> None:
    """After a call the prompt and the answer are in the conversation, in that order."""
    ada = person()

    result = await ada.complete("Hello?", port(lambda: ChatResult(text="Hi.")))

    assert result.text == "Hi."
    assert spoken(ada.get_messages()) == [
        ("system", "ada", "Hello?"),
        ("ada", "system", "Hi."),
    ]


async def test_a_person_answers_whoever_spoke() -> None:
    """The answer is addressed to the one who asked."""
    ada = person()

    await ada.complete("Hello?", port(ChatResult), from_person_id="bob")

    assert [(f, t) for f, t, _ in spoken(ada.get_messages())] == [
        ("bob", "ada"),
        ("ada", "bob"),
    ]


async def test_a_person_gives_the_service_its_whole_memory() -> None:
    """The service gets the past, the prompt, the person and the options."""
    past = Message(from_person_id="ada", to_person_id="bob", content="Once")
    ada = person(past)
    service = port(ChatResult)

    await ada.complete("upon", service, temperature=0.5)

    messages = service.called.pop("person_messages")
    assert spoken(messages) == [("ada", "bob", "Once"), ("system", "ada", "upon")]
    assert service.called == {
        "person_id": "ada",
        "llm_config": ada.llm_config,
        "temperature": 0.5,
    }


async def test_a_person_speaks_through_the_real_service(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Two turns through a service put the first turn on the wire of the second."""
    ada = person()
    server.reply(Answer("One."), Answer("Two."))

    await ada.complete("First?", service)
    await ada.complete("Second?", service)

    assert server.requests[1].json["messages"] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second?"},
    ]


@pytest.mark.parametrize("failure", [RateLimitError("x"), ValueError("x")])
async def test_a_failure_leaves_the_conversation_as_it_was(failure: Exception) -> None:
    """Whatever the service raises, the person has heard and said nothing."""
    ada = person(Message(from_person_id="bob", to_person_id="ada", content="Once"))
    before = ada.get_messages()

    def fail() -> ChatResult:
        raise failure

    with pytest.raises(type(failure)):
        await ada.complete("Hello?", port(fail))

    assert ada.get_messages() == before


async def test_a_refused_call_leaves_the_conversation_as_it_was(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """The same is true of a failure that comes over the wire."""
    ada = person()
    server.reply(error("openai", 400, "no"))

    with pytest.raises(DiPeOLLMError):
        await ada.complete("Hello?", service)

    assert ada.get_messages() == []


async def test_a_cancelled_call_leaves_the_conversation_as_it_was(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """A call that is cancelled while the provider thinks adds nothing."""
    ada = person()
    server.reply(Answer(delay=30))
    call = asyncio.create_task(ada.complete("Hello?", service))
    while not server.in_flight:  # noqa: ASYNC110 - the server has no event for it
        await asyncio.sleep(0.01)

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    assert ada.get_messages() == []


async def test_two_calls_at_once_do_not_mix() -> None:
    """Each prompt stays beside its own answer, and neither call saw half of the other."""
    ada = person()
    answers = iter(["one", "two"])
    first, second = (port(lambda: ChatResult(text=next(answers))) for _ in range(2))

    await asyncio.gather(ada.complete("1?", first), ada.complete("2?", second))

    contents = [content for _, _, content in spoken(ada.get_messages())]
    assert contents == ["1?", "one", "2?", "two"]
    assert [len(p.called["person_messages"]) for p in (first, second)] == [1, 1]


async def test_a_person_without_a_model_cannot_answer() -> None:
    """A person that has no configuration says so."""
    with pytest.raises(ValueError, match="'bob' has no llm_config"):
        await Person("bob").complete("Hello?", port(ChatResult))


def test_a_conversation_is_handed_out_as_a_copy() -> None:
    """What a caller does with the list does not change the person's memory."""
    given = [Message(from_person_id="a", to_person_id="b", content="x")]
    bob = Person("bob", messages=given)

    given.clear()
    bob.get_messages().clear()

    assert len(bob.get_messages()) == 1


def test_a_person_remembers_foreign_messages() -> None:
    """Anything with a message's attributes can be remembered."""
    bob = Person("bob")
    foreign = SimpleNamespace(from_person_id="a", to_person_id="bob", content="x")

    bob.add_message(foreign)

    assert bob.get_messages() == [foreign]


def test_a_person_prints_no_conversation() -> None:
    """The repr names the person and counts its messages."""
    bob = Person(
        "bob",
        messages=[Message(from_person_id="a", to_person_id="bob", content="psst")],
    )

    assert repr(bob) == "Person(id='bob', name='bob', 1 messages)"


def test_the_old_formatting_still_works_and_says_what_replaces_it() -> None:
    """The deprecated method warns where it is called, and names the new way."""
    ada = person(
        Message(from_person_id="bob", to_person_id="ada", content="Hello?"),
        Message(from_person_id="ada", to_person_id="bob", content="Hi."),
    )

    with pytest.warns(DeprecationWarning, match="complete_with_person") as caught:
        messages = ada._prepare_messages_for_llm(system_prompt="Be brief.")

    with pytest.warns(DeprecationWarning, match="get_messages"):
        without_prompt = ada._prepare_messages_for_llm()
    assert caught[0].filename == __file__
    assert without_prompt == messages[1:]
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
    ]


async def test_the_new_way_does_not_warn() -> None:
    """Completing as a person uses nothing that is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        await person().complete("Hello?", port(ChatResult))


# --- an application's own classes


@pytest.mark.parametrize(
    "named", [PlainService.OPENAI, TextService.OPENAI, "openai"], ids=repr
)
async def test_an_applications_own_classes_go_through_the_service(
    service: LLMInfraService, server: ProviderServer, named: Any
) -> None:
    """Messages, configuration and enum may all be the application's own."""
    config = SimpleNamespace(
        service=named,
        model="my-model",
        api_key_id="openai",
        system_prompt="Be brief.",
        prompt_file=None,
    )
    said = SimpleNamespace(from_person_id="system", to_person_id="ada", content="Hi.")

    result = await service.complete_with_person([said], "ada", config)

    assert result.text == "Hello from the loopback."
    assert server.requests[0].json["messages"] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
    ]


async def test_a_person_takes_any_port() -> None:
    """A service is a port by its methods alone."""

    async def through(service: LLMServicePort) -> str:
        return (await person().complete("Hello?", service)).text

    assert await through(port(lambda: ChatResult(text="Hi."))) == "Hi."


def test_a_person_survives_as_json() -> None:
    """What it remembers, and which model it thinks with, comes back as it was."""
    config = PersonLLMConfig(service=LLMService.OPENAI, model="m", api_key_id="k")
    heard = Message(from_person_id="system", to_person_id="ada", content="Hello?")
    ada = Person("ada", "Ada", config, [heard])

    again = Person.model_validate_json(ada.model_dump_json())

    assert again == ada
    assert again.llm_config is not None
    assert again.llm_config.service is LLMService.OPENAI
    assert again.get_messages() == [heard]


@pytest.mark.parametrize(
    "content",
    [
        "plain",
        ["Look:", Path("a/b.png")],
        [Path("a/b.png"), {"type": "text", "text": "x"}, "path"],
        [{"type": "path", "path": "x", "more": 1}],
    ],
    ids=str,
)
def test_a_picture_survives_as_json(content: Any) -> None:
    """A path is a path again, and nothing else becomes one."""
    message = Message(from_person_id="a", to_person_id="b", content=content)
    ada = Person("ada", messages=[message])

    again = Person.model_validate_json(ada.model_dump_json())

    assert again.get_messages()[0].content == content
    assert message.model_dump()["content"] == content


@pytest.mark.parametrize("service", ["openai", LLMService.OPENAI], ids=["text", "enum"])
def test_a_known_service_is_its_enum_however_it_is_given(service: str) -> None:
    """Applications read `.value`; a service that has no name here stays text."""
    assert PersonLLMConfig(service=service, model="m").service is LLMService.OPENAI
    assert PersonLLMConfig(service="groq", model="m").service == "groq"


def test_a_person_keeps_what_the_application_gave_it() -> None:
    """Its own configuration and messages are not copied into ours."""
    config, message = SimpleNamespace(model="m"), SimpleNamespace(content="x")

    person = Person("ada", llm_config=config, messages=[message])

    assert person.llm_config is config
    assert person.get_messages()[0] is message


def test_tokens_add_up() -> None:
    """A total that is not given is the sum."""
    assert TokenUsage(input=3, output=4).total == 7
    assert TokenUsage(input=3, output=4, total=9).total == 9


@pytest.mark.parametrize("seconds", [True, math.inf, math.nan, -1, 0, "5"])
def test_a_time_that_is_none_is_refused(seconds: Any) -> None:
    """No call waits for ever, or for as long as a truth value."""
    with pytest.raises(InvalidRequestError, match="timeout="):
        request_from_options((), {"timeout": seconds}, default_timeout=5)


def test_options_in_one_object_take_what_keywords_take() -> None:
    """Every keyword of a call is a field of `LLMRequestOptions`."""
    assert set(LLMRequestOptions.model_fields) == OPTIONS - {"options"}
    LLMRequestOptions(text_format=dict, trace_id="t", execution_phase="p")


def test_the_keywords_of_a_call_are_the_fields_of_the_object() -> None:
    """What a type checker sees and what is checked at run time are the same."""
    seen = typing.get_type_hints(CallOptions)
    fields = typing.get_type_hints(LLMRequestOptions)
    keywords = seen.keys() - {"options", "provider", "service_name"}

    assert keywords == set(LLMRequestOptions.model_fields)
    typed = {name for name in keywords if name != "response_format"}
    assert {n: seen[n] for n in typed} == {n: fields[n] for n in typed}


def test_the_names_that_an_editor_completes_are_the_services() -> None:
    """The literals of ServiceName are the values of the enum."""
    literals, *_ = typing.get_args(ServiceName)

    assert set(typing.get_args(literals)) == {service.value for service in LLMService}


def test_a_result_with_its_type_is_read_again() -> None:
    """A result that was stored comes back with what was parsed."""
    result = ChatResult[Weather](text="{}", parsed=Weather(sunny=True))

    again = ChatResult[Weather].model_validate_json(result.model_dump_json())

    assert again.parsed == Weather(sunny=True)
    assert isinstance(again, ChatResult)
