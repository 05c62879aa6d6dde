"""Build scripts: which models of a repository have one, and where it can run.

What a script needs stands in its own first lines, as PEP 723 says. It is run by this Python where that has
everything, else by one in a virtual environment that is made for exactly these needs, kept, and shared by the
scripts that need the same. Before one is made the script is asked whether it understands its options.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from inferpool.errors import ConfigError
from inferpool.release import read_options
from inferpool.repository.config import read_config
from inferpool.repository.layout import BUILD_SCRIPT, CONFIG_FILE, is_model_name, is_unbuilt
from inferpool.repository.load.plan_cache import cache_folder
from inferpool.tensors import names_text

_BLOCK_START = re.compile(r"# /// ([a-zA-Z0-9-]+)")
_SCRIPT_START = "# /// script"
_BLOCK_END = "# ///"


@dataclass(frozen=True, slots=True)
class BuildScript:
    """The build script of one model.

    Attributes:
        name: the model's.
        file: the script.
        description: what the `model.toml` beside it says of the model, fit to be printed.
        built: whether the model has a version already.
    """

    name: str
    file: Path
    description: str
    built: bool


def find_scripts(repository: Path) -> list[BuildScript]:
    """Every model of `repository` that has a build script, by name; raises ConfigError if there is none."""
    files = [
        file
        for file in (sorted(repository.glob(f"*/{BUILD_SCRIPT}")) if repository.is_dir() else ())
        if file.is_file() and is_model_name(file.parent.name)
    ]
    if not files:
        where = "" if repository.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(
            f"{repository} has no models to build: expected {repository}/NAME/{BUILD_SCRIPT}{where};"
            " --repository FOLDER, before the name, says where else they are"
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
    """What the model in `folder` is, or what is wrong with its `model.toml`; on one line, and plain text."""
    try:
        text = read_config(folder / CONFIG_FILE).description
    except ConfigError as error:
        text = error.detail
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def find_script(repository: Path, name: str) -> BuildScript:
    """The script of the model `name`; raises ConfigError, which says what there is."""
    scripts = {script.name: script for script in find_scripts(repository)}
    if name not in scripts:
        raise ConfigError(f'{repository} has no build script for "{name}"; there are {names_text(scripts)}')
    return scripts[name]


def read_requirements(script: Path) -> tuple[Requirement, ...]:
    """The dependencies in the metadata of `script` (PEP 723); none where it has no such block.

    Raises ConfigError if the block is damaged or asks for another Python than this.
    """
    name = f"{script.parent.name}/{script.name}"
    try:
        blocks = script_blocks(script.read_text(encoding="utf-8"))
        if not blocks:
            return ()
        if len(blocks) > 1:
            raise ConfigError(f"{name}: has {len(blocks)} blocks of metadata where one is allowed")
        table = tomllib.loads(blocks[0])
        python = SpecifierSet(table.get("requires-python", ""))
        requirements = tuple(Requirement(text) for text in table.get("dependencies", []))
    except (OSError, ValueError, TypeError, AttributeError, InvalidRequirement, InvalidSpecifier) as error:
        raise ConfigError(f"{name}: its metadata cannot be read: {error}") from error
    if not python.contains(platform.python_version(), prereleases=True):
        raise ConfigError(f"{name}: needs Python {python}, and this is {platform.python_version()}")
    return requirements


def script_blocks(text: str) -> list[str]:
    """The TOML of every block of type `script` in a script's text, found as PEP 723 says.

    A block is a run of comments from one that opens it to the last that closes it. PEP 723 gives a regular
    expression; this finds the same, in time that grows with the text and not with its square.
    """
    blocks = []
    for is_comment, run in groupby(text.split("\n"), lambda line: line == "#" or line.startswith("# ")):
        lines = list(run) if is_comment else []
        starts = (place for place, line in enumerate(lines) if _BLOCK_START.fullmatch(line))
        ends = (place for place in reversed(range(len(lines))) if lines[place] == _BLOCK_END)
        start, end = next(starts, None), next(ends, None)
        if start is None or end is None or end <= start + 1:
            continue
        if lines[start] == _SCRIPT_START:
            blocks.append("\n".join(line[2:] for line in lines[start + 1 : end]))
    return blocks


def missing(requirements: Sequence[Requirement]) -> list[Requirement]:
    """Those of `requirements` that this Python has not installed, or in another version."""
    return [requirement for requirement in requirements if not _is_met(requirement)]


def _is_met(requirement: Requirement) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    if requirement.url is not None or requirement.extras:
        # What an address holds, or an extra brings along, cannot be told from one distribution's version.
        return False
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def python_for(script: BuildScript, options: Sequence[str], cache_dir: Path | None) -> str:
    """The Python that can run `script`: this one, or that of an environment below the cache folder.

    Says on standard error what it installs. Raises ConfigError where that fails, or where the
    script's metadata cannot be read; exits as the script does where `options` ask it for help, or are wrong.
    """
    requirements = read_requirements(script.file)
    lacking = missing(requirements)
    if not lacking:
        return sys.executable
    _try_options(script, options)
    wanted = sorted(map(str, requirements))
    digest = hashlib.sha256("\n".join([sys.version, sys.prefix, *wanted]).encode()).hexdigest()
    try:
        folder = cache_folder(cache_dir).resolve() / f"build-{digest[:16]}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Held until the environment is whole, so that two builds at once make it once.
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "complete").exists():
                _say(f"{script.name} needs {', '.join(map(str, lacking))}, which is not installed here.")
                _say(f"Making an environment in {folder}; this can take minutes, and gigabytes ...")
                _make_environment(folder, wanted)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{script.name}: no environment can be made for its script: {error}") from error
    return str(folder / "bin" / "python")


def _try_options(script: BuildScript, options: Sequence[str]) -> None:
    """Let `script` answer `options` with its help or what is wrong with them, and exit, if it can here."""
    # The standard library alone (-S), and without the folder of the package, whose names are short (-P).
    command = [sys.executable, "-S", "-P", read_options.__file__, str(script.file), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != read_options.UNANSWERED:
        sys.stdout.write(run.stdout)
        sys.stderr.write(run.stderr)
        raise SystemExit(run.returncode)


def _make_environment(folder: Path, wanted: Sequence[str]) -> None:
    """A new virtual environment with `wanted`; marked complete at the end, so that half of one is no use."""
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
    ):
        # What these print is progress: standard output is the script's.
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(f"this failed, and nothing was built: {' '.join(command)}")
    (folder / "complete").touch()


def run_script(script: BuildScript, python: str, options: Sequence[str]) -> None:
    """Become the script: its output, its signals and its exit status are this process's."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(python, [python, str(script.file), *options])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
