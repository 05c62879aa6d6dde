"""What the scripts of this folder share: the example, and the three files that they write.

The scripts import this module by its bare name: their environments do not have the package `inferpool`.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def read_arrays(example: Path) -> dict[str, Array]:
    """Return the arrays of an example by name."""
    with np.load(example, allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}


def write_about(
    out: Path,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    *,
    framework: str,
    converter: str,
    kind: str,
    classes: Sequence[Any] | None = None,
    scores: str | None = None,
    activation: str = "none",
    tables: str = "",
    licence: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Write `imported.npz` and `imported.json` into the folder `out`.

    `outputs` are the framework's answers to `inputs`. `scores` names the output with a score for each class,
    which `activation` makes probabilities of. `tables` are further tables of `model.toml`; `licence` and
    `notes`, a sentence each, are for the card.
    """
    arrays = {f"in:{name}": value for name, value in inputs.items()}
    arrays |= {f"out:{name}": value for name, value in outputs.items()}
    np.savez(out / "imported.npz", **arrays)  # type: ignore[arg-type]  # numpy's types want a flag there
    about = {
        "framework": framework,
        "converter": converter,
        "packages": package_versions(Path(sys.argv[0])),
        "kind": kind,
        "classes": None if classes is None else [str(name) for name in classes],
        "scores": scores,
        "activation": activation,
        "tables": tables,
        "licence": licence,
        "notes": list(notes),
    }
    (out / "imported.json").write_text(json.dumps(about))


def package_versions(script: Path) -> dict[str, str]:
    """Return the versions of Python and of the packages that the first lines of a script name."""
    names = re.findall(r'(?m)^#   "([\w.-]+)', script.read_text("utf-8")) if script.suffix == ".py" else []
    return {"Python": platform.python_version()} | {name: metadata.version(name) for name in names}


def match_names(arrays: dict[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Return the arrays of an example in the order of a model's inputs.

    A single array needs no name, and columns of numbers become the single input, [rows, columns]. Raises
    SystemExit if the example has other names.
    """
    if len(names) == 1 and names[0] not in arrays:
        if len(arrays) == 1:
            return {names[0]: next(iter(arrays.values()))}
        if all(array.ndim == 1 and array.dtype.kind in "fiub" for array in arrays.values()):
            return {names[0]: np.column_stack(list(arrays.values()))}
    if sorted(arrays) != sorted(names):
        raise SystemExit(f"the model takes {', '.join(names)}; the example has {', '.join(arrays)}")
    return {name: arrays[name] for name in names}


def find_scores(outputs: Mapping[str, Array]) -> tuple[str, str]:
    """Return the output that may have a score for each class, and the activation that makes probabilities.

    It is the first one with several columns. Rows that add up to 1 are probabilities already.
    """
    for name, values in outputs.items():
        if values.ndim == 2 and values.shape[1] > 1 and values.dtype.kind == "f":
            probable = (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3)
            return name, "none" if probable else "softmax"
    return next(iter(outputs)), "none"
