"""S3, Google Cloud Storage and Azure Blob Storage, by the library obstore.

Credentials are found by the clouds' own means: variables, files, and the identity of the machine or the pod.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from inferpool.errors import StoreError, StoreUnreachable
from inferpool.repository.stores.reference import StoreReference, is_archive
from inferpool.repository.stores.store import Chunk, CredentialsRefused, RemoteFile, StoreChanged
from inferpool.system.install_hints import install_command

_PIECE_BYTES: Final = 2**20
_RETRIES: Final = 3
_RETRY_S: Final = 20
_REQUEST_S: Final = 120
_CONNECT_S: Final = 10
_PROFILE: Final = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
}
_REFUSED: Final = re.compile(r"40[13] (Unauthorized|Forbidden)")
_CAUSE: Final = re.compile(
    r"Connection refused|Connection reset|dns error|timed out|certificate[^\"\n]{0,80}"
    r"|status code[^\"\n<]{0,20}|HTTP status [^\"(\n]{0,40}|Missing [\w ]{1,30}|not specified [\w ]{0,30}",
    re.IGNORECASE,
)


class ObjectStore:
    """The objects below a prefix, or one object."""

    def __init__(self, reference: StoreReference, suffixes: tuple[str, ...]) -> None:
        """`suffixes` are those of model files."""
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import AzureStore, GCSStore, S3Store
        except ImportError as error:
            raise StoreError(f"{reference} needs the package obstore: {install_command('stores')}") from error
        self._obstore = obstore
        self._errors = exceptions
        self._reference = reference
        self._suffixes = suffixes
        makers: dict[str, Callable[..., Any]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
        configs = {"s3": s3_config, "gs": gs_config, "az": az_config}
        config = configs[reference.scheme](os.environ)
        plain = any(config.get(name, "").startswith("http://") for name in ("endpoint", "base_url"))
        try:
            self._store = makers[reference.scheme](
                reference.host,
                config=config,
                client_options={
                    "timeout": timedelta(seconds=_REQUEST_S),
                    "connect_timeout": timedelta(seconds=_CONNECT_S),
                    **({"allow_http": True} if plain else {}),
                },
                retry_config={
                    "max_retries": _RETRIES,
                    "retry_timeout": timedelta(seconds=_RETRY_S),
                },
            )
        except Exception as error:  # noqa: BLE001 - the texts may have secrets
            raise self._translated(error) from None

    def list_files(self) -> list[RemoteFile]:
        """All objects below the prefix; the object itself if the reference names one."""
        prefix = self._reference.path
        try:
            if prefix.endswith(self._suffixes) or is_archive(prefix):
                found = [self._obstore.head(self._store, prefix)]
                return [self._file(meta, prefix.rpartition("/")[2]) for meta in found]
            pieces = self._obstore.list(self._store, prefix or None, chunk_size=1000)
            start = len(prefix) + 1 if prefix else 0
            # Some programs mark a folder by an empty object.
            return [
                self._file(meta, meta["path"][start:])
                for piece in pieces
                for meta in piece
                if meta["path"] != prefix and not meta["path"].endswith("/")
            ]
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - the texts may have secrets
            raise self._translated(error) from None

    def _file(self, meta: Any, path: str) -> RemoteFile:
        stamp = " ".join(str(part) for part in (meta.get("e_tag"), meta.get("version")) if part)
        return RemoteFile(
            path=path,
            size=int(meta["size"]),
            stamp=stamp,
            is_archive=is_archive(path) and "/" not in path and is_archive(self._reference.path),
            address=f"{meta['path']}\n{meta.get('e_tag') or ''}",
            resumable=bool(meta.get("e_tag")),
        )

    def read(self, file: RemoteFile, start: int, end: int | None) -> Iterator[Chunk]:
        """The bytes of an object from `start` to before `end`."""
        path, _, tag = file.address.partition("\n")
        options: dict[str, Any] = {"range": (start, file.size if end is None else end)}
        if tag:
            options["if_match"] = tag
        try:
            result = self._obstore.get(self._store, path, options=options)
            for piece in result.stream(min_chunk_size=_PIECE_BYTES):
                yield memoryview(piece)
        except Exception as error:  # noqa: BLE001 - the texts may have secrets
            raise self._translated(error) from None

    def close(self) -> None:
        """Do nothing: the connections end with the process."""

    def _translated(self, error: Exception) -> StoreError:
        """An error of the library without what could be a secret: addresses are signed, and answers long."""
        errors, shown = self._errors, self._reference
        if isinstance(error, errors.NotFoundError | FileNotFoundError):
            return StoreError(f"{shown} is not there")
        if isinstance(error, errors.PreconditionError):
            return StoreChanged(f"{shown} has changed while it was read")
        text = str(error)
        found = re.search(r"<Code>(\w+)</Code>", text)
        code = f" ({found[1]})" if found is not None else ""
        if "169.254.169.254" in text or "metadata.google" in text:
            # The last resort is the identity of the machine.
            reason = "no credentials are found: set the cloud's variables, or give the machine a role"
            return CredentialsRefused(f"{shown}: {reason}")
        if isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError) or _REFUSED.search(
            text
        ):
            return CredentialsRefused(
                f"{shown} refuses{code}: the credentials are missing, or allow too little"
            )
        if "Account must be specified" in text:
            return StoreError(f"{shown}: AZURE_STORAGE_ACCOUNT_NAME must name the account")
        if "Invalid Access Key" in text:
            return CredentialsRefused(
                f"{shown}: the account's key is malformed: set AZURE_STORAGE_ACCOUNT_KEY to the text in"
                " Base64 that Azure shows"
            )
        if found is not None and found[1] in ("NoSuchBucket", "NoSuchKey", "ContainerNotFound"):
            return StoreError(f"{shown} is not there{code}")
        if isinstance(error, errors.GenericError | errors.BaseError | OSError):
            return StoreUnreachable(f"{shown} does not answer{code}: {_cause(text)}")
        return StoreError(f"{shown}: {type(error).__name__}{code}")


def _cause(text: str) -> str:
    """The innermost reason of an error of the library, without addresses."""
    found = _CAUSE.search(text)
    if found is not None:
        return found[0].strip()
    return "the request has failed"


def s3_config(environ: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """What obstore does not find by itself: the endpoint's other names, and the profiles of ~/.aws."""
    config: dict[str, str] = {}
    endpoint = (
        environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or environ.get("AWS_ENDPOINT")
    )
    if endpoint:
        config["endpoint"] = endpoint
    by_role = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
               "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE")  # fmt: skip
    if not any(environ.get(name) for name in by_role):
        config |= _profile(environ)
    if environ.get("AWS_REGION"):
        config["region"] = environ["AWS_REGION"]
    return config


def gs_config(environ: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The emulator that the variable of Google's own libraries names, if there is one; it takes no keys."""
    emulator = environ.get("STORAGE_EMULATOR_HOST", "")
    if not emulator:
        return {}
    address = emulator if "://" in emulator else f"http://{emulator}"
    return {"base_url": address, "skip_signature": "true"}


def az_config(environ: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The server that the variables of obstore name, if there is one: obstore refuses its plain HTTP."""
    endpoint = environ.get("AZURE_STORAGE_ENDPOINT") or environ.get("AZURE_ENDPOINT")
    return {"endpoint": endpoint} if endpoint else {}


def _profile(environ: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The keys of the profile AWS_PROFILE in the files of the AWS command line."""
    name = environ.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(environ.get(variable) or usual).expanduser(), encoding="utf-8")
            table = dict(parser[section]) if section in parser else {}
        except (OSError, RuntimeError, UnicodeDecodeError, configparser.Error):
            continue
        found |= {ours: table[theirs] for theirs, ours in _PROFILE.items() if table.get(theirs)}
    return found
