"""Commands that messages tell people to type, such that they work as they are printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def own_command() -> str:
    """How to call this program: by its name where that is found, else by where it is installed."""
    if shutil.which("inferpool"):
        return "inferpool"
    installed = Path(sys.executable).with_name("inferpool")
    return _shown(installed) if installed.exists() else f"{_shown(Path(sys.executable))} -m inferpool"


def install_command(extra: str) -> str:
    """How to install the `extra` for the Python that runs, which need not be the one whose pip is found."""
    return f"{_pip()} install 'inferpool[{extra}]'"


def uninstall_command(package: str) -> str:
    """How to take `package` away from the Python that runs."""
    return f"{_pip()} uninstall {package}"


def _pip() -> str:
    pip = shutil.which("pip")
    here = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return "pip" if here else f"{_shown(Path(sys.executable))} -m pip"


def _shown(file: Path) -> str:
    """The path of `file` as one types it: from the working folder where it is in that."""
    try:
        return shlex.quote(str(file.relative_to(Path.cwd())))
    except (ValueError, OSError):
        return shlex.quote(str(file))
