"""ONNX models in FP16: the graph is converted once, by a process of its own, and kept.

Weights and operations become FP16; inputs and outputs keep their datatypes, behind casts. What has no kernel
for FP16 stays FP32, and so does arithmetic with shapes: sizes above 2048 are not exact in FP16. The converter
is that of ONNX Runtime. It works on Python's copy of the whole model and holds the interpreter lock for
seconds, which a server that answers has no time for: hence the process.

    python -m inferpool.backends.onnx.gpu.fp16 MODEL.onnx FOLDER
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
"""Rises whenever what is below makes another model of the same file."""

_MODEL: Final = "model.onnx"
_WEIGHTS: Final = "weights.bin"
_FLOAT: Final = 1
_FLOAT16: Final = 10
"""As onnx.proto numbers them (`TensorProto.DataType`)."""


@contextmanager
def in_half(file: Path, kept: Path | None) -> Iterator[Path]:
    """The model of `file` in FP16, as a file for as long as the context lasts; raises LoadError.

    It is kept in the folder `kept`, where there is one that can be written to, for the next time.
    """
    check_file(file)
    folder = None if kept is None else kept / _name()
    if folder is not None and (folder / _MODEL).is_file():
        yield folder / _MODEL
        return
    with TemporaryDirectory(prefix="inferpool-", dir=_writable(kept)) as place:
        made = Path(place) / "made"
        _convert_aside(file, made)
        if folder is not None and _move(made, folder):
            yield folder / _MODEL
        else:
            yield made / _MODEL


def _name() -> str:
    """What the conversion depends on, beside the file."""
    try:
        return f"fp16-{_REVISION}-onnxruntime-{_runtime()}-onnx-{version('onnx')}"
    except PackageNotFoundError as error:
        raise LoadError(f"gpu.fp16 needs the package onnx: {install_command('fp16')}") from error


def _runtime() -> str:
    # The module has its version; the distribution is called onnxruntime or onnxruntime-gpu.
    found: str = importlib.import_module("onnxruntime").__version__
    return found


def _writable(kept: Path | None) -> Path | None:
    """The folder that holds `kept`, made where it is not there yet; None where that cannot be."""
    if kept is None:
        return None
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("models in FP16 are not kept: %s", error)
        return None
    return kept if os.access(kept, os.W_OK) else None


def _move(made: Path, folder: Path) -> bool:
    """Keep what was made; False where another process has done so before, or it cannot be."""
    try:
        made.rename(folder)
    except OSError as error:
        log.info("%s is not kept: %s", folder.name, error)
        return False
    return True


def _convert_aside(file: Path, folder: Path) -> None:
    """Convert in a process of its own; raises LoadError with what that says last."""
    _name()
    command = [sys.executable, "-m", __name__, str(file), str(folder)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if run.returncode:
        said = run.stderr.strip().splitlines() or [f"the converter ended with status {run.returncode}"]
        raise LoadError(f"{file.name} cannot be converted to FP16: {said[-1][:500]}")


def convert(file: Path, folder: Path) -> None:
    """Write the model of `file` in FP16 into `folder`, with its weights beside it.

    Raises what `onnx` and the converter raise.
    """
    # Imported here, for they cost a second and the server needs neither itself.
    onnx = importlib.import_module("onnx")
    converter = importlib.import_module("onnxruntime.transformers.float16")
    folder.mkdir(parents=True)
    inferred = folder / "inferred.onnx"
    # By path, for a model of more than 2 GB is not to be had as one message.
    importlib.import_module("onnx.shape_inference").infer_shapes_path(str(file), str(inferred))
    model = onnx.load(inferred, load_external_data=False)
    importlib.import_module("onnx.external_data_helper").load_external_data_for_model(model, str(file.parent))
    inferred.unlink()
    if model.functions:
        model = importlib.import_module("onnx.inliner").inline_local_functions(model)
    for number, node in enumerate(model.graph.node):
        node.name = f"{number}:{node.name}"
    made = converter.convert_float_to_float16(
        model, keep_io_types=True, disable_shape_infer=True, node_block_list=_shape_nodes(model.graph)
    )
    _join_islands(made.graph)
    _sort(made.graph)
    onnx.save_model(made, folder / _MODEL, save_as_external_data=True, location=_WEIGHTS)


def _shape_nodes(graph: Any) -> list[str]:
    """The names of the nodes whose inputs are shapes, sizes or constants, and nothing else."""
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
    """Let what stays FP32 take its numbers as they were before they became FP16."""
    casts = [
        (node, attribute.i) for node in graph.node for attribute in node.attribute if attribute.name == "to"
    ]
    before = {node.output[0]: node.input[0] for node, element in casts if element == _FLOAT16}
    for node, element in casts:
        if element == _FLOAT:
            node.input[0] = before.get(node.input[0], node.input[0])


def _sort(graph: Any) -> None:
    """Put every node behind those whose outputs it takes, as the format wants it; new casts stand last."""
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    order = TopologicalSorter(
        {
            place: sorted({makers[name] for name in _taken(node) if name in makers})
            for place, node in enumerate(graph.node)
        }
    )
    nodes = [graph.node[place] for place in order.static_order()]
    del graph.node[:]
    graph.node.extend(nodes)


def _taken(node: Any) -> Iterator[str]:
    """The names of what a node takes, and of what the graphs in it take from around them."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for part in inner.node:
                yield from _taken(part)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # noqa: BLE001 - the last line is what the server shows
        shutil.rmtree(sys.argv[2], ignore_errors=True)
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
