# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "joblib>=1.4",
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "pandas>=2",
#   "scikit-learn>=1.6",
#   "skl2onnx>=1.18",
# ]
# ///
"""Converts a scikit-learn estimator or pipeline, saved by joblib or pickle, to ONNX.

    scikit_learn.py MODEL.joblib EXAMPLE.npz OUT

Numbers alone become one input `features`, [rows, columns], in FP32. With columns of strings, each column is
an input of its own, [rows, 1]. A classifier answers scores, a regressor numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import skl2onnx
import sklearn
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.base import BaseEstimator, is_classifier, is_regressor

FEATURES = "features"


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if it is nothing that predicts."""
    model = joblib.load(source)
    if not isinstance(model, BaseEstimator) or not (is_classifier(model) or is_regressor(model)):
        sys.exit(f"{type(model).__name__} is no classifier and no regressor")
    if is_classifier(model) and not hasattr(model, "predict_proba"):
        sys.exit(f"{type(model).__name__} gives no probabilities; SVC gives some with probability=True")
    with np.load(example, allow_pickle=False) as loaded:
        columns = {name: loaded[name] for name in loaded.files}
    expected = outputs_of(model, rows_of(model, columns))
    types: list[tuple[str, Any]]
    if has_strings(columns):
        types = [
            (name, StringTensorType([None, 1]) if column.dtype.kind == "U" else FloatTensorType([None, 1]))
            for name, column in columns.items()
        ]
        inputs = {name: column.reshape(len(column), 1) for name, column in columns.items()}
    else:
        types = [(FEATURES, FloatTensorType([None, len(columns)]))]
        inputs = {FEATURES: np.column_stack(list(columns.values())).astype(np.float32)}
    options = {"zipmap": False} if is_classifier(model) else None
    converted = skl2onnx.to_onnx(model, initial_types=types, options=options)
    rename_outputs(converted, classifier=is_classifier(model))
    (out / "model.onnx").write_bytes(converted.SerializeToString())
    named = {f"in:{name}": value for name, value in inputs.items()}
    np.savez(out / "imported.npz", **named, **{f"out:{name}": value for name, value in expected.items()})
    about = {
        "framework": f"scikit-learn {sklearn.__version__}",
        "converter": f"skl2onnx {skl2onnx.__version__}",
        "kind": type(model).__name__,
        "classes": [str(name) for name in model.classes_] if is_classifier(model) else None,
        "scores": "scores" if is_classifier(model) else None,
        "activation": "none",
    }
    (out / "imported.json").write_text(json.dumps(about))


def has_strings(columns: dict[str, Any]) -> bool:
    """Whether a column has strings; then every column is an input of its own."""
    return any(column.dtype.kind == "U" for column in columns.values())


def rows_of(model: Any, columns: dict[str, Any]) -> Any:
    """Return the rows as the model was fitted: a data frame if it knows names, else a matrix."""
    # The numbers that are served are FP32: the framework is asked about the same ones.
    numbers = {
        name: column if column.dtype.kind == "U" else column.astype(np.float32)
        for name, column in columns.items()
    }
    if hasattr(model, "feature_names_in_") or has_strings(columns):
        return pd.DataFrame(numbers)
    return np.column_stack(list(numbers.values()))


def outputs_of(model: Any, rows: Any) -> dict[str, Any]:
    """Return what the framework answers: `scores`, or `prediction`, [rows, numbers]."""
    if is_classifier(model):
        return {"scores": np.asarray(model.predict_proba(rows), np.float32)}
    predicted = np.asarray(model.predict(rows), np.float32)
    return {"prediction": predicted.reshape(len(predicted), -1)}


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


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
