"""Sentences become the same tensors that the tokenizer gives by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool import cli
from inferpool.codecs.text import MOST_CHARACTERS, MOST_SENTENCES, TextCodec
from inferpool.codecs.text_config import TextConfig
from inferpool.codecs.text_tokenizer import read_tokenizer_file
from inferpool.errors import BodyTooLarge, ConfigError, InvalidInput, MalformedBody
from inferpool.tensors import Signature, TensorSpec
from tokenizers.processors import TemplateProcessing

from tests.text_models import WORDS, Alone, make_tokenizer, write_encoder

NAMES = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokenizer.json"
    make_tokenizer().save(str(file))
    return file


def signature(*names: str, datatype: str = "INT64", shape: tuple[int, ...] = (-1, -1)) -> Signature:
    specs = tuple(TensorSpec(name, datatype, shape) for name in names or NAMES)
    return Signature(specs, (TensorSpec("y", "FP32", (-1, 3)),))


def codec(file: Path, sig: Signature | None = None, **config: Any) -> TextCodec:
    table = TextConfig(**config)
    return TextCodec(table, sig or signature(), read_tokenizer_file(table, file))


def array(*sentences: str) -> Any:
    return np.array(sentences, dtype=object)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(st.lists(st.lists(st.sampled_from([*WORDS, "unknown", "é"]), max_size=30), min_size=1, max_size=12))
def test_rows_match_the_tokenizer(tokenizer_file: Path, sentences: list[list[str]]) -> None:
    made = codec(tokenizer_file, max_tokens=20)
    by_hand = make_tokenizer()
    by_hand.enable_truncation(20)
    texts = array(*map(" ".join, sentences))
    seen: list[int] = []
    for rows in made.encode(texts, apart=False):
        for row, index in enumerate(rows.indices):
            encoding = by_hand.encode(texts[index])
            assert rows.tensors["input_ids"][row].tolist() == encoding.ids
            assert rows.tensors["attention_mask"][row].tolist() == encoding.attention_mask
            assert rows.tensors["token_type_ids"][row].tolist() == encoding.type_ids
        seen += rows.indices
    assert sorted(seen) == list(range(len(sentences)))
    apart = made.encode(texts, apart=True)
    assert [rows.indices for rows in apart] == [[index] for index in range(len(sentences))]


@pytest.mark.parametrize("datatype", ["INT32", "INT64", "FP32"])
def test_tensors_have_the_models_datatypes(tokenizer_file: Path, datatype: str) -> None:
    (rows,) = codec(tokenizer_file, signature(datatype=datatype)).encode(array("w1"), apart=False)
    assert {str(tensor.dtype) for tensor in rows.tensors.values()} == {
        {"FP32": "float32"}.get(datatype, datatype.lower())
    }


def test_inputs_that_the_model_lacks_are_left_out(tokenizer_file: Path) -> None:
    (rows,) = codec(tokenizer_file, signature("tokens"), ids="tokens").encode(array("w1"), apart=False)
    assert rows.tensors.keys() == {"tokens"}


def test_truncation_is_taken_from_the_file_unless_it_is_set(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(9, direction="left")
    tokenizer.enable_padding(pad_id=1, length=50)
    tokenizer.save(str(tmp_path / "own.json"))
    long = array(" ".join(WORDS[:100]))
    own = codec(tmp_path / "own.json")
    assert (own.max_tokens, own.fills["input_ids"]) == (9, 1)
    ids = own.encode(long, apart=False)[0].tensors["input_ids"]
    assert ids.shape == (1, 9)
    assert ids[0, 1] == own.encode(array(WORDS[93]), apart=False)[0].tensors["input_ids"][0, 1]
    (cut,) = codec(tmp_path / "own.json", max_tokens=5).encode(long, apart=False)
    assert cut.tensors["input_ids"].shape == (1, 5)
    assert codec(tokenizer_file).max_tokens == 512


@pytest.mark.parametrize("direction", ["right", "left"])
def test_rows_of_a_model_of_one_length_are_those_of_a_tokenizer_that_pads(
    tmp_path: Path, direction: str
) -> None:
    by_hand = make_tokenizer()
    by_hand.enable_truncation(9)
    by_hand.enable_padding(direction=direction, pad_id=0, pad_type_id=1)
    by_hand.save(str(tmp_path / "tokenizer.json"))
    by_hand.enable_truncation(6)
    by_hand.enable_padding(direction=direction, pad_id=0, pad_type_id=1, length=6)
    made = codec(tmp_path / "tokenizer.json", signature(shape=(-1, 6)))
    texts = ["w1", "w1 w2 w3 w4 w5 w6 w7", "w1 w2"]
    expected = by_hand.encode_batch(texts)
    (rows,) = made.encode(array(*texts), apart=False)
    assert (rows.indices, made.max_tokens, made.unit) == ([0, 1, 2], 6, 6)
    parts = ("ids", "attention_mask", "type_ids")
    for name, part in zip(NAMES, parts, strict=True):
        assert rows.tensors[name].tolist() == [getattr(each, part) for each in expected]
    found = made.encode_texts(texts, "texts", apart=True)
    assert (found.lengths, found.truncated, len(found.groups)) == ([3, 6, 4], [1], 3)
    words = made.words(texts[2])
    assert words.tensors["input_ids"][0].tolist() == expected[2].ids
    shift = 2 if direction == "left" else 0
    assert words.word_of == list(np.roll([-1, 0, 1, -1, -1, -1], shift))
    listed = made.rows_of_tokens([[5], [6, 7]], "input", apart=False)
    padded = [[0] * 5 + [5], [0] * 4 + [6, 7]] if direction == "left" else [[5] + [0] * 5, [6, 7] + [0] * 4]
    assert listed.groups[0].tensors["input_ids"].tolist() == padded


def test_tokens_that_are_pooled_are_not_padded_on_the_left(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.enable_padding(direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    inputs = (TensorSpec("input_ids", "INT64", (-1, 6)),)
    vectors = Signature(inputs, (TensorSpec("y", "FP32", (-1, 6, 3)),))
    with pytest.raises(ConfigError, match=r"text\.embeddings\.pooling: the tokenizer pads on the left"):
        codec(tmp_path / "tokenizer.json", vectors, embeddings={"pooling": "mean"})


@pytest.mark.parametrize(
    ("sentences", "error", "words"),
    [
        ((), InvalidInput, "at least one"),
        (("w1", "\ud800"), InvalidInput, r"at \[1\] holds half of a surrogate pair"),
        (("w1",) * (MOST_SENTENCES + 1), InvalidInput, str(MOST_SENTENCES)),
        (("w" * (MOST_CHARACTERS + 1),), BodyTooLarge, str(MOST_CHARACTERS)),
    ],
)
def test_sentences_that_cannot_be_encoded_are_refused(
    tokenizer_file: Path, sentences: tuple[str, ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        codec(tokenizer_file).encode(array(*sentences), apart=False)
    assert 'tensor "text"' in str(caught.value.detail)  # type: ignore[attr-defined]


def test_a_sentence_of_no_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.post_processor = None
    tokenizer.save(str(tmp_path / "bare.json"))
    with pytest.raises(InvalidInput, match=r"at \[1\] has no tokens"):
        codec(tmp_path / "bare.json").encode(array("w1", " "), apart=False)


def test_bytes_that_are_not_utf8_are_malformed(tokenizer_file: Path) -> None:
    with pytest.raises(MalformedBody, match="offset 2"):
        codec(tokenizer_file).decode(b"w1\xff")


@pytest.mark.parametrize(
    ("sig", "config", "words"),
    [
        (signature("x"), {}, "text.ids: no input"),
        (signature(), {"ids": "x"}, "text.ids: no input"),
        (signature("input_ids"), {"mask": "x"}, "text.mask: no input"),
        (signature("input_ids", "extra"), {}, 'also needs "extra"'),
        (signature(datatype="FP64"), {}, "INT64 or INT32"),
        (signature(shape=(-1, 8, 2)), {}, "rows, tokens"),
        (signature(shape=(-1, 8)), {"max_tokens": 9}, "rows of 8 tokens only"),
        (signature(shape=(-1, 2)), {}, "no room"),
        (signature("input_ids", "text"), {}, "text.input"),
        (signature(), {"max_tokens": 2}, "no room"),
    ],
)
def test_contradictions_are_refused_with_the_key(
    tokenizer_file: Path, sig: Signature, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        codec(tokenizer_file, sig, **config)


@pytest.mark.parametrize("content", [None, b"{}", b"\xff", b"not json"])
def test_a_broken_tokenizer_is_refused_with_its_file(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"text\.tokenizer: tokenizer\.json"):
        codec(file)


def test_made_up_rows_have_no_special_tokens(tokenizer_file: Path) -> None:
    rows = codec(tokenizer_file).made_up_rows(16)
    assert rows["input_ids"].shape == (8, 16)
    assert (rows["input_ids"] >= 4).all()
    assert rows["attention_mask"].all()


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("attention_mask", [[1]], "1 tokens a row"),
        ("token_type_ids", [[0, -1]], "is -1; it takes 0 to 1"),
        ("input_ids", [[5, 204]], "0 to 203"),
        ("input_ids", [[5, float("nan")]], r"at \[0, 1\] is nan; it takes 0 to 203"),
    ],
)
def test_tensors_that_could_not_come_from_sentences_are_refused(
    tokenizer_file: Path, name: str, tensor: list[list[int]], words: str
) -> None:
    made = codec(tokenizer_file)
    tensors = made.encode(array("w1"), apart=True)[0].tensors
    made.check(tensors)
    good = {key: value[:, :2] for key, value in tensors.items()}
    with pytest.raises(InvalidInput, match=words) as caught:
        made.check({**good, name: np.array(tensor)})
    assert caught.value.members["tensor"] == name


def test_golden_samples_may_be_sentences(tmp_path: Path) -> None:
    file = write_encoder(tmp_path / "models", "golden")
    folder, model = file.parent.parent, Alone(file)
    sentences = ["w1 w2", "w3", "w4 w5 w6 w7"]
    want = [model(sentence)["pooled"][0].tolist() for sentence in sentences]
    (folder / "samples").mkdir()
    cache = str(tmp_path / "cache")
    for outputs, status in ((want, 0), (want[::-1], 1)):
        sample = {"inputs": sentences, "outputs": {"pooled": outputs}}
        (folder / "samples" / "three.json").write_text(json.dumps(sample))
        assert cli.main(["check", str(folder), "--measure-ms", "100", "--cache-dir", cache]) == status


@pytest.mark.parametrize(
    ("template", "padding", "highest"),
    [
        ({"single": "[CLS] $A [SEP]", "pair": "$A $B:0"}, {}, 0),
        ({"single": "[CLS] $A [SEP]"}, {}, 1),
        ({"single": "$A:1 [CLS]:2"}, {}, 2),
        ({"single": "$A"}, {"pad_type_id": 3}, 3),
    ],
)
def test_type_ids_beyond_those_of_the_tokenizer_are_refused(
    tmp_path: Path, template: dict[str, Any], padding: dict[str, Any], highest: int
) -> None:
    tokenizer = make_tokenizer()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(**template, special_tokens=special)
    tokenizer.enable_truncation(4, strategy="only_first")
    if padding:
        tokenizer.enable_padding(**padding)
    tokenizer.save(str(tmp_path / "own.json"))
    made = codec(tmp_path / "own.json", max_tokens=4)
    tensors = dict.fromkeys(NAMES, np.zeros((1, 2), np.int64))
    made.check({**tensors, "token_type_ids": np.array([[0, highest]])})
    with pytest.raises(InvalidInput, match=rf"token_type_ids\" at \[0, 1\] is {highest + 1}; it takes 0 to"):
        made.check({**tensors, "token_type_ids": np.array([[0, highest + 1]])})


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(*[st.integers(0, 14)] * 2), min_size=1, max_size=6),
    st.integers(5, 14),
    st.sampled_from(["longest_first", "only_first", "only_second"]),
    st.sampled_from(["right", "left"]),
)
def test_pairs_match_the_tokenizer(
    tmp_path: Path, sizes: list[tuple[int, int]], most: int, strategy: str, direction: str
) -> None:
    by_hand = make_tokenizer()
    by_hand.enable_truncation(most, strategy=strategy, direction=direction)
    by_hand.save(str(tmp_path / "tokenizer.json"))
    made = codec(tmp_path / "tokenizer.json", pairs=True)
    pairs = [(" ".join(WORDS[:first]), " ".join(WORDS[50 : 50 + second])) for first, second in sizes]
    try:
        expected = by_hand.encode_batch(pairs)
    except Exception:  # noqa: BLE001 - the library has no error type of its own
        with pytest.raises(InvalidInput, match="more than"):
            made.encode_texts(pairs, "pairs", apart=True)
        return
    rows = made.encode_texts(pairs, "pairs", apart=True)
    words = [made.words(pair).tensors for pair in pairs]
    for group, encoding, row in zip(rows.groups, expected, words, strict=True):
        assert row["input_ids"][0].tolist() == encoding.ids
        assert group.tensors["input_ids"][0].tolist() == encoding.ids
        assert group.tensors["token_type_ids"][0].tolist() == encoding.type_ids
    longest = most - 3
    assert rows.truncated == [index for index, size in enumerate(sizes) if sum(size) > longest]


def test_long_pairs_take_no_more_than_their_tokens(tokenizer_file: Path) -> None:
    """The tokenizer itself makes every combination of what it cuts off: here two million."""
    made = codec(tokenizer_file, pairs=True, max_tokens=16)
    text = "w1 " * 20_000
    rows = made.encode_texts([(text, text)], "pairs", apart=False)
    assert (rows.lengths, rows.truncated) == ([16], [0])
    with pytest.raises(InvalidInput, match="more than 16 tokens"):
        made.encode_texts([(text, text)], "pairs", apart=False, truncate=False)
    with pytest.raises(InvalidInput, match="surrogate"):
        made.encode_texts([("a", "b"), ("a", "\udc00")], "pairs", apart=False)
