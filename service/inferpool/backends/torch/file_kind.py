"""Tells the kind of a PyTorch file by the names in its archive. Nothing of the file is read or run.

All three kinds are zip archives with one folder at the top. TorchScript has `constants.pkl` and `code/`. A
PT2 archive has exported programs in `models/NAME.json` and compiled programs in `data/aotinductor/NAME/`
(torch/csrc/export/pt2_archive_constants.h).
"""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path, PurePosixPath

from inferpool.errors import LoadError


class Kind(Enum):
    """The kinds of file that can be served."""

    SCRIPT = "TorchScript"
    PROGRAM = "exported program"
    COMPILED = "AOTInductor package"


def kind_of(file: Path) -> Kind:
    """The kind of `file`.

    A package with both a program and its compiled form counts as the program, because that has a signature.
    Raises LoadError, which says what the file seems to be, if it cannot be served.
    """
    names = _names(file)
    if any(name.startswith("models/") and name.endswith(".json") for name in names):
        return Kind.PROGRAM
    if any(name.startswith("data/aotinductor/") for name in names):
        return Kind.COMPILED
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return Kind.SCRIPT
    if "data.pkl" in names:
        raise LoadError(
            f"{file.name} holds weights without a model (torch.save); save the model itself, with"
            " torch.export.save as model.pt2"
        )
    raise LoadError(f"{file.name} is not a TorchScript file, an exported program or an AOTInductor package")


def _names(file: Path) -> set[str]:
    """The names in the archive, without the folder at its top."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise LoadError(
            f"{file.name} is not a complete file of torch.export.save or torch.jit.save"
        ) from error
    except OSError as error:
        raise LoadError(f"{file.name} cannot be read: {error.strerror}") from error
    return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names}
