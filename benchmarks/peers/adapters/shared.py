"""Shared by all adapters: arguments, the model, bodies to rows, and outputs to bodies.

Adapters run in their peer's environment, as scripts, and import nothing of this project but this file.
Needs numpy, onnxruntime and orjson; pillow for pictures and tokenizers for text.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import orjson

ARGUMENTS = "PEER_ARGUMENTS"
DELAY_MS = 1
"""Milliseconds that peers with a timer wait for a batch to fill: the least that Mosec accepts."""


def arguments() -> argparse.Namespace:
    """The harness's arguments: the model, the kind of bodies, the port, and how much may run at a time.

    The first process takes it from its command line, those that it starts from its environment.
    """
    words = os.environ.setdefault(ARGUMENTS, "\n".join(sys.argv[1:])).split("\n")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kind", choices=("json", "v2", "binary", "jpeg", "text"), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="the largest batch")
    parser.add_argument("--workers", type=int, required=True, help="sessions that run at the same time")
    parser.add_argument(
        "--queue", type=int, default=0, help="requests that may wait, 0 for the peer's default"
    )
    return parser.parse_args(words)


def free_port() -> int:
    """Return a free port for a second listener of a peer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Model:
    """The model file in ONNX Runtime on the CPU, with one thread for an operator, the same for every peer."""

    def __init__(self, file: Path, kind: str) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._kind = kind
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        self.shape: list[int] = self._session.get_inputs()[0].shape[1:]
        if kind == "text":
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(file.parents[1] / "tokenizer.json"))
            self._tokenizer.enable_padding()
            self._tokenizer.enable_truncation(128)

    def decode(self, body: bytes) -> Any:
        """A body's one row, of shape (1, …), or its text."""
        if self._kind == "json":
            return self.row(orjson.loads(body)["inputs"])
        if self._kind == "binary":
            return np.frombuffer(body, np.float32).reshape(1, *self.shape)
        if self._kind == "jpeg":
            return picture(body)
        return body.decode()

    def row(self, nested: Any) -> np.ndarray:
        """Nested lists to an array of FP32."""
        return np.array(nested, np.float32)

    def run(self, rows: list[Any]) -> np.ndarray:
        """The outputs of several decoded bodies, in one run, (rows, …)."""
        if self._kind == "text":
            return self._run_texts(rows)
        return self.run_batch(rows[0] if len(rows) == 1 else np.concatenate(rows))

    def run_batch(self, batch: np.ndarray) -> np.ndarray:
        """The first output of a batch."""
        output: np.ndarray = self._session.run(None, {self._inputs[0]: batch})[0]
        return output

    def answers(self, bodies: list[bytes]) -> list[bytes]:
        """Bodies of requests to bodies of answers, by one run."""
        outputs = self.run([self.decode(body) for body in bodies])
        return [encode(outputs[number : number + 1]) for number in range(len(bodies))]

    def _run_texts(self, texts: list[str]) -> np.ndarray:
        encodings = self._tokenizer.encode_batch(texts)
        feeds = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        arrays = {name: np.array(feeds[name], np.int64) for name in self._inputs}
        output: np.ndarray = self._session.run(None, arrays)[0]
        return output


def picture(body: bytes) -> np.ndarray:
    """A JPEG to channels first, 0 to 1, (1, 3, height, width)."""
    pixels = np.asarray(open_image()(io.BytesIO(body)).convert("RGB"))
    return scaled(pixels)


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Pixels of 0 to 255, (height, width, 3), to FP32 of 0 to 1, (1, 3, height, width)."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) * np.float32(1 / 255)


@functools.cache
def open_image() -> Any:
    """Pillow, where pictures are asked for."""
    from PIL import Image

    return Image.open


def encode(outputs: np.ndarray) -> bytes:
    """An array to the JSON that all adapters answer."""
    return orjson.dumps({"outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
