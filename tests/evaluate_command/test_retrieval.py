"""`inferpool evaluate` on queries and documents: which documents a model's vectors find."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool import cli
from inferpool.errors import InvalidInput
from inferpool.evaluate_command.retrieval import is_retrieval, rank, read_retrieval
from inferpool.release.evaluate.metrics import RankedAnswers, estimate, ranked_metrics

from tests.text_models import write_encoder

DOCUMENTS = "id,text\na,w1 w2 w3\nb,w4 w5\nc,w6 w7 w8\nd,w9\n"
QUERIES = '{"id": "1", "text": "w4 w5"}\n{"id": "2", "text": "w9"}\n{"id": "3", "text": "w6"}\n'
RELEVANT = "query,document,grade\n1,b,2\n1,a,1\n2,d,1\n2,c,0\n"


def write(folder: Path, relevant: str = RELEVANT, documents: str = DOCUMENTS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "documents.csv").write_text(documents)
    (folder / "queries.jsonl").write_text(QUERIES)
    (folder / "relevant.csv").write_text(relevant)
    return folder


def test_a_model_of_embeddings_finds_its_own_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_encoder(tmp_path, "encoder", "[text]\nmax_tokens = 128\n[text.embeddings]\npooling = 'mean'\n")
    data, model, report = write(tmp_path / "data"), str(tmp_path / "encoder"), tmp_path / "report"
    arguments = ["evaluate", model, "--data", str(data), "--report", str(report), "--measure-ms", "0"]
    assert cli.main([*arguments, "--against", model]) == 0
    found = json.loads((report / "evaluation.json").read_text())
    # Queries without a relevant document are left out, and each text is nearest to itself.
    assert (found["task"], found["rows"]) == ("retrieval", 2)
    assert found["metrics"]["precision_at_1"]["value"] == found["metrics"]["mrr_at_10"]["value"] == 1
    assert found["metrics"]["recall_at_1"]["value"] == 0.75
    assert found["metrics"]["recall_at_5"]["value"] == 1
    assert found["first_relevant_rank"]["1"] == 2
    assert found["against"]["differences"]["recall_at_5"]["value"] == 0
    assert "encoder 1, retrieval, 2 queries" in capsys.readouterr().out
    assert "<svg" in (report / "evaluation.html").read_text()
    assert cli.main([*arguments, "--slice", "id"]) == 2


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_metrics_are_those_of_a_sorted_list(documents: int, queries: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    # Few different vectors, so that many products are equal.
    vectors = source.integers(-1, 2, (documents, 3)).astype(np.float32)
    asked = source.integers(-1, 2, (queries, 3)).astype(np.float32)
    grades = [
        {
            int(each): float(source.integers(1, 4))
            for each in source.choice(documents, min(documents, 3), False)
        }
        for _ in range(queries)
    ]
    answers = rank(asked, vectors, grades)
    metrics = {name: metric(np.ones(queries)) for name, metric in ranked_metrics(answers).items()}
    recalls, reciprocal, normalized = [], [], []
    for query, own in zip(asked, grades, strict=True):
        order = sorted(range(documents), key=lambda index: (-float(vectors[index] @ query), index))[:10]
        recalls.append(sum(index in own for index in order[:5]) / len(own))
        reciprocal.append(next((1 / (at + 1) for at, index in enumerate(order) if index in own), 0))
        gain = sum(own.get(index, 0) / math.log2(at + 2) for at, index in enumerate(order))
        best = sorted(own.values(), reverse=True)[:10]
        normalized.append(gain / sum(value / math.log2(at + 2) for at, value in enumerate(best)))
    assert metrics["recall_at_5"] == pytest.approx(np.mean(recalls))
    assert metrics["mrr_at_10"] == pytest.approx(np.mean(reciprocal))
    assert metrics["ndcg_at_10"] == pytest.approx(np.mean(normalized))


def test_scikit_learn_has_the_same_discounted_gain() -> None:
    from sklearn.metrics import ndcg_score

    source = np.random.default_rng(1)
    truth = source.integers(0, 4, (20, 40)).astype(float)
    scores = source.permuted(np.tile(np.arange(40.0), (20, 1)), axis=1)
    order = np.argsort(-scores, axis=1)[:, :10]
    ideal = -np.sort(-truth, axis=1)[:, :10]
    weights = 1 / np.log2(np.arange(10) + 2)
    answers = RankedAnswers(np.take_along_axis(truth, order, 1), (truth > 0).sum(axis=1), ideal @ weights)
    assert estimate(ranked_metrics(answers), 20)["ndcg_at_10"].value == pytest.approx(
        ndcg_score(truth, scores, k=10)
    )


@pytest.mark.parametrize(
    ("relevant", "documents", "problem"),
    [
        ("query,document\n9,a\n", DOCUMENTS, "no query with the id '9'"),
        ("query,document\n1,z\n", DOCUMENTS, "no document with the id 'z'"),
        ("query,document,grade\n1,a,0\n", DOCUMENTS, "no query has a relevant document"),
        ("query,document,grade\n1,a,much\n", DOCUMENTS, "is no number"),
        ("query,text\n1,a\n", DOCUMENTS, 'no column "document"; it has query, text'),
        (RELEVANT, "id,text\na,w1\na,w2\n", "comes twice"),
        (RELEVANT, "id,text\na,1\n", "expected an id and a text"),
    ],
)
def test_data_that_contradict_themselves_are_named(
    tmp_path: Path, relevant: str, documents: str, problem: str
) -> None:
    with pytest.raises(InvalidInput, match=problem):
        read_retrieval(write(tmp_path, relevant, documents))


def test_a_folder_without_all_three_tables_is_something_else(tmp_path: Path) -> None:
    assert is_retrieval(write(tmp_path))
    (tmp_path / "queries.jsonl").unlink()
    assert not is_retrieval(tmp_path)
    with pytest.raises(InvalidInput, match="lacks queries"):
        read_retrieval(tmp_path)
