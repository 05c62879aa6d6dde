"""The imports of the package point one way, and each library is imported by its own rooms alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "service" / "inferpool"
FILES = sorted(PACKAGE.rglob("*.py"))

RANKS = {
    "__main__": 10, "cli": 9, "other_commands": 8.9, "admin_commands": 8, "app": 8, "child_process": 8,
    "engine_process": 8, "launch": 8.5,
    "grpc_process": 8, "predict_command": 8.5, "evaluate_command": 8.7,
    "import_command": 8.8, "optimise_command": 8.8,
    "profile_command": 8.8, "sample_commands": 8.1,
    "sign_commands": 8, "web_process": 8, "server": 7, "server_parts": 7, "grpc_api": 6.5, "http": 6,
    "release": 6, "repository": 5, "client": 5, "engine": 4.5, "codecs": 4.2, "wire": 4, "pool": 4,
    "backends": 3, "allowance": 2, "gradient_names": 1, "pixel_table": 2,
    "command_output": 2, "platforms": 2, "explain": 2, "drift": 2,
    "privacy": 1.5, "settings": 2, "settings_sources": 2.2, "observe": 2, "tensors": 1, "system": 1,
    "error_fields": 1, "errors": 0, "__init__": 0,
}  # fmt: skip
"""A module imports from its own folder, or from a part of a lower rank."""

SIBLINGS = {
    "http/predict": (
        "http/connection",
        "http/native",
        "http/v1",
        "http/v2",
        "http/platforms",
        "http/openai",
        "http/explain",
        "http/asgi",
        "http/application",
    ),
    "http/connection": (
        "http/native",
        "http/v1",
        "http/v2",
        "http/platforms",
        "http/openai",
        "http/application",
    ),
    "http/native": ("http/v1", "http/v2", "http/platforms", "http/connection"),
    "http/v1": ("http/v2", "http/platforms", "http/connection"),
    "http/v2": ("http/native", "http/v1", "http/platforms", "http/connection"),
    "http/platforms": ("http/v2", "http/openai", "http/connection", "http/explain"),
    "http/openai": (
        "http/native",
        "http/v1",
        "http/v2",
        "http/platforms",
        "http/connection",
        "http/explain",
    ),
    "http/explain": ("http/v2", "http/openai", "http/platforms", "http/connection", "http/application"),
    "backends/onnx": ("backends/torch",),
    "backends/torch": ("backends/onnx",),
    "backends/cuda": ("backends/onnx", "backends/torch"),
}
"""Folders of one part that must not import one another: what each one leaves alone."""

LIBRARIES = {
    "fastapi": ("http", "app", "server", "cli"),
    "starlette": ("http", "app", "server", "cli"),
    "uvicorn": ("http", "app", "server", "cli"),
    "onnxruntime": ("backends/onnx", "release/optimise"),
    "torch": ("backends/torch", "release/importers", "release/pruning"),
    "grpc": ("grpc_api", "grpc_process"),
    "google": ("grpc_api",),
    "grpc_health": ("grpc_api",),
    "grpc_reflection": ("grpc_api",),
    "prometheus_client": ("observe/metrics", "observe/process_metrics"),
    "opentelemetry": ("observe/spans",),
    "pynvml": ("observe/gpu_metrics",),
    "PIL": ("codecs",),
    "watchfiles": ("repository/watch",),
    "model_signing": ("repository/trust/digital_signature",),
    "tokenizers": ("codecs/text",),
    "obstore": ("repository/stores/object_store",),
    "httpx": ("repository/stores", "client"),
    "pyarrow": (
        "codecs/arrow_table",
        "client/content",
        "predict_command",
        "evaluate_command",
        "sample_commands",
    ),
    "cryptography": ("privacy/keys",),
    "datasketches": ("drift/build",),
    "tqdm": ("client/slices", "import_command/command"),
}
"""Who may import what; the names are how paths below `service/inferpool/` begin."""

SLOW_TO_IMPORT = {
    *(
        "aiohttp",
        "datasets",
        "fastapi",
        "keras",
        "matplotlib",
        "mlflow",
        "openai",
        "optimum",
        "pandas",
        "polars",
    ),
    *("scipy", "sklearn", "tensorflow", "transformers", "tritonclient.http.aio"),
}
"""Each process of a run imports all modules of tests: what takes seconds is for the tests that need it.

PyTorch is not among them, because each process runs tests that need it.
"""

SEAM = ("inferpool.pool.pool", "inferpool.pool.router", "inferpool.pool.instance", "inferpool.backends",
        "inferpool.repository.repository", "inferpool.repository.load",
        "inferpool.repository.folder_contents", "inferpool.repository.wanted_versions",
        "inferpool.repository.admin_jobs", "inferpool.repository.routing_decisions",
        "onnxruntime", "torch")  # fmt: skip
"""The packages that the web side never imports."""


@cache
def imports_by_place(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Every module that a file imports, wherever in the file; those of `from … import` at its top."""
    found: set[str] = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            module = node.module or ""
            found.add(module)
            found.update(
                f"{module}.{alias.name}" for alias in node.names if is_module(f"{module}.{alias.name}")
            )
    at_the_top = (node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom))
    return frozenset(found), frozenset(at_the_top)


def imports_of(file: Path) -> frozenset[str]:
    """Every module that a file imports, wherever in the file."""
    return imports_by_place(file)[0]


@cache
def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package."""
    path = ROOT / "service" / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def path_of(file: Path) -> str:
    """`http/asgi` for the module `inferpool.http.asgi`."""
    return str(file.relative_to(PACKAGE).with_suffix(""))


def part_of(module: str) -> str:
    """`http` for the module `inferpool.http.asgi`."""
    return [*module.split("."), "__init__"][1]


def wrong_imports(file: Path) -> Iterator[str]:
    """The imports of a file that point the wrong way, or take a library from its owners."""
    path = path_of(file)
    own = path.split("/")[0]
    for module in imports_of(file):
        if module.split(".")[0] == "inferpool":
            part = part_of(module)
            if part not in RANKS:  # a name, not a module: `from inferpool import __version__`
                continue
            below = "/".join(module.split(".")[1:])
            between_siblings = any(
                path.startswith(f"{folder}/") and below.startswith(forbidden)
                for folder, forbidden in SIBLINGS.items()
            )
            if between_siblings or (part != own and RANKS[part] >= RANKS[own]):
                yield f"{path} imports {module}"
        else:
            allowed = LIBRARIES.get(module.split(".")[0])
            if allowed is not None and not path.startswith(allowed):
                yield f"{path} imports {module}"


def test_imports_point_one_way() -> None:
    assert not [wrong for file in FILES for wrong in wrong_imports(file)]


def test_no_modules_import_one_another_in_a_circle() -> None:
    modules = {
        ".".join(("inferpool", *path_of(file).split("/"))).removesuffix(".__init__"): file for file in FILES
    }
    graph = {
        name: {found for found in imports_of(file) if found in modules} - {name}
        for name, file in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_modules_of_tests_do_not_import_what_takes_seconds() -> None:
    """Modules that are left out as a whole, if nothing has changed, stop before such imports."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Expr) and "needs_to_run" in ast.dump(node):
                break
            inner = node.body if isinstance(node, ast.With) else [node]
            found += [
                f"{file.relative_to(ROOT)} imports {name}"
                for each in inner
                for name in names_imported(each)
                if name in SLOW_TO_IMPORT or name.split(".")[0] in SLOW_TO_IMPORT
            ]
    assert not found


def names_imported(node: ast.stmt) -> list[str]:
    """The modules that one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_gpu_folders_are_imported_only_on_the_way_to_a_gpu() -> None:
    """Elsewhere, folders named `gpu` are imported within functions, so that the folders can be deleted."""
    for file in FILES:
        if "gpu" in file.parts or file.is_relative_to(PACKAGE / "backends" / "cuda"):
            continue
        at_the_top = imports_by_place(file)[1]
        assert not [module for module in at_the_top if "gpu" in module.split(".")], path_of(file)
        of_cuda = [module for module in imports_of(file) if module.startswith("inferpool.backends.cuda")]
        assert not of_cuda, path_of(file)


def test_the_pool_knows_no_event_loop_and_no_clock() -> None:
    for file in (PACKAGE / "pool").glob("*.py"):
        assert not imports_of(file) & {"asyncio", "time", "datetime", "socket", "http"}, path_of(file)


def test_the_web_side_holds_nothing_beyond_the_seam() -> None:
    for file in (PACKAGE / "http").rglob("*.py"):
        assert not [module for module in imports_of(file) if module.startswith(SEAM)], path_of(file)


def test_the_command_imports_numpy_only_once_it_knows_what_to_do() -> None:
    """Else it starts slowly, and `serve` sets variables too late that numpy reads when it is imported."""
    code = "import sys, inferpool.cli; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_has_a_rank() -> None:
    assert {path_of(file).split("/")[0] for file in FILES} <= RANKS.keys()


def test_no_module_is_named_like_another_or_like_one_of_the_standard_library() -> None:
    names = [file.stem for file in FILES if not file.stem.startswith("__")]
    assert not [name for name in names if f"{name}s" in names], "two files whose names differ by a plural"
    assert not [name for name in names if name in sys.stdlib_module_names]
