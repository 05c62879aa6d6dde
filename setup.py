"""Builds the C modules and, for a wheel, compiles the hot path with mypyc.

An editable installation builds the C modules only and runs the Python sources. Without a C compiler a wheel
has no compiled code: the server answers the same, more slowly, and says so in its log.

Only the build reads these variables:

- INFERPOOL_COMPILED: 0 leaves out mypyc, 1 makes a failed compilation an error.
- INFERPOOL_OPT_LEVEL: how much the C compiler optimises the hot path, by default 1 with INLINING. Tests save
  time by 0.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
SOURCE = "service/inferpool"
HOT_PATH = [
    *(f"{SOURCE}/http/connection/{name}.py" for name in (
        "batched_reads", "batched_writes", "connection", "deferred_calls", "exchange", "exchange_state",
        "fast_path", "head_cache", "head_fault", "response_head", "shared", "tls_records", "tls_transport")),
    *(f"{SOURCE}/http/predict/{name}.py" for name in (
        "api", "body_buffer", "budget", "context", "in_flight", "large_answers", "no_rows", "offload",
        "predictor", "recorder", "request_head", "request_id", "request_metrics", "resolver", "response",
        "results", "response_cache", "served_version", "single_flight", "canary_choice")),
    *(f"{SOURCE}/http/{name}.py" for name in (
        "access/caller", "access/gate", "access/refusals", "access/tenants", "accept_headers",
        "native/api", "native/bodies", "openai/api", "platforms/api", "v1/api", "v2/api")),
    *(f"{SOURCE}/pool/{name}.py" for name in (
        "admission", "audit", "background_load", "batch", "completion", "device_accounts", "entry_queue",
        "fair_shares", "instance", "instance_set", "latency_model", "ordered_queue", "pool", "ports",
        "retries", "router", "splitting", "stats", "token_buckets", "waiting_entries")),
    *(f"{SOURCE}/engine/{name}.py" for name in (
        "arena", "channel", "client", "client_router", "engine_port", "entry_blocks", "entry_sender",
        "event_loop", "full_queues", "lent_bodies", "offer_reader", "pending_entry", "questions",
        "records", "result_receiver", "tensor_bytes", "tensor_layouts", "web_connection")),
    *(f"{SOURCE}/wire/{name}.py" for name in (
        "json_bodies", "json_bounds", "json_numbers", "native_json", "v2_request", "v2_response")),
    *(f"{SOURCE}/observe/{name}.py" for name in ("metrics", "metrics_page")),
    f"{SOURCE}/allowance.py",
    f"{SOURCE}/tensors.py",
]  # fmt: skip
"""The modules that every prediction passes through, with two exceptions.

Base classes of interpreted classes stay interpreted, because mypyc forbids such inheritance. Loops over
millions of elements in `wire` stay interpreted, because compiled loops would not let other threads run.
"""

C_MODULES = ("http/connection/_socketio", "wire/_json_numbers")

COMPILED = os.environ.get("INFERPOOL_COMPILED", "")
OPT_LEVEL = os.environ.get("INFERPOOL_OPT_LEVEL", "1")
INLINING = [
    *("-finline-small-functions", "-findirect-inlining", "-fpartial-inlining", "-foptimize-sibling-calls"),
    *("-fipa-cp", "-fipa-ra", "-fcaller-saves", "-fpeephole2", "-fstrict-aliasing"),
]
"""The passes of -O2 that pay for the code of mypyc, added to those of -O1.

All passes of -O2 take 1.4 times the CPU time, and a small request then takes no less time:
benchmarks/results/starts.md. Only GCC knows all of these flags: other compilers get -O2 instead.
"""
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ParallelBuild(build_ext):
    """Compiles C files in parallel, and builds the compiled hot path completely or not at all."""

    def finalize_options(self) -> None:
        """Build as many extensions at once as there are CPUs."""
        super().finalize_options()
        self.parallel = self.parallel or CPUS

    def build_extensions(self) -> None:
        """Build all extensions; without a working C compiler, leave the compiled ones out of the wheel."""
        if not self._takes_inlining():
            for extension in self.extensions:
                if INLINING[0] in extension.extra_compile_args:
                    kept = [flag for flag in extension.extra_compile_args if flag not in INLINING]
                    extension.extra_compile_args = [*kept, "-O2"]
        compile_in_turn = self.compiler.compile

        def compile_in_parallel(sources: list[str], *args: object, **options: object) -> list[str]:
            largest_first = sorted(sources, key=lambda source: -Path(source).stat().st_size)
            runs = [pool.submit(compile_in_turn, [source], *args, **options) for source in largest_first]
            return [file for run in runs for file in run.result()]

        with ThreadPoolExecutor(CPUS) as pool:
            self.compiler.compile = compile_in_parallel
            try:
                super().build_extensions()
            except (BaseError, OSError) as error:
                if COMPILED == "1":
                    raise
                self.warn(f"the hot path is not compiled and will run interpreted: {error}")
                self._drop_hot_path()
            finally:
                self.compiler.compile = compile_in_turn

    def _takes_inlining(self) -> bool:
        """Return whether the C compiler knows the flags of INLINING; Clang fails at some of them."""
        command = getattr(self.compiler, "compiler_so", None)
        if command is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder) / "empty.c"
            empty.touch()
            run = [*command, *INLINING, "-c", str(empty), "-o", str(empty.with_suffix(".o"))]
            try:
                return subprocess.run(run, capture_output=True, check=False).returncode == 0
            except OSError:  # the build says that there is no compiler
                return False

    def _drop_hot_path(self) -> None:
        """Remove what was built of the hot path, because its extensions work together only."""
        built = [extension for extension in self.extensions if not extension.optional]
        self.extensions = [extension for extension in self.extensions if extension.optional]
        for extension in built:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)


def compiled_hot_path() -> list[Extension]:
    """Return mypyc's extensions for the hot path if a wheel is being built, else none."""
    if "bdist_wheel" not in sys.argv or COMPILED == "0":
        return []
    from mypyc.build import mypycify

    os.environ["MYPYPATH"] = str(ROOT / "service")
    # Objects of an earlier build may be those of modules that no longer exist.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    # Each module has its own C file, so that the files compile in parallel. Only these modules call one
    # another's functions: the functions are hidden, so that calls are direct and can be inlined.
    extensions = mypycify(
        ["--config-file=", "--ignore-missing-imports", *HOT_PATH],
        opt_level=OPT_LEVEL, debug_level="0", multi_file=True, group_name="inferpool",
    )  # fmt: skip
    # mypy leaves millions of objects; looking through them when the build ends would take as long as mypyc.
    gc.freeze()
    for extension in extensions:
        passes = INLINING if OPT_LEVEL == "1" else []
        extension.extra_compile_args = [*extension.extra_compile_args, "-fvisibility=hidden", *passes]
    return extensions


setup(
    cmdclass={"build_ext": ParallelBuild},
    ext_modules=[
        *(Extension(f"inferpool.{name.replace('/', '.')}", [f"{SOURCE}/{name}.c"], optional=COMPILED != "1",
                    extra_compile_args=["-O3", "-std=c11", "-g0"]) for name in C_MODULES),
        *compiled_hot_path(),
    ],
)  # fmt: skip
