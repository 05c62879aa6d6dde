# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "joblib>=1.4",
#   "lightgbm>=4.5",
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxmltools>=1.14",
#   "pandas>=2",
#   "scikit-learn>=1.6",
#   "skl2onnx>=1.18",
# ]
# ///
"""Converts a model of LightGBM to ONNX: a file of `save_model`, or a pickle that may be a pipeline.

lightgbm_model.py MODEL.txt EXAMPLE.npz OUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import onnxmltools
from boosted_trees import convert_pipeline, input_types, write_trees
from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
from tabular import FEATURES, PICKLES, as_frame, as_inputs, load_pickle, match_categories, read_columns

CLASSIFIERS = ("binary", "multiclass", "multiclassova")


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    pickled = source.suffix.lower() in PICKLES
    model = load_pickle(source, "lightgbm") if pickled else lightgbm.Booster(model_file=str(source))
    if isinstance(model, lightgbm.Booster):
        convert(model, None, example, out)
    elif isinstance(model, lightgbm.LGBMModel):
        convert(model.booster_, getattr(model, "classes_", None), example, out)
    else:
        convert_pipeline(
            model, example, out, trees=(lightgbm.LGBMClassifier, lightgbm.LGBMRegressor),
            names=("LightGbmLGBMClassifier", "LightGbmLGBMRegressor"), convert=convert_lightgbm,
            regressor_options={"split": None},
        )  # fmt: skip


def convert(booster: Any, classes: Any, example: Path, out: Path) -> None:
    """Convert a booster, and write the files. `classes` are the names that a classifier knows, if any."""
    dumped = booster.dump_model()
    objective = str(dumped.get("objective", "")).split()
    if not objective:
        sys.exit("the model has an objective of its own, which ONNX does not have")
    classifier = objective[0] in CLASSIFIERS
    columns = read_columns(example, booster.feature_name())
    categories = categories_of(booster, list(columns))
    columns = match_categories(columns, categories)
    rows = as_frame(columns, categories) if categories else as_inputs(columns, apart=False)[FEATURES]
    answers = booster.predict(rows)
    if objective[0] == "binary":
        answers = np.column_stack([1 - answers, answers])
    converted = onnxmltools.convert_lightgbm(booster, initial_types=input_types(columns), zipmap=False)
    if classifier and classes is None:
        classes = range(answers.shape[1])
    write_trees(
        converted, out, columns, categories, answers, framework=f"LightGBM {lightgbm.__version__}",
        kind=objective[0], classes=classes if classifier else None,
    )  # fmt: skip


def categories_of(booster: Any, names: list[str]) -> dict[str, list[Any]]:
    """Return the categories of a model that was fitted with a data frame, by the names of their columns.

    Exits if their columns cannot be told from others with categories.
    """
    listed = booster.pandas_categorical or []
    if not listed:
        return {}
    # Only the parameters in the file tell which columns have categories.
    written = re.search(r"(?m)^\[categorical_feature: ([\d,]+)\]$", booster.model_to_string())
    columns = [] if written is None else [int(at) for at in written[1].split(",")]
    if len(columns) != len(listed):
        sys.exit(
            "the model has columns of categories besides those of its data frame: fit it with the latter"
        )
    return {names[at]: known for at, known in zip(columns, listed, strict=True)}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
