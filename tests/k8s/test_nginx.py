"""Servers behind nginx, configured as documented, are restarted one after the other, and no request fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, MakeChaos, Serve
from tests.k8s.load import Load
from tests.server import Server, free_port, wait_until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PAGE = ROOT / "docs" / "deploy" / "behind-a-proxy.md"

pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx")


def recipe(port: int, servers: list[int]) -> str:
    """The configuration of the page, for these ports on this machine."""
    (text,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert text.count("listen 80;") == 1
    addresses = iter(f"server 127.0.0.1:{server} " for server in servers)
    text, found = re.subn(r"server 10\.0\.0\.\d:8000 ", lambda _: next(addresses), text)
    assert found == len(servers)
    return str(text.replace("listen 80;", f"listen 127.0.0.1:{port};"))


@pytest.fixture
def repository(make_chaos: MakeChaos) -> Path:
    return make_chaos("m", run_ms=2)


@pytest.fixture
def servers(serve: Serve, repository: Path) -> list[Server]:
    return [serve(repository, "--port", str(free_port())) for _ in range(2)]


@pytest.fixture
def nginx(tmp_path: Path, servers: list[Server]) -> Iterator[int]:
    """The port of nginx before the servers."""
    assert NGINX is not None
    port = free_port()
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{name}_temp_path {tmp_path / name};" for name in paths)
    file = tmp_path / "nginx.conf"
    file.write_text(
        f"daemon off; worker_processes 1; pid {tmp_path / 'pid'}; error_log {tmp_path / 'errors'};"
        f" events {{ }} http {{ access_log off; {temporary}\n"
        f"{recipe(port, [server.port for server in servers])} }}"
    )
    # Started as root, nginx would run its workers as a user who cannot read the folder.
    user = "user root; " if os.getuid() == 0 else ""
    file.write_text(user + file.read_text())
    process = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(file)], stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "errors").read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/live", verify=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, "nginx answers")
        yield port
    finally:
        process.terminate()
        process.wait()


def test_a_rolling_restart_behind_nginx_fails_no_request(
    serve: Serve, repository: Path, servers: list[Server], nginx: int
) -> None:
    """Each server gets SIGTERM under load, without time to settle, and is started again."""
    load = Load([nginx], clients=4)
    try:
        load.more(100)
        for server in servers:
            server.process.terminate()
            assert server.process.wait(60) == 0
            load.more(50)
            serve(repository, "--port", str(server.port))
            load.more(100)
    finally:
        answers = load.stop()
    assert set(answers) == {"200"}, answers
