"""Commands for messages, which work when a user types them as printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def own_command() -> str:
    """The command that runs this program: its name if the shell finds it, else its path."""
    if shutil.which("inferpool"):
        return "inferpool"
    installed = Path(sys.executable).with_name("inferpool")
    return _shown(installed) if installed.exists() else f"{_shown(Path(sys.executable))} -m inferpool"


def install_command(extra: str) -> str:
    """The command that installs `extra` for the running Python, whose pip may not be first in the PATH."""
    return f"{_pip()} install 'inferpool[{extra}]'"


def uninstall_command(package: str) -> str:
    """The command that uninstalls `package` from the running Python."""
    return f"{_pip()} uninstall {package}"


def _pip() -> str:
    pip = shutil.which("pip")
    here = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return "pip" if here else f"{_shown(Path(sys.executable))} -m pip"


def _shown(file: Path) -> str:
    """The path of `file` for a shell, relative to the working folder if the file is below it."""
    try:
        return shlex.quote(str(file.relative_to(Path.cwd())))
    except (ValueError, OSError):
        return shlex.quote(str(file))
