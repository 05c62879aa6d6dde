"""What the models folder holds: looks for models, reads what they declare, and finds a version's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from inferpool.backends.registry import backends_by_suffix
from inferpool.errors import ConfigError, InferpoolError, Reason
from inferpool.pool.ports import VersionKey
from inferpool.repository.config import ModelConfig, read_config
from inferpool.repository.declared_model import (
    DeclaredModel,
    config_stamp,
    none_served,
    served_versions,
)
from inferpool.repository.label_moves import LabelMove, apply_moves, read_moves
from inferpool.repository.layout import CONFIG_FILE, ModelFolder, name_single, scan
from inferpool.repository.version_filter import VersionFilter
from inferpool.repository.version_source import HeldSource, VersionSource, read_source

log = logging.getLogger(__name__)


class FolderContents:
    """The models folder, as it was when somebody looked last.

    Attributes:
        path: the folder.
        declared: what the folder says of each model.
        moves: the labels that were moved, by models. Where the folder cannot be written, only this process
            knows them.
    """

    def __init__(
        self,
        path: Path,
        versions: VersionFilter,
        *,
        model_name: str | None,
        wait_s: float,
        held: Mapping[VersionKey, HeldSource],
        moves: dict[str, dict[str, LabelMove]],
    ) -> None:
        """Look at the folder; raises ConfigError if there is no model.

        Args:
            model_name: the name of a single model in requests; None if it keeps its own.
            wait_s: how long somebody waits for models; with 0, an empty folder is an error.
            held: what an earlier engine has loaded versions from.
        """
        self.path = path
        self.moves = moves
        self._versions = versions
        self._model_name = model_name
        self._wait_s = wait_s
        self._held = held
        self._told: set[Reason] = set()
        # The name in the folder of the model that the setting `model_name` names.
        self._own_name: str | None = None
        self.declared = {model.name: self.declare(model) for model in self._first_look()}

    def look(self) -> list[ModelFolder]:
        """The models that are there now, by their names in requests; raises ConfigError if there are none."""
        name = self._model_name
        models = name_single(scan(self.path, backends_by_suffix(), self._told), name, self._own_name)
        named = next((model for model in models if model.aliases), None)
        if named is not None:
            self._own_name = named.aliases[0]
        elif name is not None and all(model.name != name for model in models):
            self.tell(
                f"--model-name {name} is not used: it names a single model, and there are {len(models)}"
            )
        return models

    def _first_look(self) -> list[ModelFolder]:
        """The models that are there, and those which are to be served and are not there."""
        try:
            found = self.look()
        except ConfigError as error:
            if self._versions.only is None:
                if not self._wait_s:
                    raise
                log.info("waiting up to %g s for models: %s", self._wait_s, error.detail)
            found = []
        by_name = {model.name: model for model in found}
        for key in sorted(self._versions.only or ()):
            model = by_name.setdefault(key.model, ModelFolder(key.model, None, faults={key.version: ""}))
            versions = {*model.files, *model.faults}
            if versions and key.version not in model.files and not model.faults.get(key.version):
                model.faults[key.version] = f"{key.model}/{key.version} is no longer in {self.path}"
        return list(by_name.values())

    def tell(self, sentence: Reason) -> None:
        """Log a warning, once."""
        if sentence not in self._told:
            self._told.add(sentence)
            log.warning("%s", sentence)

    def declare(self, model: ModelFolder, known: DeclaredModel | None = None) -> DeclaredModel:
        """What the folder says of a model now; `known` is what it said before."""
        fault: Reason | None = None
        config = ModelConfig()
        try:
            if model.folder is not None:
                config = read_config(model.folder / CONFIG_FILE)
        except InferpoolError as error:
            fault = error.detail
            if known is not None:
                config = known.config
                if fault != known.fault:
                    log.error("%s; what is loaded of %s goes on", fault, model.name)
        moves = read_moves(model.folder) | self.moves.get(model.name, {})
        found = {*model.files, *model.faults}
        served = served_versions(config, found, apply_moves(config.versions.labels, moves))
        if self._versions.only is not None:
            # A version that was served stays served, even if a newer one is there now.
            taken = {key.version for key in self._versions.only if key.model == model.name}
            served = sorted({*served, *(taken & found)})
        return DeclaredModel(model, config, fault, served, moves, config_stamp(model))

    def source(self, declared: DeclaredModel, version: int) -> VersionSource | Reason:
        """What a version is loaded from, or why it cannot be."""
        folder = declared.folder
        held = self._held.get(VersionKey(folder.name, version))
        reason = (declared.fault if held is None else None) or folder.faults.get(version)
        if not declared.served and version not in folder.files:
            reason = reason or none_served(folder, declared.config)
        if reason:
            return reason
        if version not in folder.files:
            return f"{folder.name}/{version} is no longer in {self.path}"
        try:
            source = read_source(folder, version, declared.config if held is None else held.config)
        except OSError as error:
            return f"{folder.name}/{version} cannot be read: {error.strerror}"
        changed = None if held is None else held.changed_file(source)
        if changed is not None:
            return (
                f"{changed} has changed since the version was loaded, and the engine that had loaded it has"
                f" ended; restore the file, use a new version folder, or load the new content:"
                f" inferpool load {folder.name} {version}"
            )
        return source

    def forget_held(self) -> None:
        """Take versions from the files that are there from now on, whatever an earlier engine had loaded."""
        self._held = {}

    def single_model(self) -> str | None:
        """The name of the only model if the models folder is that model's folder."""
        for name, declared in self.declared.items():
            folder = declared.folder.folder
            if folder is not None and folder.resolve() == self.path.resolve():
                return name
        return None
