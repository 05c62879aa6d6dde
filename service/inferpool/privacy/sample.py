"""One sample: some rows of a request and its answer, after the rules for their fields; as bytes, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from inferpool.privacy.config import FieldRules, NoiseRule, RoundRule, Rule
from inferpool.privacy.keys import SampleKeys
from inferpool.privacy.noise import CountNoise
from inferpool.tensors import Array

_FORM: Final = 1
"""The number of this layout, the first byte of each sample."""
LABEL: Final = ".label"
"""The ending of the field that has the best label of an output."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample.

    Attributes:
        request_id: the id of the request.
        tenant: to whom its key belongs; "" without keys.
        model: the name of the model.
        version: the number of the version.
        created: when it was answered, in seconds since 1970.
        rows: how many rows are kept.
        inputs: what is kept of the inputs, by field, each `[rows, …]`; strings are objects.
        outputs: likewise, of the outputs.
    """

    request_id: str
    tenant: str
    model: str
    version: int
    created: float
    rows: int
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def to_bytes(self) -> bytes:
        """The sample as bytes, for `from_bytes`."""
        header: list[Any] = [self.request_id, self.tenant, self.model, self.version, self.created, self.rows]
        contents = []
        for side in (self.inputs, self.outputs):
            described = []
            for name, array in side.items():
                if array.dtype.kind == "O":
                    described.append([name, None, array.shape, array.reshape(-1).tolist()])
                else:
                    described.append([name, array.dtype.str, array.shape, None])
                    contents.append(np.ascontiguousarray(array).tobytes())
            header.append(described)
        text = orjson.dumps(header)
        return b"".join((bytes((_FORM,)), len(text).to_bytes(4, "little"), text, *contents))


class Totals(NamedTuple):
    """How many samples a store has, and their bytes."""

    held: int
    nbytes: int


def from_bytes(content: bytes) -> Sample:
    """The sample that `to_bytes` has written; raises ValueError for other bytes."""
    if content[:1] != bytes((_FORM,)):
        raise ValueError("the sample has another layout")
    start = 5 + int.from_bytes(content[1:5], "little")
    *facts, inputs, outputs = orjson.loads(content[5:start])
    sides: list[dict[str, Array]] = []
    for described in (inputs, outputs):
        side: dict[str, Array] = {}
        for name, dtype, shape, texts in described:
            if dtype is None:
                array = np.empty(len(texts), np.object_)
                array[:] = texts
            else:
                kind = np.dtype(dtype)
                end = start + kind.itemsize * int(np.prod(shape, dtype=np.int64))
                array = np.frombuffer(content[start:end], kind)
                start = end
            side[name] = array.reshape(shape)
        sides.append(side)
    return Sample(*facts, *sides)


def redacted(
    values: Mapping[str, Array], rules: Mapping[str, FieldRules], keys: SampleKeys
) -> dict[str, Array]:
    """What is kept of tensors, `[rows, …]`, by field; a tensor with rules for columns is kept by columns."""
    kept: dict[str, Array] = {}
    for name, array in values.items():
        rule = rules.get(name)
        if rule is None:
            continue
        for field, part, how in _parts(name, array, rule):
            if how != "drop":
                kept[field] = _apply(field, part, how, keys)
    return kept


def _parts(name: str, array: Array, rules: FieldRules) -> Iterator[tuple[str, Array, Rule]]:
    if not rules.columns:
        yield name, array, rules.whole
    elif array.ndim == 2:
        for at in range(array.shape[1]):
            how = rules.columns.get(at, rules.whole)
            if how != "drop":
                yield f"{name}[{at}]", array[:, at], how


def _apply(field: str, array: Array, rule: Rule, keys: SampleKeys) -> Array:
    if isinstance(rule, RoundRule):
        wide = array.astype(np.float64)
        # By division, so that a step of 0.1 gives 0.3, and not 0.30000000000000004.
        steps = np.rint(wide / rule.round)
        return steps / (1 / rule.round) if rule.round < 1 else steps * rule.round
    if isinstance(rule, NoiseRule):
        noise = CountNoise(rule.epsilon, rule.sensitivity)
        noisy = [int(value) + noise.draw() for value in array.reshape(-1).tolist()]
        # Not int64 by force: noise may lead beyond it, and then the numbers are clipped.
        limits = np.iinfo(np.int64)
        clipped = [min(max(value, limits.min), limits.max) for value in noisy]
        return np.array(clipped, np.int64).reshape(array.shape)
    if rule == "hash":
        texts = [keys.hashed(field, str(value)) for value in array.reshape(-1).tolist()]
        hashes = np.empty(len(texts), np.object_)
        hashes[:] = texts
        return hashes.reshape(array.shape)
    return array


def best_labels(scores: Array, names: Sequence[str]) -> Array:
    """The name of the best label of each row of `scores`, `[rows, labels]`; "" for a row of NaN alone."""
    found = np.empty(len(scores), np.object_)
    wide = np.where(np.isnan(scores), -np.inf, scores)
    best = wide.argmax(axis=1)
    found[:] = ["" if np.isnan(row).all() else names[at] for row, at in zip(scores, best, strict=True)]
    return found
