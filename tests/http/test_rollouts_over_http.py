"""Canaries and shadows through the real door, in one process and with two web processes and an engine."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Serve, in_one_and_several_processes
from tests.onnx_models import write_shift
from tests.server import Server, wait_until

pytestmark = in_one_and_several_processes

STABLE = "[versions]\nlabels = {stable = 1}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two versions: `good` does the same in both, `faulty` fails in the second, `other` differs."""
    made = tmp_path_factory.mktemp("rollouts")
    for version in (1, 2):
        write_shift(made, "good", version, 1.0)
        write_shift(made, "other", version, (0.0, 0.75 * (version - 1)))
        (made / "faulty" / str(version)).mkdir(parents=True)
        fault = ', "raises_at": 7' if version == 2 else ""
        (made / "faulty" / str(version) / "model.chaos").write_text(f'{{"row": [2]{fault}}}')
    for name in ("good", "faulty"):
        (made / name / "model.toml").write_text(STABLE)
    (made / "other" / "model.toml").write_text(STABLE + "[labels]\n")
    (made / "other" / "labels.txt").write_text("first\nsecond\n")
    return made


@pytest.fixture(scope="module")
def server(folder: Path, module_serve: Serve) -> Server:
    return module_serve(folder, "--admin-routes", "on", INFERPOOL_MEASURE_MS="20")


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def traffic(client: httpx.Client, model: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/models/{model}/traffic").json()
    assert client.get(f"/models/{model}").json()["traffic"].keys() == found.keys()
    return found


def ask(client: httpx.Client, model: str, row: list[float], version: str = "", **headers: str) -> str:
    """The version that answers, or the code of the error."""
    path = f"/predict/{model}/{version}" if version else f"/predict/{model}"
    answer = client.post(path, json={"inputs": [row]}, headers=headers).json()
    return str(answer.get("version") or answer["code"])


def send_until_it_ends(client: httpx.Client, model: str, row: list[float]) -> dict[str, Any]:
    """Send requests until the canary has ended; returns what is then told of it."""
    found: dict[str, Any] = {}

    def has_ended() -> bool:
        for _ in range(20):
            ask(client, model, row)
        found.update(traffic(client, model)["canary"])
        return bool(found["state"] != "running")

    wait_until(has_ended, "the canary ends")
    return found


def test_a_canary_without_a_fault_is_promoted_by_itself(server: Server, client: httpx.Client) -> None:
    canary = {"version": 2, "share": 0.5, "requests": 60}
    begun = client.put("/models/good/traffic", json={"canary": canary})
    assert begun.status_code == 200, begun.text
    assert begun.json()["canary"]["state"] == "running"
    assert server.metric("canary_share", model="good", version="2") == 0.5
    found = send_until_it_ends(client, "good", [1.0, 2.0])
    for _ in range(2):
        if found["state"] == "promoted":
            break
        # One sound canary in a hundred may be called slower, and more of them on a busy machine.
        assert "requests took more than" in found["reason"], found
        assert client.put("/models/good/traffic", json={"canary": canary}).status_code == 200
        found = send_until_it_ends(client, "good", [1.0, 2.0])
    assert (found["state"], found["canary"]["failures"]) == ("promoted", 0), found
    assert min(found["canary"]["requests"], found["stable"]["requests"]) >= 60
    assert found["canary"]["p99_ms"] > 0
    server.wait_for(r"audit: promote the canary good/2: 0 of \d+ requests failed")
    assert client.get("/models/good").json()["labels"] == {"stable": 2}
    assert {ask(client, "good", [1.0, 2.0]) for _ in range(8)} == {"2"}
    # The version before is still there.
    assert client.post("/models/good/rollback").json()["version"] == 1
    assert {ask(client, "good", [1.0, 2.0]) for _ in range(8)} == {"1"}
    server.wait_for_metric("canaries_total", 1, 1, model="good", outcome="promoted")


def test_every_web_process_serves_what_an_answer_has_promised(server: Server, folder: Path) -> None:
    write_shift(folder, "many", 1, 1.0)
    assert server.post("/v2/repository/models/many/load").status_code == 200

    def versions() -> set[str]:
        """Which versions answer on new connections, which the web processes share out."""
        body = {"inputs": [[1.0, 2.0]]}
        return {server.post("/predict/many", json=body).json()["version"] for _ in range(6)}

    for version in (2, 3):
        write_shift(folder, "many", version, float(version))
        assert server.post("/v2/repository/models/many/load").status_code == 200
        assert versions() == {str(version)}
        assert server.post("/models/many/rollback").json()["version"] == version - 1
        assert versions() == {str(version - 1)}
        assert server.request("DELETE", "/models/many/labels/stable").status_code == 200
        assert versions() == {str(version)}
    shutil.rmtree(folder / "many")


def test_a_canary_with_a_fault_is_rolled_back_by_itself(server: Server, client: httpx.Client) -> None:
    canary = {"version": 2, "share": 0.5, "requests": 100_000}
    assert client.put("/models/faulty/traffic", json={"canary": canary}).status_code == 200
    for _ in range(40):
        assert ask(client, "faulty", [1.0, 2.0, 3.0]) == "invalid_input"
    found = traffic(client, "faulty")["canary"]
    # Errors that clients cause do not count.
    assert (found["canary"]["requests"], found["stable"]["requests"]) == (0, 0)
    found = send_until_it_ends(client, "faulty", [7.0, 1.0])
    assert (found["state"], found["stable"]["failures"]) == ("rolled_back", 0), found
    assert found["canary"]["failures"] == found["canary"]["requests"] > 5
    assert "requests failed" in found["reason"]
    server.wait_for(r"audit: roll back the canary faulty/2: \d+ of \d+ requests failed")
    assert {ask(client, "faulty", [7.0, 1.0]) for _ in range(8)} == {"1"}
    assert client.get("/models/faulty").json()["labels"] == {"stable": 1}


def test_a_caller_stays_on_one_side_and_a_request_that_names_a_version_is_not_diverted(
    server: Server, client: httpx.Client
) -> None:
    canary = {"version": 2, "share": 0.5, "requests": 0, "by": "header:X-User"}
    assert client.put("/models/other/traffic", json={"canary": canary}).status_code == 200
    sides: dict[str, set[str]] = {f"user-{number}": set() for number in range(10)}
    for _ in range(2):
        # A new connection may be another web process's; the second request of each finds its head cached.
        with httpx.Client(base_url=server.url, timeout=30) as other:
            for user, seen in sides.items():
                seen |= {ask(other, "other", [1.0, 2.0], **{"X-User": user}) for _ in range(3)}
    assert {frozenset(seen) for seen in sides.values()} == {frozenset("1"), frozenset("2")}
    user = next(user for user, seen in sides.items() if seen == {"2"})
    for version, answers in (("1", "1"), ("stable", "1"), ("2", "2")):
        assert ask(client, "other", [1.0, 2.0], version, **{"X-User": user}) == answers
    assert ask(client, "other", [1.0, 2.0]) == "1"
    by_body = {"model": "other", "inputs": [[1.0, 2.0]]}
    assert client.post("/predict", json=by_body, headers={"X-User": user}).json()["version"] == "2"
    assert client.post("/models/other/rollback").json()["version"] == 1
    assert ask(client, "other", [1.0, 2.0], **{"X-User": user}) == "1"
    found = traffic(client, "other")["canary"]
    assert (found["state"], found["reason"]) == ("rolled_back", "somebody has rolled it back")
    assert client.delete("/models/other/traffic").json() == {"canary": None, "shadow": None}
    server.wait_for(r"audit: traffic other: canary 2 with 0\.5 by 'header:X-User': done")
    server.wait_for(r"audit: end the traffic of other: done")


def test_the_figures_of_a_shadow_are_those_of_a_comparison_by_hand(
    server: Server, client: httpx.Client
) -> None:
    assert client.put("/models/other/traffic", json={"shadow": {"version": 2}}).status_code == 200
    rows = [[float(number), 5.5] for number in range(12)]
    answers = {}
    for version in ("1", "2"):
        by_hand = [
            client.post(f"/predict/other/{version}", json={"inputs": [row]}).json()["outputs"]["y"]
            for row in rows
        ]
        answers[version] = np.array(by_hand, np.float32).reshape(-1, 2)
    found: dict[str, Any] = {}
    # With pauses, or copies are dropped.
    for count, row in enumerate(rows, 1):
        assert ask(client, "other", row) == "1"

        def is_compared(count: int = count) -> bool:
            found.update(traffic(client, "other")["shadow"])
            return bool(found["compared"] + found["dropped"] + found["failed"] == count)

        wait_until(is_compared, "the copy is compared")
    assert (found["compared"], found["failed"], found["dropped"], found["unlike"]) == (12, 0, 0, 0)
    gaps = np.abs(answers["1"].astype(np.float64) - answers["2"].astype(np.float64))
    [output] = found["outputs"]
    assert (output["name"], output["numbers"], output["non_finite"]) == ("y", 24, 0)
    assert output["largest"] == pytest.approx(gaps.max())
    assert output["mean"] == pytest.approx(gaps.mean())
    changed = np.mean(answers["1"].argmax(1) != answers["2"].argmax(1))
    assert 0 < changed < 1
    assert found["changed_labels"] == pytest.approx(changed)
    assert found["sent_ms"] > 0
    assert found["copy_ms"] > 0
    labels = {"model": "other", "version": "2"}
    assert server.metric("shadow_copies_total", outcome="compared", **labels) == 12
    assert server.metric("shadow_changed_labels_ratio", **labels) == pytest.approx(changed)
    assert server.metric("shadow_difference_largest", output="y", **labels) == pytest.approx(gaps.max())
    assert server.metric("shadow_difference_mean", output="y", **labels) == pytest.approx(gaps.mean())
    assert client.delete("/models/other/traffic").status_code == 200


def test_a_version_has_at_most_sixty_series_even_as_a_canary_and_a_shadow(
    server: Server, client: httpx.Client
) -> None:
    canary = {"version": 2, "share": 0.5, "requests": 0}
    both = {"canary": canary, "shadow": {"version": 2}}
    assert client.put("/models/other/traffic", json=both).status_code == 200

    def is_compared() -> bool:
        ask(client, "other", [1.0, 2.0])
        found = traffic(client, "other")["shadow"]
        return bool(found["compared"] and found["outputs"])

    wait_until(is_compared, "a copy is compared")
    assert ask(client, "other", [1.0], "2") == "invalid_input"
    assert ask(client, "other", [1.0, 2.0], "2", **{"X-Timeout-Ms": "0.001"}) == "deadline_exceeded"
    assert ask(client, "other", [1.0, 2.0], "2") == "2"
    names = [
        line.split("{")[0]
        for line in client.get("/metrics").text.splitlines()
        if 'model="other",version="2"' in line
    ]
    shadow = {name for name in names if name.startswith("inferpool_shadow")}
    assert len(shadow) == 5, "it has compared an output with labels"
    assert "inferpool_canary_share" in names
    assert names.count("inferpool_requests_total") == 6
    assert len(names) <= 60, names
    assert client.delete("/models/other/traffic").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 422, "neither a canary nor a shadow"),
        ({"canary": {"version": 2, "share": 2.0}}, 422, "expected a number from 0 to 1"),
        ({"canary": {"version": 2}}, 422, "share"),
        ({"canary": {"version": 9, "share": 0.1}}, 404, "has no version"),
        ({"canary": {"version": 1, "share": 0.1}}, 409, "answers already"),
    ],
)
def test_what_cannot_be_is_refused(client: httpx.Client, body: Any, status: int, said: str) -> None:
    reply = client.put("/models/other/traffic", json=body)
    assert reply.status_code == status, reply.text
    assert said in reply.text
    assert traffic(client, "other") == {"canary": None, "shadow": None}


def test_a_canary_outlives_its_engine(server: Server, client: httpx.Client) -> None:
    canary = {"version": 2, "share": 1.0, "requests": 0}
    assert client.put("/models/other/traffic", json={"canary": canary}).status_code == 200
    engine = client.get("/models/other/1").json()["engine"]
    if engine is None:
        assert ask(client, "other", [1.0, 2.0]) == "2"
    else:
        os.kill(engine["pid"], signal.SIGKILL)

        def is_replaced() -> bool:
            assert ask(client, "other", [1.0, 2.0]) == "2"
            now = client.get("/models/other/1").json()["engine"]
            return bool(now["pid"] not in (0, engine["pid"]))

        wait_until(is_replaced, "another engine has the version")
        assert ask(client, "other", [1.0, 2.0]) == "2"
    found = traffic(client, "other")["canary"]
    assert (found["state"], found["canary"]["requests"] >= 1) == ("running", True)


def test_a_version_that_goes_takes_its_canary_and_its_series_along(
    server: Server, client: httpx.Client, folder: Path
) -> None:
    canary = {"version": 2, "share": 1.0, "requests": 0}
    assert client.put("/models/other/traffic", json={"canary": canary}).status_code == 200
    assert ask(client, "other", [1.0, 2.0]) == "2"
    series = 'inferpool_requests_total{model="other",version="2",code="200"}'
    assert series in client.get("/metrics").text
    shutil.move(folder / "other" / "2", folder.parent / "gone")
    try:
        assert client.post("/models/other/load").status_code == 202
        wait_until(lambda: series not in client.get("/metrics").text, "the series is gone")
        assert 'model="other",version="2"' not in client.get("/metrics").text
        assert ask(client, "other", [1.0, 2.0]) == "1"
        server.wait_for(r"audit: roll back the canary other/2: the version is")
    finally:
        shutil.move(folder.parent / "gone", folder / "other" / "2")
