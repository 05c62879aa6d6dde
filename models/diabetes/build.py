# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxruntime>=1.27",
#   "scikit-learn>=1.6",
#   "skl2onnx>=1.18",
#   "tqdm>=4",
# ]
# ///
"""Fit, evaluate and export the diabetes model: linear regression from scikit-learn to a served folder.

    inferpool build diabetes [--out DIR] [--seed N]

The data are the 442 patients of Efron, Hastie, Johnstone and Tibshirani, "Least Angle Regression" (2004),
bundled with scikit-learn. The ten features are taken as they are measured; the scaling that the regression
wants is a part of the model. The ONNX file, run by ONNX Runtime, is judged on a fifth of the patients that it
has never seen, and nothing is written where it explains less than `STATED_R2` of the variance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final, TypeAlias


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(description="Fit, evaluate and export the diabetes model.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="model folder to write into (default: the one this script is in)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    # Before anything is imported that must be installed: help and mistakes need none of it.
    read_options()

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import KFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

Array: TypeAlias = npt.NDArray[Any]

STATED_R2: Final = 0.3
FOLDS: Final = 10
SAMPLE_ROWS: Final = 3


def split(seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Return features (n×10, in the card's units), held-out features, targets (n), held-out targets."""
    patients = load_diabetes(scaled=False)
    parts = train_test_split(patients.data, patients.target, test_size=0.2, random_state=seed)
    training_features, held_out_features, training_targets, held_out_targets = parts
    return training_features, held_out_features, training_targets, held_out_targets


def fit(features: Array, targets: Array) -> Pipeline:
    """Fit the regression: standardise each feature, then least squares."""
    return make_pipeline(StandardScaler(), LinearRegression()).fit(features, targets)


def cross_validate(features: Array, targets: Array, seed: int) -> Array:
    """Return R² on each of `FOLDS` folds: how much one lucky split can hide."""
    folds = KFold(FOLDS, shuffle=True, random_state=seed).split(features)
    return np.array(
        [
            r2_score(targets[test], fit(features[train], targets[train]).predict(features[test]))
            for train, test in tqdm(folds, desc="cross-validation", total=FOLDS, unit="fold")
        ]
    )


def to_onnx(pipeline: Pipeline) -> onnx.ModelProto:
    """Convert the pipeline: `features` FP32 [-1, 10] in, `progression` FP32 [-1, 1] out."""
    model: onnx.ModelProto = convert_sklearn(
        pipeline,
        name="diabetes",
        initial_types=[("features", FloatTensorType([None, 10]))],
        final_types=[("progression", FloatTensorType([None, 1]))],
        target_opset=17,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, features: Array) -> Array:
    """Predict with ONNX Runtime, as the server will."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    progression: Array = session.run(["progression"], {"features": features.astype(np.float32)})[0]
    return progression


def write(out: Path, model: onnx.ModelProto, features: Array, progression: Array) -> None:
    """Write version 1 and its golden samples."""
    version, samples = out / "1", out / "samples"
    version.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    golden = {
        "inputs": {"features": features[:SAMPLE_ROWS].tolist()},
        "outputs": {"progression": np.round(progression[:SAMPLE_ROWS].astype(float), 4).tolist()},
        # In the target's own unit, whose values run from 25 to 346: one float32 step there is 3e-5.
        "tolerance": 1e-3,
    }
    (samples / "held_out.json").write_text(json.dumps(golden) + "\n")


def main() -> int:
    """Build the model; the exit code is 1 if it is not good enough to be written."""
    options = read_options()

    training_features, features, training_targets, targets = split(options.seed)
    r2_by_fold = cross_validate(training_features, training_targets, options.seed)
    print(f"cross-validated R²: {r2_by_fold.mean():.3f} ± {r2_by_fold.std():.3f} over {FOLDS} folds")
    model = to_onnx(fit(training_features, training_targets))
    progression = run(model, features)
    r2 = r2_score(targets, progression)
    error, guess = (
        mean_absolute_error(targets, values)
        for values in (progression[:, 0], np.full_like(targets, training_targets.mean()))
    )
    print(f"held-out R²: {r2:.3f}; mean absolute error: {error:.1f} (always guessing the mean: {guess:.1f})")
    if r2 < STATED_R2:
        print(f"not written: the card states R² of at least {STATED_R2}", file=sys.stderr)
        return 1
    write(options.out, model, features, progression)
    print(f"written: {options.out / '1' / 'model.onnx'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
