"""The manifest of a version: the SHA-256 digest of every file that its load reads.

The format is that of `sha256sum`, which checks it without Inferpool: `sha256sum -c manifest.sha256` in the
folder of the version. Names are relative to that folder; files beside the versions begin with `../`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from inferpool.errors import LoadError
from inferpool.system.files import printable

MANIFEST_FILE: Final = "manifest.sha256"
SIGNATURE_FILE: Final = "model.sig"
SIGNING_FILES: Final = frozenset({MANIFEST_FILE, SIGNATURE_FILE})
"""The files that say what a version consists of, and are no part of it."""
MOST_BYTES: Final = 16 * 2**20
"""Bytes of a manifest, or of a digital signature."""
_LINE: Final = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_PLAIN: Final = re.compile(r"[^\\\n\r]+")
"""Names that `sha256sum` writes as they are."""


def manifest_text(digests: Mapping[str, str]) -> str:
    """The manifest of files with these digests; raises LoadError for a name that cannot stand in a line."""
    for name in digests:
        if not _PLAIN.fullmatch(name):
            raise LoadError(
                f"{printable(name)} cannot be in a manifest: its name has a backslash or a line break;"
                " rename it"
            )
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def parse_manifest(content: bytes) -> dict[str, str]:
    """The digests by names that a manifest lists; raises LoadError, which names the line, if it is none."""
    listed: dict[str, str] = {}
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise LoadError(f"{MANIFEST_FILE} is not UTF-8; sign the version again") from error
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        found = _LINE.fullmatch(line)
        if found is None:
            raise LoadError(
                f"{MANIFEST_FILE}, line {number}: expected 64 lower-case hexadecimal digits, two spaces and"
                " a name; sign the version again"
            )
        check_name(found[2])
        if found[2] in listed:
            raise LoadError(f"{MANIFEST_FILE}, line {number}: {printable(found[2])} is listed twice")
        listed[found[2]] = found[1]
    return listed


def check_name(name: str) -> None:
    """Raise LoadError for a name that leads elsewhere than to the folder of the version or its model."""
    parts = PurePosixPath(name).parts
    inner = parts[1:] if parts[:1] == ("..",) else parts
    if (
        not inner
        or ".." in inner
        or name.startswith("/")
        or str(PurePosixPath(*parts)) != name
        or "\0" in name
    ):
        raise LoadError(f"{printable(name)} leads out of the folder of the model")


def path_of(version_folder: Path, name: str) -> Path:
    """Where the file of this name is; `..` leads to the model even if the version's folder is a link."""
    if name.startswith("../"):
        return version_folder.parent / name[3:]
    return version_folder / name


def name_of(version_folder: Path, path: Path) -> str:
    """The name of a file in the manifest of a version; raises LoadError if it is elsewhere."""
    name = os.path.relpath(path, version_folder).replace(os.sep, "/")
    check_name(name)
    return name


def check_names(expected: Collection[str], found: Collection[str]) -> None:
    """Raise LoadError, which names the file, if a load would read a file that is not expected."""
    extra = sorted(set(found) - set(expected))
    if extra:
        others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise LoadError(
            f"{printable(extra[0])}{others} was not signed with the version: remove it, or sign the version"
            " again"
        )


def check_digest(name: str, expected: str, actual: str) -> None:
    """Raise LoadError, which names the file, if its content is not what was signed."""
    if expected != actual:
        raise LoadError(
            f"{printable(name)} has changed since the version was signed: its SHA-256 is {actual[:16]}…,"
            f" expected {expected[:16]}…; restore the file, or sign the version again"
        )
