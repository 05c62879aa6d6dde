"""Measures the time to turn request bodies into tensors, beside bare parsers: `python benchmarks/wire.py`.

Times are microseconds on one thread: medians of `--runs` runs, each the mean of many calls. The last
column is the ratio to the line that it names.
"""

from __future__ import annotations

import argparse
import platform
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np
import orjson
from inferpool.tensors import ANY, Signature, TensorSpec
from inferpool.wire import json_numbers
from inferpool.wire.native_json import encode_response, parse_request
from inferpool.wire.v2_request import parse_infer
from inferpool.wire.v2_response import encode_infer

IMAGE = Signature((TensorSpec("x", "FP32", (ANY, 3, 224, 224)),), (TensorSpec("y", "FP32", (ANY, 10)),))
ROW = Signature((TensorSpec("x", "FP32", (ANY, 64)),), (TensorSpec("y", "FP32", (ANY, 10)),))
POINTS = Signature((TensorSpec("x", "FP32", (ANY, 3)),), ())
Case = tuple[str, Callable[[], object], str | None]


C, ORJSON = "the module in C", "orjson"


@contextmanager
def reading_by(way: str) -> Iterator[None]:
    before = json_numbers.AVAILABLE
    json_numbers.AVAILABLE = way == C
    try:
        yield
    finally:
        json_numbers.AVAILABLE = before


def pixels_of(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return pixels with five digits, like those that clients send."""
    return np.random.default_rng(0).random(shape).round(5)


def predict_body(*shape: int) -> bytes:
    body = {"model": "m", "inputs": {"x": pixels_of(*shape)}}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def read(body: bytes, signature: Signature, way: str) -> Callable[[], object]:
    def forced() -> object:
        with reading_by(way):
            return parse_request(body).tensors(signature)

    return forced


def cases() -> list[Case]:
    image, points, row = predict_body(1, 3, 224, 224), predict_body(50_176, 3), predict_body(1, 64)
    ways = [*([C] if json_numbers.AVAILABLE else []), ORJSON]
    listed: list[Case] = [
        (f"image, {len(image):,} bytes of JSON: orjson + numpy, nothing checked", lambda: bare(image), None)
    ]
    listed += [(f"image: by {way}", read(image, IMAGE, way), "image, ") for way in ways]
    listed.append((f"50,176 points, {len(points):,} bytes: orjson alone", lambda: orjson.loads(points), None))
    listed += [(f"points: by {way}", read(points, POINTS, way), "50,176 points") for way in ways]
    listed.append((f"row of 64, {len(row)} bytes: orjson + numpy, nothing checked", lambda: bare(row), None))
    listed += [(f"row of 64: by {way}", read(row, ROW, way), "row of 64, ") for way in ways]
    few = predict_body(8, 64)
    listed += [(f"8 rows, {len(few)} bytes: by {way}", read(few, ROW, way), None) for way in ways]
    pixels = pixels_of(1, 3, 224, 224).astype(np.float32)
    for where, pad in (("aligned", 0), ("not aligned", 1)):
        body, length = infer_body(pixels, pad)
        listed.append((f"image, {pixels.nbytes:,} bytes in binary form, {where}", infer(body, length), None))
    copied = np.empty_like(pixels)
    listed.append(("image: one copy of its bytes", lambda: np.copyto(copied, pixels), None))
    scores = {"y": pixels_of(1, 10).astype(np.float32)}
    listed += [
        ("answer of 10 scores: encode_response", lambda: encode_response("m", "1", "i", scores, None), None),
        ("answer of 10 scores: encode_infer, JSON", lambda: answer(scores, False), None),
        ("answer of 10 scores: encode_infer, binary", lambda: answer(scores, True), None),
    ]
    return listed


def bare(body: bytes) -> object:
    return np.array(orjson.loads(body)["inputs"]["x"], dtype=np.float32)


def answer(outputs: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]], binary: bool) -> object:
    return encode_infer("m", "1", "i", outputs, None, binary, IMAGE)


def infer(body: bytes, length: int) -> Callable[[], object]:
    return lambda: parse_infer(body, length).tensors(IMAGE)


def infer_body(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]], misaligned: int
) -> tuple[bytes, int]:
    """Return a binary body whose tensor starts `misaligned` bytes after a multiple of 8 in memory."""
    parameters = {"binary_data_size": pixels.nbytes}
    entry = {"name": "x", "datatype": "FP32", "shape": pixels.shape, "parameters": parameters}
    header = orjson.dumps({"inputs": [entry]})
    header += b" " * (-len(header) % 8 + misaligned)
    return header + pixels.tobytes(), len(header)


def measure(call: Callable[[], object], runs: int) -> float:
    timer = timeit.Timer(call)
    once = timer.timeit(3) / 3
    count = max(1, int(0.1 / once))
    return median(timer.timeit(count) / count for _ in range(runs)) * 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--runs", type=int, default=7, help="runs of each case (default 7, at least 5)")
    runs = max(5, options.parse_args().runs)
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, orjson {orjson.__version__},", end=" "
    )
    print(f"medians of {runs} runs, µs\n")
    found: dict[str, float] = {}
    for name, call, base in cases():
        found[name] = measure(call, runs)
        against = next((time for other, time in found.items() if base and other.startswith(base)), None)
        ratio = f"{found[name] / against:6.2f} ×" if against else ""
        print(f"{name:<72}{found[name]:>10.1f}  {ratio}")


if __name__ == "__main__":
    main()
