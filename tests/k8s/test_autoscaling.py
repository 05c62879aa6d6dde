"""The formulas of autoscaling in the manifests, evaluated by Prometheus.

Twice: over made-up series, where the right answer is known exactly, and over real servers under load.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import MakeChaos, Serve
from tests.k8s.manifests import MANIFESTS, Manifest, kustomize, only, render, render_with
from tests.k8s.prometheus import PROMETHEUS, Labels, Prometheus
from tests.server import wait_until

pytestmark = [
    pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus and promtool"),
    pytest.mark.skipif(kustomize() is None, reason="needs kustomize 5, or a kubectl that has it"),
]

Formulas = dict[str, str]


@pytest.fixture(scope="module")
def hpa() -> Manifest:
    return only(render(MANIFESTS / "overlays" / "cpu"), "HorizontalPodAutoscaler")


@pytest.fixture(scope="module")
def scaled_object(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    tree = tmp_path_factory.mktemp("keda") / "k8s"
    return only(render_with(tree, "cpu", ["keda"]), "ScaledObject")


@pytest.fixture(scope="module")
def by_pod() -> Formulas:
    """The adapter's queries by metric name, with the placeholders filled as the adapter does for pods."""
    config = only(render(MANIFESTS / "prometheus-adapter"), "ConfigMap")["data"]["config.yaml"]
    return {
        rule["name"]["as"]: rule["metricsQuery"]
        .replace("<<.LabelMatchers>>", 'namespace="inferpool"')
        .replace("<<.GroupBy>>", "pod")
        for rule in yaml.safe_load(config)["rules"]
    }


@pytest.fixture(scope="module")
def total(scaled_object: Manifest) -> Formulas:
    """KEDA's queries by the names of their triggers."""
    return {item["name"]: item["metadata"]["query"] for item in scaled_object["spec"]["triggers"]}


def test_the_autoscalers_agree(
    hpa: Manifest, scaled_object: Manifest, by_pod: Formulas, total: Formulas
) -> None:
    """KEDA's queries are the sums of the adapter's over pods; targets and bounds are the same."""
    names = {"busy": "inferpool_busy", "wait": "inferpool_wait_seconds"}
    for short, name in names.items():
        assert total[short].split() == f"sum({by_pod[name]}) or vector(0)".split()
    targets = {item["pods"]["metric"]["name"]: item["pods"]["target"] for item in hpa["spec"]["metrics"]}
    assert targets.keys() == by_pod.keys()
    for trigger in scaled_object["spec"]["triggers"]:
        target = targets[names[trigger["name"]]]
        assert target["type"] == trigger["metricType"] == "AverageValue"
        assert 1000 * float(trigger["metadata"]["threshold"]) == float(
            target["averageValue"].removesuffix("m")
        )
    assert hpa["spec"]["minReplicas"] == scaled_object["spec"]["minReplicaCount"]
    assert hpa["spec"]["maxReplicas"] == scaled_object["spec"]["maxReplicaCount"]
    behavior = scaled_object["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert hpa["spec"]["behavior"] == behavior


def busy(pod: str, model: str, share: float, instances: int = 1, **labels: str) -> dict[str, str]:
    """Series of a model whose instances are busy for this share of ten minutes."""
    text = _labels(pod=pod, model=model, version="1", **labels)
    step = 6 * share * instances
    return {
        f'inferpool_instance_busy_seconds_total{{{text},device="cpu"}}': f"0+{step}x60",
        f'inferpool_instances{{{text},device="cpu",state="ready"}}': f"{instances}x60",
    }


def web(pod: str, share: float, **labels: str) -> dict[str, str]:
    """The series of a web thread that is busy for this share of ten minutes."""
    return {f"inferpool_web_busy_seconds_total{{{_labels(pod=pod, **labels)}}}": f"0+{6 * share}x60"}


def wait(pod: str, model: str, seconds: float, **labels: str) -> dict[str, str]:
    """The series of a model whose queue holds this many seconds of work."""
    text = _labels(pod=pod, model=model, version="1", **labels)
    return {f"inferpool_queue_wait_seconds{{{text}}}": f"{seconds}x60"}


def _labels(**labels: str) -> str:
    labels = {"namespace": "inferpool", "job": "inferpool", **labels}
    return ",".join(f'{name}="{value}"' for name, value in labels.items())


def gone(series: dict[str, str]) -> dict[str, str]:
    """The series of a pod that left half a minute before the end."""
    return {name: values.replace("x60", "x55") + " stale" for name, values in series.items()}


CASES: dict[str, tuple[list[dict[str, str]], dict[str, float], dict[str, float]]] = {
    "the busiest model of a pod counts, by all its instances": (
        [busy("a", "x", 0.5), busy("a", "y", 0.8, instances=2), web("a", 0.2)],
        {"a": 0.8},
        {},
    ),
    "the web thread counts where it is the busiest": ([busy("a", "x", 0.1), web("a", 0.9)], {"a": 0.9}, {}),
    "pods add up, idle ones as nothing": (
        [busy("a", "x", 0.6), web("a", 0.1), busy("b", "x", 0.0), web("b", 0.0), busy("c", "x", 0.9)],
        {"a": 0.6, "b": 0.0, "c": 0.9},
        {},
    ),
    "what is scraped twice counts once": (
        [
            *(busy("a", "x", 0.6, job=job) | web("a", 0.1, job=job) for job in ("inferpool", "again")),
            *(wait("a", "x", 0.3, job=job) for job in ("inferpool", "again")),
        ],
        {"a": 0.6},
        {"a": 0.3},
    ),
    "a pod that is gone does not count": (
        [
            busy("a", "x", 0.6),
            gone(busy("b", "x", 0.9) | web("b", 0.5) | wait("b", "x", 2)),
            wait("a", "x", 0),
        ],
        {"a": 0.6},
        {"a": 0.0},
    ),
    "nor does another namespace": (
        [busy("a", "x", 0.6), busy("b", "x", 0.9, namespace="other"), wait("b", "x", 2, namespace="other")],
        {"a": 0.6},
        {},
    ),
    "the longest queue of a pod counts": (
        [wait("a", "x", 0.05), wait("a", "y", 0.4), wait("b", "x", 0.0)],
        {},
        {"a": 0.4, "b": 0.0},
    ),
    "two versions are two models": (
        [
            busy("a", "x", 0.5),
            {k.replace('version="1"', 'version="2"'): v for k, v in busy("a", "x", 0.6).items()},
        ],
        {"a": 0.6},
        {},
    ),
    "without any series there is nothing to scale by": ([], {}, {}),
}


def test_formulas_over_series_with_known_results(by_pod: Formulas, total: Formulas, tmp_path: Path) -> None:
    tests = [_case(name, by_pod, total) for name in CASES]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "6s", "tests": tests}))
    run = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def _case(case: str, by_pod: Formulas, total: Formulas) -> dict[str, Any]:
    parts, shares, waits = CASES[case]
    series = {name: values for part in parts for name, values in part.items()}
    expected = []
    for name, short, answer in (
        ("inferpool_busy", "busy", shares),
        ("inferpool_wait_seconds", "wait", waits),
    ):
        samples = [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in answer.items()]
        # Rounded, because sums of floats are inexact; -0 and 0 are the same value.
        expected += [
            _expectation(f"round({by_pod[name]}, 1e-6)", samples),
            _expectation(f"round({total[short]}, 1e-6)", [{"labels": "{}", "value": sum(answer.values())}]),
        ]
    return {
        "name": case,
        "interval": "6s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": expected,
    }


def _expectation(query: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"expr": query, "eval_time": "6m", "exp_samples": samples}


def desired(pods: int, average: float, target: float) -> int:
    """The pods that a HorizontalPodAutoscaler chooses for an AverageValue, with its tolerance of 10 %."""
    ratio = average / target
    return pods if abs(ratio - 1) <= 0.1 else math.ceil(pods * ratio)


def quicker(query: str) -> str:
    """The formula with a window for scrapes every second instead of every ten seconds."""
    assert "[1m]" in query
    return query.replace("[1m]", "[6s]")


class Load:
    """Clients that send requests for models, each `rate` times a second or without a pause."""

    def __init__(self, urls: list[str], models: list[str], clients: int, rate: float = math.inf) -> None:
        self._loop = asyncio.new_event_loop()
        self._work = [(url, model) for url in urls for model in models for _ in range(clients)]
        self._pause_s = 1 / rate
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=120, verify=False) as session:
            await asyncio.gather(*(self._ask(session, *target) for target in self._work))

    async def _ask(self, session: httpx.AsyncClient, url: str, model: str) -> None:
        due = self._loop.time()
        body = json.dumps({"inputs": [[1, 2, 3, 4]]})
        while not self._stop.is_set():
            assert (await session.post(f"{url}/predict/{model}", content=body)).status_code == 200
            due = max(self._loop.time(), due + self._pause_s)
            await asyncio.sleep(due - self._loop.time())


PODS = ("inferpool-a", "inferpool-b")
RUN_MS = 200


@pytest.fixture
def urls(serve: Serve, make_chaos: MakeChaos) -> list[str]:
    """Two servers of two models with one instance each, and no batching.

    The runs are long, so that the pauses between them, which depend on the machine, hardly count.
    """
    # The queue has a fixed limit: on a busy machine the measured one would refuse some of the clients.
    config = "[batching]\nenabled = false\n[instances]\ncount = 1\n[queue]\nmax_rows = 64\n"
    for name in ("x", "y"):
        repository = make_chaos(name, run_ms=RUN_MS, config=config)
    return [serve(repository).url for _ in PODS]


@pytest.fixture
def prometheus(urls: list[str], tmp_path: Path) -> Iterator[Prometheus]:
    ports = [int(url.rsplit(":", 1)[1]) for url in urls]
    made = Prometheus(tmp_path, dict(zip(PODS, ports, strict=True)))
    yield made
    made.stop()


def every(low: float, high: float) -> Callable[[dict[Labels, float]], bool]:
    """Whether both pods have values, each within these limits."""
    pods = {frozenset({("pod", pod)}) for pod in PODS}
    return lambda answer: answer.keys() == pods and all(low <= n <= high for n in answer.values())


def test_the_number_of_pods_follows_the_load_of_real_servers(
    urls: list[str], prometheus: Prometheus, hpa: Manifest, by_pod: Formulas, total: Formulas
) -> None:
    busy_by_pod, wait_by_pod = quicker(by_pod["inferpool_busy"]), quicker(by_pod["inferpool_wait_seconds"])
    busy_total, wait_total = quicker(total["busy"]), quicker(total["wait"])
    busy_target, wait_target = (
        float(metric["pods"]["target"]["averageValue"].removesuffix("m")) / 1000
        for metric in hpa["spec"]["metrics"]
    )

    def wished() -> int:
        """Return the number of pods that the autoscaler would choose: the larger of the two."""
        average = {
            query: sum(prometheus.ask(query).values()) / len(PODS) for query in (busy_by_pod, wait_by_pod)
        }
        return max(
            desired(len(PODS), average[busy_by_pod], busy_target),
            desired(len(PODS), average[wait_by_pod], wait_target),
        )

    # Without load each pod still has a value, which is about 0.
    prometheus.wait_for(busy_by_pod, every(0.0, 0.1))
    prometheus.wait_for(wait_by_pod, every(0.0, 0.0))
    wait_until(lambda: wished() <= 1, "one pod is enough without load")

    # These requests keep an instance half busy. A pod with two half-busy models is half busy.
    with Load(urls, ["x", "y"], clients=1, rate=500 / RUN_MS):
        prometheus.wait_for(busy_by_pod, every(0.4, 0.65))
        prometheus.wait_for(busy_total, lambda answer: 0.8 <= answer.get(frozenset(), 0) <= 1.3)
        wait_until(lambda: 1 <= wished() <= len(PODS), "the pods are enough for half of their load")

    # Overload of one model: of eight clients, seven wait in the queue.
    queue_s = 7 * RUN_MS / 1000
    with Load(urls, ["x"], clients=8):
        prometheus.wait_for(busy_by_pod, every(0.9, 1.1))
        prometheus.wait_for(wait_by_pod, every(0.7 * queue_s, 1.3 * queue_s))
        prometheus.wait_for(
            wait_total, lambda answer: 1.4 * queue_s <= answer.get(frozenset(), 0) <= 2.6 * queue_s
        )
        assert desired(len(PODS), 1.0, busy_target) == 3
        wait_until(lambda: wished() >= 5, "overload asks for more pods")

    prometheus.wait_for(busy_by_pod, every(0.0, 0.1))
    prometheus.wait_for(wait_by_pod, every(0.0, 0.0))
    wait_until(lambda: wished() <= 1, "one pod is enough after the load")
