"""TorchServe: one model in a folder that is its archive, batches by its frontend."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from shared import DELAY_MS, arguments, free_port

given = arguments()
here = Path(__file__).parent
store = Path(tempfile.mkdtemp())
archive = store / "model"
(archive / "MAR-INF").mkdir(parents=True)
for name in ("torchserve_handler.py", "shared.py"):
    shutil.copy(here / name, archive)
(archive / "MAR-INF" / "MANIFEST.json").write_text(
    json.dumps({
        "runtime": "python", "archiverVersion": "0.12.0",
        "model": {"modelName": "model", "modelVersion": "1.0", "handler": "torchserve_handler.py"},
    })
)  # fmt: skip
model = {
    "1.0": {
        "defaultVersion": True, "marName": "model", "minWorkers": given.workers, "maxWorkers": given.workers,
        "batchSize": given.rows, "maxBatchDelay": DELAY_MS, "responseTimeout": 60,
    }
}  # fmt: skip
properties = {
    "inference_address": f"http://127.0.0.1:{given.port}",
    "management_address": f"http://127.0.0.1:{free_port()}",
    "metrics_address": f"http://127.0.0.1:{free_port()}",
    "enable_envvars_config": "false",
    "disable_token_authorization": "true",
    "disable_system_metrics": "true",
    "install_py_dep_per_model": "false",
    "max_request_size": str(64 * 2**20),
    # The default of 100 refuses the 256 connections of the widest load.
    "job_queue_size": str(given.queue or 1024),
    "load_models": "model",
    "models": json.dumps({"model": model}),
    "vmargs": "-Xmx512m -XX:+UseSerialGC",
}
config = store / "config.properties"
config.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
log = store / "log4j2.xml"
log.write_text('<Configuration status="ERROR"><Loggers><Root level="ERROR"/></Loggers></Configuration>')
os.environ["PEER_TORCHSERVE"] = json.dumps({"file": str(given.model), "kind": given.kind})
os.environ["LOG_LOCATION"] = os.environ["METRICS_LOCATION"] = str(store / "logs")
command = str(Path(sys.executable).with_name("torchserve"))
os.execv(command, [
    command, "--start", "--foreground", "--ncs", "--disable-token-auth", "--log-config", str(log),
    "--ts-config", str(config), "--model-store", str(store),
])  # fmt: skip
