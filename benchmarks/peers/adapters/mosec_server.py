"""Mosec: one stage, the model in worker processes, orjson instead of the default json."""

from __future__ import annotations

import sys
from typing import Any

from shared import DELAY_MS, Model, arguments, encode

given = arguments()
# Mosec reads the command line when it is imported.
sys.argv = [
    sys.argv[0],
    *("--address", "127.0.0.1", "--port", str(given.port), "--timeout", "30000", "--log-level", "error"),
    *(("--capacity", str(given.queue)) if given.queue else ()),
]

from mosec import Server, Worker  # noqa: E402 (after its command line is set)


class Predict(Worker):
    """The model, in a process of its own."""

    def __init__(self) -> None:
        self._model = Model(given.model, given.kind)

    def deserialize(self, data: bytes) -> Any:
        """The row of a body."""
        return self._model.decode(data)

    def forward(self, data: list[Any]) -> Any:
        """One run for the batch."""
        outputs = self._model.run(data)
        return [outputs[number : number + 1] for number in range(len(data))]

    def serialize(self, data: Any) -> bytes:
        """The body of an answer."""
        return encode(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Predict, num=given.workers, max_batch_size=given.rows, max_wait_time=DELAY_MS, timeout=30
    )
    server.run()
