"""dipeo_llm: one call for OpenAI, Anthropic, Google Gemini and Ollama.

Names are loaded when they are first used, so that `import dipeo_llm` costs a few
milliseconds and LiteLLM's seconds fall to the first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipeo_llm.adapters.base import BaseLLMAdapter
    from dipeo_llm.adapters.claude import ClaudeAdapter
    from dipeo_llm.adapters.factory import create_adapter
    from dipeo_llm.adapters.gemini import GeminiAdapter
    from dipeo_llm.adapters.ollama import OllamaAdapter
    from dipeo_llm.adapters.openai import ChatGPTAdapter
    from dipeo_llm.domain import (
        Capabilities,
        ChatRequest,
        ChatResult,
        ImageGenerationResult,
        LLMRequestOptions,
        LLMService,
        Message,
        Person,
        PersonLLMConfig,
        RateLimits,
        StreamChunk,
        TokenCount,
        TokenUsage,
        ToolCall,
        ToolCallDelta,
        ToolConfig,
        ToolOutput,
        ToolType,
        WebSearchResult,
    )
    from dipeo_llm.errors import (
        APIKeyError,
        APIKeyNotFoundError,
        ContentFilterError,
        ContextWindowError,
        DiPeOLLMError,
        InvalidRequestError,
        LLMServiceError,
        LLMTimeoutError,
        ModelNotFoundError,
        QuotaExceededError,
        RateLimitError,
        ServiceUnavailableError,
        SettingsError,
        StreamInterruptedError,
        StructuredOutputError,
    )
    from dipeo_llm.keys import EnvironmentAPIKeys, StaticAPIKeys
    from dipeo_llm.message_formatter import MessageFormatter
    from dipeo_llm.ports import APIKeyPort, LLMDomainService, LLMServicePort
    from dipeo_llm.service import LLMInfraService
    from dipeo_llm.settings import Settings
    from dipeo_llm.streaming import ChatStream
    from dipeo_llm.system_prompt_handler import SystemPromptHandler

__all__ = [
    "APIKeyError",
    "APIKeyNotFoundError",
    "APIKeyPort",
    "BaseLLMAdapter",
    "Capabilities",
    "ChatGPTAdapter",
    "ChatRequest",
    "ChatResult",
    "ChatStream",
    "ClaudeAdapter",
    "ContentFilterError",
    "ContextWindowError",
    "DiPeOLLMError",
    "EnvironmentAPIKeys",
    "GeminiAdapter",
    "ImageGenerationResult",
    "InvalidRequestError",
    "LLMDomainService",
    "LLMInfraService",
    "LLMRequestOptions",
    "LLMService",
    "LLMServiceError",
    "LLMServicePort",
    "LLMTimeoutError",
    "Message",
    "MessageFormatter",
    "ModelNotFoundError",
    "OllamaAdapter",
    "Person",
    "PersonLLMConfig",
    "QuotaExceededError",
    "RateLimitError",
    "RateLimits",
    "ServiceUnavailableError",
    "Settings",
    "SettingsError",
    "StaticAPIKeys",
    "StreamChunk",
    "StreamInterruptedError",
    "StructuredOutputError",
    "SystemPromptHandler",
    "TokenCount",
    "TokenUsage",
    "ToolCall",
    "ToolCallDelta",
    "ToolConfig",
    "ToolOutput",
    "ToolType",
    "WebSearchResult",
    "__version__",
    "create_adapter",
]

# Where to look for a name, cheapest first.
_MODULES = (
    "errors",
    "domain",
    "ports",
    "settings",
    "keys",
    "system_prompt_handler",
    "message_formatter",
    "streaming",
    "adapters.base",
    "adapters.factory",
    "service",
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return globals().setdefault(name, version("dipeo-llm"))
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f"dipeo_llm.{module}")).get(name)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
