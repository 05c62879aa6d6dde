"""The native JSON bodies: `{"model", "version", "id", "inputs", "outputs", "parameters"}` and its answer.

Numbers go to their tensor through `inferpool.wire.json_numbers`; where its module in C was not built, those of a
large body through `inferpool.wire.simd`; all else through orjson and `inferpool.wire.nested_lists`. Each way reads the
same tensors and raises the same errors. Where a key comes twice the last one counts. `null` for an optional
field is the same as leaving it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

import numpy as np
import orjson

from inferpool.errors import InvalidInput, MalformedBody, ModelFailed
from inferpool.tensors import (
    Array,
    Signature,
    Tensors,
    TensorSpec,
    check_inputs,
    name_text,
    names_text,
    unknown_input,
)
from inferpool.wire import json_numbers
from inferpool.wire.json_document import Document, FallBack
from inferpool.wire.nested_lists import bf16_to_fp32, read_nested, value_text

_FIELDS: Final = ("model", "version", "id", "inputs", "outputs", "parameters")
_KNOWN: Final = frozenset(_FIELDS)
_PARAMETERS: Final = ("timeout_ms", "priority")
_WRITE: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


class PredictRequest:
    """One native inference call, before its model is known.

    Attributes:
        model: the model's name, or None where the body does not say.
        version: number or label, as text.
        id: the caller's name for the request.
        outputs: the outputs asked for, in order and each once; None for all.
        timeout_ms: milliseconds the caller will wait.
        priority: 0 is the default, 1 the most urgent, larger is less urgent.
    """

    __slots__ = (
        "_body",
        "_document",
        "_inputs",
        "id",
        "model",
        "outputs",
        "priority",
        "timeout_ms",
        "version",
    )

    def __init__(self, fields: Mapping[str, Any], body: bytes, document: Document | None) -> None:
        """Check and keep the top-level `fields`; raises InvalidInput naming the first that is wrong."""
        self._body = body
        self._document = document
        self.model: str | None = None
        self.version: str | None = None
        self.id: str | None = None
        self.outputs: tuple[str, ...] | None = None
        self.timeout_ms: float | None = None
        self.priority: int | None = None
        if len(fields) == 1 and "inputs" in fields:  # most bodies
            self._inputs = fields["inputs"]
            return
        if not fields.keys() <= _KNOWN:
            unknown = next(key for key in fields if key not in _FIELDS)
            raise _unknown_field("the body", "", unknown, _FIELDS)
        self.model = _text(fields, "model")
        self.version = _version(fields.get("version"))
        self.id = _text(fields, "id")
        self.outputs = _outputs(fields.get("outputs"))
        self.timeout_ms, self.priority = _parameters(fields.get("parameters"))
        if "inputs" not in fields:
            raise InvalidInput('the body has no "inputs"', field="inputs")
        self._inputs = fields["inputs"]

    def tensors(self, signature: Signature) -> Tensors:
        """The inputs as `signature` takes them; call it once.

        Raises InvalidInput naming the tensor that is unknown, missing, irregular, or of another datatype,
        shape or range.
        """
        document, self._document = self._document, None
        if document is not None:
            try:
                tensors = _read_inputs(signature, self._inputs, document.read)
                if document.proven():
                    return tensors
            except (InvalidInput, FallBack):
                pass
            finally:
                self._inputs = None
                document.close()
            self._inputs = read_object(self._body)["inputs"]
        return _read_inputs(signature, self._inputs, read_nested)


def parse_request(body: bytes) -> PredictRequest:
    """Read a native body.

    Raises MalformedBody where it is not a JSON object, InvalidInput where a field is unknown or wrong.
    """
    document = open_large(body)
    return PredictRequest(document.fields if document else read_object(body), body, document)


def open_large(body: bytes) -> Document | None:
    """The body opened a quick way, where there is one that pays and takes it."""
    return json_numbers.open_document(body) if json_numbers.AVAILABLE else None


def encode_response(
    model: str,
    version: str,
    request_id: str,
    outputs: Mapping[str, Any],
    predictions: list[Any] | None,
    bf16: Collection[str] = (),
) -> bytes:
    """The native answer as strict JSON.

    `outputs` are arrays, or lists and objects where the model gives sequences and maps. Those named in
    `bf16` hold the raw bits of BF16. A number that is not finite becomes null and its output is named in
    `"non_finite"`. `predictions` are left out when None. Raises ModelFailed where an output holds what
    JSON cannot.
    """
    if bf16:
        outputs = {name: bf16_to_fp32(tensor) if name in bf16 else tensor for name, tensor in outputs.items()}
    answer: dict[str, Any] = {"model": model, "version": version, "id": request_id, "outputs": outputs}
    if predictions is not None:
        answer["predictions"] = predictions
    encoded = write(answer)
    if b"null" in encoded:
        non_finite = [name for name, value in outputs.items() if has_non_finite(value)]
        if non_finite:
            answer["non_finite"] = non_finite
            return write(answer)
    return encoded


def read_object(body: bytes | memoryview) -> dict[str, Any]:
    """The JSON object that `body` is; raises MalformedBody with the position where that is known."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _malformed(bytes(body), error) from None
    if not isinstance(value, dict):
        raise MalformedBody(f"the body is {value_text(value)}, not a JSON object")
    return value


def write(value: object) -> bytes:
    """Strict JSON of `value`, numpy arrays included; raises ModelFailed where JSON cannot hold it."""
    try:
        return orjson.dumps(value, default=_plain, option=_WRITE)
    except TypeError as error:
        raise ModelFailed("an output of the model cannot be written as JSON") from error


def has_non_finite(value: object) -> bool:
    """Whether a NaN or an infinity is in an array, or anywhere in lists and objects."""
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


def _read_inputs(signature: Signature, inputs: Any, read: Callable[[TensorSpec, Any], Array]) -> Tensors:
    tensors: Tensors = {}
    for name, value in _named(signature, inputs):
        spec = signature.inputs_by_name.get(name)
        if spec is None:
            raise unknown_input(signature, name)
        if name == signature.substitute_input:
            _check_sentences(name, value)
        tensors[name] = read(spec, value)
    check_inputs(signature, tensors)
    return tensors


def _check_sentences(name: str, value: Any) -> None:
    """Raise InvalidInput where sentences are meant and something simpler to name than a shape is wrong."""
    if isinstance(value, str):
        raise InvalidInput(
            f"tensor {name_text(name)} is a string; send a list of sentences: [{value_text(value)}]",
            tensor=name,
            expected="BYTES",
        )
    if not isinstance(value, list) or set(map(type, value)) <= {str, list}:
        return
    place = next(i for i, item in enumerate(value) if type(item) not in (str, list))
    got = value_text(value[place])
    raise InvalidInput(
        f"tensor {name_text(name)} at [{place}] is {got}; it takes a sentence (string)",
        tensor=name,
        index=[place],
        value=got,
        expected="BYTES",
    )


def _named(signature: Signature, inputs: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(inputs, dict):
        return inputs.items()
    single = signature.single_input
    if single is None:
        raise InvalidInput(
            f'"inputs" is {value_text(inputs)}; this model takes an object with'
            f" {names_text(signature.inputs_by_name)}",
            field="inputs",
        )
    return ((single.name, inputs),)


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong_field(name, value, "a string")
    return value


def _version(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    whole = whole_number(value)
    if whole is None:
        raise _wrong_field("version", value, "a whole number or a string")
    return str(whole)


def _outputs(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _wrong_field("outputs", value, "a list of names")
    for name in value:
        if not isinstance(name, str):
            raise _wrong_field("outputs", name, "a list of names", "holds")
    return tuple(dict.fromkeys(value)) or None


def _parameters(value: Any) -> tuple[float | None, int | None]:
    if value is None:
        return None, None
    if not isinstance(value, dict):
        raise _wrong_field("parameters", value, "an object")
    unknown = [key for key in value if key not in _PARAMETERS]
    if unknown:
        raise _unknown_field('"parameters"', "parameters.", unknown[0], _PARAMETERS)
    timeout, priority = value.get("timeout_ms"), value.get("priority")
    if timeout is not None and not (type(timeout) in (int, float) and timeout > 0):
        raise _wrong_field("parameters.timeout_ms", timeout, "a number above 0")
    if priority is not None:
        whole = whole_number(priority)
        if whole is None or whole < 0:
            raise _wrong_field("parameters.priority", priority, "a whole number from 0")
        priority = whole
    return None if timeout is None else float(timeout), priority


def whole_number(value: Any) -> int | None:
    """The integer that a JSON number is: `3.0` is 3, as JSON Schema has it; None for anything else."""
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _unknown_field(where: str, prefix: str, name: str, known: tuple[str, ...]) -> InvalidInput:
    text = value_text(name)
    return InvalidInput(
        f"{where} has an unknown field, {text}; it takes {names_text(known)}", field=f"{prefix}{text[1:-1]}"
    )


def _wrong_field(name: str, value: Any, expected: str, verb: str = "is") -> InvalidInput:
    got = value_text(value)
    return InvalidInput(f'"{name}" {verb} {got}; it takes {expected}', field=name, value=got)


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
"""How bodies begin that are taken for JSON where their sender forgot to say what they are."""


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
        place = undecodable.start
        return MalformedBody(
            f"the body is not UTF-8: byte 0x{body[place]:02x} at offset {place}", position=place
        )
    place = error.pos
    if text[place : place + 8].startswith(_NON_FINITE):
        return MalformedBody(
            f"the body is not JSON at character {place}: JSON has no NaN or Infinity;"
            " send such numbers in the binary form of /v2",
            position=place,
        )
    if place == 0 and text[0].isalpha():
        return MalformedBody(
            "the body is not JSON; if it is a sentence for a model of text: send Content-Type: text/plain",
            position=0,
        )
    return MalformedBody(f"the body is not JSON: {error.msg} at character {place}", position=place)


def _plain(value: object) -> object:
    """What orjson takes in place of an array or a scalar that it does not."""
    if isinstance(value, np.integer):
        # numpy may have two types for one width, of which orjson knows one.
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError
    if not value.ndim:
        return value[()]
    return value.tolist() if value.dtype.kind in "OU" else np.ascontiguousarray(value)
