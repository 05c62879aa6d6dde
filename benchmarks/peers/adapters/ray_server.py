"""Ray Serve: one deployment with `@serve.batch`, tuned as its guide to throughput says."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

import ray
from ray import serve
from shared import DELAY_MS, Model, arguments
from starlette.requests import Request
from starlette.responses import Response

given = arguments()


@serve.deployment(
    num_replicas=given.workers,
    max_ongoing_requests=given.queue or 512,
    max_queued_requests=given.queue or -1,
    ray_actor_options={"num_cpus": 0},
    logging_config={"enable_access_log": False, "log_level": "ERROR"},
)
class Predict:
    """The model in replicas."""

    def __init__(self, file: Path, kind: str) -> None:
        self._model = Model(file, kind)

    @serve.batch(max_batch_size=given.rows, batch_wait_timeout_s=DELAY_MS / 1000)
    async def predict(self, bodies: list[bytes]) -> list[bytes]:
        """One run for the batch."""
        return self._model.answers(bodies)

    async def __call__(self, request: Request) -> Response:
        """A request, which becomes part of a batch."""
        return Response(await self.predict(await request.body()), media_type="application/json")


ray.init(
    include_dashboard=False, num_cpus=4, object_store_memory=200 * 2**20, _temp_dir=tempfile.gettempdir(),
    logging_level="ERROR", configure_logging=False,
)  # fmt: skip
serve.start(http_options={"host": "127.0.0.1", "port": given.port})
sys.stdout.flush()
serve.run(Predict.bind(given.model, given.kind), blocking=True)
