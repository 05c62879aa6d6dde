"""What is looked up once a version, and what is counted of its requests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Final

from inferpool.errors import InvalidInput
from inferpool.observe.metrics import Metrics, Value
from inferpool.observe.prometheus_text import Exemplar
from inferpool.pool.ports import Result
from inferpool.repository.catalog import VersionView
from inferpool.tensors import ANY, JSON, Signature, Tensors, TensorSpec, names_text


class RequestStats:
    """How a version's requests ended and what they took, in seconds, since the server started.

    Attributes:
        successes: requests that were answered; `success_s` from their heads to their answers.
        failures: requests that ended with an error once the version was known; `failure_s` likewise.
        rows: rows of the successes.
        queue_s: time that the successes waited in the queue.
        decode_s: time that reading and checking their inputs took.
        compute_s: time that the batches they were in ran.
        encode_s: time that writing their outputs took.
        last: moment of the last success by the predictor's clock; None before the first.
    """

    __slots__ = (
        "compute_s",
        "decode_s",
        "encode_s",
        "failure_s",
        "failures",
        "last",
        "queue_s",
        "rows",
        "success_s",
        "successes",
    )

    def __init__(self) -> None:
        self.successes = self.failures = self.rows = 0
        self.success_s = self.failure_s = 0.0
        self.queue_s = self.decode_s = self.compute_s = self.encode_s = 0.0
        self.last: float | None = None


class RequestMetrics:
    """The values that a version's requests are counted in."""

    def __init__(self, metrics: Metrics, model: str, version: str, tally: RequestStats) -> None:
        self._metrics = metrics
        self._labels = (model, version)
        self._tally = tally
        self._by_status: dict[int, Value] = {}
        self._total = metrics.distribution("request_duration_seconds", model, version)
        self._queue = metrics.distribution("queue_duration_seconds", model, version)
        self._compute = metrics.distribution("compute_duration_seconds", model, version)

    def succeeded(
        self, rows: int, decode_s: float, encode_s: float, total_s: float, now: float, result: Result
    ) -> None:
        """Count a request that was answered at the moment `now`."""
        self._count(200, total_s)
        self._queue.observe(result.queue_s)
        self._compute.observe(result.compute_s)
        tally = self._tally
        tally.successes += 1
        tally.success_s += total_s
        tally.rows += rows
        tally.queue_s += result.queue_s
        tally.decode_s += decode_s
        tally.compute_s += result.compute_s
        tally.encode_s += encode_s
        tally.last = now

    def failed(self, status: int, total_s: float) -> None:
        """Count a request that ended with an error."""
        self._count(status, total_s)
        self._tally.failures += 1
        self._tally.failure_s += total_s

    def exemplify(self, exemplar: Exemplar, result: Result | None) -> None:
        """Let a request that has been counted stand for those that took as long."""
        self._total.exemplify(exemplar)
        if result is not None and result.error is None:
            self._queue.exemplify(exemplar._replace(amount=result.queue_s))
            self._compute.exemplify(exemplar._replace(amount=result.compute_s))

    def _count(self, status: int, total_s: float) -> None:
        value = self._by_status.get(status)
        if value is None:
            value = self._metrics.value("requests_total", *self._labels, str(status))
            self._by_status[status] = value
        value.value += 1
        self._total.observe(total_s)


MOST_ROWS: Final = 1_000_000
"""Rows of a request; rows without elements have no bytes that would bound them."""


class ServedVersion:
    """A version that is ready: its view, its meters, and how its entries are told apart."""

    def __init__(self, view: VersionView, metrics: Metrics, tally: RequestStats) -> None:
        assert view.signature is not None  # known before a version is ready
        self.view = view
        self.signature: Signature = view.signature
        self.version = str(view.key.version)
        self.meters = RequestMetrics(metrics, view.key.model, self.version, tally)
        specs = view.signature.inputs
        self.optional = frozenset(spec.name for spec in specs if spec.optional)
        self.bf16 = tuple(spec.name for spec in view.signature.outputs if spec.datatype == "BF16")
        self.class_names = {} if view.classes is None else {view.classes.output: view.classes.names}
        # Where every row of every request has the same shape there is but one group.
        self.padding = view.padding
        self.one_group = all(
            spec.optional or (spec.shape is not None and ANY not in spec.shape[1:]) for spec in specs
        )

        self._token_axes = _token_axes(view)
        self._pixels = None if view.image is None else view.image.pixel_spec
        self._sent = self.signature if self._pixels is None else _sent(self.signature, self._pixels)

    def sent(self, tensors: Tensors) -> Signature:
        """What a request's inputs follow: the signature, but for pixels that a GPU will normalise."""
        return self._sent if self._are_pixels(tensors) else self.signature

    def _are_pixels(self, tensors: Tensors) -> bool:
        if self._pixels is None:
            return False
        tensor = tensors.get(self._pixels.name)
        return tensor is not None and tensor.dtype == self._pixels.dtype

    def bound_answer(self, rows: int, tokens: int, wanted: tuple[str, ...] | None, most_bytes: int) -> None:
        """Raise InvalidInput where the outputs of so many rows, each of `tokens`, are too large to be made.

        What is known of them counts: a dimension of any size that need not be that of tokens counts as 1.
        """
        size = 0
        for spec in self.signature.outputs:
            if spec.shape is None or spec.datatype == JSON or spec.name not in (wanted or (spec.name,)):
                continue
            axes = self._token_axes.get(spec.name, ())
            sizes = [tokens if axis in axes else max(1, of) for axis, of in enumerate(spec.shape)][1:]
            size += rows * math.prod(sizes) * spec.dtype.itemsize
        if size > most_bytes:
            raise InvalidInput(
                f"the answer to {rows} rows, the longest of {tokens} tokens, takes {size} bytes, more than"
                f" the {most_bytes} that it may; send fewer rows at a time, or ask for fewer outputs",
                expected=most_bytes,
                got=size,
            )

    def rows(self, tensors: Tensors) -> int:
        """Rows of a request; raises InvalidInput where its inputs do not agree on them."""
        if not self.view.batching.enabled:
            return 1
        counts = [len(tensor) for name, tensor in tensors.items() if name not in self.optional]
        rows = counts[0]
        if rows > MOST_ROWS:
            raise InvalidInput(f"a request may have {MOST_ROWS} rows at the most, not {rows}")
        if counts.count(rows) < len(counts):
            found = ", ".join(
                f'"{name}" has {len(tensor)}' for name, tensor in tensors.items() if name not in self.optional
            )
            raise InvalidInput(f"the first dimension counts rows, the same for every input: {found}")
        return rows

    def group(self, entry_id: int, tensors: Tensors, rows: int) -> tuple[Hashable, float]:
        """What must be equal for entries to share a batch, and a row's cost in rows as measured at load."""
        if not rows or not self.optional.isdisjoint(tensors):
            # Nothing to share, or an input that holds for the whole run: such an entry runs alone.
            if rows > self.view.batching.max_rows:
                raise InvalidInput(
                    f"a request that sets {names_text(sorted(self.optional & tensors.keys()))} may have"
                    f" {self.view.batching.max_rows} rows at the most, not {rows}"
                )
            return entry_id, 1
        pixels = "pixels" if self._pixels is not None and self._are_pixels(tensors) else None
        if self.one_group:
            return pixels, 1
        if self.padding is not None:
            return self.padding.sharing(tensors)
        return (pixels, *((name, tensor.shape[1:]) for name, tensor in sorted(tensors.items()))), 1


def _sent(signature: Signature, pixels: TensorSpec) -> Signature:
    """The signature with pixels in place of the input of that name."""
    inputs = tuple(pixels if spec.name == pixels.name else spec for spec in signature.inputs)
    return Signature(inputs, signature.outputs, signature.substitute_input)


def _token_axes(view: VersionView) -> Mapping[str, tuple[int, ...]]:
    """For each output, the axes of any size that are known to count tokens: by their names, or by proof."""
    if view.text is None or view.signature is None:
        return {}
    symbols = view.signature.inputs_by_name[view.text.ids].symbols
    tokens = symbols[1] if symbols else ""
    found = dict(view.padding.axes) if view.padding is not None else {}
    for spec in view.signature.outputs:
        if tokens and tokens in spec.symbols:
            found[spec.name] = tuple(axis for axis, name in enumerate(spec.symbols) if name == tokens)
    return found
