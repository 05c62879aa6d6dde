"""The common part of all kinds of PyTorch model: tensors in and out, threads, the first runs.

Each kind of model supplies a `Forward`, a function of named tensors. This module does the rest.

PyTorch keeps the number of threads for a run in two places: OpenMP's number belongs to the calling thread,
MKL's to the process. Both are therefore set before every run, which costs a third of a microsecond. Each
instance has its own number. Only a matrix product that starts while another model is between the two steps
may use the other model's number.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch

from inferpool.backends.base import LoadedModel, LoadOptions, Rejection
from inferpool.backends.torch.autograd import differentiate
from inferpool.backends.torch.run_errors import find_rejection
from inferpool.backends.torch.signature import (
    TensorMeta,
    TreePath,
    complete_outputs,
    flatten,
    name_outputs,
    pairs_to_try,
    path_text,
    varying_structures,
)
from inferpool.errors import LoadError, UnfitForGpu, short_reason
from inferpool.gradient_names import are_gradients
from inferpool.system.gpus import CPU
from inferpool.tensors import JSON, ROUNDING, Array, Signature, Tensors, TensorSpec, name_text

log = logging.getLogger(__name__)

InputTensors: TypeAlias = dict[str, torch.Tensor]
OutputTree: TypeAlias = dict[TreePath, Any]
Forward: TypeAlias = Callable[[InputTensors], OutputTree]
"""Runs a model: takes named tensors, returns all outputs by their paths in the returned structure."""

WARM_RUNS: Final = 3
"""The executor of TorchScript profiles the first run and optimises in the second. The third is typical."""

_DATATYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}


@dataclass(frozen=True, slots=True)
class Runnable:
    """A model before its first run.

    Attributes:
        forward: runs the model; several threads may call it at once.
        inputs: the specs of the inputs.
        form: the kind of model in a few words.
        copies: whether inputs have to be copied because the model may write to them.
        max_rows: the largest batch that the model takes; None if that is unknown.
        release: frees what the garbage collector does not.
        device: the device of the weights and the inputs.
        operations: the operations of a run, by their names in PyTorch's schemas; empty if unknown.
        forward_whole: makes another `forward`, which returns the structures at some paths as they are, if the
            numbers of tensors in them depend on the input; None if no structure depends on it.
    """

    forward: Forward
    inputs: tuple[TensorSpec, ...]
    form: str
    copies: bool
    max_rows: int | None = None
    release: Callable[[], None] = lambda: None
    device: str = "cpu"
    operations: tuple[str, ...] = ()
    forward_whole: Callable[[Collection[TreePath]], Forward] | None = None


class StartedModel(NamedTuple):
    """A model that has run: the input of the constructors of `TorchModel` and `TorchDeviceModel`.

    Attributes:
        runnable: the model.
        outputs: the spec of each output, by its path in the returned structure.
    """

    runnable: Runnable
    outputs: Mapping[TreePath, TensorSpec]


class OtherOutputs(Exception):
    """A run returned more or fewer outputs than the runs at load."""


class TorchModel(LoadedModel):
    """A PyTorch model on the CPU. All instances share the model, and so one copy of the weights."""

    def __init__(self, started: StartedModel, threads: int) -> None:
        """`threads` is the number of threads that one run may use."""
        runnable, outputs = started
        self.signature = Signature(runnable.inputs, tuple(outputs.values()))
        self.form = runnable.form
        self.max_rows = runnable.max_rows
        self._runnable: Runnable | None = runnable
        self._forward = runnable.forward
        self._copies = runnable.copies
        self._paths = {spec.name: path for path, spec in outputs.items()}
        self._threads = threads

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the model; raises what PyTorch raises, and OtherOutputs if there are more or fewer of them."""
        specs = self.signature.inputs_by_name
        torch.set_num_threads(self._threads)
        if outputs is not None and are_gradients(outputs):
            return self._differentiate(inputs, outputs)
        with torch.inference_mode():
            feeds = {
                name: to_tensor(array, specs[name].datatype, copy=self._copies)
                for name, array in inputs.items()
            }
            leaves = self._forward(feeds)
            if len(leaves) > len(self._paths):
                raise OtherOutputs(
                    f"the model returned {len(leaves)} outputs, and {len(self._paths)} at load"
                )
            arrays: Tensors = {}
            for name in self._paths if outputs is None else outputs:
                leaf = leaves.get(self._paths[name])
                if leaf is None:
                    raise OtherOutputs(f"the model returned no output {name_text(name)}")
                arrays[name] = to_array(leaf) if isinstance(leaf, torch.Tensor) else to_json(leaf)
        return arrays

    def _differentiate(self, inputs: Tensors, names: Sequence[str]) -> Tensors:
        specs = self.signature.inputs_by_name
        feeds = {name: to_tensor(array, specs[name].datatype, copy=False) for name, array in inputs.items()}
        found = differentiate(self._forward, feeds, names, self._paths)
        return {name: to_array(tensor) for name, tensor in found.items()}

    def rejection(self, error: Exception) -> Rejection | None:
        """The operation that has refused its inputs, and PyTorch's reason; None for another fault."""
        return find_rejection(error)

    def close(self) -> None:
        """Drop the module, which frees its memory."""
        if self._runnable is not None:
            self._runnable.release()
        self._runnable = None
        del self._forward


def start(
    runnable: Runnable, options: LoadOptions, known: Mapping[TreePath, TensorMeta] | None = None
) -> StartedModel:
    """Run a model until it is warm, and find out its outputs unless `known` has them; raises LoadError.

    The runs use the golden samples, or else made-up rows.
    """
    runs = [known] if known is not None else []
    first_error = ""
    for pair in pairs_to_try(runnable.inputs, options.samples):
        try:
            results = [run_once(runnable, inputs, options.threads) for inputs in pair]
            for _ in range(WARM_RUNS - 1):
                run_once(runnable, pair[0], options.threads)
        except Exception as error:  # noqa: BLE001 - made-up rows may be nonsense to the model
            first_error = first_error or short_reason(error)
            continue
        if not runs:
            runnable, results = _answer_whole(runnable, results)
            runs = [{path: _meta(path, leaf) for path, leaf in leaves.items()} for leaves in results]
        break
    if not runs:
        raise LoadError(
            f"the model runs neither its golden samples nor made-up rows of its inputs ({first_error});"
            " add a golden sample, or correct the inputs in model.toml"
        )
    whole = [path for path, (datatype, _) in runs[0].items() if datatype == JSON]
    if whole and runnable.device != CPU:
        shown = " and ".join(path_text(path) or "the returned value" for path in whole)
        raise UnfitForGpu(f"the number of tensors in {shown} depends on the input, which needs the CPU")
    names = name_outputs(list(runs[0]), options.outputs)
    specs = complete_outputs(names, runs, options.outputs)
    # Structures that are answered whole have no shape.
    specs = tuple(replace(spec, shape=None) if spec.datatype == JSON else spec for spec in specs)
    return StartedModel(runnable, dict(zip(names, specs, strict=True)))


def _answer_whole(runnable: Runnable, runs: Sequence[OutputTree]) -> tuple[Runnable, list[OutputTree]]:
    """The model with the structures whole that two `runs` filled differently, and what the runs return then.

    Raises LoadError if such structures cannot be answered.
    """
    whole = varying_structures(*runs)
    if not whole:
        return runnable, list(runs)
    shown = " and ".join(sorted(path_text(path) or "the returned value" for path in whole))
    reason = f"the number of tensors in {shown} depends on the input"
    if runnable.forward_whole is None:
        raise LoadError(f"{reason}; return tensors with a dimension for them instead")
    others = [
        {path: leaf for path, leaf in run.items() if not any(path[: len(top)] == top for top in whole)}
        for run in runs
    ]
    changed: list[OutputTree] = [{**run, **{top: [] for top in whole}} for run in others]
    return replace(runnable, forward=runnable.forward_whole(whole)), changed


def agree(reference: Runnable, candidate: Runnable, options: LoadOptions) -> bool:
    """Whether two ways to run a model give the same outputs. False if `reference` runs no inputs at all."""
    for pair in pairs_to_try(reference.inputs, options.samples):
        compared = 0
        for inputs in pair:
            try:
                expected = run_once(reference, inputs, options.threads)
            except Exception:  # noqa: BLE001 - made-up rows may be nonsense to the model
                continue
            try:
                if not _same(run_once(candidate, inputs, options.threads), expected, options.gpu.fp16):
                    return False
            except RuntimeError:
                return False
            compared += 1
        if compared:
            return True
    return False


def run_once(runnable: Runnable, inputs: Tensors, threads: int) -> OutputTree:
    """Run copies of `inputs` once, outside of any instance; raises what the model raises."""
    datatypes = {spec.name: spec.datatype for spec in runnable.inputs}
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return runnable.forward(
            {
                name: to_tensor(array, datatypes[name], copy=True).to(runnable.device)
                for name, array in inputs.items()
            }
        )


def datatype_of(dtype: torch.dtype, tensor: str) -> str:
    """The datatype for `dtype`; raises LoadError, which names `tensor`, if the protocol has none."""
    if dtype not in _DATATYPES:
        raise LoadError(f"{tensor} is {str(dtype).removeprefix('torch.')}, which cannot be sent or answered")
    return _DATATYPES[dtype]


def check_datatypes(specs: Sequence[TensorSpec]) -> None:
    """Raise LoadError for an input whose datatype PyTorch does not support."""
    for spec in specs:
        if spec.datatype not in _DATATYPES.values():
            raise LoadError(
                f"input {name_text(spec.name)} is {spec.datatype}, which PyTorch does not support"
            )


def to_tensor(array: Array, datatype: str, *, copy: bool) -> torch.Tensor:
    """A tensor on the array's memory, or on a copy.

    The caller must not write to the tensor of a read-only array.
    """
    # An array of one element is contiguous whatever its strides; PyTorch refuses negative strides.
    plain = array.flags.c_contiguous and array.flags.aligned and min(array.strides, default=0) >= 0
    if copy or not plain:
        array = np.array(array, order="C")
    elif not array.flags.writeable:
        array = np.asarray(_Writable(array))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if datatype == "BF16" else tensor


def to_array(tensor: torch.Tensor) -> Array:
    """An array on the tensor's memory. BF16 becomes its bits."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy(force=True)
    return array


@contextmanager
def quiet(file: Path) -> Iterator[None]:
    """Turn whatever PyTorch raises while it loads `file` into LoadError, and silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"PyTorch {torch.__version__} cannot load {file.name}: {short_reason(error)}"
        ) from error


class _Writable:
    """The memory of a read-only array, without the flag of which PyTorch warns. Keeps the array alive."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.__array_interface__["data"][0], False),
        }


def to_json(value: Any) -> Any:
    """A returned structure for JSON: arrays for tensors, lists for tuples. BF16 becomes FP32."""
    if isinstance(value, torch.Tensor):
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy(force=True)
    if isinstance(value, Mapping):
        return {key: to_json(child) for key, child in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {key: to_json(child) for key, child in zip(value._fields, value, strict=True)}
    if isinstance(value, (tuple, list)):
        return [to_json(child) for child in value]
    return value


def _meta(path: TreePath, leaf: Any) -> TensorMeta:
    if isinstance(leaf, (list, tuple, Mapping)):
        return JSON, ()
    if not isinstance(leaf, torch.Tensor):
        raise LoadError(f"output {path_text(path)} is {type(leaf).__name__}; only tensors can be answered")
    return datatype_of(leaf.dtype, f"output {path_text(path)}"), tuple(leaf.shape)


def _same(leaves: OutputTree, others: OutputTree, fp16: bool) -> bool:
    return leaves.keys() == others.keys() and all(
        _close(leaf, others[path], fp16) for path, leaf in leaves.items()
    )


def _close(one: Any, other: Any, fp16: bool) -> bool:
    if isinstance(one, (list, tuple, Mapping)):
        return _same(dict(flatten(one)), dict(flatten(other)), fp16)
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    datatype = _DATATYPES.get(one.dtype, "")
    tolerance = ROUNDING.get("FP16" if fp16 and datatype == "FP32" else datatype)
    if tolerance is None:
        return bool(torch.equal(one, other))
    scale = other.abs().nan_to_num(0, 0, 0).amax().item() if other.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
