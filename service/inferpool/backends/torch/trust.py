"""The check of files that can run code when they are loaded: somebody must have said to trust them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from inferpool.backends.base import LoadOptions
from inferpool.errors import LoadError

_SUFFIXES = (".pt", ".pt2")


def check_trust(file: Path, options: LoadOptions) -> None:
    """Raise LoadError, which says what to write, unless `options` trust `file`. None of its code runs.

    A digest is not compared here: the file could be exchanged before it is loaded.
    """
    if options.trusted:
        return
    listed = "; the digests in model.toml belong to other files" if options.sha256 else ""
    refusal = (
        f"{file.name} can run its own code while it is loaded, and is not trusted{listed}."
        " If you know who made the file, "
    )
    everything = "serve with --trust (INFERPOOL_TRUST=true), which trusts every such file"
    versions = _versions(file)
    if not versions:
        # model.toml is beside the versions, and a bare file has none.
        raise LoadError(f"{refusal}{everything}")
    # One line for all versions: model.toml may have the key only once. Versions that are listed already stay.
    digests = {version: _digest(version) for version in versions}
    line = ", ".join(f'"{each}"' for each in dict.fromkeys(digests.values()))
    verb = "replace the line sha256 by" if options.sha256 else "write"
    names = ", ".join(f"{version.parent.name}/{version.name}" for version in versions)
    trusts = f" (it trusts {names})" if len(versions) > 1 else ""
    raise LoadError(f"{refusal}{verb} sha256 = [{line}] at the top of model.toml{trusts}; or {everything}")


def _versions(file: Path) -> list[Path]:
    """The model files of every version beside `file`, by number; empty for a bare file."""
    if file.stem != "model" or not file.parent.name.isdigit():
        return []
    folder = file.resolve().parent.parent
    found = [item for item in folder.glob("*/model.*") if item.parent.name.isdigit() and item.is_file()]
    files = [item for item in found if item.suffix in _SUFFIXES]
    return [file if item == file.resolve() else item for item in sorted(files, key=_number)]


def _number(file: Path) -> int:
    return int(file.parent.name)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
