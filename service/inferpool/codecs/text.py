"""Encodes sentences as rows of token ids, as `[text]` in a model.toml says, by Hugging Face's `tokenizers`.

A row is a sentence, or a pair of texts if the model takes pairs. Every row is encoded by itself, with the
special tokens of the tokenizer's file, and truncated as the file says. Rows of equal length are returned
together. The pool pads rows of different lengths if that changes no answer. For a model that takes one number
of tokens only, every row is padded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.codecs.text_config import TextConfig, find_inputs
from inferpool.codecs.text_outputs import ScoreOutput, VectorOutput, find_scores, find_vectors
from inferpool.codecs.text_pairs import JoinedPair, PairJoiner
from inferpool.codecs.text_tokenizer import (
    PROBE,
    catch_panics,
    highest_type,
    make_tokenizer,
    name_file,
    set_truncation,
    take_padding,
)
from inferpool.codecs.text_words import Words, find_token, find_words
from inferpool.errors import BodyTooLarge, ConfigError, InvalidInput, MalformedBody, Reason
from inferpool.tensors import ANY, Array, Signature, Tensors, TensorSpec, name_text, value_text

MOST_CHARACTERS: Final = 1_000_000
"""The most characters of a request; one core encodes them in about half a second."""
UTF8_BYTES: Final = 4
"""The most bytes of a character in UTF-8, and in memory."""
MOST_SENTENCES: Final = 10_000
"""The most sentences of a request, because each may become an entry of its own."""
MEASURED_TOKENS: Final = 32
"""The length of the rows with which batching is proven and measured; a power of two."""
PROOF_ROWS: Final = 8

_SEED: Final = 20_260_101

Text: TypeAlias = str | tuple[str, str]
"""What becomes a row: a sentence, or a pair of texts."""


class Rows(NamedTuple):
    """Sentences with the same number of tokens: their indices in the request, and their tensors."""

    indices: list[int]
    tensors: Tensors


class TextRows(NamedTuple):
    """The texts of a request as rows.

    Attributes:
        groups: the rows, in groups of equal length.
        lengths: the number of tokens of each text.
        truncated: the indices of the texts that were truncated.
    """

    groups: list[Rows]
    lengths: list[int]
    truncated: list[int]


class TextCodec:
    """Makes rows of a model's inputs from sentences; safe to share between threads.

    Attributes:
        input: the name under which clients send sentences.
        signature: the model's, with the input for sentences first, as a substitute for all others.
        max_tokens: the largest number of tokens in a row.
        fixed: the only number of tokens in a row that the model takes; None if it takes any.
        ids: the name of the input of token ids.
        mask: the name of the input that is 1 for tokens and 0 for padding, or None.
        fills: the padding value of every input that a sentence becomes, by name.
        unit: the length of the rows with which batching is proven and measured: `fixed`, or a power of two.
        vocabulary_size: the number of tokens in the vocabulary.
        pairs: whether a row is a pair of texts.
        media_types: the media types of bodies that are one sentence.
        query_prefix: put before a text that is sent as a query.
        document_prefix: put before a text that is sent as a document.
        vectors: makes the vector of each text, or the reason why the model gives none.
        scores: makes the score of each pair, or the reason why the model gives none.
    """

    def __init__(self, config: TextConfig, signature: Signature, tokenizer: bytes) -> None:
        """Prepare everything that does not depend on the sentences; `tokenizer` is the content of its file.

        Raises ConfigError, with the key at the front, if `config`, `signature` and tokenizer contradict
        each other or the tokenizer cannot encode, and LoadError if `tokenizers` is not installed.
        """
        self._tokenizer = make_tokenizer(config, tokenizer)
        self.input: Final = config.input
        self.pairs: Final = config.pairs
        self.media_types: Final[tuple[str, ...]] = () if config.pairs else ("text/plain",)
        self.query_prefix: Final = config.embeddings.query_prefix
        self.document_prefix: Final = config.embeddings.document_prefix
        self.vectors: Final[VectorOutput | Reason] = find_vectors(config, signature)
        self.scores: Final[ScoreOutput | Reason] = find_scores(config, signature)
        self._ids, self._mask, self._types = find_inputs(config, signature)
        tokens = (self._ids.shape or (ANY, ANY))[1]
        self.fixed: Final = None if tokens == ANY else tokens
        with name_file(config):
            self._highest_type: Final = highest_type(self._tokenizer)
            self.max_tokens: Final = set_truncation(config, self._tokenizer, self.fixed)
            self._padding: Final = take_padding(self._tokenizer)
            added = self._tokenizer.get_added_tokens_decoder()
            self._special = {token for token, of in added.items() if of.special}
            self.vocabulary_size: Final[int] = self._tokenizer.get_vocab_size(with_added_tokens=True)
            # This is not the size minus one, because a vocabulary may have gaps.
            known = self._tokenizer.get_vocab(with_added_tokens=True).values()
            self._highest: Final[int] = max(self._padding.id, *known, 0)
            # A tokenizer that cannot encode at all must fail here, not at the first request.
            self._joiner: PairJoiner | None = None
            if config.pairs:
                self._joiner = PairJoiner(self._tokenizer)
            else:
                self._tokenizer.encode_batch_fast([PROBE])
        self.ids: Final = self._ids.name
        self.fills: Final[dict[str, int]] = {self.ids: self._padding.id}
        self.mask: Final = None if self._mask is None else self._mask.name
        if self.mask is not None:
            self.fills[self.mask] = 0
        if self._types is not None:
            self.fills[self._types.name] = self._padding.type
        # With a power of two, the costs of rows add up without rounding. Rows of one length have one cost.
        self.unit: Final = self.fixed or 1 << (min(MEASURED_TOKENS, self.max_tokens).bit_length() - 1)
        pools = isinstance(self.vectors, VectorOutput) and self.vectors.pooled
        if self.fixed is not None and self._padding.on_left and pools:
            raise ConfigError(
                "text.embeddings.pooling: the tokenizer pads on the left, where the vectors of tokens are"
                ' pooled; set the "direction" of "padding" in its file to "Right"'
            )
        sentences = TensorSpec(self.input, "BYTES", (ANY, 2) if config.pairs else (ANY,))
        self.signature: Final = replace(
            signature, inputs=(sentences, *signature.inputs), substitute_input=self.input
        )

    def decode(self, body: bytes, allowance: Allowance = UNLIMITED) -> Array:
        """Return the sentence that is all of `body`.

        Raises MalformedBody if it is not UTF-8, BodyTooLarge if it has too many characters, InvalidInput if
        the model takes pairs, and what `Allowance.take` raises.
        """
        if self.pairs:
            raise InvalidInput(
                f"tensor {name_text(self.input)} is one text; the model takes pairs of texts, as JSON:"
                ' [["first", "second"]]',
                tensor=self.input,
            )
        if len(body) > UTF8_BYTES * MOST_CHARACTERS:
            raise BodyTooLarge(
                f"tensor {name_text(self.input)} has {len(body)} bytes; a request may have {MOST_CHARACTERS}"
                " characters",
                tensor=self.input,
                limit=MOST_CHARACTERS,
            )
        allowance.take(UTF8_BYTES * len(body), "reading the text")
        try:
            return np.array([body.decode()], dtype=object)
        except UnicodeDecodeError as error:
            raise MalformedBody(
                f"tensor {name_text(self.input)} is not UTF-8: byte 0x{body[error.start]:02x} at offset"
                f" {error.start}",
                tensor=self.input,
                position=error.start,
            ) from None

    def encode(self, sentences: Array, *, apart: bool) -> list[Rows]:
        """Return rows for `sentences`, a vector of `str`, in groups of equal length, shortest first.

        If the model takes pairs, `sentences` has two columns. With `apart` every row is a group. Raises
        InvalidInput with the sentence that cannot be encoded, and BodyTooLarge if there are too many
        characters.
        """
        listed: list[Any] = sentences.tolist()
        texts: list[Text] = list(map(tuple, listed)) if self.pairs else listed
        encodings = self._encode(texts)
        return self._groups([len(encoding) for encoding in encodings], encodings, apart)

    def encode_texts(
        self, texts: Sequence[Text], field: str, *, apart: bool, truncate: bool = True
    ) -> TextRows:
        """Return rows for `texts`, with their lengths; errors name the `field` of the body that has them.

        The texts are pairs if the model takes pairs. Raises as `encode`, and InvalidInput for a text that is
        too long unless `truncate` is set.
        """
        encodings = self._encode(texts, field)
        truncated = [index for index, encoding in enumerate(encodings) if self._is_truncated(encoding)]
        if truncated and not truncate:
            index = truncated[0]
            what = "pair" if self.pairs else "text"
            raise InvalidInput(
                f'"{field}" at [{index}] has more than {self.max_tokens} tokens; send a shorter {what}, or'
                ' leave out "truncate"',
                field=field,
                index=[index],
                expected=self.max_tokens,
            )
        lengths = [len(encoding) for encoding in encodings]
        return TextRows(self._groups(lengths, encodings, apart), lengths, truncated)

    def rows_of_tokens(self, texts: Sequence[Sequence[int]], field: str, *, apart: bool) -> TextRows:
        """Return rows for texts that are token ids already; errors name the `field` of the body with them.

        Raises InvalidInput if there are too many texts, a text has no tokens or too many, or an id is not in
        the vocabulary.
        """
        _check_count(len(texts), f'"{field}"', {"field": field})
        for index, ids in enumerate(texts):
            if not 1 <= len(ids) <= self.max_tokens:
                raise InvalidInput(
                    f'"{field}" at [{index}] has {len(ids)} tokens; the model takes 1 to {self.max_tokens}',
                    field=field,
                    index=[index],
                    expected=self.max_tokens,
                    got=len(ids),
                )
            wrong = next(
                (position for position, token in enumerate(ids) if not 0 <= token <= self._highest), None
            )
            if wrong is not None:
                raise InvalidInput(
                    f'"{field}" at [{index}, {wrong}] is {value_text(ids[wrong])}; token ids of this model'
                    f" are 0 to {self._highest}",
                    field=field,
                    index=[index, wrong],
                    expected=f"0 to {self._highest}",
                )
        lengths = [len(ids) for ids in texts]
        groups = []
        for indices in self._by_length(lengths, apart):
            rows = [texts[index] for index in indices]
            groups.append(Rows(indices, self._tensors(rows, [[0] * len(row) for row in rows])))
        return TextRows(groups, lengths, [])

    def words(self, text: Text) -> Words:
        """Return the row of a sentence, or of a pair of them, with its words; raises what `encode` raises."""
        self._encode([text])
        sentences = (text,) if isinstance(text, str) else text
        encoding = self._tokenizer.encode(*sentences)
        if self._joiner is not None:
            encoding = self._joiner.cut(encoding)
        spans, word_of = find_words(sentences, encoding)
        if self.fixed is not None:
            padding = [-1] * (self.fixed - len(word_of))
            word_of = padding + word_of if self._padding.on_left else word_of + padding
        return Words(self._rows([encoding]), spans, word_of)

    def substitute(self, kind: str) -> int | None:
        """Return the id of a token that stands for no word; None if the tokenizer has none of this `kind`.

        `mask` is the token that hides a word in training, `unknown` that of words outside the vocabulary,
        and `padding` fills rows up.
        """
        return self.fills[self.ids] if kind == "padding" else find_token(self._tokenizer, kind)

    def made_up_rows(self, tokens: int, count: int = PROOF_ROWS) -> Tensors:
        """Return `count` rows of `tokens` random tokens, with which batching is proven and measured."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        words = np.array([token for token in range(size) if token not in self._special] or [0])
        ids = np.random.default_rng(_SEED).choice(words, (count, tokens))
        return self._tensors(ids.tolist(), np.zeros_like(ids).tolist())

    def check(self, tensors: Tensors) -> None:
        """Raise InvalidInput, with the tensor, if the model's own inputs could not come from sentences.

        Rows have 1 to `max_tokens` tokens, the same number in every input. Ids are in the vocabulary, and
        type ids are among those of the tokenizer.
        """
        ids = tensors[self.ids]
        tokens = ids.shape[1]
        if not 1 <= tokens <= self.max_tokens:
            raise InvalidInput(
                f"tensor {name_text(self.ids)} has {tokens} tokens a row; the model takes 1 to"
                f" {self.max_tokens}",
                tensor=self.ids,
                expected=self.max_tokens,
                got=tokens,
            )
        for name in self.fills:
            if name in tensors and tensors[name].shape[1] != tokens:
                raise InvalidInput(
                    f"tensor {name_text(name)} has {tensors[name].shape[1]} tokens a row, but"
                    f" {name_text(self.ids)} has {tokens}",
                    tensor=name,
                    expected=tokens,
                    got=tensors[name].shape[1],
                )
        _check_range(self.ids, ids, self._highest)
        if self._types is not None and self._types.name in tensors:
            _check_range(self._types.name, tensors[self._types.name], self._highest_type)

    def _encode(self, texts: Sequence[Text], field: str = "") -> Sequence[Any]:
        """Encode `texts`; errors name the `field` that has them, or without one the input for sentences."""
        called = f'"{field}"' if field else f"tensor {name_text(self.input)}"
        members: dict[str, Any] = {"field": field} if field else {"tensor": self.input}
        _check_count(len(texts), called, members)
        characters = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
        if characters > MOST_CHARACTERS:
            raise BodyTooLarge(
                f"{called} has {characters} characters; a request may have {MOST_CHARACTERS}",
                limit=MOST_CHARACTERS,
                **members,
            )
        try:
            encodings = self._tokenize(texts, called, members)
        except InvalidInput:
            raise
        except Exception as error:  # the library has no error type of its own
            for index, text in enumerate(texts):
                whole = text if isinstance(text, str) else "".join(text)
                if not whole.isascii() and any("\ud800" <= character <= "\udfff" for character in whole):
                    raise _fault(called, index, "holds half of a surrogate pair", members) from None
            raise InvalidInput(f"{called} cannot be encoded: {error}", **members) from error
        empty = next((index for index, encoding in enumerate(encodings) if not len(encoding)), None)
        if empty is not None:
            raise _fault(called, empty, "has no tokens", members)
        return encodings

    def _tokenize(self, texts: Sequence[Text], called: str, members: dict[str, Any]) -> Sequence[Any]:
        """Return the encoding of each text. The fast variant computes no offsets, and releases the GIL."""
        joiner = self._joiner
        if joiner is None:
            with catch_panics():
                encodings: Sequence[Any] = self._tokenizer.encode_batch_fast(texts)
            return encodings
        # Many pairs have the same first text: the query of a search.
        pairs: Any = texts
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        with catch_panics():
            found = self._tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        tokens = {text: encoding.ids for text, encoding in zip(distinct, found, strict=True)}
        joined: list[JoinedPair] = []
        for index, (first, second) in enumerate(pairs):
            pair = joiner.join(tokens[first], tokens[second])
            if pair is None:
                what = f"has more than {self.max_tokens} tokens, even if one text is left out"
                raise _fault(called, index, what, members)
            joined.append(pair)
        return joined

    def _is_truncated(self, encoding: Any) -> bool:
        if self.pairs:
            return bool(encoding.truncated)
        # The pieces that were cut off are copied when they are asked for.
        return len(encoding) == self.max_tokens and bool(encoding.overflowing)

    def _groups(self, lengths: list[int], encodings: Sequence[Any], apart: bool) -> list[Rows]:
        return [
            Rows(indices, self._rows([encodings[index] for index in indices]))
            for indices in self._by_length(lengths, apart)
        ]

    def _by_length(self, lengths: list[int], apart: bool) -> list[list[int]]:
        """Return the indices of texts whose rows have one length; with `apart` one by one."""
        return _by_length(lengths if self.fixed is None else [self.fixed] * len(lengths), apart)

    def _rows(self, encodings: list[Any]) -> Tensors:
        ids = [encoding.ids for encoding in encodings]
        return self._tensors(ids, [each.type_ids for each in encodings] if self._types is not None else ids)

    def _tensors(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> Tensors:
        """Return the rows of `ids`, which have one length unless the model takes rows of a fixed one."""
        padding = self._padding
        filled = self._filled(ids, padding.id)
        tensors = {self._ids.name: filled.astype(self._ids.dtype)}
        if self._mask is not None:
            fixed = self.fixed is not None
            mask = self._filled([[1] * len(row) for row in ids], 0) if fixed else np.ones(filled.shape)
            tensors[self._mask.name] = mask.astype(self._mask.dtype)
        if self._types is not None:
            tensors[self._types.name] = self._filled(types, padding.type).astype(self._types.dtype)
        return tensors

    def _filled(self, rows: Any, fill: int) -> Array:
        """Return `rows` as an array; rows of a fixed length are filled up with `fill`."""
        if self.fixed is None:
            return np.asarray(rows)
        filled = np.full((len(rows), self.fixed), fill)
        for target, row in zip(filled, rows, strict=True):
            first = self.fixed - len(row) if self._padding.on_left else 0
            target[first : first + len(row)] = row
        return filled


def _by_length(lengths: list[int], apart: bool) -> list[list[int]]:
    """Return the indices of texts in groups of equal length, shortest first; with `apart` one by one."""
    if apart:
        return [[index] for index in range(len(lengths))]
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    return [by_length[length] for length in sorted(by_length)]


def _fault(called: str, index: int, what: str, members: dict[str, Any]) -> InvalidInput:
    return InvalidInput(f"{called} at [{index}] {what}", index=[index], **members)


def _check_count(count: int, called: str, members: dict[str, Any]) -> None:
    if not count:
        raise InvalidInput(f"{called} is empty: send at least one sentence", **members)
    if count > MOST_SENTENCES:
        raise InvalidInput(
            f"{called} has {count} sentences; a request may have {MOST_SENTENCES}",
            expected=MOST_SENTENCES,
            got=count,
            **members,
        )


def _check_range(name: str, values: Array, highest: int) -> None:
    """Raise InvalidInput for the first of `values` that is not from 0 to `highest`."""
    if not values.size or (values.min() >= 0 and values.max() <= highest):
        return
    index = np.argwhere(~((values >= 0) & (values <= highest)))[0].tolist()  # also one that is not a number
    got = str(values[tuple(index)])
    raise InvalidInput(
        f"tensor {name_text(name)} at {index} is {got}; it takes 0 to {highest}",
        tensor=name,
        index=index,
        value=got,
        expected=f"0 to {highest}",
    )
