"""The command with faults on demand: a file names the function that raises at its next call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.servers import run

FAULT_FILE = "TESTS_FAULT_FILE"
"""The variable that names the file."""
PREDICT = "inferpool.http.predict"
FUNCTIONS = {
    "native": "inferpool.http.native.api:NativeApi.encode",
    "v2": "inferpool.http.v2.api:V2Api.encode",
    "v1": "inferpool.http.v1.api:V1Api.encode",
    "openai": "inferpool.http.openai.api:TextApi.encode",
    "labels": "inferpool.codecs.labels:LabelsCodec._of_row",
    "refusal": "inferpool.http.native.api:NativeApi.problem",
    "timing": f"{PREDICT}.predictor:server_timing",
    "head": "inferpool.http.connection.exchange:whole_response",
    "large head": "inferpool.http.connection.exchange:response_head",
    "large answer": f"{PREDICT}.predictor:Predictor.respond",
    "budget": f"{PREDICT}.budget:ByteBudget.release",
    "count": f"{PREDICT}.request_metrics:RequestMetrics.succeeded",
    "cache": f"{PREDICT}.response_cache:VersionCache.keep",
    "cached": f"{PREDICT}.response_cache:VersionCache.find",
    "sharing": f"{PREDICT}.single_flight:SingleFlight._land",
    "shadow": f"{PREDICT}.shadow_copies:ShadowCopies._take",
    "access log": "inferpool.observe.logs:AccessLog.put",
    "deadline": f"{PREDICT}.predictor:Predictor.expire",
    "queue": "inferpool.pool.router:PoolRouter.offer",
    "gate": "inferpool.http.access.gate:Gate.check",
}
"""The functions by the names of their faults."""


def patch() -> None:
    """Let each function raise when the file has the name of its fault."""
    file = Path(os.environ[FAULT_FILE])
    for fault, target in FUNCTIONS.items():
        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, name, _faulty(file, fault, getattr(owner, name)))


def _faulty(file: Path, fault: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if file.read_text() == fault:
            file.write_text("")
            raise RuntimeError(f"fault of {fault}")
        return function(*arguments, **options)

    return call


if __name__ == "__main__":
    run("faults")
