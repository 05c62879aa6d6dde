"""The commands for a running server, as a user runs them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from inferpool import admin_commands, cli

from tests.conftest import Serve
from tests.http.connection.test_pipelining import check_host_is_required
from tests.onnx_models import write_shift
from tests.server import Server, free_port, wait_until

SCOPES = ("admin", "read", "predict")
KEY_LINE = re.compile(r"inferpool_\S+")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    write_shift(made / "models", "digits", 1, 1.0)
    return made


@pytest.fixture(scope="module")
def key(folder: Path) -> str:
    """A key with the scope `admin`."""
    command = ["key", "new", "--keys-file", str(folder / "keys.toml"), "--tenant", "ops"]
    made = subprocess.run(
        [sys.executable, "-m", "inferpool", *command, *(f"--scope={name}" for name in SCOPES)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = KEY_LINE.search(made.stdout)
    assert found is not None, made.stdout
    return found.group()


@pytest.fixture(scope="module")
def server(folder: Path, key: str, module_serve: Serve) -> Server:
    return module_serve(folder / "models", "--keys-file", str(folder / "keys.toml"))


def variables(server: Server, key: str) -> dict[str, str]:
    return {"INFERPOOL_URL": server.url, "INFERPOOL_KEY": key}


def run(server: Server, key: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: to start another one takes longer than all that commands do."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        for name, value in variables(server, key).items():
            patch.setenv(name, value)
        status = cli.main(list(arguments))
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())


def test_a_command_is_a_program_that_imports_no_settings(server: Server, key: str) -> None:
    """The other tests call the program's function."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "inferpool", "labels", "nothing"],
        env={**os.environ, **variables(server, key)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = done.stderr.splitlines(keepends=True)
    errors = "".join(line for line in lines if not line.startswith("import time:"))
    assert (done.returncode, done.stdout) == (1, "")
    assert errors == run(server, key, "labels", "nothing").stderr
    assert 'no model is called "nothing"' in errors
    assert "pydantic" not in done.stderr


@pytest.mark.parametrize("name", admin_commands.COMMANDS)
def test_the_help_of_a_command_is_the_same_without_the_others(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for program in (cli.main, admin_commands.main):
        with pytest.raises(SystemExit):
            program([name, "--help"])
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :]


def test_a_version_is_loaded_labelled_and_rolled_back(server: Server, key: str, folder: Path) -> None:
    write_shift(folder / "models", "digits", 2, 2.0)
    loaded = run(server, key, "load", "digits", "2")
    assert loaded.returncode == 0, loaded.stderr
    assert re.fullmatch(r"[0-9a-f]+  load    digits/2  done\n", loaded.stdout)
    assert run(server, key, "rollback", "digits").stdout == "digits: version 1 answers\n"
    assert run(server, key, "labels", "digits").stdout == "stable = 1\n"
    assert run(server, key, "labels", "digits", "canary=2").stdout == "canary = 2\nstable = 1\n"
    assert run(server, key, "labels", "digits", "--remove", "canary").stdout == "stable = 1\n"
    assert "unload  digits/2  done" in run(server, key, "unload", "digits", "2").stdout
    assert "unload  digits/2  done" in run(server, key, "jobs").stdout
    server.wait_for(r"audit: rollback digits: version 1 answers")


def test_a_canary_and_a_shadow_are_shown_set_and_ended(server: Server, key: str, folder: Path) -> None:
    for version in (1, 2):
        write_shift(folder / "models", "rolled", version, float(version))
    (folder / "models" / "rolled" / "model.toml").write_text("[versions]\nlabels = {stable = 1}\n")
    bearer = {"authorization": f"Bearer {key}"}
    assert server.post("/v2/repository/models/rolled/load", headers=bearer).status_code == 200
    both = ("--canary", "2", "--share", "20%", "--by", "key", "--requests", "0", "--shadow", "2")
    shown = run(server, key, "traffic", "rolled", *both)
    assert shown.stdout == (
        "rolled: canary 2  running  20 % of the requests, by key\n"
        "  version 2  0 requests  0 failed\n"
        "  version 1  0 requests  0 failed\n"
        "rolled: shadow 2  100 % copied  0 compared, 0 failed, 0 dropped\n"
    ), shown.stderr
    server.wait_for(r"audit: traffic rolled: canary 2 with 0\.2 by 'key', shadow 2 with 1: done")
    assert server.post("/models/rolled/rollback", headers=bearer).json()["version"] == 1
    # It has ended, and was not promoted.
    found = run(server, key, "traffic", "rolled", "--wait")
    assert found.returncode == 1
    assert "canary 2  rolled_back" in found.stdout
    stopped = run(server, key, "traffic", "rolled", "--stop")
    assert stopped.stdout == "rolled: no canary and no shadow\n"


def test_a_load_that_fails_says_why_and_fails(server: Server, key: str, folder: Path) -> None:
    broken = folder / "models" / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")
    found = run(server, key, "load", "broken")
    assert found.returncode == 1
    assert "broken/1  failed: " in found.stdout
    assert "model.onnx" in found.stdout


def test_a_command_that_is_interrupted_says_what_goes_on(
    server: Server, key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(admin_commands, "_show", interrupt)
    write_shift(folder / "models", "interrupted", 1, 1.0)
    found = run(server, key, "load", "interrupted")
    said = re.search(r"the job goes on; `inferpool jobs (\w+)` waits for it", found.stderr)
    assert said is not None, found
    assert (found.returncode, found.stdout) == (130, "")
    monkeypatch.undo()
    assert "interrupted/1  done" in run(server, key, "jobs", said[1]).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["load", "nothing"], 'no model is called "nothing"'),
        (["labels", "digits", "stable"], "stable is not LABEL=VERSION"),
        (["jobs", "--cancel"], "--cancel needs the id of a job"),
        (["jobs", "none"], 'no job is called "none"'),
        (["traffic", "digits", "--stop", "--canary", "2"], "--stop ends the canary and the shadow"),
    ],
)
def test_mistakes_are_explained(server: Server, key: str, arguments: list[str], said: str) -> None:
    found = run(server, key, *arguments)
    assert (found.returncode, found.stdout) == (1, "")
    assert said in found.stderr


def test_without_a_key_or_a_server_the_command_says_so(server: Server) -> None:
    assert "needs a key" in run(server, "", "load", "digits").stderr
    found = run(server, "", "jobs", "--url", f"http://127.0.0.1:{free_port()}")
    assert "cannot be reached" in found.stderr


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_the_admin_socket_needs_no_key_and_is_this_users_alone(
    serve: Serve, tmp_path: Path, engine: str
) -> None:
    write_shift(tmp_path / "models", "digits", 1, 1.0)
    path = tmp_path / "admin.sock"
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(path))
    left.close()  # as a server leaves it that was killed
    server = serve(tmp_path / "models", "--engine", engine, "--admin-socket", str(path))
    wait_until(lambda: run(server, "", "jobs", "--url", f"unix:{path}").returncode == 0, "the socket answers")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_shift(tmp_path / "models", "digits", 2, 2.0)
    loaded = run(server, "", "load", "digits", "--url", f"unix:{path}")
    assert loaded.returncode == 0, loaded.stderr
    assert server.post("/predict/digits", json={"inputs": [[1.0, 2.0]]}).json()["version"] == "2"
    assert server.post("/models/digits/load").status_code == 403
    with socket.socket(socket.AF_UNIX) as bare:
        bare.connect(str(path))
        check_host_is_required(bare)
    server.wait_for("audit: load digits: job")
    assert any(line.get("key") == "admin-socket" for line in server.log)
    assert server.stop() == 0
    assert not path.exists()
