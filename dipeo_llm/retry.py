"""Whether a failed attempt is retried, and after how long.

The only retry policy: LiteLLM and the SDKs below it get 0 retries. The service runs the
loop and sleeps. stamina would run it too, but only with its global hooks, which are the
application's to set and print a bare "stamina.retry_scheduled" by default; so of stamina
only the switches that turn retries off and end the waits in tests are used.
"""

import random

from dipeo_llm.call_log import log_retry
from dipeo_llm.errors import CallError, DiPeOLLMError, InvalidRequestError
from dipeo_llm.progress import CallProgress
from dipeo_llm.settings import Settings


class RetryPolicy:
    """Decides, after each failed attempt of one call, whether to make another and when.

    Args:
        settings: The number of attempts, the waits and their limits.
        progress: Counts the attempts, and knows the deadline.
    """

    def __init__(self, settings: Settings, progress: CallProgress) -> None:
        self._settings = settings
        self._progress = progress

    def next_wait(
        self, error: DiPeOLLMError, *, is_elsewhere: bool = False
    ) -> float | None:
        """Note a failed attempt, and return the seconds to wait before the next.

        Args:
            error: The failure.
            is_elsewhere: Whether the next attempt goes to another deployment, at once
                and after an error that is not retryable too.

        Returns None to give up. A wait that the provider asks for and that is longer
        than `retry_after_max`, or than the rest of the deadline, ends the call at once:
        the error says in `retry_after` when to come back.
        """
        progress = self._progress
        has_begun = progress.end_attempt(error)
        if isinstance(error, CallError):
            was_refused = isinstance(error, InvalidRequestError)
            if has_begun and was_refused and not error.status_code:
                progress.attempts -= 1  # nothing was sent
            error.attempts = progress.attempts
        wait = self._decide(error, is_elsewhere=is_elsewhere)
        if wait is None:
            progress.last = None
            return None
        progress.retry(error, wait)
        most = self._settings.max_retries + 1
        log_retry(progress, error, None if is_elsewhere else wait, most)
        return wait

    def _decide(self, error: DiPeOLLMError, *, is_elsewhere: bool) -> float | None:
        settings, progress = self._settings, self._progress
        if progress.attempts > settings.max_retries:
            return None
        asked: float | None = getattr(error, "retry_after", None)
        if not is_elsewhere:
            if not getattr(error, "retryable", False):
                return None
            if progress.left() <= (asked or 0.0):
                return None
            if asked is not None and asked > settings.retry_after_max:
                return None
        # Imported by the first failure, because the import takes 25 ms.
        import stamina

        # Inactive, it is as with `max_retries=0`.
        if progress.attempts and not stamina.is_active():
            return None
        if is_elsewhere or stamina.is_testing():
            return 0.0
        return float(asked) if asked is not None else self._backoff()

    def _backoff(self) -> float:
        """Return the wait where the provider asks for none: doubled each time."""
        first, longest = self._settings.retry_wait, self._settings.retry_wait_max
        # 2 ** 64 times any wait is longer than any limit, and is still a float.
        before = max(self._progress.attempts - 1, 0)
        grown = first * 2.0 ** min(before, 64)
        jitter = random.uniform(0, first)  # noqa: S311 - nothing is secret about it
        return min(longest, grown + jitter)
