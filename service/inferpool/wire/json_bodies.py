"""JSON bodies of every API: objects are read, values are written, and faults are named.

`inferpool.wire.json_numbers` reads bodies whose lists of numbers it extracts. Each API reads its own fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody, ModelFailed
from inferpool.tensors import names_text, value_text
from inferpool.wire import json_numbers
from inferpool.wire.json_bounds import COUNTED_BYTES, check_json

_WITH_ARRAYS: Final = orjson.OPT_SERIALIZE_NUMPY
_WITH_ANY_KEYS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
_BOM: Final = b"\xef\xbb\xbf"
_NON_FINITE: Final = ("NaN", "Infinity")
_LOOKS_LIKE: Final = (
    (b"\x89PNG", "a PNG picture: send Content-Type: image/png"),
    (b"\xff\xd8\xff", "a JPEG picture: send Content-Type: image/jpeg"),
    (b"RIFF", "a WebP picture: send Content-Type: image/webp"),
    (b"\x93NUMPY", "a NumPy array: send Content-Type: application/x-npy"),
    (b"PK\x03\x04", "an archive of arrays: send Content-Type: application/x-npz"),
    (b"\x1f\x8b", "gzip data: send Content-Encoding: gzip"),
)
"""How bodies of other formats begin, which are taken for JSON if they come without a Content-Type."""


def extract_numbers(body: bytes, allowance: Allowance) -> dict[str, Any] | None:
    """Call `json_numbers.extract_numbers`; returns None if the module in C was not built."""
    return json_numbers.extract_numbers(body, allowance) if json_numbers.AVAILABLE else None


def read_object(
    body: bytes | memoryview, example: str = '{"inputs": …}', allowance: Allowance = UNLIMITED
) -> dict[str, Any]:
    """Read a JSON object.

    Raises MalformedBody, with `example` or the position of the fault, and what `check_json` raises.
    """
    if len(body) > COUNTED_BYTES:
        check_json(body, allowance)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _malformed(bytes(body), error) from None
    if not isinstance(value, dict):
        raise MalformedBody(f"the body is {value_text(value)}, not a JSON object such as {example}")
    return value


def read_again(body: bytes | memoryview, allowance: Allowance, fault: InvalidInput | None) -> dict[str, Any]:
    """Read a JSON object whose numbers were extracted, to find its first fault or to convert it exactly.

    Raises `fault`, which extracting found, if the body is too large to be read so.
    """
    try:
        return read_object(body, allowance=allowance)
    except BodyTooLarge:
        if fault is None:
            raise
    raise fault


def write(value: object) -> bytes:
    """Return `value` as strict JSON, numpy arrays included; raises ModelFailed if JSON cannot hold it."""
    try:
        # The option for other keys than text slows down every object, and few models give such keys.
        return orjson.dumps(value, default=_plain, option=_WITH_ARRAYS)
    except TypeError:
        pass
    try:
        return orjson.dumps(value, default=_plain, option=_WITH_ANY_KEYS)
    except TypeError as error:
        raise ModelFailed("an output of the model cannot be written as JSON") from error


def has_non_finite(value: object) -> bool:
    """Return whether an array, or anything in lists and objects, is a NaN or an infinity."""
    if isinstance(value, np.ndarray):
        if value.dtype == np.object_:
            return any(map(has_non_finite, value.flat))
        return value.dtype.kind == "f" and not np.isfinite(value).all()
    if isinstance(value, (float, np.floating)):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(map(has_non_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_non_finite, value))
    return False


def whole_number(value: Any) -> int | None:
    """Return a JSON number as an integer, `3.0` as 3 like JSON Schema does; None for anything else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def unknown_field(container: str, prefix: str, name: str, known: tuple[str, ...]) -> InvalidInput:
    """Return the error for a field of `container` that is none of those `known`."""
    text = value_text(name)
    return InvalidInput(
        f"{container} has an unknown field, {text}; it takes {names_text(known)}",
        field=f"{prefix}{text[1:-1]}",
    )


def wrong_field(name: str, value: Any, expected: str, verb: str = "is") -> InvalidInput:
    """Return the error for the field `name`, whose `value` is not what is `expected`."""
    got = value_text(value)
    return InvalidInput(f'"{name}" {verb} {got}; it takes {expected}', field=name, value=got)


def _malformed(body: bytes, error: orjson.JSONDecodeError) -> MalformedBody:
    if not body:
        return MalformedBody("the body is empty", position=0)
    for start, what in _LOOKS_LIKE:
        if body.startswith(start):
            return MalformedBody(f"the body is not JSON; it looks like {what}", position=0)
    if body.startswith(_BOM):
        return MalformedBody("the body starts with a byte order mark, which JSON does not allow", position=0)
    try:
        text = body.decode()
    except UnicodeDecodeError as undecodable:
        offset = undecodable.start
        return MalformedBody(
            f"the body is not UTF-8: byte 0x{body[offset]:02x} at offset {offset}", position=offset
        )
    position = error.pos
    if text[position : position + 8].startswith(_NON_FINITE):
        return MalformedBody(
            f"the body is not JSON at character {position}: JSON has no NaN or Infinity;"
            " send such numbers in the binary form of /v2",
            position=position,
        )
    if position == 0 and text[0].isalpha():
        return MalformedBody(
            "the body is not JSON; if it is a sentence for a model of text: send Content-Type: text/plain",
            position=0,
        )
    return MalformedBody(f"the body is not JSON: {error.msg} at character {position}", position=position)


def _plain(value: object) -> object:
    """Return a value that orjson takes in place of an array or a scalar that it does not take."""
    if isinstance(value, np.integer):
        # numpy may have two types of one width, and orjson knows one of them.
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError
    if not value.ndim:
        return value[()]
    return value.tolist() if value.dtype.kind in "OU" else np.ascontiguousarray(value)
