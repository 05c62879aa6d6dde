"""Prints the result of a command that ends by itself, or the reason of its failure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from inferpool.errors import ConfigError, InferpoolError
from inferpool.system.files import printable


def print_lines(work: Callable[[], Iterable[str]]) -> int:
    """Print the lines that `work` returns, or why it failed; returns the exit status of the command."""
    try:
        for line in work():
            print(printable(line))
        return 0
    except (InferpoolError, OSError, ValueError, TypeError, ImportError) as error:
        return print_failure(error)


def print_failure(error: Exception) -> int:
    """Print why a command failed, with the notes of the error; returns the command's exit status.

    That is 2 if the arguments or settings are wrong, else 1.
    """
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    said = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        said = f"{error.filename}: {error.strerror}"  # without the number of the error
    print(f"inferpool: {printable(said + notes)}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
