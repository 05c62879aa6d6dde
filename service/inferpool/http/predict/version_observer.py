"""Chooses the requests that are observed, and copies what is needed of them; for the event loop.

A version that neither keeps samples nor has a profile has no observer, and its requests pay a comparison.
Otherwise the event loop decides by the request's id, and by the time, whether to observe a request, and
copies a few rows of the inputs and outputs. It does so once the response is written, and before the memory is
given back. Code that few requests run is in no cache of the CPU: before the response, the copies may take a
tenth of a small request's time. The thread in `observations.py` does everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np

from inferpool.drift.config import DriftConfig
from inferpool.drift.counts import WindowCounts
from inferpool.drift.fields import FieldFacts, field_values
from inferpool.drift.profile_file import Profile
from inferpool.http.predict.context import PredictContext
from inferpool.observe.metrics import Value
from inferpool.privacy.config import FieldRules, SamplesConfig, kept_fields
from inferpool.privacy.keys import is_chosen, threshold_of
from inferpool.privacy.noise import CountNoise
from inferpool.repository.catalog import VersionView
from inferpool.tensors import Array, Tensors

MOST_COUNTED_ROWS: Final = 64
"""Rows of a request that are counted for drift."""
MOST_COUNTED_BYTES: Final = 1024 * 1024
"""Of a larger tensor fewer rows are counted, because the event loop copies them."""
MOST_STRINGS: Final = 4096
"""A tensor of more strings is not copied, because the event loop looks at the length of each."""

Taker = Callable[["Observation"], None]
"""Takes every request of a version, for a program that makes a profile."""


class ObservationInbox(Protocol):
    """Takes observations from the event loop.

    Attributes:
        taker: takes every request; None but in a program that makes a profile.
        dropped: counts samples that were chosen, and not kept because there was no room.
    """

    taker: Taker | None
    dropped: Value

    def may_write(self) -> bool:
        """Whether a sample may be kept now: the disk takes it, and few wait."""

    def has_room(self) -> bool:
        """Whether another request may be observed: few wait, and what is copied is bounded."""

    def hold(self, nbytes: int) -> None:
        """Count bytes that observations hold, in any thread."""

    def take(self, observation: Observation) -> None:
        """Take an observed request that has been answered."""


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
        self.observer.inbox.hold(nbytes)

    def values(self) -> dict[str, Array]:
        """The values of its fields, for drift."""
        return field_values(self.observer.facts, self.inputs, self.outputs)

    def __del__(self) -> None:
        # A request may end without an answer anywhere, and an observation in two threads.
        self.observer.inbox.hold(-self.nbytes)


class VersionObserver:
    """Chooses and copies requests of one version; for the event loop.

    Attributes:
        key: the version.
        inbox: takes its inbox.
        facts: what its fields are named by.
        text: the input that takes sentences; "" without one.
        rules: which fields of samples are kept; empty if none are.
        most_rows, most_bytes: the largest sample that is kept.
        names: the output with labels, and their names; None without labels.
        counts: the counts of its values; None without a profile.
    """

    def __init__(self, inbox: ObservationInbox, view: VersionView, choice_key: bytes) -> None:
        """Choose samples with `choice_key`, or none if it is empty.

        Raises ConfigError if `[samples]` does not fit the model.
        """
        assert view.signature is not None  # the version is ready
        self.key = view.key
        self.facts = facts_of(view)
        self.names = self.facts.labels
        self.inbox = inbox
        self.text = "" if view.text is None else view.text.input
        self.rules: Mapping[str, FieldRules] = {}
        self.most_rows = self.most_bytes = 0
        self._threshold = 0
        self._choice_key = choice_key
        config = SamplesConfig.model_validate(view.sampling)
        if config.share and choice_key:
            self.rules = rules_of(config, view)
            self._threshold = threshold_of(config.share)
            self.most_rows, self.most_bytes = config.max_rows, config.max_request_bytes
        self._keeps_text = self.text in self.rules
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
        return bool(self._threshold) or self.counts is not None or self.inbox.taker is not None

    def keep_text(self, context: PredictContext, sentences: Array) -> None:
        """Remember the sentences of a request, which may be in any thread, if samples have them."""
        if not self._keeps_text or not is_chosen(self._choice_key, context.request_id, self._threshold):
            return
        kept = sentences[: self.most_rows]
        if sum(map(len, kept.flat)) <= self.most_bytes:
            context.sentences = kept.copy()

    def begin(self, context: PredictContext, tensors: Tensors, now: float) -> None:
        """Decide whether to observe a request at the moment `now`, and copy what is needed of its inputs.

        For small inputs this is called just before `end`; larger ones are copied before they run.
        """
        inbox = self.inbox
        is_counted = inbox.taker is not None
        if self.counts is not None and now >= self._next_count:
            is_counted = True
            self._next_count = now + self._pause_s
        is_sample = False
        if self._threshold and is_chosen(self._choice_key, context.request_id, self._threshold):
            is_sample = inbox.may_write()
            if not is_sample:
                inbox.dropped.add()
        if not is_sample and not (is_counted and (inbox.taker is not None or inbox.has_room())):
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
        self.inbox.take(observation)

    def _copies(self, observation: Observation, tensors: Tensors) -> Tensors:
        copied = {}
        for name, array in tensors.items():
            copy = self._copy(observation, name, array)
            if copy is not None:
                copied[name] = copy
        return copied

    def _rows_of(self, observation: Observation) -> int:
        if self.inbox.taker is not None:
            return 1_000_000
        return max(
            self.most_rows if observation.is_sample else 0,
            MOST_COUNTED_ROWS if observation.is_counted else 0,
        )

    def _copy(self, observation: Observation, name: str, array: Any) -> Array | None:
        """The first rows of a tensor; None if nobody needs it."""
        if not isinstance(array, np.ndarray) or not array.ndim:
            return None
        if not observation.is_counted and name not in self.rules:
            return None
        rows = self._rows_of(observation)
        if self.inbox.taker is None and len(array):
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
        if nbytes > MOST_COUNTED_BYTES and self.inbox.taker is None:
            return None
        observation.add_bytes(nbytes)
        return copy


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
