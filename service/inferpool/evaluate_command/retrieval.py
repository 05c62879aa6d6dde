"""Evaluates a model of embeddings by a search: queries, documents, and which of them are relevant."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.client import Client
from inferpool.client.slices import Progress, make_progress
from inferpool.errors import InvalidInput
from inferpool.evaluate_command.labelled_rows import file_digest, read_table
from inferpool.evaluate_command.model_answers import RETRIEVAL, only_version
from inferpool.predict_command.local_server import run_with_model
from inferpool.release.evaluate.metrics import RANKS, RankedAnswers, discounted_gain
from inferpool.settings import Settings
from inferpool.tensors import Array

_SUFFIXES: Final = (".csv", ".parquet", ".jsonl", ".ndjson")
_PARTS: Final = ("queries", "documents", "relevant")
_TEXTS: Final = 128
"""Texts of one request."""
_QUERIES: Final = 256
"""Queries whose scores for all documents are in memory at once."""


class RetrievalData(NamedTuple):
    """What a search is measured with.

    Attributes:
        queries: the texts of the queries that have a relevant document.
        documents: the texts of all documents.
        grades: for each query the grade, above 0, of each relevant document by its index.
        digest: SHA-256 of the files, as hex.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    grades: Sequence[Mapping[int, float]]
    digest: str


class Searched(NamedTuple):
    """What a model's vectors have found; the attributes are those of `Answered`, and `vectors`.

    Attributes:
        vectors: the vectors of the queries, and then of the documents, [texts, width].
    """

    model: str
    version: str
    task: str
    answers: RankedAnswers
    vectors: Array


def is_retrieval(path: Path) -> bool:
    """Return whether `path` is a folder with queries, documents, and which of them are relevant."""
    return path.is_dir() and all(_file(path, name) is not None for name in _PARTS)


def read_retrieval(folder: Path) -> RetrievalData:
    """Read the three tables of a folder: `queries`, `documents` and `relevant`.

    Raises InvalidInput if something is missing, unreadable or contradictory, and OSError.
    """
    files = {name: _file(folder, name) for name in _PARTS}
    paths = {name: path for name, path in files.items() if path is not None}
    if len(paths) < len(_PARTS):
        missing = ", ".join(name for name, path in files.items() if path is None)
        raise InvalidInput(f"{folder} lacks {missing}: a file with one of the endings {', '.join(_SUFFIXES)}")
    documents, queries = (_texts(paths[name]) for name in ("documents", "queries"))
    positions = {identity: index for index, identity in enumerate(documents)}
    grades: dict[str, dict[int, float]] = {}
    columns = _columns(paths["relevant"], ("query", "document"), "grade")
    for row, (query, document, grade) in enumerate(zip(*columns, strict=True)):
        if str(query) not in queries:
            raise InvalidInput(f"relevant, row {row}: there is no query with the id {str(query)!r}")
        if str(document) not in positions:
            raise InvalidInput(f"relevant, row {row}: there is no document with the id {str(document)!r}")
        try:
            value = 1.0 if grade is None else float(grade)
        except (TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value):
            raise InvalidInput(f"relevant, row {row}: the grade {grade!r} is no number")
        if value > 0:
            grades.setdefault(str(query), {})[positions[str(document)]] = value
    if not grades:
        raise InvalidInput("no query has a relevant document")
    asked = [identity for identity in queries if identity in grades]
    digest = hashlib.sha256("".join(file_digest(paths[name]) for name in _PARTS).encode()).hexdigest()
    return RetrievalData(
        [queries[identity] for identity in asked],
        [*documents.values()],
        [grades[identity] for identity in asked],
        digest,
    )


def ask_for_vectors(
    path: Path,
    version: str | None,
    data: RetrievalData,
    settings: Settings,
    *,
    progress: bool = False,
    prepare: Callable[[Client], object] = lambda client: None,
) -> Searched:
    """Load the model in `path`, embed all texts, and find the documents that are nearest to each query.

    The texts are sent once `prepare` has returned. Raises InferpoolError, OSError.
    """

    def use(client: Client, model: str) -> tuple[str, str, Array, Array]:
        prepare(client)
        number = version or only_version(client, model)
        with make_progress(progress, len(data.queries) + len(data.documents)) as bar:
            queries = _embed(client, model, version, data.queries, "query", bar)
            documents = _embed(client, model, version, data.documents, "document", bar)
        return model, number, queries, documents

    model, number, queries, documents = run_with_model(path, settings, use)
    found = rank(queries, documents, data.grades)
    return Searched(model, number, RETRIEVAL, found, np.concatenate([queries, documents]))


def rank(queries: Array, documents: Array, grades: Sequence[Mapping[int, float]]) -> RankedAnswers:
    """Order the documents of each query by the dot product of the vectors, both [texts, width].

    Of documents with equal products the one that comes first in the data is the better one.
    """
    depth = min(RANKS, len(documents))
    at_rank = np.zeros((len(queries), RANKS))
    for start in range(0, len(queries), _QUERIES):
        scores = queries[start : start + _QUERIES] @ documents.T
        for row, order in enumerate(_best(scores, depth), start):
            at_rank[row, :depth] = [grades[row].get(int(index), 0.0) for index in order]
    best = [sorted(each.values(), reverse=True)[:RANKS] for each in grades]
    ideal = np.array([each + [0.0] * (RANKS - len(each)) for each in best])
    relevant = np.array([len(each) for each in grades])
    return RankedAnswers(at_rank, relevant, discounted_gain(ideal))


def _best(scores: Array, depth: int) -> Array:
    """Return the indices of the `depth` largest numbers of each row, the largest first."""
    if depth == scores.shape[1]:
        return np.argsort(-scores, axis=1, kind="stable")
    least = np.partition(scores, -depth, axis=1)[:, -depth]
    found = np.empty((len(scores), depth), np.int64)
    for row, values in enumerate(scores):
        indices = np.flatnonzero(values >= least[row])
        found[row] = indices[np.argsort(-values[indices], kind="stable")][:depth]
    return found


def _embed(
    client: Client, model: str, version: str | None, texts: Sequence[str], kind: str, bar: Progress
) -> Array:
    vectors = []
    for start in range(0, len(texts), _TEXTS):
        some = texts[start : start + _TEXTS]
        vectors.append(client.embed(model, some, input_type=kind, version=version))
        bar.update(len(some))
    return np.concatenate(vectors)


def _file(folder: Path, name: str) -> Path | None:
    return next((file for suffix in _SUFFIXES if (file := folder / (name + suffix)).is_file()), None)


def _texts(path: Path) -> dict[str, str]:
    """Return the texts of a table by their ids."""
    identities, texts, _ = _columns(path, ("id", "text"), None)
    found: dict[str, str] = {}
    for row, (identity, text) in enumerate(zip(identities, texts, strict=True)):
        if identity is None or not isinstance(text, str):
            raise InvalidInput(f"{path.name}, row {row}: expected an id and a text")
        if str(identity) in found:
            raise InvalidInput(f"{path.name}, row {row}: the id {str(identity)!r} comes twice")
        found[str(identity)] = text
    if not found:
        raise InvalidInput(f"{path.name} has no rows")
    return found


def _columns(path: Path, names: Sequence[str], optional: str | None) -> list[list[Any]]:
    """Return the named columns of a table, and the optional one, or None for each row."""
    table = read_table(path)
    for name in names:
        if name not in table.column_names:
            raise InvalidInput(f'{path.name} has no column "{name}"; it has {", ".join(table.column_names)}')
    found: list[list[Any]] = [table.column(name).to_pylist() for name in names]
    has = optional is not None and optional in table.column_names
    return [*found, table.column(optional).to_pylist() if has else [None] * len(table)]
