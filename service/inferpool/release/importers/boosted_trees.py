"""What the scripts for LightGBM and XGBoost share: onnxmltools converts trees, alone or in a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxmltools
from onnxmltools.convert.common.data_types import FloatTensorType
from skl2onnx import update_registered_converter
from skl2onnx.common.shape_calculator import (
    calculate_linear_classifier_output_shapes,
    calculate_linear_regressor_output_shapes,
)
from tabular import FEATURES, ML_OPSET, add_categories, convert_estimator, rename_outputs, write_table

OPSETS = {"": 17, "ai.onnx.ml": ML_OPSET}


def input_types(columns: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Describe the input of the trees: one matrix of all columns."""
    return [(FEATURES, FloatTensorType([None, len(columns)]))]


def write_trees(
    converted: Any,
    out: Path,
    columns: Mapping[str, Any],
    categories: Mapping[str, list[Any]],
    answers: Any,
    *,
    framework: str,
    kind: str,
    classes: Sequence[Any] | None,
) -> None:
    """Write converted trees, whose inputs are columns if there are `categories`.

    `answers` are those of the framework, and `classes` the names that a classifier has; None for a regressor.
    """
    rename_outputs(converted, classifier=classes is not None)
    if categories:
        add_categories(converted, columns, categories)
    onnx.save(converted, out / "model.onnx")
    write_table(
        out, columns, answers, apart=bool(categories), framework=framework,
        converter=f"onnxmltools {onnxmltools.__version__}", kind=kind, classes=classes,
    )  # fmt: skip


def convert_pipeline(
    pipeline: Any,
    example: Path,
    out: Path,
    *,
    trees: tuple[type, type],
    names: tuple[str, str],
    convert: Callable[..., Any],
    regressor_options: Mapping[str, Any] | None = None,
) -> None:
    """Convert a pipeline that may have a classifier or a regressor of `trees`, and write the files.

    `names` are those of the two in skl2onnx, and `convert` is their converter.
    """
    classifier, regressor = trees
    update_registered_converter(
        classifier, names[0], calculate_linear_classifier_output_shapes,
        convert, options={"nocl": [True, False], "zipmap": [True, False, "columns"]},
    )  # fmt: skip
    update_registered_converter(
        regressor, names[1], calculate_linear_regressor_output_shapes, convert, options=regressor_options
    )
    convert_estimator(pipeline, example, out, OPSETS)
