"""What administrators ask goes to the engines that it is about, and one answer comes back."""

from __future__ import annotations

from typing import Any

import pytest
from inferpool.engine.admin_relay import ENDED, NOT_UP, AdminRelay
from inferpool.engine.catalog_merge import EngineFacts
from inferpool.engine.catalog_store import CatalogStore
from inferpool.engine.supervised import SupervisedEngine
from inferpool.error_fields import error_fields
from inferpool.errors import NotFound, NotReady

from tests.engine.test_catalog_merge import report, view

NOT_UP_ERROR = error_fields(NotReady(NOT_UP))
NONE_ERROR = error_fields(NotFound("there is none"))


class Channel:
    """The process of an engine and its control socket, as far as the relay uses them."""

    def __init__(self) -> None:
        self.control = self
        self.sent: list[dict[str, Any]] = []

    def send(self, kind: str, values: dict[str, Any], wait: bool = True) -> None:
        assert (kind, wait) == ("admin", False)
        self.sent.append(values)


class Server:
    """Two engines with the model `m`, of which the second one also has `n`."""

    def __init__(self) -> None:
        self.store = CatalogStore()
        self.engines: dict[str, SupervisedEngine] = {}
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.loads: list[tuple[str, int | None]] = []
        self.channels: dict[str, Channel] = {}
        for name in ("cuda:0", "cuda:1"):
            engine = self.engines[name] = SupervisedEngine(name, name)
            engine.child = self.channels[name] = Channel()  # type: ignore[assignment]
            engine.told = True
            self.store.set_engine(name, EngineFacts(1, 0, True))
            more = {"n": {1: view()}} if name == "cuda:1" else {}
            self.store.take(name, report(m={1: view()}, **more), {})
        self.relay = AdminRelay(
            self.store,
            self.engines,
            lambda web, answer: self.answers.append((web, dict(answer))),
            lambda model, version: self.loads.append((model, version)),
        )

    def ask(self, action: str, number: int = 1, **values: Any) -> list[str]:
        """Ask; returns the engines that are asked."""
        asked = {"model": "m", "version": None, "source": None, "action": action, "id": number, **values}
        self.relay.ask(1, asked, draining=False)
        return [name for name, channel in self.channels.items()
                if any(sent["id"] == number for sent in channel.sent)]  # fmt: skip

    def answer(self, engine: str, number: int = 1, **values: Any) -> None:
        self.relay.take_answer(engine, {"web": 1, "id": number, **values})


@pytest.fixture
def server() -> Server:
    return Server()


def test_all_engines_of_a_version_load_and_unload_it_as_one_job(server: Server) -> None:
    for action in ("load", "unload"):
        assert server.ask(action, version=1) == ["cuda:0", "cuda:1"]
        assert len({channel.sent[-1]["job_id"] for channel in server.channels.values()}) == 1
        server.answer("cuda:0", error=error_fields(NotFound("no such version")))
        assert not server.answers
        server.answer("cuda:1", result={"id": "7"})
        assert server.answers.pop()[1]["result"] == {"id": "7"}
    assert server.loads == [("m", 1)]
    assert server.ask("unload", 2, model="n") == ["cuda:1"]
    assert server.ask("unload", 3, model="unknown") == ["cuda:0"]


def test_the_oldest_engine_of_a_model_decides_about_all_else(server: Server) -> None:
    assert server.ask("label") == ["cuda:0"]
    assert server.ask("traffic", 2, model="n") == ["cuda:1"]
    server.store.set_engine("cuda:0", EngineFacts(0, 1, False))
    server.engines["cuda:0"].told = False
    assert server.ask("rollback", 3) == ["cuda:1"]


def test_an_engine_that_is_about_to_load_a_version_unloads_it_too(server: Server) -> None:
    engine = server.engines["cuda:1"]
    server.store.set_engine("cuda:1", EngineFacts(0, 1, False))
    engine.told = False
    for number, model in enumerate(("m", "n"), 1):
        assert server.ask("unload", number, model=model) == []
        assert server.answers.pop() == (1, {"id": number, "error": NOT_UP_ERROR})
    engine.told = True
    assert server.ask("unload", 3) == ["cuda:0", "cuda:1"]
    assert server.ask("unload", 4, model="n") == ["cuda:1"]
    engine.skip.add(("m", 1))
    assert server.ask("unload", 5, version=1) == ["cuda:0"]


def test_the_successor_of_the_oldest_engine_decides_once_it_is_told_what_was_decided(server: Server) -> None:
    server.store.set_engine("cuda:0", EngineFacts(0, 1, False))
    server.engines["cuda:0"].told = False
    assert server.ask("label") == ["cuda:1"]
    server.engines["cuda:0"].told = True
    assert server.ask("label", 2) == ["cuda:0"]
    server.store.set_engine("cuda:1", EngineFacts(0, 1, False))
    server.engines["cuda:1"].told = False
    assert server.ask("label", 3, model="n") == []
    assert server.answers == [(1, {"id": 3, "error": NOT_UP_ERROR})]


def test_nobody_is_asked_unless_all_can_be(server: Server) -> None:
    server.engines["cuda:1"].child = None
    assert server.ask("load") == []
    assert server.answers == [(1, {"id": 1, "error": NOT_UP_ERROR})]
    assert not server.loads
    assert server.ask("cancel", 2, job="unknown") == []


def test_a_question_ends_with_the_engine_or_the_web_process(server: Server) -> None:
    server.ask("unload", version=1)
    server.relay.engine_ended("cuda:1")
    server.answer("cuda:0", error=NONE_ERROR)
    assert [answer["error"] for _, answer in server.answers] == [error_fields(NotReady(ENDED))]
    server.ask("label", 2)
    server.relay.web_ended(1)
    server.answer("cuda:0", 2, result={})
    assert len(server.answers) == 1


def test_an_engine_that_ends_before_it_unloads_has_a_successor_without_the_version(server: Server) -> None:
    engine, channel = server.engines["cuda:1"], server.channels["cuda:1"]

    def ask_and_end(number: int) -> None:
        server.store.set_engine("cuda:1", EngineFacts(1, 0, True))
        server.store.take("cuda:1", report(m={1: view()}, n={1: view()}), {})
        assert server.ask("unload", number, version=1) == ["cuda:0", "cuda:1"]
        server.store.set_engine("cuda:1", EngineFacts(0, 1, False))
        server.relay.engine_ended("cuda:1")

    ask_and_end(1)
    engine.told = False
    server.answer("cuda:0", 1, error=NONE_ERROR)
    assert server.store.versions_for("cuda:1") == [("m", 1), ("n", 1)]
    engine.told = True
    ask_and_end(2)
    engine.told = False
    server.answer("cuda:0", 2, result={})
    assert server.store.versions_for("cuda:1") == [("n", 1)]
    engine.told = True
    ask_and_end(3)
    channel.sent.clear()
    server.answer("cuda:0", 3, result={})
    [sent] = channel.sent
    assert (sent["action"], sent["model"], sent["version"], sent["web"]) == ("unload", "m", 1, 0)


def test_an_engine_of_one_version_loads_it_in_place_of_the_engine_before(server: Server) -> None:
    own = server.engines["m/1"] = SupervisedEngine("m/1", "cuda:0")
    own.parent, own.only, own.told = "cuda:0", [("m", 1)], True
    own.child = server.channels["m/1"] = Channel()  # type: ignore[assignment]
    assert server.ask("load", version=1) == ["cuda:1", "m/1"]
    assert server.ask("load", 2, version=2) == ["cuda:0", "cuda:1"]


def test_a_version_that_the_first_engine_fetches_is_loaded_by_all_once_it_is_there(server: Server) -> None:
    assert server.ask("load", source="s3://models/m") == ["cuda:0"]
    job = {"id": "7", "source": "s3://models/m", "fetching": True, "versions": [], "model": "m"}
    server.relay.take_jobs("cuda:0", [job])
    assert not server.channels["cuda:1"].sent
    for _ in range(2):
        server.relay.take_jobs("cuda:0", [{**job, "fetching": False, "versions": [3]}])
    [sent] = server.channels["cuda:1"].sent
    assert (sent["action"], sent["version"], sent["job_id"]) == ("load", 3, "7")
