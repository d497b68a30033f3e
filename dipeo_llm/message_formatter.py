"""Turns a conversation, seen from one person's side, into messages for a model.

Knows what a message of OpenAI's shape must be. Pure: no file, no network, no provider
beyond the one rule that the caller names.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from dipeo_llm.domain import LLMService
from dipeo_llm.errors import InvalidRequestError


class _PromptSource(Protocol):
    def get_system_prompt(self, llm_config: Any) -> str | None: ...
    def get_system_role(self, service: Any) -> str: ...


class MessageFormatter:
    """Formats conversations."""

    def format_messages_for_llm(
        self,
        messages: Iterable[Any],
        person_id: Any,
        system_prompt: str | None = None,
        service: Any = LLMService.OPENAI,
        system_role: str = "system",
    ) -> list[dict[str, Any]]:
        """Return OpenAI-shaped messages, oldest first, the system prompt in front.

        What the person said is "assistant", what anybody else said to it, "system"
        included, is "user". Order is kept, and neighbours of one role stay apart: the
        providers that refuse such a pair are served by LiteLLM, which joins it. A
        message without content is left out, because Anthropic answers 400 to one
        ("text content blocks must be non-empty") and it says nothing to the others.

        Args:
            messages: Objects with `from_person_id` and `content`.
            person_id: Whose side it is; compared as text.
            system_prompt: None, or nothing but white space, makes no message.
            service: Whose model it is for. The roles are the same for all.
            system_role: The role of the system prompt.
        """
        me = _text(person_id)
        formatted: list[dict[str, Any]] = []
        if system_prompt and system_prompt.strip():
            formatted.append({"role": system_role, "content": system_prompt})
        for message in messages:
            content = message.content
            if not has_content(content):
                continue
            mine = _text(message.from_person_id) == me
            formatted.append(
                {"role": "assistant" if mine else "user", "content": content}
            )
        return formatted

    def prepare_llm_messages(
        self,
        person_messages: Iterable[Any],
        person_id: Any,
        llm_config: Any,
        system_prompt_handler: _PromptSource,
    ) -> list[dict[str, Any]]:
        """Find the system prompt and format the conversation. Blocks on a prompt file.

        Args:
            person_messages: As for `format_messages_for_llm`.
            person_id: Likewise.
            llm_config: Anything with the attributes of `PersonLLMConfig`.
            system_prompt_handler: What finds the prompt and the role.
        """
        service = getattr(llm_config, "service", None)
        return self.format_messages_for_llm(
            person_messages,
            person_id,
            system_prompt=system_prompt_handler.get_system_prompt(llm_config),
            service=service,
            system_role=system_prompt_handler.get_system_role(service),
        )


def has_content(content: Any) -> bool:
    """Say whether there is anything in a message's content."""
    if isinstance(content, str):
        return bool(content.strip())
    return bool(content)


_ROLES = ("assistant", "developer", "function", "system", "tool", "user")


def check_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    """Return OpenAI-shaped messages that some provider could answer.

    Raises:
        InvalidRequestError: There is no message but system prompts, or one is no
            mapping, has no role that exists, or a content of no possible type.
    """
    if isinstance(messages, str | bytes | Mapping):
        raise InvalidRequestError(
            f"messages are a {type(messages).__name__}; they must be a list, such as"
            " [{'role': 'user', 'content': 'Hello'}]"
        )
    try:
        given = tuple(messages or ())
    except TypeError:
        raise InvalidRequestError(
            f"messages are of type {type(messages).__name__}, and no list"
        ) from None
    spoken = [_says(index, message) for index, message in enumerate(given)]
    if not any(spoken):
        raise InvalidRequestError(
            "there is nothing to answer: every message is empty or a system prompt"
            if given
            else "there are no messages to answer"
        )
    return given


def _says(index: int, message: Any) -> bool:
    """Check one message, and say whether it holds something to answer."""
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"message {index} is of type {type(message).__name__}; it must be a dict"
            " with role and content"
        )
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise InvalidRequestError(
            f"message {index} has the role {role!r}, and no role of {', '.join(_ROLES)}"
        )
    if not isinstance(content, str | list | tuple | None):
        raise InvalidRequestError(
            f"message {index} has a content of type {type(content).__name__}; it must"
            " be text or a list of parts"
        )
    said = has_content(content) or bool(message.get("tool_calls"))
    return said and role not in {"system", "developer"}


def _text(person_id: Any) -> str:
    """Read an id that may be a string or an enum of strings."""
    return str(getattr(person_id, "value", person_id))
