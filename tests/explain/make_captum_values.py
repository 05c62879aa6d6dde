"""Writes `captum_values.json`: what the package `captum` says of two networks, for comparison.

It is not among the packages of the tests, because it needs matplotlib. To write the file again:

    pip install --no-deps captum==0.9.0 matplotlib cycler kiwisolver contourpy pyparsing tqdm
    python -m tests.explain.make_captum_values
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from tests.backends.torch.networks import digits
from tests.explain.models import SEVEN, seven
from tests.explain.networks import ROW, Curved

IntegratedGradients: Any = importlib.import_module("captum.attr").IntegratedGradients
FILE = Path(__file__).with_name("captum_values.json")


def explain(network: torch.nn.Module, row: torch.Tensor, target: int) -> list[float]:
    """The contributions with the baseline of zeros, by as many steps as Captum usually takes."""
    found = IntegratedGradients(network).attribute(row, target=target)
    values: list[float] = found.reshape(-1).tolist()
    return values


if __name__ == "__main__":
    values = {
        "curved": explain(Curved(), torch.tensor([ROW]), 1),
        "digits": explain(digits(), torch.tensor(seven()[None]), SEVEN),
    }
    FILE.write_text(json.dumps(values, indent=1) + "\n")
