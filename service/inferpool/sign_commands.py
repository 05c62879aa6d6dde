"""The commands `inferpool sign` and `inferpool verify`."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferpool.errors import InferpoolError, LoadError, Reason
from inferpool.settings_sources import ENV_PREFIX
from inferpool.system.files import printable

SIGN_COMMANDS: Final = ("sign", "verify")
_PATH: Final = "a version's folder, a model's folder, or a folder of models"


class _Version(NamedTuple):
    """A version on disk; `fault` says why it cannot be signed."""

    name: str
    file: Path
    folder: Path | None = None
    fault: Reason | None = None


def add_sign_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser of `inferpool`."""
    sign = commands.add_parser(
        "sign",
        help="write down the digests of a version's files, and sign them",
        description="Write manifest.sha256 into the folder of each version: the digest of every file that"
        " its load reads. With a private key, write model.sig too, a signature in the format of OpenSSF Model"
        " Signing. A server refuses a version whose files have changed since.",
        allow_abbrev=False,
    )
    sign.add_argument("path", type=Path, metavar="PATH", help=_PATH)
    sign.add_argument("--private-key", type=Path, metavar="FILE", help="PEM file with the EC key that signs")
    sign.add_argument("--certificate", type=Path, metavar="FILE", help="PEM file with the key's certificate")
    sign.add_argument(
        "--certificate-chain",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="PEM file with the certificates between that one and its authority",
    )
    verify = commands.add_parser(
        "verify",
        help="check a version's files against what was signed",
        description="Check the files of each version against its manifest.sha256, and with"
        " --require-signatures against its model.sig. Exits with 1 if a file has changed, is missing or was"
        " added, or if a version is not signed.",
        allow_abbrev=False,
    )
    verify.add_argument("path", type=Path, metavar="PATH", help=_PATH)
    verify.add_argument(
        "--require-signatures",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"PEM file with a public key, or with certificates of authorities"
        f" [{ENV_PREFIX}REQUIRE_SIGNATURES]",
    )


def run_sign_command(command: str, flags: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Run a command; the exit status is 0, or 1 if a version cannot be signed or is refused."""
    # Imported late, so that --help and mistakes answer at once.
    from inferpool.repository.trust.digital_signature import check_signers

    try:
        if command == "sign":
            if flags["certificate"] is not None and flags["private_key"] is None:
                raise LoadError("--certificate needs --private-key, the key that signs")
            return _each(flags["path"], lambda version: _sign(version, flags))
        named = environ.get(f"{ENV_PREFIX}REQUIRE_SIGNATURES", "").split(",")
        signers = flags["require_signatures"] or [Path(name.strip()) for name in named if name.strip()]
        check_signers(signers)
        return _each(flags["path"], lambda version: _verify(version, signers))
    except InferpoolError as error:
        print(f"inferpool: {printable(error.detail)}", file=sys.stderr)
        return 1


def _each(path: Path, act: Callable[[_Version], str]) -> int:
    """Do something with each version, and print what it says."""
    status = 0
    for version in _versions(path):
        try:
            if version.fault is not None:
                raise LoadError(version.fault)
            print(f"{version.name}: {act(version)}")
        except InferpoolError as error:
            status = 1
            print(f"{version.name}: {printable(error.detail)}", file=sys.stderr)
    return status


def _versions(path: Path) -> Iterator[_Version]:
    """All versions in a folder of models, in a model's folder, or the one that `path` names."""
    from inferpool.backends.registry import backends_by_suffix
    from inferpool.repository.layout import is_in_version_folder, scan

    only = None
    if is_in_version_folder(path):
        path = path.parent
    if path.is_dir() and path.resolve().name.isdecimal():
        only = int(path.resolve().name)
        path = path.resolve().parent
    for model in scan(path, backends_by_suffix()):
        for number in sorted({*model.files, *model.faults}):
            if only in (None, number):
                name = f"{model.name}/{number}"
                file = model.files.get(number, path)
                yield _Version(name, file, model.folder, model.faults.get(number))


def _sign(version: _Version, flags: Mapping[str, Any]) -> str:
    from inferpool.repository.layout import is_in_version_folder
    from inferpool.repository.trust.digital_signature import sign_folder
    from inferpool.repository.trust.manifest import MANIFEST_FILE, SIGNATURE_FILE, manifest_text

    if not is_in_version_folder(version.file):
        raise LoadError(
            f"{version.file.name} cannot be signed: only the folder of a version can"
            f" (NAME/1/model{version.file.suffix})"
        )
    folder = version.file.parent
    try:
        digests = {}
        for name, path in _found(version).items():
            with path.open("rb") as opened:
                digests[name] = hashlib.file_digest(opened, "sha256").hexdigest()
        text = manifest_text(digests)
        target, signature = folder / MANIFEST_FILE, folder / SIGNATURE_FILE
        same = target.is_file() and target.read_text(encoding="utf-8") == text
        unfinished = target.with_name(f".{MANIFEST_FILE}.part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
        stale = signature.exists() and not same
        if stale:
            signature.unlink()
        hidden = [
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
    except OSError as error:
        raise LoadError(f"the version cannot be signed: {error.filename}: {error.strerror}") from error
    said = f"{MANIFEST_FILE} lists {len(digests)} files"
    if flags["private_key"] is not None:
        sign_folder(folder, flags["private_key"], flags["certificate"], flags["certificate_chain"], hidden)
        return f"{said}, and {SIGNATURE_FILE} is their signature"
    return f"{said}; {SIGNATURE_FILE}, which was of other files, is removed" if stale else said


def _verify(version: _Version, signers: Sequence[Path]) -> str:
    from inferpool.repository.trust.verification import check_in_place, expected_digests

    expected = expected_digests(version.file, signers)
    if expected is None:
        raise LoadError("the version is not signed; inferpool sign does that")
    check_in_place(version.file, _found(version), expected)
    return f"{len(expected)} files are as they were signed"


def _found(version: _Version) -> dict[str, Path]:
    """The files that a load of the version reads."""
    from inferpool.repository.config import ModelConfig, read_config
    from inferpool.repository.layout import CONFIG_FILE
    from inferpool.repository.version_source import load_files

    folder = version.folder
    config = ModelConfig() if folder is None else read_config(folder / CONFIG_FILE)
    return load_files(version.file, folder, config)
