"""Switches the versions of a model again and again under load, and checks every single answer.

    python -m tests.repository.switching --requests 1000000 --engine process

starts a server of its own, and prints what was sent, switched and wrong. Each version adds another number to
its rows, so an answer that another version has made shows, and so does one for another request.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.onnx_models import write_shift
from tests.repository.fast_client import Answers, ask_until
from tests.server import Server

MODEL = "switched"
KEPT = 3
"""How many versions there are at a time."""
KEPT_FILES = 50
"""How many versions have files. The server forgets what it has counted of those without."""
FLAGS = ("--admin-routes", "on", "--keep-warm-s", "0.2")


@dataclass
class Report:
    """What came of the requests.

    Attributes:
        requests: how many were answered.
        switches: how many rounds of switches there were; see `take_over`.
        versions: how many answers each version gave.
        faults: what was wrong, at most a few of a kind.
        longest_s: the longest time from a request to its answer.
    """

    requests: int = 0
    switches: int = 0
    versions: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0


def prepare(folder: Path) -> None:
    """Write the first version of the model that `switch` switches."""
    write_shift(folder, MODEL, 1, 1.0)


def switch(server: Server, folder: Path, requests: int, least_switches: int, pause_s: float = 0.0) -> Report:
    """Send at least `requests` predictions while versions are switched; see `ask_until` for `pause_s`."""
    answers, over = Answers(), threading.Event()
    arguments = (server.port, MODEL, over.is_set, answers, pause_s)
    client = threading.Thread(target=ask_until, args=arguments)
    client.start()
    switches = 0
    try:
        with httpx.Client(base_url=server.url, timeout=60, verify=False) as admin:
            while client.is_alive() and (answers.requests < requests or switches < least_switches):
                take_over(admin, folder, switches + 2)
                switches += 1
    finally:
        over.set()
        client.join()
    return Report(answers.requests, switches, answers.versions, answers.faults, answers.longest_s)


def take_over(admin: httpx.Client, folder: Path, version: int) -> None:
    """Load one more version, roll it back and forth, and unload the oldest one."""
    write_shift(folder, MODEL, version, float(version))
    run_job(admin, "load", version)
    admin.post(f"/models/{MODEL}/rollback").raise_for_status()
    admin.delete(f"/models/{MODEL}/labels/stable").raise_for_status()
    if version > KEPT:
        run_job(admin, "unload", version - KEPT)
    if version > KEPT_FILES:
        shutil.rmtree(folder / MODEL / str(version - KEPT_FILES))
    # The same version once more, as if its files had changed.
    file = folder / MODEL / str(version) / "model.onnx"
    file.touch()
    run_job(admin, "load", version)
    label = f"/models/{MODEL}/labels/stable"
    admin.put(label, json={"version": max(1, version - 1)}).raise_for_status()
    admin.put(label, json={"version": version}).raise_for_status()
    admin.delete(label).raise_for_status()


def run_job(admin: httpx.Client, act: str, version: int) -> None:
    """Load or unload a version, and wait until it is done."""
    reply = admin.post(f"/models/{MODEL}/{act}", json={"version": version})
    assert reply.status_code == 202, reply.text
    job = reply.json()
    while job["state"] == "running":
        time.sleep(0.01)
        job = admin.get(f"/jobs/{job['id']}").json()
    assert job["state"] == "done", job


def main() -> int:
    """Run the script; the exit status is 1 if any answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--engine", choices=("in-process", "process"), default="in-process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        server = Server(folder, (*FLAGS, "--engine", options.engine))
        try:
            server.wait_loaded()
            began, memory = time.monotonic(), server.resident_bytes()
            report = switch(server, folder, options.requests, 1)
            took = time.monotonic() - began
            print(
                f"{report.requests} requests in {took:.0f} s ({report.requests / took:.0f}/s),"
                f" {report.switches} rounds of switches"
            )
            print(f"{len(report.versions)} versions answered; longest wait {1000 * report.longest_s:.0f} ms")
            grown = (server.resident_bytes() - memory) / 1e6
            print(f"{len(report.faults)} faults; the process has {grown:.0f} MB more than at the start")
            for fault in report.faults:
                print(fault)
        finally:
            server.kill()
    return 1 if report.faults or report.requests < options.requests else 0


if __name__ == "__main__":
    sys.exit(main())
