"""A server that takes signed versions only: one that was tampered with fails, and no other does."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.cli import main

from tests.conftest import Serve, in_both_engines
from tests.onnx_models import write_shift
from tests.repository.trust.signers import KeyPair
from tests.server import Server, wait_until

pytestmark = in_both_engines


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose names say what happened to them after they were signed; the key is `ours.pub`."""
    folder = tmp_path_factory.mktemp("signed")
    for name in ("untouched", "flipped", "extra", "theirs", "unsigned"):
        write_shift(folder / "models", name, 1, 1.0)
    ours, theirs = KeyPair(folder, "ours"), KeyPair(folder, "theirs")
    for name, key in (("untouched", ours), ("flipped", ours), ("extra", ours), ("theirs", theirs)):
        assert not main(["sign", str(folder / "models" / name), "--private-key", str(key.private)])
    content = bytearray((folder / "models/flipped/1/model.onnx").read_bytes())
    content[-20] ^= 1
    (folder / "models/flipped/1/model.onnx").write_bytes(content)
    (folder / "models/extra/1/extra.bin").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def server(module_serve: Serve, repository: Path) -> Server:
    return module_serve(
        repository / "models", "--watch", "--require-signatures", str(repository / "ours.pub")
    )


def test_one_flipped_byte_refuses_that_version_and_no_other(server: Server) -> None:
    models = {model["name"]: model["versions"][0] for model in server.get("/models").json()["models"]}
    states = {name: version["state"] for name, version in models.items()}
    assert states.pop("untouched") == "ready"
    assert set(states.values()) == {"failed"}
    reasons = {name: version["reason"] for name, version in models.items()}
    assert reasons["flipped"].startswith("model.onnx has changed since the version was signed")
    assert reasons["extra"].startswith("extra.bin was not signed with the version")
    assert reasons["theirs"].startswith("model.sig is no valid signature by ours.pub: Key mismatch")
    assert reasons["unsigned"].startswith("the version is not signed: it has no model.sig")
    assert server.post("/predict/untouched", json={"inputs": [[1.0, 2.0]]}).status_code == 200


def test_a_version_that_is_signed_again_is_served(server: Server, repository: Path) -> None:
    unsigned = repository / "models" / "unsigned"
    assert not main(["sign", str(unsigned), "--private-key", str(repository / "ours.key")])
    wait_until(
        lambda: server.post("/predict/unsigned", json={"inputs": [[1.0, 2.0]]}).status_code == 200,
        "the version that is signed now answers",
    )
    for name in ("model.sig", "manifest.sha256"):
        (unsigned / "1" / name).unlink()
