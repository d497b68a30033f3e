"""Ollama's chat endpoint."""

import re
from collections.abc import Mapping
from typing import Any

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.events import StreamReader
from dipeo_llm.adapters.provider import ModelList, Probe, Provider
from dipeo_llm.adapters.reading import (
    JSON,
    Reading,
    make_call_id,
    read_function,
    read_tool_call,
)
from dipeo_llm.adapters.request import PreparedRequest
from dipeo_llm.adapters.schemas import simplify
from dipeo_llm.adapters.translation import (
    JSON_HEADERS,
    Outgoing,
    find_config,
    map_options,
)
from dipeo_llm.domain import ChatRequest, StreamChunk, ToolCallDelta
from dipeo_llm.litellm_tables import know_model
from dipeo_llm.media import MediaRules
from dipeo_llm.structured import inline_references

# Families of Ollama's library (https://ollama.com/library, read 2026-11-23) that no
# hosted provider of ours serves under the bare name. A size after the family is written
# as a tag (`llama3.2:1b`), so hosted names such as `mistral-large-latest` do not match.
_OLLAMA_FAMILIES = (
    r"llama(?:\d+(?:\.\d+)?)?(?:-(?:vision|guard\d?|pro|chinese))?|llama-guard\d|codellama"
    r"|llava(?:-[\w.]+)?|bakllava|tinyllama|tinydolphin|mistral(?:-nemo|-small[\d.]*|lite)?"
    r"|mixtral|magistral|devstral|codestral|qwen[\d.]*(?:-coder|-math|vl)?|codeqwen|qwq"
    r"|gemma\d*n?|codegemma|phi[\d.]*(?:-mini|-reasoning|-mini-reasoning)?|gpt-oss"
    r"|deepseek-(?:r1|v2|v2\.5|v3|coder|coder-v2|llm)|smollm\d?|granite[\w.-]*"
    r"|nemotron(?:-mini)?|olmo\d?|falcon\d?|vicuna|zephyr|starcoder\d?|yi|yi-coder"
    r"|orca-mini|orca\d?|wizardlm\d?|wizardcoder|dolphin[\w.-]*|solar|stablelm\d?"
    r"|nous-hermes\d?|hermes\d|openchat|aya|aya-expanse|exaone[\w.-]*|cogito|minicpm-v"
    r"|moondream|nomic-embed-text|mxbai-embed-large|all-minilm|bge-m3|snowflake-arctic-embed"
)

OLLAMA = Provider(
    name="ollama",
    litellm="ollama_chat",
    aliases=("ollama_chat", "llama"),
    base_url="http://127.0.0.1:11434",
    needs_key=False,
    has_prices=False,
    claims=re.compile(rf"(?:{_OLLAMA_FAMILIES})(?::[\w.-]+)?", re.IGNORECASE),
    # https://github.com/ollama/ollama/pull/10653 (webp, since 0.7) and decodeImageURL in
    # https://github.com/ollama/ollama/blob/main/openai/openai.go: a gif is refused. It
    # takes no files and no sound, which LiteLLM drops silently (2026-11-23).
    media=MediaRules(
        types=frozenset({"image/png", "image/jpeg", "image/webp"}), takes_file_ids=False
    ),
)

# https://ollama.com/search?c=thinking, https://docs.ollama.com/capabilities/thinking
# (2026-11-25): gpt-oss takes three levels and cannot stop thinking; qwen3-coder does not
# think.
_THINKS_IN_LEVELS = re.compile(r"gpt-oss", re.IGNORECASE)
_LEVELS = frozenset({"low", "medium", "high"})
_THINKS = re.compile(
    r"qwen3(?!-coder|.*-instruct)|deepseek-(?:r1|v3\.1)|gpt-oss|magistral|cogito|phi4-.*reasoning|glm|kimi",
    re.IGNORECASE,
)
_LOCAL = {
    "mode": "chat",
    "input_cost_per_token": 0.0,
    "output_cost_per_token": 0.0,
    "supports_function_calling": True,
}
# LiteLLM asks localhost:11434 about a model outside its table, on the event loop (1.105
# to 1.110: two posts a call, whatever the base URL).
_UNKNOWN_MODELS = {"ollama_chat": _LOCAL, "ollama": _LOCAL}


class OllamaAdapter(BaseLLMAdapter):
    """Talks to a model in an Ollama server."""

    rows = (OLLAMA,)
    probe = Probe("dipeo-llm-probe", ("messages", "options", "tools"))
    # https://github.com/ollama/ollama/blob/main/docs/api.md (2026-11-23)
    model_list = ModelList("/api/tags", "models", "name", is_optional=True)

    def prepare(self, request: ChatRequest) -> PreparedRequest:
        """Prepare a request, without the tools if none may be called.

        Ollama has no `tool_choice`: the model would call a tool that it is shown.
        """
        prepared = super().prepare(request)
        if request.tool_choice == "none":
            prepared.options.pop("tools", None)
            prepared.options.pop("tool_choice", None)
        return prepared

    def adjust_options(self, prepared: PreparedRequest) -> None:
        """Drop an effort for a model that cannot think; make `stop` a list.

        Ollama answers 400 to both. Source:
        https://github.com/ollama/ollama/blob/main/api/types.go (`Options.FromMap`,
        2026-11-25).
        """
        options = prepared.options
        name = self.model_name.rpartition("/")[2]
        in_levels = _THINKS_IN_LEVELS.match(name)
        if not _THINKS.match(name) or (
            in_levels and options.get("reasoning_effort") not in _LEVELS
        ):
            options.pop("reasoning_effort", None)
        self._spell_tools(options.get("tools", []))
        if isinstance(options.get("stop"), str):
            options["stop"] = [options["stop"]]

    def _spell_tools(self, tools: list[JSON]) -> None:
        """Write the schemas of tools with the keywords that Ollama shows the model.

        Source: https://github.com/ollama/ollama/blob/main/api/types.go (`ToolProperty`,
        2026-11-25).
        """
        for tool in tools:
            function = tool.get("function") or {}
            if isinstance(schema := function.get("parameters"), dict):
                function["parameters"] = simplify(inline_references(schema))

    def teach(self, litellm: Any) -> None:
        """Tell LiteLLM about a model that its table leaves out."""
        know_model(litellm, self.model_name, _UNKNOWN_MODELS)

    def translate(
        self, litellm: Any, prepared: PreparedRequest, *, stream: bool
    ) -> Outgoing:
        """Translate with LiteLLM's Ollama configuration; keep names and ids of tools.

        Ollama pairs a result with its call by name, or by id in newer versions
        (https://github.com/ollama/ollama/blob/main/docs/api.md, 2026-11-23).
        """
        model, messages = self.model_name, prepared.messages
        self.teach(litellm)
        options = map_options(litellm, self.provider, model, prepared)
        body = find_config(litellm, self.provider, model).transform_request(
            model=model,
            messages=messages,
            optional_params={**options, "stream": stream},
            litellm_params={},
            headers={},
        )
        for made, given in zip(body["messages"], messages, strict=True):
            if given["role"] == "tool" and given.get("name"):
                made["tool_name"] = given["name"]
            for call, its in zip(
                made.get("tool_calls") or (),
                given.get("tool_calls") or (),
                strict=False,
            ):
                call["id"] = its.get("id")
        return Outgoing("/api/chat", JSON_HEADERS, {**body, "stream": stream})

    def has_answer(self, body: Mapping[str, Any]) -> bool:
        """Say whether there is a message."""
        return isinstance(body.get("message"), dict)

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read a chat response."""
        message = body.get("message") or {}
        reason = body.get("done_reason")
        finish = "length" if reason == "length" else "stop"
        return Reading(
            text=message.get("content") or "",
            reasoning=message.get("thinking") or None,
            tool_calls=[
                read_tool_call(
                    call.get("id") or make_call_id(body.get("created_at"), index, call),
                    *read_function(call),
                )
                for index, call in enumerate(message.get("tool_calls") or ())
            ],
            finish=finish if reason == "length" or body.get("done") else None,
            model=body.get("model"),
            usage=body if body.keys() & {"eval_count", "prompt_eval_count"} else None,
        )

    def stream_reader(self) -> StreamReader:
        """Return a reader of Ollama's lines."""
        return OllamaStream()


class OllamaStream(StreamReader):
    """Ollama's lines, ended by one that is done."""

    sse = False

    def __init__(self) -> None:
        super().__init__()
        self._last: JSON = {}
        self._first_created: str | None = None
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[JSON] = []
        self._spoke = False

    def _event(self, event: JSON, chunks: list[StreamChunk]) -> None:
        self._last = event
        self._first_created = self._first_created or event.get("created_at")
        message = event.get("message") or {}
        self._spoke = self._spoke or "message" in event
        if piece := message.get("thinking"):
            self._thinking.append(piece)
            chunks.append(StreamChunk(reasoning=piece))
        if piece := message.get("content"):
            self._text.append(piece)
            chunks.append(StreamChunk(text=piece))
        for call in message.get("tool_calls") or ():
            made = read_tool_call(call.get("id"), *read_function(call))
            chunks.append(
                StreamChunk(
                    tool_call=ToolCallDelta(
                        len(self._calls),
                        made.id or None,
                        made.name,
                        made.arguments_text,
                    )
                )
            )
            self._calls.append(call)

    @property
    def is_ended(self) -> bool:
        return self._spoke and self._last.get("done") is True

    def body(self) -> JSON:
        message: JSON = {"role": "assistant", "content": "".join(self._text)}
        if self._thinking:
            message["thinking"] = "".join(self._thinking)
        if self._calls:
            message["tool_calls"] = self._calls
        return {**self._last, "created_at": self._first_created, "message": message}
