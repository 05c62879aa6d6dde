"""What one of PyTorch's files is, by the names of what is in it; nothing of it is read or run.

All three kinds are zip archives with one folder at the top: TorchScript has `constants.pkl` and `code/`;
a PT2 archive has its exported programs in `models/NAME.json` and its compiled ones in
`data/aotinductor/NAME/` (torch/csrc/export/pt2_archive_constants.h).
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
    """What `file` is; of a package with a program both compiled and not, the program: it has a signature.

    Raises LoadError for what cannot be served, saying what it seems to be.
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
    raise LoadError(f"{file.name} is none of TorchScript, exported program and AOTInductor package")


def _names(file: Path) -> set[str]:
    """The names in the archive, without the folder at its top."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise LoadError(
            f"{file.name} is not a file that torch.export.save or torch.jit.save has written whole"
        ) from error
    except OSError as error:
        raise LoadError(f"{file.name} cannot be read: {error.strerror}") from error
    return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in names}
