"""The seam between the web side and the pool: plain values cross it through two ports.

Classes whose objects are made for every request write out their `__init__`. The `__init__` of a dataclass or
a named tuple stays interpreted in compiled modules, and takes most of a microsecond.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple, Protocol

from inferpool.errors import InferpoolError
from inferpool.tensors import Tensors

DEFAULT_PRIORITY: Final = 5
"""The priority of a request that names none. 1 is the highest; entries with larger numbers wait longer."""
LOWEST_PRIORITY: Final = 2**31 - 1
"""The priority of what nobody waits for, or not for long: copies for a shadow, and passes of explanations."""


class VersionKey(NamedTuple):
    """Names one version of one model."""

    model: str
    version: int


class Entry:
    """A request in a queue, with its deadline.

    Attributes:
        id: at least 1, unique in the life of the server; the entry's result carries it.
        key: the version that is to run the entry.
        inputs: validated tensors; rows are along the first dimension if the version is batched.
        rows: how many rows the entry has; 1 if the version is not batched.
        group: entries share a batch only if their groups are equal, because their row shapes are then equal.
        nbytes: size of the inputs in bytes, for the bound on memory.
        arrived: moment of the offer, in seconds of the pool's clock.
        deadline: moment after which an answer is useless, or infinity.
        priority: 1 is the highest.
        outputs: names of the outputs wanted, or None for all.
        row_load: cost of one row, in rows like those that were measured at load.
        request_id: the id of the request in log lines.
        parts: the entries that run in place of this one, if its rows have different lengths; `inputs` is then
            empty. `inferpool.pool.splitting.split_entry` makes such an entry.
        part_of: id of the entry that this one is a part of; 0 if it is none.
        mark: shared memory that tells the web process which entries ran when the engine ended; None if the
            pool runs in the web process. An instance writes 1 at `mark_at` before it runs the entry.
        mark_at: index of the entry's byte in `mark`.
        tenant: a number for whoever sent the request; 0 without tenants.
        rank: the priority that the entry has before those of other tenants.
        share: the tenant's share of the instances, relative to the shares of other tenants.
    """

    __slots__ = (
        "arrived", "deadline", "group", "id", "inputs", "key", "mark", "mark_at", "nbytes", "outputs",
        "part_of", "parts", "priority", "rank", "request_id", "row_load", "rows", "share", "tenant",
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
        self.priority = self.rank = priority
        self.outputs = outputs
        self.row_load = row_load
        self.request_id = request_id
        self.parts = parts
        self.part_of = 0
        self.mark: memoryview | None = None
        self.mark_at = 0
        self.tenant = 0
        self.share = 1.0

    @property
    def load(self) -> float:
        """Cost of all rows, in rows like those that were measured at load."""
        return self.rows * self.row_load


class Part(NamedTuple):
    """Some rows of an entry, as an entry of their own; `row_indices` tells which rows they are."""

    entry: Entry
    row_indices: Sequence[int]


class Result:
    """How an entry ended: with `outputs` or with an `error`. Every entry gets exactly one result.

    Attributes:
        entry_id: the entry's id.
        outputs: the tensors asked for, or None.
        error: why there are no outputs, or None.
        queue_s: seconds from the offer until an instance took the entry's first rows.
        compute_s: seconds that the entry's batches ran.
        batch_rows: rows of the entry's last batch, with those of other entries; 0 if the entry never ran.
        runs_on: whether a run still reads the entry's inputs, although the entry has its result. The outbox's
            `ended` follows when that run is over.
    """

    __slots__ = ("batch_rows", "compute_s", "entry_id", "error", "outputs", "queue_s", "runs_on")

    def __init__(
        self,
        entry_id: int,
        outputs: Tensors | None,
        error: InferpoolError | None,
        queue_s: float,
        compute_s: float = 0.0,
        batch_rows: int = 0,
        runs_on: bool = False,
    ) -> None:
        self.entry_id = entry_id
        self.outputs = outputs
        self.error = error
        self.queue_s = queue_s
        self.compute_s = compute_s
        self.batch_rows = batch_rows
        self.runs_on = runs_on


class Inbox(Protocol):
    """Takes entries from the web side. All calls return at once and may come from any thread."""

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady or Draining."""

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        """Raise the error with which `key` would refuse any entry of `tenant` now, whatever its inputs."""

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Answer the entry at once, whether it waits or runs; `reason` is `disconnected` or `deadline`.

        Does nothing if the entry has its result. A run for which nobody waits any more is stopped.
        """


class Outbox(Protocol):
    """Takes results from the pool: once per batch, from an instance's thread, without blocking."""

    def put(self, results: Sequence[Result]) -> None:
        """Hand over the results of a batch, or of entries that were dropped together."""

    def ended(self, entry_ids: Sequence[int]) -> None:
        """Take note that no run reads the inputs of these entries any more; their results said `runs_on`."""
