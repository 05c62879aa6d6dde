"""A server in a container, run as recommended: nothing writable, no capabilities, one CPU, 1 GiB."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import uuid
from collections.abc import Sequence
from pathlib import Path

from tests.docker.images import podman
from tests.server import Server, free_port

CONFINED = (
    "--network=host",
    "--ulimit=nofile=1024:1024",
    "--ulimit=nproc=1024:1024",
    "--read-only",
    # By default, Docker gives a read-only container no writable /tmp either.
    "--read-only-tmpfs=false",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--cpus=1",
    "--memory=1g",
)


class Container(Server):
    """`podman run` of an image that serves `repository`, mounted at /models, or the models in the image."""

    def __init__(
        self, image: str, repository: Path | None, options: Sequence[str] = (), flags: Sequence[str] = ()
    ) -> None:
        self.name = f"inferpool-{uuid.uuid4().hex[:12]}"
        mount = [f"--volume={repository}:/models:ro"] if repository else []
        named = [
            f"--name={self.name}",
            f"--env=INFERPOOL_PORT={free_port()}",
            "--env=INFERPOOL_LOG_FORMAT=json",
        ]
        command = ["podman", "--runtime", "runc", "run", "--rm", *CONFINED, *named, *mount, *options, image]
        self._start([*command, *(["serve", "/models", *flags] if flags else [])], {})
        self.url = f"http://127.0.0.1:{self.port}"

    def inspect(self, template: str) -> str:
        """Return a value that podman knows about the container, by a Go template."""
        return podman("inspect", "--format", template, self.name)

    def process_fields(self) -> list[dict[str, str]]:
        """Return the fields of /proc/PID/status of each process in the container, process 1 first."""
        first = int(self.inspect("{{.State.Pid}}"))
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [_status(pid) for pid in (first, *map(int, children))]

    def healthcheck(self) -> int:
        """Run the image's HEALTHCHECK in the container; return the exit status."""
        command = ["podman", "--runtime", "runc", "healthcheck", "run", self.name]
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode

    def stop(self, timeout_s: float = 30) -> int:
        """Do as `docker stop`: SIGTERM, and SIGKILL (status 137) after the timeout; return the status."""
        podman("stop", f"--time={timeout_s:.0f}", self.name, timeout_s=timeout_s + 30)
        status = self.process.wait(30)
        self._reader.join(5)
        return status

    def kill(self) -> None:
        """End the container, whatever it is doing."""
        podman("rm", "--force", "--ignore", "--time=0", self.name)
        super().kill()


def run_once(image: str, *command: str, options: Sequence[str] = ()) -> str:
    """Return the output of a command in a container of its own, confined like a server."""
    return podman("run", "--rm", *CONFINED, *options, f"--entrypoint={json.dumps(list(command))}", image)


def has_this_python(image: str) -> bool:
    """Return whether a compiled wheel of the image fits the Python that runs the tests."""
    script = "import sysconfig; print(sysconfig.get_config_var('SOABI'))"
    return run_once(image, "python3", "-c", script) == sysconfig.get_config_var("SOABI")


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
