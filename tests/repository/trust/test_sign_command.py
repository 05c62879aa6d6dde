"""`inferpool sign` and `inferpool verify`: what they write, what they find, and what they say."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from inferpool.cli import main

from tests.onnx_models import write_shift
from tests.repository.trust.signers import Certificate, KeyPair

Run: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str]:
        status = main([*map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("keys")
    root = Certificate(folder, "root")
    middle = Certificate(folder, "middle", root)
    return {
        "ours": KeyPair(folder, "ours"), "theirs": KeyPair(folder, "theirs"), "root": root, "middle": middle,
        "leaf": Certificate(folder, "leaf", middle, ca=False), "other": Certificate(folder, "other"),
        "direct": Certificate(folder, "direct", root, ca=False), "text": folder / "root.txt",
    }  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with two versions, of which every kind of file is read."""
    folder = write_shift(tmp_path / "repository", "m", 1, 1.0).parent
    write_shift(tmp_path / "repository", "m", 2, 2.0)
    (folder / "model.toml").write_text("[labels]\n")
    (folder / "labels.txt").write_text("a\nb\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "one.json").write_text("{}")
    (folder / "1" / "data").mkdir()
    (folder / "1" / "data" / "weights").write_bytes(b"1234")
    (folder / "README.md").write_text("no load reads this")
    (folder / "1" / ".hidden").write_text("nor this")
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_manifest_lists_what_a_load_reads(model: Path, run: Run) -> None:
    assert run("sign", model / "1") == (0, "m/1: manifest.sha256 lists 5 files\n")
    listed = [line.split("  ")[1] for line in (model / "1" / "manifest.sha256").read_text().splitlines()]
    assert listed == ["../labels.txt", "../model.toml", "../samples/one.json", "data/weights", "model.onnx"]
    assert run("verify", model / "1") == (0, "m/1: 5 files are as they were signed\n")
    assert not (model / "2" / "manifest.sha256").exists()
    status, said = run("verify", model)
    assert status == 1
    assert "m/2: the version is not signed" in said


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not installed")
def test_sha256sum_checks_a_manifest(model: Path, run: Run) -> None:
    run("sign", model)
    check = ["sha256sum", "--check", "--strict", "--quiet", "manifest.sha256"]
    assert subprocess.run(check, cwd=model / "1", check=False).returncode == 0


@pytest.mark.parametrize("name", ["model.onnx", "data/weights", "../labels.txt"])
def test_a_changed_file_is_named(model: Path, run: Run, name: str) -> None:
    run("sign", model)
    flip(model / "1" / name)
    status, said = run("verify", model / "1")
    assert (status, said.startswith(f"m/1: {name} has changed since the version was signed")) == (1, True)


def test_other_settings_are_a_changed_file(model: Path, run: Run) -> None:
    run("sign", model)
    (model / "model.toml").write_text("[labels]\ntop_k = 1\n")
    status, said = run("verify", model)
    assert status == 1
    assert [line.split(" has changed")[0] for line in said.splitlines()] == [
        "m/1: ../model.toml",
        "m/2: ../model.toml",
    ]


@pytest.mark.parametrize("name", ["data/weights", "../labels.txt"])
def test_a_missing_file_is_named(model: Path, run: Run, name: str) -> None:
    run("sign", model)
    (model / "1" / name).unlink()
    assert run("verify", model / "1") == (1, f"m/1: {name} is missing; it was signed with the version\n")


@pytest.mark.parametrize("name", ["extra.bin", "data/extra", "../samples/two.json"])
def test_a_file_that_was_added_is_named(model: Path, run: Run, name: str) -> None:
    run("sign", model / "1")
    (model / "1" / name).write_text("x")
    assert run("verify", model / "1") == (
        1,
        f"m/1: {name} was not signed with the version: remove it, or sign the version again\n",
    )
    run("sign", model / "1")
    assert run("verify", model / "1")[0] == 0


def test_a_signature_holds_for_its_key_and_its_files(model: Path, run: Run, keys: dict[str, Any]) -> None:
    ours, theirs = keys["ours"], keys["theirs"]
    status, said = run("sign", model, "--private-key", ours.private)
    assert (status, said.splitlines()[0]) == (
        0,
        "m/1: manifest.sha256 lists 5 files, and model.sig is their signature",
    )
    assert run("verify", model, "--require-signatures", ours.public)[0] == 0
    both = ("--require-signatures", theirs.public, "--require-signatures", ours.public)
    assert run("verify", model, *both)[0] == 0
    status, said = run("verify", model / "1", "--require-signatures", theirs.public)
    assert status == 1
    assert said.startswith("m/1: model.sig is no valid signature by theirs.pub: Key mismatch")
    flip(model / "1" / "model.onnx")
    status, said = run("verify", model, "--require-signatures", ours.public)
    assert status == 1
    assert "m/1: model.onnx has changed since the version was signed" in said
    assert "m/2: 4 files are as they were signed" in said


def test_an_attacker_who_writes_a_new_manifest_needs_the_key(
    model: Path, run: Run, keys: dict[str, Any]
) -> None:
    ours = keys["ours"]
    required = ("--require-signatures", ours.public)
    run("sign", model, "--private-key", ours.private)
    kept = (model / "1" / "model.sig").read_bytes()
    (model / "labels.txt").write_text("b\na\n")
    status, said = run("sign", model / "1")
    assert (status, said) == (
        0,
        "m/1: manifest.sha256 lists 5 files; model.sig, which was of other files, is removed\n",
    )
    assert "has no model.sig" in run("verify", model / "1", *required)[1]
    (model / "1" / "model.sig").write_bytes(kept)
    assert "m/1: manifest.sha256 has changed" in run("verify", model / "1", *required)[1]
    (model / "1" / "manifest.sha256").unlink()
    assert "m/1: manifest.sha256 is missing" in run("verify", model / "1", *required)[1]
    (model / "1" / "model.sig").write_text("{}")
    assert "m/1: model.sig is no valid signature" in run("verify", model / "1", *required)[1]
    run("sign", model, "--private-key", keys["theirs"].private)
    assert run("verify", model / "1", *required)[0] == 1


def test_a_signature_of_model_signing_covers_a_version_without_files_beside_it(
    tmp_path: Path, run: Run, keys: dict[str, Any]
) -> None:
    """Whoever publishes models may use OpenSSF's own command."""
    from model_signing import signing

    version = write_shift(tmp_path, "m", 1, 1.0)
    signer = signing.Config().use_elliptic_key_signer(private_key=keys["ours"].private)
    signer.sign(version, version / "model.sig")
    required = ("--require-signatures", keys["ours"].public)
    assert run("verify", tmp_path, *required) == (0, "m/1: 1 files are as they were signed\n")
    (version.parent / "model.toml").write_text("[batching]\nenabled = false\n")
    assert "m/1: ../model.toml was not signed" in run("verify", tmp_path, *required)[1]


def test_a_certificate_is_taken_by_its_authority(model: Path, run: Run, keys: dict[str, Any]) -> None:
    leaf, middle, root = keys["leaf"], keys["middle"], keys["root"]
    chain = ("--certificate", leaf.file, "--certificate-chain", middle.file)
    assert run("sign", model, "--private-key", leaf.private, *chain)[0] == 0
    assert run("verify", model, "--require-signatures", root.file)[0] == 0
    for wrong in (keys["other"].file, keys["ours"].public):
        status, said = run("verify", model / "1", "--require-signatures", wrong)
        assert status == 1
        assert f"m/1: model.sig is no valid signature by {wrong.name}: " in said
    status, said = run("sign", model, "--private-key", keys["ours"].private, *chain)
    assert status == 1
    assert "does not match" in said


def test_a_certificate_of_the_authority_itself_needs_no_chain(
    model: Path, run: Run, keys: dict[str, Any]
) -> None:
    direct = keys["direct"]
    signed = run("sign", model, "--private-key", direct.private, "--certificate", direct.file)
    assert signed[0] == 0, signed
    assert run("verify", model, "--require-signatures", keys["root"].file)[0] == 0
    assert run("verify", model, "--require-signatures", keys["middle"].file)[0] == 1


def test_files_that_cannot_be_used_are_named(model: Path, run: Run, keys: dict[str, Any]) -> None:
    keys["text"].write_text("no key")
    status, said = run("verify", model, "--require-signatures", keys["text"])
    assert status == 1
    assert "has neither a public key nor certificates" in said
    status, said = run("verify", model, "--require-signatures", model / "none.pub")
    assert status == 1
    assert "none.pub cannot be read: No such file" in said
    status, said = run("sign", model, "--private-key", keys["ours"].public)
    assert status == 1
    assert said.startswith("m/1: the version cannot be signed: ")
    bare = shutil.copy(model / "1" / "model.onnx", model.parent / "bare.onnx")
    status, said = run("sign", bare)
    assert status == 1
    assert "only the folder of a version can" in said
