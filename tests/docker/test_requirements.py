"""The images install pinned packages, which the project allows and the package index has for their Python."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker.images import index_settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {
    "cpu": ("cpu", "text", "otel", "jwt", "signatures", "stores"),
    "gpu": ("gpu", "fp16", "torch", "text", "otel", "jwt", "signatures", "stores"),
}
LOCKS = {target: ROOT / "docker" / f"requirements-{target}.txt" for target in (*EXTRAS, "build", "sbom")}


def pins(target: str) -> dict[str, set[str]]:
    """Return the pinned versions of each package; they may differ between Pythons."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", LOCKS[target].read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def wanted(target: str) -> list[Requirement]:
    """Return the requirements of the project for an image."""
    if target == "build":
        return [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    if target == "sbom":
        return [Requirement("cyclonedx-bom"), Requirement("debsbom")]
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for name in EXTRAS[target] for line in extras[name])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("target", LOCKS)
def test_the_pins_are_what_the_project_asks_for(target: str) -> None:
    """A new or raised dependency is in the lock; if not, run scripts/lock."""
    locked = pins(target)
    for requirement in wanted(target):
        assert requirement.name in locked, requirement
        versions = locked[requirement.name]
        assert set(requirement.specifier.filter(versions)) == versions, requirement


def test_pytorch_in_the_image_is_the_one_that_is_tested() -> None:
    """The tests pin PyTorch, and the lock has the same version."""
    tests = map(Requirement, PROJECT["project"]["optional-dependencies"]["test"])
    [torch] = [requirement for requirement in tests if requirement.name == "torch"]
    assert {f"=={version}" for version in pins("gpu")["torch"]} == {str(torch.specifier)}


def test_both_runtimes_share_one_cuda() -> None:
    """The image has one CUDA, of the major version that ONNX Runtime and PyTorch are both built for."""
    names = pins("gpu")
    [runtime] = names["nvidia-cuda-runtime"]
    assert runtime.startswith("13.")
    majors = {match[1] for name in names if (match := re.search(r"-cu(\d+)$", name))}
    assert majors == {"13"}
    assert {"onnxruntime-gpu", "torch", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cufft"} <= names.keys()


@pytest.mark.parametrize("target", EXTRAS)
def test_every_pin_can_be_installed(target: str, tmp_path: Path) -> None:
    """The package index has a wheel of each for the image's Python on Linux, and they fit one another."""
    index = index_settings().get("index-url")
    command = [
        *(sys.executable, "-m", "uv", "pip", "install", "--no-config", "--system-certs"),
        *(("--default-index", index) if index else ()),
        *("--dry-run", "--require-hashes"),
        *("--python-version", "3.13", "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:"),
        # As in the image: the pins leave out the client of a model hub on purpose.
        "--no-deps",
        *("--target", str(tmp_path), "--requirement", str(LOCKS[target])),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"onnxruntime{'-gpu' if target == 'gpu' else ''}==" in run.stderr
