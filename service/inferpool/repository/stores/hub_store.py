"""Models of the Hugging Face Hub, over its HTTP interface.

The hub's own client is not used: it keeps a cache of its own beside this one, and neither bounds nor verifies
what it fetches by the rules of all other stores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from inferpool.errors import StoreError
from inferpool.repository.stores.arrangement import BESIDE
from inferpool.repository.stores.reference import StoreReference
from inferpool.repository.stores.store import GIT_BLOB, RemoteFile
from inferpool.repository.stores.web_client import WebClient

_ENDPOINT: Final = "https://huggingface.co"
_MOST_PAGES: Final = 100
_FOREIGN: Final = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".gguf", ".md", ".png", ".jpg", ".gif")
"""Other formats of the same weights, and what is for people."""


class HubStore:
    """The files of one revision, which the branch or tag names when the files are listed."""

    def __init__(self, reference: StoreReference, suffixes: tuple[str, ...]) -> None:
        """`suffixes` are those of model files."""
        self._reference = reference
        self._suffixes = suffixes
        self._base = (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")
        self._client = WebClient(str(reference), token=hub_token())
        self._commit = ""

    def list_files(self) -> list[RemoteFile]:
        """The files of the revision that may belong to the model."""
        name = f"{self._reference.host}/{self._reference.path}"
        revision = quote(self._reference.revision or "main", safe="")
        about, _ = self._client.json(f"{self._base}/api/models/{name}/revision/{revision}")
        self._commit = str(_get(about, "sha"))
        url = f"{self._base}/api/models/{name}/tree/{quote(self._commit, safe='')}?recursive=true"
        entries: list[Any] = []
        for _ in range(_MOST_PAGES):
            page, reply = self._client.json(url)
            entries += page
            following = reply.links.get("next", {}).get("url")
            if following is None:
                break
            url = str(reply.url.join(following))
        files = [self._file(entry) for entry in entries if _get(entry, "type") == "file"]
        return self._chosen(files)

    def _file(self, entry: Any) -> RemoteFile:
        large = entry.get("lfs")
        digest = f"sha256:{_get(large, 'oid')}" if large else f"{GIT_BLOB}:{_get(entry, 'oid')}"
        path = str(_get(entry, "path"))
        return RemoteFile(path, int(_get(entry, "size")), digest=digest, address=path, resumable=True)

    def _chosen(self, files: list[RemoteFile]) -> list[RemoteFile]:
        """Leave out other formats of the weights; with the name of a file, take that model alone."""
        wanted = self._reference.file
        if not wanted:
            return [file for file in files if not file.path.endswith(_FOREIGN) or file.path.endswith(".onnx")]
        if all(file.path != wanted for file in files):
            raise StoreError(f"{self._reference} is not there")
        folder, _, name = wanted.rpartition("/")
        suffix = next((suffix for suffix in self._suffixes if name.endswith(suffix)), None)
        if suffix is None:
            raise StoreError(f"{self._reference} is no model file; those end in {', '.join(self._suffixes)}")
        chosen = []
        for file in files:
            above, _, last = file.path.rpartition("/")
            if file.path == wanted:
                chosen.append(_moved(file, f"model{suffix}"))
            elif above == folder and last.startswith(name):
                chosen.append(_moved(file, last))  # its weights, which it names
            elif file.path in BESIDE:
                chosen.append(file)
        return chosen

    def read(self, file: RemoteFile, start: int, end: int | None) -> Iterator[bytes]:
        """The bytes of a file from `start` to before `end`. A commit never changes."""
        path = quote(file.address)
        name = f"{self._reference.host}/{self._reference.path}"
        if start == 0 and end == file.size:
            end = None
        return self._client.read(f"{self._base}/{name}/resolve/{self._commit}/{path}", start, end)

    def close(self) -> None:
        """End all connections."""
        self._client.close()


def hub_token() -> str:
    """The token that the hub's own tools would use; "" if there is none."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token").expanduser().read_text().strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return ""


def _moved(file: RemoteFile, path: str) -> RemoteFile:
    return RemoteFile(path, file.size, digest=file.digest, address=file.address, resumable=file.resumable)


def _get(table: Any, key: str) -> Any:
    try:
        return table[key]
    except (TypeError, LookupError):
        raise StoreError(f"the hub answers without {key}, in another form than expected") from None
