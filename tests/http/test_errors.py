"""Every error has its code, and costs other requests nothing."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from inferpool.codecs.image_container import MEDIA_TYPES
from inferpool.http.problems import STATUSES

from tests.chaos import inferpool_chaos as chaos
from tests.conftest import MakeChaos, Serve, chaos_in
from tests.server import Server

ROW = {"inputs": {"features": [[1.0] * 10]}}


class Limited(NamedTuple):
    """A server, and the pipe for which the load of its model `slow` waits."""

    server: Server
    gate: Path


@pytest.fixture(scope="module")
def still_loading(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Limited:
    """A server with a slow model `m`, for bodies of up to 10,000 bytes; `bad` and `broken` fail."""
    folder = tmp_path_factory.mktemp("limited")
    gate = folder / "gate"
    os.mkfifo(gate)
    make = chaos_in(folder / "models")
    make("m", run_ms=20)
    make("good")
    make("bad", config="nonsense = 1\n")
    repository = make("slow", gate=str(gate))
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    server = module_serve(repository, "--max-body-bytes", "10000", wait=False)
    for name in ("good", "m"):
        server.wait_for(f"{name}/1 is ready")
    return Limited(server, gate)


@pytest.fixture(scope="module")
def limited(still_loading: Limited) -> Server:
    return still_loading.server


def code_of(answer: httpx.Response) -> str:
    """Check that the response is a problem, and return its code."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == answer.status_code == STATUSES[problem["code"]]
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem["code"]


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/predict/diabetes", b"not json", "malformed_body"),
        ("/predict/diabetes", b"", "malformed_body"),
        ("/predict/diabetes", b"[1]", "malformed_body"),
        ("/predict/diabetes", b'{"inputs": [[NaN]]}', "malformed_body"),
        ("/predict/diabetes", b"{}", "invalid_input"),
        ("/predict/diabetes", {"inputs": {"feature": [[1.0] * 10]}}, "invalid_input"),
        ("/predict/diabetes", {"inputs": {"features": [[1.0] * 9]}}, "invalid_input"),
        ("/predict/diabetes", {"inputs": {"features": [[1.0] * 10, [1.0] * 9]}}, "invalid_input"),
        ("/predict/diabetes", {"inputs": {"features": [["1"] * 10]}}, "invalid_input"),
        ("/predict/diabetes", {**ROW, "outputs": ["nothing"]}, "invalid_input"),
        ("/predict/diabetes", {**ROW, "parameters": {"timeout": 1}}, "invalid_input"),
        ("/predict/diabetes", {**ROW, "model": "digits"}, "invalid_input"),
        ("/predict", ROW, "invalid_input"),
        ("/predict/nobody", ROW, "model_not_found"),
        ("/predict", {**ROW, "model": "nobody"}, "model_not_found"),
        ("/predict/diabetes/2", ROW, "version_not_found"),
        ("/predict/diabetes/stable", ROW, "version_not_found"),
        ("/predict/diabetes/1/more", ROW, "version_not_found"),
    ],
)
def test_a_bad_request_is_answered_with_its_code(bundled: Server, path: str, body: object, code: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = bundled.post(path, content=raw, headers={"content-type": "application/json"})
    assert code_of(answer) == code
    assert bundled.post("/predict/diabetes", json=ROW).status_code == 200


def test_an_error_says_which_tensor_what_came_and_what_was_expected(bundled: Server) -> None:
    answer = bundled.post("/predict/diabetes", json={"inputs": {"features": [[1.0] * 9]}})
    problem = answer.json()
    assert problem["tensor"] == "features"
    assert problem["expected"] == [-1, 10]
    assert problem["got"] == [1, 9]


def test_wrong_methods_and_unknown_paths_have_codes(bundled: Server) -> None:
    answer = bundled.get("/predict/diabetes")
    assert code_of(answer) == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    answer = bundled.post("/models", json={})
    assert code_of(answer) == "method_not_allowed"
    assert answer.headers["allow"] == "GET, HEAD"
    assert code_of(bundled.get("/nowhere")) == "not_found"
    assert code_of(bundled.get("/models/nobody")) == "model_not_found"
    assert code_of(bundled.get("/models/diabetes/9")) == "version_not_found"


def test_a_format_that_the_model_does_not_take_is_refused(bundled: Server) -> None:
    answer = bundled.post("/predict/diabetes", content=b"x", headers={"content-type": "image/png"})
    assert code_of(answer) == "unsupported_media_type"
    assert "application/json" in answer.json()["expected"]
    answer = bundled.post("/predict/digits", content=b"no picture", headers={"content-type": "image/png"})
    assert code_of(answer) == "malformed_body"
    for other in (b"P6\n" + b"\0" * 30, b"\0\0\1\0" + b"\0" * 30, b"\0\0\0\x1cftypheic" + b"\0" * 30):
        answer = bundled.post("/predict/digits", content=other, headers={"content-type": "image/png"})
        assert code_of(answer) == "unsupported_media_type"
        assert answer.json()["expected"] == [*MEDIA_TYPES]
    answer = bundled.post("/predict/digits", files={"image": ("7.png", b"no picture")})
    assert code_of(answer) == "malformed_body"
    assert answer.json()["field"] == "image"
    answer = bundled.post("/predict/diabetes", content=b"x", headers={"content-encoding": "br"})
    assert code_of(answer) == "unsupported_media_type"


def test_strings_instead_of_numbers_are_named(bundled: Server) -> None:
    file = io.BytesIO()
    np.save(file, np.array([["a"] * 10]))
    headers = {"content-type": "application/x-npy"}
    answer = bundled.post("/predict/diabetes", content=file.getvalue(), headers=headers)
    assert code_of(answer) == "invalid_input"
    assert answer.json()["detail"] == 'tensor "features" has the datatype BYTES, the model takes FP32'
    assert answer.json()["got"] == "BYTES"


def test_a_model_that_is_loading_or_has_failed_is_not_ready(still_loading: Limited) -> None:
    """The first test of this server."""
    server, gate = still_loading
    loading = server.post("/predict/slow", json={"inputs": [[1, 2, 3, 4]]})
    assert code_of(loading) == "not_ready"
    assert int(loading.headers["retry-after"]) >= 1
    waiting = server.get("/v2/health/ready")
    assert waiting.status_code == server.get("/health/ready").status_code == 503
    assert waiting.json() == {"ready": False, "error": "the server is loading", "code": "not_ready"}
    assert server.get("/health/live").status_code == 200
    assert server.get("/v2/health/live").json() == {"live": True}
    assert server.get("/health").json()["status"] == "loading"
    chaos.open_gate(gate)
    server.wait_loaded()
    assert code_of(server.post("/predict/broken", json={"inputs": [[1]]})) == "not_ready"
    assert server.get("/health/ready").status_code == 200
    assert server.get("/v2/health/ready").json() == {"ready": True}
    health = server.get("/health").json()
    assert health["status"] == "degraded"
    assert "broken/1" in health["problems"]


def test_a_short_timeout_is_not_rounded_to_zero(limited: Server) -> None:
    body = {"inputs": [[1.0] * 4]}
    assert limited.post("/predict/m", json=body).status_code == 200
    for timeout in ("0.001", "0.9", "15"):
        answer = limited.post("/predict/m", json=body, headers={"x-timeout-ms": timeout})
        assert answer.status_code == 504
        assert " 0.0 ms" not in answer.json()["detail"]


def test_a_refused_request_counts_for_the_model_that_it_names(limited: Server) -> None:
    """Alerts see requests to a model that cannot answer; names of unknown models do not become labels."""
    server = limited
    row = {"inputs": [[1.0] * 4]}
    for path, body in (
        ("/predict/bad", row),
        ("/predict", {**row, "model": "bad"}),
        ("/v2/models/bad/infer", {"inputs": []}),
    ):
        assert server.post(path, json=body).status_code == 503
    assert server.post("/predict/good/7", json=row).status_code == 404
    assert server.post("/predict/nobody", json=row).status_code == 404
    assert server.post("/predict", json={**row, "model": "no one"}).status_code == 404
    for name, status, count in (("bad", 503, 3), ("good", 404, 1), ("", 404, 2), ("", 503, 0)):
        counted = server.metric("requests_total", model=name, version="", code=str(status))
        assert counted == count, (name, status)
    assert server.metric("request_duration_seconds_count", model="bad", version="") == 3
    assert "nobody" not in server.get("/metrics").text


def test_a_refused_request_without_a_model_counts_for_the_only_model(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("bad", config="nonsense = 1\n"))
    assert server.post("/predict", json={"inputs": [[1.0] * 4]}).status_code == 503
    assert server.metric("requests_total", model="bad", version="", code="503") == 1


def test_timeouts_must_be_numbers(bundled: Server) -> None:
    for text in ("soon", "-1", "0", "nan", "inf"):
        answer = bundled.post("/predict/diabetes", json=ROW, headers={"x-timeout-ms": text})
        assert code_of(answer) == "invalid_input", text


def test_bodies_are_capped_before_and_after_decompression(limited: Server) -> None:
    small = json.dumps({"inputs": [[1.0] * 4]}).encode()
    large = small + b" " * 20_000
    assert code_of(limited.post("/predict/m", content=large)) == "body_too_large"

    def chunks() -> object:
        yield from (large[start : start + 1000] for start in range(0, len(large), 1000))

    assert code_of(limited.post("/predict/m", content=chunks())) == "body_too_large"
    packed = gzip.compress(b" " * 20_000)
    v2 = limited.post("/v2/models/m/infer", content=packed, headers={"content-encoding": "gzip"})
    assert (v2.status_code, v2.json()["code"]) == (413, "body_too_large")
    for encoding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        headers = {"content-encoding": encoding}
        assert limited.post("/predict/m", content=compress(small), headers=headers).status_code == 200
        assert (
            code_of(limited.post("/predict/m", content=compress(large), headers=headers)) == "body_too_large"
        )
        cut = limited.post("/predict/m", content=compress(small)[:-4], headers=headers)
        assert code_of(cut) == "malformed_body"


def test_a_connection_is_usable_after_a_refusal(limited: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", limited.port, timeout=60)
    for body, status in ((b"x" * 20_000, 413), (b"nonsense", 400), (b'{"inputs": [[1, 2, 3, 4]]}', 200)):
        connection.request("POST", "/predict/m", body)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.close()


def test_a_model_that_raises_fails_that_request_alone(limited: Server) -> None:
    bad = limited.post("/predict/m", json={"inputs": [[chaos.RAISE, 0, 0, 0]]})
    assert code_of(bad) == "model_failed"
    assert "marked" not in bad.text, "the response hides the cause"
    good = limited.post("/predict/m", json={"inputs": [[1.0, 2.0, 3.0, 4.0]]})
    assert good.json()["outputs"]["sum"] == chaos.expected(np.array([[1.0, 2.0, 3.0, 4.0]])).tolist()
