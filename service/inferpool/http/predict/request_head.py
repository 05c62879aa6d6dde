"""The head of a predict request: what its path and headers say, read once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final

from inferpool.errors import InvalidInput, MalformedBody
from inferpool.observe.traceparent import Trace, read_traceparent

_HEX: Final = [f"{byte:02x}" for byte in range(256)]
# What may come back in a header and stand in a log line: visible ASCII, of a sane length.
_SAFE_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


class _Ids:
    """Random digits, the same for one server, before a number that counts on; for the event loop alone.

    All but the last two digits are the same for 256 ids, and put together once for them all.
    """

    __slots__ = ("_next", "_prefix", "_stem")

    def __init__(self) -> None:
        self._prefix = os.urandom(4).hex()
        self._next = 0
        self._stem = ""

    def new(self) -> str:
        serial = self._next
        self._next = serial + 1
        last = serial & 255
        if last == 0:
            self._stem = f"{self._prefix}{serial >> 8:06x}"
        return self._stem + _HEX[last]


_ids: Final = _Ids()


def new_request_id() -> str:
    """An id that no other request of this server has, nor is likely to have of any other."""
    return _ids.new()


def given_request_id(value: bytes | None) -> str | None:
    """The caller's `X-Request-Id` where there is one that is fit to be sent back."""
    if value is not None:
        text = value.decode("latin-1")
        if _SAFE_ID.fullmatch(text):
            return text
    return None


def request_id_from(value: bytes | None) -> str:
    """The caller's `X-Request-Id` where it is fit to be sent back, else a new one."""
    return given_request_id(value) or new_request_id()


class RequestHead:
    """What a predict request says before its body.

    Attributes:
        model: the model's name from the path, or None where the body is to name it.
        version: number or label from the path, or None.
        given_id: the caller's id for the request, or None.
        content_type: the media type, lower-case, without parameters; "" if none was given.
        content_type_parameters: what followed it.
        content_encoding: lower-case; "" if none was given.
        content_length: bytes of the body, or None where it is not known in advance.
        accept: the Accept header as it came; "" if none was given.
        accept_encoding: the Accept-Encoding header as it came; "" if none was given.
        header_length: bytes of JSON before binary tensors, from `Inference-Header-Content-Length`; None if
            it was not given, -1 if it is no number.
        trace: what a valid `traceparent` says, else None.
    """

    __slots__ = (
        "accept",
        "accept_encoding",
        "content_encoding",
        "content_length",
        "content_type",
        "content_type_parameters",
        "given_id",
        "header_length",
        "model",
        "timeout_text",
        "trace",
        "version",
    )

    def __init__(
        self, model: str | None, version: str | None, headers: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """Keep what the path names, and read `headers`, whose names are lower-case."""
        self.model = model
        self.version = version
        self.content_type = self.content_type_parameters = self.content_encoding = ""
        self.accept = self.accept_encoding = ""
        self.content_length: int | None = None
        self.header_length: int | None = None
        self.timeout_text: bytes | None = None
        self.trace: Trace | None = None
        self.given_id: str | None = None
        for name, value in headers:
            if name == b"content-type":
                kind, _, parameters = value.decode("latin-1").partition(";")
                self.content_type = kind.strip().lower()
                self.content_type_parameters = parameters.strip()
            elif name == b"content-length":
                self.content_length = int(value)
            elif name == b"accept":
                self.accept = value.decode("latin-1")
            elif name == b"accept-encoding":
                self.accept_encoding = value.decode("latin-1")
            elif name == b"inference-header-content-length":
                self.header_length = int(value) if value.isdigit() and len(value) < 19 else -1
            elif name == b"content-encoding":
                self.content_encoding = value.decode("latin-1").strip().lower()
            elif name == b"x-request-id":
                self.given_id = given_request_id(value)
            elif name == b"x-timeout-ms":
                self.timeout_text = value
            elif name == b"traceparent":
                self.trace = read_traceparent(value)

    def with_length(self, content_length: int) -> RequestHead:
        """The same, of a request that is neither named nor traced, for a body of `content_length` bytes."""
        head = RequestHead(self.model, self.version, ())
        head.content_type = self.content_type
        head.content_type_parameters = self.content_type_parameters
        head.content_encoding = self.content_encoding
        head.content_length = content_length
        head.accept = self.accept
        head.accept_encoding = self.accept_encoding
        head.header_length = self.header_length
        head.timeout_text = self.timeout_text
        return head

    def timeout_ms(self) -> float | None:
        """The number in `X-Timeout-Ms`; raises InvalidInput if it is none that is above 0."""
        if self.timeout_text is None:
            return None
        try:
            # Python would take 1_000 for a number.
            timeout = float(self.timeout_text.replace(b"_", b"?"))
        except ValueError:
            timeout = 0.0
        if not 0 < timeout < float("inf"):
            shown = self.timeout_text[:40].decode("latin-1")
            raise InvalidInput(
                f'X-Timeout-Ms is "{shown}"; expected milliseconds above 0', field="X-Timeout-Ms"
            )
        return timeout

    def json_length(self) -> int | None:
        """Bytes of JSON at the body's start, None for all of it; raises MalformedBody if it is no number."""
        if self.header_length == -1:
            raise MalformedBody("Inference-Header-Content-Length is no number of bytes")
        return self.header_length
