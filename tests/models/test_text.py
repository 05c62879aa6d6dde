"""The models of text: each is built by its script, served, and compared with a reference."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.docs.pages import PAGES, blocks
from tests.models.built import assert_batched, documented_request
from tests.models.record import needs_to_run
from tests.server import Server

MODELS = ROOT / "models"
TEXTS = (
    "Yes.",
    "The match was decided by a goal in the last minute.",
    "",
    "If the object is not found, an exception is raised, and " * 12,
)
"""Texts of 1 to about 150 words, so that all texts of a request but the longest are padded."""

# The first test of each model builds it, which a busy machine does slowly.

Build = Callable[..., Path]


def script(name: str) -> ModuleType:
    file = MODELS / name / "build.py"
    spec = importlib.util.spec_from_file_location(f"build_{name.replace('-', '_')}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, MODELS / name / "build.py", *arguments],
        # One thread does so little work sooner than several threads that wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def build(repository: Path) -> Build:
    """Build a model into a repository of its own: `build("news")` returns its folder."""

    def into(name: str, *arguments: str | Path) -> Path:
        folder = repository / name
        done = run_script(name, *arguments, "--out", folder)
        assert done.returncode == 0, done.stderr
        shutil.copy(MODELS / name / "model.toml", folder)
        return folder

    return into


@pytest.fixture(scope="module")
def start(cache_dir: Path) -> Iterator[Callable[..., Server]]:
    """Serve the folder of one model until the tests of the module end."""
    servers: list[Server] = []

    def started(folder: Path, *flags: str) -> Server:
        environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
        servers.append(Server(folder, flags, environ))
        servers[-1].wait_loaded()
        return servers[-1]

    yield started
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def minilm(build: Build, start: Callable[..., Server]) -> Server:
    needs_to_run("minilm")
    return start(build("minilm"))


@pytest.fixture(scope="module")
def news(build: Build, start: Callable[..., Server]) -> Server:
    needs_to_run("news")
    return start(build("news"))


GOOD = ("wonderful", "moving", "brilliant", "charming", "gripping", "superb", "delightful", "funny")
BAD = ("dull", "awful", "boring", "clumsy", "tedious", "dreadful", "lifeless", "painful")
PLAIN = ("the", "film", "a", "story", "its", "actors", "and", "scene", "of", "plot", "was", "we", "saw")


def write_reviews(folder: Path, chance: random.Random, count: int, words: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        review = chance.choices(PLAIN, k=chance.randint(4, 120))
        for _ in range(1 + len(review) // 12):
            review.insert(chance.randrange(len(review)), chance.choice(words))
        (folder / f"{index}_0.txt").write_text(" ".join(review) + ".<br /><br />")


def write_archive(folder: Path, test: tuple[Sequence[str], ...] = (BAD, GOOD)) -> Path:
    """Write reviews in the layout of aclImdb; `test` are the words that tell the labels of the test half."""
    chance = random.Random(5)
    for half, count, telling in (("train", 60, (BAD, GOOD)), ("test", 25, test)):
        for name, words in zip(("neg", "pos"), telling, strict=True):
            write_reviews(folder / half / name, chance, count, words)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("data") / "aclImdb")


@pytest.fixture(scope="module")
def sentiment(build: Build, start: Callable[..., Server], reviews: Path) -> Server:
    needs_to_run("sentiment")
    return start(build("sentiment", "--data", reviews, "--epochs", "12"))


def outputs(server: Server, name: str, texts: list[str]) -> np.ndarray[Any, Any]:
    answer = server.post(f"/predict/{name}", json={"inputs": texts})
    assert answer.status_code == 200, answer.text
    ((_, rows),) = answer.json()["outputs"].items()
    return np.array(rows)


def best(server: Server, name: str, texts: list[str]) -> list[str]:
    answer = server.post(f"/predict/{name}", json={"inputs": texts})
    assert answer.status_code == 200, answer.text
    return [row[0]["label"] for row in answer.json()["predictions"]]


@pytest.mark.parametrize("name", ["minilm", "news", "sentiment", "next-word"])
def test_a_text_alone_gives_the_same_answer_as_among_longer_texts(
    name: str, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue("bundled" if name == "next-word" else name)
    assert_batched(server, name)
    together = outputs(server, name, list(TEXTS))
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(outputs(server, name, [text])[0], row, rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_sentence_vectors_equal_those_of_the_package(minilm: Server, repository: Path) -> None:
    sample = json.loads((repository / "minilm" / "samples" / "sentences.json").read_text())
    got = outputs(minilm, "minilm", sample["inputs"]["text"])
    np.testing.assert_allclose(got, sample["outputs"]["embedding"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_the_client_of_openai_gets_the_vectors_of_the_package(minilm: Server, repository: Path) -> None:
    import openai

    sample = json.loads((repository / "minilm" / "samples" / "sentences.json").read_text())
    with openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="minilm", input=sample["inputs"]["text"])
    got = [item.embedding for item in answer.data]
    np.testing.assert_allclose(got, sample["outputs"]["embedding"], rtol=0, atol=1e-5)


def test_the_documented_request_for_embeddings_answers(minilm: Server) -> None:
    [source] = [
        block.source for page in PAGES for block in blocks(page) if "8000/v1/embeddings" in block.source
    ]
    command = source.replace("localhost:8000", f"127.0.0.1:{minilm.port}").replace("curl", "curl -sS")
    run = subprocess.run(command, shell=True, capture_output=True, check=True)
    assert [len(item["embedding"]) for item in json.loads(run.stdout)["data"]] == [2048, 2048]


def test_sentences_of_the_same_meaning_have_near_vectors(minilm: Server) -> None:
    cat, kitten, bond = outputs(
        minilm,
        "minilm",
        ["A cat is asleep on the couch.", "The kitten naps on a sofa.", "Yields on ten-year bonds rose."],
    )
    assert cat @ kitten > 0.5 > 0.2 > cat @ bond


def test_minilm_is_not_written_if_it_differs_from_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_to_run("minilm")
    module = script("minilm")
    monkeypatch.setattr(module, "trial_sentences", lambda: list(module.SAMPLES))
    swapped = module.run(module.to_onnx(), module.tokens(module.SAMPLES))[::-1]
    monkeypatch.setattr(module, "reference", lambda sentences: swapped)
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path)])
    assert module.main() == 1
    assert "not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_four_of_five_headlines_get_the_right_topic(news: Server) -> None:
    module = script("news")
    texts, topics = module.headlines()
    counts = [topics.count(topic) for topic in module.TOPICS]
    assert sum(counts) == len(set(texts)) >= 60
    assert min(counts) >= 12
    right = [given == topic for given, topic in zip(best(news, "news", texts), topics, strict=True)]
    assert np.mean(right) >= module.STATED_ACCURACY >= 0.8


def test_scores_of_news_are_cosines_times_twenty(news: Server, minilm: Server) -> None:
    module = script("news")
    text = "The minister resigned on Monday."
    (logits,) = outputs(news, "news", [text])
    for logit, described in zip(logits, module.TOPICS.values(), strict=True):
        mean = outputs(minilm, "minilm", list(described)).mean(axis=0)
        cosine = outputs(minilm, "minilm", [text])[0] @ mean / np.linalg.norm(mean)
        assert logit == pytest.approx(20 * cosine, abs=1e-3)


def test_sentiment_classifies_unseen_reviews(sentiment: Server, reviews: Path) -> None:
    for name, label in (("neg", "negative"), ("pos", "positive")):
        texts = [file.read_text() for file in sorted((reviews / "test" / name).glob("*.txt"))]
        assert np.mean([given == label for given in best(sentiment, "sentiment", texts)]) >= 0.8


def test_sentiment_is_not_written_if_it_is_wrong(tmp_path: Path) -> None:
    needs_to_run("sentiment")
    archive = write_archive(tmp_path / "aclImdb", test=(GOOD, BAD))
    done = run_script("sentiment", "--data", archive, "--epochs", "2", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "not written" in done.stderr
    assert not (tmp_path / "out").exists()


def test_sentiment_names_what_the_folder_lacks(tmp_path: Path) -> None:
    needs_to_run("sentiment")
    done = run_script("sentiment", "--data", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"no reviews: expected {tmp_path / 'train' / 'neg'}/*.txt" in done.stderr


def test_the_graph_of_sentiment_is_its_network() -> None:
    needs_to_run("sentiment")
    import torch

    module = script("sentiment")
    torch.manual_seed(1)
    network = module.Classifier(vocabulary=50).eval()
    rows = [[2, 7, 8, 9], [2], [2, *range(3, 50)]]
    graph = module.to_onnx({name: tensor.numpy() for name, tensor in network.state_dict().items()})
    ids, mask = map(torch.from_numpy, module.padded(rows))
    with torch.no_grad():
        expected = network(ids, mask).numpy()
    np.testing.assert_allclose(module.run(graph, rows), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def next_word() -> ModuleType:
    needs_to_run("next-word")
    return script("next-word")


@pytest.fixture(scope="module")
def few_epochs(next_word: ModuleType, repository: Path) -> Path:
    """The next-word model after four epochs: enough to know more than the frequencies of words."""
    folder = repository / "next-word"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_word, "STATED_SHARE", 3.0)
        patch.setattr(next_word, "STATED_TOP_5", 0.2)
        patch.setattr(sys, "argv", ["build.py", "--epochs", "4", "--out", str(folder)])
        assert next_word.main() == 0
    config = (MODELS / "next-word" / "model.toml").read_text()
    (folder / "model.toml").write_text(config.replace("serve = [1]", "serve = [1, 2]"))
    return folder


def test_next_word_answers_the_same_as_onnx_and_as_torchscript(
    few_epochs: Path, start: Callable[..., Server]
) -> None:
    server = start(few_epochs, "--trust")
    for text in TEXTS:
        by_onnx, by_torchscript = (
            server.post(f"/predict/next-word/{version}", json={"inputs": [text]}).json() for version in (1, 2)
        )
        (expected,), (got,) = by_onnx["outputs"]["logits"], by_torchscript["outputs"]["logits"]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        assert [row["label"] for row in by_onnx["predictions"][0]] == [
            row["label"] for row in by_torchscript["predictions"][0]
        ]


def test_next_word_is_not_written_before_it_has_learned(
    next_word: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, unseen = next_word.split()
    monkeypatch.setattr(next_word, "split", lambda: (texts, unseen[:10]))
    untrained = next_word.Network(len(next_word.make_tokenizer(texts).get_vocab()), next_word.FIRST_WORD)
    monkeypatch.setattr(next_word, "train", lambda *_: untrained.eval())
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path)])
    assert next_word.main() == 1
    assert "not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_next_word_holds_out_paragraphs_that_it_does_not_learn(next_word: ModuleType) -> None:
    texts, unseen = next_word.split()
    assert not set(texts) & set(unseen)
    assert len(unseen) == (len(texts) + len(unseen)) // 10 > 100


def test_counts_of_words_are_probabilities(next_word: ModuleType) -> None:
    counts = next_word.Counts([[2, 5, 6, 5, 7], [2, 5, 6, 8]], vocabulary=9, first_word=5)
    for before in ((), (5,), (2, 5), (8, 8)):
        assert counts.after(*before).sum() == pytest.approx(1)
    assert counts.after(2, 5).argmax() == 6 - 5
    # Two kinds among three words leave 0.75 each to the shorter counts.
    assert counts.after(5)[1] == pytest.approx((2 - 0.75) / 3 + 0.5 * counts.after()[1])


def test_the_committed_next_word_continues_the_texts_of_help(bundled: Server) -> None:
    assert "called" in best_five(bundled, "This method is")
    assert "of" in best_five(bundled, "The value")


def best_five(server: Server, text: str) -> list[str]:
    (row,) = server.post("/predict/next-word", json={"inputs": [text]}).json()["predictions"]
    assert len(row) == 5
    assert 0 < sum(word["score"] for word in row) < 1
    return [word["label"] for word in row]


def test_next_word_is_small_enough_for_the_repository(models: Path) -> None:
    files = [file for file in (models / "next-word").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3_000_000


def documented_example(first_words: str) -> tuple[str, str]:
    """Return the block of the documents that begins with `first_words`, and the output below it."""
    (block,) = [block for page in PAGES for block in blocks(page) if block.source.startswith(first_words)]
    assert block.output is not None
    return block.source, block.output.source


def test_the_documented_request_to_news_gets_the_answer_shown(news: Server) -> None:
    _, shown = documented_example("curl localhost:8000/predict/news ")
    answer, expected = documented_request("news", news, ROOT), json.loads(shown)
    assert answer.keys() == expected.keys()
    np.testing.assert_allclose(answer["outputs"]["logits"], expected["outputs"]["logits"], rtol=1e-4)
    for got, row in zip(answer["predictions"], expected["predictions"], strict=True):
        assert got == [{**word, "score": pytest.approx(word["score"], rel=1e-4)} for word in row]


def test_the_documented_program_for_minilm_prints_what_is_shown(minilm: Server) -> None:
    source, shown = documented_example(
        "import json\nimport urllib.request\n\nimport numpy as np\n\nsentences"
    )
    program = source.replace("localhost:8000", f"127.0.0.1:{minilm.port}")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == shown
