"""Tells schemathesis what JSON Schema cannot express: files, and fields that depend on other fields."""

from __future__ import annotations

import io
import json
from functools import partial
from math import prod
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image

INPUTS = {"diabetes": ("features", (10,)), "digits": ("image", (1, 8, 8)), "forecast": ("closes", (20,))}
"""The models that take numbers, with the input and the row shape of each."""
TEXT = "next-word"
"""The model that takes sentences, or token ids with a mask."""
IDS = ("input_ids", "attention_mask")
VOCABULARY = 1000
"""Ids below this are in the vocabulary of the model, which rejects all others itself."""
SENTENCES = ["It is", "A value", "", "Return the names of", "\u00fc\n"]
TEXT_PATHS = ("/v1/embeddings", "/v1/rerank", "/v2/rerank", "/v1/score")
PLATFORM_PATHS = ("/invocations", "/score", "/v1/endpoints/{endpoint}/deployedModels/{deployed}:predict")
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
    schemathesis.openapi.media_type(f"image/{kind}", st.integers(1, 30).map(partial(picture, kind)))
# The right arrays depend on the path: `map_case` makes them, with this number of rows.
for media_type in ("application/x-npy", "application/x-npz", "application/octet-stream"):
    schemathesis.openapi.media_type(
        media_type, st.integers(1, 5).map((media_type + " {}").format).map(str.encode)
    )


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Correct a request that is valid except for the rules that the schema cannot express."""
    if case.path.endswith("/infer") and case.headers and case.headers.get(LENGTH) == "0":
        # A model of text takes any body as a sentence.
        del case.headers[LENGTH]
    if case.meta is not None and case.meta.generation.mode.is_positive and case.path in TEXT_PATHS:
        # No model of the bundled ones gives vectors or scores of texts.
        case.body = {**case.body, "model": "nobody"}
        case._record_starting_state()
        return case
    if case.meta is not None and case.meta.generation.mode.is_positive and case.path in PLATFORM_PATHS:
        # The server has several models, and these paths name none.
        case.body = {"model": "nobody", "inputs": [0]}
        case._record_starting_state()
        return case
    is_predict = case.path.startswith(("/predict", "/expla")) or case.path.endswith(
        ("/infer", ":predict", ":explain")
    )
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
        # Only the path of the model itself documents its inputs.
        case.path_parameters["model"] = "nobody"
    # Files are bytes, and schemathesis would take them for faults made on purpose.
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
    """Sentences, or token ids and a mask of the same shape, with ids that the model knows."""
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
    """Ids of words, with one row per element of `data`."""
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
    """A body of `/v2` that is all JSON, whatever its media type."""
    tensor = {"name": name, "datatype": "FP32", "shape": rows.shape, "data": rows.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def mended(tensor: Any, row: tuple[int, ...]) -> Any:
    """A tensor of `/v2` whose `data` fills its `shape`; any other value unchanged."""
    if not isinstance(tensor, dict):
        return tensor
    data = tensor["data"]
    if data and isinstance(data[0], list):
        return {**tensor, "shape": [len(data), *row]}
    rows = len(data) // prod(row)
    return {**tensor, "data": data[: rows * prod(row)], "shape": [rows, *row]}
