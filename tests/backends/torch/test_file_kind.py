"""Files that may be loaded: their kind, whether they are trusted, whether PyTorch is there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from inferpool.backends.base import LoadOptions
from inferpool.backends.registry import describe_backends, find_backend
from inferpool.backends.torch.backend import PyTorchBackend
from inferpool.errors import LoadError
from inferpool.repository.config import ModelConfig
from inferpool.repository.load.load_files import open_files
from inferpool.settings import Settings
from torch import nn

from tests.backends.torch.networks import quiet, save_exported, save_scripted


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_an_untrusted_file_is_refused_before_its_code_runs(
    tmp_path: Path,
) -> None:
    sign = tmp_path / "it ran"
    file = tmp_path / "1" / "model.pt2"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/models/model.json", "{}")
        archive.writestr("model/data/sample_inputs/model.pt", pickle.dumps(Evil(sign)))
        archive.writestr("model/constants.pkl", pickle.dumps(Evil(sign)))
    with pytest.raises(LoadError) as caught:
        PyTorchBackend().load(file, LoadOptions())
    assert f'sha256 = ["{digest(file)}"]' in caught.value.detail
    assert "--trust" in caught.value.detail
    assert not sign.exists()


def test_a_listed_digest_trusts_that_file_only(tmp_path: Path) -> None:
    """What is trusted is a copy of the file: one that was exchanged meanwhile is not loaded."""
    model = tmp_path / "m"
    (model / "1").mkdir(parents=True)
    file = save_exported(model / "1" / "model.pt2", nn.Linear(3, 2), torch.rand(2, 3))
    config = ModelConfig(sha256=(digest(file),))
    files = open_files(file, model, config, PyTorchBackend(), Settings())
    save_exported(file, nn.Linear(4, 2), torch.rand(2, 4))
    with quiet():
        model_of_copy = PyTorchBackend().load(files.file, LoadOptions(trusted=files.trusted))
    assert model_of_copy.signature.inputs[0].shape == (-1, 3)
    files.close()
    files = open_files(file, model, config, PyTorchBackend(), Settings())
    listed = LoadOptions(trusted=files.trusted, sha256=frozenset(config.sha256 or ()))
    with pytest.raises(LoadError, match=r"the digests in model\.toml belong to other files"):
        PyTorchBackend().load(files.file, listed)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a complete file"),
        (b"PK\x03\x04 cut off", "is not a complete file"),
        (pickle.dumps({"weight": 1}), "is not a complete file"),
        (None, "holds weights without a model"),
        (
            {"something/else.txt": b""},
            "is not a TorchScript file, an exported program or an AOTInductor package",
        ),
        ({"m/models/model.json": b"{"}, "cannot load model.pt"),
        ({"m/constants.pkl": b"", "m/code/x.py": b""}, "cannot load model.pt"),
        ({"m/data/aotinductor/model/x.txt": b""}, "has 0 compiled libraries"),
        ({"m/data/aotinductor/a/x": b"", "m/data/aotinductor/b/x": b""}, 'none is called "model"'),
    ],
)
def test_an_unservable_file_is_a_load_error_of_one_line(
    tmp_path: Path, content: bytes | dict[str, bytes] | None, reason: str
) -> None:
    file = tmp_path / "model.pt"
    if content is None:
        torch.save(nn.Linear(2, 2).state_dict(), file)
    elif isinstance(content, dict):
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        file.write_bytes(content)
    with pytest.raises(LoadError, match=reason) as caught:
        PyTorchBackend().load(file, LoadOptions(trusted=True))
    assert "\n" not in caught.value.detail
    assert str(tmp_path) not in caught.value.detail


@pytest.mark.parametrize("name", ["model.pt", "model.pt2"])
def test_the_content_decides_the_kind_of_a_file(tmp_path: Path, name: str) -> None:
    file = save_exported(tmp_path / "program.pt2", nn.Linear(3, 2), torch.rand(2, 3)).rename(tmp_path / name)
    assert PyTorchBackend().load(file, LoadOptions(trusted=True)).form == "exported program"
    script = save_scripted(tmp_path / "script.pt", nn.Linear(3, 2)).rename(file)
    samples = ([[1.0, 2, 3]],)
    with quiet():
        assert "TorchScript" in PyTorchBackend().load(script, LoadOptions(trusted=True, samples=samples)).form


def test_the_version_of_pytorch_is_read_without_an_import() -> None:
    assert find_backend("torch").describe() == f"torch {importlib.metadata.version('torch')}"
    assert describe_backends()["torch"].startswith("torch ")


def test_without_pytorch_a_model_fails_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("inferpool.backends.torch.backend.version", version)
    assert describe_backends()["torch"] == "not installed"
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    with pytest.raises(LoadError, match=r"pip install 'inferpool\[torch\]'"):
        PyTorchBackend().load(file, LoadOptions())
