"""What is worth another try, and when. Pure, but for the clock that it is given.

The only place that decides on a retry: LiteLLM and the SDKs below it are told to make
none. stamina drives the loop and sleeps; this module answers its question.
"""

import math
import time
from collections.abc import Callable

from dipeo_llm.errors import DiPeOLLMError, LLMTimeoutError
from dipeo_llm.settings import Settings


class RetryDecision:
    """Answers stamina's question after each failed attempt of one call.

    Args:
        settings: The waits and their limits.
        deadline: When the whole call must be over, on *clock*.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        settings: Settings,
        deadline: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._deadline = deadline
        self._clock = clock

    def __call__(self, error: Exception) -> bool | float:
        """Return False to give up, True to back off, or the seconds to wait.

        A wait that the provider asks for and that is longer than `retry_after_max`, or
        than what is left of the deadline, ends the call at once: the error says in
        `retry_after` when to come back.
        """
        if not getattr(error, "retryable", False):
            return False
        wait = getattr(error, "retry_after", None)
        if self._deadline - self._clock() <= (wait or 0.0):
            return False
        if wait is None:
            return True
        return False if wait > self._settings.retry_after_max else float(wait)


def past_deadline(
    deadline: float, last: DiPeOLLMError | None, *, service: str, model: str
) -> LLMTimeoutError:
    """Make the error for a call whose deadline has passed.

    Args:
        deadline: Its length in seconds.
        last: What the attempt before it failed with, if there was one.
        service: The provider.
        model: The model.
    """
    after = f"; the attempt before failed with: {last}" if last else ""
    return LLMTimeoutError(
        f"{service} did not answer within the deadline of {deadline:g} s{after}",
        service=service,
        model=model,
        retryable=False,
    )
