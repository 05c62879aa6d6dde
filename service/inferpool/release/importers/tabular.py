"""What the scripts for models of tables share: columns in the model's order, and the inputs and outputs.

Numbers alone become one input `features`, [rows, columns], in FP32. If a column has strings or categories,
each column is an input of its own, [rows, 1]. A classifier answers `scores`, a regressor `prediction`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pandas as pd
import skl2onnx
import sklearn
from conversion import Array, read_arrays, write_about
from onnx import TensorProto, helper
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.base import BaseEstimator, is_classifier, is_regressor

FEATURES = "features"
PICKLES = (".joblib", ".pkl", ".pickle")
BOOSTERS = ("xgboost", "lightgbm", "catboost")
ML_OPSET = 3
"""The version of `ai.onnx.ml`: 2 is the first whose LabelEncoder makes numbers of any strings or numbers."""


def load_pickle(source: Path, framework: str) -> Any:
    """Load an estimator; exits with `import it with --from …` if another framework's packages are in it."""
    try:
        model = joblib.load(source)
    except ModuleNotFoundError as missing:
        name = str(missing.name).split(".")[0]
        if name in BOOSTERS and name != framework:
            sys.exit(f"it needs {name}: import it with --from {name}")
        raise
    for name in BOOSTERS:
        if name != framework and name in sys.modules:
            sys.exit(f"it needs {name}: import it with --from {name}")
    return model


def read_columns(example: Path, names: Sequence[str] | None) -> dict[str, Array]:
    """Return the columns of an example in the order of the model, numbers in FP32.

    `names` are those that the model knows. Exits if the example has other columns.
    """
    arrays = read_arrays(example)
    if len(arrays) == 1 and (matrix := next(iter(arrays.values()))).ndim == 2 and matrix.shape[1] > 1:
        known = names or [str(at) for at in range(matrix.shape[1])]
        if len(known) != matrix.shape[1]:
            sys.exit(f"the model takes {len(known)} columns; the example has {matrix.shape[1]}")
        arrays = {name: matrix[:, at] for at, name in enumerate(known)}
    columns = {name: np.reshape(array, len(array)) for name, array in arrays.items()}
    if names is not None:
        if len(names) != len(columns):
            sys.exit(f"the model takes {len(names)} columns ({_few(names)}); the example has {len(columns)}")
        if not all(re.fullmatch(r"(f|Column_)?\d+", name) for name in names):  # names that nobody gave
            # LightGBM writes an underscore for a space.
            found = {name.replace(" ", "_"): name for name in columns}
            missing = [name for name in names if name.replace(" ", "_") not in found]
            if missing:
                sys.exit(f"the model takes {_few(names)}; the example has no {_few(missing)}")
            columns = {each: columns[each] for each in (found[name.replace(" ", "_")] for name in names)}
    # The numbers that are served are FP32: the framework is asked about the same ones.
    return {
        name: column if column.dtype.kind == "U" else column.astype(np.float32)
        for name, column in columns.items()
    }


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def has_strings(columns: Mapping[str, Array]) -> bool:
    """Whether a column has strings; then every column is an input of its own."""
    return any(column.dtype.kind == "U" for column in columns.values())


def as_inputs(columns: Mapping[str, Array], *, apart: bool) -> dict[str, Array]:
    """Return the inputs of the converted model: the matrix `features`, or the columns [rows, 1] by name."""
    if apart:
        return {name: column.reshape(len(column), 1) for name, column in columns.items()}
    return {FEATURES: np.column_stack(list(columns.values()))}


def match_categories(columns: dict[str, Array], categories: Mapping[str, list[Any]]) -> dict[str, Array]:
    """Return the columns with strings where the categories of the model are strings.

    Exits if a column has strings of which the model knows no categories.
    """
    matched = {}
    for name, column in columns.items():
        known = categories.get(name)
        if known and isinstance(known[0], str) and column.dtype.kind != "U":
            # A CSV with the categories 1 and 2 reads as numbers, and as numbers it has no other form.
            column = np.array(["" if np.isnan(each) else f"{each:g}" for each in column])
        elif column.dtype.kind == "U" and not (known and isinstance(known[0], str)):
            sys.exit(f'column "{name}" has strings, of which the model knows no categories')
        matched[name] = column
    return matched


def as_frame(columns: Mapping[str, Array], categories: Mapping[str, list[Any]]) -> pd.DataFrame:
    """Return the rows as the framework takes them: categories as pandas has them, others missing."""
    return pd.DataFrame({
        name: pd.Categorical(column, categories[name]) if categories.get(name) else column
        for name, column in columns.items()
    })  # fmt: skip


def add_categories(model: Any, columns: Mapping[str, Array], categories: Mapping[str, list[Any]]) -> None:
    """Replace the input `features` by an input for each column; categories become their positions.

    What is no category becomes NaN, a missing value.
    """
    graph, nodes, parts, inputs = model.graph, [], [], []
    for at, (name, column) in enumerate(columns.items()):
        strings = column.dtype.kind == "U"
        kind = TensorProto.STRING if strings else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(name, kind, ["rows", 1]))
        known = categories.get(name)
        part = name
        if known:
            part = f"category_{at}"
            keys = {"keys_strings": known} if strings else {"keys_floats": [float(each) for each in known]}
            codes = [float(code) for code in range(len(known))]
            encoder: dict[str, Any] = {"values_floats": codes, "default_float": float("nan"), **keys}
            nodes.append(helper.make_node("LabelEncoder", [name], [part], domain="ai.onnx.ml", **encoder))
        parts.append(part)
    nodes.append(helper.make_node("Concat", parts, [FEATURES], axis=1))
    nodes.extend(graph.node)
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    opsets = {each.domain: each for each in model.opset_import}
    if "" not in opsets:
        model.opset_import.append(helper.make_opsetid("", 15))
    opsets["ai.onnx.ml"].version = max(opsets["ai.onnx.ml"].version, ML_OPSET)


def rename_outputs(converted: Any, *, classifier: bool) -> None:
    """Name the output `scores` or `prediction`. The label of a classifier goes: the scores tell it."""
    graph = converted.graph
    kept, name = (graph.output[-1], "scores") if classifier else (graph.output[0], "prediction")
    old = kept.name
    for node in graph.node:
        node.output[:] = [name if each == old else each for each in node.output]
        node.input[:] = [name if each == old else each for each in node.input]
    kept.name = name
    value = type(kept)()
    value.CopyFrom(kept)
    del graph.output[:]
    graph.output.append(value)


def convert_estimator(model: Any, example: Path, out: Path, opset: Mapping[str, int] | None = None) -> None:
    """Convert an estimator or pipeline of scikit-learn and write the files; exits if it predicts nothing."""
    if not isinstance(model, BaseEstimator) or not (is_classifier(model) or is_regressor(model)):
        sys.exit(f"{type(model).__name__} is no classifier and no regressor")
    classifier = is_classifier(model)
    if classifier and not hasattr(model, "predict_proba"):
        sys.exit(f"{type(model).__name__} gives no probabilities; SVC gives some with probability=True")
    known = getattr(model, "feature_names_in_", None)
    columns = read_columns(example, None if known is None else [str(name) for name in known])
    apart = has_strings(columns)
    framed = known is not None or apart
    rows: Any = pd.DataFrame(columns) if framed else as_inputs(columns, apart=False)[FEATURES]
    types: list[tuple[str, Any]] = [(FEATURES, FloatTensorType([None, len(columns)]))]
    if apart:
        kinds = [
            StringTensorType if column.dtype.kind == "U" else FloatTensorType for column in columns.values()
        ]
        types = [(name, kind([None, 1])) for name, kind in zip(columns, kinds, strict=True)]
    options = {"zipmap": False} if classifier else None
    converted = skl2onnx.to_onnx(model, initial_types=types, options=options, target_opset=opset)
    rename_outputs(converted, classifier=classifier)
    onnx.save(converted, out / "model.onnx")
    write_table(
        out, columns, model.predict_proba(rows) if classifier else model.predict(rows), apart=apart,
        framework=f"scikit-learn {sklearn.__version__}", converter=f"skl2onnx {skl2onnx.__version__}",
        kind=type(model).__name__, classes=model.classes_ if classifier else None,
    )  # fmt: skip


def write_table(
    out: Path,
    columns: Mapping[str, Array],
    answers: Any,
    *,
    apart: bool,
    framework: str,
    converter: str,
    kind: str,
    classes: Sequence[Any] | None,
) -> None:
    """Write what was converted: a classifier's `answers` are scores, [rows, classes]; others are numbers."""
    values = np.asarray(answers, np.float32)
    name = "prediction" if classes is None else "scores"
    write_about(
        out, as_inputs(columns, apart=apart), {name: values.reshape(len(values), -1)}, framework=framework,
        converter=converter, kind=kind, classes=classes, scores=None if classes is None else name,
    )  # fmt: skip
