"""Makes other forms of an ONNX model, each as one file.

The same model, rows and versions of packages give the same bytes. The quantisers and the optimiser are ONNX
Runtime's own (`onnxruntime.quantization`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from inferpool.errors import LoadError
from inferpool.release.optimise.brain_floats import (
    block_operations,
    floats_of,
    store_brain_floats,
    to_brain_floats,
)
from inferpool.release.optimise.unfit import Unfit
from inferpool.system.gpus import gpu_support
from inferpool.tensors import Array

Inputs = Mapping[str, Array]
"""The inputs of some rows, by name, as the model sees them."""

INT4_BLOCK: Final = 32
PRUNED_SHARE: Final = 0.5
_PRUNED_OPERATIONS: Final = ("Conv", "Gemm", "MatMul")


class Candidate(NamedTuple):
    """Another form of a model.

    Attributes:
        name: its name in tables.
        make: writes it, given the model, the file to write, and inputs to calibrate with. Raises Unfit, or
            whatever the tools raise.
        reported_only: whether it is never written, because whatever gain is measured is chance.
        keeps_fp32: whether `make` also takes `kept`, the nodes and operations that stay in FP32.
    """

    name: str
    make: Callable[..., None]
    reported_only: bool = False
    keeps_fp32: bool = False


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
    def __init__(self, batches: Sequence[Inputs]) -> None:
        self._batches: Iterator[Inputs] = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches, None)


def optimise_graph(model: Path, target: Path, batches: Sequence[Inputs]) -> None:
    """Fold constants and fuse operations now instead of at each load."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_fp16(model: Path, target: Path, batches: Sequence[Inputs], kept: Collection[str] = ()) -> None:
    """Round weights and operations to FP16; inputs and outputs keep their datatypes."""
    fp16 = _converter()
    with tempfile.TemporaryDirectory(prefix="inferpool-") as folder:
        onnx.save(fp16.to_half(fp16.read_for_conversion(model.absolute(), Path(folder)), kept), target)


def to_bf16(model: Path, target: Path, batches: Sequence[Inputs], kept: Collection[str] = ()) -> None:
    """Round weights and operations to BF16; inputs and outputs keep their datatypes."""
    fp16 = _converter()
    with tempfile.TemporaryDirectory(prefix="inferpool-") as folder:
        whole = fp16.read_for_conversion(model.absolute(), Path(folder))
        blocked, originals = block_operations(whole), floats_of(whole)
        onnx.save(to_brain_floats(fp16.to_half(whole, blocked.union(kept)), originals), target)


def store_in_bf16(model: Path, target: Path, batches: Sequence[Inputs], kept: Collection[str] = ()) -> None:
    """Round weights to BF16, and leave all operations in FP32: the runtime widens the weights at load."""
    onnx.save(store_brain_floats(onnx.load(model), kept), target)


def names_of(model: Path) -> set[str]:
    """Return the names of a model's nodes and of their operations."""
    nodes = onnx.load(model, load_external_data=False).graph.node
    return {name for node in nodes for name in (node.name, node.op_type) if name}


def _converter() -> ModuleType:
    try:
        with gpu_support():
            from inferpool.backends.onnx.gpu import fp16
    except LoadError as error:
        raise Unfit(str(error)) from error
    return fp16


def to_int8_dynamic(model: Path, target: Path, batches: Sequence[Inputs]) -> None:
    """Round weights to INT8 per channel, and inputs of operations by what each run brings."""
    with _prepared(model) as prepared:
        quantize_dynamic(
            prepared,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=_no_vnni(),
            nodes_to_exclude=_attention(prepared),
        )
    _check_changed(target, ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeLSTM"))


def to_int8_static(model: Path, target: Path, batches: Sequence[Inputs]) -> None:
    """Round weights to INT8 per channel, and inputs of operations by ranges that `batches` showed."""
    with _prepared(model) as prepared:
        quantize_static(
            prepared,
            target,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=_no_vnni(),
        )
    _check_changed(target, ("QuantizeLinear",))


def to_int4(model: Path, target: Path, batches: Sequence[Inputs]) -> None:
    """Round the weights of matrix products to INT4 in blocks of 32; sums are of INT8."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(model), bits=4, block_size=INT4_BLOCK, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    onnx.save(quantizer.model.model, target)
    _check_changed(target, ("MatMulNBits",))


def prune(model: Path, target: Path, batches: Sequence[Inputs]) -> None:
    """Set the smaller half of the weights of products and convolutions to zero.

    The operations run over zeros as over other numbers: this shows what such pruning costs, and gains
    nothing.
    """
    loaded = onnx.load(model)
    weights = {
        name for node in loaded.graph.node if node.op_type in _PRUNED_OPERATIONS for name in node.input[1:2]
    }
    count = 0
    for tensor in loaded.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in weights and values.dtype.kind == "f" and values.ndim > 1:
            limit = np.quantile(np.abs(values), PRUNED_SHARE)
            kept = np.where(np.abs(values) < limit, 0, values).astype(values.dtype)
            tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))
            count += 1
    if not count:
        raise Unfit("there are no weights of products or convolutions")
    onnx.save(loaded, target)


CANDIDATES: Final = (
    Candidate("graph", optimise_graph),
    Candidate("fp16", to_fp16, keeps_fp32=True),
    Candidate("bf16", to_bf16, keeps_fp32=True),
    Candidate("bf16-weights", store_in_bf16, reported_only=True, keeps_fp32=True),
    Candidate("int8-dynamic", to_int8_dynamic),
    Candidate("int8-static", to_int8_static),
    Candidate("int4", to_int4),
    Candidate("unstructured-50", prune, reported_only=True),
)


class _prepared:
    """The model with its shapes inferred and its graph tidied, as the quantisers want it; else as it is."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._folder = tempfile.TemporaryDirectory(prefix="inferpool-")

    def __enter__(self) -> Path:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        whole, prepared = (Path(self._folder.name) / name for name in ("whole.onnx", "prepared.onnx"))
        loaded = onnx.load(self._model)
        for number, node in enumerate(loaded.graph.node):
            # Nodes are excluded by their names: all that have none would be excluded with one of them.
            node.name = node.name or f"{node.op_type}_{number}"
        onnx.save(loaded, whole)  # with the weights that are in files of their own
        # The package logs through the root logger, and advises what is done here or cannot be.
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)
        try:
            quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        except Exception:  # noqa: BLE001 - it is advice, and fails for models that quantise well
            return whole
        return prepared

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
        self._folder.cleanup()


def _attention(file: Path) -> list[str]:
    """Return the names of Attention nodes: the quantiser's form of them knows no causal mask."""
    nodes = onnx.load(file, load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type == "Attention"]


def _no_vnni() -> bool:
    """Whether sums of products of bytes may saturate: on x86 processors without VNNI, as ORT documents."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags


def _check_changed(file: Path, operations: Sequence[str]) -> None:
    if not any(node.op_type in operations for node in onnx.load(file, load_external_data=False).graph.node):
        raise Unfit("no operation could be changed")
