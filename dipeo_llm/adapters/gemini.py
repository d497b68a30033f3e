"""Google Gemini's generateContent."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.events import StreamReader
from dipeo_llm.adapters.provider import ModelList, Page, Probe, Provider, TokenCounter
from dipeo_llm.adapters.reading import (
    JSON,
    Reading,
    make_call_id,
    merge_pages,
    read_tool_call,
)
from dipeo_llm.adapters.request import (
    COMMON_FIELDS,
    Message,
    PreparedRequest,
    drop_cache_control,
    put_system_first,
)
from dipeo_llm.adapters.schemas import simplify
from dipeo_llm.adapters.translation import JSON_HEADERS, Outgoing, map_options
from dipeo_llm.domain import (
    ImageGenerationResult,
    StreamChunk,
    ToolCallDelta,
    ToolConfig,
    ToolType,
    WebSearchResult,
)
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.litellm_providers import EXAMPLES
from dipeo_llm.litellm_tables import know_model
from dipeo_llm.media import PDF, MediaRules

# https://ai.google.dev/gemini-api/docs/image-understanding: no gif
# https://ai.google.dev/gemini-api/docs/document-processing: text is read as plain text
# https://ai.google.dev/gemini-api/docs/audio
# https://ai.google.dev/gemini-api/docs/video-understanding; all read 2026-11-23
_MEDIA = MediaRules(
    types=frozenset(
        {
            PDF,
            *(f"image/{name}" for name in ("png", "jpeg", "webp", "heic", "heif")),
            *(f"audio/{name}" for name in ("wav", "mp3", "aiff", "aac", "ogg", "flac")),
            *(f"text/{name}" for name in ("plain", "markdown", "html", "xml", "csv")),
            *(f"video/{name}" for name in ("mp4", "mpeg", "quicktime", "webm", "3gpp")),
        }
    ),
    reads_stored=True,
)
GOOGLE = Provider(
    name="google",
    litellm="gemini",
    aliases=("gemini", "google_ai_studio"),
    base_url="https://generativelanguage.googleapis.com/v1beta",
    path="/v1beta",
    key_header="x-goog-api-key",
    key_variables=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    claims=re.compile(
        r"(?:models/)?(?:gemini-[\w.-]+|gemma-\d[\w.-]*|learnlm-[\w.-]+)"
    ),
    most_stops=5,
    highest_temperature=2.0,
    media=_MEDIA,
)

# https://LOCATION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/LOCATION
# /publishers/google, with an access token of Google's for a key:
# https://cloud.google.com/vertex-ai/generative-ai/docs/model-reference/inference
# (2026-11-25).
VERTEX = Provider(
    name="vertex",
    litellm="vertex_ai",
    aliases=("vertex_ai", "vertexai", "vertex_ai_beta"),
    base_url_example=EXAMPLES["vertex_ai"],
    client=None,  # LiteLLM signs in at Google with a client of its own
    most_stops=5,
    highest_temperature=2.0,
    media=_MEDIA,
)

# The name stands in the URL's path.
_NOT_IN_A_PATH = re.compile(r"[?#%\\\s]|(^|/)\.\.?(/|$)")
# Gemini drops these keywords of a schema silently:
# https://ai.google.dev/api/generate-content#FIELDS.response_json_schema (2026-11-25)
_UNREAD = frozenset({"not", "if", "then", "else", "patternProperties", "contains"})
_REFUSES_SYSTEM = re.compile("gemma-[1-3]")
# https://ai.google.dev/gemini-api/docs/function-calling,
# https://ai.google.dev/gemini-api/docs/structured-output (2026-11-25)
_TAKES_TEXT_ONLY = re.compile(r"(?:gemini-)?gemma-[1-3]|learnlm")
# A search beside functions, and a form beside tools, since Gemini 3:
# https://ai.google.dev/gemini-api/docs/tool-combination (2026-11-25).
_COMBINES_TOOLS = re.compile(r"gemini-(?:[3-9]|flash|pro|omni|robotics-er-2)")
# https://ai.google.dev/gemini-api/docs/thinking (2026-11-25): 2.5 Pro always thinks.
_ALWAYS_THINKS = re.compile(r"gemini-2\.5-pro")
_NEVER_THINKS = re.compile(r"gemini-(?:1|2\.0|exp)|(?:gemini-)?gemma-[1-3]|learnlm")
# https://ai.google.dev/api/generate-content#GenerationConfig (2026-11-25): int32.
_MOST_INTEGER = 2**31 - 1
# Models that have left LiteLLM's table (1.110.2):
# https://ai.google.dev/gemini-api/docs/models (2026-11-25).
_RETIRED = re.compile(r"gemini-(?:1|2\.0)")
_MOST_OF_RETIRED = 8192
# Parts with the work of Google's own tools, beside functions. They go back as they came:
# https://ai.google.dev/gemini-api/docs/tool-combination (2026-11-25).
_SERVER_PARTS = frozenset({"toolCall", "toolResponse"})
# Of a model outside its table LiteLLM says that it takes no system prompt, and makes the
# prompt a part of the user's words (1.105 to 1.110).
_UNKNOWN_MODELS = {"gemini": {"mode": "chat", "supports_system_messages": True}}
_FINISH = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    # Google says STOP; aimock, which many test against, says this.
    "FUNCTION_CALL": "stop",
}
_FILTER = frozenset(
    {
        "SAFETY",
        "RECITATION",
        "LANGUAGE",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT",
        "IMAGE_RECITATION",
        "MODEL_ARMOR",
    }
)


def _next_page(page: Page) -> dict[str, Any] | None:
    token = page.get("nextPageToken")
    return {"pageToken": token} if token else None


class GeminiAdapter(BaseLLMAdapter):
    """Talks to a Gemini or Gemma model in Google AI Studio."""

    rows = (GOOGLE, VERTEX)
    # https://ai.google.dev/api/caching#FunctionDeclaration (2026-11-25)
    tool_name = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.:-]{0,63}")
    probe = Probe("gemini-2.5-flash", ("contents", "generationConfig", "tools"))
    # https://ai.google.dev/api/models#method:-models.list (2026-11-23)
    model_list = ModelList(
        "/models", "models", "name", {"pageSize": 1000}, _next_page, is_optional=True
    )
    # https://ai.google.dev/api/tokens#method:-models.counttokens (2026-11-23)
    token_counter = TokenCounter(
        "/models/{model}:countTokens",
        "totalTokens",
        frozenset({"contents", "tools", "toolConfig", "system_instruction"}),
    )

    def __init__(
        self, provider: Provider | str, model_name: str, *args: Any, **named: Any
    ) -> None:
        """Take a name with or without "models/", as Google's list has it."""
        name = model_name.removeprefix("models/")
        super().__init__(provider, name, *args, **named)

    def check_model(self) -> None:
        """Refuse a name that would be more than a name in the URL's path.

        Google's own form of a name, such as `models/gemini-2.5-flash`, is taken too.
        """
        super().check_model()
        self.model_name = self.model_name.removeprefix("models/")
        if _NOT_IN_A_PATH.search(self.model_name):
            raise self._invalid_model()

    def prepare_messages(self, messages: list[Message]) -> list[Message]:
        """Put one system prompt in front."""
        prepared = put_system_first(messages, COMMON_FIELDS)
        drop_cache_control(prepared)
        return prepared

    def own_tool(self, tool: ToolConfig, options: dict[str, Any]) -> list[JSON]:
        """Return Google's search; switch image models to images.

        Source: https://ai.google.dev/gemini-api/docs/google-search (2026-11-23).
        """
        if tool.type in {ToolType.WEB_SEARCH, ToolType.WEB_SEARCH_PREVIEW}:
            return [{"googleSearch": {}}]
        if tool.type is ToolType.IMAGE_GENERATION and "image" in self.model_name:
            options["modalities"] = ["image", "text"]
            return []
        return super().own_tool(tool, options)

    def output_limit(self) -> int | None:
        """Return the most tokens of an answer; of an unknown model, the field's limit."""
        retired = _MOST_OF_RETIRED if _RETIRED.match(self.model_name) else _MOST_INTEGER
        return super().output_limit() or retired

    def adjust_options(self, prepared: PreparedRequest) -> None:
        """Refuse what the model cannot do; drop or change an effort that it refuses."""
        options, model = prepared.options, self.model_name
        if abs(options.get("seed", 0)) > _MOST_INTEGER:
            raise self.invalid(
                f"`seed` must be at most {_MOST_INTEGER}; google refuses it"
            )
        tools, form = options.get("tools"), options.get("response_format")
        is_json = form is not None and form["type"] != "text"
        if _TAKES_TEXT_ONLY.match(model) and (tools or is_json):
            self._refuse("tools" if tools else "a response_format")
        kinds = {tool.get("type", "search") for tool in tools or ()}
        if not _COMBINES_TOOLS.match(model):
            if len(kinds) > 1:
                self._refuse("functions beside a web search, which Gemini 3 takes")
            if tools and is_json:
                self._refuse("a response_format beside tools, which Gemini 3 takes")
        if _NEVER_THINKS.match(model):
            options.pop("reasoning_effort", None)
        elif options.get("reasoning_effort") == "none" and _ALWAYS_THINKS.match(model):
            options["reasoning_effort"] = "minimal"

    def _refuse(self, what: str) -> NoReturn:
        raise InvalidRequestError(
            f"{self.model_name} does not take {what}", **self._fields()
        )

    def teach(self, litellm: Any) -> None:
        """Tell LiteLLM about a model that its table leaves out."""
        if not _REFUSES_SYSTEM.match(self.model_name):
            know_model(litellm, self.model_name, _UNKNOWN_MODELS)

    def translate(
        self, litellm: Any, prepared: PreparedRequest, *, stream: bool
    ) -> Outgoing:
        """Translate with LiteLLM's body function for Gemini."""
        from litellm.llms.vertex_ai.gemini import transformation

        model = self.model_name
        self.teach(litellm)
        schemas = _take_schemas(prepared.options)
        kept = _take_parts(prepared.messages)
        doubles = _rename_doubles(prepared.messages)
        # The function lost its underscore in 1.108.
        transform: Callable[..., JSON] = (
            getattr(transformation, "_transform_request_body", None)
            or transformation.transform_request_body
        )
        body = transform(
            messages=prepared.messages,
            model=model,
            optional_params=map_options(litellm, GOOGLE, model, prepared),
            custom_llm_provider=GOOGLE.litellm,
            litellm_params={},
            cached_content=None,
        )
        _put_schemas(body, schemas)
        _restore_doubles(body, doubles)
        _put_parts(body, kept)
        verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
        path = f"/models/{quote(model, safe='/')}:{verb}"
        return Outgoing(path, JSON_HEADERS, body)

    def counting_adapter(self) -> BaseLLMAdapter | None:
        """Return this adapter for Google AI Studio; Vertex counts in another form."""
        return self if self.provider is GOOGLE else None

    async def list_models(self, pages: int = 100) -> list[str]:
        """Return the names of the models; Vertex has no list of them here."""
        if self.provider is VERTEX:
            raise self.invalid("vertex has no list of models that is known here")
        return await super().list_models(pages)

    def count_body(self, body: JSON) -> JSON:
        """Return a whole request: system prompt and tools count only inside of one."""
        if body.keys() <= {"contents"}:
            return body
        return {
            "generateContentRequest": {"model": f"models/{self.model_name}", **body}
        }

    def has_answer(self, body: Mapping[str, Any]) -> bool:
        """Say whether there are candidates."""
        candidates = body.get("candidates")
        return isinstance(candidates, list) and bool(candidates)

    def blocked_prompt(self, body: Mapping[str, Any]) -> str | None:
        """Return Google's reason for refusing the prompt, None if it did not."""
        feedback = body.get("promptFeedback")
        reason = feedback.get("blockReason") if isinstance(feedback, dict) else None
        return str(reason) if reason and not body.get("candidates") else None

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read a generateContent response."""
        candidates = body.get("candidates") or [{}]
        first = candidates[0]
        reason = first.get("finishReason")
        texts = [_join_text(candidate, thought=False) for candidate in candidates]
        reading = Reading(
            text=texts[0],
            texts=texts if len(texts) > 1 else [],
            reasoning=_join_text(first, thought=True) or None,
            finish=(
                "content_filter"
                if reason in _FILTER
                # Kept as it is: after MALFORMED_FUNCTION_CALL the answer is not whole.
                else _FINISH.get(reason, reason.lower())
                if reason
                else None
            ),
            model=body.get("modelVersion"),
            id=body.get("responseId"),
            usage=body.get("usageMetadata"),
        )
        if reason in _FILTER:
            reading.refusal = first.get("finishMessage") or f"blocked: {reason}"
        for index, part in enumerate(_parts(first)):
            if call := part.get("functionCall"):
                made = read_tool_call(
                    call.get("id") or make_call_id(body.get("responseId"), index, call),
                    call.get("name"),
                    call.get("args"),
                )
                signature = part.get("thoughtSignature")
                made.thought_signature = (
                    signature if isinstance(signature, str) else None
                )
                reading.tool_calls.append(made)
            elif (data := part.get("inlineData")) and data.get(
                "mimeType", ""
            ).startswith("image/"):
                reading.images.append(
                    ImageGenerationResult(
                        image_data=data.get("data", ""),
                        format=data["mimeType"].removeprefix("image/"),
                    )
                )
        if any(part.keys() & _SERVER_PARTS for part in _parts(first)):
            reading.content_blocks = list(_parts(first))
        reading.searches = _grounding(first.get("groundingMetadata") or {})
        return reading

    def stream_reader(self) -> StreamReader:
        """Return a reader of Gemini's responses."""
        return GeminiStream()


def _take_parts(messages: list[Message]) -> dict[str, list[JSON]]:
    """Put a text, in place, in front of a turn that has parts; return them by this text.

    LiteLLM knows no parts of Google's own tools; `_put_parts` puts them back.
    """
    taken: dict[str, list[JSON]] = {}
    for number, message in enumerate(messages):
        own = message.get("provider_specific_fields")
        parts = own.get("content_blocks") if isinstance(own, Mapping) else None
        is_ours = isinstance(parts, list) and all(
            isinstance(part, dict) and "type" not in part for part in parts
        )
        if parts and is_ours:
            message["content"] = text = f"{_PARTS}{number}"
            taken[text] = parts
    return taken


def _put_parts(body: JSON, taken: Mapping[str, list[JSON]]) -> None:
    for content in body.get("contents", ()) if taken else ():
        for index, part in enumerate(content["parts"]):
            if (parts := taken.get(part.get("text"))) is not None:
                # The calls follow the text, and are among the kept parts too.
                rest = content["parts"][index + 1 :]
                calls = sum(1 for kept in parts if "functionCall" in kept)
                content["parts"][index:] = [*parts, *rest[calls:]]
                break


_PARTS = "dipeo-llm-parts-"


def _rename_doubles(messages: list[Message]) -> dict[str, str]:
    """Rename repeated calls of one turn, in place; return the real names.

    LiteLLM drops a call that has the name and arguments of another one
    (check_if_part_exists_in_parts, 1.105 to 1.110), and keeps both results.
    """
    doubles: dict[str, str] = {}
    for message in messages:
        seen: set[tuple[str, str]] = set()
        for call in message.get("tool_calls") or ():
            function = call["function"]
            key = (function["name"], function["arguments"])
            if key in seen:
                name = f"{function['name']}.{len(doubles)}.again"
                doubles[name] = function["name"]
                function["name"] = name
            seen.add(key)
    return doubles


def _restore_doubles(body: JSON, doubles: Mapping[str, str]) -> None:
    if not doubles:
        return
    for content in body.get("contents", ()):
        for part in content.get("parts", ()):
            for kind in ("function_call", "functionCall"):
                if call := part.get(kind):
                    call["name"] = doubles.get(call["name"], call["name"])
            for kind in ("function_response", "functionResponse"):
                if answer := part.get(kind):
                    answer["name"] = doubles.get(answer["name"], answer["name"])


@dataclass(slots=True)
class _Schemas:
    """The JSON schemas of a request, which LiteLLM would rewrite with losses."""

    functions: dict[str, JSON]
    """The parameters of each function, by its name."""
    has_search: bool
    answer: JSON | None


def _take_schemas(options: dict[str, Any]) -> _Schemas:
    """Take the schemas and a search beside functions out of options, in place."""
    functions: dict[str, JSON] = {}
    tools = options.get("tools", [])
    own = [tool for tool in tools if "googleSearch" in tool]
    is_mixed = bool(own) and len(own) < len(tools)
    if is_mixed:
        options["tools"] = [tool for tool in tools if "googleSearch" not in tool]
    for tool in options.get("tools", []):
        if function := tool.get("function"):
            functions[function["name"]] = function.pop("parameters", None) or {}
    form = options.get("response_format") or {}
    answer = (form.get("json_schema") or {}).get("schema")
    if answer is not None:
        form["json_schema"]["schema"] = {"type": "object", "properties": {}}
    return _Schemas(functions, is_mixed, answer)


def _put_schemas(body: JSON, schemas: _Schemas) -> None:
    """Put the schemas into a body, in the fields that take JSON Schema.

    Source: https://ai.google.dev/api/caching#FunctionDeclaration and
    https://ai.google.dev/gemini-api/docs/structured-output (2026-11-25).
    """
    for tool in body.get("tools", ()):
        for declared in tool.get("function_declarations", ()):
            declared.pop("parameters", None)
            schema = schemas.functions.get(declared["name"])
            if schema and _takes_arguments(schema):
                declared["parametersJsonSchema"] = _simplify(schema)
    if schemas.has_search:
        body["tools"].append({"googleSearch": {}})
        config = body.setdefault("toolConfig", {})
        config["includeServerSideToolInvocations"] = True
        calling = config.get("functionCallingConfig", {})
        if calling.get("mode") == "AUTO":  # refused beside a search
            calling["mode"] = "VALIDATED"
    config = body.get("generationConfig", {})
    if schemas.answer is not None:
        for name in ("responseSchema", "response_schema", "response_json_schema"):
            config.pop(name, None)
        config["responseJsonSchema"] = _simplify(schemas.answer)


def _takes_arguments(schema: Mapping[str, Any]) -> bool:
    """Say whether the parameters of a function may hold anything."""
    may_be_more = isinstance(schema.get("additionalProperties"), Mapping)
    others = schema.keys() - {*_ABOUT_NOTHING, "properties", "additionalProperties"}
    return bool(schema.get("properties")) or may_be_more or bool(others)


_ABOUT_NOTHING = frozenset({"type", "title", "description", "required", "$schema"})


def _simplify(schema: JSON) -> Any:
    return simplify(schema, unread=_UNREAD, plain_enums=True)


def _parts(candidate: Mapping[str, Any]) -> list[JSON]:
    return (candidate.get("content") or {}).get("parts") or []


def _join_text(candidate: Mapping[str, Any], *, thought: bool) -> str:
    return "".join(
        part.get("text") or ""
        for part in _parts(candidate)
        if bool(part.get("thought")) is thought
    )


def _grounding(metadata: Mapping[str, Any]) -> list[WebSearchResult]:
    snippets: dict[int, str] = {}
    for support in metadata.get("groundingSupports") or ():
        for index in support.get("groundingChunkIndices") or ():
            snippets.setdefault(index, (support.get("segment") or {}).get("text") or "")
    return merge_pages(
        WebSearchResult(
            url=web.get("uri", ""),
            title=web.get("title") or "",
            snippet=snippets.get(index, ""),
        )
        for index, chunk in enumerate(metadata.get("groundingChunks") or ())
        if (web := chunk.get("web"))
    )


class GeminiStream(StreamReader):
    """Gemini's responses, ended by one with a finish reason or a blocked prompt."""

    def __init__(self) -> None:
        super().__init__()
        self._head: JSON = {}
        self._candidates: dict[int, JSON] = {}
        self._pieces: dict[int, list[str]] = {}
        self._calls = 0

    def _event(self, event: JSON, chunks: list[StreamChunk]) -> None:
        for name, value in event.items():
            if name != "candidates":
                self._head[name] = value
        for candidate in event.get("candidates") or ():
            index = candidate.get("index") or 0
            kept = self._candidates.setdefault(
                index, {"index": index, "content": {"role": "model", "parts": []}}
            )
            for name, value in candidate.items():
                if name not in {"content", "index"}:
                    kept[name] = value
            for part in _parts(candidate):
                self._part(kept["content"]["parts"], part, chunks if index == 0 else [])

    def _part(self, parts: list[JSON], part: JSON, chunks: list[StreamChunk]) -> None:
        if call := part.get("functionCall"):
            arguments = json.dumps(call.get("args") or {}, ensure_ascii=False)
            delta = ToolCallDelta(
                self._calls, call.get("id"), call.get("name"), arguments
            )
            chunks.append(StreamChunk(tool_call=delta))
            self._calls += 1
        elif text := part.get("text"):
            chunks.append(
                StreamChunk(reasoning=text)
                if part.get("thought")
                else StreamChunk(text)
            )
        self._keep(parts, part)

    def _keep(self, parts: list[JSON], part: JSON) -> None:
        """Add a part; plain text is joined to plain text, or a long answer is costly."""
        plain = part.keys() <= {"text", "thought"}
        last = parts[-1] if parts else {}
        pieces = self._pieces.get(id(last))
        if plain and pieces is not None and part.get("thought") == last.get("thought"):
            pieces.append(part.get("text") or "")
            return
        parts.append(part)
        if plain:
            self._pieces[id(part)] = [part.get("text") or ""]

    @property
    def usage(self) -> Any:
        return self._head.get("usageMetadata")

    @property
    def is_ended(self) -> bool:
        feedback = self._head.get("promptFeedback") or {}
        return bool(feedback.get("blockReason")) or (
            bool(self._candidates)
            and all(c.get("finishReason") for c in self._candidates.values())
        )

    def body(self) -> JSON:
        candidates = [c for _, c in sorted(self._candidates.items())]
        for candidate in candidates:
            for part in _parts(candidate):
                if id(part) in self._pieces:
                    part["text"] = "".join(self._pieces[id(part)])
        return {**self._head, **({"candidates": candidates} if candidates else {})}
