"""Where models and their versions lie in a folder, or which single model a path means."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from inferpool.errors import ConfigError, LoadError
from inferpool.system.install_hints import own_command

log = logging.getLogger(__name__)

CONFIG_FILE = "model.toml"
BUILD_SCRIPT = "build.py"
DEFAULT_REPOSITORY = Path("models")
"""Where models are built if nothing else is said, below the working folder."""
_HIDDEN = (".", "_")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model as it lies on disk.

    Attributes:
        name: what requests call it.
        folder: holds `model.toml`, `samples/`, `labels.txt`; None for a bare file.
        files: each version's model file.
        faults: versions that have no file to load, and why.
        origin: the file or folder, by its name in the repository.
    """

    name: str
    folder: Path | None
    files: dict[int, Path] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    origin: str = ""


def scan(path: Path, suffixes: dict[str, str]) -> list[ModelFolder]:
    """The models that `path` holds: a repository, one model's folder, or one model file.

    `suffixes` are those of model files (`.onnx`). Raises ConfigError if there is nothing to serve.
    """
    if path.is_file():
        if path.suffix not in suffixes:
            raise ConfigError(f"{path} is not a model file; those end in {', '.join(sorted(suffixes))}")
        return [_bare(path)]
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist")
    if _version_folders(path):
        return [_folder(path.resolve(), suffixes)]
    found: dict[str, ModelFolder] = {}
    for item in sorted(path.iterdir()):
        if not is_model_name(item.name):
            if not item.name.startswith(_HIDDEN):
                log.warning("%r is left out: its name cannot stand in a path", item.name)
            continue
        if is_unbuilt(item):
            log.info("%s is left out until it is built: run %s", item.name, build_command(item))
            continue
        if item.is_file() and item.suffix in suffixes:
            model = _bare(item)
        elif item.is_dir() and ((item / CONFIG_FILE).exists() or _version_folders(item)):
            model = _folder(item, suffixes)
        elif item.is_dir() and (stray := _stray_file(item, suffixes)) is not None:
            where = f"{item.name}/1/model{stray.suffix.lower()}"
            model = ModelFolder(
                item.name, item, {}, {1: f"{stray.relative_to(path)} is in no version: expected {where}"}
            )
        else:
            if item.is_dir():
                log.info("%s is no model: it has neither versions nor a %s", item, CONFIG_FILE)
            continue
        if model.name in found:
            fault = f"both {found[model.name].origin} and {model.origin} are called {model.name}"
            model = ModelFolder(model.name, None, {}, {1: fault})
        found[model.name] = model
    if not found:
        if (path / BUILD_SCRIPT).is_file():
            raise ConfigError(f"{path} is not built yet: run {build_command(path.resolve())}")
        unbuilt = [item.name for item in sorted(path.iterdir()) if is_unbuilt(item)]
        if unbuilt:
            raise ConfigError(
                f"{path}: none of {', '.join(unbuilt)} is built yet: run {build_command(path / unbuilt[0])}"
            )
        raise ConfigError(f"{path} holds no models: expected {path}/NAME/1/model.onnx or {path}/NAME.onnx")
    return list(found.values())


def is_model_name(name: str) -> bool:
    """Whether a file or folder of this name in a repository may be a model."""
    return not name.startswith(_HIDDEN) and name.isprintable()


def is_unbuilt(item: Path) -> bool:
    """Whether `item` is the folder of a model that has a build script and no version yet."""
    return (
        is_model_name(item.name)
        and item.is_dir()
        and (item / BUILD_SCRIPT).is_file()
        and not _version_folders(item)
    )


def build_command(folder: Path) -> str:
    """What to type to have the model in `folder` built."""
    repository = folder.parent
    where = "" if repository == DEFAULT_REPOSITORY else f"--repository {shlex.quote(str(repository))} "
    return f"{own_command()} build {where}{shlex.quote(folder.name)}"


def _bare(file: Path) -> ModelFolder:
    if file.stem == "model" and file.parent.name.isdigit():
        return ModelFolder(file.resolve().parent.parent.name, None, {1: file}, origin=file.name)
    return ModelFolder(file.stem, None, {1: file}, origin=file.name)


def _version_folders(folder: Path) -> dict[int, Path]:
    return {
        int(item.name): item
        for item in folder.iterdir()
        if item.is_dir() and item.name.isdecimal() and item.name.isascii() and not item.name.startswith("0")
    }


def _stray_file(folder: Path, suffixes: dict[str, str]) -> Path | None:
    """A model file in a folder of no model, or just below it: meant to be served, and in the wrong place."""
    files = (*folder.glob("*"), *folder.glob("*/*"))
    return next((item for item in sorted(files) if item.suffix.lower() in suffixes and item.is_file()), None)


def _folder(folder: Path, suffixes: dict[str, str]) -> ModelFolder:
    model = ModelFolder(folder.name, folder, origin=f"{folder.name}/")
    for version, version_folder in sorted(_version_folders(folder).items()):
        try:
            model.files[version] = _model_file(version_folder, suffixes)
        except LoadError as error:
            model.faults[version] = error.detail
    return model


def _model_file(version_folder: Path, suffixes: dict[str, str]) -> Path:
    files = sorted(item for item in version_folder.iterdir() if item.suffix in suffixes and item.is_file())
    named = [item for item in files if item.stem == "model"]
    where = f"{version_folder.parent.name}/{version_folder.name}"
    if len(named) == 1:
        return named[0]
    if named:
        raise LoadError(f"{where} has {' and '.join(item.name for item in named)}; which is it? Keep one")
    if files:
        raise LoadError(f"{where} has {files[0].name}; call it model{files[0].suffix}")
    expected = " or ".join(f"model{suffix}" for suffix in sorted(suffixes))
    raise LoadError(f"{where} has no model file; expected {expected}")
