"""Start the server as the command does, but for connections that are kept for half a second."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

from service.cli import main

KEPT_S = 0.5

if __name__ == "__main__":
    made = uvicorn.Config

    def config(*arguments: Any, **options: Any) -> uvicorn.Config:
        return made(*arguments, **{**options, "timeout_keep_alive": KEPT_S})

    uvicorn.Config = config  # type: ignore[assignment,misc]
    sys.exit(main())
