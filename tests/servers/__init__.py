"""Commands that behave like `inferpool`, but for a patch. Each has a function `patch`.

A server of several processes is patched in all of them: see `site/sitecustomize.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn


def run(name: str) -> NoReturn:
    """Run the command `inferpool` with the patch of the module `tests.servers.<name>`."""
    module = os.environ["TESTS_SERVER"] = f"{__name__}.{name}"
    importlib.import_module(module).patch()
    from inferpool.cli import main

    sys.exit(main())
