"""The response to one predict request, before it is put into HTTP's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from inferpool.http.predict.api import Data
from inferpool.http.predict.compression import gzipped
from inferpool.http.problems import Headers

_LONGEST_S: Final = 3600.0
"""Server-Timing shows longer times as this one."""
_WHOLE: Final = [b"%d" % number for number in range(1000)]
_THOUSANDTHS: Final = [b".%03d" % number for number in range(1000)]


class Response:
    """A response; `headers` name the body's type, but not its length.

    Attributes:
        status: the HTTP status.
        headers: names are lower-case.
        parts: the body, to be sent one after the other; large outputs are views of their tensors.
        size: bytes of the body.
        compressible: whether the client accepts gzip and the body is large enough for it.
    """

    __slots__ = ("compressible", "headers", "parts", "size", "status")

    def __init__(
        self, status: int, headers: Headers, parts: Sequence[Data], size: int, compressible: bool = False
    ) -> None:
        self.status = status
        self.headers = headers
        self.parts = parts
        self.size = size
        self.compressible = compressible


def compressed(response: Response) -> Response:
    """Return `response` as gzip, or unchanged if gzip hardly makes it smaller; may run in any thread."""
    packed = gzipped(response.parts)
    if packed is None:
        return response
    headers = [*response.headers, (b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
    return Response(response.status, headers, [packed], len(packed))


def server_timing(queue_s: float, compute_s: float, total_s: float) -> bytes:
    """Return the value of Server-Timing (W3C Server Timing), in milliseconds with three decimals."""
    if 0.0 <= queue_s < 0.999 and 0.0 <= compute_s < 0.999 and 0.0 <= total_s < 0.999:
        # Formatting three floats takes three times as long as all of this.
        queue, compute, total = round_us(queue_s), round_us(compute_s), round_us(total_s)
        return b"".join(
            (
                b"queue;dur=", _WHOLE[queue // 1000], _THOUSANDTHS[queue % 1000],
                b", compute;dur=", _WHOLE[compute // 1000], _THOUSANDTHS[compute % 1000],
                b", total;dur=", _WHOLE[total // 1000], _THOUSANDTHS[total % 1000],
            )
        )  # fmt: skip
    return b"queue;dur=%.3f, compute;dur=%.3f, total;dur=%.3f" % (
        1000 * min(max(queue_s, 0.0), _LONGEST_S),
        1000 * min(max(compute_s, 0.0), _LONGEST_S),
        1000 * min(max(total_s, 0.0), _LONGEST_S),
    )


def round_us(seconds: float) -> int:
    """Return a time that is not negative in whole microseconds."""
    return int(1e6 * seconds + 0.5)
