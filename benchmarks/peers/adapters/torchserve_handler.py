"""The handler that TorchServe runs for `torchserve_server.py`: one of its own around the ONNX file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shared import Model, encode

SETTINGS = "PEER_TORCHSERVE"


class Handler:
    """The model in a worker process."""

    def initialize(self, context: Any) -> None:
        """Load the file that the environment names."""
        settings = json.loads(os.environ[SETTINGS])
        self._kind = settings["kind"]
        self._model = Model(Path(settings["file"]), self._kind)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """A batch that TorchServe has put together: JSON comes parsed, text as text, all else as bytes."""
        outputs = self._model.run([self._row(request["body"]) for request in data])
        return [encode(outputs[number : number + 1]) for number in range(len(data))]

    def _row(self, body: Any) -> Any:
        if self._kind == "json":
            return self._model.row(body["inputs"])
        return body if isinstance(body, str) else self._model.decode(bytes(body))
