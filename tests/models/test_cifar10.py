"""CIFAR-10: the script reads its archive without executing it, and builds a model that is served."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib.util
import io
import lzma
import os
import pickle
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import ROOT, Serve
from tests.models import cifar_archive as made
from tests.models.built import assert_batched, build, documented_request
from tests.models.record import needs_to_run

MODEL = ROOT / "models/cifar10"
ROWS = 40


def load_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10_archive", MODEL / "archive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


archive = load_module()
TINY = made.batch("testing batch 1 of 1", *made.pictures(3, 0))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the folder cifar10 alone, as it is committed."""
    target = tmp_path / "models" / "cifar10"
    target.mkdir(parents=True)
    for file in MODEL.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target.parent


def test_a_model_built_from_the_archive_classifies_pictures(
    repository: Path, tmp_path: Path, serve: Serve
) -> None:
    needs_to_run("cifar10")
    data = made.write_tar(tmp_path / "cifar-10-python.tar.gz", made.files(ROWS))
    run = build(repository, "cifar10", "--data", data, "--epochs", 8, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    assert "held-out accuracy" in run.stdout
    server = serve(repository)
    assert_batched(server, "cifar10")
    images, labels = made.pictures(ROWS, 0)
    session = onnxruntime.InferenceSession(repository / "cifar10/1/model.onnx")
    right = 0
    for image, label in zip(images, labels, strict=True):
        png = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(png, "png")
        answer = server.post(
            "/predict/cifar10", content=png.getvalue(), headers={"content-type": "image/png"}
        ).json()
        (alone,) = session.run(["logits"], {"image": (image[None] / 255).astype(np.float32)})
        np.testing.assert_allclose(answer["outputs"]["logits"], alone, atol=1e-3)
        assert len(answer["predictions"][0]) == 3
        right += answer["predictions"][0][0]["label"] == made.NAMES[label]
    assert right / len(images) >= 0.6
    answer = documented_request("cifar10", server, repository.parent)
    assert answer["predictions"][0][0]["label"] in made.NAMES


def test_a_model_that_learned_nothing_is_not_written(repository: Path, tmp_path: Path) -> None:
    """A model cannot learn labels that do not depend on the pictures."""
    needs_to_run("cifar10")
    draw = np.random.default_rng(0)
    files = {
        name: made.batch(name, made.pictures(ROWS, seed)[0], draw.integers(0, 10, ROWS))
        for seed, name in enumerate(name for name in archive.NAMES if name != archive.META)
    }
    data = made.write_tar(tmp_path / "a.tar.gz", {**files, "batches.meta": made.meta()})
    run = build(repository, "cifar10", "--data", data, "--epochs", 1, OMP_NUM_THREADS="1")
    assert run.returncode == 1
    assert "not written: the card states at least 60%" in run.stderr
    assert not (repository / "cifar10/1").exists()


def test_the_archive_of_the_tests_has_the_format_of_python_2() -> None:
    """The real `batches.meta` has 158 bytes; Python's pickle reads the other files."""
    assert len(made.meta()) == 158
    images, labels = made.pictures(3, 0)
    table = pickle.loads(TINY, encoding="bytes")
    np.testing.assert_array_equal(table[b"data"], images.reshape(3, -1))
    assert table[b"labels"] == labels.tolist()


def test_the_archive_and_its_folder_give_the_same_pictures(tmp_path: Path) -> None:
    files = made.files(ROWS)
    data = made.write_tar(tmp_path / "a.tar.gz", files)
    folder = tmp_path / made.FOLDER
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    training = [made.pictures(ROWS, seed) for seed in range(1, 6)]
    held_out = made.pictures(ROWS, 0)
    for path in (data, folder, tmp_path):
        images, test_images, labels, test_labels = archive.read_archive(path, made.NAMES)
        np.testing.assert_array_equal(images, np.concatenate([part[0] for part in training]))
        np.testing.assert_array_equal(labels, np.concatenate([part[1] for part in training]))
        np.testing.assert_array_equal(test_images, held_out[0])
        np.testing.assert_array_equal(test_labels, held_out[1])


class Evil:
    """An object whose unpickling creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.witness}'",)


def evil_by_name(module: str, name: str) -> bytes:
    """Return a pickle that calls `module.name("touch …")`, by instructions that CIFAR-10's own files have."""
    return b"\x80\x02}U\x04dataq\x01c" + f"{module}\n{name}\n".encode() + b"U\x05touch\x85Rs."


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    evil = pickle.dumps({b"data": Evil(witness)}, protocol)
    with pytest.raises(archive.ArchiveError):
        archive.unpickle(evil)
    assert not witness.exists()
    pickle.loads(evil)
    assert witness.exists()  # what was refused would have run


@pytest.mark.parametrize(
    ("module", "name"),
    [("posix", "system"), ("builtins", "eval"), ("numpy", "load"), ("numpy", "dtype.type"), ("numpy", "x")],
)
def test_a_name_that_is_not_needed_is_refused(module: str, name: str) -> None:
    with pytest.raises(archive.ArchiveError, match=f"asks for '{module}.{name}'"):
        archive.unpickle(evil_by_name(module, name))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TINY.replace(b"U\x02u1", b"U\x02O8"), "where pixels are bytes"),
        (TINY.replace(b"K\x03M\x00\x0c", b"K\x04M\x00\x0c"), "array of 4×3072 bytes that has 9216"),
        (TINY[:-20], "no pickle"),
        (b"", "no pickle"),
        (b"\x80\x02]q\x01.", "no dictionary"),
        (b"\x80\x02}K\x01K\x01s.", "no dictionary"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "index 4294967295"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.", "BYTEARRAY8|no pickle"),
        (b"\x80\x02\x82\x01.", "EXT1"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(archive.ArchiveError, match=words):
        archive.unpickle(data)


@contextlib.contextmanager
def memory_below(most_bytes: int) -> Iterator[None]:
    """Fail if Python allocates more than this at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("instruction", [b"]", b"}", b"(", b"K\x00\x85", b"U\x01a"])
def test_a_pickle_with_too_many_objects_is_refused(instruction: bytes) -> None:
    data = b"\x80\x02" + instruction * 1_000_000 + b"."
    with memory_below(8 << 20), pytest.raises(archive.ArchiveError, match="more than 100000 instructions"):
        archive.unpickle(data)


def test_a_batch_of_the_real_size_is_read() -> None:
    """Each file of the real archive has 10,000 pictures."""
    images, labels = np.zeros((10_000, 3, 32, 32), np.uint8), np.arange(10_000) % 10
    table = archive.unpickle(made.batch("training batch 1 of 5", images, labels))
    assert table["labels"] == labels.tolist()
    assert table["data"].array.shape == (10_000, 3072)


@given(st.data())
def test_a_pickle_with_changed_bytes_is_read_or_refused(data: st.DataObject) -> None:
    changed = bytearray(TINY)
    head, tail = TINY.index(b"T\x00\x24") + 5, TINY.rindex(b"tb") - 2
    indices = st.one_of(st.integers(0, head), st.integers(tail, len(TINY) - 1))
    for index in data.draw(st.lists(indices, min_size=1, max_size=4)):
        changed[index] = data.draw(st.integers(0, 255))
    with contextlib.suppress(archive.ArchiveError):
        assert isinstance(archive.unpickle(bytes(changed)), dict)


def damaged(name: str, data: bytes) -> dict[str, bytes]:
    return {**made.files(2), name: data}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no data_batch_1"),
        ({key: made.files(2)[key] for key in archive.NAMES if key != "data_batch_3"}, "has no data_batch_3"),
        (damaged("batches.meta", made.pickled({"label_names": ["cat"]})), "label_names are not"),
        (damaged("test_batch", made.pickled({"labels": [0]})), "test_batch: data is no table"),
        (damaged("test_batch", made.batch("b", *made.pictures(2, 0)).replace(b"K\x00K\x01e", b"K\x00K\x0ae")),
         "labels are not all from 0 to 9"),
        (damaged("test_batch", made.batch("b", made.pictures(2, 0)[0], np.arange(3))), "3 labels for 2"),
        (damaged("data_batch_2", evil_by_name("posix", "system")), "data_batch_2: it asks for 'posix"),
    ],
)  # fmt: skip
def test_the_message_names_the_fault_of_an_archive(
    tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    data = made.write_tar(tmp_path / "a.tar.gz", files)
    with pytest.raises(archive.ArchiveError, match=words):
        archive.read_archive(data, made.NAMES)


def test_an_archive_unpacks_nothing(tmp_path: Path) -> None:
    """Nothing is written, whether the archive has links, paths out of its folder or large files."""
    secret = tmp_path / "secret"
    secret.write_bytes(made.meta())
    data = tmp_path / "a.tar.gz"
    with tarfile.open(data, "w:gz") as target:
        link = tarfile.TarInfo(f"{made.FOLDER}/batches.meta")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        target.addfile(link)
        outside = tarfile.TarInfo("../../outside")
        outside.size = 3
        target.addfile(outside, io.BytesIO(b"abc"))
    with pytest.raises(archive.ArchiveError, match=r"has no .*batches\.meta"):
        archive.read_archive(data, made.NAMES)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.tar.gz", "secret"]
    large = tarfile.TarInfo("zeros")
    large.size = archive.MOST_BYTES + 1
    with tarfile.open(data, "w:gz", compresslevel=1) as target:
        target.addfile(large, io.BytesIO(bytes(large.size)))
    with pytest.raises(archive.ArchiveError, match="'zeros' has more than"):
        archive.read_archive(data, made.NAMES)
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(archive.ArchiveError):
        archive.read_archive(data, made.NAMES)


def header(kind: bytes, size: int, name: str = "name") -> bytes:
    """Return a header of a tar archive that announces `size` bytes."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_announces_too_much_is_refused_unread(tmp_path: Path, kind: bytes) -> None:
    data = tmp_path / "a.tar.gz"
    size = 64 << 20
    data.write_bytes(gzip.compress(header(kind, size) + bytes(size), 1))
    with memory_below(8 << 20), pytest.raises(archive.ArchiveError, match="headers have more than 65536"):
        archive.read_archive(data, made.NAMES)


def test_too_many_headers_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "a.tar"
    data.write_bytes(b"".join(header(tarfile.REGTYPE, 0, f"file{number}") for number in range(20_000)))
    with memory_below(8 << 20), pytest.raises(archive.ArchiveError, match="headers have more than 65536"):
        archive.read_archive(data, made.NAMES)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "a.tar.gz"
    part = gzip.compress(header(tarfile.REGTYPE, archive.MOST_BYTES) + bytes(archive.MOST_BYTES), 1)
    data.write_bytes(part * 5)
    with memory_below(8 << 20), pytest.raises(archive.ArchiveError, match="unpacks to more than 268435456"):
        archive.read_archive(data, made.NAMES)


def damaged_archives() -> dict[str, bytes]:
    """Return files that are no archives, each for another reason."""
    archive_bytes = header(tarfile.REGTYPE, 1024, f"{made.FOLDER}/test_batch")
    packed = bytearray(gzip.compress(np.random.default_rng(0).bytes(4096)))
    packed[10] = 0xFF
    records = b"23 GNU.sparse.map=a,b\n\n"
    sparse = header(tarfile.XHDTYPE, len(records)) + records.ljust(512, b"\0") + archive_bytes
    return {
        "empty": b"",
        "text": b"no archive" * 100,
        "damaged deflate": bytes(packed),
        "xz": lzma.compress(archive_bytes),
        "damaged xz": lzma.compress(archive_bytes)[:20],
        "bzip2": bz2.compress(archive_bytes),
        "sparse map": sparse,
        "negative size": archive_bytes[:124] + b"\xff" * 12 + archive_bytes[136:],
        "short": archive_bytes + b"abc",
        "control characters": header(tarfile.REGTYPE, archive.MOST_BYTES + 1, "\x1b[2J\n"),
    }


@pytest.mark.parametrize("way", damaged_archives())
def test_a_damaged_archive_is_refused_in_one_sentence(repository: Path, tmp_path: Path, way: str) -> None:
    data = tmp_path / "a.tar.gz"
    data.write_bytes(damaged_archives()[way])
    with pytest.raises(archive.ArchiveError) as refused:
        archive.read_archive(data, made.NAMES)
    assert str(refused.value).startswith(f"{data}: ")
    assert str(refused.value).isprintable()


@given(st.binary(max_size=700), st.integers(0, 1500), st.booleans())
def test_an_archive_of_random_bytes_is_refused(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, index: int, packed: bool
) -> None:
    archive_bytes = bytearray(
        header(tarfile.XHDTYPE, 30) + b"30 mtime=1".ljust(512, b"\0") + header(b"0", 512)
    )
    archive_bytes[index : index + len(noise)] = noise
    data = tmp_path_factory.mktemp("archive") / "a.tar"
    data.write_bytes(gzip.compress(archive_bytes) if packed else archive_bytes)
    with pytest.raises(archive.ArchiveError):
        archive.read_archive(data, made.NAMES)


def test_the_labels_are_those_of_cifar_10() -> None:
    assert tuple((MODEL / "labels.txt").read_text().split()) == made.NAMES


def test_without_data_the_script_asks_for_it(repository: Path) -> None:
    needs_to_run("cifar10")
    run: subprocess.CompletedProcess[str] = build(repository, "cifar10")
    assert run.returncode == 2
    assert "--data" in run.stderr
    run = build(repository, "cifar10", "--data", repository)
    assert run.returncode == 1
    assert "expected cifar-10-batches-py/" in run.stderr
