"""CUDA graphs and the one stream of ONNX Runtime: its CPU session, wrapped in what a session on CUDA does.

The wrapper keeps graphs as the runtime's CUDA part does (1.31: by thread and number, each with the addresses
it was captured with), and the stream is the fake library's, which copies nothing before it is waited for.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from inferpool.backends.base import GpuOptions, LoadOptions
from inferpool.backends.cuda.capture_gate import DEVICE_GATE
from inferpool.backends.cuda.memory import CudaMemory, Memory
from inferpool.backends.onnx.gpu import session as gpu_session
from inferpool.backends.onnx.gpu.bound_model import BoundModel
from inferpool.backends.onnx.gpu.session import GraphsRefused, open_session
from inferpool.backends.onnx.signature import read_signature
from inferpool.errors import LoadError, OutOfMemory
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.gpu.graph_capture import MOST_GRAPHS, capture
from inferpool.tensors import Array
from onnx import TensorProto, helper

from tests.backends.cuda.test_memory import library, opened  # noqa: F401 - fixtures
from tests.fake_gpu.host_memory import HostMemory

node = helper.make_node


def value(name: str, shape: list[Any], element: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, element, shape)


def session_of(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    made = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def square(rows: Any = "n") -> Any:
    return session_of([node("Mul", ["a", "a"], ["y"])], [value("a", [rows, 3])], [value("y", [rows, 3])])


class GraphSession:
    """A session that captures and replays, and says of each run what it was.

    `fault` makes it fail: "refuses" raises in the middle of a capture, "stale" replays without reading its
    inputs again.
    """

    def __init__(self, session: Any, memory: Memory, fault: str = "") -> None:
        self.session = session
        self.memory = memory
        self.fault = fault
        self.runs: list[tuple[str, int]] = []
        self.graphs: dict[tuple[int, int], Any] = {}
        self.synchronous: list[bool] = []
        self.alone: list[bool] = []

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run(self, names: list[str], inputs: Any, options: Any) -> Any:
        assert options.get_run_config_entry("gpu_graph_id") == "-1"
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "0"
        return self.session.run(names, inputs)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        self.synchronous.append(
            options.get_run_config_entry("disable_synchronize_execution_providers") == "0"
        )
        # The stream does what was queued before the run, before it runs.
        if isinstance(self.memory, CudaMemory):
            CudaMemory.wait(self.memory)
        key = threading.get_ident(), graph
        if graph == -1:
            self.runs.append(("plain", graph))
            self.session.run_with_iobinding(binding)
        elif key in self.graphs:
            self.runs.append(("replayed", graph))
            if self.fault != "stale":
                self.session.run_with_iobinding(self.graphs[key])
        else:
            self.runs.append(("captured", graph))
            self.alone.append(DEVICE_GATE.capturing)
            if self.fault == "refuses":
                if isinstance(self.memory, CudaMemory):
                    self.memory._library.fakeCapture()
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            self.graphs[key] = binding
            self.session.run_with_iobinding(binding)


class CountedMemory(CudaMemory):
    """Counts how often the model waits for it."""

    waits = 0

    def wait(self) -> None:
        self.waits += 1
        super().wait()


def bound(
    memory: Memory, session: Any = None, fault: str = "", reopen: Callable[[], Any] | None = None
) -> tuple[BoundModel, GraphSession]:
    wrapped = GraphSession(session or square(), memory, fault)
    signature = read_signature(Path("unread"), wrapped.session)
    streamed = isinstance(memory, CudaMemory)
    model = BoundModel(wrapped, signature, "cpu", memory, {}, streamed=streamed, open_without_graphs=reopen)
    return model, wrapped


def rows(count: int, start: float = 0) -> Array:
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3) + np.float32(start)


def check(model: BoundModel, count: int, bucket: int) -> None:
    given = rows(count, 7 * count)
    assert model.run_padded([{"a": given}], bucket)["y"].tolist() == (given * given).tolist()


def capture_all(model: BoundModel, buckets: BatchBuckets | None, samples: list[Any] | None = None) -> None:
    capture(model, buckets, samples or [{"a": rows(5)}])


def test_each_batch_size_has_its_own_graph(opened: list[str]) -> None:  # noqa: F811
    model, session = bound(CudaMemory(3, 13))
    assert (model.graphs, model.can_capture) == ((False, "none were asked for"), True)
    capture_all(model, BatchBuckets([1, 2, 4, 8]))
    assert model.graphs.ok
    numbers = [number for kind, number in session.runs if kind == "captured"]
    assert numbers == [1, 2, 3, 4]
    assert all(session.alone)
    session.runs.clear()
    for bucket, count in ((8, 7), (1, 1), (4, 3), (2, 2), (8, 8)):
        check(model, count, bucket)
    assert session.runs == [("replayed", number) for number in (1, 4, 2, 3, 1)]
    # A shape for which none was captured runs as it is; graphs outlive it that memory grows for others.
    for bucket in (3, 64, 8, 4):
        check(model, 2, bucket)
    assert [kind for kind, _ in session.runs[-4:]] == ["plain", "plain", "replayed", "replayed"]
    for bucket in range(399, 8, -1):
        check(model, 1, bucket)
    check(model, 2, 2)
    assert session.runs[-1] == ("replayed", 3)
    model.close()


def test_token_rows_are_captured_for_their_smallest_shapes() -> None:
    """Few rows of many tokens and many of few, each in its own memory; `/models` says that it is a part."""
    session = session_of(
        [node("Constant", [], ["axis"], value_ints=[1]), node("ReduceSum", ["a", "axis"], ["y"])],
        [value("a", ["n", "m"])],
        [value("y", ["n", 1])],
    )

    def run(model: BoundModel, bucket: int, length: int) -> None:
        given = np.random.default_rng(length).integers(0, 9, (bucket, length)).astype(np.float32)
        answer = model.run_padded([{"a": given}], bucket)["y"]
        assert answer.tolist() == given.sum(axis=1, keepdims=True).tolist()

    for buckets, lengths, part in (
        ([1, 2, 4, 8], [8, 16], ""),
        (range(1, 9), range(8, 80, 8), "of 72 shapes"),
    ):
        model, wrapped = bound(HostMemory(), session)
        texts = [
            {"a": np.arange(8 * length, dtype=np.float32).reshape(8, length) / length} for length in lengths
        ]
        capture(model, BatchBuckets(list(buckets)), [], texts)
        assert model.graphs.ok == (not part)
        assert part in model.graphs.reason
        wrapped.runs.clear()
        sizes = sorted((bucket * length, bucket, length) for bucket in buckets for length in lengths)
        for _, bucket, length in sizes:
            run(model, bucket, length)
        kinds = [kind for kind, _ in wrapped.runs]
        small = [size for size, _, _ in sizes if size < sizes[min(MOST_GRAPHS, len(sizes)) - 1][0]]
        assert kinds[: len(small)] == ["replayed"] * len(small)
        assert kinds.count("replayed") == min(MOST_GRAPHS, len(sizes))


def test_only_the_smallest_batch_sizes_are_captured() -> None:
    model, session = bound(HostMemory())
    capture_all(model, BatchBuckets(range(1, MOST_GRAPHS + 5)))
    assert len(session.graphs) == MOST_GRAPHS
    session.runs.clear()
    check(model, MOST_GRAPHS, MOST_GRAPHS)
    check(model, MOST_GRAPHS + 1, MOST_GRAPHS + 1)
    assert [kind for kind, _ in session.runs] == ["replayed", "plain"]


def test_a_streamed_run_waits_once(opened: list[str]) -> None:  # noqa: F811
    """Copies there, the run and copies back are queued; what is read has been waited for."""
    memory = CountedMemory(3, 13)
    model, session = bound(memory)
    for captures in (False, True):
        if captures:
            capture_all(model, BatchBuckets([4]))
        memory.waits = 0
        session.synchronous.clear()
        check(model, 3, 4)
        assert memory.waits == 1
        assert session.synchronous == [False]
    model.close()


def test_a_run_without_a_stream_is_synchronous(opened: list[str]) -> None:  # noqa: F811
    memory = CudaMemory(3, 13)
    model = BoundModel(square(), read_signature(Path("unread"), square()), "cpu", memory, {})
    check(model, 3, 4)
    assert model._options.get_run_config_entry("disable_synchronize_execution_providers") == "0"
    model.close()


def test_a_failed_run_leaves_no_work_in_the_stream(opened: list[str]) -> None:  # noqa: F811
    """The rows of a run do not overtake a copy to the device that is under way."""
    memory = CountedMemory(3, 13)
    model, session = bound(memory)
    check(model, 2, 4)
    works = session.run_with_iobinding

    def broken(binding: Any, options: Any) -> None:
        raise RuntimeError("CUDA failure 2: out of memory")

    memory.waits = 0
    session.run_with_iobinding = broken  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="out of memory"):
        model.run_padded([{"a": rows(2)}], 4)
    assert memory.waits == 1
    session.run_with_iobinding = works  # type: ignore[method-assign]
    check(model, 2, 4)
    model.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refuses", "a run could not be captured: CUDA failure 900: operation not permitted when stream is"),
        ("stale", 'output "y" differs'),
    ],
)
def test_a_failed_or_wrong_capture_drops_the_session(
    fault: str,
    reason: str,
    opened: list[str],  # noqa: F811
) -> None:
    """The capture is ended before the session is closed; a session without graphs answers."""
    memory = CudaMemory(3, 13)
    plain = GraphSession(square(), memory)

    def reopen() -> Any:
        status = ctypes.c_int()
        memory._library.cudaStreamIsCapturing(memory._stream, ctypes.byref(status))
        assert not status.value
        assert model._session is None
        return plain

    model, session = bound(memory, fault=fault, reopen=reopen)
    capture_all(model, BatchBuckets([1, 2, 4]))
    assert not model.graphs.ok
    assert reason in model.graphs.reason
    session.runs.clear()
    for bucket in (1, 4, 2):
        check(model, 1, bucket)
    assert not session.runs
    assert [kind for kind, _ in plain.runs] == ["plain"] * 3
    model.close()
    assert memory._library.fakeLeft() == 0


def test_a_replacement_thread_captures_its_own_graphs(opened: list[str]) -> None:  # noqa: F811
    """Graphs of a thread that is gone are not named on another, to be captured there while it serves."""
    model, session = bound(CudaMemory(3, 13))
    buckets = BatchBuckets([1, 4])
    faults: list[BaseException] = []

    def live() -> None:
        try:
            model.begin()
            capture_all(model, buckets)
            for bucket in (1, 4):
                check(model, 1, bucket)
        except Exception as error:  # noqa: BLE001 - it is raised again by the test
            faults.append(error)

    # Both are there at once, so that they are two also to whoever reuses the names of threads.
    first, second = threading.Thread(target=live), threading.Thread(target=live)
    capture_all(model, buckets)
    before = len(session.graphs)
    for thread in (first, second):
        session.runs.clear()
        thread.start()
        thread.join()
        assert not faults
        assert [kind for kind, _ in session.runs if kind != "plain"][-2:] == ["replayed"] * 2
    model.begin()
    session.runs.clear()
    check(model, 1, 4)
    assert [kind for kind, _ in session.runs] == ["plain"]
    assert len(session.graphs) > before
    model.close()


def test_a_thread_may_allocate_during_a_capture_elsewhere(opened: list[str]) -> None:  # noqa: F811
    """Every thread that uses the memory leaves the mode in which threads begin (0) for its own (1)."""
    model, _ = bound(CudaMemory(3, 13))
    modes: list[int] = []

    def work() -> None:
        modes.append(model._memory._library.fakeMode())  # type: ignore[attr-defined]
        check(model, 2, 2)
        modes.append(model._memory._library.fakeMode())  # type: ignore[attr-defined]

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert modes == [0, 1, 0, 1]
    model.close()


def test_a_model_of_one_shape_has_one_graph() -> None:
    model, session = bound(HostMemory(), square(1))
    capture_all(model, None, [{"a": rows(1)}])
    assert model.graphs.ok
    session.runs.clear()
    assert model.run({"a": rows(1, 5)})["y"].tolist() == (rows(1, 5) * rows(1, 5)).tolist()
    assert session.runs == [("replayed", 1)]


def test_zero_rows_run_without_a_graph() -> None:
    model, _ = bound(HostMemory())
    assert model.run({"a": rows(0)})["y"].shape == (0, 3)


@pytest.mark.parametrize(
    ("nodes", "outputs", "cpu_nodes", "reason"),
    [
        (
            [node("NonZero", ["a"], ["y"])],
            [value("y", [2, "k"], TensorProto.INT64)],
            {},
            'the shape of output "y" is not known before the run',
        ),
        (
            [node("Mul", ["a", "a"], ["y"])],
            [value("y", ["n", 3])],
            {"Shape": 2, "Gather": 1},
            "3 nodes run on the CPU: 1 Gather, 2 Shape",
        ),
    ],
)
def test_an_obstacle_to_capture_is_the_reason(
    nodes: list[Any], outputs: list[Any], cpu_nodes: dict[str, int], reason: str
) -> None:
    session = session_of(nodes, [value("a", ["n", 3])], outputs)
    model = BoundModel(session, read_signature(Path("unread"), session), "cpu", HostMemory(), cpu_nodes)
    assert (model.graphs, model.can_capture) == ((False, reason), False)


def test_rows_of_any_shape_are_captured_for_one_shape() -> None:
    """And `/models` says so; rows of other shapes run as they are."""
    session = session_of(
        [node("Constant", [], ["axis"], value_ints=[1]), node("ReduceSum", ["a", "axis"], ["y"])],
        [value("a", ["n", "m"])],
        [value("y", ["n", 1])],
    )
    model, wrapped = bound(HostMemory(), session)
    capture_all(model, BatchBuckets([1, 2]))
    assert model.graphs == (False, "for rows of the shape that was tried at load only")
    wrapped.runs.clear()
    for width in (3, 4):
        given = np.ones((1, width), np.float32)
        assert model.run_padded([{"a": given}], 2)["y"].tolist() == [[width]]
    assert [kind for kind, _ in wrapped.runs] == ["replayed", "plain"]


Opened = Callable[[str], LoadError]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
    """Open a session for graphs of a runtime that refuses with an error; what is raised."""

    def opening(error: str) -> LoadError:
        def session(*_: Any, **options: Any) -> None:
            assert not DEVICE_GATE.capturing
            [(_, chosen)] = options["providers"]
            assert chosen["enable_cuda_graph"] == "1"
            assert chosen["user_compute_stream"] == "4096"
            raise RuntimeError(error)

        runtime = SimpleNamespace(InferenceSession=session, set_default_logger_severity=lambda _: None)
        monkeypatch.setattr(gpu_session, "ort", runtime)
        options = LoadOptions("cuda:0", gpu=GpuOptions(graphs=True))
        with pytest.raises(LoadError) as raised:
            open_session(tmp_path / "model.onnx", options, ort.SessionOptions(), 4096)
        return raised.value

    return opening


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "This session cannot use the graph capture feature as requested by the user as the model has"
            " control flow nodes which can't be supported by CUDAExecutionProvider",
            "the model has control flow (If, Loop or Scan)",
        ),
        (
            "This session cannot use the graph capture feature as requested by the user  as all compute graph"
            " nodes have not been partitioned to the CUDAExecutionProvider",
            "some of its nodes run on the CPU",
        ),
        (
            "This session cannot use the graph capture feature as requested by the user today",
            "ONNX Runtime refused: This session cannot use the graph capture feature as requested",
        ),
    ],
)
def test_a_refusal_of_the_runtime_becomes_a_reason(error: str, reason: str, refuse: Opened) -> None:
    raised = refuse(error)
    assert isinstance(raised, GraphsRefused)
    assert reason in raised.detail


def test_other_load_errors_are_not_refusals_of_graphs(refuse: Opened) -> None:
    assert not isinstance(refuse("Protobuf parsing failed"), GraphsRefused)
