"""A version that loads beside others is measured by a process of its own, whose end harms nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from inferpool.repository.load.measuring_process import WORTH_BUDGET_S

from tests.conftest import MakeChaos, Serve
from tests.server import Server, wait_until

pytestmark = pytest.mark.parametrize(
    "server_module", ["tests.servers.usual_priority"], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def server(
    module_serve: Serve, module_make_chaos: MakeChaos, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    """A server of one process, which any load in that process could end."""
    return module_serve(
        module_make_chaos("kind"), "--engine", "in-process", "--admin-routes", "on",
        INFERPOOL_CACHE_DIR=str(tmp_path_factory.mktemp("own")),
        INFERPOOL_MEASURE_MS=str(1000 * WORTH_BUDGET_S),
    )  # fmt: skip


def begin(server: Server, model: str) -> str:
    reply = server.post(f"/models/{model}/load", json={})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def ended(server: Server, job: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def is_over() -> bool:
        found.update(server.get(f"/jobs/{job}").json())
        return found["state"] != "running"

    wait_until(is_over, "the job ends")
    return found


def measuring(server: Server, model: str) -> int:
    """The process that measures a model, or has done so."""
    process = int(server.wait_for(rf"^{re.escape(model)}/1 is measured by process (\d+)$")[1])
    assert process != server.process.pid
    return process


def assert_answers(server: Server, model: str) -> None:
    reply = server.post(f"/predict/{model}", json={"inputs": [[1.0, 2.0, 3.0, 4.0]]})
    assert reply.json().get("outputs") == {"sum": [31.0]}, reply.text


def test_another_process_measures_a_version_once(server: Server, module_make_chaos: MakeChaos) -> None:
    module_make_chaos("other")
    assert ended(server, begin(server, "other"))["state"] == "done"
    assert not Path(f"/proc/{measuring(server, 'other')}").exists()
    assert_answers(server, "other")
    assert server.get("/models/other/1").json()["latency"]
    # Its plan is known now.
    assert server.post("/v2/repository/models/other/unload", json={}).status_code == 200
    assert ended(server, begin(server, "other"))["state"] == "done"
    assert sum("other/1 is measured by" in line["message"] for line in server.log) == 1


def test_a_file_that_ends_its_loader_fails_its_version_only(
    server: Server, module_make_chaos: MakeChaos
) -> None:
    module_make_chaos("fatal", load_crashes=True)
    job = ended(server, begin(server, "fatal"))
    assert job["state"] == "failed"
    assert "loading ended its process, which was ended by SIGSEGV" in job["reason"]
    assert server.get("/models/fatal/1").json()["state"] == "failed"
    assert_answers(server, "kind")


def test_the_end_of_a_job_ends_the_process(server: Server, module_make_chaos: MakeChaos) -> None:
    """A load that lets no other thread run would otherwise never end."""
    module_make_chaos("stuck", load_holds=True)
    job = begin(server, "stuck")
    process = measuring(server, "stuck")
    assert server.request("DELETE", f"/jobs/{job}").json()["state"] == "cancelled"
    wait_until(lambda: not Path(f"/proc/{process}").exists(), "the process has ended")
    assert_answers(server, "kind")
