"""MLServer: adaptive batching, inference in the web server's process unless several workers are asked for."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from shared import DELAY_MS, arguments, free_port

given = arguments()
folder = Path(tempfile.mkdtemp())
(folder / "settings.json").write_text(
    json.dumps({
        "host": "127.0.0.1", "http_port": given.port, "grpc_port": free_port(), "metrics_port": free_port(),
        # With workers, MLServer passes requests to processes. A single model is faster without.
        "parallel_workers": given.workers if given.workers > 1 else 0,
        "gzip_enabled": False, "debug": False,
    })
)  # fmt: skip
(folder / "model-settings.json").write_text(
    json.dumps({
        "name": "model", "implementation": "mlserver_runtime.Predict",
        "max_batch_size": given.rows, "max_batch_time": DELAY_MS / 1000,
        "parameters": {"extra": {"file": str(given.model), "kind": given.kind}},
    })
)  # fmt: skip
os.environ["PYTHONPATH"] = str(Path(__file__).parent)
command = str(Path(sys.executable).with_name("mlserver"))
os.execv(command, [command, "start", str(folder)])
