"""Formats a conversation for a model, from the side of one of its persons.

Knows OpenAI's message format. Pure: no file, no network, no provider's rules.
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
        """Return messages in OpenAI's format, the system prompt first, then oldest first.

        The person's own messages get the role "assistant"; all others, including those
        from "system", get "user". The order is kept. Adjacent messages of one role are
        not joined here: LiteLLM joins them for the providers that require it. A message
        without content is left out, because Anthropic refuses it with a 400 ("text
        content blocks must be non-empty").

        Args:
            messages: Objects with `from_person_id` and `content`.
            person_id: The person whose side it is; compared as text.
            system_prompt: None, or only white space, adds no message.
            service: The provider. The roles are the same for all of them.
            system_role: The role of the system prompt.
        """
        own_id = _text(person_id)
        formatted: list[dict[str, Any]] = []
        if system_prompt and system_prompt.strip():
            formatted.append({"role": system_role, "content": system_prompt})
        for message in messages:
            content = message.content
            if not has_content(content):
                continue
            is_own = _text(message.from_person_id) == own_id
            formatted.append(
                {"role": "assistant" if is_own else "user", "content": content}
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
            person_id: As for `format_messages_for_llm`.
            llm_config: An object with the attributes of `PersonLLMConfig`.
            system_prompt_handler: Finds the prompt and its role.
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
    """Say whether a message's content is more than white space."""
    if isinstance(content, str):
        return bool(content.strip())
    return bool(content)


_ROLES = ("assistant", "developer", "function", "system", "tool", "user")
_CONTENTS = (str, list, tuple, type(None))  # `str | list` would be made at each check


def check_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the messages of a call as a tuple, if a provider could answer them.

    Raises:
        InvalidRequestError: There are only system prompts, or a message is not a
            mapping with a known role and a content of a possible type.
    """
    is_list = isinstance(messages, (list, tuple)) or (
        isinstance(messages, Iterable)
        and not isinstance(messages, (str, bytes, Mapping))
    )
    if messages is not None and not is_list:
        raise InvalidRequestError(
            f"`messages` must be a list, such as [{{'role': 'user', 'content': 'Hello'}}];"
            f" got {type(messages).__name__}"
        )
    given = tuple(messages or ())
    # Each message is checked, also after one that can be answered.
    answerable = [_check_message(index, message) for index, message in enumerate(given)]
    if not any(answerable):
        raise InvalidRequestError(
            "there is nothing to answer: every message is empty or a system prompt"
            if given
            else "there is nothing to answer: `messages` is empty"
        )
    return given


def _check_message(index: int, message: Any) -> bool:
    """Check one message, and say whether it has something to answer."""
    # Check dict first: isinstance(x, Mapping) is slow.
    if not isinstance(message, (dict, Mapping)):
        raise InvalidRequestError(
            f"message {index} must be a dict with `role` and `content`; got"
            f" {type(message).__name__}"
        )
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise InvalidRequestError(
            f"message {index} has the unknown role {role!r}; known are"
            f" {', '.join(_ROLES)}"
        )
    if not isinstance(content, _CONTENTS):
        raise InvalidRequestError(
            f"the content of message {index} must be text or a list of parts; got"
            f" {type(content).__name__}"
        )
    is_filled = has_content(content) or bool(message.get("tool_calls"))
    return is_filled and role not in {"system", "developer"}


def _text(person_id: Any) -> str:
    """Return an id as text; it may be a member of an enum of strings."""
    return str(getattr(person_id, "value", person_id))
