"""Metadata of a model: the names, datatypes and shapes of its inputs and outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from inferpool.tensors import TensorSpec


class Metadata(NamedTuple):
    """A version of a model.

    Attributes:
        name: the model's name.
        versions: the numbers of its versions.
        platform: the runtime, in the words of the Open Inference Protocol.
        inputs: the inputs; -1 in a shape stands for any size, and the first dimension counts rows.
        outputs: the outputs.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def read_metadata(answer: dict[str, Any]) -> Metadata:
    """Read the answer of `GET /v2/models/…`; raises KeyError, TypeError or ValueError if it is another."""
    return Metadata(
        str(answer["name"]),
        tuple(map(str, answer.get("versions") or ())),
        str(answer.get("platform", "")),
        tuple(map(_spec, answer["inputs"])),
        tuple(map(_spec, answer["outputs"])),
    )


def _spec(tensor: dict[str, Any]) -> TensorSpec:
    return TensorSpec(str(tensor["name"]), str(tensor["datatype"]), tuple(map(int, tensor["shape"])))
