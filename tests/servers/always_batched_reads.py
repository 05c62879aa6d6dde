"""The command with batched reads for every connection, however few requests there are."""

import sys
from functools import partial
from unittest import mock

from inferpool.cli import main
from inferpool.http.connection.batched_reads import ReadBatcher

if __name__ == "__main__":
    with mock.patch("inferpool.app.ReadBatcher", partial(ReadBatcher, 1)):
        sys.exit(main())
