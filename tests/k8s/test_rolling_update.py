"""Servers behind a real proxy are replaced one after the other, and no request fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeChaos, Serve
from tests.k8s.load import Load
from tests.k8s.manifests import MANIFESTS, environ, kustomize, render, server_of
from tests.k8s.proxy import HAPROXY, Proxy
from tests.server import Server, free_port

pytestmark = [
    pytest.mark.skipif(HAPROXY is None, reason="needs haproxy"),
    pytest.mark.skipif(kustomize() is None, reason="needs kustomize 5, or a kubectl that has it"),
]


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
        load.more(100)
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
            load.more(100)
    finally:
        answers = load.stop()
    assert set(answers) == {"200"}, answers
    for server in servers:
        server.wait_for("the settle time is over")
