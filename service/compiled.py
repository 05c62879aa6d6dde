"""The hot path in C: modules that mypyc has compiled, used for as long as they are of these sources.

They stand in `service/_compiled/`, not in place of their sources: whoever changes a line runs it at once,
interpreted, and not the C of what the line was before. `setup.py` makes them, where there is a compiler.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final, Literal

SWITCH: Final = "INFERPOOL_COMPILED"
"""The environment variable that, where it is 0 (false, no, off), keeps them from being used, or made."""
FOLDER: Final = "_compiled"
SEAL: Final = "sources"
"""The file, beside the modules, with what `sources` was for the package that they were made of."""

State = Literal["compiled", "interpreted", "switched off", "out of date"]
"""How the hot path runs; the last three all mean interpreted."""


class Compiled(MetaPathFinder):
    """Finds the compiled modules of a folder before anything finds their sources."""

    def __init__(self, folder: Path) -> None:
        suffix = EXTENSION_SUFFIXES[0]
        self._files = {
            file.name.removesuffix(suffix): file for file in folder.iterdir() if file.name.endswith(suffix)
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the module of this name is, if it is compiled."""
        file = self._files.get(fullname)
        if file is None:
            return None
        return spec_from_file_location(fullname, file, loader=ExtensionFileLoader(fullname, str(file)))


def sources(package: Path) -> str:
    """A digest of a package's Python files, and of the Python that modules compiled of them are for.

    All of them count, not only those compiled: what one module says another is compiled by.
    """
    digest = hashlib.sha256(EXTENSION_SUFFIXES[0].encode())
    for file in sorted(package.rglob("*.py")):
        if not file.is_file():
            continue  # such as an editor's lock, a link to nowhere
        digest.update(
            str(file.relative_to(package)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest()
        )
    return digest.hexdigest()


def is_off() -> bool:
    """Whether the environment says that compiled modules are not wanted."""
    return os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off")


def use(package: Path) -> State:
    """Have imports take the compiled modules of `package` from here on, if there are any of its sources."""
    folder = package / FOLDER
    try:
        seal = (folder / SEAL).read_text()
    except OSError:
        return "interpreted"
    if is_off():
        return "switched off"
    if seal != sources(package):
        return "out of date"
    sys.meta_path.insert(0, Compiled(folder))
    return "compiled"
