"""The wheel has one package, serves from an empty environment, and its compiled hot path passes the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docker import images
from tests.docker.containers import has_this_python
from tests.record import needs_to_run
from tests.server import Server

HAS_COMPILER = shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not HAS_COMPILER, reason="needs a C compiler: apt-get install gcc libc6-dev python3-dev"
    ),
]

CONNECTION = "tests/http/connection"
ROUTES = "tests/http/access/test_route_scopes.py"
REFUSED = "test_every_route_refuses_no_key_wrong_keys_expired_keys_and_keys_with_other_scopes"
WHOLE_SERVER = "tests/observe/test_whole_server.py"
HOT_PATH_TESTS = [
    *(f"tests/engine/test_{name}.py" for name in ("arena", "broken_channels", "channel", "lent_bodies")),
    *(f"tests/engine/test_{name}.py" for name in ("successors", "tensor_layouts")),
    "tests/observe/test_regions.py",
    f"{WHOLE_SERVER}::test_counters_are_those_of_the_clients_whichever_process_answers",
    f"{WHOLE_SERVER}::test_crashes_and_replays_are_counted",
    *("tests/wire", "tests/pool", "tests/http/connection", "tests/http/predict"),
    f"{ROUTES}::{REFUSED}[POST /predict/{{model}}]",
    f"{ROUTES}::{REFUSED}[POST /v2/models/{{model}}/infer]",
    "--ignore=tests/pool/test_soak.py",
    "--ignore-glob=tests/pool/*_over_http.py",
    *(
        f"--ignore={CONNECTION}/test_{name}.py"
        for name in ("idle_connections", "listeners", "slow_client_timer", "slow_clients", "socketio")
    ),
    *(f"--ignore={CONNECTION}/test_{name}.py" for name in ("thread_exits", "tls_connections")),
    *(
        f"--ignore=tests/http/predict/test_{name}.py"
        for name in ("costly_bodies", "memory_limit", "rejections")
    ),
    *(
        f"--deselect={CONNECTION}/test_{name}"
        for name in (
            "batched_reads.py::test_clients_that_mix_requests_of_all_kinds_get_their_own_responses[inferpool]",
            "batched_reads.py::test_the_refusal_of_a_large_request_arrives",
            "batched_reads.py::test_without_descriptors_the_loop_goes_on_reading",
            "head_cache.py::test_a_request_with_a_cached_head_is_admitted_like_any_other",
            "pipelining.py::test_bodies_in_flight_are_bounded_for_all_together",
            "pipelining.py::test_large_bodies_leave_room_for_small_ones",
        )
    ),
]
"""The tests of the modules that a wheel compiles. Their other run imports the sources.

They show what compiling can break: the types and bounds of values, the calls between compiled and
interpreted code, and the protocols of the client and of the engine. Left out are tests of what a wheel does
not change: the sockets in C, the watch over slow clients, listeners, what runtimes refuse, the memory that
bodies, threads and connections take, and tests that start a server for themselves alone. Of servers of
several processes, one answers and one crashes; that any process may end at any time is tested with the
sources. The tests of INTERPRETED are left out as well.
"""


INTERPRETED = {
    *("engine/admin_relay", "engine/catalog_distribution", "engine/catalog_merge", "engine/catalog_parcel"),
    "engine/catalog_store",
    *("engine/child_loop", "engine/control", "engine/device_engines", "engine/engine_failures"),
    *("engine/engine_keeper", "engine/engine_memory", "engine/grpc_keeper", "engine/liveness"),
    *("engine/process_connections", "engine/web_keeper"),
    *("engine/restart_policy", "engine/spare_engine", "engine/spawn", "engine/supervised"),
    *("engine/supervisor", "engine/supervisor_metrics"),
    *("http/connection/acceptor", "http/connection/body_receiver", "http/connection/forwarded"),
    "http/connection/lingering_close",
    *("http/connection/protocol", "http/connection/raw_head", "http/connection/reset_watch"),
    *("http/connection/slow_client", "http/connection/tls_handshake"),
    *("http/connection/unread_responses",),
    *("http/predict/compression", "http/predict/fair_threads", "http/predict/host_lookups"),
    "http/predict/memory_monitor",
    *("http/predict/observations", "http/predict/picture_urls", "http/predict/shadow_copies"),
    "http/predict/version_observer",
    *("pool/buckets", "pool/hot_swap", "pool/log_limits", "pool/padding", "pool/redaction", "pool/row_cost"),
    *("pool/run_limits", "pool/run_stopper", "pool/run_watcher"),
    *(
        "wire/columns",
        "wire/json_pieces",
        "wire/large_bytes",
        "wire/nested_lists",
        "wire/npy",
        "wire/v1_request",
    ),
    *("wire/v1_response", "wire/v2_binary", "wire/v2_classification"),
}
"""The modules beside the hot path that setup.py leaves to the interpreter, on purpose: see HOT_PATH there."""


def arguments() -> list[str]:
    """Return pytest's arguments for these tests, with few examples of each property."""
    files = [Path("tests", module).with_name(f"test_{Path(module).name}.py") for module in INTERPRETED]
    ignored = [f"--ignore={file}" for file in sorted(files) if (ROOT / file).exists()]
    return [*HOT_PATH_TESTS, *ignored, "--hypothesis-profile=few"]


def plain_environ(**own: str) -> dict[str, str]:
    """Return the variables of this process, without those that choose modules or measure coverage."""
    left_out = ("PYTHONPATH", "COVERAGE_", "COV_", "PYTEST_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(left_out)}
    return kept | own


def build_wheel(folder: Path, compiled: str) -> Path:
    """Build a wheel from the sources as a user of pip builds it, in an environment that pip makes."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT / "service", source / "service", ignore=ignored)
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)],
        env=plain_environ(INFERPOOL_COMPILED=compiled, INFERPOOL_OPT_LEVEL="0"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the container image if it fits this Python; else a wheel that pip builds.

    Compiling takes a minute of CPU time, and the tests of the image need its wheel in any case.
    """
    folder = tmp_path_factory.mktemp("wheel")
    if not images.missing():
        base = images.build_base()
        if has_this_python(base):
            return images.copy_wheel(base, folder)
    return build_wheel(folder, "1")


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel; the packages that it depends on are those of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(python)),
            *("install", "--quiet", "--no-deps", "--no-index", str(wheel)),
        ],
        env=plain_environ(), check=True,
    )  # fmt: skip
    [packages] = folder.glob("lib/python*/site-packages")
    # A folder on this list comes after the environment's own packages, and its .pth files are not read. An
    # editable installation of the project is not found there for that reason.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "tests-packages.pth").write_text("\n".join(others) + "\n")
    return python


def test_the_wheel_has_one_package_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {top for top in tops if "." not in top}
    assert packages == {"inferpool"}
    others = sorted(tops - packages)
    # mypyc puts the code of all compiled modules into one library, with the package's name.
    assert [name.split(".")[0].split("-")[0] for name in others] == ["inferpool", "inferpool__mypyc"]
    assert "inferpool/py.typed" in names
    assert {f"inferpool/http/page/{name}" for name in ("page.html", "page.css", "start.js")} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith(".c") or "/tests/" in name]


def test_pip_builds_the_same_wheel_without_compiling(wheel: Path, tmp_path: Path) -> None:
    """The build requirements are complete; without mypyc the wheel has the same sources and the C modules."""
    needs_to_run("build-by-pip")
    sources: set[str] = set()
    libraries: set[str] = set()
    with zipfile.ZipFile(build_wheel(tmp_path, "0")) as archive:
        for name in archive.namelist():
            (libraries if name.endswith(".so") else sources).add(name)
    with zipfile.ZipFile(wheel) as archive:
        assert sources == {name for name in archive.namelist() if not name.endswith(".so")}
    assert {Path(name).name.split(".")[0] for name in libraries} == {"_json_numbers", "_socketio"}


def test_every_module_of_the_hot_path_is_compiled(wheel: Path) -> None:
    """A new module in one of these folders is added to HOT_PATH in setup.py, or to INTERPRETED here."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name.removeprefix("inferpool/") for name in archive.namelist()]
    compiled = {name.split(".")[0] for name in names if name.endswith(".so")}
    folders = ("engine/", "http/connection/", "http/predict/", "pool/", "wire/")
    modules = {
        name.removesuffix(".py") for name in names if name.endswith(".py") and name.startswith(folders)
    }
    assert {name for name in modules - compiled if not name.endswith("__init__")} == INTERPRETED


def test_the_package_is_imported_from_the_wheel(python: Path, tmp_path: Path) -> None:
    for command in ([str(python), "-m", "inferpool"], [str(python.with_name("inferpool"))]):
        run = subprocess.run(
            [*command, "--version"], cwd=tmp_path, env=plain_environ(),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert run.stdout.startswith("inferpool ")
    code = (
        "import inferpool, importlib.util as u;"
        " print(inferpool.__file__, u.find_spec('service'), u.find_spec('tests'))"
    )
    run = subprocess.run(
        [str(python), "-c", code],
        cwd=tmp_path,
        env=plain_environ(),
        capture_output=True,
        text=True,
        check=True,
    )
    file, *others = run.stdout.split()
    assert Path(file).is_relative_to(python.parents[1])
    assert others == ["None", "None"]


class InstalledServer(Server):
    """`inferpool serve` of an environment, started in a folder that has nothing to do with the project."""

    def __init__(self, python: Path, repository: Path, folder: Path) -> None:
        own = {
            "INFERPOOL_LOG_FORMAT": "json", "PYTHONPATH": "", "INFERPOOL_CACHE_DIR": str(folder),
            "INFERPOOL_MEASURE_MS": "200",
        }  # fmt: skip
        command = [str(python.with_name("inferpool")), "serve", str(repository), "--port", "0"]
        # The variable is read when a wheel is built; a server that finds it set starts all the same.
        self._start(["env", f"--chdir={folder}", "INFERPOOL_COMPILED=1", *command], own)


def test_the_wheel_serves_with_its_hot_path_compiled(python: Path, models: Path, tmp_path: Path) -> None:
    server = InstalledServer(python, models / "diabetes", tmp_path)
    try:
        server.wait_loaded()
        row = [59.0, 2.0, 32.1, 101.0, 157.0, 93.2, 38.0, 4.0, 4.86, 87.0]
        answer = server.post("/predict/diabetes", json={"inputs": [row]})
        assert answer.status_code == 200, answer.text
        [[prediction]] = answer.json()["outputs"].values()
        assert prediction
        assert server.metric("build_info", hot_path="compiled") == 1
        assert not [line for line in server.log if line["level"] in ("warning", "error", "raw")]
    finally:
        server.kill()


def test_the_compiled_hot_path_passes_its_tests(python: Path) -> None:
    """The tests run in another process, with the compiled modules of the wheel in place of the sources."""
    needs_to_run("compiled-hot-path")
    run = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=.", *arguments()],
        cwd=ROOT, env=plain_environ(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr
