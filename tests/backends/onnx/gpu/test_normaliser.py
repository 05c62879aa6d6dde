"""Pixels that a device normalises: the same bits as the codec's, wherever they run and whatever ran before.

ONNX Runtime's CPU provider runs the same graphs as a card would, from and to the fake library's memory.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from inferpool.backends.cuda.memory import CudaMemory, Memory
from inferpool.backends.onnx.gpu.bound_model import BoundModel
from inferpool.backends.onnx.gpu.lookup_graph import PIXELS, ROWS, lookup_graph
from inferpool.backends.onnx.gpu.normaliser import Normaliser
from inferpool.backends.onnx.signature import read_signature
from inferpool.backends.torch.gpu.device_model import TorchDeviceModel
from inferpool.backends.torch.model import InputTensors, OutputTree, Runnable, StartedModel, to_tensor
from inferpool.backends.torch.signature import TreePath
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.image_config import ImageConfig
from inferpool.errors import OutOfMemory, Verdict
from inferpool.pixel_table import Normalisation
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.gpu.graph_capture import capture
from inferpool.repository.load.gpu.pixel_check import check_pixels
from inferpool.tensors import ANY, Array, Signature, Tensors, TensorSpec
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.backends.cuda.test_memory import library, opened  # noqa: F401 - fixtures
from tests.backends.onnx.gpu.test_cuda_graphs import GraphSession
from tests.backends.torch.gpu.test_cuda_graphs import FakeRecorder
from tests.fake_gpu.host_memory import HostMemory

node = helper.make_node

LAYOUTS = {
    "CHW": ((ANY, 3, 5, 7), {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}),
    "HWC": ((ANY, 5, 7, 3), {"layout": "HWC", "scale": 1.0, "mean": 127.5, "std": 127.5}),
    "grey CHW": ((ANY, 1, 5, 7), {"mode": "grey", "mean": 0.5, "std": 0.5}),
    "grey HW": ((ANY, 5, 7), {"mode": "grey", "layout": "HW", "std": 0.3}),
}
"""The shape of an input for pictures of 5 × 7 pixels, and how they are normalised."""

layouts = pytest.mark.parametrize("layout", LAYOUTS)
datatypes = pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16", "FP64"])


def codec(layout: str, datatype: str = "FP32") -> ImageCodec:
    shape, config = LAYOUTS[layout]
    spec = TensorSpec("x", datatype, shape)
    settings: Any = config
    return ImageCodec(ImageConfig(**settings), Signature((spec,), (spec,)))


def table(layout: str, datatype: str = "FP32") -> Normalisation:
    normalisation = codec(layout, datatype).normalisation
    assert normalisation is not None
    return normalisation


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def both(made: ImageCodec, seeds: Sequence[int]) -> tuple[Array, Array]:
    """Pictures as pixels, and as the codec itself normalises them."""
    files = [picture(seed) for seed in seeds]
    leaving = made.without_normalisation()
    pixels, rows = (np.concatenate([one.decode(file)["x"] for file in files]) for one in (leaving, made))
    return pixels, rows


# The graph.


@layouts
@datatypes
def test_the_lookup_graph_gives_the_bits_of_the_codec(layout: str, datatype: str) -> None:
    """Every value of a pixel among them."""
    made = codec(layout, datatype)
    session = ort.InferenceSession(lookup_graph(table(layout, datatype)), providers=["CPUExecutionProvider"])
    pixels, rows = both(made, range(3))
    assert pixels.dtype == np.uint8
    every = np.repeat(np.resize(np.arange(256, dtype=np.uint8), (8, 5, 7, 1)), pixels.shape[-1], axis=-1)
    for given, expected in ((pixels, rows), (every, table(layout, datatype).normalise(every))):
        [found] = session.run([ROWS], {PIXELS: given})
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()


@layouts
def test_the_lookup_graph_equals_one_written_by_the_onnx_package(layout: str) -> None:
    """Message for message; and its checker finds nothing wrong."""
    normalisation = table(layout)
    shape, first, colours = [5, 7, normalisation.channels], layout == "CHW", "grey" not in layout
    nodes, tensors, last = [], [("values", normalisation.values.reshape(-1))], PIXELS
    if first:
        nodes.append(node("Transpose", [last], ["ordered"], name="Transpose", perm=[0, 3, 1, 2]))
        shape, last = [3, 5, 7], "ordered"
    nodes.append(node("Cast", [last], ["indexes"], name="Cast", to=TensorProto.INT32))
    last = "indexes"
    if colours:
        starts = np.array([0, 256, 512], np.int32)
        tensors.append(("starts", starts.reshape(3, 1, 1) if first else starts))
        nodes.append(node("Add", [last, "starts"], ["table_indexes"], name="Add"))
        last = "table_indexes"
    nodes.append(node("Gather", ["values", last], [ROWS], name="Gather"))
    graph = helper.make_graph(
        nodes,
        "normalise",
        [helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["n", 5, 7, normalisation.channels])],
        [helper.make_tensor_value_info(ROWS, TensorProto.FLOAT, ["n", *shape])],
        [numpy_helper.from_array(array, name) for name, array in tensors],
    )
    expected = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    written = onnx.load_from_string(lookup_graph(normalisation))
    onnx.checker.check_model(written, full_check=True)
    assert written == expected


# In front of a session, in its stream.


def bound(memory: Memory, layout: str, datatype: str = "FP32") -> tuple[BoundModel, GraphSession]:
    """A model that gives its input, and for each row the sum of all, with a normaliser in front of it."""
    normalisation = table(layout, datatype)
    element = {"FP32": TensorProto.FLOAT, "FP16": TensorProto.FLOAT16, "FP64": TensorProto.DOUBLE}[datatype]
    shape: list[str | int | None] = ["n", *normalisation.row_shape]
    zero = numpy_helper.from_array(np.array([0], np.int64), "zero")
    nothing = numpy_helper.from_array(np.array([0], normalisation.values.dtype), "nothing")
    graph = helper.make_graph(
        [
            node("ReduceSum", ["x", "zero"], ["all"], keepdims=1),
            node("Mul", ["x", "nothing"], ["none"]),
            node("Add", ["none", "all"], ["total"]),
            node("Identity", ["x"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info(name, element, shape) for name in ("y", "total")],
        [zero, nothing],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(model.SerializeToString(), providers=providers)
    lookup = ort.InferenceSession(lookup_graph(normalisation), providers=providers)
    streamed = isinstance(memory, CudaMemory)
    wrapped = GraphSession(session, memory)
    normaliser = Normaliser(GraphSession(lookup, memory), normalisation, "cpu", memory, streamed=streamed)
    signature = read_signature(Path("unread"), session)
    bound_model = BoundModel(wrapped, signature, "cpu", memory, {}, streamed=streamed, normaliser=normaliser)
    return bound_model, wrapped


def check(model: Any, made: ImageCodec, count: int, bucket: int, seed: int) -> None:
    """Pictures, in as many parts as there are, and then the same as numbers."""
    pixels, rows = both(made, range(seed, seed + count))
    for tensor in (pixels, rows):
        parts = [{"x": tensor[row : row + 1]} for row in range(count)]
        answer = model.run_padded(parts, bucket)
        assert answer["y"].tobytes() == rows.tobytes()
        # Padding that is no zero would be in it: a pixel of 0 is not 0 to the model.
        total = rows.sum(axis=0, dtype=np.float64)
        np.testing.assert_allclose(answer["total"][0].astype(np.float64), total, rtol=1e-2, atol=1e-2)


@layouts
@pytest.mark.parametrize("datatype", ["FP32", "FP16", "FP64"])
def test_pixels_give_the_outputs_of_normalised_numbers(layout: str, datatype: str) -> None:
    """With any number of rows among more, after whatever ran before."""
    model, _ = bound(HostMemory(), layout, datatype)
    made = codec(layout, datatype)
    for seed, (count, bucket) in enumerate(((3, 4), (1, 1), (8, 8), (2, 4), (1, 8), (4, 4))):
        check(model, made, count, bucket, 10 * seed)
    pixels, rows = both(made, range(3))
    assert model.run({"x": pixels}, ["y"])["y"].tobytes() == rows.tobytes()


def test_pixels_and_model_share_one_stream_and_one_wait(opened: list[str]) -> None:  # noqa: F811
    memory = CudaMemory(3, 13)
    model, session = bound(memory, "CHW")
    check(model, codec("CHW"), 5, 8, 0)
    assert session.synchronous == [False, False]
    assert model._normaliser is not None
    lookup: Any = model._normaliser._session
    assert lookup.synchronous == [False]
    model.close()
    assert memory._library.fakeLeft() == 0


def test_graphs_replay_on_normalised_pixels(opened: list[str]) -> None:  # noqa: F811
    """They were captured with numbers, over the memory that pixels are put into too."""
    model, session = bound(CudaMemory(3, 13), "CHW")
    made = codec("CHW")
    capture(model, BatchBuckets([1, 2, 4]), [{"x": both(made, range(4))[1]}])
    assert model.graphs.ok
    session.runs.clear()
    for seed, (count, bucket) in enumerate(((3, 4), (1, 1), (2, 2), (4, 4), (1, 4))):
        check(model, made, count, bucket, 10 * seed)
    assert {kind for kind, _ in session.runs} == {"replayed"}
    model.close()


def test_a_repeated_shape_of_pixels_allocates_nothing(opened: list[str]) -> None:  # noqa: F811
    memory = CudaMemory(3, 13)
    model, _ = bound(memory, "CHW")
    made = codec("CHW")
    check(model, made, 8, 8, 0)
    before = memory._library.fakeLeft()
    for count, bucket in ((8, 8), (3, 4), (1, 1), (5, 8)):
        check(model, made, count, bucket, count)
    assert memory._library.fakeLeft() == before
    model.close()


def test_out_of_memory_for_pixels_leaves_the_model_usable(opened: list[str]) -> None:  # noqa: F811
    """Its buckets are halved for that, as for numbers."""
    memory = CudaMemory(3, 13)
    model, _ = bound(memory, "CHW")
    made = codec("CHW")
    pixels, rows = both(made, range(4))
    model.run_padded([{"x": rows}], 4)
    model.run_padded([{"x": pixels[:1]}], 1)
    memory._library.fakeRoom(16)
    with pytest.raises(OutOfMemory, match="out of memory"):
        model.run_padded([{"x": pixels}], 4)
    assert model.run_padded([{"x": rows}], 4)["y"].tobytes() == rows.tobytes()
    assert model.run_padded([{"x": pixels[:1]}], 1)["y"].tobytes() == rows[:1].tobytes()
    model.close()


# Whether they are left to it at all.


def test_pixels_are_checked_on_every_batch_size() -> None:
    model, session = bound(HostMemory(), "CHW")
    assert check_pixels(model, table("CHW"), (1, 2, 8), padded=True) is None
    assert check_pixels(model, table("CHW"), (1,), padded=False) is None
    assert len(session.runs) == 8


def test_a_failed_pixel_check_gives_the_reason() -> None:
    model, _ = bound(HostMemory(), "CHW")
    normalisation = table("CHW")
    other = Normalisation("x", "CHW", 5, 7, normalisation.values + np.float32(0.5))
    assert 'output "y" differs by ' in str(check_pixels(model, other, (2,), padded=True))

    class Full:
        normalisation = table("CHW")

        def run(self, *rest: Any) -> int:
            raise OutOfMemory("CUDA: out of memory")

    full: Any = Full()
    model._normaliser = full
    assert check_pixels(model, normalisation, (2,), padded=True) == (
        "with pixels the model raised 'CUDA: out of memory'"
    )
    model.takes_pixels = Verdict(False, "there is no kernel for it")
    assert check_pixels(model, normalisation, (2,), padded=True) == "there is no kernel for it"


# Of PyTorch.


def echo(layout: str, datatype: str, recorder: Any = None) -> tuple[TorchDeviceModel, list[torch.Tensor]]:
    seen: list[torch.Tensor] = []

    def forward(feeds: InputTensors) -> OutputTree:
        seen.append(feeds["x"].clone())
        return {(): feeds["x"].clone()}

    spec = TensorSpec("x", datatype, LAYOUTS[layout][0])
    outputs: dict[TreePath, TensorSpec] = {(): TensorSpec("y", datatype, spec.shape)}
    runnable = Runnable(forward, (spec,), "a form", copies=False)
    started = StartedModel(runnable, outputs)
    return TorchDeviceModel(started, "cpu", recorder, table(layout, datatype)), seen


@layouts
@datatypes
def test_a_pytorch_model_gives_the_same_outputs_for_pixels(layout: str, datatype: str) -> None:
    """And what is padded is zero, after a batch that filled the memory."""
    made = codec(layout, datatype)
    model, seen = echo(layout, datatype)
    assert model.takes_pixels.ok
    for seed, (count, bucket) in enumerate(((4, 4), (3, 4), (1, 1), (8, 8), (2, 4))):
        pixels, rows = both(made, range(10 * seed, 10 * seed + count))
        for tensor in (pixels, rows):
            parts: list[Tensors] = [{"x": tensor[row : row + 1]} for row in range(count)]
            assert model.run_padded(parts, bucket)["y"].tobytes() == rows.tobytes()
            padded = np.concatenate([rows, np.zeros((bucket - count, *rows.shape[1:]), rows.dtype)])
            assert torch.equal(seen[-1], to_tensor(padded, datatype, copy=True))
        assert model.run({"x": pixels})["y"].tobytes() == rows.tobytes()
    assert check_pixels(model, table(layout, datatype), (1, 4), padded=True) is None


def test_pytorch_recordings_replay_on_normalised_pixels() -> None:
    recorder = FakeRecorder()
    made = codec("CHW")
    model, _ = echo("CHW", "FP32", recorder)
    capture(model, BatchBuckets([1, 4]), [{"x": both(made, range(4))[1]}])
    assert model.graphs.ok
    before = sum(recording.replays for recording in recorder.made)
    for seed, (count, bucket) in enumerate(((3, 4), (1, 1), (4, 4))):
        pixels, rows = both(made, range(10 * seed, 10 * seed + count))
        assert model.run_padded([{"x": pixels}], bucket)["y"].tobytes() == rows.tobytes()
    assert sum(recording.replays for recording in recorder.made) - before == 3
