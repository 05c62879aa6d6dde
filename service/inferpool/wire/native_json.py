"""The native JSON bodies: `{"model", "version", "id", "inputs", "outputs", "parameters"}` and their answers.

Lists of numbers are read by `inferpool.wire.json_numbers` if its module in C was built, all else by orjson
and `inferpool.wire.nested_lists`. Both ways give the same tensors and the same errors. If a key comes
twice, the last one counts. `null` for an optional field means the same as leaving it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.errors import InvalidInput
from inferpool.tensors import (
    Array,
    Signature,
    Tensors,
    TensorSpec,
    bf16_to_fp32,
    check_inputs,
    name_text,
    names_text,
    unknown_input,
    value_text,
)
from inferpool.wire import json_numbers
from inferpool.wire.json_bodies import (
    extract_numbers,
    has_non_finite,
    read_again,
    read_object,
    unknown_field,
    whole_number,
    write,
    wrong_field,
)
from inferpool.wire.json_numbers import FallBack, read_extracted
from inferpool.wire.nested_lists import completed, read_nested

_FIELDS: Final = ("model", "version", "id", "inputs", "outputs", "parameters")
MOST_ID_CHARACTERS: Final = 1024
"""The longest id of a request."""
_KNOWN_FIELDS: Final = frozenset(_FIELDS)
TABLE_FIELDS: Final = ("dataframe_records", "dataframe_split", "records", "split", "list")
"""The fields that hold a table in place of `inputs`, by the words of pandas and MLflow."""
_ROWS: Final = re.compile(rb'"(?:dataframe_records|dataframe_split|records|split|list|instances)"\s*:')
_SEARCHED_BYTES: Final = 1024
_PARAMETERS: Final = ("timeout_ms", "priority")


class PredictRequest:
    """One native inference request, whose model is not resolved yet.

    Attributes:
        model: the model's name, or None if the body does not say.
        version: a number or a label, as text.
        id: the client's name for the request.
        outputs: the outputs asked for, in order and each once; None for all.
        timeout_ms: how many milliseconds the client waits.
        priority: 0 is the default, 1 the most urgent, larger is less urgent.
        table_field: the field with a table in place of `inputs`; None if there is none.
        table: the value of that field.
    """

    __slots__ = (
        "_allowance",
        "_body",
        "_extracted",
        "_inputs",
        "id",
        "model",
        "outputs",
        "priority",
        "table",
        "table_field",
        "timeout_ms",
        "version",
    )

    def __init__(
        self, fields: Mapping[str, Any], body: bytes, extracted: bool, allowance: Allowance = UNLIMITED
    ) -> None:
        """Check and keep the top-level `fields` of `body`, which are `extracted` by `json_numbers` or plain.

        Raises InvalidInput with the first field that is wrong.
        """
        self._allowance = allowance
        self._body = body
        self._extracted = extracted
        self.model: str | None = None
        self.version: str | None = None
        self.id: str | None = None
        self.outputs: tuple[str, ...] | None = None
        self.timeout_ms: float | None = None
        self.priority: int | None = None
        self.table_field: str | None = None
        self.table: Any = None
        if len(fields) == 1 and "inputs" in fields:  # most bodies
            self._inputs = fields["inputs"]
            return
        if not fields.keys() <= _KNOWN_FIELDS:
            unknown = next((key for key in fields if key not in _FIELDS and key not in TABLE_FIELDS), None)
            if unknown is not None:
                raise unknown_field("the body", "", unknown, _FIELDS)
            self.table_field = _table_field(fields)
            self.table = fields[self.table_field]
        self.model = _text(fields, "model")
        self.version = _version(fields.get("version"))
        self.id = check_id(_text(fields, "id"))
        self.outputs = _outputs(fields.get("outputs"))
        self.timeout_ms, self.priority = read_parameters(fields.get("parameters"))
        if "inputs" not in fields and self.table_field is None:
            raise InvalidInput('the body has no "inputs"', field="inputs")
        self._inputs = fields.get("inputs")

    def texts_of(self, name: str) -> list[str] | None:
        """Return the strings that are sent for the input `name`, alone or as `inputs`; None if it has others.

        Raises InvalidInput if another input stands beside them.
        """
        inputs = self._inputs
        is_named = isinstance(inputs, dict)
        value = inputs.get(name) if is_named else inputs
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            return None
        if is_named and len(inputs) > 1:
            other = next(key for key in inputs if key != name)
            raise InvalidInput(
                f'"inputs" has {name_text(other)} beside pictures for {name_text(name)}; send a form with a'
                " field for each input",
                tensor=name,
            )
        return texts

    def tensors(self, signature: Signature) -> Tensors:
        """Return the inputs as `signature` takes them; may be called once.

        Raises InvalidInput with the tensor that is unknown, missing, irregular, or of another datatype, shape
        or range.
        """
        if self._extracted:
            self._extracted = False
            fault: InvalidInput | None = None
            try:
                return read_inputs(signature, self._inputs, read_extracted)
            except InvalidInput as error:
                fault = error
            except FallBack:
                pass
            finally:
                self._inputs = None
            self._inputs = read_again(self._body, self._allowance, fault)["inputs"]
        return read_inputs(signature, self._inputs, read_nested)


def parse_request(body: bytes, allowance: Allowance = UNLIMITED) -> PredictRequest:
    """Read a native body.

    Raises MalformedBody if it is not a JSON object, InvalidInput if a field is unknown or wrong, and what
    `check_json` raises.
    """
    fields = extract_numbers(body, allowance)
    if fields is not None:
        return PredictRequest(fields, body, True, allowance)
    return PredictRequest(read_object(body, allowance=allowance), body, False)


def encode_response(
    model: str,
    version: str,
    request_id: str,
    outputs: Mapping[str, Any],
    predictions: list[Any] | None,
    bf16: Collection[str] = (),
) -> bytes:
    """Return the native answer as strict JSON.

    `outputs` are arrays, or lists and objects if the model gives sequences and maps. The outputs named in
    `bf16` hold the raw bits of BF16. A number that is not finite becomes null, and its output is named in
    `"non_finite"`. `predictions` are left out if None. Raises ModelFailed if JSON cannot hold an output.
    """
    if bf16:
        outputs = {name: bf16_to_fp32(tensor) if name in bf16 else tensor for name, tensor in outputs.items()}
    answer: dict[str, Any] = {"model": model, "version": version, "id": request_id, "outputs": outputs}
    if predictions is not None:
        answer["predictions"] = predictions
    encoded = write(answer)
    if json_numbers.has_null(encoded):
        non_finite = [name for name, value in outputs.items() if has_non_finite(value)]
        if non_finite:
            answer["non_finite"] = non_finite
            return write(answer)
    return encoded


def read_inputs(signature: Signature, inputs: Any, read: Callable[[TensorSpec, Any], Array]) -> Tensors:
    """Return `inputs`, an object by names or the only input, as tensors; `read` makes one of a value.

    Raises InvalidInput, and what `read` raises.
    """
    tensors: Tensors = {}
    for name, value in _named(signature, inputs):
        spec = signature.inputs_by_name.get(name)
        if spec is None:
            raise unknown_input(signature, name)
        if name == signature.substitute_input:
            _check_sentences(name, value)
        tensor = read(spec, value)
        tensors[name] = tensor if tensor.size else completed(spec, tensor)
    check_inputs(signature, tensors)
    return tensors


def _check_sentences(name: str, value: Any) -> None:
    """Raise InvalidInput if a value for sentences has a fault that is simpler than a wrong shape."""
    if isinstance(value, str):
        raise InvalidInput(
            f"tensor {name_text(name)} is a string; send a list of sentences: [{value_text(value)}]",
            tensor=name,
            expected="BYTES",
        )
    if not isinstance(value, list) or set(map(type, value)) <= {str, list}:
        return
    index = next(i for i, item in enumerate(value) if type(item) not in (str, list))
    got = value_text(value[index])
    raise InvalidInput(
        f"tensor {name_text(name)} at [{index}] is {got}; it takes a sentence (string)",
        tensor=name,
        index=[index],
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


def has_rows_as_objects(body: bytes) -> bool:
    """Return whether a field at the beginning of `body` is one for rows, each of which may be an object."""
    return _ROWS.search(body, 0, _SEARCHED_BYTES) is not None


def _table_field(fields: Mapping[str, Any]) -> str:
    """Return the field with a table; raises InvalidInput if there is another one, or `inputs`."""
    found = [key for key in fields if key in TABLE_FIELDS or key == "inputs"]
    if len(found) > 1:
        raise InvalidInput(f"the body has {names_text(found)}; send one of them", field=found[0])
    return found[0]


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong_field(name, value, "a string")
    return value


def check_id(value: str | None) -> str | None:
    """Return the id of a request, which its answer repeats; raises InvalidInput if it is too long."""
    if value is not None and len(value) > MOST_ID_CHARACTERS:
        raise InvalidInput(
            f'"id" has {len(value)} characters; it takes at most {MOST_ID_CHARACTERS}',
            field="id",
            expected=MOST_ID_CHARACTERS,
            got=len(value),
        )
    return value


def _version(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    number = whole_number(value)
    if number is None:
        raise wrong_field("version", value, "a whole number or a string")
    return str(number)


def _outputs(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise wrong_field("outputs", value, "a list of names")
    for name in value:
        if not isinstance(name, str):
            raise wrong_field("outputs", name, "a list of names", "holds")
    return tuple(dict.fromkeys(value)) or None


def read_parameters(value: Any) -> tuple[float | None, int | None]:
    """Return the timeout in milliseconds and the priority in `parameters`; raises InvalidInput."""
    if value is None:
        return None, None
    if not isinstance(value, dict):
        raise wrong_field("parameters", value, "an object")
    unknown = [key for key in value if key not in _PARAMETERS]
    if unknown:
        raise unknown_field('"parameters"', "parameters.", unknown[0], _PARAMETERS)
    timeout, priority = value.get("timeout_ms"), value.get("priority")
    if timeout is not None and not (type(timeout) in (int, float) and timeout > 0):
        raise wrong_field("parameters.timeout_ms", timeout, "a number above 0")
    if priority is not None:
        number = whole_number(priority)
        if number is None or number < 0:
            raise wrong_field("parameters.priority", priority, "a whole number from 0")
        priority = number
    return None if timeout is None else float(timeout), priority
