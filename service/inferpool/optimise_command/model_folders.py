"""The folder of a model: which version is optimised, and copies of the folder with another form of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx

from inferpool.client import Client
from inferpool.errors import ConfigError
from inferpool.evaluate_command.labelled_rows import LabelledRows
from inferpool.predict_command.local_server import run_with_model
from inferpool.repository.config import ModelConfig, read_config
from inferpool.repository.layout import CONFIG_FILE
from inferpool.settings import Settings
from inferpool.tensors import Array

_SAMPLES: Final = "samples"
_SEEN: Final = "inferpool_seen_"
_ROWS_PER_REQUEST: Final = 32


class SourceModel(NamedTuple):
    """The version that is optimised.

    Attributes:
        folder: the model's folder.
        number: the version.
        file: its ONNX file.
        config: what `model.toml` says.
        newest: the highest number of a version in the folder.
    """

    folder: Path
    number: int
    file: Path
    config: ModelConfig
    newest: int

    @property
    def newer_answers(self) -> bool:
        """Whether a newer version in the folder would answer requests at once."""
        versions = self.config.versions
        return "stable" not in versions.labels and isinstance(versions.serve, str)


def find_source(folder: Path, version: int | None) -> SourceModel:
    """Return a version of the model in `folder`, by default the one that answers; raises ConfigError."""
    numbers = sorted(int(each.name) for each in folder.iterdir() if each.is_dir() and each.name.isdecimal())
    if not numbers:
        raise ConfigError(f"{folder} has no folder with a version's number")
    config = read_config(folder / CONFIG_FILE)
    number = version or config.versions.labels.get("stable") or numbers[-1]
    if isinstance(config.versions.serve, tuple) and version is None:
        number = max((each for each in numbers if each in config.versions.serve), default=number)
    files = sorted((folder / str(number)).glob("*.onnx")) if number in numbers else []
    if len(files) != 1:
        raise ConfigError(f"{folder / str(number)} needs one ONNX file")
    return SourceModel(folder, number, files[0], config, numbers[-1])


def with_form(source: SourceModel, file: Path, parent: Path, *, samples: bool = False) -> Path:
    """Make a copy of the model's folder in `parent` whose only version is `file`; returns the copy.

    The files beside `file` are part of it: large weights are in files of their own. Golden samples come along
    with `samples` alone.
    """
    copy = parent / source.folder.resolve().name
    left_out = {each.name for each in source.folder.iterdir() if each.is_dir() and each.name.isdecimal()}
    if not samples:
        left_out.add(_SAMPLES)
    root = str(source.folder)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return left_out & set(names) if folder == root else set()

    shutil.copytree(root, copy, ignore=ignored)
    (copy / str(source.number)).mkdir()
    for each in file.parent.iterdir():
        if each.is_file():
            shutil.copyfile(each, copy / str(source.number) / each.name)
    return copy


def record_inputs(
    source: SourceModel, rows: LabelledRows, parent: Path, settings: Settings
) -> list[dict[str, Array]]:
    """Return what the model sees of `rows`, in several parts of up to 32 rows: pixels, tokens, numbers.

    A copy of the model returns its inputs as further outputs, so whatever turns requests into inputs is the
    server's own.
    """
    recorder = parent / "recorder" / "model.onnx"
    recorder.parent.mkdir()
    graph_model = onnx.load(source.file)
    graph = graph_model.graph
    constants = {tensor.name for tensor in graph.initializer}
    names = [each.name for each in graph.input if each.name not in constants]
    for value in graph.input:
        if value.name in names:
            graph.node.append(onnx.helper.make_node("Identity", [value.name], [_SEEN + value.name]))
            output = graph.output.add()
            output.CopyFrom(value)
            output.name = _SEEN + value.name
    onnx.save(graph_model, recorder)
    folder = with_form(source, recorder, parent)
    count = len(rows.targets)
    wanted = [_SEEN + name for name in names]

    def use(client: Client, model: str) -> list[dict[str, Array]]:
        found = []
        for start in range(0, count, _ROWS_PER_REQUEST):
            chosen = range(start, min(count, start + _ROWS_PER_REQUEST))
            outputs = client.predict(model, take_rows(rows.inputs, chosen), outputs=wanted).outputs
            found.append({name: outputs[_SEEN + name] for name in names})
        return found

    return run_with_model(folder, settings, use)


def take_rows(inputs: Any, numbers: Any) -> Any:
    """Return some rows of what a client predicts with: an array, a dict of them, a table or a list."""
    chosen = list(numbers)
    if isinstance(inputs, dict):
        return {name: array[chosen] for name, array in inputs.items()}
    if isinstance(inputs, list):
        return [inputs[number] for number in chosen]
    return inputs.take(chosen) if hasattr(inputs, "column_names") else inputs[chosen]
