"""The files and settings that a version is loaded from, as a value that changes when they do."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferpool.repository.config import ModelConfig, VersionsConfig
from inferpool.repository.layout import ModelFolder


@dataclass(frozen=True, slots=True)
class VersionSource:
    """The sources of one version. Two are equal if nothing that a load depends on differs.

    Attributes:
        file: the model file.
        folder: the model's folder; None for a bare file.
        config: the keys of `model.toml`.
        files: names, sizes and times (in nanoseconds) of all files.
        fingerprint: names, sizes and times of all files, and the settings.
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
    if model.folder is not None:
        beside = ["samples"]
        if config.text is not None:
            beside.append(config.text.tokenizer)
        if config.labels is not None:
            beside.append(config.labels.file)
        for name in beside:
            if (model.folder / name).exists():
                found += _walk(model.folder / name)
    facts = [(path, path.is_dir(), path.stat()) for path in found]
    # A folder has no content of its own, but its time tells when the last file came.
    files = tuple((str(path), status.st_size, status.st_mtime_ns) for path, is_folder, status in facts
                  if not is_folder)  # fmt: skip
    # Labels and the list of versions do not change what a load does.
    settings = config.model_copy(update={"versions": VersionsConfig(), "description": ""})
    changed_at = max(status.st_mtime for _, _, status in facts)
    return VersionSource(file, model.folder, config, files, (files, repr(settings)), changed_at)


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
    return {"config": source.config.model_dump(mode="json"), "files": source.files}


def held_from_json(table: Mapping[str, Any]) -> HeldSource:
    """The source that `held_json` has written; raises ValueError or LookupError for another table."""
    files = tuple((str(name), int(size), int(time)) for name, size, time in table["files"])
    return HeldSource(ModelConfig.model_validate(table["config"]), files)


def _walk(item: Path) -> Iterator[Path]:
    """Return `item` and everything below it, but what is hidden."""
    yield item
    if item.is_dir():
        for child in sorted(item.iterdir()):
            if not child.name.startswith("."):
                yield from _walk(child)
