"""The catalogs of several engines become one."""

from __future__ import annotations

from typing import Any

import pytest
from inferpool.engine.catalog_merge import EngineFacts
from inferpool.engine.catalog_store import CatalogStore

UP = EngineFacts(7, 0, True)
DOWN = EngineFacts(0, 1, False)


def view(state: str = "ready", **own: Any) -> dict[str, Any]:
    return {"state": state, "reason": "", "labels": [], "codecs": None, **own}


def report(**models: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A catalog of an engine: `report(m={1: view()})`."""
    return {
        "models": {
            name: {
                "description": name,
                "labels": {},
                "label_fault": None,
                "versions": {str(number): {**sent, "key": [name, number]} for number, sent in views.items()},
            }
            for name, views in models.items()
        }
    }


@pytest.fixture
def store() -> CatalogStore:
    """A store with an engine that has two models, of which `m` has two versions."""
    made = CatalogStore()
    made.set_engine("cpu", UP)
    made.take("cpu", report(m={1: view(), 2: view("loading")}, n={1: view("failed", reason="bad")}), {})
    return made


def shown(store: CatalogStore, model: str, version: int) -> tuple[str, str | None, bool]:
    found = store.catalog["models"][model]["versions"][str(version)]
    return found["state"], found["engine"], found["reloading"]


def test_what_one_engine_shows_is_shown(store: CatalogStore) -> None:
    assert shown(store, "m", 1) == ("ready", "cpu", False)
    assert shown(store, "m", 2) == ("loading", "cpu", False)
    assert shown(store, "n", 1) == ("failed", "cpu", False)
    assert store.catalog["engines"] == {"cpu": {"pid": 7, "restarts": 0, "up": True, "parent": None}}
    assert store.versions() == [("m", 1), ("m", 2), ("n", 1)]
    assert store.versions("loading", "failed") == [("m", 2), ("n", 1)]


def test_versions_of_one_model_come_from_several_engines(store: CatalogStore) -> None:
    store.set_engine("cuda:0", UP)
    store.take("cuda:0", report(m={3: view()}, o={1: view()}), {})
    assert list(store.catalog["models"]) == ["m", "n", "o"]
    assert list(store.catalog["models"]["m"]["versions"]) == ["1", "2", "3"]
    assert shown(store, "m", 1) == ("ready", "cpu", False)
    assert shown(store, "m", 3) == ("ready", "cuda:0", False)


def test_a_version_that_moves_is_shown_where_it_goes_as_soon_as_its_engine_has_ended(
    store: CatalogStore,
) -> None:
    store.move(("m", 1), "cpu", "m/1")
    assert shown(store, "m", 1) == ("ready", "cpu", False)
    store.set_engine("cpu", DOWN)
    assert shown(store, "m", 1) == ("ready", "m/1", True)
    store.set_engine("m/1", UP)
    assert shown(store, "m", 1) == ("ready", "m/1", True)
    store.take("m/1", report(m={1: view()}), {})
    assert shown(store, "m", 1) == ("ready", "m/1", False)


def test_while_an_engine_is_restarted_its_versions_stay_ready(store: CatalogStore) -> None:
    store.set_engine("cpu", DOWN)
    assert shown(store, "m", 1) == ("ready", "cpu", True)
    assert shown(store, "m", 2) == ("loading", "cpu", False)
    store.set_engine("cpu", EngineFacts(8, 1, True))
    assert shown(store, "m", 1) == ("ready", "cpu", True)
    store.take("cpu", report(m={1: view("loading"), 2: view("loading")}), {})
    assert shown(store, "m", 1) == ("ready", "cpu", True)
    assert shown(store, "n", 1) == ("failed", "cpu", False)
    store.take("cpu", report(m={1: view(load_s=2.0), 2: view()}), {})
    assert shown(store, "m", 1) == ("ready", "cpu", False)
    assert shown(store, "m", 2) == ("ready", "cpu", False)


def test_a_version_whose_engine_ends_while_it_is_unloaded_is_unloaded(store: CatalogStore) -> None:
    job = {
        "id": "1",
        "kind": "unload",
        "state": "running",
        "created": 1,
        "model": "m",
        "versions": [1],
        "ended": 0,
    }
    store.take("cpu", {**report(m={1: view("draining"), 2: view()}), "jobs": [job]}, {})
    assert shown(store, "m", 1) == ("draining", "cpu", False)
    store.set_engine("cpu", DOWN)
    assert shown(store, "m", 1) == ("unloaded", "cpu", False)
    assert ("m", 1) not in store.versions("ready", "loading", "failed")
    assert [each["state"] for each in store.catalog["jobs"]] == ["done"]
    store.set_engine("cpu", UP)
    store.take("cpu", report(m={2: view()}), {})
    assert shown(store, "m", 1) == ("unloaded", "cpu", False)


def test_a_version_that_does_not_load_again_has_failed(store: CatalogStore) -> None:
    store.set_engine("cpu", DOWN)
    store.set_engine("cpu", UP)
    store.take("cpu", report(m={1: view("failed", reason="gone")}), {})
    assert shown(store, "m", 1) == ("failed", "cpu", False)


def test_a_version_moves_to_an_engine_of_its_own(store: CatalogStore) -> None:
    store.set_engine("cpu", DOWN)
    store.set_engine("cpu", UP)
    store.take("cpu", report(m={2: view()}), {})  # it was told to skip version 1
    store.set_engine("m/1", UP)
    assert shown(store, "m", 1)[::2] == ("ready", True)
    store.take("m/1", report(m={1: view("loading")}), {})
    assert shown(store, "m", 1) == ("ready", "m/1", True)
    store.take("m/1", report(m={1: view()}), {})
    assert shown(store, "m", 1) == ("ready", "m/1", False)


def test_of_two_engines_with_a_version_the_one_that_can_answer_counts(store: CatalogStore) -> None:
    store.set_engine("m/2", UP)
    store.take("m/2", report(m={2: view()}), {})
    assert shown(store, "m", 2) == ("ready", "m/2", False)
    store.remove_engine("m/2")
    assert shown(store, "m", 2) == ("ready", "cpu", True)


def test_a_version_that_the_supervisor_fails_has_failed_whatever_engines_say(store: CatalogStore) -> None:
    store.fail(("m", 1), "it has crashed its engine 4 times in 10 minutes", "cpu")
    found = store.catalog["models"]["m"]["versions"]["1"]
    assert (found["state"], found["reason"]) == ("failed", "it has crashed its engine 4 times in 10 minutes")
    store.take("cpu", report(m={1: view(), 2: view()}), {})
    assert shown(store, "m", 1) == ("failed", None, False)


def engines_of(store: CatalogStore, version: int = 1) -> tuple[list[str], list[str], dict[str, str]]:
    found = store.catalog["models"]["m"]["versions"][str(version)]
    return found["engines"], found["absent"], found["faults"]


@pytest.fixture
def two() -> CatalogStore:
    """A store with two engines that have the same version."""
    made = CatalogStore()
    for engine in ("cuda:0", "cuda:1"):
        made.set_engine(engine, UP)
        made.take(engine, report(m={1: view()}), {})
    return made


def test_a_version_in_two_engines_is_ready_while_either_is(two: CatalogStore) -> None:
    assert engines_of(two) == (["cuda:0", "cuda:1"], [], {})
    two.set_engine("cuda:0", DOWN)
    assert shown(two, "m", 1) == ("ready", "cuda:1", False)
    assert engines_of(two) == (["cuda:1", "cuda:0"], ["cuda:0"], {})
    two.set_engine("cuda:0", EngineFacts(9, 1, True))
    two.take("cuda:0", report(m={1: view("loading")}), {})
    assert engines_of(two) == (["cuda:1", "cuda:0"], ["cuda:0"], {})
    two.set_engine("cuda:1", DOWN)
    assert shown(two, "m", 1)[::2] == ("ready", True)
    two.take("cuda:0", report(m={1: view()}), {})
    assert engines_of(two) == (["cuda:0", "cuda:1"], ["cuda:1"], {})


def test_a_version_that_fails_in_one_engine_goes_on_in_the_other(two: CatalogStore) -> None:
    two.take("cuda:0", report(m={1: view("failed", reason="out of memory")}), {})
    assert shown(two, "m", 1) == ("ready", "cuda:1", False)
    assert engines_of(two) == (["cuda:1"], [], {"cuda:0": "out of memory"})
    two.fail(("m", 1), "it crashes", "cuda:1")
    assert shown(two, "m", 1) == ("failed", None, False)


def test_a_version_that_one_engine_loads_first_is_ready_at_once(two: CatalogStore) -> None:
    two.take("cuda:0", report(m={1: view(), 2: view("loading")}), {})
    two.take("cuda:1", report(m={1: view(), 2: view("loading")}), {})
    assert shown(two, "m", 2)[0] == "loading"
    two.take("cuda:1", report(m={1: view(), 2: view()}), {})
    assert shown(two, "m", 2) == ("ready", "cuda:1", False)
    assert engines_of(two, 2) == (["cuda:1"], [], {})


def test_an_engine_whose_part_of_a_version_moves_loses_only_that(two: CatalogStore) -> None:
    two.set_engine("m/1", UP._replace(parent="cuda:0"))
    two.move(("m", 1), "cuda:0", "m/1")
    two.take("m/1", report(m={1: view()}), {})
    assert engines_of(two) == (["cuda:1", "m/1"], [], {})


def test_jobs_of_one_id_are_one_job(two: CatalogStore) -> None:
    def states(*of_engines: str) -> list[tuple[str, str]]:
        for engine, state in zip(("cuda:0", "cuda:1"), of_engines, strict=True):
            job = {"id": "1", "kind": "load", "state": state, "created": 1, "model": "m", "versions": [1],
                   "ended": 0, "reason": "bad" if state == "failed" else ""}  # fmt: skip
            two.take(engine, {**report(m={1: view()}), "jobs": [job]}, {})
        return [(job["state"], job["reason"]) for job in two.catalog["jobs"]]

    assert states("done", "running") == [("running", "")]
    assert states("failed", "running") == [("running", "")]
    assert states("failed", "done") == [("failed", "bad")]
    assert states("done", "elsewhere") == [("done", "")]
    assert states("elsewhere", "elsewhere") == [("done", "")]  # the version is ready in a third engine


def test_a_version_whose_engine_ends_while_it_fetches_has_not_come(store: CatalogStore) -> None:
    job = {"id": "1", "kind": "load", "state": "running", "created": 1, "model": "m", "versions": [],
           "ended": 0, "reason": "", "fetching": True}  # fmt: skip
    store.take("cpu", {**report(m={1: view()}), "jobs": [job]}, {})
    store.set_engine("cpu", DOWN)
    (ended,) = store.catalog["jobs"]
    assert (ended["state"], ended["fetching"]) == ("failed", False)
    assert "load it again" in ended["reason"]


def test_the_oldest_engine_decides_about_labels(two: CatalogStore) -> None:
    told = report(m={1: view()})
    two.take("cuda:0", {**told, "moves": {"m": {"stable": (1, None)}}}, {})
    two.take("cuda:1", {**told, "moves": {"m": {"stable": (2, None)}}}, {})
    assert two.moves == {"m": {"stable": (1, None)}}
    two.set_engine("cuda:0", DOWN)
    two.take("cuda:1", {**told, "moves": {"m": {"stable": (2, None)}}}, {})
    assert two.moves == {"m": {"stable": (2, None)}}
