"""The command, whose processes that measure have the usual priority: the machine of the tests is busy."""

from __future__ import annotations

from tests.servers import run


def patch() -> None:
    """Let the processes that measure have the usual priority."""
    from inferpool.repository.load import measuring_process

    measuring_process.run_only_on_idle_cores = lambda pid: None  # type: ignore[attr-defined]


if __name__ == "__main__":
    run("usual_priority")
