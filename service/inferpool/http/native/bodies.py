"""Reads the body of a native predict request as tensors, by its media type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from inferpool.allowance import Allowance
from inferpool.codecs.base64_files import read_base64
from inferpool.codecs.csv_table import read_csv
from inferpool.codecs.table import Table, read_json_table, table_tensors, takes_tables
from inferpool.codecs.text import TextCodec
from inferpool.errors import InvalidInput, UnsupportedMediaType
from inferpool.http.media_types import CSV, FORM, JSON_TYPE, MEANT_AS_JSON, NPY, NPZ, PARQUET, TABLES
from inferpool.http.native.multipart import find_input, read_form
from inferpool.http.predict.api import Body, Data, Options
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.repository.catalog import VersionView
from inferpool.tensors import Array, Tensors, TensorSpec, check_inputs, name_text, names_text, value_text
from inferpool.wire.json_bounds import COUNTED_BYTES
from inferpool.wire.large_bytes import as_bytes
from inferpool.wire.native_json import PredictRequest, has_rows_as_objects, parse_request
from inferpool.wire.npy import cast_to, decode_npy, decode_npz

_CHARSET: Final = re.compile(r"""(?:^|[\s;])charset\s*=\s*["']?([^\s;"']*)""", re.IGNORECASE)
_UTF8: Final = frozenset(("utf-8", "utf8", "us-ascii", "ascii"))
_SYNONYMS: Final = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "application/parquet": PARQUET,
    "application/x-parquet": PARQUET,
}
"""Media types that are not registered, and that clients send all the same."""


def open_body(head: RequestHead, data: Data, allowance: Allowance) -> Body:
    """Open a body and parse as much of it as possible without the model.

    Raises MalformedBody, InvalidInput for a wrong field other than the tensors, and what `Allowance.take`
    raises.
    """
    if head.content_type in MEANT_AS_JSON:
        content = as_bytes(data)
        allow_rows(content, allowance)
        return open_request(parse_request(content, allowance), allowance)
    return _FileBody(head, data, allowance)


def allow_rows(data: bytes, allowance: Allowance) -> None:
    """Let a JSON body have more values than the tensors of the signature, if its rows may be objects.

    The bound of all values holds for it, too.
    """
    if len(data) > COUNTED_BYTES and has_rows_as_objects(data):
        allowance.signature = None


def open_request(request: PredictRequest, allowance: Allowance) -> Body:
    """Return the body of a native JSON request."""
    return _JsonBody(request, allowance)


def media_types(view: VersionView) -> list[str]:
    """The media types of the bodies that a version takes."""
    pictures = view.image.media_types if view.image is not None else ()
    texts = view.text.media_types if view.text is not None else ()
    tables = TABLES if view.signature is not None and takes_tables(view.signature) else ()
    return [JSON_TYPE, NPY, NPZ, FORM, *tables, *pictures, *texts]


class _JsonBody(Body):
    def __init__(self, request: PredictRequest, allowance: Allowance) -> None:
        self._columns: Sequence[str] = ()
        self._request = request
        self._allowance = allowance
        self.options = Options(
            request.model,
            request.version,
            request.id,
            request.outputs,
            request.timeout_ms,
            request.priority,
        )

    @property
    def columns(self) -> Sequence[str]:
        return self._columns

    def tensors(self, served: ServedVersion) -> Tensors:
        field = self._request.table_field
        if field is None:
            image = served.view.image
            texts = None if image is None else self._request.texts_of(image.input)
            if image is None or texts is None:
                return self._request.tensors(served.signature)
            files = read_base64(image.input, texts, self._allowance)
            return image.decode_rows(files, len(texts), self._allowance)
        signature = served.signature
        table = read_json_table(field, self._request.table, signature)
        self._columns = table.names
        return table_tensors(signature, table, self._allowance)


class _FileBody(Body):
    """Arrays, a picture or a text. Such a body has only tensors, so it is read once the version is known."""

    def __init__(self, head: RequestHead, data: Data, allowance: Allowance) -> None:
        self._head = head
        self._data = data
        self._allowance = allowance
        self._columns: Sequence[str] = ()
        self.options = Options()

    @property
    def columns(self) -> Sequence[str]:
        return self._columns

    def tensors(self, served: ServedVersion) -> Tensors:
        tensors = self._read(served)
        check_inputs(served.sent(tensors), tensors)
        return tensors

    def _read(self, served: ServedVersion) -> Tensors:
        kind = self._head.content_type
        if kind == NPY:
            spec = served.signature.single_input
            if spec is None:
                takes = names_text(served.signature.inputs_by_name)
                raise InvalidInput(
                    f"{NPY} holds one array, the model takes {takes}; send {NPZ} with one array per input"
                )
            return {spec.name: self._cast(served, spec, decode_npy(self._data, self._allowance))}
        data = as_bytes(self._data)
        if kind == NPZ:
            arrays = decode_npz(data, self._allowance)
            return {
                name: self._cast(served, find_input(served.signature, name), arrays.pop(name))
                for name in list(arrays)
            }
        kind = _SYNONYMS.get(kind, kind)
        if kind in TABLES:
            table = self._read_table(kind, served)
            self._columns = table.names
            return table_tensors(served.signature, table, self._allowance)
        image, text = served.view.image, served.view.text
        if kind == FORM:
            return read_form(
                data, self._head.content_type_parameters, served.signature, image, text, self._allowance
            )
        if text is not None and kind in text.media_types:
            return self._read_text(text, data)
        if image is not None and kind in image.media_types:
            return image.decode(data, self._allowance)
        expected = media_types(served.view)
        raise UnsupportedMediaType(
            f"the body is {name_text(kind)}, the model takes {', '.join(expected)}", expected=expected
        )

    def _cast(self, served: ServedVersion, spec: TensorSpec, array: Array) -> Array:
        served.check_rows(array)
        return cast_to(spec, array, self._allowance)

    def _read_table(self, kind: str, served: ServedVersion) -> Table:
        if kind == CSV:
            parameters = self._head.content_type_parameters
            return read_csv(as_bytes(self._data), parameters, served.signature, self._allowance)
        # Imported late: the package that reads these files is not always installed, and takes time to import.
        from inferpool.codecs.arrow_table import read_arrow, read_parquet

        read = read_parquet if kind == PARQUET else read_arrow
        return read(as_bytes(self._data), self._allowance)

    def _read_text(self, text: TextCodec, data: bytes) -> Tensors:
        found = _CHARSET.search(self._head.content_type_parameters)
        if found is not None and found[1].lower() not in _UTF8:
            raise UnsupportedMediaType(
                f"the text has the charset {value_text(found[1])}; send UTF-8", expected=["utf-8"]
            )
        return {text.input: text.decode(data, self._allowance)}
