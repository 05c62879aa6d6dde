"""Predicts with the rows of a file by several requests at a time, and keeps each answer on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.client import Client, Prediction
from inferpool.client.slices import make_progress
from inferpool.errors import (
    Forbidden,
    InferpoolError,
    InvalidInput,
    ModelCrashed,
    ModelFailed,
    NotFound,
    RequestError,
    RunTimeout,
    Unauthorized,
)
from inferpool.predict_command.finished_chunks import Finished, FinishedChunks
from inferpool.predict_command.rows_in import Chunk, Source
from inferpool.predict_command.rows_out import write_output
from inferpool.tensors import Array

_OF_ROWS: Final = (RequestError, ModelFailed, ModelCrashed, RunTimeout)
"""The errors that a row may be to blame for."""
_OF_CALLERS: Final = (Unauthorized, Forbidden, NotFound)
"""Those among them that every row would have."""


class RunOptions(NamedTuple):
    """How a file is predicted.

    Attributes:
        version: the version that answers; None for the model's default.
        outputs: the outputs wanted; None for all.
        labels: whether to write the best label and its score in place of the outputs' names alone.
        keep_errors: whether a row that cannot be answered becomes a row with an error, not the end.
        concurrency: how many requests run at the same time.
        progress: whether to show a bar.
    """

    version: str | None
    outputs: Sequence[str] | None
    labels: bool
    keep_errors: bool
    concurrency: int
    progress: bool


class Counts(NamedTuple):
    """What a run did: all rows, those with an error, and those that an earlier run had answered."""

    rows: int
    errors: int
    earlier: int


def predict_file(
    client: Client, model: str, source: Source, output: Path, store: FinishedChunks, options: RunOptions
) -> Counts:
    """Predict every row of `source` and write `output`; chunks that are in `store` are not asked again.

    Raises InferpoolError and OSError; `store` then keeps what is finished.
    """
    done = store.starts()
    rows = earlier = 0
    waiting: deque[tuple[Chunk, Future[Finished]]] = deque()

    def submit(threads: ThreadPoolExecutor) -> Iterator[Chunk]:
        """Yield the chunks that are done, with at most two for each thread on their way."""
        for chunk in source.chunks():
            if chunk.start in done:
                yield chunk
                continue
            waiting.append((chunk, threads.submit(_answer, client, model, chunk, store, options)))
            if len(waiting) >= 2 * options.concurrency:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)

    with (
        make_progress(options.progress, source.rows) as bar,
        ThreadPoolExecutor(options.concurrency) as threads,
    ):
        try:
            for chunk in submit(threads):
                rows += chunk.rows
                earlier += chunk.rows if chunk.start in done else 0
                bar.update(chunk.rows)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if not rows:
        raise InvalidInput("the file has no rows")
    errors = sum(bool(error) for chunk in store.read() for error in chunk.errors)
    write_output(output, store.read, with_errors=options.keep_errors)
    store.remove()
    return Counts(rows, errors, earlier)


def _first(waiting: deque[tuple[Chunk, Future[Finished]]]) -> Chunk:
    chunk, future = waiting.popleft()
    future.result()
    return chunk


def _answer(client: Client, model: str, chunk: Chunk, store: FinishedChunks, options: RunOptions) -> Finished:
    """Answer a chunk and keep it."""

    def ask(start: int, end: int) -> Prediction:
        return client.predict_content(
            model, chunk.content(start, end), options.version, options.outputs, options.labels
        )

    answers: list[tuple[int, int, Prediction]] = []
    errors = [""] * chunk.rows
    fault = _ask_in_halves(ask, 0, chunk.rows, answers, errors, keep=options.keep_errors)
    if fault is None and not chunk.start and all(errors) and chunk.rows > 1:
        fault = InvalidInput(f"every row of the first {chunk.rows} has an error: {errors[0]}")
    if fault is not None:
        where = (
            f"row {chunk.start}"
            if chunk.rows == 1
            else f"rows {chunk.start} to {chunk.start + chunk.rows - 1}"
        )
        if chunk.names and chunk.rows == 1:
            where = chunk.names[0]
        fault.add_note(f"in {where}; --keep-errors keeps such rows with their errors")
        raise fault
    finished = Finished(
        chunk.start, _joined(answers), errors, chunk.names, _labels(answers, chunk.rows, options)
    )
    store.add(finished)
    return finished


def _ask_in_halves(
    ask: Callable[[int, int], Prediction],
    start: int,
    end: int,
    answers: list[tuple[int, int, Prediction]],
    errors: list[str],
    *,
    keep: bool,
) -> InferpoolError | None:
    """Ask for the rows from `start` to `end`; after an error for each half, until its rows are known.

    Returns the error that ends the run, or None.
    """
    try:
        answers.append((start, end, ask(start, end)))
        return None
    except _OF_ROWS as error:
        if not keep or isinstance(error, _OF_CALLERS):
            return error
        if end - start == 1:
            errors[start] = f"{error.code}: {error.detail}"
            return None
    middle = (start + end) // 2
    return _ask_in_halves(ask, start, middle, answers, errors, keep=keep) or _ask_in_halves(
        ask, middle, end, answers, errors, keep=keep
    )


def _joined(answers: Sequence[tuple[int, int, Prediction]]) -> dict[str, Array]:
    if not answers:
        return {}
    for start, end, prediction in answers:
        for name, values in prediction.outputs.items():
            if np.ndim(values) == 0 or len(values) != end - start:
                raise ModelFailed(f'output "{name}" has not one row for each of the {end - start} rows sent')
    first = answers[0][2].outputs
    return {name: np.concatenate([each.outputs[name] for _, _, each in answers]) for name in first}


def _labels(
    answers: Sequence[tuple[int, int, Prediction]], rows: int, options: RunOptions
) -> list[tuple[str, float]]:
    if not options.labels:
        return []
    found: list[tuple[str, float]] = [("", float("nan"))] * rows
    for start, _, prediction in answers:
        for index, best in enumerate(prediction.labels or (), start):
            found[index] = (str(best[0]["label"]), float(best[0]["score"]))
    return found


def describe(counts: Counts, output: Path) -> str:
    """Return the line that a run ends with."""
    parts: list[Any] = [f"{counts.rows} rows"]
    if counts.errors:
        parts.append(f"{counts.errors} with an error")
    if counts.earlier:
        parts.append(f"{counts.earlier} from an earlier run")
    return f"{', '.join(parts)}: {output}"
