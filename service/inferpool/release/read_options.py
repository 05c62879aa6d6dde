"""Run a build script as far as its options are read, for its help or for what is wrong with them.

It is a program of its own, for a Python that has the standard library and nothing else. A script that reads
its options (by argparse) before it imports what must be installed answers; one that does not is stopped by
its first such import, and `UNANSWERED` is the exit status.
"""

from __future__ import annotations

import argparse
import ast
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

UNANSWERED: Final = 75
"""The exit status where the options are good, or it cannot be told: sysexits' EX_TEMPFAIL, "try again"."""


def answer(script: Path, options: list[str]) -> NoReturn:
    """Exit as `script` does where it answers `options` by itself, else with `UNANSWERED`."""
    if not _imports_argparse(script):
        sys.exit(UNANSWERED)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments: Any, **named: Any) -> NoReturn:
        try:
            parse(*arguments, **named)
        except SystemExit as left:
            _leave(left.code if isinstance(left.code, int) else 0)
        _leave(UNANSWERED)

    setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)  # noqa: B010 - mypy takes no assignment
    sys.argv = [str(script), *options]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException:  # noqa: BLE001 - whatever is wrong with it will be seen when it is run in earnest
        _leave(UNANSWERED)
    _leave(UNANSWERED)


def _imports_argparse(script: Path) -> bool:
    """Whether running `script` that far is of use: one that knows no options would only do its work."""
    try:
        tree = ast.parse(script.read_bytes())
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.Import) and node.names[0].name == "argparse" for node in tree.body)


def _leave(status: int) -> NoReturn:
    """Exit at once: nothing of the script, such as what it has registered for the end, runs any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    answer(Path(sys.argv[1]), sys.argv[2:])
