"""Embeddings, rerank and scores over HTTP, with the clients of OpenAI and Cohere as they are."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import onnxruntime
import pytest
from inferpool import AsyncClient, Client
from inferpool.errors import ModelNotFound
from inferpool.http.problems import STATUSES
from inferpool.tensors import Array

from tests.conftest import Serve, in_both_engines
from tests.server import Server
from tests.text_models import Alone, make_tokenizer, write_encoder

if TYPE_CHECKING:  # the tests import it themselves: it takes a second of each process that collects them
    import openai

pytestmark = in_both_engines

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w1 w2 w3 w3"]
ALONE = "[batching]\nenabled = false\n"
"""Each text runs by itself; such a model loads sooner, too."""
MODELS = {
    "whole": "[text]\nmax_tokens = 128\n[text.embeddings]\noutput = 'pooled'\ndimensions = [4, 8]\n",
    "raw": "[text]\nmax_tokens = 128\n[text.embeddings]\noutput = 'pooled'\nnormalize = false\n"
    "[cache]\nenabled = true\n",
    "mean": "[text]\nmax_tokens = 12\n[text.embeddings]\npooling = 'mean'\n"
    "query_prefix = 'w7 '\ndocument_prefix = 'w8 '\n",
    "cls": "[text]\nmax_tokens = 128\n[text.embeddings]\npooling = 'cls'\n" + ALONE,
    "last": "[text]\nmax_tokens = 128\n[text.embeddings]\npooling = 'last'\n" + ALONE,
    "unclear": "[text]\nmax_tokens = 128\n" + ALONE,
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, config in MODELS.items():
        write_encoder(folder, name, config)
    write_encoder(folder, "cross", "[text]\npairs = true\nmax_tokens = 16\n", types=2, scored=True)
    return folder


@pytest.fixture(scope="module")
def server(module_serve: Serve, repository: Path) -> Server:
    return module_serve(repository, "--measure-ms", "0")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(repository: Path) -> Alone:
    return Alone(repository / "whole" / "1" / "model.onnx")


def unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(got), expected, atol=1e-5, rtol=0)


class CrossEncoder:
    """The score of a pair of texts, by ONNX Runtime and the tokenizer by hand."""

    def __init__(self, repository: Path) -> None:
        self._session = onnxruntime.InferenceSession(repository / "cross" / "1" / "model.onnx")
        self._tokenizer = make_tokenizer()
        self._tokenizer.enable_truncation(16)

    def __call__(self, first: str, second: str) -> float:
        encoding = self._tokenizer.encode(first, second)
        values = (encoding.ids, encoding.attention_mask, encoding.type_ids)
        names = [item.name for item in self._session.get_inputs()]
        tensors = {name: np.array([value]) for name, value in zip(names, values, strict=True)}
        [logits] = self._session.run(["score"], tensors)
        return float(1 / (1 + np.exp(-np.float64(logits[0, 0]))))


@pytest.fixture(scope="module")
def cross(repository: Path) -> CrossEncoder:
    return CrossEncoder(repository)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_the_client_of_openai_gets_the_vectors(client: openai.OpenAI, alone: Alone, form: Any) -> None:
    answer = client.embeddings.create(model="whole", input=TEXTS, encoding_format=form)
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    for item, text in zip(answer.data, TEXTS, strict=True):
        # The client decodes base64 by itself only if it has asked for base64 by itself.
        vector: Any = item.embedding
        if form == "base64":
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        assert_close(vector, unit(alone(text)["pooled"][0]))
    assert answer.model == "whole"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(t.split()) + 2 for t in TEXTS)


def test_the_clients_of_inferpool_get_the_vectors(server: Server, alone: Alone) -> None:
    expected = np.stack([unit(alone(text)["pooled"][0]) for text in TEXTS])

    async def from_asyncio() -> Array:
        async with AsyncClient(server.url) as client:
            return await client.embed("whole", TEXTS, version="1")

    with Client(server.url) as client:
        assert_close(client.embed("whole", TEXTS), expected)
        query, document = (client.embed("mean", ["w1"], input_type=kind) for kind in ("query", "document"))
        assert not np.allclose(query, document)
        with pytest.raises(ModelNotFound):
            client.embed("nobody", TEXTS)
    assert_close(asyncio.run(from_asyncio()), expected)


def test_a_text_alone_and_token_ids_give_the_same(client: openai.OpenAI, alone: Alone) -> None:
    expected = unit(alone(TEXTS[2])["pooled"][0])
    ids = alone.inputs(TEXTS[2])["input_ids"][0].tolist()
    sent: Any
    for sent in (TEXTS[2], [TEXTS[2]], ids, [ids]):
        answer = client.embeddings.create(model="whole", input=sent)
        assert_close(answer.data[0].embedding, expected)
    mixed = client.embeddings.create(model="whole", input=[ids, ids[:3]])
    assert_close(mixed.data[0].embedding, expected)


def test_dimensions_cut_and_scale_where_the_model_says_so(client: openai.OpenAI, alone: Alone) -> None:
    import openai

    whole = alone(TEXTS[0])["pooled"][0]
    for size in (4, 8, 16):
        answer = client.embeddings.create(model="whole", input=TEXTS[0], dimensions=size)
        assert_close(answer.data[0].embedding, unit(whole[:size]))
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.embeddings.create(model="whole", input=TEXTS[0], dimensions=5)
    assert refused.value.param == "dimensions"
    assert "4 or 8 or 16" in str(refused.value)


def test_hidden_states_are_pooled(client: openai.OpenAI, alone: Alone) -> None:
    raw = client.embeddings.create(model="raw", input=TEXTS).data
    for name, position in (("mean", None), ("cls", 0), ("last", -1)):
        answer = client.embeddings.create(model=name, input=TEXTS)
        for index, text in enumerate(TEXTS):
            outputs = alone(text)
            expected = outputs["pooled"][0] if position is None else outputs["tokens"][0, position]
            assert_close(answer.data[index].embedding, unit(expected))
            assert_close(raw[index].embedding, outputs["pooled"][0])


def test_cached_answers_have_the_order_of_the_request(server: Server, alone: Alone) -> None:
    for texts in (TEXTS, TEXTS, TEXTS, TEXTS[::-1], [TEXTS[1], TEXTS[0]], TEXTS[:2]):
        for path in ("/v1/embeddings", "/predict/raw"):
            body = {"model": "raw", "input": texts} if path == "/v1/embeddings" else {"inputs": texts}
            answer = server.post(path, json=body).json()
            rows = answer["outputs"]["pooled"] if "outputs" in answer else answer["data"]
            vectors = [row["embedding"] if isinstance(row, dict) else row for row in rows]
            assert_close(vectors, [alone(text)["pooled"][0] for text in texts])


def test_prefixes_are_put_before_queries_and_documents(client: openai.OpenAI, alone: Alone) -> None:
    for kind, prefix in (
        ("query", "w7 "),
        ("search_document", "w8 "),
        ("retrieval.passage", "w8 "),
        (None, ""),
    ):
        extra = None if kind is None else {"input_type": kind}
        answer = client.embeddings.create(model="mean", input="w1 w2", extra_body=extra)
        assert_close(answer.data[0].embedding, unit(alone(prefix + "w1 w2")["pooled"][0]))


def test_truncation_is_reported_and_can_be_refused(server: Server, client: openai.OpenAI) -> None:
    texts = ["w1", "w2 " * 40, "w3 " * 10]
    body = {"model": "mean", "input": texts}
    answer = server.post("/v1/embeddings", json=body).json()
    assert answer["truncated"] == [1]
    assert answer["warnings"] == ["input 1: truncated to 12 tokens"]
    assert answer["usage"]["prompt_tokens"] == 3 + 12 + 12
    for refuse in ({"truncate": "NONE"}, {"truncate": False}, {"truncation": False}):
        refused = server.post("/v1/embeddings", json={**body, **refuse})
        assert refused.status_code == 422
        assert "at [1] has more than 12 tokens" in refused.json()["error"]["message"]
    short = server.post("/v1/embeddings", json={"model": "mean", "input": texts[2], "truncate": "NONE"})
    assert short.status_code == 200
    assert short.json().keys() == {"object", "data", "model", "usage"}


def test_errors_are_those_of_openai(server: Server, client: openai.OpenAI) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="nobody", input="w1")
    assert missing.value.code == "model_not_found"
    for body, said in (
        ({"model": "whole"}, '"input" is null'),
        ({"model": "whole", "input": []}, "is empty"),
        ({"model": "whole", "input": [1, "w1"]}, "token ids"),
        ({"model": "whole", "input": ["w1", 1]}, '"input[1]" is 1'),
        ({"model": "whole", "input": [[10**18]]}, "token ids of this model are 0 to"),
        ({"model": "whole", "input": [[-1]]}, "token ids of this model are 0 to"),
        ({"model": "whole", "input": [[]]}, "has 0 tokens"),
        ({"model": "whole", "input": "w1", "encoding_format": "hex"}, '"float", "base64"'),
        ({"model": "whole", "input": "w1", "input_type": "song"}, "search_query"),
        ({"model": "whole", "input": "w1", "dimensions": 0}, "from 1"),
        ({"model": "whole", "input": "w1", "truncate": "START"}, '"END"'),
        ({"model": "whole", "inputs": "w1"}, "unknown field"),
        ({"model": "unclear", "input": "w1"}, "text.embeddings.output"),
        ({"model": "cross", "input": "w1"}, "pairs"),
        ({"input": "w1"}, "model"),
    ):
        answer = server.post("/v1/embeddings", json=body)
        error = answer.json()["error"]
        assert answer.headers["content-type"] == "application/json"
        assert answer.status_code == STATUSES[error["code"]] == 422
        assert error["type"] == "invalid_request_error"
        assert said in error["message"], error
    assert server.get("/v1/embeddings").json()["error"]["code"] == "method_not_allowed"
    assert server.post("/v1/embeddings", content=b"[]").json()["error"]["code"] == "malformed_body"


def test_a_pair_model_reranks_for_the_clients_of_cohere(server: Server, cross: CrossEncoder) -> None:
    import cohere

    query = "w1 w2"
    expected = [cross(query, text) for text in TEXTS]
    order = sorted(range(4), key=lambda index: -expected[index])
    with httpx.Client() as http:
        own: Any = {"api_key": "none", "base_url": server.url, "httpx_client": http}
        first = cohere.Client(**own).rerank(
            model="cross", query=query, documents=[*TEXTS[:3], {"text": TEXTS[3]}], return_documents=True
        )
        second = cohere.ClientV2(**own).rerank(model="cross", query=query, documents=TEXTS, top_n=2)
    assert [each.index for each in first.results] == order
    assert_close([each.relevance_score for each in first.results], [expected[index] for index in order])
    assert [each.document.text for each in first.results if each.document] == [TEXTS[i] for i in order]
    assert [each.index for each in second.results] == order[:2]
    assert second.id


def test_rerank_has_the_fields_of_jina(server: Server, cross: CrossEncoder) -> None:
    body = {"model": "cross", "query": "w9 " * 9, "documents": ["w1", "w2 " * 9], "return_documents": False}
    answer = server.post("/v1/rerank", json=body).json()
    assert answer["model"] == "cross"
    scores = {each["index"]: each["relevance_score"] for each in answer["results"]}
    assert_close([scores[0], scores[1]], [cross("w9 " * 9, "w1"), cross("w9 " * 9, "w2 " * 9)])
    assert "document" not in answer["results"][0]
    assert answer["usage"]["total_tokens"] == 13 + 16
    assert answer["truncated"] == [1]
    assert answer["meta"]["warnings"] == ["documents 1: truncated to 16 tokens"]
    for bad, said in (
        ({"documents": []}, "is empty"),
        ({"documents": "w1"}, "a list of texts"),
        ({"documents": [{"title": "w1"}]}, '"text"'),
        ({"query": None}, '"query" is null'),
        ({"top_n": 0}, "from 1"),
        ({"model": "unclear"}, "gives no vectors"),
        ({"truncate": False}, "has more than 16 tokens"),
    ):
        refused = server.post("/v1/rerank", json={**body, **bad})
        assert refused.status_code == 422
        assert said in refused.json()["error"]["message"]


def test_scores_of_pairs(server: Server, cross: CrossEncoder, alone: Alone) -> None:
    def scores(**body: Any) -> list[float]:
        answer = server.post("/v1/score", json=body)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        assert [each["index"] for each in data] == [*range(len(data))]
        return [each["score"] for each in data]

    one_to_many = [cross("w1 w2", text) for text in TEXTS]
    assert_close(scores(model="cross", text_1="w1 w2", text_2=TEXTS), one_to_many)
    assert_close(scores(model="cross", queries=["w1 w2"] * 4, documents=TEXTS), one_to_many)
    assert_close(scores(model="cross", text_1="w1 w2", text_2="w4"), one_to_many[1:2])
    # A model of vectors scores by their cosine.
    query = unit(alone("w7 w1 w2")["pooled"][0])
    cosines = [query @ unit(alone("w8 " + text)["pooled"][0]) for text in TEXTS]
    assert_close(scores(model="mean", text_1="w1 w2", text_2=TEXTS), cosines)
    ranked = server.post("/v1/rerank", json={"model": "mean", "query": "w1 w2", "documents": TEXTS}).json()
    assert_close([each["relevance_score"] for each in ranked["results"]], sorted(cosines, reverse=True))
    long = {"model": "mean", "query": "w3 " * 40, "documents": ["w1", "w2 " * 40]}
    warned = server.post("/v1/rerank", json=long).json()
    assert warned["truncated"] == [1]
    assert warned["warnings"] == [
        "query 0: truncated to 12 tokens",
        "documents 1: truncated to 12 tokens",
    ]
    refused = server.post("/v1/rerank", json={**long, "truncate": False}).json()["error"]
    assert refused["param"] == "query"
    for wrong in (
        {"text_1": ["a", "b"], "text_2": TEXTS},
        {"text_1": "a", "documents": ["b"]},
        {"text_1": "a", "text_2": []},
        {"queries": "a"},
    ):
        assert server.post("/v1/score", json={"model": "cross", **wrong}).status_code == 422


def test_pairs_are_inputs_of_every_api(server: Server, cross: CrossEncoder) -> None:
    pairs = [["w1 w2", text] for text in TEXTS]
    logits = [np.log(p / (1 - p)) for p in (cross(*pair) for pair in pairs)]
    native = server.post("/predict/cross", json={"inputs": pairs}).json()["outputs"]["score"]
    assert_close(np.array(native)[:, 0], logits)
    rows = server.post("/v1/models/cross:predict", json={"instances": pairs}).json()["predictions"]
    assert rows == native
    tensor = {"name": "text", "datatype": "BYTES", "shape": [4, 2], "data": pairs}
    v2 = server.post("/v2/models/cross/infer", json={"inputs": [tensor]}).json()["outputs"][0]
    assert_close(v2["data"], logits)
    for body, kind in ((b"w1", "text/plain"), (b'{"inputs": ["w1"]}', "application/json")):
        refused = server.post("/predict/cross", content=body, headers={"content-type": kind})
        assert refused.status_code in (415, 422)


def test_models_are_listed_for_openai(client: openai.OpenAI, server: Server) -> None:
    assert sorted(model.id for model in client.models.list()) == sorted([*MODELS, "cross"])
    assert client.models.retrieve("mean").owned_by == "inferpool"
    listed = server.get("/openai/v1/models").json()
    assert listed == server.get("/v1/models").json()
    assert sorted(listed["models"]) == sorted([*MODELS, "cross"])


def test_large_answers_are_those_of_each_text(client: openai.OpenAI) -> None:
    texts = [f"w{number % 200} w{number % 7}" * (1 + number % 5) for number in range(1500)]
    answer = client.embeddings.create(model="cls", input=texts)
    some = client.embeddings.create(model="cls", input=[texts[700], texts[1499]])
    assert [item.index for item in answer.data] == [*range(1500)]
    assert_close(answer.data[700].embedding, some.data[0].embedding)
    assert_close(answer.data[1499].embedding, some.data[1].embedding)
