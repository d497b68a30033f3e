"""The whole call by `litellm.acompletion`, over the pooled client.

For providers without a format here, for `engine="litellm"`, and for a LiteLLM whose
translation no longer fits. LiteLLM's own reading counts; status, headers and the number
of requests come from the wire.
"""

import asyncio
import os
import re
from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

from dipeo_llm import client as http
from dipeo_llm import litellm_import, litellm_providers
from dipeo_llm.adapters.attempt import CompletionAttempt
from dipeo_llm.adapters.base import BaseLLMAdapter, rename_tool
from dipeo_llm.adapters.events import StreamReader
from dipeo_llm.adapters.openai import OpenAIStream, read_chat_completion
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.adapters.reading import JSON, Reading
from dipeo_llm.client import PLACEHOLDER, Client
from dipeo_llm.domain import ChatResult
from dipeo_llm.errors import (
    APIKeyNotFoundError,
    CallError,
    LLMServiceError,
    ServiceUnavailableError,
)
from dipeo_llm.streaming import Items

BEDROCK = Provider(
    name="bedrock",
    litellm="bedrock",
    aliases=("aws",),
    needs_key=False,
    key_variables=("AWS_BEARER_TOKEN_BEDROCK",),
    claims=re.compile(
        r"(?:[a-z]{2,6}(?:-gov)?\.)?(?:anthropic|amazon|meta|cohere|mistral|ai21"
        r"|deepseek)\.[\w.:-]+"
    ),
)
# AWS signs their requests, with a region and credentials of the environment.
_OF_AWS = {
    "bedrock": "bedrock-runtime",
    "sagemaker_chat": "runtime.sagemaker",
    "sagemaker_nova": "runtime.sagemaker",
}
_REGIONS = ("AWS_REGION_NAME", "AWS_REGION", "AWS_DEFAULT_REGION")
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def _find_region() -> str | None:
    return next((os.environ[r] for r in _REGIONS if os.environ.get(r)), None)


# Nobody here knows whether such a provider has the name in the URL's path.
_NOT_IN_A_PATH = re.compile(r"[?#%\\\s]|(^|/)\.\.?(/|$)")


class LiteLLMAdapter(BaseLLMAdapter):
    """Makes calls with `litellm.acompletion`."""

    rows = (BEDROCK,)
    headers = None

    def check_model(self) -> None:
        """Refuse a name that would be more than a name in a URL's path."""
        super().check_model()
        if _NOT_IN_A_PATH.search(self.model_name):
            raise self._invalid_model()

    def _find_base_url(self, given: str | None) -> str:
        """Return the base URL; AWS's follows from the region."""
        host = _OF_AWS.get(self.provider.name)
        if host is None or given or self.provider.name in self.settings.base_urls:
            return super()._find_base_url(given)
        region = _find_region()
        if region is None:
            # LiteLLM would take us-west-2.
            raise self.invalid(f"{self.provider.name} needs a region: set AWS_REGION")
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        return super()._find_base_url(f"https://{host}.{region}.{domain}")

    def _check_key(
        self, api_key: str | SecretStr | None, base_url: str | None
    ) -> SecretStr:
        """Return the key; AWS signs without one, with credentials of the environment.

        Of AWS only Bedrock takes a key.
        """
        key = super()._check_key(api_key, base_url)
        takes_key = self.provider is BEDROCK
        is_signed = self.provider.name in _OF_AWS and not (takes_key and key)
        if is_signed and not all(os.environ.get(name) for name in _CREDENTIALS):
            # boto would ask an address of the machine's network for some.
            key_or = "a key, or " if takes_key else ""
            raise APIKeyNotFoundError(
                f"{self.provider.name} needs {key_or}{' and '.join(_CREDENTIALS)}",
                **self._fields(),
            )
        return key

    async def exchange(self, attempt: CompletionAttempt, client: Client) -> ChatResult:
        """Let LiteLLM make the call, and read its result."""
        response = await self._call(attempt, client)
        self._check_sent(attempt)
        self._log_left_out(attempt)
        return self._make_result(attempt, dict(response.model_dump()))

    async def receive(self, attempt: CompletionAttempt, client: Client) -> Items:
        """Let LiteLLM make the call, and read its chunks.

        LiteLLM takes a stream without its terminator for a whole one, so this engine
        cannot promise that a stream came to its end.
        """
        reader = self.open_reader(attempt)
        names = attempt.prepared.tool_names
        attempt.is_kept = False
        response = None
        try:
            async with asyncio.timeout_at(attempt.due):
                response = await self._call(attempt, client)
            chunks = aiter(response)
            while True:
                async with asyncio.timeout_at(attempt.due):
                    try:
                        chunk = await anext(chunks, None)
                    except Exception as exc:  # noqa: BLE001 - mapped
                        raise self._find_failure(attempt, exc) from None
                if chunk is None:
                    break
                self._check_sent(attempt)
                for item in reader.read_event(chunk.model_dump()):
                    yield rename_tool(item, names) if names else item
        finally:
            # LiteLLM leaves some streams open that are left early.
            if attempt.response is not None:
                attempt.response.close()
            if response is not None:
                await response.aclose()
        reader.read_done()
        body = self._check_stream(attempt, reader)
        self._log_left_out(attempt)
        yield self._make_result(attempt, body)

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read LiteLLM's result, which has the shape of a chat completion."""
        reading = read_chat_completion(body)
        if reading.model is not None:
            # LiteLLM writes its own name of the provider in front of Ollama's models.
            reading.model = reading.model.removeprefix(f"{self.provider.litellm}/")
        return reading

    def stream_reader(self) -> StreamReader:
        """Return a reader of LiteLLM's chunks."""
        return LiteLLMStream()

    def sends(self, attempt: CompletionAttempt, option: str) -> bool:
        """Say whether LiteLLM's table has an option for the model."""
        supported = attempt.litellm.get_supported_openai_params(
            model=self.model_name, custom_llm_provider=self.provider.litellm
        )
        return supported is None or option in supported

    async def _call(self, attempt: CompletionAttempt, client: Client) -> Any:
        """Run `acompletion` in a task of its own.

        LiteLLM makes the coroutine of the call in a thread. If the caller is cancelled
        meanwhile, LiteLLM would drop that coroutine without awaiting it; so the task
        goes on, and the client stops it before it sends.
        """
        task = asyncio.create_task(
            attempt.litellm.acompletion(**self._arguments(attempt, client))
        )
        # Retrieve the exception here: a caller that is cancelled twice does not wait.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if attempt.requests:
                task.cancel()
            attempt.is_abandoned = True
            await asyncio.wait([task])
            raise
        if (failure := task.exception()) is not None:
            raise self._find_failure(attempt, failure) from None
        return task.result()

    def _find_failure(
        self, attempt: CompletionAttempt, exc: BaseException
    ) -> BaseException:
        """Return the failure that the wire showed, instead of LiteLLM's account."""
        if attempt.error is not None:
            return attempt.error
        if attempt.status is not None and attempt.status >= 300:
            return self._refusal(attempt)
        if not isinstance(exc, Exception):
            return exc
        if attempt.is_stream and attempt.status is not None:
            return ServiceUnavailableError(
                f"LiteLLM could not read the stream of {self.provider.name}:"
                f" {self._clean(str(exc))}",
                **self._answer_fields(attempt),
            )
        if attempt.status is not None:
            try:
                self._check_object(attempt)
            except CallError as error:
                return error
            return LLMServiceError(
                f"LiteLLM could not read the answer of {self.provider.name}:"
                f" {self._clean(str(exc))}",
                **self._answer_fields(attempt),
            )
        return self._untranslatable(exc)

    def _check_sent(self, attempt: CompletionAttempt) -> None:
        """Refuse an answer that did not come over our client."""
        if not attempt.requests:
            raise LLMServiceError(
                f"LiteLLM reaches {self.provider.name}'s {self.model_name} through a"
                " client of its own, which has no key",
                **self._fields(),
            )

    def _arguments(self, attempt: CompletionAttempt, client: Client) -> JSON:
        litellm_import.without_reroutes()
        row, prepared = self.provider, attempt.prepared
        if row.client is None:
            raise self.invalid(
                f"LiteLLM reaches {row.name} with a client of its own; use"
                ' engine="auto" or "direct"'
            )
        if row.system_role != "system":
            # LiteLLM turns "developer" into "system" for all but the o-series, and
            # "system" into "user" for some of those.
            attempt.extra_body = {
                "messages": prepared.messages,
                **attempt.request.extra_body,
            }
        self.preparer.teach(attempt.litellm)
        # Of some LiteLLM calls another endpoint; those that speak OpenAI's format it
        # reaches under the name of the config that translates for them.
        name = row.litellm
        if row.speaks_openai:
            name = litellm_providers.describe(attempt.litellm, name).config
        arguments: JSON = {
            "model": f"{name}/{self.model_name}",
            "custom_llm_provider": name,
            "messages": prepared.messages,
            **prepared.options,
            "client": self._sdk_client(client, attempt),
            "timeout": attempt.request.timeout,
            "max_retries": 0,
            "num_retries": 0,
            "drop_params": True,
        }
        if self.endpoint.secret or row.name not in _OF_AWS:
            arguments["api_key"] = PLACEHOLDER
        arguments["api_base"] = self.endpoint.base_url
        if row is BEDROCK:
            # LiteLLM would send to AWS_BEDROCK_RUNTIME_ENDPOINT in spite of `api_base`.
            arguments["aws_bedrock_runtime_endpoint"] = self.endpoint.base_url
        if row.name in _OF_AWS and (region := _find_region()):
            arguments["aws_region_name"] = region
        if attempt.is_stream:
            arguments |= {"stream": True, "stream_options": {"include_usage": True}}
        return arguments

    def _sdk_client(self, client: Client, attempt: CompletionAttempt) -> Any:
        """Return what LiteLLM takes as `client=` for the provider, for one attempt."""
        if self.provider.client == "sdk":
            import openai

            # Its clients are httpx2's from version 3 on.
            library: Any = openai.DefaultAsyncHttpxClient.__mro__[1].__module__
            return openai.AsyncOpenAI(
                api_key=PLACEHOLDER,
                base_url=self.endpoint.base_url,
                http_client=http.httpx_client(
                    client, attempt, library.partition(".")[0]
                ),
                max_retries=0,
            )
        from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

        class Handler(AsyncHTTPHandler):  # type: ignore[misc] # it is Any
            def __del__(self) -> None:
                """Close nothing: the pooled client owns the connections."""

        # The transport in the constructor spares LiteLLM a client of its own; the client
        # that is set afterwards follows no redirect.
        over = http.httpx_client(client, attempt)
        handler = Handler(transport=over._transport)  # noqa: SLF001 - made by us
        handler.client = over
        return handler


class LiteLLMStream(OpenAIStream):
    """LiteLLM's chunks, which give one finish reason for all choices, at the end."""

    @property
    def is_ended(self) -> bool:
        return self._done and any(c["finish_reason"] for c in self._choices.values())
