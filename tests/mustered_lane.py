"""`inferpool`, with the muster reading for every connection that it can, however few requests there are."""

import sys
from functools import partial
from unittest import mock

from service.cli import main
from service.http.muster import Muster

if __name__ == "__main__":
    with mock.patch("service.app.Muster", partial(Muster, 1)):
        sys.exit(main())
