"""Runs alone find models that share something among rows, whatever it is, and keep those that do not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from inferpool.backends.base import LoadedModel
from inferpool.repository.load.batching_check import check_batching
from inferpool.repository.load.batching_proof import BatchingProof
from inferpool.repository.load.batching_remedies import Obstacle
from inferpool.tensors import Signature, Tensors, TensorSpec

from tests.repository.load.function_model import FunctionModel

TABLE = np.random.default_rng(3).standard_normal((30_000, 4)).astype(np.float32)
TEXT_END = 29_999
CALLS = count()


def proof_of(
    function: Callable[[np.ndarray], Any],
    shape: tuple[int, ...] = (-1, 4),
    datatype: str = "FP32",
    out: str = "FP32",
    samples: tuple[Tensors, ...] = (),
) -> BatchingProof:
    return check_batching(FunctionModel(function, shape, datatype, (out, None)), samples)


def if_any(condition: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A model that adds 1 to every row if the condition holds for one."""
    return lambda x: x + np.float32(bool(np.any(condition(x))))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x / (255 if np.nanmax(x) > 50 else 1), id="pixels"),
        pytest.param(if_any(lambda x: np.abs(x).max(axis=1) < 0.05), id="dark"),
        pytest.param(if_any(lambda x: x.min(axis=1) > 100), id="bright"),
        pytest.param(if_any(lambda x: np.ptp(x, axis=1) == 0), id="constant"),
        pytest.param(if_any(lambda x: np.abs(x) > 1e5), id="huge"),
        pytest.param(if_any(lambda x: np.abs(x).max(axis=1) < 1e-4), id="tiny"),
        pytest.param(if_any(lambda x: (x == 0).all(axis=1)), id="zero"),
        pytest.param(if_any(lambda x: (x < 0).all(axis=1)), id="negative"),
        pytest.param(if_any(np.isnan), id="nan"),
        pytest.param(if_any(np.isinf), id="inf"),
        pytest.param(lambda x: np.nan_to_num(x) - np.nan_to_num(x)[-1:] * 1e-3, id="last"),
        pytest.param(lambda x: x + 1e-3 * np.nan_to_num(x)[:1], id="first"),
        pytest.param(lambda x: x + np.float32(1e-6) * np.nan_to_num(x).max(), id="small-beside-large"),
    ],
)
def test_what_rows_of_one_range_share_is_found(function: Callable[[np.ndarray], Any]) -> None:
    proof = proof_of(function)
    assert not proof.batched, proof.reason
    assert proof.fault is not None
    assert proof.fault.obstacle is Obstacle.ROWS_MIXED


def embed(ids: np.ndarray) -> np.ndarray:
    if ids.max() >= len(TABLE) or ids.min() < 0:
        raise IndexError("not in the vocabulary")
    return TABLE[ids].sum(axis=1)


@pytest.mark.parametrize(
    "shared",
    [
        pytest.param(lambda ids: (ids == TEXT_END).any(), id="end"),
        pytest.param(lambda ids: ids.max() > 20_000, id="rare"),
        pytest.param(lambda ids: (ids == 101).any(), id="special"),
        pytest.param(lambda ids: (ids[:, -1] == 0).any(), id="padding"),
        pytest.param(lambda ids: (ids == 0).all(axis=1).any(), id="empty"),
        pytest.param(lambda ids: ids.shape[1] > 20 and ids[0, 0] > 1, id="long"),
        pytest.param(lambda ids: ids.shape[1] < 8 and len(ids) > 1, id="short"),
    ],
)
def test_what_texts_of_one_kind_share_is_found(shared: Callable[[np.ndarray], Any]) -> None:
    proof = proof_of(lambda ids: embed(ids) + np.float32(bool(shared(ids))), (-1, -1), "INT64")
    assert not proof.batched, proof.reason
    assert proof_of(embed, (-1, -1), "INT64").batched


@pytest.mark.parametrize("datatype", ["UINT8", "INT8", "INT16", "INT32", "UINT32"])
def test_integers_come_from_the_whole_range(datatype: str) -> None:
    top = 100 if datatype.endswith("8") else 30_000

    def model(x: np.ndarray) -> np.ndarray:
        return (x.astype(np.float32) + (x.max() > top)).astype(np.float32)

    assert not proof_of(model, (-1, 4), datatype).batched
    assert proof_of(lambda x: x.astype(np.float32), (-1, 4), datatype).batched


def test_the_lowest_integer_is_never_run() -> None:
    """Divided by -1 it ends the process."""
    seen: list[int] = []

    def model(x: np.ndarray) -> np.ndarray:
        seen.append(int(x.min()))
        return x.astype(np.float32)

    sample = {"x": np.array([[-3, 2, 1, 7]], np.int64)}
    assert proof_of(model, datatype="INT64", samples=(sample,)).batched
    assert np.iinfo(np.int64).min < min(seen) < 0


@pytest.mark.parametrize(
    "shared",
    [
        pytest.param(lambda texts: max(map(len, texts)), id="longest"),
        pytest.param(lambda texts: max(len(text.split()) for text in texts), id="most-words"),
        pytest.param(lambda texts: "" in texts, id="empty"),
        pytest.param(lambda texts: all(map(str.isascii, texts)), id="ascii"),
        pytest.param(lambda texts: any(map(str.isdigit, texts)), id="digits"),
    ],
)
def test_what_strings_share_is_found(shared: Callable[[list[str]], int]) -> None:
    def model(x: np.ndarray) -> np.ndarray:
        texts = x.ravel().tolist()
        return np.array([[len(text), shared(texts)] for text in texts])

    assert not proof_of(model, (-1, 1), "BYTES", "INT64").batched


def test_strings_by_themselves_are_batched() -> None:
    assert proof_of(lambda x: np.array([[len(t)] for t in x.ravel()]), (-1, 1), "BYTES", "INT64").batched


def test_all_golden_samples_are_mixed() -> None:
    """Only one sample in ten shows what the rows share."""

    def model(x: np.ndarray) -> np.ndarray:
        if not np.isin(x, range(200)).all():
            raise ValueError("no code of mine")
        return x.astype(np.float32) + (x == 177).any()

    samples = tuple({"x": np.array([[row, row + 1]], np.int64)} for row in range(168, 180))
    assert not proof_of(model, (-1, 2), "INT64", samples=samples).batched
    wide = ({"x": np.array([[0, 1]])}, {"x": np.arange(3).reshape(1, 3)}, {"x": np.array([[5, 2, 9]])})
    mixes = proof_of(
        lambda x: x.astype(np.float32) + (x.shape[1] == 3 and x.max()), (-1, -1), "INT64", samples=wide
    )
    assert not mixes.batched


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x + np.random.default_rng().random(x.shape, np.float32), id="random"),
        pytest.param(lambda x: x + next(CALLS), id="state"),
    ],
)
def test_a_model_that_answers_differently_each_time_is_told_apart(
    function: Callable[[np.ndarray], Any],
) -> None:
    proof = proof_of(function)
    assert proof.fault is not None
    assert proof.fault.obstacle is Obstacle.ANSWERS_CHANGE
    assert "answers differently each time" in proof.reason


def test_a_model_that_remembers_the_rows_before_is_told_apart() -> None:
    before = np.zeros((1, 4), np.float32)

    def model(x: np.ndarray) -> np.ndarray:
        nonlocal before
        answer, before = x + before, np.nan_to_num(x[-1:])
        return answer

    proof = proof_of(model)
    assert proof.fault is not None
    assert proof.fault.obstacle is Obstacle.ANSWERS_CHANGE


@pytest.mark.parametrize("shape", [(1, 4), (3, 4)])
def test_a_model_that_is_never_batched_is_told_apart_too(shape: tuple[int, ...]) -> None:
    proof = proof_of(lambda x: x + np.random.default_rng().random(x.shape, np.float32), shape)
    assert "answers differently each time" in proof.reason


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x @ TABLE[:4], id="product"),
        pytest.param(lambda x: (x @ TABLE[:4, :1])[:, 0], id="one-number"),
        pytest.param(lambda x: np.concatenate([x * 640, np.tanh(x)], axis=1), id="scores-and-places"),
        pytest.param(lambda x: np.where(x > 0, np.inf, x), id="not-finite"),
        pytest.param(lambda x: np.exp(np.clip(x, -80, 80)), id="exponential"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_by_themselves_are_batched(function: Callable[[np.ndarray], Any]) -> None:
    proof = proof_of(lambda x: function(x).astype(np.float32))
    assert proof.batched, proof.reason


def test_rows_that_the_model_refuses_alone_are_left_out() -> None:
    def model(x: np.ndarray) -> np.ndarray:
        if not (np.abs(x) < 4).all():
            raise ValueError("out of range")
        return x

    proof = proof_of(model)
    assert proof.batched
    assert np.abs(proof.rows["x"]).max() < 4


def test_an_input_of_flags_and_one_of_numbers_vary_together_and_apart() -> None:
    class Masked(LoadedModel):
        signature = Signature(
            (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("mask", "BOOL", (-1, 4))),
            (TensorSpec("y", "FP32", (-1,)),),
        )

        def run(self, inputs: Tensors, outputs: object = None) -> Tensors:
            kept = np.where(inputs["mask"], np.nan_to_num(inputs["x"], posinf=1e6), 0)
            some = inputs["mask"].any(axis=1)
            return {"y": (kept.sum(axis=1) + 5 * (not some.all())).astype(np.float32)}

        def close(self) -> None:
            pass

    assert not check_batching(Masked(), ()).batched


def test_the_verdict_does_not_depend_on_how_fast_the_machine_is() -> None:
    """The runs are the same, because the check sees no clock."""
    runs = []
    for _ in range(2):
        model = FunctionModel(lambda x: x)
        check_batching(model, ())
        runs.append(model.runs)
    assert runs[0] == runs[1]
