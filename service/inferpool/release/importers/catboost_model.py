# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "catboost>=1.2.8",
#   "joblib>=1.4",
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "pandas>=2",
#   "scikit-learn>=1.6",
#   "skl2onnx>=1.18",
# ]
# ///
"""Converts a model of CatBoost to ONNX by CatBoost itself: a file of `save_model`, or a pickle.

catboost_model.py MODEL.cbm EXAMPLE.npz OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import catboost
import onnx
from tabular import (
    FEATURES,
    PICKLES,
    as_inputs,
    has_strings,
    load_pickle,
    read_columns,
    rename_outputs,
    write_table,
)


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    if source.suffix.lower() in PICKLES:
        model = load_pickle(source, "catboost")
        if not isinstance(model, catboost.CatBoost):
            sys.exit(
                f"CatBoost converts its own models, not in a {type(model).__name__}: import the last step"
            )
    else:
        model = catboost.CatBoost()
        model.load_model(str(source), format="json" if source.suffix.lower() == ".json" else "cbm")
    convert(model, example, out)


def convert(model: Any, example: Path, out: Path) -> None:
    """Convert a model, and write the files."""
    if model.get_cat_feature_indices() or model.get_text_feature_indices():
        sys.exit("CatBoost exports no columns of categories or text: encode them before, in numbers")
    columns = read_columns(example, model.feature_names_)
    if has_strings(columns):
        sys.exit("the model takes numbers, and the example has strings")
    classifier = model.classes_ is not None and len(model.classes_) > 0
    features = as_inputs(columns, apart=False)[FEATURES]
    if classifier and {str(name) for name in model.classes_} <= {"True", "False"}:
        sys.exit("CatBoost exports no classes True and False: fit the model with numbers or names")
    exponential = is_exponential(model)
    kind = "Probability" if classifier else "Exponent" if exponential else "RawFormulaVal"
    answers = model.predict(features, prediction_type=kind)
    model.save_model(str(out / "model.onnx"), format="onnx")
    converted = onnx.load(out / "model.onnx")
    finish_outputs(converted.graph, exponential=exponential)
    rename_outputs(converted, classifier=classifier)
    onnx.save(converted, out / "model.onnx")
    write_table(
        out, columns, answers, apart=False,
        framework=f"CatBoost {catboost.__version__}", converter=f"CatBoost {catboost.__version__}",
        kind=type(model).__name__, classes=model.classes_ if classifier else None,
    )  # fmt: skip


def is_exponential(model: Any) -> bool:
    """Whether the model predicts the exponent of what its trees add up to."""
    return str(model.get_all_params().get("loss_function", "")).split(":")[0] in ("Poisson", "Tweedie")


def finish_outputs(graph: Any, *, exponential: bool) -> None:
    """Make every output a tensor of the shape that it has; `exponential` takes the exponent of the first one.

    CatBoost's scores are a list of mappings, its regressions have a dimension too few in their type, and its
    file has only what the trees add up to.
    """
    for node in [each for each in graph.node if each.op_type == "ZipMap"]:
        output = next(each for each in graph.output if each.name == node.output[0])
        output.CopyFrom(tensor_of(node.input[0], None))
        graph.node.remove(node)
    if len(graph.output) == 1:
        name = graph.output[0].name
        if exponential:
            graph.node.append(onnx.helper.make_node("Exp", [name], ["exponent"]))
            name = "exponent"
        graph.output[0].CopyFrom(tensor_of(name, 1))


def tensor_of(name: str, columns: int | None) -> Any:
    """Describe an output [rows, columns] of FP32."""
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", columns])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
