"""The image for CPUs, built and run by podman: it is small and confined, keeps its CPU quota, and drains."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
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
from tests.record import has_changed, needs_to_run
from tests.server import free_port, wait_until

ROOT = Path(__file__).parents[2]
MISSING = images.missing()
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"building images needs {MISSING}"),
    # The first test waits for the build, and for that of the wheel.
    pytest.mark.timeout(1200),
]

TARGET = os.environ.get("IMAGE_TARGET", "cpu")
"""`gpu` tries the other image, of 5 GB, on the cores of any machine; no CI builds it each time."""
WIDTH = 1024
RUN_STEPS = 200
Run = Callable[..., Container]
LIST_DISTRIBUTIONS = "from importlib.metadata import *\nfor d in distributions(): print(d.name, d.version)"


@pytest.fixture(scope="session")
def base() -> str:
    return images.build_base()


@pytest.fixture(scope="session")
def image(base: str) -> str:
    """The image as users build it; while nothing of it has changed, without the list of its packages."""
    if TARGET != "cpu" or has_changed("image"):
        return images.build(TARGET, base)
    return images.build("cpu-without-plans", base)


@pytest.fixture
def only_after_a_change() -> None:
    """Skip the tests of what the image alone decides while nothing of the image has changed."""
    if TARGET == "cpu":
        needs_to_run("image")


only_after_a_change_of_the_image = pytest.mark.usefixtures("only_after_a_change")


@pytest.fixture
def run(image: str) -> Iterator[Run]:
    """Start containers with `run(repository, *flags)`; they are removed after the test."""
    started: list[Container] = []

    def start(repository: Path | None, *flags: str, **environ: str) -> Container:
        options = [f"--env={name}={value}" for name, value in environ.items()]
        started.append(Container(image, repository, options, flags))
        return started[-1]

    yield start
    for container in started:
        container.kill()


def write_slow(repository: Path) -> Path:
    """Write a model that returns its rows of `WIDTH` numbers after tens of milliseconds, never batched."""
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
    # Only their owner may read the temporary folders of tests, and the user in the container is another one.
    repository.chmod(0o755)
    return repository


def test_the_models_of_a_volume_answer(run: Run) -> None:
    """The bundled models load and answer in a read-only container without capabilities."""
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


@only_after_a_change_of_the_image
def test_the_image_has_the_locale_of_text_models(run: Run, tmp_path: Path) -> None:
    """A model that changes the case of letters, as TF-IDF pipelines do, loads and answers."""
    value = helper.make_tensor_value_info
    lower = helper.make_node("StringNormalizer", ["x"], ["y"], case_change_action="LOWER")
    texts = [value(name, TensorProto.STRING, ["rows"]) for name in "xy"]
    write_model(tmp_path, "lower", helper.make_graph([lower], "lower", texts[:1], texts[1:]))
    tmp_path.chmod(0o755)
    container = run(tmp_path)
    container.wait_loaded()
    answer = container.post("/predict/lower", json={"inputs": ["ÄRGER", "Good"]})
    assert answer.json()["outputs"]["y"] == ["ärger", "good"]


def test_the_server_runs_without_root_and_without_capabilities(run: Run) -> None:
    """tini and the server run as user 10001, without capabilities, on a read-only file system."""
    container = run(ROOT / "models")
    container.wait_loaded()
    processes = container.process_fields()
    assert [process["Name"] for process in processes] == ["tini", "inferpool"]
    for process in processes:
        assert process["Uid"].split() == ["10001"] * 4
        assert process["Gid"].split() == ["10001"] * 4
        assert int(process["CapEff"], 16) == int(process["CapBnd"], 16) == 0
        assert process["NoNewPrivs"] == "1"
    assert any("measurements are not kept" in line["message"] for line in container.log)


@only_after_a_change_of_the_image
@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="needs a second core, outside the quota")
def test_the_quota_limits_the_threads(run: Run, serve: Serve) -> None:
    """With a quota of one core a run has one thread; outside the container it has a thread per core."""
    container = run(ROOT / "models", INFERPOOL_MEASURE_MS="0")
    outside = serve(ROOT / "models", "--measure-ms", "0")
    container.wait_loaded()
    threads = [server.get("/models/digits/1").json()["threads"] for server in (container, outside)]
    assert threads == [1, len(os.sched_getaffinity(0))]


@only_after_a_change_of_the_image
def test_measurements_are_kept_in_a_volume(image: str, tmp_path: Path) -> None:
    """The server writes its measurements into a folder mounted at /cache, for the next container."""
    tmp_path.chmod(0o777)
    options = [f"--volume={tmp_path}:/cache", "--env=INFERPOOL_MEASURE_MS=200"]
    container = Container(image, ROOT / "models", options)
    try:
        container.wait_loaded()
    finally:
        container.kill()
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} >= {"diabetes", "digits"}


def test_the_healthcheck_follows_readiness(run: Run) -> None:
    """The check passes when the models are ready, and fails when a required model is missing."""
    container = run(ROOT / "models")
    container.wait_loaded()
    assert container.healthcheck() == 0
    assert container.inspect("{{.State.Health.Status}}") == "healthy"
    without = run(ROOT / "models", INFERPOOL_REQUIRED_MODELS="absent")
    without.wait_loaded()
    assert without.healthcheck() == 1


def test_sigterm_drains(run: Run, tmp_path: Path) -> None:
    """After `docker stop`, accepted requests are answered, and the exit status is 0."""
    container = run(write_slow(tmp_path), "--measure-ms", "0")
    container.wait_loaded()
    count = 24
    replies: dict[int, Reply] = {}

    async def ask(client: Client, number: int) -> None:
        body = json.dumps({"inputs": [[float(number)] * WIDTH]}).encode()
        replies[number] = await client.post("/predict/slow", body)

    async def scenario() -> int:
        work = asyncio.create_task(with_clients(container.port, count, ask))
        # One request runs, the others wait.
        await asyncio.to_thread(container.wait_for_metric, "queue_rows", at_least=count / 2, model="slow")
        stop = asyncio.create_task(asyncio.to_thread(container.stop))
        await asyncio.to_thread(container.wait_for, "draining")
        assert len(replies) < count, "all requests were answered before the signal"
        await work
        return await stop

    assert asyncio.run(scenario()) == 0
    for number, reply in replies.items():
        assert reply.status == 200
        assert json.loads(reply.body)["outputs"]["y"] == [[float(number)] * WIDTH]


@only_after_a_change_of_the_image
def test_a_server_that_still_starts_can_be_stopped(image: str) -> None:
    """SIGTERM ends a server that does not handle signals yet, because tini is process 1."""
    [entrypoint] = json.loads(
        images.podman("image", "inspect", "--format={{json .Config.Entrypoint}}", image)
    )[:1]
    name = f"inferpool-start-{os.getpid()}"
    # `sleep` is like a server that does not handle signals yet.
    command = json.dumps([entrypoint, "--", "sleep", "60"])
    images.podman("run", "--detach", f"--name={name}", *CONFINED, f"--entrypoint={command}", image)
    try:
        images.podman("stop", "--time=30", name)
        assert images.podman("wait", name) == "143"
    finally:
        images.podman("rm", "--force", "--time=0", name)


@only_after_a_change_of_the_image
def test_an_image_may_contain_models_and_their_plans(base: str) -> None:
    """An image built with MODELS and PLANS needs no volume, and its first start measures nothing."""
    container = Container(images.build("cpu", base, "models", plans="1"), None)
    try:
        container.wait_loaded()
        assert container.get("/health/ready").status_code == 200
        # What is measured cannot be kept in a read-only container, and the log says so.
        assert not any("measurements are not kept" in line["message"] for line in container.log)
        assert container.get("/models/digits").json()["versions"][0]["latency"]
    finally:
        container.kill()


@only_after_a_change_of_the_image
def test_the_image_has_the_pinned_packages_and_no_compiler(image: str) -> None:
    """The image contains exactly the packages of the lock and the server."""
    found = run_once(image, "sh", "-c", "command -v cc c++ gcc g++ clang ld as make || true")
    assert found == ""
    listed = run_once(image, "/opt/inferpool/bin/python3", "-c", LIST_DISTRIBUTIONS).lower().replace("_", "-")
    installed = {line.replace(" ", "==") for line in listed.splitlines()}
    lock = (ROOT / "docker" / f"requirements-{TARGET}.txt").read_text()
    pinned = set(re.findall(r"^[\w.-]+==[\w.]+", lock, re.MULTILINE))
    assert installed - pinned == {f"inferpool=={__version__}"}
    assert len(installed) > 10


@only_after_a_change_of_the_image
def test_the_image_has_neither_pip_nor_programs_that_gain_rights(image: str) -> None:
    """No program is set-uid or set-gid, and nothing can install packages into the image."""
    names = ("-iname", "pip", "-o", "-iname", "pip-*", "-o", "-name", "ensurepip")
    # The user of the server may not look into every folder.
    everywhere = ("--user=0", "--cap-add=DAC_READ_SEARCH")
    search = ("find", "/", "-xdev", "(", "-type", "f", "-perm", "/6000", "-o", *names, ")")
    assert run_once(image, *search, options=everywhere) == ""


@only_after_a_change_of_the_image
def test_the_image_lists_its_packages(image: str) -> None:
    """scripts/sbom writes a list with every Python distribution and every Debian package of the image."""
    written = subprocess.run([ROOT / "scripts" / "sbom", image], capture_output=True, text=True, check=True)
    sbom = json.loads(written.stdout)
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    listed = {
        (part["name"].lower().replace("_", "-"), part["version"])
        for part in sbom["components"]
        if "version" in part
    }
    debian = run_once(image, "dpkg-query", "--show", "--showformat", "${Package} ${Version}\n").splitlines()
    python = run_once(image, "/opt/inferpool/bin/python3", "-c", LIST_DISTRIBUTIONS).splitlines()
    installed = {tuple(line.lower().replace("_", "-").split()) for line in python}
    installed |= {tuple(line.split()) for line in debian}
    assert len(installed) > 100
    assert installed - listed == set()
    names = [part["name"] for part in sbom["components"]]
    assert "python" in names
    assert "pip" not in names


@only_after_a_change_of_the_image
def test_the_labels_say_what_is_in_the_image(image: str) -> None:
    """The labels of OCI name the version, the commit and the licence, whose text is in the image."""
    text = images.podman("image", "inspect", "--format={{json .Config.Labels}}", image)
    labels = {name.rpartition(".")[2]: value for name, value in json.loads(text).items()}
    assert labels["version"] == __version__
    assert labels["licenses"] == "Apache-2.0"
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])
    licence = run_once(image, "cat", "/usr/share/doc/inferpool/LICENSE")
    assert licence.strip() == (ROOT / "LICENSE").read_text().strip()


def test_the_hot_path_of_the_image_is_compiled(image: str) -> None:
    script = (
        "import inferpool.observe.build_info as info, inferpool.pool.entry_queue as queue;"
        " print(info.hot_path(), queue.__file__)"
    )
    said = run_once(image, "/opt/inferpool/bin/python3", "-c", script)
    assert said.startswith("compiled /opt/inferpool/lib/")
    assert said.strip().endswith(".so")


@only_after_a_change_of_the_image
def test_the_documented_size_is_right(image: str, base: str) -> None:
    """The size that the image adds to its base differs from the page on containers by a tenth at most."""
    sizes = [int(images.podman("image", "inspect", "--format", "{{.Size}}", name)) for name in (image, base)]
    added = (sizes[0] - sizes[1]) / 1e6
    page = (ROOT / "docs" / "deploy" / "containers.md").read_text()
    stated = re.search(rf"^\| `{TARGET}` \| (?:about )?([\d,]+) MB \|", page, re.MULTILINE)
    assert stated is not None
    assert added == pytest.approx(float(stated[1].replace(",", "")), rel=0.1)


class OnPlatform(Container):
    """The image as a platform starts it: with its variables and mounts, and as the user that it chooses."""

    def __init__(self, image: str, options: Sequence[str], command: Sequence[str] = ()) -> None:
        self.name = f"inferpool-{uuid.uuid4().hex[:12]}"
        named = [f"--name={self.name}", "--env=INFERPOOL_LOG_FORMAT=json", "--env=INFERPOOL_MEASURE_MS=0"]
        run = ["podman", "--runtime", "runc", "run", "--rm", *CONFINED, *named, *options, image, *command]
        self._start(run, {})
        self.url = f"http://127.0.0.1:{self.port}"


DIABETES = ROOT / "models" / "diabetes"
PATIENT = [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87]


@only_after_a_change_of_the_image
@pytest.mark.parametrize("platform", ["sagemaker", "vertex", "azure", "kserve", "cloud-run"])
def test_the_image_starts_as_each_platform_starts_it(image: str, platform: str, tmp_path: Path) -> None:
    """No argument but what the platform gives: it is ready on its port, and answers on its path."""
    port = free_port()
    instances, predictions = {"instances": [PATIENT]}, {"predictions": [[pytest.approx(210.57, abs=0.01)]]}
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(DIABETES / "1" / "model.onnx", flat / "model.onnx")
    for folder in (tmp_path, flat):
        folder.chmod(0o755)  # the user in the container is another one
    options, command, ready, predict = {
        # Platforms give a port of their own; tests of this machine share its ports, so each takes a free one.
        "sagemaker": (
            [f"--volume={flat}:/opt/ml/model:ro", f"--env=SAGEMAKER_BIND_TO_PORT={port}", "--user=0"],
            ["serve"],
            "/ping",
            "/invocations",
        ),
        "vertex": (
            [
                f"--volume={DIABETES}:/m:ro",
                "--env=AIP_STORAGE_URI=/m",
                f"--env=AIP_HTTP_PORT={port}",
                "--env=AIP_HEALTH_ROUTE=/v1/endpoints/1/deployedModels/2",
                "--env=AIP_PREDICT_ROUTE=/v1/endpoints/1/deployedModels/2:predict",
            ],
            [],
            "/v1/endpoints/1/deployedModels/2",
            "/v1/endpoints/1/deployedModels/2:predict",
        ),
        "azure": (
            [
                f"--volume={DIABETES}:/var/azureml-app/azureml-models/d/1:ro",
                "--env=AZUREML_MODEL_DIR=/var/azureml-app/azureml-models/d/1",
                f"--env=INFERPOOL_PORT={port}",
            ],
            [],
            "/health/ready",
            "/score",
        ),
        "kserve": (
            # OpenShift runs containers as a user that has no name.
            [f"--volume={flat}:/mnt/models:ro", f"--env=PORT={port}", "--user=1000680000:0"],
            ["serve", "--model_name=service"],
            "/v1/models/service",
            "/v1/models/service:predict",
        ),
        "cloud-run": (
            [f"--volume={DIABETES}:/models/diabetes:ro", f"--env=PORT={port}"],
            [],
            "/v2/health/ready",
            "/v1/models/diabetes:predict",
        ),
    }[platform]
    container = OnPlatform(image, options, command)
    try:
        assert container.port == port
        container.wait_loaded()
        assert container.get(ready).status_code == 200
        answer = container.post(predict, json=instances)
        assert (answer.status_code, answer.json()) == (200, predictions)
        assert container.healthcheck() == 0
    finally:
        container.kill()


@only_after_a_change_of_the_image
def test_an_image_of_models_of_kserve_may_come_late(image: str, tmp_path: Path) -> None:
    """A container beside the server makes a link to its own models, when the server has started already."""
    mounts, models, port = tmp_path / "mnt", tmp_path / "modelcar", free_port()
    for folder in (tmp_path, mounts, models):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    shutil.copy(DIABETES / "1" / "model.onnx", models / "model.onnx")
    options = [
        f"--volume={mounts}:/mnt:ro", f"--volume={models}:/proc-of-modelcar:ro",
        "--env=MODEL_INIT_MODE=async", f"--env=PORT={port}", "--user=1000680000:0",
    ]  # fmt: skip
    container = OnPlatform(image, options, ["serve", "--model_name=service"])
    try:
        assert container.get("/v2/health/live").status_code == 200
        assert container.get("/v1/models/service").status_code == 503
        (mounts / "models").symlink_to("/proc-of-modelcar")
        container.wait_loaded()
        wait_until(lambda: container.get("/v1/models/service").status_code == 200, "the model is ready")
        answer = container.post("/v2/models/service/infer", json={
            "inputs": [{"name": "features", "shape": [1, 10], "datatype": "FP32", "data": PATIENT}],
        })  # fmt: skip
        assert answer.json()["outputs"][0]["data"] == [pytest.approx(210.57, abs=0.01)]
    finally:
        container.kill()
