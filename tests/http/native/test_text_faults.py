"""Faulty texts, token ids and tokenizers cost other requests and models nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.server import Server
from tests.text_models import WORDS, write_encoder

TABLE = "[text]\nmax_tokens = 128\n"
HIGHEST = 3 + len(WORDS)
"""The largest id in the vocabulary."""
IN_FLIGHT_BYTES = 20_000_000
ANSWERS_BYTES = 15_000_000
"""Bytes of them that answers may take, as tensors and as JSON."""
MIXED = [" ".join(WORDS[:126]), *["w1"] * 999]
"""A joined response has rows of equal length: 1000 rows of 128 tokens with 16 numbers take 8 MB."""


def change_tokenizer(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = model.parent.parent / "tokenizer.json"
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))


def forget_names(file: Path) -> None:
    """Remove from the model's file the names of its dimensions."""
    model = onnx.load(file)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.Clear()
    onnx.save(model, file)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_encoder(folder, "masked", TABLE)
    write_encoder(folder, "typed", TABLE, types=2)
    forget_names(write_encoder(folder, "unnamed", TABLE, mask=False))
    change_tokenizer(
        write_encoder(folder, "backtracks", TABLE),
        lambda table: table.update(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False
            }
        ),
    )  # fmt: skip
    change_tokenizer(
        write_encoder(folder, "a-charsmap", TABLE),
        lambda table: table.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    )
    change_tokenizer(
        write_encoder(folder, "a-length", TABLE),
        lambda table: table.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    )
    change_tokenizer(
        write_encoder(folder, "a-template", TABLE),
        lambda table: table["post_processor"]["single"].append(
            {"SpecialToken": {"id": "[NO]", "type_id": 0}}
        ),
    )
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, cache_dir: Path, server_module: str) -> Iterator[Server]:
    own = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "100"}
    started = Server(repository, ("--in-flight-bytes", str(IN_FLIGHT_BYTES)), own, server_module)
    started.wait_loaded()
    yield started
    started.kill()


def test_a_tokenizer_that_panics_fails_its_model_alone(server: Server) -> None:
    problems = server.get("/health").json()["problems"]
    assert problems.keys() == {"a-charsmap/1", "a-length/1", "a-template/1"}
    for name, reason in problems.items():
        assert f"{name[:-2]}/model.toml: text.tokenizer: tokenizer.json is not a tokenizer: " in reason
    assert "chunk size must be non-zero" in problems["a-length/1"]


@pytest.mark.parametrize("longer", [0, 3000])
def test_a_tokenizer_that_panics_on_a_text_fails_that_request_alone(server: Server, longer: int) -> None:
    """Small bodies are read in the event loop, large ones in another thread."""
    for _ in range(3):
        answer = server.post("/predict/backtracks", json={"inputs": ["x" * 40, "w1 " * longer]})
        assert answer.status_code == 422, answer.text
        assert answer.json()["tensor"] == "text"
    assert server.post("/predict/backtracks", json={"inputs": ["w1"]}).status_code == 200


def test_a_response_that_would_be_too_large_is_refused_before_the_run(server: Server) -> None:
    ran = server.metric("batches_total", model="masked")
    ids = {"input_ids": [[5] * 128] * 1000, "attention_mask": [[1] * 128] * 1000}
    for inputs in (MIXED, MIXED[:1] * 600, ids):
        answer = server.post("/predict/masked", json={"inputs": inputs})
        assert answer.status_code == 422, answer.text
        assert answer.json()["expected"] == ANSWERS_BYTES < answer.json()["got"]
        assert "128 tokens" in answer.json()["detail"]
    assert server.metric("batches_total", model="masked") == ran
    for body in ({"inputs": MIXED, "outputs": ["pooled"]}, {"inputs": MIXED[:400]}):
        assert server.post("/predict/masked", json=body).status_code == 200


def test_a_response_of_unknown_size_is_bounded_when_it_is_joined(server: Server) -> None:
    answer = server.post("/predict/unnamed", json={"inputs": MIXED})
    assert answer.status_code == 422, answer.text
    assert answer.json()["expected"] == ANSWERS_BYTES < answer.json()["got"]
    for body in ({"inputs": MIXED, "outputs": ["pooled"]}, {"inputs": MIXED[:400]}):
        assert server.post("/predict/unnamed", json=body).status_code == 200
    model = server.get("/models/unnamed/1").json()
    assert {instance["state"] for instance in model["instances"]} == {"ready"}


@pytest.mark.parametrize(
    ("ids", "mask", "tensor", "words"),
    [
        ([[999_999]], [[1]], "input_ids", f"at [0, 0] is 999999; it takes 0 to {HIGHEST}"),
        ([[HIGHEST + 1]], [[1]], "input_ids", f"at [0, 0] is {HIGHEST + 1}; it takes 0 to {HIGHEST}"),
        ([[5, 5], [5, -1]], [[1, 1]] * 2, "input_ids", f"at [1, 1] is -1; it takes 0 to {HIGHEST}"),
        ([[]], [[]], "input_ids", "has 0 tokens a row"),
        ([[5] * 100_000], [[1] * 100_000], "input_ids", "100000 tokens a row; the model takes 1 to 128"),
    ],
    ids=["far", "next", "negative", "none", "many"],
)
def test_ids_outside_the_vocabulary_are_refused_by_name(
    server: Server, ids: Any, mask: Any, tensor: str, words: str
) -> None:
    answer = server.post("/predict/masked", json={"inputs": {"input_ids": ids, "attention_mask": mask}})
    assert answer.status_code == 422, answer.text
    assert answer.json()["tensor"] == tensor
    assert words in answer.json()["detail"]
    highest = {"input_ids": [[HIGHEST]], "attention_mask": [[1]]}
    assert server.post("/predict/masked", json={"inputs": highest}).status_code == 200


@pytest.mark.parametrize(("types", "index"), [([[0, 2]], [0, 1]), ([[1, 0], [-1, 0]], [1, 0])])
def test_types_that_the_tokenizer_does_not_give_are_refused_before_the_queue(
    server: Server, types: Any, index: list[int]
) -> None:
    ones = [[1] * 2] * len(types)
    ran = server.metric("batches_total", model="typed")
    inputs = {"input_ids": ones, "attention_mask": ones, "token_type_ids": types}
    answer = server.post("/predict/typed", json={"inputs": inputs})
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    wrong = str(types[index[0]][index[1]])
    assert (problem["tensor"], problem["index"], problem["value"]) == ("token_type_ids", index, wrong)
    assert problem["expected"] == "0 to 1"
    assert server.metric("batches_total", model="typed") == ran
    inputs["token_type_ids"] = [[0, 1]] * len(types)
    assert server.post("/predict/typed", json={"inputs": inputs}).status_code == 200
