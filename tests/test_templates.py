"""Prompt templates: what they can say, what they cannot reach, and how they fail."""

import datetime as dt
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import Environment
from pydantic import BaseModel, SecretStr, computed_field

from dipeo_llm.domain import Message, Person, PersonLLMConfig
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings
from dipeo_llm.system_prompt_handler import SystemPromptHandler
from dipeo_llm.templates import RenderedPrompt
from tests.conftest import MODELS, each_provider
from tests.provider_server import ProviderServer

SECRET = "top-secret-7b1f"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Make a base directory, and secrets in it and beside it."""
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    for secret in (tmp_path / "secret.j2", base / ".env", base / "notes.txt"):
        secret.write_text(SECRET)
    return base


@pytest.fixture
def write(base: Path) -> Callable[[str, str], int]:
    """Write a file below the base directory."""
    return lambda name, text: (base / name).write_text(text, "utf-8")


def config(
    prompt_file: Any = None, system_prompt: str | None = None, **variables: Any
) -> Any:
    """Make what an application's own configuration looks like."""
    return SimpleNamespace(
        prompt_file=prompt_file,
        system_prompt=system_prompt,
        prompt_variables=variables or None,
    )


def render(text: str, base: Path | str = "/nowhere", **variables: Any) -> str | None:
    """Render an inline template."""
    handler = SystemPromptHandler(base)
    return handler.get_system_prompt(config(None, text), variables)


# --- what is a template


def test_a_j2_file_is_a_template_without_variables(base: Path, write: Any) -> None:
    """Its name is enough."""
    write("p.j2", "{{ 6 * 7 }}")

    assert SystemPromptHandler(base).get_system_prompt(config("p.j2")) == "42"


@pytest.mark.parametrize("source", ["file", "inline"])
@pytest.mark.parametrize(
    ("of_config", "of_call", "expected"),
    [
        (None, None, "Hi {{ name }}"),
        ({"name": "Ada"}, None, "Hi Ada"),
        (None, {"name": "Ada"}, "Hi Ada"),
        ({"name": "Bob"}, {"name": "Ada"}, "Hi Ada"),
        ({"name": "Ada"}, {}, "Hi Ada"),
    ],
)
def test_variables_make_a_template_and_the_calls_win(
    base: Path, write: Any, source: str, of_config: Any, of_call: Any, expected: str
) -> None:
    """Without any, braces are text as they always were."""
    write("p.md", "Hi {{ name }}")
    asked = config(*(["p.md"] if source == "file" else [None, "Hi {{ name }}"]))
    asked.prompt_variables = of_config

    assert SystemPromptHandler(base).get_system_prompt(asked, of_call) == expected


@pytest.mark.parametrize("path", ["a.J2", "link.md", "a.J2/"])
def test_a_template_is_never_taken_for_a_text(
    base: Path, write: Any, path: str
) -> None:
    """Whatever way its name is written, and through a link."""
    write("a.J2", "{{ 1 + 1 }}")
    (base / "link.md").symlink_to("a.J2")

    assert SystemPromptHandler(base).get_system_prompt(config(path)) == "2"


def test_no_variables_at_all_differ_from_an_empty_mapping() -> None:
    """An empty mapping asks for a template."""
    handler = SystemPromptHandler()

    assert handler.get_system_prompt(config(None, "{{ 1 }}"), {}) == "1"
    assert handler.get_system_prompt(config(None, "{{ 1 }}")) == "{{ 1 }}"


def test_a_missing_file_lets_the_inline_template_stand_in(base: Path) -> None:
    """As for a file that is not a template; a template all the same."""
    handler = SystemPromptHandler(base)

    assert handler.get_system_prompt(config("no.j2", "Hi {{ n }}", n="Ada")) == "Hi Ada"
    assert handler.get_system_prompt(config("no.j2", "Hi {{ n }}")) == "Hi {{ n }}"


def test_a_template_file_names_itself(base: Path, write: Any) -> None:
    """Telemetry has its name and its version; another text is another version."""
    handler = SystemPromptHandler(base)
    write("sub/p.j2", "{{ n }}")
    first = handler.get_system_prompt(config("sub/p.j2", n=1))
    other = handler.get_system_prompt(config("sub/p.j2", n=2))
    write("sub/p.j2", "{{ n }}!")
    changed = handler.get_system_prompt(config("sub/p.j2", n=1))

    assert isinstance(first, RenderedPrompt)
    assert isinstance(other, RenderedPrompt)
    assert isinstance(changed, RenderedPrompt)
    assert first.template == "sub/p.j2"
    assert first.version == other.version == "90436f968066"
    assert changed.version != first.version
    assert (first, other, changed) == ("1", "2", "1!")


# --- values


ATTACKS = [
    "{{ 7 * 7 }}",
    "{% include '../secret.j2' %}",
    "{% endraw %}{{ 7 * 7 }}",
    "#}{{ 7 * 7 }}{#",
    '<b>O\'Hara & "Söhne"</b>',
]


@pytest.mark.parametrize("text", ATTACKS)
def test_a_value_is_never_compiled_or_escaped(text: str) -> None:
    """What a user says arrives letter by letter, wherever the template puts it."""
    template = "{{ t }}|{% set u = t %}{{ u }}|{% for x in [t] %}{{ x }}{% endfor %}"

    assert render(template, t=text) == "|".join([text] * 3)


class _Colour(Enum):
    RED = "red"


class _Model(BaseModel):
    name: str
    key: SecretStr


def test_values_are_plain_data() -> None:
    """Objects arrive as their JSON, without their methods; a secret stays masked."""
    model = _Model(name="Ada", key=SecretStr(SECRET))

    prompt = render(
        "{{ m.name }} {{ m.key }} {{ c }} {{ d }} {{ s }} {{ m.model_dump is defined }}",
        m=model,
        c=_Colour.RED,
        d=dt.date(2026, 11, 25),
        s=(1, 2),
    )

    assert prompt == "Ada ********** red 2026-11-25 [1, 2] False"


class _Broken(BaseModel):
    @computed_field  # type: ignore[prop-decorator]
    @property
    def name(self) -> str:
        raise KeyError("lost")


def _deep() -> list[Any]:
    made: list[Any] = []
    for _ in range(10_000):
        made = [made]
    return made


VALUES = [object(), print, [].append, sys, {"a": [Environment()]}, b"\xff"]
VALUES += [_Broken(), _deep()]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_value_that_is_not_data_is_refused(value: Any) -> None:
    """It is named."""
    with pytest.raises(InvalidRequestError, match="prompt variable 'thing'"):
        render("Hi", thing=value)


@pytest.mark.parametrize("given", [["a"], "name", 5])
def test_variables_are_a_mapping(given: Any) -> None:
    """Anything else is refused with an example."""
    for of_config, of_call in ((given, None), (None, given)):
        asked = SimpleNamespace(system_prompt="Hi", prompt_variables=of_config)
        with pytest.raises(InvalidRequestError, match=r"\{'name': 'Ada'\}"):
            SystemPromptHandler().get_system_prompt(asked, of_call)


def test_a_variables_name_is_text() -> None:
    """A number could never be reached from a template."""
    with pytest.raises(InvalidRequestError, match="prompt variable 1"):
        SystemPromptHandler().get_system_prompt(config(None, "Hi"), {1: 2})  # type: ignore[dict-item]


# --- what a template says


@pytest.mark.parametrize(
    "text",
    [
        "{{ people|map(attribute='nom')|list }}",
        "{{ people|groupby('nom')|list }}",
        "{{ {'a': people[0].nom} }}",
        "{{ people|map(attribute='nom')|join(', ') }}",
        "{{ [people[0].nom]|tojson }}",
    ],
)
def test_a_field_that_is_missing_is_an_error_inside_a_list_too(text: str) -> None:
    """Nor does "Undefined" reach the model."""
    with pytest.raises(InvalidRequestError, match=r"'nom'|Undefined is not JSON"):
        render(text, people=[{"name": "Ada"}])


def test_json_is_for_a_model_and_not_for_a_page() -> None:
    """No letter is replaced by an escape of HTML's or of ASCII's."""
    value = {"q": "it's <ä> & co"}

    assert render("{{ v | tojson }}", v=value) == json.dumps(value, ensure_ascii=False)
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    with pytest.raises(InvalidRequestError, match="'nothing' is undefined"):
        render("{{ nothing | tojson }}")


def test_lines_of_tags_leave_no_trace(base: Path, write: Any) -> None:
    """A line that holds a tag and nothing else disappears; the last newline stays."""
    text = "A\n  {% if yes %}\nB\n  {% endif %}\n{# c #}\nC\n"
    write("p.j2", text)
    write("plain.j2", "no tag\nat all\n")
    handler = SystemPromptHandler(base)

    assert handler.get_system_prompt(config("p.j2", yes=1)) == "A\nB\nC\n"
    assert handler.get_system_prompt(config("plain.j2")) == "no tag\nat all\n"


def test_line_ends_are_those_of_a_text(base: Path, write: Any) -> None:
    """A template of Windows, with a byte order mark, is as any other; a value stays."""
    (base / "p.j2").write_bytes(
        "\ufeffHi {{ x }}\r\n{% if 1 %}\r\nBye\r\n{% endif %}".encode()
    )

    prompt = SystemPromptHandler(base).get_system_prompt(config("p.j2", x="a\r\nb"))

    assert prompt == "Hi a\r\nb\nBye\n"


def test_templates_are_made_of_others(base: Path, write: Any) -> None:
    """Include, extend and import find files from the base directory on.

    With `./` they find a file beside the one that names it, an included one too.
    """
    write("sub/frame.j2", "<{% block x %}{% endblock %}>")
    write("sub/macros.j2", "{% macro twice(t) %}{{ t }}{{ t }}{% endmacro %}")
    write("sub/part.j2", "{% include './leaf.j2' %}")
    write("sub/leaf.j2", "{{ n }}")
    write(
        "p.j2",
        "{% extends 'sub/frame.j2' %}{% import 'sub/macros.j2' as m %}"
        "{% block x %}{{ m.twice(n) }}{% include './sub/part.j2' %}{% endblock %}",
    )
    handler = SystemPromptHandler(base)

    assert handler.get_system_prompt(config("p.j2", n="a")) == "<aaa>"
    inline = "{% include ['no.j2', './sub/part.j2'] %}"
    assert handler.get_system_prompt(config(None, inline, n="b")) == "b"
    optional = "{% include 'no.j2' ignore missing %}!"
    assert handler.get_system_prompt(config(None, optional), {}) == "!"


# --- how it fails


FAILURES = [
    ("{{ mood }}", r"'mood' is undefined; the variables are: a, name", 1),
    ("\n\n{{ name.first }}", r"has no attribute 'first'", 3),
    ("{% if mood %}{% endif %}", r"'mood' is undefined", 1),
    ("{% for x in mood %}{% endfor %}", r"'mood' is undefined", 1),
    ("{{ mood ~ 'x' }}", r"'mood' is undefined", 1),
    ("\n{% if %}", r"Expected an expression", 2),
    ("\n{{ name | no_such }}", r"No filter named 'no_such'", 2),
    ("\n{{ 1 / 0 }}", r"ZeroDivisionError: division by zero", 2),
    ("\n{{ name + 1 }}", r"TypeError: ", 2),
    ("\n{% include 'no.j2' %}", r"there is no template 'no\.j2'", 2),
    ("\n{% do 1 %}", r"unknown tag 'do'", 2),
    ("\n{{ range(10 ** 9) }}", r"OverflowError: ", 2),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", r"(Recursion|Memory)Error", None),
]


@pytest.mark.parametrize(("text", "reason", "line"), FAILURES)
@pytest.mark.parametrize("source", ["file", "inline"])
def test_a_template_that_fails_is_never_sent_raw(
    base: Path, write: Any, text: str, reason: str, line: int | None, source: str
) -> None:
    """The call fails, on_missing or not; file, line and variable are named."""
    write("sub/p.j2", text)
    inline = source == "inline"
    asked = config(None if inline else "sub/p.j2", text if inline else "raw", a=1)
    asked.prompt_variables["name"] = "Ada"

    with pytest.raises(InvalidRequestError, match=reason) as caught:
        SystemPromptHandler(base, on_missing="fallback").get_system_prompt(asked)

    name = "system_prompt" if inline else "sub/p.j2"
    message = str(caught.value)
    assert message.startswith(f"prompt template '{name}'")
    assert message.isprintable()
    assert line is None or f"{name}', line {line}: " in message


@pytest.mark.parametrize(
    "inner", ["{{ mood }}", "{% if %}", "{{ 1 / 0 }}", "{{ name | no_such }}"]
)
def test_the_file_that_fails_is_the_one_that_is_named(
    base: Path, write: Any, inner: str
) -> None:
    """It may be included, extended or imported by another."""
    write("sub/bad.j2", f"first line\n{inner}")
    for tag in ("include 'sub/bad.j2'", "extends 'sub/bad.j2'"):
        write("p.j2", f"{{% {tag} %}}")
        with pytest.raises(InvalidRequestError, match=r"'sub/bad\.j2', line 2: "):
            SystemPromptHandler(base).get_system_prompt(config("p.j2", name=1))


def test_a_template_of_itself_ends(base: Path, write: Any) -> None:
    """An include without end is an error, not a crash."""
    write("p.j2", "x{% include 'p.j2' %}")

    with pytest.raises(InvalidRequestError, match=r"'p\.j2', line 1: .*recursion"):
        SystemPromptHandler(base).get_system_prompt(config("p.j2"))


@pytest.mark.parametrize(("length", "fits"), [(100, True), (101, False)])
def test_the_output_is_bounded(base: Path, length: int, *, fits: bool) -> None:
    """One character too many is an error, not a cut."""
    handler = SystemPromptHandler(base, max_bytes=100)
    asked = config(None, "{% for i in range(n) %}x{% endfor %}", n=length)

    if fits:
        assert handler.get_system_prompt(asked) == "x" * length
    else:
        with pytest.raises(InvalidRequestError, match="exceeds 100 characters"):
            handler.get_system_prompt(asked)


def test_a_template_without_end_is_left_at_the_limit() -> None:
    """The rest of 10,000,000,000 lines is never made."""
    loop = "{% for i in range(100000) %}"
    text = f"{loop}{loop}{'x' * 100}{'{% endfor %}' * 2}"

    with pytest.raises(InvalidRequestError, match="exceeds 1048576 characters"):
        render(text)


# --- what a hostile template cannot do


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('__cla' ~ 'ss__') }}",
    "{{ ''['__cl' ~ 'ass__'].__mro__[1].__subclasses__() }}",
    "{{ ['']|map(attribute='__class__')|list|first }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ dict.__base__ }}",
    "{{ '{0.__class__}'.format(name) }}",
    "{{ '{x.__class__}'.format_map({'x': name}) }}",
    "{{ ('{0.__class__}' | attr('format'))(name) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(name) }}",
    "{{ ['{0.__class__}']|map('attr', 'format')|list }}{{ (''|attr('__doc__')) }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{{ caller.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ namespace().__init__ }}",
    "{{ name.__init_subclass__ }}",
    "{{ items.append(1) }}",
    "{{ items.clear() }}",
    "{{ table.update({'a': 1}) }}",
    "{{ name.mro() }}",
    "{% include '/etc/passwd' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ config }}",
    "{{ request }}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_the_sandbox_holds(text: str) -> None:
    """Neither an attribute of Python's nor a change of a value is to be had."""
    values: dict[str, Any] = {"name": "Ada", "items": [1], "table": {}}

    with pytest.raises(InvalidRequestError) as caught:
        render(text, **values)

    assert "<class" not in str(caught.value)
    assert values == {"name": "Ada", "items": [1], "table": {}}


REFUSED = [
    "../secret.j2",
    "sub/../../secret.j2",
    "{parent}/secret.j2",
    "{parent}/base/inside.j2",
    "~/inside.j2",
    "./../secret.j2",
    "file-link.j2",
    "dir-link/secret.j2",
    ".env",
    "notes.txt",
    "sub",
    "sub.j2",
    "pipe.j2",
    "bytes.j2",
    "large.j2",
    "null\0.j2",
]
WAYS = ["include {0!r}", "include {0!r} ignore missing", "extends {0!r}"]
WAYS += ["import {0!r} as m", "from {0!r} import m", "include [{0!r}, 'inside.j2']"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", REFUSED)
def test_no_file_is_read_but_templates_below_the_base(
    base: Path, write: Any, monkeypatch: pytest.MonkeyPatch, path: str, way: str
) -> None:
    """Not by any tag, nor quietly by `ignore missing` or the next of a list."""
    monkeypatch.setenv("HOME", str(base))
    (base / "file-link.j2").symlink_to("../secret.j2")
    (base / "dir-link").symlink_to(base.parent)
    (base / "sub.j2").mkdir()
    os.mkfifo(base / "pipe.j2")
    (base / "bytes.j2").write_bytes(b"\xff")
    write("large.j2", "x" * 1001)
    write("inside.j2", "inside")
    handler = SystemPromptHandler(base, max_bytes=1000, allow_outside_base_dir=True)
    text = "{% " + way.format(path.format(parent=base.parent)) + " %}"

    with pytest.raises(InvalidRequestError, match="is refused") as caught:
        handler.get_system_prompt(config(None, text), {})

    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("path", ["../secret.j2", "{parent}/secret.j2", "link.j2"])
def test_a_prompt_file_outside_the_base_is_refused(base: Path, path: str) -> None:
    """For a template this is an error, never a warning; the application may allow it."""
    (base / "link.j2").symlink_to("../secret.j2")
    asked = config(path.format(parent=base.parent), "raw")

    with pytest.raises(InvalidRequestError, match="outside the base directory"):
        SystemPromptHandler(base).get_system_prompt(asked)
    handler = SystemPromptHandler(base, allow_outside_base_dir=True)
    assert handler.get_system_prompt(asked) == SECRET


def test_a_template_that_becomes_a_link_outwards_is_no_longer_included(
    base: Path, write: Any
) -> None:
    """The jail is checked at every call, whatever was compiled before."""
    write("part.j2", "inside")
    handler = SystemPromptHandler(base)
    asked = config(None, "{% include 'part.j2' %}", n=1)
    assert handler.get_system_prompt(asked) == "inside"

    (base / "part.j2").unlink()
    (base / "part.j2").symlink_to("../secret.j2")

    with pytest.raises(InvalidRequestError, match="outside the base directory"):
        handler.get_system_prompt(asked)


# --- compiling once


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the name of each template that is compiled."""
    names: list[Any] = []
    compile_ = Environment.compile

    def watch(self: Any, source: Any, name: Any = None, *rest: Any, **more: Any) -> Any:
        names.append(name)
        return compile_(self, source, name, *rest, **more)

    monkeypatch.setattr(Environment, "compile", watch)
    return names


def test_a_version_of_a_file_is_compiled_once(
    base: Path, write: Any, compiled: list[Any]
) -> None:
    """So is an included file, and an inline text; a change is seen at the next call."""
    write("p.j2", "{{ n }}{% include 'part.j2' %}")
    write("part.j2", "-")
    handler = SystemPromptHandler(base)
    inline = config(None, "{{ n }}", n=1)

    for number in range(3):
        asked = config("p.j2", n=number)
        assert handler.get_system_prompt(asked) == f"{number}-"
        assert handler.get_system_prompt(inline) == "1"
    assert compiled == ["p.j2", "part.j2", "system_prompt"]

    write("part.j2", "--")
    assert handler.get_system_prompt(config("p.j2", n=4)) == "4--"
    write("p.j2", "{{ n }}!{% include 'part.j2' %}")
    assert handler.get_system_prompt(config("p.j2", n=4)) == "4!--"
    assert compiled[3:] == ["part.j2", "p.j2"]


def test_threads_render_their_own_values(base: Path, write: Any) -> None:
    """One handler serves them all."""
    write("p.j2", "{% for i in range(50) %}{{ n }},{% endfor %}")
    handler = SystemPromptHandler(base)
    found: dict[int, set[str | None]] = {}

    def work(number: int) -> None:
        asked = config("p.j2", n=number)
        found[number] = {handler.get_system_prompt(asked) for _ in range(20)}

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {n: {f"{n}," * 50} for n in range(8)}


# --- Jinja itself


def test_without_jinja_the_extra_is_named(base: Path, write: Any) -> None:
    """The call fails; prompts that are not templates work as before."""
    write("p.j2", "{{ 1 }}")
    code = f"""
import sys
sys.modules["jinja2"] = None
from types import SimpleNamespace as Config
from dipeo_llm import InvalidRequestError, SystemPromptHandler
handler = SystemPromptHandler({str(base)!r})
print(handler.get_system_prompt(Config(prompt_file="notes.txt")))
for asked in (Config(prompt_file="p.j2"), Config(system_prompt="x", prompt_variables={{}})):
    try:
        print(handler.get_system_prompt(asked))
    except InvalidRequestError as exc:
        print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    plain, *errors = done.stdout.splitlines()
    assert plain == SECRET
    assert [error.split()[0] for error in errors] == ["'p.j2'", "'system_prompt'"]
    assert all("pip install 'dipeo-llm[templates]'" in error for error in errors)


def test_a_jinja_with_holes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM allows older ones, whose sandbox can be left."""
    version = metadata.version
    monkeypatch.setattr(
        "dipeo_llm.templates.version",
        lambda name: "3.1.5" if name == "jinja2" else version(name),
    )

    with pytest.raises(InvalidRequestError, match=r"3\.1\.6 or newer.*3\.1\.5"):
        render("Hi")


# --- through the service


SAID = [Message(from_person_id="host", to_person_id="ada", content="{{ 7 * 7 }}")]


@pytest.fixture
async def prompted(base: Path, keys: StaticAPIKeys) -> Any:
    """Open a service whose prompt files lie in the base directory."""
    async with LLMInfraService(keys, settings=Settings(base_dir=base)) as service:
        yield service


def person(**fields: Any) -> PersonLLMConfig:
    """Make a configuration for OpenAI."""
    return PersonLLMConfig(model="gpt-4.1-nano", api_key_id="openai", **fields)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_rendered_prompt_is_sent_and_user_text_is_not_rendered(
    prompted: LLMInfraService, server: ProviderServer, write: Any, *, streamed: bool
) -> None:
    """The call's variables win over the person's."""
    write("p.j2", "You are {{ mood }} {{ role }}.")
    ada = person(prompt_file="p.j2", prompt_variables={"mood": "?", "role": "Ada"})
    more: dict[str, Any] = {"variables": {"mood": "cheerful"}, "temperature": 0}

    if streamed:
        async with prompted.stream_with_person(SAID, "ada", ada, **more) as stream:
            await stream.result()
    else:
        await prompted.complete_with_person(SAID, "ada", ada, **more)

    assert server.requests[-1].json["messages"] == [
        {"role": "developer", "content": "You are cheerful Ada."},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ]


@each_provider
async def test_every_provider_gets_the_rendered_prompt(
    prompted: LLMInfraService, server: ProviderServer, write: Any, provider: str
) -> None:
    """In its own place, as text."""
    write("p.j2", "Be {{ mood }}.")
    config = PersonLLMConfig(
        model=MODELS[provider], api_key_id=provider, prompt_file="p.j2"
    )

    await prompted.complete_with_person(
        SAID, "ada", config, variables={"mood": "brief"}
    )

    assert '"Be brief."' in json.dumps(server.requests[-1].json)


async def test_a_person_takes_variables(
    prompted: LLMInfraService, server: ProviderServer
) -> None:
    """`Person.complete` hands them on."""
    ada = Person("ada", llm_config=person(system_prompt="Be {{ mood }}."))

    await ada.complete("Hello?", prompted, variables={"mood": "brief"})

    assert server.requests[-1].json["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize("text", ["{{ mood }}", "{{ ''.__class__ }}", "{% if %}"])
async def test_nothing_is_sent_if_the_template_fails(
    prompted: LLMInfraService, server: ProviderServer, text: str
) -> None:
    """Neither raw nor empty."""
    with pytest.raises(InvalidRequestError, match="system_prompt"):
        await prompted.complete_with_person(
            SAID, "ada", person(system_prompt=text), variables={}
        )

    assert server.requests == []


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"prompt_file": "notes.txt"}, None),
        ({"system_prompt": "Hi", "prompt_variables": {}}, None),
        ({"system_prompt": "Hi"}, {}),
    ],
)
async def test_a_template_does_not_block_the_event_loop(
    base: Path, keys: StaticAPIKeys, fields: dict[str, Any], variables: Any
) -> None:
    """A prompt that may be slow is made in a thread, an inline template too."""
    threads: list[threading.Thread] = []

    class Handler(SystemPromptHandler):
        def get_system_prompt(self, *given: Any) -> str | None:
            threads.append(threading.current_thread())
            return super().get_system_prompt(*given)

    async with LLMInfraService(keys, system_prompt_handler=Handler(base)) as service:
        await service.complete_with_person(
            SAID, "ada", person(**fields), variables=variables
        )

    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_a_call_without_a_person_has_no_variables(
    prompted: LLMInfraService,
) -> None:
    """A conversation in OpenAI's format is never a template."""
    with pytest.raises(TypeError, match="unexpected keyword 'variables'"):
        await prompted.complete(
            [{"role": "user", "content": "Hi"}],
            "gpt-4.1-nano",
            "openai",
            variables={},  # type: ignore[call-overload]
        )


# --- the prompts of this project


LIBRARY = ROOT / "prompts"
GIVEN: dict[str, dict[str, Any]] = {
    "extraction": {"fields": {"name": "the person's full name"}},
    "judge": {"criteria": {"truth": "no claim is wrong"}},
    "moderator": {"topic": "bread", "persons": ["Ada", "Bob"]},
    "review": {"code_language": "Python"},
    "speaker": {"mood": "cheerful", "role": "optimist"},
    "summary": {},
    "translation": {"language": "German"},
}
OPTIONAL: dict[str, dict[str, Any]] = {
    "extraction": {},
    "judge": {"best": 10},
    "moderator": {"rounds": 4},
    "review": {"focus": ["races"], "limit": 3, "language": "German"},
    "speaker": {"place": "the bar", "rules": ["Be brief."]},
    "summary": {"sentences": 1, "audience": "children", "language": "German"},
    "translation": {"tone": "formal", "glossary": {"bread": "Brot"}},
}


def test_every_prompt_of_the_library_is_tried() -> None:
    """A new one needs an example here."""
    named = {p.stem for p in LIBRARY.glob("*.j2") if not p.stem.startswith("_")}

    assert named == GIVEN.keys() == OPTIONAL.keys()


@pytest.mark.parametrize("base_dir", [ROOT, LIBRARY], ids=["project", "folder"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_prompt_of_the_library_says_what_it_is_given(
    name: str, base_dir: Path
) -> None:
    """Its comment names each variable; each value shows, and no tag is left."""
    path = LIBRARY.relative_to(base_dir) / f"{name}.j2"
    handler = SystemPromptHandler(base_dir)
    comment = (LIBRARY / f"{name}.j2").read_text("utf-8").partition("#}")[0]

    least = handler.get_system_prompt(config(path), GIVEN[name])
    most = handler.get_system_prompt(config(path), GIVEN[name] | OPTIONAL[name])

    assert least
    assert most
    for variables, prompt in ((GIVEN, least), (OPTIONAL, most)):
        for variable, value in variables[name].items():
            assert re.search(rf"\b{variable}\b", comment)
            texts = [*value, *value.values()] if isinstance(value, dict) else value
            for text in texts if isinstance(texts, list) else [texts]:
                assert str(text) in prompt
    for prompt in (least, most):
        assert not re.search(r"\{[{%#]|[}%#]\}|\n\n|  ", prompt)
        assert prompt.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        assert prompt.endswith(("\n", "."))


@pytest.mark.parametrize("name", [name for name in GIVEN if GIVEN[name]])
def test_a_prompt_of_the_library_names_a_variable_that_is_missing(name: str) -> None:
    """None of them is sent with a hole in it."""
    first = next(iter(GIVEN[name]))

    with pytest.raises(InvalidRequestError, match=rf"'{first}' is undefined"):
        SystemPromptHandler(LIBRARY).get_system_prompt(config(f"{name}.j2"))
