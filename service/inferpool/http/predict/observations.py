"""What is kept of predictions beside their answers: samples for evaluation, and counts of their values.

A version that neither keeps samples nor has a profile has no observer, and its requests pay a comparison.
Otherwise the event loop decides by the request's id, and by the time, whether to observe a request, and
copies a few rows of the inputs and outputs. It does so once the response is written, and before the memory is
given back. Code that few requests run is in no cache of the CPU: before the response, the copies may take a
tenth of a small request's time. One thread of the process does everything else, in a small share of a core.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from inferpool.drift.config import DriftConfig
from inferpool.drift.counts import WINDOW, ClosedWindow, WindowCounts
from inferpool.drift.fields import FieldFacts, field_values
from inferpool.drift.profile_file import Profile
from inferpool.errors import ConfigError
from inferpool.http.predict.context import PredictContext
from inferpool.observe.families import DRIFT
from inferpool.observe.metrics import Metrics
from inferpool.observe.metrics import Sample as Reading
from inferpool.observe.paced_worker import PacedWorker
from inferpool.pool.ports import VersionKey
from inferpool.privacy.config import FieldRules, SamplesConfig, kept_fields
from inferpool.privacy.keys import SampleKeys, is_chosen, threshold_of
from inferpool.privacy.noise import CountNoise
from inferpool.privacy.sample import LABEL, Sample, Totals, best_labels, redacted
from inferpool.repository.catalog import ModelView, VersionView
from inferpool.system.cpu_pace import let_others_run
from inferpool.tensors import Array, Tensors, bf16_to_fp32

if TYPE_CHECKING:
    # The module imports sqlite3, and few servers keep samples.
    from inferpool.privacy.store import SampleStore, SealedSample

log = logging.getLogger(__name__)

MOST_COUNTED_ROWS: Final = 64
"""Rows of a request that are counted for drift."""
MOST_COUNTED_BYTES: Final = 1024 * 1024
"""Of a larger tensor fewer rows are counted, because the event loop copies them."""
MOST_STRINGS: Final = 4096
"""A tensor of more strings is not copied, because the event loop looks at the length of each."""
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

Taker = Callable[["Observation"], None]
"""Takes every request of a version, for a program that makes a profile."""


class Observation:
    """What has been copied of one request.

    Attributes:
        observer: the observer of its version.
        is_sample: whether it is to be kept as a sample.
        is_counted: whether its values are to be counted.
        request_id, tenant: those of the request, if it is a sample.
        inputs: rows of the inputs of each run; texts run by their lengths.
        texts: its sentences, if they are kept.
        outputs: rows of the outputs.
        ended: when it was answered, in seconds since 1970.
        nbytes: bytes of what was copied, which count until nobody has the observation any more.
    """

    __slots__ = (
        "ended", "inputs", "is_counted", "is_sample", "nbytes", "observer", "outputs",
        "request_id", "tenant", "texts",
    )  # fmt: skip

    def __init__(self, observer: VersionObserver, *, is_sample: bool, is_counted: bool) -> None:
        self.observer = observer
        self.is_sample = is_sample
        self.is_counted = is_counted
        self.request_id = self.tenant = ""
        self.inputs: list[Tensors] = []
        self.texts: Array | None = None
        self.outputs: Tensors = {}
        self.ended = 0.0
        self.nbytes = 0

    def add_bytes(self, nbytes: int) -> None:
        """Count bytes that were copied."""
        self.nbytes += nbytes
        self.observer.observations.hold(nbytes)

    def __del__(self) -> None:
        # A request may end without an answer anywhere, and an observation in two threads.
        self.observer.observations.hold(-self.nbytes)


class VersionObserver:
    """Chooses and copies requests of one version; for the event loop.

    Attributes:
        key: the version.
        observations: those of the process.
        facts: what its fields are named by.
        rules: which fields of samples are kept; empty if none are.
        names: the output with labels, and their names; None without labels.
        counts: the counts of its values; None without a profile.
    """

    def __init__(self, observations: Observations, view: VersionView) -> None:
        """Raises ConfigError if `[samples]` does not fit the model."""
        assert view.signature is not None  # the version is ready
        self.key = view.key
        self.facts = facts_of(view)
        self.names = self.facts.labels
        self.observations = observations
        self._text = "" if view.text is None else view.text.input
        self.rules: Mapping[str, FieldRules] = {}
        self._threshold = self._most_rows = self._most_bytes = 0
        self._choice_key = b""
        config = SamplesConfig.model_validate(view.sampling)
        if config.share and observations.store is not None and observations.keys is not None:
            self.rules = rules_of(config, view)
            self._choice_key = observations.keys.choice_key
            self._threshold = threshold_of(config.share)
            self._most_rows, self._most_bytes = config.max_rows, config.max_request_bytes
        self._keeps_text = self._text in self.rules
        self.counts: WindowCounts | None = None
        self.profile: Profile | None = None
        self._pause_s = 0.0
        self._next_count = 0.0
        if view.drift:
            drift = DriftConfig.model_validate(view.drift["config"])
            self.profile = Profile.model_validate(view.drift["profile"])
            self.counts = WindowCounts(self.profile, drift.window_s, CountNoise(drift.epsilon))
            self._pause_s = 1 / drift.requests_per_s

    @property
    def is_needed(self) -> bool:
        """Whether anything is to be done."""
        return bool(self._threshold) or self.counts is not None or self.observations.taker is not None

    def keep_text(self, context: PredictContext, sentences: Array) -> None:
        """Remember the sentences of a request, which may be in any thread, if samples have them."""
        if not self._keeps_text or not is_chosen(self._choice_key, context.request_id, self._threshold):
            return
        kept = sentences[: self._most_rows]
        if sum(map(len, kept.flat)) <= self._most_bytes:
            context.sentences = kept.copy()

    def begin(self, context: PredictContext, tensors: Tensors, now: float) -> None:
        """Decide whether to observe a request at the moment `now`, and copy what is needed of its inputs.

        For small inputs this is called just before `end`; larger ones are copied before they run.
        """
        observations = self.observations
        is_counted = observations.taker is not None
        if self.counts is not None and now >= self._next_count:
            is_counted = True
            self._next_count = now + self._pause_s
        is_sample = False
        if self._threshold and is_chosen(self._choice_key, context.request_id, self._threshold):
            is_sample = observations.may_write()
            if not is_sample:
                observations.dropped.add()
        if not is_sample and not (is_counted and (observations.taker is not None or observations.has_room())):
            return
        observation = Observation(self, is_sample=is_sample, is_counted=is_counted)
        parts = [rows.tensors for rows in context.texts] if context.texts else [tensors]
        for part in parts[: 1 if not context.texts else self._rows_of(observation)]:
            observation.inputs.append(self._copies(observation, part))
        if is_sample:
            observation.request_id = context.request_id
            observation.tenant = context.caller.tenant
            observation.texts = context.sentences
        context.observation = observation

    def end(self, context: PredictContext, outputs: Tensors) -> None:
        """Copy what is needed of the outputs of a request that `begin` observes, and hand it over."""
        observation: Observation = context.observation
        context.observation = None
        observation.outputs = self._copies(observation, outputs)
        observation.ended = context.ended
        self.observations.take(observation)

    def _copies(self, observation: Observation, tensors: Tensors) -> Tensors:
        copied = {}
        for name, array in tensors.items():
            copy = self._copy(observation, name, array)
            if copy is not None:
                copied[name] = copy
        return copied

    def _rows_of(self, observation: Observation) -> int:
        if self.observations.taker is not None:
            return 1_000_000
        return max(
            self._most_rows if observation.is_sample else 0,
            MOST_COUNTED_ROWS if observation.is_counted else 0,
        )

    def _copy(self, observation: Observation, name: str, array: Any) -> Array | None:
        """The first rows of a tensor; None if nobody needs it."""
        if not isinstance(array, np.ndarray) or not array.ndim:
            return None
        if not observation.is_counted and name not in self.rules:
            return None
        rows = self._rows_of(observation)
        if self.observations.taker is None and len(array):
            rows = min(rows, max(1, MOST_COUNTED_BYTES // max(1, array.nbytes // len(array))))
            if array.nbytes // len(array) > MOST_COUNTED_BYTES:
                return None
        copy: Array = array[:rows].copy()
        nbytes = copy.nbytes
        if copy.dtype.kind == "O":
            # An array refers to its strings, each of which may be as large as a body.
            if copy.size > MOST_STRINGS:
                return None
            nbytes += sum(len(text) if isinstance(text, (str, bytes)) else 64 for text in copy.flat)
        if nbytes > MOST_COUNTED_BYTES and self.observations.taker is None:
            return None
        observation.add_bytes(nbytes)
        return copy

    def sample_of(self, observation: Observation, keys: SampleKeys) -> Sample | None:
        """The sample of an observed request, after the rules; None if it is too large, or has no rows."""
        inputs: dict[str, Array] = {} if self._text else dict(observation.inputs[0])
        if self._text and observation.texts is not None:
            inputs[self._text] = observation.texts
        rows = self._most_rows
        values = (*inputs.values(), *observation.outputs.values())
        for array in values:
            rows = min(rows, len(array))
        bf16 = self.facts.bf16
        sides = []
        for side in (inputs, observation.outputs):
            plain = {
                name: bf16_to_fp32(array[:rows]) if name in bf16 else array[:rows]
                for name, array in side.items()
            }
            sides.append(redacted(plain, self.rules, keys))
        if self.names is not None and self.names[0] in sides[1]:
            name, names = self.names
            scores = observation.outputs[name][:rows]
            scores = bf16_to_fp32(scores) if name in bf16 else scores
            if self.rules[name].whole == "keep" and not self.rules[name].columns and scores.ndim == 2:
                sides[1][name + LABEL] = best_labels(scores.astype(np.float64), names)
        kept = [array for side in sides for array in side.values()]
        size = sum(
            sum(64 + len(str(text)) for text in array.flat) if array.dtype.kind == "O" else array.nbytes
            for array in kept
        )
        if not kept or not rows or size > self._most_bytes:
            return None
        return Sample(
            observation.request_id, observation.tenant, self.key.model, self.key.version, observation.ended,
            rows, *sides,
        )  # fmt: skip

    def values_of(self, observation: Observation) -> dict[str, Array]:
        """The values of the fields of an observed request."""
        return field_values(self.facts, observation.inputs, observation.outputs)


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
                observer = VersionObserver(self, view)
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
                closed = observer.counts.add(each.ended, observer.values_of(each))
                if closed is not None:
                    self._publish(observer, closed)
            if each.is_sample and self.store is not None and self.keys is not None:
                sample = observer.sample_of(each, self.keys)
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


def rules_of(config: SamplesConfig, view: VersionView) -> dict[str, FieldRules]:
    """The rules for the fields of a version; raises ConfigError."""
    assert view.signature is not None  # the version is ready
    text = view.text
    tokens = () if text is None else tuple(spec.name for spec in view.signature.inputs)
    pixels = None if view.image is None else view.image.input
    return kept_fields(config, view.signature, pixels, None if text is None else text.input, tokens)


def facts_of(view: VersionView) -> FieldFacts:
    """What the fields of a version are named by."""
    signature, text, image, classes = view.signature, view.text, view.image, view.classes
    assert signature is not None  # the version is ready
    bf16 = frozenset(spec.name for spec in (*signature.inputs, *signature.outputs) if spec.datatype == "BF16")
    unknown = None if text is None else text.substitute("unknown")
    return FieldFacts(
        pixels="" if image is None else image.input,
        channels_last=image is not None and image.picture.layout == "HWC",
        text="" if text is None else text.input,
        ids="" if text is None else text.ids,
        unknown=-1 if unknown is None else unknown,
        bf16=bf16,
        labels=None if classes is None else (classes.output, classes.names),
    )
