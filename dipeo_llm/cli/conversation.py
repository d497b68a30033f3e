"""A conversation: its calls, what is printed of them, and the file that keeps it.

One question is a conversation of one turn. Imports the service, so the command imports
this module when it needs it.
"""

import asyncio
import os
import shutil
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
    find_provider,
    key_for,
    open_service,
    report,
    run,
)
from dipeo_llm.domain import (
    ChatResult,
    Message,
    Person,
    PersonLLMConfig,
    ToolConfig,
    ToolType,
)
from dipeo_llm.errors import DiPeOLLMError
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

        self._print(run(ask()))
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
                    question = None
            finally:
                runner.run(service.aclose())

    async def _open(self) -> LLMInfraService:
        """Make the service, and complete the configuration with the provider's key."""
        options, config = self._options, self._config
        provider = await find_provider(config.model, config.service)
        update = {"api_key_id": key_for(provider, config.api_key_id)}
        self._config = self._person.llm_config = config.model_copy(update=update)
        return open_service(
            provider, base_url=options.base_url, timeout=options.timeout
        )

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
                raise
            result = ChatResult(text="".join(printed), finish_reason=_INTERRUPTED)
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


def _save(person: Person, path: Path) -> None:
    """Write a file beside *path* and rename it: readers never see half of it."""
    path = path.resolve()  # keeps a link a link
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - renamed after it is closed
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    )
    try:
        with file:
            file.write(person.model_dump_json(indent=2, exclude_none=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, file.name)
        Path(file.name).replace(path)
    except BaseException:
        Path(file.name).unlink()
        raise
