"""A file on a web server: an archive of models, or a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import unquote, urlsplit, urlunsplit

from inferpool.repository.stores.reference import StoreReference, is_archive
from inferpool.repository.stores.store import RemoteFile
from inferpool.repository.stores.web_client import WebClient, netrc_credentials


class WebStore:
    """The file that an address names. Credentials are those of the address, or of `.netrc`."""

    def __init__(
        self,
        reference: StoreReference,
        suffixes: tuple[str, ...],
        may_ask: Callable[[str], bool] | None = None,
    ) -> None:
        """`suffixes` are those of model files; every other file is an archive. `may_ask`: see `WebClient`."""
        url = urlsplit(reference.text)
        credentials = netrc_credentials(url.hostname or "")
        if url.username is not None:
            credentials = (unquote(url.username), unquote(url.password or ""))
        self._url = urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, url.query, ""))
        self._reference = reference
        self._suffixes = suffixes
        self._client = WebClient(str(reference), credentials, may_ask=may_ask)
        self._conditions: dict[str, str] = {}

    def list_files(self) -> list[RemoteFile]:
        """The file, as the headers describe it."""
        headers = self._client.head(self._url)
        tag, changed = headers.get("etag", ""), headers.get("last-modified", "")
        length = headers.get("content-length", "")
        size = int(length) if length.isdecimal() and "content-encoding" not in headers else None
        # A weak tag names what is equivalent, not what is equal byte for byte.
        if tag and not tag.startswith("W/"):
            self._conditions = {"If-Match": tag}
        elif changed:
            self._conditions = {"If-Unmodified-Since": changed}
        name = unquote(self._reference.path).rpartition("/")[2]
        return [
            RemoteFile(
                path=name,
                size=size,
                stamp=f"{tag} {changed}".strip(),
                digest=f"sha256:{self._reference.sha256}" if self._reference.sha256 else "",
                is_archive=is_archive(name) or not name.endswith(self._suffixes),
                resumable="bytes" in headers.get("accept-ranges", "")
                and size is not None
                and bool(self._conditions or self._reference.sha256),
            )
        ]

    def read(self, file: RemoteFile, start: int, end: int | None) -> Iterator[bytes]:
        """The bytes of the file from `start` to before `end`."""
        if not file.resumable or (start == 0 and end == file.size):
            end = None
        return self._client.read(self._url, start, end, self._conditions)

    def close(self) -> None:
        """End all connections."""
        self._client.close()
