"""Clients that keep asking while servers are replaced."""

from __future__ import annotations

import json
import threading
from collections import Counter

import httpx
import numpy as np

from tests.chaos import inferpool_chaos as chaos

PAUSE_S = 0.1
"""Pause of a client after each request; without one the clients would fill the machine."""


class Load:
    """Clients that send requests with short pauses, each on a connection that it keeps open."""

    def __init__(self, ports: list[int], clients: int) -> None:
        self.answers: Counter[str] = Counter()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(port, seed)) for port in ports for seed in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, port: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        # Without `verify=False` each client would load the certificates of the machine, for plain HTTP.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, verify=False) as client:
            while not self._stopped.is_set():
                rows = rng.integers(0, 9, (2, 4)).astype(float)
                try:
                    reply = client.post("/predict/m", content=json.dumps({"inputs": rows.tolist()}))
                    outcome = str(reply.status_code)
                    if (
                        reply.status_code == 200
                        and reply.json()["outputs"]["sum"] != chaos.expected(rows).tolist()
                    ):
                        outcome = "wrong"
                except httpx.HTTPError as error:
                    outcome = repr(error)
                with self._lock:
                    self.answers[outcome] += 1
                self._stopped.wait(PAUSE_S)

    def more(self, count: int) -> None:
        """Wait until `count` more requests are answered."""
        wanted = self.answers.total() + count
        while self.answers.total() < wanted:
            assert any(thread.is_alive() for thread in self._threads)
            self._stopped.wait(0.02)

    def stop(self) -> Counter[str]:
        """End the clients; returns how many requests had each outcome."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(30)
        return self.answers
