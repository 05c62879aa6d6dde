"""The check of batching finds models that mix rows, draw random numbers or lose rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.backends.row_verdict import Evidence, Independence, RowVerdict
from inferpool.repository.load.batching_check import check_batching
from inferpool.repository.load.batching_proof import BatchingProof
from inferpool.tensors import Tensors
from onnx import TensorProto, helper

from tests.repository.load.function_model import FunctionModel


def proof_of(model: LoadedModel, *samples: Tensors) -> BatchingProof:
    return check_batching(model, samples)


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
def test_row_wise_models_are_batched(function: Callable[[np.ndarray], Any]) -> None:
    datatype = "FP32" if function(np.zeros((1, 4), np.float32)).dtype == np.float32 else "INT64"
    proof = proof_of(FunctionModel(function, out=(datatype, None)))
    assert proof.batched, proof.reason
    assert "tried 2, 3, 5, 6, 8" in proof.reason


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
    function: Callable[[np.ndarray], Any], words: str
) -> None:
    proof = proof_of(FunctionModel(function))
    assert not proof.batched
    assert any(word in proof.reason for word in words.split("|")), proof.reason


def test_the_evidence_is_the_graph_or_the_runs() -> None:
    read = RowVerdict(Independence.INDEPENDENT, "no operation mixes rows")
    unread = RowVerdict(Independence.UNKNOWN, "no rule for Odd")
    for verdict, evidence in ((read, Evidence.GRAPH), (unread, Evidence.RUNS)):
        proof = check_batching(FunctionModel(lambda x: x * 2), (), verdict)
        assert proof.evidence is evidence
        assert verdict.reason in proof.reason
    assert proof_of(FunctionModel(lambda x: x[::-1])).evidence is None


@pytest.mark.parametrize(
    ("shape", "out", "words"),
    [
        ((1, 4), (-1, 4), 'input "x" is fixed at 1'),
        ((), (-1, 4), "scalar"),
    ],
)
def test_a_fixed_first_dimension_is_served_alone(
    shape: tuple[int, ...], out: tuple[int, ...], words: str
) -> None:
    model = FunctionModel(lambda x: x, shape, out=("FP32", out))
    proof = proof_of(model)
    assert not proof.batched
    assert words in proof.reason
    assert set(model.runs) <= {1}


def test_a_declared_number_of_rows_is_believed_only_if_runs_agree() -> None:
    declared = ("FP32", (1, 4))
    assert proof_of(FunctionModel(lambda x: x, out=declared)).batched
    assert proof_of(FunctionModel(lambda x: x, out=("FP32", None))).batched

    def reshapes(x: np.ndarray) -> np.ndarray:
        return x.reshape(1, 4)

    for function in (reshapes, lambda x: x[:1]):
        proof = proof_of(FunctionModel(function, out=declared))
        assert proof.reason == 'the first dimension of output "y" is fixed at 1'


def test_large_integers_are_tried_before_small_ones() -> None:
    def embed(x: np.ndarray) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[x]  # ids of 3 and more are out of its vocabulary

    assert proof_of(FunctionModel(embed, (-1, 5), "INT64")).batched


def test_other_dimensions_are_tried_until_one_fits() -> None:
    def needs_64(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), 64)

    assert proof_of(FunctionModel(needs_64, (-1, -1))).batched


def test_samples_are_used_if_made_up_rows_would_not_run() -> None:
    def strict(x: np.ndarray) -> np.ndarray:
        if x.shape[1] != 7 or not set(x.ravel().tolist()) <= {100, 200, 300}:
            raise ValueError("not in the vocabulary")
        return x.astype(np.float32)

    model = FunctionModel(strict, (-1, -1), "INT64")
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
    sample: np.ndarray, function: Callable[[np.ndarray], Any]
) -> None:
    datatype = "BYTES" if sample.dtype == object else "INT64"
    out = "BYTES" if sample.dtype == object else "FP32"
    model = FunctionModel(function, (-1, *sample.shape[1:]), datatype, out=(out, None))
    assert not proof_of(model, {"x": sample}).batched


def test_few_runs_confirm_what_the_graph_has_shown() -> None:
    model = FunctionModel(lambda x: x)
    assert check_batching(model, (), RowVerdict(Independence.INDEPENDENT, "no operation mixes rows")).batched
    assert sum(model.runs) < 16


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
