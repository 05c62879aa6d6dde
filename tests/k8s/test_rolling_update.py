"""Servers behind a real proxy are replaced one after the other, and no request fails."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.conftest import MakeChaos, Serve
from tests.k8s.manifests import MANIFESTS, environ, kustomize, render, server_of
from tests.k8s.proxy import HAPROXY, Proxy
from tests.server import Server, free_port

pytestmark = [
    pytest.mark.skipif(HAPROXY is None, reason="needs haproxy"),
    pytest.mark.skipif(kustomize() is None, reason="needs kustomize 5, or a kubectl that has it"),
]


PAUSE_S = 0.01
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
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
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


@pytest.fixture
def proxy(tmp_path: Path, servers: list[Server]) -> Iterator[Proxy]:
    made = Proxy(tmp_path, [server.port for server in servers])
    for number in range(len(servers)):
        made.wait_for(number, "UP")
    yield made
    made.stop()


@pytest.fixture
def repository(make_chaos: MakeChaos) -> Path:
    return make_chaos("m", run_ms=2)


@pytest.fixture
def servers(serve: Serve, repository: Path) -> list[Server]:
    return [_start(serve, repository, free_port()) for _ in range(2)]


def _start(serve: Serve, repository: Path, port: int) -> Server:
    """A server with the variables of the deployment."""
    own = environ(server_of(render(MANIFESTS / "overlays" / "cpu")))
    del own["INFERPOOL_CACHE_DIR"]
    return serve(repository, "--port", str(port), **own)


def test_a_rolling_update_under_load_fails_no_request(
    serve: Serve, repository: Path, servers: list[Server], proxy: Proxy
) -> None:
    """Each server gets SIGTERM under load and is replaced once it has ended; every request is answered.

    The first server leaves as in Kubernetes: during preStop it gets no new connections but keeps the open
    ones. The second leaves as behind other load balancers, which learn of it only from /health/ready.
    """
    load = Load([proxy.requests, proxy.connections], clients=4)
    try:
        load.more(200)
        for number, server in enumerate(servers):
            if number == 0:
                proxy.withdraw(number)
                load.more(50)
            server.process.terminate()
            if number > 0:
                proxy.wait_for(number, "DOWN")
            load.more(50)
            assert server.process.wait(60) == 0
            _start(serve, repository, server.port)
            proxy.restore(number)
            proxy.wait_for(number, "UP")
            load.more(200)
    finally:
        answers = load.stop()
    assert set(answers) == {"200"}, answers
    for server in servers:
        server.wait_for("the settle time is over")
