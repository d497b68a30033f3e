"""OpenAI's Responses endpoint: the models and the tools that only it has."""

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.events import StreamReader
from dipeo_llm.adapters.failures import error_in
from dipeo_llm.adapters.provider import TokenCounter
from dipeo_llm.adapters.reading import (
    JSON,
    Reading,
    join_paragraphs,
    merge_pages,
    read_tool_call,
)
from dipeo_llm.adapters.request import PreparedRequest
from dipeo_llm.adapters.translation import JSON_HEADERS, Outgoing, map_options
from dipeo_llm.domain import (
    ImageGenerationResult,
    StreamChunk,
    ToolCallDelta,
    WebSearchResult,
)

_NOT_OF_THE_BODY = frozenset({"litellm_logging_obj", "client", "stream"})
# https://platform.openai.com/docs/api-reference/responses/create (2026-11-25)
_FEWEST_TOKENS = 16
_FINISH = {"max_output_tokens": "length", "content_filter": "content_filter"}


class ResponsesAdapter(BaseLLMAdapter):
    """Translates and reads for the Responses endpoint; `ChatGPTAdapter` prepares."""

    # https://platform.openai.com/docs/api-reference/responses/input-tokens (2026-11-23)
    token_counter = TokenCounter(
        "/responses/input_tokens",
        "input_tokens",
        frozenset({"model", "input", "tools", "tool_choice"}),
    )

    def translate(
        self, litellm: Any, prepared: PreparedRequest, *, stream: bool
    ) -> Outgoing:
        """Translate with LiteLLM's bridge from chat completions to Responses.

        Source: https://platform.openai.com/docs/guides/migrate-to-responses
        (2026-11-23).
        """
        from litellm.completion_extras.litellm_responses_transformation import (
            transformation,
        )

        handler = transformation.LiteLLMResponsesTransformationHandler()
        made = handler.transform_request(
            model=self.model_name,
            messages=prepared.messages,
            optional_params=map_options(
                litellm, self.provider, self.model_name, prepared
            ),
            litellm_params={},
            headers={},
            litellm_logging_obj=SimpleNamespace(),
            client=None,
        )
        body: JSON = {
            name: value
            for name, value in made.items()
            if value is not None and name not in _NOT_OF_THE_BODY
        }
        if body.get("max_output_tokens", _FEWEST_TOKENS) < _FEWEST_TOKENS:
            body["max_output_tokens"] = _FEWEST_TOKENS
        for tool in body.get("tools", ()):
            # Without it, Responses takes every optional parameter for a required one.
            if tool.get("type") == "function" and tool.get("strict") is None:
                tool["strict"] = False
        if stream:
            body["stream"] = True
        return Outgoing("/responses", JSON_HEADERS, body)

    def has_answer(self, body: Mapping[str, Any]) -> bool:
        """Say whether there is a list of output items."""
        return isinstance(body.get("output"), list)

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read a response."""
        reading = Reading(
            model=body.get("model"), id=body.get("id"), usage=body.get("usage")
        )
        searches: list[WebSearchResult] = []
        thoughts: list[str] = []
        for item in body.get("output") or ():
            match item.get("type"):
                case "message":
                    for part in item.get("content") or ():
                        reading.text += part.get("text") or ""
                        reading.refusal = part.get("refusal") or reading.refusal
                        searches += [
                            WebSearchResult(
                                url=a.get("url", ""), title=a.get("title") or ""
                            )
                            for a in part.get("annotations") or ()
                            if a.get("type") == "url_citation"
                        ]
                case "function_call":
                    reading.tool_calls.append(
                        read_tool_call(
                            item.get("call_id"), item.get("name"), item.get("arguments")
                        )
                    )
                case "image_generation_call" if item.get("result"):
                    reading.images.append(
                        ImageGenerationResult(
                            image_data=item["result"],
                            format=item.get("output_format") or "png",
                        )
                    )
                case "reasoning":
                    thoughts += [s.get("text") or "" for s in item.get("summary") or ()]
        reading.searches = merge_pages(searches)
        reading.reasoning = join_paragraphs(thoughts)
        reason = (body.get("incomplete_details") or {}).get("reason")
        reading.finish = _FINISH.get(reason, "stop") if reason else "stop"
        return reading

    def stream_reader(self) -> StreamReader:
        """Return a reader of Responses events."""
        return ResponsesStream()


class ResponsesStream(StreamReader):
    """OpenAI's Responses events, ended by one that carries the whole response."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: JSON | None = None
        self._items: dict[int, JSON] = {}
        self._calls: dict[int, int] = {}

    def _event(self, event: JSON, chunks: list[StreamChunk]) -> None:
        match event.get("type"):
            case "response.output_text.delta":
                chunks.append(StreamChunk(text=event["delta"]))
            case "response.reasoning_summary_text.delta":
                chunks.append(StreamChunk(reasoning=event["delta"]))
            case "response.output_item.added":
                item = event["item"]
                if item.get("type") == "function_call":
                    index = self._calls[event["output_index"]] = len(self._calls)
                    chunks.append(
                        StreamChunk(
                            tool_call=ToolCallDelta(
                                index, item["call_id"], item["name"]
                            )
                        )
                    )
            case "response.function_call_arguments.delta":
                index = self._calls[event["output_index"]]
                chunks.append(
                    StreamChunk(
                        tool_call=ToolCallDelta(index, arguments=event["delta"])
                    )
                )
            case "response.output_item.done":
                self._items[event["output_index"]] = event["item"]
            case "response.completed" | "response.incomplete" if not error_in(
                event["response"]
            ):
                self._whole = event["response"]
            case "response.completed" | "response.incomplete" | "response.failed":
                self.error = json.dumps(event["response"]).encode()
            case "error":
                self.error = json.dumps({"error": event}).encode()

    @property
    def is_ended(self) -> bool:
        return self._whole is not None

    def body(self) -> JSON:
        items = [item for _, item in sorted(self._items.items())]
        if self._whole is None:
            return {"output": items}
        # Some servers leave the output out of the last event.
        return {**self._whole, "output": self._whole.get("output") or items}
