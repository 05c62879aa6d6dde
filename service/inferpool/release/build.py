"""Find the build scripts of a repository, and run them.

The first lines of a script name the packages that it needs, in the format of PEP 723. If this Python has
all of them, this Python runs the script. Otherwise `uv run --script` does, in an environment that uv keeps.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from inferpool.errors import ConfigError
from inferpool.repository.config import read_config
from inferpool.repository.layout import BUILD_SCRIPT, CONFIG_FILE, is_model_name, is_unbuilt
from inferpool.system.install_hints import install_command
from inferpool.tensors import names_text

Environment: TypeAlias = Literal["auto", "own", "here"]
"""Where a script runs: in one of its own, in that of this Python, or (`auto`) in this one if it has all."""

_METADATA = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
"""The regular expression of PEP 723, for blocks of the type `script`."""


@dataclass(frozen=True, slots=True)
class BuildScript:
    """The build script of one model.

    Attributes:
        name: The name of the model.
        file: The path of the script.
        description: The description in the `model.toml` beside the script, in printable characters.
        built: True if the model has a version already.
    """

    name: str
    file: Path
    description: str
    built: bool


def find_scripts(repository: Path) -> list[BuildScript]:
    """Return the build scripts of all models of `repository`, sorted by name.

    Raises:
        ConfigError: no model has a build script.
    """
    files = [
        file
        for file in (sorted(repository.glob(f"*/{BUILD_SCRIPT}")) if repository.is_dir() else ())
        if file.is_file() and is_model_name(file.parent.name)
    ]
    if not files:
        parent = "" if repository.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(
            f"{repository} has no models to build: expected {repository}/NAME/{BUILD_SCRIPT}{parent};"
            " name another folder with --repository FOLDER, before the model's name"
        )
    return [
        BuildScript(
            name=file.parent.name,
            file=file,
            description=_description(file.parent),
            built=not is_unbuilt(file.parent),
        )
        for file in files
    ]


def _description(folder: Path) -> str:
    """Return the description of a model, or the fault of its `model.toml`, as one printable line."""
    try:
        text = read_config(folder / CONFIG_FILE).description
    except ConfigError as error:
        text = error.detail
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def find_script(repository: Path, name: str) -> BuildScript:
    """Return the build script of the model `name`.

    Raises:
        ConfigError: there is no such script; the message names those that there are.
    """
    scripts = {script.name: script for script in find_scripts(repository)}
    if name not in scripts:
        raise ConfigError(f'{repository} has no build script for "{name}"; there are {names_text(scripts)}')
    return scripts[name]


def run_script(script: BuildScript, options: Sequence[str]) -> None:
    """Replace this process by the script: its output, signals and exit status become those of the command.

    Raises:
        ConfigError: the metadata of the script cannot be read, or uv is needed and was not found.
    """
    command = _command(script, options)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def _command(script: BuildScript, options: Sequence[str]) -> list[str]:
    # A script parses its options before it imports third-party packages: it prints its help without them.
    if {"-h", "--help"} & set(options):
        return [sys.executable, str(script.file), *options]
    return script_command(script.file, options, f"{script.name}: the build script")


def script_command(
    file: Path,
    options: Sequence[str],
    what: str = "this",
    *,
    also: Path | None = None,
    environment: Environment = "auto",
) -> list[str]:
    """Return the command that runs the script `file` in an environment: by this Python, or by uv.

    The script imports `also`, if there is one: the packages of both are there.

    Raises:
        ConfigError: the metadata of the script cannot be read, uv is needed and was not found, or packages
            are missing here.
    """
    missing = [*missing_packages(file), *(missing_packages(also) if also else [])]
    if not missing and environment != "own":
        return [sys.executable, str(file), *options]
    needed = f"{what} needs {', '.join(missing)}, not installed here"
    if environment == "here":
        raise ConfigError(f"{needed}: install that, or let uv make an environment with --environment own")
    if not missing:
        needed = f"{what} needs an environment of its own"
    uv = _find_uv()
    if uv is None:
        hint = install_command("build")
        raise ConfigError(f"{needed}; uv can install that, but was not found: run {hint}")
    sys.stderr.write(f"{needed}. uv installs that now; this can take minutes, and gigabytes, once ...\n")
    more = ["--with-requirements", str(also)] if also else []
    return [uv, "run", *more, "--script", str(file), *options]


def _find_uv() -> str | None:
    """Return the path of uv: beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else shutil.which("uv")


def missing_packages(script: Path) -> list[str]:
    """Return the requirements in the metadata of `script` that this Python does not meet, itself included.

    Raises:
        ConfigError: the metadata cannot be read.
    """
    name = f"{script.parent.name}/{script.name}"
    try:
        table = _metadata(script.read_text(encoding="utf-8"))
        python = SpecifierSet(table.get("requires-python", ""))
        requirements = [Requirement(text) for text in table.get("dependencies", [])]
    except (OSError, ValueError, TypeError, AttributeError, InvalidRequirement, InvalidSpecifier) as error:
        raise ConfigError(f"{name}: the metadata of the script cannot be read: {error}") from error
    missing = [str(requirement) for requirement in requirements if not _is_met(requirement)]
    if not python.contains(platform.python_version(), prereleases=True):
        missing.append(f"Python {python}")
    return missing


def _metadata(text: str) -> dict[str, Any]:
    """Return the metadata of a script, empty without a block; raises ValueError for a damaged block."""
    blocks = [match["content"] for match in _METADATA.finditer(text)]
    if len(blocks) > 1:
        raise ValueError(f"it has {len(blocks)} blocks of metadata, and one is allowed")
    lines = "".join(blocks).splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))


def _is_met(requirement: Requirement) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    if requirement.url is not None or requirement.extras:
        # The version of one distribution does not tell what a URL has, or which packages an extra adds.
        return False
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
