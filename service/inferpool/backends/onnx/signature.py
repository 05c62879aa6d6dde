"""Reads the signature of an ONNX model from a session of ONNX Runtime."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from inferpool.backends.onnx.model_file import graph_values
from inferpool.errors import LoadError
from inferpool.tensors import ANY, JSON, Signature, TensorSpec

log = logging.getLogger(__name__)

DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""Type names of ONNX Runtime to datatypes of the protocol."""

_NAMELESS: Final = frozenset(("?", "*", "-1", "none", "null", "nan", "dynamic", "unk", "unknown", "any"))
"""Names, in lower case, that exporters give to any open dimension: equal names are not equal sizes."""

_OPTIONAL_TENSOR: Final = re.compile(r"optional\((tensor\(\w+\))\)")
_NESTED: Final = re.compile(r"(?:optional\(|seq\(|map\(\w+,)+(tensor\(\w+\))\)+")


def read_signature(file: Path, session: Any) -> Signature:
    """The signature of `session`, which has loaded `file`.

    An initialiser that may be overridden is an optional input, and so is an input of an optional type. An
    output that is a sequence, a map or an optional value has the datatype `JSON`.

    Raises LoadError for an input or output whose type no request or response can carry. An optional input of
    such a type is left out of the signature instead.
    """
    try:
        return _read(file, session)
    except UnicodeDecodeError as error:
        raise LoadError(f"a name in {file.name} is not UTF-8") from error


def _read(file: Path, session: Any) -> Signature:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    defaults = session.get_overridable_initializers()
    unranked: frozenset[str] = frozenset()
    # The session reports an empty shape for scalars and for tensors of unknown rank.
    if not all(node.shape for node in (*inputs, *defaults, *outputs)):
        unranked = frozenset(value.name for value in graph_values(file) if not value.ranked)
    input_specs = [*_inputs(inputs, unranked), *_inputs(defaults, unranked, overridable=True)]
    # A file may list an output twice, but a response names it once.
    output_specs = {node.name: _output(node, unranked) for node in outputs}
    return Signature(tuple(input_specs), tuple(output_specs.values()))


def _inputs(
    nodes: Iterable[Any], unranked: frozenset[str], *, overridable: bool = False
) -> Iterator[TensorSpec]:
    for node in nodes:
        optional = overridable or node.type.startswith("optional(")
        within = _OPTIONAL_TENSOR.fullmatch(node.type)
        datatype = DATATYPES.get(within[1] if within else node.type)
        if datatype is not None:
            yield TensorSpec(node.name, datatype, _shape(node, unranked), optional, _symbols(node))
        elif optional:
            log.info('input "%s" has type %s, which no request can set', node.name, node.type)
        else:
            raise _unservable("input", node)


def _output(node: Any, unranked: frozenset[str]) -> TensorSpec:
    datatype = DATATYPES.get(node.type)
    if datatype is not None:
        return TensorSpec(node.name, datatype, _shape(node, unranked), symbols=_symbols(node))
    nested = _NESTED.fullmatch(node.type)
    # ONNX Runtime cannot convert BF16 to Python objects.
    if nested is None or DATATYPES.get(nested[1], "BF16") == "BF16":
        raise _unservable("output", node)
    return TensorSpec(node.name, JSON, None)


def _shape(node: Any, unranked: frozenset[str]) -> tuple[int, ...] | None:
    if not node.shape and node.name in unranked:
        return None
    return tuple(size if isinstance(size, int) and size >= 0 else ANY for size in node.shape)


def _symbols(node: Any) -> tuple[str, ...]:
    # The sizes of an overridable initialiser have another integer type, so test for str.
    symbols = tuple(
        size if isinstance(size, str) and size.strip().lower() not in _NAMELESS else "" for size in node.shape
    )
    return symbols if any(symbols) else ()


def _unservable(kind: str, node: Any) -> LoadError:
    return LoadError(f'{kind} "{node.name}" has type {node.type}, which cannot be served')
