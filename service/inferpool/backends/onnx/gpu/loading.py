"""Loads an ONNX file on a GPU, in FP16 if that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.onnx.gpu.bound_model import BoundModel, bindable
from inferpool.backends.onnx.gpu.fp16 import in_half
from inferpool.backends.onnx.gpu.normaliser import Normaliser, open_normaliser
from inferpool.backends.onnx.gpu.session import GraphsRefused, open_memory, open_session
from inferpool.backends.onnx.gpu.tensorrt import tensorrt_unavailable_reason
from inferpool.backends.onnx.load_errors import check_file
from inferpool.backends.onnx.model import session_settings
from inferpool.backends.onnx.signature import read_signature
from inferpool.errors import LoadError, OutOfMemory, Reason, UnfitForGpu, Verdict
from inferpool.system.gpus import CPU

_OpenFile: TypeAlias = Callable[[], AbstractContextManager[Path]]
"""Gives the path of the file to load. The file exists for as long as the context lasts."""


def load(file: Path, options: LoadOptions, load_on_cpu: Callable[[Path], LoadedModel]) -> LoadedModel:
    """Load `file`, an absolute path, on `options.device`, which may be the CPU for a model in FP16.

    `load_on_cpu` loads another file with the same options on the CPU. Raises LoadError, or OutOfMemory on a
    GPU.
    """
    if not options.gpu.fp16:
        return _load_on_gpu(lambda: nullcontext(file), options)
    open_file = partial(in_half, file, options.gpu.cache_dir)
    if options.device == CPU:
        with open_file() as converted:
            return load_on_cpu(converted)
    try:
        return _load_on_gpu(open_file, options)
    except UnfitForGpu as error:
        raise UnfitForGpu(f"{error.detail}; gpu.fp16 = false may leave fewer nodes on the CPU") from error


def _load_on_gpu(open_file: _OpenFile, options: LoadOptions) -> BoundModel:
    if options.gpu.tensorrt is not None and (reason := tensorrt_unavailable_reason()):
        raise LoadError(reason)
    memory = open_memory(options)
    without_graphs = options.with_gpu(graphs=False)

    def open_without_graphs() -> Any:
        with open_file() as file:
            return open_session(file, without_graphs, session_settings(options), memory.stream)[0]

    try:
        refused: Reason | None = None
        with open_file() as file:
            check_file(file)
            try:
                session, cpu_nodes = open_session(file, options, session_settings(options), memory.stream)
            except GraphsRefused as error:
                refused = error.detail
                settings = session_settings(options)
                session, cpu_nodes = open_session(file, without_graphs, settings, memory.stream)
            signature = read_signature(file, session)
        if not bindable(signature):
            raise UnfitForGpu(
                'a GPU takes tensors of numbers only; set instances.devices = ["cpu"] in model.toml'
            )
    except BaseException:
        memory.close()
        raise
    normaliser: Normaliser | None = None
    takes_pixels: Verdict | None = None
    if options.gpu.normalisation is not None:
        try:
            normaliser = open_normaliser(
                options.gpu.normalisation, options, session_settings(options), memory
            )
        except (LoadError, OutOfMemory) as error:
            takes_pixels = Verdict(False, error.detail)
    return BoundModel(
        session,
        signature,
        options.device,
        memory,
        cpu_nodes,
        streamed=True,
        graphs_refused=refused,
        open_without_graphs=open_without_graphs if options.gpu.graphs and refused is None else None,
        normaliser=normaliser,
        takes_pixels=takes_pixels,
        rounding=options.gpu.rounding,
    )
