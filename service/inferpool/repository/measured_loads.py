"""Loads versions beside others that serve: a version without a plan is measured by another process first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from inferpool.pool.ports import VersionKey
from inferpool.repository.lifecycle import VERIFY, WARM, Phase
from inferpool.repository.load.loader import LoadedVersion, Loader, NotMeasured
from inferpool.repository.load.measuring_process import (
    LoadPhases,
    MeasureRequest,
    has_room,
    is_worth_a_process,
    measure_apart,
)
from inferpool.repository.version_source import VersionSource
from inferpool.settings import Settings
from inferpool.system.memory import chosen_limit


class MeasuredLoads:
    """Loads versions by a `Loader`, whose plans may come from processes of their own."""

    def __init__(
        self, loader: Loader, settings: Settings, clock: Callable[[], float], device: str | None
    ) -> None:
        """`device` is the one that the loader has; None if it has all."""
        self._loader = loader
        self._settings = settings
        self._clock = clock
        self._device = device

    def load(
        self,
        key: VersionKey,
        source: VersionSource,
        enter: Callable[[Phase], None],
        is_over: Callable[[], bool],
        begin_here: Callable[[VersionKey], None],
        *,
        beside: bool,
        remeasure: bool,
        apart: bool,
    ) -> LoadedVersion:
        """Load a version as `Loader.load` does; `apart` allows another process to measure it.

        `begin_here` is called before this process loads the version, which may then end this process.
        `is_over` says whether nobody waits for the load any more.

        Raises LoadError.
        """
        began = self._clock()
        phases = LoadPhases(enter)
        apart = apart and self._may_measure_apart(source)
        if apart and (remeasure or not self._loader.knows_plan(source.file)):
            phases.enter(VERIFY)
            if self._measure(key, source, phases, is_over, remeasure=remeasure):
                remeasure = False
            apart = False  # once is enough, even if the file has changed meanwhile
        begin_here(key)
        load = partial(self._load_here, key, source, phases, beside=beside)
        try:
            loaded = load(remeasure=remeasure, measures=not apart)
        except NotMeasured:
            self._measure(key, source, phases, is_over, remeasure=False)
            loaded = load(remeasure=False, measures=True)
        loaded.view = replace(loaded.view, load_s=self._clock() - began)
        return loaded

    def _load_here(
        self,
        key: VersionKey,
        source: VersionSource,
        phases: LoadPhases,
        *,
        beside: bool,
        remeasure: bool,
        measures: bool,
    ) -> LoadedVersion:
        return self._loader.load(
            key, source.file, source.folder, source.config, phases.enter,
            beside=beside, remeasure=remeasure, measures=measures,
        )  # fmt: skip

    def _may_measure_apart(self, source: VersionSource) -> bool:
        """Whether another process is worth its cost, and has the memory."""
        size = sum(length for _, length, _ in source.files)
        if not is_worth_a_process(size, self._settings.measure_ms / 1000):
            return False
        memory = chosen_limit(self._settings.memory_bytes)
        return has_room(size, memory.limit, memory.held()) and self._loader.is_for_cpu(
            source.file, source.config
        )

    def _measure(
        self,
        key: VersionKey,
        source: VersionSource,
        phases: LoadPhases,
        is_over: Callable[[], bool],
        *,
        remeasure: bool,
    ) -> bool:
        """Have the version measured by another process; False if there can be none."""
        request = MeasureRequest(
            key.model,
            key.version,
            str(source.file),
            None if source.folder is None else str(source.folder),
            # Without defaults: some keys mean something else if they are given, even with the default.
            source.config.model_dump(mode="json", exclude_unset=True),
            self._settings.model_dump(mode="json"),
            self._device,
            remeasure,
        )
        known = self._loader.plans()
        plans = measure_apart(request, known, phases.enter, is_over, self._clock)
        if plans is None:
            return False
        # A plan that was known may have turned out to be wrong meanwhile.
        self._loader.take_plans({name: text for name, text in plans.items() if known.get(name) != text})
        phases.enter(WARM)
        return True
