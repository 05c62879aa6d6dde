"""What a repository in an engine takes, tells and publishes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from inferpool.engine.catalog_merge import EngineFacts
from inferpool.engine.catalog_parcel import unpack
from inferpool.engine.catalog_store import CatalogStore
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import FAILED, LOADING, READY
from inferpool.repository.catalog_publisher import CatalogPublisher, answer_ask
from inferpool.repository.remote_catalog import RemoteCatalog
from inferpool.repository.repository import Repository
from inferpool.settings import Settings

from tests.conftest import ROOT, MakeChaos
from tests.server import CHAOS

A1, A2, B1 = VersionKey("a", 1), VersionKey("a", 2), VersionKey("b", 1)


class Engine:
    """The catalog's side of an engine: a repository, and everything that it tells."""

    def __init__(self, path: Path, cache: Path, **options: Any) -> None:
        self.told: list[VersionKey | str] = []
        settings = Settings(cache_dir=cache, measure_ms=50, devices=("cpu",))
        self.repository = Repository(
            path, settings, ResultDispatcher(), Metrics({}), time.monotonic,
            on_loading=self.told.append, on_change=lambda: self.told.append("change"), **options,
        )  # fmt: skip
        self.publisher = CatalogPublisher(self.repository)

    def publish(self, store: CatalogStore) -> Mapping[str, bytes]:
        """Send the catalog to the supervisor; returns the files that were sent with it."""
        descriptor = self.publisher.pack()
        parcel = unpack(descriptor)
        os.close(descriptor)
        store.take("cpu", *parcel)
        return parcel.files

    async def ask(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(json.loads(json.dumps(answer_ask(self.repository, question), allow_nan=False)))

    def close(self) -> None:
        assert self.repository.drain(10)
        self.repository.close()


@pytest.fixture(autouse=True)
def chaos_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the backend of `make_chaos`."""
    monkeypatch.syspath_prepend(str(CHAOS))


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def folder(make_chaos: MakeChaos) -> Path:
    """A repository with two versions of `a`, and `b`."""
    make_chaos("a", "[versions]\nlabels = {stable = 1}\n")
    path = make_chaos("b")
    (path / "a" / "2").mkdir()
    (path / "a" / "2" / "model.chaos").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("only", "skip", "taken"),
    [
        (None, (), [A1, A2, B1]),
        (None, (A2,), [A1, B1]),
        (None, (A1, A2), [B1]),
        ((A1, B1), (), [A1, B1]),
        ((A1, B1), (A1,), [B1]),
        ((A2,), (), [A2]),
        ((), (), []),
    ],
)
def test_an_engine_shows_and_loads_the_versions_that_it_takes(
    folder: Path,
    tmp_path: Path,
    engines: list[Engine],
    only: Collection[VersionKey] | None,
    skip: Collection[VersionKey],
    taken: list[VersionKey],
) -> None:
    engine = Engine(folder, tmp_path / "cache", only=only, skip=skip)
    engines.append(engine)

    def shown() -> dict[VersionKey, str]:
        models = engine.repository.models().values()
        return {view.key: view.state for model in models for view in model.versions.values()}

    assert shown() == dict.fromkeys(taken, LOADING)
    engine.repository.load_now()
    assert shown() == dict.fromkeys(taken, READY)
    # The newest version loads first.
    in_turn = sorted(taken, key=lambda key: (key.model, -key.version))
    assert engine.told == [told for key in in_turn for told in (key, "change")]
    if A1 in taken:
        assert engine.repository.models()["a"].labels == {"stable": 1}


def test_a_web_process_has_the_catalog_of_the_engine(
    folder: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    engine = Engine(folder, tmp_path / "cache")
    engines.append(engine)
    store, catalog = CatalogStore(), RemoteCatalog(time.monotonic)

    def pass_on() -> None:
        engine.publish(store)
        news = store.news_for("web")
        assert news is not None
        catalog.update(*news)

    store.set_engine("cpu", EngineFacts(os.getpid(), 0, True))
    pass_on()
    assert catalog.models() == engine.repository.models()
    assert not catalog.health().ready
    engine.repository.load_now()
    pass_on()
    assert catalog.models() == engine.repository.models()
    catalog.engine_up("cpu", engine.ask)
    asyncio.run(catalog.refresh())
    for key in (A1, A2, B1):
        own, remote = engine.repository.live(key), catalog.live(key)
        assert list(remote.instances) == list(own.instances)
        assert list(remote.latency) == list(own.latency)
    assert catalog.health() == engine.repository.health()


def test_the_files_of_codecs_are_sent_once_as_they_were_loaded(
    tmp_path: Path, engines: list[Engine], models: Path
) -> None:
    engine = Engine(models / "digits", tmp_path / "cache")
    engines.append(engine)
    store = CatalogStore()
    store.set_engine("cpu", EngineFacts(os.getpid(), 0, True))
    assert not engine.publish(store)
    engine.repository.load_now()
    labels = (ROOT / "models" / "digits" / "labels.txt").read_bytes()
    assert list(engine.publish(store).values()) == [labels]
    assert not engine.publish(store)
    news = store.news_for("web")
    assert news is not None
    catalog = RemoteCatalog(time.monotonic)
    catalog.update(*news)
    [view] = catalog.models()["digits"].versions.values()
    [own] = engine.repository.models()["digits"].versions.values()
    assert view.classes is not None
    assert own.classes is not None
    assert view.classes.names == own.classes.names
    assert (view.image is None) == (own.image is None)


def test_a_successor_loads_by_the_plans_of_the_engine_before(
    folder: Path, tmp_path: Path, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_folder = tmp_path / "a file"
    no_folder.touch()
    first = Engine(folder, no_folder)
    engines.append(first)
    first.repository.load_now()
    store = CatalogStore()
    first.publish(store)
    # Both versions of `a` have one content, and `b` is another model.
    kinds = sorted(Path(name).suffix for name in store.plans)
    assert kinds == [".json", ".json", ".threads", ".threads"]

    def measure(*arguments: object) -> None:
        raise AssertionError("a version is measured again")

    monkeypatch.setattr("inferpool.repository.load.planner.Planner.make", measure)
    second = Engine(folder, no_folder, plans=store.plans)
    engines.append(second)
    second.repository.load_now()
    states = {view.state for model in second.repository.models().values() for view in model.versions.values()}
    assert states == {READY}
    second.publish(store)
    assert sorted(Path(name).suffix for name in store.plans) == kinds


def test_a_successor_serves_what_was_served_whatever_has_become_of_the_folder(
    folder: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    """It takes no new version, not even in place of the latest, and one that is gone has failed."""
    config = folder / "a" / "model.toml"
    config.write_text('[versions]\nserve = "latest"\n')
    (folder / "a" / "3").mkdir()
    (folder / "a" / "3" / "model.chaos").write_text("{}")
    shutil.rmtree(folder / "b")
    engine = Engine(folder, tmp_path / "cache", only=[A2, B1])
    engines.append(engine)
    engine.repository.load_now()
    models = engine.repository.models()
    assert {number: view.state for number, view in models["a"].versions.items()} == {2: READY}
    [gone] = models["b"].versions.values()
    assert (gone.state, gone.reason) == (FAILED, f"b/1 is no longer in {folder}")


def test_a_successor_starts_even_if_no_model_is_left(
    folder: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    shutil.rmtree(folder)
    engine = Engine(folder, tmp_path / "cache", only=[A1, A2])
    engines.append(engine)
    [model] = engine.repository.models().values()
    assert {view.reason for view in model.versions.values()} == {
        f"a/1 is no longer in {folder}", f"a/2 is no longer in {folder}",
    }  # fmt: skip
