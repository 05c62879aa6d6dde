"""Bound runs of ONNX Runtime: the same class as on a GPU, with the CPU's memory as the device's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferpool.backends.base import GpuOptions, LoadOptions
from inferpool.backends.cuda.memory import CudaMemory
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.backends.onnx.gpu.bound_model import BoundModel, bindable
from inferpool.backends.onnx.gpu.session import (
    check_nodes,
    cpu_nodes,
    cuda_unavailable_reason,
    found_versions,
    is_out_of_memory,
    load_libraries,
    provider_options,
)
from inferpool.backends.onnx.signature import read_signature
from inferpool.errors import LoadError, OutOfMemory
from inferpool.system.install_hints import install_command, uninstall_command
from inferpool.tensors import Array
from onnx import TensorProto, helper

from tests.fake_gpu.host_memory import HostMemory
from tests.onnx_models import bf16

node = helper.make_node
Make = Callable[..., BoundModel]


class CountedMemory(HostMemory):
    """Counts what is allocated and copied."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = 0
        self.uploaded = 0

    def host(self, nbytes: int) -> Array:
        self.allocated += 1
        return super().host(nbytes)

    def upload(self, address: int, host: Array) -> None:
        self.uploaded += host.nbytes
        super().upload(address, host)


def graph(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    made = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def tensor(name: str, shape: list[Any] | None, element: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, element, shape)


AFFINE = graph(
    [node("Add", ["a", "b"], ["total"]), node("ReduceSum", ["total"], ["sum"], keepdims=0)],
    [tensor("a", ["n", 3]), tensor("b", ["n", 3])],
    [tensor("total", ["n", 3]), tensor("sum", [])],
)
POSITIVE = graph(
    [node("NonZero", ["a"], ["indexes"])],
    [tensor("a", ["n", "m"])],
    [tensor("indexes", [2, "k"], TensorProto.INT64)],
)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def bound(model: Any) -> BoundModel:
        file = tmp_path / "model.onnx"
        file.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        signature = read_signature(file, session)
        assert bindable(signature)
        return BoundModel(session, signature, "cpu", CountedMemory(), {})

    return bound


def rows(count: int, start: float = 0) -> Array:
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3) + np.float32(start)


def test_a_bound_model_gives_the_outputs_of_an_unbound_session(make: Make) -> None:
    """Outputs of known and of unknown shape, of any rank, are the caller's own."""
    model = make(AFFINE)
    first = model.run({"a": rows(4), "b": rows(4, 5)})
    kept = {name: tensor.copy() for name, tensor in first.items()}
    assert first["total"].tolist() == (rows(4) + rows(4, 5)).tolist()
    assert first["sum"] == (rows(4) + rows(4, 5)).sum()
    second = model.run({"a": rows(4, 9), "b": rows(4, 9)}, ["total"])
    assert list(second) == ["total"]
    assert {name: tensor.tolist() for name, tensor in first.items()} == {
        name: tensor.tolist() for name, tensor in kept.items()
    }


def test_an_output_with_a_data_dependent_shape_is_returned(make: Make) -> None:
    model = make(POSITIVE)
    for array in (np.eye(3, dtype=np.float32), np.zeros((2, 2), np.float32), np.ones((2, 5), np.float32)):
        assert model.run({"a": array})["indexes"].tolist() == np.array(np.nonzero(array)).tolist()


def test_outputs_of_other_sizes_follow_for_the_same_inputs_shapes(make: Make) -> None:
    """The binding of a shape keeps the outputs of its last run, which must not limit the next run."""
    model = make(POSITIVE)
    for array in (np.array([[1, 0], [0, 0]]), np.eye(2), np.zeros((2, 2)), np.ones((2, 2))):
        found = model.run({"a": array.astype(np.float32)})["indexes"]
        assert found.tolist() == np.array(np.nonzero(array)).tolist()


def test_padded_rows_are_cut_off_the_outputs(make: Make) -> None:
    model = make(graph([node("Mul", ["a", "a"], ["y"])], [tensor("a", ["n", 3])], [tensor("y", ["n", 3])]))
    parts = [{"a": rows(2)}, {"a": rows(1, 50)}, {"a": rows(2, 70)}]
    answer = model.run_padded(parts, 8)["y"]
    whole = np.concatenate([part["a"] for part in parts])
    assert answer.tolist() == (whole * whole).tolist()


@settings(max_examples=25)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=20))
def test_padding_is_zero_whatever_ran_before(counts: list[int]) -> None:
    """A model that adds all rows of a run to each finds nothing of the batches before in its memory."""
    nothing = helper.make_tensor("nothing", TensorProto.FLOAT, [1], [0.0])
    first = helper.make_tensor("first", TensorProto.INT64, [1], [0])
    made = helper.make_graph(
        [
            node("ReduceSum", ["a", "first"], ["all"], keepdims=1),
            node("Mul", ["a", "nothing"], ["none"]),
            node("Add", ["none", "all"], ["y"]),
        ],
        "g",
        [tensor("a", ["n", 3])],
        [tensor("y", ["n", 3])],
        [nothing, first],
    )
    model = helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    bound = BoundModel(session, read_signature(Path("unread"), session), "cpu", HostMemory(), {})
    for index, count in enumerate(counts):
        rows_given = rows(count, 100 * index)
        answer = bound.run_padded([{"a": rows_given}], 8)["y"]
        assert answer.tolist() == [rows_given.sum(axis=0).tolist()] * count


def test_nothing_is_allocated_for_a_shape_that_ran_before(make: Make) -> None:
    """Nor for a smaller one; and each run copies its rows and the padding, no more."""
    model = make(graph([node("Mul", ["a", "a"], ["y"])], [tensor("a", ["n", 3])], [tensor("y", ["n", 3])]))
    memory = model._memory
    assert isinstance(memory, CountedMemory)
    model.run_padded([{"a": rows(8)}], 8)
    allocated, uploaded = memory.allocated, memory.uploaded
    for count in (8, 5, 1, 8, 3):
        model.run_padded([{"a": rows(count)}], 8 if count > 4 else 4)
    assert memory.allocated == allocated
    assert memory.uploaded - uploaded == 4 * 3 * (8 + 8 + 4 + 8 + 4)
    bindings = dict(model._bindings)
    model.run_padded([{"a": rows(7)}], 8)
    assert model._bindings == bindings


def test_bindings_stay_valid_when_memory_grows(make: Make) -> None:
    model = make(AFFINE)
    for count in (1, 4, 2, 64, 4, 1):
        answer = model.run({"a": rows(count), "b": rows(count, 1)})
        assert answer["total"].tolist() == (rows(count) + rows(count, 1)).tolist()


def test_zero_rows_and_bf16_are_supported(make: Make) -> None:
    model = make(AFFINE)
    assert model.run({"a": rows(0), "b": rows(0)})["total"].shape == (0, 3)
    kind = TensorProto.BFLOAT16
    ends = [tensor("a", ["n"], kind)], [tensor("y", ["n"], kind)]
    half = make(graph([node("Identity", ["a"], ["y"])], *ends))
    bits = bf16(1.5, -2.0, 3.0)
    assert half.run_padded([{"a": bits}], 4)["y"].tolist() == bits.tolist()


def test_a_run_can_be_stopped_and_the_next_one_runs(make: Make) -> None:
    """A stop that comes between two runs stops neither."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Add", ["sum", "sum"], ["sum_out"])],
        "turn",
        [tensor("i", [], TensorProto.INT64), tensor("go", [], TensorProto.BOOL), tensor("sum", [1])],
        [tensor("go_on", [], TensorProto.BOOL), tensor("sum_out", [1])],
    )
    loop = [
        node("Squeeze", ["turns"], ["n"]),
        node("Cast", ["n"], ["yes"], to=TensorProto.BOOL),
        node("Loop", ["n", "yes", "start"], ["y"], body=body),
    ]
    model = make(
        graph(loop, [tensor("turns", [1], TensorProto.INT64), tensor("start", [1])], [tensor("y", [1])])
    )
    start = np.ones(1, np.float32)
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.01):
            model.stop_run(0)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Exception, match="terminate flag"):
        model.run({"turns": np.array([10**12]), "start": start})
    over.set()
    stopper.join()
    model.stop_run(0)
    assert model.run({"turns": np.array([3]), "start": start})["y"].tolist() == [8]


def test_strings_and_non_tensors_are_not_bindable(tmp_path: Path) -> None:
    kind = TensorProto.STRING
    model = graph([node("Identity", ["a"], ["y"])], [tensor("a", ["n"], kind)], [tensor("y", ["n"], kind)])
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert not bindable(read_signature(file, session))


# What is asked of the machine and of the session, without either.


@pytest.mark.parametrize(
    ("missing", "what"),
    [("libcublasLt.so.13", "cuBLAS"), ("libcudnn.so.9", "cuDNN 9"), ("libcudart.so.13", "runtime")],
)
def test_the_error_names_the_first_missing_library(missing: str, what: str) -> None:
    asked: list[str] = []

    def load(name: str) -> None:
        asked.append(name)
        if name == missing:
            raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(LoadError, match=f"{what} cannot be loaded.*{missing}.*needs CUDA 13 and cuDNN 9"):
        load_libraries("13.0", load)
    assert asked[-1] == missing
    load_libraries("13.0", lambda name: None)


def test_libraries_are_found_in_the_wheels_of_nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in a folder of each wheel, in which the system does not look."""
    names = ["libcudart.so.99", "libcublasLt.so.99", "libcublas.so.99", "libcurand.so.10", "libcudnn.so.9"]
    for index, name in enumerate(names):
        folder = tmp_path / "nvidia" / ("cudnn" if "dnn" in name else f"part{index}") / "lib"
        folder.mkdir(parents=True)
        (folder / name).write_text("no library")
    opened: list[str] = []

    def load(name: str) -> None:
        if "/" not in name:
            raise OSError(f"{name}: cannot open shared object file")
        opened.append(Path(name).name)

    monkeypatch.setattr("ctypes.CDLL", load)
    with pytest.raises(LoadError, match="CUDA's runtime cannot be loaded"):
        load_libraries("99.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_libraries("99.0")
    assert opened == names


def test_nodes_on_the_cpu_are_read_from_a_session() -> None:
    """A real session of the CPU: every node is there, by kind."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(AFFINE.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert cpu_nodes(session) == {"Add": 1, "ReduceSum": 1}


@pytest.mark.parametrize(
    ("left", "allowed", "refused"),
    [
        ({}, "none", ""),
        ({"Shape": 2, "Gather": 1}, "none", '3 nodes .* CPU: 1 Gather, 2 Shape; .*cpu_nodes = "shapes"'),
        ({"Shape": 2, "Gather": 1}, "shapes", ""),
        ({"Shape": 2, "NonMaxSuppression": 1}, "shapes", 'NonMaxSuppression.*cpu_nodes = "any"'),
        ({"NonMaxSuppression": 1}, "any", ""),
    ],
)
def test_cpu_nodes_are_refused_unless_allowed(left: dict[str, int], allowed: Any, refused: str) -> None:
    options = LoadOptions("cuda:0", gpu=GpuOptions(cpu_nodes=allowed))
    if refused:
        with pytest.raises(LoadError, match=refused):
            check_nodes(left, options)
    else:
        check_nodes(left, options)


def test_provider_options_follow_the_load_options() -> None:
    plain = provider_options(LoadOptions("cuda:3"), 4096)
    assert plain == {
        "device_id": "3",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "prefer_nhwc": "0",
        "use_tf32": "0",
        "user_compute_stream": "4096",
        "enable_cuda_graph": "0",
    }
    bounded = provider_options(
        LoadOptions("cuda:0", gpu=GpuOptions(tf32=True, memory_bytes=2**30, graphs=True)), 4096
    )
    assert bounded["enable_cuda_graph"] == "1"
    assert (bounded["use_tf32"], bounded["gpu_mem_limit"]) == ("1", str(2**30))


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("BFCArena::AllocateRawInternal Available memory of 1 is smaller than requested bytes of 2", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("Failed to allocate memory for requested buffer of size 1024", True),
        ("CUDA failure 700: an illegal memory access was encountered", False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(text: str, is_one: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) is is_one


def test_out_of_memory_in_a_run_raises_out_of_memory(make: Make) -> None:
    model = make(AFFINE)

    class Full:
        def __init__(self, session: Any) -> None:
            self.io_binding = session.io_binding

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            raise RuntimeError("CUDA failure 2: out of memory")

    model._session = Full(model._session)
    with pytest.raises(OutOfMemory, match="out of memory"):
        model.run_padded([{"a": rows(1), "b": rows(1)}], 2)


@pytest.mark.skipif(not cuda_unavailable_reason(), reason="ONNX Runtime for GPUs is installed")
def test_a_runtime_for_cpus_is_the_reason_why_no_gpu_is_used() -> None:
    commands = f"{uninstall_command('onnxruntime')}, then {install_command('gpu')}"
    reason = OnnxBackend().gpu_unavailable_reason(Path("model.onnx"))
    assert str(reason).endswith(f"is built for CPUs only: run {commands}")
    with pytest.raises(LoadError, match=r"CUDA's runtime library cannot be loaded"):
        CudaMemory(0, 0)
    assert found_versions("0") in ("neither", "cuDNN 9")
