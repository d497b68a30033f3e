"""What the package would send to the providers themselves, taken before it is sent.

A request for api.openai.com is not the one for a loopback server: which endpoint is
asked depends on the host. So the service goes its whole way with the real addresses, and
the HTTP session under it hands over the request in place of sending it.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from yarl import URL

from dipeo_llm import (
    DiPeOLLMError,
    InvalidRequestError,
    LLMInfraService,
    Settings,
    StaticAPIKeys,
)
from tests.conftest import PROVIDERS
from tests.provider_rules import losses_of, violations_of

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Sent:
    """One request for a provider."""

    provider: str
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    def wrong(self) -> list[str]:
        """Return what the provider would refuse or pass over."""
        asked = (self.provider, self.method, self.path, self.headers, self.body)
        return violations_of(*asked) + losses_of(*asked)


class _Taken(aiohttp.ClientError):
    """Ends a call whose request was taken."""


Ask = Callable[..., Any]


@dataclass
class Requests:
    """Says what a call sends."""

    service: LLMInfraService
    taken: list[tuple[str, URL, dict[str, str], bytes]]

    async def of(
        self,
        provider: str,
        model: str,
        messages: list[dict[str, Any]] | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Sent | InvalidRequestError:
        """Return the request of a call, or the error raised in its place.

        Raises:
            Exception: Whatever else the call raised before anything was sent.
        """
        self.taken.clear()
        options["service"] = provider
        asked = (messages or HELLO, model, provider)
        try:
            if stream:
                async with self.service.stream(*asked, **options) as chunks:
                    async for _ in chunks:
                        pass
            else:
                await self.service.complete(*asked, **options)
        except InvalidRequestError as exc:
            if not self.taken:
                return exc
            raise
        except DiPeOLLMError:
            if not self.taken:
                raise
        method, url, headers, body = self.taken[-1]
        return Sent(provider, method, url.raw_path_qs, headers, json.loads(body))


@contextlib.asynccontextmanager
async def requests() -> AsyncIterator[Requests]:
    """Open a service whose requests are taken from it; nothing is sent anywhere."""
    taken: list[tuple[str, URL, dict[str, str], bytes]] = []

    async def take(
        session: aiohttp.ClientSession,
        method: str,
        url: URL,
        *,
        headers: dict[str, str],
        data: bytes,
        **options: Any,
    ) -> None:
        taken.append((method, url, {**headers, "host": str(url.host)}, data))
        raise _Taken

    keys = StaticAPIKeys(
        {name: {"key": f"sk-test-{name}", "service": name} for name in PROVIDERS}
    )
    settings = Settings(engine="direct", max_retries=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiohttp.ClientSession, "request", take)
        async with LLMInfraService(keys, settings=settings) as service:
            yield Requests(service, taken)
