"""The bodies by which servers take an input: one function for each way."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.peers.load import Request
from benchmarks.peers.workloads import Sample

Build = Callable[[Sample], Request]
JSON = {"Content-Type": "application/json"}
BOUNDARY = "9f2c1d7e"


def plain_json(path: str) -> Build:
    """`{"inputs": nested lists}`."""
    return lambda sample: Request(path, dumps({"inputs": numbers(sample).tolist()}), JSON)


def text_json(path: str) -> Build:
    """`{"inputs": ["a sentence"]}`."""
    return lambda sample: Request(path, dumps({"inputs": [sample.text]}), JSON)


def raw(path: str) -> Build:
    """The bytes of the row, FP32 in little-endian order, and nothing else."""
    headers = {"Content-Type": "application/octet-stream"}
    return lambda sample: Request(path, sample.rows.tobytes(), headers)


def jpeg(path: str) -> Build:
    """The picture's file as the body."""
    return lambda sample: Request(path, sample.jpeg, {"Content-Type": "image/jpeg"})


def text(path: str) -> Build:
    """The sentence as the body."""
    return lambda sample: Request(path, sample.text.encode(), {"Content-Type": "text/plain"})


def raw_form(path: str, field: str) -> Build:
    """A form with the bytes of the row as a file."""
    return lambda sample: form(path, field, sample.rows.tobytes(), "application/octet-stream")


def jpeg_form(path: str, field: str) -> Build:
    """A form with the picture's file."""
    return lambda sample: form(path, field, sample.jpeg, "image/jpeg")


def v2(path: str, tensor: str) -> Build:
    """The Open Inference Protocol, numbers as a flat list."""
    return partial(_v2, path, tensor)


def v2_binary(path: str, tensor: str) -> Build:
    """The same with its binary tensor data extension; the answer stays JSON."""
    return lambda sample: binary(path, tensor, "FP32", list(sample.rows.shape), sample.rows.tobytes())


def v2_jpeg(path: str, tensor: str) -> Build:
    """The same with the picture's file as an element of BYTES."""
    return lambda sample: binary(path, tensor, "BYTES", [1, 1], element(sample.jpeg))


def v2_text(path: str, tensor: str) -> Build:
    """The same with the sentence as an element of BYTES, in JSON."""
    described = {"name": tensor, "datatype": "BYTES", "shape": [1, 1]}
    return lambda sample: Request(path, dumps({"inputs": [{**described, "data": [sample.text]}]}), JSON)


def _v2(path: str, tensor: str, sample: Sample) -> Request:
    described = {"name": tensor, "datatype": "FP32", "shape": list(sample.rows.shape)}
    return Request(
        path, dumps({"inputs": [{**described, "data": numbers(sample).reshape(-1).tolist()}]}), JSON
    )


def binary(path: str, tensor: str, datatype: str, shape: list[int], data: bytes) -> Request:
    """A header in JSON and the bytes of one tensor behind it."""
    described = {"name": tensor, "datatype": datatype, "shape": shape}
    header = dumps({"inputs": [{**described, "parameters": {"binary_data_size": len(data)}}]})
    length = {"Inference-Header-Content-Length": str(len(header))}
    return Request(path, header + data, {"Content-Type": "application/octet-stream", **length})


def form(path: str, field: str, data: bytes, media_type: str) -> Request:
    """multipart/form-data with one file."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="input"\r\n'
    body = f"{head}Content-Type: {media_type}\r\n\r\n".encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    return Request(path, body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})


def element(data: bytes) -> bytes:
    """An element of BYTES: its length, then itself."""
    return len(data).to_bytes(4, "little") + data


def numbers(sample: Sample) -> Any:
    """The row as decimals of five places, as a client would write them."""
    return sample.rows.astype("float64").round(5)


def dumps(value: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()
