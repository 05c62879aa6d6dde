"""The folder of an imported model: the version, `model.toml`, labels, golden samples and the card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from inferpool.errors import InvalidInput
from inferpool.import_command.conversion_run import Converted
from inferpool.repository.load.golden_samples import MOST_SAMPLE_BYTES
from inferpool.tensors import Array

SAMPLE_ROWS: Final = 3


def write_model(
    folder: Path,
    converted: Converted,
    names: Sequence[str] | None,
    source: str,
    example: str,
    tolerance: float,
) -> None:
    """Write the model's folder with its first version. `names` are those of the classes, if it has any.

    Raises InvalidInput if there are names and no scores.
    """
    about = converted.about
    (folder / "1").mkdir(parents=True)
    for each in converted.file.parent.glob("model.onnx*"):  # large weights are in a file of their own
        shutil.copyfile(each, folder / "1" / each.name)
    tokenizer = converted.file.with_name("tokenizer.json")
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    kind = f"{about['kind']} of {about['framework']}, from {source}"
    table = [f"description = {json.dumps(kind, ensure_ascii=False)}"]
    if about["tables"]:
        table += ["", about["tables"].rstrip()]
    if names and about["scores"] is None:
        raise InvalidInput("the model answers no scores of classes, which --labels could name")
    if names:
        (folder / "labels.txt").write_text("".join(f"{each}\n" for each in names), "utf-8")
        table += [
            "",
            "[labels]",
            f"output = {json.dumps(about['scores'], ensure_ascii=False)}",
            f'activation = "{about["activation"]}"',
        ]
    (folder / "model.toml").write_text("\n".join(table) + "\n", "utf-8")
    card = write_card(folder.name, converted, kind, example, tolerance, names)
    (folder / "README.md").write_text(card, "utf-8")


def write_sample(folder: Path, converted: Converted, tolerance: float) -> None:
    """Write the first rows as the golden sample of the model's folder; replaces one that is there."""
    (folder / "samples").mkdir(exist_ok=True)
    sample = make_sample(converted.inputs, converted.expected, tolerance)
    (folder / "samples" / "imported.json").write_bytes(sample)


def make_sample(inputs: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float) -> bytes:
    """Return the JSON of a golden sample: three rows, or fewer if they are very large."""
    for rows in range(SAMPLE_ROWS, 0, -1):
        table = {
            "inputs": {name: _as_json(array[:rows]) for name, array in inputs.items()},
            "outputs": {name: _as_json(array[:rows]) for name, array in expected.items()},
            "tolerance": tolerance,
        }
        sample = orjson.dumps(table, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
        if len(sample) <= MOST_SAMPLE_BYTES:
            return sample
    raise InvalidInput(f"a row of the example is too large for a sample: more than {MOST_SAMPLE_BYTES} bytes")


def _as_json(array: Array) -> Any:
    """What orjson can write: it has short numbers, and null for NaN, but knows no strings of numpy."""
    return array.tolist() if array.dtype.kind in "US" or not array.ndim else np.ascontiguousarray(array)


def write_card(
    name: str,
    converted: Converted,
    kind: str,
    example: str,
    tolerance: float,
    names: Sequence[str] | None,
) -> str:
    """Return the text of the card, `README.md`."""
    about = converted.about
    rows = len(next(iter(converted.inputs.values())))
    lines = [
        f"# {name}",
        "",
        f"{kind}. Converted by {about['converter']} on {datetime.now(UTC):%Y-%m-%d}.",
        "",
        *(f"- **Input**: {_describe(each, array)}" for each, array in converted.inputs.items()),
        *(f"- **Output**: {_describe(each, array)}" for each, array in converted.expected.items()),
    ]
    if names:
        shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        lines.append(f"- **Classes**: {len(names)}: {shown}")
    lines += [
        f"- **Compared**: the answers to {rows} rows of {example} differ from the framework's by at most"
        f" {tolerance:g}, or {tolerance:g} of the answer; the first {min(rows, SAMPLE_ROWS)} are golden"
        " samples.",
        f"- **Environment** of the conversion: {'its own' if converted.alone else 'that of Inferpool'}, with"
        f" {', '.join(f'{each} {version}' for each, version in about['packages'].items())}.",
        *([f"- **Licence**: {about['licence']}"] if about["licence"] else []),
        *(f"- {note}" for note in about["notes"]),
        "",
    ]
    return "\n".join(lines)


def _describe(name: str, array: Array) -> str:
    kind = "text" if array.dtype.kind in "US" else array.dtype.name
    return f"`{name}`, {kind} [{', '.join(('rows', *map(str, array.shape[1:])))}]"


def add_version(folder: Path, target: Path) -> int:
    """Make `folder` the folder `target`, or its version another one there; returns the version."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, target)
        return 1
    numbers = [int(each.name) for each in target.iterdir() if each.is_dir() and each.name.isdecimal()]
    number = max(numbers, default=0) + 1
    shutil.copytree(folder / "1", target / f".{number}")
    (target / f".{number}").rename(target / str(number))
    return number
