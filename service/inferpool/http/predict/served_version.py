"""A version that is ready, with what each of its requests needs looked up once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

from inferpool.errors import InvalidInput
from inferpool.http.predict.no_rows import EmptyAnswers, has_rows
from inferpool.http.predict.request_metrics import RequestMetrics
from inferpool.http.predict.response_cache import VersionCache
from inferpool.repository.catalog import VersionView
from inferpool.tensors import ANY, JSON, MOST_ROWS, Array, Signature, Tensors, TensorSpec, names_text
from inferpool.wire.v2_request import RequestedOutput

_JSON_BYTES: Final[Mapping[str, int]] = {
    "BOOL": 6, "UINT8": 4, "INT8": 5, "UINT16": 6, "INT16": 7, "UINT32": 11, "INT32": 12, "UINT64": 21,
    "INT64": 21, "FP16": 14, "BF16": 14, "FP32": 14, "FP64": 22, "BYTES": 32, JSON: 64,
}  # fmt: skip
"""Bytes of JSON that an element takes at most, with its comma; for strings and objects a guess."""
_CLASS_BYTES: Final = 120
"""Bytes that a class takes in an answer of /v2: a string of about 30 characters, as an object and as JSON."""


class OutputSize:
    """How large an output is.

    Attributes:
        name: the output's name.
        element_bytes: bytes of an element in memory.
        json_bytes: bytes of an element as JSON.
        row_elements: the product of the known dimensions of a row.
        axes: the input and the axis of it that each unknown dimension is equal to; an input named "" stands
            for the tokens of the longest row.
    """

    __slots__ = ("axes", "element_bytes", "json_bytes", "name", "row_elements")

    def __init__(self, spec: TensorSpec, token_axes: Sequence[int], inputs: Sequence[TensorSpec]) -> None:
        """Size the output `spec`, whose `token_axes` count tokens, of a model with `inputs`."""
        self.name = spec.name
        self.element_bytes = 64 if spec.datatype in ("BYTES", JSON) else spec.dtype.itemsize
        self.json_bytes = _JSON_BYTES[spec.datatype]
        self.row_elements = 1
        axes: list[tuple[str, int]] = []
        for axis, size in enumerate(spec.shape or ()):
            if not axis:
                continue
            if axis in token_axes:
                axes.append(("", 0))
            elif size != ANY:
                self.row_elements *= size
            elif axis < len(spec.symbols) and spec.symbols[axis]:
                axes.extend(_same_dimension(spec.symbols[axis], inputs))
        self.axes = tuple(axes)


def _same_dimension(symbol: str, inputs: Sequence[TensorSpec]) -> Sequence[tuple[str, int]]:
    """Return the first input and axis whose dimension is called `symbol`; empty if there is none."""
    for spec in inputs:
        if symbol in spec.symbols:
            return ((spec.name, spec.symbols.index(symbol)),)
    return ()


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
        open_answer: whether the rows of a request do not tell how large its answer is.
        row_answer_bytes: bytes that the answer to one row takes, as tensors and as JSON.
        shadow: the `ShadowTarget` that gets copies of the requests; None if there is none.
        cache: the outputs of earlier requests; None if the model's answers are not cached.
        observer: the `VersionObserver` that takes samples and counts values; None if nothing is observed.
    """

    def __init__(self, view: VersionView, metrics: RequestMetrics, cache: VersionCache | None = None) -> None:
        assert view.signature is not None  # known before a version is ready
        self.view = view
        self.signature: Signature = view.signature
        self.version = str(view.key.version)
        self.metrics = metrics
        self.shadow: Any = None
        self.observer: Any = None
        self.cache = cache
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
        self._empty: EmptyAnswers | None = None
        if has_rows(view.signature, view.batching.enabled):
            ids = "" if view.text is None else view.text.ids
            self._empty = EmptyAnswers(view.signature, self._token_axes, ids)
        self._sizes = [
            OutputSize(spec, self._token_axes.get(spec.name, ()), specs) for spec in view.signature.outputs
        ]
        self._label_bytes = 0 if view.classes is None else view.classes.row_bytes()
        self.row_answer_bytes = self._label_bytes + sum(
            size.row_elements * (size.element_bytes + size.json_bytes) for size in self._sizes
        )
        self.open_answer = not view.batching.enabled or any(
            spec.shape is None or spec.datatype in ("BYTES", JSON) or ANY in spec.shape[1:]
            for spec in view.signature.outputs
        )
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

    def answer_bytes(
        self,
        rows: int,
        tokens: int,
        tensors: Tensors,
        wanted: tuple[str, ...] | None,
        forms: Sequence[RequestedOutput] | None,
        as_json: bool,
    ) -> int:
        """Return about how many bytes the outputs take, with their JSON unless all of them are binary.

        `rows` counts rows, `tokens` the tokens of the longest one, and `wanted` names the outputs asked for
        (None for all), `forms` their forms. A dimension that follows from no input counts as 1.
        """
        total = 0
        for size in self._sizes:
            if wanted is not None and size.name not in wanted:
                continue
            elements = size.row_elements
            for name, axis in size.axes:
                elements *= tokens if not name else tensors[name].shape[axis] if name in tensors else 1
            element_bytes = size.element_bytes + (size.json_bytes if as_json else 0)
            total += rows * elements * element_bytes
            if self._label_bytes and size.name in self.class_names:
                total += rows * self._label_bytes
            if forms is not None:
                total += sum(
                    rows * min(form.classification, elements) * _CLASS_BYTES
                    for form in forms
                    if form.name == size.name
                )
        return total

    def measured_bytes(self, outputs: Tensors, as_json: bool) -> int:
        """Return about how many bytes `outputs` take, like `answer_bytes`, from their real shapes."""
        total = 0
        for size in self._sizes:
            value = outputs.get(size.name)
            if value is None:
                continue
            # An output of the datatype JSON may be a list.
            elements = value.size if hasattr(value, "size") else len(value) if isinstance(value, list) else 1
            total += elements * (size.element_bytes + (size.json_bytes if as_json else 0))
            if self._label_bytes and size.name in self.class_names:
                total += len(value) * self._label_bytes
        return total

    def rows(self, tensors: Tensors) -> int:
        """Return the rows of a request. If the version is not batched, that is 1, or 0 without rows.

        Raises InvalidInput if the inputs differ in their rows, or have too many.
        """
        if not self.view.batching.enabled:
            return 0 if self._empty is not None and self._without_rows(tensors) else 1
        optional = self.optional
        if len(tensors) == 1 and not optional:  # most requests
            rows = len(next(iter(tensors.values())))
            if rows > MOST_ROWS:
                raise _too_many_rows(rows)
            return rows
        counts = (
            [len(tensor) for name, tensor in tensors.items() if name not in optional]
            if optional
            else [len(tensor) for tensor in tensors.values()]
        )
        rows = counts[0]
        if rows > MOST_ROWS:
            raise _too_many_rows(rows)
        if counts.count(rows) < len(counts):
            found = ", ".join(
                f'"{name}" has {len(tensor)}' for name, tensor in tensors.items() if name not in self.optional
            )
            raise InvalidInput(
                f"inputs differ in their rows: {found}; every input needs the same first dimension"
            )
        return rows

    def _without_rows(self, tensors: Tensors) -> bool:
        return not any(len(tensor) for name, tensor in tensors.items() if name not in self.optional)

    def empty_answer(self, tensors: Tensors, wanted: tuple[str, ...] | None) -> Tensors | None:
        """Return the outputs for inputs without rows; None if the model has to run to tell."""
        return None if self._empty is None else self._empty.outputs(tensors, wanted)

    def check_rows(self, tensor: Array) -> None:
        """Raise InvalidInput if an input has too many rows, before it is converted at a cost."""
        if tensor.ndim and len(tensor) > MOST_ROWS and self.view.batching.enabled:
            raise _too_many_rows(len(tensor))

    def group(self, entry_id: int, tensors: Tensors, rows: int) -> tuple[Hashable, float]:
        """Return what entries that share a batch must have in common, and the cost of one row.

        The cost is in rows as they were measured at load. Raises InvalidInput for too many rows.
        """
        if not rows or (self.optional and not self.optional.isdisjoint(tensors)):
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


def _too_many_rows(rows: int) -> InvalidInput:
    return InvalidInput(
        f"the request has {rows} rows; at most {MOST_ROWS} are allowed; send them in several requests"
    )


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
