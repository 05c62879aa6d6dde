"""LitServe: its batching, one API server.

It is asked for its fast queue over ZeroMQ, which 0.2.19 hands on under a name that nothing reads.

Annotations are not postponed here: LitServe compares them with types.
"""

from typing import Any

import litserve
from fastapi import Request, Response
from shared import DELAY_MS, Model, arguments, encode

given = arguments()


class Predict(litserve.LitAPI):
    """The model in worker processes."""

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        self._model = Model(given.model, given.kind)

    def decode_request(self, request: Request) -> Any:
        """JSON or a form to a row."""
        if given.kind in ("binary", "jpeg"):
            return self._model.decode(request["file"].file.read())
        return self._model.row(request["inputs"]) if given.kind == "json" else request["inputs"][0]

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Return the list: the model takes a list."""
        return inputs

    def predict(self, rows: list[Any]) -> Any:
        """One run for the batch."""
        return self._model.run(rows)

    def unbatch(self, outputs: Any) -> list[Any]:
        """A slice a request."""
        return [outputs[number : number + 1] for number in range(len(outputs))]

    def encode_response(self, output: Any) -> Response:
        """The body of an answer."""
        return Response(encode(output), media_type="application/json")


if __name__ == "__main__":
    server = litserve.LitServer(
        Predict(max_batch_size=given.rows, batch_timeout=DELAY_MS / 1000),
        accelerator="cpu",
        workers_per_device=given.workers,
        fast_queue=True,
        timeout=30,
    )
    server.run(
        host="127.0.0.1",
        port=given.port,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
