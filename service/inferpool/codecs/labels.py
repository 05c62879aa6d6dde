"""Names the best scores of an output, as `[labels]` in a model.toml says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field

from inferpool.errors import ConfigError, ModelFailed
from inferpool.system.files import read_file
from inferpool.tensors import (
    ANY,
    FLOATS,
    JSON,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    bf16_to_fp32,
    names_text,
    shape_text,
)

Prediction: TypeAlias = dict[str, str | float | None]
"""`{"label": name, "score": number}`; the score is None if it is not finite."""

_PIECE_LABELS: Final = 1024
"""Labels that are written at a time: about 50 KB of JSON, which take less than half a millisecond."""
_SCORE_BYTES: Final = 44
"""Bytes of JSON of a label beside its name: the score has up to 22."""
_MOST_FILE_BYTES: Final = 64 * 2**20
"""Bytes of a file of names: a million names of 64 bytes."""
_SORTED_COLUMNS: Final = 128
"""Rows of up to so many scores are sorted completely. In longer ones, finding the best first is faster."""
_ACTIVATED: Final = (np.dtype(np.float32), np.dtype(np.float64))
"""Scores of these types are activated as they are."""

LABELS_FILE: Final = "labels.txt"
"""The usual file of the names, in the model's folder."""


class LabelsConfig(BaseModel):
    """The table `[labels]` of a model.toml; the descriptions of its keys are also those of the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str | None = Field(
        default=None,
        description="The output with one score a label. If the model has several, the default is the first"
        " with two dimensions and floating-point numbers.",
        json_schema_extra={"unset": "the only one"},
    )
    file: Annotated[str, Field(min_length=1)] = Field(
        default=LABELS_FILE, description="The names, one a line, in the order of the scores."
    )
    activation: Literal["none", "softmax", "sigmoid"] = Field(
        default="none", description='Turns the output into scores: `"none"`, `"softmax"` or `"sigmoid"`.'
    )
    top_k: Annotated[int, Field(ge=1)] = Field(default=5, description="Labels a row at most.")
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=None, description="Leave out scores below this."
    )


class LabelsCodec:
    """Names the best scores of every row; safe to share between threads."""

    def __init__(self, config: LabelsConfig, signature: Signature, names: Sequence[str]) -> None:
        """Raise ConfigError, with the key at the front, if the output cannot hold scores for `names`."""
        spec = _find_output(config, signature)
        shape = spec.shape
        if not names:
            raise ConfigError(f"labels.file: {config.file} has no names")
        if shape is not None:
            if len(shape) != 2:
                raise ConfigError(
                    f'labels.output: "{spec.name}" is {shape_text(shape)}; scores are [rows, labels]'
                )
            if shape[1] not in (ANY, len(names)):
                raise ConfigError(
                    f"labels.file: {config.file} has {len(names)} names, "
                    f'but "{spec.name}" gives {shape[1]} scores'
                )
        if spec.datatype in ("BYTES", "BOOL", JSON):
            raise ConfigError(f'labels.output: "{spec.name}" is {spec.datatype}; scores are numbers')
        self.output: Final = spec.name
        self._bfloat16 = spec.datatype == "BF16"
        self._activation = config.activation
        self._count = min(config.top_k, len(names))
        self._threshold = config.threshold
        self.names: Final = tuple(names)
        encoded = [orjson.dumps(name) for name in names]
        self._longest = max(map(len, encoded))
        self._first_openings = _table([b'[{"label":%b,"score":' % name for name in encoded])
        self._openings = _table([b'},{"label":%b,"score":' % name for name in encoded])

    def predictions(self, outputs: Tensors) -> list[list[Prediction]]:
        """Return the best labels of every row of `outputs`, best first.

        Equal scores keep the order of the output. NaN is worse than any other score, and left out if
        there is a threshold. Raises ModelFailed if the model has left the dimensions of the output open, and
        the output does not hold one score a label.
        """
        logits = self._checked(outputs)
        if len(logits) == 1 and logits.shape[1] <= _SORTED_COLUMNS:
            return [self._of_row(self._activate(logits)[0])]
        order, best, wanted = self._best(logits)
        finite = np.isfinite(best)
        return [
            [
                {"label": self.names[index], "score": score if is_finite else None}
                for index, score, is_finite, is_wanted in zip(*row, strict=True)
                if is_wanted
            ]
            for row in zip(order.tolist(), best.tolist(), finite.tolist(), wanted.tolist(), strict=True)
        ]

    def _of_row(self, scores: Array) -> list[Prediction]:
        """Return the best labels of one row.

        Most requests have one row, of which numpy would take longer to call than to work.
        """
        # The sort is stable, and puts NaN last.
        order = np.negative(scores).argsort(kind="stable")[: self._count].tolist()
        values = scores.tolist()
        names, threshold = self.names, self._threshold
        return [
            {"label": names[index], "score": score if math.isfinite(score) else None}
            for index in order
            for score in (values[index],)
            if threshold is None or score >= threshold
        ]

    def write_predictions(self, outputs: Tensors) -> Iterator[bytes]:
        """Yield the JSON of `predictions(outputs)` in pieces, without an object for each label.

        Each piece holds the GIL for less than a millisecond. Raises ModelFailed as `predictions` does.
        """
        logits = self._checked(outputs)
        rows = max(1, _PIECE_LABELS // self._count)
        before = b"["
        for start in range(0, len(logits), rows):
            yield before + self._write(*self._best(logits[start : start + rows]))
            before = b","
        yield b"[]" if before == b"[" else b"]"

    def scores(self, outputs: Tensors) -> Array:
        """Return the scores of every label, as `predictions` has them: `[rows, labels]`.

        Raises ModelFailed as `predictions` does.
        """
        return self._activate(self._checked(outputs))

    def row_bytes(self) -> int:
        """Return about how many bytes of JSON the labels of a row take."""
        return self._count * (self._longest + _SCORE_BYTES) + 4

    def _checked(self, outputs: Tensors) -> Array:
        logits = outputs[self.output]
        if logits.ndim != 2 or logits.shape[1] != len(self.names):
            raise ModelFailed(
                f'output "{self.output}" is {shape_text(logits.shape)}; '
                f"{len(self.names)} labels need [rows, {len(self.names)}]"
            )
        return logits

    def _best(self, logits: Array) -> tuple[Array, Array, Array]:
        """Return the indices of the best labels of each row, their scores, and which of them are wanted."""
        scores = self._activate(logits)
        order = _best(scores, self._count)
        best = np.take_along_axis(scores, order, axis=1)
        # Compared in double precision, as clients see them: no score may be rounded up to the threshold.
        wanted = (
            np.ones(best.shape, np.bool_)
            if self._threshold is None
            else best.astype(float) >= self._threshold
        )
        return order, best, wanted

    def _write(self, order: Array, best: Array, wanted: Array) -> bytes:
        """Return the JSON of some rows, separated by commas and without brackets around them all."""
        rows, count = order.shape
        # orjson writes numbers fastest. In double precision they are those of `predictions`.
        numbers = orjson.dumps(best.astype(np.float64).reshape(-1), option=orjson.OPT_SERIALIZE_NUMPY)
        pieces = np.empty((rows, 2 * count + 1), np.object_)
        pieces[:, 0:-1:2] = self._openings[order]
        pieces[:, 0] = self._first_openings[order[:, 0]]
        pieces[:, 1:-1:2] = np.array(numbers[1:-1].split(b","), np.object_).reshape(rows, count)
        pieces[:, -1] = b"}],"
        if not wanted.all():
            # The best come first and NaN last, so the wanted ones are the first of each row.
            pieces[:, 0:-1:2][~wanted] = pieces[:, 1:-1:2][~wanted] = b""
            none = ~wanted[:, 0]
            pieces[none, 0], pieces[none, -1] = b"[", b"],"
        return b"".join(pieces.reshape(-1).tolist())[:-1]

    def _activate(self, logits: Array) -> Array:
        if self._bfloat16:
            logits = bf16_to_fp32(logits)
        return activate(logits, self._activation)


def activate(logits: Array, activation: str) -> Array:
    """Turn `logits`, [rows, labels], into scores in FP32 or FP64, as `labels.activation` says."""
    scores = logits
    if logits.dtype not in _ACTIVATED:
        scores = logits.astype(np.result_type(logits.dtype, np.float32), copy=False)
    if activation == "none":
        return scores
    # Scores that are not finite are answered as such, so numpy need not warn.
    with np.errstate(invalid="ignore"):
        return _softmax(scores) if activation == "softmax" else _sigmoid(scores)


def read_labels(path: Path) -> tuple[str, ...]:
    """Read names, one a line in UTF-8; blank lines may follow the last.

    Raises ConfigError if the file cannot be read, has no names, or has an empty line or the same name twice.
    """
    return parse_labels(read_labels_file(path), path.name)


def read_labels_file(path: Path) -> bytes:
    """The content of a file of names; raises ConfigError if the file cannot be read."""
    try:
        return read_file(path, _MOST_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{path.name}: cannot be read ({error.strerror})") from error


def parse_labels(content: bytes, file: str) -> tuple[str, ...]:
    """The names in `content`, one a line in UTF-8; blank lines may follow the last.

    Raises ConfigError, which names `file`, if there are none, a line is empty, or a name is there twice.
    """
    try:
        lines = content.decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            raise ConfigError(f"{file}: line {number} is empty; each line is one label")
        if name in seen:
            raise ConfigError(f'{file}: "{name}" is on line {seen[name]} and again on line {number}')
        seen[name] = number
    return tuple(seen)


def _find_output(config: LabelsConfig, signature: Signature) -> TensorSpec:
    if config.output is not None:
        named = signature.outputs_by_name.get(config.output)
        if named is None:
            raise ConfigError(
                f'labels.output: no output is called "{config.output}"; '
                f"the model gives {names_text(signature.outputs_by_name)}"
            )
        return named
    if len(signature.outputs) == 1:
        return signature.outputs[0]
    for spec in signature.outputs:
        if spec.datatype in FLOATS and spec.shape is not None and len(spec.shape) == 2:
            return spec
    raise ConfigError(
        "labels.output: must be given, because none of "
        f"{names_text(signature.outputs_by_name)} is a table of scores [rows, labels]"
    )


def _table(texts: Sequence[bytes]) -> Array:
    """Return a vector of `bytes` objects."""
    table: Array = np.empty(len(texts), np.object_)
    table[:] = texts
    return table


def _best(scores: Array, count: int) -> Array:
    """Return the indices of each row's `count` best scores, best first: [rows, count]."""
    falling = -scores
    if scores.shape[1] <= _SORTED_COLUMNS:
        # The sort is stable, and puts NaN last.
        return falling.argsort(axis=1, kind="stable")[:, :count]
    order = np.empty((len(scores), count), np.intp)
    # Finding the bound and sorting a few candidates takes a fraction of the time of a stable sort of all.
    bounds = np.partition(falling, count - 1, axis=1)[:, count - 1]
    for row, (values, bound) in enumerate(zip(falling, bounds, strict=True)):
        # With this comparison NaN stays a candidate; the sort puts it last.
        candidates = np.flatnonzero(~(values > bound))
        order[row] = candidates[values[candidates].argsort(kind="stable")[:count]]
    return order


def _softmax(logits: Array) -> Array:
    """Return the softmax of each row, after subtracting its maximum, so that nothing overflows."""
    # Not the methods of arrays, which call these by way of Python.
    raised: Array = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))
    raised /= np.add.reduce(raised, axis=1, keepdims=True)
    return raised


def _sigmoid(logits: Array) -> Array:
    """Return 1 / (1 + exp(-x)), computed from exp(-|x|): nothing overflows and small values stay precise."""
    small = np.exp(-np.abs(logits))
    scores: Array = np.where(logits < 0, small, 1) / (1 + small)
    return scores
