"""Bodies with a list of rows: `{"instances": …}` of the protocol V1, which Vertex AI and KServe use.

An instance is what one row is for the only input of a model, or an object with a value for each input.
`{"inputs": …}` has whole inputs instead, as TensorFlow Serving takes them. This module is not compiled: its
loops over rows let other threads run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.errors import InvalidInput
from inferpool.tensors import (
    Array,
    Signature,
    Tensors,
    TensorSpec,
    check_inputs,
    names_text,
    unknown_input,
)
from inferpool.wire.columns import as_column, column_tensor, transpose
from inferpool.wire.json_bodies import extract_numbers, read_again, read_object, unknown_field, wrong_field
from inferpool.wire.json_numbers import FallBack, Numbers, read_extracted
from inferpool.wire.native_json import PredictRequest, read_inputs, read_parameters
from inferpool.wire.nested_lists import completed, read_nested

_FIELDS: Final = ("instances", "inputs", "signature_name", "parameters")
_BASE64: Final = "b64"


class InstancesRequest:
    """One request with instances, or with whole inputs.

    Attributes:
        by_columns: whether the body has whole inputs; its answer has whole outputs then.
        timeout_ms: how many milliseconds the client waits, or None.
        priority: 0 is the default, 1 the most urgent, larger is less urgent; or None.
    """

    def __init__(
        self, fields: Mapping[str, Any], body: bytes, extracted: bool, allowance: Allowance = UNLIMITED
    ) -> None:
        """Check and keep the top-level `fields` of `body`, which are `extracted` by `json_numbers` or plain.

        Raises InvalidInput with the first field that is wrong.
        """
        unknown = next((key for key in fields if key not in _FIELDS), None)
        if unknown is not None:
            raise unknown_field("the body", "", unknown, _FIELDS)
        self.by_columns = "instances" not in fields
        if self.by_columns == ("inputs" not in fields):
            has = 'neither "instances" nor "inputs"' if self.by_columns else 'both "instances" and "inputs"'
            raise InvalidInput(f"the body has {has}; send one of them", field="instances")
        self._key = "inputs" if self.by_columns else "instances"
        self._value = fields[self._key]
        self._body = body
        self._extracted = extracted
        self._allowance = allowance
        self.timeout_ms, self.priority = read_parameters(fields.get("parameters"))

    def texts_of(self, name: str) -> list[str] | None:
        """Return the strings that are sent for the input `name`, one a row; None if it has others.

        TensorFlow Serving's clients put files into objects: `{"b64": "…"}`.
        """
        rows = self._value
        if self.by_columns:
            rows = rows.get(name, rows) if isinstance(rows, dict) else rows
            rows = rows if isinstance(rows, list) else [rows]
        if not isinstance(rows, list) or not rows:
            return None
        texts = []
        for row in rows:
            is_named = not self.by_columns and isinstance(row, dict) and row.keys() == {name}
            value = row[name] if is_named else row
            if isinstance(value, dict) and value.keys() == {_BASE64}:
                value = value[_BASE64]
            if not isinstance(value, str):
                return None
            texts.append(value)
        return texts

    def tensors(self, signature: Signature) -> Tensors:
        """Return the inputs as `signature` takes them; may be called once. Raises InvalidInput."""
        value, self._value = self._value, None
        read = read_inputs if self.by_columns else read_instances
        if self._extracted:
            fault: InvalidInput | None = None
            try:
                return read(signature, value, read_extracted)
            except InvalidInput as error:
                fault = error
            except FallBack:
                pass
            value = read_again(self._body, self._allowance, fault)[self._key]
        return read(signature, value, read_nested)


def parse_instances(body: bytes, allowance: Allowance = UNLIMITED) -> InstancesRequest:
    """Read a body of the protocol V1.

    Raises MalformedBody if it is not a JSON object, InvalidInput if a field is unknown or wrong, and what
    `check_json` raises.
    """
    fields = extract_numbers(body, allowance)
    if fields is not None:
        return InstancesRequest(fields, body, True, allowance)
    return InstancesRequest(read_object(body, '{"instances": […]}', allowance), body, False)


def parse_either(body: bytes, allowance: Allowance = UNLIMITED) -> InstancesRequest | PredictRequest:
    """Read a body of the protocol V1 if it has instances, and else a native body; raises as both do."""
    fields = extract_numbers(body, allowance)
    extracted = fields is not None
    if fields is None:
        fields = read_object(body, allowance=allowance)
    if "instances" in fields or "signature_name" in fields:
        return InstancesRequest(fields, body, extracted, allowance)
    return PredictRequest(fields, body, extracted, allowance)


def read_instances(signature: Signature, instances: Any, read: Callable[[TensorSpec, Any], Array]) -> Tensors:
    """Return the inputs that a list of instances holds; `read` makes a tensor of a value.

    Raises InvalidInput, and what `read` raises.
    """
    if not isinstance(instances, (list, Numbers)):
        raise wrong_field("instances", instances, "a list with an item for each row")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        tensors = {}
        for name, values in transpose(instances, "instances", signature.inputs_by_name).items():
            spec = signature.inputs_by_name.get(name)
            if spec is None:
                raise unknown_input(signature, name)
            tensors[name] = column_tensor(spec, values)
    else:
        single = signature.single_input
        if single is None:
            raise InvalidInput(
                '"instances" has values without names; this model takes objects with'
                f" {names_text(signature.inputs_by_name)}",
                field="instances",
            )
        tensor = read(single, instances)
        tensors = {single.name: as_column(single, tensor if tensor.size else completed(single, tensor))}
    check_inputs(signature, tensors)
    return tensors
