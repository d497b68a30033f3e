"""The log of calls: one INFO record after each call, one WARNING before each retry.

On the logger `dipeo_llm.calls`, as text and as `extra`. Holds what a `CallRecord` holds,
so no prompt and no key.
"""

import logging

from dipeo_llm.errors import DiPeOLLMError
from dipeo_llm.progress import CallProgress
from dipeo_llm.record import CallRecord

_log = logging.getLogger("dipeo_llm.calls")


def log_call(record: CallRecord) -> None:
    """Log a call that has ended."""
    if not _log.isEnabledFor(logging.INFO):
        return
    usage = record.usage
    _log.info(
        "%s",
        _describe(record),
        extra={
            "provider": record.service,
            "model": record.model,
            "status": record.status,
            "error": record.error,
            "status_code": record.status_code,
            "seconds": round(record.duration, 6),
            "tokens": usage.model_dump() if usage else None,
            "is_usage_partial": record.is_usage_partial,
            "cost_usd": record.cost_usd,
            "attempts": record.requests,
            "finish_reason": record.finish_reason,
            "request_id": record.request_id,
            "cached": record.cached,
            "route": record.route,
            "deployment": record.deployment,
            "person_id": record.person_id,
            "labels": dict(record.labels),
        },
    )


def log_retry(
    progress: CallProgress, error: DiPeOLLMError, wait: float | None, attempts: int
) -> None:
    """Log that a failed attempt is followed by another.

    Args:
        progress: The call.
        error: The failure of the attempt.
        wait: Seconds before the next attempt; None if it goes to another deployment.
        attempts: Most attempts of the call.
    """
    status = getattr(error, "status_code", None)
    reason = type(error).__name__ if status in {None, 200} else str(status)
    following = (
        "another deployment" if wait is None else f"next attempt in {wait:.1f} s"
    )
    _log.warning(
        "%s: %s, %s (%d of %d)",
        _name(progress.service, progress.model),
        reason,
        following,
        progress.attempts + 1,
        attempts,
        extra={
            "provider": progress.service,
            "model": progress.model,
            "error": type(error).__name__,
            "status_code": status,
            "wait": wait or 0.0,
            "deployment": progress.deployment,
            "attempt": progress.attempts + 1,
        },
    )


def _describe(record: CallRecord) -> str:
    """Return a call as one line."""
    outcome: str = record.status
    if record.status == "error":
        status = f" {record.status_code}" if record.status_code else ""
        outcome = f"{record.error}{status}"
    elif record.cached:
        outcome = "ok from the cache"
    said = [
        f"{_name(record.service, record.model)}: {outcome} in {record.duration:.2f} s",
        _describe_usage(record),
        "unknown cost" if record.cost_usd is None else f"${record.cost_usd:.6f}",
        f"{record.requests} attempt{'' if record.requests == 1 else 's'}",
    ]
    about = {
        "route": record.route,
        "deployment": record.deployment,
        "finish": record.finish_reason,
        "request": record.request_id,
        "person": record.person_id,
        **record.labels,
    }
    said += [f"{name} {_word(value)}" for name, value in about.items() if value]
    return ", ".join(said)


def _describe_usage(record: CallRecord) -> str:
    if record.usage is None:
        return "unknown tokens"
    written = "unknown" if record.is_usage_partial else record.usage.output
    return f"{record.usage.input} + {written} tokens"


def _name(service: str | None, model: str) -> str:
    return "/".join(_word(part) for part in (service, model) if part)


def _word(text: str) -> str:
    """Return a text as it is, or quoted if it could be taken for another line."""
    return text if text.isprintable() else ascii(text)
