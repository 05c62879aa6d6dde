"""Files of users, which may be anything: a named pipe, a device without an end, a huge file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_file(file: Path, most_bytes: int) -> bytes:
    """The content of a regular file of at most `most_bytes`; never waits for a writer.

    Raises OSError, whose `strerror` says in a clause what is wrong.
    """
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        # The size may be wrong, as in /proc, or grow.
        content = opened.read(most_bytes + 1) if status.st_size <= most_bytes else b""
        if max(status.st_size, len(content)) > most_bytes:
            raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", str(file))
        return content


def cache_folder(chosen: Path | None) -> Path:
    """`chosen`, or the user's own (`XDG_CACHE_HOME`, `~/.cache`); raises RuntimeError without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (chosen if chosen is not None else base / "inferpool").expanduser()


def printable(text: str) -> str:
    """`text` with an escape in place of every character that could move a cursor, or start a line."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )
