"""Renders the manifests with a real kustomize, and validates them with the real schemas."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "k8s"
SCHEMAS = Path(__file__).parent / "schemas"
OLDEST = "1.30"
"""The first version of Kubernetes that has `preStop.sleep` without a switch."""

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader, which is ten times as fast, if PyYAML was built with it."""

Manifest = dict[str, Any]


@cache
def kustomize() -> tuple[str, ...] | None:
    """The command that builds a folder: kustomize 5, or a kubectl that has it; None if there is neither."""
    if shutil.which("kustomize"):
        return ("kustomize", "build")
    if shutil.which("kubectl"):
        command = ["kubectl", "version", "--client"]
        if "Kustomize Version: v5" in subprocess.run(command, capture_output=True, text=True).stdout:
            return ("kubectl", "kustomize")
    return None


def template(values: Mapping[str, Any], release: str = "two", namespace: str = "serving") -> list[Manifest]:
    """The manifests that `helm install` would send; fails with what Helm says of wrong values."""
    program = Path(__file__).with_name("helm_template.py")
    command = [sys.executable, str(program), str(MANIFESTS / "chart"), release, namespace]
    made = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return [manifest for manifest in yaml.load_all(made.stdout, LOADER) if manifest]


def render(folder: Path) -> list[Manifest]:
    """The manifests that `kubectl apply -k` would send; warnings count as errors."""
    return [manifest for manifest in yaml.load_all(_rendered(folder), LOADER) if manifest]


@cache
def _rendered(folder: Path) -> str:
    # A folder is not changed after it was rendered, and many tests look at the same ones.
    command = kustomize()
    assert command is not None
    # A program in Go that ends at once takes a third less CPU time if it collects no garbage.
    environ = os.environ | {"GOGC": "off", "GOMAXPROCS": "1"}
    made = subprocess.run([*command, str(folder)], env=environ, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    return made.stdout


def render_with(tree: Path, overlay: str, components: Sequence[str]) -> list[Manifest]:
    """The manifests of an overlay with these components, rendered from a copy in `tree`."""
    shutil.copytree(MANIFESTS, tree)
    file = tree / "overlays" / overlay / "kustomization.yaml"
    kustomization = yaml.safe_load(file.read_text())
    kustomization["components"] = [f"../../components/{name}" for name in components]
    file.write_text(yaml.safe_dump(kustomization))
    return render(file.parent)


def validate(manifest: Manifest) -> None:
    """Validate a manifest with the schema of its kind; raises the errors of the validator."""
    _validate(json.dumps(manifest))


@cache
def _validate(text: str) -> None:
    # Most manifests are the same in every overlay, and Kubernetes' schemas are slow to read.
    manifest = json.loads(text)
    kind, api = manifest["kind"], manifest["apiVersion"]
    custom = SCHEMAS / f"{api.replace('/', '_')}_{kind}.json"
    if custom.exists():
        for error in _validator(custom).iter_errors(manifest):
            raise error
    else:
        for version in (OLDEST, kubernetes_validate.latest_version()):
            kubernetes_validate.validate(manifest, version, strict=True)


@cache
def _validator(file: Path) -> Any:
    # `jsonschema.validate` checks the schema itself each time, which takes seconds for those of KServe.
    schema = json.loads(file.read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def only(manifests: Sequence[Manifest], kind: str) -> Manifest:
    """The one manifest of this kind."""
    (manifest,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return manifest


def pod(manifests: Sequence[Manifest]) -> Manifest:
    """The template of the deployment's pods."""
    template: Manifest = only(manifests, "Deployment")["spec"]["template"]
    return template


def server_of(manifests: Sequence[Manifest]) -> Manifest:
    """The container of the server."""
    (container,) = pod(manifests)["spec"]["containers"]
    return dict(container)


def environ(container: Manifest) -> dict[str, str]:
    """The variables of a container."""
    return {variable["name"]: variable["value"] for variable in container["env"]}


def containers(spec: Manifest) -> Iterator[Manifest]:
    """Every container of a pod, init containers included."""
    yield from spec.get("initContainers", ())
    yield from spec["containers"]
