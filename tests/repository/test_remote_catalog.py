"""The catalog of a web process: what it shows of what the supervisor and the engines tell."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.engine.catalog_merge import EngineFacts
from inferpool.engine.catalog_parcel import pack, unpack
from inferpool.engine.catalog_store import CatalogStore
from inferpool.errors import ModelNotFound, NotReady
from inferpool.pool.ports import VersionKey
from inferpool.pool.stats import InstanceState
from inferpool.repository import remote_catalog
from inferpool.repository.catalog import (
    FAILED,
    LOADING,
    READY,
    EngineView,
    LiveView,
    ModelView,
    VersionView,
    find_ready,
)
from inferpool.repository.catalog_json import live_json, model_json, source_files
from inferpool.repository.codec_factory import CodecSource, make_codecs, read_codec_source
from inferpool.repository.config import read_config
from inferpool.repository.health import PATIENCE_S
from inferpool.repository.remote_catalog import NOT_ANSWERING, RESTARTING, SILENT_S, RemoteCatalog
from inferpool.tensors import Signature, TensorSpec

from tests.conftest import ROOT

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),))
KEY = VersionKey("m", 1)
UP = EngineFacts(7, 0, True)
DOWN = EngineFacts(0, 1, False)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Server:
    """A supervisor's store and a web process's catalog, and what passes between them."""

    def __init__(self, required: tuple[str, ...] = ()) -> None:
        self.clock = Clock()
        self.store = CatalogStore()
        self.catalog = RemoteCatalog(self.clock, required)

    def engine(
        self, name: str, facts: EngineFacts, live: Mapping[VersionKey, LiveView] | None = None
    ) -> None:
        """Tell the store and the catalog of an engine; `live` is what it answers, None that it is silent."""
        self.store.set_engine(name, facts)
        if facts.up:
            self.catalog.engine_up(name, answering(live))
        else:
            self.catalog.engine_down(name)
        self.push()

    def take(
        self, name: str, *views: VersionView, sources: Mapping[VersionKey, CodecSource] | None = None
    ) -> None:
        """Let an engine show these versions."""
        models: dict[str, ModelView] = {}
        for view in views:
            versions = {**models[view.key.model].versions} if view.key.model in models else {}
            versions[view.key.version] = view
            models[view.key.model] = ModelView(view.key.model, "", versions, {})
        sources = sources or {}
        sent = {"models": {name: model_json(model, sources) for name, model in models.items()}}
        files = {key: text for source in sources.values() for key, text in source_files(source).items()}
        self.store.take(name, json.loads(json.dumps(sent)), files)
        self.push()

    def push(self) -> None:
        news = self.store.news_for("web")
        if news is not None:
            self.catalog.update(*news)

    def refresh(self) -> None:
        async def refresh() -> None:
            await self.catalog.refresh()

        asyncio.run(refresh())


def answering(
    live: Mapping[VersionKey, LiveView] | None,
) -> Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]:
    async def ask(question: Mapping[str, Any]) -> Mapping[str, Any]:
        assert question == {"live": True}
        if live is None:
            await asyncio.Event().wait()
            raise AssertionError
        sent = {"live": [[*key, live_json(view)] for key, view in live.items()]}
        return dict(json.loads(json.dumps(sent)))

    return ask


def ready(model: str = "m", version: int = 1, **own: Any) -> VersionView:
    return VersionView(VersionKey(model, version), READY, signature=SIGNATURE, **own)


def instances(*states: str, **own: Any) -> LiveView:
    return LiveView(tuple(InstanceState("cpu", state) for state in states), **own)


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_catalog, "ASK_TIMEOUT_S", 0.01)


@pytest.fixture
def server() -> Server:
    """A server whose one engine has one version."""
    made = Server()
    made.engine("cpu", UP, {KEY: instances("ready", "ready", waiting_rows=3)})
    made.take("cpu", ready())
    made.refresh()
    return made


def test_it_shows_what_the_supervisor_and_the_engine_tell(server: Server) -> None:
    assert server.catalog.models() == {"m": ModelView("m", "", {1: ready()}, {})}
    engine = EngineView("cpu", 7, 0)
    assert server.catalog.live(KEY) == instances(
        "ready", "ready", waiting_rows=3, engine=engine, engines=(engine,)
    )
    assert server.catalog.engine_of(KEY) == "cpu"
    health = server.catalog.health()
    assert (health.ready, health.status, dict(health.problems)) == (True, "ok", {})


def test_an_instance_that_is_lost_is_a_problem(server: Server) -> None:
    server.engine("cpu", UP, {KEY: instances("ready", "lost")})
    server.refresh()
    health = server.catalog.health()
    assert (health.ready, health.problems) == (True, {"m/1": "1 of 2 instances are lost"})
    server.engine("cpu", UP, {KEY: instances("lost", "lost")})
    server.refresh()
    health = server.catalog.health()
    assert (health.ready, health.problems) == (False, {"m/1": "2 of 2 instances are lost"})


def test_while_an_engine_is_restarted_its_versions_take_requests_and_are_not_ready(server: Server) -> None:
    models = server.catalog.models()
    for step in (
        lambda: server.engine("cpu", DOWN),
        lambda: server.engine("cpu", UP, {KEY: LiveView(loading_s=1.0)}),
        lambda: server.take("cpu", VersionView(KEY, LOADING)),
    ):
        step()
        server.refresh()
        assert server.catalog.models() is models  # what requests have looked up stays valid
        health = server.catalog.health()
        assert (health.ready, health.problems) == (False, {"m/1": RESTARTING})
        assert {each.state for each in server.catalog.live(KEY).instances} <= {NOT_ANSWERING}
    server.engine("cpu", UP, {KEY: instances("ready")})
    server.take("cpu", ready(load_s=1.0))
    server.refresh()
    assert server.catalog.health().status == "ok"
    assert server.catalog.models()["m"].versions[1].load_s == 1.0


def test_of_two_engines_one_may_be_restarted_or_fail(server: Server) -> None:
    server.engine("cpu-2", UP, {KEY: instances("ready", waiting_rows=2)})
    server.take("cpu-2", ready())
    server.refresh()
    assert server.catalog.engines_of(KEY) == ["cpu", "cpu-2"]
    live = server.catalog.live(KEY)
    assert (len(live.instances), live.waiting_rows, len(live.engines)) == (3, 5, 2)
    assert live.missing == ()
    assert server.catalog.health().status == "ok"
    server.engine("cpu", DOWN)
    server.refresh()
    health = server.catalog.health()
    assert (health.ready, health.problems) == (True, {"m/1": f"cpu: {RESTARTING}"})
    states = [instance.state for instance in server.catalog.live(KEY).instances]
    assert sorted(states) == [NOT_ANSWERING, NOT_ANSWERING, "ready"]
    assert server.catalog.live(KEY).missing == ("cpu",)
    server.engine("cpu", UP, {})
    server.take("cpu", VersionView(KEY, FAILED, "weights.bin has changed"))
    server.refresh()
    health = server.catalog.health()
    assert (health.ready, health.problems) == (True, {"m/1": "cpu: weights.bin has changed"})
    assert server.catalog.engines_of(KEY) == ["cpu-2"]
    assert server.catalog.live(KEY).missing == ("cpu",)
    server.engine("cpu-2", DOWN)
    assert server.catalog.health().ready is False


def test_an_engine_that_does_not_answer_is_a_problem_and_later_not_ready(server: Server) -> None:
    server.engine("cpu", UP, None)
    server.refresh()
    live = server.catalog.live(KEY)
    assert [instance.state for instance in live.instances] == [NOT_ANSWERING, NOT_ANSWERING]
    assert live.waiting_rows == 3
    health = server.catalog.health()
    assert (health.ready, health.status) == (True, "degraded")
    assert health.problems == {"m/1": "its engine has not answered for 0 s"}
    server.clock.now += SILENT_S
    server.refresh()
    health = server.catalog.health()
    assert (health.ready, health.problems) == (False, {"m/1": "its engine has not answered for 5 s"})


def test_a_silent_engine_costs_the_others_nothing(server: Server) -> None:
    server.engine("own", UP, None)
    server.take("own", ready("n"))
    server.engine("cpu", UP, {KEY: instances("ready", waiting_rows=9)})
    server.refresh()
    assert server.catalog.live(KEY).waiting_rows == 9
    assert set(server.catalog.health().problems) == {"n/1"}


def test_a_version_that_has_failed_keeps_others_and_readiness(server: Server) -> None:
    server.take("cpu", ready(), VersionView(VersionKey("n", 1), LOADING))
    assert server.catalog.health().status == "loading"
    server.store.fail(("n", 1), "loading took longer than 10 s", "cpu")
    server.push()
    health = server.catalog.health()
    assert (health.ready, health.problems) == (True, {"n/1": "loading took longer than 10 s"})


def test_readiness_waits_for_a_load_but_not_for_ever(server: Server) -> None:
    def loading(seconds: float) -> None:
        live = {KEY: instances("ready"), VersionKey("n", 1): LiveView(loading_s=seconds)}
        server.engine("cpu", UP, live)
        server.refresh()

    server.take("cpu", ready(), VersionView(VersionKey("n", 1), LOADING))
    loading(PATIENCE_S - 1)
    assert not server.catalog.health().ready
    loading(PATIENCE_S + 1)
    assert server.catalog.health().ready
    assert server.catalog.health().problems == {"n/1": "loading for 121 s"}


@pytest.mark.parametrize("required", [("n",), ("m", "n")])
def test_readiness_waits_for_required_models_however_long(required: tuple[str, ...]) -> None:
    server = Server(required)
    server.engine("cpu", UP, {KEY: instances("ready"), VersionKey("n", 1): LiveView(loading_s=999.0)})
    server.take("cpu", ready(), VersionView(VersionKey("n", 1), LOADING))
    server.refresh()
    assert server.catalog.health().status == "loading"


def test_a_required_model_without_an_engine_is_not_ready() -> None:
    server = Server(("m",))
    server.engine("cpu", UP, {KEY: instances("ready")})
    server.engine("own", UP, {VersionKey("n", 1): instances("ready")})
    server.take("cpu", ready())
    server.take("own", ready("n"))
    server.refresh()
    assert server.catalog.health().ready
    server.engine("own", DOWN)
    assert server.catalog.health().ready
    server.engine("cpu", DOWN)
    assert not server.catalog.health().ready


def test_draining_is_not_ready(server: Server) -> None:
    server.catalog.begin_drain()
    assert (server.catalog.health().ready, server.catalog.health().status) == (False, "draining")


def test_only_what_changed_is_made_again(server: Server) -> None:
    server.take("cpu", ready(), ready("m", 2))
    models = server.catalog.models()
    server.take("cpu", ready(), ready("m", 2, threads=4))
    assert server.catalog.models() is not models
    assert server.catalog.models()["m"].versions[1] is models["m"].versions[1]
    assert server.catalog.models()["m"].versions[2].threads == 4


def source(folder: Path, **own: str) -> CodecSource:
    """The source of a model with labels, in `folder`."""
    folder.mkdir(exist_ok=True)
    for name, text in own.items():
        (folder / name.replace("_", ".")).write_text(text)
    return read_codec_source(read_config(folder / "model.toml"), folder, SIGNATURE)


def test_codecs_are_those_of_the_files_that_were_loaded(server: Server, tmp_path: Path) -> None:
    loaded = source(tmp_path / "m", model_toml="[labels]\ntop_k = 1\n", labels_txt="cat\ndog\n")
    (tmp_path / "m" / "labels.txt").write_text("changed\nsince\n")
    server.take("cpu", ready(), sources={KEY: loaded})
    outputs = {"y": np.array([[0.0, 1.0]], np.float32)}

    def label(catalog: RemoteCatalog) -> object:
        classes = catalog.models()["m"].versions[1].classes
        assert classes is not None
        return classes.predictions(outputs)[0][0]["label"]

    assert label(server.catalog) == "dog"
    # A web process that starts later gets the same, even if no engine is left.
    server.engine("cpu", DOWN)
    news = server.store.news_for("another")
    assert news is not None
    descriptor = pack(*news)
    later = RemoteCatalog(server.clock)
    later.update(*unpack(descriptor))
    assert label(later) == "dog"


def test_equal_codecs_are_made_once(server: Server, tmp_path: Path) -> None:
    loaded = source(tmp_path / "m", model_toml="[labels]\n", labels_txt="cat\ndog\n")
    sources = {KEY: loaded, VersionKey("m", 2): loaded}
    server.take("cpu", ready(), ready("m", 2), sources=sources)
    one, two = server.catalog.models()["m"].versions.values()
    assert one.classes is two.classes is not None
    server.take("cpu", ready(threads=2), ready("m", 2), sources=sources)
    assert server.catalog.models()["m"].versions[1].classes is one.classes


def test_a_picture_is_decoded_as_the_engine_decodes_it(server: Server, tmp_path: Path) -> None:
    spec = TensorSpec("x", "FP32", (-1, 3, 2, 2))
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.toml").write_text("[image]\nmean = [0.1, 0.2, 0.3]\n")
    signature = Signature((spec,), SIGNATURE.outputs)
    loaded = read_codec_source(read_config(folder / "model.toml"), folder, signature)
    for takes_pixels in (False, True):
        kept = CodecSource(loaded.image, None, None, signature, takes_pixels=takes_pixels)
        server.take("cpu", ready(), sources={KEY: kept})
        made, own = server.catalog.models()["m"].versions[1].image, make_codecs(kept, "m").image
        assert made is not None
        assert own is not None
        assert made.pixel_spec == own.pixel_spec
        assert (made.pixel_spec is not None) is takes_pixels


def test_a_version_whose_codecs_cannot_be_made_has_failed_alone(server: Server, tmp_path: Path) -> None:
    loaded = source(tmp_path / "m", model_toml="[labels]\n", labels_txt="one name for two scores\n")
    server.take("cpu", ready(), ready("n"), sources={KEY: loaded})
    versions = server.catalog.models()
    assert versions["m"].versions[1].state == FAILED
    assert "1 names" in versions["m"].versions[1].reason
    assert versions["n"].versions[1].state == READY


def test_no_runtime_is_imported(tmp_path: Path) -> None:
    """Neither for the catalog of a web process, with codecs, nor for the store of the supervisor."""
    web = """
import sys, pathlib
from inferpool.repository.remote_catalog import RemoteCatalog
from inferpool.repository.codec_factory import make_codecs, read_codec_source
from inferpool.repository.config import read_config
from inferpool.tensors import Signature, TensorSpec
folder = pathlib.Path(sys.argv[1])
x, y = (TensorSpec("x", "FP32", (-1, 3, 2, 2)),), (TensorSpec("y", "FP32", (-1, 2)),)
make_codecs(read_codec_source(read_config(folder / "model.toml"), folder, Signature(x, y)), "m")
print(*sorted({"onnxruntime", "torch"} & sys.modules.keys()))
"""
    (tmp_path / "model.toml").write_text("[image]\n[labels]\n")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    supervisor = """
import sys
from inferpool.engine.catalog_store import CatalogStore
from inferpool.engine.catalog_parcel import pack, unpack
print(*sorted({"onnxruntime", "torch", "numpy", "pydantic"} & sys.modules.keys()))
"""
    for code in (web, supervisor):
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == []


def test_before_the_first_catalog_nothing_is_missing_yet() -> None:
    server = Server()
    assert server.catalog.health().status == "loading"
    with pytest.raises(NotReady):
        find_ready(server.catalog, "m", None)
    server.engine("cpu", UP, {})
    server.take("cpu", ready())
    with pytest.raises(ModelNotFound):
        find_ready(server.catalog, "n", None)
