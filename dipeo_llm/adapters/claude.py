"""Anthropic's messages."""

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.events import StreamReader
from dipeo_llm.adapters.provider import ModelList, Page, Probe, Provider, TokenCounter
from dipeo_llm.adapters.reading import (
    JSON,
    Reading,
    join_paragraphs,
    merge_pages,
    read_tool_call,
)
from dipeo_llm.adapters.request import (
    COMMON_FIELDS,
    Message,
    PreparedRequest,
    copy_json,
    put_system_first,
)
from dipeo_llm.adapters.translation import (
    JSON_HEADERS,
    PLAIN_OPTIONS,
    Outgoing,
    find_config,
    map_options,
)
from dipeo_llm.client import PLACEHOLDER, STANDARD_HEADERS
from dipeo_llm.domain import (
    StreamChunk,
    ToolCallDelta,
    ToolConfig,
    ToolType,
    WebSearchResult,
)
from dipeo_llm.litellm_tables import known_model_info
from dipeo_llm.media import PDF, PICTURES, MediaRules

ANTHROPIC = Provider(
    name="anthropic",
    litellm="anthropic",
    aliases=("claude",),
    base_url="https://api.anthropic.com",
    key_header="x-api-key",
    key_variables=("ANTHROPIC_API_KEY",),
    # https://docs.anthropic.com/en/api/messages (2026-11-25)
    highest_temperature=1.0,
    claims=re.compile(r"claude-[\w.-]+"),
    # https://platform.claude.com/docs/en/build-with-claude/vision
    # https://platform.claude.com/docs/en/build-with-claude/pdf-support (2026-11-23)
    # It takes no sound, which LiteLLM drops silently.
    media=MediaRules(types=PICTURES | {PDF}, reads_documents=True),
)

# LiteLLM asks older Claude models for JSON through a tool of this name.
_JSON_TOOL = "json_tool_call"
# Most tokens of an answer, for models that have left LiteLLM's table (1.110.2):
# https://docs.anthropic.com/en/docs/about-claude/models/overview (2026-11-25).
_MOST_TOKENS = (
    (re.compile(r"claude-3-(?:haiku|opus|sonnet)|claude-(?:2|instant)"), 4096),
    (re.compile(r"claude-3-5-"), 8192),
    (re.compile(r"claude-opus-4(?:-[01])?(?:-\d{8}|-latest)?$"), 32_000),
    (re.compile(r"claude-3-7-|claude-sonnet-4(?:-0)?(?:-\d{8}|-latest)?$"), 64_000),
)
# https://platform.claude.com/docs/en/agents-and-tools/tool-use/server-tools
# (2026-11-25): a conversation with a server tool goes on with the blocks as they came.
# Every block but these is a server tool's.
_OWN_BLOCKS = frozenset({"text", "thinking", "redacted_thinking", "tool_use"})
_BLOCKS = "dipeo-llm-content-blocks-"
_PROPERTY = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_KEPT_KEYWORDS = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "title"}
)
# "input_schema does not support oneOf, allOf, or anyOf at the top level" of Anthropic's
# 400 (https://github.com/anthropics/claude-code/issues/5319, 2026-11-25).
_NOT_AT_THE_ROOT = frozenset({"oneOf", "allOf", "anyOf"})
_TAKES_BOTH = re.compile(r"claude-(?:instant|[23])\b")
_MOST_KEPT = 512
_plain_headers: dict[str, dict[str, str]] = {}
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    # A long turn of the provider's own tools is to be continued.
    "pause_turn": "pause",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def _next_page(page: Page) -> dict[str, Any] | None:
    last = page.get("last_id")
    return {"after_id": last} if page.get("has_more") and last else None


class ClaudeAdapter(BaseLLMAdapter):
    """Talks to a Claude model."""

    rows = (ANTHROPIC,)
    probe = Probe("claude-sonnet-4-5", ("messages", "max_tokens", "system", "tools"))
    # https://docs.anthropic.com/en/api/models-list (2026-11-23)
    model_list = ModelList("/v1/models", "data", "id", {"limit": 1000}, _next_page)
    # https://docs.anthropic.com/en/api/messages-count-tokens (2026-11-23)
    token_counter = TokenCounter(
        "/v1/messages/count_tokens",
        "input_tokens",
        frozenset({"model", "messages", "system", "tools", "tool_choice", "thinking"}),
    )
    # `json_tool_call` and `web_search` are taken.
    tool_name = re.compile(r"(?!(?:json_tool_call|web_search)$)[a-zA-Z0-9_-]{1,64}")
    headers = STANDARD_HEADERS | {"anthropic-version", "anthropic-beta"}
    question_headers: ClassVar[Mapping[str, str]] = {"anthropic-version": "2023-06-01"}

    def complete_base_url(self, url: str) -> str:
        """Return a checked base URL without "/v1", which the paths begin with."""
        return url.removesuffix("/v1")

    def prepare_messages(self, messages: list[Message]) -> list[Message]:
        """Put one system prompt in front; keep thinking blocks and cache marks."""
        prepared = put_system_first(messages, COMMON_FIELDS | {"thinking_blocks"})
        for message in prepared:
            blocks = message.get("thinking_blocks") or []
            if not (isinstance(blocks, list) and all(map(_is_dict, blocks))):
                raise self.invalid(
                    "`thinking_blocks` of a message must be a list of dicts"
                )
        return prepared

    def own_tool(self, tool: ToolConfig, options: dict[str, Any]) -> list[JSON]:
        """Return Anthropic's web search.

        Source: https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/web-search-tool
        (2026-11-23).
        """
        if tool.type not in {ToolType.WEB_SEARCH, ToolType.WEB_SEARCH_PREVIEW}:
            return super().own_tool(tool, options)
        config = {
            k: v for k, v in (tool.config or {}).items() if k != "search_context_size"
        }
        return [{"type": "web_search_20250305", "name": "web_search", **config}]

    def output_limit(self) -> int | None:
        """Return the most tokens of an answer, None if unknown."""
        known = (most for name, most in _MOST_TOKENS if name.match(self.model_name))
        return super().output_limit() or next(known, None)

    def adjust_options(self, prepared: PreparedRequest) -> None:
        """Drop top_p beside temperature, and send some forms through a tool.

        Models since Claude 4 take temperature or top_p, not both. Source:
        https://docs.anthropic.com/en/docs/about-claude/models/migrating-to-claude-4
        (2026-11-23).
        """
        options = prepared.options
        if "temperature" in options and not _TAKES_BOTH.match(self.model_name):
            options.pop("top_p", None)
        if "max_tokens" not in options and (limit := self.output_limit()):
            # LiteLLM takes 128,000 for a model outside its table.
            options["max_tokens"] = limit
        stop = options.get("stop")
        if any(
            not text.strip()
            for text in ([stop] if isinstance(stop, str) else stop or ())
        ):
            raise self.invalid("`stop` has an empty text; anthropic refuses it")
        form = options.get("response_format") or {}
        schema = (form.get("json_schema") or {}).get("schema")
        self._check_properties("response_format", schema)
        if isinstance(schema, Mapping) and not _is_closed(schema):
            self._ask_through_tool(options, dict(schema))
        for tool in options.get("tools", ()):
            if function := tool.get("function"):
                schema = function.get("parameters") or {}
                self._check_properties(function["name"], schema)
                if refused := schema.keys() & _NOT_AT_THE_ROOT:
                    raise self.invalid(
                        f"the parameters of the tool {function['name']!r} have"
                        f" {min(refused)!r} at the root, which anthropic refuses"
                    )
        self._check_prefill(prepared.messages)

    def _read_schemas(self, options: Mapping[str, Any]) -> dict[str, JSON]:
        """Return the schemas of functions that LiteLLM would shorten, by their names."""
        schemas = {}
        for tool in options.get("tools", ()):
            function = tool.get("function") or {}
            schema = function.get("parameters")
            if schema and not schema.keys() <= _KEPT_KEYWORDS:
                schemas[function["name"]] = copy_json(schema)
        return schemas

    def _check_properties(self, name: str, schema: Any) -> None:
        """Refuse names of properties that Anthropic refuses."""
        if isinstance(schema, list):
            for item in schema:
                self._check_properties(name, item)
        if not isinstance(schema, Mapping):
            return
        properties = schema.get("properties")
        for key in properties if isinstance(properties, Mapping) else ():
            if not _PROPERTY.fullmatch(key):
                raise self.invalid(
                    f"{name!r} has a property {key!r}; anthropic takes letters, digits,"
                    " '_', '.' and '-'"
                )
        for value in schema.values():
            self._check_properties(name, value)

    def _check_prefill(self, messages: list[Message]) -> None:
        """Refuse a conversation that ends with the assistant, where the model does."""
        info = known_model_info("anthropic", self.model_name, "anthropic")
        is_refused = info.get("supports_assistant_prefill") is False
        last = messages[-1] if messages else {}
        if is_refused and last.get("role") == "assistant" and not _kept_blocks(last):
            raise self.invalid(
                f"{self.model_name} does not continue an assistant's message; end the"
                " conversation with the user's"
            )

    def _ask_through_tool(self, options: dict[str, Any], schema: JSON) -> None:
        """Ask for JSON through a forced tool, whose schema may refer to itself.

        Structured output takes no recursive schema, and LiteLLM drops the definitions
        that it refers to. Source:
        https://platform.claude.com/docs/en/build-with-claude/structured-outputs
        (2026-11-25).
        """
        del options["response_format"]
        function = {
            "name": _JSON_TOOL,
            "description": "Give the answer.",
            "parameters": schema,
        }
        tools = options.setdefault("tools", [])
        tools.append({"type": "function", "function": function})
        if len(tools) == 1:
            options["tool_choice"] = {
                "type": "function",
                "function": {"name": _JSON_TOOL},
            }
        else:
            options.setdefault("tool_choice", "required")

    def translate(
        self, litellm: Any, prepared: PreparedRequest, *, stream: bool
    ) -> Outgoing:
        """Translate with LiteLLM's Anthropic configuration and its beta headers."""
        from litellm.anthropic_beta_headers_manager import (
            update_request_with_filtered_beta,
        )

        row, model = self.provider, self.model_name
        blocks = _take_blocks(prepared.messages)
        schemas = self._read_schemas(prepared.options)
        options = map_options(litellm, row, model, prepared)
        options.pop("json_mode", None)
        _fit_thinking(options)
        options["is_vertex_request"] = False
        config = find_config(litellm, row, model)
        headers = self._beta_headers(config, prepared.messages, options)
        body = config.transform_request(
            model=model,
            messages=prepared.messages,
            optional_params=options,
            litellm_params={},
            headers=headers,
        )
        headers, body = update_request_with_filtered_beta(
            headers=headers, request_data=body, provider=row.litellm
        )
        body.pop("is_vertex_request", None)
        _put_blocks(body, blocks)
        for tool in body.get("tools", ()):
            if tool.get("name") in schemas:
                # LiteLLM keeps only some keywords at the root.
                tool["input_schema"] = schemas[tool["name"]]
        if stream:
            body["stream"] = True
        return Outgoing("/v1/messages", {**JSON_HEADERS, **headers}, body)

    def _beta_headers(
        self, config: Any, messages: list[Message], options: dict[str, Any]
    ) -> dict[str, str]:
        """Ask LiteLLM for the headers; for plain text they are always the same."""
        model = self.model_name
        is_plain = options.keys() <= PLAIN_OPTIONS | {
            "stop_sequences",
            "is_vertex_request",
        } and all(isinstance(m["content"], str) and len(m) == 2 for m in messages)
        if is_plain and model in _plain_headers:
            return dict(_plain_headers[model])
        headers: dict[str, str] = config.validate_environment(
            headers={},
            model=model,
            messages=messages,
            optional_params=options,
            litellm_params={},
            api_key=PLACEHOLDER,
            api_base=self.provider.base_url,
        )
        if is_plain and len(_plain_headers) < _MOST_KEPT:
            _plain_headers[model] = dict(headers)
        return headers

    def has_answer(self, body: Mapping[str, Any]) -> bool:
        """Say whether there is a list of content blocks."""
        return isinstance(body.get("content"), list)

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read a message."""
        reading = Reading(
            model=body.get("model"), id=body.get("id"), usage=body.get("usage")
        )
        stop = body.get("stop_reason")
        reading.finish = _FINISH.get(stop, stop) if stop else None
        thoughts: list[str] = []
        searches: list[WebSearchResult] = []
        for block in body.get("content") or ():
            match block.get("type"):
                case "text":
                    reading.text += block.get("text") or ""
                    searches += [
                        WebSearchResult(
                            url=c["url"],
                            title=c.get("title") or "",
                            snippet=c.get("cited_text") or "",
                        )
                        for c in block.get("citations") or ()
                        if c.get("url")
                    ]
                case "thinking":
                    thoughts.append(block.get("thinking") or "")
                    reading.thinking_blocks.append(dict(block))
                case "redacted_thinking":
                    reading.thinking_blocks.append(dict(block))
                case "tool_use" if block.get("name") == _JSON_TOOL:
                    reading.text += _json_text(block.get("input"))
                    reading.finish = (
                        "stop" if reading.finish == "tool_calls" else reading.finish
                    )
                case "tool_use":
                    reading.tool_calls.append(
                        read_tool_call(
                            block.get("id"), block.get("name"), block.get("input")
                        )
                    )
                case "web_search_tool_result":
                    found = block.get("content")
                    searches += [
                        WebSearchResult(
                            url=r.get("url", ""), title=r.get("title") or ""
                        )
                        for r in (found if isinstance(found, list) else ())
                    ]
        blocks = body.get("content") or ()
        if stop == "pause_turn" or any(
            b.get("type") not in _OWN_BLOCKS for b in blocks
        ):
            reading.content_blocks = list(blocks)
        if stop == "refusal":
            reading.refusal = reading.text or "the model declined"
        reading.reasoning = join_paragraphs(thoughts)
        reading.searches = merge_pages(searches)
        return reading

    def stream_reader(self) -> StreamReader:
        """Return a reader of Anthropic's events."""
        return AnthropicStream()


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _kept_blocks(message: Mapping[str, Any]) -> list[JSON]:
    """Return the content blocks that a result of Claude's kept for the next request."""
    own = message.get("provider_specific_fields")
    blocks = own.get("content_blocks") if isinstance(own, Mapping) else None
    if not isinstance(blocks, list):
        return []
    # Google's parts have no type.
    is_ours = all(isinstance(block, dict) and block.get("type") for block in blocks)
    return blocks if is_ours else []


def _take_blocks(messages: list[Message]) -> dict[str, list[JSON]]:
    """Put a text, in place, where a message has blocks; return them by this text.

    LiteLLM knows no blocks of server tools; `_put_blocks` puts them back.
    """
    taken: dict[str, list[JSON]] = {}
    for number, message in enumerate(messages):
        if blocks := _kept_blocks(message):
            message["content"] = text = f"{_BLOCKS}{number}"
            taken[text] = blocks
            message.pop("tool_calls", None)
            message.pop("thinking_blocks", None)
    return taken


def _put_blocks(body: JSON, blocks: Mapping[str, list[JSON]]) -> None:
    if not blocks:
        return
    for message in body["messages"]:
        content = message["content"]
        if message["role"] == "assistant" and isinstance(content, list):
            message["content"] = [
                block
                for given in content
                for block in blocks.get(given.get("text", ""), [given])
            ]


def _is_closed(schema: Any) -> bool:
    """Say whether structured output can hold a schema without a change of its meaning.

    It takes no reference to itself, no open object and no tuple; LiteLLM would close
    the objects, and drop the rest. Source:
    https://platform.claude.com/docs/en/build-with-claude/structured-outputs
    (2026-11-25).
    """
    if isinstance(schema, list):
        return all(map(_is_closed, schema))
    if not isinstance(schema, Mapping):
        return True
    properties = schema.get("properties")
    named = properties.values() if isinstance(properties, Mapping) else ()
    if True in named or schema.get("items") is True:
        return False
    kind = schema.get("type")
    if isinstance(kind, list) and "object" in kind:
        return False  # LiteLLM 1.105 leaves it open
    is_object = kind == "object"
    if (
        "$ref" in schema
        or "prefixItems" in schema
        or "patternProperties" in schema
        or schema.get("additionalProperties")
    ):
        return False
    if is_object and not schema.get("properties"):
        return False
    return all(
        all(map(_is_closed, value.values()))
        if key == "properties" and isinstance(value, Mapping)
        else key in {"enum", "const", "default", "examples"} or _is_closed(value)
        for key, value in schema.items()
    )


def _fit_thinking(options: dict[str, Any]) -> None:
    """Drop the options, as LiteLLM mapped them, that thinking excludes, or thinking.

    Thinking takes no forced tool, no temperature and no top_p below 0.95, and fewer
    tokens than the answer may have. Sources, 2026-11-25:
    https://platform.claude.com/docs/en/build-with-claude/extended-thinking,
    https://platform.claude.com/docs/en/build-with-claude/adaptive-thinking.
    """
    thinking = options.get("thinking") or {}
    if thinking.get("type") not in {"enabled", "adaptive"}:
        return
    is_forced = (options.get("tool_choice") or {}).get("type") in {"any", "tool"}
    budget = thinking.get("budget_tokens", 0)
    if is_forced or options.get("max_tokens", budget + 1) <= budget:
        del options["thinking"]
        if isinstance(config := options.get("output_config"), dict):
            config.pop("effort", None)
            if not config:
                del options["output_config"]
        return
    for name in ("temperature", "top_p", "top_k"):
        options.pop(name, None)


def _json_text(value: Any) -> str:
    """Return the JSON text of a forced tool's input."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class AnthropicStream(StreamReader):
    """Anthropic's events, ended by message_stop."""

    def __init__(self) -> None:
        super().__init__()
        self._message: JSON = {}
        self._blocks: dict[int, JSON] = {}
        self._pieces: dict[int, list[str]] = {}
        self._calls: dict[int, int] = {}
        self._stopped = False

    def _event(self, event: JSON, chunks: list[StreamChunk]) -> None:
        match event.get("type"):
            case "content_block_delta":
                self._delta(event["index"], event["delta"], chunks)
            case "content_block_start":
                self._start(event["index"], dict(event["content_block"]), chunks)
            case "content_block_stop":
                self._finish(event["index"])
            case "message_start":
                self._message = dict(event["message"])
            case "message_delta":
                self._message.update(event.get("delta") or {})
                usage = self._message.setdefault("usage", {})
                usage.update(
                    {
                        k: v
                        for k, v in (event.get("usage") or {}).items()
                        if v is not None
                    }
                )
            case "message_stop":
                self._stopped = True

    def _start(self, index: int, block: JSON, chunks: list[StreamChunk]) -> None:
        self._blocks[index] = block
        self._pieces[index] = []
        if block["type"] == "tool_use":
            self._calls[index] = len(self._calls)
            if block["name"] != _JSON_TOOL:
                chunks.append(
                    StreamChunk(
                        tool_call=ToolCallDelta(
                            self._calls[index], block["id"], block["name"]
                        )
                    )
                )
        elif block["type"] == "text" and block.get("text"):
            self._pieces[index].append(block["text"])
            chunks.append(StreamChunk(text=block["text"]))

    def _delta(self, index: int, delta: JSON, chunks: list[StreamChunk]) -> None:
        block = self._blocks[index]
        match delta.get("type"):
            case "text_delta":
                self._pieces[index].append(delta["text"])
                chunks.append(StreamChunk(text=delta["text"]))
            case "input_json_delta":
                piece = delta["partial_json"]
                self._pieces[index].append(piece)
                if block["type"] != "tool_use" or not piece:
                    return
                if block["name"] == _JSON_TOOL:
                    chunks.append(StreamChunk(text=piece))
                else:
                    chunks.append(
                        StreamChunk(
                            tool_call=ToolCallDelta(self._calls[index], arguments=piece)
                        )
                    )
            case "thinking_delta":
                self._pieces[index].append(delta["thinking"])
                chunks.append(StreamChunk(reasoning=delta["thinking"]))
            case "signature_delta":
                block["signature"] = block.get("signature", "") + delta["signature"]
            case "citations_delta":
                if not block.get("citations"):
                    block["citations"] = []
                block["citations"].append(delta["citation"])

    def _finish(self, index: int) -> None:
        block = self._blocks[index]
        text = "".join(self._pieces.pop(index, ()))
        match block["type"]:
            case "text":
                block["text"] = text
            case "thinking":
                block["thinking"] = (block.get("thinking") or "") + text
            case "tool_use" | "server_tool_use" if text:
                try:
                    block["input"] = json.loads(text)
                except ValueError:
                    block["input"] = text  # cut or broken: kept as it came

    @property
    def usage(self) -> Any:
        return self._message.get("usage")

    @property
    def is_ended(self) -> bool:
        return self._stopped and bool(self._message.get("stop_reason"))

    def body(self) -> JSON:
        for index in list(self._pieces):
            self._finish(index)
        blocks = [block for _, block in sorted(self._blocks.items())]
        return {**self._message, "content": blocks}
