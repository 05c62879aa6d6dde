"""Makes versions what is wanted of them: loads them, and drains those that must go.

While a server starts, several versions load at once. They are measured one after the other, while no other
load runs, so that measurements do not disturb one another. Later, one version loads at a time. A load that
does not end delays the others for `health.PATIENCE_S` only. All decisions are made by `VersionLifecycle`, and
`JobTracker` knows the jobs; this module has the threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Literal, Protocol, TypeAlias

from inferpool.errors import InferpoolError, LoadCancelled, Reason, RunsElsewhere
from inferpool.pool.ports import VersionKey
from inferpool.repository import health
from inferpool.repository.bare_files import advise_folder
from inferpool.repository.job_tracker import JobTracker
from inferpool.repository.jobs import Job, JobKind
from inferpool.repository.lifecycle import (
    BEGIN_LOAD,
    CANCEL_LOAD,
    FAILED,
    MEASURE,
    READY,
    Phase,
    VersionLifecycle,
)
from inferpool.repository.load.loader import LoadedVersion
from inferpool.repository.version_source import VersionSource

log = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["ready", "failed", "cancelled"]
"""How a load ends."""


class Versions(Protocol):
    """Loads and frees versions, as the manager decides. All methods are called in threads of the manager."""

    def load(
        self,
        key: VersionKey,
        source: VersionSource,
        enter: Callable[[Phase], None],
        is_over: Callable[[], bool],
    ) -> LoadedVersion:
        """Load a version; `enter` is told each phase, and raises LoadCancelled. Raises LoadError.

        `is_over` says whether nobody waits for the load any more.
        """

    def fits_beside(self, source: VersionSource, others: Sequence[VersionSource]) -> bool:
        """Whether a version may begin to load while `others` load."""

    def serve(self, key: VersionKey, loaded: LoadedVersion) -> None:
        """Let requests reach a version that is loaded, in place of what was loaded of it before."""

    def discard(self, loaded: LoadedVersion) -> None:
        """Free a version that was loaded in vain."""

    def retire(self, key: VersionKey) -> None:
        """Take requests away from a version, wait until its last one is answered, and free its memory."""

    def count_load(self, key: VersionKey, outcome: Outcome) -> None:
        """Count a load that has ended."""


class Views(Protocol):
    """Publishes what the manager has done."""

    def show(self, key: VersionKey, lifecycle: VersionLifecycle) -> bool:
        """Publish what a version is now; returns whether it has vanished for good."""

    def leave(self, key: VersionKey) -> None:
        """Publish that a version runs on another device, and is not loaded here."""

    def is_elsewhere(self, key: VersionKey) -> bool:
        """Whether the last load has left a version to the engine of another device."""

    def jobs_changed(self) -> None:
        """Publish the jobs."""

    def await_seen(self) -> None:
        """Wait until all that send requests know what is published now."""


class _Load:
    """A load under way, which has one result: whoever claims it first decides.

    Attributes:
        waits: whether it waits until it may be measured.
        measures: whether it is being measured.
        patience_from: since when others wait for it, without the time that it has waited itself.
    """

    def __init__(self, key: VersionKey, source: VersionSource, began: float) -> None:
        self.key = key
        self.source = source
        self.began = began
        self.cancelled = False
        self.waits = self.measures = False
        self.patience_from = began
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Whether the caller decides what becomes of the version: true once."""
        return self._claim.acquire(blocking=False)

    def is_over(self) -> bool:
        """Whether it is decided what becomes of the version: the load is cancelled or takes too long."""
        return self._claim.locked()


class LoadManager:
    """The lifecycles of all versions, and the threads that load and drain them.

    All methods may be called in any thread.
    """

    def __init__(
        self,
        versions: Versions,
        views: Views,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        load_timeout_s: float | None,
        *,
        loads_at_once: int = 1,
        first: Collection[str] = (),
    ) -> None:
        """Until all versions are what is wanted for the first time, `loads_at_once` versions load at once.

        A load fails after `load_timeout_s`; None if the caller sees to it that none takes too long. The
        models named in `first` load before all others.
        """
        self._versions = versions
        self._views = views
        self._clock = clock
        self._load_timeout_s = load_timeout_s
        self._loads_at_once = loads_at_once
        self._first = frozenset(first)
        self._changed = threading.Condition(threading.RLock())
        self._lifecycles: dict[VersionKey, VersionLifecycle] = {}
        self._loads: dict[VersionKey, _Load] = {}
        self._jobs = JobTracker(self._lifecycles, views.is_elsewhere, clock, wall_clock)
        self._on_settled: Callable[[], None] | None = None
        self._unsettled = False
        # Counts what the thread may have to act on. It lets go of the lock between its look and its wait.
        self._changes = 0
        self._late_told = False
        self._stopped = False
        self._threads = 0
        self._thread: threading.Thread | None = None

    # The wanted state.

    def want(self, key: VersionKey, source: VersionSource, *, retry: bool = False) -> None:
        """Serve a version from `source`. A source that has failed is loaded again only with `retry`."""
        with self._changed:
            lifecycle = self._lifecycles.setdefault(key, VersionLifecycle())
            changes = retry or lifecycle.wanted != source
            lifecycle.want(source, retry=retry)
            if changes:
                self._wake()

    def load_again(self, key: VersionKey) -> None:
        """Load a version that serves once more, from the same source."""
        with self._changed:
            lifecycle = self._lifecycles.get(key)
            if lifecycle is not None:
                lifecycle.load_again()
                self._wake()

    def unwant(self, key: VersionKey, keep_s: float = 0.0) -> None:
        """Serve a version no more, after `keep_s` seconds in which it goes on serving."""
        with self._changed:
            lifecycle = self._lifecycles.get(key)
            if lifecycle is not None:
                changes = lifecycle.wanted is not None or lifecycle.warm_until > self._clock() + keep_s
                lifecycle.unwant(self._clock() + keep_s)
                if changes:
                    self._wake()

    def fail(self, key: VersionKey, source: VersionSource | str, reason: Reason) -> None:
        """Take note that a version cannot be loaded; `source` is what cannot."""
        with self._changed:
            lifecycle = self._lifecycles.setdefault(key, VersionLifecycle())
            changes = lifecycle.wanted != source or lifecycle.reason != reason
            lifecycle.fail(source, reason)
            self._show(key, lifecycle)
            if changes:
                self._wake()

    def unload_failed(self, key: VersionKey) -> None:
        """Take note that nobody wants a version which may have failed."""
        lifecycle = self._lifecycles.get(key)
        if lifecycle is not None and lifecycle.actual == FAILED:
            lifecycle.unloaded()
            self._show(key, lifecycle)

    def show(self, key: VersionKey) -> None:
        """Publish what a version is, because what is wanted of it has changed."""
        lifecycle = self._lifecycles.get(key)
        if lifecycle is not None:
            self._show(key, lifecycle)

    def _show(self, key: VersionKey, lifecycle: VersionLifecycle) -> None:
        """Publish what a version is, and forget it if it has vanished."""
        # No lock is needed, and a caller may not have it: the manager holds it while it waits to publish.
        if self._views.show(key, lifecycle):
            self._lifecycles.pop(key, None)

    def lifecycle(self, key: VersionKey) -> VersionLifecycle | None:
        """The lifecycle of a version, only to be read; None if the manager does not know the version."""
        return self._lifecycles.get(key)

    def lifecycles(self) -> list[tuple[VersionKey, VersionLifecycle]]:
        """All versions that the manager knows, with their lifecycles, which are only to be read."""
        return list(self._lifecycles.items())

    @property
    def is_loading(self) -> bool:
        """Whether any thread loads, even one whose result is thrown away."""
        return bool(self._threads)

    def loading(self) -> dict[VersionKey, float]:
        """The versions that load, with the moments at which their loads began."""
        return {key: load.began for key, load in list(self._loads.items())}

    # Jobs.

    def jobs(self) -> list[Job]:
        """All jobs that run, and the last ones that have ended, oldest first."""
        # Without the lock: an engine publishes the jobs while a thread with the lock waits to publish.
        return self._jobs.jobs()

    def begin_job(
        self,
        kind: JobKind,
        model: str,
        asked: int | None,
        versions: Sequence[int],
        job_id: str | None = None,
    ) -> Job:
        """Begin a job, as `JobTracker.begin` says."""
        with self._changed:
            job = self._jobs.begin(kind, model, asked, versions, job_id)
            # The thread only has to look whether the job has ended: changes of the caller wake it themselves.
            self._tell_threads()
        self._views.jobs_changed()
        return job

    def begin_fetch(
        self, model: str, asked: int | None, source: str, source_key: str, most: int
    ) -> tuple[Job, bool]:
        """Begin a job that fetches a version first, as `JobTracker.begin_fetch` says."""
        with self._changed:
            job, is_new = self._jobs.begin_fetch(model, asked, source, source_key, most)
        self._views.jobs_changed()
        return job, is_new

    def tell_fetched(self, job_id: str, fetched: int, to_fetch: int) -> None:
        """Take note of how far a fetch is."""
        with self._changed:
            changed = self._jobs.tell_fetched(job_id, fetched, to_fetch)
        if changed:
            self._views.jobs_changed()

    def is_fetching(self, job_id: str) -> bool:
        """Whether a job waits for a fetch; False once it is cancelled."""
        return self._jobs.is_fetching(job_id)

    def end_fetch(self, job_id: str, versions: Sequence[int], reason: Reason = "") -> None:
        """Let a job load `versions`, which the caller wants; or fail it with a `reason`."""
        with self._changed:
            changed = self._jobs.end_fetch(job_id, versions, reason)
            if changed:
                self._tell_threads()
        if changed:
            self._views.jobs_changed()

    def cancel(self, job_id: str) -> Job | None:
        """End a job that runs, as `JobTracker.cancel` says."""
        with self._changed:
            job = self._jobs.cancel(job_id)
            if job is None:
                return None
            self._wake()
        self._views.jobs_changed()
        return job

    # The thread.

    def start(self, on_settled: Callable[[], None]) -> None:
        """Begin to load. `on_settled` is called, in a thread, whenever all versions are what is wanted.

        It is also called when that is true of all versions but those whose loads take too long.
        """
        with self._changed:
            self._on_settled = on_settled
            self._unsettled = True
            self._thread = threading.Thread(target=self._run, name="models", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Begin no load and no drain any more."""
        with self._changed:
            self._stopped = True
            self._wake()

    def _wake(self) -> None:
        self._unsettled = True
        self._tell_threads()

    def _tell_threads(self) -> None:
        """Let all threads look again; the caller holds the lock."""
        self._changes += 1
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopped:
                    return
                now = self._clock()
                changes = self._changes
                acted = self._act(now)
                due = self._jobs.is_any_due
            if due:
                # Whoever learns that a job is done may use what it has done, in any process.
                self._views.await_seen()
            with self._changed:
                ended = self._jobs.end_due()
                settled = not acted and self._is_settled(now)
            if ended:
                self._views.jobs_changed()
            if settled and self._on_settled is not None:
                self._on_settled()
            with self._changed:
                if not (acted or settled or self._stopped or self._changes != changes):
                    self._changed.wait(self._pause(now))

    def _act(self, now: float) -> bool:
        """Take every step that can be taken; returns whether there was one."""
        acted = False
        for key, lifecycle in sorted(
            self._lifecycles.items(), key=lambda item: item[0].model not in self._first
        ):
            step = lifecycle.step(now)
            if step is None or (step == BEGIN_LOAD and not self._may_begin(lifecycle, now)):
                continue
            acted = True
            if step == BEGIN_LOAD:
                self._begin_load(key, lifecycle, now)
            elif step == CANCEL_LOAD:
                self._cancel_load(key, lifecycle)
            else:
                lifecycle.drain_begun()
                self._show(key, lifecycle)
                threading.Thread(target=self._retire, args=(key, lifecycle), daemon=True).start()
        return acted

    def _may_begin(self, lifecycle: VersionLifecycle, now: float) -> bool:
        """Whether a version may begin to load beside the loads that are under way.

        Loads that take too long do not count.
        """
        others = [load for load in self._loads.values() if not _is_late(load, now)]
        if not others:
            return True
        source = lifecycle.wanted
        assert isinstance(source, VersionSource)
        return (
            len(others) < self._loads_at_once
            and not any(load.waits or load.measures for load in others)
            and self._versions.fits_beside(source, [load.source for load in others])
        )

    def _pause(self, now: float) -> float | None:
        """How long nothing can happen unless somebody wakes the thread."""
        moments = [load.patience_from + health.PATIENCE_S for load in self._loads.values() if not load.waits]
        moments += [
            lifecycle.warm_until
            for lifecycle in self._lifecycles.values()
            if lifecycle.actual == READY and lifecycle.wanted is None
        ]
        later = [moment - now for moment in moments if moment > now]
        return min(later) if later else None

    def _is_settled(self, now: float) -> bool:
        """Whether to call `on_settled` now; true once until something changes."""
        if not self._unsettled:
            return False
        waiting = [key for key, lifecycle in self._lifecycles.items() if not lifecycle.settled]
        if waiting:
            loads = [self._loads.get(key) for key in waiting]
            late = [load for load in loads if load is not None and _is_late(load, now)]
            if len(late) < len(waiting) or self._late_told:
                return False
            self._late_told = True
        else:
            self._unsettled = self._late_told = False
        # What serves must not be slowed down by more than one load.
        self._loads_at_once = 1
        return True

    # Loads.

    def _begin_load(self, key: VersionKey, lifecycle: VersionLifecycle, now: float) -> None:
        source = lifecycle.wanted
        assert isinstance(source, VersionSource)
        _tell_late(self._loads.values(), now)
        lifecycle.load_begun()
        load = self._loads[key] = _Load(key, source, now)
        self._jobs.load_begun(key)
        self._show(key, lifecycle)
        self._threads += 1
        threading.Thread(target=self._load, args=(load, lifecycle), daemon=True).start()

    def _cancel_load(self, key: VersionKey, lifecycle: VersionLifecycle) -> None:
        lifecycle.cancel_begun()
        load = self._loads[key]
        load.cancelled = True
        if load.claim():
            self._end_load(load, "cancelled")
            lifecycle.cancelled()
            log.info("%s/%d: the load is cancelled", *key)
            self._show(key, lifecycle)

    def _load(self, load: _Load, lifecycle: VersionLifecycle) -> None:
        timer: threading.Timer | None = None
        if self._load_timeout_s is not None:
            timer = threading.Timer(self._load_timeout_s, self._give_up, (load, lifecycle))
            timer.daemon = True
            timer.start()
        try:
            enter = partial(self._enter, load, lifecycle)
            loaded = self._versions.load(load.key, load.source, enter, load.is_over)
        except RunsElsewhere as error:
            self._leave(load, lifecycle, error.detail)
        except InferpoolError as error:
            reason = advise_folder(error.detail, load.source.file, load.source.folder)
            self._fail(load, lifecycle, reason)
        except BaseException as error:
            # A model's code or a native library may raise SystemExit: that fails this version only.
            if not load.cancelled:
                log.exception("loading %s/%d", *load.key)
            self._fail(load, lifecycle, f"loading failed with {type(error).__name__}: {error}")
        else:
            self._take(load, lifecycle, loaded)
        finally:
            if timer is not None:
                timer.cancel()
            with self._changed:
                self._threads -= 1

    def _enter(self, load: _Load, lifecycle: VersionLifecycle, phase: Phase) -> None:
        with self._changed:
            if phase == MEASURE:
                self._await_quiet(load)
            load.measures = phase == MEASURE
            self._tell_threads()
            if load.cancelled:
                raise LoadCancelled("the load was cancelled")
            if self._loads.get(load.key) is not load:
                return
            lifecycle.entered(phase)
            changed = self._jobs.load_entered(load.key, phase)
        if changed:
            self._views.jobs_changed()

    def _await_quiet(self, load: _Load) -> None:
        """Wait until no other load runs but those that take too long; the caller holds the lock."""
        load.waits = True
        self._tell_threads()
        while self._loads.get(load.key) is load and not self._stopped:
            now = self._clock()
            others = [other for other in self._loads.values() if other is not load and not other.waits]
            busy = [other for other in others if not _is_late(other, now)]
            if not busy:
                _tell_late(others, now)
                break
            self._changed.wait(min(other.patience_from for other in busy) + health.PATIENCE_S - now)
        load.waits = False
        load.patience_from = self._clock()

    def _take(self, load: _Load, lifecycle: VersionLifecycle, loaded: LoadedVersion) -> None:
        with self._changed:
            claimed = load.claim()
            if claimed:
                self._end_load(load, "ready")
                self._versions.serve(load.key, loaded)
                lifecycle.loaded()
                self._show(load.key, lifecycle)
                self._wake()
        if not claimed:
            log.warning("%s/%d is loaded, too late", *load.key)
            self._versions.discard(loaded)

    def _fail(self, load: _Load, lifecycle: VersionLifecycle, reason: Reason) -> None:
        with self._changed:
            if load.claim():
                self._end_load(load, "failed")
                log.error("%s/%d has failed: %s", *load.key, reason)
                lifecycle.load_failed(reason)
                self._show(load.key, lifecycle)
                self._wake()

    def _leave(self, load: _Load, lifecycle: VersionLifecycle, reason: Reason) -> None:
        """Leave a version to the engine of another device."""
        with self._changed:
            if load.claim():
                self._end_load(load, None)
                lifecycle.load_failed(reason)
                if lifecycle.actual == READY:
                    self.unwant(load.key)
                self._views.leave(load.key)
                self._wake()

    def _give_up(self, load: _Load, lifecycle: VersionLifecycle) -> None:
        """Fail a version that is still loading. Nothing can end its thread, whose result is thrown away."""
        limit_s = self._load_timeout_s
        self._fail(load, lifecycle, f"loading takes longer than {limit_s:g} s; --load-timeout-s allows more")

    def _end_load(self, load: _Load, outcome: Outcome | None) -> None:
        """End a load, which counts only with an outcome."""
        self._jobs.load_ended(load.key, ok=outcome == "ready")
        if outcome is not None:
            self._versions.count_load(load.key, outcome)
        del self._loads[load.key]
        self._tell_threads()

    def _retire(self, key: VersionKey, lifecycle: VersionLifecycle) -> None:
        try:
            self._versions.retire(key)
        except Exception:
            log.exception("unloading %s/%d", *key)
        with self._changed:
            lifecycle.drained()
            self._show(key, lifecycle)
            self._wake()


def _is_late(load: _Load, now: float) -> bool:
    """Whether a load takes so long that nothing waits for it any more."""
    return not load.waits and now - load.patience_from >= health.PATIENCE_S


def _tell_late(loads: Collection[_Load], now: float) -> None:
    for load in loads:
        if _is_late(load, now):
            log.warning(
                "%s/%d has been loading for %.0f s; the next models load beside it",
                *load.key, now - load.began,
            )  # fmt: skip
