"""Writes small pictures in the format of CIFAR-10: the bytes that Python 2 pickled."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER = "cifar-10-batches-py"


class Python2Pickle:
    """Writes pickle protocol 2 like Python 2's cPickle: texts are bytes, and most objects are memoised."""

    def __init__(self) -> None:
        self._puts = 0

    def remembered(self) -> bytes:
        self._puts += 1
        return b"q%c" % self._puts if self._puts < 256 else b"r" + self._puts.to_bytes(4, "little")

    def text(self, value: str) -> bytes:
        return b"U%c%s" % (len(value), value.encode()) + self.remembered()

    def number(self, value: int) -> bytes:
        if value < 256:
            return b"K%c" % value
        return b"M" + value.to_bytes(2, "little")

    def array(self, values: np.ndarray) -> bytes:
        raw = values.tobytes()
        return b"".join(
            (
                b"cnumpy.core.multiarray\n_reconstruct\n", self.remembered(),
                b"cnumpy\nndarray\n", self.remembered(),
                b"K\x00\x85U\x01b\x87R", self.remembered(),
                b"(K\x01", *map(self.number, values.shape), b"\x86",
                b"cnumpy\ndtype\n", self.remembered(),
                b"U\x02u1K\x00K\x01\x87R", self.remembered(),
                b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
                b"\x89T", len(raw).to_bytes(4, "little"), raw, b"tb",
            )
        )  # fmt: skip

    def list(self, items: list[int] | list[str]) -> bytes:
        began = b"]" + self.remembered() + b"("
        return began + b"".join(map(self.any, items)) + b"e"

    def any(self, value: object) -> bytes:
        if isinstance(value, int):
            return self.number(value)
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, np.ndarray):
            return self.array(value)
        assert isinstance(value, list)
        return self.list(value)


def pickled(table: dict[str, object]) -> bytes:
    """Return the pickle of a dictionary; each file of the archive is one."""
    writer = Python2Pickle()
    began = b"\x80\x02}" + writer.remembered() + b"("
    return began + b"".join(writer.text(key) + writer.any(value) for key, value in table.items()) + b"u."


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n×3×32×32 bytes) and labels: noise on ten colours, one for each label."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    cube = np.mgrid[40:240:60, 60:220:100, 60:220:100].reshape(3, -1).T
    colours = np.random.default_rng(0).permutation(cube)
    noise = draw.normal(0, 20, (count, 3, 32, 32))
    return (colours[labels][:, :, None, None] + noise).clip(0, 255).astype(np.uint8), labels


def batch(name: str, images: np.ndarray, labels: np.ndarray) -> bytes:
    """Return the file of one batch."""
    return pickled(
        {
            "batch_label": name,
            "labels": labels.tolist(),
            "data": images.reshape(len(images), -1),
            "filenames": [f"{NAMES[label]}_s_{index:06}.png" for index, label in enumerate(labels)],
        }
    )


def meta() -> bytes:
    """Return the file with the names of the labels."""
    return pickled({"num_cases_per_batch": 10000, "label_names": list(NAMES), "num_vis": 3072})


def files(rows: int, seed: int = 0) -> dict[str, bytes]:
    """Return all files of an archive with `rows` pictures in each batch."""
    made = {
        f"data_batch_{number}": batch(f"training batch {number} of 5", *pictures(rows, seed + number))
        for number in range(1, 6)
    }
    made["test_batch"] = batch("testing batch 1 of 1", *pictures(rows, seed))
    return {**made, "batches.meta": meta()}


def write_tar(path: Path, contents: dict[str, bytes]) -> Path:
    """Write an archive like `cifar-10-python.tar.gz`; return its path."""
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo(FOLDER)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in contents.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
