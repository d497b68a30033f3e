"""The service as DiPeO's newer versions call it.

`from dipeo_llm.dipeo import LLMInfraService` replaces DiPeO's own import of that name.
docs/dipeo.md describes the change for each version. The names, the keywords and the
phases are those of https://github.com/sorryhyun/DiPeO (2026-11-25); nothing of DiPeO is
imported.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from pydantic import BaseModel, model_validator
from pydantic_core import to_json

from dipeo_llm import domain, service
from dipeo_llm.domain import ChatRequest, ServiceName, T, TokenUsage
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.progress import CallProgress
from dipeo_llm.structured import form_of


class LLMUsage(BaseModel):
    """Tokens of one call, in exactly the fields of DiPeO's class of the same name."""

    input: int
    """As in `TokenUsage`, like the other fields."""
    output: int
    cached: int
    total: int


class ChatResult(domain.ChatResult[T]):
    """A result that has the usage under DiPeO's newer name too."""

    @property
    def llm_usage(self) -> LLMUsage | None:
        """The tokens of the call; None if the provider reported no usage."""
        usage = self.token_usage
        return LLMUsage.model_validate(vars(usage)) if usage else None


class MemorySelectionOutput(BaseModel):
    """The messages that a person needs for its next task."""

    message_ids: list[str]

    @model_validator(mode="before")
    @classmethod
    def _read_array(cls, value: Any) -> Any:
        # DiPeO's own prompt asks for a bare array, and a model without structured
        # output follows it.
        return {"message_ids": value} if isinstance(value, list) else value


class DecisionOutput(BaseModel):
    """The answer to a question of yes or no."""

    decision: bool


_FORMS: dict[str, type[BaseModel]] = {
    "memory_selection": MemorySelectionOutput,
    "decision_evaluation": DecisionOutput,
}
"""The form of an answer in the phases whose answer DiPeO parses."""


class LLMInfraService(service.LLMInfraService):
    """`dipeo_llm.LLMInfraService` with the methods and signatures of DiPeO's port.

    A call with the `execution_phase` "memory_selection" or "decision_evaluation" and no
    `response_format` asks for the form that DiPeO parses; its `text` is then a JSON
    array of message ids, or an object such as `{"decision":true}`.
    """

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        service_name: ServiceName | None = None,
        **options: Any,
    ) -> ChatResult[Any]:
        """Answer a conversation, as the service that this class extends does.

        Args:
            messages: In OpenAI's format, oldest first.
            model: A model string.
            api_key_id: The key's id; None for a provider that needs no key.
            service_name: The provider; `service` and `provider` mean the same.
            **options: As for the extended service.

        Raises:
            DiPeOLLMError, TypeError, RuntimeError: As the extended service.

        Cancelling the call closes its connection.
        """
        result = await super().complete(
            messages, model, api_key_id, service_name=service_name, **options
        )
        return cast("ChatResult[Any]", result)  # made by `_finish` below

    async def complete_memory_selection(
        self,
        candidate_messages: Iterable[Any],
        task_preview: str,
        criteria: str,
        at_most: float | None,
        model: str,
        api_key_id: str | None,
        service_name: ServiceName | None,
        **options: Any,
    ) -> MemorySelectionOutput:
        """Let the model choose the messages that matter for a task.

        Args:
            candidate_messages: Objects with the attributes of `Message`. A message
                without an `id` cannot be chosen.
            task_preview: The task; its first 1200 characters are shown to the model.
            criteria: What to look for, in natural language.
            at_most: The most messages to choose; None or 0 is no limit.
            model: As for `complete`.
            api_key_id: As for `complete`.
            service_name: As for `complete`.
            **options: As for `complete`, such as the labels `person_name`,
                `execution_id` and `node_id`. `temperature` is 0 if it is not given.

        Returns:
            Ids of candidates, in the model's order. Without criteria or candidates the
            list is empty, and no request is made.

        Raises:
            StructuredOutputError: The model's answer is not a list of ids.
            DiPeOLLMError, TypeError, RuntimeError: As `complete`.

        Cancelling the call closes its connection.
        """
        candidates = {
            str(m.id): m for m in candidate_messages if getattr(m, "id", None)
        }
        if not candidates or not (criteria or "").strip():
            return MemorySelectionOutput(message_ids=[])
        limit = int(at_most) if at_most and at_most > 0 else len(candidates)
        prompt = _selection_prompt(candidates, task_preview or "", criteria, limit)
        result = await self.complete(
            [{"role": "user", "content": prompt}],
            model,
            api_key_id,
            service_name,
            execution_phase="memory_selection",
            **_call_options(options),
        )
        # A model may repeat an id or invent one.
        chosen = dict.fromkeys(i for i in result.parsed.message_ids if i in candidates)
        return MemorySelectionOutput(message_ids=list(chosen)[:limit])

    async def complete_decision(
        self,
        prompt: str,
        context: Mapping[str, Any] | None,
        model: str,
        api_key_id: str | None,
        service_name: ServiceName | None,
        **options: Any,
    ) -> DecisionOutput:
        """Let the model answer a question with yes or no.

        Args:
            prompt: The question.
            context: The values of the diagram. The model sees "default" or else
                "generated_output" if there is one, and otherwise everything but the
                counters of loops and branches.
            model: As for `complete`.
            api_key_id: As for `complete`.
            service_name: As for `complete`.
            **options: As for `complete`. `temperature` is 0 if it is not given.

        Raises:
            InvalidRequestError: The question is missing.
            StructuredOutputError: The model's answer is not a decision.
            DiPeOLLMError, TypeError, RuntimeError: As `complete`.

        Cancelling the call closes its connection.
        """
        if not (prompt or "").strip():
            raise InvalidRequestError("`prompt` is empty; a decision needs a question")
        result = await self.complete(
            [{"role": "user", "content": _decision_prompt(prompt, context or {})}],
            model,
            api_key_id,
            service_name,
            execution_phase="decision_evaluation",
            **_call_options(options),
        )
        decision: DecisionOutput = result.parsed
        return decision

    def get_token_counts(self, client_name: str, usage: Any) -> TokenUsage:
        """Read a provider's usage record, or that of an object with a `token_usage`."""
        return super().get_token_counts(
            client_name, getattr(usage, "token_usage", None) or usage
        )

    async def validate_api_key(
        self,
        api_key_id: str,
        provider: str | None = None,
        *,
        service: str | None = None,
    ) -> bool:
        """Say whether the provider accepts a key; `service` is DiPeO's newer name.

        Raises:
            DiPeOLLMError, RuntimeError: As the extended service.

        Cancelling the call closes its connection.
        """
        return await super().validate_api_key(api_key_id, provider or service)

    async def get_service_for_model(self, model: str) -> str | None:
        """Return the name of a model's provider, or None if it is unknown."""
        return await self.get_provider_for_model(model)

    def _check_options(
        self, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> ChatRequest:
        request = super()._check_options(options, defaults)
        phase = options.get("execution_phase")
        form = _FORMS.get(str(getattr(phase, "value", phase)))
        if form is None or request.response_format is not None:
            return request
        return replace(request, response_format=form_of(form))

    def _finish(
        self,
        request: ChatRequest,
        result: domain.ChatResult[Any],
        progress: CallProgress,
    ) -> ChatResult[Any]:
        done = super()._finish(request, result, progress)
        if isinstance(done.parsed, MemorySelectionOutput):
            done.text = to_json(done.parsed.message_ids).decode()
        elif isinstance(done.parsed, DecisionOutput):
            done.text = done.parsed.model_dump_json()
        return ChatResult.model_construct(done.model_fields_set, **dict(done))


_LEFT_OVER = {"preprocessed", "llm_service", "person_id"}
"""Keywords that DiPeO's selector hands on and its own service drops."""


def _call_options(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in options.items() if name not in _LEFT_OVER}
    return {"temperature": 0, **kept}


# --- what the model reads -------------------------------------------------------------

# DiPeO's own limits, in characters.
_SNIPPET, _PREVIEW = 250, 1200


def _selection_prompt(
    candidates: Mapping[str, Any], task: str, criteria: str, limit: int
) -> str:
    lines = [
        f"- {i} ({getattr(message, 'from_person_id', None) or 'unknown'}): {_snippet(message)}"
        for i, message in candidates.items()
    ]
    most = f" Choose {limit} at most." if limit < len(candidates) else ""
    return "\n".join(
        [
            "Which of these messages does a writer need to see again for the next task?",
            "",
            "Messages (id, sender, beginning):",
            *lines,
            "",
            "Next task:",
            task[:_PREVIEW],
            "",
            "Look for:",
            criteria,
            "",
            f"Skip a message that only repeats the task.{most} If none fits, choose none.",
            'Answer with the ids as JSON: {"message_ids": ["…"]}',
        ]
    )


def _snippet(message: Any) -> str:
    content = getattr(message, "content", None) or ""
    parts = [content] if isinstance(content, str) else content
    text = " ".join(part for part in parts if isinstance(part, str))
    return " ".join(text[:_SNIPPET].split())


_COUNTERS = {
    "current_index",
    "last_index",
    "iteration_count",
    "loop_index",
    "execution_count",
    "node_execution_count",
}


def _decision_prompt(question: str, context: Mapping[str, Any]) -> str:
    content = _content(context)
    if not isinstance(content, str):
        content = to_json(content, indent=2, fallback=str).decode()
    shown = f"\n\nDecide about this:\n{content}" if context else ""
    return (
        f"{question}{shown}\n\n"
        'Answer with JSON: {"decision": true} for yes, {"decision": false} for no.'
    )


def _content(context: Mapping[str, Any]) -> Any:
    for name in ("default", "generated_output"):
        if name in context:
            return context[name]
    kept = {
        name: value
        for name, value in context.items()
        if name not in _COUNTERS
        and not name.startswith("branch[")
        and not name.endswith("_last_increment_at")
    }
    return kept or context
