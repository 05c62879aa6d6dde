"""The rendered manifests fit Kubernetes, the server and each other."""

from __future__ import annotations

import itertools
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from inferpool.observe.families import FAMILIES
from inferpool.server import BODY_GRACE_S, CLOSE_TIMEOUT_S
from inferpool.settings import Settings
from inferpool.settings_sources import read_settings

from tests.conftest import ROOT, Serve
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
    validate,
)

pytestmark = pytest.mark.skipif(kustomize() is None, reason="needs kustomize 5, or a kubectl that has it")

OVERLAYS = ("cpu", "gpu")
PAIRS = itertools.product(("models-volume", "models-image", ""), ("hpa", "keda", ""))
WAYS = [
    [component for component in (*pair, operator, spans) if component]
    for number, pair in enumerate(PAIRS)
    for operator, spans in itertools.product(("no-prometheus-operator", ""), ("otel", ""))
    if (bool(operator) + bool(spans) + number) % 2
]
"""Half of all ways: each of the last two components is in some, and not in others, of each pair's."""


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Manifest]:
    """The rendered manifests of an overlay."""
    return render(MANIFESTS / "overlays" / request.param)


FOLDERS = [
    *("overlays/cpu", "overlays/gpu", "overlays/minimal", "overlays/openshift"),
    *("kserve", "prometheus-adapter"),
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_fits_the_schema_of_its_kind(folder: str) -> None:
    for manifest in render(MANIFESTS / folder):
        validate(manifest)


@pytest.mark.parametrize(
    ("name", "way"),
    # Each pair has two ways: one for each overlay.
    [
        pytest.param(OVERLAYS[(number + number // 2) % 2], way, id="+".join(way) or "bare")
        for number, way in enumerate(WAYS)
    ],
)
def test_the_components_combine(name: str, way: list[str], tmp_path: Path) -> None:
    manifests = render_with(tmp_path / "k8s", name, way)
    for manifest in manifests:
        validate(manifest)
    kinds = {manifest["kind"] for manifest in manifests}
    assert ("HorizontalPodAutoscaler" in kinds) == ("hpa" in way)
    assert ("ScaledObject" in kinds) == ("keda" in way)
    assert ({"PodMonitor", "PrometheusRule"} <= kinds) != ("no-prometheus-operator" in way)
    # The autoscaler and the manifest must not both set the number of pods.
    assert ("replicas" in only(manifests, "Deployment")["spec"]) != bool({"hpa", "keda"} & {*way})
    variables = environ(server_of(manifests))
    assert ("OTEL_EXPORTER_OTLP_ENDPOINT" in variables) == ("otel" in way)
    # The server keeps its own variables and its permitted clients.
    assert environ(server_of(_base())).items() <= variables.items()
    policy, plain = (only(some, "NetworkPolicy")["spec"] for some in (manifests, _base()))
    assert bool(policy["egress"]) == ("otel" in way)
    assert {**policy, "egress": []} == plain
    mounts = {mount["mountPath"]: mount for mount in server_of(manifests)["volumeMounts"]}
    assert ("/models" in mounts) == any(name.startswith("models-") for name in way)
    assert mounts.get("/models", {"readOnly": True})["readOnly"]
    _check_pod(pod(manifests)["spec"])


def test_the_minimal_overlay_needs_nothing_but_kubernetes() -> None:
    """No operator, no autoscaler, no volume that has to be there before."""
    manifests = render(MANIFESTS / "overlays" / "minimal")
    assert not [manifest["kind"] for manifest in manifests if "." in manifest["apiVersion"].split("/")[0]
                and not manifest["apiVersion"].split("/")[0].endswith(".k8s.io")]  # fmt: skip
    kinds = {manifest["kind"] for manifest in manifests}
    assert not kinds & {"HorizontalPodAutoscaler", "PersistentVolumeClaim"}
    assert all("emptyDir" in volume for volume in pod(manifests)["spec"]["volumes"])
    _check_pod(pod(manifests)["spec"])


def test_openshift_may_choose_the_user() -> None:
    spec = pod(render(MANIFESTS / "overlays" / "openshift"))["spec"]
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & spec["securityContext"].keys()
    assert not any("runAsUser" in container["securityContext"] for container in containers(spec))
    _check_pod(spec)


def test_the_other_components_combine(tmp_path: Path) -> None:
    """Keys from a Secret, Ingress and Gateway with TLS, a priority, and a cache that survives pods."""
    names = ["models-volume", "keys", "grpc", "ingress", "gateway", "priority", "cache-volume"]
    manifests = render_with(tmp_path / "k8s", "cpu", names)
    for manifest in manifests:
        validate(manifest)
    spec, server = pod(manifests)["spec"], server_of(manifests)
    _check_pod(spec)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "inferpool-cache"}}
    assert environ(server)["INFERPOOL_CACHE_DIR"] == mounts["cache"]
    assert volumes["keys"]["secret"]["secretName"] == "inferpool-keys"
    assert Path(environ(server)["INFERPOOL_KEYS_FILE"]).parent == Path(mounts["keys"])
    settings = read_settings({}, environ(server))
    assert settings.public_scopes == ("metrics",)
    ports = {port["name"]: port for port in only(manifests, "Service")["spec"]["ports"]}
    assert ports["grpc"]["port"] == settings.grpc_port
    assert {"name": "grpc", "containerPort": settings.grpc_port} in server["ports"]
    assert server["readinessProbe"]["grpc"] == {"port": settings.grpc_port}
    assert "httpGet" not in server["readinessProbe"]
    assert {"port": "grpc"} in only(manifests, "NetworkPolicy")["spec"]["ingress"][0]["ports"]
    assert spec["priorityClassName"] == only(manifests, "PriorityClass")["metadata"]["name"]
    service, ingress = only(manifests, "Service"), only(manifests, "Ingress")["spec"]
    (rule,) = ingress["rules"]
    assert ingress["tls"] == [{"hosts": [rule["host"]], "secretName": "inferpool-tls"}]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    port = ports["http"]
    assert path["backend"]["service"]["port"]["name"] == port["name"]
    route, (listener,) = only(manifests, "HTTPRoute")["spec"], only(manifests, "Gateway")["spec"]["listeners"]
    assert route["parentRefs"] == [{"name": "inferpool", "sectionName": listener["name"]}]
    assert route["hostnames"] == [listener["hostname"]]
    (backend,) = route["rules"][0]["backendRefs"]
    assert backend == {"name": service["metadata"]["name"], "port": port["port"]}


@pytest.mark.parametrize("names", [["models-store", "otel"], ["otel", "models-store"]])
def test_a_store_opens_the_network_for_https(names: list[str], tmp_path: Path) -> None:
    manifests = render_with(tmp_path / "k8s", "cpu", names)
    for manifest in manifests:
        validate(manifest)
    _check_pod(pod(manifests)["spec"])
    assert server_of(manifests)["args"] == ["serve", "s3://my-bucket/models"]
    ports = [
        port["port"] for rule in only(manifests, "NetworkPolicy")["spec"]["egress"] for port in rule["ports"]
    ]
    assert sorted(ports) == [53, 53, 53, 53, 443, 4318], "both components open theirs, in any order"


def test_the_ingress_has_what_is_documented_for_nginx() -> None:
    ingress = yaml.safe_load((MANIFESTS / "components" / "ingress" / "ingress.yaml").read_text())
    page = (ROOT / "docs" / "deploy" / "behind-a-proxy.md").read_text()
    for name in ("proxy-next-upstream", "proxy-next-upstream-tries", "proxy-read-timeout", "proxy-body-size"):
        value = ingress["metadata"]["annotations"][f"nginx.ingress.kubernetes.io/{name}"]
        directive = name.replace("-", "_").replace("proxy_body_size", "client_max_body_size")
        assert re.search(rf"\b{directive} {value}s?;", page), name


def test_the_operator_of_the_usual_chart_selects_monitor_and_rules(overlay: list[Manifest]) -> None:
    """kube-prometheus-stack selects by the name of its release."""
    for kind in ("PodMonitor", "PrometheusRule"):
        assert only(overlay, kind)["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_services_are_dual_stack_where_the_cluster_is(overlay: list[Manifest]) -> None:
    assert only(overlay, "Service")["spec"]["ipFamilyPolicy"] == "PreferDualStack"
    assert environ(server_of(overlay))["INFERPOOL_HOST"] == "::"


@cache
def _base() -> list[Manifest]:
    return render(MANIFESTS / "base")


def test_the_network_policy_lets_spans_out(tmp_path: Path) -> None:
    """The policy allows the collector in the variable and the DNS, and no other destination."""
    manifests = render_with(tmp_path / "k8s", "cpu", ["otel"])
    dns, collector = only(manifests, "NetworkPolicy")["spec"]["egress"]
    endpoint = urlsplit(environ(server_of(manifests))["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert endpoint.scheme == "http"
    _, namespace, kind = (endpoint.hostname or "").split(".")
    assert kind == "svc"
    (peer,) = collector["to"]
    assert peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    assert collector["ports"] == [{"port": endpoint.port, "protocol": "TCP"}]
    (peer,) = dns["to"]
    assert peer["podSelector"] == {"matchLabels": {"k8s-app": "kube-dns"}}
    assert {(port["port"], port["protocol"]) for port in dns["ports"]} == {(53, "UDP"), (53, "TCP")}


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("base/deployment.yaml", ("spec", "template", "spec", "containers", 0, "readinessProbe", "periodS")),
        ("base/podmonitor.yaml", ("spec", "podMetricsEndpoints", 0, "portName")),
        ("components/keda/scaledobject.yaml", ("spec", "triggers", 0, "treshold")),
        ("kserve/clusterservingruntime.yaml", ("spec", "protocolVersion")),
        ("kserve/inferenceservice.yaml", ("spec", "predictor", "model", "format")),
    ],
)
def test_the_schemas_refuse_unknown_fields(file: str, path: tuple[Any, ...]) -> None:
    manifest = inner = yaml.safe_load((MANIFESTS / file).read_text())
    validate(manifest)
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = "?"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(manifest)


def _check_pod(spec: Manifest) -> None:
    """The Pod Security Standard "restricted" and a read-only root."""
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    for container in containers(spec):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"memory", "cpu"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert written <= {"/cache", "/tmp", "/target"}
    for volume in spec["volumes"]:
        assert volume.keys() <= {"name", "emptyDir", "persistentVolumeClaim", "secret"}


def test_every_selector_matches_the_pods(overlay: list[Manifest]) -> None:
    labels = pod(overlay)["metadata"]["labels"].items()
    assert only(overlay, "Service")["spec"]["selector"].items() <= labels
    assert only(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert only(overlay, kind)["spec"]["selector"]["matchLabels"].items() <= labels
    for constraint in pod(overlay)["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= labels
    ports = {port["name"] for port in server_of(overlay)["ports"]}
    assert {port["targetPort"] for port in only(overlay, "Service")["spec"]["ports"]} <= ports
    assert {end["port"] for end in only(overlay, "PodMonitor")["spec"]["podMetricsEndpoints"]} <= ports
    (ingress,) = only(overlay, "NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for port in ingress["ports"]} <= ports


def test_everything_is_in_one_namespace(overlay: list[Manifest]) -> None:
    namespace = only(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for manifest in overlay:
        if manifest is not namespace:
            assert manifest["metadata"]["namespace"] == namespace["metadata"]["name"]


def test_the_port_is_the_servers(overlay: list[Manifest]) -> None:
    (port,) = server_of(overlay)["ports"]
    assert port["containerPort"] == Settings().port


def test_the_grace_period_covers_settling_draining_and_closing(overlay: list[Manifest]) -> None:
    """The grace period includes the time of preStop; the kubelet kills the pod at its end."""
    container = server_of(overlay)
    settings = read_settings({}, environ(container))
    assert settings.drain_settle_s > _until_not_ready(container), (
        "the probes must see that the pod is not ready"
    )
    needed = (
        container["lifecycle"]["preStop"]["sleep"]["seconds"]
        + settings.drain_settle_s
        + max(BODY_GRACE_S, settings.drain_timeout_s)
        + CLOSE_TIMEOUT_S
    )
    assert pod(overlay)["spec"]["terminationGracePeriodSeconds"] >= needed + 5


def _until_not_ready(container: Manifest) -> float:
    probe = container["readinessProbe"]
    return float(probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"])


def test_a_server_starts_with_the_containers_variables_and_passes_its_probes(
    overlay: list[Manifest], serve: Serve
) -> None:
    container = server_of(overlay)
    assert container["args"] == ["serve", "/models"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    own = environ(container)
    own.pop("INFERPOOL_DEVICES", None)  # this machine may have no GPU
    assert own.pop("INFERPOOL_CACHE_DIR") in writable
    # With the variables of a Service called inferpool-web, in case somebody turns service links on.
    server = serve(ROOT / "models", INFERPOOL_WEB_PORT="tcp://10.0.0.1:80", **own)
    server.wait_for(r"1 variables that Kubernetes sets for Services are ignored, such as INFERPOOL_WEB_PORT=")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server.get(container[probe]["httpGet"]["path"]).status_code == 200
    (endpoint,) = only(overlay, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert "inferpool_requests" in server.get(endpoint["path"]).text


def test_only_the_gpu_overlay_asks_for_a_gpu() -> None:
    spec = pod(render(MANIFESTS / "overlays" / "gpu"))["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"] == "inferpool:gpu"
    assert spec["runtimeClassName"] == "nvidia"
    # Without a GPU that works, models fail to load and do not run on the CPU.
    assert read_settings({}, environ(container)).devices == ("cuda:0",)
    cache = next(volume for volume in spec["volumes"] if volume["name"] == "cache")
    assert cache.keys() == {"name", "persistentVolumeClaim"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    spec = pod(render(MANIFESTS / "overlays" / "cpu"))["spec"]
    assert "nvidia.com/gpu" not in spec["containers"][0]["resources"]["limits"]
    assert spec["containers"][0]["image"] == "inferpool:cpu"


def test_threads_are_sized_by_a_whole_number_of_cores(overlay: list[Manifest]) -> None:
    """The quota sets the number of threads; the request must cover as many cores."""
    resources = server_of(overlay)["resources"]
    assert int(resources["limits"]["cpu"]) >= 1
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]


def test_the_rules_are_those_of_compose(overlay: list[Manifest]) -> None:
    rules = yaml.safe_load((ROOT / "docker" / "prometheus" / "rules.yml").read_text())
    assert only(overlay, "PrometheusRule")["spec"] == rules, (
        "regenerate prometheusrule.yaml as its first lines say"
    )


def test_the_job_has_the_name_that_the_rules_ask_for(overlay: list[Manifest]) -> None:
    label = only(overlay, "PodMonitor")["spec"]["jobLabel"]
    (asked,) = set(re.findall(r'job=~"([^"]*)"', str(only(overlay, "PrometheusRule")["spec"])))
    assert re.fullmatch(asked, pod(overlay)["metadata"]["labels"][label])


def test_rules_and_formulas_name_exported_metrics(overlay: list[Manifest]) -> None:
    texts = [
        str(only(overlay, "PrometheusRule")["spec"]["groups"]),
        *(rule["metricsQuery"] for rule in adapter_rules()),
        *(rule["seriesQuery"] for rule in adapter_rules()),
    ]
    named = {name for text in texts for name in re.findall(r"\binferpool_\w+", text)}
    have = {family.full_name for family in FAMILIES.values()}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in named} <= have


def adapter_rules() -> list[Manifest]:
    """The rules of prometheus-adapter, from its ConfigMap."""
    config = only(render(MANIFESTS / "prometheus-adapter"), "ConfigMap")["data"]["config.yaml"]
    rules: list[Manifest] = yaml.safe_load(config)["rules"]
    return rules


def test_kserve_finds_runtime_format_and_protocol() -> None:
    manifests = render(MANIFESTS / "kserve")
    runtime, service = only(manifests, "ClusterServingRuntime"), only(manifests, "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [
        {key: item[key] for key in ("name", "version")} for item in runtime["spec"]["supportedModelFormats"]
    ]
    assert model["modelFormat"] in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    # KServe finds the container by this name.
    assert container["name"] == "kserve-container"
    assert container["args"] == ["serve", "/mnt/models", "--model-name={{.Name}}"]
    # Namespaces that are "restricted" take it.
    context = container["securityContext"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (context["runAsNonRoot"], context["allowPrivilegeEscalation"]) == (True, False)
    assert context["capabilities"] == {"drop": ["ALL"]}
    settings = read_settings({}, environ(container))
    needed = settings.drain_settle_s + settings.drain_timeout_s + CLOSE_TIMEOUT_S
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] >= needed + 5


def test_a_service_of_kserve_answers_under_its_name(serve: Serve, tmp_path: Path) -> None:
    """The claim is mounted at /mnt/models; clients name the model like the service."""
    manifests = render(MANIFESTS / "kserve")
    (container,) = only(manifests, "ClusterServingRuntime")["spec"]["containers"]
    name = only(manifests, "InferenceService")["metadata"]["name"]
    shutil.copytree(ROOT / "models" / name, tmp_path / "mnt" / "models" / name)
    own = environ(container)
    assert own.pop("INFERPOOL_CACHE_DIR") in {mount["mountPath"] for mount in container["volumeMounts"]}
    server = serve(tmp_path / "mnt" / "models", **own)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server.get(container[probe]["httpGet"]["path"]).status_code == 200
    assert server.get(f"/v2/models/{name}/ready").status_code == 200
    image = {"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}
    answer = server.post(f"/v2/models/{name}/infer", json={"inputs": [image]})
    assert answer.status_code == 200
    assert answer.json()["outputs"][0]["shape"] == [1, 10]
