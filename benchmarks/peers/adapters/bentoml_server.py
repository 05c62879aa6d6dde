"""BentoML: a batchable API that takes an array, a picture or a text; started by its own command.

Annotations are not postponed here: BentoML makes its API of them.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from shared import Model, arguments, scaled

given = arguments()


def start() -> None:
    """Become `bentoml serve` of this file."""
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    here = Path(__file__)
    command = [
        str(Path(sys.executable).with_name("bentoml")), "serve", f"{here.stem}:Predict",
        "--working-dir", str(here.parent), "--host", "127.0.0.1", "--port", str(given.port),
        "--api-workers", "1", "--quiet",
    ]  # fmt: skip
    os.execv(command[0], command)


if __name__ == "__main__":
    start()

import bentoml  # noqa: E402 (the command that replaces this process imports it again)

batchable = {"batchable": True, "max_batch_size": given.rows, "max_latency_ms": 30_000}
traffic = {"timeout": 30, **({"max_concurrency": given.queue} if given.queue else {})}
Array = Annotated[np.ndarray, bentoml.validators.DType("float32")]


@bentoml.service(workers=given.workers, traffic=traffic, logging={"access": {"enabled": False}})
class Predict:
    """The model in worker processes."""

    def __init__(self) -> None:
        self._model = Model(given.model, given.kind)

    if given.kind == "jpeg":
        from PIL.Image import Image

        @bentoml.api(**batchable, route="/predict")
        def predict(self, inputs: list[Image]) -> np.ndarray:
            """Pictures of a batch."""
            return self._model.run([scaled(np.asarray(image.convert("RGB"))) for image in inputs])

    elif given.kind == "text":

        @bentoml.api(**batchable, route="/predict")
        def predict(self, inputs: list[str]) -> np.ndarray:
            """Sentences of a batch."""
            return self._model.run(inputs)

    else:

        @bentoml.api(**batchable, route="/predict")
        def predict(self, inputs: Array) -> np.ndarray:
            """Rows of a batch."""
            return self._model.run_batch(inputs)
