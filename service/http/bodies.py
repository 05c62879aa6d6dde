"""From the bytes of a predict request to its tensors, by media type."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Final

from service.errors import BodyTooLarge, InvalidInput, MalformedBody, UnsupportedMediaType
from service.repository.catalog import VersionView
from service.tensors import Tensors, TensorSpec, check_inputs, names_text, unknown_input
from service.wire.json import PredictRequest, parse_request
from service.wire.npy import cast_to, decode_npy, decode_npz

JSON: Final = "application/json"
NPY: Final = "application/x-npy"
NPZ: Final = "application/x-npz"

# What curl and browsers send when nothing was said: taken for JSON, as people mean it.
_MEANT_AS_JSON: Final = frozenset(("", JSON, "application/x-www-form-urlencoded", "application/octet-stream"))

_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS


@dataclass(slots=True)
class Options:
    """What a body says beside its tensors, where its format can.

    Attributes:
        model: the model's name.
        version: number or label.
        id: the caller's name for the request.
        outputs: names of the outputs wanted, None for all.
        timeout_ms: milliseconds that the caller will wait.
        priority: 1 is the highest; 0 and None are the default.
    """

    model: str | None = None
    version: str | None = None
    id: str | None = None
    outputs: tuple[str, ...] | None = None
    timeout_ms: float | None = None
    priority: int | None = None


class Body:
    """A body whose format is known, and whose tensors are read once the version is."""

    def __init__(self, content_type: str, data: bytes, max_bytes: int) -> None:
        """Read as much as can be read without the model.

        Raises MalformedBody, or InvalidInput for a field beside the tensors that is wrong.
        """
        self._content_type = content_type
        self._data = data
        self._max_bytes = max_bytes
        self._request: PredictRequest | None = None
        self.options = Options()
        if content_type in _MEANT_AS_JSON:
            request = self._request = parse_request(data)
            self.options = Options(
                request.model,
                request.version,
                request.id,
                request.outputs,
                request.timeout_ms,
                request.priority,
            )

    def tensors(self, view: VersionView) -> Tensors:
        """The inputs as the version takes them, checked against its signature; call it once.

        Raises UnsupportedMediaType, MalformedBody, InvalidInput or BodyTooLarge.
        """
        signature = view.signature
        assert signature is not None  # the version is ready
        if self._request is not None:
            return self._request.tensors(signature)
        if self._content_type == NPY:
            spec = signature.single_input
            if spec is None:
                takes = names_text(signature.inputs_by_name)
                raise InvalidInput(f"the model takes {takes}: send {NPZ} with an array for each")
            tensors = {spec.name: cast_to(spec, decode_npy(self._data, self._max_bytes))}
        elif self._content_type == NPZ:
            arrays = decode_npz(self._data, self._max_bytes)
            tensors = {name: cast_to(_spec(view, name), array) for name, array in arrays.items()}
        elif view.image is not None and self._content_type in view.image.media_types:
            tensors = view.image.decode(self._data)
        else:
            raise UnsupportedMediaType(
                f'"{self._content_type}" is not a format that this model takes',
                expected=media_types(view),
            )
        check_inputs(signature, tensors)
        return tensors


def media_types(view: VersionView) -> list[str]:
    """The media types of bodies that a version takes."""
    return [JSON, NPY, NPZ, *(view.image.media_types if view.image is not None else ())]


def decompress(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """A body without its Content-Encoding: gzip, deflate, or none.

    Raises BodyTooLarge as soon as more than `max_bytes` have come out, UnsupportedMediaType for other
    encodings, MalformedBody for data that is damaged or cut off.
    """
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedMediaType(
            f'Content-Encoding "{encoding[:40]}" is not taken', expected=["gzip", "deflate"]
        )
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = stream.decompress(data, max_bytes + 1)
    except zlib.error:
        if encoding != "deflate":
            raise MalformedBody(f"the body is not {encoding} data") from None
        # "deflate" means zlib's format (RFC 9110, 8.4.1.2), but some send the bare stream.
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            plain = stream.decompress(data, max_bytes + 1)
        except zlib.error:
            raise MalformedBody("the body is not deflate data") from None
    if len(plain) > max_bytes:
        raise BodyTooLarge(f"the body is larger than {max_bytes} bytes when decompressed", limit=max_bytes)
    if not stream.eof or stream.unused_data:
        raise MalformedBody(f"the {encoding} data is {'cut off' if not stream.eof else 'followed by more'}")
    return plain


def _spec(view: VersionView, name: str) -> TensorSpec:
    assert view.signature is not None  # the version is ready
    spec = view.signature.inputs_by_name.get(name)
    if spec is None:
        raise unknown_input(view.signature, name)
    return spec
