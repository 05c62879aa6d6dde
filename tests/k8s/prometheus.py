"""A real Prometheus that scrapes servers as if they were pods."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from tests.server import free_port

PROMETHEUS = shutil.which("prometheus") and shutil.which("promtool")

Labels = frozenset[tuple[str, str]]


class Prometheus:
    """Prometheus over `{pod: port}`, with the labels that a PodMonitor gives; scrapes every second."""

    def __init__(self, folder: Path, pods: Mapping[str, int]) -> None:
        jobs = [
            {
                "job_name": "inferpool",
                "static_configs": [
                    {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "inferpool", "pod": pod}}
                    for pod, port in pods.items()
                ],
            }
        ]
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}
        # JSON is YAML.
        (folder / "prometheus.json").write_text(json.dumps(config))
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.json'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=subprocess.DEVNULL,
        )
        # Without `verify=False` it would load the certificates of the machine, for plain HTTP.
        self._client = httpx.Client(verify=False, timeout=60)

    def ask(self, query: str) -> dict[Labels, float]:
        """The instant vector of a query; empty while Prometheus starts."""
        try:
            answer = self._client.get(f"{self._url}/api/v1/query", params={"query": query})
        except httpx.TransportError:
            return {}
        if answer.status_code == 503:
            return {}
        assert answer.status_code == 200, answer.text
        result = answer.json()["data"]["result"]
        return {frozenset(item["metric"].items()): float(item["value"][1]) for item in result}

    def wait_for(
        self, query: str, wanted: Callable[[dict[Labels, float]], bool], timeout_s: float = 120.0
    ) -> dict[Labels, float]:
        """Repeat a query until `wanted` accepts the result; no result may contain NaN."""
        ends = time.monotonic() + timeout_s
        while True:
            answer = self.ask(query)
            assert not any(map(math.isnan, answer.values())), answer
            if wanted(answer):
                return answer
            assert self._process.poll() is None, "Prometheus has ended"
            assert time.monotonic() < ends, f"{query}: {answer}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._client.close()
