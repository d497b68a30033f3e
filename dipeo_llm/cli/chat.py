"""`dipeo-llm chat`: its options and its help.

`inputs` reads the files that the options name; `conversation` makes the calls.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from dipeo_llm.cli import inputs
from dipeo_llm.cli.options import (
    SECONDS,
    Command,
    Exit,
    Number,
    UsageError,
    complete_service,
    connection,
    is_model,
    service,
    text,
)

_HELP = """\
Ask MODEL one question and print its answer, or hold a conversation (--interactive).

PROMPT is the question. Piped text is added below it, or is the question if PROMPT is
missing or "-". MODEL may be left out if DIPEO_LLM_MODEL or the --conversation file
names one: a single argument is then the prompt, unless it reads as a model's name.
"""

_EFFORTS = ("none", "minimal", "low", "medium", "high")

_EPILOG = """\
Examples:
  dipeo-llm chat gpt-4.1-nano "Name three rivers."
  cat letter.txt | dipeo-llm chat claude-haiku-4-5 "Summarise this:"
  git diff | dipeo-llm chat claude-haiku-4-5 --system "Write a commit message."
  dipeo-llm chat gemini-2.5-flash "Hello" --prompt-file prompts/optimist.md
  dipeo-llm chat gpt-4.1-nano "What is this?" --image ~/photo.jpg --file plan.pdf
  dipeo-llm chat gemini-2.5-flash "Name two rivers." --schema rivers.schema.json
  dipeo-llm chat gpt-4.1-nano "Name a colour." --max-tokens 20 --json
  dipeo-llm chat claude-haiku-4-5 "Who won yesterday?" --tool web_search
  dipeo-llm chat gpt-5 "Draw a river." --tool image_generation
  dipeo-llm chat llama3.2:1b --interactive --system "Answer like a pirate."
  dipeo-llm chat gpt-4.1-nano "My name is Ada." --conversation ada.json
  dipeo-llm chat "What is my name?" --conversation ada.json
  dipeo-llm chat llama3.2:1b --interactive --html talk.html
  dipeo-llm chat my-model "Hi" --service openai --base-url http://127.0.0.1:8000/v1

A schema file holds a JSON schema, such as
  {"type": "object", "properties": {"names": {"type": "array"}}, "required": ["names"]}

In a conversation each line is a question; /quit or Ctrl-D ends it, and Ctrl-C stops an
answer. A question that fails is forgotten; the printed part of a stopped answer is
kept. --conversation reads FILE, if it exists, and saves the conversation to it after
each answer, with the model and the system prompt.

Inside a shell loop that reads stdin, add "< /dev/null", or chat reads the rest of it.
A broken stream is printed as far as it came, and the exit code is 1. On a terminal,
control characters in an answer are shown as escapes (\\x1b).
Variables and exit codes: dipeo-llm --help
"""


@click.command(
    cls=Command, help=_HELP, short_help="Ask a model, or talk with it.", epilog=_EPILOG
)
@click.argument("model", required=False, type=text)
@click.argument("prompt", required=False, type=text)
@click.option(
    "--system",
    "system_prompt",
    metavar="TEXT",
    type=text,
    help="The system prompt.",
)
@click.option(
    "--prompt-file",
    metavar="FILE",
    type=click.Path(),
    help="Read the system prompt from a file in or below the working directory."
    " --system is used if the file cannot be read.",
)
@click.option(
    "--image",
    "images",
    metavar="PATH_OR_URL",
    multiple=True,
    type=click.Path(),
    help="A picture to look at. Repeat it for more.",
)
@click.option(
    "--file",
    "files",
    metavar="PATH_OR_URL",
    multiple=True,
    type=click.Path(),
    help="A PDF, sound or picture to look at. Repeat it for more.",
)
@click.option(
    "-i",
    "--interactive",
    is_flag=True,
    help="Hold a conversation, until /quit or Ctrl-D.",
)
@click.option(
    "--conversation",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Continue the conversation in FILE and save it there, as JSON.",
)
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True),
    help="Write the conversation to FILE as a web page: every word, the tokens, the"
    " cost, and a time line of the calls with their retries. An interactive one"
    " rewrites it after each turn.",
)
@click.option(
    "--service",
    type=service,
    metavar="NAME",
    shell_complete=complete_service,
    help="The provider (openai, anthropic, google, ollama, ...), if the model's name"
    " does not show it.",
)
@connection
@click.option(
    "--deadline",
    metavar="SECONDS",
    type=SECONDS,
    help="Limit for the whole call, retries and waits included.",
)
@click.option(
    "--max-tokens",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Longest answer, in tokens (about four letters of English each).",
)
@click.option(
    "--temperature",
    metavar="NUMBER",
    type=Number(min=0),
    help="Sampling temperature, often up to 2. This and the next three options are not"
    " sent to a model that does not take them.",
)
@click.option(
    "--top-p",
    metavar="NUMBER",
    type=Number(min=0, max=1),
    help="Sample from the likeliest tokens with this total probability.",
)
@click.option(
    "--seed",
    metavar="INTEGER",
    type=int,
    help="Makes the same answer to the same request more likely.",
)
@click.option(
    "--reasoning-effort",
    metavar="LEVEL",
    type=text,
    shell_complete=lambda *args: [
        level for level in _EFFORTS if level.startswith(args[2])
    ],
    help="How long the model thinks: none, minimal, low, medium, high, or another level"
    " of the provider's.",
)
@click.option(
    "--tool",
    "tools",
    multiple=True,
    type=click.Choice(["web_search", "image_generation"]),
    help="Let the provider search the web, and list its sources; or draw, and save"
    " the pictures as image-1.png and so on in the working directory.",
)
@click.option(
    "--schema",
    metavar="FILE",
    type=click.Path(),
    help="Print JSON that follows the JSON schema in this file.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the whole result as JSON: text, tokens, cost in USD, request id.",
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Print the answer as it arrives. Default: on a terminal, and in a"
    " conversation.",
)
@click.option(
    "--show-reasoning",
    is_flag=True,
    help="Print the model's thinking on stderr, if the provider shows it.",
)
@click.option(
    "--usage",
    is_flag=True,
    help="Print tokens, cost and seconds on stderr. Always on in a conversation.",
)
def chat(model: str | None, prompt: str | None, **given: Any) -> Exit:
    """Answer one question, or hold a conversation."""
    options = SimpleNamespace(**given)
    _check_exclusive(options, prompt)

    from dipeo_llm.cli.conversation import (
        Conversation,
        check_page,
        read_conversation,
    )
    from dipeo_llm.domain import Person, PersonLLMConfig

    path = Path(options.conversation) if options.conversation else None
    if options.html:
        check_page(options.html, path)
    person = read_conversation(path) if path else None
    saved = person.llm_config if person else None
    default = saved.model if saved else os.environ.get("DIPEO_LLM_MODEL")
    if default and model is not None and prompt is None and not is_model(model):
        model, prompt = None, model
    model = default if model is None else model
    if model is None:
        raise UsageError("the model is missing: give MODEL, or set DIPEO_LLM_MODEL")
    question = prompt if options.interactive else inputs.read_prompt(prompt)
    options.schema = inputs.read_schema(options.schema) if options.schema else None
    options.media = inputs.find_media(options.images, options.files)

    if saved is None:
        saved = PersonLLMConfig(model=model)
    elif model != saved.model:  # it may be another provider's
        saved = saved.model_copy(update={"service": None, "api_key_id": None})
    is_new_prompt = options.system_prompt is not None or options.prompt_file
    system_prompt = inputs.read_system_prompt(options if is_new_prompt else saved)
    config = saved.model_copy(
        update={
            "service": options.service or saved.service,
            "model": model,
            "api_key_id": options.key_id or saved.api_key_id,
            "system_prompt": system_prompt,
            "prompt_file": None,
        }
    )
    conversation = Conversation(
        options, person or Person("assistant", "Assistant"), config, path
    )
    if options.interactive:
        return conversation.hold(question)
    return conversation.answer(question or "")


def _check_exclusive(options: SimpleNamespace, prompt: str | None) -> None:
    """Refuse options that contradict each other."""
    if options.interactive and prompt == "-":
        raise UsageError('--interactive reads stdin itself: PROMPT cannot be "-"')
    whole = "--schema" if options.schema else "--json" if options.as_json else None
    for option in ("interactive", "stream"):
        if whole and getattr(options, option):
            raise UsageError(f"--{option} and {whole} exclude each other")
