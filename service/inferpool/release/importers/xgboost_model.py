# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "joblib>=1.4",
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxmltools>=1.16",   # 1.16 is the first that converts categories
#   "pandas>=2",
#   "scikit-learn>=1.6",
#   "skl2onnx>=1.18",
#   "xgboost-cpu>=3.1",    # 3.1 is the first that keeps the names of categories; without the packages of CUDA
# ]
# ///
"""Converts a model of XGBoost to ONNX: a file of `save_model`, or a pickle that may be a pipeline.

xgboost_model.py MODEL.ubj EXAMPLE.npz OUT
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxmltools
import xgboost
from boosted_trees import convert_pipeline, input_types, write_trees
from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
from tabular import FEATURES, PICKLES, as_frame, as_inputs, load_pickle, match_categories, read_columns


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    pickled = source.suffix.lower() in PICKLES
    model = load_pickle(source, "xgboost") if pickled else xgboost.Booster(model_file=str(source))
    if isinstance(model, xgboost.Booster):
        model = with_interface(model, bytes(model.save_raw("ubj")))
    if isinstance(model, xgboost.XGBModel):
        convert(model, example, out)
    else:
        convert_pipeline(
            model, example, out, trees=(xgboost.XGBClassifier, xgboost.XGBRegressor),
            names=("XGBoostXGBClassifier", "XGBoostXGBRegressor"), convert=convert_xgboost,
        )  # fmt: skip


def with_interface(booster: Any, saved: bytes) -> Any:
    """Return the classifier or regressor of a booster: the converter reads parameters of these."""
    objective = json.loads(booster.save_config())["learner"]["objective"]["name"]
    kind = xgboost.XGBClassifier if objective.startswith(("binary:", "multi:")) else xgboost.XGBRegressor
    model = kind()
    model.load_model(bytearray(saved))
    return model


def convert(model: Any, example: Path, out: Path) -> None:
    """Convert a model with the interface of scikit-learn, and write the files."""
    booster = model.get_booster()
    names = booster.feature_names
    columns = read_columns(example, names or [f"f{at}" for at in range(booster.num_features())])
    known = categories_of(booster)
    categories = {name: known[at] for at, name in enumerate(columns) if at in known}
    columns = match_categories(columns, categories)
    rows: Any = as_frame(columns, categories) if names else as_inputs(columns, apart=False)[FEATURES]
    if names:
        rows.columns = names
    if categories:
        model.set_params(enable_categorical=True)
    elif booster.feature_types and "c" in booster.feature_types:
        model.set_params(enable_categorical=True, feature_types=booster.feature_types)
    classifier = isinstance(model, xgboost.XGBClassifier)
    answers = model.predict_proba(rows) if classifier else model.predict(rows)
    booster.feature_names = None  # the converter takes positions only
    converted = onnxmltools.convert_xgboost(model, initial_types=input_types(columns))
    write_trees(
        converted, out, columns, categories, answers, framework=f"XGBoost {xgboost.__version__}",
        kind=type(model).__name__, classes=model.classes_ if classifier else None,
    )  # fmt: skip


def categories_of(booster: Any) -> dict[int, list[Any]]:
    """Return the names of categories by the position of their column, as the file of a model has them.

    `Booster.get_categories` has them as well, but needs pyarrow, whose wheel is larger than that of XGBoost.
    """
    learner = json.loads(bytes(booster.save_raw("json")))["learner"]
    encoded = learner["gradient_booster"].get("model", {}).get("cats", {}).get("enc", [])
    found: dict[int, list[Any]] = {}
    for at, column in enumerate(encoded):
        values = column["values"]
        if not values:
            continue
        if "offsets" in column:
            raw = bytes(value & 0xFF for value in values)
            if not raw.isascii():
                # XGBoost 3.2 counts letters where it means bytes, and cuts names off.
                sys.exit("XGBoost keeps names of categories in ASCII only: fit the model with other names")
            found[at] = [raw[start:end].decode() for start, end in pairwise(column["offsets"])]
        else:
            found[at] = values
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
