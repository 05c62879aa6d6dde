"""The files that a version is loaded from, and their digests, each of which is computed once.

Files that must be what was checked (signed ones, and those that run code by their digest in `model.toml`) are
loaded from a private copy. All others are loaded from where they are, and hashed meanwhile, because only the
cache of plans needs their digests.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from inferpool.backends.base import Backend
from inferpool.errors import LoadError
from inferpool.repository.config import ModelConfig, read_config
from inferpool.repository.layout import CONFIG_FILE
from inferpool.repository.trust.manifest import SIGNING_FILES, path_of
from inferpool.repository.trust.private_copy import PrivateCopy
from inferpool.repository.trust.verification import copy_checked, expected_digests
from inferpool.repository.version_source import load_files, load_settings
from inferpool.settings import Settings

_CHUNK_BYTES: Final = 2**20
"""Bytes that are hashed at once; the interpreter's lock is released meanwhile."""


class LoadFiles:
    """The files of one version during its load.

    Attributes:
        file: the model file to load.
        folder: the folder of the model to read; None for a bare file.
        trusted: whether the model file may run code while it is loaded.
    """

    def __init__(
        self,
        file: Path,
        folder: Path | None,
        *,
        trusted: bool,
        copy: PrivateCopy | None = None,
    ) -> None:
        """Begin to hash the files of the model, in a thread, unless they are a `copy` that was hashed."""
        self.file = file
        self.folder = folder
        self.trusted = trusted
        self._copy = copy
        self._known: dict[Path, str] = {}
        self._fault: OSError | None = None
        self._closed = False
        self._hashing: threading.Thread | None = None
        if copy is not None:
            self._known = {path_of(copy.file.parent, name): digest for name, digest in copy.digests.items()}
        else:
            self._hashing = threading.Thread(target=self._hash_model, name="hash", daemon=True)
            self._hashing.start()

    def model_digest(self) -> str:
        """A digest of the model file and its external data; raises OSError if one cannot be read."""
        if self._hashing is not None:
            self._hashing.join()
        if self._fault is not None:
            raise self._fault
        return self.digest_of(model_files(self.file))

    def digest(self) -> str:
        """The digest that people are shown; raises OSError if a file cannot be read.

        It is the SHA-256 of the model file, as `sha256sum` prints it. For a model with external data, it is
        `model_digest`.
        """
        if len(model_files(self.file)) > 1:
            return self.model_digest()
        if self._hashing is not None:
            self._hashing.join()
        if self._fault is not None:
            raise self._fault
        return self._file_digest(self.file)

    def digest_of(self, files: Sequence[Path]) -> str:
        """SHA-256 over the names and contents of `files`; raises OSError if one cannot be read."""
        digest = hashlib.sha256()
        for item in sorted(files):
            digest.update(f"{item.name}\n{self._file_digest(item)}\n".encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Remove the copy, if there is one, and hash no more."""
        self._closed = True
        if self._copy is not None:
            self._copy.close()

    def _file_digest(self, file: Path) -> str:
        known = self._known.get(file)
        if known is None:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    if self._closed:
                        raise OSError(errno.ECANCELED, "the load has ended", str(file))
                    digest.update(chunk)
            known = self._known[file] = digest.hexdigest()
        return known

    def _hash_model(self) -> None:
        try:
            for file in model_files(self.file):
                self._file_digest(file)
        except OSError as error:
            self._fault = error


def open_files(
    file: Path, folder: Path | None, config: ModelConfig, backend: Backend, settings: Settings
) -> LoadFiles:
    """The files to load a version from. They are what was signed, if somebody has signed the version.

    Raises LoadError, which names the file, if they are not what was signed, or if they are not signed and
    must be.
    """
    expected = expected_digests(file, settings.require_signatures, settings.cache_dir)
    by_digest = backend.runs_code and not settings.trust
    if expected is None and not (by_digest and config.sha256):
        return LoadFiles(file, folder, trusted=settings.trust)
    try:
        copy = copy_checked(file, load_files(file, folder, config), expected, settings.cache_dir)
    except OSError as error:
        raise LoadError(f"the files of the version cannot be read: {error.strerror}") from error
    try:
        if expected is not None and folder is not None:
            _check_config(copy.folder, config)
        listed = copy.digests[file.name] in {digest.lower() for digest in config.sha256 or ()}
        if by_digest and not listed:
            copy.close()
            # The backend refuses the file, and says which digests the files of all versions have.
            return LoadFiles(file, folder, trusted=False)
        return LoadFiles(
            copy.file,
            None if folder is None else copy.folder,
            trusted=settings.trust or by_digest,
            copy=copy,
        )
    except BaseException:
        copy.close()
        raise


def model_files(file: Path) -> list[Path]:
    """A model's files. Its external data is in the version's folder, or is named after a bare file."""
    pattern = "*" if file.stem == "model" else glob.escape(file.name) + "*"
    found = [item for item in file.parent.glob(pattern) if item.is_file()]
    return [item for item in found if item.name not in SIGNING_FILES]


def _check_config(folder: Path, config: ModelConfig) -> None:
    """Raise LoadError if the `model.toml` that was copied is not the one that was read before."""
    if load_settings(read_config(folder / CONFIG_FILE)) != load_settings(config):
        raise LoadError(f"{CONFIG_FILE} has changed since it was read; load the version again")
