"""Plans are kept between starts with everything that they say."""

from __future__ import annotations

from pathlib import Path

from inferpool.backends.row_verdict import Evidence
from inferpool.pool.latency_model import Measurement
from inferpool.pool.row_cost import CostPoint, RowCost
from inferpool.repository.load.declared_shapes import ShapeCorrections
from inferpool.repository.load.plan import Plan
from inferpool.repository.load.plan_cache import PlanCache

PLAN = Plan(
    True,
    "rows are independent",
    8,
    2,
    1,
    table=(Measurement(1, 0.001, 8), Measurement(8, 0.004, 8)),
    evidence=Evidence.GRAPH,
    row_cost=RowCost((CostPoint(48, 0.001, 1.0), CostPoint(768, 0.016, 16.0)), 0.5),
    row_bytes=192,
    shapes=ShapeCorrections(("size",), (("label", (-1,)), ("open", None))),
)


def test_a_plan_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    cache, target = PlanCache(tmp_path), tmp_path / "plan.json"
    assert cache.find(target) is None
    cache.keep(target, PLAN)
    assert cache.find(target) == PLAN
