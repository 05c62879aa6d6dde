"""What JSON Schema cannot say of a request, said to schemathesis: files, and what depends on other fields."""

from __future__ import annotations

import io
import json
from math import prod
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image

INPUTS = {"diabetes": ("features", (10,)), "digits": ("image", (1, 8, 8)), "forecast": ("closes", (20,))}
"""The input of each model that is served and takes numbers, and the shape of its rows."""
TEXT = "next-word"
"""The model that takes sentences. It refuses a list of none, and a part of its other inputs."""
LENGTH = "Inference-Header-Content-Length"


def saved(save: Any, *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def picture(kind: str, side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side), 7 * side).save(stream, kind)
    return stream.getvalue()


for kind in ("png", "jpeg", "webp"):
    schemathesis.openapi.media_type(
        f"image/{kind}", st.integers(1, 30).map(lambda side, kind=kind: picture(kind, side))
    )
# Which arrays are right depends on the path: `map_body` makes them, with so many rows.
for media_type in ("application/x-npy", "application/x-npz", "application/octet-stream"):
    schemathesis.openapi.media_type(
        media_type,
        st.integers(1, 5).map(lambda rows, media_type=media_type: f"{media_type} {rows}".encode()),
    )


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Leave out requests whose only fault is a header that nobody knows: such are taken."""
    return not any(name.lower().startswith("x-schemathesis-unknown") for name in case.headers or ())


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Make a valid request of one that is valid but for what the schema cannot say."""
    is_predict = case.path.startswith("/predict") or case.path.endswith("/infer")
    if case.meta is None or not case.meta.generation.mode.is_positive or not is_predict:
        return case
    model = next((name for name in (*INPUTS, TEXT) if name in case.path.split("/")), None)
    if case.headers and LENGTH in case.headers:
        del case.headers[LENGTH]
    named = case.body.get("model") if case.path == "/predict" and isinstance(case.body, dict) else None
    if TEXT in (model, named):
        case.body = with_sentences(case.body, case.path.endswith("/infer"))
    elif model is not None:
        case.body = mended_body(case.body, *INPUTS[model])
    elif (case.path_parameters or {}).get("model") in (*INPUTS, TEXT):
        # What it takes is said by its own path alone.
        case.path_parameters["model"] = "nobody"
    # Files are no strings, by which schemathesis would take them for faults that are made on purpose.
    case._record_starting_state()
    return case


def mended_body(body: Any, name: str, row: tuple[int, ...]) -> Any:
    if isinstance(body, bytes) and body.startswith(b"application/"):
        media_type, rows = body.decode().split()
        zeros = np.zeros((int(rows), *row), np.float32)
        if media_type == "application/x-npy":
            return saved(np.save, zeros)
        return saved(np.savez, **{name: zeros}) if media_type == "application/x-npz" else infer(name, zeros)
    if isinstance(body, dict) and name in body:
        return {name: saved(np.save, np.zeros((2, *row), np.float32))}
    if isinstance(body, dict) and isinstance(body["inputs"], list):
        return {**body, "inputs": [mended(tensor, row) for tensor in body["inputs"]]}
    return body


def with_sentences(body: Any, is_v2: bool) -> Any:
    """The same request for the model that takes sentences, with two of them."""
    sentences = ["It is", "A value"]
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": sentences}
    if isinstance(body, bytes) and body.startswith(b"application/"):
        if body.startswith(b"application/x-npy"):
            return saved(np.save, np.array(sentences))
        if body.startswith(b"application/x-npz"):
            return saved(np.savez, text=np.array(sentences))
        return json.dumps({"inputs": [tensor]}).encode()
    if isinstance(body, dict) and "inputs" in body:
        return {**body, "inputs": [tensor] if is_v2 else sentences}
    return {"text": saved(np.save, np.array(sentences))} if isinstance(body, dict) else body


def infer(name: str, rows: np.ndarray) -> bytes:
    """A body of `/v2` that is all JSON, whatever it is called."""
    tensor = {"name": name, "datatype": "FP32", "shape": rows.shape, "data": rows.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def mended(tensor: Any, row: tuple[int, ...]) -> Any:
    """A tensor of `/v2` whose `shape` is filled by its `data`; any other value is what it is."""
    if not isinstance(tensor, dict):
        return tensor
    data = tensor["data"]
    if data and isinstance(data[0], list):
        return {**tensor, "shape": [len(data), *row]}
    rows = len(data) // prod(row)
    return {**tensor, "data": data[: rows * prod(row)], "shape": [rows, *row]}
