"""A model on a GPU that can be exchanged for a better one between two batches."""

from __future__ import annotations

from collections.abc import Sequence

from inferpool.backends.base import DeviceModel
from inferpool.tensors import Tensors


class HotSwapModel(DeviceModel):
    """Runs one model until another has been offered, and that from the next batch on.

    What is there of the first to be seen (its signature, what runs on the CPU) stays.
    """

    def __init__(self, model: DeviceModel) -> None:
        self.signature = model.signature
        self.form = model.form
        self.max_rows = model.max_rows
        self.cpu_nodes = model.cpu_nodes
        self.rounding = model.rounding
        self.capturable = model.capturable
        self._model = model
        self._offered: DeviceModel | None = None
        self._nothing: Tensors | None = None

    @property
    def graphs(self) -> bool | str:  # type: ignore[override]
        """Of the model that runs now."""
        return self._model.graphs

    def offer(self, model: DeviceModel, nothing: Tensors | None) -> None:
        """Let `model`, which has the same signature and answers alike, run the next batch; only once.

        `nothing` is what is answered where there are no rows, for which an engine has no shape; None leaves
        that to the model.
        """
        self._nothing = nothing
        self._offered = model

    def begin(self) -> None:
        """Get the model ready on this thread."""
        self._model.begin()

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run as it is; raises what the model raises."""
        if self._nothing is not None and not all(tensor.size for tensor in inputs.values()):
            return {name: self._nothing[name] for name in outputs or self._nothing}
        return self._chosen().run(inputs, outputs)

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Run the rows of all parts among `rows`; raises what the model raises."""
        return self._chosen().run_padded(parts, rows, outputs)

    def close(self) -> None:
        """Close what runs, and what has been offered and never ran."""
        for model in filter(None, (self._model, self._offered)):
            model.close()

    def _chosen(self) -> DeviceModel:
        if self._offered is not None:
            gone, self._model, self._offered = self._model, self._offered, None
            gone.close()
        return self._model
