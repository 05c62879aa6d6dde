"""Read CIFAR-10 as its authors publish it, and run nothing that is in it.

The archive holds Python 2 pickles. A pickle is a program, so only those are run that are made of the few
instructions of CIFAR-10's own, by an unpickler that knows three names: those with which an array of bytes is
written, and for each of them a stand-in that can only become such an array. Any other file is refused.
"""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

FOLDER: Final = "cifar-10-batches-py"
TRAINING: Final = tuple(f"data_batch_{number}" for number in range(1, 6))
HELD_OUT: Final = "test_batch"
META: Final = "batches.meta"
NAMES: Final = (*TRAINING, HELD_OUT, META)

SIDE: Final = 32
PIXELS: Final = 3 * SIDE * SIDE
MOST_BYTES: Final = 64 * 1024 * 1024
"""A batch of the real archive has 31 MB."""
MOST_UNPACKED: Final = 256 * 1024 * 1024
"""All of the real archive has 186 MB."""
MOST_HEADER_BYTES: Final = 64 * 1024
"""The real archive's nine headers have 512 bytes each; packed anew by another tar they have a few more."""
MOST_INSTRUCTIONS: Final = 100_000
"""A batch of the real archive has 10,000 labels and as many file names: about 30,000."""


OPCODES: Final = frozenset(
    {
        "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
        "SHORT_BINSTRING", "BINSTRING", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM",
        "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "BINGET",
        "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD",
    }
)  # fmt: skip
"""The opcodes that Python 2 writes for numbers, texts, lists, dictionaries and an array."""


class ArchiveError(Exception):
    """The archive is not CIFAR-10's; the text says where and why."""


class _Dtype:
    """Stands in for `numpy.dtype`: bytes, and nothing but bytes."""

    def __init__(self, code: object = None, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise ArchiveError(f"an array of {code!r} where pixels are bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order and fields: bytes have neither."""


class _Array:
    """Stands in for `numpy.ndarray`: holds what the pickle says of it, if that is an array of bytes."""

    def __init__(self, *_: object) -> None:
        self.array: Array | None = None

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), (int(rows), int(columns)), _Dtype(), False | 0, bytes(data)):
                if rows < 0 or columns < 0 or rows * columns != len(data):
                    raise ArchiveError(f"an array of {rows}×{columns} bytes that has {len(data)}")
                self.array = np.frombuffer(data, np.uint8).reshape(rows, columns)
            case _:
                raise ArchiveError("an array that is not a table of bytes")


def _blank(*_: object) -> _Array:
    """Stands in for numpy's `_reconstruct`: an array to which its state is still to come."""
    return _Array()


class _Unpickler(pickle.Unpickler):
    """Numbers, texts, lists, dictionaries and tables of bytes."""

    _KNOWN: Final = {
        ("numpy.core.multiarray", "_reconstruct"): _blank,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in; raises ArchiveError for every other name, and so before anything is run."""
        try:
            return self._KNOWN[module, name]
        except KeyError:
            wanted = ascii(f"{module}.{name}")
            raise ArchiveError(f"it asks for {wanted}, which no batch of CIFAR-10 needs") from None


def check_instructions(data: bytes) -> None:
    """Raise ArchiveError where a pickle has an instruction that no batch has, or would fill the memory.

    The others look up registries, make objects in other ways, or take as much memory as they say. Those that
    a batch has are counted, as one byte can make an object of a hundred.
    """
    puts = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        if count > MOST_INSTRUCTIONS:
            raise ArchiveError(f"it has more than {MOST_INSTRUCTIONS} instructions")
        if opcode.name not in OPCODES:
            raise ArchiveError(f"it has the instruction {opcode.name}, which no batch of CIFAR-10 has")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            puts += 1
            # The unpickler allocates memory for every index up to this one.
            if not isinstance(argument, int) or argument > puts:
                raise ArchiveError(f"it memoises index {argument} before the indices below it")


def unpickle(data: bytes) -> dict[str, Any]:
    """One file of the archive: a dictionary by name; raises ArchiveError for anything else."""
    try:
        check_instructions(data)
        table = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except ArchiveError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        raise ArchiveError(f"it is no pickle of a batch ({type(error).__name__})") from error
    if not isinstance(table, dict) or not all(isinstance(key, bytes) for key in table):
        raise ArchiveError("it is no dictionary")
    return {key.decode("latin-1"): value for key, value in table.items()}


def read_archive(path: Path, labels: tuple[str, ...]) -> tuple[Array, Array, Array, Array]:
    """Read `cifar-10-python.tar.gz`, or the folder that it unpacks to.

    `labels` are the ten names, in the order that the archive must have. Returns training images (n×3×32×32, 0
    to 255), held-out images, training labels (n), held-out labels. Raises ArchiveError, which names the file.
    """
    files = _from_folder(path) if path.is_dir() else _from_tar(path)
    lacking = [name for name in NAMES if name not in files]
    if lacking:
        raise ArchiveError(f"{path} has no {', '.join(lacking)}; expected {FOLDER}/ with {', '.join(NAMES)}")
    tables = {}
    for name, data in files.items():
        try:
            tables[name] = unpickle(data)
        except ArchiveError as error:
            raise ArchiveError(f"{path}: {name}: {error}") from error.__cause__
    names = tables.pop(META).get("label_names")
    if names != [label.encode() for label in labels]:
        raise ArchiveError(f"{path}: {META}: label_names are not {', '.join(labels)}")
    batches = {name: _rows(path, name, table, len(labels)) for name, table in tables.items()}
    training = [batches[name] for name in TRAINING]
    images, targets = (np.concatenate(parts) for parts in zip(*training, strict=True))
    return images, batches[HELD_OUT][0], targets, batches[HELD_OUT][1]


def _rows(path: Path, name: str, table: dict[str, Any], classes: int) -> tuple[Array, Array]:
    """A batch's images and labels."""
    data, labels = table.get("data"), table.get("labels")
    if not isinstance(data, _Array) or data.array is None or data.array.shape[1] != PIXELS:
        raise ArchiveError(f"{path}: {name}: data is no table of {PIXELS} bytes a picture")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ArchiveError(f"{path}: {name}: labels are no list of numbers")
    if not all(0 <= label < classes for label in labels):
        raise ArchiveError(f"{path}: {name}: labels are not all from 0 to {classes - 1}")
    if not labels or len(labels) != len(data.array):
        raise ArchiveError(f"{path}: {name}: {len(labels)} labels for {len(data.array)} pictures")
    return data.array.reshape(-1, 3, SIDE, SIDE), np.array(labels)


def _from_folder(folder: Path) -> dict[str, bytes]:
    """The files by name, from `folder` or from the one of the archive's name in it."""
    inner = folder / FOLDER
    files = [(inner if inner.is_dir() else folder) / name for name in NAMES]
    for file in files:
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            raise ArchiveError(f"{file} has more than {MOST_BYTES} bytes")
    return {file.name: file.read_bytes() for file in files if file.is_file()}


class _Unpacked:
    """A tar as tarfile reads it, from its start to its end, and no more of it than there may be.

    tarfile itself reads headers only, each at once in the size that the archive states, and keeps them:
    so their bytes are counted apart.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._offset = 0
        self._header_bytes = 0

    def tell(self) -> int:
        """Bytes from the start."""
        return self._offset

    def seek(self, offset: int) -> None:
        """Skip to `offset`; raise ArchiveError if the offset lies behind, or too far ahead."""
        if offset < self._offset:
            raise ArchiveError("its parts lie over one another")
        self._check(offset)
        while self._offset < offset:
            skipped = len(self._source.read(min(offset - self._offset, 64 * 1024)))
            if not skipped:
                raise EOFError("it ends too early")
            self._offset += skipped

    def read(self, size: int) -> bytes:
        """`size` bytes of a header, fewer at the end; raises ArchiveError where headers have too many."""
        self._header_bytes += size
        if size < 0 or self._header_bytes > MOST_HEADER_BYTES:
            raise ArchiveError(f"its headers have more than {MOST_HEADER_BYTES} bytes")
        return self._take(size)

    def content(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes from `offset` on; raise EOFError if there are fewer."""
        self.seek(offset)
        data = self._take(size)
        if len(data) < size:
            raise EOFError("it ends too early")
        return data

    def _take(self, size: int) -> bytes:
        self._check(self._offset + size)
        data = self._source.read(size)
        self._offset += len(data)
        return data

    def _check(self, offset: int) -> None:
        if offset > MOST_UNPACKED:
            raise ArchiveError(f"it unpacks to more than {MOST_UNPACKED} bytes")


def _from_tar(path: Path) -> dict[str, bytes]:
    """The files by name, read from the archive as it lies: nothing is unpacked to the disk."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return _members(_Unpacked(gzip.GzipFile(fileobj=file) if packed else file))
    except ArchiveError as error:
        raise ArchiveError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # whatever a damaged archive makes tarfile and the unpacker raise
        raise ArchiveError(f"{path}: cannot be read as an archive: {error}") from error


def _members(unpacked: _Unpacked) -> dict[str, bytes]:
    wanted = {f"{FOLDER}/{name}": name for name in NAMES}
    files = {}
    with tarfile.open(fileobj=unpacked, mode="r:") as archive:
        for member in archive:
            if member.size > MOST_BYTES:
                raise ArchiveError(f"{member.name!a} has more than {MOST_BYTES} bytes")
            name = wanted.get(member.name.removeprefix("./"))
            if name is not None and member.isreg() and not member.issparse():
                files[name] = unpacked.content(member.offset_data, member.size)
    return files
