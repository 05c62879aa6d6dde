"""The command with few TLS handshakes at a time, and little patience for them."""

from __future__ import annotations

import sys
from unittest import mock

from inferpool.cli import main

MOST = 8
HANDSHAKE_S = 3.0

if __name__ == "__main__":
    with (
        mock.patch("inferpool.http.connection.acceptor.MOST_HANDSHAKES", MOST),
        mock.patch("inferpool.http.connection.acceptor.SPARED_S", 0.05),
        mock.patch("inferpool.http.connection.acceptor.HANDSHAKE_S", HANDSHAKE_S),
    ):
        sys.exit(main())
