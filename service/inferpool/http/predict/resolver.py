"""Finds the version that a request means, and the metrics that the request is counted in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from inferpool.errors import InvalidInput
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_metrics import (
    RequestMetrics,
    RequestStats,
    RequestTotals,
    request_totals,
)
from inferpool.http.predict.served_version import ServedVersion
from inferpool.observe.families import BATCH_RUNS, REQUEST_STATS
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.pool.stats import BatchCount
from inferpool.repository.catalog import Catalog, ModelView, find_ready, known_models
from inferpool.tensors import names_text

MOST_NAMES: Final = 256
"""Names of versions that are remembered: a model may be named with a number, a label, or no version."""


class Resolver:
    """Looks versions up in the catalog, and remembers them until the catalog changes.

    Attributes:
        no_model: where requests are counted that mean no model of the catalog.
    """

    def __init__(self, catalog: Catalog, metrics: Metrics) -> None:
        """Find what `catalog` serves, and count its requests in `metrics`."""
        self._catalog = catalog
        self._metrics = metrics
        self._resolved = _Resolved({})
        self._served: dict[VersionKey, ServedVersion] = {}
        self._stats: dict[VersionKey, RequestStats] = {}
        self.no_model = RequestMetrics(metrics, "", "", RequestStats())
        self._by_model: dict[str, RequestMetrics] = {}

    def find(self, model: str, version: str | None) -> ServedVersion:
        """Return the version that a name means; `version` is a number, a label, or None for the default.

        Raises ModelNotFound, VersionNotFound or NotReady. May be called from any thread.
        """
        models = self._catalog.models()
        # A local reference: another thread may replace `self._resolved` after the catalog changed, and
        # what this thread finds in the earlier models must not be remembered with the later ones.
        resolved = self._resolved
        if models is not resolved.models or len(resolved.versions) >= MOST_NAMES:
            resolved = self._resolved = _Resolved(models)
        name = (model, version)
        served = resolved.versions.get(name)
        if served is None:
            served = resolved.versions[name] = self._look_up(model, version)
        return served

    def model_named(self, name: str | None, among: frozenset[str] | None = None) -> str:
        """Return the model that a body means: the one it names, or the only one that is served.

        `among` has the models that the caller may use, None if these are all.

        Raises InvalidInput if the body names none and not exactly one is served, and NotReady if no model is
        known yet.
        """
        if name is not None:
            return name
        known = known_models(self._catalog)
        # A key for some models must not tell which others there are.
        models = list(known) if among is None else [model for model in known if model in among]
        if len(models) != 1:
            raise InvalidInput(
                f'the body must name a "model": {names_text(models)} are served', field="model"
            )
        return next(iter(models))

    def stats(self, key: VersionKey) -> RequestTotals:
        """Return how the requests for a version ended, in all processes of the server."""
        return request_totals(self._metrics, key.model, str(key.version), self._stats.get(key))

    def batches(self, key: VersionKey) -> list[BatchCount]:
        """Return what has run of a version by batch size, smallest first, in all processes of the server."""
        if not self._metrics.is_shared:
            return sorted(self._catalog.live(key).batches)
        found = self._metrics.hidden_series(BATCH_RUNS, key.model, str(key.version))
        return sorted(
            BatchCount(
                int(labels[2]), int(sum(each[0] for each in numbers)), sum(each[1] for each in numbers)
            )
            for labels, numbers in found.items()
            if len(labels) == 3 and labels[2].isdecimal()
        )

    def metrics_of(self, context: PredictContext) -> RequestMetrics:
        """Return where a refused request is counted: its version, else its model, else neither."""
        if context.served is not None:
            return context.served.metrics
        name = self.model_of(context)
        if name is None:
            return self.no_model
        metrics = self._by_model.get(name)
        if metrics is None:
            metrics = self._by_model[name] = RequestMetrics(self._metrics, name, "", RequestStats())
        return metrics

    def model_of(self, context: PredictContext) -> str | None:
        """Return the model that a request means, ready or not; None if the catalog has no such model."""
        if context.served is not None:
            return context.served.view.key.model
        models = self._catalog.models()
        name = context.head.model or context.options.model
        if name is None and len(models) == 1:
            name = next(iter(models))
        # Labels must stay few, and a client can send any name.
        return name if name is not None and name in models else None

    def _look_up(self, model: str, version: str | None) -> ServedVersion:
        view = find_ready(self._catalog, model, version)
        served = self._served.get(view.key)
        if served is None or served.view is not view:
            model_name, number = view.key.model, str(view.key.version)
            stats = self._stats.get(view.key)
            if stats is None:
                new = RequestStats(self._metrics.hidden(REQUEST_STATS, model_name, number))
                # Another thread may have been quicker.
                stats = self._stats.setdefault(view.key, new)
            metrics = RequestMetrics(self._metrics, model_name, number, stats)
            served = self._served[view.key] = ServedVersion(view, metrics)
        return served


class _Resolved:
    """The versions that names meant while the catalog's models were `models`."""

    __slots__ = ("models", "versions")

    def __init__(self, models: Mapping[str, ModelView]) -> None:
        self.models = models
        self.versions: dict[tuple[str, str | None], ServedVersion] = {}
