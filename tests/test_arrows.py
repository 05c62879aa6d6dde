"""Imports point one way, and what knows of what is as small as the design says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "service").rglob("*.py"))

RANKS = {
    "__main__": 9, "cli": 8, "app": 7, "http": 6, "build": 6, "read_options": 0, "repository": 5,
    "codecs": 4, "wire": 4, "pool": 4, "backends": 3, "tensors": 2,
    "settings": 2, "logs": 1, "metrics": 1, "spans": 1, "machine": 1, "devices": 1, "nvml": 2,
    "commands": 0, "errors": 0, "exposition": 0, "record": 0, "tracing": 0, "aside": 0, "__init__": 0,
    "compiled": -1,
}  # fmt: skip
"""A module imports from its own part, or from one of a lower rank."""

LIBRARIES = {
    "fastapi": ("http", "app", "cli"),
    "starlette": ("http", "app", "cli"),
    "uvicorn": ("http", "app", "cli"),
    "onnxruntime": ("backends/onnx",),
    "torch": ("backends/torch", "backends/aoti"),
    "prometheus_client": ("metrics",),
    "opentelemetry": ("spans",),
    "pynvml": ("nvml",),
    "PIL": ("codecs",),
    "tokenizers": ("codecs/text",),
}
"""Who may import what; the names are how paths below `service/` begin."""

SEAM = ("service.pool.pool", "service.pool.engine", "service.pool.instance", "service.backends",
        "service.repository.repository", "service.repository.loader", "onnxruntime", "torch")  # fmt: skip
"""What the web side never holds."""


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "service")
    return found


def part_of(module: str) -> str:
    """`service.http.lane` is in the part `http`."""
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    path = str(file.relative_to(ROOT / "service"))
    own = path.split("/")[0].removesuffix(".py")
    for module in imports_of(file):
        if module.split(".")[0] == "service":
            part = part_of(module)
            if part not in RANKS:  # a name, not a module: `from service import __version__`
                continue
            assert part == own or RANKS[part] < RANKS[own], f"{path} imports {module}"
        else:
            allowed = LIBRARIES.get(module.split(".")[0])
            assert allowed is None or path.startswith(allowed), f"{path} imports {module}"


@pytest.mark.parametrize("file", sorted((ROOT / "service/pool").glob("*.py")), ids=lambda file: file.name)
def test_the_pool_knows_no_event_loop_and_no_clock(file: Path) -> None:
    assert not imports_of(file) & {"asyncio", "time", "datetime", "socket", "http"}


@pytest.mark.parametrize("file", sorted((ROOT / "service/http").glob("*.py")), ids=lambda file: file.name)
def test_the_web_side_holds_nothing_beyond_the_seam(file: Path) -> None:
    assert not [module for module in imports_of(file) if module.startswith(SEAM)]


def test_every_module_has_a_rank() -> None:
    paths = (file.relative_to(ROOT / "service").with_suffix("") for file in FILES)
    assert {path.parts[0] for path in paths} <= RANKS.keys()
