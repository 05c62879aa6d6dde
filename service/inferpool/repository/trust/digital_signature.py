"""Digital signatures of versions in the format of OpenSSF Model Signing, made and checked by its library.

The library is an extra (`inferpool[signatures]`), because it brings a client of Sigstore with it. It is used
with keys and certificates only, which needs no network.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from inferpool.errors import ConfigError, LoadError, Reason, short_reason
from inferpool.repository.trust.manifest import SIGNATURE_FILE, check_name
from inferpool.system.files import printable, read_file
from inferpool.system.install_hints import install_command

_KEY: Final = b"-----BEGIN PUBLIC KEY-----"
_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_MOST_BYTES: Final = 2**20
"""Bytes of a file with a key or certificates."""


def check_signers(files: Sequence[Path]) -> None:
    """Raise ConfigError unless each file has a public key or certificates, to check signatures by."""
    if files:
        _library("verifying")
    for file in files:
        _verifier(file)


def signed_digests(signature: bytes, signers: Sequence[Path], parent: Path) -> dict[str, str]:
    """The SHA-256 digests of the files that a digital signature covers, by their names.

    `signers` are files with a public key, or with certificates of authorities; one of them must have signed.
    The library reads files only, so the signature is written to a private folder in `parent`.
    Raises LoadError if none has, or if the signature covers files in another way, and ConfigError if a file
    of `signers` cannot be used.
    """
    reasons = []
    with tempfile.TemporaryDirectory(prefix="inferpool-", dir=parent) as folder:
        file = Path(folder) / SIGNATURE_FILE
        file.write_bytes(signature)
        for signer in signers:
            found, reason = _manifest(file, _verifier(signer))
            if found is not None:
                return _digests(found)
            reasons.append(f"by {printable(signer.name)}: {reason}")
    raise LoadError(f"{SIGNATURE_FILE} is no valid signature {'; '.join(reasons)}")


def sign_folder(
    folder: Path, private_key: Path, certificate: Path | None, chain: Sequence[Path], ignored: Sequence[str]
) -> None:
    """Write the digital signature of a version's folder, which covers all files in it but the `ignored` ones.

    The key is an EC key in PEM without a password. With a certificate of it, the signature contains the
    certificate and the `chain` of those that lead to an authority. Raises LoadError if they cannot be used.
    """
    config = _library("signing").Config()
    hashing = _library("hashing").Config()
    hashing.set_allow_symlinks(True)
    hashing.set_ignored_paths(paths=[SIGNATURE_FILE, *ignored], ignore_git_paths=False)
    unfinished = folder / f".{SIGNATURE_FILE}.part"
    hashing.add_ignored_paths(model_path=folder, paths=[unfinished.name])
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=private_key)
        else:
            # The library fails without a chain. A certificate that an authority has issued itself needs none,
            # and may be there twice.
            config.use_certificate_signer(
                private_key=private_key,
                signing_certificate=certificate,
                certificate_chain=chain or [certificate],
            )
        config.set_hashing_config(hashing).sign(folder, unfinished)
        unfinished.replace(folder / SIGNATURE_FILE)
    except (OSError, ValueError, TypeError) as error:
        raise LoadError(f"the version cannot be signed: {short_reason(error)}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _verifier(file: Path) -> Any:
    """A configuration of the library that checks signatures by the key or the certificates in `file`."""
    try:
        content = read_file(file, _MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"--require-signatures: {file} cannot be read: {error.strerror}") from error
    config = _library("verifying").Config()
    try:
        if _KEY in content:
            return config.use_elliptic_key_verifier(public_key=file)
        if _CERTIFICATE in content:
            return config.use_certificate_verifier(certificate_chain=[file])
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--require-signatures: {file} cannot be used: {short_reason(error)}") from error
    raise ConfigError(
        f"--require-signatures: {file} has neither a public key nor certificates; expected a PEM file that"
        f" begins with {_KEY.decode()} or {_CERTIFICATE.decode()}"
    )


def _manifest(file: Path, verifier: Any) -> tuple[Any, Reason]:
    """What the signature in `file` says of the folder that was signed; None, and why, if it is not valid.

    The library would read and hash the folder by itself. Here the bytes that are loaded are hashed once, so
    the library is handed a folder that is equal to whatever was signed, and gives away what that is.
    """
    seen: list[Any] = []

    class AnyFolder:
        def __eq__(self, signed: object) -> bool:
            seen.append(signed)
            return True

        __hash__ = None  # type: ignore[assignment]

    class NoHashing(_library("hashing").Config):  # type: ignore[misc]
        def hash(self, *folders: object, **options: object) -> AnyFolder:
            return AnyFolder()

    verifier.set_hashing_config(NoHashing())
    try:
        verifier.verify(file.parent, file)
    except Exception as error:  # noqa: BLE001 - it raises whatever its parsers and its libraries raise
        return None, short_reason(error)
    return (seen[0], "") if seen else (None, "the library has not said what was signed")


def _digests(signed: Any) -> dict[str, str]:
    """The digests of what was signed; raises LoadError if they are not those of whole files by SHA-256."""
    how: Mapping[str, Any] = signed.serialization_type
    if how.get("method") != "files" or how.get("hash_type") != "sha256":
        raise LoadError(
            f"{SIGNATURE_FILE} covers {how.get('method')} by {how.get('hash_type')}; expected files by"
            " sha256: sign the version again without options for hashing"
        )
    digests = {item.identifier: item.digest.digest_hex for item in signed.resource_descriptors()}
    for name in digests:
        check_name(name)
    return digests


def _library(part: str) -> Any:
    """A module of the library; raises ConfigError, which says how to install it, if it is missing."""
    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        raise ConfigError(
            f"signatures need the package model-signing: {install_command('signatures')}"
        ) from error
