"""The signature of a model whose file does not tell it all: from descriptions, golden samples and runs.

A description in `model.toml` counts first, then the file, then the golden samples. Nothing here needs
PyTorch: tensors are seen as numpy arrays.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

import numpy as np

from inferpool.backends.base import TensorHint
from inferpool.backends.made_up_inputs import made_up_pairs
from inferpool.errors import LoadError
from inferpool.tensors import ANY, Array, Tensors, TensorSpec, name_text, names_text, shape_text

_DATATYPES: Final = {"b": "BOOL", "i": "INT64", "u": "INT64", "f": "FP32"}
"""By the kind of numpy dtype that a golden sample's numbers make."""
Place: TypeAlias = tuple[str | int, ...]
"""Where in what a model returned a tensor stands: indexes of tuples and lists, keys of dicts."""

TensorMeta: TypeAlias = tuple[str, tuple[int, ...]]
"""Datatype and shape of a tensor."""


def name_inputs(
    unnamed: int, taken: Collection[str], described: Sequence[TensorHint], samples: Sequence[Any]
) -> list[str]:
    """Names for inputs that have a place but no name: as described, as in a sample, else `input_0`…

    `taken` are the names of the other inputs. Raises LoadError where too few or too many are described.
    """
    if not unnamed:
        return []
    for source in (
        [entry.name for entry in described],
        next(([*sample] for sample in samples if isinstance(sample, Mapping)), []),
    ):
        names = [name for name in source if name not in taken]
        if names and len(names) != unnamed:
            raise LoadError(
                f"the model takes {unnamed} inputs by their place, and {len(names)} are described:"
                f" {names_text(names)}"
            )
        if names:
            return names
    return [f"input_{place}" for place in range(unnamed)]


def complete_inputs(
    found: Sequence[TensorSpec | TensorHint],
    optional: Collection[str],
    described: Sequence[TensorHint],
    samples: Sequence[Any],
) -> tuple[TensorSpec, ...]:
    """Specs of the inputs that were `found`, completed by `described` and else by `samples`.

    Those in `optional` are left out where nothing is known of them. Raises LoadError with the lines that
    `model.toml` needs where something of another one is not known.
    """
    known = {entry.name: entry for entry in described}
    unknown = known.keys() - {entry.name for entry in found}
    if unknown:
        raise LoadError(
            f"model.toml describes the input {names_text(sorted(unknown))}, which the model does not have;"
            f" it takes {names_text([entry.name for entry in found])}"
        )
    specs: list[TensorSpec] = []
    missing = []
    for entry in found:
        if isinstance(entry, TensorSpec):
            specs.append(entry)
            continue
        own = known.get(entry.name, entry)
        seen = _seen(entry.name, samples, alone=len(found) == 1)
        datatype, shape = own.datatype or seen.datatype, seen.shape if own.shape is None else own.shape
        if datatype is not None and shape is not None:
            specs.append(TensorSpec(entry.name, datatype, shape, entry.name in optional))
        elif entry.name not in optional:
            missing.append(TensorHint(entry.name, datatype, shape))
    if missing:
        raise LoadError(
            f"the file does not say all of the input {names_text([entry.name for entry in missing])};"
            " add a golden sample, or write in model.toml, with the true datatypes and shapes"
            " (-1 where any size will do):\n" + _toml("inputs", missing)
        )
    return tuple(specs)


def pairs_to_try(specs: Sequence[TensorSpec], samples: Sequence[Any]) -> Iterator[tuple[Tensors, Tensors]]:
    """Pairs of inputs that may run, which differ in the sizes that may differ.

    The golden samples come first, then made-up inputs.
    """
    for sample in samples:
        first = _arrays(specs, sample)
        if first is not None:
            yield (
                first,
                {name: _doubled(tensor) for name, tensor in first.items()}
                if all(spec.shape and spec.shape[0] == ANY for spec in specs if spec.name in first)
                else first,
            )
    yield from made_up_pairs(specs)


def flatten(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything in tuples, lists and dicts within one another, with where it stands; None is left out."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flatten(part, (*place, key))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, part in zip(value._fields, value, strict=True):
            yield from flatten(part, (*place, key))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from flatten(part, (*place, index))
    elif value is not None:
        yield place, value


def name_outputs(places: Sequence[Place], described: Sequence[TensorHint]) -> dict[Place, str]:
    """A name for each output: its key in a dict, else as described, else `output_0`…

    Raises LoadError where what is described and what the model gives are not as many, or have other keys.
    """
    if not places:
        raise LoadError("the model gives no tensor")
    keyed = all(place and isinstance(place[0], str) for place in places)
    names = [_name(place) for place in places]
    wanted = [entry.name for entry in described]
    if wanted and ((keyed and set(wanted) != set(names)) or len(wanted) != len(names)):
        raise LoadError(f"the model gives {names_text(names)}; model.toml describes {names_text(wanted)}")
    if len(set(names)) < len(names):
        raise LoadError(f"two outputs would have the same name; the model gives {names_text(names)}")
    return dict(zip(places, names if keyed or not wanted else wanted, strict=True))


def complete_outputs(
    names: Mapping[Place, str],
    runs: Sequence[Mapping[Place, TensorMeta]],
    described: Sequence[TensorHint],
) -> tuple[TensorSpec, ...]:
    """Specs of the outputs by `names`: datatypes and shapes as in `runs`, -1 where those differ.

    A shape that is described counts instead. Raises LoadError where two runs differ in more than sizes.
    """
    shapes = {entry.name: entry.shape for entry in described if entry.shape is not None}
    specs = []
    for place, name in names.items():
        seen = [run[place] for run in runs if place in run]
        if len(seen) < len(runs) or len({datatype for datatype, _ in seen}) > 1:
            raise LoadError(f"output {name_text(name)} is there, or of one datatype, in some runs only")
        ranks = {len(shape) for _, shape in seen}
        shape = None
        if len(ranks) == 1:
            sizes = zip(*(shape for _, shape in seen), strict=True)
            shape = tuple(each[0] if len(set(each)) == 1 else ANY for each in sizes)
        specs.append(TensorSpec(name, seen[0][0], shapes.get(name, shape)))
    return tuple(specs)


def place_text(place: Place) -> str:
    """A place for people: `["hidden"][0]`; nothing where the model returns a tensor."""
    return "".join(f"[{json.dumps(part)}]" for part in place)


def _seen(name: str, samples: Sequence[Any], *, alone: bool) -> TensorHint:
    """What golden samples show of an input; the first dimension is rows."""
    seen = TensorHint(name)
    for sample in samples:
        value = sample.get(name) if isinstance(sample, Mapping) else sample if alone else None
        if value is None:
            continue
        try:
            array = np.asarray(value)
        except ValueError:  # ragged: reading the samples will say so
            continue
        datatype = _DATATYPES.get(array.dtype.kind)
        shape = (ANY, *array.shape[1:]) if array.ndim else ()
        if seen.datatype is None or datatype == "FP32":
            seen = replace(seen, datatype=datatype)
        if seen.shape is None:
            seen = replace(seen, shape=shape)
        elif len(seen.shape) == len(shape):
            merged = (a if a == b else ANY for a, b in zip(seen.shape, shape, strict=True))
            seen = replace(seen, shape=tuple(merged))
    return seen


def _arrays(specs: Sequence[TensorSpec], sample: Any) -> Tensors | None:
    """A sample as arrays, or None: a sample that does not fit is for others to complain of."""
    named = sample if isinstance(sample, Mapping) else {specs[0].name: sample} if len(specs) == 1 else {}
    by_name = {spec.name: spec for spec in specs}
    try:
        arrays = {name: np.asarray(value, by_name[name].dtype) for name, value in named.items()}
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return arrays if all(spec.optional or spec.name in arrays for spec in specs) else None


def _doubled(tensor: Array) -> Array:
    return np.concatenate([tensor, tensor])


def _name(place: Place) -> str:
    parts = "_".join(map(str, place))
    if not place:
        return "output_0"
    return parts if isinstance(place[0], str) else f"output_{parts}"


def _toml(table: str, entries: Sequence[TensorHint]) -> str:
    """The lines of `model.toml` that describe `entries`, with examples where something is not known."""
    return "\n".join(
        f'[[{table}]]\nname = {json.dumps(entry.name)}\ndatatype = "{entry.datatype or "FP32"}"\n'
        f"shape = {shape_text((ANY, 64) if entry.shape is None else entry.shape)}"
        for entry in entries
    )
