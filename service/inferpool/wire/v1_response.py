"""Writes answers by rows or by outputs: `{"predictions": …}` and `{"outputs": …}` of the protocol V1.

A prediction is a row of the only output of a model, or an object with a row of each output. Numbers that
are not finite become null. Everything is written in pieces, as `json_pieces` does, and this module is not
compiled either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np

from inferpool.tensors import bf16_to_fp32
from inferpool.wire.json_bodies import write
from inferpool.wire.json_pieces import PIECE_ELEMENTS, Chunk, write_value

_PIECE_OBJECTS: Final = 512
"""Objects that are written at a time at most."""


def write_predictions(outputs: Mapping[str, Any], bf16: Collection[str]) -> Iterator[Chunk]:
    """Yield the answer by rows. The outputs named in `bf16` hold raw bits.

    Outputs that have no rows in common are one object instead of a list. Raises ModelFailed if JSON cannot
    hold an output.
    """
    plain = _plain(outputs, bf16)
    yield b'{"predictions":'
    if len(plain) == 1:
        yield from write_value(next(iter(plain.values())))
    elif (count := _rows(plain)) is None:
        yield from _write_object(plain)
    else:
        yield b"["
        for start, rows in _row_pieces(plain, count):
            yield (b"," if start else b"") + write(rows)[1:-1]
        yield b"]"
    yield b"}"


def write_outputs(outputs: Mapping[str, Any], bf16: Collection[str]) -> Iterator[Chunk]:
    """Yield the answer by outputs: the only one, or an object of several. Raises as `write_predictions`."""
    plain = _plain(outputs, bf16)
    yield b'{"outputs":'
    yield from write_value(next(iter(plain.values()))) if len(plain) == 1 else _write_object(plain)
    yield b"}"


def write_lines(outputs: Mapping[str, Any], bf16: Collection[str]) -> Iterator[Chunk]:
    """Yield the predictions as JSON Lines, one a line. Raises as `write_predictions`."""
    plain = _plain(outputs, bf16)
    count = _rows(plain)
    if count is None:
        yield from _write_object(plain)
        yield b"\n"
        return
    for _, rows in _row_pieces(plain, count):
        alone = len(plain) == 1
        yield b"".join(write(next(iter(row.values())) if alone else row) + b"\n" for row in rows)


def _plain(outputs: Mapping[str, Any], bf16: Collection[str]) -> dict[str, Any]:
    return {name: bf16_to_fp32(value) if name in bf16 else value for name, value in outputs.items()}


def _rows(outputs: Mapping[str, Any]) -> int | None:
    """The rows that all outputs have; None if they differ, or if one has none."""
    counts = {
        len(value) if isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim) else -1
        for value in outputs.values()
    }
    count = counts.pop() if len(counts) == 1 else -1
    return count if count >= 0 else None


def _row_pieces(outputs: Mapping[str, Any], count: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield some rows at a time, each an object, with the number of the first one."""
    elements = sum(value.size if isinstance(value, np.ndarray) else len(value) for value in outputs.values())
    step = min(_PIECE_OBJECTS, max(1, PIECE_ELEMENTS * count // max(1, elements)))
    for start in range(0, count, step):
        parts = [
            part.tolist() if isinstance(part, np.ndarray) else part
            for part in (value[start : start + step] for value in outputs.values())
        ]
        yield start, [dict(zip(outputs, row, strict=True)) for row in zip(*parts, strict=True)]


def _write_object(outputs: Mapping[str, Any]) -> Iterator[Chunk]:
    before = b"{"
    for name, value in outputs.items():
        yield before + write(name) + b":"
        yield from write_value(value)
        before = b","
    yield b"}" if outputs else b"{}"
