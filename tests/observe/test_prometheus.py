"""A real Prometheus scrapes a loaded server and returns what the clients counted."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from inferpool.observe.families import FAMILIES

from tests.certificates import Authority
from tests.chaos.inferpool_chaos import CRASH, DIE, RAISE, WAIT, WRONG_ROWS
from tests.clients import Client
from tests.engine.processes import WEB, find
from tests.http.access.keys import KeyFile
from tests.observe.prometheus import FOLDER, ROOT, Prometheus, needs_prometheus
from tests.onnx_models import write_shift
from tests.server import START_S, Server, free_port

DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "inferpool.json").read_text())
LOAD_S = 14
CRASHING = "inferpool-crashing"
"""The job of the server whose processes end."""
TROUBLED = "inferpool-troubled"
"""The job of the server whose models are slow, hang, load for ever or mix rows."""
GONE = "inferpool-gone"
"""The job of a server that does not exist."""
SLOW_S = 0.25
"""The rules take requests that last longer for slow."""
PAUSE_S = 0.06
"""A client's pause between two requests: the rates are to be there, not to be high."""
WEB_BUSY = "InferpoolWebBusy"
"""The alert that fires only while a web process has more requests than it can answer."""
GPU_PANELS = {
    "Utilization", "GPU memory", "Padded rows", "Nodes on the CPU", "GPU temperature", "GPU power"
}  # fmt: skip
"""Panels about GPUs, which are empty on a machine without one."""

UNUSED_PANELS = {"Requests by the cache"}
"""Panels about models with a cache, which the servers of these tests have not."""


class Sent(NamedTuple):
    """A request: its model, the Unix time of its response, the status, and the seconds that it took."""

    model: str
    at: float
    status: int
    took_s: float


class Load:
    """Clients that send requests of known kinds until they are stopped, in a thread of their own."""

    def __init__(self, port: int) -> None:
        self.sent: list[Sent] = []
        self.traces: set[str] = set()
        self._port = port
        self._stop = False
        self.began = time.time()
        self.ended = math.inf
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        self._thread.join()
        self.ended = time.time()

    def count(self, model: str, status: int) -> int:
        return sum(sent.model == model and sent.status == status for sent in self.sent)

    async def _run(self) -> None:
        steady = [self._client("steady", [[1.0, 2.0, 3.0, 4.0]], {}) for _ in range(3)]
        await asyncio.gather(
            *steady,
            self._client("steady", [[1.0]], {}),
            self._client("steady", [[1.0, 2.0, 3.0, 4.0]], {"x-timeout-ms": "1"}),
            self._client("diabetes", [[0.0] * 10], {}, traced=True),
            self._client("next-word", ["It is", "A list of the names of all"], {}),
            self._client("ill", [[1.0] * 4], {}),
            self._client("ill", [[RAISE] * 4], {}),
            self._client("mortal", [[DIE] * 4], {}, most=3),
            self._client("rolled", [[1.0, 2.0]], {}),
        )

    async def _client(
        self, model: str, rows: list[Any], headers: dict[str, str], *, most: int = 1_000_000,
        traced: bool = False,
    ) -> None:  # fmt: skip
        client = await Client.connect(self._port)
        body = json.dumps({"inputs": rows}).encode()
        for number in range(1, most + 1):
            if self._stop:
                break
            if traced:
                trace = f"{number:032x}"
                self.traces.add(trace)
                headers = {"traceparent": f"00-{trace}-{1:016x}-01"}
            began = time.monotonic()
            reply = await client.post(f"/predict/{model}", body, headers)
            self.sent.append(Sent(model, time.time(), reply.status, time.monotonic() - began))
            await asyncio.sleep(PAUSE_S)
        await client.close()


@contextmanager
def busy_web_process(port: int) -> Iterator[None]:
    """Keep one web process of a server busy: it always has requests of one connection before it."""
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    ends = threading.Event()

    def keep_sending() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            answered = 200
            while not ends.is_set():
                connection.sendall(answered * request)
                answered = connection.recv(1 << 20).count(b"HTTP/1.1 200")

    with ThreadPoolExecutor(1) as client:
        sending = client.submit(keep_sending)
        try:
            yield
        finally:
            ends.set()
            sending.result()


@contextmanager
def troubled(folder: Path, environ: dict[str, str]) -> Iterator[Server]:
    """A server under load in which much goes wrong, but no process ends."""
    alone = "[batching]\nenabled = false\n[instances]\ncount = 1\n"
    models = {
        "slow": ({"run_ms": 400}, alone),
        "full": ({"run_ms": 400}, alone + "[queue]\nmax_rows = 1\n"),
        # Models load one after the other, so the one that does not end comes last.
        "hung": ({"run_gate": str(folder / "run-gate")}, alone),
        "waits": ({"gate": str(folder / "load-gate")}, alone),
        "mixing": ({"run_ms": 500}, "[batching]\nmax_rows = 8\n[instances]\ncount = 1\n"),
    }
    for gate in ("run-gate", "load-gate"):
        os.mkfifo(folder / gate)
    for name, (settings, toml) in models.items():
        (folder / "models" / name / "1").mkdir(parents=True)
        (folder / "models" / name / "1" / "model.chaos").write_text(json.dumps(settings))
        (folder / "models" / name / "model.toml").write_text(toml)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    Authority(folder).issue(certificate, key, days=2)
    tls = ("--tls-certificate-file", str(certificate), "--tls-key-file", str(key))
    server = Server(folder / "models", (*tls, "--run-timeout-s", "1", "--required-models", "slow"), environ)
    ends = threading.Event()

    def send(model: str, *rows: list[float]) -> None:
        server.post(f"/predict/{model}", json={"inputs": rows})

    def keep_sending(model: str) -> None:
        while not ends.is_set():
            send(model, [1.0] * 4)
            ends.wait(5 * PAUSE_S)  # each request has a TLS handshake

    with ThreadPoolExecutor(16) as clients:
        try:
            for name in models.keys() - {"waits"}:
                server.wait_for_metric("model_state", at_least=1, model=name, state="ready")
            for model in ["slow"] * 6 + ["full"] * 4:
                clients.submit(keep_sending, model)
            clients.submit(send, "hung", [WAIT] * 4)
            for _ in range(4):
                clients.submit(send, "mixing", [WRONG_ROWS] * 4)
            yield server
        finally:
            ends.set()
            server.kill()


class Watched(NamedTuple):
    """The Prometheus that watched a server under load, and the load."""

    prometheus: Prometheus
    load: Load


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Watched]:
    """A server under load of every kind for a while: good requests, bad ones, late ones, deadly ones."""
    folder = tmp_path_factory.mktemp("watched")
    repository = folder / "repository"
    for name in ("diabetes", "next-word"):
        shutil.copytree(ROOT / "models" / name, repository / name)
    # That steady's rows do not mix cannot be read, so its requests are audited.
    chaotic = {"steady": {"run_ms": 20, "reads": False}, "ill": {"run_ms": 5}, "mortal": {}}
    for name, settings in chaotic.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.chaos").write_text(json.dumps(settings))
    (repository / "mortal" / "model.toml").write_text("[instances]\ncount = 2\n")
    for version in (1, 2):
        write_shift(repository, "rolled", version, float(version))
    (repository / "rolled" / "model.toml").write_text("[versions]\nlabels = {stable = 1}\n[labels]\n")
    (repository / "rolled" / "labels.txt").write_text("first\nsecond\n")
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "100"}
    # With keys there are metrics of tenants; the load is of the tenant that has none.
    keys = KeyFile(folder / "keys.toml")
    keys.add("unused", "admin")
    public = ("--keys-file", str(keys.path), "--public-scopes", "predict,read,metrics")
    # One of the required models does not exist.
    server = Server(repository, (*public, "--required-models", "steady,missing"), environ)
    server.wait_loaded()
    (folder / "crashing" / "fragile" / "1").mkdir(parents=True)
    (folder / "crashing" / "fragile" / "1" / "model.chaos").write_text("{}")
    crashing = Server(folder / "crashing", ("--engine", "process", "--web-processes", "2"), environ)
    crashing.wait_loaded()
    traffic = {"canary": {"version": 2, "share": 0.5, "requests": 0}, "shadow": {"version": 2}}
    for _ in range(2):  # the second one ends the first
        reply = server.request("PUT", "/models/rolled/traffic", json=traffic, headers=keys.bearer("unused"))
        assert reply.status_code == 200, reply.text
    (folder / "prometheus").mkdir()
    (folder / TROUBLED).mkdir()
    with troubled(folder / TROUBLED, environ) as third:
        targets = {
            CRASHING: f"127.0.0.1:{crashing.port}", TROUBLED: third.url, GONE: f"127.0.0.1:{free_port()}",
        }  # fmt: skip
        prometheus = Prometheus(folder / "prometheus", f"127.0.0.1:{server.port}", targets)
        # Counters that rise at once must be scraped at 0 first.
        for name in ("engine_restarts", "web_restarts", "replayed_entries", "crashed_entries"):
            zero = f'inferpool_{name}_total{{job="{CRASHING}"}} == 0'
            prometheus.wait(partial(prometheus.has, zero), "a first scrape", START_S)
        prometheus.wait(lambda: prometheus.value("sum(up)") == 3, "a first scrape", START_S)
        load = Load(server.port)
        try:
            # Keys that cannot be read again, a request that ends two engines, a web process that is killed.
            keys.path.write_text("no TOML")
            assert crashing.post("/predict/fragile", json={"inputs": [[CRASH] * 4]}).status_code == 500
            os.kill(find(crashing, WEB)[0], signal.SIGKILL)
            prometheus.wait(lambda: time.time() > load.began + LOAD_S, "the load lasts", LOAD_S + START_S)
            prometheus.wait(lambda: prometheus.has('ALERTS{alertstate="firing"}'), "an alert fires", START_S)
            load.stop()
            with busy_web_process(crashing.port):
                prometheus.wait_for_alert(WEB_BUSY, job=CRASHING)
            prometheus.wait(
                lambda: prometheus.value("time() - min(timestamp(up))") < 1, "a last scrape", START_S
            )
            yield Watched(prometheus, load)
        finally:
            load.stop()
            prometheus.close()
            server.kill()
            crashing.kill()


pytestmark = needs_prometheus


def test_counters_are_those_of_the_clients(watched: Watched) -> None:
    """After the load, the counts by model and status are those of the clients."""
    prometheus, load = watched
    for model, status in (
        ("steady", 200), ("steady", 422), ("steady", 504), ("diabetes", 200), ("ill", 200), ("ill", 500),
    ):  # fmt: skip
        expression = f'inferpool_requests_total{{model="{model}",code="{status}"}}'
        expected = load.count(model, status)
        assert expected, (model, status)
        prometheus.wait_for_value(expression, expected, START_S)


def test_rates_are_those_of_the_clients(watched: Watched) -> None:
    """The rate that Prometheus computes is that of the clients' own counts."""
    prometheus, load = watched
    end = load.began + LOAD_S
    for model in ("steady", "diabetes", "ill"):
        span = f'inferpool_requests_total{{model="{model}",code="200"}}[10s]'
        rate = prometheus.value(f"rate({span})", end)
        seen = sum(
            sent.model == model and sent.status == 200 and end - 10 < sent.at <= end for sent in load.sent
        )
        assert rate == pytest.approx(seen / 10, rel=0.3), model


def test_quantiles_and_sums_show_the_time_of_the_model(watched: Watched) -> None:
    """A model that takes 20 ms has its median in the bucket of 20 ms or, on a busy machine, above."""
    prometheus, load = watched
    end = load.began + LOAD_S

    def quantile(share: float, kind: str) -> float:
        rate = f'rate(inferpool_{kind}_duration_seconds_bucket{{model="steady"}}[10s])'
        return prometheus.value(f"histogram_quantile({share}, {rate})", end)

    def spent(kind: str) -> float:
        return prometheus.value(f'rate(inferpool_{kind}_duration_seconds_sum{{model="steady"}}[10s])', end)

    assert 0.015 < quantile(0.5, "compute") <= 0.2
    # Sums, because quantiles within one bucket are guesses. Refused requests are in the first sum only.
    assert spent("request") > spent("queue") + spent("compute")
    busy = 'rate(inferpool_instance_busy_seconds_total{model="steady"}[10s])'
    ran = 'rate(inferpool_batch_rows_count{model="steady"}[10s])'
    assert 0.020 <= prometheus.value(f"sum({busy}) / sum({ran})", end) < 0.2


def test_every_rule_can_be_evaluated(watched: Watched) -> None:
    """Prometheus has evaluated each rule of the file without an error."""
    rules = watched.prometheus.rules()
    named = re.findall(r"(?:record|alert): (\S+)", (FOLDER / "rules.yml").read_text())
    assert sorted(rule["name"] for rule in rules) == sorted(named)
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}


def test_recorded_ratios_are_those_of_the_load(watched: Watched) -> None:
    """The recorded share of failures is that of the failed requests, and 0 if none failed.

    No request that was quick for its client counts as slow.
    """
    prometheus, load = watched
    end = load.ended
    wrong, right = load.count("ill", 500), load.count("ill", 200)
    ratio = prometheus.value('inferpool:request_errors:ratio_rate5m{model="ill"}', end)
    assert ratio == pytest.approx(wrong / (wrong + right), rel=0.3)
    assert prometheus.value('inferpool:request_errors:ratio_rate5m{model="diabetes"}', end) == 0
    took = [sent.took_s for sent in load.sent if sent.model == "diabetes"]
    slow = sum(seconds > SLOW_S for seconds in took) / len(took)  # 0, but on a busy machine
    ratio = prometheus.value('inferpool:requests_slow:ratio_rate5m{model="diabetes"}', end)
    assert ratio <= 1.3 * slow + 0.01
    assert prometheus.query('inferpool:requests:rate5m{model=""}', end) == []


def test_exactly_the_expected_alerts_fire(watched: Watched) -> None:
    """Each trouble that the servers have fires its alert, and nothing fires any other alert."""
    prometheus = watched.prometheus
    expected = {
        ("InferpoolModelFailed", "broken"), ("InferpoolModelUnavailable", "broken"),
        ("InferpoolInstanceLost", "mortal"), ("InferpoolErrorsBurnFast", "ill"),
        ("InferpoolErrorsBurnSlowly", "ill"), ("InferpoolDeadlinesMissed", "steady"),
        ("InferpoolNotReady", None), ("InferpoolServerNotReady", None), ("InferpoolKeysStale", None),
        ("InferpoolEngineRestarts", None), ("InferpoolWebRestarts", None),
        ("InferpoolRequestsCrash", "fragile"), ("InferpoolRequestsReplayed", "fragile"),
        ("InferpoolLatencyBurnFast", "slow"), ("InferpoolLatencyBurnSlowly", "slow"),
        ("InferpoolQueueOld", "slow"), ("InferpoolRefusing", "full"), ("InferpoolInstanceHung", "hung"),
        ("InferpoolModelLoadsLong", "waits"), ("InferpoolBatchingStopped", "mixing"),
        ("InferpoolCertificateExpires", None), ("InferpoolServerDown", None),
    }  # fmt: skip
    # The three failures of "mortal" are too few to call anybody.

    def firing() -> set[tuple[str, str | None]]:
        alerts = prometheus.query('ALERTS{alertstate="firing"}')
        return {
            (labels["alertname"], labels.get("model"))
            for labels, _ in alerts
            # On a busy machine requests do take longer. No web process is busy any more.
            if labels["alertname"] != WEB_BUSY
            and (not labels["alertname"].startswith("InferpoolLatency") or labels["model"] == "slow")
        }

    with suppress(AssertionError):  # the next line tells more
        prometheus.wait(lambda: firing() >= expected, "every alert that is due fires", START_S)
    assert firing() == expected


def test_a_web_process_with_more_requests_than_it_can_answer_is_found(watched: Watched) -> None:
    """It is one of two web processes. No other server's is found, though all share the cores."""
    firing = f'ALERTS{{alertname="{WEB_BUSY}",alertstate="firing"}}'
    found = watched.prometheus.query(f"last_over_time({firing}[5m])")
    assert {labels["job"] for labels, _ in found} == {CRASHING}
    assert len({labels["process"] for labels, _ in found}) == 1


def test_every_alert_is_provoked_here_or_beside_a_server_of_another_test(watched: Watched) -> None:
    prometheus = watched.prometheus
    fired = prometheus.query('last_over_time(ALERTS{alertstate="firing"}[5m])')
    provoked = {labels["alertname"] for labels, _ in fired}
    alerts = {rule["name"] for rule in prometheus.rules() if rule["type"] == "alerting"}
    elsewhere = {
        "InferpoolAbsent": Path(__file__),
        "InferpoolMemoryHigh": ROOT / "tests/http/predict/test_memory_limit.py",
        "InferpoolDrift": ROOT / "tests/http/predict/test_observations.py",
        "InferpoolSamplesStopped": ROOT / "tests/http/predict/test_observations.py",
        "InferpoolEngineMissing": ROOT / "tests/engine/test_two_cards.py",
        "InferpoolGpuFallback": ROOT / "tests/engine/test_two_cards.py",
    }
    assert alerts - provoked <= elsewhere.keys()
    for name, file in elsewhere.items():
        assert f'wait_for_alert("{name}"' in file.read_text()


def test_an_alert_fires_if_no_server_is_scraped(tmp_path: Path) -> None:
    with Prometheus(tmp_path, None) as prometheus:
        prometheus.wait_for_alert("InferpoolAbsent")


def test_exemplars_are_traces_of_the_load(watched: Watched) -> None:
    """Prometheus keeps exemplars of each duration, with trace ids that the client sent."""
    prometheus, load = watched
    for kind in ("request", "queue", "compute"):
        series = f'inferpool_{kind}_duration_seconds_bucket{{model="diabetes"}}'
        exemplars = prometheus.exemplars(series, load.began, load.ended + 5)
        assert exemplars
        assert {exemplar["labels"]["trace_id"] for exemplar in exemplars} <= load.traces
        assert all(load.began - 1 < exemplar["timestamp"] < load.ended + 1 for exemplar in exemplars)
    assert not prometheus.exemplars('inferpool_request_duration_seconds_bucket{model="ill"}', 0, load.ended)


def panels() -> list[dict[str, Any]]:
    """Every panel of the dashboard that shows data."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Any]:
    """Every query of the dashboard: of its panels, its variables and its annotations."""
    for panel in panels():
        for target in panel["targets"]:
            yield pytest.param(panel["title"], target["expr"], id=f"{panel['title']}-{target['refId']}")
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            expression = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert expression
            yield pytest.param(variable["name"], f"count by ({expression[2]}) ({expression[1]})")
    for annotation in DASHBOARD["annotations"]["list"]:
        yield pytest.param(annotation["name"], annotation["expr"])


@pytest.mark.parametrize(("title", "expression"), list(queries()))
def test_every_query_of_the_dashboard_returns_data(title: str, expression: str, watched: Watched) -> None:
    """Panels, variables and annotations show data; Prometheus at least parses those about GPUs."""
    values = {"__rate_interval": "10s", "model": ".*", "instance": ".*", "namespace": ".*", "job": ".*"}
    for variable, value in ((f"${name}", value) for name, value in values.items()):
        expression = expression.replace(variable, value)
    assert "$" not in expression
    found = watched.prometheus.query(expression, watched.load.began + LOAD_S)
    if title in GPU_PANELS or title in UNUSED_PANELS:
        assert found == [], "it has data; test it like the others"
    else:
        if title == "Alerts":
            found = watched.prometheus.query(expression)
        assert any(not math.isnan(number) for _, number in found), expression


def test_rules_and_dashboard_name_exactly_the_exported_metrics() -> None:
    """Rules and dashboard name exported metrics only, and every exported metric."""
    texts = (FOLDER / "rules.yml").read_text() + json.dumps(DASHBOARD)
    named = {re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(r"inferpool_(\w+)", texts)}
    assert named == FAMILIES.keys()
    assert {panel["title"] for panel in panels()} >= GPU_PANELS


def test_a_version_in_trouble_has_at_most_sixty_series_a_shadow_too(watched: Watched) -> None:
    prometheus, load = watched
    every = '{__name__=~"inferpool_.*",model!="",version!=""}'
    counts = {
        (labels["model"], labels["version"]): count
        for labels, count in prometheus.query(f"count by (job, model, version) ({every})", load.ended)
    }
    models = {"steady", "ill", "mortal", "mixing", "hung", "next-word", "fragile"}
    assert {model for model, _ in counts} >= models
    assert ("rolled", "2") in counts, "it is a canary and a shadow"
    assert max(counts.values()) <= 60, counts
