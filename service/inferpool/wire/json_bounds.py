"""Bounds the Python objects that a JSON parser makes of a body, before it makes them.

A list takes three bytes in a body and a hundred in memory, and the parser holds the GIL until the last object
is made. `_json_numbers`, a module in C, counts the values of a large body without the GIL. A body with more
of them than the model's inputs could take is refused, and so is one that would hold the GIL for too long.
"""

from __future__ import annotations

from typing import Any, Final

from inferpool.allowance import Allowance
from inferpool.errors import BodyTooLarge, InvalidInput
from inferpool.tensors import ANY, MOST_ROWS, Signature, TensorSpec, element_count

try:
    from inferpool.wire import _json_numbers
except ImportError:  # the package was built without a C compiler
    _json_numbers = None  # type: ignore[assignment]

COUNTED_BYTES: Final = 64 * 1024
"""Shorter JSON is not counted: it becomes at most a few megabytes, within milliseconds."""
MOST_OBJECT_BYTES: Final = 16 * 2**20 if _json_numbers is not None else 128 * 2**20
"""The most memory that the objects of one body may take, with the characters of strings.

A parser makes as many in 6 ms, and frees them in 2 ms. It holds the GIL for that long, so every other request
waits. Without the module in C, the numbers in regular lists are such objects, too.
"""
STRING_BYTES: Final = 104
"""Bytes of a string without its characters, of the parser's node, and of references to both."""

_PARSER_BYTES: Final = 13
"""Bytes that the parser allocates for each byte of text, before it knows how many values there are."""
_LIST_BYTES: Final = 112
_OBJECT_BYTES: Final = 272
_NUMBER_BYTES: Final = 72
_LITERAL_BYTES: Final = 40
_MOST_DEPTH: Final = 40
"""The deepest tensor has 32 dimensions, within the lists and objects of a request."""
_ENVELOPE_VALUES: Final = 64 * 1024
"""Lists, objects or strings beside the tensors: names, shapes and parameters of 4096 inputs and outputs."""
_NO_LIMIT: Final = 2**63 - 1


def check_json(text: bytes | memoryview, allowance: Allowance) -> None:
    """Reserve the memory of the objects that a parser would make of `text`; call this for large texts only.

    Raises InvalidInput if there are more values, or deeper ones, than the inputs of the signature could take,
    BodyTooLarge if the objects would take more than `MOST_OBJECT_BYTES`, and what `Allowance.take` raises.
    """
    count = _count_without_c if _json_numbers is None else _json_numbers.count
    lists, objects, strings, numbers, literals, text_bytes, depth = count(text)
    if depth > _MOST_DEPTH:
        raise InvalidInput(
            f"the body is nested {depth} deep; a request takes {_MOST_DEPTH} lists and objects in each other",
            expected=_MOST_DEPTH,
            got=depth,
        )
    if allowance.signature is not None:
        most_lists, most_strings = _limits(allowance.signature)
        for name, got, most in (
            ("lists", lists, most_lists),
            ("objects", objects, _ENVELOPE_VALUES),
            ("strings", strings, most_strings),
        ):
            if got > most:
                raise InvalidInput(
                    f"the body has {got} JSON {name}; the inputs of this model take at most {most}",
                    expected=most,
                    got=got,
                )
    size = (
        _LIST_BYTES * lists
        + _OBJECT_BYTES * objects
        + STRING_BYTES * strings
        + _NUMBER_BYTES * numbers
        + _LITERAL_BYTES * literals
        + text_bytes
    )
    if size > MOST_OBJECT_BYTES:
        raise BodyTooLarge(
            f"the body has {numbers + literals} JSON values outside regular lists of numbers, {strings}"
            f" strings, {lists} lists and {objects} objects, which take {size} bytes of memory; the limit is"
            f" {MOST_OBJECT_BYTES}; send fewer rows at a time, or arrays in binary form",
            limit=MOST_OBJECT_BYTES,
            got=size,
        )
    allowance.take(size + _PARSER_BYTES * len(text), "reading the JSON of the body")


def _limits(signature: Signature) -> tuple[int, int]:
    """Return how many lists, and how many strings, a request for a version may have."""
    lists = strings = _ENVELOPE_VALUES
    for spec in signature.inputs:
        shape = _largest_shape(spec)
        if shape is None:
            return _NO_LIMIT, _NO_LIMIT if _has_strings(signature) else _ENVELOPE_VALUES
        lists += sum(element_count(shape[:axis]) for axis in range(len(shape)))
        if spec.datatype == "BYTES":
            strings += element_count(shape)
    return lists, strings


def _has_strings(signature: Signature) -> bool:
    return any(spec.datatype == "BYTES" for spec in signature.inputs)


def _largest_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return the largest shape of an input, None if it has no bound."""
    if spec.shape is None or ANY in spec.shape[1:]:
        return None
    return tuple(MOST_ROWS if size == ANY else size for size in spec.shape)


def _count_without_c(text: bytes | memoryview) -> tuple[int, ...]:
    """Count like the module in C, but too much rather than too little, and no depth."""
    body: Any = bytes(text)
    lists, objects, strings = body.count(b"["), body.count(b"{"), body.count(b'"') // 2
    text_bytes = len(body) if body.isascii() else 4 * len(body)
    return lists, objects, strings, body.count(b",") + lists, 0, text_bytes, 0
