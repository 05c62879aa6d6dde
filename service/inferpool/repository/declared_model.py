"""What the models folder says of a model: its versions, its `model.toml`, and the labels that were moved."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from inferpool.errors import Reason
from inferpool.repository.config import ModelConfig
from inferpool.repository.label_moves import LabelMove, apply_moves
from inferpool.repository.layout import CONFIG_FILE, ModelFolder


@dataclass(slots=True)
class DeclaredModel:
    """What the folder says of a model.

    Attributes:
        folder: where it is on disk.
        config: its `model.toml`.
        fault: why its `model.toml` cannot be read; None if it can.
        served: the versions that are to be served.
        moves: the labels that were moved while a server ran.
        stamp: tells whether the `model.toml` on disk is another one.
    """

    folder: ModelFolder
    config: ModelConfig
    fault: Reason | None
    served: list[int]
    moves: dict[str, LabelMove] = field(default_factory=dict)
    stamp: object = None

    @property
    def found(self) -> set[int]:
        """The versions that are on disk, whether they can be loaded or not."""
        return {*self.folder.files, *self.folder.faults}

    def labels(self) -> dict[str, int]:
        """The label of each version, whether it is served or not."""
        return apply_moves(self.config.versions.labels, self.moves)


def served_versions(config: ModelConfig, found: Collection[int], labels: Mapping[str, int]) -> list[int]:
    """Which of the versions that were found a model serves; `labels` are the versions that labels name."""
    wanted = config.versions.serve
    if wanted == "latest":
        return sorted({max(found, default=0), *labels.values()} & set(found))
    return sorted(found) if wanted == "all" else sorted(set(wanted) & set(found))


def config_stamp(model: ModelFolder) -> object:
    """Tells whether a `model.toml` is another one, and when it was changed."""
    if model.folder is None:
        return None
    try:
        status = (model.folder / CONFIG_FILE).stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime)


def label_fault(model: str, declared: DeclaredModel, served: list[int]) -> Reason | None:
    """Which labels name a version that is not served, and what to do; None if there are none."""
    stale = {label: version for label, version in declared.labels().items() if version not in served}
    if not stale or not served:
        return None
    configured = declared.config.versions.labels
    written = {label: version for label, version in stale.items() if configured.get(label) == version}
    moved = {label: version for label, version in stale.items() if label not in written}
    have = ", ".join(map(str, served))
    faults = []
    if written:
        faults.append(
            f"{model}/model.toml: versions.labels: {_named(written)}, which is not served; correct the label"
            f" or remove it (served: {have})"
        )
    if moved:
        faults.append(
            f"{_named(moved)}, which is not served; move the label to another version, or remove it"
            f" (served: {have})"
        )
    return "; ".join(faults)


def _named(labels: Mapping[str, int]) -> str:
    return ", ".join(f'"{label}" names version {version}' for label, version in labels.items())


def none_served(model: ModelFolder, config: ModelConfig) -> Reason:
    """Why no version of a model is served, and what to do."""
    found = sorted([*model.files, *model.faults])
    if found:
        have = ", ".join(map(str, found))
        return (
            f"{model.name}/model.toml: versions.serve: {config.versions.serve} is not there; there is {have}"
        )
    reason = f"{model.name} has no version: expected {model.name}/1/model.onnx"
    return "; ".join((reason, *model.skipped))
