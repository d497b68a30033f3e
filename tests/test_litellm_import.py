"""What LiteLLM's import must leave alone, each in a process of its own."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HEAD = """
import asyncio, copy, gc, logging, os, sys, threading, weakref
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
        # Not httpx: LiteLLM raises its level during the import.
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
    assert not any(task.done() for task in waiting), "the executor was blocked"
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
    assert gone() is None, "the import keeps older garbage"
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
LOGGERS = """
async def main():
    def settings(logger):
        return logger.level, logger.handlers, logger.filters, logger.propagate, logger.disabled
    others = [logging.getLogger()]
    for name in ("asyncio", "backoff", "httpx", "uvicorn.access", "uvicorn.error"):
        others.append(logging.getLogger(name))
    for name in ("apscheduler.scheduler", "apscheduler.executors.default"):
        others.append(logging.getLogger(name))
    logging.getLogger("apscheduler.scheduler").setLevel(logging.DEBUG)
    logging.getLogger("LiteLLM Router").setLevel(logging.DEBUG)
    mine = logging.Filter("uvicorn")
    logging.getLogger("uvicorn.error").addFilter(mine)
    before = [copy.copy(settings(logger)) for logger in others]
    await load_litellm()
    assert [settings(logger) for logger in others] == before
    assert logging.getLogger("uvicorn.error").filters == [mine]
    assert logging.getLogger("LiteLLM").level == logging.WARNING
    assert logging.getLogger("LiteLLM Router").level == logging.DEBUG, "the application's"
"""
QUIET = """
async def main():
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    litellm = await load_litellm()
    from dipeo_llm.litellm_tables import infer_provider
    assert infer_provider("a-model-of-nobody") is None
    litellm.get_optional_params(
        model="dipeo-llm-probe", custom_llm_provider="ollama_chat", temperature=1
    )
"""
HOOKS = """
async def main():
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    os.environ["JSON_LOGS"] = "true"
    await load_litellm()
    assert hooks == (sys.excepthook, threading.excepthook, sys.unraisablehook)
    assert os.environ["JSON_LOGS"] == "true"
"""
RUN = "\nasyncio.run(main())\n"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(LOGS, id="other threads may log during the import"),
        pytest.param(LOGGERS, id="the loggers of other packages are unchanged"),
        pytest.param(QUIET, id="LiteLLM's own loggers do not write at INFO"),
        pytest.param(HOOKS, id="the hooks for exceptions are unchanged"),
        pytest.param(THREADS, id="the event loop's executor stays free"),
        pytest.param(GARBAGE, id="older garbage is collected"),
        pytest.param(ENVIRONMENT, id="a client waits for the environment"),
    ],
)
async def test_the_import_disturbs_nobody(program: str, tmp_path: Path) -> None:
    """The program succeeds and prints nothing."""
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
