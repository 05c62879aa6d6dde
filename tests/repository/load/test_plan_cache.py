"""Plans are kept between starts with everything that they say."""

from __future__ import annotations

from dataclasses import replace
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


def test_plans_that_no_folder_keeps_serve_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "a file"
    folder.touch()
    target = folder / "plan.json"
    cache = PlanCache(folder)
    cache.keep(target, PLAN)
    assert PlanCache(folder).find(target) is None
    assert PlanCache(folder, plans=cache.plans()).find(target) == PLAN
    assert PlanCache(folder, plans=cache.plans(), remeasure=True).find(target) is None


def test_a_plan_that_was_found_is_passed_on_until_it_is_dropped(tmp_path: Path) -> None:
    PlanCache(tmp_path).keep(tmp_path / "plan.json", PLAN)
    drops: list[None] = []
    cache = PlanCache(tmp_path, on_drop=lambda: drops.append(None))
    assert cache.find(tmp_path / "plan.json") == PLAN
    assert PlanCache(plans=cache.plans()).find(Path("plan.json")) == PLAN
    cache.drop(tmp_path / "plan.json")
    assert drops == [None]
    assert not cache.plans()


def test_a_folder_that_is_only_read_has_plans_until_they_are_dropped(tmp_path: Path) -> None:
    """The plans of an image serve a container with an empty cache; a wrong one does not come back."""
    seeded, folder = tmp_path / "image", tmp_path / "cache"
    target = folder / "plan.json"
    PlanCache(seeded).keep(seeded / "plan.json", PLAN)
    cache = PlanCache(folder, seeded)
    assert cache.find(target) == PLAN
    cache.drop(target)
    assert cache.find(target) is None
    # An engine that is started later knows of it.
    assert PlanCache(folder, seeded, plans=cache.plans()).find(target) is None
    assert (seeded / "plan.json").exists()
    newer = replace(PLAN, max_rows=4)
    PlanCache(folder, seeded).keep(target, newer)
    assert PlanCache(folder, seeded).find(target) == newer


def test_the_threads_of_a_model_are_guessed_before_it_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "m" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    cache = PlanCache(tmp_path / "cache")
    assert cache.guess_threads(file, 4) is None
    cache.keep_threads(file, 4, 3)
    assert PlanCache(tmp_path / "cache").guess_threads(file, 4) == 3
    assert PlanCache(tmp_path / "cache").guess_threads(file, 2) is None
    assert PlanCache(tmp_path / "cache", remeasure=True).guess_threads(file, 4) is None
    file.write_bytes(b"another")
    assert PlanCache(tmp_path / "cache").guess_threads(file, 4) is None
