"""Private copies: what is in them, who may open them, and when they go."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from inferpool.errors import LoadError
from inferpool.repository.trust.private_copy import PREFIX, PrivateCopy


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files for this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Path]:
    files = {"model.bin": "m/1/model.bin", "deep/data": "m/1/deep/data", "../labels.txt": "m/labels.txt"}
    for name, path in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(name.encode() * 1000)
    return {name: tmp_path / path for name, path in files.items()}


def test_a_copy_keeps_what_the_files_were(names: dict[str, Path], temporary: Path) -> None:
    copy = PrivateCopy(names["model.bin"], names)
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()}
    assert copy.digests == digests
    for path in names.values():
        path.write_bytes(b"another")
    assert (copy.folder / "labels.txt").read_bytes() == b"../labels.txt" * 1000
    assert copy.file == copy.folder / "1" / "model.bin"
    assert copy.folder.name == "m"
    assert (copy.file.parent / "deep/data").read_bytes() == b"deep/data" * 1000
    [root] = temporary.iterdir()
    assert root.stat().st_mode & 0o077 == 0
    copy.close()
    copy.close()
    assert not list(temporary.iterdir())


def test_a_file_that_is_missing_or_no_file_is_named(names: dict[str, Path], temporary: Path) -> None:
    os.mkfifo(names["model.bin"].parent / "pipe")
    with pytest.raises(LoadError, match=r"^pipe is not a regular file"):
        PrivateCopy(names["model.bin"], {**names, "pipe": names["model.bin"].parent / "pipe"})
    with pytest.raises(LoadError, match=r"^gone is missing"):
        PrivateCopy(names["model.bin"], {**names, "gone": names["model.bin"].parent / "gone"})
    assert not list(temporary.iterdir())


def test_a_link_beside_the_versions_does_not_lead_out_of_the_model(
    names: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("a key")
    names["../labels.txt"].unlink()
    names["../labels.txt"].symlink_to(tmp_path / "secret")
    with pytest.raises(LoadError, match=r"^\.\./labels\.txt leads out"):
        PrivateCopy(names["model.bin"], names)


def test_a_copy_that_a_killed_process_has_left_is_removed(names: dict[str, Path], temporary: Path) -> None:
    used = PrivateCopy(names["model.bin"], names)
    [root] = temporary.iterdir()
    left, new = temporary / f"{PREFIX}left", temporary / f"{PREFIX}new"
    for folder in (left, new):
        folder.mkdir()
    for folder in (left, root):
        os.utime(folder, (0, 0))
    PrivateCopy(names["model.bin"], names).close()
    assert root.exists(), "another load uses it"
    assert new.exists(), "its owner may not have locked it yet"
    assert not left.exists()
    used.close()
