"""The record of what costly tests last passed with: the compiled hot path, imports, PyTorch, the image.

`scripts/test` skips these tests if nothing that they depend on has changed since they passed. A change of a
file, of a package, or of Python makes them run again. `scripts/test --full` skips none. To run those whose
record is outdated, and renew it:

    python -m tests.record

An outdated record makes tests run again; it never skips them. `tests/models/record.py` does the same for
models.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
RECORD: Final = Path(__file__).with_name("record.json")
FULL: Final = "MODELS_FULL"
"""With this variable no test is skipped."""


@dataclass(frozen=True)
class Costly:
    """Tests that take much time.

    Attributes:
        tests: pytest's arguments that run them.
        files: glob patterns of the files that they depend on, from the root of the checkout.
        packages: the packages that they depend on.
    """

    tests: tuple[str, ...]
    files: tuple[str, ...]
    packages: tuple[str, ...] = ()


IMPORT: Final = (
    "service/inferpool/import_command/**/*.py",
    "service/inferpool/release/importers/**/*.py",
    "tests/import_command/scripts.py",
)
PAGES: Final = ("tests/docs/test_commands.py", "tests/docs/pages.py")
HOT_PATH_FOLDERS: Final = ("engine", "http", "observe", "pool", "wire")
COMMANDS_OF_A_PAGE: Final = "tests/docs/test_commands.py::test_commands_of_a_page_run"

COSTLY: Final = {
    # Their packages take a gigabyte, which uv fetches.
    "large-frameworks": Costly(
        ("tests/import_command/test_large_frameworks.py",),
        (
            *IMPORT,
            "tests/import_command/test_large_frameworks.py",
            "tests/import_command/hugging_face_models.py",
        ),
    ),
    "frameworks": Costly(
        ("tests/import_command/test_boosted_trees.py", "tests/import_command/test_networks.py"),
        (*IMPORT, "tests/import_command/test_boosted_trees.py", "tests/import_command/test_networks.py"),
        ("keras", "lightgbm", "onnx", "onnxmltools", "onnxruntime", "scikit-learn", "torch", "xgboost-cpu"),
    ),
    "docs/export-a-model.md": Costly(
        (f"{COMMANDS_OF_A_PAGE}[docs/export-a-model.md]",),
        (
            *("docs/export-a-model.md", *PAGES, "service/inferpool/backends/**/*.py"),
            *("service/inferpool/repository/load/**/*.py", "service/inferpool/admin_commands.py"),
        ),
        ("onnx", "onnxruntime", "scikit-learn", "skl2onnx", "torch"),
    ),
    "docs/import.md": Costly(
        (f"{COMMANDS_OF_A_PAGE}[docs/import.md]",),
        (
            *("docs/import.md", *PAGES, *IMPORT[:2]),
            "service/inferpool/evaluate_command/**/*.py",
            "service/inferpool/release/evaluate/**/*.py",
        ),
        ("joblib", "onnx", "onnxruntime", "scikit-learn", "skl2onnx"),
    ),
    # Their answers through a server, and random programs whose rows may depend on one another.
    "torch": Costly(
        (
            *("tests/backends/torch/test_over_http.py", "tests/backends/torch/test_lists.py"),
            *("tests/backends/torch/row_analysis",),
        ),
        (
            *("service/inferpool/backends/**/*.py", "service/inferpool/repository/load/**/*.py"),
            *("tests/backends/torch/**/*.py", "service/inferpool/explain/**/*.py", "tests/explain/**/*.py"),
        ),
        ("numpy", "torch"),
    ),
    "memory-of-pictures": Costly(
        ("tests/codecs/test_image_memory.py",),
        (
            *("service/inferpool/codecs/**/*.py", "service/inferpool/http/predict/budget.py"),
            *("tests/codecs/picture_memory.py", "tests/codecs/test_image_memory.py"),
        ),
        ("numpy", "pillow"),
    ),
    "benchmarks": Costly(
        ("tests/benchmarks",), ("benchmarks/**/*.py", "benchmarks/**/*.lua", "tests/benchmarks/*.py")
    ),
    # A second run of the tests of the modules that a wheel compiles.
    "compiled-hot-path": Costly(
        ("tests/test_wheel.py::test_the_compiled_hot_path_passes_its_tests",),
        (
            *("pyproject.toml", "setup.py", "service/**/*.c", "service/inferpool/*.py"),
            *(f"service/inferpool/{folder}/**/*.py" for folder in HOT_PATH_FOLDERS),
            *(f"tests/engine/test_{name}.py" for name in ("arena", "broken_channels", "channel")),
            *(f"tests/engine/test_{name}.py" for name in ("lent_bodies", "successors", "tensor_layouts")),
            *("tests/observe/test_regions.py", "tests/observe/test_whole_server.py", "tests/engine/[!t]*.py"),
            *("tests/http/access/test_route_scopes.py", "tests/http/access/keys.py"),
            *(f"tests/http/{folder}/**/*.py" for folder in ("connection", "predict")),
            *(f"tests/{folder}/**/*.py" for folder in ("pool", "wire", "chaos", "fake_gpu", "servers")),
            *("tests/certificates.py", "tests/clients.py", "tests/conftest.py", "tests/onnx_models.py"),
            *("tests/server.py", "tests/test_wheel.py", "tests/fuzz/mutations.py"),
            "tests/backends/torch/networks.py",
        ),
        ("mypy", "numpy", "onnxruntime", "orjson"),
    ),
    # pip fetches the requirements of the build into an environment of its own.
    "build-by-pip": Costly(
        ("tests/test_wheel.py::test_pip_builds_the_same_wheel_without_compiling",),
        ("pyproject.toml", "setup.py", "service/**/*.c"),
    ),
    "image": Costly(
        ("tests/docker/test_image.py",),
        (
            *("docker/Dockerfile", "docker/*.py", "docker/requirements-*.txt", "scripts/image"),
            *(
                "scripts/sbom",
                "setup.py",
                "tests/docker/*.py",
                "docs/deploy/containers.md",
                "service/inferpool/launch.py",
            ),
            *("service/inferpool/platforms.py", "service/inferpool/system/*.py"),
            "service/inferpool/repository/load/**/*.py",
        ),
    ),
}
"""The costly tests, by a name."""


def needs_to_run(name: str, *, whole_module: bool = False) -> None:
    """Skip the calling test or fixture, or the calling module, unless something has changed."""
    import pytest  # .ci/run builds the image before pytest is installed, and asks `has_changed`

    if not has_changed(name):
        pytest.skip(
            f"nothing of {name} has changed since this test passed; scripts/test --full runs it",
            allow_module_level=whole_module,
        )


def has_changed(name: str) -> bool:
    """Return whether the tests `name` passed with other files or packages, or all tests shall run."""
    return bool(os.environ.get(FULL)) or recorded().get(name) != digest(name)


def recorded() -> dict[str, str]:
    """Return the digests with which the tests last passed, by name."""
    record: dict[str, str] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return record


def digest(name: str, root: Path = ROOT) -> str:
    """Return a SHA-256 of everything that the tests `name` depend on, in hexadecimal digits."""
    costly = COSTLY[name]
    lines = [f"Python {sys.version_info.major}.{sys.version_info.minor}"]
    lines.append(f"engine {os.environ.get('INFERPOOL_ENGINE', '')}")
    lines.append(f"tests {' '.join(costly.tests)}")
    lines += [f"{package} {version(package)}" for package in costly.packages]
    for file in sorted(set(files(name, root))):
        about = file.stat()
        lines.append(
            f"{file.relative_to(root)} {_digest_of_file(str(file), about.st_mtime_ns, about.st_size)}"
        )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _digest_of_file(path: str, modified_ns: int, size: int) -> str:
    """Return the SHA-256 of a file. Records share files, and a process of pytest asks for several records."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def files(name: str, root: Path = ROOT) -> Iterator[Path]:
    """Find the files that the tests `name` depend on."""
    for pattern in COSTLY[name].files:
        yield from root.glob(pattern)


def main() -> int:
    """Run the tests that the record does not know to pass, or those that are named; renew the record."""
    status = 0
    for name in sys.argv[1:] or [name for name in COSTLY if recorded().get(name) != digest(name)]:
        before = digest(name)
        command = [sys.executable, "-m", "pytest", "-q", *COSTLY[name].tests]
        failed = subprocess.run(command, cwd=ROOT, env=os.environ | {FULL: "1"}, check=False).returncode
        if failed:
            status = failed
        elif digest(name) != before:
            print(f"files of {name} have changed while its tests ran; run this again", file=sys.stderr)
            status = 1
        else:
            record = {**recorded(), name: before}
            RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
