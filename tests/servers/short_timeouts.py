"""The command with short timeouts for idle connections and slow clients."""

from __future__ import annotations

from typing import Any

import uvicorn

from tests.servers import run

KEPT_S = 0.5
STALLED_S = 1.0


def patch() -> None:
    """Shorten the timeouts."""
    from inferpool.http.connection import slow_client

    made = uvicorn.Config

    def config(*arguments: Any, **options: Any) -> uvicorn.Config:
        return made(*arguments, **{**options, "timeout_keep_alive": KEPT_S})

    uvicorn.Config = config  # type: ignore[assignment, misc]
    slow_client.STALLED_S = STALLED_S  # type: ignore[misc]


if __name__ == "__main__":
    run("short_timeouts")
