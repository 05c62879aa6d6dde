"""Gather the rows of several entries into one batch, and scatter its outputs back to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inferpool.pool.entry_queue import Piece
from inferpool.pool.padding import Padding
from inferpool.tensors import Array, Tensors, shape_text


class WrongRows(Exception):
    """An output of a batch does not have the batch's rows, so it cannot be told whose rows are whose."""


def gather(pieces: Sequence[Piece], padding: Padding | None = None) -> Tensors:
    """The inputs of a batch: the pieces' rows, in order, along the first dimension.

    All pieces are of one group, so they have the same inputs, datatypes and row shapes, or with `padding`
    are brought to the same. A batch of one whole entry is that entry's inputs as they came, not a copy.
    """
    if len(pieces) == 1:
        piece = pieces[0]
        inputs = piece.entry.inputs
        if piece.whole:
            return inputs
        return {name: tensor[piece.start : piece.stop] for name, tensor in inputs.items()}
    if padding is not None and len({padding.length(piece.entry.inputs) for piece in pieces}) > 1:
        return padding.gather([gather([piece]) for piece in pieces])
    return {
        name: np.concatenate([_rows_of(piece, name) for piece in pieces]) for name in pieces[0].entry.inputs
    }


def _rows_of(piece: Piece, name: str) -> Array:
    tensor = piece.entry.inputs[name]
    return tensor if piece.whole else tensor[piece.start : piece.stop]


def gather_parts(pieces: Sequence[Piece], padding: Padding | None = None) -> list[Tensors]:
    """The inputs of a batch in parts, for a model that puts them together itself: no copies are made.

    Rows that `padding` has to bring to one length are one part.
    """
    if padding is not None and len({padding.length(piece.entry.inputs) for piece in pieces}) > 1:
        return [gather(pieces, padding)]
    return [gather([piece]) for piece in pieces]


def wanted_outputs(pieces: Sequence[Piece]) -> tuple[str, ...] | None:
    """The outputs that the batch has to compute: all that any of its entries asked for; None is all."""
    wanted: dict[str, None] = {}
    for piece in pieces:
        if piece.entry.outputs is None:
            return None
        wanted.update(dict.fromkeys(piece.entry.outputs))
    return tuple(wanted)


def scatter(outputs: Tensors, pieces: Sequence[Piece], padding: Padding | None = None) -> list[Tensors]:
    """Each piece's rows of the outputs that its entry asked for, as views, in the order of `pieces`.

    What came of `padding` is cut off.

    Raises WrongRows unless every output has the batch's rows along its first dimension.
    """
    rows = sum(piece.rows for piece in pieces)
    for name, tensor in outputs.items():
        if not tensor.ndim or tensor.shape[0] != rows:
            raise WrongRows(f'output "{name}" has shape {shape_text(tensor.shape)} for {rows} rows')
    if len(pieces) == 1:
        return [select(outputs, pieces[0].entry.outputs)]
    parts = []
    start = 0
    for piece in pieces:
        stop = start + piece.rows
        chosen = select(outputs, piece.entry.outputs)
        rows_of = {name: tensor[start:stop] for name, tensor in chosen.items()}
        if padding is not None:
            rows_of = padding.cut(rows_of, padding.length(piece.entry.inputs))
        parts.append(rows_of)
        start = stop
    return parts


def select(outputs: Tensors, names: tuple[str, ...] | None) -> Tensors:
    """The outputs of these names, in their order; all of them for None."""
    return outputs if names is None else {name: outputs[name] for name in names}


def join(parts: Sequence[Tensors]) -> Tensors:
    """The outputs of an entry that ran in pieces, from theirs in order."""
    joined: dict[str, Any] = {}
    for name in parts[0]:
        joined[name] = np.concatenate([part[name] for part in parts])
    return joined
