"""Runs a child of the supervisor: `python -m inferpool.child_process MODULE DESCRIPTOR PARENT`."""

from __future__ import annotations

import importlib
import sys

from inferpool.system.imports import kept_imports, without_plugins


def main() -> int:
    """Run `MODULE.main()`, which finds its own arguments behind the program's name."""
    without_plugins()
    with kept_imports():
        module = importlib.import_module(sys.argv.pop(1))
    status: int = module.main()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
