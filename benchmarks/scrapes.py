"""Measures what scrapes of many versions cost, and how much they slow predictions.

    python -m benchmarks.scrapes [--versions 150] [--every 15 1 0] [--rounds 8] [--seconds 6] [--per-s 200]
        [--one-by-one] [--serve FLAGS]

starts a server of so many small models, each of which answers once, so that its series exist. First the
page is read while nothing else happens: its size, the time until it is read, and the server's CPU time. Then
predictions are sent at random moments, in rounds without scrapes and with one every so many seconds in turns.
A Prometheus scrapes every 15 or 60 seconds; every second is a hard case. With 0 a scrape begins as soon as
the one before it has ended, which shows how long predictions take that come during a scrape. Times are taken
and printed as `explain.py` does, for each pause between scrapes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.explain import Round, Sending, cores_of, predict_always, print_rounds, request_of, start
from benchmarks.load_beside import share_cores
from benchmarks.samples import serving
from benchmarks.wrong_keys import cpu_s
from tests.onnx_models import write_shift

SCRAPES = 40
"""Scrapes of an idle server: the kernel counts CPU time in hundredths of a second."""
IDLE_S = 0.03
"""CPU seconds a second of a server that does nothing."""
BODY = json.dumps({"inputs": [[1.0, 2.0]]}).encode()


class Page(NamedTuple):
    """The page of a scrape, compressed as Prometheus asks for, and the seconds until it was read."""

    content: bytes
    seconds: float


def scrape(connection: http.client.HTTPConnection, coding: str = "gzip") -> Page:
    """Read the page once."""
    began = time.perf_counter()
    connection.request("GET", "/metrics", headers={"Accept-Encoding": coding})
    content = connection.getresponse().read()
    return Page(content, time.perf_counter() - began)


def wait_until_idle(server: int) -> None:
    """Wait until the server does nothing: after its start it prepares a spare process."""
    spent = math.inf
    while spent > IDLE_S:
        before = cpu_s(server)
        time.sleep(1)
        spent = cpu_s(server) - before


def scrape_idle(server: int, port: int) -> None:
    """Print what the page is and costs while nothing else happens."""
    wait_until_idle(server)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    plain, packed = scrape(connection, "identity").content, scrape(connection).content
    series = Counter(
        line.split(b'model="')[1].split(b'"')[0]
        for line in plain.splitlines()
        if b'{model="' in line and b'{model=""' not in line
    )
    before = cpu_s(server)
    times = [scrape(connection).seconds for _ in range(SCRAPES)]
    spent_ms = 1000 * (cpu_s(server) - before) / SCRAPES
    print(
        f"{len(series)} versions, {max(series.values())} series of one at most; {len(plain) / 1e3:.0f} KB,"
        f" {len(packed) / 1e3:.0f} KB compressed; {1000 * statistics.median(times):.0f} ms until it is read,"
        f" {spent_ms:.0f} ms of CPU time"
    )


class Scraper(threading.Thread):
    """Scrapes every so many seconds for the time of a round, first at a random moment."""

    def __init__(self, port: int, every_s: float, seconds: float, seed: int) -> None:
        super().__init__()
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._every_s = every_s
        self._due = time.monotonic() + random.Random(seed).uniform(0, every_s)
        self._ends = time.monotonic() + seconds

    def run(self) -> None:
        """Scrape until the round ends."""
        while self._due < self._ends:
            time.sleep(max(0.0, self._due - time.monotonic()))
            scrape(self._connection)
            self._due = max(self._due + self._every_s, time.monotonic())
        self._connection.close()


def measure(server: int, port: int, options: argparse.Namespace) -> None:
    """Send predictions without scrapes and with them, in turns, and print how long they took."""
    pipe: Connection = start(predict_always, port, options.client_cores, request_of("/predict/model-0", BODY))

    def run(seed: int, every_s: float) -> Round:
        before = cpu_s(server)
        pipe.send(Sending(options.seconds, options.per_s, seed, options.one_by_one))
        scraper = Scraper(port, every_s, options.seconds, seed)
        if every_s < math.inf:
            scraper.start()
        times = pipe.recv()
        used = cpu_s(server) - before
        if every_s < math.inf:
            scraper.join()
        return Round(times, [], used)

    pauses = (math.inf, *options.every)
    rounds: dict[float, list[Round]] = {pause: [] for pause in pauses}
    run(0, math.inf)
    for number in range(options.rounds):
        for pause in pauses if number % 2 else reversed(pauses):
            rounds[pause].append(run(number, pause))
    for pause in options.every:
        print(f"\na scrape every {pause:g} s" if pause else "\nscrapes without a pause")
        print_rounds({"alone": rounds[math.inf], "scraped": rounds[pause]}, options.per_s, options)


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--versions", type=int, default=150)
    parser.add_argument(
        "--every",
        type=float,
        nargs="+",
        default=[15.0, 1.0, 0.0],
        metavar="S",
        help="seconds between scrapes",
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--per-s", type=float, default=200.0)
    parser.add_argument("--one-by-one", action="store_true", help="one connection, timed from the sending")
    parser.add_argument("--serve", default="", help="more flags of inferpool serve, as one text")
    client, others = share_cores(argparse.Namespace(one_core=False))
    parser.add_argument("--server-cores", type=cores_of, default=others)
    parser.add_argument("--client-cores", type=cores_of, default=client)
    options = parser.parse_args()
    print("$", shlex.join(("scripts/bench", "scrapes", *sys.argv[1:])), flush=True)
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.versions):
            write_shift(Path(name), f"model-{number}", 1, 1.0)
        os.sched_setaffinity(0, options.server_cores)
        flags = ("--measure-ms", "0", *shlex.split(options.serve))
        with serving(Path(name), *flags) as (server, port):
            os.sched_setaffinity(0, options.client_cores)
            connection = http.client.HTTPConnection("127.0.0.1", port)
            for number in range(options.versions):
                connection.request("POST", f"/predict/model-{number}", BODY)
                reply = connection.getresponse()
                reply.read()
                assert reply.status == 200
            scrape_idle(server, port)
            if options.rounds:
                measure(server, port, options)


if __name__ == "__main__":
    main()
