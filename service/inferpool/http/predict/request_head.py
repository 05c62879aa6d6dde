"""The head of a predict request: what its path and headers say, read once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from inferpool.errors import InvalidInput, MalformedBody
from inferpool.http.accept_headers import accepts_gzip
from inferpool.http.predict.request_id import given_request_id
from inferpool.observe.traceparent import Trace, read_traceparent

_SHOWN_BYTES: Final = 200
NO_NAMES: Final[frozenset[bytes]] = frozenset()


class RequestHead:
    """The part of a predict request before its body.

    Attributes:
        model: the model's name from the path, or None if the body has to name the model.
        version: number or label from the path, or None.
        given_id: the client's id for the request, or None.
        content_type: the media type, lower-case, without parameters; "" if none was given.
        content_type_parameters: the parameters of the media type.
        content_encoding: lower-case, several headers as one list; "" if none was given.
        content_length: bytes of the body, or None if the client does not say.
        accept: the Accept header, unchanged; "" if none was given.
        accept_encoding: the Accept-Encoding header, unchanged; "" if none was given.
        header_length: bytes of JSON before binary tensors, from `Inference-Header-Content-Length`; None if
            that header was not given, -1 if it is no number.
        timeout_text: the X-Timeout-Ms header, unchanged, or None.
        trace: the trace of a valid `traceparent`, else None.
        method: the HTTP method.
        path: the path, still percent-encoded and without its query, at most 200 bytes of it; for the log.
        forwarded: the values of X-Forwarded-For, unchanged, or None.
        kept: the headers by which a canary's requests are chosen; None without such canaries.
        kept_names: the names of those headers.
        attributes: SageMaker's header for what a client tells the server, unchanged; "" if none was given.
        origin: the Origin header, unchanged, which browsers send for a page of another origin; or None.
    """

    __slots__ = (
        "accept", "accept_encoding", "attributes", "content_encoding", "content_length", "content_type",
        "content_type_parameters", "forwarded", "given_id", "header_length", "kept", "kept_names", "method",
        "model", "origin", "path", "timeout_text", "trace", "version",
    )  # fmt: skip

    def __init__(
        self, model: str | None, version: str | None, headers: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """Take the names from the path, and read `headers`, whose names must be lower-case."""
        self.model = model
        self.version = version
        self.content_type = self.content_type_parameters = self.content_encoding = ""
        self.accept = self.accept_encoding = self.attributes = ""
        self.content_length: int | None = None
        self.header_length: int | None = None
        self.timeout_text: bytes | None = None
        self.trace: Trace | None = None
        self.given_id: str | None = None
        self.origin: bytes | None = None
        self.method = "POST"
        self.path = ""
        self.forwarded: bytes | None = None
        self.kept: dict[bytes, bytes] | None = None
        self.kept_names = NO_NAMES
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
                coding = value.decode("latin-1").strip().lower()
                self.content_encoding = (
                    f"{self.content_encoding}, {coding}" if self.content_encoding else coding
                )
            elif name == b"x-request-id":
                self.given_id = given_request_id(value)
            elif name == b"x-timeout-ms":
                self.timeout_text = value
            elif name == b"traceparent":
                self.trace = read_traceparent(value)
            elif name == b"origin":
                self.origin = value
            elif name == b"x-forwarded-for":
                self.forwarded = value if self.forwarded is None else b"%b,%b" % (self.forwarded, value)
            elif name == b"x-amzn-sagemaker-custom-attributes":
                self.attributes = value.decode("latin-1")

    def with_length(self, content_length: int) -> RequestHead:
        """Return a copy for a body of `content_length` bytes, without the client's id and trace."""
        head = RequestHead(self.model, self.version, ())
        head.content_type = self.content_type
        head.content_type_parameters = self.content_type_parameters
        head.content_encoding = self.content_encoding
        head.content_length = content_length
        head.accept = self.accept
        head.accept_encoding = self.accept_encoding
        head.attributes = self.attributes
        head.header_length = self.header_length
        head.timeout_text = self.timeout_text
        head.origin = self.origin
        head.path = self.path
        head.forwarded = self.forwarded
        head.kept = self.kept
        head.kept_names = self.kept_names
        return head

    def keep(self, names: frozenset[bytes], headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep those of the `headers` that have one of the `names`, in small letters."""
        self.kept = {name: value for name, value in headers if name in names}
        self.kept_names = names

    def came_to(self, method: bytes, target: bytes) -> None:
        """Keep the method and the path of the request, whose request line names `target`."""
        self.method = method[:_SHOWN_BYTES].decode("latin-1")
        self.path = target.partition(b"?")[0][:_SHOWN_BYTES].decode("latin-1")

    def timeout_ms(self) -> float:
        """Return the milliseconds in X-Timeout-Ms, which was given; raises InvalidInput unless above 0."""
        assert self.timeout_text is not None  # the caller has looked
        try:
            # Python would accept 1_000 as a number.
            timeout = float(self.timeout_text.replace(b"_", b"?"))
        except ValueError:
            timeout = 0.0
        if not 0 < timeout < float("inf"):
            shown = self.timeout_text[:40].decode("latin-1")
            raise InvalidInput(
                f'X-Timeout-Ms is "{shown}"; expected a number of milliseconds above 0', field="X-Timeout-Ms"
            )
        return timeout

    def json_length(self) -> int | None:
        """Return the bytes of JSON at the start of the body, None for all of it.

        Raises MalformedBody if Inference-Header-Content-Length is no number.
        """
        if self.header_length == -1:
            raise MalformedBody("Inference-Header-Content-Length is not a number of bytes")
        return self.header_length

    def accepts_gzip(self) -> bool:
        """Return whether Accept-Encoding (RFC 9110, 12.5.3) allows a gzip response."""
        return accepts_gzip(self.accept_encoding)
