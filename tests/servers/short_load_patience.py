"""The command, but a slow load delays the next load for a moment only."""

from __future__ import annotations

from tests.servers import run

PATIENCE_S = 0.2


def patch() -> None:
    """Shorten the delay."""
    from inferpool.repository import health

    health.PATIENCE_S = PATIENCE_S  # type: ignore[misc]


if __name__ == "__main__":
    run("short_load_patience")
