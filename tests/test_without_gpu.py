"""An installation without the folders named `gpu` serves models on the CPU, in a copy of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server import ROOT

SUITES = (
    "tests/backends/onnx/test_backend.py",
    "tests/backends/torch/test_file_kind.py",
    "tests/repository/load/test_batching_check.py",
    "tests/repository/test_repository_over_http.py::test_versions_and_labels_choose_who_answers",
    "tests/system/test_gpus.py",
)
"""CPU tests that load, check and serve models of both backends, within a minute on a busy machine."""

IMPORT_ALL = """
import importlib, pathlib, sys
root = pathlib.Path("service")
for file in sorted(root.glob("inferpool/**/*.py")):
    name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    # The scripts of importers run in environments of their own, with frameworks that are not here.
    if not name.endswith("__main__") and not name.startswith("inferpool.release.importers."):
        importlib.import_module(name)
import inferpool
loaded = [name for name in sys.modules if name.startswith("inferpool.")]
assert not [name for name in loaded if "gpu" in name.split(".")]
print(inferpool.__file__)
"""

ASK_FOR_A_GPU = """
import pathlib
from inferpool.backends.base import GpuOptions, LoadOptions
from inferpool.backends.registry import find_backend
from inferpool.errors import LoadError

missing = "GPU support is not part of this installation"
onnx, torch = find_backend("onnx"), find_backend("torch")
model = pathlib.Path("models/digits/1/model.onnx")
assert onnx.gpu_unavailable_reason(model) == missing
assert onnx.tensorrt_unavailable_reason() == missing
for options in (LoadOptions("cuda:0"), LoadOptions(gpu=GpuOptions(fp16=True))):
    try:
        onnx.load(model, options)
    except LoadError as error:
        assert error.detail == missing, error
    else:
        raise AssertionError("the model was loaded")
print(onnx.load(model, LoadOptions()).signature.inputs[0].name)
"""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run Python in a copy of the project without any folder named `gpu`; returns its output.

    The copies of the sources are as old as these, so that their bytecode is valid, too.
    """
    copy = tmp_path_factory.mktemp("without-gpu")
    for folder in ("service", "tests", "models/digits", "models/diabetes"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("gpu"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "tests" / Path(__file__).name).unlink()
    # Servers of the tests have the root on their path, and must not find the installed package.
    (copy / "inferpool").symlink_to(copy / "service" / "inferpool")

    def run_python(*arguments: str) -> str:
        environ = os.environ | {"PYTHONPATH": str(copy)}
        process = subprocess.run(
            [sys.executable, *arguments], cwd=copy, env=environ, capture_output=True, text=True, check=False
        )
        assert not process.returncode, process.stdout + process.stderr
        return process.stdout

    return run_python


def test_every_module_can_be_imported(run: Run) -> None:
    assert "without-gpu" in run("-c", IMPORT_ALL)


def test_a_gpu_that_is_asked_for_is_a_load_error(run: Run) -> None:
    assert run("-c", ASK_FOR_A_GPU).split() == ["image"]


def test_the_tests_for_the_cpu_pass(run: Run) -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=few")
    assert " passed" in run("-m", "pytest", *options, *SUITES)
