"""Sentences over HTTP: in every format, the answer is the model's output for that sentence alone."""

from __future__ import annotations

import asyncio
import io
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from inferpool import cli
from jsonschema import Draft202012Validator

from tests.clients import Client, with_clients
from tests.conftest import ROOT
from tests.onnx_models import write_model
from tests.server import Server
from tests.text_models import WORDS, Alone, make_tokenizer, write_encoder

TABLE = "[text]\nmax_tokens = 128\n"
SENTENCES = [" ".join(random.Random(n).choices(WORDS, k=1 + 7 * n % 50)) for n in range(48)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_encoder(folder, "masked", TABLE + "[batching]\nmax_rows = 16\n[instances]\ncount = 1\n")
    write_encoder(folder, "leaky", TABLE, mask=False)
    write_encoder(folder, "apart", TABLE + "[batching]\nenabled = false\n", ids=onnx.TensorProto.INT32)
    write_encoder(folder, "too-long", "[text]\n")
    # What Keras makes of an `Embedding` whose texts have one length: six tokens, in floating point.
    rows = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", 6])
        for name in ("input_ids", "seen")
    ]
    node = onnx.helper.make_node("Identity", ["input_ids"], ["seen"])
    six = write_model(folder, "six", onnx.helper.make_graph([node], "six", rows[:1], rows[1:])).parent.parent
    (six / "model.toml").write_text("[text]\n")
    make_tokenizer().save(str(six / "tokenizer.json"))
    broken = write_encoder(folder, "broken").parent.parent
    (broken / "tokenizer.json").write_text('{"model": {}}')
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, cache_dir: Path, server_module: str) -> Iterator[Server]:
    own = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
    started = Server(repository, (), own, server_module)
    started.wait_loaded()
    yield started
    started.kill()


@pytest.fixture(scope="module")
def alone(repository: Path) -> dict[str, Alone]:
    return {name: Alone(repository / name / "1/model.onnx") for name in ("masked", "leaky", "apart")}


def check_rows(outputs: dict[str, Any], sentences: list[str], model: Alone) -> None:
    for pooled, tokens, sentence in zip(outputs["pooled"], outputs["tokens"], sentences, strict=True):
        want = model(sentence)
        length = want["tokens"].shape[1]
        np.testing.assert_allclose(pooled, want["pooled"][0], atol=1e-5)
        np.testing.assert_allclose(np.array(tokens)[:length], want["tokens"][0], atol=1e-5)
        assert not np.array(tokens)[length:].any(), "a row's own tokens are followed by zeros only"


def test_a_model_of_one_length_gets_rows_that_are_filled_up(server: Server) -> None:
    answer = server.post("/predict/six", json={"inputs": ["w1", "w1 w2 w3 w4 w5 w6"]})
    assert answer.json()["outputs"]["seen"] == [[2, 5, 3, 0, 0, 0], [2, 5, 6, 7, 8, 3]], answer.text
    (version,) = server.get("/models/six").json()["versions"]
    assert "every row has the 6 tokens that the model takes" in version["batching"]["reason"]
    found = server.post("/explain/six?target=2", json={"inputs": ["w1 w2"]}).json()["explanations"][0]
    assert [each["word"] for each in found["contributions"]] == ["w1", "w2"]
    assert found["additivity"]["holds"]


@pytest.mark.parametrize("name", ["masked", "leaky", "apart"])
def test_a_request_of_mixed_lengths_answers_as_each_alone(
    server: Server, alone: dict[str, Alone], name: str
) -> None:
    for inputs in (SENTENCES, {"text": SENTENCES}, SENTENCES[:1]):
        answer = server.post(f"/predict/{name}", json={"inputs": inputs})
        assert answer.status_code == 200, answer.text
        sentences = inputs["text"] if isinstance(inputs, dict) else inputs
        check_rows(answer.json()["outputs"], sentences, alone[name])


@pytest.mark.parametrize("name", ["masked", "leaky", "apart"])
def test_requests_at_once_answer_as_each_alone(server: Server, alone: dict[str, Alone], name: str) -> None:
    counts = ("batch_rows_count", "batch_rows_sum", "tokens_total", "padded_tokens_total")
    before = {key: server.metric(key, model=name) for key in counts}

    async def work(client: Client, number: int) -> None:
        for turn in range(6):
            sentence = SENTENCES[(number * 5 + turn) % len(SENTENCES)]
            if turn % 2:
                inputs: Any = [sentence]
            else:
                inputs = {key: value.tolist() for key, value in alone[name].inputs(sentence).items()}
            reply = await client.post(f"/predict/{name}", json.dumps({"inputs": inputs}).encode())
            assert reply.status == 200, reply.body
            outputs = json.loads(reply.body)["outputs"]
            want = alone[name](sentence)
            for output, tensor in want.items():
                np.testing.assert_allclose(outputs[output], tensor, atol=1e-5)

    asyncio.run(with_clients(server.port, 24, work))
    ran, rows, tokens, padded = (server.metric(key, model=name) - before[key] for key in counts)
    assert rows == 24 * 6
    assert tokens - padded == sum(
        alone[name].inputs(SENTENCES[(number * 5 + turn) % len(SENTENCES)])["input_ids"].size
        for number in range(24)
        for turn in range(6)
    )
    if name == "masked":
        assert ran < 24 * 6, "rows of several requests share batches"
        assert padded > 0, "rows of different lengths share batches"
    else:
        assert padded == 0


def test_every_wire_format_carries_sentences(server: Server, alone: dict[str, Alone]) -> None:
    sentence = "W1 w2 nowhere é w3"
    want = alone["masked"](sentence)["pooled"]

    def check(answer: httpx.Response) -> None:
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["outputs"]["pooled"], want, atol=1e-5)

    path, body = "/predict/masked", sentence.encode()
    check(server.post(path, content=body, headers={"content-type": "text/plain"}))
    check(server.post(path, content=body, headers={"content-type": "text/plain; charset=UTF-8"}))
    check(server.post(path, files={"text": (None, body)}))
    check(server.post("/predict", json={"model": "masked", "inputs": [sentence]}))
    for array in (np.array([sentence]), np.array([body])):
        file = io.BytesIO()
        np.save(file, array)
        check(server.post(path, content=file.getvalue(), headers={"content-type": "application/x-npy"}))
        file = io.BytesIO()
        np.savez(file, text=array)
        check(server.post(path, content=file.getvalue(), headers={"content-type": "application/x-npz"}))
    v2 = "/v2/models/masked/infer"
    entry = {"name": "text", "datatype": "BYTES", "shape": [1]}
    answers = [server.post(v2, json={"inputs": [{**entry, "data": [sentence]}]})]
    packed = struct.pack("<I", len(body)) + body
    header = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": len(packed)}}]}).encode()
    length = {"inference-header-content-length": str(len(header))}
    answers.append(server.post(v2, content=header + packed, headers=length))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        pooled = next(item for item in answer.json()["outputs"] if item["name"] == "pooled")
        np.testing.assert_allclose(pooled["data"], want[0], atol=1e-5)
    raw = server.post(v2, content=body, headers={"inference-header-content-length": "0"})
    assert raw.status_code == 200, raw.text


@pytest.mark.parametrize(
    ("inputs", "status", "words"),
    [
        ([], 422, "at least one sentence"),
        ([1], 422, "takes a sentence (string)"),
        ([["w1"]], 422, "shape [1, 1]"),
        ([1, 2, 3] * 1000, 422, "at [0] is 1; it takes a sentence (string)"),
        ("w1 w2", 422, 'send a list of sentences: ["w1 w2"]'),
        ({"text": "w1"}, 422, 'send a list of sentences: ["w1"]'),
        (["w1"] * 10_001, 422, "10000"),
        ({"text": ["w1"], "input_ids": [[2]]}, 422, 'leave out "input_ids"'),
        ({"input_ids": [[2]]}, 422, "attention_mask"),
        (["w" * 1_000_001], 413, "1000000"),
    ],
)
def test_a_value_that_is_not_a_sentence_is_refused_by_name(
    server: Server, inputs: Any, status: int, words: str
) -> None:
    answer = server.post("/predict/masked", json={"inputs": inputs})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
    assert answer.json()["tensor"] in ("text", "attention_mask")


def test_the_limits_of_a_text_are_stated(server: Server) -> None:
    """The error has the documented members."""
    answer = server.post("/predict/masked", json={"inputs": ["w" * 1_000_001]})
    assert (answer.status_code, answer.json()["limit"]) == (413, 1_000_000)
    answer = server.post("/predict/masked", json={"inputs": ["w1"] * 10_001})
    assert (answer.status_code, answer.json()["expected"]) == (422, 10_000)


def test_a_sentence_without_a_media_type_is_recognised(server: Server) -> None:
    for body in (b"This method is", b"Infinite loops", b'{"inputs": }'):
        answer = server.post("/predict/masked", content=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body")
        assert ("Content-Type: text/plain" in answer.json()["detail"]) == body.startswith((b"T", b"Infinite"))


def test_sentences_may_have_a_second_dimension_in_v2(server: Server) -> None:
    sentences = ["w1", "w2 w3", "w4"]
    entry = {"name": "text", "datatype": "BYTES"}
    packed = b"".join(struct.pack("<I", len(text)) + text.encode() for text in sentences)
    answers = []
    for shape in ([3], [3, 1]):
        for data in (sentences, [[text] for text in sentences]) if len(shape) > 1 else (sentences,):
            body = {"inputs": [{**entry, "shape": shape, "data": data}]}
            answers.append(server.post("/v2/models/masked/infer", json=body))
        header = {"inputs": [{**entry, "shape": shape, "parameters": {"binary_data_size": len(packed)}}]}
        text = json.dumps(header).encode()
        length = {"inference-header-content-length": str(len(text))}
        answers.append(server.post("/v2/models/masked/infer", content=text + packed, headers=length))
    assert len(answers) == 5
    for answer in answers:
        assert answer.status_code == 200, answer.text
        pooled = [item for item in answer.json()["outputs"] if item["name"] == "pooled"]
        first = [item for item in answers[0].json()["outputs"] if item["name"] == "pooled"]
        np.testing.assert_allclose(pooled[0]["data"], first[0]["data"], atol=1e-5)
    for shape in ([1, 3], [3, 1, 1]):
        body = {"inputs": [{**entry, "shape": shape, "data": sentences}]}
        assert server.post("/v2/models/masked/infer", json=body).status_code == 422


def test_a_wrong_field_of_a_form_is_named(server: Server) -> None:
    answer = server.post("/predict/masked", files={"input_ids": (None, b"abc")})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith('field "input_ids" of the form: ')
    assert answer.json()["field"] == "input_ids"


def test_invalid_utf8_and_lone_surrogates_are_refused(server: Server) -> None:
    answer = server.post("/predict/masked", content=b"w1 \xff", headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["tensor"]) == (400, "text")
    latin = {"content-type": "text/plain; charset=latin-1"}
    assert server.post("/predict/masked", content=b"w1", headers=latin).status_code == 415
    assert server.post("/predict/masked", content=b'{"inputs": ["\\ud800"]}').status_code == 400


def test_dimensions_with_the_same_name_must_be_equal(server: Server) -> None:
    inputs = {"input_ids": [[2, 5, 3]], "attention_mask": [[1, 1]]}
    answer = server.post("/predict/masked", json={"inputs": inputs})
    assert answer.status_code == 422
    for name in ("input_ids", "attention_mask", "tokens"):
        assert f'"{name}"' in answer.json()["detail"]


def test_all_descriptions_of_a_text_model_agree(
    server: Server, repository: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = server.get("/models/masked/1").json()
    assert [(item["name"], item["datatype"], item["shape"]) for item in version["inputs"]] == [
        ("text", "BYTES", [-1]), ("input_ids", "INT64", [-1, -1]), ("attention_mask", "INT64", [-1, -1]),
    ]  # fmt: skip
    assert all(item["optional"] for item in version["inputs"])
    assert "text/plain" in version["media_types"]
    assert "so do rows of different lengths" in version["batching"]["reason"]
    leaky = server.get("/models/leaky/1").json()["batching"]
    assert leaky["enabled"]
    assert "rows of different lengths never share a batch" in leaky["reason"]
    metadata = server.get("/v2/models/masked").json()
    assert metadata["inputs"][0] == {"name": "text", "datatype": "BYTES", "shape": [-1]}
    content = server.get("/openapi.json").json()["paths"]["/predict/masked"]["post"]["requestBody"]["content"]
    assert "text/plain" in content
    example = content["application/json"]["examples"]["masked"]["value"]
    assert server.post("/predict/masked", json=example).status_code == 200
    assert cli.main(["check", str(repository), "--cache-dir", str(cache_dir)]) == 1
    assert "text: BYTES [-1] in place of every other input" in capsys.readouterr().out


IDS_AND_MASK = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}
TEXT = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["It is"]}
TOKENS = [
    {"name": name, "datatype": "INT64", "shape": [1, 2], "data": rows[0]}
    for name, rows in IDS_AND_MASK.items()
]


@pytest.mark.parametrize(
    ("path", "inputs", "is_right"),
    [
        ("/predict/masked", ["It is"], True),
        ("/predict/masked", [""], True),
        ("/predict/masked", [], False),
        ("/predict/masked", {"text": ["It is"]}, True),
        ("/predict/masked", {"text": []}, False),
        ("/predict/masked", IDS_AND_MASK, True),
        ("/predict/masked", {"input_ids": [[1, 2]]}, False),
        ("/predict/masked", {**IDS_AND_MASK, "text": ["It is"]}, False),
        ("/predict/masked", {}, False),
        ("/v2/models/masked/infer", [TEXT], True),
        ("/v2/models/masked/infer", [{**TEXT, "shape": [0], "data": []}], False),
        ("/v2/models/masked/infer", TOKENS, True),
        ("/v2/models/masked/infer", TOKENS[::-1], True),
        ("/v2/models/masked/infer", TOKENS[:1], False),
        ("/v2/models/masked/infer", [*TOKENS, TEXT], False),
        ("/v2/models/masked/infer", [], False),
    ],
)
def test_the_document_allows_every_accepted_body(
    server: Server, path: str, inputs: Any, is_right: bool
) -> None:
    """The document and the server agree on sentences, at least one, and on the inputs that they replace."""
    body = {"inputs": inputs}
    document = server.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert Draft202012Validator(schema).is_valid(body) is is_right
    answer = server.post(path, json=body)
    assert answer.status_code == (200 if is_right else 422), answer.text


def test_a_wrong_tokenizer_fails_its_model_alone(server: Server) -> None:
    problems = server.get("/health").json()["problems"]
    assert "broken/model.toml: text.tokenizer: tokenizer.json is not a tokenizer" in problems["broken/1"]
    assert "a row of 512 tokens cannot be run" in problems["too-long/1"]
    assert "text.max_tokens" in problems["too-long/1"]
    assert problems.keys() == {"broken/1", "too-long/1"}


def test_deadlines_and_lost_clients_end_whole_requests(server: Server) -> None:
    """A split request is answered once and leaves nothing behind, whatever its outcome."""

    async def scenario() -> None:
        body = json.dumps({"inputs": SENTENCES * 8}).encode()
        clients = [await Client.connect(server.port) for _ in range(12)]
        for number, client in enumerate(clients):
            client.send("/predict/masked", body, {"x-timeout-ms": str(1 + number % 4)})
        for client in clients[:6]:
            await client.close()
        for client in clients[6:]:
            assert (await client.receive()).status in (200, 504)
            assert (await client.post("/predict/masked", b'{"inputs": ["w1"]}')).status == 200
            await client.close()

    asyncio.run(scenario())
    assert server.get("/models/masked/1").json()["queue_rows"] == 0
    assert server.metric("in_flight_requests") == 0


def test_without_tokenizers_the_model_says_what_to_install(
    repository: Path, cache_dir: Path, tmp_path: Path, server_module: str
) -> None:
    (tmp_path / "tokenizers.py").write_text("raise ImportError\n")
    own = {"INFERPOOL_CACHE_DIR": str(cache_dir), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    server = Server(repository / "masked", (), own, server_module)
    try:
        server.wait_loaded()
        assert "pip install 'inferpool[text]'" in server.get("/health").json()["problems"]["masked/1"]
    finally:
        server.kill()
