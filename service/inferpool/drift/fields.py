"""Turns rows of a request and of its answer into fields: lists of numbers or of categories to be counted.

| of | fields |
|---|---|
| one number a row | `inputs.NAME` |
| up to 16 numbers a row | `inputs.NAME[0]` … |
| more | `inputs.NAME.mean` and `inputs.NAME.std` of the row |
| pictures | `inputs.NAME.channel0.mean` and `.std` of each channel |
| text | `inputs.NAME.tokens`, and `inputs.NAME.unknown`, the share of unknown tokens |
| strings, flags | `inputs.NAME` as categories |
| an output with labels | `outputs.NAME.label`, and `outputs.NAME.top`, its largest number |

Outputs are the same with `outputs`. A field has one value a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.tensors import Array, bf16_to_fp32

MOST_COLUMNS: Final = 16
_MOST_TEXT: Final = 200


class FieldFacts(NamedTuple):
    """What has to be known of a version to name its fields.

    Attributes:
        pixels: the input that takes pictures; "" without one.
        channels_last: whether the pictures have their channels in the last dimension.
        text: the input that takes sentences; "" without one.
        ids: the input that gets the tokens of sentences.
        unknown: the token of words that the vocabulary lacks; -1 without one.
        bf16: inputs and outputs that have the raw bits of BF16.
        labels: the output with labels, and their names.
    """

    pixels: str = ""
    channels_last: bool = False
    text: str = ""
    ids: str = ""
    unknown: int = -1
    bf16: frozenset[str] = frozenset()
    labels: tuple[str, Sequence[str]] | None = None


def field_values(
    facts: FieldFacts,
    inputs: Sequence[Mapping[str, Array]],
    outputs: Mapping[str, Array],
) -> dict[str, Array]:
    """The values of each field, one a row. `inputs` are those of each run: texts run by their lengths.

    Numbers are float64, in which missing ones are NaN; categories are strings.
    """
    found: dict[str, Array] = {}
    if facts.text:
        tokens, unknown = [], []
        for each in inputs:
            ids = each.get(facts.ids)
            if ids is not None and ids.ndim == 2 and ids.size:
                tokens.append(np.full(len(ids), float(ids.shape[1])))
                unknown.append((ids == facts.unknown).mean(axis=1))
        if tokens:
            found[f"inputs.{facts.text}.tokens"] = np.concatenate(tokens)
            if facts.unknown >= 0:
                found[f"inputs.{facts.text}.unknown"] = np.concatenate(unknown)
    else:
        for each in inputs[:1]:
            for name, array in each.items():
                if name == facts.pixels:
                    _add_picture(found, f"inputs.{name}", array, facts)
                else:
                    _add(found, f"inputs.{name}", array, name in facts.bf16)
    for name, array in outputs.items():
        if not isinstance(array, np.ndarray):
            continue
        if facts.labels is not None and name == facts.labels[0] and array.ndim == 2 and array.shape[1]:
            scores = _wide(array, name in facts.bf16)
            best = np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1)
            names = facts.labels[1]
            found[f"outputs.{name}.label"] = _texts([names[at] if at < len(names) else "" for at in best])
            found[f"outputs.{name}.top"] = scores[np.arange(len(scores)), best]
        else:
            _add(found, f"outputs.{name}", array, name in facts.bf16)
    return found


def _add(found: dict[str, Array], name: str, array: Array, is_bf16: bool) -> None:
    if not array.ndim or not array.size:
        return
    if array.dtype.kind in "Ob":
        if array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1):
            found[name] = _texts(array.reshape(-1).tolist())
        return
    wide = _wide(array, is_bf16).reshape(len(array), -1)
    width = wide.shape[1]
    if width == 1:
        found[name] = wide[:, 0]
    elif width <= MOST_COLUMNS and array.ndim == 2:
        for at in range(width):
            found[f"{name}[{at}]"] = wide[:, at]
    else:
        found[f"{name}.mean"], found[f"{name}.std"] = wide.mean(axis=1), wide.std(axis=1)


def _add_picture(found: dict[str, Array], name: str, array: Array, facts: FieldFacts) -> None:
    if array.ndim not in (3, 4) or not array.size or array.dtype == np.uint8:
        return  # raw pixels for a GPU that normalises them are no numbers to compare with the profile's
    wide = _wide(array, facts.pixels in facts.bf16)
    if wide.ndim == 3:
        wide = wide[:, None]
    if facts.channels_last:
        wide = np.moveaxis(wide, -1, 1)
    flat = wide.reshape(len(wide), wide.shape[1], -1)
    means, deviations = flat.mean(axis=2), flat.std(axis=2)
    for channel in range(flat.shape[1]):
        found[f"{name}.channel{channel}.mean"] = means[:, channel]
        found[f"{name}.channel{channel}.std"] = deviations[:, channel]


def _wide(array: Array, is_bf16: bool) -> Array:
    wide: Array = (bf16_to_fp32(array) if is_bf16 else array).astype(np.float64)
    # An infinity has no place among quantiles of what can be measured.
    wide[~np.isfinite(wide)] = np.nan
    return wide


def _texts(values: Sequence[Any]) -> Array:
    texts = np.empty(len(values), np.object_)
    texts[:] = [str(value)[:_MOST_TEXT] for value in values]
    return texts
