"""OpenAI's chat completions, and every server that speaks their format.

OpenAI's other endpoint, Responses, has a file of its own; this adapter decides when a
request must go there.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

from dipeo_llm.adapters.attempt import Attempt
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.events import StreamReader
from dipeo_llm.adapters.provider import ModelList, Probe, Provider
from dipeo_llm.adapters.reading import (
    JSON,
    Reading,
    make_call_id,
    merge_pages,
    read_function,
    read_tool_call,
)
from dipeo_llm.adapters.request import (
    OPENAI_FIELDS,
    Message,
    PreparedRequest,
    drop_cache_control,
    keep_fields,
)
from dipeo_llm.adapters.translation import (
    JSON_HEADERS,
    Outgoing,
    find_config,
    map_options,
)
from dipeo_llm.domain import (
    ImageGenerationResult,
    StreamChunk,
    ToolCall,
    ToolCallDelta,
    ToolConfig,
    ToolType,
    WebSearchResult,
)
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.litellm_import import load_litellm
from dipeo_llm.litellm_providers import describe, path_below, translate_openai
from dipeo_llm.litellm_tables import known_model_info, model_info
from dipeo_llm.media import PDF, PICTURES, MediaRules

# https://platform.openai.com/docs/guides/images-vision#image-input-requirements
# https://developers.openai.com/api/docs/guides/file-inputs: PDF only, never by URL
# https://platform.openai.com/docs/guides/audio: wav and mp3; all read 2026-11-23.
_MEDIA = MediaRules(
    types=PICTURES | {PDF, "audio/wav", "audio/mp3"}, fetches_images=True
)

OPENAI = Provider(
    name="openai",
    litellm="openai",
    aliases=("chatgpt", "gpt"),
    base_url="https://api.openai.com/v1",
    path="/v1",
    key_variables=("OPENAI_API_KEY",),
    system_role="developer",
    most_stops=4,
    highest_temperature=2.0,
    client="sdk",
    claims=re.compile(
        r"(?:ft:)?(?:gpt-(?!oss)[\w.-]+|chatgpt-[\w.-]+|o[1-9](?:-[\w.-]+)?"
        r"|codex-[\w.-]+|davinci-002|babbage-002)(?::.*)?"
        r"|computer-use-preview[\w.-]*|text-embedding-(?:3|ada)-[\w.-]+"
        r"|dall-e-\d|whisper-1|tts-1[\w.-]*|omni-moderation-[\w.-]+"
    ),
    media=_MEDIA,
)
DEEPSEEK = Provider(
    name="deepseek",
    litellm="deepseek",
    base_url="https://api.deepseek.com/v1",
    key_variables=("DEEPSEEK_API_KEY",),
    claims=re.compile(r"deepseek-(?:chat|reasoner)"),
)

_OPENAI_HOST = "api.openai.com"
_CHAT_ONLY = re.compile(r"(?:ft:)?(?:gpt-[34]|chatgpt-)")
_TAKES_NO_STOP = re.compile(r"(?:ft:)?o[34](?:-|$)")
_REASONS = re.compile(r"(?:ft:)?o[1-9](?:-|:|$)")
# Names without a version, which LiteLLM does not know (1.110.2), for models that reason:
# https://platform.openai.com/docs/models (2026-11-25).
# Rows that LiteLLM's table lacks, or has without their limit (1.110.2).
_NEWER = re.compile(r"gpt-(?:[5-9]|\d\d)")
_LATEST = re.compile(r"(?:gpt-[a-z]+-|chat-)latest|gpt-(?:[7-9]|\d\d)")
_TUNED = re.compile(r"ft:([^:]+)")
_ALL_EFFORTS = frozenset({None, "none", "minimal", "low", "medium", "high", "xhigh"})
# They search in every answer and take little else:
# https://platform.openai.com/docs/guides/tools-web-search?api-mode=chat (2026-11-25).
_SEARCH_PREVIEW = re.compile(r"gpt-4o(?:-mini)?-search-preview")
_SEARCHES = re.compile(r".*-search-(?:preview|api)")
_CANNOT_SEARCH = re.compile(r"(?:ft:)?gpt-4\.1-nano")
# https://platform.openai.com/docs/guides/deep-research (2026-11-25)
_DEEP_RESEARCH = re.compile(r".*-deep-research")
# Structured output came with gpt-4o-2024-08-06 (2026-11-25):
# https://platform.openai.com/docs/guides/structured-outputs#supported-models
_TAKES_NO_SCHEMA = re.compile(
    r"(?:ft:)?(?:gpt-3\.5|gpt-4(?:$|:|-\d{4}(?:$|-|:)|-turbo|-32k)|gpt-4o-2024-05-13"
    r"|chatgpt-|o1-mini|o1-preview)"
)
# The efforts of the series whose levels LiteLLM's table does not hold (1.110.2):
# https://platform.openai.com/docs/guides/reasoning and the model pages
# https://platform.openai.com/docs/models/gpt-5-pro, …/gpt-5-codex (2026-11-25).
_EFFORTS: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = (
    (re.compile(r"o1-mini|o1-preview"), frozenset()),
    (_DEEP_RESEARCH, frozenset({"medium"})),
    (re.compile(r"(?:ft:)?o[134](?:-|$)"), frozenset({"low", "medium", "high"})),
    (re.compile(r"gpt-5-pro"), frozenset({"high"})),
    (re.compile(r"gpt-5\.\d+-pro"), frozenset({"medium", "high", "xhigh"})),
    (re.compile(r"gpt-5(?:\.1)?-codex(?!-max)"), frozenset({"low", "medium", "high"})),
    (
        re.compile(r"gpt-5\.\d+-codex"),
        frozenset({"low", "medium", "high", "xhigh"}),
    ),
    (re.compile(r"gpt-5-chat|(?:gpt-5.*-)?chat-latest"), frozenset()),
)
# https://platform.openai.com/docs/guides/structured-outputs (2026-11-25)
_NOT_AT_THE_ROOT = frozenset({"oneOf", "anyOf", "allOf", "enum", "not"})
# They answer 400 or 422 to a field of a message that they do not know:
# https://console.groq.com/docs/openai, https://docs.mistral.ai/api,
# https://inference-docs.cerebras.ai/api-reference/chat-completions (2026-11-25).
_REFUSES_REASONING = frozenset({"groq", "mistral", "cerebras"})
# Together's and Mistral's words for a reason to finish, and the form that `tool_calls`
# replaced: https://docs.together.ai/reference/chat-completions-1,
# https://docs.mistral.ai/api (2026-11-25).
_FINISH = {"function_call": "tool_calls", "eos": "stop", "model_length": "length"}
# LiteLLM asks models that take no JSON schema, such as most of Groq's, for JSON through
# a tool of this name.
_JSON_TOOL = "json_tool_call"


@lru_cache(maxsize=256)
def _is_openai_host(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == _OPENAI_HOST or host.endswith(f".{_OPENAI_HOST}")


@lru_cache(maxsize=1024)
def _is_openais_name(model: str) -> bool:
    return OPENAI.claims.fullmatch(model) is not None


class ChatGPTAdapter(BaseLLMAdapter):
    """Talks to OpenAI, or to a server that speaks its chat completions."""

    rows = (OPENAI, DEEPSEEK)
    probe = Probe("gpt-4.1-nano", ("messages", "max_tokens", "temperature", "tools"))
    # https://platform.openai.com/docs/api-reference/models/list (2026-11-23)
    model_list = ModelList("/models", "data", "id")

    @property
    def is_openai(self) -> bool:
        """Whether the server is OpenAI's own, not one that speaks its format."""
        return _is_openai_host(self.endpoint.base_url or "")

    def prepare_messages(self, messages: list[Message]) -> list[Message]:
        """Keep OpenAI's fields, and send system prompts as the role "developer".

        DeepSeek and Kimi answer 400 to a tool turn without its `reasoning_content`
        (https://api-docs.deepseek.com/guides/thinking_mode,
        https://platform.moonshot.ai/docs/guide/use-kimi-k2-thinking-model), and Gemini
        behind this format to one without its thought signature
        (https://ai.google.dev/gemini-api/docs/thought-signatures; all 2026-11-25).
        """
        # OpenRouter wants the blocks of a thought back as it sent them:
        # https://openrouter.ai/docs/use-cases/reasoning-tokens (2026-11-25).
        own = {"reasoning_details"} if self.provider.name == "openrouter" else set()
        prepared = keep_fields(
            messages,
            OPENAI_FIELDS | {"reasoning_content"} | own,
            system_role=self._system_role,
        )
        is_refused = self._is_openais_model or self.provider.name in _REFUSES_REASONING
        for message in prepared:
            message.setdefault("content", None)
            if not isinstance(name := message.get("name"), str):
                message.pop("name", None)
            else:
                message["name"] = re.sub(r"[\s<|\\/>]+", "_", name)[:64]
            if isinstance(call_id := message.get("tool_call_id"), str):
                message["tool_call_id"] = _shorten(call_id)
            if message["role"] == "tool":
                message.pop("name", None)
            calls = message.get("tool_calls")
            if not calls or is_refused:
                message.pop("reasoning_content", None)
            if calls:
                message["tool_calls"] = [self._prepare_call(call) for call in calls]
        drop_cache_control(prepared)
        return prepared

    @property
    def _is_openais_model(self) -> bool:
        """Whether OpenAI's rules hold: its own server, or a proxy in front of it."""
        return self.is_openai or _is_openais_name(self.model_name)

    @property
    def _system_role(self) -> str:
        """The role of a system prompt; "developer" is OpenAI's.

        A name with a slash is a repository's, on a server of other models (vLLM, TGI,
        OpenRouter). Most of them answer 400 to the role, or pass the prompt over:
        https://github.com/michelle-avery/openai-compatible-conversation/issues/21
        (2026-11-25).
        """
        is_other = "/" in self.model_name and not self.is_openai
        return "system" if is_other else self.provider.system_role

    def _prepare_call(self, call: JSON) -> JSON:
        kept = {k: v for k, v in call.items() if k in {"id", "type", "function"}}
        own = call.get("provider_specific_fields")
        kept["id"] = _shorten(str(call.get("id") or ""))
        signature = own.get("thought_signature") if isinstance(own, Mapping) else None
        if signature and not self._is_openais_model:
            kept["extra_content"] = {"google": {"thought_signature": signature}}
        return kept

    def own_tool(self, tool: ToolConfig, options: dict[str, Any]) -> list[JSON]:
        """Return OpenAI's web search or image generation.

        Source: https://platform.openai.com/docs/guides/tools-web-search (2026-11-23).
        """
        config = tool.config or {}
        if self.provider is not OPENAI:
            return super().own_tool(tool, options)
        if tool.type is ToolType.IMAGE_GENERATION:
            return [{"type": "image_generation", **config}]
        if tool.type not in {ToolType.WEB_SEARCH, ToolType.WEB_SEARCH_PREVIEW}:
            return super().own_tool(tool, options)
        if _CANNOT_SEARCH.match(self.model_name):
            return super().own_tool(tool, options)
        if _SEARCHES.match(self.model_name):
            options["web_search_options"] = config
            return []
        return [{"type": "web_search", **config}]

    def adjust_options(self, prepared: PreparedRequest) -> None:
        """Drop options that the model refuses and LiteLLM would send.

        LiteLLM no longer knows the retired o-series models, and not every effort that a
        model takes. Source:
        https://platform.openai.com/docs/api-reference/chat/create (2026-11-25).
        """
        if self.provider is not OPENAI:
            return
        options, model = prepared.options, self.model_name
        if "reasoning_effort" in options and not self._takes_effort(options):
            options.pop("reasoning_effort")
        if _REASONS.match(model) or _LATEST.match(model):
            if "max_tokens" in options:
                options["max_completion_tokens"] = options.pop("max_tokens")
            options.pop("temperature", None)
            options.pop("top_p", None)
        if "stop" in options and any(
            m.match(model) for m in (_TAKES_NO_STOP, _LATEST, _SEARCH_PREVIEW)
        ):
            options.pop("stop")
        if _SEARCH_PREVIEW.match(model):
            for name in ("temperature", "top_p", "n", "seed"):
                options.pop(name, None)
        self._check_abilities(options)

    def _takes_effort(self, options: Mapping[str, Any]) -> bool:
        """Say whether the model may take an effort; LiteLLM would send any word."""
        effort, model = options["reasoning_effort"], self.model_name
        tools = options.get("tools", ())
        if effort == "minimal" and any(t.get("type") == "web_search" for t in tools):
            # https://platform.openai.com/docs/guides/tools-web-search (2026-11-25)
            return False
        if _CHAT_ONLY.match(model):
            return False
        levels = next((e for name, e in _EFFORTS if name.match(model)), None)
        if levels is not None:
            return effort in levels
        if not self._is_openais_model:
            return True
        info = known_model_info("openai", self.model_name, "openai")
        flag = info.get(f"supports_{effort}_reasoning_effort")
        if effort == "max":
            return bool(flag)
        return flag is not False and effort in _ALL_EFFORTS

    def _check_abilities(self, options: Mapping[str, Any]) -> None:
        """Refuse what cannot be left out without changing the answer's meaning."""
        model, tools = self.model_name, options.get("tools", ())
        for tool in tools if self._is_openais_model else ():
            function = tool.get("function") or {}
            if found := (function.get("parameters") or {}).keys() & _NOT_AT_THE_ROOT:
                raise self.invalid(
                    f"the parameters of the tool {function['name']!r} have"
                    f" {min(found)!r} at the root, which openai refuses"
                )
        has_functions = any(tool.get("type") == "function" for tool in tools)
        has_schema = (options.get("response_format") or {}).get("type") == "json_schema"
        refused = None
        if _DEEP_RESEARCH.match(model):
            if has_functions or has_schema:
                refused = "does not take functions or a response_format"
            elif not tools:
                refused = "needs a tool to search with, such as ToolType.WEB_SEARCH"
        elif has_functions and _SEARCHES.match(model):
            refused = "does not take functions"
        elif has_schema and _TAKES_NO_SCHEMA.match(model):
            refused = "does not take a JSON schema; newer models do"
        if refused:
            raise InvalidRequestError(f"{model} {refused}", **self._fields())

    def output_limit(self) -> int | None:
        """Return the most tokens of an answer, None if unknown."""
        if (limit := super().output_limit()) or self.provider is not OPENAI:
            return limit
        if tuned := _TUNED.match(self.model_name):
            info = known_model_info("openai", tuned[1], "openai")
            return info.get("max_output_tokens")
        return 128_000 if _NEWER.match(self.model_name) else None

    def other_endpoint(
        self, litellm: Any, prepared: PreparedRequest
    ) -> BaseLLMAdapter | None:
        """Return the Responses endpoint for a request that only it takes.

        LiteLLM knows the models, and that newer ones take function tools beside
        reasoning there only; OpenAI's own tools are there only too.
        """
        if self.provider is not OPENAI:
            return None
        options = prepared.options
        tools = options.get("tools", ())
        if any(tool.get("type") != "function" for tool in tools) or (
            tools and self.is_openai and _LATEST.match(self.model_name)
        ):
            return self.sibling("responses")
        if self.is_openai and any(map(_is_result_with_media, prepared.messages)):
            return self.sibling("responses")
        effort = options.get("reasoning_effort")
        if self.is_openai and effort == "max":
            # https://platform.openai.com/docs/guides/reasoning (2026-11-25)
            return self.sibling("responses")
        if tools and _must_bridge(
            litellm, self.model_name, tools, effort, self.endpoint.base_url
        ):
            return self.sibling("responses")
        info = model_info(litellm, "openai", self.model_name) or {}
        return self.sibling("responses") if info.get("mode") == "responses" else None

    def counting_adapter(self) -> BaseLLMAdapter | None:
        """Return OpenAI's Responses endpoint, which counts tokens."""
        return self.sibling("responses") if self.provider is OPENAI else None

    def translate(
        self, litellm: Any, prepared: PreparedRequest, *, stream: bool
    ) -> Outgoing:
        """Translate with the configuration class that LiteLLM has for the provider."""
        if self.provider is not OPENAI:
            facts = describe(litellm, self.provider.litellm)
            return Outgoing(
                *translate_openai(
                    litellm,
                    facts,
                    self.model_name,
                    prepared.messages,
                    prepared.options,
                    stream,
                    base_url=self.endpoint.base_url,
                )
            )
        model, messages = self.model_name, prepared.messages
        body = find_config(litellm, self.provider, model).transform_request(
            model=model,
            messages=messages,
            optional_params=map_options(litellm, self.provider, model, prepared),
            litellm_params={},
            headers={},
        )
        # LiteLLM changes some roles here that must be sent as they are.
        body["messages"] = messages
        body.pop("extra_body", None)
        body.pop("stream", None)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Outgoing("/chat/completions", JSON_HEADERS, body)

    async def find_model_list(self) -> ModelList:
        """Return the list beside the chat's path, which is not the base URL's for all."""
        if self.provider is OPENAI:
            return self.model_list
        litellm = await load_litellm()
        facts = describe(litellm, self.provider.litellm)
        chat = path_below(litellm, facts, "", self.endpoint.base_url or "")
        beside = chat.rstrip("/").removesuffix("/chat/completions")
        return replace(self.model_list, path=f"{beside}{self.model_list.path}")

    def _check_object(self, attempt: Attempt) -> Mapping[str, Any]:
        """Return the JSON of an answer; Together's list of models is a bare array.

        Source: https://docs.together.ai/reference/models-1 (2026-11-25).
        """
        is_bare = attempt.body.lstrip().startswith(b"[")
        if is_bare and self.provider.name == "together_ai":
            attempt.body = bytearray(b'{"data":%b}' % bytes(attempt.body))
        return super()._check_object(attempt)

    def has_answer(self, body: Mapping[str, Any]) -> bool:
        """Say whether each choice has a message, or was filtered whole by Azure."""
        choices = body.get("choices")
        return (
            isinstance(choices, list)
            and bool(choices)
            and all(
                isinstance(choice, dict)
                and (
                    isinstance(choice.get("message"), dict)
                    or choice.get("finish_reason") == "content_filter"
                )
                for choice in choices
            )
        )

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read a chat completion."""
        return read_chat_completion(body)

    def stream_reader(self) -> StreamReader:
        """Return a reader of chat completion chunks."""
        return OpenAIStream()


def _shorten(call_id: str) -> str:
    """Shorten the id of a call, such as another provider's, to what OpenAI takes.

    Source: "Expected a string with maximum length 64" of OpenAI's 400 (2026-11-25).
    """
    if 0 < len(call_id) <= 64:
        return call_id
    return f"call_{blake2b(call_id.encode(), digest_size=16).hexdigest()}"


def _is_result_with_media(message: Message) -> bool:
    """Say whether a tool gave more than text, which chat completions do not take.

    Source: https://platform.openai.com/docs/api-reference/chat/create (2026-11-25).
    """
    content = message.get("content")
    parts = content if message["role"] == "tool" and isinstance(content, list) else ()
    return any(isinstance(p, Mapping) and p.get("type") != "text" for p in parts)


def _must_bridge(
    litellm: Any, model: str, tools: Any, effort: Any, base_url: str | None
) -> bool:
    """Ask LiteLLM whether a request with tools must go to the Responses endpoint.

    A LiteLLM that has moved or changed its check counts as one that says no.
    """
    try:
        info, _ = _bridge_check(litellm)(
            model=model,
            custom_llm_provider="openai",
            tools=tools,
            reasoning_effort=effort,
            api_base=base_url,
        )
        return bool(info.get("mode") == "responses")
    except Exception as exc:  # noqa: BLE001 - any change in LiteLLM means the same here
        key = ("bridge check", id(litellm))
        if key not in _warned:
            _warned.add(key)
            _log.warning(
                "the installed LiteLLM does not say which requests need OpenAI's"
                " Responses endpoint (%r); they go to chat completions",
                exc,
            )
        return False


def _bridge_check(litellm: Any) -> Any:
    try:
        from litellm.responses.bridge_check import responses_api_bridge_check
    except ImportError:  # 1.105
        return litellm.main.responses_api_bridge_check
    return responses_api_bridge_check


_log = logging.getLogger("dipeo_llm")
_warned: set[tuple[str, int]] = set()


def read_chat_completion(body: Mapping[str, Any]) -> Reading:
    """Read a chat completion; LiteLLM's own results have this shape too."""
    choices = body.get("choices") or []
    messages = [choice.get("message") or {} for choice in choices]
    first = messages[0] if messages else {}
    texts = [_join_text(message.get("content")) for message in messages]
    finish: Any = choices[0].get("finish_reason") if choices else None
    calls = first.get("tool_calls") or ()
    if not calls and first.get("function_call"):  # the form that `tool_calls` replaced
        calls = [{"function": first["function_call"]}]
    made = [_read_call(body, index, call) for index, call in enumerate(calls)]
    if answers := [call.arguments_text for call in made if call.name == _JSON_TOOL]:
        texts[0] = answers[0]
        made = [call for call in made if call.name != _JSON_TOOL]
        finish = "stop" if finish == "tool_calls" and not made else finish
    return Reading(
        text=texts[0] if texts else "",
        texts=texts if len(texts) > 1 else [],
        reasoning=first.get("reasoning_content")
        or first.get("reasoning")
        or _join_thinking(first.get("content"))
        or None,
        tool_calls=made,
        finish=_FINISH.get(finish, finish),
        refusal=first.get("refusal") or None,
        model=body.get("model"),
        id=body.get("id"),
        usage=_read_usage(body),
        searches=merge_pages(_read_searches(body, first)),
        images=[
            image
            for part in first.get("images") or ()
            if (image := _read_image(part.get("image_url", {}).get("url", "")))
        ],
    )


def _read_searches(body: Mapping[str, Any], message: JSON) -> Iterator[WebSearchResult]:
    """Yield the pages that an answer rests on.

    OpenAI and OpenRouter annotate the message. Perplexity lists its `search_results`
    beside the choices, and the URLs alone as `citations`, as xAI does
    (https://docs.perplexity.ai/api-reference/chat-completions-post,
    https://docs.x.ai/docs/guides/live-search; both 2026-11-25).
    """
    for annotation in message.get("annotations") or ():
        if cited := annotation.get("url_citation"):
            yield WebSearchResult(
                url=cited.get("url", ""), title=cited.get("title") or ""
            )
    for page in body.get("search_results") or ():
        if url := page.get("url"):
            yield WebSearchResult(
                url=url,
                title=page.get("title") or "",
                snippet=page.get("snippet") or "",
            )
    for url in body.get("citations") or ():
        if isinstance(url, str):
            yield WebSearchResult(url=url, title="")


def _read_usage(body: Mapping[str, Any]) -> Any:
    """Return the usage with the service tier, which decides the price."""
    usage, tier = body.get("usage"), body.get("service_tier")
    return (
        {**usage, "service_tier": tier} if tier and isinstance(usage, dict) else usage
    )


def _read_call(body: Mapping[str, Any], index: int, call: JSON) -> ToolCall:
    function = read_function(call)
    call_id = call.get("id") or make_call_id(body.get("id"), index, function)
    made = read_tool_call(call_id, *function)
    # Gemini's OpenAI endpoint, and LiteLLM's own results.
    extra = (call.get("extra_content") or {}).get("google") or {}
    own = call.get("provider_specific_fields") or {}
    signature = extra.get("thought_signature") or own.get("thought_signature")
    made.thought_signature = signature if isinstance(signature, str) else None
    return made


def _join_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _join_thinking(content: Any) -> str:
    """Return the text of Mistral's thinking parts.

    Source: https://docs.mistral.ai/capabilities/reasoning (2026-11-25).
    """
    if not isinstance(content, list):
        return ""
    return "".join(
        _join_text(part.get("thinking"))
        for part in content
        if part.get("type") == "thinking"
    )


def _read_image(url: str) -> ImageGenerationResult | None:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/"):
        return None
    return ImageGenerationResult(
        image_data=data, format=head.removeprefix("data:image/").partition(";")[0]
    )


_HEAD = ("id", "model", "usage", "service_tier", "citations", "search_results")
_OPENAI_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")


class OpenAIStream(StreamReader):
    """Chat completion chunks, ended by a finish reason for each choice and [DONE]."""

    def __init__(self) -> None:
        super().__init__()
        self._head: JSON = {}
        self._choices: dict[int, JSON] = {}
        self._text: dict[tuple[int, str], list[str]] = {}
        self._calls: dict[int, list[JSON]] = {}
        self._last: dict[tuple[int, int | None], JSON] = {}
        """The call that a fragment with this index goes to, by choice and index."""

    def _event(self, event: JSON, chunks: list[StreamChunk]) -> None:
        for name in _HEAD:
            if event.get(name) is not None:
                self._head[name] = event[name]
        for choice in event.get("choices") or ():
            index = choice.get("index") or 0
            kept = self._choices.setdefault(
                index, {"index": index, "finish_reason": None}
            )
            if choice.get("finish_reason"):
                kept["finish_reason"] = choice["finish_reason"]
            delta = choice.get("delta")
            if delta is None:  # some compatible servers send whole messages
                delta = choice.get("message")
            if delta:
                self._delta(index, kept, delta, chunks)

    def _delta(
        self, index: int, kept: JSON, delta: JSON, chunks: list[StreamChunk]
    ) -> None:
        for name in _OPENAI_TEXTS:
            if not (content := delta.get(name)):
                continue
            if name == "reasoning" and delta.get("reasoning_content"):
                continue  # the same again, under both of its names
            if piece := _join_text(content):
                self._add_text(index, name, piece, chunks)
        if thought := _join_thinking(delta.get("content")):
            self._add_text(index, "reasoning_content", thought, chunks)
        if delta.get("annotations"):
            kept.setdefault("annotations", []).extend(delta["annotations"])
        for call in delta.get("tool_calls") or ():
            self._call(index, call, chunks)
        if function := delta.get("function_call"):
            self._call(index, {"index": 0, "function": function}, chunks)

    def _add_text(
        self, index: int, name: str, piece: str, chunks: list[StreamChunk]
    ) -> None:
        self._text.setdefault((index, name), []).append(piece)
        if index == 0 and name == "content":
            chunks.append(StreamChunk(piece))
        elif index == 0 and name != "refusal":
            chunks.append(StreamChunk(reasoning=piece))

    def _call(self, choice: int, call: JSON, chunks: list[StreamChunk]) -> None:
        name, arguments = read_function(call)
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        place = (choice, call.get("index"))
        kept = self._last.get(place)
        if kept is None or _begins_a_call(kept, call, name):
            calls = self._calls.setdefault(choice, [])
            kept = {"at": len(calls), "id": None, "name": None, "text": []}
            self._last[place] = kept
            calls.append(kept)
        kept["id"] = kept["id"] or call.get("id")
        kept["name"] = name or kept["name"]
        if arguments:
            kept["text"].append(arguments)
        if call.get("extra_content"):
            kept["extra"] = call["extra_content"]
        if kept["name"] == _JSON_TOOL:
            if choice == 0 and arguments:
                chunks.append(StreamChunk(arguments))
        elif choice == 0:
            told = kept["id"] if call.get("id") else None
            chunks.append(
                StreamChunk(
                    tool_call=ToolCallDelta(
                        kept["at"], told, name or None, arguments or ""
                    )
                )
            )

    @property
    def usage(self) -> Any:
        return self._head.get("usage")

    @property
    def is_ended(self) -> bool:
        return (
            self._done
            and bool(self._choices)
            and all(c["finish_reason"] for c in self._choices.values())
        )

    def body(self) -> JSON:
        texts: dict[int, JSON] = {}
        for (choice, name), pieces in self._text.items():
            texts.setdefault(choice, {})[name] = "".join(pieces)
        calls = {index: list(map(_whole_call, c)) for index, c in self._calls.items()}
        choices = []
        for index, kept in sorted(self._choices.items()):
            message: JSON = {"role": "assistant", "content": None}
            message.update(texts.get(index, {}))
            if index in calls:
                message["tool_calls"] = calls[index]
            if "annotations" in kept:
                message["annotations"] = kept["annotations"]
            finish = kept["finish_reason"]
            choices.append(
                {"index": index, "message": message, "finish_reason": finish}
            )
        return {**self._head, "object": "chat.completion", "choices": choices}


def _begins_a_call(kept: JSON, call: JSON, name: str | None) -> bool:
    """Say whether a fragment begins another call than the one that has its index.

    Ollama gives each call the index 0 (github.com/ollama/ollama/issues/15457), others
    give none. Poolside changes the id after the first fragment of a call, where alone
    the name is (github.com/poolsideai/pool/issues/9). Both read 2026-11-25.
    """
    given = call.get("id")
    other = bool(given and kept["id"] and given != kept["id"])
    if call.get("index") is not None:
        return other and bool(name)
    return other or (bool(name) and not (given and kept["id"]))


def _whole_call(call: JSON) -> JSON:
    function = {"name": call["name"], "arguments": "".join(call["text"])}
    whole = {"id": call["id"], "type": "function", "function": function}
    return {**whole, "extra_content": call["extra"]} if "extra" in call else whole
