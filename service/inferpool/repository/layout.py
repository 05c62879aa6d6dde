"""Finds the models and versions in a folder, or the single model that a path names."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from inferpool.errors import ConfigError, LoadError, Reason
from inferpool.repository.foreign_files import find_conversion, is_foreign
from inferpool.system.files import printable
from inferpool.system.install_hints import own_command

log = logging.getLogger(__name__)

CONFIG_FILE = "model.toml"
BUILD_SCRIPT = "build.py"
DEFAULT_REPOSITORY = Path("models")
"""Where models are built by default, below the working folder."""
_HIDDEN = (".", "_")
_NUMBER: Final = re.compile("[1-9][0-9]{0,17}")
"""The numbers of versions. One of 18 digits is an integer in every program."""

_LIKE_A_VERSION: Final = re.compile(r"(?:v|ver|version)?[-_.]?0*(\d+)", re.IGNORECASE)
"""Folder names that look like versions: `01`, `v2`, `version-3`."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        name: the name in requests.
        folder: holds `model.toml`, `samples/`, `labels.txt`; None for a bare file.
        files: each version's model file.
        faults: why a version has no file that can be loaded.
        origin: the name of the file or folder in the repository.
        skipped: for each folder that looks like a version but is none, why, and what to do.
        aliases: other names in requests.
    """

    name: str
    folder: Path | None
    files: dict[int, Path] = field(default_factory=dict)
    faults: dict[int, Reason] = field(default_factory=dict)
    origin: str = ""
    skipped: tuple[Reason, ...] = ()
    aliases: tuple[str, ...] = ()


def name_single(models: Sequence[ModelFolder], name: str | None, own: str | None) -> list[ModelFolder]:
    """`models`, of which a single one is called `name`; its own name is an alias then.

    `own` is the own name of the model that was single before others came, if there was one. Nothing changes
    if `name` is None.
    """
    if own is None and len(models) == 1:
        own = models[0].name
    return [
        replace(model, name=name, aliases=(model.name,))
        if name not in (None, model.name) and model.name == own
        else model
        for model in models
    ]


def scan(path: Path, suffixes: Mapping[str, str], told: set[Reason] | None = None) -> list[ModelFolder]:
    """The models in `path`: a repository, one model's folder, or one model file.

    `suffixes` are those of model files (`.onnx`). Logs each file and folder that looks like a model and is
    skipped, but for the sentences in `told`, and adds them there. Raises ConfigError if there is nothing to
    serve.
    """
    told = set() if told is None else told
    if path.is_file():
        if path.suffix not in suffixes:
            file = path.absolute()
            repository = file.parent.parent.parent if file.parent.name.isdigit() else file.parent
            raise ConfigError(f"{path} is not a model file: {_file_remedy(file, suffixes, repository)}")
        return [_bare(path)]
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist")
    if _version_folders(path):
        single = _folder(path.resolve(), suffixes)
        _tell(single.skipped, told)
        return [single]
    found: dict[str, ModelFolder] = {}
    skipped: list[Reason] = []
    for item in sorted(path.iterdir()):
        model = _model(item, suffixes, skipped, told)
        if model is None:
            continue
        if model.name in found:
            fault = f"both {found[model.name].origin} and {model.origin} are called {model.name}; rename one"
            model = ModelFolder(model.name, None, {}, {1: fault})
        found[model.name] = model
    _tell(skipped, told)
    if not found:
        raise ConfigError(_nothing_found(path, skipped))
    return list(found.values())


def _tell(skipped: Sequence[Reason], told: set[Reason]) -> None:
    for reason in skipped:
        if reason not in told:
            told.add(reason)
            log.warning("%s", reason)


def _tell_once(sentence: str, told: set[Reason]) -> None:
    if sentence not in told:
        told.add(sentence)
        log.info("%s", sentence)


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
    """The command that builds the model in `folder`."""
    repository = folder.parent
    option = "" if repository == DEFAULT_REPOSITORY else f"--repository {shlex.quote(str(repository))} "
    return f"{own_command()} build {option}{shlex.quote(folder.name)}"


def _model(
    item: Path, suffixes: Mapping[str, str], skipped: list[Reason], told: set[Reason]
) -> ModelFolder | None:
    """The model in `item` of a repository, or None. Adds to `skipped` if `item` only looks like a model."""
    if not is_model_name(item.name):
        if not item.name.startswith(_HIDDEN):
            skipped.append(f"{item.name!r} is skipped: its name cannot stand in a path; rename it")
        return None
    if is_unbuilt(item):
        _tell_once(f"{item.name} is skipped until it is built: run {build_command(item)}", told)
        return None
    if item.is_file():
        if item.suffix in suffixes:
            return _bare(item)
        if _looks_like_a_model(item, suffixes):
            skipped.append(f"{item.name} is skipped: {_file_remedy(item, suffixes, item.parent)}")
        return None
    if not item.is_dir():
        return None
    if (item / CONFIG_FILE).exists() or _version_folders(item):
        model = _folder(item, suffixes)
        skipped.extend(model.skipped)
        return model
    stray = _stray_file(item, suffixes)
    if stray is None:
        _tell_once(f"{item} is no model: it has neither versions nor a {CONFIG_FILE}", told)
        return None
    name = stray.relative_to(item.parent)
    if stray.suffix.lower() in suffixes:
        target = f"{item.name}/1/model{stray.suffix.lower()}"
        reason = f"{name} is not in the folder of a version (a whole number from 1): move it to {target}"
        return ModelFolder(item.name, item, {}, {1: reason})
    skipped.append(f"{name} is skipped: {_file_remedy(stray, suffixes, item.parent)}")
    return None


def _nothing_found(path: Path, skipped: list[Reason]) -> Reason:
    """Why a repository without models has none, and what to do."""
    if (path / BUILD_SCRIPT).is_file():
        return f"{path} is not built yet: run {build_command(path.resolve())}"
    unbuilt = [item.name for item in sorted(path.iterdir()) if is_unbuilt(item)]
    if unbuilt:
        return f"{path}: none of {', '.join(unbuilt)} is built yet: run {build_command(path / unbuilt[0])}"
    expected = f"{path} holds no models: expected {path}/NAME/1/model.onnx or {path}/NAME.onnx"
    return "; ".join((expected, *skipped))


def is_in_version_folder(file: Path) -> bool:
    """Whether a model file is in the folder of a version, which is its alone."""
    return file.stem == "model" and file.parent.name.isdigit()


def _bare(file: Path) -> ModelFolder:
    if is_in_version_folder(file):
        return ModelFolder(file.resolve().parent.parent.name, None, {1: file}, origin=file.name)
    return ModelFolder(file.stem, None, {1: file}, origin=file.name)


def is_version_number(name: str) -> bool:
    """Whether a folder of this name has a version, and a request may name it."""
    return _NUMBER.fullmatch(name) is not None


def _version_folders(folder: Path) -> dict[int, Path]:
    return {
        int(item.name): item for item in folder.iterdir() if item.is_dir() and is_version_number(item.name)
    }


def _looks_like_a_model(file: Path, suffixes: Mapping[str, str]) -> bool:
    return file.suffix.lower() in suffixes or is_foreign(file)


def _file_remedy(file: Path, suffixes: Mapping[str, str], repository: Path) -> Reason:
    """Return the advice for a file in `repository` that is expected to be a model file and is none."""
    if file.suffix.lower() in suffixes:
        return f"rename it to {file.stem}{file.suffix.lower()}"
    conversion = find_conversion(file, repository)
    if conversion is not None:
        return f"it is {conversion}"
    return f"model files end in {', '.join(sorted(suffixes))}"


def _stray_file(folder: Path, suffixes: Mapping[str, str]) -> Path | None:
    """A file in a folder without versions, or one level below, that looks like a model: it is misplaced."""
    files = [item for item in sorted((*folder.glob("*"), *folder.glob("*/*"))) if item.is_file()]
    known = [item for item in files if item.suffix.lower() in suffixes]
    foreign = [item for item in files if is_foreign(item)]
    return next(iter(known + foreign), None)


def _folder(folder: Path, suffixes: Mapping[str, str]) -> ModelFolder:
    versions = _version_folders(folder)
    numbers = set(versions)
    skipped = [
        reason
        for item in sorted(folder.iterdir())
        if (reason := _skipped_version(item, versions, numbers, suffixes)) is not None
    ]
    model = ModelFolder(folder.name, folder, origin=f"{folder.name}/", skipped=tuple(skipped))
    for version, version_folder in sorted(versions.items()):
        try:
            model.files[version] = _model_file(version_folder, suffixes)
        except LoadError as error:
            model.faults[version] = error.detail
    return model


def _skipped_version(
    item: Path, versions: Mapping[int, Path], numbers: set[int], suffixes: Mapping[str, str]
) -> Reason | None:
    """Why an item of a model's folder is no version although it looks like one, and what to do.

    `numbers` are taken. Adds the one that the item is to get.
    """
    name = f"{item.parent.name}/{item.name}"
    if item.is_file():
        if not _looks_like_a_model(item, suffixes):
            return None
        if item.suffix.lower() in suffixes:
            number = max(numbers, default=0) + 1
            numbers.add(number)
            target = f"{item.parent.name}/{number}/model{item.suffix.lower()}"
            return f"{name} is skipped: a model file must be in a version's folder; move it to {target}"
        # Beside versions, a pickle may well be something else than a model.
        if versions:
            return None
        return f"{name} is skipped: {_file_remedy(item, suffixes, item.parent.parent)}"
    numbered = _LIKE_A_VERSION.fullmatch(item.name)
    if not item.is_dir() or item in versions.values():
        return None
    if numbered is None and not any(_looks_like_a_model(file, suffixes) for file in item.glob("model.*")):
        return None
    number = int(numbered[1]) if numbered is not None else 0
    if number in numbers or not is_version_number(str(number)):
        number = max(numbers, default=0) + 1
    numbers.add(number)
    return (
        f"{name} is skipped: a version's folder must be named by a number without leading zeros, of at"
        f" most 18 digits; rename it to {item.parent.name}/{number}"
    )


def _model_file(version_folder: Path, suffixes: Mapping[str, str]) -> Path:
    """The model file of a version; raises LoadError, which says what to do, unless there is exactly one."""
    name = f"{version_folder.parent.name}/{version_folder.name}"
    items = sorted(version_folder.iterdir())
    for item in items:
        if item.exists() and not item.is_file() and not item.is_dir():
            # A runtime that reads it as weights would wait for a writer, or read without end.
            raise LoadError(
                f"{name} has {printable(item.name)}, which is not a file but a pipe or a device: remove it"
            )
    everything = [item for item in items if item.is_file()]
    files = [item for item in everything if item.suffix in suffixes]
    named = [item for item in files if item.stem == "model"]
    if len(named) == 1:
        return named[0]
    if named:
        raise LoadError(f"{name} has {' and '.join(item.name for item in named)}: keep one of them")
    if files:
        raise LoadError(f"{name} has {files[0].name}: rename it to model{files[0].suffix}")
    similar = [item for item in everything if _looks_like_a_model(item, suffixes)]
    similar.sort(key=lambda item: item.suffix.lower() not in suffixes)
    if similar and similar[0].suffix.lower() in suffixes:
        raise LoadError(f"{name} has {similar[0].name}: rename it to model{similar[0].suffix.lower()}")
    expected = " or ".join(f"model{suffix}" for suffix in sorted(suffixes))
    if similar:
        remedy = _file_remedy(similar[0], suffixes, version_folder.parent.parent)
        raise LoadError(f"{name} has {similar[0].name}, not {expected}: {remedy}")
    raise LoadError(f"{name} has no model file: expected {expected}")
