"""LiteLLM's import: what it must not disturb, each in a process of its own."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HEAD = """
import asyncio, gc, logging, os, sys, weakref
from concurrent.futures import ThreadPoolExecutor
from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys
from dipeo_llm.litellm_import import load_litellm
"""
LOGS = """
async def main():
    said = []
    class Keep(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
    for name in ("uvicorn.error", "uvicorn.access", "asyncio", "httpx", "mine"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).addHandler(Keep())
    loading = asyncio.create_task(load_litellm())
    lines = 0
    while not loading.done():
        # Not httpx, which LiteLLM makes say less for as long.
        for name in ("uvicorn.error", "asyncio", "mine"):
            logging.getLogger(name).info("line")
            lines += 1
        logging.getLogger("uvicorn.access").info(
            '%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "GET", "/", "1.1", 200
        )
        await asyncio.sleep(0.01)
    await loading
    assert said.count("line") == lines > 40, (said.count("line"), lines)
"""
THREADS = """
async def main():
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    waiting = [asyncio.create_task(load_litellm()) for _ in range(50)]
    await asyncio.sleep(0)
    await asyncio.to_thread(lambda: None)
    assert not any(task.done() for task in waiting), "the import was waited for"
    waiting[0].cancel()
    modules = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(modules[0], asyncio.CancelledError), modules[0]
    assert len(set(modules[1:])) == 1
"""
GARBAGE = """
class Node:
    pass
async def main():
    node = Node()
    node.itself = node
    gone = weakref.ref(node)
    gc.disable()
    del node
    await load_litellm()
    gc.collect()
    assert gone() is None, "what was garbage before the import is kept for good"
"""
ENVIRONMENT = """
async def main():
    before = dict(os.environ)
    settings = Settings(max_retries=0, base_urls={"openai": "http://provider.invalid/v1"})
    service = LLMInfraService(StaticAPIKeys({"openai": "k"}), settings=settings)
    async with service:
        loading = asyncio.create_task(load_litellm())
        while "HTTP_PROXY" in os.environ:
            await asyncio.sleep(0.001)
        try:
            await service.validate_api_key("openai")
        except Exception as exc:
            assert "127.0.0.1" in str(exc), exc
        await loading
    changed = {k for k in {*before, *os.environ} if before.get(k) != os.environ.get(k)}
    assert changed == {"LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS"}, changed
"""
RUN = "\nasyncio.run(main())\n"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(LOGS, id="a line that is logged meanwhile is logged"),
        pytest.param(THREADS, id="the loop's own threads stay free"),
        pytest.param(GARBAGE, id="garbage of before is collected"),
        pytest.param(ENVIRONMENT, id="a client waits until the environment is back"),
    ],
)
async def test_the_import_disturbs_nobody(program: str, tmp_path: Path) -> None:
    """The program ends well, and says nothing."""
    usual = ("PATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
    env = {name: os.environ[name] for name in usual if name in os.environ}
    env |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    env |= {"HTTP_PROXY": "http://127.0.0.1:9"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HEAD + program + RUN,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()

    assert (process.returncode, out.decode(), err.decode()) == (0, "", "")
