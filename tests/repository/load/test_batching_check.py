"""The check of batching finds models that mix rows, draw random numbers or lose rows; the planner."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.repository.load.batching_check import BatchingProof, check_batching
from inferpool.repository.load.batching_remedies import Obstacle, find_remedy
from inferpool.repository.load.planner import Plan, PlanConstraints, Planner
from inferpool.tensors import Signature, Tensors, TensorSpec
from onnx import TensorProto, helper


class Fake(LoadedModel):
    """A model that is a Python function of "x"."""

    def __init__(
        self,
        function: Callable[[np.ndarray], object],
        shape: tuple[int, ...] = (-1, 4),
        datatype: str = "FP32",
        out: tuple[str, tuple[int, ...] | None] = ("FP32", None),
    ) -> None:
        self.signature = Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", *out),))
        self.runs: list[int] = []
        self._function = function

    def run(self, inputs: Tensors, outputs: object = None) -> Tensors:
        self.runs.append(len(inputs["x"]))
        return {"y": self._function(inputs["x"])}

    def close(self) -> None:
        pass


def proof_of(model: LoadedModel, *samples: Tensors) -> BatchingProof:
    return check_batching(model, samples, 1.0, time.perf_counter)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2,
        lambda x: x.sum(axis=1, keepdims=True),
        lambda x: x * (1 + 1e-6 * len(x)),
        lambda x: np.where(x > 0, x, np.nan),
        lambda x: np.where(x > 0, np.inf, x),
        lambda x: x.argmax(axis=1),
        lambda x: np.array([str(row) for row in x.tolist()], dtype=object),
    ],
)
def test_row_wise_models_are_batched(function: Callable[[np.ndarray], object]) -> None:
    datatype = "FP32" if function(np.zeros((1, 4), np.float32)).dtype == np.float32 else "INT64"
    proof = proof_of(Fake(function, out=(datatype, None)))
    assert proof.batched, proof.reason
    assert "2, 3, 5, 8" in proof.reason


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x - x.mean(axis=0), "differs"),
        (lambda x: x / np.abs(x).max(), "differs"),
        (lambda x: np.sort(x, axis=0), "differs"),
        (lambda x: x[::-1], "differs"),
        (lambda x: np.cumsum(x, axis=0), "differs"),
        (lambda x: x + np.random.default_rng().standard_normal(x.shape).astype(np.float32), "differs"),
        (lambda x: x.mean(axis=0, keepdims=True), "for one row|when"),
        (lambda x: x.T, "does not follow"),
        (lambda x: np.array(x.sum()), "does not follow"),
        (lambda x: np.concatenate([x, x]), "does not follow"),
        (lambda x: x[: 1 + len(x) // 3], "when"),
        (lambda x: [{"a": 1.0}] * len(x), "no tensor"),
        (lambda x: x if len(x) == 1 else np.linalg.inv(np.zeros((2, 2))), "raised"),
        (lambda x: np.where(np.isfinite(x).all() and len(x) > 2, np.nan, x), "differs"),
        (lambda x: np.where(x > 0, np.inf if len(x) == 1 else -np.inf, x), "differs"),
        (lambda x: np.concatenate([x * 640, (x[:, :1] - x.mean())], axis=1), "differs"),
        (lambda x: np.zeros((len(x), 3), np.float32), "proves nothing"),
        (lambda x: np.full((len(x), 3), np.nan, np.float32), "proves nothing"),
    ],
)
def test_a_model_that_mixes_or_loses_rows_is_not_batched(
    function: Callable[[np.ndarray], object], words: str
) -> None:
    proof = proof_of(Fake(function))
    assert not proof.batched
    assert any(word in proof.reason for word in words.split("|")), proof.reason


@pytest.mark.parametrize(
    ("shape", "out", "words"),
    [
        ((1, 4), (-1, 4), 'input "x" is fixed at 1'),
        ((), (-1, 4), "scalar"),
        ((-1, 4), (10, 4), 'output "y" is fixed at 10'),
    ],
)
def test_a_fixed_first_dimension_is_served_alone(
    shape: tuple[int, ...], out: tuple[int, ...], words: str
) -> None:
    model = Fake(lambda x: x, shape, out=("FP32", out))
    proof = proof_of(model)
    assert not proof.batched
    assert words in proof.reason
    assert not model.runs


def test_large_integers_are_tried_before_small_ones() -> None:
    def embed(x: np.ndarray) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[x]  # ids of 3 and more are out of its vocabulary

    assert proof_of(Fake(embed, (-1, 5), "INT64")).batched


def test_other_dimensions_are_tried_until_one_fits() -> None:
    def needs_64(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), 64)

    assert proof_of(Fake(needs_64, (-1, -1))).batched


def test_samples_are_used_if_made_up_rows_would_not_run() -> None:
    def strict(x: np.ndarray) -> np.ndarray:
        if x.shape[1] != 7 or not set(x.ravel().tolist()) <= {100, 200, 300}:
            raise ValueError("not in the vocabulary")
        return x.astype(np.float32)

    model = Fake(strict, (-1, -1), "INT64")
    unproven = proof_of(model)
    assert not unproven.batched
    assert "golden sample" in unproven.reason
    assert proof_of(model, {"x": np.array([[100, 200, 300, 100, 100, 100, 300]])}).batched


@pytest.mark.parametrize(
    ("sample", "function"),
    [
        (np.array([3, 5], np.int64)[:1], lambda x: x - x.mean()),
        (np.array([[1, 9, 4, 7]], np.int64), lambda x: (x - x.max()).astype(np.float32)),
        (np.array([["a text"]], object), lambda x: np.array([[x[0, 0]]] * len(x), object)),
    ],
)
def test_one_sample_row_is_varied_until_mixing_shows(
    sample: np.ndarray, function: Callable[[np.ndarray], object]
) -> None:
    datatype = "BYTES" if sample.dtype == object else "INT64"
    out = "BYTES" if sample.dtype == object else "FP32"
    model = Fake(function, (-1, *sample.shape[1:]), datatype, out=(out, None))
    assert not proof_of(model, {"x": sample}).batched


def test_a_slow_model_is_proven_with_fewer_rows() -> None:
    moments = iter(range(10_000))
    model = Fake(lambda x: x)
    proof = check_batching(model, (), 1.0, lambda: next(moments) * 0.4)
    assert proof.batched
    assert sum(model.runs) < 12


def test_batch_norm_left_in_training_mode_is_caught_in_a_real_model(tmp_path: Path) -> None:
    def model_with(training: int) -> onnx.ModelProto:
        names = ["scale", "bias", "mean", "var"]
        weights = [helper.make_tensor(name, TensorProto.FLOAT, [4], [1.0] * 4) for name in names]
        outputs = ["y", "m", "v"] if training else ["y"]
        node = helper.make_node("BatchNormalization", ["x", *names], outputs, training_mode=training)
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
            weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    for training in (0, 1):
        onnx.checker.check_model(model_with(training))

    def load(training: int) -> LoadedModel:
        file = tmp_path / f"{training}.onnx"
        onnx.save(model_with(training), file)
        return OnnxBackend().load(file, LoadOptions())

    assert proof_of(load(0)).batched
    assert not proof_of(load(1)).batched


def plan_of(model: LoadedModel, **constraints: Any) -> Plan:
    fields: dict[str, Any] = {"cores": 1, "budget_s": 0.3} | constraints
    return Planner(lambda threads: model, PlanConstraints(**fields), time.perf_counter).make(model)


def test_on_a_gpu_instances_are_copies_that_were_measured_with_one_thread_each() -> None:
    """One copy of a model on a GPU never runs on two threads, so another instance is another copy."""
    loads: list[int] = []
    made: list[Fake] = []

    def sleeps(x: np.ndarray) -> np.ndarray:
        time.sleep(0.002)
        return x

    def load(threads: int) -> LoadedModel:
        loads.append(threads)
        made.append(Fake(sleeps))
        return made[-1]

    constraints = PlanConstraints(cores=8, budget_s=0.5, max_rows=4, gpu=True)
    plan = Planner(load, constraints, time.perf_counter).make(Fake(sleeps))
    assert (plan.instances, plan.threads, loads) == (2, 1, [1])


@pytest.mark.parametrize(
    ("backend", "form", "remedy"),
    [
        ("onnx", "", 'torch.onnx.export(…, dynamic_shapes={"x": {0: "batch"}})'),
        (
            "torch",
            "exported program",
            'torch.export.export(…, dynamic_shapes={"x": {0: torch.export.Dim("batch")}})',
        ),
        ("torch", "TorchScript (deprecated by PyTorch)", 'below [[inputs]] of "x", let shape begin with -1'),
        ("chaos", "", "let the first dimension of x be of any size"),
    ],
)
def test_the_remedy_of_a_fixed_number_of_rows_depends_on_the_file(
    backend: str, form: str, remedy: str
) -> None:
    line = find_remedy(Obstacle.FIXED_ROWS, "x", is_input=True, backend=backend, form=form)
    assert remedy in line
    of_output = find_remedy(Obstacle.FIXED_ROWS, "y", is_input=False, backend=backend, form=form)
    assert "take the number of rows from the input" in of_output


@pytest.mark.parametrize("obstacle", list(Obstacle))
def test_every_obstacle_has_a_remedy(obstacle: Obstacle) -> None:
    assert find_remedy(obstacle, "x", is_input=True, backend="onnx", form="")


def test_the_batch_limit_is_reached_when_more_rows_stop_paying() -> None:
    def per_row(x: np.ndarray) -> np.ndarray:
        time.sleep(0.01 * len(x))
        return x

    def per_run(x: np.ndarray) -> np.ndarray:
        time.sleep(0.005)
        return x

    assert plan_of(Fake(per_row)).max_rows <= 2
    assert plan_of(Fake(per_run), budget_s=2.0).max_rows >= 64
    assert plan_of(Fake(per_row), max_rows=5).max_rows == 5
    assert plan_of(Fake(per_run), batching=False).max_rows == 1


def test_a_difference_that_only_larger_batches_show_is_found_while_measuring() -> None:
    def from_32_on(x: np.ndarray) -> np.ndarray:
        time.sleep(0.0005)
        return x if len(x) < 32 else x - x.mean(axis=0)

    plan = plan_of(Fake(from_32_on))
    assert not plan.batched
    assert "when 32 rows run together" in plan.reason
    assert plan.max_rows == 1


def test_a_model_that_raises_on_several_rows_still_gets_a_plan() -> None:
    def only_one(x: np.ndarray) -> np.ndarray:
        if len(x) > 1:
            raise ValueError("one row at a time")
        return x

    plan = plan_of(Fake(only_one))
    assert not plan.batched
    assert "one row at a time" in plan.reason

    def few(x: np.ndarray) -> np.ndarray:
        time.sleep(0.001)
        if len(x) > 12:
            raise MemoryError
        return x

    assert plan_of(Fake(few)).max_rows == 8


def test_more_instances_are_chosen_if_they_raise_the_rate() -> None:
    def sleeps(x: np.ndarray) -> np.ndarray:
        time.sleep(0.005)  # as a run without the GIL: two at a time take no longer
        return x

    plan = plan_of(Fake(sleeps), cores=2, max_rows=1)
    assert (plan.instances, plan.threads) == (2, 1)
    assert (plan_of(Fake(lambda x: x), cores=2).instances) == 1
    asked = plan_of(Fake(sleeps), cores=2, instances=3, threads=1)
    assert (asked.instances, asked.threads) == (3, 1)
