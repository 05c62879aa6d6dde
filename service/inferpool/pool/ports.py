"""What crosses the seam between the web side and the pool: plain values through two ports.

What is made anew for each request has its `__init__` written out, here and along its way: that of a dataclass
or of a named tuple runs interpreted where all about it is compiled, and takes most of a microsecond.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple, Protocol

from inferpool.errors import InferpoolError
from inferpool.tensors import Tensors

DEFAULT_PRIORITY: Final = 5
"""The priority of a request that names none; 1 is the highest, larger numbers wait longer."""


class VersionKey(NamedTuple):
    """Which version of which model."""

    model: str
    version: int


class Entry:
    """A request in a queue.

    Attributes:
        id: unique in the life of the server; its result carries it.
        key: the version that is to run it.
        inputs: validated tensors; rows are along the first dimension where the version is batched.
        rows: how many rows it has; 1 where the version is not batched.
        group: entries share a batch only if their groups are equal (their row shapes are).
        nbytes: size of the inputs, for the bound on memory.
        arrived: moment of the offer, in seconds of the pool's clock.
        deadline: moment after which the answer is of no use, or infinity.
        priority: 1 is the highest.
        outputs: names of the outputs wanted, or None for all.
        row_load: what one of its rows costs, in rows like those that were measured at load.
        request_id: what log lines call the request that it is of.
        parts: where its rows cannot all run as they stand together, the entries that do; `inputs` is empty.
    """

    __slots__ = (
        "arrived", "deadline", "group", "id", "inputs", "key", "nbytes", "outputs", "parts", "priority",
        "request_id", "row_load", "rows",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        key: VersionKey,
        inputs: Tensors,
        rows: int,
        group: Hashable,
        nbytes: int,
        arrived: float,
        deadline: float = math.inf,
        priority: int = DEFAULT_PRIORITY,
        outputs: tuple[str, ...] | None = None,
        row_load: float = 1.0,
        request_id: str = "",
        parts: tuple[Part, ...] = (),
    ) -> None:
        self.id = id
        self.key = key
        self.inputs = inputs
        self.rows = rows
        self.group = group
        self.nbytes = nbytes
        self.arrived = arrived
        self.deadline = deadline
        self.priority = priority
        self.outputs = outputs
        self.row_load = row_load
        self.request_id = request_id
        self.parts = parts

    @property
    def load(self) -> float:
        """What it costs, in rows like those that were measured at load."""
        return self.rows * self.row_load


class Part(NamedTuple):
    """Some rows of an entry, as an entry of their own; `places` are their numbers among its rows."""

    entry: Entry
    places: Sequence[int]


class Result:
    """How an entry ended: with `outputs`, or with an `error`; there is exactly one an entry.

    Attributes:
        entry_id: the entry's id.
        outputs: the tensors asked for, or None.
        error: why there are none, or None.
        queue_s: seconds from the offer until an instance took the entry (its first rows).
        compute_s: seconds that the batches it was in ran.
        batch_rows: rows of the (last) batch it ran in, other entries' included; 0 if it never ran.
    """

    __slots__ = ("batch_rows", "compute_s", "entry_id", "error", "outputs", "queue_s")

    def __init__(
        self,
        entry_id: int,
        outputs: Tensors | None,
        error: InferpoolError | None,
        queue_s: float,
        compute_s: float = 0.0,
        batch_rows: int = 0,
    ) -> None:
        self.entry_id = entry_id
        self.outputs = outputs
        self.error = error
        self.queue_s = queue_s
        self.compute_s = compute_s
        self.batch_rows = batch_rows


class Inbox(Protocol):
    """Where the web side puts entries. Both calls return at once and may come from any thread."""

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady or Draining."""

    def refuse_early(self, key: VersionKey) -> None:
        """Raise what any entry for `key` would be refused with now, whatever is in it."""

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry if it still waits; `reason` is `disconnected` or `deadline`."""


class Outbox(Protocol):
    """Where the pool puts results: once a batch, from an instance's thread, never blocking."""

    def put(self, results: Sequence[Result]) -> None:
        """Hand over the results of a batch, or of entries dropped together."""
