"""docs/troubleshooting.md: each message in its tables is made here."""

import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dipeo_llm import (
    EnvironmentAPIKeys,
    LLMInfraService,
    PersonLLMConfig,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm import settings as settings_module
from dipeo_llm.ports import APIKeyPort
from tests.conftest import HELLO, Authority, keys_for
from tests.provider_server import Answer, ProviderServer, Raw, error

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
MODEL = "gpt-4.1-nano"


class River(BaseModel):
    """A form for answers."""

    length_km: int


@dataclass
class Place:
    """What a case may use: a server, and how a service is opened."""

    server: ProviderServer
    secure: ProviderServer
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    async def ask(
        self,
        content: Any = "Hello",
        model: str = MODEL,
        key: str | None = "openai",
        keys: APIKeyPort | None = None,
        **options: Any,
    ) -> None:
        """Ask once, without retries."""
        usual: dict[str, Any] = {"max_retries": 0, "base_dir": self.folder}
        settings = Settings(**usual | self.settings)
        async with LLMInfraService(
            keys or keys_for(self.server), settings=settings
        ) as service:
            await service.initialize()
            messages = [{"role": "user", "content": content}]
            await service.complete(messages, model, key, **options)

    async def stream(self) -> None:
        """Read a stream to its end."""
        settings = Settings(max_retries=0)
        async with (
            LLMInfraService(keys_for(self.server), settings=settings) as service,
            service.stream(HELLO, MODEL, "openai") as stream,
        ):
            await stream.result()

    async def speak(self) -> None:
        """Speak as a person whose prompt file is missing."""
        settings = Settings(base_dir=self.folder)
        config = PersonLLMConfig(
            model=MODEL, api_key_id="openai", prompt_file="missing.md"
        )
        message = type("Said", (), {"from_person_id": "b", "content": "Hello"})
        async with LLMInfraService(keys_for(self.server), settings=settings) as service:
            await service.complete_with_person([message], "a", config)


Case = Callable[[Place], Awaitable[None]]


async def _closed(place: Place) -> None:
    async with LLMInfraService(keys_for(place.server), settings=Settings()) as service:
        pass
    await service.complete(HELLO, MODEL, "openai")


async def _wrong_owner(place: Place) -> None:
    record = {"key": "sk-x", "service": "anthropic"}
    await place.ask(keys=StaticAPIKeys({"openai": record}))


async def _read_settings(place: Place) -> None:
    Settings.from_env({"DIPEO_LLM_TIMEOUT": "5m"})


async def _socks(place: Place) -> None:
    place.settings["proxy"] = "socks5://127.0.0.1:1"
    # Loopback takes no proxy.
    record = {"key": "sk-x", "base_url": "https://api.example.test/v1"}
    await place.ask(keys=StaticAPIKeys({"openai": record}))


async def _untrusted(place: Place) -> None:
    await place.ask(keys=keys_for(place.secure))


async def _gone(place: Place) -> None:
    record = {"key": "sk-x", "base_url": "http://127.0.0.1:9/v1"}
    await place.ask(keys=StaticAPIKeys({"openai": record}))


def _answering(reply: Any, **options: Any) -> Case:
    async def ask(place: Place) -> None:
        place.server.default = reply
        await place.ask(**options)

    return ask


async def _broken_stream(place: Place) -> None:
    place.server.default = Answer(cut_after=2)
    await place.stream()


async def _foreign_variable(place: Place) -> None:
    Settings.from_env({"OPENAI_BASE_URL": "http://127.0.0.1:1"})


async def _misspelt_variable(place: Place) -> None:
    Settings.from_env({"DIPEO_LLM_TIMOUT": "5"})


_PICTURE = {"type": "image_url", "image_url": {"url": "https://127.0.0.1/a.png"}}

CASES: dict[str, Case] = {
    "set OPENAI_API_KEY for 'openai'": lambda p: p.ask(
        keys=EnvironmentAPIKeys(), key=None
    ),
    "the given api_key_id looks like a key": lambda p: p.ask(key=f"sk-{'a1' * 20}"),
    "belongs to anthropic and was not sent to openai": _wrong_owner,
    "no provider is known for model": lambda p: p.ask(model="my-model"),
    "unknown provider 'opnai'; did you mean 'openai'?": lambda p: p.ask(
        service="opnai"
    ),
    "needs a base_url": lambda p: p.ask(
        model="hosted_vllm/x", keys=StaticAPIKeys({"openai": "sk-x"})
    ),
    "unexpected keyword 'temprature'": lambda p: p.ask(temprature=1),
    "max_tokens=-1 cannot be sent": lambda p: p.ask(max_tokens=-1),
    "there is nothing to answer": lambda p: p.ask(content=" "),
    "it leads outside the base directory": lambda p: p.ask(content=[Path("../a.png")]),
    "it is not on the public internet": lambda p: p.ask(
        content=[_PICTURE], model="claude-haiku-4-5", key="anthropic"
    ),
    "DIPEO_LLM_TIMEOUT='5m' cannot be read": _read_settings,
    "a proxy of kind 'socks5' is not supported": _socks,
    "the service is closed": _closed,
    "openai answered 401": _answering(error("openai", 401)),
    "openai answered 404": _answering(error("openai", 404)),
    "no answer from openai: Cannot connect": _gone,
    "CERTIFICATE_VERIFY_FAILED": _untrusted,
    "openai did not answer within 0.2 s": _answering(Answer(delay=5), timeout=0.2),
    "within the deadline of 0.2 s": _answering(Answer(delay=5), deadline=0.2),
    "openai answered 200, but": _answering(Raw(body=b"<html>Sign in</html>")),
    "the stream broke off after": _broken_stream,
    "no structured answer: the answer was cut off": _answering(
        Answer('{"length', finish="length"), response_format=River
    ),
    "no structured answer: length_km": _answering(
        Answer('{"length": 1}'), response_format=River
    ),
    "does not take seed: it was left out": _answering(
        Answer(), model="claude-haiku-4-5", key="anthropic", seed=1
    ),
    "prompt file 'missing.md' is not used": Place.speak,
    "OPENAI_BASE_URL is set but not used": _foreign_variable,
    "DIPEO_LLM_TIMOUT is unknown": _misspelt_variable,
}


def _forget_warnings() -> None:
    for value in vars(settings_module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what is logged once be logged again."""
    monkeypatch.setattr("dipeo_llm.adapters.base._seen_options", set())
    _forget_warnings()
    yield
    _forget_warnings()


def test_the_page_has_the_cases() -> None:
    """No row is without a case, and no case without a row."""
    rows = re.findall(r"^\| `(.+?)` \|", PAGE.read_text("utf-8"), re.MULTILINE)

    assert rows == list(CASES)


@pytest.mark.parametrize("message", CASES)
async def test_a_message(
    message: str,
    server: ProviderServer,
    secure: ProviderServer,
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A user who searches for it finds the row."""
    caplog.set_level(logging.INFO, "dipeo_llm")
    place = Place(server, secure, tmp_path)
    raised = ""
    try:
        await CASES[message](place)
    except Exception as exc:  # noqa: BLE001 - its words are compared
        raised = str(exc)

    assert message in f"{raised}\n{caplog.text}"
