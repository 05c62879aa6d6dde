"""Layouts: what the tensors of many requests have in common, sent once.

Both sides of a channel keep a table of layouts. A layout has the names, datatypes and shapes of tensors. Of a
tensor whose first dimension is the number of rows, the layout has the other dimensions. A record has the
number of the layout of its tensors, and how many rows there are.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

import numpy as np

from inferpool.engine.arena import ALIGNMENT
from inferpool.engine.records import LAYOUT, LAYOUT_FIELDS, ProtocolError, json_record, read_json
from inferpool.pool.ports import VersionKey
from inferpool.tensors import Tensors, element_count

MOST_LAYOUTS: Final = 1024
"""So many layouts are known at a time. Clients choose shapes, so the oldest layout is forgotten."""

TEXT: Final = "text"
"""The code of arrays of `str`."""
JSON_VALUE: Final = "json"
"""The code of values that are no arrays: lists, mappings, numbers, None, with arrays within them."""

_MOST_DIMENSIONS: Final = 64
_MOST_ROW_BYTES: Final = 1 << 36
ARRAYS: Final = {
    code: np.dtype(code)
    for code in ("?", "<u1", "<u2", "<u4", "<u8", "<i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")
}
"""The dtypes of arrays by their codes; the codes of BF16 and UINT16 are the same."""
CODES: Final[dict[Any, str]] = {
    **{dtype: code for code, dtype in ARRAYS.items()},
    np.dtype(np.object_): TEXT,
}
"""The codes of arrays by their dtypes."""


class TensorForm:
    """The name, datatype and shape of one tensor of a layout.

    Attributes:
        name: its name.
        code: the datatype.
        dtype: numpy's datatype; None for values that are no arrays.
        by_rows: whether the first dimension is the number of rows.
        shape: the other dimensions, or all dimensions.
        elements: the product of `shape`.
        nbytes: bytes of `elements`; -1 if their size is not fixed.
    """

    __slots__ = ("by_rows", "code", "dtype", "elements", "name", "nbytes", "shape")

    def __init__(self, name: str, code: str, by_rows: bool, shape: tuple[int, ...]) -> None:
        self.name = name
        self.code = code
        dtype: Any = np.dtype(np.object_) if code == TEXT else ARRAYS.get(code)
        self.dtype = dtype
        self.by_rows = by_rows
        self.shape = shape
        self.elements = element_count(shape)
        self.nbytes = self.elements * dtype.itemsize if code in ARRAYS else -1


class Layout:
    """What the tensors of entries, or of results, have in common.

    Attributes:
        key: the version.
        group: which entries may share a batch, as the web process tells it; on the engine's side a text.
        outputs: the outputs wanted, or None for all.
        forms: the tensors, in their order.
        plain: whether every tensor has a fixed size for a number of rows.
        single: the only tensor if there is one, with a fixed size and a first dimension of rows; else None.
        number: the number in records; -1 if the layout is forgotten.
        sent: the epoch of the channel that knows the layout; -1 if none does.
        row_bytes: bytes of the outputs for a row, as they were last; 0 if that is not known. Web side only.
    """

    __slots__ = (
        "forms", "group", "key", "number", "outputs", "plain", "row_bytes", "sent", "single",
    )  # fmt: skip

    def __init__(
        self,
        key: VersionKey,
        group: Hashable,
        outputs: tuple[str, ...] | None,
        forms: list[TensorForm],
    ) -> None:
        self.key = key
        self.group = group
        self.outputs = outputs
        self.forms = forms
        self.plain = True
        for form in forms:
            if form.nbytes < 0:
                self.plain = False
        self.single = forms[0] if len(forms) == 1 and self.plain and forms[0].by_rows else None
        self.number = -1
        self.sent = -1
        self.row_bytes = 0

    def fits(self, tensors: Tensors, rows: int) -> bool:
        """Whether these are tensors of this layout."""
        forms = self.forms
        if len(tensors) != len(forms):
            return False
        single = self.single
        if single is not None:
            only = tensors.get(single.name)
            if not isinstance(only, np.ndarray):
                return False
            dtype: Any = only.dtype
            # numpy has one object of each usual datatype, and compares objects slowly.
            if dtype is not single.dtype and dtype != single.dtype:
                return False
            sizes = only.shape
            return bool(sizes) and sizes[0] == rows and sizes[1:] == single.shape
        index = 0
        for name, tensor in tensors.items():
            form = forms[index]
            index += 1
            if name != form.name:
                return False
            if form.dtype is None:
                if isinstance(tensor, np.ndarray):
                    return False
                continue
            if not isinstance(tensor, np.ndarray) or tensor.dtype != form.dtype:
                return False
            shape = tensor.shape
            if form.by_rows:
                if not shape or shape[0] != rows or shape[1:] != form.shape:
                    return False
            elif shape != form.shape or (shape and shape[0] == rows):
                return False
        return True

    def size(self, rows: int) -> int:
        """Return how many bytes the tensors take; the layout is `plain`."""
        single = self.single
        if single is not None:
            return single.nbytes * rows
        at = 0
        for form in self.forms:
            at = (at + (form.nbytes * rows if form.by_rows else form.nbytes) + (ALIGNMENT - 1)) & -ALIGNMENT
        return at

    def record(self) -> bytes:
        """Return the LAYOUT record. Raises ProtocolError if the names are too long."""
        return json_record(
            LAYOUT_FIELDS,
            LAYOUT,
            self.number,
            {
                "model": self.key.model,
                "version": self.key.version,
                "group": repr(self.group),
                "outputs": self.outputs,
                "tensors": [[form.name, form.code, form.by_rows, form.shape] for form in self.forms],
            },
        )


def read_layout(body: bytes) -> Layout:
    """Return the layout of the JSON in a LAYOUT record; raises ProtocolError if it is none."""
    value = read_json(body)
    try:
        outputs = value["outputs"]
        layout = Layout(
            VersionKey(_text(value["model"]), whole_size(value["version"])),
            _text(value["group"]),
            None if outputs is None else tuple(_text(name) for name in outputs),
            [_read_form(*each) for each in value["tensors"]],
        )
        if len({form.name for form in layout.forms}) < len(layout.forms):
            raise ValueError("two tensors have one name")
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a layout came that cannot be read: {error}") from None
    return layout


def _read_form(name: object, code: object, by_rows: object, shape: Any) -> TensorForm:
    sizes = tuple(whole_size(size) for size in shape)
    known = code in ARRAYS or code in (TEXT, JSON_VALUE)
    if not known or not isinstance(by_rows, bool) or len(sizes) + by_rows > _MOST_DIMENSIONS:
        raise ValueError("not the form of a tensor")
    if element_count(size or 1 for size in sizes) * 8 > _MOST_ROW_BYTES:
        raise ValueError(f"a tensor of shape {sizes}")
    if code == JSON_VALUE and (by_rows or sizes):
        raise ValueError("a shape of a value that is no tensor")
    return TensorForm(_text(name), _text(code), by_rows, sizes)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def whole_size(value: object) -> int:
    """Return a size that came as JSON; raises TypeError if it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise TypeError(f"{value!r:.40} is no whole number")
    return value


class LayoutTable:
    """The layouts that one side of a channel has given numbers to."""

    __slots__ = ("_last", "_layouts", "_most")

    def __init__(self, most: int = MOST_LAYOUTS) -> None:
        """`most` layouts have a number at a time."""
        self._most = most
        self._last: dict[VersionKey, Layout] = {}
        # In the order of their numbering, the oldest first.
        self._layouts: dict[Hashable, Layout] = {}

    def find(
        self,
        key: VersionKey,
        tensors: Tensors,
        rows: int,
        group: Hashable = None,
        outputs: tuple[str, ...] | None = None,
    ) -> Layout:
        """Return the layout of these tensors, with a number. It may have to be sent: see `Layout.sent`.

        Raises TypeError for tensors of another datatype than `inferpool.tensors` has.
        """
        last = self._last.get(key)
        if last is not None and last.outputs == outputs and last.group == group and last.fits(tensors, rows):
            return last
        forms: list[TensorForm] = []
        parts: list[Hashable] = []
        for name, tensor in tensors.items():
            form = _form_of(name, tensor, rows)
            forms.append(form)
            parts.append((name, form.code, form.by_rows, form.shape))
        whole: Hashable = (key, group, outputs, tuple(parts))
        layout = self._layouts.get(whole)
        if layout is None:
            layout = Layout(key, group, outputs, forms)
            self._add(whole, layout)
        self._last[key] = layout
        return layout

    def renumber(self, layout: Layout) -> None:
        """Give a number to a layout that this table has made, and perhaps has forgotten."""
        if layout.number < 0:
            parts = tuple((form.name, form.code, form.by_rows, form.shape) for form in layout.forms)
            whole: Hashable = (layout.key, layout.group, layout.outputs, parts)
            other = self._layouts.pop(whole, None)
            if other is None:
                self._add(whole, layout)
            else:
                # The same layout was made again meanwhile; this one takes its place.
                layout.number, other.number = other.number, -1
                layout.sent = other.sent
                self._layouts[whole] = layout
                if self._last.get(layout.key) is other:
                    self._last[layout.key] = layout

    def _add(self, whole: Hashable, layout: Layout) -> None:
        if len(self._layouts) < self._most:
            layout.number = len(self._layouts)
        else:
            oldest = self._layouts.pop(next(iter(self._layouts)))
            layout.number = oldest.number
            oldest.number = -1
            if self._last.get(oldest.key) is oldest:
                del self._last[oldest.key]
        layout.sent = -1
        self._layouts[whole] = layout


def _form_of(name: str, tensor: Any, rows: int) -> TensorForm:
    if not isinstance(tensor, np.ndarray):
        return TensorForm(name, JSON_VALUE, False, ())
    code = CODES.get(tensor.dtype) or CODES.get(tensor.dtype.newbyteorder("<"))
    if code is None:
        raise TypeError(f'tensor "{name}" has the datatype {tensor.dtype}, which no datatype of tensors is')
    shape = tensor.shape
    if shape and shape[0] == rows:
        return TensorForm(name, code, True, shape[1:])
    return TensorForm(name, code, False, shape)
