"""What is served is held: a version answers the same whatever becomes of its files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests import onnx_models
from tests.conftest import Serve


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_weights_that_are_written_over_or_cut_change_nothing(
    serve: Serve, tmp_path: Path, engine: str
) -> None:
    size = 4096
    version = tmp_path / "repository" / "adds" / "1"
    onnx_models.save(onnx_models.add_external("weights.bin", size), version)
    weights = version / "weights.bin"
    weights.write_bytes(np.full(size, 2, np.float32).tobytes())
    server = serve(tmp_path / "repository", "--engine", engine)
    server.wait_loaded()

    def answer() -> float:
        reply = server.post("/predict/adds", json={"inputs": [[1.0] * size]})
        assert reply.status_code == 200
        (value,) = set(reply.json()["outputs"]["y"][0])
        return float(value)

    assert answer() == 3
    with weights.open("r+b") as opened:
        opened.write(np.full(size, 5, np.float32).tobytes())
    assert answer() == 3
    os.truncate(weights, 100)
    assert answer() == 3
    (version / "model.onnx").write_bytes(b"")
    weights.unlink()
    assert answer() == 3
    assert not any("ended" in line["message"] for line in server.log)
    assert server.stop() == 0
