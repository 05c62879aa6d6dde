"""A model on a GPU that can be exchanged for a better one between two batches.

Experimental: it exchanges CUDA for TensorRT, which has not yet run on a GPU. Nothing here is needed on the
CPU, and nothing here imports a GPU library.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferpool.backends.base import DeviceModel, Rejection
from inferpool.errors import Reason, Verdict
from inferpool.tensors import Tensors


class HotSwapModel(DeviceModel):
    """Runs one model until another is offered, and the other from the next batch on.

    The attributes that the first model shows, such as its signature and its nodes on the CPU, stay.
    """

    def __init__(self, model: DeviceModel) -> None:
        self.signature = model.signature
        self.form = model.form
        self.max_rows = model.max_rows
        self.cpu_nodes = model.cpu_nodes
        self.rounding = model.rounding
        self.can_capture = model.can_capture
        self._model = model
        self._offered: DeviceModel | None = None
        self._empty_outputs: Tensors | None = None

    @property
    def graphs(self) -> Verdict:  # type: ignore[override]
        """Whether the model that runs now replays CUDA graphs, or why not."""
        return self._model.graphs

    def offer(self, model: DeviceModel, empty_outputs: Tensors | None) -> None:
        """Let `model`, which has the same signature and gives equal answers, run the next batch. Only once.

        `empty_outputs` answers requests without rows, for which a TensorRT engine has no shape. With None,
        the model runs them.
        """
        self._empty_outputs = empty_outputs
        self._offered = model

    def rejection(self, error: Exception) -> Rejection | None:
        """Why the input is to blame for `error`; None if it is not known to be."""
        return self._model.rejection(error)

    def stop_run(self, thread: int) -> None:
        """Ask the run of a thread to end."""
        self._model.stop_run(thread)

    def lost(self) -> Reason | None:
        """Why this process cannot use the device any more; None if it can."""
        return self._model.lost()

    def begin(self) -> None:
        """Get the model ready on the calling thread."""
        self._model.begin()

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the inputs as they are; raises whatever the model raises."""
        if self._empty_outputs is not None and not all(tensor.size for tensor in inputs.values()):
            return {name: self._empty_outputs[name] for name in outputs or self._empty_outputs}
        return self._chosen_model().run(inputs, outputs)

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Run the rows of all parts, padded to `rows` rows; raises whatever the model raises."""
        return self._chosen_model().run_padded(parts, rows, outputs)

    def close(self) -> None:
        """Close the model that runs, and the one that was offered and never ran."""
        for model in filter(None, (self._model, self._offered)):
            model.close()

    def _chosen_model(self) -> DeviceModel:
        if self._offered is not None:
            replaced, self._model, self._offered = self._model, self._offered, None
            replaced.close()
        return self._model
