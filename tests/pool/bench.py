"""A pool over a fake model, which a test lets run batch by batch."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from inferpool.backends.base import LoadedModel
from inferpool.observe.metrics import Metrics
from inferpool.pool.admission import Limits
from inferpool.pool.audit import Audit
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.latency_model import LatencyModel, Measurement
from inferpool.pool.padding import Padding
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Entry, Part, Result, VersionKey
from inferpool.pool.run_watcher import RunWatcher
from inferpool.pool.splitting import split_entry
from inferpool.tensors import Signature, Tensors, TensorSpec

from tests.chaos import inferpool_chaos as chaos

KEY = VersionKey("m", 1)


class Outbox:
    """Keeps results, and lets a test wait for them."""

    def __init__(self) -> None:
        self.results: queue.Queue[Result] = queue.Queue()
        self.unread: queue.Queue[int] = queue.Queue()
        self.puts = 0

    def put(self, results: Sequence[Result]) -> None:
        assert results
        self.puts += 1
        for result in results:
            self.results.put(result)

    def ended(self, entry_ids: Sequence[int]) -> None:
        assert entry_ids
        for entry_id in entry_ids:
            self.unread.put(entry_id)

    def take(self, count: int) -> dict[int, Result]:
        """The next `count` results by entry; no entry has two."""
        found: dict[int, Result] = {}
        for _ in range(count):
            result = self.results.get(timeout=60)
            assert result.entry_id not in found
            found[result.entry_id] = result
        return found


class Clock:
    """The system's clock, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class HeldModel(LoadedModel):
    """The chaos model, which waits for `release` before each run and keeps the rows of each batch."""

    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("sum", "FP64", (-1,)),))

    def __init__(self) -> None:
        self.model = chaos.ChaosModel({})
        self.release = threading.Semaphore(0)
        self.running = threading.Semaphore(0)
        self.batches: list[int] = []
        self.deadly = False
        self.deaths = 0
        self.lost_reason: str | None = None
        self.stoppable = False
        self.endless = math.nan
        self.run_s = 0.0
        self.stops: list[int] = []
        self._stopped: set[int] = set()

    def lost(self) -> str | None:
        return self.lost_reason

    def stop_run(self, thread: int) -> None:
        self.stops.append(thread)
        if self.stoppable:
            self._stopped.add(thread)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        self.batches.append(len(inputs["x"]))
        self.running.release()
        self._stopped.discard(threading.get_ident())
        time.sleep(self.run_s)
        deadline = time.monotonic() + 60
        while self.endless in inputs["x"][:, 0] or not self.release.acquire(timeout=0.01):
            assert time.monotonic() < deadline
            if threading.get_ident() in self._stopped:
                raise RuntimeError("the run was stopped")
        if self.deadly:
            self.deaths += 1
            raise SystemExit
        if self.lost_reason is not None:
            raise RuntimeError(self.lost_reason)
        return self.model.run(inputs)

    def close(self) -> None:
        pass


class Bench:
    """A pool of one instance over a held model."""

    def __init__(
        self,
        instances: int = 1,
        max_joined_bytes: float = math.inf,
        buckets: BatchBuckets | None = None,
        padding: Padding | None = None,
        audit: Audit | None = None,
        forget_plan: Callable[[], None] | None = None,
        run_timeout_s: float = 0.0,
        on_hung: Callable[[VersionKey, str], None] | None = None,
        **limits: Any,
    ) -> None:
        self.outbox = Outbox()
        self.clock = Clock()
        self.model = HeldModel()
        self.metrics = Metrics({})
        self._ids = itertools.count(1)
        fields: dict[str, Any] = {"batch_rows": 8, "queue_rows": 100, "queue_bytes": 10**6} | limits
        self.pool = Pool(
            KEY,
            Limits(**fields),
            LatencyModel([Measurement(1, 0.01, 100), Measurement(8, 0.02, 100)]),
            self.outbox,
            self.metrics,
            self.clock,
            batched=True,
            padding=padding,
            max_joined_bytes=max_joined_bytes,
            buckets=buckets,
            audit=audit,
            forget_plan=forget_plan,
            watcher=RunWatcher(self.clock, run_timeout_s, on_hung),
        )
        for _ in range(instances):
            self.pool.start_instance(self.model, "cpu")

    def stops(self, reason: str) -> float:
        """How often batching was turned off for this reason."""
        return self.metrics.value("batching_stopped_total", *map(str, KEY), reason).value

    def audits(self) -> float:
        """How many audits have run."""
        return self.metrics.value("audits_total", *map(str, KEY)).value

    def entry(self, *marks: float, **rest: Any) -> Entry:
        """An entry with a row for each mark, which is the row's first element."""
        rows = np.zeros((len(marks), 4), np.float32)
        rows[:, 0] = marks
        fields: dict[str, Any] = {"group": None, "nbytes": rows.nbytes, "arrived": self.clock()} | rest
        return Entry(next(self._ids), KEY, {"x": rows}, len(rows), **fields)

    def offer(self, *marks: float, **rest: Any) -> Entry:
        """Offer an entry with a row for each mark."""
        entry = self.entry(*marks, **rest)
        self.pool.offer(entry)
        return entry

    def offer_parts(self, *marks: Sequence[float], **rest: Any) -> Entry:
        """Offer an entry of parts, each with a row for each of its marks."""
        parts, start = [], 0
        for part in marks:
            parts.append(Part(self.entry(*part, **rest), range(start, start + len(part))))
            start += len(part)
        entry = split_entry(next(self._ids), parts)
        self.pool.offer(entry)
        return entry

    def dropped(self, reason: str) -> float:
        """How many entries were counted as dropped for `reason`."""
        return self.metrics.value("dropped_entries_total", "m", "1", reason).value

    def ran(self) -> int:
        """How many batches have run."""
        return sum(count.runs for count in self.pool.batches())

    def busy_seconds(self) -> float:
        """How long instances have run batches, by the metrics."""
        self.pool.instances()
        return self.metrics.value("instance_busy_seconds_total", "m", "1", "cpu").value

    def busy(self) -> Entry:
        """Keep the instance busy with one row, so that what is offered next waits together."""
        entry = self.offer(7)
        assert self.model.running.acquire(timeout=60)
        return entry

    def go(self, runs: int = 10_000) -> None:
        """Let so many runs pass; by default every run from here on."""
        self.model.release.release(runs)


def check(entry: Entry, result: Result) -> None:
    assert result.error is None
    assert result.outputs is not None
    assert result.outputs["sum"].tolist() == chaos.expected(entry.inputs["x"]).tolist()
