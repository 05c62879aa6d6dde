"""The comparison with other servers: real servers, real loads, and counts that add up."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.peers.load import LoadError, Request, closed_loop, open_loop
from benchmarks.peers.measure import environ
from benchmarks.peers.peers import PEERS
from benchmarks.peers.processes import Server, ServerError
from benchmarks.peers.results import Results
from benchmarks.peers.targets import targets
from benchmarks.peers.workloads import WORKLOADS
from tests.record import needs_to_run

ROOT = Path(__file__).parents[2]
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk: apt-get install wrk")


def peers(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark with its results, models and measurements below `out`."""
    command = [sys.executable, "-m", "benchmarks.peers", "--out", str(out / "results"), *words]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(out)}
    return subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one short round with Inferpool and plain FastAPI."""
    needs_to_run("benchmarks")
    out = tmp_path_factory.mktemp("peers")
    words = [
        "--workloads",
        "row-json,overload",
        "--peers",
        "inferpool,fastapi",
        "--rounds",
        "1",
        "--seconds",
        "1",
    ]
    run = peers(out, *words)
    assert run.returncode == 0, run.stderr
    return out


@needs_wrk
def test_two_servers_are_measured_in_one_round(measured: Path) -> None:
    """Every level has answers, no errors, CPU time and memory; the table and the plot show both servers."""
    report = json.loads((measured / "results" / "peers.json").read_text())
    loads = [record for record in report["records"] if record["workload"] == "row-json"]
    assert [(record["peer"], record["level"]) for record in loads] == [
        (peer, level) for peer in ("inferpool", "fastapi") for level in (1, 16, 64, 256)
    ]
    for record in loads:
        assert record["requests"] > 0
        assert (record["refused"], record["lost"]) == (0, 0)
        assert 0 < record["p50_ms"] <= record["p99_ms"] <= record["max_ms"]
        assert 10 < record["cpu_us"] < 1e6
        assert 20 < record["pss_mib"] < 2000
    table = (measured / "results" / "peers.md").read_text()
    assert "| Inferpool | 1 |" in table
    assert "| FastAPI, pydantic body | 1 |" in table
    assert "<svg" in (measured / "results" / "peers-row-json.svg").read_text()


@needs_wrk
def test_an_overload_is_twice_the_capacity(measured: Path) -> None:
    """Each server gets twice its own capacity; FastAPI refuses nothing; a bounded queue does."""
    report = json.loads((measured / "results" / "peers.json").read_text())
    own, fastapi = (record for record in report["records"] if record["workload"] == "overload")
    for record in (own, fastapi):
        assert "problem" not in record, record["problem"]
        assert record["offered_per_s"] == pytest.approx(2 * record["capacity_per_s"])
        assert record["lost"] == 0
    assert own["goodput_per_s"] > 0
    # A server that refused nothing has answered more than was taken for its capacity.
    assert own["refused"] > 0 or own["goodput_per_s"] + own["late_per_s"] > own["capacity_per_s"]
    assert fastapi["refused"] == 0


@needs_wrk
def test_a_finished_measurement_is_not_repeated(measured: Path) -> None:
    """The same command measures nothing again; another round adds to the results."""
    file = measured / "results" / "peers.json"
    before = json.loads(file.read_text())["records"]
    words = ["--workloads", "row-json", "--peers", "inferpool", "--seconds", "1", "--no-plots"]
    assert peers(measured, *words, "--rounds", "1").returncode == 0
    assert json.loads(file.read_text())["records"] == before
    assert peers(measured, *words, "--rounds", "2", "--stop-after-s", "0").returncode == 0
    assert json.loads(file.read_text())["records"] == before


@needs_wrk
def test_the_check_names_targets_that_were_not_measured(measured: Path) -> None:
    """Without results of Mosec the targets relative to Mosec do not hold, and the exit status is 1."""
    run = peers(measured, "--check")
    assert run.returncode == 1
    assert "| small JSON, 64: ≥ 1.5 × Mosec's requests/s | not measured | |" in run.stdout
    assert "| small JSON: memory ≤ 110 MiB | " in run.stdout


@pytest.mark.parametrize(("own", "holds"), [(1500.0, True), (1499.0, False)])
def test_a_target_holds_from_its_bound_on(tmp_path: Path, own: float, holds: bool) -> None:
    """The check compares medians, and a value at the bound holds."""
    results = Results(tmp_path / "peers.json")
    for peer, rates in (("inferpool", (9000.0, own, 1.0)), ("mosec", (1000.0, 1000.0, 4000.0))):
        results.set_peer(peer, version="1")
        for rate in rates:
            results.add("row-json", peer, [{"level": 64, "requests_per_s": rate, "at": "2026-01-01"}])
    first = next(targets(Results(tmp_path / "peers.json")))
    assert (first.measured, first.holds) == (own / 1000, holds)


def test_a_new_version_drops_the_records_of_the_old_one(tmp_path: Path) -> None:
    """Records of an earlier version are dropped, not mixed with new ones."""
    results = Results(tmp_path / "peers.json")
    for peer in ("inferpool", "mosec"):
        results.set_peer(peer, version="1")
        results.add("row-json", peer, [{"level": 1, "at": "2026-01-01"}])
    results.set_peer("inferpool", version="2")
    assert [results.rounds("row-json", peer) for peer in ("inferpool", "mosec")] == [0, 1]


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
def test_every_peer_has_a_request_or_a_reason(peer) -> None:
    """Every workload that a peer cannot run has a reason in the table."""
    for workload in WORKLOADS.values():
        assert (workload.kind in peer.requests) != (workload.kind in peer.cannot), workload.name


# A server of two processes, of which the other has a session, a name and a parent of its own.
TWO = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ends = time.process_time() + 0.6
        while time.process_time() < ends: pass  # uses CPU time, to be counted
        open("busy-" + str(os.getpid()), "w").close()
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


def test_a_hidden_process_is_counted_and_ended(tmp_path: Path) -> None:
    """The CPU time, the memory and the end of a server include the processes that it started."""
    python = Path(sys.executable)
    server = Server([str(python), "-c", TWO], environ(python), tmp_path)
    server.wait(lambda: any(tmp_path.glob("busy-*")))
    hidden = int(next(tmp_path.glob("busy-*")).name.removeprefix("busy-"))
    assert server.cpu_s() >= 0.5  # of 0.6, which the kernel counts in hundredths
    assert server.pss_mib() > 1
    server.stop()
    assert not is_alive(hidden)


def test_a_server_that_ended_is_reported_with_its_log(tmp_path: Path) -> None:
    """The log of a server that ended is the reason in the table."""
    server = Server(["sh", "-c", "echo no such model; exit 3"], dict(os.environ), tmp_path)
    with pytest.raises(ServerError, match="ended with status 3; log: no such model"):
        server.wait(lambda: False)
    server.stop()


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Slow(BaseHTTPRequestHandler):
    """Answers one request at a time, in 20 ms, and refuses every second request at once."""

    protocol_version = "HTTP/1.1"
    one_at_a_time = threading.Lock()
    count = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        type(self).count += 1
        status = 503 if type(self).count % 2 else 200
        if status == 200:
            with self.one_at_a_time:
                time.sleep(0.02)  # what this server's work takes
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[int]:
    """The port of a slow server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_open_loop_does_not_wait_for_answers(slow: int) -> None:
    """At 60 requests a second the server refuses half and answers half in time; nothing is lost or late.

    A busy machine may delay answers in some rounds, and not in five.
    """
    for _ in range(5):
        record = open_loop(slow, Request("/", b"x", {}), 60, 3, 1.0)
        assert record["refused"] == 90
        assert record["lost"] == 0
        if record["late_per_s"] == 0 and record["goodput_per_s"] == pytest.approx(30, rel=0.15):
            break
    assert record["late_per_s"] == 0
    assert record["goodput_per_s"] == pytest.approx(30, rel=0.15)
    assert record["refusal_p50_ms"] < record["good_p50_ms"]


@needs_wrk
def test_refusals_are_not_counted_as_answers(slow: int) -> None:
    """Refusals are counted apart from wrk's requests; the rate is that of good answers."""
    record = closed_loop(slow, Request("/", b"x", {}), 2, 1)
    assert record["refused"] == pytest.approx(record["requests"], abs=2)
    assert record["requests_per_s"] < 51


def test_requests_without_a_server_are_lost() -> None:
    """An open loop counts the requests that it cannot send; with wrk the error names the fault."""

    async def gone() -> int:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port: int = server.sockets[0].getsockname()[1]
        server.close()
        return port

    port = asyncio.run(gone())
    assert open_loop(port, Request("/", b"x", {}), 20, 1.5, 1.0)["lost"] == 30
    if shutil.which("wrk"):
        with pytest.raises(LoadError, match="wrk"):
            closed_loop(port, Request("/", b"x", {}), 1, 1)
