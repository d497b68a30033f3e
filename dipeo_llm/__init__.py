"""dipeo_llm: one call for OpenAI, Anthropic, Google Gemini and Ollama.

Each name is imported on first use: `import dipeo_llm` takes a few milliseconds, and
LiteLLM, which takes seconds, is imported by the first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipeo_llm.adapters.base import BaseLLMAdapter as BaseLLMAdapter
    from dipeo_llm.adapters.claude import ClaudeAdapter as ClaudeAdapter
    from dipeo_llm.adapters.factory import create_adapter as create_adapter
    from dipeo_llm.adapters.gemini import GeminiAdapter as GeminiAdapter
    from dipeo_llm.adapters.ollama import OllamaAdapter as OllamaAdapter
    from dipeo_llm.adapters.openai import ChatGPTAdapter as ChatGPTAdapter
    from dipeo_llm.domain import (
        CallOptions as CallOptions,
        Capabilities as Capabilities,
        ChatRequest as ChatRequest,
        ChatResult as ChatResult,
        ImageGenerationResult as ImageGenerationResult,
        LLMRequestOptions as LLMRequestOptions,
        LLMService as LLMService,
        Message as Message,
        Person as Person,
        PersonLLMConfig as PersonLLMConfig,
        RateLimits as RateLimits,
        StreamChunk as StreamChunk,
        TokenCount as TokenCount,
        TokenUsage as TokenUsage,
        ToolCall as ToolCall,
        ToolCallDelta as ToolCallDelta,
        ToolConfig as ToolConfig,
        ToolOutput as ToolOutput,
        ToolType as ToolType,
        WebSearchResult as WebSearchResult,
    )
    from dipeo_llm.errors import (
        APIKeyError as APIKeyError,
        APIKeyNotFoundError as APIKeyNotFoundError,
        CacheMissError as CacheMissError,
        CallError as CallError,
        ContentFilterError as ContentFilterError,
        ContextWindowError as ContextWindowError,
        DiPeOLLMError as DiPeOLLMError,
        InvalidRequestError as InvalidRequestError,
        LLMServiceError as LLMServiceError,
        LLMTimeoutError as LLMTimeoutError,
        ModelNotFoundError as ModelNotFoundError,
        QuotaExceededError as QuotaExceededError,
        RateLimitError as RateLimitError,
        ServiceUnavailableError as ServiceUnavailableError,
        SettingsError as SettingsError,
        StreamInterruptedError as StreamInterruptedError,
        StructuredOutputError as StructuredOutputError,
    )
    from dipeo_llm.keys import (
        EnvironmentAPIKeys as EnvironmentAPIKeys,
        StaticAPIKeys as StaticAPIKeys,
    )
    from dipeo_llm.ledger import Usage as Usage, UsageTotals as UsageTotals
    from dipeo_llm.message_formatter import MessageFormatter as MessageFormatter
    from dipeo_llm.ports import (
        APIKeyPort as APIKeyPort,
        APIKeyRecord as APIKeyRecord,
        LLMDomainService as LLMDomainService,
        LLMServicePort as LLMServicePort,
    )
    from dipeo_llm.record import (
        AttemptRecord as AttemptRecord,
        CallRecord as CallRecord,
    )
    from dipeo_llm.routes import (
        Deployment as Deployment,
        Route as Route,
        Routes as Routes,
    )
    from dipeo_llm.routing import (
        DeploymentHealth as DeploymentHealth,
        RouteHealth as RouteHealth,
    )
    from dipeo_llm.service import LLMInfraService as LLMInfraService
    from dipeo_llm.settings import Settings as Settings
    from dipeo_llm.streaming import ChatStream as ChatStream
    from dipeo_llm.system_prompt_handler import (
        SystemPromptHandler as SystemPromptHandler,
    )

_MODULES = {
    "adapters.base": "BaseLLMAdapter",
    "adapters.claude": "ClaudeAdapter",
    "adapters.factory": "create_adapter",
    "adapters.gemini": "GeminiAdapter",
    "adapters.ollama": "OllamaAdapter",
    "adapters.openai": "ChatGPTAdapter",
    "domain": (
        "CallOptions Capabilities ChatRequest ChatResult ImageGenerationResult "
        "LLMRequestOptions LLMService Message Person PersonLLMConfig RateLimits "
        "StreamChunk TokenCount TokenUsage ToolCall ToolCallDelta ToolConfig "
        "ToolOutput ToolType WebSearchResult"
    ),
    "errors": (
        "APIKeyError APIKeyNotFoundError CacheMissError CallError ContentFilterError "
        "ContextWindowError DiPeOLLMError InvalidRequestError LLMServiceError "
        "LLMTimeoutError ModelNotFoundError QuotaExceededError RateLimitError "
        "ServiceUnavailableError SettingsError StreamInterruptedError "
        "StructuredOutputError"
    ),
    "keys": "EnvironmentAPIKeys StaticAPIKeys",
    "ledger": "Usage UsageTotals",
    "message_formatter": "MessageFormatter",
    "ports": "APIKeyPort APIKeyRecord LLMDomainService LLMServicePort",
    "record": "AttemptRecord CallRecord",
    "routes": "Deployment Route Routes",
    "routing": "DeploymentHealth RouteHealth",
    "service": "LLMInfraService",
    "settings": "Settings",
    "streaming": "ChatStream",
    "system_prompt_handler": "SystemPromptHandler",
}
"""The public names of each module; a test holds them equal to the imports above."""

_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted([*_HOMES, "__version__"])  # noqa: PLE0605 - type checkers read the imports


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("dipeo-llm")
    elif name in _HOMES:
        value = getattr(import_module(f"dipeo_llm.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
