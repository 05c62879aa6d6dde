"""Turns what a caller predicts with into the body of a request.

Arrays are sent in the binary form of the Open Inference Protocol: it takes any number of inputs, has their
names and datatypes, and is not copied, compressed or summed up, which npz is. It needs to know the names
and datatypes of the inputs, which the client asks for once. A caller whose key may not ask sends npz.
Pictures are sent as the files that they are, data frames as Arrow, and sentences as JSON, which is as short
for text as any binary form.

The classes of pandas, Pillow and pyarrow are recognised by what they offer, so none of them is imported.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import orjson

from inferpool.client.answer import JSON_TYPE, NPZ
from inferpool.client.metadata import Metadata
from inferpool.errors import InvalidInput
from inferpool.tensors import Array, TensorSpec, fp32_to_bf16, names_text
from inferpool.wire.npy import cast_to, encode_npy, encode_npz
from inferpool.wire.v2_binary import to_binary

ARROW: Final = "application/vnd.apache.arrow.stream"
OCTET_STREAM: Final = "application/octet-stream"
_PICTURE_TYPES: Final = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"RIFF", "image/webp"),
    (b"BM", "image/bmp"),
    (b"GIF8", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
)

Part: TypeAlias = bytes | memoryview


class Arrays(NamedTuple):
    """Arrays by the names of their inputs; the name of the only array is None if the caller gave none."""

    tensors: Mapping[str | None, Array]


class Frame(NamedTuple):
    """A data frame."""

    frame: Any


class Sentences(NamedTuple):
    """Sentences, one a row."""

    texts: Sequence[str]


class Pictures(NamedTuple):
    """Pictures, one a row: paths, files in memory, or pictures of Pillow."""

    pictures: Sequence[Any]


class Form(NamedTuple):
    """Pictures and arrays by the names of their inputs."""

    fields: Mapping[str, Pictures | Array]


class File(NamedTuple):
    """A body as it is sent, with its media type."""

    media_type: str
    content: bytes


Content: TypeAlias = Arrays | Frame | Sentences | Pictures | Form | File


class Encoded(NamedTuple):
    """A body: its media type, its parts, and the bytes of JSON before binary tensors if it has those."""

    media_type: str
    parts: Sequence[Part]
    header_length: int | None = None


def recognise(value: Any) -> Content:
    """Return what `value` is; raises TypeError if it is nothing that a model takes."""
    if isinstance(value, np.ndarray):
        return Arrays({None: _array(value)})
    if isinstance(value, str):
        return Sentences([value])
    if is_picture(value):
        return Pictures([value])
    if hasattr(value, "columns") and (hasattr(value, "iloc") or hasattr(value, "__arrow_c_stream__")):
        return Frame(value)
    if isinstance(value, Mapping):
        if any(_holds_pictures(inner) for inner in value.values()):
            return Form({
                str(name): Pictures(inner if isinstance(inner, (list, tuple)) else [inner])
                if _holds_pictures(inner)
                else _array(inner)
                for name, inner in value.items()
            })  # fmt: skip
        return Arrays({str(name): _array(inner) for name, inner in value.items()})
    if isinstance(value, (list, tuple)) and value:
        if isinstance(value[0], str):
            return Sentences(value)
        if is_picture(value[0]):
            return Pictures(value)
    return Arrays({None: _array(value)})


def is_picture(value: Any) -> bool:
    """Whether `value` is a path, the bytes of a file, or a picture of Pillow."""
    return isinstance(value, (bytes, bytearray, memoryview, Path)) or (
        hasattr(value, "getbands") and hasattr(value, "save")
    )


def _holds_pictures(value: Any) -> bool:
    return is_picture(value) or (isinstance(value, (list, tuple)) and bool(value) and is_picture(value[0]))


def _array(value: Any) -> Array:
    """Return an array-like value; strings become objects. Raises TypeError for anything else."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"the rows are irregular: {error}") from None
    if array.dtype.kind in "US":
        array = array.astype(np.str_).astype(np.object_)
    if array.dtype.kind == "O" and not all(isinstance(each, str) for each in array.flat):
        raise TypeError(f"{type(value).__name__} holds objects that are neither numbers nor strings")
    if array.dtype.kind not in "biufO":
        raise TypeError(f"{type(value).__name__} is no array of numbers or strings, picture or data frame")
    return array


def encode_arrays(arrays: Arrays, metadata: Metadata, outputs: Sequence[str] | None) -> Encoded:
    """Encode `arrays` in the binary form, in the datatypes of the model.

    Raises InvalidInput if the model takes others.
    """
    by_name = {spec.name: spec for spec in metadata.inputs}
    entries, data = [], []
    for given, array in arrays.tensors.items():
        name = given if given is not None else _only_input(metadata)
        spec = by_name.get(name)
        if spec is None:
            raise InvalidInput(
                f"no input is called {name}; the model takes {names_text(by_name)}", tensor=name
            )
        part = to_binary(_cast(spec, array))
        entries.append({
            "name": name, "datatype": spec.datatype, "shape": array.shape,
            "parameters": {"binary_data_size": len(part)},
        })  # fmt: skip
        data.append(part)
    request: dict[str, Any] = {"inputs": entries, "parameters": {"binary_data_output": True}}
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    header = orjson.dumps(request)
    return Encoded(OCTET_STREAM, [header, *data], len(header))


def _only_input(metadata: Metadata) -> str:
    if len(metadata.inputs) != 1:
        names = names_text([spec.name for spec in metadata.inputs])
        raise InvalidInput(f"{metadata.name} takes {names}; send a dict with their names")
    return metadata.inputs[0].name


def _cast(spec: TensorSpec, array: Array) -> Array:
    if spec.datatype == "BF16" and array.dtype.kind == "f":
        array = fp32_to_bf16(np.ascontiguousarray(array, np.float32))
    return cast_to(spec, array)


def encode_npz_arrays(arrays: Arrays) -> Encoded:
    """Encode `arrays` for the native route, which finds out names and datatypes by itself."""
    if None in arrays.tensors:
        return Encoded("application/x-npy", [encode_npy(arrays.tensors[None])])
    return Encoded(NPZ, [encode_npz({str(name): array for name, array in arrays.tensors.items()})])


def encode_sentences(sentences: Sentences) -> Encoded:
    """Encode sentences as JSON."""
    return Encoded(JSON_TYPE, [orjson.dumps({"inputs": list(sentences.texts)})])


def encode_frame(frame: Frame, *, arrow: bool) -> Encoded:
    """Encode a data frame as Arrow, or as JSON if pyarrow is not installed or `arrow` is false."""
    if arrow:
        content = _arrow(frame.frame)
        if content is not None:
            return Encoded(ARROW, [content])
    if hasattr(frame.frame, "iloc"):
        columns = {str(name): _json_column(frame.frame[name]) for name in frame.frame.columns}
    elif hasattr(frame.frame, "to_pydict"):
        columns = frame.frame.to_pydict()
    else:
        raise TypeError(
            f"{type(frame.frame).__name__} is sent as Arrow alone, which pyarrow writes and reads"
        )
    options = orjson.OPT_SERIALIZE_NUMPY
    return Encoded(JSON_TYPE, [orjson.dumps({"list": columns}, option=options)])


def _json_column(column: Any) -> Any:
    """Return a column of pandas as orjson takes it; a missing value becomes None."""
    values = column.to_numpy()
    if values.dtype.kind in "biuf":
        return np.ascontiguousarray(values)
    return [None if missing else value for value, missing in zip(values.tolist(), column.isna(), strict=True)]


def _arrow(frame: Any) -> Part | None:
    """Return the stream of Arrow that holds `frame`; None if pyarrow is not installed."""
    try:
        import pyarrow as pa
    except ImportError:
        return None
    is_pandas = hasattr(frame, "iloc")
    table = pa.Table.from_pandas(frame, preserve_index=False) if is_pandas else pa.table(frame)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def encode_pictures(pictures: Pictures) -> Encoded:
    """Encode pictures: one as the file that it is, several as a form."""
    files = [read_picture(picture) for picture in pictures.pictures]
    if len(files) == 1:
        return Encoded(picture_type(files[0]), [files[0]])
    return _encode_form([("", file) for file in files])


def encode_form(form: Form) -> Encoded:
    """Encode pictures and arrays by the names of their inputs."""
    fields: list[tuple[str, Part]] = []
    for name, value in form.fields.items():
        if isinstance(value, Pictures):
            fields += [(name, read_picture(picture)) for picture in value.pictures]
        else:
            fields.append((name, encode_npy(value)))
    return _encode_form(fields)


def _encode_form(fields: Sequence[tuple[str, Part]]) -> Encoded:
    """Encode `multipart/form-data` (RFC 7578); a picture without a name is for the model's image input."""
    boundary = secrets.token_hex(16)
    parts: list[Part] = []
    for name, content in fields:
        quoted = (
            (name or "picture").replace("\\", "\\\\").replace('"', '\\"').replace("\r", "").replace("\n", "")
        )
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{quoted}"; filename="file"\r\n\r\n'
        parts += (head.encode(), content, b"\r\n")
    parts.append(f"--{boundary}--\r\n".encode())
    return Encoded(f"multipart/form-data; boundary={boundary}", parts)


def read_picture(picture: Any) -> Part:
    """Return the file of a picture; raises OSError if a path cannot be read."""
    if isinstance(picture, Path):
        return picture.read_bytes()
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    file = io.BytesIO()
    # PNG loses nothing, and compressing it little costs less than sending more.
    mode = picture if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else picture.convert("RGB")
    mode.save(file, "PNG", compress_level=1)
    return file.getvalue()


def picture_type(file: Part) -> str:
    """Return the media type of a picture by its first bytes; that of any bytes if it is unknown."""
    start = bytes(file[:12])
    if start[4:] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    return next((kind for magic, kind in _PICTURE_TYPES if start.startswith(magic)), OCTET_STREAM)


def count_rows(content: Content) -> int:
    """Return how many rows `content` has; raises TypeError if its inputs differ in them."""
    if isinstance(content, Sentences):
        return len(content.texts)
    if isinstance(content, Pictures):
        return len(content.pictures)
    if isinstance(content, Frame):
        return len(content.frame)
    if isinstance(content, File):
        raise TypeError("the rows of a file are not known")
    values = content.tensors.values() if isinstance(content, Arrays) else content.fields.values()
    counts = {
        len(value.pictures) if isinstance(value, Pictures) else len(np.atleast_1d(value)) for value in values
    }
    if len(counts) != 1:
        raise TypeError(f"the inputs differ in their rows: {sorted(counts)}")
    return counts.pop()


def cut(content: Content, start: int, end: int) -> Content:
    """Return the rows from `start` up to `end`; arrays are views."""
    if isinstance(content, Sentences):
        return Sentences(content.texts[start:end])
    if isinstance(content, Pictures):
        return Pictures(content.pictures[start:end])
    if isinstance(content, Frame):
        frame = content.frame
        return Frame(frame.iloc[start:end] if hasattr(frame, "iloc") else frame[start:end])
    if isinstance(content, File):
        raise TypeError("a file cannot be cut")
    if isinstance(content, Arrays):
        return Arrays({name: array[start:end] for name, array in content.tensors.items()})
    return Form({
        name: Pictures(value.pictures[start:end]) if isinstance(value, Pictures) else value[start:end]
        for name, value in content.fields.items()
    })  # fmt: skip


def usual_rows(content: Content) -> int:
    """Return how many rows of `content` are sent in one request if the caller does not say."""
    if isinstance(content, Arrays):
        rows = count_rows(content)
        size = sum(array.nbytes for array in content.tensors.values())
        return max(1, min(MOST_ROWS, REQUEST_BYTES * rows // max(1, size)))
    if isinstance(content, Frame):
        return MOST_ROWS
    return SENTENCES if isinstance(content, Sentences) else PICTURES


REQUEST_BYTES: Final = 2**20
"""Bytes of arrays in one of several requests: enough that a request costs little beside its arrays."""
MOST_ROWS: Final = 1024
SENTENCES: Final = 64
PICTURES: Final = 8
