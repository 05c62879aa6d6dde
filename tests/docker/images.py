"""Images built by podman, without a Docker engine, on a Python base made from Debian's packages.

The base replaces the Python image of a registry. It contains the settings with which this machine reaches its
mirrors: apt's sources and proxies, and the trusted certificates.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.record import has_changed

ROOT = Path(__file__).parents[2]
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
TOOLS = ("apt-get", "mmdebstrap", "podman", "runc")
PACKAGES = ("ca-certificates", "python3", "python3-pip", "python3-venv")


def missing() -> str:
    """Return the programs and rights that this machine lacks to build and run images, or an empty text."""
    lacking = [tool for tool in TOOLS if not shutil.which(tool)]
    if os.geteuid() != 0:
        lacking.append("root")
    elif not lacking and not _sources():
        lacking.append("a mirror of Debian in apt's sources")
    return ", ".join(lacking)


def podman(*arguments: str | Path, timeout_s: float = 60) -> str:
    """Return the output of podman; raise AssertionError, with all of its output, if it fails."""
    run = subprocess.run(
        ["podman", "--runtime", "runc", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert run.returncode == 0, f"podman {shlex.join(map(str, arguments))}\n{run.stdout}{run.stderr}"
    return run.stdout.strip()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let no other process of the tests build meanwhile, so that it finds the finished layers."""
    with Path(tempfile.gettempdir(), "inferpool-tests-images.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_base() -> str:
    """Return the name of the Python base; it is made again only when its recipe has changed."""
    with one_at_a_time():
        return _build_base()


def _build_base() -> str:
    sources, proxies = _sources(), _proxies()
    recipe = json.dumps([sources, proxies, BUNDLE.read_text(), PACKAGES])
    name = f"localhost/inferpool-tests-python:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    kept = subprocess.run(["podman", "image", "exists", name], check=False)
    if kept.returncode == 0:
        return name
    with tempfile.TemporaryDirectory() as folder:
        conf = Path(folder, "apt.conf")
        conf.write_text(proxies)
        archive = Path(folder, "base.tar")
        command = [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            # These settings are also for the packages that the Dockerfile installs.
            f"--aptopt={conf}",
            f"--customize-hook=copy-in {BUNDLE} {BUNDLE.parent}",
            _codename(),
            str(archive),
            *sources,
        ]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr
        podman("import", archive, name)
    return name


def build(target: str, base: str, models: str = "", plans: str = "") -> str:
    """Build a target of the Dockerfile by scripts/image; return its name.

    `models` is a folder of models for the image, which are measured for each number of cores in `plans`.
    While nothing of the image has changed, the C compiler does not optimise its wheel: that saves time.
    """
    name = f"localhost/inferpool-tests:{'-'.join(filter(None, (target, models, plans and 'plans')))}"
    with one_at_a_time(), tempfile.NamedTemporaryFile("w", suffix=".conf") as secret:
        secret.write(_pip_conf())
        secret.flush()
        command = [
            str(ROOT / "scripts" / "image"),
            target,
            "--isolation=chroot",
            "--network=host",
            f"--secret=id=pip,src={secret.name}",
            f"--build-arg=PYTHON_IMAGE={base}",
            f"--build-arg=MODELS={models}",
            f"--build-arg=PLANS={plans}",
            *([] if has_changed("image") else ["--build-arg=OPT_LEVEL=0"]),
            f"--tag={name}",
        ]
        run = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
        assert run.returncode == 0, f"{run.stdout}{run.stderr}"
    return name


def copy_wheel(base: str, folder: Path) -> Path:
    """Build the stage of the Dockerfile that compiles the wheel, and copy the wheel into `folder`."""
    container = podman("create", build("code", base), "true")
    try:
        podman("cp", f"{container}:/build/wheel/.", folder)
    finally:
        podman("rm", container)
    [wheel] = folder.glob("*.whl")
    return wheel


def _codename() -> str:
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    return release.get("VERSION_CODENAME", "")


def _sources() -> list[str]:
    """Return those of apt's sources that are Debian's, one line each."""
    listed = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format=$(ORIGIN)|deb $(REPO_URI) $(CODENAME) $(COMPONENT)",
            "Created-By: Packages",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.partition("|") for line in listed.stdout.splitlines()]
    return sorted({line for origin, _, line in lines if origin == "Debian"})


def _proxies() -> str:
    """Return apt's settings of proxies and TLS."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    kept = ("Acquire::http::", "Acquire::https::")
    return "".join(f"{line}\n" for line in dump.stdout.splitlines() if line.startswith(kept))


def index_settings() -> dict[str, str]:
    """Return pip's settings of the package index, without local folders, because a build cannot see them."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name not in ("index-url", "extra-index-url", "find-links", "proxy", "trusted-host"):
            continue
        urls = [url for url in shlex.split(value)[0].split() if not url.startswith(("/", "file:"))]
        if urls:
            settings[name] = " ".join(urls)
    return settings


def _pip_conf() -> str:
    """Return a pip.conf with the package index and the certificates of this machine."""
    settings = {"cert": str(BUNDLE), **index_settings()}
    return "\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""])


def main() -> None:
    """Build the image with the wheel, before tests ask for it; do nothing on a machine that cannot."""
    if not missing():
        build("code", build_base())


if __name__ == "__main__":
    main()
