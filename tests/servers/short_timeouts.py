"""The command with short timeouts for idle connections and slow clients."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import uvicorn
from inferpool.cli import main

KEPT_S = 0.5
STALLED_S = 1.0

if __name__ == "__main__":
    made = uvicorn.Config

    def config(*arguments: Any, **options: Any) -> uvicorn.Config:
        return made(*arguments, **{**options, "timeout_keep_alive": KEPT_S})

    with (
        mock.patch("uvicorn.Config", config),
        mock.patch("inferpool.http.connection.slow_client.STALLED_S", STALLED_S),
    ):
        sys.exit(main())
