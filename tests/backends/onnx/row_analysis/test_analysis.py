"""Which graphs mix rows: by the smallest graph of each kind, with the reason that is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inferpool.backends.onnx.row_analysis.analysis import (
    RULES,
    analyse,
    analyse_file,
    operations_without_rule,
)
from inferpool.backends.onnx.row_analysis.graph_file import read_graph
from inferpool.backends.row_verdict import Independence
from onnx import TensorProto as Type
from onnx import helper, numpy_helper

from tests.conftest import ROOT

node = helper.make_node


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: list[str],
    constants: dict[str, Any] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    """A model; `inputs` have a datatype and a shape, outputs declare nothing."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, Type.UNDEFINED, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    opsets = [
        helper.make_opsetid("", opset),
        helper.make_opsetid("ai.onnx.ml", 3),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


ROW = {"x": (Type.FLOAT, ["n", 4])}
IMAGE = {"x": (Type.FLOAT, ["n", 3, "h", "w"])}
WORDS = {"x": (Type.STRING, ["n"])}
TOKENS = {"ids": (Type.INT64, ["n", "s"]), "mask": (Type.INT64, ["n", "s"])}

MIXING = [
    (
        "one maximum",
        [node("ReduceMax", ["x"], ["y"], keepdims=0)],
        ROW,
        {},
        "ReduceMax takes one value over the whole batch",
    ),
    ("over the rows", [node("ReduceMean", ["x", "zero"], ["y"])], ROW, {"zero": [0]}, "over the rows"),
    (
        "one scale",
        [node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])],
        ROW,
        {},
        "takes one scale for all rows",
    ),
    ("widest", [node("StringSplit", ["x"], ["y", "c"], delimiter=" ")], WORDS, {}, "as wide as the longest"),
    (
        "kept rows",
        [node("Compress", ["x", "which"], ["y"], axis=0)],
        ROW,
        {"which": [True]},
        "picks rows by their position",
    ),
    ("old softmax", [node("Transpose", ["x"], ["t"]), node("Softmax", ["t"], ["y"], axis=0)], ROW, {}, None),
    ("softmax", [node("Softmax", ["x"], ["y"], axis=0)], ROW, {}, "normalises over the rows"),
    (
        "statistics",
        [node("BatchNormalization", ["x", "a", "a", "a", "a"], ["y", "m", "v"], training_mode=1)],
        ROW,
        {"a": np.ones(4, np.float32)},
        "statistics of the batch",
    ),
    (
        "every row with every row",
        [node("Transpose", ["x"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
        ROW,
        {},
        "multiplies each row with each",
    ),
    (
        "sum over rows",
        [node("Transpose", ["x"], ["t"]), node("MatMul", ["t", "x"], ["y"])],
        ROW,
        {},
        "sums over the rows",
    ),
    ("first row", [node("Gather", ["x", "zero"], ["y"])], ROW, {"zero": 0}, "picks rows by their position"),
    (
        "divided by the rows",
        [
            node("Shape", ["x"], ["s"], end=1),
            node("Cast", ["s"], ["f"], to=Type.FLOAT),
            node("Div", ["x", "f"], ["y"]),
        ],
        ROW,
        {},
        "computes with the number of rows",
    ),
    (
        "numbered",
        [
            node("Shape", ["x"], ["s"], end=1),
            node("Squeeze", ["s"], ["n"]),
            node("Range", ["zero", "n", "one"], ["y"]),
        ],
        ROW,
        {"zero": 0, "one": 1},
        "numbers the rows",
    ),
    ("running sum", [node("CumSum", ["x", "zero"], ["y"])], ROW, {"zero": 0}, "runs along the rows"),
    (
        "boxes",
        [node("NonMaxSuppression", ["x", "s"], ["y"])],
        {"x": (Type.FLOAT, ["n", "b", 4]), "s": (Type.FLOAT, ["n", 1, "b"])},
        {},
        "lists the boxes of all rows",
    ),
    ("one row", [node("Reshape", ["x", "shape"], ["y"])], ROW, {"shape": [1, 4]}, "fixes the number of rows"),
    ("same for all", [node("Identity", ["c"], ["y"])], ROW, {"c": [1.0]}, "is the same for all rows"),
]

INDEPENDENT = [
    (
        "sizes with one name",
        [
            node("GlobalAveragePool", ["x"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("MatMul", ["f", "w"], ["y"]),
        ],
        {"x": (Type.FLOAT, ["?", 3, "?", "?"])},
        {"w": np.ones((3, 2), np.float32)},
    ),
    ("last axis", [node("Softmax", ["x"], ["s"]), node("ArgMax", ["s"], ["y"], axis=1, keepdims=0)], ROW, {}),
    (
        "recurrent",
        [
            node("Gather", ["e", "ids"], ["g"]),
            node("Transpose", ["g"], ["t"], perm=[1, 0, 2]),
            node("GRU", ["t", "w", "r"], ["", "last"], hidden_size=4),
            node("Squeeze", ["last", "zero"], ["v"]),
            node("MatMul", ["v", "o"], ["y"]),
        ],
        {"ids": (Type.INT64, ["n", "s"])},
        {
            "e": np.ones((20, 8), np.float32),
            "w": np.ones((1, 12, 8), np.float32),
            "r": np.ones((1, 12, 4), np.float32),
            "zero": [0],
            "o": np.ones((4, 2), np.float32),
        },
    ),
    (
        "heads",
        [
            node("Reshape", ["x", "heads"], ["h"]),
            node("Transpose", ["h"], ["q"], perm=[0, 2, 1, 3]),
            node("Transpose", ["h"], ["k"], perm=[0, 2, 3, 1]),
            node("MatMul", ["q", "k"], ["a"]),
            node("Softmax", ["a"], ["p"]),
            node("MatMul", ["p", "q"], ["m"]),
            node("Transpose", ["m"], ["b"], perm=[0, 2, 1, 3]),
            node("Reshape", ["b", "back"], ["y"]),
        ],
        {"x": (Type.FLOAT, ["n", "s", 8])},
        {"heads": [0, -1, 2, 4], "back": [0, -1, 8]},
    ),
    (
        "merged and cut again",
        [
            node("Shape", ["x"], ["s"]),
            node("Reshape", ["x", "flat"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Reshape", ["m", "s"], ["y"]),
        ],
        {"x": (Type.FLOAT, ["n", "s", 8])},
        {"flat": [-1, 8], "w": np.ones((8, 8), np.float32)},
    ),
    (
        "a token for each row",
        [
            node("Shape", ["x"], ["s"], end=1),
            node("Concat", ["s", "ones"], ["shape"], axis=0),
            node("Expand", ["token", "shape"], ["t"]),
            node("Concat", ["t", "x"], ["y"], axis=1),
        ],
        {"x": (Type.FLOAT, ["n", "s", 8])},
        {"ones": [1, 1], "token": np.ones((1, 1, 8), np.float32)},
    ),
    (
        "mean of the tokens that count",
        [
            node("Gather", ["e", "ids"], ["g"]),
            node("Cast", ["mask"], ["f"], to=Type.FLOAT),
            node("Unsqueeze", ["f", "two"], ["m"]),
            node("Mul", ["g", "m"], ["k"]),
            node("ReduceSum", ["k", "one"], ["t"], keepdims=0),
            node("ReduceSum", ["f", "one"], ["c"], keepdims=1),
            node("Div", ["t", "c"], ["y"]),
        ],
        TOKENS,
        {"e": np.ones((20, 8), np.float32), "one": [1], "two": [2]},
    ),
    (
        "branches",
        [
            node(
                "If",
                ["yes"],
                ["y"],
                then_branch=helper.make_graph(
                    [node("Relu", ["x"], ["a"])],
                    "t",
                    [],
                    [helper.make_tensor_value_info("a", Type.FLOAT, None)],
                ),
                else_branch=helper.make_graph(
                    [node("Neg", ["x"], ["b"])],
                    "e",
                    [],
                    [helper.make_tensor_value_info("b", Type.FLOAT, None)],
                ),
            )
        ],
        ROW,
        {"yes": True},
    ),
    (
        "the row's own number",
        [
            node("Shape", ["mask"], ["shape"]),
            node("Gather", ["shape", "zero"], ["rows"]),
            node("Range", ["zero", "rows", "one"], ["numbers"]),
            node("Unsqueeze", ["numbers", "second"], ["column"]),
            node("Expand", ["column", "shape"], ["own"]),
            node("Unsqueeze", ["own", "last"], ["first"]),
            node("Unsqueeze", ["ids", "last"], ["then"]),
            node("Concat", ["first", "then"], ["positions"], axis=-1),
            node("GatherND", ["mask", "positions"], ["y"]),
        ],
        {"mask": (Type.INT64, ["n", 3]), "ids": (Type.INT64, ["n", 3])},
        {"zero": 0, "one": 1, "second": [1], "last": [-1]},
    ),
    (
        "blocks of rows added up",
        [
            node("Concat", ["x", "x"], ["both"], axis=0),
            node("Reshape", ["both", "apart"], ["blocks"]),
            node("ReduceSum", ["blocks", "zero"], ["y"], keepdims=0),
        ],
        ROW,
        {"apart": [2, -1, 4], "zero": [0]},
    ),
    (
        "several indices of each row",
        [
            node("TopK", ["x", "two"], ["v", "i"], axis=1),
            node("ArrayFeatureExtractor", ["names", "i"], ["f"], domain="ai.onnx.ml"),
            node("Reshape", ["f", "shape"], ["y"]),
        ],
        ROW,
        {"two": [2], "names": np.arange(4), "shape": [-1, 2]},
    ),
    (
        "written to shared positions",
        [
            node("Transpose", ["x"], ["t"]),
            node("Gather", ["t", "zero"], ["g"]),
            node("Tanh", ["g"], ["u"]),
            node("ScatterND", ["t", "at", "u"], ["s"]),
            node("Transpose", ["s"], ["y"]),
        ],
        ROW,
        {"zero": [0], "at": [[1]]},
    ),
    ("trees", [node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1)], ROW, {}),
    (
        "classes by name",
        [
            node("ArgMax", ["x"], ["i"], axis=1, keepdims=0),
            node("ArrayFeatureExtractor", ["names", "i"], ["f"], domain="ai.onnx.ml"),
            node("Reshape", ["f", "flat"], ["y"]),
        ],
        ROW,
        {"names": np.arange(4), "flat": [-1]},
    ),
]


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants", "reason"),
    [case[1:] for case in MIXING],
    ids=[case[0] for case in MIXING],
)
def test_a_graph_that_mixes_rows_is_found_out(
    nodes: list[onnx.NodeProto], inputs: dict[str, Any], constants: dict[str, Any], reason: str | None
) -> None:
    model = model_of(nodes, inputs, ["y"], constants, opset=11 if reason is None else 20)
    verdict = analyse(model)
    assert verdict.independence is Independence.MIXES, verdict
    assert (reason or "normalises over the rows") in verdict.reason


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants"),
    [case[1:] for case in INDEPENDENT],
    ids=[case[0] for case in INDEPENDENT],
)
def test_a_graph_of_independent_rows_is_proven(
    nodes: list[onnx.NodeProto], inputs: dict[str, Any], constants: dict[str, Any]
) -> None:
    assert analyse(model_of(nodes, inputs, ["y"], constants)).independence is Independence.INDEPENDENT


def test_a_condition_on_the_rows_mixes_them() -> None:
    branches = {
        branch: helper.make_graph(
            [node("Identity", ["x"], [branch])],
            branch,
            [],
            [helper.make_tensor_value_info(branch, Type.FLOAT, None)],
        )
        for branch in ("then_branch", "else_branch")
    }
    nodes = [
        node("ReduceMax", ["x"], ["top"], keepdims=0),
        node("Greater", ["top", "limit"], ["bright"]),
        node("If", ["bright"], ["y"], **branches),
    ]
    verdict = analyse(model_of(nodes, ROW, ["y"], {"limit": np.float32(50)}))
    assert verdict.independence is Independence.MIXES


def tokens_of(inputs: list[Any], words: list[str], filler: str = "#") -> onnx.ModelProto:
    """A count of words, as skl2onnx writes TF-IDF: strings to tables of words, each row filled up."""
    text = {"x": (Type.STRING, inputs)}
    tokenizer = node(
        "Tokenizer", ["x"], ["t"], domain="com.microsoft",
        mark=0, mincharnum=1, pad_value=filler, tokenexp="[a-z]+",
    )  # fmt: skip
    count = node(
        "TfIdfVectorizer", ["f"], ["y"], mode="TF", max_gram_length=2, min_gram_length=1, max_skip_count=0,
        ngram_counts=[0, 2], ngram_indexes=[0, 1, 2], pool_strings=words,
    )  # fmt: skip
    return model_of([tokenizer, node("Flatten", ["t"], ["f"]), count], text, ["y"])


def test_words_are_counted_for_each_row_unless_the_filler_counts() -> None:
    for shape in (["n", 1], ["n"]):
        verdict = analyse(tokens_of(shape, ["good", "bad", "good", "bad"]))
        assert verdict.independence is Independence.INDEPENDENT
    counted = analyse(tokens_of(["n", 1], ["good", "#", "good", "#"]))
    assert counted.reason == "Tokenizer makes every row as wide as the longest"
    several = analyse(tokens_of(["n", 2], ["good", "bad", "good", "bad"]))
    assert several.independence is Independence.MIXES


def test_an_operation_without_a_rule_is_named() -> None:
    model = model_of([node("Sideways", ["x"], ["y"], name="third", domain="com.microsoft")], ROW, ["y"])
    assert analyse(model).independence is Independence.UNKNOWN
    assert analyse(model).reason == 'Sideways "third": no rule for this operation'
    assert operations_without_rule(model) == {"com.microsoft.Sideways"}


def test_random_numbers_are_told_apart() -> None:
    verdict = analyse(model_of([node("RandomNormalLike", ["x"], ["y"])], ROW, ["y"]))
    assert verdict == (Independence.UNKNOWN, "RandomNormalLike draws random numbers")


@pytest.mark.parametrize("name", ["digits", "diabetes", "forecast", "next-word"])
def test_models_that_come_with_the_project_are_proven(name: str) -> None:
    model = onnx.load(str(ROOT / "models" / name / "1" / "model.onnx"))
    assert not operations_without_rule(model)
    assert analyse(model).independence is Independence.INDEPENDENT


def test_declared_shapes_are_not_believed() -> None:
    model = model_of([node("MatMul", ["x", "w"], ["y"])], ROW, ["y"], {"w": np.ones((4, 3), np.float32)})
    model.graph.output[0].type.tensor_type.elem_type = Type.FLOAT
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1
    assert analyse(model).independence is Independence.INDEPENDENT


def test_the_numbers_of_large_weights_are_not_read(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Reshape", ["m", "flat"], ["y"])]
    model = model_of(nodes, ROW, ["y"], {"w": np.ones((4, 50_000), np.float32), "flat": [-1, 50_000]})
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    read = read_graph(file)
    weights, shape = read.graph.initializer
    assert (list(weights.dims), weights.raw_data) == ([4, 50_000], b"")
    assert numpy_helper.to_array(shape).tolist() == [-1, 50_000]
    assert analyse_file(file).independence is Independence.INDEPENDENT
    whole = file.read_bytes()
    weights.raw_data = model.graph.initializer[0].raw_data
    assert read == model
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no complete model"):
        read_graph(file)


def test_every_rule_belongs_to_an_operation_that_exists() -> None:
    known = {
        schema.name if schema.domain in ("", "ai.onnx") else f"{schema.domain}.{schema.name}"
        for schema in onnx.defs.get_all_schemas_with_history()
    }
    known.add("SimplifiedLayerNormalization")  # ONNX Runtime has it in ONNX's own domain
    assert not {name for name in RULES if not name.startswith("com.microsoft.") and name not in known}
