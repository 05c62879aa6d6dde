"""Forms with files, and compressed requests and responses."""

from __future__ import annotations

import base64
import gzip
import io
import json
import platform
import resource
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Serve
from tests.onnx_models import write_identity
from tests.server import Server

PICTURE = (ROOT / "models/digits/samples/7.png").read_bytes()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_a_form_has_a_file_for_each_tensor(serve: Serve, tmp_path: Any) -> None:
    write_identity(tmp_path / "models", "both", ["FP32", "INT64"])
    server = serve(tmp_path / "models")
    second = np.arange(20).reshape(2, 10)
    first = (second / 4).astype(np.float32)
    files = {"x0": ("a.npy", npy(first), "application/x-npy"), "x1": ("b.npy", npy(second))}
    answer = server.post("/predict/both", files=files)
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"] == {"y0": first.tolist(), "y1": second.tolist()}
    missing = server.post("/predict/both", files={"x0": npy(first)})
    assert missing.json()["tensor"] == "x1"
    unknown = server.post("/predict/both", files={"x0": npy(first), "z": npy(first)})
    assert unknown.json()["tensor"] == "z"
    twice = server.post("/predict/both", files=[("x0", npy(first)), ("x0", npy(first))])
    assert twice.json()["code"] == "invalid_input"


@pytest.mark.parametrize("field", ["image", "file"])
def test_a_form_may_hold_a_picture(bundled: Server, field: str) -> None:
    answer = bundled.post("/predict/digits", files={field: ("seven.png", PICTURE, "image/png")})
    alone = bundled.post("/predict/digits", content=PICTURE, headers={"content-type": "image/png"})
    assert answer.json()["predictions"] == alone.json()["predictions"]
    two = bundled.post("/predict/digits", files=[(field, PICTURE), ("second", PICTURE)])
    assert two.json()["predictions"] == 2 * alone.json()["predictions"]
    broken = bundled.post("/predict/digits", files=[(field, PICTURE), ("second", PICTURE[:80])])
    assert broken.json()["detail"].startswith("picture 1: ")
    twice = bundled.post(
        "/predict/digits", files=[("image", npy(np.zeros((1, 1, 8, 8)))), ("second", PICTURE)]
    )
    assert twice.json()["code"] == "invalid_input"


def test_json_may_hold_pictures(bundled: Server) -> None:
    text = base64.b64encode(PICTURE).decode()
    alone = bundled.post("/predict/digits", content=PICTURE, headers={"content-type": "image/png"})
    expected = alone.json()["predictions"]
    url = f"data:image/png;base64,{text}"
    for inputs, rows in ((text, 1), ([text, url], 2), ({"image": [url]}, 1)):
        assert (
            bundled.post("/predict/digits", json={"inputs": inputs}).json()["predictions"] == rows * expected
        )
        named = bundled.post("/predict", json={"model": "digits", "inputs": inputs})
        assert named.json()["predictions"] == rows * expected
    refused = bundled.post("/predict/digits", json={"inputs": ["http://127.0.0.1/secret.png"]})
    assert (refused.status_code, refused.json()["index"]) == (422, [0])
    beside = bundled.post("/predict/digits", json={"inputs": {"image": url, "other": [1]}})
    assert "send a form" in beside.json()["detail"]


def test_memory_of_a_picture_in_short_json_is_counted(serve: Serve, models: Path, cache_dir: Path) -> None:
    """A few kilobytes of base64 may be a picture that takes half a gigabyte."""
    file = io.BytesIO()
    Image.new("1", (7000, 7000)).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert len(text) < 20_000
    server = serve(
        models / "digits", "--in-flight-bytes", str(64 * 2**20), "--memory-bytes", str(256 * 2**20)
    )
    for path, body in (("/predict/digits", {"inputs": [text]}), ("/predict", {"inputs": text})):
        for spaces in (0, 40_000, 200_000):
            content = json.dumps(body) + " " * spaces
            answer = server.post(path, content=content, headers={"content-type": "application/json"})
            assert answer.json()["code"] == "body_too_large", answer.text


def test_the_unregistered_name_of_jpeg_is_taken_too(bundled: Server) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(PICTURE)).convert("L").save(file, "JPEG")
    answers = [
        bundled.post("/predict/digits", content=file.getvalue(), headers={"content-type": kind}).json()
        for kind in ("image/jpeg", "image/jpg")
    ]
    assert answers[0]["predictions"] == answers[1]["predictions"]


@pytest.mark.parametrize(
    ("content", "boundary", "code"),
    [
        (b"", "boundary=x", "malformed_body"),
        (b"no form", "boundary=x", "malformed_body"),
        (b"--x\r\n\r\n\r\n--x--", "charset=utf-8", "malformed_body"),
        (b"--x\r\n\r\n\r\n--x--", "boundary=" + "x" * 1000, "malformed_body"),
        (b"--x\r\nA: b\r\n\r\ncut off", "boundary=x", "malformed_body"),
        (b"--x\r\n\r\nno name\r\n--x--", "boundary=x", "invalid_input"),
        (b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\n\r\n--x--", "boundary=x", "malformed_body"),
        (b"--x\r\n\r\n\r\n" * 2000 + b"--x--", "boundary=x", "malformed_body"),
        (b"--x--", "boundary=x", "invalid_input"),
    ],
)
def test_an_invalid_form_is_refused(bundled: Server, content: bytes, boundary: str, code: str) -> None:
    headers = {"content-type": f"multipart/form-data; {boundary}"}
    answer = bundled.post("/predict/diabetes", content=content, headers=headers)
    assert answer.json()["code"] == code, answer.text


def test_a_compressed_body_may_have_several_members_and_name_identity(bundled: Server) -> None:
    body = json.dumps({"inputs": [[0.5] * 10]}).encode()
    one = gzip.compress(body)
    several = gzip.compress(body[:10]) + gzip.compress(b"") + gzip.compress(body[10:])
    for content, codings in (
        (one, ["gzip"]), (several, ["gzip"]), (several, ["X-Gzip"]), (one, ["gzip, identity"]),
        (one, ["identity", "gzip"]), (one, ["gzip", "identity"]),
        (zlib.compress(body), ["identity,,Deflate"]),
        (body, ["identity"]), (body, ["identity, identity"]), (body, [""]),
    ):  # fmt: skip
        headers = [("content-encoding", coding) for coding in codings]
        answer = bundled.post("/predict/diabetes", content=content, headers=headers)
        assert answer.status_code == 200, (codings, answer.text)
    for content, codings, status in (
        (one, ["gzip, gzip"], 415), (one, ["gzip", "br"], 415), (one + b"more", ["gzip"], 400),
        (one + one[:-1], ["gzip"], 400), (2 * zlib.compress(body), ["deflate"], 400),
        (one + 5000 * gzip.compress(b""), ["gzip"], 400),
    ):  # fmt: skip
        headers = [("content-encoding", coding) for coding in codings]
        answer = bundled.post("/predict/diabetes", content=content, headers=headers)
        assert answer.status_code == status, (codings, answer.text)


def test_a_line_of_csv_that_is_no_row_is_refused(bundled: Server) -> None:
    """A wrong cell must not turn the only row into names, and the answer into one of no rows."""
    line = b"1,2,3,4,5,6,7,8,9,x"
    answer = bundled.post("/predict/diabetes", content=line, headers={"content-type": "text/csv"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
    assert '"9", "x"' in answer.json()["detail"]
    assert '"features"' in answer.json()["detail"]
    headers = {"content-type": "text/csv; header=present"}
    answer = bundled.post("/predict/diabetes", content=line, headers=headers)
    assert answer.json()["outputs"] == {"progression": []}, "a table without rows that says so"


def large(rows: int = 400) -> bytes:
    return json.dumps({"inputs": [[n / 7] * 10 for n in range(rows)]}).encode()


@pytest.mark.parametrize("accept", ["gzip", "gzip, deflate, br", "GZIP;q=0.5", "*"])
@pytest.mark.parametrize("rows", [400, 6000])
def test_a_large_response_is_gzip_if_the_client_accepts_it(bundled: Server, accept: str, rows: int) -> None:
    answers = []
    for encoding in (accept, "identity"):
        with httpx.stream(
            "POST",
            bundled.url + "/predict/diabetes",
            content=large(rows),
            headers={"accept-encoding": encoding, "x-request-id": "a"},
        ) as answer:
            raw = b"".join(answer.iter_raw())
            answers.append((answer.headers.get("content-encoding"), raw))
            assert int(answer.headers["content-length"]) == len(raw)
    (packed_as, packed), (plain_as, plain) = answers
    assert (packed_as, plain_as) == ("gzip", None)
    assert gzip.decompress(packed) == plain
    assert len(packed) < 0.8 * len(plain)


@pytest.mark.parametrize("accept", ["", "identity", "gzip;q=0", "*;q=0", "br", "gzip;q=x"])
def test_a_response_is_not_gzip_if_the_client_does_not_accept_it(bundled: Server, accept: str) -> None:
    answer = bundled.post("/predict/diabetes", content=large(), headers={"accept-encoding": accept})
    assert answer.status_code == 200
    assert "content-encoding" not in answer.headers


def test_a_response_that_is_small_or_does_not_shrink_is_not_compressed(bundled: Server) -> None:
    headers = {"accept-encoding": "gzip"}
    small = bundled.post("/predict/diabetes", content=large(1), headers=headers)
    assert "content-encoding" not in small.headers
    noise = np.random.default_rng(0).uniform(0, 100, (5000, 10)).astype(np.float32)
    arrays = bundled.post(
        "/predict/diabetes",
        content=npy(noise),
        headers={**headers, "accept": "application/x-npy", "content-type": "application/x-npy"},
    )
    assert "content-encoding" not in arrays.headers
    zeros = bundled.post(
        "/predict/diabetes",
        content=npy(np.zeros_like(noise)),
        headers={**headers, "accept": "application/x-npy", "content-type": "application/x-npy"},
    )
    assert zeros.headers["content-encoding"] == "gzip"
    assert np.load(io.BytesIO(zeros.content)).shape == (5000, 1)


def minor_faults(server: Server) -> int:
    """The number of page faults so far of the process that reads requests."""
    return int(Path(f"/proc/{server.web_process()}/stat").read_text().rpartition(")")[2].split()[7])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_the_memory_of_large_bodies_is_reused(bundled: Server) -> None:
    rows = np.zeros((15_000, 10), np.float32)
    headers = {"inference-header-content-length": "0", "accept-encoding": "identity"}

    def ask(count: int) -> None:
        with httpx.Client(timeout=30) as client:
            for _ in range(count):
                answer = client.post(
                    f"{bundled.url}/v2/models/diabetes/infer", content=rows.tobytes(), headers=headers
                )
                assert answer.status_code == 200

    ask(30)
    before = minor_faults(bundled)
    ask(50)
    pages = rows.nbytes // resource.getpagesize()
    assert (minor_faults(bundled) - before) / 50 < pages / 4
