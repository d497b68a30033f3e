"""The clients that are measured: each answers a prompt whole and as a stream.

Runs in the environment of one peer, where nothing else need be installed, so every
import of a library stands inside the class that uses it. No client retries, logs to
anywhere or talks to anything but the server.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

SYSTEM = "You are brief."
PROMPT = "Say hello."
KEY = "benchmark"
MODELS = {
    "openai": "gpt-4o-mini",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2",
}
BASE_PATHS = {"openai": "/v1", "anthropic": "", "google": "/v1beta", "ollama": ""}


def messages() -> list[dict[str, Any]]:
    """Return the conversation, new for each call: some clients change it."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": PROMPT},
    ]


class Client:
    """One format of one library against one origin."""

    def __init__(self, wire_format: str, origin: str) -> None:
        self.format = wire_format
        self.model = MODELS[wire_format]
        self.base_url = origin + BASE_PATHS[wire_format]
        self.origin = origin

    async def open(self) -> None:
        """Import and open what the library needs."""

    async def call(self) -> str:
        """Answer the prompt."""
        raise NotImplementedError

    def stream(self) -> AsyncIterator[str]:
        """Answer the prompt piece by piece."""
        raise NotImplementedError

    async def pool_hit(self) -> None:
        """Take the open client out of the pool and give it back, where there is one."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close it."""


class Raw(Client):
    """aiohttp and json, nothing between: what the wire itself costs."""

    async def open(self) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession()

    def _request(self, *, stream: bool) -> Any:
        if self.format == "google":
            verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
            return self._session.post(
                f"{self.base_url}/models/{self.model}:{verb}",
                headers={"x-goog-api-key": KEY},
                json={
                    "systemInstruction": {"parts": [{"text": SYSTEM}]},
                    "contents": [{"role": "user", "parts": [{"text": PROMPT}]}],
                },
            )
        body = {"model": self.model, "messages": messages(), "stream": stream}
        path, headers = {
            "openai": ("/chat/completions", {"authorization": f"Bearer {KEY}"}),
            "anthropic": ("/v1/messages", {"x-api-key": KEY}),
            "ollama": ("/api/chat", {}),
        }[self.format]
        if self.format == "anthropic":
            body |= {"max_tokens": 100, "system": SYSTEM}
            body["messages"] = messages()[1:]
        return self._session.post(self.base_url + path, headers=headers, json=body)

    async def call(self) -> str:
        async with self._request(stream=False) as response:
            body = json.loads(await response.read())
        match self.format:
            case "openai":
                text = body["choices"][0]["message"]["content"]
            case "anthropic":
                text = body["content"][0]["text"]
            case "google":
                text = body["candidates"][0]["content"]["parts"][0]["text"]
            case _:
                text = body["message"]["content"]
        return str(text)

    async def stream(self) -> AsyncIterator[str]:
        read = _RAW_EVENTS[self.format]
        sse = self.format != "ollama"
        async with self._request(stream=True) as response:
            async for line in response.content:
                if sse and not line.startswith(b"data:"):
                    continue
                data = line[5:] if sse else line
                if data.strip() == b"[DONE]":
                    continue
                if text := read(json.loads(data)):
                    yield text

    async def close(self) -> None:
        await self._session.close()


def _openai_event(event: Any) -> Any:
    return event["choices"][0]["delta"].get("content") if event["choices"] else None


def _google_event(event: Any) -> Any:
    parts = event["candidates"][0].get("content", {}).get("parts")
    return parts[0].get("text") if parts else None


_RAW_EVENTS: dict[str, Callable[[Any], Any]] = {
    "openai": _openai_event,
    "anthropic": lambda event: event.get("delta", {}).get("text"),
    "google": _google_event,
    "ollama": lambda event: event["message"]["content"],
}


class Ours(Client):
    """This package, by its direct engine."""

    engine = "direct"
    cache: str | None = None

    async def open(self) -> None:
        from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys

        self._settings = Settings(
            engine=self.engine,  # type: ignore[arg-type]
            max_retries=0,
            base_urls={self.format: self.base_url},
        )
        self._service = LLMInfraService(
            StaticAPIKeys({"key": KEY}),
            settings=self._settings,
            # Older versions, with which this one is compared, have no cache.
            **({"cache": self.cache} if self.cache else {}),
        )
        self._adapter: Any = None

    async def call(self) -> str:
        result = await self._service.complete(
            messages(), self.model, "key", service=self.format
        )
        return result.text

    async def stream(self) -> AsyncIterator[str]:
        async with self._service.stream(
            messages(), self.model, "key", service=self.format
        ) as stream:
            async for chunk in stream:
                if chunk.text:
                    yield chunk.text

    async def pool_hit(self) -> None:
        if self._adapter is None:
            from dipeo_llm import create_adapter

            self._adapter = create_adapter(
                self.format, self.model, KEY, settings=self._settings
            )
        async with await self._adapter.client():
            pass

    async def close(self) -> None:
        if self._adapter is not None:
            await self._adapter.aclose()
        await self._service.aclose()


class OursThroughLiteLLM(Ours):
    """This package, by the engine that calls `litellm.acompletion`."""

    engine = "litellm"


class OursCached(Ours):
    """This package, with a hit in memory for every call but the first."""

    cache = "memory://"


class OursShared(Ours):
    """Likewise in Redis."""

    cache = os.environ.get("BENCHMARK_REDIS")


class LiteLLM(Client):
    """Bare `litellm.acompletion`, with the client that it keeps for itself."""

    async def open(self) -> None:
        import litellm

        from dipeo_llm import create_adapter

        adapter = create_adapter(self.format, self.model, KEY, self.base_url)
        adapter.teach(litellm)  # or it would ask Ollama about the model in each call
        self._litellm: Any = litellm
        self._arguments: dict[str, Any] = {
            "model": f"{adapter.provider.litellm}/{self.model}",
            "custom_llm_provider": adapter.provider.litellm,
            "api_key": KEY,
            "api_base": self.base_url,
            "timeout": 60,
            "max_retries": 0,
            "num_retries": 0,
            "drop_params": True,
        }

    async def call(self) -> str:
        response = await self._litellm.acompletion(
            messages=messages(), **self._arguments
        )
        return str(response.choices[0].message.content)

    async def stream(self) -> AsyncIterator[str]:
        response = await self._litellm.acompletion(
            messages=messages(), stream=True, **self._arguments
        )
        async for chunk in response:
            if text := chunk.choices[0].delta.content:
                yield text

    async def close(self) -> None:
        await self._litellm.close_litellm_async_clients()


class LiteLLMCached(LiteLLM):
    """`litellm.acompletion` with its own cache, in memory."""

    async def open(self) -> None:
        await super().open()
        self._litellm.cache = self._litellm.Cache(**self.cache())

    def cache(self) -> dict[str, Any]:
        return {"type": "local"}

    async def call(self) -> str:
        text = await super().call()
        await asyncio.sleep(0)  # it stores in a task of its own
        return text


class LiteLLMShared(LiteLLMCached):
    """Likewise in Redis."""

    def cache(self) -> dict[str, Any]:
        url = urlsplit(os.environ["BENCHMARK_REDIS"])
        return {"type": "redis", "host": url.hostname, "port": str(url.port)}


class LiteLLMRouter(Client):
    """`litellm.Router`, which keeps a client of its own."""

    async def open(self) -> None:
        import litellm

        self._router = litellm.Router(
            model_list=[
                {
                    "model_name": self.model,
                    "litellm_params": {
                        "model": f"openai/{self.model}",
                        "api_key": KEY,
                        "api_base": self.base_url,
                    },
                }
            ],
            num_retries=0,
        )

    async def call(self) -> str:
        response = await self._router.acompletion(self.model, messages())
        return str(response.choices[0].message.content)

    async def stream(self) -> AsyncIterator[str]:
        response = await self._router.acompletion(self.model, messages(), stream=True)
        async for chunk in response:
            if text := chunk.choices[0].delta.content:
                yield text


class OpenAI(Client):
    """The OpenAI SDK."""

    async def open(self) -> None:
        import openai

        self._client = openai.AsyncOpenAI(
            api_key=KEY, base_url=self.base_url, max_retries=0
        )

    async def call(self) -> str:
        response = await self._client.chat.completions.create(
            model=self.model, messages=messages()
        )
        return str(response.choices[0].message.content)

    async def stream(self) -> AsyncIterator[str]:
        response = await self._client.chat.completions.create(
            model=self.model, messages=messages(), stream=True
        )
        async for chunk in response:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield text

    async def close(self) -> None:
        await self._client.close()


class Anthropic(Client):
    """The Anthropic SDK."""

    async def open(self) -> None:
        import anthropic

        self._client = anthropic.AsyncAnthropic(
            api_key=KEY, base_url=self.base_url, max_retries=0
        )

    def _arguments(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "max_tokens": 100,
            "system": SYSTEM,
            "messages": messages()[1:],
        }

    async def call(self) -> str:
        response = await self._client.messages.create(**self._arguments())
        return str(response.content[0].text)

    async def stream(self) -> AsyncIterator[str]:
        events = await self._client.messages.create(**self._arguments(), stream=True)
        async for event in events:
            if event.type == "content_block_delta":
                yield event.delta.text

    async def close(self) -> None:
        await self._client.close()


class GoogleGenAI(Client):
    """The Google Gen AI SDK."""

    async def open(self) -> None:
        from google import genai
        from google.genai import types

        self._client = genai.Client(
            api_key=KEY,
            http_options=types.HttpOptions(base_url=self.origin, api_version="v1beta"),
        )
        self._config = types.GenerateContentConfig(system_instruction=SYSTEM)

    async def call(self) -> str:
        response = await self._client.aio.models.generate_content(
            model=self.model, contents=PROMPT, config=self._config
        )
        return str(response.text)

    async def stream(self) -> AsyncIterator[str]:
        chunks = await self._client.aio.models.generate_content_stream(
            model=self.model, contents=PROMPT, config=self._config
        )
        async for chunk in chunks:
            if chunk.text:
                yield chunk.text


class Ollama(Client):
    """Ollama's SDK."""

    async def open(self) -> None:
        import ollama

        self._client = ollama.AsyncClient(host=self.base_url)

    async def call(self) -> str:
        response = await self._client.chat(self.model, messages())
        return str(response.message.content)

    async def stream(self) -> AsyncIterator[str]:
        async for chunk in await self._client.chat(self.model, messages(), stream=True):
            if chunk.message.content:
                yield chunk.message.content


class PydanticAI(Client):
    """An agent of pydantic-ai without tools."""

    async def open(self) -> None:
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        provider = OpenAIProvider(base_url=self.base_url, api_key=KEY)
        self._agent = Agent(
            OpenAIChatModel(self.model, provider=provider), system_prompt=SYSTEM
        )

    async def call(self) -> str:
        return str((await self._agent.run(PROMPT)).output)

    async def stream(self) -> AsyncIterator[str]:
        async with self._agent.run_stream(PROMPT) as run:
            async for text in run.stream_text(delta=True, debounce_by=None):
                yield text


class LangChain(Client):
    """LangChain's chat model."""

    async def open(self) -> None:
        from langchain_openai import ChatOpenAI

        self._model = ChatOpenAI(
            model=self.model, base_url=self.base_url, api_key=KEY, max_retries=0
        )

    async def call(self) -> str:
        return str((await self._model.ainvoke(messages())).content)

    async def stream(self) -> AsyncIterator[str]:
        async for chunk in self._model.astream(messages()):
            if chunk.content:
                yield str(chunk.content)


class Instructor(OpenAI):
    """instructor around the OpenAI SDK, without a response model."""

    async def open(self) -> None:
        import instructor

        await super().open()
        self._inner = self._client
        self._instructor: Any = instructor.from_openai(self._client)

    async def call(self) -> str:
        response = await self._instructor.create(
            response_model=None, model=self.model, messages=messages()
        )
        return str(response.choices[0].message.content)

    async def stream(self) -> AsyncIterator[str]:
        response = await self._instructor.create(
            response_model=None, model=self.model, messages=messages(), stream=True
        )
        async for chunk in response:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield text


class AnyLLM(Client):
    """any-llm, with the client that it keeps open."""

    async def open(self) -> None:
        from any_llm import AnyLLM as Library

        self._client = Library.create("openai", api_key=KEY, api_base=self.base_url)

    async def call(self) -> str:
        response: Any = await self._client.acompletion(self.model, messages())
        return str(response.choices[0].message.content)

    async def stream(self) -> AsyncIterator[str]:
        response: Any = await self._client.acompletion(
            self.model, messages(), stream=True
        )
        async for chunk in response:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield text


CLIENTS: dict[str, type[Client]] = {
    "raw": Raw,
    "direct": Ours,
    "engine-litellm": OursThroughLiteLLM,
    "litellm": LiteLLM,
    "litellm-router": LiteLLMRouter,
    "cached-memory": OursCached,
    "cached-redis": OursShared,
    "litellm-memory": LiteLLMCached,
    "litellm-redis": LiteLLMShared,
    "openai": OpenAI,
    "anthropic": Anthropic,
    "google-genai": GoogleGenAI,
    "ollama": Ollama,
    "pydantic-ai": PydanticAI,
    "langchain": LangChain,
    "instructor": Instructor,
    "any-llm": AnyLLM,
}

# LiteLLM would fetch a price table and read a .env file, LangChain look for a tracer.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("LITELLM_MODE", "PRODUCTION")
os.environ.setdefault("LANGSMITH_TRACING", "false")
