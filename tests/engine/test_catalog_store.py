"""What the supervisor keeps of the catalogs of engines, and whom it sends what."""

from __future__ import annotations

from typing import Any

import pytest
from inferpool.engine.catalog_merge import EngineFacts, file_digests
from inferpool.engine.catalog_store import CatalogStore

from tests.engine.test_catalog_merge import report, view

UP = EngineFacts(7, 0, True)
DOWN = EngineFacts(0, 1, False)


def codecs(tokenizer: str = "", names: str = "", **table: Any) -> dict[str, Any]:
    return {"text": table, "tokenizer": tokenizer, "names": names}


@pytest.fixture
def store() -> CatalogStore:
    """A store with an engine."""
    made = CatalogStore()
    made.set_engine("cpu", UP)
    return made


def test_a_web_process_is_sent_what_it_lacks(store: CatalogStore) -> None:
    one, two = view(codecs=codecs("t1", "n1")), view(codecs=codecs("t1", "n2"))
    store.take("cpu", report(m={1: one, 2: view("loading")}), {"t1": b"tokens", "n1": b"names"})
    news = store.news_for("web")
    assert news == (store.catalog, {"t1": b"tokens", "n1": b"names"})
    assert store.news_for("web") is None
    store.take("cpu", report(m={1: one, 2: two}), {"n2": b"others"})
    assert store.news_for("web") == (store.catalog, {"t1": b"tokens", "n2": b"others"})
    store.forget_web("web")
    assert store.news_for("web") == (store.catalog, {"t1": b"tokens", "n1": b"names", "n2": b"others"})


def test_files_outlive_the_engine_that_read_them(store: CatalogStore) -> None:
    store.take("cpu", report(m={1: view(codecs=codecs("t1"))}), {"t1": b"tokens"})
    store.set_engine("cpu", DOWN)
    store.take("cpu", report(m={1: view("loading")}), {})
    assert store.news_for("new web") == (store.catalog, {"t1": b"tokens"})


def test_files_are_kept_while_a_version_is_failed_and_dropped_with_their_codecs(store: CatalogStore) -> None:
    store.take("cpu", report(m={1: view(codecs=codecs("t1"))}), {"t1": b"tokens"})
    store.take("cpu", report(m={1: view(codecs=codecs("t2"))}), {"t2": b"others"})
    assert file_digests(store.catalog) == ["t2"]
    assert store.news_for("web") == (store.catalog, {"t2": b"others"})


def test_a_successor_loads_what_its_engine_had_or_loaded_and_nothing_of_another_device(
    store: CatalogStore,
) -> None:
    for engine in ("cuda:0", "cuda:1"):
        store.set_engine(engine, UP)
    store.take("cuda:0", report(m={1: view(), 2: view()}, n={1: view()}), {})
    store.take("cuda:1", report(m={1: view(), 2: view("loading")}), {})
    assert store.versions_for("cuda:1") == [("m", 1), ("m", 2), ("n", 1)]
    store.set_engine("cuda:1", DOWN)
    assert store.versions_for("cuda:1") == [("m", 1), ("m", 2)]
