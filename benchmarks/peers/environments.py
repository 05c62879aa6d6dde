"""Virtual environments for the peers, one each, in a cache folder; what is there already is used again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

INSTALL_S = 900
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferpool-peers"

DEPENDENCIES = """
import importlib.metadata as m, json, sys
print(json.dumps([r for r in m.requires(sys.argv[1]) or [] if "extra ==" not in r]))
"""
VERSIONS = """
import importlib.metadata as m, json, platform, sys
print(json.dumps({"python": platform.python_version(), **{name: m.version(name) for name in sys.argv[1:]}}))
"""


class NotHere(Exception):
    """A peer cannot be set up on this machine; the text says why."""


def environment(name: str, requirements: tuple[str, ...], relaxed: tuple[str, ...] = ()) -> Path:
    """The Python of the environment called `name`, made and filled first where needed.

    Without requirements it is the one that runs this. The first requirement is the peer itself; of what
    that depends on, the packages in `relaxed` are taken at any version. Raises NotHere.
    """
    if not requirements:
        return Path(sys.executable)
    folder = CACHE / name
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    made_from = json.dumps([sys.version, requirements, relaxed])
    if stamp.exists() and stamp.read_text() == made_from:
        return python
    print(f"Installing {' '.join(requirements)} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if relaxed:
        run([*pip, "--no-deps", requirements[0]])
        listed = json.loads(run([str(python), "-c", DEPENDENCIES, distribution(requirements[0])]))
        wanted = [distribution(text) if distribution(text) in relaxed else text for text in listed]
        run([*pip, *wanted, *requirements[1:]])
    else:
        run([*pip, *requirements])
    stamp.write_text(made_from)
    return python


def versions(python: Path, distributions: tuple[str, ...]) -> dict[str, str]:
    """The versions of an environment's Python and of these distributions in it."""
    found: dict[str, str] = json.loads(run([str(python), "-c", VERSIONS, *distributions]))
    return found


def distribution(requirement: str) -> str:
    """`ray[serve]==2.60.0` is about `ray`."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]


def clean_environ(python: Path) -> dict[str, str]:
    """This process' variables without what leads Python astray, with the environment's commands first."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ.pop("VIRTUAL_ENV", None)
    return {**environ, "PATH": f"{python.parent}:{environ.get('PATH', os.defpath)}"}


def run(command: list[str]) -> str:
    """Return the output of a command; raises NotHere with its last line if it fails."""
    environ = clean_environ(Path(command[0]))
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotHere(f"not set up within {INSTALL_S} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotHere(lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout
