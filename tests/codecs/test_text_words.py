"""The words of a sentence, with the tokens and the characters that are theirs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.codecs.text import TextCodec
from inferpool.codecs.text_config import TextConfig
from inferpool.errors import InvalidInput
from inferpool.tensors import Signature, TensorSpec
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.text_models import WORDS, make_tokenizer

SIGNATURE = Signature((TensorSpec("input_ids", "INT64", (-1, -1)),), (TensorSpec("y", "FP32", (-1, 3)),))


def codec(tokenizer: Tokenizer, **config: object) -> TextCodec:
    return TextCodec(TextConfig.model_validate(config), SIGNATURE, tokenizer.to_str().encode())


ONE = codec(make_tokenizer(), max_tokens=20)
PAIRS = codec(make_tokenizer(), max_tokens=20, pairs=True)
GAPS = st.text(" \n\u2009", min_size=1, max_size=3)
SENTENCES = st.lists(st.tuples(st.sampled_from([*WORDS, "É", "W1"]), GAPS), min_size=1, max_size=30)


@given(parts=SENTENCES, before=st.text(" ", max_size=2))
def test_each_word_has_its_characters_and_its_token(parts: list[tuple[str, str]], before: str) -> None:
    sentence = before + "".join(word + gap for word, gap in parts)
    words = ONE.words(sentence)
    kept = [word for word, _ in parts][:18]  # beside the two special tokens
    assert [sentence[span.start : span.end] for span in words.spans] == kept
    assert words.word_of == [-1, *range(len(kept)), -1]
    [expected] = ONE.encode(np.array([sentence], object), apart=False)
    assert words.tensors["input_ids"].tolist() == expected.tensors["input_ids"].tolist()


def test_the_words_of_a_pair_say_which_text_they_are_from() -> None:
    pair = ("w1 w2", "w3  w4")
    words = PAIRS.words(pair)
    assert [(span.sentence, pair[span.sentence][span.start : span.end]) for span in words.spans] == [
        (0, "w1"), (0, "w2"), (1, "w3"), (1, "w4"),
    ]  # fmt: skip
    assert sorted(set(words.word_of) - {-1}) == [0, 1, 2, 3]


def test_a_tokenizer_that_takes_a_sentence_for_one_word_has_words_too() -> None:
    pieces = {"<unk>": 0, "\u2581go": 1, "od": 2, "\u2581day": 3, "\u2581": 4, "s": 5}
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0 - number) for piece, number in pieces.items()], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    sentence = "good  days good"
    words = codec(tokenizer).words(sentence)
    assert [sentence[span.start : span.end] for span in words.spans] == ["good", "days", "good"]


def test_the_tokens_that_replace_words_are_those_of_the_tokenizer() -> None:
    assert (ONE.substitute("mask"), ONE.substitute("unknown"), ONE.substitute("padding")) == (None, 1, 0)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["[MASK]"])
    assert codec(tokenizer).substitute("mask") == tokenizer.token_to_id("[MASK]")


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(InvalidInput, match="surrogate"):
        ONE.words("half of a \ud800")
