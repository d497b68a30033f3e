"""Anthropic's messages."""

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic_core import to_json

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
from dipeo_llm.media import PDF, PICTURES, MediaRules

ANTHROPIC = Provider(
    name="anthropic",
    litellm="anthropic",
    aliases=("claude",),
    base_url="https://api.anthropic.com",
    key_header="x-api-key",
    key_variables=("ANTHROPIC_API_KEY",),
    claims=re.compile(r"claude-[\w.-]+"),
    # https://platform.claude.com/docs/en/build-with-claude/vision
    # https://platform.claude.com/docs/en/build-with-claude/pdf-support (2026-11-23)
    # It takes no sound, which LiteLLM drops silently.
    media=MediaRules(types=PICTURES | {PDF}, reads_documents=True),
)

# LiteLLM asks older Claude models for JSON through a tool of this name.
_JSON_TOOL = "json_tool_call"
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
    headers = STANDARD_HEADERS | {"anthropic-version", "anthropic-beta"}
    question_headers: ClassVar[Mapping[str, str]] = {"anthropic-version": "2023-06-01"}

    def complete_base_url(self, url: str) -> str:
        """Return a checked base URL without "/v1", which the paths begin with."""
        return url.removesuffix("/v1")

    def prepare_messages(self, messages: list[Message]) -> list[Message]:
        """Put one system prompt in front; keep thinking blocks and cache marks."""
        return put_system_first(messages, COMMON_FIELDS | {"thinking_blocks"})

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

    def adjust_options(self, prepared: PreparedRequest) -> None:
        """Drop top_p beside temperature, and send some forms through a tool.

        Models since Claude 4 take temperature or top_p, not both. Source:
        https://docs.anthropic.com/en/docs/about-claude/models/migrating-to-claude-4
        (2026-11-23).
        """
        options = prepared.options
        if "temperature" in options and not _TAKES_BOTH.match(self.model_name):
            options.pop("top_p", None)
        form = options.get("response_format") or {}
        schema = (form.get("json_schema") or {}).get("schema")
        if isinstance(schema, Mapping) and "$ref" in to_json(schema).decode():
            self._ask_through_tool(options, dict(schema))

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
        if stop == "refusal":
            reading.refusal = reading.text or "the model declined"
        reading.reasoning = join_paragraphs(thoughts)
        reading.searches = merge_pages(searches)
        return reading

    def stream_reader(self) -> StreamReader:
        """Return a reader of Anthropic's events."""
        return AnthropicStream()


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
    """Return the JSON text of a forced tool's input.

    Older Claude models may wrap the object in `values`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and set(value) == {"values"}:
        value = value["values"]
    return json.dumps(value, ensure_ascii=False)


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
    def is_ended(self) -> bool:
        return self._stopped and bool(self._message.get("stop_reason"))

    def body(self) -> JSON:
        for index in list(self._pieces):
            self._finish(index)
        blocks = [block for _, block in sorted(self._blocks.items())]
        return {**self._message, "content": blocks}
