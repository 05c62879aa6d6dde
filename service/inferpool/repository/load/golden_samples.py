"""Golden samples: inputs with their expected outputs, checked before a version is ready.

`samples/NAME.json` is `{"inputs": …, "outputs": {"name": nested lists}, "tolerance": 1e-4}`, with the inputs
as in a request. A number passes if it is within `tolerance`, absolute or relative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from inferpool.backends.base import LoadedModel
from inferpool.codecs.text import TextCodec
from inferpool.errors import InferpoolError, LoadError, Reason
from inferpool.pool.splitting import Unjoinable, join_rows
from inferpool.repository.catalog import SampleView
from inferpool.repository.config import ModelConfig
from inferpool.system.files import read_file
from inferpool.tensors import Array, Signature, Tensors, names_text
from inferpool.wire.json_bodies import write
from inferpool.wire.native_json import parse_request

_KEYS = {"inputs", "outputs", "tolerance"}
DEFAULT_TOLERANCE = 1e-4
MOST_KEPT_ROWS = 16
MOST_KEPT_ELEMENTS = 4096
"""Rows, and elements of them together, that explanations compare requests with."""
MOST_SAMPLE_BYTES = 64 * 2**20
"""Bytes of a sample's file; a sample is to be a few rows."""
MOST_SHOWN_BYTES = 16 * 2**10
"""Bytes of the inputs of all samples of a version that are shown: they are a part of the catalog."""


@dataclass(frozen=True, slots=True)
class GoldenSample:
    """One golden sample.

    Attributes:
        name: the name of its file.
        given: the inputs as its file has them, in JSON.
        inputs: the inputs of each run: one run for tensors, one for each sentence of a text.
        outputs: the expected outputs, of all runs together.
        tolerance: the largest difference that passes, absolute or relative.
    """

    name: str
    given: bytes
    inputs: tuple[Tensors, ...]
    outputs: dict[str, Any]
    tolerance: float


def read_samples(folder: Path, signature: Signature, text: TextCodec | None = None) -> list[GoldenSample]:
    """The samples in a model's folder, sorted by name; raises LoadError if a sample cannot be read.

    `text` encodes sentences, which a sample may have in place of tensors.
    """
    return [
        _read(file, signature, text) for file in sorted(folder.glob("samples/*.json")) if not file.is_dir()
    ]


def raw_inputs(folder: Path, config: ModelConfig) -> Iterator[Any]:
    """The inputs of each golden sample, as its JSON has them; `read_samples` reports other files."""
    for file in sorted(folder.glob("samples/*.json")):
        with suppress(OSError, orjson.JSONDecodeError):
            table = orjson.loads(read_file(file, MOST_SAMPLE_BYTES))
            if not isinstance(table, dict) or "inputs" not in table:
                continue
            inputs = table["inputs"]
            # Sentences do not describe the tensors that the model takes.
            if config.text is None or (isinstance(inputs, dict) and config.text.input not in inputs):
                yield table["inputs"]


def shown_samples(samples: list[GoldenSample]) -> tuple[SampleView, ...]:
    """The samples that people can try a version with: as many as are small enough together."""
    shown, left = [], MOST_SHOWN_BYTES
    for sample in samples:
        if len(sample.given) <= left:
            left -= len(sample.given)
            shown.append(SampleView(sample.name, sample.given.decode()))
    return tuple(shown)


def check_samples(samples: list[GoldenSample], model: LoadedModel) -> None:
    """Run every sample; raises LoadError for the first one with other outputs than expected."""
    for sample in samples:
        try:
            outputs = _run(sample, model)
        except Unjoinable as error:
            raise LoadError(f"sample {sample.name}: {error}") from error
        except Exception as error:  # whatever the runtime raises, this version cannot be served
            raise LoadError(f"sample {sample.name}: the model raised {error}") from error
        for name, expected in sample.outputs.items():
            if name not in outputs:
                known = names_text(model.signature.outputs_by_name)
                raise LoadError(f'sample {sample.name}: the model has no output "{name}"; it has {known}')
            fault = _difference(outputs[name], expected, sample.tolerance)
            if fault is not None:
                raise LoadError(f'sample {sample.name}: output "{name}" {fault}')


def kept_rows(samples: Sequence[GoldenSample]) -> dict[str, Any]:
    """The first rows of the samples by input, as nested lists, which explanations compare requests with.

    Empty if the samples have no rows of one shape, or rows so large that they do not belong in a catalog.
    """
    if not samples:
        return {}
    first = samples[0].inputs[0]
    alike = [
        each
        for sample in samples
        for each in sample.inputs
        if each.keys() == first.keys()
        and all(
            tensor.ndim and len(tensor) and tensor.shape[1:] == first[name].shape[1:]
            for name, tensor in each.items()
        )
    ]
    if not alike:
        return {}
    most = min(
        MOST_KEPT_ROWS, MOST_KEPT_ELEMENTS // max(1, sum(tensor[0].size for tensor in alike[0].values()))
    )
    rows = {name: np.concatenate([each[name] for each in alike])[:most] for name in first}
    finite = all(np.isfinite(tensor).all() for tensor in rows.values() if tensor.dtype.kind == "f")
    return {name: tensor.tolist() for name, tensor in rows.items()} if most and finite else {}


def _run(sample: GoldenSample, model: LoadedModel) -> Tensors:
    if len(sample.inputs) == 1:
        return model.run(sample.inputs[0])
    return join_rows([([index], model.run(row)) for index, row in enumerate(sample.inputs)])


def _read(file: Path, signature: Signature, text: TextCodec | None) -> GoldenSample:
    try:
        table = orjson.loads(read_file(file, MOST_SAMPLE_BYTES))
    except OSError as error:
        raise LoadError(f"sample {file.name}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise LoadError(f"sample {file.name}: {error}") from error
    if not isinstance(table, dict) or not {"inputs", "outputs"} <= table.keys() <= _KEYS:
        raise LoadError(f"sample {file.name}: expected an object of inputs, outputs and maybe tolerance")
    tolerance = table.get("tolerance", DEFAULT_TOLERANCE)
    if (
        not isinstance(table["outputs"], dict)
        or not table["outputs"]
        or not isinstance(tolerance, int | float)
    ):
        raise LoadError(
            f"sample {file.name}: expected an object with at least one output, and a number as tolerance"
        )
    try:
        given = orjson.dumps(table["inputs"])
        request = parse_request(b'{"inputs":%b}' % given)
        tensors = request.tensors(signature if text is None else text.signature)
        inputs: tuple[Tensors, ...] = (tensors,)
        if text is not None and text.input in tensors:
            inputs = tuple(rows.tensors for rows in text.encode(tensors[text.input], apart=True))
    except InferpoolError as error:
        raise LoadError(f"sample {file.name}: {error.detail}") from error
    return GoldenSample(file.name, given, inputs, table["outputs"], float(tolerance))


def _difference(got: Array | list[Any] | dict[str, Any], expected: Any, tolerance: float) -> Reason | None:
    """How an output differs from the expected one; None if it does not."""
    if not isinstance(got, np.ndarray):
        as_sent = orjson.loads(write(got))
        return None if _alike(as_sent, expected, tolerance) else f"is {as_sent}, not {expected}"
    if got.dtype.kind not in "fiub":
        return None if got.tolist() == expected else f"is {got.tolist()}, not {expected}"
    try:
        want = np.asarray(expected, dtype=np.float64)
    except (TypeError, ValueError):
        return "is numbers, but the sample expects something else"
    if want.shape != got.shape:
        return f"has shape {list(got.shape)}, not {list(want.shape)}"
    if np.allclose(got.astype(np.float64), want, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    return f"differs by {np.max(np.abs(got - want)):.3g}, more than the tolerance {tolerance:g}"


def _alike(got: Any, expected: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal within `tolerance`."""
    if isinstance(got, list) and isinstance(expected, list):
        return len(got) == len(expected) and all(
            _alike(one, other, tolerance) for one, other in zip(got, expected, strict=True)
        )
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(
            _alike(got[key], expected[key], tolerance) for key in got
        )
    if isinstance(got, float) and isinstance(expected, float | int):
        return math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)
    return type(got) is type(expected) and bool(got == expected)
