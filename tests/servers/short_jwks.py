"""The command that fetches the keys of tokens as often as tokens ask for it."""

from __future__ import annotations

import sys
from unittest import mock

from inferpool.cli import main

PAUSE_S = 0.05

if __name__ == "__main__":
    with mock.patch("inferpool.http.access.jwks.LEAST_PAUSE_S", PAUSE_S):
        sys.exit(main())
