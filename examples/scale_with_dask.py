"""Answer a file of questions on many machines: Dask spreads them, Redis shares answers.

    pip install "dipeo-llm[redis]" dask distributed
    export OPENAI_API_KEY=… DIPEO_LLM_CACHE_URL=redis://cache.example:6379/0
    python examples/scale_with_dask.py questions.txt gpt-4.1-nano tcp://scheduler:8786

Without the scheduler's address it starts two worker processes on this machine. Each
worker answers a part of the lines with `complete_many`. The workers share the cache, so a
question that comes in several parts is paid for once, and a part that Dask runs again
after a worker has died finds the answers that were there.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dipeo_llm import EnvironmentAPIKeys, LLMInfraService

PART = 100
"""Lines that a worker answers at a time."""


async def answer(questions: Sequence[str], model: str) -> list[dict[str, Any]]:
    """Answer the questions of one part; an error is a row, not an exception."""
    async with LLMInfraService(EnvironmentAPIKeys()) as service:
        provider = await service.get_provider_for_model(model)
        requests = (
            {
                "messages": [{"role": "user", "content": question}],
                "model": model,
                "api_key_id": provider,
                # Equal questions are one: without it, `complete_many` samples.
                "sample": 0,
            }
            for question in questions
        )
        rows = []
        async with service.complete_many(requests, concurrency=20) as batch:
            async for item in batch:
                row: dict[str, Any] = {"question": questions[item.index]}
                if item.result is None:
                    row["error"] = str(item.error)
                else:
                    row["answer"] = item.result.text
                    row["cost_usd"] = item.result.cost_usd
                rows.append(row)
        return rows


def answer_part(questions: Sequence[str], model: str) -> list[dict[str, Any]]:
    """Run in a worker, which calls plain functions."""
    return asyncio.run(answer(questions, model))


def parts(lines: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut the lines into parts."""
    for start in range(0, len(lines), PART):
        yield lines[start : start + PART]


def main(path: str, model: str, scheduler: str | None = None) -> None:
    """Answer every line of a file and print what it came to."""
    from distributed import Client, LocalCluster

    lines = [line for line in Path(path).read_text("utf-8").split("\n") if line]
    cluster = scheduler or LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    )
    with Client(cluster) as client:
        # `pure=False`: the same part may have another answer another time.
        done = client.map(answer_part, list(parts(lines)), model=model, pure=False)
        rows = [row for part in client.gather(done) for row in part]
    if not isinstance(cluster, str):
        cluster.close()
    failed = sum("error" in row for row in rows)
    cost = sum(row.get("cost_usd") or 0.0 for row in rows)
    print(f"{len(rows) - failed} answered, {failed} failed, {cost:.6f} USD")


if __name__ == "__main__":
    main(*sys.argv[1:])
