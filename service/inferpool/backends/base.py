"""What the pool needs of a runtime: a file becomes a loaded model, a loaded model runs tensors.

A backend is found by name or by the file's suffix. The built-in ones are imported when first needed,
so a server without torch, or without ONNX Runtime, still starts; others may be installed beside
Inferpool under the entry-point group `inferpool.backends`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from inferpool.errors import LoadError
from inferpool.pixel_table import Normalisation
from inferpool.tensors import Signature, Tensors


@dataclass(frozen=True, slots=True)
class TensorHint:
    """What the owner of a model says of one input or output; None is left to the file.

    Attributes:
        name: as requests spell it.
        datatype: a key of `inferpool.tensors.DTYPES`.
        shape: one size a dimension, -1 where it may vary.
    """

    name: str
    datatype: str | None = None
    shape: tuple[int, ...] | None = None


CpuNodes: TypeAlias = Literal["none", "shapes", "any"]
"""Which nodes of a model on a GPU may run on the CPU: none, arithmetic with shapes, whatever has to."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What TensorRT makes of a model for one kind of GPU.

    Attributes:
        folder: where its files are; it is built into an empty one.
        shapes: the inputs whose number of rows varies, with the largest shape of each.
    """

    folder: Path
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is to be loaded.

    Attributes:
        device: `cpu` or `cuda:N`.
        threads: threads that one run may use (at least 1).
        inputs: the inputs as the owner describes them, for files that do not say what they take.
        outputs: the outputs, likewise; for files that do not name them, in their order.
        samples: the inputs of each golden sample as they are written: nested lists, by name or bare.
        trusted: files that can run code when they are loaded may do so, whoever made them.
        sha256: SHA-256 digests, in lower-case hexadecimal, of files that may do so in any case.
        cpu_nodes: on a GPU, what may run on the CPU all the same.
        tf32: on a GPU, matrix products of FP32 may be rounded as TF32.
        fp16: weights and operations of FP32 become FP16; inputs and outputs keep their datatypes.
        memory_bytes: on a GPU, the most that the runtime may take for this copy; None is all there is.
        graphs: on a GPU, `capture` will be called where the runtime has that.
        kept: a folder of this file's content alone, where a backend may keep what it makes of it; None
            where there is none. It need not be there yet, nor be one that can be written to.
        engine: on a GPU, the engine of TensorRT that is to run it; None is as the runtime runs it itself.
        normalise: on a GPU, how it is to normalise the pixels of an input itself; None where none come.
    """

    device: str = "cpu"
    threads: int = 1
    inputs: tuple[TensorHint, ...] = ()
    outputs: tuple[TensorHint, ...] = ()
    samples: tuple[Any, ...] = ()
    trusted: bool = False
    sha256: frozenset[str] = frozenset()
    cpu_nodes: CpuNodes = "none"
    tf32: bool = False
    fp16: bool = False
    memory_bytes: int | None = None
    graphs: bool = False
    kept: Path | None = None
    engine: Engine | None = None
    normalise: Normalisation | None = None


class LoadedModel(ABC):
    """A model in memory. `run` may be called from several threads at once and releases the GIL.

    Attributes:
        signature: what it takes and gives.
        form: which of the backend's kinds of model it is, in a few words; empty where there is one kind.
        max_rows: the largest batch that it takes, by its own account; None where it does not say.
        cpu_nodes: of a model on a GPU, how many nodes of each kind run on the CPU.
        rounding: the datatype that its sums are rounded to where that is coarser than its outputs' own;
            empty elsewhere. Whoever loads a model sets it, by what was asked for.
    """

    signature: Signature
    form: str = ""
    max_rows: int | None = None
    cpu_nodes: Mapping[str, int] = MappingProxyType({})
    rounding: str = ""

    @abstractmethod
    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Compute `outputs` (all of them when None) from `inputs`; raises whatever the runtime raises.

        The inputs match the signature already; optional ones may be absent. The caller does not
        change `inputs` afterwards and owns what is returned.
        """

    def begin(self) -> None:  # noqa: B027 - most have nothing to do
        """Get ready on the thread that runs it from here on, before its first batch.

        Called by an instance's thread when it starts, and by the one that takes its place if it dies.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back memory and devices; no run is under way and none follows."""


class DeviceModel(LoadedModel):
    """A model on a GPU, with memory of its own for inputs and outputs: one thread runs it at a time.

    Every instance has one of its own, so that the copies of one overlap the runs of another. Where the
    device has no memory left for a run, it raises OutOfMemory.

    Attributes:
        graphs: whether runs that repeat are replayed from CUDA graphs, or why they are not; it is known
            once every batch size has run.
        capturable: whether it is worth loading with `LoadOptions.graphs`, and calling `capture` then.
        first: what `begin` does: see there.
        normalises: whether an input may come as pixels too, as `LoadOptions.normalise` says, or why not.
    """

    graphs: bool | str = "its runtime has none here"
    capturable: bool = False
    first: Callable[[], None] | None = None
    normalises: bool | str = "its runtime cannot"

    def begin(self) -> None:
        """Do what is to be done first."""
        if self.first is not None:
            self.first()

    def capture(self, parts: Sequence[Tensors], rows: int | None) -> Tensors:
        """Run as `run_padded`, or as `run` where `rows` is None; such runs of this thread are replayed after.

        Only of a model that was loaded for it. Raises whatever keeps the run from being captured.
        """
        raise NotImplementedError

    def uncapture(self, reason: str) -> None:
        """Run everything as it is from here on, and say that it is for `reason`."""
        raise NotImplementedError

    @abstractmethod
    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Compute `outputs` of the rows of all `parts`, one below the other, in a run of `rows` rows.

        The rows that are missing are zeros, or empty texts, and are cut off the outputs again. Every input
        and output has the rows along its first dimension: only of models for which that has been proven.
        """


class Backend(ABC):
    """A runtime. Subclasses are stateless and made without arguments."""

    name: str
    suffixes: tuple[str, ...]

    @abstractmethod
    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        """Load `file`; raises LoadError with a sentence that says what is wrong with it."""

    def gpu_unavailable_reason(self, file: Path) -> str:
        """Why `file` cannot run on a GPU, whatever the machine has; "" if it can.

        The end of a sentence: `the backend chaos runs models on the CPU only`. Where it can, `load` gives
        a DeviceModel for a device `cuda:N`.
        """
        return f"the backend {self.name} runs models on the CPU only"

    def lacks_engines(self) -> str:
        """Why no model of this backend can be loaded with an engine of TensorRT here; "" if one may be."""
        return f"the backend {self.name} runs no engines of TensorRT"

    def engine_version(self) -> str:
        """The versions that engines are good for, and no others; it `lacks_engines` for no reason."""
        return self.describe()

    @abstractmethod
    def describe(self) -> str:
        """The runtime and its version, for logs and `build_info`: `onnxruntime 1.31.1`."""


_BUILT_IN: Final = {
    "onnx": ("inferpool.backends.onnx.backend", "OnnxBackend", (".onnx",)),
    "torch": ("inferpool.backends.torch.backend", "PyTorchBackend", (".pt", ".pt2")),
}
ENTRY_POINT_GROUP: Final = "inferpool.backends"


def backend_names() -> tuple[str, ...]:
    """Every backend that can be asked for by name, whether or not its runtime is installed."""
    installed = (point.name for point in entry_points(group=ENTRY_POINT_GROUP))
    return (*_BUILT_IN, *installed)


def find_backend(name: str) -> Backend:
    """The backend of this name; raises LoadError if there is none or its runtime is not installed."""
    if name in _BUILT_IN:
        module, attribute, _ = _BUILT_IN[name]
        backend: Backend = getattr(importlib.import_module(module), attribute)()
        return backend
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            found: Backend = point.load()()
            return found
    raise LoadError(f'no backend is called "{name}"; there are {", ".join(backend_names())}')


def describe_backends() -> dict[str, str]:
    """The runtime and version of every backend by name; `not installed` if its runtime is missing."""
    described = {}
    for name in backend_names():
        try:
            described[name] = find_backend(name).describe()
        except LoadError:
            described[name] = "not installed"
    return described


def backends_by_suffix() -> dict[str, str]:
    """File suffix to backend name, for every backend."""
    suffixes = {suffix: name for name, (_, _, listed) in _BUILT_IN.items() for suffix in listed}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        for suffix in point.load().suffixes:
            suffixes.setdefault(suffix, point.name)
    return suffixes
