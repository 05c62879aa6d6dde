"""The command, but a slow load delays the next load for a moment only."""

from __future__ import annotations

import sys
from unittest import mock

from inferpool.cli import main

PATIENCE_S = 0.2

if __name__ == "__main__":
    with mock.patch("inferpool.repository.health.PATIENCE_S", PATIENCE_S):
        sys.exit(main())
