"""The model without a server: the best that loops over one session reach, as a line of JSON.

Tried are one to `--cores` threads that call the session at the same time, each call with one thread or all
cores shared among them, and batches of 1 to 16 rows; the best goes on for `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime

BATCHES = (1, 2, 4, 8, 16)
TRIAL_S = 1.0


def loop(session: onnxruntime.InferenceSession, callers: int, rows: int, seconds: float) -> float:
    """Rows a second of so many threads, each with the next batch as soon as the last is done."""
    tensor = session.get_inputs()[0]
    batch = np.random.default_rng(0).random((rows, *tensor.shape[1:])).astype(np.float32)
    done = [0] * callers
    session.run(None, {tensor.name: batch})
    began = time.perf_counter()

    def call(number: int) -> None:
        while time.perf_counter() - began < seconds:
            session.run(None, {tensor.name: batch})
            done[number] += rows

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    tried = []
    for callers in sorted({1, given.cores}):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = given.cores // callers
        session = onnxruntime.InferenceSession(str(given.model), options, providers=["CPUExecutionProvider"])
        tried += [(loop(session, callers, rows, TRIAL_S), callers, rows, session) for rows in BATCHES]
    _, callers, rows, session = max(tried, key=lambda entry: entry[0])
    rate = loop(session, callers, rows, given.seconds)
    print(json.dumps({"rows_per_s": rate, "callers": callers, "batch": rows}))


main()
