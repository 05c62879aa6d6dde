"""Judges whether a server can answer, by the states of its versions and of their instances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from inferpool.errors import Reason
from inferpool.pool.ports import VersionKey
from inferpool.pool.stats import InstanceState, hung_reason
from inferpool.repository.catalog import FAILED, LOADING, READY, Health, LiveView, ModelView

PATIENCE_S: Final = 120.0
"""A load that takes longer than this many seconds does not keep the server from being ready.

Models that the setting `required_models` names are waited for, however long they take to load.
"""


def judge(
    models: Mapping[str, ModelView],
    live: Callable[[VersionKey], LiveView],
    required_models: Collection[str],
    *,
    draining: bool,
    faults: Callable[[VersionKey], tuple[Reason | None, bool]] = lambda key: (None, True),
) -> Health:
    """Whether every required model can answer, and the problems there are.

    `faults` tells what is wrong with the engine of a version (None if nothing is), and whether the version
    can answer all the same.
    """
    problems: dict[str, str] = {}
    loading: set[str] = set()
    late: set[str] = set()
    answering: set[str] = set()
    for model in models.values():
        if model.label_fault is not None:
            problems[model.name] = model.label_fault
        for version in model.versions.values():
            name = f"{model.name}/{version.key.version}"
            if version.state == READY:
                fault, reachable = faults(version.key)
                instances = live(version.key).instances
                ready = sum(instance.state == "ready" for instance in instances)
                problem = fault or _instance_problem(instances)
                if problem is not None:
                    problems[name] = problem
                if reachable and (ready or fault is not None):
                    answering.add(model.name)
            elif version.state == LOADING and not version.beside:
                for_s = live(version.key).loading_s
                (loading if for_s < PATIENCE_S else late).add(model.name)
                problems[name] = f"loading for {for_s:.0f} s"
            elif version.state == FAILED:
                problems[name] = version.reason or version.state
    required = set(required_models)
    if required:
        loading |= late & required
    else:
        served = (
            name for name, model in models.items()
            if any(version.state == READY for version in model.versions.values())
        )  # fmt: skip
        required = {*served, *loading}
    problems.update(dict.fromkeys(required - set(models), "required, but not in the repository"))
    is_ready = bool(answering) and required <= answering - loading and not draining
    if draining:
        return Health(False, "draining", problems)
    if is_ready:
        return Health(True, "degraded" if problems else "ok", problems)
    return Health(False, "loading" if loading or late or not models else "unavailable", problems)


def _instance_problem(instances: Sequence[InstanceState]) -> Reason | None:
    """What is wrong with some of the instances; None if all are ready."""
    states = Counter(instance.state for instance in instances)
    problems = [
        f"{count} of {len(instances)} instances are {state}"
        for state, count in states.items()
        if state not in ("ready", "hung")
    ]
    return "; ".join(filter(None, (*problems, hung_reason(instances)))) or None
