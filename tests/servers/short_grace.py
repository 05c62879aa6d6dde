"""The command with a short time in which a run has to stop before its instance counts as hung."""

from __future__ import annotations

from tests.servers import run

GRACE_S = 0.3


def patch() -> None:
    """Shorten the time."""
    from inferpool.pool import run_limits

    run_limits.GRACE_S = GRACE_S  # type: ignore[misc]


if __name__ == "__main__":
    run("short_grace")
