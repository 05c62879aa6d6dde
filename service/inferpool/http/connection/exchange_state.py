"""The states of an exchange, and which of them may follow each other.

The states are integers, because mypyc compiles comparisons of enum members to calls. An exchange has its turn
from READING on.
"""

from __future__ import annotations

from typing import Final

WAITING: Final = 0
"""Earlier requests are answered first; the body is being received."""
READY: Final = 1
"""Earlier requests are answered first; the body is complete, or an error is to be the response."""
READING: Final = 2
"""It is this request's turn; the body is being received."""
DECODING: Final = 3
"""The body is decoded, maybe in a thread, or its tensors wait for the end of the loop's iteration."""
QUEUED: Final = 4
"""The entry waits in the queue, or runs."""
ENCODING: Final = 5
"""The response is made, maybe compressed in a thread."""
WRITING: Final = 6
"""The response is with the transport, or waits there for its client to read."""
DONE: Final = 7
"""The response is complete, or the client is gone."""

STATES: Final = ("WAITING", "READY", "READING", "DECODING", "QUEUED", "ENCODING", "WRITING", "DONE")

FOLLOWERS: Final[tuple[tuple[int, ...], ...]] = (
    (READY, READING, DONE),  # from WAITING
    (READING, DONE),  # from READY
    (DECODING, WRITING, DONE),  # from READING
    (QUEUED, WRITING, DONE),  # from DECODING
    (ENCODING, DONE),  # from QUEUED
    (WRITING, DONE),  # from ENCODING
    (DONE,),  # from WRITING
    (),  # from DONE
)
"""The states that may follow each state."""

FOLLOWER_BITS: Final = [sum(1 << state for state in followers) for followers in FOLLOWERS]
"""The same for each state as a set of bits: bit n is set if state n may follow."""
