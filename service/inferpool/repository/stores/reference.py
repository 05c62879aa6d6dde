"""Reads what names a repository: a path of this machine, or a place in a store.

| reference | store |
|---|---|
| `s3://bucket/prefix`, `gs://…`, `az://container/prefix` | object stores |
| `https://host/models.tar.gz` | an archive or a model file on a web server |
| `hf://owner/name@revision` | a model of the Hugging Face Hub |
| `oci://registry/name:tag` | an artifact or an image of a registry |
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from inferpool.errors import ConfigError

OBJECT_STORES: Final = ("s3", "gs", "az")
WEB: Final = ("http", "https")
HUB: Final = "hf"
REGISTRY: Final = "oci"
ARCHIVE_SUFFIXES: Final = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
LATEST: Final = "latest"
_MOST_CHARACTERS: Final = 2048
_DIGEST: Final = re.compile(r"sha256=([0-9a-f]{64})")
_IMAGE: Final = re.compile(
    r"(?P<name>[a-z0-9._/-]+?)(?:@(?P<digest>sha256:[0-9a-f]{64})|:(?P<tag>[\w][\w.-]{0,127}))?"
)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True, slots=True)
class StoreReference:
    """A place in a store. Its text may contain credentials; `str()` of the reference never does.

    Attributes:
        scheme: the part before `://`.
        host: the bucket or container, the server with its port, or the owner on a hub.
        path: the prefix, the file or the name; without slashes at its ends.
        revision: the tag, digest or revision; "" if none is named.
        file: of a hub, the only file that is wanted; else "".
        sha256: the digest that the one file must have; "" if none is named.
        text: the whole reference as somebody wrote it.
    """

    scheme: str
    host: str
    path: str
    revision: str = ""
    file: str = ""
    sha256: str = ""
    text: str = field(default="", repr=False, compare=False)

    def __str__(self) -> str:
        mark = (
            "" if not self.revision else ":" if self.scheme == REGISTRY and ":" not in self.revision else "@"
        )
        parts = [self.host, self.path + mark + self.revision, self.file]
        return f"{self.scheme}://{'/'.join(part for part in parts if part)}"

    @property
    def key(self) -> str:
        """A name for files about this place: the same for every reference to it."""
        return hashlib.sha256(f"{self}#{self.sha256}".encode()).hexdigest()[:16]

    @property
    def model_name(self) -> str:
        """The name of the model, if the place has one model that says no name itself."""
        parts = [self.host, *filter(None, self.path.split("/"))]
        # Neither `model.onnx` nor the number of a version names a model: the folder around does.
        while len(parts) > 1 and (parts[-1].isdecimal() or _without_suffix(parts[-1]) == "model"):
            parts.pop()
        name = _without_suffix(parts[-1])
        return name if _NAME.fullmatch(name) else "model"

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, and plain HTTP to it cannot be read by others."""
        return re.sub(r":\d+$", "", self.host) in _LOOPBACK


def _without_suffix(name: str) -> str:
    for suffix in (*ARCHIVE_SUFFIXES, ".onnx", ".pt2", ".pt"):
        name = name.removesuffix(suffix)
    return name


def is_archive(path: str) -> bool:
    """Whether the name of a file is that of an archive."""
    return path.lower().endswith(ARCHIVE_SUFFIXES)


def parse_repository(text: str) -> Path | StoreReference:
    """Read the path of a folder or file, or a reference to a store; raises ConfigError, which says why."""
    scheme, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return Path(text)
    scheme = scheme.lower()
    if len(text) > _MOST_CHARACTERS or not text.isprintable() or " " in text:
        raise ConfigError(f"the reference to {scheme}:// is too long, or has a space or a control character")
    if scheme == "file":
        return Path(unquote(rest))
    if scheme in OBJECT_STORES:
        return _object_store(scheme, rest, text)
    if scheme in WEB:
        return _web(text)
    if scheme == HUB:
        return _hub(rest, text)
    if scheme == REGISTRY:
        return _registry(rest, text)
    raise ConfigError(
        f"{scheme}:// is no store; write s3://, gs://, az://, https://, hf:// or oci://, or a path"
    )


def _object_store(scheme: str, rest: str, text: str) -> StoreReference:
    bucket, _, prefix = rest.partition("/")
    if not bucket or "@" in bucket or "?" in rest or "#" in rest:
        raise ConfigError(
            f"{scheme}:// needs a bucket and a prefix, and nothing else: {scheme}://bucket/models"
        )
    return StoreReference(scheme, bucket, prefix.strip("/"), text=text)


def _web(text: str) -> StoreReference:
    try:
        url = urlsplit(text)
        port = f":{url.port}" if url.port is not None else ""
    except ValueError:
        raise ConfigError("the web address of the models is malformed") from None
    host = url.hostname or ""
    host = f"[{host}]" if ":" in host else host
    pinned = _DIGEST.fullmatch(url.fragment)
    path = url.path.strip("/")
    if not host or not path or (url.fragment and pinned is None):
        raise ConfigError(
            "a web address must name an archive or a model file: https://host/models.tar.gz, or with its"
            " digest https://host/models.tar.gz#sha256=…"
        )
    reference = StoreReference(
        url.scheme, host + port, path, sha256=pinned[1] if pinned is not None else "", text=text
    )
    if url.scheme == "http" and not reference.is_local and pinned is None:
        raise ConfigError(
            f"{reference} could be changed on its way; use https://, or pin the file: {reference}#sha256=…"
        )
    return reference


def _hub(rest: str, text: str) -> StoreReference:
    owner, _, rest = rest.partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    if not all(_NAME.fullmatch(part) for part in (owner, name)) or "?" in rest or "#" in rest:
        raise ConfigError("a model of the hub is named by its owner and its name: hf://owner/name@revision")
    return StoreReference(HUB, owner, name, unquote(revision), file.strip("/"), text=text)


def _registry(rest: str, text: str) -> StoreReference:
    host, _, image = rest.partition("/")
    found = _IMAGE.fullmatch(image)
    if not re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?|\[[0-9a-f:]+\](:\d+)?", host) or found is None:
        raise ConfigError(
            "a model in a registry is named by the registry, its name and a tag: oci://registry/name:tag, or"
            " oci://registry/name@sha256:…"
        )
    revision = found["digest"] or found["tag"] or LATEST
    return StoreReference(REGISTRY, host, found["name"].strip("/"), revision, text=text)
