"""Makes the pool of a version that is loaded: its limits, its latency model, and what watches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from inferpool.backends.base import LoadedModel
from inferpool.backends.row_verdict import Evidence
from inferpool.errors import Reason
from inferpool.observe.metrics import Metrics
from inferpool.pool.admission import Limits
from inferpool.pool.audit import Audit, Compare
from inferpool.pool.device_accounts import DeviceAccounts
from inferpool.pool.latency_model import LatencyModel, Measurement
from inferpool.pool.padding import Padding
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Outbox, VersionKey
from inferpool.pool.run_watcher import RunWatcher
from inferpool.repository.config import ModelConfig
from inferpool.repository.load.comparison import compare_answers
from inferpool.repository.load.list_outputs import ListsAsTables
from inferpool.repository.load.model_copies import ModelCopies
from inferpool.repository.load.plan import Plan
from inferpool.repository.load.planner import TRUST
from inferpool.settings import Settings
from inferpool.tensors import Tensors

BATCH_BYTES: Final = 64 * 1024 * 1024
"""Bytes of inputs that a batch of rows of any size may have, in any case."""

LEAST_QUEUE_ROWS: Final = 64
"""Rows that may wait however slow the model is, because a burst of single requests is no overload."""


class PoolFactory:
    """Makes the pools of one process, which share a watcher over runs and the accounts of devices."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        metrics: Metrics,
        clock: Callable[[], float],
        on_hung: Callable[[VersionKey, Reason], None] | None,
    ) -> None:
        """`on_hung` is told of runs that do not stop; see `RunWatcher`."""
        self._settings = settings
        self._outbox = outbox
        self._metrics = metrics
        self._clock = clock
        self._watcher = RunWatcher(clock, settings.run_timeout_s, on_hung)
        self._accounts = DeviceAccounts()

    def make(
        self,
        key: VersionKey,
        config: ModelConfig,
        plan: Plan,
        padding: Padding | None,
        copies: ModelCopies,
        forget_plan: Callable[[], None],
    ) -> Pool:
        """The pool of a version, without instances.

        `forget_plan` is called when an answer shows that the plan is wrong.
        """
        row_load, cost = 1, plan.row_cost
        if padding is not None:
            row_load = math.ceil(padding.longest / padding.unit)
        elif cost is not None:
            row_load = math.ceil(max(1.0, cost.points[-1].load))
        limits = Limits(
            batch_rows=plan.max_rows,
            queue_rows=config.queue.max_rows or LEAST_QUEUE_ROWS * row_load,
            queue_bytes=config.queue.max_bytes or self._settings.queue_bytes,
            queue_s=math.inf if config.queue.max_rows else self._settings.queue_ms / 1000,
            least_rows=LEAST_QUEUE_ROWS * row_load,
            delay_s=config.batching.max_delay_ms / 1000,
            # Rows of one size are bounded by their number.
            batch_bytes=math.inf if cost is None else max(BATCH_BYTES, plan.max_rows * plan.row_bytes),
        )
        return Pool(
            key,
            limits,
            LatencyModel((*_smaller_rows(plan), *plan.table)),
            self._outbox,
            self._metrics,
            self._clock,
            batched=plan.batched,
            padding=padding,
            max_joined_bytes=self._settings.in_flight_bytes,
            buckets=copies.buckets,
            audit=Audit(_comparison(copies.models[0][1])) if plan.evidence is Evidence.RUNS else None,
            forget_plan=forget_plan,
            watcher=self._watcher,
            accounts=self._accounts,
        )


def _comparison(model: LoadedModel) -> Compare:
    """How audits compare two answers of `model`: as the check at load does."""
    tables = ListsAsTables(model)

    def compare(answer: Tensors, alone: Tensors, others: Sequence[Tensors]) -> Reason | None:
        answer, alone, *others = map(tables.as_tables, (answer, alone, *others))
        return compare_answers(tables.signature, answer, alone, others, tables.rounding)

    return compare


def _smaller_rows(plan: Plan) -> list[Measurement]:
    """The times of rows that cost less than those that batches were measured with."""
    if plan.row_cost is None or not plan.table:
        return []
    own = plan.table[0].seconds
    return [
        Measurement(point.load, point.load * own, TRUST) for point in plan.row_cost.points if point.load < 1
    ]
