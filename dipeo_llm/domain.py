"""The words of a conversation with a model: messages, persons, options, results.

Pure data. Nothing here knows a provider, a network or LiteLLM; a Person knows the port
that it talks through (as a type) and nothing of what stands behind it.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from dipeo_llm.errors import InvalidRequestError

if TYPE_CHECKING:
    from dipeo_llm.ports import LLMServicePort

Content = str | list[str | Path | dict[str, Any]]
"""Plain text, or a list of it, of local files, and of OpenAI's content parts."""


class LLMService(StrEnum):
    """The services that have a name here. `google` and `gemini` are one provider."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GOOGLE = "google"
    GEMINI = "gemini"
    OLLAMA = "ollama"
    BEDROCK = "bedrock"
    VERTEX = "vertex"
    DEEPSEEK = "deepseek"


class Message(BaseModel):
    """One utterance from one person to another."""

    from_person_id: str
    """Who speaks; "system" for the application itself."""
    to_person_id: str
    """Who is spoken to."""
    content: Content
    """What is said. A message without any is left out of a request."""
    id: str | None = None
    """The application's own, as are the fields below; none of them is ever sent."""
    message_type: str | None = None
    """A label, such as "person_to_person"."""
    timestamp: str | None = None
    """When it was said, in the application's own form."""
    metadata: dict[str, Any] | None = None
    """Whatever else the application keeps with it."""


class PersonLLMConfig(BaseModel):
    """Which model a person thinks with, and how it is told who it is."""

    service: LLMService | str | None = Field(None, union_mode="left_to_right")
    """None lets the model string decide."""
    model: str
    """A model string, as for `LLMInfraService.complete`; it may have a prefix."""
    api_key_id: str | None = None
    """Name of the key, never the key itself. None where the provider needs none."""
    system_prompt: str | None = None
    """Used where `prompt_file` is None or cannot be read."""
    prompt_file: str | None = None
    """Path of a text file, relative to the base directory."""


class ToolType(StrEnum):
    """Work that a provider can do by itself during a call."""

    WEB_SEARCH = "web_search"
    WEB_SEARCH_PREVIEW = "web_search_preview"
    IMAGE_GENERATION = "image_generation"
    VOICE = "voice"


class ToolConfig(BaseModel):
    """Asks for one of the provider's own tools."""

    type: ToolType
    enabled: bool = True
    """False leaves the tool out of the request."""
    config: dict[str, Any] | None = None
    """The provider's own settings of the tool, such as `search_context_size`."""


class WebSearchResult(BaseModel):
    """A page that the provider found and used."""

    url: str
    title: str = ""
    snippet: str = ""
    """What the provider quotes of it, where it does."""
    score: float | None = None
    """Always None here: no provider tells one."""


class ImageGenerationResult(BaseModel):
    """An image that the provider generated."""

    image_data: str
    """Base64, without a data: prefix."""
    format: str = "png"
    """The second half of its media type: png, jpeg or webp."""
    width: int | None = None
    """Pixels, as is the height; always None here: no provider tells them."""
    height: int | None = None


class ToolOutput(BaseModel):
    """What one of the provider's own tools brought."""

    type: ToolType
    """Which tool it was: WEB_SEARCH or IMAGE_GENERATION."""
    result: list[WebSearchResult] | ImageGenerationResult | str | dict[str, Any]
    """The pages of a web search, or an image; no other kind is made here."""
    raw_response: Any | None = None
    """Always None here; the provider's JSON is in `ChatResult.raw_response`."""


class ToolCall(BaseModel):
    """Work that the model asks the caller to do."""

    id: str
    """The provider's name for the call, or one made here where it gives none."""
    name: str
    """The function's."""
    arguments: dict[str, Any] | None = None
    """None where what came is not a JSON object; then see `arguments_text`."""
    arguments_text: str = ""
    """The arguments as the model wrote them."""
    thought_signature: str | None = None
    """Google's thought signature of the call, to be sent back with its result."""

    def to_message(self, output: Any) -> dict[str, Any]:
        """Return the message that answers this call, to be appended after the turn.

        Args:
            output: What the tool gave: text, or anything that pydantic can turn into
                JSON.
        """
        if not isinstance(output, str):
            output = to_json(output).decode()
        return {
            "role": "tool",
            "tool_call_id": self.id,
            "name": self.name,
            "content": output,
        }


class TokenUsage(BaseModel):
    """Tokens of one call, counted alike for every provider."""

    input: int = 0
    """All that was read, tokens from a cache included."""
    output: int = 0
    """All that was written, reasoning included."""
    cached: int = 0
    """The part of `input` that the provider took from its prompt cache."""
    total: int = 0
    """`input` and `output` together."""
    cache_written: int = 0
    """The part of `input` that the provider put into its prompt cache."""
    reasoning: int = 0
    """The part of `output` that was reasoning."""

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        self.total = self.total or self.input + self.output
        return self


class RateLimits(BaseModel):
    """What the provider says is left for this key. None where it does not say."""

    requests_left: int | None = None
    """Requests that may still be made until the reset."""
    requests_reset: float | None = None
    """Seconds until the requests are full again."""
    tokens_left: int | None = None
    """Tokens that may still be used until the reset."""
    tokens_reset: float | None = None
    """Seconds until the tokens are full again."""


class LLMRequestOptions(BaseModel):
    """Options of a call as one object; a keyword of the call itself wins over it."""

    model_config = ConfigDict(extra="forbid")

    temperature: float | None = None
    """How random the answer is: 0 to 2 for OpenAI and Google, 0 to 1 for Anthropic, 0
    or more for Ollama. Sent as it is; a value out of range is the provider's error."""
    max_tokens: int | None = None
    """Most tokens of the answer, reasoning included; None is the provider's limit, or
    LiteLLM's for Anthropic, which takes no request without one."""
    top_p: float | None = None
    """Share of the likeliest tokens to choose from, 0 to 1."""
    n: int | None = None
    """Number of answers, all in `ChatResult.texts`; left out where there is only one."""
    stop: str | list[str] | None = None
    """Texts that end the answer where they would begin; they are not part of it."""
    seed: int | None = None
    """Makes the same request more likely to have the same answer."""
    tools: list[Any] | None = None
    """Functions, OpenAI's function-tool dicts, and `ToolConfig` objects."""
    tool_choice: str | dict[str, Any] | None = None
    """One of "auto", "none" and "required", or OpenAI's dict that names a function."""
    response_format: Any | None = None
    """A pydantic class or other type, a JSON schema, or OpenAI's own dict."""
    text_format: Any | None = None
    """DiPeO's older name for `response_format`."""
    reasoning_effort: str | None = None
    """One of "none", "minimal", "low", "medium" and "high", where the model has it."""
    timeout: float | None = None
    """Seconds for one attempt; of a stream, for its first chunk."""
    idle_timeout: float | None = None
    """Seconds to wait for a stream's next chunk."""
    deadline: float | None = None
    """Seconds for the whole call: key, prompt file, media, all attempts and waits."""
    extra_body: dict[str, Any] | None = None
    """Merged into the request's JSON as it is sent, object by object; wins over it."""
    execution_phase: str | None = None
    """The application's own labels, this and the next two; never sent."""
    execution_id: str | None = None
    trace_id: str | None = None


class TokenCount(BaseModel):
    """Tokens of a request that was not sent."""

    tokens: int
    """Input tokens, those of the tools included."""
    source: str
    """Who counted: "provider", or "tokenizer" for LiteLLM's."""


class Capabilities(BaseModel):
    """What a model takes and costs, by LiteLLM's table; None where it does not say.

    Each flag says whether the model takes or does what its name says: function tools,
    several calls at once, images, PDFs, audio, structured output, reasoning, prompt
    caching, a web search by the provider.
    """

    service: str
    """The provider's name, such as "openai"."""
    model: str
    """The model, without a prefix."""
    tools: bool | None = None
    parallel_tools: bool | None = None
    vision: bool | None = None
    pdf: bool | None = None
    audio: bool | None = None
    structured_output: bool | None = None
    reasoning: bool | None = None
    prompt_caching: bool | None = None
    web_search: bool | None = None
    context_window: int | None = None
    """Most input tokens."""
    max_output: int | None = None
    """Most output tokens."""
    input_usd_per_million: float | None = None
    """USD for 1,000,000 input tokens."""
    output_usd_per_million: float | None = None
    """USD for 1,000,000 output tokens."""


class ChatResult(BaseModel):
    """What a call gave, in the same words for every provider."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    text: str = ""
    """The answer's text; empty where the model only called tools or made images."""
    token_usage: TokenUsage | None = None
    """None where the provider counted nothing."""
    raw_response: Any | None = Field(default=None, repr=False)
    """The provider's own JSON, for a stream put together again from its events. Only
    for a provider without a format of ours is it what LiteLLM made of the answer."""
    tool_outputs: list[ToolOutput] | None = None
    """Work that the provider did: searches, images."""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    """Work that is asked of the caller."""
    parsed: Any | None = None
    """The answer as `response_format` asked for it; None without one, and for a turn
    that calls tools."""
    finish_reason: str | None = None
    """stop, length, tool_calls, content_filter, or another word of the provider's own
    in lower case, such as Google's malformed_function_call; None where it gave none."""
    model: str | None = None
    """The model that answered, by the provider's own account."""
    service: str | None = None
    """The provider that was asked, such as "openai"."""
    cost_usd: float | None = None
    """USD by LiteLLM's price table; None where the price is unknown, never 0 for it."""
    request_id: str | None = None
    """The provider's name for the request."""
    attempts: int = 1
    """Requests that this call made, the successful one included."""
    queued: float = 0.0
    """Seconds that the successful one waited for a turn, under `max_concurrency`."""
    cached: bool = False
    """For an application that answers from a cache of its own; always False here."""
    reasoning: str | None = None
    """The reasoning text, where the provider shows it."""
    rate_limits: RateLimits | None = None
    texts: list[str] = Field(default_factory=list)
    """The texts of all choices, where more than one was asked for; `text` is first."""
    refusal: str | None = None
    """What the model said in place of an answer, where it declined."""
    thinking_blocks: list[dict[str, Any]] = Field(default_factory=list, repr=False)
    """Anthropic's thinking blocks; `to_messages` sends them back."""

    def to_messages(self) -> list[dict[str, Any]]:
        """Return what to append to a conversation so that it can go on from here.

        One assistant message in OpenAI's shape, with what Anthropic, Google and Ollama
        want back: thinking blocks, thought signatures, reasoning text. Answer each of
        `tool_calls` after it with `ToolCall.to_message`.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.thinking_blocks:
            message["thinking_blocks"] = self.thinking_blocks
        elif self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_text},
                    **(
                        {
                            "provider_specific_fields": {
                                "thought_signature": call.thought_signature
                            }
                        }
                        if call.thought_signature
                        else {}
                    ),
                }
                for call in self.tool_calls
            ]
        elif not self.text:
            message["content"] = ""
        return [message]


SAMPLING = (
    "temperature",
    "max_tokens",
    "top_p",
    "n",
    "stop",
    "seed",
    "reasoning_effort",
)
"""The options that travel to the provider as they are, under OpenAI's names."""

OPTIONS = frozenset({*LLMRequestOptions.model_fields, "options"})
"""Every keyword that a call takes beside messages, model, key and service."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request as an adapter gets it: checked, and nothing left to look up."""

    messages: Sequence[Mapping[str, Any]]
    """OpenAI-shaped, oldest first; any system message uses the role "system"."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Those of SAMPLING that were given."""
    tools: Sequence[Any] = ()
    """As for `LLMRequestOptions`, as are the next two."""
    tool_choice: str | Mapping[str, Any] | None = None
    response_format: Any | None = None
    """What is asked for; an adapter asks, and the service above it checks and parses."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Sent as it is, for what this package does not know."""
    timeout: float = 300.0
    """Seconds for this attempt; of a stream, for its first chunk."""
    idle_timeout: float | None = None
    """Seconds to wait for a stream's next chunk; None takes `timeout`."""
    deadline: float | None = None
    """Seconds for the whole call; kept by the service, as an adapter makes one attempt."""


def request_from_options(
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    default_timeout: float,
    default_idle_timeout: float | None = None,
) -> ChatRequest:
    """Make a request of messages and the keywords of a call.

    Args:
        messages: OpenAI-shaped, oldest first.
        options: Any of OPTIONS. A keyword that is None counts as not given.
        default_timeout: Seconds for an attempt where no `timeout` is given.
        default_idle_timeout: Seconds for a stream's next chunk, likewise.

    Raises:
        TypeError: A keyword is none of OPTIONS; the message names it.
        InvalidRequestError: A time is not above 0.
    """
    bundle = options.get("options")
    unknown = sorted(set(options) - OPTIONS)
    if isinstance(bundle, Mapping):
        unknown += sorted(set(bundle) - OPTIONS)
    if unknown:
        raise TypeError(
            f"unexpected keyword {unknown[0]!r}; known are {', '.join(sorted(OPTIONS))}."
            " What this package does not know travels in extra_body={…}"
        )
    given = _renamed(_fields(bundle)) if bundle is not None else {}
    given |= _renamed((k, v) for k, v in options.items() if k != "options")
    return ChatRequest(
        messages=messages,
        sampling={name: given[name] for name in SAMPLING if name in given},
        tools=tuple(given.get("tools") or ()),
        tool_choice=given.get("tool_choice"),
        response_format=given.get("response_format"),
        extra_body=given.get("extra_body") or {},
        timeout=_seconds(given, "timeout") or default_timeout,
        idle_timeout=_seconds(given, "idle_timeout") or default_idle_timeout,
        deadline=_seconds(given, "deadline"),
    )


def _renamed(given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Keep what is given, the older name of `response_format` under the newer."""
    kept = {name: value for name, value in given if value is not None}
    if "text_format" in kept:
        kept.setdefault("response_format", kept.pop("text_format"))
    return kept


def _seconds(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise InvalidRequestError(f"{name}={value!r} is no number of seconds above 0")
    return float(value)


def _fields(bundle: Any) -> Iterable[tuple[str, Any]]:
    """Name the options that a bundle sets: ours, the application's own, or a mapping."""
    if isinstance(bundle, Mapping):
        return bundle.items()
    return ((name, getattr(bundle, name, None)) for name in OPTIONS - {"options"})


class Person(BaseModel):
    """A participant: who it is, which model it thinks with, and what it remembers.

    `model_dump_json` and `model_validate_json` keep one between two runs.
    """

    id: str
    """Tells this person from the others in a conversation."""
    name: str = ""
    """For people to read; the id where it is empty."""
    llm_config: PersonLLMConfig | Any | None = Field(None, union_mode="left_to_right")
    """Its model and prompt: anything with the attributes of `PersonLLMConfig`."""
    messages: list[Annotated[Message | Any, Field(union_mode="left_to_right")]] = Field(
        default_factory=list
    )
    """What it remembers, oldest first: anything with the attributes of `Message`."""

    def __init__(
        self,
        id: str,  # noqa: A002 - the attribute's name is the application's
        name: str = "",
        llm_config: Any = None,
        messages: Iterable[Any] = (),
    ) -> None:
        given = list(messages)
        super().__init__(id=id, name=name or id, llm_config=llm_config, messages=given)

    def __repr__(self) -> str:
        return (
            f"Person(id={self.id!r}, name={self.name!r}, {len(self.messages)} messages)"
        )

    def get_messages(self) -> list[Any]:
        """Return the conversation, oldest first, as a list of the caller's own."""
        return list(self.messages)

    def add_message(self, message: Any) -> None:
        """Remember a message; anything with the attributes of `Message` will do."""
        self.messages.append(message)

    async def complete(
        self,
        prompt: Content,
        llm_service: "LLMServicePort",
        from_person_id: str = "system",
        **options: Any,
    ) -> ChatResult:
        """Hear a prompt, answer it, and remember both.

        Args:
            prompt: What is said to this person.
            llm_service: What the answer comes through.
            from_person_id: Who says it; another person's id, or "system".
            **options: As for `LLMServicePort.complete_with_person`.

        Raises:
            ValueError: This person has no `llm_config`.
            DiPeOLLMError: As from the service.

        On failure, and on cancellation, which closes the call's connection, the
        conversation is as it was before. It grows only when the answer is there, so
        that two calls at once do not see each other's half.
        """
        if self.llm_config is None:
            raise ValueError(f"person {self.id!r} has no llm_config")
        heard = Message(
            from_person_id=from_person_id, to_person_id=self.id, content=prompt
        )
        result = await llm_service.complete_with_person(
            person_messages=[*self.messages, heard],
            person_id=self.id,
            llm_config=self.llm_config,
            **options,
        )
        said = Message(
            from_person_id=self.id, to_person_id=from_person_id, content=result.text
        )
        self.messages += [heard, said]
        return result

    def _prepare_messages_for_llm(
        self, system_prompt: str | None = None
    ) -> list[dict[str, Any]]:
        """Format this person's conversation. Deprecated."""
        warnings.warn(
            "Person._prepare_messages_for_llm() is deprecated: call"
            " LLMInfraService.complete_with_person(person_messages=person.get_messages(),"
            " person_id=person.id, llm_config=person.llm_config), which formats the"
            " messages itself",
            DeprecationWarning,
            stacklevel=2,
        )
        head = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return head + [
            {
                "role": "assistant" if m.from_person_id == self.id else "user",
                "content": m.content,
            }
            for m in self.messages
        ]


@dataclass(slots=True)
class ToolCallDelta:
    """A piece of a tool call in a stream."""

    index: int
    """Which of the parallel calls it belongs to, from 0."""
    id: str | None = None
    """The call's id, in its first piece; None: as before."""
    name: str | None = None
    """The function's name, in its first piece; None: as before."""
    arguments: str = ""
    """A piece of the arguments' JSON text."""


@dataclass(slots=True)
class StreamChunk:
    """A piece of a streamed answer, as soon as it came. One of its fields is filled."""

    text: str = ""
    """A piece of the answer's text."""
    reasoning: str = ""
    """A piece of the reasoning text, where the provider shows it."""
    tool_call: ToolCallDelta | None = None
    """A piece of a tool call."""
