"""Answers of the Open Inference Protocol v2: JSON, alone or followed by tensors in binary form.

The protocol leaves some choices open. Here `data` in JSON is flat. A number that is not finite is `null`,
and the output's parameters then say `"non_finite": true`. `BF16` in JSON is written as the numbers that its
bits stand for. An output that is not a tensor (a sequence or a map) is `BYTES` of JSON text, one string for
each element of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from inferpool.system.cpu_pace import let_others_run
from inferpool.tensors import DTYPES, JSON, Array, Signature, TensorSpec, bf16_to_fp32
from inferpool.wire.json_bodies import has_non_finite, write
from inferpool.wire.json_pieces import Chunk, write_infer
from inferpool.wire.v2_binary import to_binary
from inferpool.wire.v2_classification import classify, empty_in_pieces
from inferpool.wire.v2_request import RequestedOutput

_ALIGNMENT: Final = 8
"""Bytes of the largest element."""
_SPACES: Final = b" " * _ALIGNMENT
_NO_LABELS: Final[Mapping[str, Sequence[str]]] = MappingProxyType({})


def encode_infer(
    model: str,
    version: str,
    request_id: str,
    outputs: Mapping[str, Any],
    requested: Sequence[RequestedOutput] | None,
    binary_default: bool,
    signature: Signature,
    labels: Mapping[str, Sequence[str]] = _NO_LABELS,
    join: Callable[[Iterable[Chunk]], list[bytes]] | None = None,
) -> tuple[list[bytes | memoryview], int | None]:
    """Return the parts of the answer, and the length of its JSON header if parts in binary form follow it.

    `requested` are outputs that the model has, None for all of `outputs`. `labels` name the classes of a
    classification, by output. An empty `request_id` is left out. Large arrays are not copied: the parts are
    views of them. With `join`, which joins them, the JSON is written in pieces, beside the event loop. Raises
    InvalidInput if a classification is asked of an output without numbers, and ModelFailed if an output
    cannot be written.
    """
    if requested is None:
        requested = [RequestedOutput(name) for name in outputs]
    entries: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    classes: list[Array] = []
    binary_any = False
    for wanted in requested:
        spec = signature.outputs_by_name.get(wanted.name)
        tensor, datatype = _output(outputs[wanted.name], spec)
        if wanted.classification:
            tensor = classify(
                wanted.name,
                tensor,
                datatype,
                wanted.classification,
                labels.get(wanted.name, ()),
                None if join is None else let_others_run,
            )
            datatype = "BYTES"
            classes.append(tensor)
        entry: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": tensor.shape}
        if binary_default if wanted.binary_data is None else wanted.binary_data:
            part = to_binary(tensor)
            entry["parameters"] = {"binary_data_size": len(part)}
            parts.append(part)
            binary_any = True
        else:
            numbers = bf16_to_fp32(tensor) if datatype == "BF16" else tensor
            entry["data"] = numbers.reshape(-1)
            if numbers.dtype.kind == "f" and has_non_finite(numbers):
                entry["parameters"] = {"non_finite": True}
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if request_id:
        answer["id"] = request_id
    header = [write(answer)] if join is None else join(write_infer(answer))
    if join is not None:
        for strings in classes:
            empty_in_pieces(strings)
    if not binary_any:
        return [*header, *filter(len, parts)], None
    length = sum(map(len, header))
    padding = -length % _ALIGNMENT
    if padding:
        # JSON may end with spaces. A client then finds the first tensor aligned, and need not copy it.
        header[-1] += _SPACES[:padding]
    return [*header, *filter(len, parts)], length + padding


def _output(value: Any, spec: TensorSpec | None) -> tuple[Array, str]:
    """Return an output as a tensor, and its datatype."""
    is_tensor = isinstance(value, (np.ndarray, np.generic))
    if is_tensor and (spec is None or spec.datatype != JSON):
        tensor = np.asarray(value)
        return tensor, spec.datatype if spec else _datatype_of(tensor)
    elements = value if isinstance(value, list) else [value]
    return np.array([write(element).decode() for element in elements], dtype=np.object_), "BYTES"


def _datatype_of(tensor: Array) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
