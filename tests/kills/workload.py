"""The models of the suite, and requests to them whose answers are known row by row."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import onnxruntime
from inferpool.tensors import Array
from onnx import TensorProto, helper

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Reply
from tests.engine.test_trials import LEAST, info, save, write_gru, write_ratio
from tests.server import ROOT

KNOWN_ROWS: Final = 200
"""Distinct rows of each network whose answers are computed alone, before the server starts."""
POISONED: Final = 6
"""Models of the misbehaving backend. Few requests poison each, because a version that crashes often fails."""
LARGE_SHARE: Final = 0.02
"""Share of the wide requests that have megabytes."""
MOST_JSON: Final = 4000
"""A tensor with more elements is sent in a binary format."""
_DATATYPES: Final = {"FP32": "<f4", "INT64": "<i8", "FP64": "<f8"}

Answers: TypeAlias = Mapping[str, Array]


class Request(NamedTuple):
    """A request and what its answer must be.

    Attributes:
        path: the path of the URL.
        headers: the header fields.
        body: the body.
        expected: the outputs by name, each the concatenation of what its rows give alone.
    """

    path: str
    headers: Mapping[str, str]
    body: bytes
    expected: Answers

    def fault(self, reply: Reply) -> str | None:
        """What is wrong with the outputs of an answer with the status 200; None if nothing is."""
        outputs = _decode(reply)
        for name, right in self.expected.items():
            found = outputs.get(name, outputs.get(""))
            if found is None:
                return f"the output {name} is missing"
            if found.shape != right.shape:
                return f"{name} has the shape {found.shape}, not {right.shape}"
            # A network's sums depend on the batch in their last bits; everything else is exact.
            slack = 1e-4 if name == "logits" else 0.0
            wrong = ~np.isclose(found, right, rtol=0.0, atol=slack).reshape(len(right), -1).all(axis=1)
            if wrong.any():
                return f"{name} has {wrong.sum()} wrong rows of {len(right)}"
        return None


class Workload:
    """Makes requests; one generator of random numbers for each client."""

    def __init__(self, repository: Path, seed: int = 0) -> None:
        """Write the models into `repository`."""
        self._makers: list[tuple[float, Callable[[np.random.Generator], Request]]] = []
        rng = np.random.default_rng(seed)
        self._add_digits(repository, rng)
        self._add_gru(repository, rng)
        self._add_wide(repository)
        self._add_ratio(repository)
        self._add_chaos(repository)
        self._shares = np.cumsum([share for share, _ in self._makers])

    def make(self, rng: np.random.Generator) -> Request:
        """A request that a well-behaved client sends."""
        index = int(np.searchsorted(self._shares, rng.uniform(0, self._shares[-1]), side="right"))
        return self._makers[index][1](rng)

    def _add_digits(self, repository: Path, rng: np.random.Generator) -> None:
        shutil.copytree(ROOT / "models" / "digits", repository / "digits")
        session = onnxruntime.InferenceSession(str(repository / "digits" / "1" / "model.onnx"))
        rows = rng.integers(0, 256, (KNOWN_ROWS, 1, 8, 8)).astype(np.float32)
        right = np.concatenate([session.run(["logits"], {"image": row[None]})[0] for row in rows])

        def make(rng: np.random.Generator) -> Request:
            chosen = rng.integers(0, KNOWN_ROWS, rng.integers(1, 9))
            return _request(rng, "digits", {"image": rows[chosen]}, {"logits": right[chosen]})

        self._makers.append((0.35, make))

    def _add_gru(self, repository: Path, rng: np.random.Generator) -> None:
        write_gru(repository)
        session = onnxruntime.InferenceSession(str(repository / "gru" / "1" / "model.onnx"))
        known = []
        for _ in range(KNOWN_ROWS):
            row = rng.integers(0, 20, (1, int(rng.integers(1, 13))))
            known.append((row, session.run(["logits"], {"ids": row})[0]))

        def make(rng: np.random.Generator) -> Request:
            row, right = known[rng.integers(0, KNOWN_ROWS)]
            count = int(rng.integers(1, 5))
            return _request(
                rng, "gru", {"ids": np.repeat(row, count, 0)}, {"logits": np.repeat(right, count, 0)}
            )

        self._makers.append((0.25, make))

    def _add_wide(self, repository: Path) -> None:
        save(
            repository,
            "wide",
            [helper.make_node("Mul", ["x", "three"], ["m"]), helper.make_node("Add", ["m", "one"], ["y"])],
            [info("x", TensorProto.FLOAT, ["rows", "columns"])],
            [info("y", TensorProto.FLOAT, ["rows", "columns"])],
            three=np.array(3, np.float32), one=np.array(1, np.float32),
        )  # fmt: skip

        def make(rng: np.random.Generator) -> Request:
            if rng.random() < LARGE_SHARE:
                shape = (int(rng.integers(1, 5)), int(rng.integers(20_000, 300_000)))
            else:
                shape = (int(rng.integers(1, 9)), int(rng.choice([8, 64, 500, 5_000])))
            x = rng.integers(0, 1 << 20, shape).astype(np.float32)
            return _request(rng, "wide", {"x": x}, {"y": x * 3 + 1})

        self._makers.append((0.2, make))

    def _add_ratio(self, repository: Path) -> None:
        write_ratio(repository)

        def make(rng: np.random.Generator) -> Request:
            a = rng.integers(0, 1 << 40, rng.integers(1, 6))
            b = rng.integers(1, 1000, len(a))
            return _request(rng, "ratio", {"a": a, "b": b}, {"y": a // b})

        self._makers.append((0.08, make))

    def _add_chaos(self, repository: Path) -> None:
        for number in range(POISONED):
            folder = repository / f"sums-{number}" / "1"
            folder.mkdir(parents=True)
            (folder / "model.chaos").write_text(json.dumps({"run_ms": 2}))

        def make(rng: np.random.Generator) -> Request:
            x = rng.integers(0, 1000, (rng.integers(1, 6), 4)).astype(np.float32)
            model = f"sums-{rng.integers(0, POISONED)}"
            return _request(rng, model, {"x": x}, {"sum": chaos.expected(x)})

        self._makers.append((0.12, make))


def crash(number: int) -> Request:
    """A request that ends its engine with SIGSEGV."""
    return _json_request(f"sums-{number}", {"x": np.array([[chaos.CRASH, 0, 0, 0]])}, {})


def take_memory(number: int, mebibytes: int) -> Request:
    """A request that takes so much memory."""
    x = np.array([[chaos.HUNGRY, mebibytes, 0, 0]])
    return _json_request(f"sums-{number}", {"x": x}, {"sum": chaos.expected(x)})


def divide() -> Request:
    """A request that ends its engine with SIGFPE."""
    return _json_request("ratio", {"a": np.array([LEAST]), "b": np.array([-1])}, {})


def _request(rng: np.random.Generator, model: str, inputs: Mapping[str, Array], right: Answers) -> Request:
    """A request in one of the wire formats."""
    size = sum(tensor.size for tensor in inputs.values())
    formats: Sequence[str] = ["v2"] if size > MOST_JSON else ["json", "json", "v2"]
    if len(inputs) == 1:
        formats = [*formats, "npy"]
    chosen = formats[int(rng.integers(0, len(formats)))]
    if chosen == "json":
        return _json_request(model, inputs, right)
    if chosen == "v2":
        return binary_request(model, inputs, right)
    stream = io.BytesIO()
    np.save(stream, next(iter(inputs.values())))
    headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    return Request(f"/predict/{model}", headers, stream.getvalue(), right)


def _json_request(model: str, inputs: Mapping[str, Array], right: Answers) -> Request:
    body = json.dumps({"inputs": {name: tensor.tolist() for name, tensor in inputs.items()}}).encode()
    return Request(f"/predict/{model}", {"content-type": "application/json"}, body, right)


def binary_request(model: str, inputs: Mapping[str, Array], right: Answers) -> Request:
    """A request of the Open Inference Protocol with binary tensors."""
    tensors: list[dict[str, Any]] = []
    data = b""
    for name, tensor in inputs.items():
        datatype = "INT64" if tensor.dtype == np.int64 else "FP32"
        raw = tensor.astype(_DATATYPES[datatype]).tobytes()
        tensors.append(
            {
                "name": name,
                "datatype": datatype,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(raw)},
            }
        )
        data += raw
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in right]
    head = json.dumps({"inputs": tensors, "outputs": outputs}).encode()
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }
    return Request(f"/v2/models/{model}/infer", headers, head + data, right)


def _decode(reply: Reply) -> dict[str, Array]:
    """The outputs of an answer by name; the only one of an npy body has the name ""."""
    if reply.headers["content-type"] == "application/x-npy":
        return {"": np.load(io.BytesIO(reply.body))}
    length = int(reply.headers.get("inference-header-content-length", "0"))
    if not length:
        found = json.loads(reply.body)["outputs"]
        return {name: np.array(value) for name, value in found.items()}
    outputs = {}
    at = length
    for each in json.loads(reply.body[:length])["outputs"]:
        size = each["parameters"]["binary_data_size"]
        array = np.frombuffer(reply.body[at : at + size], _DATATYPES[each["datatype"]])
        outputs[each["name"]] = array.reshape(each["shape"])
        at += size
    return outputs
