"""Decides from where an administrator may have versions loaded: the prefixes of the setting `load_from`.

A server that fetched any address would ask servers of its own network on behalf of whoever has an admin key.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final
from urllib.parse import unquote, urlsplit

from inferpool.errors import ConfigError, Forbidden, InvalidInput
from inferpool.repository.stores.reference import WEB, StoreReference, parse_repository

FOLDER: Final = "file"
"""The scheme of a reference to a folder or a file of this machine."""


def parse_source(text: str) -> StoreReference:
    """Read where a version is to come from: a store, or an absolute path; raises InvalidInput."""
    try:
        found = parse_repository(text)
    except ConfigError as error:
        raise InvalidInput(error.detail, field="from") from None
    if isinstance(found, StoreReference):
        if found.scheme in WEB and "@" in urlsplit(text).netloc:
            raise InvalidInput(
                "from: an address in a request must not have a password; write it into the .netrc of the"
                " server",
                field="from",
            )
        return found
    path = str(found)
    if not found.is_absolute() or not path.isprintable() or len(path) > os.pathconf("/", "PC_PATH_MAX"):
        raise InvalidInput(
            f'from: "{path[:100]}" is neither a store nor an absolute path of the server\'s machine',
            field="from",
        )
    return StoreReference(FOLDER, "", path, text=text)


class AllowedSources:
    """The prefixes below which sources may lie."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        """`prefixes` are stores (`s3://bucket/models`) and absolute paths of folders."""
        self._prefixes = [_split_prefix(prefix) for prefix in prefixes]

    def allowed(self, source: StoreReference) -> StoreReference:
        """The source to read, without links in its path; raises Forbidden unless it may be read."""
        asked = source
        if source.scheme == FOLDER:
            source = StoreReference(FOLDER, "", os.path.realpath(source.path), text=source.text)
            parts: list[str] | None = source.path.strip("/").split("/")
        else:
            path = f"{source.host}/{source.path}" + (f"/{source.file}" if source.file else "")
            parts = _parts(source.scheme, path)
        if not self._covers(source.scheme, parts):
            raise Forbidden(
                f"{asked} is not below a prefix from which versions may be loaded; the server's setting"
                " load_from (--load-from) has those prefixes"
            )
        return source

    def covers_address(self, address: str) -> bool:
        """Whether a web address, to which a server redirects, lies below a prefix."""
        try:
            url = urlsplit(address)
            port = f":{url.port}" if url.port is not None else ""
        except ValueError:
            return False
        host = url.hostname or ""
        host = f"[{host}]" if ":" in host else host
        return "@" not in url.netloc and self._covers(
            url.scheme, _parts(url.scheme, f"{host}{port}{url.path}")
        )

    def _covers(self, scheme: str, parts: list[str] | None) -> bool:
        return parts is not None and any(
            scheme == allowed and parts[: len(prefix)] == prefix for allowed, prefix in self._prefixes
        )


def _split_prefix(prefix: str) -> tuple[str, list[str]]:
    scheme, separator, rest = prefix.partition("://")
    if not separator:
        path = os.path.realpath(prefix).strip("/")
        return FOLDER, path.split("/") if path else []
    scheme = scheme.lower()
    host, _, path = rest.strip("/").partition("/")
    host = host.lower() if scheme in WEB else host
    return scheme, _parts(scheme, f"{host}/{path}" if path else host) or [""]


def _parts(scheme: str, path: str) -> list[str] | None:
    """The parts of a path as a server may read them; None if a part could lead somewhere else."""
    parts = path.strip("/").split("/")
    if scheme in WEB:  # elsewhere, a percent sign stands for itself
        parts = [unquote(part) for part in parts]
    if any(part in ("", ".", "..") or "/" in part or "\\" in part or "%" in part for part in parts):
        return None
    return parts
