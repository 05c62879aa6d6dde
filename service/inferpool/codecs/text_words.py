"""The words of a sentence, as far as its tokens have them, and the tokens that stand for no word."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from inferpool.tensors import Tensors

_PARTS: Final = re.compile(r"\S+")
_MASK_TOKENS: Final = ("[MASK]", "<mask>", "<MASK>")
_UNKNOWN_TOKENS: Final = ("[UNK]", "<unk>", "<UNK>")


class Span(NamedTuple):
    """Where a word begins and ends, in characters: in the first or the second sentence of a pair."""

    sentence: int
    start: int
    end: int


class Words(NamedTuple):
    """The words of a sentence or a pair, as far as the row of tokens has them.

    Attributes:
        tensors: the row.
        spans: where each word is.
        word_of: the number of the word of each token; -1 for special tokens and padding.
    """

    tensors: Tensors
    spans: list[Span]
    word_of: list[int]


def find_words(sentences: Sequence[str], encoding: Any) -> tuple[list[Span], list[int]]:
    """Return the span of each word that has tokens, and the number of the word of each token."""
    tokens = list(zip(encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True))
    starts = [[match.start() for match in _PARTS.finditer(sentence)] for sentence in sentences]
    # Some tokenizers take a whole sentence for one word.
    in_parts = len({number for _, number, _ in tokens} - {None}) < 2 and max(map(len, starts)) > 1
    known: dict[tuple[int, int], int] = {}
    spans: list[Span] = []
    word_of = []
    for which, number, (start, end) in tokens:
        if which is not None:
            while start < end and sentences[which][start].isspace():
                start += 1  # a token of some tokenizers begins with the space before its word
        if which is None or number is None or start == end:
            word_of.append(-1)
            continue
        own = bisect_right(starts[which], start) if in_parts else number
        word = known.setdefault((which, own), len(spans))
        if word == len(spans):
            spans.append(Span(which, start, end))
        else:
            spans[word] = Span(which, min(spans[word].start, start), max(spans[word].end, end))
        word_of.append(word)
    return spans, word_of


def find_token(tokenizer: Any, kind: str) -> int | None:
    """Return the id of a token that stands for no word; None if the tokenizer has none of this `kind`.

    `mask` is the token that hides a word in training, and `unknown` that of words outside the vocabulary.
    """
    names: tuple[str, ...] = _MASK_TOKENS
    if kind == "unknown":
        names = tuple(filter(None, (getattr(tokenizer.model, "unk_token", None), *_UNKNOWN_TOKENS)))
    found = (tokenizer.token_to_id(name) for name in names)
    return next((token for token in found if token is not None), None)
