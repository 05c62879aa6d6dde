"""The files and settings that a version is loaded from, as a value that changes when they do."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferpool.codecs.labels import LABELS_FILE
from inferpool.repository.config import ModelConfig, VersionsConfig
from inferpool.repository.layout import CONFIG_FILE, ModelFolder, is_in_version_folder
from inferpool.repository.trust.manifest import SIGNING_FILES, name_of


@dataclass(frozen=True, slots=True)
class VersionSource:
    """The sources of one version. Two are equal if nothing that a load depends on differs.

    Attributes:
        file: the model file.
        folder: the model's folder; None for a bare file.
        config: the keys of `model.toml`.
        files: names, sizes and times (in nanoseconds) of all files.
        fingerprint: names, sizes and times of all files, also of the last change of their nodes, and the
            settings.
        changed_at: the last change of any of the files, in seconds since 1970.
    """

    file: Path
    folder: Path | None = field(compare=False)
    config: ModelConfig = field(compare=False)
    files: tuple[tuple[str, int, int], ...] = field(compare=False)
    fingerprint: Hashable
    changed_at: float = field(compare=False)


def read_source(model: ModelFolder, version: int, config: ModelConfig) -> VersionSource:
    """The source of a version that `model` has a file of. Raises OSError if files vanish meanwhile."""
    file = model.files[version]
    found = list(_walk(file.parent)) if model.folder is not None else [file]
    found += _beside(model.folder, config)
    facts = [(path, path.is_dir(), path.stat()) for path in found]
    # A folder has no content of its own, but its time tells when the last file came.
    files = tuple((str(path), status.st_size, status.st_mtime_ns) for path, is_folder, status in facts
                  if not is_folder)  # fmt: skip
    nodes = tuple(_node_changed_at(status) for _, is_folder, status in facts if not is_folder)
    changed_at = max(status.st_mtime for _, _, status in facts)
    fingerprint = (files, nodes, repr(load_settings(config)))
    return VersionSource(file, model.folder, config, files, fingerprint, changed_at)


def _node_changed_at(status: os.stat_result) -> int:
    """When a file's node was changed last, in nanoseconds; 0 if the file has several links.

    Archives and build systems that give all files the same time leave the size and the time of other content
    of the same size as they were. Another link changes the node, too, as in the cache of a store, whose
    files never change.
    """
    return status.st_ctime_ns if status.st_nlink == 1 else 0


def load_settings(config: ModelConfig) -> ModelConfig:
    """The part of `model.toml` that a load depends on: neither labels nor the list of versions do."""
    return config.model_copy(update={"versions": VersionsConfig(), "description": ""})


def load_files(file: Path, folder: Path | None, config: ModelConfig) -> dict[str, Path]:
    """The files that a load of `file` reads, `model.toml` among them, by their names in a manifest.

    Files that say what was signed are not among them, and neither are hidden ones. Raises OSError if files
    vanish meanwhile, and LoadError for a file outside of the model's folder.
    """
    if not is_in_version_folder(file):
        return {file.name: file}
    found = [*_walk(file.parent), *_beside(folder, config)]
    if folder is not None:
        found += [path for path in (folder / CONFIG_FILE, folder / LABELS_FILE) if path.exists()]
    names = {name_of(file.parent, path): path for path in found if not path.is_dir()}
    return {name: path for name, path in names.items() if name not in SIGNING_FILES}


@dataclass(frozen=True, slots=True)
class HeldSource:
    """What a version was loaded from by an engine that has ended; its successor loads nothing else.

    Attributes:
        config: the keys of `model.toml` at that time.
        files: as in `VersionSource`.
    """

    config: ModelConfig
    files: tuple[tuple[str, int, int], ...]

    def changed_file(self, source: VersionSource) -> str | None:
        """The name of a file that has changed, come or gone since; None if there is none."""
        changed = {*self.files} ^ {*source.files}
        return Path(min(changed)[0]).name if changed else None


def held_json(source: VersionSource) -> dict[str, Any]:
    """A source as JSON, for `held_from_json`."""
    # Without defaults: some keys mean something else if they are given, even with the default as value.
    return {"config": source.config.model_dump(mode="json", exclude_unset=True), "files": source.files}


def held_from_json(table: Mapping[str, Any]) -> HeldSource:
    """The source that `held_json` has written; raises ValueError or LookupError for another table."""
    files = tuple((str(name), int(size), int(time)) for name, size, time in table["files"])
    return HeldSource(ModelConfig.model_validate(table["config"]), files)


def _beside(folder: Path | None, config: ModelConfig) -> list[Path]:
    """The files and folders beside the versions of a model that a load reads, without `model.toml`."""
    if folder is None:
        return []
    names = ["samples"]
    if config.text is not None:
        names.append(config.text.tokenizer)
    if config.labels is not None:
        names.append(config.labels.file)
    return [path for name in names if (folder / name).exists() for path in _walk(folder / name)]


def _walk(item: Path) -> Iterator[Path]:
    """Return `item` and everything below it, but what is hidden."""
    yield item
    if item.is_dir():
        for child in sorted(item.iterdir()):
            if not child.name.startswith("."):
                yield from _walk(child)
