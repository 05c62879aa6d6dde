"""Makes what a process needs to answer requests, whether it runs the models itself or engines do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from inferpool.errors import ConfigError
from inferpool.http.access.cors import make_cors
from inferpool.http.access.make_gate import KeySource, make_gate
from inferpool.http.access.tenants_file import make_tenants
from inferpool.http.application import Application
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.shared import SharedState
from inferpool.http.platforms.api import INVOCATIONS
from inferpool.http.predict.in_flight import InFlight
from inferpool.http.predict.memory_monitor import CachedMemory, MemoryMonitor, System
from inferpool.http.predict.observations import Observations
from inferpool.http.predict.picture_urls import PictureUrls
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.recorder import RequestRecorder
from inferpool.http.predict.response_cache import ResponseCache
from inferpool.http.predict.results import ResultDispatcher
from inferpool.http.predict.version_observer import Taker
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Inbox, VersionKey
from inferpool.privacy.keys import KEYS_VARIABLE, SampleKeys, read_keys
from inferpool.repository.admin import Admin
from inferpool.repository.catalog import Catalog
from inferpool.repository.catalog_readings import is_shown
from inferpool.repository.drift_figures import drift_readings
from inferpool.repository.rollout import RolloutWatch
from inferpool.repository.traffic_figures import traffic_readings
from inferpool.settings import Settings
from inferpool.system.imports import no_collections
from inferpool.system.memory import COPIES, COPIES_APART

if TYPE_CHECKING:
    from inferpool.http.routes import Routes
    from inferpool.privacy.store import SampleStore

_READY: Final = "/health/ready"
_DAY_S: Final = 86_400
CACHE_SHARE: Final = 16
"""Cached outputs take at most this share of the memory."""


class ServerParts(NamedTuple):
    """The arguments of `inferpool.server.Server`, in its order."""

    application: Application
    in_flight: InFlight
    results: ResultDispatcher
    read_batcher: ReadBatcher
    metrics: Metrics
    memory: MemoryMonitor
    settings: Settings
    key_sources: Sequence[KeySource]
    rollouts: RolloutWatch | None
    observations: Observations


def make_server_parts(
    catalog: Catalog,
    inbox: Inbox,
    results: ResultDispatcher,
    metrics: Metrics,
    settings: Settings,
    admin: Admin,
    recorder: RequestRecorder,
    system: System,
    *,
    derive: bool,
    processes: int = 1,
    release: Callable[[VersionKey, int], None] | None = None,
    lend: Callable[[VersionKey, int, int], memoryview | None] | None = None,
    rates: memoryview[float] | None = None,
    rollouts: RolloutWatch | None = None,
    taker: Taker | None = None,
) -> ServerParts:
    """Make the parts of a server for what `catalog` serves, whose entries `inbox` takes.

    `system` and `derive` are for the `MemoryMonitor`, `release` and `lend` are for the `Predictor`. `rates`
    is memory that all `processes` share, for the rates of tenants. `rollouts` ends canaries.
    `taker` takes every request, for a program that makes a profile.

    Raises ConfigError if keys or tenants cannot be read, samples cannot be kept where they are to be, or
    `image_urls` has a value that cannot be used.
    """
    metrics.show_only(partial(is_shown, catalog))
    metrics.add_source(partial(traffic_readings, catalog, metrics), published=False)
    cache = ResponseCache(min(settings.cache_bytes, system.limit.limit // CACHE_SHARE) // processes, metrics)
    metrics.add_source(partial(drift_readings, catalog, metrics), published=False)
    observations = Observations(metrics, *_sample_store(settings), taker)
    predictor = Predictor(
        catalog,
        inbox,
        results,
        metrics,
        time.monotonic,
        max_body_bytes=settings.max_body_bytes,
        in_flight_bytes=settings.in_flight_bytes,
        recorder=recorder,
        release=release,
        lend=lend,
        cache=cache,
        observations=observations,
    )
    if settings.image_urls:
        predictor.fetch_pictures(PictureUrls(settings.image_urls))
    memory = MemoryMonitor(
        system,
        predictor.budget,
        metrics,
        derive=derive,
        share=processes,
        copies=COPIES if lend is None else COPIES_APART,
        cache=CachedMemory(cache, catalog),
    )
    gate, key_sources = make_gate(settings, time.monotonic, metrics)
    predictor.tenants, tenant_sources = make_tenants(settings.tenants_file, gate.enabled, metrics, rates)
    shared = SharedState(
        predictor,
        gate,
        make_cors(settings.cors_allow_origin),
        settings.max_head_bytes,
        settings.root_path,
        _route_aliases(settings.predict_route, settings.health_route),
    )
    results.wrap_batches(shared.writes.begin, shared.writes.flush)
    read_batcher = ReadBatcher()
    application = Application(
        shared,
        read_batcher,
        partial(_make_routes, catalog, shared, metrics, admin, settings, observations),
    )
    return ServerParts(
        application,
        predictor.in_flight,
        results,
        read_batcher,
        metrics,
        memory,
        settings,
        [*key_sources, *tenant_sources],
        rollouts,
        observations,
    )


def _route_aliases(predict_route: str | None, health_route: str | None) -> dict[bytes, bytes]:
    """The routes of this server that the paths of a platform mean."""
    aliases = {predict_route: INVOCATIONS, health_route: _READY}
    return {path.encode(): route.encode() for path, route in aliases.items() if path is not None}


def _make_routes(
    catalog: Catalog,
    shared: SharedState,
    metrics: Metrics,
    admin: Admin,
    settings: Settings,
    observations: Observations,
) -> Routes:
    """Make the routes that are no predictions. Their imports take a while, so this is done late."""
    with no_collections():
        from inferpool.http.explain.options import ExplanationLimits
        from inferpool.http.routes import make_routes

        limits = ExplanationLimits(settings.explain_max_passes, settings.explain_max_ms / 1000)
        return make_routes(catalog, shared, metrics, admin, limits, observations)


def _sample_store(settings: Settings) -> tuple[SampleStore | None, SampleKeys | None]:
    """Return the store of samples and its keys, if the settings name a place; raises ConfigError."""
    if settings.samples_dir is None:
        return None, None
    from inferpool.privacy.store import SampleStore, StoreLimits  # imports sqlite3; few servers keep samples

    keys = read_keys(settings.samples_keys_file, os.environ.get(KEYS_VARIABLE))
    if keys is None:
        raise ConfigError(
            f"samples_dir is set, and no keys are: set samples_keys_file, or {KEYS_VARIABLE}; `inferpool"
            " samples new-key` makes a key"
        )
    limits = StoreLimits(settings.samples_count, settings.samples_bytes, settings.samples_days * _DAY_S)
    return SampleStore(settings.samples_dir, keys, limits), keys
