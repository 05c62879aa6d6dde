"""What is kept of predictions beside their answers: samples for evaluation, and counts of their values.

One thread of the process writes samples and counts values, in a small share of a core. The event loop hands
it copies of rows (`version_observer.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from inferpool.drift.counts import WINDOW, ClosedWindow
from inferpool.errors import ConfigError
from inferpool.http.predict.version_observer import Observation, Taker, VersionObserver
from inferpool.observe.families import DRIFT
from inferpool.observe.metrics import Metrics
from inferpool.observe.metrics import Sample as Reading
from inferpool.observe.paced_worker import PacedWorker
from inferpool.pool.ports import VersionKey
from inferpool.privacy.keys import SampleKeys
from inferpool.privacy.sample import LABEL, Sample, Totals, best_labels, redacted
from inferpool.repository.catalog import ModelView, VersionView
from inferpool.system.cpu_pace import let_others_run
from inferpool.tensors import Array, bf16_to_fp32

if TYPE_CHECKING:
    # The module imports sqlite3, and few servers keep samples.
    from inferpool.privacy.store import SampleStore, SealedSample

log = logging.getLogger(__name__)

RETRY_S: Final = 60.0
"""How long no samples are kept after the disk has failed."""
PIECE_S: Final = 100e-6
"""How long the thread works before it lets the event loop run."""
TICK_S: Final = 1.0
EXPIRE_S: Final = 600.0
MOST_HELD_BYTES: Final = 16 * 1024 * 1024
"""Bytes that observations hold, from the first copy until they are written; then no more are begun."""
CLOSE_S: Final = 2.0
"""How long the process may take at its end to write the samples that wait."""


class Observations:
    """The observers of one process, their thread, and the store of samples.

    Attributes:
        store: where samples are kept; None if the settings name no place.
        keys: the keys of samples; None without a store.
        worker: the thread.
        dropped: counts samples that were chosen, and not kept because there was no room.
        taker: takes every request; None but in a program that makes a profile.
        held_bytes: bytes of what is copied of requests now.
    """

    def __init__(
        self,
        metrics: Metrics,
        store: SampleStore | None = None,
        keys: SampleKeys | None = None,
        taker: Taker | None = None,
    ) -> None:
        """Keep samples in `store`, encrypted by `keys`, and count in `metrics`."""
        self.store = store
        self.keys = keys
        self._choice_key = b"" if store is None or keys is None else keys.choice_key
        self.taker = taker
        self._metrics = metrics
        self._observers: dict[VersionKey, tuple[VersionView, VersionObserver | None]] = {}
        self.dropped = metrics.value("samples_total", "dropped")
        self._written = metrics.value("samples_total", "written")
        self._left_out = metrics.value("samples_total", "left_out")
        self._failed = metrics.value("samples_total", "failed")
        self._deleted = metrics.value("samples_total", "deleted")
        self._totals = Totals(0, 0)
        self._stopped_until = 0.0
        self._next_expiry = 0.0
        self._warned: set[str] = set()
        self._holding = threading.Lock()
        self.held_bytes = 0
        self._making = threading.Lock()
        self._worker: PacedWorker[Observation] | None = None
        if store is not None:
            metrics.add_source(self._readings)
            # Samples grow too old although no version keeps any now.
            self.worker  # noqa: B018 - the thread begins here

    @property
    def worker(self) -> PacedWorker[Observation]:
        """The thread, which begins with the store, or else with the first version that needs it."""
        if self._worker is None:
            self._worker = PacedWorker("observations", self._handle, self._tick, TICK_S)
        return self._worker

    def of(self, view: VersionView) -> VersionObserver | None:
        """The observer of a version; None if it has nothing to do. May be called in any thread."""
        with self._making:
            return self._find(view)

    def _find(self, view: VersionView) -> VersionObserver | None:
        known = self._observers.get(view.key)
        if known is not None and _is_alike(known[0], view):
            return known[1]  # else what the window has counted by now would be lost
        observer: VersionObserver | None = None
        if view.sampling and self.store is None and view.key.model not in self._warned:
            self._warned.add(view.key.model)
            log.warning(
                "%s: no samples are kept, because the settings samples_dir and samples_keys_file are not set",
                view.key.model,
            )
        if view.drift or self.taker is not None or (view.sampling and self.store is not None):
            try:
                observer = VersionObserver(self, view, self._choice_key)
            except (ConfigError, ValueError) as error:
                log.error("%s is not observed: %s", view.key.model, error)
            if observer is not None and not observer.is_needed:
                observer = None
        if observer is not None:
            self.worker  # noqa: B018 - the thread begins here, and not with a request
        self._observers[view.key] = (view, observer)
        return observer

    def keep_only(self, models: Mapping[str, ModelView]) -> None:
        """Forget the observers of versions that are gone."""
        for key in list(self._observers):
            model = models.get(key.model)
            if model is None or key.version not in model.versions:
                self._observers.pop(key, None)

    def may_write(self) -> bool:
        """Whether a sample may be kept now: the disk takes it, and few wait."""
        return not self._stopped_until and self.has_room()

    def has_room(self) -> bool:
        """Whether another request may be observed: few wait, and what is copied is bounded."""
        return self.held_bytes < MOST_HELD_BYTES and self.worker.has_room()

    def hold(self, nbytes: int) -> None:
        """Count bytes that observations hold, in any thread."""
        with self._holding:
            self.held_bytes += nbytes

    def take(self, observation: Observation) -> None:
        """Take an observed request that has been answered."""
        if self.taker is not None:
            self.taker(observation)
            return
        if not self.worker.offer(observation) and observation.is_sample:
            self.dropped.add()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        if self._worker is not None and not self._worker.close(CLOSE_S):
            log.warning("samples that waited to be written are lost")
        elif self.store is not None:
            self.store.close()

    def _handle(self, observed: Sequence[Observation]) -> None:
        samples: list[SealedSample] = []
        began = time.perf_counter()
        for each in observed:
            observer = each.observer
            if each.is_counted and observer.counts is not None:
                closed = observer.counts.add(each.ended, each.values())
                if closed is not None:
                    self._publish(observer, closed)
            if each.is_sample and self.store is not None and self.keys is not None:
                sample = sample_of(each, self.keys)
                if sample is None:
                    self._left_out.add()
                else:
                    samples.append(self.store.seal(sample))
            # A request that comes meanwhile waits for the GIL until this piece is done, not for all. A pause
            # takes as much time as a small sample, so there is none after each.
            if time.perf_counter() - began > PIECE_S:
                let_others_run()
                began = time.perf_counter()
        if samples:
            self._write(samples)

    def _write(self, samples: Sequence[SealedSample]) -> None:
        assert self.store is not None
        if self._stopped_until:
            self._failed.add(len(samples))
            return
        try:
            self._totals, deleted = self.store.add(samples)
            self._deleted.add(deleted)
            self._written.add(len(samples) - deleted)
        except self.store.failures as error:
            self._failed.add(len(samples))
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._stopped_until = time.monotonic() + RETRY_S
        log.error("no samples are kept for %g s, because the store has failed: %s", RETRY_S, error)

    def _tick(self) -> None:
        for _, observer in list(self._observers.values()):
            if observer is not None and observer.counts is not None:
                closed = observer.counts.close_at(time.time())
                if closed is not None:
                    self._publish(observer, closed)
        now = time.monotonic()
        if self._stopped_until and now >= self._stopped_until:
            self._stopped_until = 0.0
        if self.store is not None and not self._stopped_until and now >= self._next_expiry:
            self._next_expiry = now + EXPIRE_S
            self._try_store(self.store, self.store.expire)
        elif self.store is not None and not self._stopped_until:
            # Another process may have written or deleted some.
            self._try_store(self.store, self.store.totals)

    def _try_store(self, store: SampleStore, work: Callable[[], Totals]) -> None:
        try:
            self._totals = work()
        except store.failures as error:
            self._stop(error)

    def _publish(self, observer: VersionObserver, closed: ClosedWindow) -> None:
        """Write the noisy counts of a window where all processes see them; odd and even ones take turns."""
        assert observer.profile is not None
        for field in observer.profile.fields:
            counts = closed.counts[field.name]
            cells = self._metrics.cells(DRIFT, observer.key.model, str(observer.key.version), field.name)
            start = closed.number % 2 * WINDOW
            # Others read none of the counts until the number is right.
            cells[start] = 0.0
            cells[start + 1] = field.tag()
            for at, count in enumerate(counts):
                cells[start + 2 + at] = max(0.0, count)  # noise can lead below zero
            cells[start] = float(closed.number)

    def _readings(self) -> Sequence[Reading]:
        return [
            ("samples_held", (), float(self._totals.held)),
            ("samples_bytes", (), float(self._totals.nbytes)),
            ("samples_stopped", (), float(self._stopped_until > 0)),
        ]


def _is_alike(one: VersionView, other: VersionView) -> bool:
    """Whether two views of a version have one load, so that only labels or states differ."""
    return one is other or (
        one.digest == other.digest
        and one.load_s == other.load_s
        and one.signature == other.signature
        and one.sampling == other.sampling
        and one.drift == other.drift
    )


def sample_of(observation: Observation, keys: SampleKeys) -> Sample | None:
    """The sample of an observed request, after the rules; None if it is too large, or has no rows."""
    observer, outputs = observation.observer, observation.outputs
    inputs: dict[str, Array] = {} if observer.text else dict(observation.inputs[0])
    if observer.text and observation.texts is not None:
        inputs[observer.text] = observation.texts
    rows = observer.most_rows
    values = (*inputs.values(), *outputs.values())
    for array in values:
        rows = min(rows, len(array))
    bf16 = observer.facts.bf16
    sides = []
    for side in (inputs, outputs):
        plain = {
            name: bf16_to_fp32(array[:rows]) if name in bf16 else array[:rows] for name, array in side.items()
        }
        sides.append(redacted(plain, observer.rules, keys))
    if observer.names is not None and observer.names[0] in sides[1]:
        name, names = observer.names
        scores = outputs[name][:rows]
        scores = bf16_to_fp32(scores) if name in bf16 else scores
        if observer.rules[name].whole == "keep" and not observer.rules[name].columns and scores.ndim == 2:
            sides[1][name + LABEL] = best_labels(scores.astype(np.float64), names)
    kept = [array for side in sides for array in side.values()]
    size = sum(
        sum(64 + len(str(text)) for text in array.flat) if array.dtype.kind == "O" else array.nbytes
        for array in kept
    )
    if not kept or not rows or size > observer.most_bytes:
        return None
    key = observer.key
    return Sample(
        observation.request_id, observation.tenant, key.model, key.version, observation.ended, rows, *sides
    )
