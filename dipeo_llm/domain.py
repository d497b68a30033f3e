"""The domain's models: messages, persons, options, results.

Pure data: no provider, no network, no LiteLLM. A Person knows only the type of the port
that it calls.
"""

import difflib
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    Protocol,
    Self,
    TypeAlias,
    TypedDict,
    Unpack,
    overload,
)

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import to_json
from typing_extensions import TypeVar

from dipeo_llm.errors import InvalidRequestError, StructuredOutputError
from dipeo_llm.functions import read_arguments

if TYPE_CHECKING:
    from dipeo_llm.ports import LLMServicePort

T = TypeVar("T", default=Any)
"""The type that `response_format` asks for."""

Content = str | list[str | Path | dict[str, Any]]
"""Text, or a list of texts, paths of local files, and OpenAI content parts."""

ResponseFormat: TypeAlias = type[T] | Mapping[str, Any] | UnionType
"""A pydantic class or another type, a JSON schema, or OpenAI's `response_format`."""

_KnownService = Literal[
    "openai",
    "anthropic",
    "google",
    "gemini",
    "ollama",
    "bedrock",
    "vertex",
    "deepseek",
]
ServiceName: TypeAlias = _KnownService | str | Enum
"""A provider's name, or a member of any enum with such a name as its value.

An editor completes the known names; any other name that LiteLLM knows works too.
"""

Effort: TypeAlias = (
    Literal["none", "minimal", "low", "medium", "high", "xhigh"] | str  # noqa: PYI051
)
"""A reasoning effort; the models differ in which they take."""

CacheMode: TypeAlias = Literal["bypass", "refresh", "only"]
"""How a call uses the cache: not at all, to store but not to read, or to read and never
ask the provider. Without one, it reads and stores."""

ToolChoice: TypeAlias = Literal["auto", "none", "required"] | Mapping[str, Any]
"""One of the words, or OpenAI's dict that names a function."""


class LLMService(StrEnum):
    """The providers with a name here. `google` and `gemini` are the same provider."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GOOGLE = "google"
    GEMINI = "gemini"
    OLLAMA = "ollama"
    BEDROCK = "bedrock"
    VERTEX = "vertex"
    DEEPSEEK = "deepseek"


class Message(BaseModel):
    """One message from one person to another."""

    from_person_id: str
    """The speaker; "system" for the application itself."""
    to_person_id: str
    """The listener."""
    content: Content
    """The message. In JSON a path is `{"type": "path", "path": "…"}`, so that it is a
    path again when it is read. A message without content is left out of a request."""
    id: str | None = None
    """The application's own, like the fields below; none of them is ever sent."""
    message_type: str | None = None
    """A label, such as "person_to_person"."""
    timestamp: str | None = None
    """The time of the message, in the application's own format."""
    metadata: dict[str, Any] | None = None
    """Anything else that the application keeps with the message."""

    @field_validator("content", mode="before")
    @classmethod
    def _read_paths(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return [
            Path(part["path"])
            if isinstance(part, dict)
            and part.keys() == {"type", "path"}
            and part["type"] == "path"
            else part
            for part in content
        ]

    @field_serializer("content", when_used="json")
    def _tag_paths(self, content: Content) -> str | list[str | dict[str, Any]]:
        if isinstance(content, str):
            return content
        return [
            {"type": "path", "path": str(part)} if isinstance(part, Path) else part
            for part in content
        ]


def _read_number(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, bool | str):  # which pydantic would convert
        raise ValueError("it must be a number")  # noqa: TRY004 - pydantic collects it
    number = read(value)
    return value if isinstance(value, int) else number


_Number = Annotated[float, WrapValidator(_read_number)]
_Temperature = Annotated[_Number, Field(ge=0, lt=float("inf"))]
_Seconds = Annotated[_Number, Field(gt=0, lt=float("inf"))]
_Integer = Annotated[int, WrapValidator(_read_number)]
_Count = Annotated[_Integer, Field(ge=1)]


class PersonLLMConfig(BaseModel):
    """A person's model, prompt and default options. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    service: Annotated[LLMService | str | None, Field(union_mode="left_to_right")] = (
        None
    )
    """None: the model string decides."""
    model: str
    """A model string, as for `LLMInfraService.complete`; it may have a prefix."""
    api_key_id: str | None = None
    """The key's id, never the key itself. None for a provider that needs no key."""
    system_prompt: str | None = None
    """Used if `prompt_file` is None or cannot be read."""
    prompt_file: str | None = None
    """Path of a text file, relative to the base directory; a template if it ends in
    `.j2`."""
    prompt_variables: dict[str, Any] | None = None
    """Values for a template. Unless it is None, the prompt is a template under any file
    name, and `system_prompt` too."""
    temperature: _Temperature | None = None
    """The person's default, like the two below; an option of the call wins."""
    max_tokens: _Count | None = None
    reasoning_effort: str | None = None


def person_defaults(llm_config: Any) -> dict[str, Any]:
    """Return the default options of a person's configuration.

    Args:
        llm_config: Any object; attributes that are missing or None are left out.
    """
    found = ((name, getattr(llm_config, name, None)) for name in _PERSON_OPTIONS)
    return {name: value for name, value in found if value is not None}


_PERSON_OPTIONS = ("temperature", "max_tokens", "reasoning_effort")


class ToolType(StrEnum):
    """A provider's own tool."""

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


class ToolLike(Protocol):
    """An application's own class with the attributes of `ToolConfig`."""

    @property
    def type(self) -> Any:
        """A `ToolType`, or its value."""
        ...


Tool: TypeAlias = Callable[..., Any] | Mapping[str, Any] | ToolConfig | ToolLike
"""A function or a pydantic class, a function-tool dict, or a provider's own tool."""


class WebSearchResult(BaseModel):
    """A page that the provider found and used."""

    url: str
    title: str = ""
    snippet: str = ""
    """The quoted text; empty if the provider quotes none."""
    score: float | None = None
    """Always None: no provider reports a score."""


class ImageGenerationResult(BaseModel):
    """An image that the provider generated."""

    image_data: str
    """Base64, without a data: prefix."""
    format: str = "png"
    """The subtype of its media type: png, jpeg or webp."""
    width: int | None = None
    """Pixels, like the height; always None: no provider reports them."""
    height: int | None = None


class ToolOutput(BaseModel):
    """The result of one of the provider's own tools."""

    type: ToolType
    """The tool: WEB_SEARCH or IMAGE_GENERATION."""
    result: list[WebSearchResult] | ImageGenerationResult | str | dict[str, Any]
    """The pages of a web search, or an image; no other kind is produced here."""
    raw_response: Any | None = None
    """Always None; the provider's JSON is in `ChatResult.raw_response`."""


class ToolCall(BaseModel):
    """A call that the model asks the caller to make."""

    id: str
    """The provider's id of the call, or a generated one if it sends none."""
    name: str
    """The function's name."""
    arguments: dict[str, Any] | None = None
    """The arguments as JSON values; None if `arguments_text` is not a JSON object."""
    arguments_text: str = ""
    """The arguments as the model wrote them."""
    thought_signature: str | None = None
    """Google's thought signature of the call, sent back with its result."""

    def arguments_for(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the arguments in the types that a function is annotated with.

        `function(**call.arguments_for(function))` makes the call: a model, a date or an
        enum arrives as one.

        Args:
            function: The tool as it was given to the call.

        Raises:
            StructuredOutputError: The arguments do not fit; the message names each of
                them and can be sent back to the model.
            InvalidRequestError: The function cannot be described.
        """
        try:
            if self.arguments is None:
                raise ValueError("they are not a JSON object")
            return read_arguments(function, self.arguments)
        except ValueError as exc:
            raise StructuredOutputError(
                f"the arguments of {self.name!r} are invalid: {exc}",
                text=self.arguments_text,
            ) from exc

    def to_message(self, output: Any) -> dict[str, Any]:
        """Return the message that answers this call; append it after the turn.

        Args:
            output: The tool's result: text, or any value that pydantic can convert to
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
    """Tokens of one call, counted in the same way for every provider."""

    input: int = 0
    """All input tokens, including those from a cache."""
    output: int = 0
    """All output tokens, including reasoning."""
    cached: int = 0
    """The part of `input` that the provider read from its prompt cache."""
    total: int = 0
    """`input` and `output` together."""
    cache_written: int = 0
    """The part of `input` that the provider wrote to its prompt cache."""
    reasoning: int = 0
    """The part of `output` that was reasoning."""

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        self.total = self.total or self.input + self.output
        return self

    def __add__(self, other: "TokenUsage") -> "TokenUsage":
        """Return the tokens of both; `sum(usages, TokenUsage())` adds up many."""
        if not isinstance(other, TokenUsage):
            return NotImplemented
        mine, others = vars(self), vars(other)
        return TokenUsage(**{name: mine[name] + others[name] for name in mine})


class RateLimits(BaseModel):
    """The rate limits that the provider reports for the key; None if it does not."""

    requests_left: int | None = None
    """Requests left until the reset."""
    requests_reset: float | None = None
    """Seconds until the full number of requests is available."""
    tokens_left: int | None = None
    """Tokens left until the reset."""
    tokens_reset: float | None = None
    """Seconds until the full number of tokens is available."""


def _list_tools(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping) or callable(value) or hasattr(value, "type"):
        return [value]
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(  # noqa: TRY004 - pydantic collects it
            "it must be a list of functions, dicts or ToolConfig objects"
        )
    return list(value)


class LLMRequestOptions(BaseModel):
    """Options of a call as one object; a keyword of the call wins over it."""

    model_config = ConfigDict(extra="forbid")

    temperature: _Temperature | None = None
    """Randomness: 0 to 2 for OpenAI and Google, 0 to 1 for Anthropic, 0 or more for
    Ollama. Sent unchanged; above the range, the provider's error is raised."""
    max_tokens: _Count | None = None
    """Most tokens of the answer, including reasoning. None is the provider's limit; for
    Anthropic, which requires a limit, it is LiteLLM's."""
    top_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    """Share of the likeliest tokens to choose from, 0 to 1."""
    n: _Count | None = None
    """Number of answers, all in `ChatResult.texts`; dropped where only 1 is possible."""
    stop: str | list[str] | None = None
    """Texts that end the answer; they are not part of it."""
    seed: _Integer | None = None
    """Makes the same request more likely to get the same answer."""
    tools: Annotated[Sequence[Tool] | None, PlainValidator(_list_tools)] = None
    """Functions, pydantic classes, function-tool dicts, and `ToolConfig` objects."""
    tool_choice: ToolChoice | None = None
    """One of "auto", "none" and "required", or OpenAI's dict that names a function."""
    response_format: Any = None
    """A pydantic class or another type, a JSON schema, or OpenAI's own dict."""
    text_format: Any = None
    """DiPeO's older name for `response_format`."""
    reasoning_effort: Effort | None = None
    """One of "none", "minimal", "low", "medium" and "high", where the model has it."""
    timeout: _Seconds | None = None
    """Seconds for one attempt; for a stream, until its first chunk."""
    idle_timeout: _Seconds | None = None
    """Seconds to wait for a stream's next chunk."""
    deadline: _Seconds | None = None
    """Seconds for the whole call: key, prompt file, media, all attempts and waits."""
    extra_body: Mapping[str, Any] | None = None
    """Merged into the request's JSON, object by object; wins over the rest."""
    cache: CacheMode | None = None
    """Whether this call reads and stores in the service's cache; None: both."""
    sample: Annotated[_Integer, Field(ge=0)] | None = None
    """Which sample of the same request is asked for: a part of the cache's key that is
    never sent. Two samples are two answers, also if they are asked for at once."""
    coalesce: bool | None = None
    """False makes a call of its own where an identical one is in flight; None and True
    share its answer, if the service has a cache."""
    session: Annotated[str, Field(min_length=1)] | None = None
    """Names a conversation, for a route: its calls stay at one deployment, whose prompt
    cache is warm; never sent. None is the person, with `execution_id` if it is given."""
    execution_phase: Any = None
    """The application's own labels, like the four below; never sent."""
    execution_id: Any = None
    trace_id: Any = None
    person_name: Any = None
    node_id: Any = None


class CommonOptions(TypedDict, total=False):
    """The options that every call takes with the same type.

    The fields are explained at `LLMRequestOptions`.
    """

    temperature: float | None
    max_tokens: int | None
    top_p: float | None
    n: int | None
    stop: str | list[str] | None
    seed: int | None
    tool_choice: ToolChoice | None
    text_format: Any
    reasoning_effort: Effort | None
    timeout: float | None
    idle_timeout: float | None
    deadline: float | None
    extra_body: Mapping[str, Any] | None
    cache: CacheMode | None
    sample: int | None
    coalesce: bool | None
    session: str | None
    execution_phase: Any
    execution_id: Any
    trace_id: Any
    person_name: Any
    node_id: Any
    options: Any
    """An LLMRequestOptions, a mapping, or any object with its attributes."""
    provider: ServiceName | None
    """The same as `service`, like the next."""
    service_name: ServiceName | None


class CallOptions(CommonOptions, total=False):
    """All keyword options of a call, for a function that passes them on.

    `async def ask(question: str, **options: Unpack[CallOptions])` gives the caller the
    same completion and checks as the call itself.
    """

    tools: Sequence[Tool] | None
    response_format: ResponseFormat[Any] | None


class TokenCount(BaseModel):
    """Tokens of a request that was not sent."""

    tokens: int
    """Input tokens, including those of the tools."""
    source: str
    """The source of the number: "provider", or "tokenizer" for LiteLLM's."""


class Capabilities(BaseModel):
    """A model's features, limits and prices by LiteLLM's table; None where unknown.

    The flags say whether the model supports function tools, several calls at once,
    images, PDFs, audio, structured output, reasoning, prompt caching, and the provider's
    own web search.
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


class ChatResult(BaseModel, Generic[T]):
    """The result of a call, in the same terms for every provider.

    `ChatResult[River]` is the result of a call with `response_format=River`: `parsed` is
    a River. A call with tools returns `ChatResult[River | None]`, because a turn that
    calls tools has no answer yet: check `if result.parsed is not None` first.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    text: str = ""
    """The answer's text; empty if the model only called tools or generated images."""
    token_usage: TokenUsage | None = None
    """None if the provider reported no usage."""
    raw_response: Any | None = Field(default=None, repr=False)
    """The provider's own JSON; for a stream, assembled from its events. For a provider
    without a format here it is LiteLLM's response object."""
    tool_outputs: list[ToolOutput] | None = None
    """Results of the provider's own tools: searches, images."""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    """Calls that the caller is asked to make."""
    parsed: T = Field(default=None)  # type: ignore[assignment]
    """The answer as `response_format` asked for it; None without one, and for a turn
    that calls tools."""
    finish_reason: str | None = None
    """stop, length, tool_calls, content_filter, pause (a long turn of Anthropic's own
    tools, to be continued with `to_messages`), or another of the provider's own words
    in lower case, such as Google's malformed_function_call; None if it sent none."""
    model: str | None = None
    """The model that answered, as the provider names it."""
    service: str | None = None
    """The provider that was called, such as "openai"."""
    cost_usd: float | None = None
    """USD by LiteLLM's price table; None if the price is unknown, never 0 for that; 0
    if the answer comes from the cache."""
    request_id: str | None = None
    """The provider's id of the request."""
    attempts: int = 1
    """Requests that this call sent, including the successful one."""
    queued: float = 0.0
    """Seconds that the call waited for its turn: the successful request for a permit
    under `max_concurrency`, and the call for a deployment of its route."""
    cached: bool = False
    """True if this call sent nothing: the answer comes from the cache, or from an
    identical call that was in flight. Its `token_usage` and `cost_usd` are then 0, and
    so is `attempts`."""
    route: str | None = None
    """The route that was asked for; None for a model."""
    deployment: str | None = None
    """The deployment of the route that answered."""
    tried: list[str] = Field(default_factory=list)
    """The deployments that this call tried, in order, the one that answered last; empty
    if the answer comes from the cache."""
    original_usage: TokenUsage | None = None
    """The tokens of the call that the provider answered, where `cached` is true."""
    original_cost_usd: float | None = None
    """The USD of that call; None if the price is unknown."""
    reasoning: str | None = None
    """The reasoning text, if the provider shows it."""
    rate_limits: RateLimits | None = None
    texts: list[str] = Field(default_factory=list)
    """The texts of all choices if more than one was asked for; `text` is the first."""
    refusal: str | None = None
    """The model's own words if it declined to answer."""
    thinking_blocks: list[dict[str, Any]] = Field(default_factory=list, repr=False)
    """Anthropic's thinking blocks; `to_messages` sends them back."""
    content_blocks: list[dict[str, Any]] = Field(default_factory=list, repr=False)
    """Anthropic's or Google's whole content, where their own tools worked in it;
    `to_messages` sends it back, so that a turn that paused can continue."""

    def to_messages(self) -> list[dict[str, Any]]:
        """Return what to append to a conversation to continue it after this turn.

        One assistant message in OpenAI's format, with the fields that Anthropic, Google
        and Ollama expect back: thinking blocks, thought signatures, reasoning text.
        After it, answer each of `tool_calls` with `ToolCall.to_message`.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.thinking_blocks:
            message["thinking_blocks"] = self.thinking_blocks
        elif self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.content_blocks:
            fields = {"content_blocks": self.content_blocks}
            message["provider_specific_fields"] = fields
        if self.tool_calls:
            message["tool_calls"] = [_to_openai(call) for call in self.tool_calls]
        elif not self.text:
            message["content"] = ""
        return [message]


def _to_openai(call: ToolCall) -> dict[str, Any]:
    arguments = call.arguments_text.strip()
    if arguments in {"", "null"}:
        # Servers fail on a text that is not JSON, and Google invents arguments for it.
        arguments = to_json(call.arguments or {}).decode()
    made: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
    if call.thought_signature:
        fields = {"thought_signature": call.thought_signature}
        made["provider_specific_fields"] = fields
    return made


SAMPLING = (
    "temperature",
    "max_tokens",
    "top_p",
    "n",
    "stop",
    "seed",
    "reasoning_effort",
)
"""The options that are sent to the provider unchanged, under OpenAI's names."""

_LONGEST_LABEL = 256

LABELS = ("execution_phase", "execution_id", "trace_id", "person_name", "node_id")
"""The application's own labels of a call."""

OPTIONS = frozenset({*LLMRequestOptions.model_fields, "options"})
"""Every keyword that a call takes besides messages, model, key and service."""


UsageSoFar: TypeAlias = Callable[[], TokenUsage | None]
"""Returns the usage that the provider has told so far."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request as an adapter receives it: validated and complete."""

    messages: Sequence[Mapping[str, Any]]
    """In OpenAI's format, oldest first; system messages have the role "system"."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The options of SAMPLING that were given."""
    tools: Sequence[Any] = ()
    """As for `LLMRequestOptions`, like the next two."""
    tool_choice: str | Mapping[str, Any] | None = None
    response_format: Any | None = None
    """The adapter sends it; the service checks and parses the answer."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Sent unchanged: fields that this package does not know."""
    timeout: float = 300.0
    """Seconds for this attempt; for a stream, until its first chunk."""
    idle_timeout: float | None = None
    """Seconds to wait for a stream's next chunk; None is `timeout`."""
    deadline: float | None = None
    """Seconds for the whole call, which only the service enforces."""
    cache: CacheMode | None = None
    """As for `LLMRequestOptions`; only the service looks at it and at the next two."""
    sample: int | None = None
    coalesce: bool = True
    session: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Those of LABELS that were given; for the record of the call, never sent."""
    watch_usage: Callable[[UsageSoFar], object] | None = field(
        default=None, compare=False, repr=False
    )
    """The adapter calls it when an answer begins, so that the record of a call that ends
    early has what the provider had told."""


def request_from_options(
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    default_timeout: float,
    default_idle_timeout: float | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ChatRequest:
    """Build a request from messages and the keywords of a call.

    Args:
        messages: In OpenAI's format, oldest first.
        options: Any of OPTIONS. None counts as not given.
        default_timeout: Seconds for an attempt without a `timeout`.
        default_idle_timeout: Seconds for a stream's next chunk without an `idle_timeout`.
        defaults: Options of lowest rank, such as a person's own.

    Raises:
        TypeError: An unknown keyword; the message names the nearest known one.
        InvalidRequestError: A value cannot be sent; the message names the option.
    """
    bundle = options.get("options")
    keywords = {name: value for name, value in options.items() if name != "options"}
    given = {**(defaults or {}), **_rename(_read_bundle(bundle)), **_rename(keywords)}
    if not given.keys() <= _FIELDS:
        raise unknown_keyword(min(given.keys() - _FIELDS), {*OPTIONS, "service"})
    try:
        # The validated options by name; those that were not given are None.
        read = vars(LLMRequestOptions.model_validate(given)) if given else _NOT_GIVEN
    except ValidationError as exc:
        raise _explain(exc) from None
    return ChatRequest(
        messages=messages,
        sampling={name: read[name] for name in SAMPLING if read[name] is not None},
        tools=tuple(read["tools"] or ()),
        tool_choice=read["tool_choice"],
        response_format=read["response_format"],
        extra_body=read["extra_body"] or {},
        timeout=read["timeout"] or default_timeout,
        idle_timeout=read["idle_timeout"] or default_idle_timeout,
        deadline=read["deadline"],
        cache=read["cache"],
        sample=read["sample"],
        coalesce=read["coalesce"] is not False,
        session=read["session"],
        labels={name: label(read[name]) for name in LABELS if read[name] is not None},
    )


def label(value: Any) -> str:
    """Return an application's label as text, at most 256 characters of it.

    Half of a surrogate pair is escaped: exporters of telemetry fail at it.
    """
    text = str(getattr(value, "value", value))[:_LONGEST_LABEL]
    return text.encode(errors="backslashreplace").decode()


def unknown_keyword(name: str, known: Iterable[str]) -> TypeError:
    """Return the error for an unknown keyword, with the nearest known one."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {_listed(known)}."
    return TypeError(
        f"unexpected keyword {name!r}; {hint} Fields that this package does not know go"
        " into extra_body={…}"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _read_bundle(bundle: Any) -> dict[str, Any]:
    """Return the options in an object: a mapping, ours, or the application's own."""
    if bundle is None:
        return {}
    if isinstance(bundle, Mapping):
        return dict(bundle)
    return {name: getattr(bundle, name, None) for name in _FIELDS}


_FIELDS = LLMRequestOptions.model_fields.keys()
_NOT_GIVEN: Mapping[str, Any] = vars(LLMRequestOptions())


def _rename(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is None, and use the newer name of `text_format`."""
    given = {name: value for name, value in options.items() if value is not None}
    if "text_format" in given:
        given.setdefault("response_format", given.pop("text_format"))
    return given


def _explain(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    name, value = first["loc"][0], reprlib.repr(first["input"])
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem.replace("Input should be", "it must be")
    return InvalidRequestError(f"{name}={value} cannot be sent: {problem}")


class Person(BaseModel):
    """A participant: its identity, its model and its conversation.

    `model_dump_json` and `model_validate_json` store and restore one.
    """

    id: str
    """Unique among the persons of a conversation."""
    name: str = ""
    """A name for people to read; the id if it is empty."""
    llm_config: Annotated[
        PersonLLMConfig | Any | None, Field(union_mode="left_to_right")
    ] = None
    """Its model and prompt: any object with the attributes of `PersonLLMConfig`."""
    messages: list[Annotated[Message | Any, Field(union_mode="left_to_right")]] = Field(
        default_factory=list
    )
    """The conversation, oldest first: any objects with the attributes of `Message`."""

    @field_validator("llm_config", mode="before")
    @classmethod
    def _read_config(cls, value: Any) -> Any:
        # As a member of a union, a mapping that does not fit would be kept as it is.
        is_mapping = isinstance(value, Mapping)
        return PersonLLMConfig.model_validate(value) if is_mapping else value

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
        """Return the conversation, oldest first, as a new list."""
        return list(self.messages)

    def add_message(self, message: Any) -> None:
        """Append a message: any object with the attributes of `Message`."""
        self.messages.append(message)

    @overload
    async def complete(
        self,
        prompt: Content,
        llm_service: "LLMServicePort",
        from_person_id: str = "system",
        *,
        variables: Mapping[str, Any] | None = None,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: None = None,
        **options: Unpack[CommonOptions],
    ) -> ChatResult[T]: ...
    @overload
    async def complete(
        self,
        prompt: Content,
        llm_service: "LLMServicePort",
        from_person_id: str = "system",
        *,
        variables: Mapping[str, Any] | None = None,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: Sequence[Tool] | None,
        **options: Unpack[CommonOptions],
    ) -> ChatResult[T | None]: ...
    async def complete(
        self,
        prompt: Content,
        llm_service: "LLMServicePort",
        from_person_id: str = "system",
        **options: Any,
    ) -> ChatResult[Any]:
        """Answer a prompt as this person, and append both to the conversation.

        Args:
            prompt: The message to this person.
            llm_service: The service that makes the call.
            from_person_id: The speaker: another person's id, or "system".
            **options: As for `LLMServicePort.complete_with_person`; `variables` too.

        Raises:
            ValueError: This person has no `llm_config`.
            DiPeOLLMError: As from the service.

        A call that fails or is cancelled, which closes its connection, leaves the
        conversation unchanged. The messages are appended when the answer is complete,
        so that two concurrent calls do not see half of each other.
        """
        if self.llm_config is None:
            raise ValueError(f"person {self.id!r} has no llm_config")
        asked = Message(
            from_person_id=from_person_id, to_person_id=self.id, content=prompt
        )
        result: ChatResult[Any] = await llm_service.complete_with_person(
            person_messages=[*self.messages, asked],
            person_id=self.id,
            llm_config=self.llm_config,
            **options,
        )
        answer = Message(
            from_person_id=self.id, to_person_id=from_person_id, content=result.text
        )
        self.messages += [asked, answer]
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


LEFT_OUT = frozenset(
    {
        *("timeout", "idle_timeout", "deadline", "cache", "coalesce"),
        *("labels", "session", "watch_usage"),
        *LABELS,
    }
)
"""The fields of a request that its answer does not depend on; every other one counts."""
