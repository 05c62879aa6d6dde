"""Scores become labels with scores, best first, for all kinds of scores."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inferpool.codecs.labels import LabelsCodec, LabelsConfig, read_labels
from inferpool.errors import ConfigError, ModelFailed
from inferpool.tensors import ANY, Array, Signature, TensorSpec

NAMES = ("ant", "bee", "cat")
SLOWER = 4
"""How much slower than the quiet machine on which it was measured a machine may be: 0.03 s there."""


def signature(*outputs: TensorSpec) -> Signature:
    return Signature((), outputs)


def scores(shape: tuple[int, ...] | None = (ANY, 3), datatype: str = "FP32", name: str = "y") -> TensorSpec:
    return TensorSpec(name, datatype, shape)


def codec(names: tuple[str, ...] = NAMES, datatype: str = "FP32", **config: Any) -> LabelsCodec:
    return LabelsCodec(LabelsConfig(**config), signature(scores((ANY, ANY), datatype)), names)


def by_hand(
    row: list[float], activation: str, top_k: int, threshold: float | None
) -> list[tuple[int, float]]:
    """Return the predictions by definition, in Python's own numbers, for finite scores."""
    if activation == "softmax":
        top = max(row)
        total = math.fsum(math.exp(x - top) for x in row)
        row = [math.exp(x - top) / total for x in row]
    elif activation == "sigmoid":
        row = [1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in row]
    best = sorted(enumerate(row), key=lambda pair: (-pair[1], pair[0]))[:top_k]
    return [(index, score) for index, score in best if threshold is None or score >= threshold]


@given(
    logits=hnp.arrays(
        np.float64, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=st.integers(-40, 40).map(float)
    ),
    activation=st.sampled_from(["none", "softmax", "sigmoid"]),
    top_k=st.integers(1, 12),
)
def test_predictions_match_the_definition(logits: Array, activation: str, top_k: int) -> None:
    names = tuple(f"label {index}" for index in range(logits.shape[1]))
    got = codec(names, "FP64", activation=activation, top_k=top_k).predictions({"y": logits})
    assert len(got) == len(logits)
    for row, predicted in zip(logits.tolist(), got, strict=True):
        expected = by_hand(row, activation, top_k, None)
        found = [prediction["score"] for prediction in predicted]
        assert found == pytest.approx([score for _, score in expected], rel=1e-12)
        if activation == "none":
            assert [prediction["label"] for prediction in predicted] == [names[i] for i, _ in expected]


@given(
    logits=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(6)), elements=st.floats(width=32)),
    activation=st.sampled_from(["none", "softmax", "sigmoid"]),
    top_k=st.integers(1, 6),
    threshold=st.none() | st.floats(-1, 1),
)
def test_any_scores_give_ordered_predictions(
    logits: Array, activation: str, top_k: int, threshold: float | None
) -> None:
    made = codec(tuple("abcdef"), activation=activation, top_k=top_k, threshold=threshold)
    for row in made.predictions({"y": logits}):
        assert len(row) <= top_k
        assert len({prediction["label"] for prediction in row}) == len(row)
        scores = [prediction["score"] for prediction in row if prediction["score"] is not None]
        finite = [score for score in scores if isinstance(score, float) and math.isfinite(score)]
        assert finite == scores
        assert finite == sorted(finite, reverse=True)
        if activation != "none":
            assert all(0 <= score <= 1 for score in finite)
        if threshold is not None:
            assert all(score >= threshold for score in finite)


@given(
    logits=hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.just(4)), elements=st.floats(width=32)),
    top_k=st.integers(1, 4),
    threshold=st.none() | st.floats(-1, 1),
)
def test_pieces_of_json_are_those_of_the_predictions(
    logits: Array, top_k: int, threshold: float | None
) -> None:
    made = codec(('"', "é", "c", "\\"), top_k=top_k, threshold=threshold)
    with mock.patch("inferpool.codecs.labels._PIECE_LABELS", 8):
        written = b"".join(made.write_predictions({"y": logits}))
    assert written == orjson.dumps(made.predictions({"y": logits}))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(2, 4), st.just(3)), elements=st.floats(width=32)),
    st.sampled_from(["none", "softmax", "sigmoid"]),
    st.sampled_from([None, 0.25]),
)
def test_a_row_alone_has_the_labels_that_it_has_among_others(
    logits: Array, activation: str, threshold: float | None
) -> None:
    labels = codec(activation=activation, threshold=threshold, top_k=2)
    together = labels.predictions({"y": logits})
    assert together == [labels.predictions({"y": row[None]})[0] for row in logits]


def test_rows_of_any_length_are_sorted_alike() -> None:
    rows = np.random.default_rng(0).integers(0, 40, (5, 300)).astype(np.float32)
    rows[:, 7] = np.nan
    for columns in (100, 300):
        names = tuple(map(str, range(columns)))
        got = codec(names, top_k=20).predictions({"y": rows[:, :columns]})
        expected = np.argsort(-rows[:, :columns], axis=1, kind="stable")[:, :20].astype(str).tolist()
        assert [[prediction["label"] for prediction in row] for row in got] == expected


def test_a_million_rows_of_labels_take_less_than_half_a_second_of_cpu_time() -> None:
    names = tuple(map(str, range(10)))
    made = codec(names, activation="softmax", top_k=3)
    logits = np.random.default_rng(0).standard_normal((100_000, 10)).astype(np.float32)
    began = time.thread_time()
    for start in range(0, len(logits), 341):
        made._best(logits[start : start + 341])
    assert time.thread_time() - began < 0.05 * SLOWER


def test_an_answer_has_labels_and_scores() -> None:
    got = codec(top_k=2).predictions({"y": np.array([[0.25, 1.5, 0.5], [3, 2, 1]], np.float32)})
    assert got == [
        [{"label": "bee", "score": 1.5}, {"label": "cat", "score": 0.5}],
        [{"label": "ant", "score": 3.0}, {"label": "bee", "score": 2.0}],
    ]


def test_equal_scores_keep_their_order_also_at_the_cut() -> None:
    names = tuple(map(str, range(8)))
    row = np.array([[1, 2, 2, 0, 2, 1, 2, 1]], np.float32)
    for top_k in range(1, 9):
        labels = [prediction["label"] for prediction in codec(names, top_k=top_k).predictions({"y": row})[0]]
        assert labels == list("12460573"[:top_k])


def test_nan_comes_last_and_has_no_score() -> None:
    row = np.array([[np.nan, -np.inf, 0.5]], np.float32)
    assert codec().predictions({"y": row}) == [
        [{"label": "cat", "score": 0.5}, {"label": "bee", "score": None}, {"label": "ant", "score": None}]
    ]


def test_a_row_of_nothing_but_nan_keeps_its_order() -> None:
    row = np.full((1, 3), np.nan, np.float32)
    got = codec(activation="softmax", top_k=2).predictions({"y": row})
    assert got == [[{"label": "ant", "score": None}, {"label": "bee", "score": None}]]


def test_a_threshold_leaves_out_lower_scores_and_nan() -> None:
    row = np.array([[0.5, np.nan, 0.25]], np.float32)
    assert codec(threshold=0.5).predictions({"y": row}) == [[{"label": "ant", "score": 0.5}]]
    assert codec(threshold=0.75).predictions({"y": row}) == [[]]


def test_softmax_of_large_logits_does_not_overflow() -> None:
    got = codec(activation="softmax", top_k=1).predictions({"y": np.array([[1e38, -1e38, 0]], np.float32)})
    assert got == [[{"label": "ant", "score": 1.0}]]


def test_a_masked_label_has_no_probability() -> None:
    row = np.array([[0, -np.inf, 0]], np.float32)
    got = codec(activation="softmax").predictions({"y": row})
    assert [prediction["score"] for prediction in got[0]] == [0.5, 0.5, 0.0]


def test_sigmoid_keeps_the_digits_of_small_scores() -> None:
    row = np.array([[-50, 50, -1000]], np.float32)
    got = codec(activation="sigmoid").predictions({"y": row})[0]
    assert [prediction["score"] for prediction in got] == pytest.approx([1.0, math.exp(-50), 0.0], rel=1e-6)


def test_half_precision_is_scored_in_single() -> None:
    row = np.array([[0, 1, 2]], np.float16)
    got = codec(datatype="FP16", activation="softmax").predictions({"y": row})[0]
    expected = by_hand([0, 1, 2], "softmax", 3, None)
    assert [prediction["score"] for prediction in got] == pytest.approx([s for _, s in expected], rel=1e-6)


def test_bfloat16_is_read_from_its_bits() -> None:
    row = (np.array([[0.5, -2, 3]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    got = codec(datatype="BF16").predictions({"y": row})[0]
    assert [prediction["score"] for prediction in got] == [3.0, 0.5, -2.0]


def test_integers_are_scores_too() -> None:
    row = np.array([[3, 250, 7]], np.uint8)
    assert codec(datatype="UINT8", top_k=1).predictions({"y": row}) == [[{"label": "bee", "score": 250.0}]]


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 1), (3,)])
def test_an_output_of_the_wrong_shape_is_a_failure_of_the_model(shape: tuple[int, ...]) -> None:
    made = LabelsCodec(LabelsConfig(), signature(scores(None)), NAMES)
    with pytest.raises(ModelFailed, match='output "y"'):
        made.predictions({"y": np.zeros(shape, np.float32)})


def test_the_output_is_found_if_only_one_is_possible() -> None:
    outputs = (
        scores((ANY,), "INT64", "class"),
        scores((ANY, 3), "INT64", "counts"),
        scores((ANY, 3), "FP32", "logits"),
    )
    assert LabelsCodec(LabelsConfig(), signature(*outputs), NAMES).output == "logits"
    assert LabelsCodec(LabelsConfig(output="counts"), signature(*outputs), NAMES).output == "counts"


@pytest.mark.parametrize(
    ("outputs", "config", "names", "message"),
    [
        ([scores()], {"output": "z"}, NAMES, 'labels.output: no output is called "z"; the model gives "y"'),
        ([scores((ANY,)), scores((ANY, 2, 3), name="z")], {}, NAMES, "labels.output: must be given"),
        ([], {}, NAMES, "labels.output: must be given"),
        ([scores((ANY, 3, 3))], {}, NAMES, r'labels.output: "y" is \[-1, 3, 3\]'),
        ([scores((ANY, 3), "BYTES")], {}, NAMES, 'labels.output: "y" is BYTES'),
        ([scores((ANY, 4))], {"file": "w.txt"}, NAMES, 'labels.file: w.txt has 3 names, but "y" gives 4'),
        ([scores()], {}, (), "labels.file: labels.txt has no names"),
    ],
)
def test_contradictions_are_refused_with_the_key(
    outputs: list[TensorSpec], config: dict[str, Any], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        LabelsCodec(LabelsConfig(**config), signature(*outputs), names)


@pytest.mark.parametrize(
    "text", ["ant\nbee\ncat", "ant\nbee\ncat\n", "ant\r\nbee\r\ncat\r\n\r\n", "\ufeffant\nbee \n cat\n\n\n"]
)
def test_each_line_is_a_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(text.encode())
    assert read_labels(file) == NAMES


def test_only_a_newline_ends_a_name(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("käse\u2028brot\nsalt\x0bwater\n", encoding="utf-8")
    assert read_labels(file) == ("käse\u2028brot", "salt\x0bwater")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 is empty"),
        (b"\n\n", "line 1 is empty"),
        (b"ant\n\nbee\n", "line 2 is empty"),
        (b"ant\nbee\nant\n", '"ant" is on line 1 and again on line 3'),
        (b"ant\n\xff\n", "is not UTF-8 text"),
    ],
)
def test_the_error_for_a_bad_file_of_names_has_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^words.txt: .*{message}"):
        read_labels(file)


def test_a_missing_file_of_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^labels.txt: cannot be read \(No such file"):
        read_labels(tmp_path / "labels.txt")
