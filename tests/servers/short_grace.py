"""The command with a short time in which a run has to stop before its instance counts as hung."""

from __future__ import annotations

import sys
from unittest import mock

from inferpool.cli import main

GRACE_S = 0.3

if __name__ == "__main__":
    with mock.patch("inferpool.pool.run_limits.GRACE_S", GRACE_S):
        sys.exit(main())
