"""The examples of docs/scaling.md: the workers of an engine share answers through Redis."""

import asyncio
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.provider_server import Answer, ProviderServer
from tests.redis_server import RedisServer, needs_redis

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = needs_redis


@pytest.mark.parametrize(
    ("engine", "package"), [("dask", "distributed"), ("ray", "ray")]
)
async def test_workers_share_answers(
    server: ProviderServer, tmp_path: Path, engine: str, package: str
) -> None:
    """300 lines with 50 questions are 50 calls, whichever worker asks; again, none."""
    if find_spec(package) is None:
        pytest.skip(f"needs {package}: nox -s scaling")
    server.default = lambda r: Answer(r.json["messages"][-1]["content"], delay=0.05)
    questions = tmp_path / "questions.txt"
    await asyncio.to_thread(
        questions.write_text, "".join(f"question {n % 50}\n" for n in range(300))
    )
    with RedisServer(tmp_path) as redis_server:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OPENAI_API_KEY": "sk-openai",
            "DIPEO_LLM_OPENAI_BASE_URL": server.base_url("openai"),
            # On a busy machine half a second may pass, and a call goes on without Redis.
            "DIPEO_LLM_CACHE_URL": f"{redis_server.url}?timeout=30",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for calls in (50, 50):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(EXAMPLES / f"scale_with_{engine}.py"),
                *(str(questions), "gpt-4.1-nano"),
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                cwd=tmp_path,
            )
            said, _ = await process.communicate()
            assert said.decode().startswith("300 answered, 0 failed")
            assert len(server.requests) == calls
