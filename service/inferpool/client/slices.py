"""Cuts many rows into several requests, and shows how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from inferpool.client.content import Content, count_rows, usual_rows
from inferpool.system.install_hints import install_command


class Progress(Protocol):
    """A bar that shows how much is done."""

    def update(self, rows: int) -> object:
        """Show that `rows` more are done."""


class _NoProgress:
    def update(self, rows: int) -> None:
        pass


def slice_rows(content: Content, rows_per_request: int | None, concurrency: int) -> list[tuple[int, int]]:
    """Return the first and the last row (not included) of each request; at least one request.

    Raises ValueError if a number is below 1, and TypeError if the inputs differ in their rows.
    """
    step = usual_rows(content) if rows_per_request is None else rows_per_request
    if step < 1 or concurrency < 1:
        raise ValueError("rows_per_request and concurrency are numbers from 1")
    rows = count_rows(content)
    return [(start, min(rows, start + step)) for start in range(0, max(1, rows), step)]


@contextmanager
def make_progress(wanted: bool, rows: int | None, unit: str = "row") -> Iterator[Progress]:
    """Show a bar of tqdm if it is `wanted`, of how many rows or other units, if that is known.

    Raises ImportError if tqdm is not installed.
    """
    if not wanted:
        yield _NoProgress()
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as missing:
        raise ImportError(f"a progress bar needs tqdm: {install_command('client')}") from missing
    with tqdm(total=rows, unit=unit) as bar:
        yield bar
