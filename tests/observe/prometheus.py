"""Debian's Prometheus on a free port, scraping a server with the project's own configuration and rules."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from tests.server import START_S, free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "prometheus"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs prometheus and promtool: apt-get install prometheus",
)

Labels = dict[str, str]


class Prometheus:
    """A process that scrapes targets and evaluates the rules, both every second."""

    def __init__(self, folder: Path, target: str | None, others: Mapping[str, str] = {}) -> None:
        """Scrape `target` (`host:port`) as the project's own job, and `others` by the names of their jobs.

        `https://` before one of the others is for a server whose certificate nobody knows. Without a target,
        the job has none.
        """
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [] if target is None else [target]}]
        for job, other in others.items():
            scheme, _, address = other.rpartition("://")
            config["scrape_configs"].append(
                {
                    "job_name": job,
                    "scheme": scheme or "http",
                    "tls_config": {"insecure_skip_verify": True},
                    "static_configs": [{"targets": [address]}],
                }
            )
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            # Alerts wait a minute or longer before they fire; this delay is changed.
            text = re.sub(r"for: \w+", "for: 2s", (FOLDER / name).read_text())
            # A rate is divided by its window. The load of a web process lasts no five minutes.
            text, changed = re.subn(r"(web_busy_seconds_total)\[5m\]", r"\1[5s]", text)
            assert changed == 1
            (folder / name).write_text(text)
        address = f"127.0.0.1:{free_port()}"
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._client = httpx.Client(base_url=f"http://{address}", timeout=60, verify=False)
        self.wait(self._ready, "Prometheus is ready", START_S)

    def query(self, expression: str, at: float | None = None) -> list[tuple[Labels, float]]:
        """The samples of an expression now, or at a Unix time."""
        found = self._get("query", query=expression, **({} if at is None else {"time": at}))
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]

    def value(self, expression: str, at: float | None = None) -> float:
        """The number of an expression with one sample."""
        ((_, number),) = self.query(expression, at)
        return number

    def exemplars(self, expression: str, begin: float, end: float) -> list[dict[str, Any]]:
        """The exemplars of series between two Unix times."""
        found = self._get("query_exemplars", query=expression, start=begin, end=end)
        return [exemplar for series in found for exemplar in series["exemplars"]]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health and its alerts."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def wait_for_value(self, expression: str, number: float, timeout_s: float) -> None:
        """Wait until the one number that an expression gives is `number`."""
        self.wait(lambda: self.value(expression) == number, f"{expression} is {number}", timeout_s)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float) -> None:
        """Wait until `condition` holds, looking ten times a second."""
        ends = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, "Prometheus has ended"
            assert time.monotonic() < ends, f"not within {timeout_s} s: {what}"
            time.sleep(0.1)

    def wait_for_alert(self, name: str, **labels: str) -> None:
        """Wait until an alert with these labels fires."""
        wanted = labels | {"alertname": name, "alertstate": "firing"}
        selector = ",".join(f'{label}="{value}"' for label, value in wanted.items())
        self.wait(lambda: self.has(f"ALERTS{{{selector}}}"), f"{name} fires", START_S)

    def has(self, expression: str) -> bool:
        """Whether an expression gives a number now."""
        return any(not math.isnan(number) for _, number in self.query(expression))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._client.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _get(self, what: str, **parameters: Any) -> Any:
        answer = self._client.get(f"/api/v1/{what}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]
