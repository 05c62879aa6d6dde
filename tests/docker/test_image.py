"""The image for CPUs, built and run by podman: small, confined, sized by its CPU, and drained by SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from inferpool import __version__
from onnx import TensorProto, helper, numpy_helper

from tests.clients import Client, Reply, with_clients
from tests.conftest import Serve
from tests.docker import images
from tests.docker.containers import CONFINED, Container, run_once
from tests.onnx_models import write_model

ROOT = Path(__file__).parents[2]
MISSING = images.missing()
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"images are built with {MISSING}, which is not here"),
    # The first test of them waits for the build.
    pytest.mark.timeout(600),
]

WIDTH = 1024
RUN_STEPS = 200
Run = Callable[..., Container]


@pytest.fixture(scope="session")
def base() -> str:
    return images.build_base()


@pytest.fixture(scope="session")
def image(base: str) -> str:
    return images.build("cpu", base)


@pytest.fixture
def run(image: str) -> Iterator[Run]:
    """Start containers: `run(repository, *flags)`; they are gone after the test."""
    started: list[Container] = []

    def start(repository: Path | None, *flags: str, **environ: str) -> Container:
        options = [f"--env={name}={value}" for name, value in environ.items()]
        started.append(Container(image, repository, options, flags))
        return started[-1]

    yield start
    for container in started:
        container.kill()


def write_slow(repository: Path) -> Path:
    """A model that gives its rows of `WIDTH` numbers back after some tens of milliseconds; never batched."""
    names = ["x", *(f"step{n}" for n in range(1, RUN_STEPS)), "y"]
    eye = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "eye")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", [a, "eye"], [b]) for a, b in pairwise(names)],
        "slow",
        [value("x", TensorProto.FLOAT, ["rows", WIDTH])],
        [value("y", TensorProto.FLOAT, ["rows", WIDTH])],
        [eye],
    )
    write_model(repository, "slow", graph)
    (repository / "slow" / "model.toml").write_text("[batching]\nenabled = false\n")
    # The tests' temporary folders are for their owner alone, which the user in the container is not.
    repository.chmod(0o755)
    return repository


def test_the_models_of_a_volume_answer(run: Run) -> None:
    """Read-only, without capabilities or a writable folder, the bundled models load and are right."""
    container = run(ROOT / "models")
    container.wait_loaded()
    assert container.get("/health").json()["status"] == "ok"
    picture = (ROOT / "models" / "digits" / "samples" / "7.png").read_bytes()
    for sent in (
        {"content": picture, "headers": {"Content-Type": "image/png"}},
        {"files": {"image": ("7.png", picture, "image/png")}},
    ):
        answer = container.post("/predict/digits", **sent)
        assert answer.status_code == 200
        assert answer.json()["predictions"][0][0]["label"] == "7"


def test_it_runs_as_nobody_in_particular(run: Run) -> None:
    """tini and the server are user 10001 and hold no capability, and the file system takes nothing."""
    container = run(ROOT / "models")
    container.wait_loaded()
    processes = container.processes()
    assert [process["Name"] for process in processes] == ["tini", "inferpool"]
    for process in processes:
        assert process["Uid"].split() == ["10001"] * 4
        assert process["Gid"].split() == ["10001"] * 4
        assert int(process["CapEff"], 16) == int(process["CapBnd"], 16) == 0
        assert process["NoNewPrivs"] == "1"
    assert any("measurements are not kept" in line["message"] for line in container.log)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs a second core to keep from it")
def test_threads_are_those_of_the_quota(run: Run, serve: Serve) -> None:
    """Given one of several cores, a run has one thread; the same server outside takes them all."""
    container = run(ROOT / "models", INFERPOOL_MEASURE_MS="0")
    outside = serve(ROOT / "models", "--measure-ms", "0")
    container.wait_loaded()
    threads = [server.get("/models/digits/1").json()["threads"] for server in (container, outside)]
    assert threads == [1, len(os.sched_getaffinity(0))]


def test_measurements_are_kept_in_a_volume(image: str, tmp_path: Path) -> None:
    """A folder mounted at /cache holds what was measured, for the next container."""
    tmp_path.chmod(0o777)
    options = [f"--volume={tmp_path}:/cache", "--env=INFERPOOL_MEASURE_MS=200"]
    container = Container(image, ROOT / "models", options)
    try:
        container.wait_loaded()
    finally:
        container.kill()
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} >= {"diabetes", "digits"}


def test_the_healthcheck_follows_readiness(run: Run) -> None:
    """It passes where the models can answer, and fails where a required one cannot."""
    container = run(ROOT / "models")
    container.wait_loaded()
    assert container.healthcheck() == 0
    assert container.inspect("{{.State.Health.Status}}") == "healthy"
    without = run(ROOT / "models", INFERPOOL_REQUIRED_MODELS="absent")
    without.wait_loaded()
    assert without.healthcheck() == 1


def test_sigterm_drains(run: Run, tmp_path: Path) -> None:
    """What was accepted when `docker stop` came is answered, and the exit status is 0."""
    container = run(write_slow(tmp_path), "--measure-ms", "0")
    container.wait_loaded()
    count = 24
    replies: dict[int, Reply] = {}

    async def ask(client: Client, number: int) -> None:
        body = json.dumps({"inputs": [[float(number)] * WIDTH]}).encode()
        replies[number] = await client.post("/predict/slow", body)

    async def scenario() -> int:
        work = asyncio.create_task(with_clients(container.port, count, ask))
        # One runs, the others wait.
        while await asyncio.to_thread(container.metric, "queue_rows", model="slow") < count / 2:
            assert not work.done()
        stop = asyncio.create_task(asyncio.to_thread(container.stop))
        await asyncio.to_thread(container.wait_for, "draining")
        assert len(replies) < count, "all were answered before the signal came"
        await work
        return await stop

    assert asyncio.run(scenario()) == 0
    for number, reply in replies.items():
        assert reply.status == 200
        assert json.loads(reply.body)["outputs"]["y"] == [[float(number)] * WIDTH]


def test_a_server_that_still_starts_can_be_stopped(image: str) -> None:
    """SIGTERM ends it at once before it handles signals itself, which process 1 would not."""
    [entrypoint] = json.loads(
        images.podman("image", "inspect", "--format={{json .Config.Entrypoint}}", image)
    )[:1]
    name = f"inferpool-start-{os.getpid()}"
    # In the place of a server that has not got as far as to handle signals.
    command = json.dumps([entrypoint, "--", "sleep", "60"])
    images.podman("run", "--detach", f"--name={name}", *CONFINED, f"--entrypoint={command}", image)
    try:
        images.podman("stop", "--time=30", name)
        assert images.podman("wait", name) == "143"
    finally:
        images.podman("rm", "--force", "--time=0", name)


def test_models_can_be_baked_in(base: str) -> None:
    """`--build-arg MODELS=models` needs no volume."""
    container = Container(images.build("cpu", base, "models"), None)
    try:
        container.wait_loaded()
        assert container.get("/health/ready").status_code == 200
    finally:
        container.kill()


def test_there_is_no_compiler_and_only_what_is_pinned(image: str) -> None:
    """Neither compilers nor pip's leftovers: exactly the packages of the lock and the server itself."""
    found = run_once(image, "sh", "-c", "command -v cc c++ gcc g++ clang ld as make || true")
    assert found == ""
    script = "from importlib.metadata import *; print(*(f'{d.name}=={d.version}' for d in distributions()))"
    listed = run_once(image, "/opt/inferpool/bin/python3", "-c", script)
    installed = set(listed.lower().replace("_", "-").split())
    lock = (ROOT / "docker" / "requirements-cpu.txt").read_text()
    pinned = set(re.findall(r"^[\w.-]+==[\w.]+", lock, re.MULTILINE))
    assert installed - pinned == {f"inferpool=={__version__}"}
    assert len(installed) > 10


def test_its_hot_path_is_compiled(image: str) -> None:
    script = (
        "import inferpool.observe.build_info as info, inferpool.pool.entry_queue as queue;"
        " print(info.hot_path(), queue.__file__)"
    )
    said = run_once(image, "/opt/inferpool/bin/python3", "-c", script)
    assert said.startswith("compiled /opt/inferpool/lib/")
    assert said.strip().endswith(".so")


def test_its_size_is_the_one_that_is_stated(image: str, base: str) -> None:
    """What the image adds to its base is what the page on containers says, give or take a tenth."""
    sizes = [int(images.podman("image", "inspect", "--format", "{{.Size}}", name)) for name in (image, base)]
    added = (sizes[0] - sizes[1]) / 1e6
    page = (ROOT / "docs" / "deploy" / "containers.md").read_text()
    stated = re.search(r"^\| `cpu` \| (\d+) MB \|", page, re.MULTILINE)
    assert stated is not None
    assert added == pytest.approx(float(stated[1]), rel=0.1)
