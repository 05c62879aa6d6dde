"""Reads `multipart/form-data` (RFC 7578): each field is an npy file, a picture or a sentence.

Several pictures are rows of the image input, in the order of the form.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from inferpool.allowance import Allowance
from inferpool.codecs.text import TextCodec
from inferpool.errors import InvalidInput, MalformedBody, RequestError
from inferpool.system.cpu_pace import PACE
from inferpool.tensors import (
    Signature,
    Tensors,
    TensorSpec,
    name_text,
    unknown_input,
    value_text,
)
from inferpool.wire.large_bytes import as_bytes
from inferpool.wire.npy import cast_to, decode_npy

if TYPE_CHECKING:
    from inferpool.codecs.image import ImageCodec

_MAX_FIELDS: Final = 1024
_PIECE_BYTES: Final = 256 * 1024
"""Bytes that are searched for a boundary at a time, because a search holds the GIL."""
_NPY_MAGIC: Final = b"\x93NUMPY"

# The library logs faults in bodies. They concern the client, who gets an error, and not the log.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


@dataclass(slots=True)
class _Field:
    """One field of the form. Its content comes in slices, of one byte each if a client means it badly."""

    name: str = ""
    content: bytearray = field(default_factory=bytearray)


def read_form(
    body: bytes,
    parameters: str,
    signature: Signature,
    image: ImageCodec | None,
    text: TextCodec | None,
    allowance: Allowance,
) -> Tensors:
    """Read the tensors in a form; `parameters` are those of its Content-Type.

    An npy file has the name of its input. A picture is for the model's image input, and may have any name
    that no other input has. A sentence is for the text input. Raises MalformedBody if the form is incomplete,
    InvalidInput if a field is none of these, the errors of npy files and pictures, and what `Allowance.take`
    raises.
    """
    tensors: Tensors = {}
    pictures: list[bytes] = []
    names: list[str] = []
    allowance.take(2 * len(body), "taking the form apart")
    for part in _fields(body, parameters):
        content = as_bytes(part.content)
        part.content.clear()
        if text is not None and part.name == text.input and not content.startswith(_NPY_MAGIC):
            found = {text.input: text.decode(content, allowance)}
        elif image is None or content.startswith(_NPY_MAGIC):
            spec = find_input(signature, part.name)
            with _naming(part.name):
                array = decode_npy(content, allowance)
                found = {spec.name: cast_to(spec, array, allowance)}
        else:
            if part.name in signature.inputs_by_name and part.name != image.input:
                raise InvalidInput(
                    f"field {name_text(part.name)} is a picture, which the model takes for"
                    f" {name_text(image.input)} only; send an npy file",
                    tensor=part.name,
                )
            pictures.append(content)
            names.append(part.name)
            continue
        twice = found.keys() & tensors.keys()
        if twice:
            raise _twice(next(iter(twice)))
        tensors |= found
    if image is not None and pictures:
        if image.input in tensors:
            raise _twice(image.input)
        if len(pictures) > 1:
            return tensors | image.decode_rows(pictures, len(pictures), allowance)
        with _naming(names[0]):
            tensors |= image.decode(pictures[0], allowance)
    return tensors


def _twice(name: str) -> InvalidInput:
    return InvalidInput(f"tensor {name_text(name)} comes twice; send each input once", tensor=name)


def find_input(signature: Signature, name: str) -> TensorSpec:
    """The input called `name`; raises InvalidInput if there is none."""
    spec = signature.inputs_by_name.get(name)
    if spec is None:
        raise unknown_input(signature, name)
    return spec


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefix the errors of a field's content with the name of the field."""
    try:
        yield
    except RequestError as error:
        field_text = name_text(name)
        raise type(error)(
            f"field {field_text} of the form: {error.detail}", **{**error.members, "field": field_text[1:-1]}
        ) from None


class _Reader:
    """Collects the fields from the callbacks of the parser."""

    def __init__(self) -> None:
        self.parts: list[_Field] = []
        self.complete = False
        self._header = b""
        self._value = b""

    def begin(self) -> None:
        if len(self.parts) == _MAX_FIELDS:
            raise MalformedBody(
                f"the form has more than {_MAX_FIELDS} fields, the most that are accepted",
                expected=_MAX_FIELDS,
            )
        self.parts.append(_Field())

    def header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value.decode("latin-1"))
            self.parts[-1].name = options.get(b"name", b"").decode(errors="replace")
        self._header = self._value = b""

    def content(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].content += memoryview(data)[start:end]

    def end(self) -> None:
        self.complete = True


def _fields(body: bytes, parameters: str) -> list[_Field]:
    _, options = parse_options_header(f"multipart/form-data; {parameters}")
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedBody("the Content-Type of the form has no boundary; add the parameter boundary")
    reader = _Reader()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin,
                "on_header_field": reader.header,
                "on_header_value": reader.value,
                "on_header_end": reader.header_end,
                "on_part_data": reader.content,
                "on_end": reader.end,
            },
        )
        for start in range(0, len(body), _PIECE_BYTES):
            parser.write(body[start : start + _PIECE_BYTES])
            PACE.step()
    except FormParserError as error:
        raise MalformedBody(f"the body is not a valid form: {value_text(str(error))}") from None
    if not reader.complete:
        raise MalformedBody("the form is cut off: its last boundary is missing")
    return reader.parts
