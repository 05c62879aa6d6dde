"""Models that once ended, blocked or changed a whole server, with their right outcomes; and loads that kill.

Each of them is served beside a good model, which must notice nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import Serve, chaos_in
from tests.engine.processes import ENGINE, WEB, find
from tests.server import Server, wait_until

GOOD = {"inputs": [[1.0, 2.0, 3.0, 4.0]]}
LEAST, MOST = -(2**63), 2**63 - 1
LOAD_TIMEOUT_S = 10
PAUSE_S = 0.1


def info(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(
    repository: Path,
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    *,
    external: bool = False,
    **constants: np.ndarray,
) -> Path:
    """Write version 1 of a model; with `external` its constants are in `weights.bin`."""
    initialisers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=external, location="weights.bin",
        size_threshold=0,
    )  # fmt: skip
    return folder


def write_gru(repository: Path) -> None:
    """ONNX Runtime aborts if this model gets no step."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    node = helper.make_node
    save(
        repository,
        "gru",
        [
            node("Gather", ["e", "ids"], ["x"]),
            node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
            node("GRU", ["t", "w", "r"], ["", "last"], hidden_size=4),
            node("Squeeze", ["last", "axis"], ["v"]),
            node("MatMul", ["v", "o"], ["logits"]),
        ],
        [info("ids", TensorProto.INT64, ["batch", "steps"])],
        [info("logits", TensorProto.FLOAT, ["batch", 2])],
        e=normal(20, 8), w=normal(1, 12, 8), r=normal(1, 12, 4), axis=np.array([0]), o=normal(4, 2),
    )  # fmt: skip


def write_ratio(repository: Path) -> None:
    """The process gets SIGFPE for the least integer divided by -1."""
    save(
        repository,
        "ratio",
        [helper.make_node("Div", ["a", "b"], ["y"])],
        [info("a", TensorProto.INT64, ["n"]), info("b", TensorProto.INT64, ["n"])],
        [info("y", TensorProto.INT64, ["n"])],
    )


def write_turns(repository: Path) -> None:
    """A run takes as many turns as its input says."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "step"], ["sum_out"]),
        ],
        "turn",
        [
            info("i", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("sum", TensorProto.FLOAT, [1]),
        ],
        [info("go_on", TensorProto.BOOL, []), info("sum_out", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.array([1], np.float32), "step")],
    )
    save(
        repository,
        "turns",
        [
            helper.make_node("Squeeze", ["count"], ["n"]),
            helper.make_node("Loop", ["n", "yes", "start"], ["total"], body=body),
        ],
        [info("count", TensorProto.INT64, [1])],
        [info("total", TensorProto.FLOAT, [1])],
        yes=np.array(True), start=np.array([0], np.float32),
    )  # fmt: skip


def write_outside(repository: Path, name: str) -> Path:
    """The weights are in a file beside the graph; the answer to ones is the sum of each column."""
    return save(
        repository,
        name,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [info("x", TensorProto.FLOAT, ["batch", 64])],
        [info("y", TensorProto.FLOAT, ["batch", 64])],
        external=True,
        w=np.full((64, 64), 0.5, np.float32),
    )


@contextlib.contextmanager
def good_requests(server: Server) -> Iterator[list[httpx.Response]]:
    """Send requests to the good model all the time, and one more after the block has ended.

    Their short pauses leave the cores to the processes that the tests start again and again.
    """
    answers: list[httpx.Response] = []
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(PAUSE_S):
            answers.append(server.post("/predict/good", json=GOOD))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join()
    answers.append(server.post("/predict/good", json=GOOD))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.text.split('"outputs"')[1] for answer in answers} == {':{"sum":[31.0]}}'}


@pytest.fixture(scope="module")
def tried(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of two good models, of three whose files kill or block the loader, and of `ratio`."""
    folder = tmp_path_factory.mktemp("tried")
    gate = folder / "gate"
    os.mkfifo(gate)
    make = chaos_in(folder / "repository")
    make("bad", load_crashes=True)
    make("blocking", load_holds=True)
    make("endless", gate=str(gate))
    make("good")
    repository = make("next")  # loads after these three
    write_ratio(repository)
    flags = ("--engine", "process", "--web-processes", "1", "--load-timeout-s", str(LOAD_TIMEOUT_S))
    return module_serve(repository, *flags)


@pytest.fixture(scope="module")
def replaced(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    """A server whose processes the tests replace, and its repository: all models are ready afterwards."""
    repository = tmp_path_factory.mktemp("replaced")
    chaos_in(repository)("good")
    write_gru(repository)
    write_turns(repository)
    for name in ("outside", "zeroed", "halved"):
        write_outside(repository, name)
    folder = save(
        repository,
        "named",
        [helper.make_node("Identity", ["x"], ["y"])],
        [info("x", TensorProto.FLOAT, ["batch", 2])],
        [info("y", TensorProto.FLOAT, ["batch", 2])],
    ).parent
    (folder / "model.toml").write_text("[labels]\ntop_k = 1\n")
    (folder / "labels.txt").write_text("cat\ndog\n")
    flags = ("--engine", "process", "--web-processes", "1", "--admin-routes", "on")
    return module_serve(repository, *flags), repository


def test_a_file_that_kills_or_blocks_the_loader_is_a_failed_version(tried: Server) -> None:
    server = tried

    def state(model: str) -> tuple[str, str]:
        [version] = server.get(f"/models/{model}").json()["versions"]
        return version["state"], version["reason"]

    def has_failed(model: str) -> bool:
        return state(model)[0] == "failed"

    for model, expected in (
        ("bad", "ended the engine 2 times"), ("blocking", f"--load-timeout-s ({LOAD_TIMEOUT_S} s)"),
        ("endless", f"--load-timeout-s ({LOAD_TIMEOUT_S} s)"),
    ):  # fmt: skip
        wait_until(partial(has_failed, model), f"the version of {model} has failed")
        assert expected in state(model)[1]
    assert "SIGSEGV" in state("bad")[1]
    wait_until(lambda: server.get("/health/ready").status_code == 200, "the server is ready")
    health = server.get("/health").json()
    reasons = {f"{model}/1": state(model)[1] for model in ("bad", "blocking", "endless")}
    assert (health["status"], health["problems"]) == ("degraded", reasons)
    for model in ("good", "next"):
        assert server.post(f"/predict/{model}", json=GOOD).status_code == 200
    for model in ("bad", "blocking", "endless"):
        refused = server.post(f"/predict/{model}", json=GOOD)
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")


def test_a_model_that_keeps_crashing_even_in_an_engine_of_its_own_fails_with_the_reason(
    tried: Server,
) -> None:
    """The last test of this server."""
    server = tried
    before = server.metric("engine_restarts_total")

    def ratio() -> dict[str, Any]:
        [version] = server.get("/models/ratio").json()["versions"]
        return dict(version)

    def answers_others() -> bool:
        answer = server.post("/predict/ratio", json=harmless)
        return answer.status_code == 200 and answer.json()["outputs"] == {"y": [LEAST, 2]}

    def assert_that_it_failed_alone() -> None:
        """The model has answers for others, in the next engine. Logs have the shapes of a request only."""
        assert answers_others()
        assert server.metric("engine_restarts_total") == before + 2
        line = server.wait_for(r"ratio/1 crashed its engine on request \S+ twice")
        assert str(LEAST) not in line.string

    poison = {"inputs": {"a": [LEAST], "b": [-1]}}
    harmless = {"inputs": {"a": [LEAST, 6], "b": [1, 3]}}
    seen: list[dict[str, str]] = []
    with good_requests(server):
        # At most five: one in the shared engine, one in that or in the model's own engine, and three there.
        while ratio()["state"] != "failed" and len(seen) < 5:
            answer = server.post("/predict/ratio", json=poison)
            if "/models/ratio says why" in answer.text:
                break  # it has failed since
            assert (answer.status_code, answer.json()["code"]) == (500, "model_crashed"), answer.text
            if not seen:
                assert_that_it_failed_alone()
            seen.append(server.get("/health").json()["problems"])
            if len(seen) == 2:  # each has ended two engines
                wait_until(lambda: len(find(server, ENGINE)) == 2, "the version has an engine of its own")
                wait_until(answers_others, "the version answers others there")
        assert seen[2]["ratio/1"] == "its engine is being restarted"  # after a pause
        wait_until(lambda: ratio()["state"] == "failed", "the version has failed")
        reason = ratio()["reason"]
        assert "its runs ended engines of its own 3 times in 10 minutes" in reason
        assert "SIGFPE" in reason
        health = server.get("/health").json()
        assert (health["status"], health["problems"]["ratio/1"]) == ("degraded", reason)
        refused = server.post("/predict/ratio", json=poison)
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
    assert server.get("/v2/models/ratio/ready").status_code == 503
    assert server.metric("model_state", model="ratio", state="failed") == 1
    # The last two requests ended it twice each; those before may have ended the shared engine.
    assert 4 <= server.metric("engine_restarts_total", engine="ratio/1") <= 6
    assert len(find(server, ENGINE)) == 1
    assert server.stop() == 0


def test_while_its_engine_restarts_a_model_takes_requests_and_health_tells(
    replaced: tuple[Server, Path],
) -> None:
    server, repository = replaced
    [version] = server.get("/models/good").json()["versions"]
    seen: list[dict[str, Any]] = []

    def watch() -> bool:
        health = server.get("/health")
        if health.status_code == 503:
            seen.append(health.json())
            assert server.get("/models/good").json()["versions"][0]["state"] == "ready"
            assert server.get("/health/ready").status_code in (200, 503)
        return bool(seen) and health.status_code == 200

    os.kill(version["engine"]["pid"], 9)
    wait_until(watch, "the server is ready again")
    models = [f"{folder.name}/1" for folder in repository.iterdir()]
    assert seen[0]["problems"] == dict.fromkeys(models, "its engine is being restarted")
    [after] = server.get("/models/good").json()["versions"]
    assert after["engine"]["restarts"] == version["engine"]["restarts"] + 1
    assert after["engine"]["pid"] != version["engine"]["pid"]


def test_an_engine_that_replaces_another_loads_nothing_that_was_written_since(
    replaced: tuple[Server, Path],
) -> None:
    server, repository = replaced
    folder = repository / "outside" / "1"
    weights = folder / "weights.bin"
    body = {"inputs": [[1.0] * 64]}

    def version() -> dict[str, Any]:
        [found] = server.get("/models/outside").json()["versions"]
        return dict(found)

    def replace_engine() -> None:
        [before] = find(server, ENGINE)
        os.kill(before, 9)
        wait_until(lambda: find(server, ENGINE) not in ([], [before]), "there is another engine")
        wait_until(lambda: server.get("/health/ready").status_code == 200, "it is ready")

    right = server.post("/predict/outside", json=body).json()["outputs"]
    max_rows = version()["batching"]["max_rows"]
    assert max_rows > 1
    (folder.parent / "model.toml").write_text("[batching]\nmax_rows = 1\n")
    with good_requests(server):
        replace_engine()
        assert server.post("/predict/outside", json=body).json()["outputs"] == right
        assert version()["batching"]["max_rows"] == max_rows

        weights.write_bytes(bytes(weights.stat().st_size))
        for _ in range(2):
            replace_engine()
            assert version()["state"] == "failed"
            assert version()["reason"].startswith("weights.bin has changed since the version was loaded")
            assert server.post("/predict/outside", json=body).status_code == 503
        assert server.post("/models/outside/load").status_code == 202
        wait_until(lambda: version()["state"] == "ready", "the new content is loaded")
        assert version()["batching"]["max_rows"] == 1
        assert server.post("/predict/outside", json=body).json()["outputs"] == {"y": [[0.0] * 64]}


def test_a_recurrent_network_without_steps_costs_nobody_else_anything(replaced: tuple[Server, Path]) -> None:
    server, _ = replaced
    before = server.metric("engine_restarts_total")
    with good_requests(server):
        bodies: list[dict[str, Any]] = [
            {"inputs": [[]]},
            {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 0], "data": []}]},
            {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [0, 5], "data": []}]},
        ]
        for body in bodies:
            path = "/predict/gru" if body == {"inputs": [[]]} else "/v2/models/gru/infer"
            assert server.post(path, json=body).status_code in (200, 422)
    assert server.post("/predict/gru", json={"inputs": [[1, 2]]}).status_code == 200
    assert server.metric("engine_restarts_total") == before


def test_a_run_without_an_end_is_answered_at_its_deadline_and_ends(replaced: tuple[Server, Path]) -> None:
    server, _ = replaced
    before = server.metric("engine_restarts_total")
    with good_requests(server):
        began = time.monotonic()
        endless = {"inputs": [10**12]}
        answer = server.post("/predict/turns", json=endless, headers={"X-Timeout-Ms": "500"})
        assert answer.status_code == 504
        assert time.monotonic() - began < 20, "without an end a run would take hours"
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/predict/turns", json=endless, timeout=0.3)
        # Both runs are ended, so that others can run.
        assert server.post("/predict/turns", json={"inputs": [3]}).json()["outputs"] == {"total": [3.0]}
    assert server.metric("engine_restarts_total") == before


@pytest.mark.parametrize("model", ["zeroed", "halved"])
def test_weights_that_change_on_disk_change_no_answer(replaced: tuple[Server, Path], model: str) -> None:
    server, repository = replaced
    before = server.metric("engine_restarts_total")
    weights = repository / model / "1" / "weights.bin"
    body = {"inputs": [[1.0] * 64]}
    right = server.post(f"/predict/{model}", json=body).json()["outputs"]
    assert right == {"y": [[32.0] * 64]}
    size = weights.stat().st_size
    with good_requests(server):
        if model == "halved":
            os.truncate(weights, size // 2)
        else:
            with weights.open("r+b") as stream:
                stream.write(bytes(size))
        for _ in range(20):
            assert server.post(f"/predict/{model}", json=body).json()["outputs"] == right
    assert server.metric("engine_restarts_total") == before


def test_labels_that_change_on_disk_change_no_prediction(replaced: tuple[Server, Path]) -> None:
    """Not even after the only web process has been replaced. The last test of this server."""
    server, repository = replaced

    def label() -> str:
        answer = server.post("/predict/named", json={"inputs": [[1.0, 2.0]]})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["predictions"][0][0]["label"])

    assert label() == "dog"
    (repository / "named" / "labels.txt").write_text("written\nsince\n")
    before = find(server, WEB)
    [process] = before
    os.kill(process, 9)

    def is_replaced() -> bool:
        now = find(server, WEB)
        with contextlib.suppress(httpx.TransportError):
            return len(now) == 1 and now != before and server.get("/health/ready").is_success
        return False

    wait_until(is_replaced, "the web process is replaced")
    assert {label() for _ in range(10)} == {"dog"}
    assert server.stop() == 0
