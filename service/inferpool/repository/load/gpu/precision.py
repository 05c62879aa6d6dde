"""What coarser rounding changes: a model's outputs held against those of the same model in FP32, at load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.errors import LoadError, OutOfMemory
from inferpool.repository.load.batching_check import first_line, relative_difference, runnable
from inferpool.tensors import Array, Tensors, TensorSpec


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest differences that were seen.

    Attributes:
        absolute: between two numbers of an output.
        relative: the same as a share of the output's scale.
        changed: the share of whole numbers, flags and texts that are not the same.
        rows: how many rows were tried.
    """

    absolute: float
    relative: float
    changed: float
    rows: int


@dataclass(frozen=True, slots=True)
class Reference:
    """Inputs, and what the model makes of them in FP32."""

    inputs: Sequence[Tensors]
    outputs: Sequence[Tensors]

    def difference(self, model: LoadedModel, name: str) -> Difference:
        """How far `model` is from it; `name` is that of its rounding.

        Raises LoadError where it gives no numbers for what has some in FP32, or nothing at all.
        """
        absolute = relative = 0.0
        same = whole = rows = 0
        for inputs, wanted in zip(self.inputs, self.outputs, strict=True):
            try:
                given = model.run(inputs)
            except Exception as error:  # whatever a runtime raises is this version's fault
                raise LoadError(f"in {name} the model raised {first_line(error)}") from error
            rows += len(next(iter(inputs.values())))
            for output, want in wanted.items():
                spec, got = model.signature.outputs_by_name[output], given[output]
                if not isinstance(want, np.ndarray) or not isinstance(got, np.ndarray):
                    continue
                if want.shape != got.shape:
                    raise LoadError(f'in {name} output "{output}" has another shape than in FP32')
                if spec.datatype not in ("FP64", "FP32", "FP16", "BF16"):
                    same += int(np.count_nonzero(got == want))
                    whole += want.size
                    continue
                gap = _gap(_numbers(got, spec), _numbers(want, spec), f'in {name} output "{output}"')
                absolute, relative = max(absolute, gap[0]), max(relative, gap[1])
        return Difference(absolute, relative, 1 - same / whole if whole else 0.0, rows)


def reference(exact: LoadedModel, samples: Sequence[Tensors], clock: Callable[[], float]) -> Reference:
    """What `exact`, which rounds as FP32, gives for the rows that proofs are made with and for `samples`."""
    rows, _, _ = runnable(exact, samples, clock)
    inputs, outputs = [], []
    for candidate in ([rows] if rows else []) + [sample for sample in samples if _has_rows(sample)]:
        try:
            outputs.append(exact.run(candidate))
        except OutOfMemory:
            raise
        except Exception:  # noqa: BLE001 - what is wrong with a sample is told when it is checked
            continue
        inputs.append(candidate)
    return Reference(inputs, outputs)


def _has_rows(sample: Tensors) -> bool:
    return bool(sample) and all(tensor.ndim and len(tensor) for tensor in sample.values())


def _numbers(tensor: Array, spec: TensorSpec) -> Array:
    """The numbers of an output, wide enough for all; BF16 comes as bits."""
    if spec.datatype == "BF16":
        tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
    wide: Array = tensor.astype(np.float64)
    return wide


def _gap(got: Array, want: Array, what: str) -> tuple[float, float]:
    """The largest difference, absolute and of the scale; raises LoadError where only `want` is a number."""
    lost = np.isfinite(want) & ~np.isfinite(got)
    if lost.any():
        raise LoadError(
            f"{what} is no finite number in {np.count_nonzero(lost)} of {want.size} places where FP32 has one"
            " (up to {:.3g}); FP16 ends at 65504, within the model too".format(np.abs(want[lost]).max())
        )
    # What is infinite in FP32 has no distance.
    got = np.where(np.isfinite(want), got, want)
    finite = np.isfinite(want)
    absolute = np.abs(got[finite] - want[finite]).max(initial=0.0)
    return float(absolute), relative_difference(got, want, want)
