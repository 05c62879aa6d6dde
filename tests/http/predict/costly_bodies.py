"""Small requests that cost a server gigabytes or seconds if nobody counts what they become."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from onnx import TensorProto, helper
from PIL import Image

from tests.onnx_models import write_identity, write_model

JSON_BYTES = 32 * 2**20
"""The size of a body of JSON: half of what a server takes by default."""
COLUMNS = 4096


class Costly(NamedTuple):
    """One request, sent `times` at once; `statuses` are those of right answers."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    statuses: tuple[int, ...]
    times: int = 1


def write_models(repository: Path) -> None:
    """Write a model of strings, and one that takes much and answers little."""
    write_identity(repository, "strings", ["BYTES"])
    shape = ("rows", COLUMNS)
    graph = helper.make_graph(
        [helper.make_node("ArgMax", ["x0"], ["y0"], axis=1, keepdims=0)],
        "largest",
        [helper.make_tensor_value_info("x0", TensorProto.DOUBLE, shape)],
        [helper.make_tensor_value_info("y0", TensorProto.INT64, ("rows",))],
    )
    write_model(repository, "largest", graph)


def zipped(plain: bytes) -> bytes:
    """Return gzip data of `plain`, of a hundredth of its size: more would be refused for that alone."""
    deflate = zlib.compressobj(6, wbits=-zlib.MAX_WBITS)
    data = deflate.compress(plain) + deflate.flush()
    name = b"n" * max(0, len(plain) // 99 - len(data))  # the format has room for the name of a file
    head = b"\x1f\x8b\x08\x08" + bytes(6) + name + b"\0"
    return head + data + struct.pack("<II", zlib.crc32(plain), len(plain))


def filled(start: bytes, piece: bytes, end: bytes) -> bytes:
    """Return gzip data of `start`, as many `piece` as fit, and `end`."""
    return zipped(start + piece * ((JSON_BYTES - len(start) - len(end)) // len(piece)) + end)


def infer(name: str, datatype: str, *shape: int) -> bytes:
    """Return the beginning of a v2 request, up to the data of its input."""
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    return b'{"inputs":[' + json.dumps(tensor).encode()[:-1] + b',"data":['


def binary_strings(count: int) -> tuple[bytes, int]:
    """Return a binary v2 request with `count` empty strings, and the length of its JSON."""
    size = {"binary_data_size": 4 * count}
    tensor = {"name": "x0", "datatype": "BYTES", "shape": [count, 1], "parameters": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    return zipped(head + bytes(4 * count)), len(head)


def npy_of_bytes(rows: int, columns: int) -> bytes:
    """Return an npy file of zeros of one byte."""
    file = io.BytesIO()
    np.save(file, np.zeros((rows, columns), np.uint8))
    return file.getvalue()


def npz_with_entries(count: int) -> bytes:
    """Return an archive whose directory names its only member `count` times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"")
    body = file.getvalue()
    start, end = body.index(b"PK\x01\x02"), body.index(b"PK\x05\x06")
    entries = body[start:end] * count
    shown = min(count, 0xFFFF)
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, shown, shown, len(entries), start, 0)
    return body[:start] + entries + tail


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


def form_of_boundaries() -> bytes:
    """Return a form whose content looks like the beginning of a boundary again and again."""
    head = b'--e\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
    return head + b"\r\n-" * 2_000_000 + b"\r\n--e--\r\n"


GZIP = {"content-encoding": "gzip"}
JSON = {**GZIP, "content-type": "application/json"}
NPY, NPZ, PNG = (
    {**GZIP, "content-type": kind} for kind in ("application/x-npy", "application/x-npz", "image/png")
)
FORM = {**GZIP, "content-type": "multipart/form-data; boundary=e"}
DIGITS, DIGITS_V2 = "/predict/digits", "/v2/models/digits/infer"
STRINGS, STRINGS_V2 = "/predict/strings", "/v2/models/strings/infer"


def costly_json(name: str) -> Costly:
    """Return JSON whose values a parser would make millions of objects of."""
    native = b'{"inputs":['
    image = infer("image", "FP32", 1, 1, 8, 8)
    path, start, piece, end = {
        "lists": (DIGITS, native, b"[],", b"[]]}"),
        "lists for a model that the body names": (
            "/predict",
            b'{"model":"digits","inputs":[',
            b"[],",
            b"[]]}",
        ),
        "objects": (DIGITS, native, b"{},", b"{}]}"),
        "strings for numbers": (DIGITS, native, b'"",', b'""]}'),
        "strings": (STRINGS, native, b'[""],', b'[""]]}'),
        "depth": (DIGITS, b'{"inputs":', b"[", b""),
        "null": (DIGITS, native, b"null,", b"null]}"),
        "ragged numbers": (DIGITS, native, b"1,", b"[1]]}"),
        "v2 lists": (DIGITS_V2, image, b"[],", b"[]]}]}"),
        "v2 names": (DIGITS_V2, b'{"inputs":[],"outputs":[', b'{"name":"a"},', b"{}]}"),
        "v2 parameters": (DIGITS_V2, b'{"inputs":[],"parameters":{', b'"a":1,', b'"b":1}}'),
        "v2 strings": (STRINGS_V2, infer("x0", "BYTES", 8_000_000, 1), b'"",', b'""]}]}'),
    }[name]
    return Costly(path, filled(start, piece, end), JSON, (413, 422))


JSON_CASES = (
    "lists", "lists for a model that the body names", "objects", "strings for numbers", "strings", "depth",
    "null", "ragged numbers", "v2 lists", "v2 names", "v2 parameters", "v2 strings",
)  # fmt: skip


def costly_file(name: str) -> Costly:
    """Return files that become larger, or take longer, than their size shows."""
    if name == "binary strings":
        body, length = binary_strings(15_000_000)
        return Costly(STRINGS_V2, body, {**GZIP, "inference-header-content-length": str(length)}, (413, 422))
    return {
        "bytes for FP64": lambda: Costly(
            "/predict/largest", zipped(npy_of_bytes(4096, COLUMNS)), NPY, (200, 429, 503), 8
        ),
        "rows": lambda: Costly("/predict/largest", zipped(npy_of_bytes(60_000_000, 1)), NPY, (422,)),
        "directory": lambda: Costly("/predict/largest", zipped(npz_with_entries(1_300_000)), NPZ, (400,)),
        "pictures": lambda: Costly(DIGITS, webp(3500), {"content-type": "image/webp"}, (200, 503), 6),
        "chunks": lambda: Costly(DIGITS, zipped(png_with_chunks(5_000_000)), PNG, (413,)),
        "form": lambda: Costly(DIGITS, zipped(form_of_boundaries()), FORM, (400, 422)),
    }[name]()


FILE_CASES = ("binary strings", "bytes for FP64", "rows", "directory", "pictures", "chunks", "form")
