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
"""

from __future__ import annotations

import sys
from pathlib import Path

from tabular import convert_estimator, load_pickle

if __name__ == "__main__":
    source, example, out = map(Path, sys.argv[1:4])
    convert_estimator(load_pickle(source, "scikit-learn"), example, out)
