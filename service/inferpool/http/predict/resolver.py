"""Finds the version that a request means, and the metrics that the request is counted in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from inferpool.errors import InvalidInput
from inferpool.http.predict.canary_choice import CanaryChoice, trial_metrics
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.observations import Observations
from inferpool.http.predict.request_head import NO_NAMES
from inferpool.http.predict.request_metrics import (
    RequestMetrics,
    RequestStats,
    RequestTotals,
    request_totals,
)
from inferpool.http.predict.response_cache import ResponseCache
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.predict.shadow_copies import ShadowTarget
from inferpool.observe.families import BATCH_RUNS, REQUEST_STATS
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.pool.stats import BatchCount
from inferpool.repository.catalog import (
    READY,
    Catalog,
    ModelView,
    VersionView,
    find_ready,
    known_models,
)
from inferpool.repository.traffic import Traffic
from inferpool.tensors import names_text

MOST_NAMES: Final = 256
"""Names of versions that are remembered: a model may be named with a number, a label, or no version."""


class Resolver:
    """Looks versions up in the catalog, and remembers them until the catalog changes.

    Attributes:
        no_model: where requests are counted that mean no model of the catalog.
        choice_headers: the names of the headers by which requests are shared out between versions.
        on_choice_headers: called when these names have changed, in any thread.
    """

    def __init__(
        self,
        catalog: Catalog,
        metrics: Metrics,
        cache: ResponseCache | None = None,
        observations: Observations | None = None,
    ) -> None:
        """Find what `catalog` serves, and count its requests in `metrics`; `cache` has their outputs.

        `observations` keeps samples of them.
        """
        self._catalog = catalog
        self._metrics = metrics
        self._cache = cache or ResponseCache(0, metrics)
        self._observations = observations
        self._resolved = _Resolved({})
        self._served: dict[VersionKey, ServedVersion] = {}
        self._stats: dict[VersionKey, RequestStats] = {}
        self.no_model = RequestMetrics(metrics, "", "", RequestStats())
        self._by_model: dict[str, RequestMetrics] = {}
        self.choice_headers = NO_NAMES
        self.on_choice_headers: Callable[[], None] | None = None

    def find(self, model: str, version: str | None, context: PredictContext | None = None) -> ServedVersion:
        """Return the version that a name means; `version` is a number, a label, or None for the default.

        A request that names no version may be a canary's: `context` tells, and without one the default
        answers.

        Raises ModelNotFound, VersionNotFound or NotReady. May be called from any thread.
        """
        models = self._catalog.models()
        # A local reference: another thread may replace `self._resolved` after the catalog changed, and
        # what this thread finds in the earlier models must not be remembered with the later ones.
        resolved = self._resolved
        if models is not resolved.models or len(resolved.versions) >= MOST_NAMES:
            resolved = self._begin(models)
        name = (model, version)
        served = resolved.versions.get(name)
        if served is None:
            choice = resolved.choices.get(model) if version is None else None
            if choice is not None:
                # Never remembered by its name, so that other models pay nothing for the choice.
                return choice.stable if context is None else choice.choose(context)
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
        if among is None and len(known) == 1:
            return next(iter(known))
        # A key for some models must not tell which others there are.
        models = list(known) if among is None else [model for model in known if model in among]
        if len(models) != 1:
            raise InvalidInput(
                f"the request must name a model: {names_text(models)} are served; a path names it, or a"
                ' JSON body with "model"',
                field="model",
            )
        return next(iter(models))

    def last_success(self) -> float:
        """Return when a process has last answered a prediction with outputs, by the predictor's clock."""
        moments = [stats.last for stats in list(self._stats.values())]
        for series in self._metrics.hidden_series(REQUEST_STATS).values():
            moments += [numbers[4] for numbers in series]
        return max(moments, default=0.0)

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

    def _begin(self, models: Mapping[str, ModelView]) -> _Resolved:
        """Remember nothing of earlier models, and prepare the choices between versions of these."""
        resolved = _Resolved(models)
        for key in list(self._served):
            model = models.get(key.model)
            if model is None or key.version not in model.versions:
                self._served.pop(key, None)  # a tokenizer may have many megabytes
        self._cache.keep_only(models)
        if self._observations is not None:
            self._observations.keep_only(models)
        headers = NO_NAMES
        for model in models.values():
            if model.traffic is not None:
                choice = self._choice(model, model.traffic)
                if choice is not None:
                    resolved.choices[model.name] = choice
                    if choice.header is not None:
                        headers = headers | {choice.header}
        self._resolved = resolved
        if headers != self.choice_headers:
            self.choice_headers = headers or NO_NAMES
            if self.on_choice_headers is not None:
                self.on_choice_headers()
        return resolved

    def _choice(self, model: ModelView, traffic: Traffic) -> CanaryChoice | None:
        """Return how requests are shared out; None if the default version answers all of them."""
        default = model.default
        if default is None:
            return None
        rule = traffic.running
        other = None if rule is None else model.versions.get(rule.version)
        if rule is None or other is None or other.state != READY or default.key.version != rule.stable:
            rule = other = None
        shadow = None if traffic.shadow is None else model.versions.get(traffic.shadow.version)
        if shadow is not None and (shadow.state != READY or shadow.key == default.key):
            shadow = None
        if other is None and shadow is None:
            return None
        stable = self._in_trial(default, traffic.number)
        canary = None if other is None else self._in_trial(other, traffic.number)
        if shadow is not None and traffic.shadow is not None:
            served = ServedVersion(shadow, self._request_metrics(shadow.key))
            stable.shadow = ShadowTarget(self._metrics, served, traffic.number, traffic.shadow.share)
        return CanaryChoice(stable, canary, rule)

    def _in_trial(self, view: VersionView, number: int) -> ServedVersion:
        stats = self._stats_of(view.key)
        metrics = trial_metrics(self._metrics, view.key, stats, number)
        return self._make(view, metrics)

    def _make(self, view: VersionView, metrics: RequestMetrics) -> ServedVersion:
        served = ServedVersion(view, metrics, self._cache.of(view))
        if self._observations is not None:
            served.observer = self._observations.of(view)
        return served

    def _look_up(self, model: str, version: str | None) -> ServedVersion:
        view = find_ready(self._catalog, model, version)
        served = self._served.get(view.key)
        if served is None or served.view is not view:
            metrics = self._request_metrics(view.key)
            served = self._served[view.key] = self._make(view, metrics)
        return served

    def _request_metrics(self, key: VersionKey) -> RequestMetrics:
        return RequestMetrics(self._metrics, key.model, str(key.version), self._stats_of(key))

    def _stats_of(self, key: VersionKey) -> RequestStats:
        stats = self._stats.get(key)
        if stats is None:
            new = RequestStats(self._metrics.hidden(REQUEST_STATS, key.model, str(key.version)))
            # Another thread may have been quicker.
            stats = self._stats.setdefault(key, new)
        return stats


class _Resolved:
    """The versions that names meant while the catalog's models were `models`, and choices between them."""

    __slots__ = ("choices", "models", "versions")

    def __init__(self, models: Mapping[str, ModelView]) -> None:
        self.models = models
        self.versions: dict[tuple[str, str | None], ServedVersion] = {}
        self.choices: dict[str, CanaryChoice] = {}
