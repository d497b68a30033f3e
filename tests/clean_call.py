"""Makes a call with tools on each provider, where only the package's needs are installed.

Run by `nox -s clean`. LiteLLM had versions that could do this in no plain install; this
script exits with 1 where the installed one is such.
"""

import asyncio
import sys

from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys
from tests.provider_server import Answer, ProviderServer

MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2:1b",
}
MESSAGES = [{"role": "user", "content": "How is the weather in Bonn?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


async def main() -> int:
    """Call each provider by both engines; return how many brought no tool call."""
    missing = 0
    async with ProviderServer() as server:
        server.default = Answer(tool_calls=[("weather", {"city": "Bonn"})])
        keys = StaticAPIKeys(
            {
                provider: {"key": "sk-test", "base_url": server.base_url(provider)}
                for provider in MODELS
            }
        )
        for engine in ("direct", "litellm"):
            settings = Settings(engine=engine, max_retries=0)
            async with LLMInfraService(keys, settings=settings) as service:
                for provider, model in MODELS.items():
                    said = await _said(service, provider, model)
                    missing += said != "weather({'city': 'Bonn'})"
                    sys.stdout.write(f"{engine:8} {provider:10} {said}\n")
    return missing


async def _said(service: LLMInfraService, provider: str, model: str) -> str:
    try:
        result = await service.complete(MESSAGES, model, provider, tools=[TOOL])
    except Exception as exc:  # noqa: BLE001 - whatever it is, the script is to say it
        return f"{type(exc).__name__}: {exc}"
    calls = [f"{call.name}({call.arguments})" for call in result.tool_calls]
    return " ".join(calls) or "no tool call"


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main()) else 0)
