"""A conversation: its calls, what is printed of them, and the file that keeps it.

One question is a conversation of one turn. Imports the service, so the command imports
this module when it needs it.
"""

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from dipeo_llm.cli import inputs, results, terminal
from dipeo_llm.cli.options import (
    Exit,
    UsageError,
    find_provider_and_key,
    open_service,
    report,
    run,
)
from dipeo_llm.conversation_page import Turn, write_page
from dipeo_llm.domain import (
    ChatResult,
    Message,
    Person,
    PersonLLMConfig,
    ToolConfig,
    ToolType,
)
from dipeo_llm.errors import DiPeOLLMError
from dipeo_llm.files import replace_file
from dipeo_llm.record import CallRecord
from dipeo_llm.service import LLMInfraService
from dipeo_llm.streaming import ChatStream

_INTERRUPTED = "interrupted"
"""The `finish_reason` of an answer that Ctrl-C stopped."""


class Conversation:
    """A conversation with a model.

    Args:
        options: Of `chat`; its `media` goes out with the first question answered.
        person: The model's side of it. It remembers both sides.
        config: The model, its key and its prompt.
        path: Where the conversation is saved; None keeps it in memory.
    """

    def __init__(
        self,
        options: SimpleNamespace,
        person: Person,
        config: PersonLLMConfig,
        path: Path | None,
    ) -> None:
        self._options = options
        self._person = person
        self._config = config
        self._path = path
        self._html = Path(options.html) if options.html else None
        names = {"user": "User", person.id: person.name}
        self._turns = [
            Turn(who, _words(message.content), name=names.get(who, ""))
            for message in person.messages
            for who in [message.from_person_id]
        ]
        self._record: CallRecord | None = None
        self._streams = options.stream
        if options.as_json or options.schema is not None:
            self._streams = False
        elif options.stream is None:
            self._streams = options.interactive or terminal.is_terminal(sys.stdout)

    def answer(self, question: str) -> Exit:
        """Answer one question."""

        async def ask() -> ChatResult:
            async with await self._open() as service:
                return await self._ask(service, question)

        try:
            self._print(run(ask()))
        finally:
            self._write_page()
        return Exit.OK

    def hold(self, question: str | None) -> Exit:
        """Answer the questions on stdin, until /quit or its end.

        Args:
            question: The first one; None reads it.
        """
        with asyncio.Runner() as runner:
            service = run(self._open(), runner)
            terminal.write_hint(
                f"{self._config.model}: /quit or Ctrl-D ends the conversation, Ctrl-C"
                " stops an answer"
            )
            try:
                while True:
                    question = question or inputs.read_line()
                    if question is None or question.strip() == "/quit":
                        return Exit.OK
                    if question.strip():
                        try:
                            self._print(run(self._ask(service, question), runner))
                        except DiPeOLLMError as exc:
                            report(exc)
                        finally:
                            self._write_page()
                    question = None
            finally:
                runner.run(service.aclose())

    async def _open(self) -> LLMInfraService:
        """Make the service, and complete the configuration with the provider's key."""
        options, config = self._options, self._config
        provider, key = await find_provider_and_key(
            config.model, config.service, config.api_key_id
        )
        if options.base_url and not provider:
            raise UsageError("--base-url needs a model, and not a route")
        update = {"api_key_id": key}
        self._config = self._person.llm_config = config.model_copy(update=update)
        service = open_service(
            provider,
            base_url=options.base_url,
            on_call=self._keep_record,
            timeout=options.timeout,
        )
        if self._html is not None:
            await service.initialize()  # LiteLLM's import is not the provider's time
        return service

    async def _ask(self, service: LLMInfraService, question: str) -> ChatResult:
        """Make a call, printing a stream as it arrives, and remember the turn.

        A conversation survives Ctrl-C: the result is what was printed until then.
        """
        options, person = self._options, self._person
        content = [question, *options.media] if options.media else question
        heard = Message(from_person_id="user", to_person_id=person.id, content=content)
        messages = [*person.messages, heard]
        call: dict[str, Any] = {
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "top_p": options.top_p,
            "seed": options.seed,
            "reasoning_effort": options.reasoning_effort,
            "deadline": options.deadline,
            "response_format": options.schema,
            "tools": [ToolConfig(type=ToolType(name)) for name in options.tools],
        }
        printed: list[str] = []
        self._record = None
        self._turns.append(Turn("user", _words(content), name="User"))
        terminal.show_status(f"waiting for {self._config.model} ...")
        started = time.perf_counter()
        try:
            if self._streams:
                async with service.stream_with_person(
                    messages, person.id, self._config, **call
                ) as stream:
                    await self._print_stream(stream, printed)
                    result = await stream.result()
            else:
                result = await service.complete_with_person(
                    messages, person.id, self._config, **call
                )
        except asyncio.CancelledError:
            if not options.interactive:
                self._note_answer("".join(printed))
                self._write_page()  # here, because the process ends at once
                raise
            result = ChatResult(text="".join(printed), finish_reason=_INTERRUPTED)
        except Exception as exc:
            self._note_answer("".join(printed), error=str(exc))
            raise
        self._note_answer(result.text or result.refusal or "")
        self._seconds = time.perf_counter() - started
        if result.text:  # no provider accepts an empty turn
            said = Message(
                from_person_id=person.id, to_person_id="user", content=result.text
            )
            person.messages += [heard, said]
            options.media = []
        return result

    async def _print_stream(self, stream: ChatStream, printed: list[str]) -> None:
        """Print a stream as it arrives, in a thread: a terminal may block.

        Args:
            stream: An open stream.
            printed: Takes the text that was printed.
        """
        async for chunk in stream:
            if chunk.reasoning and self._options.show_reasoning:
                await asyncio.to_thread(terminal.write_aside, chunk.reasoning)
            if chunk.text:
                printed.append(chunk.text)
                await asyncio.to_thread(terminal.write_text, chunk.text)

    def _keep_record(self, record: CallRecord) -> None:
        self._record = record

    def _note_answer(self, text: str, *, error: str | None = None) -> None:
        """Add the person's turn, with the record of the last call, to the page."""
        person = self._person
        self._turns.append(Turn(person.id, text, self._record, error, person.name))

    def _write_page(self) -> None:
        """Write the page of the conversation, if one was asked for."""
        if self._html is not None:
            title = f"Conversation with {self._config.model}"
            write_page(self._html, self._turns, title=title)

    def _print(self, result: ChatResult) -> None:
        """Print what is left of a turn, and save the conversation."""
        options = self._options
        if options.as_json:
            results.print_json(result)
        elif options.schema is not None:
            terminal.write_json(result.parsed)
        elif result.finish_reason == _INTERRUPTED:
            terminal.write("\n")
        else:
            if options.show_reasoning and result.reasoning and not self._streams:
                terminal.write_aside(result.reasoning + "\n")
            results.print_rest(result, is_printed=self._streams)
        if result.finish_reason != _INTERRUPTED and (
            options.usage or options.interactive
        ):
            results.print_usage(result, self._seconds)
        if self._path:
            _save(self._person, self._path)


def read_conversation(path: Path) -> Person | None:
    """Read a saved conversation; return None if the file does not exist yet.

    Raises:
        UsageError: The file cannot be used, or its folder cannot be written to.
    """
    try:
        text = path.read_bytes() if path.exists() else b""
        if not os.access(path.resolve().parent, os.W_OK):
            raise ValueError("its folder cannot be written to")
        if not text.strip():
            return None
        person = Person.model_validate_json(text)
        if not isinstance(person.llm_config, PersonLLMConfig) or not all(
            isinstance(message, Message) for message in person.messages
        ):
            raise ValueError("it is not a Person with an llm_config and messages")
    except ValidationError as exc:
        why = f"it is not a Person: {exc.errors()[0]['msg']}"
    except (OSError, ValueError) as exc:
        why = inputs.reason(exc)
    else:
        return person
    raise UsageError(f"the file {str(path)!r} of --conversation cannot be used: {why}")


def check_page(html: str, conversation: Path | None) -> None:
    """Check that the page of a conversation can be written, and leave no trace.

    Raises:
        UsageError: It cannot, or it would replace the file of the conversation.
    """
    try:
        path = Path(html).resolve()
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        if conversation is not None and path == conversation.resolve():
            raise ValueError("--conversation names the same file")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except (OSError, ValueError, RuntimeError) as exc:
        raise UsageError(
            f"the file {html!r} of --html cannot be written: {inputs.reason(exc)}"
        ) from None


def _save(person: Person, path: Path) -> None:
    """Save a conversation as JSON."""
    text = person.model_dump_json(indent=2, exclude_none=True)
    replace_file(path, text + "\n")


def _words(content: Any) -> str:
    """Return the text of a message; a picture or a file is named by its kind."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "\n".join(text if isinstance(text, str) else "[file]" for text in texts)
