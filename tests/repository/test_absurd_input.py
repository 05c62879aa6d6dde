"""Whatever stands in a models folder: a reason at once, and the server starts with the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inferpool.errors import ConfigError
from inferpool.repository.config import read_config
from inferpool.repository.load.plan import Plan
from inferpool.repository.load.plan_cache import PlanCache
from inferpool.settings_sources import read_settings
from inferpool.system.files import printable, read_file

from tests.conftest import MakeChaos, Serve, chaos_in
from tests.server import CHAOS, ROOT

DAMAGES = [b"", b"\0" * 100, b"[1, 2]", b"{" * 10**6, b"7", b'{"table": 1}', os.urandom(1000)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[batching]\nmax_rows = 1e9", "batching.max_rows: Input should be less than or equal to 1000000"),
        ("[batching]\nmax_rows = -1", "batching.max_rows: Input should be greater than or equal to 1"),
        ("[batching]\nmax_rows = nan", "batching.max_rows"),
        ("[batching]\nmax_delay_ms = inf", "batching.max_delay_ms: Input should be a finite number"),
        ("[batching]\nmax_delay_ms = nan", "batching.max_delay_ms: Input should be a finite number"),
        ("[batching]\nmax_delay_ms = 1e300", "batching.max_delay_ms: Input should be less than or equal"),
        ("timeout_ms = inf", "timeout_ms: Input should be a finite number"),
        ("timeout_ms = nan", "timeout_ms: Input should be a finite number"),
        ("[instances]\ncount = 1000000", "instances.count: Input should be less than or equal to 1024"),
        ("[instances]\nthreads = 99999999999999999999", "instances.threads"),
        ("[queue]\nmax_rows = 1e18", "queue.max_rows"),
        ("[queue]\nmax_bytes = 1e300", "queue.max_bytes"),
        ("[gpu]\nmemory_bytes = 1e18", "gpu.memory_bytes"),
        ("[image]\nsize = [1000000, 1000000]", "image.size.0: Input should be less than or equal to 16384"),
        ('[[inputs]]\nname = "x"\nshape = [1e300]', "inputs.0.shape.0"),
        (f"sha256 = {['no digest'] * 10_000}", "9995 more faults"),
        (f"[versions]\nserve = {[0] * 20_000}", "versions.serve"),
        ('[versions.labels]\n"\\u001b[31mred" = 1', "cannot be a label"),
        ('[versions.labels]\n".." = 1', "another meaning in a path"),
        (f"description = {json.dumps('x' * 10_001)}", "description"),
        (f'"{"k" * 100_000}" = 1', "unknown key"),
        ('"\\u001b[2J" = 1', r"\x1b[2J: unknown key"),
        (f"{'a.' * 100_000}a = 1", "a key has more than 33 parts"),
        (f"[{'a . ' * 60_000}a]", "a key has more than 33 parts"),
        ('"a".' * 60_000 + "a = 1", "a key has more than 33 parts"),
        (f"a = {'[' * 100_000}", "nested too deeply"),
        (f"a = {'{a=' * 50_000}", "nested too deeply"),
        (f"inputs = [{'1,' * 100_000}]", "inputs"),
        ("".join(f"a{n} = 1\n" for n in range(20_000)), "more faults"),
        ("#" * 300_000, "larger than 262144 bytes; expected a text file of at most 262144 bytes"),
        ("a = " + "9" * 100_000, "not valid TOML"),
    ],
)
def test_an_absurd_value_is_refused_at_once_in_few_words(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "model.toml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        read_config(file)
    assert time.process_time() - began < 3
    assert reason in str(error.value)
    assert len(str(error.value)) < 3000
    assert str(error.value).isprintable()


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e400"])
@pytest.mark.parametrize("name", ["queue_ms", "measure_ms", "drain_timeout_s", "drain_settle_s"])
def test_a_setting_without_end_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        read_settings({name: value}, {})


@pytest.mark.parametrize("name", ["in_flight_bytes", "queue_bytes", "memory_bytes", "threads"])
def test_a_setting_beyond_every_machine_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        read_settings({name: "9" * 30}, {})


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


def make_endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def make_huge(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(2**40)


KINDS = [make_pipe, make_endless, make_huge]


@pytest.mark.parametrize("make", KINDS)
def test_only_regular_files_of_some_size_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "file")
    with pytest.raises(OSError, match=r"not a regular file|larger than 1000 bytes"):
        read_file(tmp_path / "file", 1000)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    assert read_file(tmp_path / "file", 1000) == b"x" * 1000
    with pytest.raises(OSError, match="larger than 999 bytes"):
        read_file(tmp_path / "file", 999)
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_file(Path("/proc/self/status"), 10)


@pytest.fixture(scope="module")
def versions(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The versions of a server of a good model, and of models with a file of each kind in each place."""
    folder = tmp_path_factory.mktemp("absurd") / "repository"
    write = chaos_in(folder)
    repository = write("good")
    tables = {"labels": '[labels]\nfile = "file"', "tokenizer": '[text]\ntokenizer = "file"'}
    targets = {"config": "model.toml", "sample": "samples/a.json", "model": "1/model.chaos"}
    for make in KINDS:
        kind = make.__name__
        for name, table in tables.items():
            write(f"{kind}-{name}", config=table)
            make(repository / f"{kind}-{name}" / "file")
        for name, target in targets.items():
            write(f"{kind}-{name}")
            file = repository / f"{kind}-{name}" / target
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)
            make(file)
        if make is not make_huge:  # a runtime may have large weights
            write(f"{kind}-weights")
            make(repository / f"{kind}-weights" / "1" / "weights.bin")
    server = module_serve(repository)
    assert server.post("/predict/good", json={"inputs": [[1, 2, 3, 4]]}).status_code == 200
    return {model["name"]: model["versions"][0] for model in server.get("/models").json()["models"]}


@pytest.mark.parametrize("make", KINDS)
def test_pipes_devices_and_endless_files_fail_one_model_and_the_others_are_served(
    versions: dict[str, dict[str, Any]], make: Callable[[Path], None]
) -> None:
    assert versions["good"]["state"] == "ready"
    failed = {name: version for name, version in versions.items() if name.startswith(make.__name__)}
    assert len(failed) >= 5
    for name, version in failed.items():
        assert version["state"] == "failed", (name, version)
        assert 10 < len(version["reason"]) < 500


def test_a_model_file_larger_than_the_memory_is_not_read(versions: dict[str, dict[str, Any]]) -> None:
    reason = versions["make_huge-model"]["reason"]
    assert reason.startswith(f"model.chaos has {2**40} bytes; expected at most")


@pytest.mark.parametrize("damage", range(len(DAMAGES) + 3))
def test_a_damaged_plan_is_made_again(tmp_path: Path, damage: int, caplog: pytest.LogCaptureFixture) -> None:
    cache, target = PlanCache(tmp_path), tmp_path / "m.json"
    cache.keep(target, Plan(True, "read", 8, 1, 1))
    content = target.read_bytes()
    assert cache.find(target) == Plan(True, "read", 8, 1, 1)
    if damage < len(DAMAGES):
        target.write_bytes(DAMAGES[damage])
    elif damage == len(DAMAGES):
        target.write_bytes(content.replace(b'"max_rows": 8', b'"max_rows": 1e999'))
    else:
        target.unlink()
        KINDS[damage - len(DAMAGES) - 1](target)
    assert PlanCache(tmp_path).find(target) is None
    assert "cannot be read, so it is made again" in caplog.text


def test_names_cannot_control_the_terminal_that_shows_them(tmp_path: Path, make_chaos: MakeChaos) -> None:
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"
    repository = make_chaos("m", config='description = "\\u001b[2J"')
    make_chaos("evil\x1b[2J")
    (repository / "m" / "samples").mkdir()
    (repository / "m" / "samples" / "\x1b]0;evil\x07.json").write_text("nonsense")
    command = [sys.executable, "-m", "inferpool", "check", str(repository), "--cache-dir", str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{CHAOS}"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert ran.returncode == 1
    assert r"sample \x1b]0;evil\x07.json" in ran.stdout
    assert r"sample \x1b]0;evil\x07.json" in ran.stderr
    assert "\x1b" not in ran.stdout + ran.stderr
