"""ONNX models in FP16. A process of its own converts the graph once, and the result is cached.

Weights and operations become FP16. Inputs and outputs keep their datatypes, behind casts. Operations without
an FP16 kernel stay FP32, and so does arithmetic with shapes, because sizes above 2048 are not exact in FP16.

The converter is part of ONNX Runtime. It works on a Python copy of the whole model and holds the interpreter
lock for seconds, which would stop a server from answering. Therefore it runs in a process of its own:

    python -m inferpool.backends.onnx.gpu.fp16 MODEL.onnx FOLDER
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from inferpool.backends.onnx.load_errors import check_file
from inferpool.errors import LoadError
from inferpool.system.install_hints import install_command

log = logging.getLogger(__name__)

_REVISION: Final = 1
"""Increase this number when a change below alters the converted model."""

_MODEL: Final = "model.onnx"
_WEIGHTS: Final = "weights.bin"
_FLOAT: Final = 1
_FLOAT16: Final = 10
"""The numbers of FLOAT and FLOAT16 in onnx.proto (`TensorProto.DataType`)."""


@contextmanager
def in_half(file: Path, cache_dir: Path | None) -> Iterator[Path]:
    """The path of the FP16 version of `file`, which exists for as long as the context lasts.

    The converted model is kept in `cache_dir`, if that is given and writable. Raises LoadError.
    """
    check_file(file)
    folder = None if cache_dir is None else cache_dir / _cache_name()
    if folder is not None and (folder / _MODEL).is_file():
        yield folder / _MODEL
        return
    with TemporaryDirectory(prefix="inferpool-", dir=_writable(cache_dir)) as temporary:
        converted = Path(temporary) / "converted"
        _run_converter(file, converted)
        if folder is not None and _move(converted, folder):
            yield folder / _MODEL
        else:
            yield converted / _MODEL


def _cache_name() -> str:
    """A folder name made of everything besides the file that the conversion depends on."""
    try:
        return f"fp16-{_REVISION}-onnxruntime-{_runtime_version()}-onnx-{version('onnx')}"
    except PackageNotFoundError as error:
        raise LoadError(f"gpu.fp16 needs the package onnx: run {install_command('fp16')}") from error


def _runtime_version() -> str:
    # Ask the module: the distribution may be called onnxruntime or onnxruntime-gpu.
    found: str = importlib.import_module("onnxruntime").__version__
    return found


def _writable(cache_dir: Path | None) -> Path | None:
    """`cache_dir`, created if it is missing; None if it is None or cannot be written to."""
    if cache_dir is None:
        return None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("FP16 models are not cached: %s", error)
        return None
    return cache_dir if os.access(cache_dir, os.W_OK) else None


def _move(converted: Path, folder: Path) -> bool:
    """Move the converted model to the cache; False if that fails or another process was first."""
    try:
        converted.rename(folder)
    except OSError as error:
        log.info("%s is not cached: %s", folder.name, error)
        return False
    return True


def _run_converter(file: Path, folder: Path) -> None:
    """Convert in a process of its own; raises LoadError with the last line that the process writes."""
    _cache_name()  # raises if the package onnx is missing
    command = [sys.executable, "-m", __name__, str(file), str(folder)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"the converter ended with status {run.returncode}"]
        raise LoadError(f"{file.name} cannot be converted to FP16: {lines[-1][:500]}")


def convert(file: Path, folder: Path) -> None:
    """Write the FP16 version of `file` and its weights into `folder`.

    Raises what `onnx` and the converter raise.
    """
    # Imported here: these packages take a second to import, and the server does not need them.
    onnx = importlib.import_module("onnx")
    folder.mkdir(parents=True)
    converted = to_half(read_for_conversion(file, folder))
    onnx.save_model(converted, folder / _MODEL, save_as_external_data=True, location=_WEIGHTS)


def read_for_conversion(file: Path, folder: Path) -> Any:
    """Read a model with its weights and the shapes of its values; `folder` is for a file meanwhile.

    The name of each node is its number, a colon and its name in the file.
    """
    onnx = importlib.import_module("onnx")
    inferred = folder / "inferred.onnx"
    # By path: a model of more than 2 GB does not fit into one protobuf message.
    importlib.import_module("onnx.shape_inference").infer_shapes_path(str(file), str(inferred))
    model = onnx.load(inferred, load_external_data=False)
    importlib.import_module("onnx.external_data_helper").load_external_data_for_model(model, str(file.parent))
    inferred.unlink()
    if model.functions:
        model = importlib.import_module("onnx.inliner").inline_local_functions(model)
    for number, node in enumerate(model.graph.node):
        node.name = f"{number}:{node.name}"
    return model


def to_half(model: Any, kept: Collection[str] = ()) -> Any:
    """Convert what `read_for_conversion` returned, which is changed.

    Nodes in `kept` stay FP32: names of nodes in the file, and kinds of operations.
    """
    converter = importlib.import_module("onnxruntime.transformers.float16")
    named = [node.name for node in model.graph.node if node.name.partition(":")[2] in kept]
    converted = converter.convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*converter.DEFAULT_OP_BLOCK_LIST, *kept],
        node_block_list=[*_shape_nodes(model.graph), *named],
    )
    _join_islands(converted.graph)
    _sort(converted.graph)
    return converted


def _shape_nodes(graph: Any) -> list[str]:
    """The names of the nodes that compute with shapes and sizes: they take those and constants only."""
    known = {tensor.name for tensor in graph.initializer} | {""}
    shapes: set[str] = set()
    found = []
    for node in graph.node:
        if node.op_type == "Constant":
            known.update(node.output)
        elif node.op_type in ("Shape", "Size"):
            shapes.update(node.output)
        elif shapes.intersection(node.input) and (shapes | known).issuperset(node.input):
            shapes.update(node.output)
            found.append(node.name)
    return found


def _join_islands(graph: Any) -> None:
    """Feed the nodes that stay FP32 with the original FP32 numbers, not with numbers cast down and up."""
    casts = [
        (node, attribute.i) for node in graph.node for attribute in node.attribute if attribute.name == "to"
    ]
    before = {node.output[0]: node.input[0] for node, element in casts if element == _FLOAT16}
    for node, element in casts:
        if element == _FLOAT:
            node.input[0] = before.get(node.input[0], node.input[0])


def _sort(graph: Any) -> None:
    """Sort the nodes topologically, as the format requires. The converter appends its casts at the end."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    order = TopologicalSorter(
        {
            index: sorted({makers[name] for name in _inputs_of(node) if name in makers})
            for index, node in enumerate(graph.node)
        }
    )
    nodes = [graph.node[index] for index in order.static_order()]
    del graph.node[:]
    graph.node.extend(nodes)


def _inputs_of(node: Any) -> Iterator[str]:
    """The names of a node's inputs, and of the outer values that its subgraphs use."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for nested in inner.node:
                yield from _inputs_of(nested)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - the server shows the last line
        shutil.rmtree(sys.argv[2], ignore_errors=True)
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
