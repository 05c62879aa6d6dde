"""Reads and writes numpy's `.npy` and `.npz` files, which clients with arrays may send instead of JSON.

The format is that of NEP 1: a magic string, a version, a header with `descr`, `fortran_order` and `shape`,
and the elements. Pickles are never read. Every length is checked against the size of the body before memory
is allocated. Strings (`U`, or `S` with UTF-8 in it) become `BYTES`. numpy pads strings with NULs, so NULs
at the end of a string are lost. BF16 is sent as `uint16`, its raw bits.
"""

from __future__ import annotations

import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Final

import numpy as np

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody, ModelFailed, UnsupportedMediaType
from inferpool.tensors import (
    Array,
    TensorSpec,
    check_tensor,
    element_count,
    shape_text,
    value_text,
)
from inferpool.wire.json_bounds import MOST_OBJECT_BYTES
from inferpool.wire.large_bytes import PIECE_BYTES, pieces
from inferpool.wire.nested_lists import MAX_RANK, index_of, narrow_integers, out_of_range

_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER_BYTES: Final = 4096
"""A header is three short entries and padding; numpy writes 118 bytes."""
_MAX_BYTES: Final = 2**63 - 1
_MAX_MEMBERS: Final = 4096
_MAX_TEXT_BYTES: Final = 2**30
_TEXT_OBJECT_BYTES: Final = 64
"""Bytes of a short Python string and the pointer to it, without its characters."""
_PIECE_TEXTS: Final = 4096
"""Strings that are made at a time; numpy holds the GIL meanwhile."""
_LAST_CHARACTER: Final = 0x10FFFF
_SURROGATES: Final = 0xD800
_SURROGATE_MASK: Final = 0xFFFFF800
"""The 2048 codes from 0xD800 on are halves of UTF-16 pairs, not characters."""
_SWAPPED: Final = ">" if sys.byteorder == "little" else "<"
_DIRECTORY_ENTRY: Final = b"PK\x01\x02"
_SEARCHED_BYTES: Final = 2**20
"""Bytes that are searched at a time, because a search holds the GIL."""
_ENCRYPTED: Final = 0x1
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    UnicodeDecodeError,
    ValueError,
)
"""The errors that zipfile raises for damaged files, and for files that are not zip files."""

# numpy's own header reader (numpy.lib.format) is not used: it warns about old files, evaluates Python
# literals, builds any dtype, and raises many kinds of errors. These expressions take linear time.
_VALUE: Final = r"""('[^']*+'|"[^"]*+"|True|False|\([\d\s,]*+\))"""
_ENTRY: Final = rf"""(['"])(descr|fortran_order|shape)\1\s*+:\s*+{_VALUE}\s*+"""
_HEADER: Final = re.compile(rf"\s*+\{{\s*+(?:{_ENTRY},?+\s*+)*+\}}\s*+")
_ENTRIES: Final = re.compile(_ENTRY)
_DESCR: Final = re.compile(r"([<>|=]?)(?:(b1|[iu][1248]|f[248])|([US])([1-9]\d{0,8}))")


def decode_npy(body: bytes | memoryview, allowance: Allowance) -> Array:
    """Return the array in an `.npy` file, C-contiguous in native byte order; a view of `body` if possible.

    Raises MalformedBody if the file is damaged or incomplete, BodyTooLarge if the array takes more than
    `allowance.most_bytes` bytes, InvalidInput if no tensor can have its dtype, and what `Allowance.take`
    raises.
    """
    view = memoryview(body)
    header, start = _split(view)
    descr, fortran, shape = _read_header(header)
    dtype = _dtype(descr)
    expected = _size(dtype, shape)
    needed = expected + (element_count(shape) * _TEXT_OBJECT_BYTES if dtype.kind in "US" else 0)
    limit = allowance.most_bytes
    if needed > limit:
        raise BodyTooLarge(f"the array takes {needed} bytes, the limit is {limit}", limit=limit, got=needed)
    got = len(view) - start
    if got != expected:
        raise MalformedBody(
            f"{got} bytes follow the npy header; its {dtype.name} {shape_text(shape)} takes {expected} bytes;"
            " send the whole file, and nothing after it",
            expected=expected,
            got=got,
        )
    flat: Array = np.frombuffer(view, dtype=dtype, offset=start) if expected else np.empty(0, dtype)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    if dtype.kind in "US":
        # The characters are copied twice, and again into their strings.
        if (objects := element_count(shape) * _TEXT_OBJECT_BYTES) > MOST_OBJECT_BYTES:
            raise BodyTooLarge(
                f"the array has {element_count(shape)} strings, which take {objects} bytes of memory; the"
                f" limit is {MOST_OBJECT_BYTES}; send fewer rows at a time",
                limit=MOST_OBJECT_BYTES,
                got=objects,
            )
        allowance.take(needed + 3 * expected, "reading the strings of the array")
        return _from_numpy_text(array)
    if dtype.kind == "b" and array.size and int(flat.view(np.uint8).max()) > 1:
        raise InvalidInput("a byte of a bool array is neither 0 nor 1", expected="BOOL")
    if fortran or dtype.byteorder == _SWAPPED:
        allowance.take(2 * expected, "putting the elements of the array in order")
    return np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape)


def decode_npz(body: bytes | memoryview, allowance: Allowance) -> dict[str, Array]:
    """Return the arrays in an `.npz` file by name; together they may unpack to `allowance.most_bytes` bytes.

    Members may be stored or deflated. Names may contain slashes, like names of inputs do, because nothing
    is unpacked to a disk. Raises the errors of `decode_npy`.
    """
    arrays: dict[str, Array] = {}
    _check_directory(body)
    try:
        with zipfile.ZipFile(BytesIO(body)) as archive:
            members = archive.infolist()
            _check_members(members, allowance.most_bytes)
            allowance.take(sum(member.file_size for member in members), "unpacking the npz file")
            for member in members:
                content = _read_member(archive, member)
                arrays[member.filename.removesuffix(".npy")] = decode_npy(content, allowance)
    except _ZIP_ERRORS as error:
        raise MalformedBody(f"the body is not a valid npz file: {value_text(str(error))}") from None
    return arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> memoryview:
    """Return the content of a member, which is read in pieces; raises MalformedBody if it is truncated.

    `ZipExtFile.read` would join all that it has read with each further piece, and hold the GIL meanwhile.
    """
    content = np.empty(member.file_size, np.uint8).data
    size = 0
    with archive.open(member) as file:
        while size < len(content) and (piece := file.read(min(PIECE_BYTES, len(content) - size))):
            content[size : size + len(piece)] = piece
            size += len(piece)
    if size != len(content):
        raise MalformedBody(f"npz member {value_text(member.filename)} is truncated")
    return content


def encode_npy(array: Array) -> bytes:
    """Return an `.npy` file of `array`; strings are written as `U`. Raises the errors of `npy_parts`."""
    return b"".join(npy_parts(array))


def npy_parts(array: Array) -> list[bytes | memoryview]:
    """Return the head of an `.npy` file of `array`, and its elements, a view of the array if possible.

    Raises UnsupportedMediaType if an output is a sequence or a map instead of an array, and ModelFailed if
    its strings become too long.
    """
    if not isinstance(array, np.ndarray):
        raise UnsupportedMediaType("an output of this model is not an array: accept application/json")
    array = (
        _to_numpy_text(array)
        if array.dtype == np.object_
        else np.ascontiguousarray(array).reshape(array.shape)
    )
    entries = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape!r}, }}"
    # The format asks that elements start at a multiple of 64 bytes, so that a mapped file is aligned.
    padding = -(len(_MAGIC) + 4 + len(entries) + 1) % 64
    header = entries.encode() + b" " * padding + b"\n"
    prefix = _MAGIC + b"\x01\x00" + len(header).to_bytes(2, "little") + header
    return [prefix, array.reshape(-1).view(np.uint8).data] if array.size else [prefix]


def encode_npz(arrays: Mapping[str, Array]) -> bytes:
    """Return an `.npz` file of `arrays`, which are stored without compression."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            parts = npy_parts(array)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.file_size = sum(map(len, parts))
            with archive.open(info, "w") as member:
                for part in parts:
                    for piece in pieces(part):
                        member.write(piece)
    return file.getvalue()


def cast_to(spec: TensorSpec, array: Array, allowance: Allowance = UNLIMITED) -> Array:
    """Return `array` in the datatype of `spec`, after a check of its shape.

    Integers are cast to other integer datatypes if every value is in range. All numbers are rounded to
    floats if every finite value stays finite. Nothing else is cast: no float to an integer, no boolean, no
    string. Raises InvalidInput with the tensor, and with the position and the value at fault if there is
    one, and what `Allowance.take` raises.
    """
    kinds = spec.dtype.kind, array.dtype.kind
    if array.dtype != spec.dtype and spec.datatype != "BF16" and (kinds in _TO_FLOAT or kinds in _TO_INTEGER):
        # The shape is checked first, by a view of one element: a wrong shape costs no memory.
        check_tensor(spec, np.broadcast_to(np.empty((), spec.dtype), array.shape))
        # The cast array, and for each element a flag of whether it is finite.
        size = array.size * (spec.dtype.itemsize + 1)
        allowance.take(size, f'casting tensor "{spec.name}" from {array.dtype.name} to {spec.datatype}')
        array = _to_floats(spec, array) if kinds in _TO_FLOAT else _to_integers(spec, array)
    check_tensor(spec, array)
    return array


_TO_FLOAT: Final = frozenset((("f", "f"), ("f", "i"), ("f", "u")))
_TO_INTEGER: Final = frozenset((("i", "i"), ("i", "u"), ("u", "i"), ("u", "u")))


def _to_floats(spec: TensorSpec, array: Array) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        cast: Array = array.astype(spec.dtype)
    if array.dtype.kind in "iu" and spec.datatype != "FP16":
        return cast  # no integer is out of the range
    finite = np.isfinite(cast)
    if not finite.all():
        lost = np.flatnonzero(np.isfinite(array) & ~finite)
        if lost.size:
            position = int(lost[0])
            raise out_of_range(spec, index_of(position, array.shape), array.flat[position].item())
    return cast


def _to_integers(spec: TensorSpec, array: Array) -> Array:
    cast = narrow_integers(array, spec.dtype)
    if cast is None:
        limits = np.iinfo(spec.dtype)
        position = next(
            i for i, number in enumerate(array.flat) if not limits.min <= int(number) <= limits.max
        )
        raise out_of_range(spec, index_of(position, array.shape), array.flat[position].item())
    return cast


def _split(view: memoryview) -> tuple[bytes, int]:
    """Return the bytes of the header, and the offset of the elements."""
    if bytes(view[:6]) != _MAGIC:
        raise MalformedBody(
            "the body is not an npy file, which begins with \\x93NUMPY; write it with numpy.save", position=0
        )
    version = tuple(view[6:8])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise MalformedBody(
            f"the npy file has format {'.'.join(map(str, version))}; send 1.0, 2.0 or 3.0, as numpy.save does"
        )
    start = 10 if version == (1, 0) else 12
    length = int.from_bytes(view[8:start], "little")
    if length > _MAX_HEADER_BYTES:
        raise MalformedBody(
            f"the npy header takes {length} bytes, the limit is {_MAX_HEADER_BYTES}",
            expected=_MAX_HEADER_BYTES,
            got=length,
        )
    if start + length > len(view):
        raise MalformedBody(
            "the body ends within the npy header; send the whole file", expected=start + length, got=len(view)
        )
    return bytes(view[start : start + length]), start + length


def _read_header(header: bytes) -> tuple[str, bool, tuple[int, ...]]:
    text = header.decode("latin-1")
    entries = {key: value for _, key, value in _ENTRIES.findall(text)} if _HEADER.fullmatch(text) else {}
    descr, fortran, shape = (entries.get(key, "") for key in ("descr", "fortran_order", "shape"))
    if "'descr': [" in text:
        raise InvalidInput(
            "the npy file holds structured elements; a tensor takes numbers, booleans or strings"
        )
    if descr[:1] not in ("'", '"') or fortran not in ("True", "False") or shape[:1] != "(":
        raise MalformedBody(
            "the npy header is not {'descr': …, 'fortran_order': …, 'shape': …};"
            " write the file with numpy.save"
        )
    sizes = [size.strip() for size in shape[1:-1].removesuffix(",").split(",")] if shape[1:-1].strip() else []
    if not all(size.isdecimal() and len(size) < 20 for size in sizes) or len(sizes) > MAX_RANK:
        raise MalformedBody(f"the npy header has shape {value_text(shape)}, which is not a shape")
    return descr[1:-1], fortran == "True", tuple(map(int, sizes))


def _dtype(descr: str) -> np.dtype[Any]:
    if not _DESCR.fullmatch(descr):
        raise InvalidInput(
            f"the npy file has dtype {value_text(descr)}; a tensor takes bool, integers,"
            " floats of up to 64 bits, and strings",
            got=value_text(descr),
        )
    return np.dtype(descr)


def _size(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Return how many bytes the elements take; raises MalformedBody if no array can have that shape."""
    if dtype.itemsize * element_count(size for size in shape if size) > _MAX_BYTES:
        raise MalformedBody(f"the npy header has shape {shape_text(shape)}, more than memory can hold")
    return dtype.itemsize * element_count(shape)


def _from_numpy_text(array: Array) -> Array:
    texts: Array = np.empty(array.shape, dtype=np.object_)
    if array.dtype.kind == "U":
        native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
        # numpy makes strings of any codes, also of codes that are not characters.
        codes = native.view(np.uint32)
        if ((codes > _LAST_CHARACTER) | ((codes & _SURROGATE_MASK) == _SURROGATES)).any():
            raise _not_unicode()
        flat = native.reshape(-1)
        for start in range(0, len(flat), _PIECE_TEXTS):
            texts.reshape(-1)[start : start + _PIECE_TEXTS] = flat[start : start + _PIECE_TEXTS].tolist()
    else:
        try:
            flat = array.ravel()
            for start in range(0, len(flat), _PIECE_TEXTS):
                piece = [text.decode() for text in flat[start : start + _PIECE_TEXTS].tolist()]
                texts.reshape(-1)[start : start + _PIECE_TEXTS] = piece
        except UnicodeDecodeError:
            raise _not_unicode() from None
    return texts


def _not_unicode() -> InvalidInput:
    return InvalidInput("a string in the npy file is not valid Unicode text", expected="BYTES")


def _to_numpy_text(array: Array) -> Array:
    texts = [str(text) for text in array.flat]
    longest = max(map(len, texts), default=0)
    if 4 * longest * len(texts) > _MAX_TEXT_BYTES:
        raise ModelFailed("the strings of an output are too long for an npy file")
    return np.array(texts, dtype=f"U{max(longest, 1)}").reshape(array.shape)


def _check_directory(body: bytes | memoryview) -> None:
    """Raise MalformedBody if the directory has too many entries, because `zipfile` reads them all at once."""
    entries = 0
    for start in range(0, len(body), _SEARCHED_BYTES):
        piece = bytes(body[start : start + _SEARCHED_BYTES + len(_DIRECTORY_ENTRY) - 1])
        entries += piece.count(_DIRECTORY_ENTRY)
        if entries > _MAX_MEMBERS:
            raise MalformedBody(
                f"the npz file has more than {_MAX_MEMBERS} members, the limit; send fewer arrays",
                expected=_MAX_MEMBERS,
            )


def _check_members(members: list[zipfile.ZipInfo], max_bytes: int) -> None:
    if len(members) > _MAX_MEMBERS:
        raise MalformedBody(f"the npz file has {len(members)} members, the limit is {_MAX_MEMBERS}")
    seen: set[str] = set()
    for member in members:
        name = value_text(member.filename)
        if not member.filename.endswith(".npy"):
            raise MalformedBody(f"npz member {name} is not an npy file")
        if member.filename in seen:
            raise MalformedBody(f"npz member {name} comes twice")
        seen.add(member.filename)
        if member.flag_bits & _ENCRYPTED:
            raise MalformedBody(f"npz member {name} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise MalformedBody(f"npz member {name} is neither stored nor deflated")
    unpacked = sum(member.file_size for member in members)
    # The headers of the npy files are small and not counted.
    limit = max_bytes + len(members) * (_MAX_HEADER_BYTES + 12)
    if unpacked > limit:
        raise BodyTooLarge(
            f"the npz file unpacks to {unpacked} bytes, the limit is {max_bytes}",
            limit=max_bytes,
            got=unpacked,
        )
