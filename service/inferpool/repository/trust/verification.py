"""Checks the files of a version against its manifest and its digital signature."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from inferpool.errors import LoadError
from inferpool.repository.layout import is_in_version_folder
from inferpool.repository.trust.digital_signature import signed_digests
from inferpool.repository.trust.manifest import (
    MANIFEST_FILE,
    MOST_BYTES,
    SIGNATURE_FILE,
    check_digest,
    check_name,
    check_names,
    parse_manifest,
    path_of,
)
from inferpool.repository.trust.private_copy import PrivateCopy, temporary_folder
from inferpool.system.files import printable, read_file


def expected_digests(
    file: Path, signers: Sequence[Path], cache_dir: Path | None = None
) -> dict[str, str] | None:
    """The digests, by name, of the files that the version of the model `file` must have; None if any will do.

    With `signers` (see `signed_digests`) the version must have a valid digital signature. Raises LoadError if
    it has none, or if its manifest is not the one that was signed. `cache_dir` is as in `PrivateCopy`.
    """
    if not is_in_version_folder(file):
        if signers:
            raise LoadError(
                f"{file.name} is not signed, and cannot be: only the folder of a version can"
                f" (NAME/1/model{file.suffix})"
            )
        return None
    folder = file.parent
    manifest = _read(folder / MANIFEST_FILE)
    listed = {} if manifest is None else parse_manifest(manifest)
    if not signers:
        return None if manifest is None else listed
    signature = _read(folder / SIGNATURE_FILE)
    if signature is None:
        raise LoadError(
            f"the version is not signed: it has no {SIGNATURE_FILE}, and --require-signatures is set; sign it"
            " with inferpool sign --private-key"
        )
    try:
        parent = temporary_folder(cache_dir)
    except OSError as error:
        raise LoadError(f"{SIGNATURE_FILE} cannot be checked: {error.strerror}") from error
    signed = signed_digests(signature, signers, parent)
    if manifest is not None:
        digest = hashlib.sha256(manifest).hexdigest()
        if MANIFEST_FILE not in signed:
            raise LoadError(f"{SIGNATURE_FILE} does not cover {MANIFEST_FILE}; sign the version again")
        check_digest(MANIFEST_FILE, signed.pop(MANIFEST_FILE), digest)
        for name in sorted(signed.keys() & listed.keys()):
            check_digest(name, signed[name], listed[name])
    elif MANIFEST_FILE in signed:
        raise LoadError(f"{MANIFEST_FILE} is missing; it was signed with the version")
    return {**listed, **signed}


def copy_checked(
    file: Path,
    found: Mapping[str, Path],
    expected: Mapping[str, str] | None,
    cache_dir: Path | None = None,
) -> PrivateCopy:
    """A private copy of the files of a version, which are those that are expected, and no others.

    `found` are the files that a load reads, by name. Raises LoadError, which names the file, if one has
    changed, is missing or was added. With `expected` None any files are right.
    """
    if expected is None:
        return PrivateCopy(file, found, cache_dir)
    check_names(expected, found)
    copy = PrivateCopy(file, {name: path_of(file.parent, name) for name in expected}, cache_dir)
    try:
        for name, digest in copy.digests.items():
            check_digest(name, expected[name], digest)
    except BaseException:
        copy.close()
        raise
    return copy


def check_in_place(file: Path, found: Mapping[str, Path], expected: Mapping[str, str]) -> None:
    """Check the files of a version where they are; raises LoadError as `copy_checked` does."""
    check_names(expected, found)
    for name, digest in expected.items():
        check_name(name)
        path = path_of(file.parent, name)
        if not path.is_file():
            raise LoadError(f"{printable(name)} is missing; it was signed with the version")
        try:
            with path.open("rb") as opened:
                check_digest(name, digest, hashlib.file_digest(opened, "sha256").hexdigest())
        except OSError as error:
            raise LoadError(f"{printable(name)} cannot be read: {error.strerror}") from error


def _read(file: Path) -> bytes | None:
    """The content of a small file; None if there is no such file. Raises LoadError."""
    try:
        return read_file(file, MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LoadError(f"{file.name} cannot be read: {error.strerror}") from error
