"""Asks a model for its answers to labelled rows, and reads them as scores of classes or as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.client import Client, Prediction
from inferpool.codecs.labels import LabelsConfig, activate, read_labels
from inferpool.errors import ConfigError, InvalidInput
from inferpool.evaluate_command.labelled_rows import LabelledRows
from inferpool.predict_command.local_server import run_with_model
from inferpool.release.evaluate.metrics import ClassAnswers, NumberAnswers, class_indices
from inferpool.repository.config import read_config
from inferpool.repository.layout import CONFIG_FILE
from inferpool.settings import Settings
from inferpool.tensors import Array

CLASSIFICATION: Final = "classification"
REGRESSION: Final = "regression"
NEXT_WORD: Final = "next-word"
RETRIEVAL: Final = "retrieval"
TASKS: Final = (CLASSIFICATION, REGRESSION, NEXT_WORD, RETRIEVAL)


class Answered(NamedTuple):
    """A model's answers to all rows.

    Attributes:
        model: the model's name.
        version: the version that answered.
        task: one of `TASKS`.
        answers: the answers beside the truth.
    """

    model: str
    version: str
    task: str
    answers: ClassAnswers | NumberAnswers


def ask_model(
    path: Path,
    version: str | None,
    rows: LabelledRows,
    settings: Settings,
    *,
    task: str | None = None,
    output: str | None = None,
    progress: bool = False,
    prepare: Callable[[Client], object] = lambda client: None,
) -> Answered:
    """Load the model in `path` and ask it about all `rows`, once `prepare` has returned.

    `task` is by default a classification if the model has labels, else a regression. `output` is by default
    the output that has the labels, or the first one with numbers that fit. Raises InferpoolError, OSError.
    """

    def use(client: Client, model: str) -> tuple[str, str, Prediction]:
        prepare(client)
        number = version or only_version(client, model)
        return model, number, client.predict_many(model, rows.inputs, version=version, progress=progress)

    model, number, prediction = run_with_model(path, settings, use)
    labels = _labels(path)
    if task is None:
        task = REGRESSION if labels is None else CLASSIFICATION
    outputs = prediction.outputs
    if task == REGRESSION:
        return Answered(model, number, task, _numbers(outputs, output, rows.targets))
    config, names = labels or (LabelsConfig(), None)
    return Answered(
        model, number, task, _classes(outputs, output or config.output, config, names, rows.targets)
    )


def only_version(client: Client, model: str) -> str:
    """Return the version that answers if none is named."""
    for each in client.models():
        if each["name"] == model:
            served = [one["version"] for one in each["versions"] if one["state"] == "ready"]
            return str(each.get("default") or max(served))
    raise InvalidInput(f"{model} is not served")


def _labels(path: Path) -> tuple[LabelsConfig, Sequence[str]] | None:
    """Return what `model.toml` says of the labels, and their names; None if the model has none."""
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / CONFIG_FILE).labels
    return None if config is None else (config, read_labels(folder / config.file))


def _classes(
    outputs: Mapping[str, Array],
    wanted: str | None,
    config: LabelsConfig,
    names: Sequence[str] | None,
    targets: Sequence[Any],
) -> ClassAnswers:
    fitting = [
        name
        for name, values in outputs.items()
        if values.ndim == 2 and values.dtype.kind == "f" and (names is None or values.shape[1] == len(names))
    ]
    name = _choose(outputs, wanted, fitting, "scores, [rows, classes]")
    scores = activate(outputs[name], config.activation).astype(float)
    if names is None:
        names = [str(number) for number in range(scores.shape[1])]
    if not np.isfinite(scores).all():
        raise InvalidInput(f'output "{name}" has scores that are not finite')
    return ClassAnswers(names, class_indices(targets, names), scores)


def _numbers(outputs: Mapping[str, Array], wanted: str | None, targets: Sequence[Any]) -> NumberAnswers:
    fitting = [
        name
        for name, values in outputs.items()
        if values.dtype.kind in "fiu" and (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1))
    ]
    name = _choose(outputs, wanted, fitting, "one number a row")
    try:
        truth = np.asarray(targets, float)
    except (TypeError, ValueError):
        raise InvalidInput("the targets of a regression are numbers; --task names another task") from None
    predicted = outputs[name].reshape(len(truth), -1).astype(float)
    if predicted.shape[1] != 1 or not np.isfinite(truth).all() or not np.isfinite(predicted).all():
        raise InvalidInput(f'output "{name}" needs one finite number for each finite target')
    return NumberAnswers(truth, predicted[:, 0])


def _choose(outputs: Mapping[str, Array], wanted: str | None, fitting: Sequence[str], what: str) -> str:
    if wanted is not None and wanted not in outputs:
        raise ConfigError(f'there is no output "{wanted}"; the model has {", ".join(outputs)}')
    if wanted is not None:
        return wanted
    if not fitting:
        raise ConfigError(f"no output has {what}; the model has {', '.join(outputs)}")
    return fitting[0]
