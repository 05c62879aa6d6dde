"""The Helm chart renders what the overlays of Kustomize render, and every value gives valid manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import (
    MANIFESTS,
    Manifest,
    containers,
    environ,
    kustomize,
    only,
    pod,
    render,
    render_with,
    server_of,
    template,
    validate,
)

VALUES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "everything": {
        "models": {"claim": "weights"},
        "cache": {"claim": "found-out"},
        "keysSecret": "keys",
        "grpc": {"enabled": True},
        "priorityClassName": "high",
        "openshift": True,
        "autoscaling": {"enabled": True, "minReplicas": 3},
        "ingress": {"enabled": True, "className": "nginx", "host": "models.example.org"},
        "gateway": {"name": "shared", "namespace": "gateways", "host": "models.example.org"},
        "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
        "env": {"INFERPOOL_THREADS": 2, "INFERPOOL_ACCESS_LOG": True},
        "image": {"pullSecrets": [{"name": "registry"}]},
    },
    "gpu": {"gpu": {"enabled": True}, "models": {"image": "weights:1"}},
    "closed": {"networkPolicy": {"enabled": False}},
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_every_value_gives_valid_manifests(values: dict[str, Any]) -> None:
    manifests = template(values)
    for manifest in manifests:
        validate(manifest)
        assert manifest["metadata"]["namespace"] == "serving"
        assert manifest["metadata"]["name"] == "two-inferpool"
    labels = pod(manifests)["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "inferpool", "app.kubernetes.io/instance": "two"}
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert only(manifests, kind)["spec"]["selector"] == {"matchLabels": labels}
    assert only(manifests, "Service")["spec"]["selector"] == labels
    for container in containers(pod(manifests)["spec"]):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.skipif(kustomize() is None, reason="needs kustomize 5, or a kubectl that has it")
def test_without_values_the_chart_is_the_minimal_overlay() -> None:
    minimal = render(MANIFESTS / "overlays" / "minimal")
    assert _plain(template({}, "inferpool", "inferpool")) == _plain(minimal)


@pytest.mark.skipif(kustomize() is None, reason="needs kustomize 5, or a kubectl that has it")
def test_values_do_what_components_do(tmp_path: Path) -> None:
    names = ["models-volume", "cache-volume", "keys", "grpc", "hpa", "ingress"]
    overlay = _plain(render_with(tmp_path / "k8s", "minimal", names))
    chart = _plain(
        template(
            {
                "models": {"claim": "inferpool-models"},
                "cache": {"claim": "inferpool-cache"},
                "keysSecret": "inferpool-keys",
                "grpc": {"enabled": True},
                "autoscaling": {"enabled": True},
                "ingress": {"enabled": True},
                "monitoring": {"enabled": True},
            },
            "inferpool",
            "inferpool",
        )
    )
    # Claims are made by whoever has the storage.
    overlay = {key: manifest for key, manifest in overlay.items() if key != "PersistentVolumeClaim"}
    assert chart == overlay


@pytest.mark.skipif(kustomize() is None, reason="needs kustomize 5, or a kubectl that has it")
def test_a_store_is_that_of_the_component(tmp_path: Path) -> None:
    overlay = _plain(render_with(tmp_path / "k8s", "minimal", ["models-store", "no-prometheus-operator"]))
    assert (
        _plain(template({"models": {"store": "s3://my-bucket/models"}}, "inferpool", "inferpool")) == overlay
    )


def test_the_values_arrive() -> None:
    manifests = template(VALUES["everything"])
    spec, server = pod(manifests)["spec"], server_of(manifests)
    assert "replicas" not in only(manifests, "Deployment")["spec"]
    assert "runAsUser" not in spec["securityContext"]
    assert (spec["priorityClassName"], spec["imagePullSecrets"]) == ("high", [{"name": "registry"}])
    variables = environ(server)
    assert (variables["INFERPOOL_THREADS"], variables["INFERPOOL_ACCESS_LOG"]) == ("2", "true")
    assert only(manifests, "HorizontalPodAutoscaler")["spec"]["minReplicas"] == 3
    assert only(manifests, "Ingress")["spec"]["ingressClassName"] == "nginx"
    assert only(manifests, "HTTPRoute")["spec"]["parentRefs"] == [{"name": "shared", "namespace": "gateways"}]
    for kind in ("PodMonitor", "PrometheusRule"):
        assert only(manifests, kind)["metadata"]["labels"]["release"] == "prometheus"
    manifests = template(VALUES["gpu"])
    spec, server = pod(manifests)["spec"], server_of(manifests)
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert (spec["runtimeClassName"], environ(server)["INFERPOOL_DEVICES"]) == ("nvidia", "cuda:0")
    assert only(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert spec["initContainers"][0]["image"] == "weights:1"


def test_values_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(AssertionError, match="more than one is set"):
        template({"models": {"claim": "a", "image": "b"}})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 3}, "replica"),
        ({"models": {"claims": "a"}}, "claims"),
        ({"replicas": "many"}, "replicas"),
    ],
)
def test_values_that_the_chart_does_not_know_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(AssertionError, match=named):
        template(values)


def test_the_schema_has_every_value() -> None:
    """And nothing else, so that each value has its default and its comment."""
    known = yaml.safe_load((MANIFESTS / "chart" / "values.yaml").read_text())
    schema = json.loads((MANIFESTS / "chart" / "values.schema.json").read_text())
    # Helm adds "global" to the values of every chart.
    assert schema["properties"].keys() - {"global"} == known.keys()
    for name, value in known.items():
        inner = schema["properties"][name].get("properties")
        assert inner is None or inner.keys() == value.keys()


def _plain(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The manifests by kind, without the namespace and what Helm adds to labels."""
    return {
        manifest["kind"]: _without_helm(manifest)
        for manifest in yaml.safe_load(yaml.safe_dump(manifests))
        if manifest["kind"] != "Namespace"
    }


def _without_helm(value: Any) -> Any:
    added = {"app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart"}
    if isinstance(value, list):
        items = [_without_helm(item) for item in value]
        # The order of variables, mounts and volumes means nothing.
        named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: str(item["name"])) if named else items
    if isinstance(value, dict):
        return {key: _without_helm(inner) for key, inner in value.items() if key not in added}
    return value
