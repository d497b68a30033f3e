"""The command `dipeo-llm`: its parts, and how it starts and ends.

What takes long to import is imported by the part that needs it: --help is instant.
"""

import os
import sys
from collections.abc import Sequence

import click
from click.shell_completion import get_completion_class, shell_complete

from dipeo_llm.cli import terminal
from dipeo_llm.cli.batch import batch
from dipeo_llm.cli.cassettes import cassettes
from dipeo_llm.cli.chat import chat
from dipeo_llm.cli.doctor import doctor
from dipeo_llm.cli.models import models, provider
from dipeo_llm.cli.options import Command, Exit, Group, report
from dipeo_llm.cli.routes import routes

_PROGRAM = "dipeo-llm"
_COMPLETE = "_DIPEO_LLM_COMPLETE"
"""The variable by which the shell's function asks this program for completions."""

_EPILOG = """\
Examples:
  dipeo-llm doctor
  dipeo-llm chat gpt-4.1-nano "Name three rivers."
  cat letter.txt | dipeo-llm chat claude-haiku-4-5 "Summarise this:"
  dipeo-llm chat llama3.2:1b --interactive
  dipeo-llm batch questions.jsonl answers.jsonl --model gpt-4.1-nano
  dipeo-llm models anthropic
  dipeo-llm provider gemini-2.5-flash
  dipeo-llm routes routes.yaml
  dipeo-llm cassettes check tests/cassettes
  dipeo-llm completion bash

Environment:
  OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY or GOOGLE_API_KEY
                             the key of each provider; Ollama needs none
  DIPEO_LLM_MODEL            the model of `chat`, unless one is named
  DIPEO_LLM_TIMEOUT          seconds for one attempt (default 300)
  DIPEO_LLM_MAX_RETRIES      attempts after the first (default 3)
  DIPEO_LLM_OPENAI_BASE_URL, DIPEO_LLM_ANTHROPIC_BASE_URL,
  DIPEO_LLM_GOOGLE_BASE_URL, DIPEO_LLM_OLLAMA_BASE_URL (or OLLAMA_HOST)
                             where a provider is reached, if not at its own address
  DIPEO_LLM_CACHE_URL        where answers are cached: memory://, redis://host:6379/0
  DIPEO_LLM_ROUTES           YAML or JSON file of routes, whose names stand for models
  DIPEO_LLM_STATE_URL        where routes share limits and cool-downs: redis://...
  HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, NO_COLOR
                             as for other programs

Exit codes:
  0    it worked
  1    the call failed, or the model or its provider is unknown
  2    a wrong argument, file or setting
  3    a key is missing, or the provider refuses it
  130  interrupted (Ctrl-C)
  141  the reader of the output closed it
"""

_COMPLETION_EPILOG = """\
Examples:
  bash, in ~/.bashrc:  eval "$(dipeo-llm completion bash)"
  zsh, in ~/.zshrc:    eval "$(dipeo-llm completion zsh)"
  fish:                dipeo-llm completion fish > \\
                         ~/.config/fish/completions/dipeo-llm.fish
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. No exception leaves it.

    Args:
        argv: The arguments; None takes the process's own.

    Ctrl-C closes the connection of the call in flight.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    caller = "process" if argv is None else "program"
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed")
        if instruction := os.environ.get(_COMPLETE):
            return shell_complete(dipeo_llm, {}, _PROGRAM, _COMPLETE, instruction)
        with (
            terminal.log_to_stderr(),
            dipeo_llm.make_context(_PROGRAM, arguments, obj=caller) as context,
        ):
            return Exit(dipeo_llm.invoke(context))
    except click.exceptions.Exit:  # after --help or --version
        return Exit.OK
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        terminal.discard_stdout()
        return Exit.BROKEN_PIPE
    except Exception as exc:  # noqa: BLE001 - a traceback does not help a shell
        return report(exc)
    finally:
        terminal.leave()


def _print_version(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        terminal.write(
            f"{_PROGRAM} {version('dipeo-llm')} (LiteLLM {version('litellm')})\n"
        )
        context.exit()


@click.group(
    cls=Group,
    epilog=_EPILOG,
    no_args_is_help=False,
    context_settings={"max_content_width": 88},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def dipeo_llm() -> None:
    """Talk to OpenAI, Anthropic, Google Gemini and Ollama models."""


@click.command(cls=Command, epilog=_COMPLETION_EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> Exit:
    """Print the script with which SHELL completes this command."""
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has all three
    terminal.write(kind(dipeo_llm, {}, _PROGRAM, _COMPLETE).source())
    return Exit.OK


for _part in (chat, batch, models, provider, routes, doctor, cassettes, completion):
    dipeo_llm.add_command(_part)
