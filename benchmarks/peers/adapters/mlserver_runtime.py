"""The runtime that MLServer loads for `mlserver_server.py`: one of its own, with adaptive batching."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from shared import Model


class Predict(MLModel):
    """The model."""

    async def load(self) -> bool:
        """Load the file that the settings name."""
        extra = self.settings.parameters.extra
        self._kind = extra["kind"]
        self._model = Model(Path(extra["file"]), self._kind)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """A batch that MLServer has put together."""
        tensor = payload.inputs[0]
        if self._kind == "text":
            outputs = self._model.run(StringCodec.decode_input(tensor))
        else:
            outputs = self._model.run_batch(NumpyCodec.decode_input(tensor).astype(np.float32, copy=False))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("outputs", outputs)])
