"""What is finished of a run, on disk, so that a run that was killed goes on where it was.

Each chunk of rows becomes a file in the folder `OUTPUT.parts`, which appears under its name complete or not
at all. At the end the files become the output, in the order of the rows, and the folder is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np

from inferpool.errors import Conflict
from inferpool.tensors import Array

PLAN: Final = "plan.json"
_OUTPUT: Final = "output:"


class Finished(NamedTuple):
    """The answers to a chunk of rows.

    Attributes:
        start: the number of its first row.
        outputs: the outputs of the rows without an error, by name.
        errors: an error for each row, an empty text for none.
        names: the names of the rows, or nothing.
        labels: the best label of each row and its score, or nothing; an empty text for a row with an error.
    """

    start: int
    outputs: Mapping[str, Array]
    errors: Sequence[str]
    names: Sequence[str] = ()
    labels: Sequence[tuple[str, float]] = ()


class FinishedChunks:
    """The folder of finished chunks beside an output."""

    def __init__(self, output: Path, plan: Mapping[str, Any]) -> None:
        """Open the folder for a run that `plan` describes, or go on with that of an earlier run.

        Raises Conflict if the earlier run had another plan, or still runs, or if the output exists.
        """
        self.folder = output.with_name(output.name + ".parts")
        if output.exists() and not self.folder.exists():
            raise Conflict(f"{output} exists; remove it, or name another output")
        self.folder.mkdir(exist_ok=True)
        self._lock: IO[str] = (self.folder / PLAN).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise Conflict(f"another run writes {output}") from None
        self._lock.seek(0)
        text = self._lock.read()
        mine = json.dumps(plan, sort_keys=True)
        if text and text != mine and self.starts():
            self._lock.close()
            raise Conflict(
                f"{self.folder} is of a run with another file, model or option; repeat that one, or remove"
                " the folder"
            )
        if text != mine:
            self._lock.truncate(0)
            self._lock.write(mine)
            self._lock.flush()

    def starts(self) -> set[int]:
        """The first rows of the chunks that are finished."""
        return {int(path.stem) for path in self.folder.glob("*.npz")}

    def add(self, finished: Finished) -> None:
        """Keep a chunk; returns once it is on disk."""
        arrays: dict[str, Array] = {
            f"{_OUTPUT}{name}": value.astype(np.str_) if value.dtype == np.object_ else value
            for name, value in finished.outputs.items()
        }
        arrays["errors"] = np.array(finished.errors, np.str_)
        arrays["names"] = np.array(finished.names, np.str_)
        arrays["labels"] = np.array([label for label, _ in finished.labels], np.str_)
        arrays["scores"] = np.array([score for _, score in finished.labels], np.float64)
        file = self.folder / f"{finished.start:012d}.npz"
        unfinished = file.with_suffix(".unfinished")
        with unfinished.open("wb") as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type]
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)

    def read(self) -> Iterator[Finished]:
        """The finished chunks in the order of their rows."""
        for start in sorted(self.starts()):
            with np.load(self.folder / f"{start:012d}.npz", allow_pickle=False) as arrays:
                yield Finished(
                    start,
                    {
                        name.removeprefix(_OUTPUT): arrays[name]
                        for name in arrays.files
                        if name.startswith(_OUTPUT)
                    },
                    arrays["errors"].tolist(),
                    arrays["names"].tolist(),
                    [*zip(arrays["labels"].tolist(), arrays["scores"].tolist(), strict=True)],
                )

    def remove(self) -> None:
        """Remove the folder: the output is complete."""
        shutil.rmtree(self.folder)
        self._lock.close()

    def close(self) -> None:
        """Leave the folder for a later run."""
        self._lock.close()
