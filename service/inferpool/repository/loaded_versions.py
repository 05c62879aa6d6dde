"""The versions that are loaded in this process: loads them, lets requests reach them, and frees them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from inferpool.errors import RunsElsewhere
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.pool.router import PoolRouter
from inferpool.repository.catalog import LiveView
from inferpool.repository.codec_factory import CodecSource
from inferpool.repository.idle_measuring import IdleWatch
from inferpool.repository.lifecycle import Phase
from inferpool.repository.load.loader import LoadedVersion
from inferpool.repository.load_manager import Outcome
from inferpool.repository.load_room import fits_beside
from inferpool.repository.measured_loads import MeasuredLoads
from inferpool.repository.published_views import PublishedViews
from inferpool.repository.version_source import VersionSource
from inferpool.system.memory import memory_use, release_freed_memory

log = logging.getLogger(__name__)

LATE_DRAIN_S: Final = 1.0
"""How long the instances of a version that has loaded too late may take to end."""
ON_THEIR_WAY_S: Final = 0.1
"""How long requests to a version may be on their way from another process that has sent its last one."""


class LoadedVersions:
    """The versions that have pools here. All methods may be called in any thread.

    Attributes:
        router: takes requests to the pools.
    """

    def __init__(
        self,
        loads: MeasuredLoads,
        views: PublishedViews,
        idle: IdleWatch,
        metrics: Metrics,
        *,
        memory_bytes: int,
        drain_timeout_s: float,
        on_loading: Callable[[VersionKey], None] | None,
        until_seen: Callable[[], None] | None,
        keeps_codec_sources: bool,
    ) -> None:
        """Load nothing yet.

        Args:
            on_loading: called when a version begins to load in this process.
            until_seen: waits until all that send requests know what is published; None if they look before
                each request.
            keeps_codec_sources: whether `codec_sources` is asked for.
        """
        self.router = PoolRouter()
        self._loads = loads
        self._views = views
        self._idle = idle
        self._metrics = metrics
        self._memory_bytes = memory_bytes
        self._drain_timeout_s = drain_timeout_s
        self._on_loading = on_loading
        self._until_seen = until_seen
        self._keeps_codec_sources = keeps_codec_sources
        self._loaded: dict[VersionKey, LoadedVersion] = {}
        self._codec_sources: dict[VersionKey, CodecSource] = {}
        # What versions are loaded from at the moment, and what those that serve were loaded from.
        self._load_sources: dict[VersionKey, VersionSource] = {}
        self._served_sources: dict[VersionKey, VersionSource] = {}
        self._remeasured: VersionKey | None = None

    # What is loaded.

    def get(self, key: VersionKey) -> LoadedVersion:
        """The version that was loaded under `key`, with its pool and its models; raises KeyError."""
        return self._loaded[key]

    def live(self, key: VersionKey, phase: Phase | None) -> LiveView | None:
        """The facts about a version that change, with the `phase` of a load beside it; None if not loaded."""
        loaded = self._loaded.get(key)
        if loaded is None:
            return None
        pool = loaded.pool
        rows, age_s, wait_s = pool.waiting()
        return LiveView(
            pool.instances(),
            pool.latency.table(),
            rows,
            age_s,
            wait_s,
            pool.batching_stopped,
            pool.batches(),
            pool.bucket_sizes(),
            loaded.copies.tensorrt,
            phase=phase,
        )

    def runs(self) -> int:
        """How many batches have run of the versions that are loaded now."""
        return sum(count.runs for loaded in list(self._loaded.values()) for count in loaded.pool.batches())

    def sources(self) -> Mapping[VersionKey, VersionSource]:
        """What the versions that serve were loaded from."""
        return dict(self._served_sources)

    def codec_sources(self) -> Mapping[VersionKey, CodecSource]:
        """What the codecs of the versions that are loaded were made from; empty unless these are kept."""
        return dict(self._codec_sources)

    # What the manager asks for.

    def load(
        self,
        key: VersionKey,
        source: VersionSource,
        enter: Callable[[Phase], None],
        is_over: Callable[[], bool],
    ) -> LoadedVersion:
        """Load a version; other versions go on serving."""
        self._load_sources[key] = source
        remeasure = key == self._remeasured
        if remeasure:
            self._remeasured = None
        self._views.elsewhere.pop(key, None)
        try:
            return self._loads.load(
                key,
                source,
                enter,
                is_over,
                self._on_loading or (lambda key: None),
                beside=bool(self._loaded),
                remeasure=remeasure,
                # A server that starts has little to answer, and the process would take time from its start.
                apart=self._views.was_ready and bool(self._loaded),
            )
        except RunsElsewhere as error:
            self._views.elsewhere[key] = error.devices
            raise

    def remeasure(self, key: VersionKey) -> None:
        """Let the next load of a version ignore its kept measurements."""
        self._remeasured = key

    def fits_beside(self, source: VersionSource, others: Sequence[VersionSource]) -> bool:
        """Whether a version may load while `others` do: there is memory, and its backend can."""
        return fits_beside(source, others, self._memory_bytes)

    def serve(self, key: VersionKey, loaded: LoadedVersion) -> None:
        """Let requests reach a version that is loaded, in place of what was loaded of it before."""
        before = self._loaded.get(key)
        if self._keeps_codec_sources and loaded.codec_source is not None:
            self._codec_sources[key] = loaded.codec_source
        loaded.codec_source = None  # a tokenizer may have many megabytes
        self._metrics.add_version(key.model, str(key.version))
        with self._views.lock:
            self._loaded[key] = loaded
            self._served_sources[key] = self._load_sources[key]
            self.router.add(loaded.pool)
            self._views.publish(loaded.view)
        batching = loaded.view.batching
        log.info(
            "%s/%d is ready after %.2f s (%s)",
            *key,
            loaded.view.load_s,
            f"batches of up to {batching.max_rows} rows"
            if batching.enabled
            else f"unbatched: {batching.reason}",
        )
        self._idle.measured(key, loaded.waited)
        if before is not None:
            threading.Thread(target=self._end, args=(key, before), daemon=True).start()

    def discard(self, loaded: LoadedVersion) -> None:
        """Free a version that was loaded in vain."""
        loaded.pool.drain(LATE_DRAIN_S)
        loaded.close()

    def retire(self, key: VersionKey) -> None:
        """Take requests away from a version, wait until its last one is answered, and free its memory."""
        if self._until_seen is not None:
            self._until_seen()
            time.sleep(ON_THEIR_WAY_S)
        loaded = self._loaded.pop(key, None)
        self._idle.forget(key)
        self._codec_sources.pop(key, None)
        self._served_sources.pop(key, None)
        if loaded is not None:
            self.router.remove(key)
            self._end(key, loaded)

    def _end(self, key: VersionKey, loaded: LoadedVersion) -> None:
        """Let a version answer what it has accepted, and free its memory."""
        held = memory_use().held
        if not loaded.pool.drain(self._drain_timeout_s):
            log.error("%s/%d still runs, and keeps its memory", *key)
            return
        self.router.forget(loaded.pool)
        loaded.close()
        release_freed_memory()
        freed = held - memory_use().held
        log.info("%s/%d is unloaded; the process has %.1f MB less", *key, freed / 1e6)

    def count_load(self, key: VersionKey, outcome: Outcome) -> None:
        """Count a load that has ended."""
        self._metrics.value("loads_total", key.model, str(key.version), outcome).add()

    # The end.

    @property
    def is_running(self) -> bool:
        """Whether an instance's thread lives."""
        return any(pool.is_running for pool in self.router.pools())

    def drain(self, ends: float, clock: Callable[[], float]) -> bool:
        """Finish the accepted requests and end every instance until `ends`; False if that is too soon."""
        ended = [pool.drain(max(0.0, ends - clock())) for pool in self.router.pools()]
        return all(ended)

    def close(self) -> None:
        """Free the memory of every model. The instances have ended."""
        for loaded in self._loaded.values():
            loaded.close()
