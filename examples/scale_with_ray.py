"""Answer a file of questions on many machines: Ray Data spreads them, Redis shares answers.

    pip install "dipeo-llm[redis]" "ray[data]"
    export OPENAI_API_KEY=… DIPEO_LLM_CACHE_URL=redis://cache.example:6379/0
    python examples/scale_with_ray.py questions.txt gpt-4.1-nano

It runs on the cluster that RAY_ADDRESS names, otherwise on this machine. The workers share
the cache, so a question that comes in several batches is paid for once, and a batch that
Ray runs again after a worker has died finds the answers that were there.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dipeo_llm import EnvironmentAPIKeys, LLMInfraService

PART = 100
"""Lines that a worker answers at a time."""


async def answer(questions: Sequence[str], model: str) -> dict[str, list[Any]]:
    """Answer the questions of one batch; an error is a value, not an exception."""
    answered: dict[str, list[Any]] = {"answer": [], "error": [], "cost_usd": []}
    async with LLMInfraService(EnvironmentAPIKeys()) as service:
        provider = await service.get_provider_for_model(model)
        requests = (
            {
                "messages": [{"role": "user", "content": str(question)}],
                "model": model,
                "api_key_id": provider,
                # Equal questions are one: without it, `complete_many` samples.
                "sample": 0,
            }
            for question in questions
        )
        async with service.complete_many(requests, concurrency=20) as batch:
            async for item in batch:
                result = item.result
                answered["answer"].append(result.text if result else "")
                answered["error"].append(str(item.error or ""))
                answered["cost_usd"].append((result and result.cost_usd) or 0.0)
    return {"question": list(questions), **answered}


def answer_batch(batch: dict[str, Any], model: str) -> dict[str, list[Any]]:
    """Run in a worker, which calls plain functions."""
    return asyncio.run(answer(batch["item"], model))


def main(path: str, model: str) -> None:
    """Answer every line of a file and print what it came to."""
    import ray

    lines = [line for line in Path(path).read_text("utf-8").split("\n") if line]
    ray.init(include_dashboard=False, log_to_driver=False)
    # By itself Ray would make 200 blocks, and open a service for each.
    data = ray.data.from_items(lines, override_num_blocks=-(-len(lines) // PART))
    done = data.map_batches(answer_batch, batch_size=None, fn_kwargs={"model": model})
    rows = done.take_all()
    failed = sum(bool(row["error"]) for row in rows)
    cost = sum(row["cost_usd"] for row in rows)
    print(f"{len(rows) - failed} answered, {failed} failed, {cost:.6f} USD")


if __name__ == "__main__":
    main(*sys.argv[1:])
