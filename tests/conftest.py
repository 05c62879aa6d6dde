"""Fixtures that start real servers and make repositories for them."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

from tests.server import COVERAGE_VARIABLES, START_S, Server

ROOT = Path(__file__).parent.parent

# The backend sets this variable before it imports the runtime; some tests import the runtime first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# An example that is slow on a busy machine is not wrong.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
# For a second run of the same tests; pytest's option --hypothesis-profile chooses it.
hypothesis.settings.register_profile("few", hypothesis.settings.get_profile("busy"), max_examples=20)
hypothesis.settings.load_profile("busy")

# A request without a timeout of its own waits as long as tests wait for anything, not httpx's five seconds.
_patience = httpx.Timeout(START_S)
for _part in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, _part, getattr(_patience, _part))

Serve = Callable[..., Server]
MakeChaos = Callable[..., Path]

LONGEST_FIRST = (
    *("test_wheel.py", "backends/torch", "models", "docker", "http/test_fuzz.py", "pool/test_soak.py"),
    *("k8s", "benchmarks", "docs", "release", "test_without_gpu.py", "repository", "observe"),
)
"""The files and folders of tests that take minutes; among several processes they start first.

The tests of the image wait for the wheel, whose tests build it meanwhile.
"""


COVERED = ("http", "pool", "wire")
"""The folders whose tests run under coverage. Elsewhere it would only slow the servers down."""
NOT_COVERED = ("http/access/", "http/test_drain.py", "pool/test_soak.py")
"""Tests in these folders that need none, as those in `…_over_http.py`: those beside them pass each line.

Coverage adds a third to the CPU time of a server's start.
"""


def pytest_configure() -> None:
    """Let servers know SIGHUP, even if `nohup` started the run and has all its children ignore it.

    The garbage collector rests until all tests are found: it would traverse thousands of them, and their
    modules, again and again.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out whatever stays until the end of the run.

    The little garbage among it stays, too: to collect it took each process half a second.
    """
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the tests that take longest if several processes share the tests; measure only some."""

    def rank(item: pytest.Item) -> int:
        path = _path(item)
        return next((rank for rank, start in enumerate(LONGEST_FIRST) if path.startswith(start)), 99)

    if config.getoption("numprocesses", None) or "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=rank)
    if config.pluginmanager.hasplugin("pytest_cov"):
        for item in items:
            if not _is_covered(item):
                item.add_marker("no_cover")


def _path(node: pytest.Item | pytest.Collector) -> str:
    return _below_tests(node.path)


@functools.cache
def _below_tests(path: Path) -> str:
    return str(path.relative_to(ROOT / "tests"))


def _is_covered(node: pytest.Item | pytest.Collector) -> bool:
    path = _path(node)
    return (
        path.startswith(COVERED) and not path.startswith(NOT_COVERED) and not path.endswith("_over_http.py")
    )


@pytest.fixture(scope="module", autouse=True)
def coverage_of_servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the servers of a module run without coverage if its tests do."""
    with pytest.MonkeyPatch.context() as patch:
        if not _is_covered(request.node):
            for name in COVERAGE_VARIABLES:
                patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for measurements, shared by all tests of a process: a bad measurement spreads no further."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def usual_log_level() -> None:
    """Reset the log level: the command `check`, called by a test, hides all lines but errors."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(scope="module")
def server_module(request: pytest.FixtureRequest) -> str:
    """The module to start; a test names another one by an indirect parameter of this name."""
    return str(getattr(request, "param", "inferpool"))


WITHOUT_SPARE = {"TESTS_SPARE_ENGINE": "none"}
"""Variables of all servers that `serve` starts: a spare engine takes half a second of CPU time."""
WITH_SPARE = {"TESTS_SPARE_ENGINE": "usual"}
"""Variables for the servers of tests in which a spare engine plays a part."""

ENGINES = {
    "in-process": {"INFERPOOL_ENGINE": "in-process"},
    "process": {"INFERPOOL_ENGINE": "process", "INFERPOOL_WEB_PROCESSES": "1"},
    "processes": {"INFERPOOL_ENGINE": "process", "INFERPOOL_WEB_PROCESSES": "2"},
}
"""The ways to run a server, as variables. Tests of what may differ take two of them."""

in_both_engines = pytest.mark.parametrize(
    "engine_variables", ["in-process", "process"], indirect=True, scope="module"
)
"""Marks tests whose servers run in one process, and with an engine of its own."""

in_one_and_several_processes = pytest.mark.parametrize(
    "engine_variables", ["in-process", "processes"], indirect=True, scope="module"
)
"""The same, with two web processes, for what these share. The second one costs a second of CPU time."""


@pytest.fixture(scope="module")
def engine_variables(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """The variables of servers; none, and so the usual way, unless a test is marked with one of these."""
    return ENGINES[request.param] if hasattr(request, "param") else {}


@pytest.fixture
def serve(cache_dir: Path, server_module: str, engine_variables: Mapping[str, str]) -> Iterator[Serve]:
    """Start servers: `serve(repository, *flags)`; they are stopped after the test."""
    yield from _serving(cache_dir, server_module, engine_variables)


@pytest.fixture(scope="module")
def module_serve(cache_dir: Path, server_module: str, engine_variables: Mapping[str, str]) -> Iterator[Serve]:
    """Start servers as `serve` does; they are stopped after the last test of the module.

    A start costs a second of CPU time, or two with `--engine process`. Tests that leave a server as they
    found it share one.
    """
    yield from _serving(cache_dir, server_module, engine_variables)


def _serving(cache_dir: Path, server_module: str, engine_variables: Mapping[str, str]) -> Iterator[Serve]:
    servers: list[Server] = []

    def start(repository: Path, *flags: str, wait: bool = True, **environ: str) -> Server:
        own = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200", **WITHOUT_SPARE}
        server = Server(repository, flags, {**own, **engine_variables, **environ}, server_module)
        servers.append(server)
        if wait:
            server.wait_loaded()
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder `models` as it is in the repository, without files that were built later."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    target = tmp_path_factory.mktemp("bundled") / "models"

    def built(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(ROOT)
        return [name for name in names if name == "__pycache__" or str(inside / name) in ignored]

    shutil.copytree(ROOT / "models", target, ignore=built)
    return target


@pytest.fixture(scope="session")
def bundled_servers() -> Iterator[dict[tuple[str, ...], Server]]:
    """The servers that `bundled` has started."""
    servers: dict[tuple[str, ...], Server] = {}
    yield servers
    for server in servers.values():
        server.kill()


@pytest.fixture(scope="module")
def bundled(
    models: Path, cache_dir: Path, server_module: str, bundled_servers: dict[tuple[str, ...], Server]
) -> Server:
    """A server of the models that come with the project, for all modules: leave it as you find it."""
    variables = (os.environ.get(name, "") for name in COVERAGE_VARIABLES)
    key = (server_module, *variables)
    if key not in bundled_servers:
        environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
        server = Server(models, (), environ, server_module)
        bundled_servers[key] = server
        server.wait_loaded()
    return bundled_servers[key]


@pytest.fixture
def make_chaos(tmp_path: Path) -> MakeChaos:
    """Write a model of the misbehaving backend: `make_chaos("name", run_ms=5, config="…")`."""
    return chaos_in(tmp_path / "repository")


@pytest.fixture(scope="module")
def module_make_chaos(tmp_path_factory: pytest.TempPathFactory) -> MakeChaos:
    """Write models as `make_chaos` does, for a server of `module_serve`."""
    return chaos_in(tmp_path_factory.mktemp("repository"))


def chaos_in(repository: Path) -> MakeChaos:
    """Return a function that writes models into `repository`, as `make_chaos` does."""

    def make(name: str, config: str = "", **settings: Any) -> Path:
        folder = repository / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.chaos").write_text(json.dumps(settings))
        (folder.parent / "model.toml").write_text(config)
        return repository

    return make
