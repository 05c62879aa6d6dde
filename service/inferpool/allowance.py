"""What decoding one body may use: memory, which decoders ask for first, and pictures of other hosts."""

from __future__ import annotations

from typing import Final

from inferpool.errors import InvalidInput
from inferpool.tensors import Signature


class Allowance:
    """Grants memory to the decoders of one body. This class grants everything, as is right for a small body.

    Attributes:
        most_bytes: the bytes that a body may have once it is decompressed.
        signature: the signature of the version that the request means; None if the body has to name it.
    """

    __slots__ = ("most_bytes", "signature")

    def __init__(self, most_bytes: int, signature: Signature | None = None) -> None:
        """Keep both values."""
        self.most_bytes = most_bytes
        self.signature = signature

    def take(self, size: int, what: str) -> None:
        """Reserve `size` bytes for `what`, the beginning of a sentence in an error; may wait for others.

        Raises BodyTooLarge if the server never has as much memory for one request, and Overloaded if other
        requests hold it.
        """

    def give_back(self, size: int) -> None:
        """Return `size` of the bytes that `take` reserved: they are free again."""

    def fetch_picture(self, url: str) -> bytes:
        """Return the file at `url`; its bytes are taken, and the caller gives them back.

        Raises InvalidInput with the reason if it cannot be fetched, and what `take` raises.
        """
        raise InvalidInput("URLs of pictures are not fetched; send the picture itself")


UNLIMITED: Final = Allowance(2**63 - 1)
"""For bodies that come from no client."""
