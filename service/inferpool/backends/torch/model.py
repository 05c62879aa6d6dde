"""What PyTorch's kinds of model have in common: tensors in and out, threads, the first runs.

A kind of model is a `Forward`: a function of named tensors. The rest is here.

PyTorch keeps the number of threads of a run in two places: OpenMP's, which is the calling thread's own,
and MKL's, which is the process's. So it is set before every run, which costs a third of a microsecond:
each instance has its own number, and only a matrix product that starts while another model is between
the two steps may use the other's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.torch.signature import (
    Place,
    TensorMeta,
    complete_outputs,
    name_outputs,
    pairs_to_try,
    place_text,
)
from inferpool.errors import LoadError, short_reason
from inferpool.tensors import ROUNDING, Array, Signature, Tensors, TensorSpec, name_text

log = logging.getLogger(__name__)

InputTensors: TypeAlias = dict[str, torch.Tensor]
OutputTree: TypeAlias = dict[Place, Any]
Forward: TypeAlias = Callable[[InputTensors], OutputTree]
"""Runs a model: named tensors in, everything that it returned out, by where it stands."""

WARM_RUNS: Final = 3
"""The executor of TorchScript watches the first run and optimises in the second: the third is as any."""

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
    """A kind of model, as far as it is known before its first run.

    Attributes:
        forward: runs it; may be called from several threads at once.
        inputs: their specs.
        form: which kind of model this is, in a few words.
        copies: inputs have to be copied, because it may write to them.
        max_rows: the largest batch that it takes; None where that is not known.
        release: gives back what the collector does not.
        device: where its weights are, and its inputs have to be.
        waits: why its runs cannot be recorded on a GPU, where that is known beforehand.
    """

    forward: Forward
    inputs: tuple[TensorSpec, ...]
    form: str
    copies: bool
    max_rows: int | None = None
    release: Callable[[], None] = lambda: None
    device: str = "cpu"
    waits: str = ""


class TorchModel(LoadedModel):
    """A model of PyTorch on the CPU. Instances share it, and with it one copy of the weights."""

    def __init__(self, runnable: Runnable, outputs: Mapping[Place, TensorSpec], threads: int) -> None:
        """`outputs` are all that the model gives, by where they stand in what it returns."""
        self.signature = Signature(runnable.inputs, tuple(outputs.values()))
        self.form = runnable.form
        self.max_rows = runnable.max_rows
        self._runnable: Runnable | None = runnable
        self._forward = runnable.forward
        self._copies = runnable.copies
        self._places = {spec.name: place for place, spec in outputs.items()}
        self._threads = threads

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the model; raises what PyTorch raises, and RuntimeError where an output is missing."""
        specs = self.signature.inputs_by_name
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            feeds = {
                name: to_tensor(array, specs[name].datatype, copy=self._copies)
                for name, array in inputs.items()
            }
            leaves = self._forward(feeds)
            answer = {}
            for name in self._places if outputs is None else outputs:
                leaf = leaves.get(self._places[name])
                if leaf is None:
                    raise RuntimeError(f"the model gave no output {name_text(name)}")
                answer[name] = to_array(leaf)
        return answer

    def close(self) -> None:
        """Drop the module, and with it its memory."""
        if self._runnable is not None:
            self._runnable.release()
        self._runnable = None
        del self._forward


def start(
    runnable: Runnable, options: LoadOptions, known: Mapping[Place, TensorMeta] | None = None
) -> LoadedModel:
    """Run a model until it is warm, and see what it gives where that is not `known`; raises LoadError.

    It runs the golden samples, or made-up rows.
    """
    runs, fault = [known] if known is not None else [], ""
    for pair in pairs_to_try(runnable.inputs, options.samples):
        try:
            answers = [run_once(runnable, inputs, options.threads) for inputs in pair]
            for _ in range(WARM_RUNS - 1):
                run_once(runnable, pair[0], options.threads)
        except Exception as error:  # noqa: BLE001 - made-up rows may be nonsense to the model
            fault = fault or short_reason(error)
            continue
        runs = runs or [{place: _facts(place, leaf) for place, leaf in leaves.items()} for leaves in answers]
        break
    if not runs:
        raise LoadError(
            f"the model runs neither its golden samples nor made-up rows of its inputs ({fault});"
            " add a golden sample, or correct what model.toml says of its inputs"
        )
    names = name_outputs(list(runs[0]), options.outputs)
    specs = complete_outputs(names, runs, options.outputs)
    outputs = dict(zip(names, specs, strict=True))
    if runnable.device != "cpu":
        # Imported here, for it is made of what is here.
        from inferpool.backends.torch.gpu.device_model import TorchDeviceModel

        return TorchDeviceModel(runnable, outputs, runnable.device, normalisation=options.normalise)
    return TorchModel(runnable, outputs, options.threads)


def agree(reference: Runnable, candidate: Runnable, options: LoadOptions) -> bool:
    """Whether two ways to run a model give the same; False where `reference` runs nothing at all."""
    for pair in pairs_to_try(reference.inputs, options.samples):
        compared = 0
        for inputs in pair:
            try:
                expected = run_once(reference, inputs, options.threads)
            except Exception:  # noqa: BLE001 - made-up rows may be nonsense to the model
                continue
            try:
                if not _same(run_once(candidate, inputs, options.threads), expected, options.fp16):
                    return False
            except RuntimeError:
                return False
            compared += 1
        if compared:
            return True
    return False


def run_once(runnable: Runnable, inputs: Tensors, threads: int) -> OutputTree:
    """One run with copies of `inputs`, outside of any instance; raises what the model raises."""
    datatypes = {spec.name: spec.datatype for spec in runnable.inputs}
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return runnable.forward(
            {
                name: to_tensor(array, datatypes[name], copy=True).to(runnable.device)
                for name, array in inputs.items()
            }
        )


def datatype_of(dtype: torch.dtype, what: str) -> str:
    """The datatype's name; raises LoadError, which names `what`, where the protocol has none."""
    if dtype not in _DATATYPES:
        raise LoadError(f"{what} is {str(dtype).removeprefix('torch.')}, which cannot be sent or answered")
    return _DATATYPES[dtype]


def check_datatypes(specs: Sequence[TensorSpec]) -> None:
    """Raise LoadError for an input of a datatype that PyTorch does not have."""
    for spec in specs:
        if spec.datatype not in _DATATYPES.values():
            raise LoadError(f"input {name_text(spec.name)} is {spec.datatype}, which PyTorch does not have")


def to_tensor(array: Array, datatype: str, *, copy: bool) -> torch.Tensor:
    """The tensor on an array's memory, or on a copy; a read-only array is promised not to be written to."""
    # An array of one element counts as contiguous whatever its strides are, and PyTorch takes none below 0.
    plain = array.flags.c_contiguous and array.flags.aligned and min(array.strides, default=0) >= 0
    if copy or not plain:
        array = np.array(array, order="C")
    elif not array.flags.writeable:
        array = np.asarray(_Writable(array))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if datatype == "BF16" else tensor


def to_array(tensor: torch.Tensor) -> Array:
    """The array on a tensor's memory; of BF16 its bits."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy(force=True)
    return array


@contextmanager
def quiet(file: Path) -> Iterator[None]:
    """Turn whatever PyTorch raises on loading `file` into LoadError, and its warnings into nothing."""
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
    """The memory of a read-only array, for PyTorch, which warns of those; it keeps the array alive."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.__array_interface__["data"][0], False),
        }


def _facts(place: Place, leaf: Any) -> TensorMeta:
    if not isinstance(leaf, torch.Tensor):
        raise LoadError(
            f"output {place_text(place)} is {type(leaf).__name__}, and only tensors can be answered"
        )
    return datatype_of(leaf.dtype, f"output {place_text(place)}"), tuple(leaf.shape)


def _same(leaves: OutputTree, others: OutputTree, fp16: bool) -> bool:
    return leaves.keys() == others.keys() and all(
        _close(leaf, others[place], fp16) for place, leaf in leaves.items()
    )


def _close(one: Any, other: Any, fp16: bool) -> bool:
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
