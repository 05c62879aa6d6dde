"""Answers of many megabytes, made of small requests, do not hold up the server."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import numpy as np

from tests.conftest import Serve
from tests.http.predict.costly_bodies import NPY, zipped
from tests.server import Server

ROWS = 40_000
TOO_MANY_ROWS = 100_000
PAUSE_S = 0.01
"""Pause between two looks at `/health/live`."""
LIVE_S = 2.0
LIVE_SHARE = 0.5
"""Made on the event loop, the answer would hold up `/health/live` for longer, and for most of the request."""


def rows(count: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((count, 1, 8, 8), np.uint8))
    return zipped(file.getvalue())


def watch(server: Server, took: list[float], over: threading.Event) -> None:
    while not over.wait(PAUSE_S):
        began = time.perf_counter()
        assert server.get("/health/live").status_code == 200
        took.append(time.perf_counter() - began)


def classes(count: int) -> tuple[bytes, dict[str, str]]:
    part = (
        b'{"inputs":[{"name":"image","datatype":"FP32","shape":[%d,1,8,8],'
        b'"parameters":{"binary_data_size":%d}}],'
        b'"outputs":[{"name":"logits","parameters":{"classification":10}}]}' % (count, 256 * count)
    )
    return part + bytes(256 * count), {"inference-header-content-length": str(len(part))}


def post_watched(server: Server, path: str, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
    """Post a body; fails if `/health/live` takes long meanwhile."""
    took: list[float] = []
    over = threading.Event()
    thread = threading.Thread(target=watch, args=(server, took, over))
    thread.start()
    began = time.perf_counter()
    try:
        return server.post(path, content=body, headers=headers, timeout=None)
    finally:
        request_s = time.perf_counter() - began
        over.set()
        thread.join()
        assert max(took) < max(LIVE_S, LIVE_SHARE * request_s)


def test_a_large_native_answer_is_right_and_health_is_answered_meanwhile(bundled: Server) -> None:
    answer = post_watched(bundled, "/predict/digits", rows(ROWS), NPY)
    assert answer.status_code == 200, answer.text[:500]
    fields = answer.json()
    (logits,) = fields["outputs"].values()
    assert len(logits) == len(fields["predictions"]) == ROWS
    alone = bundled.post("/predict/digits", content=rows(1), headers=NPY).json()
    assert fields["predictions"][0] == fields["predictions"][-1] == alone["predictions"][0]


def test_a_large_classification_is_right_and_health_is_answered_meanwhile(bundled: Server) -> None:
    path = "/v2/models/digits/infer"
    answer = post_watched(bundled, path, *classes(ROWS // 4))
    assert answer.status_code == 200, answer.text[:500]
    (output,) = answer.json()["outputs"]
    assert output["shape"] == [ROWS // 4, 10]
    body, headers = classes(1)
    alone = bundled.post(path, content=body, headers=headers).json()
    assert output["data"][:10] == output["data"][-10:] == alone["outputs"][0]["data"]


def test_an_answer_that_would_fill_the_memory_is_refused_before_it_runs(serve: Serve, models: Path) -> None:
    server = serve(models / "digits", "--in-flight-bytes", "20000000")
    answer = server.post("/predict/digits", content=rows(TOO_MANY_ROWS), headers=NPY)
    assert answer.status_code == 422, answer.text[:500]
    assert answer.json()["expected"] < answer.json()["got"]
    assert "send fewer rows at a time" in answer.json()["detail"]
    assert server.metric("batches_total") == 0
