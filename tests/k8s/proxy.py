"""A real HAProxy before some servers: as a proxy of requests, and of connections as kube-proxy is."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.server import free_port

HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

# No retries and no redispatch: a request that a server refuses or drops must be visible.
# Without `timeout check`, a check has 250 ms, and a busy machine takes both servers out of service.
CONFIG = """
global
  stats socket {folder}/admin.sock level admin
defaults
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  timeout check 20s
  retries 0
  option httpchk GET /health/ready
  http-check expect status 200
  default-server inter 250ms fall 2 rise 1 init-addr none
listen requests
  mode http
  bind 127.0.0.1:{requests}
{servers}
listen connections
  mode tcp
  bind 127.0.0.1:{connections}
{servers}
"""


class Proxy:
    """HAProxy before the servers on these ports, which are called s0, s1, …"""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        assert HAPROXY is not None
        self.requests, self.connections = free_port(), free_port()
        self._admin = folder / "admin.sock"
        servers = "\n".join(f"  server s{n} 127.0.0.1:{port} check" for n, port in enumerate(ports))
        file = folder / "haproxy.cfg"
        file.write_text(
            CONFIG.format(
                folder=folder, requests=self.requests, connections=self.connections, servers=servers
            )
        )
        self._process = subprocess.Popen([HAPROXY, "-db", "-f", str(file)], stderr=subprocess.DEVNULL)

    def states(self, server: int) -> set[str]:
        """The states of a server in the two proxies: `UP`, `DOWN`, `DRAIN`, …"""
        table = self.command("show stat").lstrip("# ")
        rows = csv.DictReader(table.splitlines())
        return {row["status"].split()[0] for row in rows if row["svname"] == f"s{server}"}

    def wait_for(self, server: int, state: str, timeout_s: float = 120.0) -> None:
        """Wait until the server has this state in both proxies."""
        ends = time.monotonic() + timeout_s
        while not self._admin.exists() or self.states(server) != {state}:
            assert self._process.poll() is None, "HAProxy has ended"
            assert time.monotonic() < ends, f"s{server} is {self.states(server)}, not {state}"
            time.sleep(0.05)

    def command(self, text: str) -> str:
        """HAProxy's response to a command on its admin socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._admin))
            connection.sendall(text.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def withdraw(self, server: int) -> None:
        """Send no new connections to a server, as when an endpoint is removed; open ones stay."""
        for backend in ("requests", "connections"):
            self.command(f"set server {backend}/s{server} state drain")

    def restore(self, server: int) -> None:
        """Send requests to a server again as soon as it is ready."""
        for backend in ("requests", "connections"):
            self.command(f"set server {backend}/s{server} state ready")

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
