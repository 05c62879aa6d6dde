"""Runs the script of a framework, in an environment of its own or in that of this Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.import_command.frameworks import SCRIPTS, Source
from inferpool.release import importers
from inferpool.release.build import Environment, script_command
from inferpool.tensors import Array

_REFRESH_S: Final = 0.5
_OTHER_FRAMEWORK: Final = re.compile(r"import it with --from ([\w-]+)")


@dataclass(frozen=True, slots=True)
class Converted:
    """What a script has written.

    Attributes:
        file: `model.onnx`; large weights are in files beside it.
        about: The framework, the converter and the classes, as `release/importers` describes them.
        inputs: The rows of the example as the converted model takes them, by input.
        expected: The framework's answers to these rows, by output.
        alone: Whether the script ran in an environment of its own.
    """

    file: Path
    about: Mapping[str, Any]
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]
    alone: bool = False


def run_conversion(
    source: Source,
    example: Mapping[str, Array],
    work: Path,
    options: list[str],
    *,
    chosen: bool,
    environment: Environment,
    refresh: Callable[[], None],
) -> Converted:
    """Convert `source` in the folder `work`, calling `refresh` twice a second.

    If the script says that the source is of another framework, and the user has not `chosen` one, that
    framework's script is run. Raises InvalidInput with the last line of what the script says.
    """
    np.savez(work / "example.npz", **example)  # type: ignore[arg-type]  # numpy's types want a flag there
    command = _command(source.framework, source, work, options, environment)
    fault = _run(command, work, refresh)
    other = None if fault is None or chosen else _OTHER_FRAMEWORK.search(fault)
    if other is not None and other[1] in SCRIPTS and other[1] != source.framework:
        command = _command(other[1], source, work, options, environment)
        fault = _run(command, work, refresh)
    if fault is not None:
        raise InvalidInput(f"{source.name} cannot be converted: {fault}")
    about = json.loads((work / "imported.json").read_text())
    with np.load(work / "imported.npz", allow_pickle=False) as loaded:
        inputs = {name[3:]: loaded[name] for name in loaded.files if name.startswith("in:")}
        expected = {name[4:]: loaded[name] for name in loaded.files if name.startswith("out:")}
    return Converted(work / "model.onnx", about, inputs, expected, command[0] != sys.executable)


def _command(
    framework: str, source: Source, work: Path, options: list[str], environment: Environment
) -> list[str]:
    """Return the command that runs the script of a framework; an environment of its own is made by then."""
    script = Path(importers.__file__).with_name(SCRIPTS[framework])
    path = f"{source.path.absolute()}{':' if source.function else ''}{source.function}"
    given = [path, str(work / "example.npz"), str(work), *options]
    command = script_command(script, given, "this import", environment=environment)
    if command[0] != sys.executable:
        # Beforehand, because uv shows the progress of its downloads, and the output of the script is hidden.
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        subprocess.run([command[0], "sync", *quiet, "--script", str(script)], check=False)
    return command


def _run(command: list[str], work: Path, refresh: Callable[[], None]) -> str | None:
    """Run the script of a framework; returns what it says if it failed."""
    with (work / "script.log").open("w+b") as log:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    status = running.wait(_REFRESH_S)
                    break
                except subprocess.TimeoutExpired:
                    refresh()
        finally:
            running.kill()
            running.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    return (said or "it gave no reason").splitlines()[-1] if status else None
