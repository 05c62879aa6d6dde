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
"""The model that takes sentences, or else token ids with a mask."""
IDS = ("input_ids", "attention_mask")
VOCABULARY = 1000
"""Less than the words that it knows: of an id that is none of them, it is the model that complains."""
SENTENCES = ["It is", "A value", "", "Return the names of", "\u00fc\n"]
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
def map_case(context: Any, case: Any) -> Any:
    """Make a valid request of one that is valid but for what the schema cannot say."""
    if case.path.endswith("/infer") and case.headers and case.headers.get(LENGTH) == "0":
        # Whatever follows is a sentence, where the model takes one.
        del case.headers[LENGTH]
    is_predict = case.path.startswith("/predict") or case.path.endswith("/infer")
    if case.meta is None or not case.meta.generation.mode.is_positive or not is_predict:
        return case
    model = next((name for name in (*INPUTS, TEXT) if name in case.path.split("/")), None)
    if case.headers and LENGTH in case.headers:
        del case.headers[LENGTH]
    named = case.body.get("model") if case.path == "/predict" and isinstance(case.body, dict) else None
    if TEXT in (model, named):
        case.body = mended_text(case.body)
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


def mended_text(body: Any) -> Any:
    """Sentences, or token ids and their mask, which have one shape and are words of the model."""
    if isinstance(body, bytes) and body.startswith(b"application/"):
        media_type, rows = body.decode().split()
        sentences = np.array(SENTENCES[: int(rows)])
        ids = np.ones((int(rows), 3), np.int64)
        if media_type == "application/x-npy":
            return saved(np.save, sentences)
        if media_type == "application/x-npz":
            return saved(np.savez, **({"text": sentences} if int(rows) % 2 else dict.fromkeys(IDS, ids)))
        tensors = [text_tensor(sentences.tolist())] if int(rows) % 2 else id_tensors(ids)
        return json.dumps({"inputs": tensors}).encode()
    if not isinstance(body, dict):
        return body
    if "inputs" not in body:
        if "text" in body:
            as_file = len(body["text"]) % 2
            return {"text": saved(np.save, np.array(SENTENCES)) if as_file else SENTENCES[-1].encode()}
        return {name: saved(np.save, np.ones((2, 3), np.int64)) for name in body}
    inputs = body["inputs"]
    if isinstance(inputs, dict) and "text" not in inputs:
        ids = words(inputs["input_ids"])
        inputs = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    elif isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
        given = inputs[0]
        inputs = (
            [{**given, "shape": [len(given["data"])]}]
            if given["name"] == "text"
            else id_tensors(words(given["data"]))
        )
    return {**body, "inputs": inputs}


def words(data: list[Any]) -> np.ndarray:
    """Ids of words, as many rows of them as `data` has elements."""
    first = np.array([sum(row) if isinstance(row, list) else row for row in data] or [1], object)
    return np.stack([first % VOCABULARY, first // 7 % VOCABULARY], axis=1).astype(np.int64)


def text_tensor(sentences: list[str]) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [len(sentences)], "data": sentences}


def id_tensors(ids: np.ndarray) -> list[dict[str, Any]]:
    ones = np.ones_like(ids)
    return [
        {"name": name, "datatype": "INT64", "shape": ids.shape, "data": array.reshape(-1).tolist()}
        for name, array in zip(IDS, (ids, ones), strict=True)
    ]


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
