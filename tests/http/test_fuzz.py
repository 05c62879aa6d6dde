"""A body with faults gets the response that its fault explains, and costs other clients nothing."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import random
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from inferpool.http.problems import STATUSES

from tests.clients import Client, Reply, with_clients
from tests.conftest import ROOT
from tests.server import Server, wait_until
from tests.wire.test_mutations import mutated

CASES = int(os.environ.get("FUZZ_CASES", "5000"))
"""Requests in all; `scripts/test --full` sends 100,000."""
CLIENTS = 8
SEED = int(os.environ.get("FUZZ_SEED", "4"))
HANGS_S = 30
GROWTH_BYTES = 2 * 2**20
"""The memory of a server that keeps nothing may differ by this between two moments."""
NOT_FAULTS = (429, 503, 504)
LENGTH = "inference-header-content-length"
ROWS = np.random.default_rng(0).uniform(0, 100, (2, 10)).astype(np.float32)
PICTURE = (ROOT / "models/digits/samples/7.png").read_bytes()


class Kind(NamedTuple):
    """A valid request of one kind, whose body is mutated."""

    path: str
    body: bytes
    headers: dict[str, str]


def saved(save: object, *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save(stream, *arrays, **named)  # type: ignore[operator]
    return stream.getvalue()


def form(*files: tuple[str, bytes]) -> bytes:
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode() + content
        for name, content in files
    ]
    return b"\r\n".join([*parts, b"--edge--\r\n"])


def infer_header(**tensor: object) -> bytes:
    tensor = {"name": "features", "datatype": "FP32", "shape": [2, 10], **tensor}
    outputs = [{"name": "progression", "parameters": {"classification": 1, "binary_data": True}}]
    parameters = {"timeout": 10_000_000, "priority": 1, "binary_data_output": False}
    return json.dumps({"id": "a", "inputs": [tensor], "outputs": outputs, "parameters": parameters}).encode()


NATIVE_API = json.dumps(
    {
        "model": "diabetes",
        "version": 1,
        "id": "é",
        "inputs": {"features": ROWS.tolist()},
        "outputs": ["progression"],
        "parameters": {"timeout_ms": 10_000, "priority": 1},
    }
).encode()
BINARY_HEADER = infer_header(parameters={"binary_data_size": ROWS.nbytes})
NPY = saved(np.save, ROWS)
INFER = "/v2/models/diabetes/infer"
FORM = {"content-type": "multipart/form-data; boundary=edge"}
KINDS = {
    "JSON": Kind("/predict", NATIVE_API, {}),
    "JSON for a path": Kind("/predict/diabetes", json.dumps({"inputs": ROWS.tolist()}).encode(), {}),
    "large JSON": Kind("/predict/diabetes", json.dumps({"inputs": [[1.5] * 10] * 40}).encode(), {}),
    "gzip": Kind("/predict", gzip.compress(NATIVE_API), {"content-encoding": "gzip"}),
    "v2 JSON": Kind(INFER, infer_header(data=ROWS.tolist()), {}),
    "v2 binary": Kind(INFER, BINARY_HEADER + ROWS.tobytes(), {LENGTH: str(len(BINARY_HEADER))}),
    "v2 raw": Kind(INFER, ROWS.tobytes(), {LENGTH: "0"}),
    "npy": Kind("/predict/diabetes", NPY, {"content-type": "application/x-npy"}),
    "npz": Kind(
        "/predict/diabetes",
        saved(np.savez_compressed, features=ROWS),
        {"content-type": "application/x-npz", "accept": "application/x-npz"},
    ),
    "form": Kind("/predict/diabetes", form(("features", NPY)), FORM),
    "form with a picture": Kind("/predict/digits", form(("image", PICTURE)), FORM),
    "picture": Kind("/predict/digits", PICTURE, {"content-type": "image/png"}),
}


ODD_VALUES: list[object] = [
    *(None, True, False, 0, -1, 1.5, 3.0, 2**63, -(2**70), 1e308, 1e-320),
    *("", "x", "\0", "é" * 40, "9" * 30, "FP16", "BYTES", "progression", "features", "digits"),
    *([], {}, [[]], [0] * 33, [2, 10], [0, 10], [1, 2, 10], [2**40, 2**40], {"x": []}, {"name": "features"}),
]


def distorted(document: object, chance: random.Random) -> object:
    """`document` with one of its values, at any depth, replaced, removed or duplicated."""
    if not isinstance(document, dict | list) or not document or chance.random() < 0.15:
        return chance.choice(ODD_VALUES)
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = chance.choice(keys)
    changed = document.copy()
    if chance.random() < 0.15:
        del changed[key]  # type: ignore[arg-type]
    elif chance.random() < 0.1:
        if isinstance(changed, dict):
            changed[chance.choice(["inputs", "x", "", "shape", "shared_memory_region"])] = changed[key]
        else:
            changed.append(changed[key])
    else:
        changed[key] = distorted(changed[key], chance)  # type: ignore[index]
    return changed


def faulty(kind: Kind, chance: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body of this kind with a fault, and the headers for it."""
    headers, body = kind.headers, kind.body
    tail = b""
    if headers.get(LENGTH, "0") != "0":
        body, tail = body[: int(headers[LENGTH])], body[int(headers[LENGTH]) :]
    if body.startswith(b"{") and chance.random() < 0.5:
        body = json.dumps(distorted(json.loads(body), chance)).encode()
        return body + tail, {**headers, LENGTH: str(len(body))} if tail else headers
    if LENGTH in headers and chance.random() < 0.1:
        headers = {**headers, LENGTH: chance.choice(["-1", "1", "7", "99999999999", "x", ""])}
    return mutated(body + tail, chance), headers


def explained(kind: str, reply: Reply, body: bytes) -> int:
    """Check that the fault of the body explains the status, and return the status."""
    case = f"{kind}: {body!r} is answered {reply.status} {reply.body!r}"
    assert reply.status < 500 or reply.status in NOT_FAULTS, case
    assert reply.headers.get("connection") != "close", case
    assert "x-request-id" in reply.headers, case
    if reply.status != 200:
        error = json.loads(reply.body)
        assert STATUSES[error["code"]] == reply.status, case
    return reply.status


async def ask(port: int, cases: int, seed: int) -> Counter[tuple[str, int]]:
    """Send `cases` mutated bodies; returns how often each kind got each status."""
    counts: Counter[tuple[str, int]] = Counter()

    async def work(client: Client, number: int) -> None:
        chance = random.Random(seed * CLIENTS + number)
        names = list(KINDS)
        for index in range(cases // CLIENTS):
            name = names[index % len(names)]
            body, headers = faulty(KINDS[name], chance)
            async with asyncio.timeout(HANGS_S):
                reply = await client.post(KINDS[name].path, body, headers)
            counts[name, explained(name, reply, body)] += 1

    await with_clients(port, CLIENTS, work)
    return counts


@pytest.mark.timeout(600)
def test_mutated_bodies_are_answered_and_leave_nothing_behind(bundled: Server) -> None:
    for name, (path, body, headers) in KINDS.items():
        answer = bundled.post(path, content=body, headers=headers)
        assert answer.status_code == 200, f"{name}: {answer.text}"
    counts = asyncio.run(ask(bundled.port, CASES // 2, SEED))
    before = bundled.resident_bytes()
    counts += asyncio.run(ask(bundled.port, CASES // 2, SEED + 1))
    assert counts.total() >= CASES - 2 * CLIENTS
    for name in KINDS:
        good = counts[name, 200]
        refused = sum(count for (kind, _), count in counts.items() if kind == name) - good
        assert refused > good / 20, f"{name}: {counts}"
    # What bursts have freed goes back a moment later.
    wait_until(lambda: bundled.resident_bytes() - before < GROWTH_BYTES, "the memory of before")
    assert bundled.metric("in_flight_requests") == 0
    assert bundled.get("/health/ready").status_code == 200
