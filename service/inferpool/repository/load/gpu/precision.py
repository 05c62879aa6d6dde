"""Measures what coarser rounding changes: compares a model's outputs with those of the same model in FP32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.errors import LoadError, OutOfMemory, short_reason
from inferpool.repository.catalog import RoundingDifference
from inferpool.repository.load.comparison import output_scale, relative_difference
from inferpool.repository.load.runnable_rows import find_runnable_rows
from inferpool.tensors import ROUNDING, Array, Tensors, TensorSpec, bf16_to_fp32


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs, and the model's outputs for them in FP32."""

    inputs: Sequence[Tensors]
    outputs: Sequence[Tensors]

    def difference(self, model: LoadedModel, rounding: str) -> RoundingDifference:
        """How far the outputs of `model` are from the reference; `rounding` is the name of its rounding.

        Raises LoadError if the model raises, or if a number that is finite in FP32 is not.
        """
        absolute = relative = 0.0
        same = compared = rows = 0
        for inputs, wanted in zip(self.inputs, self.outputs, strict=True):
            try:
                given = model.run(inputs)
            except Exception as error:  # whatever the runtime raises, this version cannot be served
                raise LoadError(f"in {rounding} the model raised {short_reason(error)}") from error
            rows += len(next(iter(inputs.values())))
            for output, want in wanted.items():
                spec, got = model.signature.outputs_by_name[output], given[output]
                if not isinstance(want, np.ndarray) or not isinstance(got, np.ndarray):
                    continue
                if want.shape != got.shape:
                    raise LoadError(f'in {rounding} output "{output}" has another shape than in FP32')
                if spec.datatype not in ROUNDING:
                    same += int(np.count_nonzero(got == want))
                    compared += want.size
                    continue
                gap = _gap(_numbers(got, spec), _numbers(want, spec), f'in {rounding} output "{output}"')
                absolute, relative = max(absolute, gap[0]), max(relative, gap[1])
        changed = 1 - same / compared if compared else 0.0
        return RoundingDifference(absolute, relative, changed, rows)


def run_reference(exact: LoadedModel, samples: Sequence[Tensors]) -> Reference:
    """Run `exact`, which rounds as FP32, on the rows of the checks and on `samples`."""
    rows = find_runnable_rows(exact, samples).rows
    inputs, outputs = [], []
    for candidate in ([rows] if rows else []) + [sample for sample in samples if _has_rows(sample)]:
        try:
            outputs.append(exact.run(candidate))
        except OutOfMemory:
            raise
        except Exception:  # noqa: BLE001 - the check of the samples reports what is wrong with one
            continue
        inputs.append(candidate)
    return Reference(inputs, outputs)


def _has_rows(sample: Tensors) -> bool:
    return bool(sample) and all(tensor.ndim and len(tensor) for tensor in sample.values())


def _numbers(tensor: Array, spec: TensorSpec) -> Array:
    """The numbers of an output as FP64; BF16 comes as bits."""
    if spec.datatype == "BF16":
        tensor = bf16_to_fp32(tensor)
    wide: Array = tensor.astype(np.float64)
    return wide


def _gap(got: Array, want: Array, what: str) -> tuple[float, float]:
    """The largest difference, absolute and relative to the scale.

    Raises LoadError if a number of `got` is not finite where that of `want` is.
    """
    lost = np.isfinite(want) & ~np.isfinite(got)
    if lost.any():
        raise LoadError(
            f"{what} is not finite in {np.count_nonzero(lost)} of {want.size} numbers that are finite in FP32"
            f" (up to {np.abs(want[lost]).max():.3g}); FP16 ends at 65504, within the model too:"
            " set gpu.fp16 = false in model.toml"
        )
    # Numbers that are infinite in FP32 do not count.
    got = np.where(np.isfinite(want), got, want)
    finite = np.isfinite(want)
    absolute = np.abs(got[finite] - want[finite]).max(initial=0.0)
    return float(absolute), relative_difference(got, want, output_scale(want))
