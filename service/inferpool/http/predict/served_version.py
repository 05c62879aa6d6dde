"""A version that is ready, with what each of its requests needs looked up once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

from inferpool.errors import InvalidInput
from inferpool.http.predict.request_metrics import RequestMetrics
from inferpool.repository.catalog import VersionView
from inferpool.tensors import ANY, JSON, MOST_ROWS, Signature, Tensors, TensorSpec, names_text


class ServedVersion:
    """A version that is ready.

    Attributes:
        view: the version in the catalog.
        signature: its inputs and outputs.
        version: its number as text.
        metrics: where its requests are counted.
        optional: names of the inputs that a request may leave out.
        bf16: names of the outputs whose datatype is BF16.
        class_names: for the output that has labels, its name and the labels.
    """

    def __init__(self, view: VersionView, metrics: RequestMetrics) -> None:
        assert view.signature is not None  # known before a version is ready
        self.view = view
        self.signature: Signature = view.signature
        self.version = str(view.key.version)
        self.metrics = metrics
        specs = view.signature.inputs
        self.optional = frozenset(spec.name for spec in specs if spec.optional)
        self.bf16 = tuple(spec.name for spec in view.signature.outputs if spec.datatype == "BF16")
        self.class_names = {} if view.classes is None else {view.classes.output: view.classes.names}
        self._padding = view.padding
        self._row_cost = view.row_cost
        # If every row of every request has the same shape, there is only one group, and one cost.
        self._one_group = view.row_cost is None and all(
            spec.optional or (spec.shape is not None and ANY not in spec.shape[1:]) for spec in specs
        )
        self._token_axes = _token_axes(view)
        self._pixels = None if view.image is None else view.image.pixel_spec
        self._pixel_signature = (
            self.signature if self._pixels is None else _sent(self.signature, self._pixels)
        )

    def sent(self, tensors: Tensors) -> Signature:
        """Return the signature that `tensors` follow: with raw pixels if a GPU will normalise them."""
        return self._pixel_signature if self._are_pixels(tensors) else self.signature

    def _are_pixels(self, tensors: Tensors) -> bool:
        if self._pixels is None:
            return False
        tensor = tensors.get(self._pixels.name)
        return tensor is not None and tensor.dtype == self._pixels.dtype

    def bound_answer(self, rows: int, tokens: int, wanted: tuple[str, ...] | None, most_bytes: int) -> None:
        """Raise InvalidInput if the outputs would take more than `most_bytes` bytes.

        `rows` counts rows, `tokens` the tokens of the longest one, and `wanted` names the outputs asked for
        (None for all). A dimension of unknown size counts as 1 unless it is known to count tokens.
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
                f"the response would take {size} bytes: {rows} rows, the longest of {tokens} tokens; the"
                f" limit is {most_bytes} bytes; send fewer rows at a time, or ask for fewer outputs",
                expected=most_bytes,
                got=size,
            )

    def rows(self, tensors: Tensors) -> int:
        """Return the rows of a request, 1 if the version is not batched.

        Raises InvalidInput if the inputs differ in their rows, or have too many.
        """
        if not self.view.batching.enabled:
            return 1
        counts = [len(tensor) for name, tensor in tensors.items() if name not in self.optional]
        rows = counts[0]
        if rows > MOST_ROWS:
            raise InvalidInput(
                f"the request has {rows} rows; at most {MOST_ROWS} are allowed; send them in several requests"
            )
        if counts.count(rows) < len(counts):
            found = ", ".join(
                f'"{name}" has {len(tensor)}' for name, tensor in tensors.items() if name not in self.optional
            )
            raise InvalidInput(
                f"inputs differ in their rows: {found}; every input needs the same first dimension"
            )
        return rows

    def group(self, entry_id: int, tensors: Tensors, rows: int) -> tuple[Hashable, float]:
        """Return what entries that share a batch must have in common, and the cost of one row.

        The cost is in rows as they were measured at load. Raises InvalidInput for too many rows.
        """
        if not rows or not self.optional.isdisjoint(tensors):
            # Without rows, or with an input that holds for the whole run, an entry runs alone.
            if rows > self.view.batching.max_rows:
                raise InvalidInput(
                    f"the request has {rows} rows; one that sets"
                    f" {names_text(sorted(self.optional & tensors.keys()))} may have at most"
                    f" {self.view.batching.max_rows}; send them in several requests"
                )
            return entry_id, self._load_of(tensors, max(1, rows))
        pixels = "pixels" if self._pixels is not None and self._are_pixels(tensors) else None
        if self._one_group:
            return pixels, 1
        if self._padding is not None:
            return self._padding.sharing(tensors)
        shapes = (pixels, *((name, tensor.shape[1:]) for name, tensor in sorted(tensors.items())))
        return shapes, self._load_of(tensors, rows)

    def _load_of(self, tensors: Tensors, rows: int) -> float:
        """Return the cost of a row, of a request that has at least one."""
        if self._row_cost is None:
            return 1.0
        return self._row_cost.load(sum(tensor.size for tensor in tensors.values()) // rows)


def _sent(signature: Signature, pixels: TensorSpec) -> Signature:
    """Return `signature` with `pixels` in place of the input of that name."""
    inputs = tuple(pixels if spec.name == pixels.name else spec for spec in signature.inputs)
    return Signature(inputs, signature.outputs, signature.substitute_input)


def _token_axes(view: VersionView) -> Mapping[str, tuple[int, ...]]:
    """Return, for each output, its axes that count tokens: known by their names, or proven."""
    if view.text is None or view.signature is None:
        return {}
    symbols = view.signature.inputs_by_name[view.text.ids].symbols
    tokens = symbols[1] if symbols else ""
    found = dict(view.padding.axes) if view.padding is not None else {}
    for spec in view.signature.outputs:
        if tokens and tokens in spec.symbols:
            found[spec.name] = tuple(axis for axis, name in enumerate(spec.symbols) if name == tokens)
    return found
