"""DiPeO's three generations of calls, made with objects of DiPeO's shapes.

The classes here have the fields and the strictness of DiPeO's own, whose code is not
needed: https://github.com/sorryhyun/DiPeO at 8d4c1864, 30543550 and 9efdfa69.
"""

import enum
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import pytest
from pydantic import BaseModel, ConfigDict

import dipeo_llm
from dipeo_llm import InvalidRequestError, Settings, StructuredOutputError, TokenUsage
from dipeo_llm.dipeo import (
    ChatResult,
    DecisionOutput,
    LLMInfraService,
    MemorySelectionOutput,
)
from dipeo_llm.testing import MockLLMAdapter
from tests.conftest import HELLO, MODELS, PROVIDERS, each_provider
from tests.provider_server import Answer, ProviderServer, Received


class Strict(BaseModel):
    """A model of DiPeO's: generated from TypeScript, without room for more fields."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Service(str, enum.Enum):  # noqa: UP042 - as DiPeO writes it
    """A provider, with the members that are called here."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GOOGLE = "google"
    OLLAMA = "ollama"


class Phase(str, enum.Enum):  # noqa: UP042
    """A phase of an execution."""

    MEMORY_SELECTION = "memory_selection"
    DIRECT_EXECUTION = "direct_execution"
    DECISION_EVALUATION = "decision_evaluation"
    DEFAULT = "default"


class ToolKind(str, enum.Enum):  # noqa: UP042
    """A provider's own tool."""

    WEB_SEARCH = "web_search"


class Tool(Strict):
    """A request for a provider's own tool."""

    type: ToolKind
    enabled: bool | None = None
    config: dict[str, Any] | None = None


class Config(Strict):
    """A person's model."""

    service: Service
    model: str
    api_key_id: str
    system_prompt: str | None = None
    prompt_file: str | None = None


class Words(Strict):
    """A message."""

    id: str | None = None
    from_person_id: str
    to_person_id: str
    content: str
    timestamp: str | None = None
    token_count: float | None = None
    message_type: str
    metadata: dict[str, Any] | None = None


class Usage(Strict):
    """The usage that DiPeO stores; it refuses any further field."""

    input: float
    output: float
    cached: float | None = None
    total: float | None = None


class APIKeyError(Exception):
    """The application's own error for a key."""


@dataclass
class Keys:
    """A store of keys: plain method, records without an address."""

    def get_api_key(self, key_id: str) -> dict[str, str]:
        """Return the record of a key."""
        if not key_id.startswith("APIKEY_"):
            raise APIKeyError(f"API key '{key_id}' not found")
        service = key_id.removeprefix("APIKEY_").lower()
        key = f"sk-test-{service}"
        return {"id": key_id, "label": key_id, "service": service, "key": key}


@runtime_checkable
class FirstPort(Protocol):
    """The port of 8d4c1864."""

    async def complete(
        self, messages: list[dict[str, str]], model: str, api_key_id: str, **kwargs: Any
    ) -> Any:
        """Answer."""

    async def complete_with_person(
        self,
        person_messages: list[Any],
        person_id: str,
        llm_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Answer as a person."""

    async def get_available_models(self, api_key_id: str) -> list[str]:
        """List models."""

    def get_token_counts(self, client_name: str, usage: Any) -> Any:
        """Read a usage record."""


@runtime_checkable
class SecondPort(Protocol):
    """The port of 30543550."""

    async def complete(
        self, messages: list[dict[str, str]], model: str, api_key_id: str, **kwargs: Any
    ) -> Any:
        """Answer."""

    async def validate_api_key(
        self, api_key_id: str, provider: str | None = None
    ) -> bool:
        """Check a key."""

    async def get_provider_for_model(self, model: str) -> str | None:
        """Name the provider."""


@runtime_checkable
class ThirdPort(Protocol):
    """The port of 9efdfa69."""

    async def complete(
        self,
        messages: list[dict[str, str]],
        model: str,
        api_key_id: str,
        service_name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer."""

    async def complete_memory_selection(
        self,
        candidate_messages: list[Any],
        task_preview: str,
        criteria: str,
        at_most: int | None,
        model: str,
        api_key_id: str,
        service_name: str,
        **kwargs: Any,
    ) -> Any:
        """Choose messages."""

    async def complete_decision(
        self,
        prompt: str,
        context: dict[str, Any],
        model: str,
        api_key_id: str,
        service_name: str,
        **kwargs: Any,
    ) -> Any:
        """Decide."""

    async def validate_api_key(
        self, api_key_id: str, service: str | None = None
    ) -> bool:
        """Check a key."""

    async def get_service_for_model(self, model: str) -> str | None:
        """Name the provider."""


@pytest.fixture
async def service(server: ProviderServer) -> AsyncIterator[LLMInfraService]:
    """Open a service on the loopback server, with DiPeO's store of keys."""
    urls = {provider: server.base_url(provider) for provider in PROVIDERS}
    settings = Settings(base_urls=urls, max_retries=0, timeout=20)
    async with LLMInfraService(Keys(), settings=settings) as opened:
        yield opened


def config(provider: str, **more: Any) -> Config:
    """Make the configuration of a person."""
    return Config(
        service=Service(provider),
        model=MODELS[provider],
        api_key_id=f"APIKEY_{provider.upper()}",
        **more,
    )


def says(speaker: str, content: str, to: str = "critic", **more: Any) -> Words:
    """Make a message."""
    kind = "system_to_person" if speaker == "system" else "person_to_person"
    return Words(
        from_person_id=speaker,
        to_person_id=to,
        content=content,
        message_type=kind,
        **more,
    )


def sent_text(request: Received) -> str:
    """Return the text of the last message on any provider's wire."""
    body = request.json
    message = (body.get("contents") or body["messages"])[-1]
    content = message.get("parts") or message["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    assert isinstance(text, str)
    return text


def output_limit(body: dict[str, Any]) -> Any:
    """Return the limit of the answer on any provider's wire."""
    place = body.get("generationConfig") or body.get("options") or body
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict")
    return next(place[name] for name in names if name in place)


@pytest.mark.parametrize("port", [FirstPort, SecondPort, ThirdPort])
def test_the_service_is_an_instance_of_each_port(port: type) -> None:
    """DiPeO's registry checks a service against its protocol."""
    service = LLMInfraService(Keys())

    assert isinstance(service, port)
    assert isinstance(service, dipeo_llm.LLMInfraService)
    assert isinstance(service, dipeo_llm.LLMServicePort)


# --- the first generation: the service formats a person's conversation ----------------


@each_provider
async def test_a_person_of_the_first_generation_is_answered(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """The person hands over its messages and its configuration, and reads the usage."""
    messages = [says("critic", "Go on.", to="system"), says("system", "Discuss bread.")]

    result = await service.complete_with_person(
        person_messages=messages,
        person_id="critic",
        llm_config=config(provider, system_prompt="You are a critic."),
        temperature=0.7,
        max_tokens=4096,
    )

    reply = says("critic", result.text, to="system")
    assert reply.content == "Hello from the loopback."
    assert result.token_usage
    assert result.token_usage.total == 17
    (request,) = server.requests
    assert sent_text(request) == "Discuss bread."
    assert "You are a critic." in str(request.json)


async def test_a_web_search_that_dipeo_asks_for_is_made(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """DiPeO's tool objects reach the provider, and its sources come back."""
    server.reply(Answer(citations=[("https://example.test/", "The match")]))

    result = await service.complete_with_person(
        [says("system", "Who won?")],
        "critic",
        Config(
            service=Service.OPENAI, model="gpt-4.1-mini", api_key_id="APIKEY_OPENAI"
        ),
        tools=[Tool(type=ToolKind.WEB_SEARCH, enabled=True)],
    )

    assert "web_search" in str(server.requests[0].json)
    assert result.tool_outputs
    assert isinstance(result.tool_outputs[0].result, list)
    assert result.tool_outputs[0].result[0].url == "https://example.test/"


# --- the second generation: the person formats it itself -------------------------------


@each_provider
async def test_a_person_of_the_second_generation_is_answered(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A limit beyond the model's is lowered, and OpenAI's role is taken everywhere."""
    person = config(provider)
    role = "developer" if person.service == Service.OPENAI else "system"

    result = await service.complete(
        messages=[{"role": role, "content": "Be brief."}, *HELLO],
        model=person.model,
        api_key_id=person.api_key_id,
        service=person.service,
        temperature=0.2,
        max_tokens=256000,
        execution_phase="direct_execution",
    )

    assert result.text == "Hello from the loopback."
    body = server.requests[0].json
    assert "direct_execution" not in str(body)
    if provider != "ollama":  # whose models have no limit of their own
        assert output_limit(body) < 256000


ANSWERS = {
    "object": '{"message_ids": ["m1", "m7"]}',
    "array": '["m1", "m7"]',
    "fenced": '```json\n["m1", "m7"]\n```',
}


@each_provider
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize(
    "phase", ["memory_selection", Phase.MEMORY_SELECTION], ids=["text", "enum"]
)
async def test_the_text_of_a_memory_selection_is_a_bare_array(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    answer: str,
    phase: str,
) -> None:
    """DiPeO parses the text; the provider is asked for the form."""
    server.reply(Answer(text=answer))
    person = config(provider)

    result = await service.complete(
        HELLO,
        person.model,
        person.api_key_id,
        service=person.service,
        execution_phase=phase,
    )

    assert json.loads(result.text) == ["m1", "m7"]
    assert "message_ids" in str(server.requests[0].json)


async def test_the_text_of_a_decision_says_true_or_false(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """DiPeO looks for the word; whatever stands around the JSON is gone."""
    server.reply(Answer(text='```json\n{"decision": false}\n```'))

    result = await service.complete(
        HELLO, "gpt-4.1-nano", "APIKEY_OPENAI", execution_phase="decision_evaluation"
    )

    assert result.text == '{"decision":false}'


class River(BaseModel):
    """A form of the caller's own."""

    name: str


@pytest.mark.parametrize("name", ["response_format", "text_format"])
async def test_a_form_of_the_caller_wins_over_the_phase(
    service: LLMInfraService, server: ProviderServer, name: str
) -> None:
    """The phase asks for a form only where the call has none."""
    server.reply(Answer(text='{"name": "Rhine"}'))
    options: dict[str, Any] = {name: River}

    result = await service.complete(
        HELLO,
        "gpt-4.1-nano",
        "APIKEY_OPENAI",
        execution_phase=Phase.MEMORY_SELECTION,
        **options,
    )

    assert result.parsed == River(name="Rhine")
    assert result.text == '{"name": "Rhine"}'


async def test_a_selection_in_prose_is_an_error(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """What cannot be read is not passed off as an empty selection."""
    server.reply(Answer(text="I would keep the first one."))

    with pytest.raises(StructuredOutputError) as raised:
        await service.complete(
            HELLO, "gpt-4.1-nano", "APIKEY_OPENAI", execution_phase="memory_selection"
        )

    assert raised.value.text == "I would keep the first one."


# --- the third generation: memory, decisions, llm_usage --------------------------------


@each_provider
async def test_a_person_of_the_third_generation_is_answered(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """The service's name stands fourth, and the labels of an execution stay here."""
    person = config(provider)

    result = await service.complete(
        HELLO,
        person.model,
        person.api_key_id,
        person.service.value,
        execution_phase=Phase.DIRECT_EXECUTION,
        execution_id="exec_1",
        trace_id="exec_1",
        person_name="Critic",
        node_id="node_1",
    )

    assert isinstance(result, ChatResult)
    assert result.llm_usage
    stored = Usage(**result.llm_usage.model_dump())
    assert stored == Usage(input=12, output=5, cached=0, total=17)
    assert not hasattr(result, "content")  # which DiPeO would read before `text`
    body = server.requests[0].json
    assert not {"exec_1", "Critic", "node_1"} & set(str(body).split("'"))


async def test_without_usage_there_is_no_llm_usage() -> None:
    """Usage that the provider did not report is not reported as zero."""
    assert ChatResult[None](text="Hello").llm_usage is None


async def test_a_streamed_result_has_llm_usage_too(service: LLMInfraService) -> None:
    """Every way to a result leads to the same class."""
    async with service.stream(HELLO, "gpt-4.1-nano", "APIKEY_OPENAI") as stream:
        result = await stream.result()

    assert isinstance(result, ChatResult)
    assert result.llm_usage
    assert result.llm_usage.total == 17


CANDIDATES = [
    says("system", "Write about bread.", id="m1"),
    says("optimist", "Bread is\n\ngood. " + "Very good. " * 100, id="m2"),
    says("optimist", "The oven is at 220 °C.", id="m3"),
    says("optimist", "This one has no id."),
]


@each_provider
async def test_memories_are_selected(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """Unknown and repeated ids are dropped, and no more come back than were asked for."""
    answer = {"message_ids": ["m3", "m9", "m3", "m1", "m2"]}
    server.reply(Answer(text=json.dumps(answer)))
    person = config(provider)

    output = await service.complete_memory_selection(
        candidate_messages=CANDIDATES,
        task_preview="Bake it.",
        criteria="Temperatures",
        at_most=2,
        model=person.model,
        api_key_id=person.api_key_id,
        service_name=person.service.value,
        person_name="Critic",
        execution_id="exec_1",
        node_id="node_1",
    )

    assert output.message_ids == ["m3", "m1"]
    (request,) = server.requests
    asked = sent_text(request)
    assert "- m3 (optimist): The oven is at 220 °C." in asked
    assert "- m2 (optimist): Bread is good. Very good." in asked
    assert "no id" not in asked
    assert "Bake it." in asked
    assert "Temperatures" in asked
    assert "Choose 2 at most." in asked
    assert asked.count("Very good") < 25
    assert "exec_1" not in str(request.json)


@pytest.mark.parametrize(
    ("candidates", "criteria"),
    [(CANDIDATES, "  "), (CANDIDATES, None), ([], "Temperatures")],
    ids=["blank", "none", "no candidates"],
)
async def test_nothing_is_asked_where_there_is_nothing_to_select(
    service: LLMInfraService,
    server: ProviderServer,
    candidates: list[Words],
    criteria: Any,
) -> None:
    """A selection without criteria or candidates costs no request."""
    output = await service.complete_memory_selection(
        candidates,
        "Bake it.",
        criteria,
        None,
        "gpt-4.1-nano",
        "APIKEY_OPENAI",
        "openai",
    )

    assert output.message_ids == []
    assert server.requests == []


async def test_what_dipeos_selector_hands_on_is_dropped(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """DiPeO's selector passes its own arguments on; other keywords are checked."""
    server.default = Answer(text='{"message_ids": []}')
    given: dict[str, Any] = {
        "candidate_messages": CANDIDATES,
        "task_preview": None,
        "criteria": "Temperatures",
        "at_most": 0.0,
        "model": "gpt-4.1-nano",
        "api_key_id": "APIKEY_OPENAI",
        "service_name": "openai",
    }

    output = await service.complete_memory_selection(
        **given, preprocessed=True, llm_service=service, person_id="critic"
    )
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        await service.complete_memory_selection(**given, temprature=1)

    assert output.message_ids == []
    assert "at most" not in sent_text(server.requests[0])
    assert server.requests[0].json["temperature"] == 0


CONTEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({"default": "Crusty.", "other": "no"}, "Crusty."),
    "generated": ({"generated_output": {"a": 1}, "other": "no"}, '{\n  "a": 1\n}'),
    "rest": (
        {"taste": "good", "loop_index": 3, "branch[x]": 1, "a_last_increment_at": 2},
        '{\n  "taste": "good"\n}',
    ),
    "objects": ({"default": {"when": SimpleNamespace(a=1)}}, "namespace(a=1)"),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("decision", [True, False])
async def test_a_decision_is_made(
    service: LLMInfraService, server: ProviderServer, decision: bool, context: str
) -> None:
    """The model sees the question and the part of the context that matters."""
    server.reply(Answer(text=json.dumps({"decision": decision})))
    given, shown = CONTEXTS[context]

    output = await service.complete_decision(
        prompt="Is the bread good?",
        context=given,
        model="claude-sonnet-4-5",
        api_key_id="APIKEY_ANTHROPIC",
        service_name="anthropic",
    )

    assert output == DecisionOutput(decision=decision)
    asked = sent_text(server.requests[0])
    assert asked.startswith("Is the bread good?")
    assert shown in asked
    assert "loop_index" not in asked
    assert "other" not in asked


async def test_a_decision_needs_a_question(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """An empty prompt is a mistake in the diagram, and not a no."""
    with pytest.raises(InvalidRequestError, match="needs a question"):
        await service.complete_decision(" ", {}, "gpt-4.1-nano", "k", "openai")

    assert server.requests == []


async def test_a_mock_answers_all_three_generations() -> None:
    """An application's tests need no server."""
    mock = MockLLMAdapter("Bread.", '["m1"]', '{"message_ids": ["m3"]}', "Yes.")
    service = LLMInfraService(Keys(), adapter_factory=mock)
    model = ("gpt-4.1-nano", "APIKEY_OPENAI", "openai")

    first = await service.complete_with_person(
        [says("system", "Discuss bread.")], "critic", config("openai")
    )
    second = await service.complete(HELLO, *model, execution_phase="memory_selection")
    third = await service.complete_memory_selection(CANDIDATES, "", "Ovens", 1, *model)
    with pytest.raises(StructuredOutputError):
        await service.complete_decision("Is it good?", {}, *model)

    assert isinstance(first, ChatResult)
    assert first.llm_usage
    assert first.llm_usage.output == 1
    assert second.text == '["m1"]'
    assert third == MemorySelectionOutput(message_ids=["m3"])
    assert mock.requests[3].request.sampling["temperature"] == 0


# --- the rest of the port --------------------------------------------------------------


def test_the_usage_of_a_response_object_is_read() -> None:
    """DiPeO's own response objects carry the usage under `token_usage`."""
    service = LLMInfraService(Keys())
    response = SimpleNamespace(token_usage=Usage(input=7, output=3, total=10))

    counted = service.get_token_counts("openai", response)

    assert counted == TokenUsage(input=7, output=3, total=10)
    record = {"prompt_tokens": 7, "completion_tokens": 3}
    assert service.get_token_counts("openai", record) == counted
    empty = SimpleNamespace(token_usage=None)
    assert service.get_token_counts("openai", empty) == TokenUsage()


async def test_a_key_is_checked_under_either_name_of_the_provider(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """The newer port calls the provider `service`."""
    assert await service.validate_api_key("APIKEY_OPENAI", service="openai")
    assert await service.validate_api_key("APIKEY_OPENAI", provider="openai")
    assert await service.validate_api_key("APIKEY_OPENAI", "openai")
    server.keys["openai"] = {"another"}
    assert not await service.validate_api_key("APIKEY_OPENAI", service="openai")

    assert {request.provider for request in server.requests} == {"openai"}


async def test_the_provider_of_a_model_is_told_under_both_names() -> None:
    """The newer port calls it the model's service."""
    service = LLMInfraService(Keys())

    assert await service.get_service_for_model("claude-sonnet-4-5") == "anthropic"
    assert await service.get_provider_for_model("claude-sonnet-4-5") == "anthropic"


async def test_the_applications_own_error_for_a_key_passes() -> None:
    """Handlers of DiPeO's APIKeyError go on working; nothing is sent."""
    service = LLMInfraService(Keys())

    with pytest.raises(APIKeyError, match="'openai_key' not found"):
        await service.complete(HELLO, "gpt-4.1-nano", "openai_key")


async def test_no_messages_are_an_error(service: LLMInfraService) -> None:
    """DiPeO's own service sent a conversation without messages."""
    with pytest.raises(InvalidRequestError):
        await service.complete([], "gpt-4.1-nano", "APIKEY_OPENAI", "openai")
