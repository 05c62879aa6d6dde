"""The compose files follow the Compose Specification, and a compose tool merges them as intended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml")


def merged(*files: str, **environ: str) -> dict[str, Any]:
    """Return the project that podman-compose merges from the files."""
    chosen = [argument for file in files for argument in ("--file", str(FOLDER / file))]
    run = subprocess.run(
        [sys.executable, "-m", "podman_compose", *chosen, "config"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    project: dict[str, Any] = yaml.safe_load(run.stdout)
    return project


@pytest.mark.parametrize("file", FILES)
def test_a_file_follows_the_specification(file: str) -> None:
    """The schema of the specification knows every key."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    run = subprocess.run([*command, FOLDER / file], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_gpu_file_changes_the_image_and_adds_the_gpus() -> None:
    """With the second file, compose builds the other target and reserves every GPU; the rest is the same."""
    plain, gpu = (merged(*files)["services"] for files in (FILES[:1], FILES))
    before, after = plain.pop("inferpool"), gpu.pop("inferpool")
    assert plain == gpu
    assert (before["build"].pop("target"), after["build"].pop("target")) == ("cpu", "gpu")
    assert (before.pop("image"), after.pop("image")) == ("inferpool:cpu", "inferpool:gpu")
    assert (before.pop("mem_limit"), after.pop("mem_limit")) == ("4g", "16g")
    [device] = after.pop("deploy")["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert before == after


def test_the_folder_of_models_can_be_chosen() -> None:
    """MODELS replaces the models of the project."""
    volumes = merged("compose.yaml", MODELS="/srv/models")["services"]["inferpool"]["volumes"]
    assert "/srv/models:/models:ro" in volumes


def test_no_port_is_open_to_other_machines_unless_it_is_asked_for() -> None:
    """ADDRESS opens the server's, and nothing else's."""
    services = merged("compose.yaml")["services"]
    ports = {name: service["ports"] for name, service in services.items()}
    assert {port.split(":")[0] for published in ports.values() for port in published} == {"127.0.0.1"}
    opened = merged("compose.yaml", ADDRESS="0.0.0.0")["services"]
    assert opened["inferpool"]["ports"] == ["0.0.0.0:8000:8000"]
    assert {name: service["ports"] for name, service in opened.items()} | {
        "inferpool": ports["inferpool"]
    } == ports


@pytest.mark.parametrize("files", [FILES[:1], FILES])
def test_memory_is_limited(files: tuple[str, ...]) -> None:
    """MEMORY replaces the limit of each file."""
    assert merged(*files, MEMORY="1500m")["services"]["inferpool"]["mem_limit"] == "1500m"


def test_what_is_mounted_is_there() -> None:
    """Every folder that a service mounts is in the project."""
    services = merged("compose.yaml")["services"].values()
    sources = {volume.split(":")[0] for service in services for volume in service["volumes"]}
    folders = {source for source in sources if source.startswith(".")}
    assert len(folders) == 4
    assert {source for source in folders if not (FOLDER / source).is_dir()} == set()
