"""Measures what scrapes of many versions cost, and how much they slow predictions.

    python -m benchmarks.scrapes [--versions 150] [--every 1] [--rounds 12] [--seconds 3] [--per-s 200]
        [--one-by-one] [--serve FLAGS]

starts a server of so many small models, each of which answers once, so that its series exist. First the
page is read while nothing else happens: its size, the time until it is read, and the server's CPU time. Then
predictions are sent at random moments, in rounds without scrapes and with one every second in turns; a
Prometheus scrapes every 15 or 60 seconds. Times are taken and printed as `explain.py` does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
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
        line.split(b'model="')[1].split(b'"')[0] for line in plain.splitlines() if b'{model="' in line
    )
    before = cpu_s(server)
    times = [scrape(connection).seconds for _ in range(SCRAPES)]
    spent_ms = 1000 * (cpu_s(server) - before) / SCRAPES
    print(
        f"{len(series)} versions, {max(series.values())} series of one at most; {len(plain) / 1e3:.0f} KB,"
        f" {len(packed) / 1e3:.0f} KB compressed; {1000 * statistics.median(times):.0f} ms until it is read,"
        f" {spent_ms:.0f} ms of CPU time"
    )


class Scraper:
    """Scrapes every so many seconds while it is on."""

    def __init__(self, port: int, every_s: float) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._every_s = every_s
        self.on = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.on.wait()
            scrape(self._connection)
            time.sleep(self._every_s)


def measure(server: int, port: int, options: argparse.Namespace) -> None:
    """Send predictions without scrapes and with them, in turns, and print how long they took."""
    pipe: Connection = start(predict_always, port, options.client_cores, request_of("/predict/model-0", BODY))
    scraper = Scraper(port, options.every)

    def run(seed: int, *, scraped: bool) -> Round:
        (scraper.on.set if scraped else scraper.on.clear)()
        before = cpu_s(server)
        pipe.send(Sending(options.seconds, options.per_s, seed, options.one_by_one))
        times = pipe.recv()
        return Round(times, [], cpu_s(server) - before)

    rounds: dict[bool, list[Round]] = {False: [], True: []}
    run(0, scraped=False)
    for number in range(options.rounds):
        for scraped in (False, True) if number % 2 else (True, False):
            rounds[scraped].append(run(number, scraped=scraped))
    print_rounds({"alone": rounds[False], "scraped": rounds[True]}, options.per_s, options)


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--versions", type=int, default=150)
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between scrapes")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0)
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
