"""Small requests that cost a server gigabytes or seconds if nobody counts what they become."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

MOST_BODY_BYTES = 64 * 2**20
"""The largest body that a server takes by default, and what the compressed bodies here become."""


class Costly(NamedTuple):
    """One request, sent `times` at once; `statuses` are those of the answers that are right."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    statuses: tuple[int, ...]
    times: int = 1


def packed(start: bytes, piece: bytes, end: bytes, size: int = MOST_BODY_BYTES - 1024) -> bytes:
    """Return gzip data of `start`, as many `piece` as fit into `size` bytes, and `end`."""
    return zipped(start + piece * ((size - len(start) - len(end)) // len(piece)) + end)


def zipped(plain: bytes) -> bytes:
    """Return gzip data of `plain`, of a hundredth of its size: more would be refused for that alone."""
    deflate = zlib.compressobj(6, wbits=-zlib.MAX_WBITS)
    data = deflate.compress(plain) + deflate.flush()
    name = b"n" * max(0, len(plain) // 99 - len(data))  # the format allows a name of a file
    head = b"\x1f\x8b\x08\x08" + bytes(6) + name + b"\0"
    return head + data + struct.pack("<II", zlib.crc32(plain), len(plain))


def npy_head(dtype: str, *shape: int) -> bytes:
    """Return the magic string and the header of an npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def webp(side: int) -> bytes:
    """Return a picture of `side` × `side` pixels with transparency, in one colour."""
    file = io.BytesIO()
    Image.new("RGBA", (side, side), (1, 2, 3, 4)).save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


def png_with_chunks(count: int) -> bytes:
    """Return a picture with `count` empty chunks of pixels before its pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    body = file.getvalue()
    empty = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    at = body.index(b"IDAT") - 4
    return body[:at] + empty * count + body[at:]


def npz_with_entries(count: int) -> bytes:
    """Return an archive whose directory has `count` entries, all for one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"")
    body = file.getvalue()
    start, end = body.index(b"PK\x01\x02"), body.index(b"PK\x05\x06")
    entry = body[start:end]
    most = 0xFFFF
    tail = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, min(count, most), min(count, most), len(entry) * count, start, 0
    )
    return body[:start] + entry * count + tail


GZIP = {"content-encoding": "gzip"}
JSON = {**GZIP, "content-type": "application/json"}


def infer(name: str, datatype: str, shape: list[int]) -> bytes:
    """Return the beginning of a v2 request, up to the data of its input."""
    return b'{"inputs":[{"name":"%s","datatype":"%s","shape":%s,"data":[' % (
        name.encode(), datatype.encode(), json.dumps(shape).encode(),
    )  # fmt: skip


def binary_strings(count: int) -> tuple[bytes, dict[str, str]]:
    """Return a binary v2 request with `count` empty strings."""
    tensor = {
        "name": "x0",
        "datatype": "BYTES",
        "shape": [count, 1],
        "parameters": {"binary_data_size": 4 * count},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return zipped(head + b"\0" * 4 * count), {
        **GZIP, "inference-header-content-length": str(len(head))
    }  # fmt: skip


def costly_json() -> dict[str, Costly]:
    """JSON whose values a parser would make millions of objects of."""
    digits = "/predict/digits"
    v2 = "/v2/models/digits/infer"
    refused = (413, 422)
    native = b'{"inputs":['
    strings, headers = binary_strings(15_000_000)
    return {
        "empty lists": Costly(digits, packed(native, b"[],", b"[]]}"), JSON, refused),
        "empty lists for any model": Costly(
            "/predict", packed(b'{"model":"digits","inputs":[', b"[],", b"[]]}"), JSON, refused
        ),
        "empty objects": Costly(digits, packed(native, b"{},", b"{}]}"), JSON, refused),
        "strings": Costly(digits, packed(native, b'"",', b'""]}'), JSON, refused),
        "strings for strings": Costly("/predict/strings", packed(native, b'[""],', b'[""]]}'), JSON, refused),
        "depth": Costly(digits, packed(b'{"inputs":', b"[", b""), JSON, (400, *refused)),
        "literals": Costly(digits, packed(native, b"null,", b"null]}"), JSON, refused),
        "ragged numbers": Costly(digits, packed(native, b"1,", b"[1]]}"), JSON, refused),
        "names": Costly(v2, packed(b'{"inputs":[],"outputs":[', b'{"name":"a"},', b"{}]}"), JSON, refused),
        "parameters": Costly(
            v2, packed(b'{"inputs":[],"parameters":{', b'"a":1,', b'"b":1}}'), JSON, refused
        ),
        "v2 lists": Costly(
            v2, packed(infer("image", "FP32", [1, 1, 8, 8]), b"[],", b"[]]}]}"), JSON, refused
        ),
        "v2 strings": Costly(
            "/v2/models/strings/infer",
            packed(infer("x0", "BYTES", [16_000_000, 1]), b'"",', b'""]}]}'),
            JSON,
            refused,
        ),
        "binary strings": Costly("/v2/models/strings/infer", strings, headers, refused),
    }


def costly_files() -> dict[str, Costly]:
    """Files that become larger than they are."""
    npy = {**GZIP, "content-type": "application/x-npy"}
    npz = {**GZIP, "content-type": "application/x-npz"}
    rows = (MOST_BODY_BYTES - 1024) // 10
    entries = (MOST_BODY_BYTES - 1024) // 47
    return {
        "small integers": Costly(
            "/predict/doubles", zipped(npy_head("|u1", rows, 10) + b"\0" * (10 * rows)), npy, (200, 413, 422, 503), 8
        ),
        "directory": Costly(
            "/predict/doubles", zipped(npz_with_entries(entries)), npz, (400,)
        ),
        "pictures": Costly("/predict/digits", webp(7000), {"content-type": "image/webp"}, (200, 413, 503), 6),
        "chunks": Costly(
            "/predict/digits", zipped(png_with_chunks(5_000_000)), {**GZIP, "content-type": "image/png"}, (413,)
        ),
    }  # fmt: skip


CASES: Mapping[str, Callable[[], dict[str, Costly]]] = {"JSON": costly_json, "files": costly_files}
