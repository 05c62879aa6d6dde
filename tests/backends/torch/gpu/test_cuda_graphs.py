"""Recorded runs of PyTorch: the same class as on a GPU, with a recorder that runs anew what it has recorded.

Like CUDA's it reads and writes the same memory each time; what CUDA itself does is not pretended.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inferpool.backends.base import LoadOptions, TensorHint
from inferpool.backends.torch import program, script
from inferpool.backends.torch.backend import PyTorchBackend
from inferpool.backends.torch.gpu.cuda_graphs import Recording, record_obstacle
from inferpool.backends.torch.gpu.device_model import _KEPT_SHAPES, TorchDeviceModel
from inferpool.backends.torch.model import InputTensors, OutputTree, Runnable, StartedModel, start
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.gpu.graph_capture import capture
from inferpool.tensors import Array, TensorSpec
from torch import nn

from tests.backends.torch.networks import Chosen, digits, save_exported, save_scripted

X = TensorSpec("x", "FP32", (-1, 1, 8, 8))
SCORES = TensorSpec("scores", "FP32", (-1, 10))


class FakeRecording:
    def __init__(self, run: Callable[[], OutputTree], fault: str) -> None:
        self.run = run
        self.fault = fault
        self.leaves = run()
        self.replays = 0
        self.dropped = False

    def replay(self) -> OutputTree:
        assert not self.dropped
        self.replays += 1
        if self.fault != "stale":
            for path, leaf in self.run().items():
                self.leaves[path].copy_(leaf)
        return self.leaves

    def drop(self) -> None:
        self.dropped = True


class FakeRecorder:
    """`fault` makes it fail: "refuses" raises, "stale" replays without reading the inputs again."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.made: list[FakeRecording] = []
        self.entered = 0

    def enter(self) -> None:
        self.entered += 1

    def record(self, run: Callable[[], OutputTree]) -> Recording:
        if self.fault == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.made.append(FakeRecording(run, self.fault))
        return self.made[-1]


def on_fake(
    recorder: FakeRecorder, forward: Any = None, operations: tuple[str, ...] = ()
) -> TorchDeviceModel:
    network = digits()

    def plain(feeds: InputTensors) -> OutputTree:
        return {(): network(feeds["x"])}

    runnable = Runnable(forward or plain, (X,), "a form", copies=False, operations=operations)
    return TorchDeviceModel(StartedModel(runnable, {(): SCORES}), "cpu", recorder)


def images(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).random((count, 1, 8, 8)).astype(np.float32)


def test_every_batch_size_is_replayed_with_the_networks_outputs() -> None:
    """Whatever ran before; a row among others, a full bucket, and rows of several requests."""
    recorder = FakeRecorder()
    model = on_fake(recorder)
    assert model.can_capture
    assert model.graphs == (False, "none were asked for")
    capture(model, BatchBuckets((1, 4, 8)), [])
    assert model.graphs.ok
    assert len(recorder.made) == 3
    before = [recording.replays for recording in recorder.made]
    network = digits()
    kept = []
    for seed, counts in enumerate(((8,), (3, 2), (1,), (4,), (2, 1), (8,))):
        parts = [{"x": images(count, 10 * seed + index)} for index, count in enumerate(counts)]
        whole = np.concatenate([part["x"] for part in parts])
        with torch.inference_mode():
            want = network(torch.from_numpy(whole)).numpy()
        bucket = BatchBuckets((1, 4, 8)).bucket_for(len(whole))
        assert bucket is not None
        kept.append((model.run_padded(parts, bucket)["scores"], want))
    for got, want in kept:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    after = [recording.replays for recording in recorder.made]
    assert sum(after) - sum(before) == len(kept)


def test_other_shapes_run_without_a_recording() -> None:
    recorder = FakeRecorder()
    model = on_fake(recorder)
    capture(model, BatchBuckets((4,)), [])
    replays = recorder.made[0].replays
    rows = images(4, 0)
    np.testing.assert_allclose(
        model.run({"x": rows})["scores"], model.run_padded([{"x": rows}], 6)["scores"], atol=1e-5
    )
    assert recorder.made[0].replays == replays


def test_a_recording_keeps_its_memory_while_other_shapes_run() -> None:
    """Buffers make room for others, except the buffers of a recording, which has their addresses."""

    def forward(feeds: InputTensors) -> OutputTree:
        return {(): feeds["x"].sum((1, 2, 3))[:, None].repeat(1, 10)}

    model = on_fake(FakeRecorder(), forward)
    capture(model, BatchBuckets((4,)), [])
    [(buffers, _)] = model._recordings.values()
    alive = weakref.ref(buffers["x"].device)
    for count in range(1, _KEPT_SHAPES + 2):
        model.run_padded([{"x": images(1, count)}], 4 + count)
    gc.collect()
    assert alive() is not None
    rows = images(3, 7)
    answer = model.run_padded([{"x": rows}], 4)["scores"]
    np.testing.assert_allclose(answer[:, 0], rows.sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refuses", "a run could not be captured: operation not permitted when stream is capturing"),
        ("stale", 'output "scores" differs by'),
    ],
)
def test_a_failed_or_wrong_recording_is_dropped_with_a_reason(fault: str, reason: str) -> None:
    recorder = FakeRecorder(fault)
    model = on_fake(recorder)
    capture(model, BatchBuckets((1, 8)), [])
    assert model.graphs.reason.startswith(reason)
    assert all(recording.dropped for recording in recorder.made)
    rows = images(3, 1)
    with torch.inference_mode():
        want = digits()(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(model.run_padded([{"x": rows}], 8)["scores"], want, rtol=1e-5, atol=1e-5)


def test_close_drops_the_recordings() -> None:
    recorder = FakeRecorder()
    model = on_fake(recorder)
    capture(model, BatchBuckets((1, 8)), [])
    model.close()
    assert [recording.dropped for recording in recorder.made] == [True, True]
    assert not model._buffers
    assert not model._recordings


def test_begin_prepares_the_thread_for_recordings_elsewhere() -> None:
    recorder = FakeRecorder()
    model = on_fake(recorder)
    model.begin()
    assert recorder.entered == 1


def test_a_run_that_waits_for_the_device_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations of both kinds of file reach the model that would record them."""
    found: list[str | None] = []

    def spy(runnable: Runnable, *rest: Any) -> Any:
        found.append(record_obstacle(runnable.operations))
        return start(runnable, *rest)

    for module in (program, script):
        monkeypatch.setattr(module, "start", spy)
    described = LoadOptions(trusted=True, inputs=(TensorHint("x", "FP32", (-1, 4)),))
    for network in (Chosen(), nn.Linear(4, 4)):
        file = save_exported(tmp_path / "m.pt2", network, torch.rand(3, 4))
        PyTorchBackend().load(file, LoadOptions(trusted=True))
    PyTorchBackend().load(save_scripted(tmp_path / "m.pt", Chosen()), described)
    reason = "aten::nonzero waits for the device in the middle of a run"
    assert found == [reason, None, reason]
    model = on_fake(FakeRecorder(), operations=("aten::add", "aten::nonzero"))
    assert (model.can_capture, model.graphs) == (False, (False, reason))
