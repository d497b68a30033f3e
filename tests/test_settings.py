"""Settings: what the environment may say, in what form, and what it may not."""

import dataclasses
import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import settings as settings_module
from dipeo_llm.adapters.factory import create_adapter
from dipeo_llm.domain import LLMService
from dipeo_llm.errors import InvalidRequestError, SettingsError
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings

GOOD: list[tuple[str, str, str, Any]] = [
    ("DIPEO_BASE_DIR", "/srv/prompts", "base_dir", Path("/srv/prompts")),
    ("DIPEO_BASE_DIR", "not/there/yet", "base_dir", Path("not/there/yet")),
    ("DIPEO_BASE_DIR", "~/prompts", "base_dir", Path.home() / "prompts"),
    ("DIPEO_LLM_TIMEOUT", "30", "timeout", 30.0),
    ("DIPEO_LLM_TIMEOUT", " 0.5 ", "timeout", 0.5),
    ("DIPEO_LLM_TIMEOUT", "", "timeout", 300.0),
    ("DIPEO_LLM_TIMEOUT", "  ", "timeout", 300.0),
    ("DIPEO_LLM_MAX_RETRIES", "0", "max_retries", 0),
    ("DIPEO_LLM_MAX_RETRIES", "7", "max_retries", 7),
    ("DIPEO_LLM_MAX_RETRIES", "", "max_retries", 3),
    ("DIPEO_LLM_ENGINE", "direct", "engine", "direct"),
    ("DIPEO_LLM_ENGINE", "LiteLLM", "engine", "litellm"),
    ("DIPEO_LLM_ENGINE", "", "engine", "auto"),
]
BAD = [
    ("DIPEO_LLM_TIMEOUT", "0"),
    ("DIPEO_LLM_TIMEOUT", "-1"),
    ("DIPEO_LLM_TIMEOUT", "inf"),
    ("DIPEO_LLM_TIMEOUT", "nan"),
    ("DIPEO_LLM_TIMEOUT", "5 min"),
    ("DIPEO_LLM_TIMEOUT", "0x10"),
    ("DIPEO_LLM_MAX_RETRIES", "-1"),
    ("DIPEO_LLM_MAX_RETRIES", "2.5"),
    ("DIPEO_LLM_MAX_RETRIES", "many"),
    ("DIPEO_LLM_ENGINE", "steam"),
    ("OLLAMA_HOST", "ftp://gpu"),
    ("OLLAMA_HOST", "gpu:ollama"),
    ("OLLAMA_HOST", "gpu:99999"),
    ("OLLAMA_HOST", "http://[::1"),
    ("OLLAMA_HOST", "g p u"),
]
PROVIDERS = ("openai", "anthropic", "google", "ollama")
GOOD_URLS = [
    ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
    ("https://llm.example.com/v1/", "https://llm.example.com/v1"),
    (" https://llm.example.com ", "https://llm.example.com"),
    ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
]
BAD_URLS = [
    "llm.example.com/v1",
    "localhost:8000",
    "ftp://llm.example.com",
    "file:///etc/passwd",
    "https://",
    "https:///v1",
    "https://llm.example.com:port/v1",
    "https://llm.example.com:65536/v1",
    "https://[::1/v1",
    "https://llm.example.com/v1?key=x",
    "https://llm.example.com/v1#x",
    "https://user@llm.example.com/v1",
    "https://llm.exa mple.com/v1",
    "https://llm.example\n.com/v1",
]
OLLAMA_HOSTS = [
    ("gpu", "http://gpu:11434"),
    ("gpu.lan:8080", "http://gpu.lan:8080"),
    ("gpu:", "http://gpu:11434"),
    (":8080", "http://127.0.0.1:8080"),
    ("http://gpu", "http://gpu:80"),
    ("https://gpu", "https://gpu:443"),
    ("https://gpu:8443/", "https://gpu:8443"),
    ("https://gpu/ollama/", "https://gpu:443/ollama"),
    ("gpu/ollama", "http://gpu:11434/ollama"),
    ("0.0.0.0", "http://127.0.0.1:11434"),
    ("0.0.0.0:8080", "http://127.0.0.1:8080"),
    ("http://0.0.0.0:8080", "http://127.0.0.1:8080"),
    ("::1", "http://[::1]:11434"),
    ("[::1]", "http://[::1]:11434"),
    ("[::1]:8080", "http://[::1]:8080"),
    ("http://[2001:db8::1]", "http://[2001:db8::1]:80"),
    ("::", "http://[::1]:11434"),
    ("[::]:8080", "http://[::1]:8080"),
]


@pytest.mark.parametrize(("variable", "text", "field", "value"), GOOD)
def test_a_variable_sets_its_field(
    variable: str, text: str, field: str, value: Any
) -> None:
    """A variable is read into its setting; a blank one counts as not set."""
    settings = Settings.from_env({variable: text})

    assert settings == dataclasses.replace(Settings(), **{field: value})


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("text", "url"), GOOD_URLS)
def test_a_base_url_is_read(provider: str, text: str, url: str) -> None:
    """Each provider's base URL is taken as given, without a slash at its end."""
    settings = Settings.from_env({f"DIPEO_LLM_{provider.upper()}_BASE_URL": text})

    assert settings.base_urls == {provider: url}


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        *BAD,
        *(
            (f"DIPEO_LLM_{p.upper()}_BASE_URL", url)
            for p in PROVIDERS
            for url in BAD_URLS
        ),
    ],
)
def test_a_value_that_cannot_be_read_names_its_variable(
    variable: str, text: str
) -> None:
    """Whoever set a bad value learns at the start which variable to fix."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable: text})

    assert str(caught.value).startswith(variable)


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("DIPEO_LLM_OPENAI_BASE_URL", "https://me:hunter2@gpu/v1"),
        ("DIPEO_LLM_OPENAI_BASE_URL", "https://:hunter2@gpu/v1"),
        ("DIPEO_LLM_OPENAI_BASE_URL", "https://me:hunter2@gpu:port/v1"),
        ("OLLAMA_HOST", "https://me:hunter2@gpu"),
        ("OLLAMA_HOST", "me:hunter2@gpu"),
        ("OLLAMA_HOST", "me:hunter2@gpu:11434"),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_shown(variable: str, url: str) -> None:
    """A URL with a password in it is refused by an error that keeps the password."""
    with pytest.raises(SettingsError, match=variable) as caught:
        Settings.from_env({variable: url})

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["google", "gemini", LLMService.GEMINI], ids=repr)
def test_a_base_url_may_stand_under_any_name_of_its_provider(
    name: str,
) -> None:
    """A key does not travel to the provider's own address for want of an alias."""
    settings = Settings(base_urls={name: "http://127.0.0.1:1/v1beta"})

    adapter = create_adapter("google", "gemini-2.5-flash", "sk-1", settings=settings)

    assert adapter.endpoint.base_url == "http://127.0.0.1:1/v1beta"


@pytest.mark.parametrize(("host", "url"), OLLAMA_HOSTS)
def test_ollama_host_is_read_as_ollama_reads_it(host: str, url: str) -> None:
    """OLLAMA_HOST takes every form that Ollama's own tools take."""
    assert Settings.from_env({"OLLAMA_HOST": host}).base_urls == {"ollama": url}


def test_our_own_variable_wins_over_ollama_host() -> None:
    """DIPEO_LLM_OLLAMA_BASE_URL decides where both are set."""
    settings = Settings.from_env(
        {"OLLAMA_HOST": "one", "DIPEO_LLM_OLLAMA_BASE_URL": "http://two:1"}
    )

    assert settings.base_urls == {"ollama": "http://two:1"}


def test_a_password_in_a_keys_base_url_is_refused_and_not_shown() -> None:
    """A key record's base URL is held to the same rule."""
    with pytest.raises(InvalidRequestError, match="password") as caught:
        create_adapter("openai", "gpt-4o", "sk-1", "https://me:hunter2@gpu/v1")

    assert "hunter2" not in str(caught.value)


def test_several_base_urls_are_kept_apart() -> None:
    """Every provider can have a base URL of its own."""
    settings = Settings.from_env(
        {f"DIPEO_LLM_{p.upper()}_BASE_URL": f"http://{p}:1" for p in PROVIDERS}
    )

    assert settings.base_urls == {p: f"http://{p}:1" for p in PROVIDERS}


def test_an_empty_environment_gives_the_defaults() -> None:
    """Without a variable the settings are those of the constructor."""
    assert Settings.from_env({}) == Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OPENAI_BASE_URL", "http://elsewhere/v1"),
        ("OPENAI_API_BASE", "http://elsewhere/v1"),
        ("OPENAI_ORGANIZATION", "org-1"),
        ("ANTHROPIC_BASE_URL", "http://elsewhere"),
        ("GEMINI_API_BASE", "http://elsewhere"),
        ("OLLAMA_API_BASE", "http://elsewhere"),
        ("OLLAMA_API_KEY", "sk-1"),
        ("LITELLM_PROXY_API_BASE", "http://elsewhere"),
        ("HTTPS_PROXY", "http://elsewhere"),
        ("dipeo_llm_timeout", "1"),
    ],
)
def test_other_variables_change_no_setting(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """A variable of another tool leaves the settings as they are."""
    monkeypatch.setenv(variable, value)

    assert Settings.from_env() == Settings()


def test_the_process_environment_is_read_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without an argument, from_env reads the variables of the process."""
    monkeypatch.setenv("DIPEO_LLM_TIMEOUT", "12")

    assert Settings.from_env().timeout == 12.0


def test_a_service_reads_the_environment_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A service without settings takes the environment's."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "1")

    assert LLMInfraService(StaticAPIKeys({})).settings.max_retries == 1


def test_a_service_refuses_a_bad_environment_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bad variable fails at the start, not at the first call."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "lots")

    with pytest.raises(SettingsError, match="DIPEO_LLM_MAX_RETRIES"):
        LLMInfraService(StaticAPIKeys({}))


def test_settings_given_in_code_do_not_ask_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A service with settings of its own does not mind a bad environment."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "lots")

    assert (
        LLMInfraService(StaticAPIKeys({}), settings=Settings()).settings == Settings()
    )


def test_settings_cannot_be_changed() -> None:
    """Settings are frozen: what a service was made with is what it works with."""
    settings = Settings()

    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.timeout = 1.0  # type: ignore[misc]


def test_secrets_are_not_in_the_repr() -> None:
    """A proxy's password and the extra headers do not appear in a log of settings."""
    settings = Settings(
        proxy="http://me:hunter2@proxy:3128", extra_headers={"x-team": "hunter3"}
    )

    assert "hunter" not in repr(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": "5"},
        {"timeout": math.inf},
        {"timeout": True},
        {"idle_timeout": 0.0},
        {"connect_timeout": math.nan},
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"max_concurrency": 0},
        {"max_clients": 0},
        {"client_ttl": 0},
        {"close_grace": -0.1},
        {"engine": "turbo"},
        {"missing_prompt": "ignore"},
        {"base_urls": {"openai": "gpu:8000"}},
        {"extra_headers": {"x-team": 5}},
    ],
    ids=str,
)
def test_a_setting_that_no_call_could_be_made_with_is_refused(wrong: Any) -> None:
    """The error names the field, when the settings are made and not at the first call."""
    (name,) = wrong

    with pytest.raises(SettingsError, match=name):
        Settings(**wrong)


def test_settings_that_are_off_or_none_are_taken() -> None:
    """0 is no wait, and None no limit."""
    Settings(
        retry_wait=0, retry_after_max=0, close_grace=0, max_retries=0, idle_timeout=None
    )
    Settings(max_concurrency=None, timeout=1, client_ttl=0.01)


def test_a_field_that_does_not_exist_is_a_type_error() -> None:
    """A misspelt field is answered with the nearest one."""
    with pytest.raises(TypeError, match="'time_out'; did you mean 'timeout'"):
        Settings(time_out=5)  # type: ignore[call-arg]
    make: Any = Settings
    with pytest.raises(TypeError):
        make(5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_urls", {"openai": "https://me:hunter2@gpu/v1"}),
        ("base_urls", {"openai": "https://me:hunter2/x@gpu/v1"}),
        ("base_urls", {"openai": "https://me:hunter2@gp\u2100/v1"}),
        ("base_urls", {"openai": ["hunter2"]}),
        ("proxy", ["http://me:hunter2@proxy"]),
        ("extra_headers", {"x-team": ["hunter2"]}),
    ],
    ids=str,
)
def test_a_secret_in_a_field_is_not_shown(field: str, value: Any) -> None:
    """The error names the field, and for a mapping its key."""
    with pytest.raises(SettingsError, match=field) as caught:
        Settings(**{field: value})

    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_settings_are_their_own_copy() -> None:
    """A mapping that changes later changes no call, and a URL has no slash at its end."""
    urls = {LLMService.OPENAI: "http://one/v1/"}
    settings = Settings(base_urls=urls, base_dir="prompts")  # type: ignore[arg-type]

    urls.clear()

    assert settings.base_urls == {"openai": "http://one/v1"}
    assert settings.base_dir == Path("prompts")


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was warned of, as if nothing had been before."""
    settings_module.warn_once.cache_clear()
    return lambda: [r.message for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DIPEO_LLM_TIMOUT": "5"}, "did you mean DIPEO_LLM_TIMEOUT?"),
        ({"DIPEO_LLM_OPNAI_BASE_URL": "http://x"}, "did you mean 'openai'?"),
        ({"DIPEO_LLM_BASE_URL": "http://x"}, "DIPEO_LLM_BASE_URL is unknown"),
        ({"OPENAI_BASE_URL": "http://x"}, "set DIPEO_LLM_OPENAI_BASE_URL"),
        ({"ANTHROPIC_BASE_URL": "http://x"}, "set DIPEO_LLM_ANTHROPIC_BASE_URL"),
    ],
    ids=str,
)
def test_a_variable_without_effect_is_warned_of_once(
    environment: dict[str, str], said: str, warned: Callable[[], list[str]]
) -> None:
    """A typo, and another library's variable, are named once in a process."""
    Settings.from_env(environment)
    Settings.from_env(environment)

    (message,) = warned()
    assert said in message
    assert "http" not in message


@pytest.mark.parametrize(
    "environment",
    [
        {"DIPEO_LLM_TIMEOUT": "5", "DIPEO_BASE_DIR": "x", "DIPEO_OTHER": "1"},
        {"DIPEO_LLM_GROQ_BASE_URL": "http://x"},
        {"DIPEO_LLM_VERTEX_AI_BASE_URL": "http://x"},
        {"OPENAI_BASE_URL": "http://x", "DIPEO_LLM_OPENAI_BASE_URL": "http://y"},
        {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": "k"},
    ],
    ids=str,
)
def test_nothing_else_is_warned_of(
    environment: dict[str, str], warned: Callable[[], list[str]]
) -> None:
    """A known variable, another provider's URL, and one that we do use, are fine."""
    Settings.from_env(environment)

    assert warned() == []


def test_a_misspelt_provider_of_a_base_url_is_warned_of(
    warned: Callable[[], list[str]],
) -> None:
    """Calls would go to the provider's own address without a word."""
    Settings(base_urls={"opnai": "http://x", "groq": "http://y", "gemini": "http://z"})

    assert warned() == [
        "base_urls has an unknown provider 'opnai'; did you mean 'openai'?"
    ]


def test_every_variable_of_the_package_is_known() -> None:
    """A variable that some module reads is not called unknown."""
    package = Path(settings_module.__file__).parent
    named = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r"\bDIPEO_LLM_[A-Z_]+\b", path.read_text("utf-8"))
    }
    known = {*settings_module._VARIABLES, *settings_module._OTHER_VARIABLES}

    unknown = {name for name in named if not name.endswith("_BASE_URL")} - known
    assert unknown == set()
