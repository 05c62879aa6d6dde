"""How far the last window's requests are from the profiles of versions, in all processes of the server."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from inferpool.drift.config import DriftConfig
from inferpool.drift.counts import WINDOW
from inferpool.drift.distance import Distances, distances
from inferpool.drift.profile_file import FieldProfile, Profile
from inferpool.observe.families import DRIFT
from inferpool.observe.metrics import Metrics, Sample
from inferpool.repository.catalog import READY, Catalog, VersionView

LEAST_ROWS: Final = 200
"""Rows that a window needs: with fewer ones chance alone makes distances that look like a change."""
SETTLE_S: Final = 3.0
"""How long after its end a window counts: by then every process has closed it."""


@dataclass(frozen=True, slots=True)
class FieldDrift:
    """How far a field is from its reference: by counts of about `rows` rows, which have noise."""

    name: str
    rows: int
    distances: Distances


@dataclass(frozen=True, slots=True)
class DriftFigures:
    """The drift of a version.

    Attributes:
        window_s: the length of a window in seconds.
        epsilon: hides a row in the counts of each field.
        ended: when the last window that counts has ended, in seconds since 1970; None without one.
        fields: its fields with enough rows, in the order of the profile.
    """

    window_s: float
    epsilon: float
    ended: float | None
    fields: Sequence[FieldDrift]


def drift_figures(view: VersionView, metrics: Metrics, now: float) -> DriftFigures | None:
    """The drift of a version at the moment `now`, in seconds since 1970; None without a profile.

    It is that of the last window that has ended, or of the one before if the last one had no rows.
    """
    if not view.drift:
        return None
    config = DriftConfig.model_validate(view.drift["config"])
    profile = Profile.model_validate(view.drift["profile"])
    model, version = view.key.model, str(view.key.version)
    found = metrics.hidden_series(DRIFT, model, version)
    last = math.floor((now - SETTLE_S) / config.window_s) - 1
    for number in (last, last - 1):
        fields = []
        for field in profile.fields:
            counted = _field_drift(field, found.get((model, version, field.name), ()), number)
            if counted is not None:
                fields.append(counted)
        if fields:
            return DriftFigures(config.window_s, config.epsilon, (number + 1) * config.window_s, fields)
    return DriftFigures(config.window_s, config.epsilon, None, ())


def _field_drift(field: FieldProfile, cells: Iterable[Sequence[float]], number: int) -> FieldDrift | None:
    """The drift of a field by the counts of all processes in the window `number`; None with too few rows."""
    sums = [0.0] * len(field.shares)
    tag = field.tag()
    for each in cells:
        start = number % 2 * WINDOW
        if each[start] == number and each[start + 1] == tag:
            counts = each[start + 2 : start + 2 + len(sums)]
            sums = [one + other for one, other in zip(sums, counts, strict=True)]
    rows = int(sum(sums))
    if rows < LEAST_ROWS:
        return None
    return FieldDrift(field.name, rows, distances(field.shares, sums, ordered=field.kind == "number"))


def largest(fields: Iterable[FieldDrift], measure: str) -> float | None:
    """The largest distance of all fields by one measure: `psi`, `ks` or `js`; None if none has it."""
    found = [number for each in fields if (number := getattr(each.distances, measure)) is not None]
    return max(found, default=None)


def drift_readings(catalog: Catalog, metrics: Metrics) -> Iterable[Sample]:
    """The gauges of all versions with a profile, at this moment."""
    now = time.time()
    for model in catalog.models().values():
        for view in model.versions.values():
            figures = drift_figures(view, metrics, now) if view.state == READY else None
            if figures is None:
                continue
            labels = (model.name, str(view.key.version))
            for measure in Distances._fields:
                number = largest(figures.fields, measure)
                if number is not None:
                    yield "drift_distance_largest", (*labels, measure), number
            own = view.drift["config"]["series"]
            for field in figures.fields:
                for measure, number in zip(Distances._fields, field.distances, strict=True):
                    if field.name in own and number is not None:
                        yield "drift_distance", (*labels, field.name, measure), number
