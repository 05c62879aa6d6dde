"""Makes the forms with fewer channels: another process prunes the network and runs the model's `build.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from inferpool.backends.base import LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.errors import ConfigError
from inferpool.release import pruning
from inferpool.release.build import script_command
from inferpool.repository.layout import BUILD_SCRIPT
from inferpool.system.cpu import usable_cores
from inferpool.tensors import Array

if TYPE_CHECKING:
    from inferpool.optimise_command.model_folders import SourceModel

PERCENTS: Final = (25, 50)
"""The shares of the channels of each layer that are removed."""
MOST_EPOCHS: Final = 1000
_SCRIPT: Final = "structured_pruning.py"
_RESULT: Final = "result.json"


def form_name(percent: int) -> str:
    """Return the name of the form without that many of the channels."""
    return f"structured-{percent}"


def find_build_script(folder: Path) -> Path:
    """Return the model's build script; raises ConfigError if there is none."""
    script = folder / BUILD_SCRIPT
    if not script.is_file():
        raise ConfigError(f"--fine-tune needs {script}: it loads the network and trains it")
    return script.absolute()


def make_structured(
    source: SourceModel, rows: Mapping[str, Array], work: Path, epochs: int, seed: int
) -> tuple[dict[str, Path], dict[str, str]]:
    """Make the forms in the folder `work`; returns the files that were made, and reasons for the others.

    `rows` are inputs of the model, by which the network is compared with the version. This runs the code of
    `build.py`, with the rights of this process. The same seed and number of cores give the same bytes.
    """
    answers = OnnxBackend().load(source.file, LoadOptions(threads=1)).run(dict(rows))
    arrays = {f"in:{name}": array for name, array in rows.items()}
    arrays |= {f"out:{name}": array for name, array in answers.items()}
    np.savez(work / "rows.npz", **arrays)  # type: ignore[arg-type]  # numpy's types want a flag there
    build = find_build_script(source.folder)
    paths = [build, source.file.absolute(), work / "rows.npz", work]
    command = script_command(
        Path(pruning.__file__).with_name(_SCRIPT),
        [*map(str, paths), *map(str, (epochs, seed, *PERCENTS))],
        "structured pruning",
        also=build,
    )
    fault = _run(command, work / "script.log")
    reasons = _result(work).get("failures", {})
    files, failed = {}, {}
    for percent in PERCENTS:
        file, name = work / str(percent) / "model.onnx", form_name(percent)
        reason = fault or reasons.get(str(percent))
        if reason is None and file.is_file():
            files[name] = file
        else:
            failed[name] = f"cannot be made: {reason or 'no file was written'}"
    return files, failed


def read_tools(work: Path) -> dict[str, str]:
    """Return the versions of the packages that made the forms in `work`."""
    tools: dict[str, str] = _result(work).get("tools", {})
    return tools


def _result(work: Path) -> dict[str, Any]:
    file = work / _RESULT
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def _run(command: list[str], log: Path) -> str | None:
    """Run a command, whose standard error a person at a terminal sees; returns why it failed, or None."""
    # Threads and hashes are the same in each run, and so are sums and orders.
    environ = os.environ | {
        "OMP_NUM_THREADS": str(usable_cores()),
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    with log.open("w+b") as file:
        shown = None if sys.stderr.isatty() else file
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=shown, env=environ, check=False
        )
        if done.returncode == 0:
            return None
        file.seek(0)
        said = file.read().decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"its process ended with status {done.returncode}"
