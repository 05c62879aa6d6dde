"""The control groups of this process, which limit what it may use of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def own_cgroups(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """The folders of the cgroups that limit `controller` for this process, innermost first.

    Each comes with the version of its hierarchy, 1 or 2. Folders may be missing. `root` contains `proc` and
    `sys`. Without cgroups there are none. Sources: the kernel's documents cgroup-v2.rst and cgroup-v1.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            version, mount = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, mount = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        # Without a cgroup namespace the path is the host's and may not exist here; then the top of the mount
        # is the cgroup of this process.
        parts = Path(path.lstrip("/"))
        yield from ((version, mount / folder) for folder in (parts, *parts.parents))
