"""Models in registries of containers: OCI artifacts (as `oras push` makes them) and images.

The protocol is that of the OCI distribution specification. It is spoken here, in a few requests, because the
clients of registries in Python bring their own downloads without bounds, parts and a cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from inferpool.errors import StoreError
from inferpool.repository.stores.reference import StoreReference
from inferpool.repository.stores.store import CredentialsRefused, RemoteFile
from inferpool.repository.stores.web_client import WebClient

_INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_TITLE: Final = "org.opencontainers.image.title"
_UNPACK: Final = "io.deis.oras.content.unpack"
_LAYER: Final = re.compile(r"[+.]tar([+.](gzip|zstd))?$")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')
_HELPER_S: Final = 30


class RegistryStore:
    """The layers of an artifact or image: a layer with a title is a file, others are archives."""

    def __init__(self, reference: StoreReference) -> None:
        self._reference = reference
        scheme = "http" if reference.is_local else "https"
        host = "registry-1.docker.io" if reference.host == "docker.io" else reference.host
        self._base = f"{scheme}://{host}/v2/{reference.path}"
        self._credentials = registry_credentials(reference.host)
        self._client = WebClient(str(reference))
        self._authorization: dict[str, str] = {}

    def list_files(self) -> list[RemoteFile]:
        """The layers that the manifest names."""
        manifest = self._manifest(self._reference.revision)
        if manifest.get("mediaType") in _INDEXES or "manifests" in manifest:
            manifest = self._manifest(_for_this_machine(manifest["manifests"]))
        try:
            files = [_layer(number, layer) for number, layer in enumerate(manifest["layers"])]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise StoreError(f"{self._reference}: the manifest has no layers that could be read") from None
        return files

    def _manifest(self, name: str) -> dict[str, Any]:
        """A manifest by tag or digest; a digest is verified."""
        url = f"{self._base}/manifests/{name}"
        headers = {"Accept": ", ".join((*_INDEXES, *_MANIFESTS))}
        body, reply = self._client.get(url, headers | self._authorization, statuses=(401,))
        if reply.status_code == 401:
            self._authorize(reply.headers.get("www-authenticate", ""))
            body, reply = self._client.get(url, headers | self._authorization)
        if _DIGEST.fullmatch(name) and hashlib.sha256(body).hexdigest() != name.partition(":")[2]:
            raise StoreError(f"{self._reference}: the manifest has another digest than the one asked for")
        try:
            manifest = json.loads(body)
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict):
            raise StoreError(f"{self._reference}: the registry answers with something else than a manifest")
        return manifest

    def _authorize(self, challenge: str) -> None:
        """Get what the registry wants: a token of its token server, or the user and password."""
        kind, _, rest = challenge.partition(" ")
        basic: dict[str, str] = {}
        if self._credentials is not None:
            pair = ":".join(self._credentials).encode()
            basic = {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}
        if kind.lower() != "bearer":
            if not basic:
                raise CredentialsRefused(
                    f"{self._reference} needs a user and a password: docker login {self._reference.host}"
                )
            self._authorization = basic
            return
        facts = dict(_CHALLENGE.findall(rest))
        import httpx

        realm = httpx.URL(facts.get("realm", ""))
        if realm.scheme != "https" and not self._reference.is_local:
            raise StoreError(f"{self._reference}: the registry's token server has no TLS")
        query = {name: facts[name] for name in ("service", "scope") if name in facts}
        answer, _ = self._client.json(str(realm.copy_merge_params(query)), basic)
        token = answer.get("token") or answer.get("access_token") if isinstance(answer, dict) else None
        if not isinstance(token, str):
            raise StoreError(f"{self._reference}: the registry's token server gives no token")
        self._authorization = {"Authorization": f"Bearer {token}"}

    def read(self, file: RemoteFile, start: int, end: int | None) -> Iterator[bytes]:
        """The bytes of a layer from `start` to before `end`. A digest names one content."""
        if start == 0 and end == file.size:
            end = None
        url = f"{self._base}/blobs/{file.digest}"
        try:
            yield from self._client.read(url, start, end, self._authorization)
        except CredentialsRefused:
            # Tokens are good for a few minutes. No byte has been read with this one.
            self._manifest(self._reference.revision)
            yield from self._client.read(url, start, end, self._authorization)

    def close(self) -> None:
        """End all connections."""
        self._client.close()


def keep_of_image(path: str) -> str | None:
    """The path of a file of an image, whose models are in the folder `/models`; None for all others."""
    return (
        path.removeprefix("/").removeprefix("models/")
        if path.removeprefix("/").startswith("models/")
        else None
    )


def _layer(number: int, layer: dict[str, Any]) -> RemoteFile:
    digest, annotations = str(layer["digest"]), layer.get("annotations") or {}
    if not _DIGEST.fullmatch(digest):
        raise ValueError(digest)
    title = annotations.get(_TITLE)
    is_archive = bool(_LAYER.search(layer["mediaType"]))
    if title is not None:
        is_archive = annotations.get(_UNPACK) == "true"
    path = str(title) if title is not None and not is_archive else f"layer-{number}"
    return RemoteFile(path, int(layer["size"]), digest=digest, is_archive=is_archive,
                      address="image" if title is None else "", resumable=True)  # fmt: skip


def _for_this_machine(manifests: list[dict[str, Any]]) -> str:
    """The digest of the manifest for Linux on this machine's processor, else of the first one."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    fitting = [
        manifest
        for manifest in manifests
        if (manifest.get("platform") or {}).get("architecture") == machine
        and (manifest.get("platform") or {}).get("os") == "linux"
    ]
    chosen = [*fitting, *manifests]
    if not chosen or not _DIGEST.fullmatch(str(chosen[0].get("digest"))):
        raise StoreError("the index in the registry names no manifest")
    return str(chosen[0]["digest"])


def registry_credentials(host: str) -> tuple[str, str] | None:
    """The user and password that `docker login` or `podman login` has kept for a registry."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    files = [
        os.environ.get("REGISTRY_AUTH_FILE", ""),
        str(Path(os.environ.get("DOCKER_CONFIG") or "~/.docker") / "config.json"),
        f"{runtime}/containers/auth.json" if runtime else "",
    ]
    names = [host, f"https://{host}"]
    if host == "docker.io":
        names += ["https://index.docker.io/v1/", "index.docker.io"]
    for file in filter(None, files):
        try:
            config = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
            helpers = config.get("credHelpers") or {}
            for name in names:
                entry = (config.get("auths") or {}).get(name) or {}
                if entry.get("auth"):
                    user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
                    return user, password
                helper = helpers.get(name) or (config.get("credsStore") if not entry.get("auth") else None)
                if helper and (found := _ask_helper(str(helper), name)) is not None:
                    return found
        except (OSError, ValueError, RuntimeError, AttributeError, TypeError):
            continue
    return None


def _ask_helper(helper: str, name: str) -> tuple[str, str] | None:
    """Ask the program that keeps Docker's passwords, as Docker does."""
    if not re.fullmatch(r"[\w.-]+", helper):
        return None
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=name, capture_output=True, text=True, timeout=_HELPER_S, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
        return str(found["Username"]), str(found["Secret"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
        return None
