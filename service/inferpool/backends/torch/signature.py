"""Completes the signature of a model from `model.toml`, golden samples and runs, if its file lacks parts.

A description in `model.toml` comes first, then the file, then the golden samples. This module does not need
PyTorch: it sees tensors as numpy arrays.
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
"""Kind of the numpy dtype of a golden sample's numbers to datatype."""
TreePath: TypeAlias = tuple[str | int, ...]
"""The path of a tensor in a returned structure: indexes of tuples and lists, keys of dicts."""

TensorMeta: TypeAlias = tuple[str, tuple[int, ...]]
"""The datatype and shape of a tensor."""


def name_inputs(
    unnamed: int, taken: Collection[str], described: Sequence[TensorHint], samples: Sequence[Any]
) -> list[str]:
    """Names for `unnamed` positional inputs: from `described`, else from a sample, else `input_0`…

    `taken` are the names of the other inputs. Raises LoadError if too few or too many names are given.
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
                f"the model takes {unnamed} positional inputs, but {len(names)} are described:"
                f" {names_text(names)}"
            )
        if names:
            return names
    return [f"input_{index}" for index in range(unnamed)]


def complete_inputs(
    found: Sequence[TensorSpec | TensorHint],
    optional: Collection[str],
    described: Sequence[TensorHint],
    samples: Sequence[Any],
) -> tuple[TensorSpec, ...]:
    """The specs of the inputs `found` in the file, completed from `described`, else from `samples`.

    An input in `optional` about which too little is known is left out. For any other such input, raises
    LoadError with the lines to write in `model.toml`.
    """
    known = {entry.name: entry for entry in described}
    unknown = known.keys() - {entry.name for entry in found}
    if unknown:
        raise LoadError(
            f"model.toml describes the input {names_text(sorted(unknown))}, which the model does not have;"
            f" the model takes {names_text([entry.name for entry in found])}"
        )
    specs: list[TensorSpec] = []
    missing = []
    for entry in found:
        if isinstance(entry, TensorSpec):
            specs.append(entry)
            continue
        hint = known.get(entry.name, entry)
        seen = _seen(entry.name, samples, single=len(found) == 1)
        datatype = hint.datatype or seen.datatype
        shape = seen.shape if hint.shape is None else hint.shape
        if datatype is not None and shape is not None:
            specs.append(TensorSpec(entry.name, datatype, shape, entry.name in optional))
        elif entry.name not in optional:
            missing.append(TensorHint(entry.name, datatype, shape))
    if missing:
        raise LoadError(
            f"the file does not fully describe the input {names_text([entry.name for entry in missing])};"
            " add a golden sample, or write the true datatypes and shapes in model.toml"
            " (-1 for a dimension of any size):\n" + _toml("inputs", missing)
        )
    return tuple(specs)


def pairs_to_try(specs: Sequence[TensorSpec], samples: Sequence[Any]) -> Iterator[tuple[Tensors, Tensors]]:
    """Pairs of inputs that may run, which differ in every dimension of any size.

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


def flatten(
    value: Any, path: TreePath = (), whole: Collection[TreePath] = ()
) -> Iterator[tuple[TreePath, Any]]:
    """All values in nested tuples, lists and dicts, each with its path. None is left out.

    A tuple, list or dict whose path is in `whole` is a value itself.
    """
    if path in whole:
        yield path, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from flatten(child, (*path, key), whole)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, child in zip(value._fields, value, strict=True):
            yield from flatten(child, (*path, key), whole)
    elif isinstance(value, (tuple, list)):
        for index, child in enumerate(value):
            yield from flatten(child, (*path, index), whole)
    elif value is not None:
        yield path, value


def varying_structures(one: Collection[TreePath], other: Collection[TreePath]) -> set[TreePath]:
    """The paths of the tuples, lists and dicts that two returned structures fill differently.

    `one` and `other` are the paths of all values in the two. Of nested structures, the outermost is given.
    """
    found: set[TreePath] = set()
    if set(one) == set(other):
        return found
    inner = [{path[0] for path in paths if path} for paths in (one, other)]
    if inner[0] != inner[1] or () in one or () in other:
        return {()}
    for key in inner[0]:
        below = [[path[1:] for path in paths if path[0] == key] for paths in (one, other)]
        found.update((key, *path) for path in varying_structures(*below))
    return found


def name_outputs(paths: Sequence[TreePath], described: Sequence[TensorHint]) -> dict[TreePath, str]:
    """A name for each output: its key in a dict, else its name in `described`, else `output_0`…

    Raises LoadError if the number or the keys of the described outputs differ from the model's.
    """
    if not paths:
        raise LoadError("the model returns no tensor")
    keyed = all(path and isinstance(path[0], str) for path in paths)
    names = [_name(path) for path in paths]
    wanted = [entry.name for entry in described]
    if wanted and ((keyed and set(wanted) != set(names)) or len(wanted) != len(names)):
        raise LoadError(f"the model returns {names_text(names)}; model.toml describes {names_text(wanted)}")
    if len(set(names)) < len(names):
        raise LoadError(f"two outputs would have the same name; the model returns {names_text(names)}")
    return dict(zip(paths, names if keyed or not wanted else wanted, strict=True))


def complete_outputs(
    names: Mapping[TreePath, str],
    runs: Sequence[Mapping[TreePath, TensorMeta]],
    described: Sequence[TensorHint],
) -> tuple[TensorSpec, ...]:
    """The specs of the outputs in `names`, from `runs`. Sizes that differ between runs become -1.

    A shape in `described` takes precedence. Raises LoadError if two runs differ in more than sizes.
    """
    shapes = {entry.name: entry.shape for entry in described if entry.shape is not None}
    specs = []
    for path, name in names.items():
        seen = [run[path] for run in runs if path in run]
        if len(seen) < len(runs) or len({datatype for datatype, _ in seen}) > 1:
            raise LoadError(f"output {name_text(name)} is missing, or has another datatype, in some runs")
        ranks = {len(shape) for _, shape in seen}
        shape = None
        if len(ranks) == 1:
            sizes = zip(*(shape for _, shape in seen), strict=True)
            shape = tuple(each[0] if len(set(each)) == 1 else ANY for each in sizes)
        specs.append(TensorSpec(name, seen[0][0], shapes.get(name, shape)))
    return tuple(specs)


def path_text(path: TreePath) -> str:
    """A path as text: `["hidden"][0]`; empty for the returned value itself."""
    return "".join(f"[{json.dumps(key)}]" for key in path)


def _seen(name: str, samples: Sequence[Any], *, single: bool) -> TensorHint:
    """The datatype and shape of an input in the golden samples. The first dimension is the rows."""
    seen = TensorHint(name)
    for sample in samples:
        value = sample.get(name) if isinstance(sample, Mapping) else sample if single else None
        if value is None:
            continue
        try:
            array = np.asarray(value)
        except ValueError:  # ragged: the error is raised when the samples are read
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
    """A sample as arrays, or None if it does not fit. Reading the samples reports the error."""
    named = sample if isinstance(sample, Mapping) else {specs[0].name: sample} if len(specs) == 1 else {}
    by_name = {spec.name: spec for spec in specs}
    try:
        arrays = {name: np.asarray(value, by_name[name].dtype) for name, value in named.items()}
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return arrays if all(spec.optional or spec.name in arrays for spec in specs) else None


def _doubled(tensor: Array) -> Array:
    return np.concatenate([tensor, tensor])


def _name(path: TreePath) -> str:
    joined = "_".join(map(str, path))
    if not path:
        return "output_0"
    return joined if isinstance(path[0], str) else f"output_{joined}"


def _toml(table: str, entries: Sequence[TensorHint]) -> str:
    """The lines of `model.toml` that describe `entries`, with examples for unknown fields."""
    return "\n".join(
        f'[[{table}]]\nname = {json.dumps(entry.name)}\ndatatype = "{entry.datatype or "FP32"}"\n'
        f"shape = {shape_text((ANY, 64) if entry.shape is None else entry.shape)}"
        for entry in entries
    )
