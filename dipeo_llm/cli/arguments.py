"""The arguments of the command `dipeo-llm`: what may be typed, and what help tells of it.

Knows names, types and texts. What a command does is not known here: its function is
given to `build_parser`.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from dipeo_llm.adapters import factory as providers
from dipeo_llm.cli import terminal
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.settings import http_url

_T = TypeVar("_T")

Command = Callable[[argparse.Namespace], int]
"""Takes the parsed arguments and returns the exit code."""


class UsageError(Exception):
    """What was asked for makes no sense."""


_EPILOG = """\
examples:
  dipeo-llm chat gpt-4.1-nano "Name three rivers."
  dipeo-llm chat claude-haiku-4-5 - < letter.txt --system "Answer in one sentence."
  dipeo-llm chat claude-haiku-4-5 --interactive
  dipeo-llm chat llama3.2:1b "Say hello." --base-url http://192.168.1.5:11434
  dipeo-llm chat my-model "Hi" --service openai --base-url http://127.0.0.1:8000/v1
  dipeo-llm models anthropic
  dipeo-llm provider gemini-2.5-flash
  dipeo-llm cassettes check tests/cassettes

environment:
  OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY or GOOGLE_API_KEY
                             the key of each provider; Ollama needs none
  DIPEO_LLM_TIMEOUT          seconds for one attempt (default 300)
  DIPEO_LLM_MAX_RETRIES      attempts after the first (default 3)
  DIPEO_LLM_OPENAI_BASE_URL, DIPEO_LLM_ANTHROPIC_BASE_URL,
  DIPEO_LLM_GOOGLE_BASE_URL, DIPEO_LLM_OLLAMA_BASE_URL (or OLLAMA_HOST)
                             where a provider lives, if not at its own address
  HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE
                             as for other programs

exit codes:
  0    it worked
  1    the call failed, or the model or its provider is unknown
  2    a wrong argument, file or setting
  3    a key is missing, or the provider refuses it
  130  interrupted (Ctrl-C)
  141  whoever read the output closed it
"""

_CHAT = """\
Ask a model one question and print its answer, or talk with it (--interactive). The
model's name tells the provider; where it does not, --service or a prefix
(openai/my-model) does.
"""

_CHAT_EPILOG = """\
examples:
  dipeo-llm chat gpt-4.1-nano "Name three rivers."
  git diff | dipeo-llm chat claude-haiku-4-5 - --system "Write a commit message."
  dipeo-llm chat gemini-2.5-flash "Hello" --prompt-file prompts/optimist.md
  dipeo-llm chat gpt-4.1-nano "Name a colour." --max-tokens 20 --json
  dipeo-llm chat gpt-4.1-nano "What is this?" --image photo.jpg --image plan.png
  dipeo-llm chat gemini-2.5-flash "Name two rivers." --schema rivers.schema.json
  dipeo-llm chat claude-haiku-4-5 "Who won yesterday?" --tool web_search
  dipeo-llm chat gpt-5 "Draw a river." --tool image_generation
  dipeo-llm chat llama3.2:1b --interactive --system "Answer like a pirate."

A schema file holds a JSON schema, such as
  {"type": "object", "properties": {"names": {"type": "array"}}, "required": ["names"]}

In a conversation each line is a question; /quit or Ctrl-D ends it. A question that
fails is not remembered. An answer that breaks off is printed as far as it came, and the
exit code is 1.

On a terminal, control characters in an answer are shown as escapes (\\x1b).
Variables and exit codes: dipeo-llm --help
"""

_MODELS = """\
Print the models that a provider offers to your key, one on a line, in the form that
`chat` takes. Without SERVICE: of every provider whose key is in the environment, and of
Ollama if OLLAMA_HOST or DIPEO_LLM_OLLAMA_BASE_URL is set.
"""

_PROVIDER = """\
Print the provider that a model name belongs to; exit with 1 if that is unknown.
Most names are answered at once; for the others LiteLLM is asked, which takes seconds.
"""

_CHECK = "look for keys and other secrets; exits with 1 if there are some"
_LIST = "show what was recorded when, from where and with which model"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        # argparse keeps silent about an output that is closed or full.
        terminal.write(self.format_help())


class _Version(argparse.Action):
    """Looks the versions up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        terminal.write(
            f"dipeo-llm {version('dipeo-llm')} (LiteLLM {version('litellm')})\n"
        )
        parser.exit()


def build_parser(
    chat: Command, models: Command, provider: Command, check: Command, list_: Command
) -> argparse.ArgumentParser:
    """Make the parser. The command that is asked for becomes `command` of its result.

    What it cannot parse raises UsageError; after --help and --version it exits.
    """
    parser = _Parser(
        prog="dipeo-llm",
        description="Talk to OpenAI, Anthropic, Google Gemini and Ollama models.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the version and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_chat(commands, chat)
    _add_models(commands, models)
    _add_provider(commands, provider)
    _add_cassettes(commands, check, list_)
    return parser


def _add_chat(commands: Any, command: Command) -> None:
    parser = commands.add_parser(
        "chat", help="ask a model", description=_CHAT, epilog=_CHAT_EPILOG
    )
    parser.set_defaults(command=command)
    parser.add_argument("model", metavar="MODEL", help="such as gpt-4.1-nano")
    prompt = parser.add_argument(
        "prompt",
        metavar="PROMPT",
        type=_text,
        help="the question; - reads it from stdin; with --interactive it may be left"
        " out",
    )
    # nargs="?" would make argparse overlook a prompt that stands after an option.
    prompt.required = False
    parser.add_argument(
        "--system",
        dest="system_prompt",
        metavar="TEXT",
        type=_text,
        help="the system prompt",
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read the system prompt from a file in or below the working directory;"
        " --system stands in if it cannot be used",
    )
    parser.add_argument(
        "--service",
        type=_service,
        help="the provider (openai, anthropic, google, ollama, ...), where the model's"
        " name does not tell it",
    )
    parser.add_argument(
        "--temperature",
        metavar="NUMBER",
        type=_temperature,
        help="sampling temperature, 0 or above, often up to 2; left out for a model"
        " that takes none",
    )
    parser.add_argument(
        "--max-tokens",
        metavar="TOKENS",
        type=_count,
        help="longest answer, in tokens (a token is about four letters of English)",
    )
    parser.add_argument(
        "--image",
        dest="images",
        metavar="PATH_OR_URL",
        action="append",
        default=[],
        type=_text,
        help="a picture (or PDF, or sound) to look at, in or below the working"
        " directory, or a picture's URL; may be given several times",
    )
    parser.add_argument(
        "--tool",
        dest="tools",
        action="append",
        default=[],
        choices=["web_search", "image_generation"],
        help="let the provider search, and list its sources; or let it draw, and save"
        " the pictures as image-1.png and so on in the working directory",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="hold a conversation on stdin, until /quit or Ctrl-D",
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer as it comes (default: on a terminal, and with"
        " --interactive)",
    )
    parser.add_argument(
        "--show-reasoning",
        action="store_true",
        help="print on stderr what the model thinks, where its provider shows it",
    )
    _add_connection(parser)
    parser.add_argument(
        "--schema",
        metavar="FILE",
        help="print JSON that follows the JSON schema in this file",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the whole result as JSON: text, tokens, cost in USD, request id",
    )


def _add_models(commands: Any, command: Command) -> None:
    parser = commands.add_parser(
        "models", help="list what a provider offers", description=_MODELS
    )
    parser.set_defaults(command=command)
    parser.add_argument(
        "service",
        metavar="SERVICE",
        nargs="?",
        type=_service,
        help="openai, anthropic, google or ollama",
    )
    _add_connection(parser)
    parser.add_argument(
        "--json", action="store_true", help="print {service: [model, ...]} as JSON"
    )


def _add_provider(commands: Any, command: Command) -> None:
    parser = commands.add_parser(
        "provider", help="tell whose a model is", description=_PROVIDER
    )
    parser.set_defaults(command=command)
    parser.add_argument("model", metavar="NAME", help="such as gemini-2.5-flash")


def _add_cassettes(commands: Any, check: Command, list_: Command) -> None:
    parser = commands.add_parser("cassettes", help="look after recorded exchanges")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, command, text in (("check", check, _CHECK), ("list", list_, _LIST)):
        description = f"{text[0].upper()}{text[1:]}."
        action = actions.add_parser(name, help=text, description=description)
        action.set_defaults(command=command)
        action.add_argument(
            "folder",
            nargs="?",
            default="cassettes",
            metavar="DIR",
            help="the folder, or one file (default: cassettes)",
        )


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key-id",
        metavar="NAME",
        type=_named_key,
        help="where the key is: a variable such as GEMINI_API_KEY (default: the"
        " provider's own)",
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        type=_url,
        help="where the provider lives; your key is sent there",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        help="for one attempt (default: DIPEO_LLM_TIMEOUT, else 300)",
    )


def _type(
    convert: Callable[[str], _T],
    wrong: str = "{1}",
    holds: Callable[[_T], bool] = lambda _: True,
) -> Callable[[str], _T]:
    """Make an argument's type, which has argparse say what is wrong with an argument.

    Args:
        convert: Reads the argument, or raises.
        wrong: What is said: {0} is the argument, {1} what was raised.
        holds: Whether what was read makes sense.
    """

    def typed(argument: str) -> _T:
        try:
            value = convert(argument)
            if not holds(value):
                raise ValueError
        except (ValueError, InvalidRequestError) as exc:
            raise argparse.ArgumentTypeError(wrong.format(argument, exc)) from None
        return value

    return typed


_text = _type(lambda text: text.encode().decode(), "it is not text in UTF-8")
_service = _type(lambda name: providers.by_name(name).name)
_url = _type(http_url)
_named_key = _type(
    str,
    # Not repeated here: it may be the key itself.
    "it must be the name of a provider or of the variable that holds its key;"
    " a key itself does not belong on a command line",
    lambda name: providers.of_key(name) is not None,
)
_temperature = _type(float, "{0!r} is not a number from 0", lambda n: 0 <= n < math.inf)
_seconds = _type(
    float, "{0!r} is not a number of seconds above 0", lambda n: 0 < n < math.inf
)
_count = _type(
    lambda text: int(text) if text.isdecimal() else 0,
    "{0!r} is not a whole number above 0",
    lambda n: n > 0,
)
