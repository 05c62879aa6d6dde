"""Switches the versions of a model again and again while clients predict, and checks every single answer.

    python -m tests.repository.switching --requests 1000000 --engine process

starts a server of its own, and prints what was sent, switched and wrong. Each version adds another number to
its rows, so an answer that another version has made shows, and so does one for another request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.clients import Client, with_clients
from tests.onnx_models import write_shift
from tests.server import Server

MODEL = "switched"
CLIENTS = 8
KEPT = 3
"""How many versions there are at a time."""
FLAGS = ("--admin-routes", "on", "--keep-warm-s", "0.2")


@dataclass
class Report:
    """What came of the requests.

    Attributes:
        requests: how many were answered.
        switches: how many times another version took over, or the same one with other files.
        versions: how many answers each version gave.
        faults: what was wrong, at most a few of a kind.
        longest_s: the longest time from a request to its answer.
    """

    requests: int = 0
    switches: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0


def prepare(folder: Path) -> None:
    """Write the first version of the model that `switch` switches."""
    write_shift(folder, MODEL, 1, 1.0)


async def switch(server: Server, folder: Path, requests: int, least_switches: int) -> Report:
    """Send at least `requests` predictions from many clients while versions are switched."""
    report = Report()
    over = asyncio.Event()

    async def predict(client: Client, number: int) -> None:
        sent = 0
        while not over.is_set():
            sent += 1
            row = [float(number), float(sent % 10_000)]
            began = time.monotonic()
            reply = await client.post(f"/predict/{MODEL}", json.dumps({"inputs": [row]}).encode())
            report.longest_s = max(report.longest_s, time.monotonic() - began)
            report.requests += 1
            fault = check(reply.status, reply.body, row)
            if fault is None:
                report.versions[json.loads(reply.body)["version"]] += 1
            elif len(report.faults) < 10:
                report.faults.append(fault)

    async def administer() -> None:
        version = 1
        try:
            async with httpx.AsyncClient(base_url=server.url, timeout=60, verify=False) as client:
                while report.requests < requests or report.switches < least_switches:
                    version += 1
                    await take_over(client, folder, version)
                    report.switches += 1
        finally:
            over.set()

    await asyncio.gather(with_clients(server.port, CLIENTS, predict), administer())
    return report


async def take_over(client: httpx.AsyncClient, folder: Path, version: int) -> None:
    """Load one more version, roll it back and forth, and unload the oldest one."""
    write_shift(folder, MODEL, version, float(version))
    await run_job(client, "load", version)
    (await client.post(f"/models/{MODEL}/rollback")).raise_for_status()
    (await client.delete(f"/models/{MODEL}/labels/stable")).raise_for_status()
    if version > KEPT:
        await run_job(client, "unload", version - KEPT)
    # The same version once more, as if its files had changed.
    file = folder / MODEL / str(version) / "model.onnx"
    file.touch()
    await run_job(client, "load", version)
    label = f"/models/{MODEL}/labels/stable"
    (await client.put(label, json={"version": max(1, version - 1)})).raise_for_status()
    (await client.put(label, json={"version": version})).raise_for_status()
    (await client.delete(label)).raise_for_status()


async def run_job(client: httpx.AsyncClient, act: str, version: int) -> None:
    """Load or unload a version, and wait until it is done."""
    reply = await client.post(f"/models/{MODEL}/{act}", json={"version": version})
    assert reply.status_code == 202, reply.text
    job = reply.json()
    while job["state"] == "running":
        job = (await client.get(f"/jobs/{job['id']}")).json()
    assert job["state"] == "done", job


def check(status: int, body: bytes, row: list[float]) -> str | None:
    """What is wrong with an answer; None if it is the one that its version gives to this row."""
    if status != 200:
        return f"status {status}: {body[:300]!r}"
    answer = json.loads(body)
    expected = [[number + float(answer["version"]) for number in row]]
    if answer["outputs"]["y"] != expected:
        return f"version {answer['version']} answered {answer['outputs']['y']} to {row}"
    return None


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
            report = asyncio.run(switch(server, folder, options.requests, 1))
            took = time.monotonic() - began
            print(f"{report.requests} requests in {took:.0f} s, {report.switches} rounds of switches")
            print(f"{len(report.versions)} versions answered; longest wait {1000 * report.longest_s:.0f} ms")
            grown = (server.resident_bytes() - memory) / 1e6
            print(f"{len(report.faults)} faults; the process has {grown:.0f} MB more than at the start")
            for fault in report.faults:
                print(fault)
        finally:
            server.kill()
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
