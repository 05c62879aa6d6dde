"""The interfaces between the pool and a runtime.

A `Backend` turns a file into a `LoadedModel`. A `LoadedModel` turns input tensors into output tensors.
`inferpool.backends.registry` finds the backend of a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.errors import Reason, Verdict
from inferpool.pixel_table import Normalisation
from inferpool.tensors import Signature, Tensors


class Rejection(NamedTuple):
    """Why a runtime cannot run an input.

    Attributes:
        operation: the operation that refuses it, by the runtime's name; empty if that is unknown.
        reason: the runtime's reason, which may quote the input.
    """

    operation: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class TensorHint:
    """The description of one input or output in `model.toml`. A field that is None is read from the file.

    Attributes:
        name: the name that requests use.
        datatype: a key of `inferpool.tensors.DTYPES`.
        shape: one size for each dimension; -1 marks a dimension of any size.
    """

    name: str
    datatype: str | None = None
    shape: tuple[int, ...] | None = None


CpuNodes: TypeAlias = Literal["none", "shapes", "any"]
"""The nodes of a GPU model that may run on the CPU: none, arithmetic with shapes, or any node."""


@dataclass(frozen=True, slots=True)
class TensorRTPlan:
    """A plan that TensorRT builds from a model for one kind of GPU ("engine" in TensorRT's documents).

    Attributes:
        folder: the folder of the plan's files. A load with an empty folder builds the plan.
        shapes: the inputs with a variable number of rows, each with its largest shape.
    """

    folder: Path
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """The part of `LoadOptions` that matters on a GPU.

    Attributes:
        cpu_nodes: the nodes that may run on the CPU all the same.
        tf32: whether matrix products of FP32 may round to TF32.
        fp16: whether FP32 weights and operations become FP16. Inputs and outputs keep their datatypes.
        memory_bytes: the most memory that the runtime may take for this copy; None sets no limit.
        graphs: whether the caller will call `DeviceModel.capture`, if the runtime supports CUDA graphs.
        cache_dir: a folder in which a backend may cache files that it derives from this model file. The
            folder depends on the file's content, may not exist yet and may be read-only. None disables
            the cache.
        tensorrt: the TensorRT plan that runs the model; None runs it without TensorRT.
        normalisation: how the GPU normalises the pixels of an input; None if no pixels are sent.
    """

    cpu_nodes: CpuNodes = "none"
    tf32: bool = False
    fp16: bool = False
    memory_bytes: int | None = None
    graphs: bool = False
    cache_dir: Path | None = None
    tensorrt: TensorRTPlan | None = None
    normalisation: Normalisation | None = None

    @property
    def rounding(self) -> str:
        """The value of `LoadedModel.rounding` for a model that is loaded with these options."""
        return "FP16" if self.fp16 or self.tf32 else ""  # TF32 has as many digits as FP16


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model.

    Attributes:
        device: `cpu` or `cuda:N`.
        threads: the number of threads that one run may use (at least 1).
        inputs: the owner's description of the inputs, for files that do not describe them.
        outputs: the owner's description of the outputs in their order, for files that do not name them.
        samples: the inputs of each golden sample, as its JSON has them: nested lists, by name or bare.
        trusted: whether the file may run code during its load.
        sha256: SHA-256 digests (lower-case hexadecimal) that the owner lists, for the refusal of a file that
            is not trusted: the caller has compared them with what it loads.
        gpu: what holds on a GPU only.
    """

    device: str = "cpu"
    threads: int = 1
    inputs: tuple[TensorHint, ...] = ()
    outputs: tuple[TensorHint, ...] = ()
    samples: tuple[Any, ...] = ()
    trusted: bool = False
    sha256: frozenset[str] = frozenset()
    gpu: GpuOptions = GpuOptions()

    def with_gpu(self, **changes: Any) -> LoadOptions:
        """A copy with these fields of `gpu` changed; raises TypeError for an unknown field."""
        return replace(self, gpu=replace(self.gpu, **changes))


class LoadedModel(ABC):
    """A model in memory. Several threads may call `run` at once; `run` releases the GIL.

    Attributes:
        signature: the inputs and outputs.
        form: the kind of model in a few words, for a backend with several kinds; else empty.
        max_rows: the largest batch that the model declares; None if it declares none.
        cpu_nodes: for a model on a GPU, the number of nodes of each kind that run on the CPU.
        rounding: the datatype that intermediate sums are rounded to, if it is coarser than the outputs'
            own; else empty. On a GPU it is that of the options.
    """

    signature: Signature
    form: str = ""
    max_rows: int | None = None
    cpu_nodes: Mapping[str, int] = MappingProxyType({})
    rounding: str = ""

    @abstractmethod
    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Compute `outputs` (None: all of them) from `inputs`; raises whatever the runtime raises.

        A model of PyTorch also takes names of gradients, and then nothing else among `outputs`.
        The inputs already match the signature; optional inputs may be absent. The caller does not
        change `inputs` afterwards and owns the returned tensors.

        The model does not write to `inputs`: they may run again, and rows of them may be kept as a sample.
        """

    def rejection(self, error: Exception) -> Rejection | None:
        """Why the input is to blame for `error`, which `run` raised for it; None if it is not known to be."""
        return None

    def stop_run(self, thread: int) -> None:  # noqa: B027 - some runtimes cannot
        """Ask the run that the thread with this identifier has begun to end soon, by raising an error.

        Any thread may call this, at any moment. It may come too late, or before the run has begun, and then
        does nothing. A runtime that cannot stop a run does nothing either.
        """

    def release_memory(self) -> None:  # noqa: B027 - most runtimes keep none
        """Free memory that the runtime keeps for later runs and that no run uses.

        Any thread may call this at any moment before `close`. The next runs take longer.
        """

    def lost(self) -> Reason | None:
        """Why this process cannot use the device any more; None if it can. Asked after a run has raised.

        After some errors of CUDA (an address that is not mapped, a failed assertion in a kernel) every later
        call of the process fails, on every copy of every model on that device.
        """
        return None

    def begin(self) -> None:  # noqa: B027 - most models have nothing to do
        """Prepare the calling thread, which runs the model from now on, before its first batch.

        An instance's thread calls this when it starts. Its replacement calls it again after a crash.
        """

    @abstractmethod
    def close(self) -> None:
        """Free memory and devices. No run is in progress and none follows."""


REPLAYED: Final = Verdict(True, "runs are replayed from CUDA graphs")
"""The value of `DeviceModel.graphs` after a successful capture."""


class DeviceModel(LoadedModel):
    """A model on a GPU with its own memory for inputs and outputs. One thread runs it at a time.

    Each instance has its own copy, so that the copies of one instance overlap the runs of another.
    `run` and `run_padded` raise OutOfMemory if the device has too little memory for the run.

    Attributes:
        graphs: whether repeated runs are replayed from CUDA graphs. Final once every batch size has run.
        can_capture: whether loading with `GpuOptions.graphs` and calling `capture` can pay off.
        takes_pixels: whether an input may also arrive as pixels, as `GpuOptions.normalisation` describes.
    """

    graphs: Verdict = Verdict(False, "its runtime has none here")
    can_capture: bool = False
    takes_pixels: Verdict = Verdict(False, "its runtime cannot")

    def capture(self, parts: Sequence[Tensors], rows: int | None) -> Tensors:
        """Run like `run_padded` (or like `run` if `rows` is None), and capture the run as a CUDA graph.

        Later runs of the same shape on this thread are replayed. Requires a model that was loaded with
        `GpuOptions.graphs`. Raises whatever prevents the capture.
        """
        raise NotImplementedError

    def uncapture(self, reason: Reason) -> None:
        """Drop all graphs and run without graphs from now on, because of `reason`."""
        raise NotImplementedError

    @abstractmethod
    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Concatenate the rows of all `parts`, pad them to `rows` rows and compute `outputs`.

        Padding rows are zeros or empty texts; their outputs are cut off. The first dimension of every
        input and output must be the rows, so the caller must have proven that the model can be batched.
        """


class Backend(ABC):
    """A runtime. Subclasses hold no state and have a constructor without arguments.

    Attributes:
        name: the name in `model.toml`.
        suffixes: those of the files that it loads.
        runs_code: whether a file can run code while it is loaded. `LoadOptions.trusted` then also says that
            the digest of the file is one of those that `model.toml` lists.
        loads_at_once: whether several threads may load files at the same time.
        starts_threads_first: whether a load on the CPU starts all threads of the runs, one less than
            `LoadOptions.threads`, before it does anything that takes long.
    """

    name: str
    suffixes: tuple[str, ...]
    runs_code: bool = False
    loads_at_once: bool = False
    starts_threads_first: bool = False

    @abstractmethod
    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        """Load `file`. Raises LoadError, whose text says what is wrong with the file.

        For a device `cuda:N` the result is a DeviceModel, if the backend supports GPUs.
        """

    def read_rows(self, file: Path, options: LoadOptions) -> RowVerdict:
        """Find out by reading the graph of `file` whether any operation mixes the rows of a batch.

        Nothing of the file is run, and it is loaded only if `options` trust it. The verdict on a file that
        cannot be read is UNKNOWN.
        """
        return RowVerdict(Independence.UNKNOWN, f"the backend {self.name} does not read graphs")

    def gpu_unavailable_reason(self, file: Path) -> Reason | None:
        """Why this backend cannot run `file` on any GPU; None if it can.

        The reason reads as the end of a sentence: `the backend chaos runs models on the CPU only`.
        """
        return f"the backend {self.name} runs models on the CPU only"

    def tensorrt_unavailable_reason(self) -> Reason | None:
        """Why this backend cannot run a TensorRT plan here; None if it can."""
        return f"the backend {self.name} does not use TensorRT"

    def tensorrt_version(self) -> str:
        """The versions that a TensorRT plan depends on. Requires that TensorRT is available."""
        return self.describe()

    def import_runtime(self) -> None:  # noqa: B027 - most are imported with their backend
        """Import the runtime ahead of the first load. If it cannot be imported, the load will say so."""

    @abstractmethod
    def describe(self) -> str:
        """The runtime and its version, for logs and `build_info`: `onnxruntime 1.31.1`."""


class DeviceLost(Exception):
    """The process cannot use a device any more; the text is the reason."""


_NO_MEMORY: Final = ("std::bad_alloc", "Failed to allocate memory", "can't allocate memory")
"""Words in the errors of ONNX Runtime and PyTorch if the system gives them no memory."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a run failed because the host lacks memory, whatever class of error its runtime raises."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)
