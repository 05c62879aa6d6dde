"""Ends canaries: looks at what is counted of them, and promotes them or rolls them back."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from inferpool.errors import InferpoolError, Reason
from inferpool.observe.metrics import Metrics
from inferpool.repository.admin import Admin
from inferpool.repository.catalog import DRAINING, FAILED, UNLOADED, Catalog, ModelView
from inferpool.repository.rollout_policy import Decision, decide
from inferpool.repository.traffic import PROMOTED, ROLLED_BACK, CanaryState, Traffic
from inferpool.repository.traffic_figures import trial_counts
from inferpool.system.every_second import until_next

log = logging.getLogger(__name__)

LOOK_S: Final = 0.25
"""Pause between two looks at the counts of a canary; without one there is a look each second."""


class RolloutWatch:
    """Looks at all canaries again and again, on the event loop of one process of the server."""

    def __init__(self, catalog: Catalog, metrics: Metrics, admin: Admin) -> None:
        self._catalog = catalog
        self._metrics = metrics
        self._admin = admin
        self._task: asyncio.Task[None] | None = None
        self._told: set[int] = set()

    def start(self) -> None:
        """Begin to look; the event loop runs."""
        self._task = asyncio.get_running_loop().create_task(self._look_often())

    def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    async def _look_often(self) -> None:
        running = False
        while True:
            await asyncio.sleep(LOOK_S if running else until_next(time.monotonic()))
            running = False
            for model in list(self._catalog.models().values()):
                traffic = model.traffic
                if traffic is None or traffic.running is None:
                    continue
                running = True
                try:
                    await self._look(model, traffic)
                except InferpoolError as error:
                    if traffic.number not in self._told:
                        self._told.add(traffic.number)
                        log.warning("the canary of %s cannot be ended yet: %s", model.name, error.detail)
                except Exception:
                    log.exception("the canary of %s", model.name)

    async def _look(self, model: ModelView, traffic: Traffic) -> None:
        decision = self._lost(model, traffic)
        if decision is None:
            # In a thread: the intervals take milliseconds.
            decision = await asyncio.to_thread(self._decide, model.name, traffic)
        if decision is None:
            return
        state, reason = decision
        if await self._admin.end_canary(model.name, traffic.number, state, reason):
            log_end(model.name, traffic, state, reason)

    def _lost(self, model: ModelView, traffic: Traffic) -> Decision | None:
        """The decision if the canary cannot answer any more; None if it can."""
        assert traffic.running is not None
        view = model.versions.get(traffic.running.version)
        if view is None or view.state in (FAILED, DRAINING, UNLOADED):
            state = "gone" if view is None else view.state
            return Decision(
                ROLLED_BACK, f"the version is {state}" + (f": {view.reason}" if view and view.reason else "")
            )
        return None

    def _decide(self, model: str, traffic: Traffic) -> Decision | None:
        canary = traffic.running
        assert canary is not None
        if not canary.least_requests:
            return None
        own, other = (
            trial_counts(self._metrics, model, version, traffic.number)
            for version in (canary.version, canary.stable)
        )
        return decide(own, other, canary.least_requests)


def log_end(model: str, traffic: Traffic, state: CanaryState, reason: Reason) -> None:
    """Leave the line of the audit trail about a canary that the server has ended by itself."""
    assert traffic.canary is not None
    act = "promote" if state == PROMOTED else "roll back"
    log.log(
        logging.INFO if state == PROMOTED else logging.WARNING,
        "audit: %s the canary %s/%d: %s", act, model, traffic.canary.version, reason,
        extra={"key": None, "tenant": None, "request_id": None},
    )  # fmt: skip
