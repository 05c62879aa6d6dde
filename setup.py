"""Compiles the modules in C, and the hot path by mypyc, when a wheel is built.

An editable installation runs the sources interpreted. Without a C compiler the package has neither, says so in
its log, and answers the same, more slowly.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "service/inferpool"
HOT_PATH = [
    *(f"{SOURCE}/http/connection/{name}.py" for name in (
        "batched_reads", "batched_writes", "connection", "deferred_calls", "exchange", "head_cache",
        "response_head")),
    *(f"{SOURCE}/http/predict/{name}.py" for name in (
        "api", "body_buffer", "context", "offload", "predictor", "recorder", "request_head", "results",
        "served_version")),
    *(f"{SOURCE}/http/{name}.py" for name in ("native/api", "native/bodies", "v2/api")),
    *(f"{SOURCE}/pool/{name}.py" for name in (
        "assembly", "batch", "drop_reasons", "entry_queue", "instance", "latency_model", "ordered_queue",
        "pool", "ports", "retries", "router", "stats")),
    *(f"{SOURCE}/wire/{name}.py" for name in (
        "json_document", "json_numbers", "native_json", "v2_request", "v2_response")),
    f"{SOURCE}/observe/metrics.py",
    f"{SOURCE}/tensors.py",
]  # fmt: skip
"""The modules that every prediction passes through, with two exceptions.

Base classes of interpreted classes stay interpreted, because mypyc forbids such inheritance. Loops over millions
of elements in `wire` stay interpreted, because compiled loops would not let other threads run.
"""

NATIVE_API = ("http/connection/_socketio", "wire/_json_numbers")


def compiled_hot_path() -> list[Extension]:
    """Return mypyc's extensions for the hot path, if a wheel is built: editable installations have none."""
    if "bdist_wheel" not in sys.argv or os.environ.get("INFERPOOL_COMPILED") == "0":
        return []
    from mypyc.build import mypycify

    sys.path.insert(0, str(Path(__file__).resolve().parent / "service"))
    os.environ["MYPYPATH"] = str(Path(__file__).resolve().parent / "service")
    return mypycify(["--config-file=", "--ignore-missing-imports", *HOT_PATH],
                    opt_level="2", debug_level="0", group_name="inferpool")  # fmt: skip


setup(
    cmdclass={"build_ext": build_ext},
    ext_modules=[
        *(Extension(f"inferpool.{name.replace('/', '.')}", [f"{SOURCE}/{name}.c"],
                    extra_compile_args=["-O3", "-std=c11"], optional=True) for name in NATIVE_API),
        *compiled_hot_path(),
    ],
)  # fmt: skip
