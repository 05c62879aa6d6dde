"""What all stores have in common: they list files, and read parts of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from inferpool.errors import StoreError, StoreUnreachable

SHA256: Final = "sha256"
GIT_BLOB: Final = "git"
"""The digest that git has of a file: SHA-1 over a header and the content."""
Chunk: TypeAlias = "bytes | memoryview"


class StoreChanged(StoreUnreachable):
    """A file is no longer what it was when the store was listed: list it again."""


class CredentialsRefused(StoreError):
    """The store wants credentials, or others."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a store.

    Attributes:
        path: relative to the reference, with slashes.
        size: bytes; None if the store does not say.
        stamp: differs whenever the content does; "" if the store has nothing of the kind.
        digest: `sha256:…` or `git:…` of the content; "" if the store does not say.
        is_archive: whether the files are inside.
        address: what the store reads the file by.
        resumable: whether a part of the file can be read, and never one of another content.
    """

    path: str
    size: int | None
    stamp: str = ""
    digest: str = ""
    is_archive: bool = False
    address: str = ""
    resumable: bool = False

    def key(self, origin: str) -> str:
        """The name of the content: the same for the same file of the same `origin`; "" if none is known."""
        if self.digest:
            return hashlib.sha256(self.digest.encode()).hexdigest()
        if not self.stamp:
            return ""
        return hashlib.sha256(f"{origin}\n{self.path}\n{self.size}\n{self.stamp}".encode()).hexdigest()


class Store(Protocol):
    """A store. The methods may be called in several threads; they raise StoreError or StoreUnreachable."""

    def list_files(self) -> list[RemoteFile]:
        """All files there are, or the one that the reference names. No content is read."""

    def read(self, file: RemoteFile, start: int, end: int | None) -> Iterator[Chunk]:
        """The bytes from `start` to before `end` (None: the last one), in pieces.

        Raises StoreChanged if the file is another one now.
        """

    def close(self) -> None:
        """End all connections."""


def stamp_of(files: Iterable[RemoteFile]) -> str:
    """Differs whenever any of the files does; "" if the store does not say."""
    lines = []
    for file in sorted(files, key=lambda file: file.path):
        if not (file.digest or file.stamp):
            return ""
        lines.append(f"{file.path}\n{file.size}\n{file.digest or file.stamp}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
