"""Replaces the pods of a Deployment under load through its Service, and counts the requests that fail.

    python benchmarks/rolling_deployment.py [--namespace NAME] [--change restart|evict] [--rate N]
    python benchmarks/rolling_deployment.py -- kubectl … set image deployment/inferpool inferpool=inferpool:2

kubectl chooses the cluster, by KUBECONFIG. The Deployment serves the bundled model `digits`, or another one
that `--path`, `--body` and `--content-type` name. Clients in a pod of the same image send requests to the
address of the Service: half of them over connections that they keep open, half over a new connection for
each request. No client asks twice, so each error counts, as does an answer unlike the first one of the same
version. A kept connection that the server has closed before a request is opened again.

`restart` is `kubectl rollout restart`. `evict` evicts each pod in turn, as draining a node does, and waits
while the PodDisruptionBudget forbids it. A command after `--` is run instead. A change ends when all replicas
are up to date and available, and the old pods are gone.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.percentiles import percentile

SAMPLE = Path(__file__).parent.parent / "models" / "digits" / "samples" / "7.png"
POD = "inferpool-load"
LINES_BEFORE, LINES_AFTER = 10, 10
"""How many lines the clients print before the change, and after it: two a second."""
CHANGE_S = 600
ANSWERED = "answered"

CLIENTS = r"""
import base64, collections, http.client, json, os, select, threading, time

settings = json.loads(os.environ["LOAD"])
body, interval = base64.b64decode(settings["body"]), settings["clients"] / settings["rate"]
lock, times, outcomes, answers, begun = threading.Lock(), [], collections.Counter(), {}, {}


def ask(connection):
    connection.request("POST", settings["path"], body, {"Content-Type": settings["type"]})
    reply = connection.getresponse()
    content = reply.read()
    if reply.status != 200:
        return f"{reply.status} {reply.reason}"
    answer = {name: value for name, value in json.loads(content).items() if name != "id"}
    with lock:
        expected = answers.setdefault(answer.get("version"), answer)
    return "answered" if answer == expected else f"another answer: {content[:200]!r}"


def closed(connection):
    return connection.sock is None or bool(select.select([connection.sock], [], [], 0)[0])


def client(number):
    keeps, connection, due = number % 2 == 0, None, time.monotonic() + interval * number / settings["clients"]
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        began = time.monotonic()
        with lock:
            begun[number] = began
        if connection is None or not keeps or closed(connection):
            if connection is not None:
                connection.close()
            connection = http.client.HTTPConnection(settings["host"], settings["port"], timeout=30)
        try:
            outcome = ask(connection)
        except (OSError, ValueError, http.client.HTTPException) as error:
            connection.close()
            connection, outcome = None, f"{type(error).__name__}: {error} ({'kept' if keeps else 'new'})"
        ended = time.monotonic()
        with lock:
            del begun[number]
            times.append(round(1000 * (ended - began), 2))
            outcomes[outcome] += 1
        due = max(due + interval, ended)


for number in range(settings["clients"]):
    threading.Thread(target=client, args=(number,), daemon=True).start()
while True:
    time.sleep(0.5)
    with lock:
        oldest_s = time.monotonic() - min(begun.values(), default=time.monotonic())
        line = json.dumps({"times": times, "outcomes": outcomes, "oldest_s": oldest_s})
        times.clear()
        outcomes.clear()
    print(line, flush=True)
"""


class Load:
    """The pod with the clients; what it prints is collected until it is deleted."""

    def __init__(self, namespace: str, manifest: dict[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._namespace = namespace
        delete(namespace)
        kubectl(namespace, "create", "--filename=-", given=json.dumps(manifest))
        kubectl(namespace, "wait", "--for=condition=Ready", f"pod/{POD}", "--timeout=180s")
        self._logs = subprocess.Popen(
            ["kubectl", "--namespace", namespace, "logs", "--follow", POD], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._logs.stdout is not None
        try:
            for line in self._logs.stdout:
                with self._changed:
                    self.lines.append(json.loads(line))
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def wait(self, lines: int) -> None:
        """Wait until the clients have printed so many more lines."""
        wanted = len(self.lines) + lines
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self.lines) >= wanted)
        if self._ended:
            sys.exit(f"the pod {POD} has ended")

    def stop(self) -> None:
        """Delete the pod."""
        delete(self._namespace)
        with self._logs:
            self._logs.terminate()
            self._reader.join()


def delete(namespace: str) -> None:
    """Delete the pod with the clients, if there is one."""
    kubectl(namespace, "delete", "pod", POD, "--ignore-not-found", "--grace-period=0", "--force")


def kubectl(namespace: str, *words: str, given: str | None = None) -> str:
    """Return the output of kubectl; end the program with its error if it fails."""
    run = subprocess.run(
        ["kubectl", "--namespace", namespace, *words],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f"kubectl {' '.join(words)}\n{run.stderr}")
    return run.stdout


def read(namespace: str, *words: str) -> dict[str, Any]:
    """Return what `kubectl get` shows as JSON."""
    found: dict[str, Any] = json.loads(kubectl(namespace, "get", *words, "--output=json"))
    return found


def load_pod(image: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of the pod with the clients, which the standard `restricted` admits."""
    security = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "load",
                "image": image,
                "command": ["/opt/inferpool/bin/python3", "-c", CLIENTS],
                "env": [{"name": "LOAD", "value": json.dumps(settings)}],
                "securityContext": security,
            }],
        },
    }  # fmt: skip


def pods(namespace: str, deployment: dict[str, Any], *, only_ending: bool = False) -> list[str]:
    """Return the names of the pods of a Deployment, or of those that are about to end."""
    selector = deployment["spec"]["selector"]["matchLabels"].items()
    found = read(namespace, "pods", "--selector", ",".join(f"{name}={value}" for name, value in selector))
    return [
        pod["metadata"]["name"]
        for pod in found["items"]
        if not only_ending or "deletionTimestamp" in pod["metadata"]
    ]


def evict(namespace: str, deployment: dict[str, Any]) -> None:
    """Evict each pod in turn; each waits until the PodDisruptionBudget allows it."""
    for name in pods(namespace, deployment):
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
        }
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
        refused = 0
        while True:
            run = subprocess.run(
                ["kubectl", "create", "--raw", path, "--filename=-"],
                input=json.dumps(eviction),
                capture_output=True,
                text=True,
                check=False,
            )
            if not run.returncode:
                break
            if "disruption budget" not in run.stderr or refused == CHANGE_S:
                sys.exit(run.stderr)
            refused += 1
            time.sleep(1)
        print(f"{name}: evicted, after {refused} refusals by the PodDisruptionBudget")


def change(options: argparse.Namespace, deployment: dict[str, Any]) -> None:
    """Make the change, and wait until it has ended."""
    name, namespace = options.deployment, options.namespace
    if options.command:
        if status := subprocess.run(options.command, check=False).returncode:
            print(f"the command ended with status {status}")
    elif options.change == "restart":
        kubectl(namespace, "rollout", "restart", f"deployment/{name}")
    else:
        evict(namespace, deployment)
    rollout = ("rollout", "status", f"deployment/{name}", f"--timeout={CHANGE_S}s")
    kubectl(namespace, *rollout)
    if ending := pods(namespace, deployment, only_ending=True):
        kubectl(
            namespace, "wait", "--for=delete", *(f"pod/{pod}" for pod in ending), f"--timeout={CHANGE_S}s"
        )
    kubectl(namespace, *rollout)


def report(name: str, lines: Sequence[dict[str, Any]]) -> Counter[str]:
    """Print the figures of one phase; return how many requests had each outcome."""
    times = [each for line in lines for each in line["times"]] or [math.nan]
    outcomes: Counter[str] = Counter()
    for line in lines:
        outcomes.update(line["outcomes"])
    print(
        f"{name} {outcomes.total():6} requests   {outcomes.total() - outcomes[ANSWERED]:4} failed   "
        f"p50 {percentile(times, 0.5):7.1f} ms   p99 {percentile(times, 0.99):7.1f} ms   "
        f"longest {max(times):7.1f} ms"
    )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--namespace", default="inferpool")
    parser.add_argument("--deployment", default="inferpool")
    parser.add_argument("--service", default="inferpool")
    parser.add_argument("--change", choices=["restart", "evict"], default="restart")
    parser.add_argument("--rate", type=float, default=50, help="requests per second, of all clients together")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--path", default="/predict/digits")
    parser.add_argument("--body", type=Path, default=SAMPLE)
    parser.add_argument("--content-type", default="image/png")
    parser.add_argument("command", nargs="*", help="a command that makes the change")
    options = parser.parse_args()
    namespace = options.namespace
    deployment = read(namespace, "deployment", options.deployment)
    service = read(namespace, "service", options.service)["spec"]
    settings = {
        "host": service["clusterIP"],
        "port": next(port["port"] for port in service["ports"] if port.get("name", "http") == "http"),
        "path": options.path,
        "type": options.content_type,
        "body": base64.b64encode(options.body.read_bytes()).decode(),
        "rate": options.rate,
        "clients": options.clients,
    }
    images = {each["name"]: each["image"] for each in deployment["spec"]["template"]["spec"]["containers"]}
    # Beside the server there may be containers that a mesh or a collector of logs has added.
    image = images.get("inferpool", next(iter(images.values())))
    load = Load(namespace, load_pod(image, settings))
    try:
        load.wait(LINES_BEFORE)
        before = len(load.lines)
        old, began = set(pods(namespace, deployment)), time.monotonic()
        change(options, deployment)
        ended = time.monotonic()
        load.wait(LINES_AFTER)
        # A request without an answer counts once its client has given up.
        while load.lines[-1]["oldest_s"] > time.monotonic() - ended:
            load.wait(1)
        new = set(pods(namespace, deployment)) - old
    finally:
        load.stop()
    outcomes = report("before", load.lines[:before]) + report("change", load.lines[before:])
    print(f"the change took {ended - began:.0f} s; {len(new)} pods are new")
    failures = [(outcome, count) for outcome, count in outcomes.most_common() if outcome != ANSWERED]
    for outcome, count in failures:
        print(f"  {count} × {outcome}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
