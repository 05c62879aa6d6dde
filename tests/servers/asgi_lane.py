"""The command with uvicorn's own HTTP protocol, so that every prediction takes the ASGI lane."""

from __future__ import annotations

import sys
from unittest import mock

from inferpool.cli import main

if __name__ == "__main__":
    with mock.patch("inferpool.server.PredictProtocol", "httptools"):
        sys.exit(main())
