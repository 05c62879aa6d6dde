"""Writes large JSON answers in pieces, so that other threads can run meanwhile.

One call of orjson holds the GIL until all is written: a second for a hundred megabytes. Here it is released
after each piece. This module is not compiled: compiled loops do not let other threads run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from inferpool.errors import InferpoolError
from inferpool.system.cpu_pace import let_others_run
from inferpool.tensors import Array, bf16_to_fp32
from inferpool.wire.json_bodies import has_non_finite, write

Chunk: TypeAlias = bytes | memoryview

PIECE_ELEMENTS: Final = 4096
"""Numbers that are written at a time; they take about a third of a millisecond."""
_PIECE_STRINGS: Final = 512
_JOINED_BYTES: Final = 1024 * 1024


def write_answer(
    model: str,
    version: str,
    request_id: str,
    outputs: Mapping[str, Any],
    predictions: Iterable[bytes] | None,
    bf16: Collection[str] = (),
) -> Iterator[Chunk]:
    """Yield the native answer in pieces; together they are what `encode_response` returns.

    `predictions` are pieces of JSON, or None to leave them out. Raises ModelFailed if JSON cannot hold an
    output.
    """
    yield write({"model": model, "version": version, "id": request_id})[:-1]
    before = b',"outputs":{'
    non_finite = []
    for name, value in outputs.items():
        plain = bf16_to_fp32(value) if name in bf16 else value
        yield before + write(name) + b":"
        yield from write_value(plain)
        before = b","
        if has_non_finite(plain):
            non_finite.append(name)
    yield b',"outputs":{}' if not outputs else b"}"
    if predictions is not None:
        yield b',"predictions":'
        yield from predictions
    if non_finite:
        yield b',"non_finite":' + write(non_finite)
    yield b"}"


def write_infer(answer: Mapping[str, Any]) -> Iterator[Chunk]:
    """Yield an answer of the protocol v2 in pieces; together they are what `write(answer)` returns.

    The `data` of its outputs are arrays.
    """
    yield write({"model_name": answer["model_name"], "model_version": answer["model_version"]})[:-1]
    before = b',"outputs":['
    for entry in answer["outputs"]:
        yield before
        before = b","
        if "data" not in entry:
            yield write(entry)
            continue
        keys = list(entry)
        after = {key: entry[key] for key in keys[keys.index("data") + 1 :]}
        yield write({key: entry[key] for key in keys[: keys.index("data")]})[:-1] + b',"data":'
        yield from write_array(entry["data"])
        yield b"," + write(after)[1:] if after else b"}"
    yield b"]" if answer["outputs"] else before + b"]"
    yield b',"id":' + write(answer["id"]) + b"}" if "id" in answer else b"}"


def write_value(value: Any) -> Iterator[Chunk]:
    """Yield an output in pieces; raises ModelFailed if JSON cannot hold it."""
    if isinstance(value, np.ndarray):
        yield from write_array(value)
    elif isinstance(value, list) and len(value) > _PIECE_STRINGS:
        for start in range(0, len(value), _PIECE_STRINGS):
            yield b"," if start else b"["
            yield _without_brackets(value[start : start + _PIECE_STRINGS])
        yield b"]"
    else:
        yield write(value)


def write_array(array: Array) -> Iterator[Chunk]:
    """Yield an array as nested lists, in pieces."""
    most = _PIECE_STRINGS if array.dtype == np.object_ else PIECE_ELEMENTS
    if array.size <= most or not array.ndim:
        yield write(array)
        return
    row_size = array.size // len(array)
    if row_size > most:
        for index, row in enumerate(array):
            yield b"," if index else b"["
            yield from write_array(row)
    else:
        rows = max(1, most // row_size)
        for start in range(0, len(array), rows):
            yield b"," if start else b"["
            yield _without_brackets(array[start : start + rows])
    yield b"]"


def join_pieces(pieces: Iterable[Chunk], is_wanted: Callable[[], bool]) -> list[bytes]:
    """Return `pieces` in parts of about a megabyte; lets other threads run after each piece.

    Raises InferpoolError as soon as `is_wanted` returns False: nobody waits for the answer any more.
    """
    parts: list[bytes] = []
    joined: list[Chunk] = []
    size = 0
    for piece in pieces:
        joined.append(piece)
        size += len(piece)
        if size > _JOINED_BYTES:
            parts.append(b"".join(joined))
            joined.clear()
            size = 0
            if not is_wanted():
                raise InferpoolError("the client is gone or has been refused")
        let_others_run()
    if joined:
        parts.append(b"".join(joined))
    return parts


def _without_brackets(values: object) -> memoryview:
    return memoryview(write(values))[1:-1]
