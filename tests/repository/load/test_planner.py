"""The planner chooses batch sizes, instances and threads by measuring; remedies for batching that is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inferpool.backends.base import LoadedModel
from inferpool.repository.load.batching_remedies import Obstacle, find_remedy
from inferpool.repository.load.plan import Plan, PlanConstraints
from inferpool.repository.load.planner import Planner

from tests.repository.load.function_model import Clock, FunctionModel


def plan_of(model: LoadedModel, clock: Callable[[], float] = time.perf_counter, **constraints: Any) -> Plan:
    fields: dict[str, Any] = {"cores": 1, "budget_s": 0.3} | constraints
    return Planner(lambda threads: model, PlanConstraints(**fields), clock).make(model)


def test_on_a_gpu_instances_are_copies_that_were_measured_with_one_thread_each() -> None:
    """One copy of a model on a GPU never runs on two threads, so another instance is another copy."""
    loads: list[int] = []
    made: list[FunctionModel] = []

    def sleeps(x: np.ndarray) -> np.ndarray:
        time.sleep(0.002)
        return x

    def load(threads: int) -> LoadedModel:
        loads.append(threads)
        made.append(FunctionModel(sleeps))
        return made[-1]

    constraints = PlanConstraints(cores=8, budget_s=0.5, max_rows=4, gpu=True)
    plan = Planner(load, constraints, time.perf_counter).make(FunctionModel(sleeps))
    assert (plan.instances, plan.threads, loads) == (2, 1, [1])


@pytest.mark.parametrize(
    ("backend", "form", "remedy"),
    [
        ("onnx", "", '"x" open: torch.onnx.export(…, dynamic_shapes=({0: torch.export.Dim("rows")},))'),
        (
            "torch",
            "exported program",
            '"x" open: torch.export.export(…, dynamic_shapes=({0: torch.export.Dim("rows")},))',
        ),
        ("torch", "TorchScript (deprecated by PyTorch)", 'below [[inputs]] of "x", let shape begin with -1'),
        ("chaos", "", 'leave the first dimension of "x" open'),
    ],
)
def test_the_remedy_of_a_fixed_number_of_rows_depends_on_the_file(
    backend: str, form: str, remedy: str
) -> None:
    line = find_remedy(Obstacle.FIXED_ROWS, "x", is_input=True, backend=backend, form=form)
    assert remedy in line
    of_output = find_remedy(Obstacle.FIXED_ROWS, "y", is_input=False, backend=backend, form=form)
    assert "take the number of rows from the input" in of_output


@pytest.mark.parametrize("obstacle", list(Obstacle))
def test_every_obstacle_has_a_remedy(obstacle: Obstacle) -> None:
    assert find_remedy(obstacle, "x", is_input=True, backend="onnx", form="")


def test_the_batch_limit_is_reached_when_more_rows_stop_paying() -> None:
    clock = Clock()

    def per_row(x: np.ndarray) -> np.ndarray:
        clock.advance(0.01 * len(x))
        return x

    def per_run(x: np.ndarray) -> np.ndarray:
        clock.advance(0.005)
        return x

    assert plan_of(FunctionModel(per_row), clock).max_rows == 1
    assert plan_of(FunctionModel(per_run), clock, budget_s=2.0).max_rows == 256
    assert plan_of(FunctionModel(per_row), clock, max_rows=5).max_rows == 5
    assert plan_of(FunctionModel(per_run), clock, batching=False).max_rows == 1


def test_a_difference_that_only_larger_batches_show_is_found_while_measuring() -> None:
    clock = Clock()

    def from_32_on(x: np.ndarray) -> np.ndarray:
        clock.advance(0.0005)
        return x if len(x) < 32 else x - x.mean(axis=0)

    plan = plan_of(FunctionModel(from_32_on), clock)
    assert not plan.batched
    assert "when 32 rows run together" in plan.reason
    assert plan.max_rows == 1
    assert plan.fault is not None
    assert plan.fault.obstacle is Obstacle.ROWS_MIXED


def test_a_model_that_raises_on_several_rows_still_gets_a_plan() -> None:
    clock = Clock()

    def only_one(x: np.ndarray) -> np.ndarray:
        if len(x) > 1:
            raise ValueError("one row at a time")
        return x

    plan = plan_of(FunctionModel(only_one))
    assert not plan.batched
    assert "one row at a time" in plan.reason

    def few(x: np.ndarray) -> np.ndarray:
        clock.advance(0.001)
        if len(x) > 12:
            raise MemoryError
        return x

    assert plan_of(FunctionModel(few), clock).max_rows == 8


def test_more_instances_are_chosen_if_they_raise_the_rate() -> None:
    def sleeps(x: np.ndarray) -> np.ndarray:
        time.sleep(0.005)  # as a run without the GIL: two at a time take no longer
        return x

    plan = plan_of(FunctionModel(sleeps), cores=2, max_rows=1)
    assert (plan.instances, plan.threads) == (2, 1)
    assert (plan_of(FunctionModel(lambda x: x), cores=2).instances) == 1
    asked = plan_of(FunctionModel(sleeps), cores=2, instances=3, threads=1)
    assert (asked.instances, asked.threads) == (3, 1)


def test_threads_and_instances_that_give_other_answers_are_not_taken() -> None:
    """The plan gives the answers that were proven, with the threads and instances that it chooses."""

    def sleeps(x: np.ndarray) -> np.ndarray:
        time.sleep(0.004)
        return x

    def hurried(x: np.ndarray) -> np.ndarray:
        time.sleep(0.001)
        return x + len(x)

    def plan_with(**constraints: Any) -> Plan:
        chosen = PlanConstraints(cores=2, budget_s=0.5, max_rows=4, **constraints)
        return Planner(lambda threads: FunctionModel(hurried), chosen, time.perf_counter).make(
            FunctionModel(sleeps)
        )

    assert plan_with().threads == 1
    asked = plan_with(threads=2)
    assert not asked.batched
    assert "threads run at the same time" in asked.reason


def test_the_batch_limit_of_model_toml_is_checked_too() -> None:
    def from_9_on(x: np.ndarray) -> np.ndarray:
        return x if len(x) < 9 else x[::-1]

    assert not plan_of(FunctionModel(from_9_on), max_rows=12).batched
    assert plan_of(FunctionModel(from_9_on), max_rows=7).max_rows == 7
    unmeasured = plan_of(FunctionModel(from_9_on), budget_s=0.0)
    assert not unmeasured.batched
