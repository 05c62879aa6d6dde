"""Models that run another model pass on what the pool asks of it when a run fails or has to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from inferpool.backends.base import DeviceModel, LoadedModel, Rejection
from inferpool.pool.buckets import BatchBuckets, BucketedModel
from inferpool.pool.hot_swap import HotSwapModel
from inferpool.repository.load.gpu.graph_capture import CapturingModel
from inferpool.tensors import Signature, Tensors


class Inner(DeviceModel):
    """Remembers what it is asked."""

    signature = Signature((), ())

    def __init__(self) -> None:
        self.stopped: list[int] = []

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        raise NotImplementedError

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        raise NotImplementedError

    def rejection(self, error: Exception) -> Rejection | None:
        return Rejection("Gather", str(error))

    def stop_run(self, thread: int) -> None:
        self.stopped.append(thread)

    def lost(self) -> str | None:
        return "it is lost"

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "around",
    [
        lambda inner: BucketedModel(inner, BatchBuckets((1, 2))),
        HotSwapModel,
        lambda inner: CapturingModel(inner, None, []),
    ],
    ids=["buckets", "hot swap", "capturing"],
)
def test_it_passes_on_what_is_asked_of_a_failed_run(around: Callable[[Inner], LoadedModel]) -> None:
    inner = Inner()
    model = around(inner)
    assert model.lost() == "it is lost"
    assert model.rejection(ValueError("no such row")) == Rejection("Gather", "no such row")
    model.stop_run(7)
    assert inner.stopped == [7]
