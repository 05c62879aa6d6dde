"""Encodes sentences as rows of token ids, as `[text]` in a model.toml says, by Hugging Face's `tokenizers`.

Every sentence is encoded by itself, with the special tokens of the tokenizer's file, and truncated as the
file says. Nothing is padded here: rows of equal length are returned together. The pool pads rows of
different lengths if that changes no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.codecs.text_config import TextConfig, find_inputs
from inferpool.codecs.text_tokenizer import (
    PROBE,
    catch_panics,
    highest_type,
    make_tokenizer,
    name_file,
    set_truncation,
    take_padding,
)
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody
from inferpool.tensors import ANY, Array, Signature, Tensors, TensorSpec, name_text

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


class Rows(NamedTuple):
    """Sentences with the same number of tokens: their indices in the request, and their tensors."""

    indices: list[int]
    tensors: Tensors


class TextCodec:
    """Makes rows of a model's inputs from sentences; safe to share between threads.

    Attributes:
        input: the name under which clients send sentences.
        signature: the model's, with the input for sentences first, as a substitute for all others.
        max_tokens: the largest number of tokens in a row.
        ids: the name of the input of token ids.
        mask: the name of the input that is 1 for tokens and 0 for padding, or None.
        fills: the padding value of every input that a sentence becomes, by name.
        unit: the length of the rows with which batching is proven and measured; a power of two.
        vocabulary_size: the number of tokens in the vocabulary.
    """

    media_types: ClassVar[tuple[str, ...]] = ("text/plain",)

    def __init__(self, config: TextConfig, signature: Signature, tokenizer: bytes) -> None:
        """Prepare everything that does not depend on the sentences; `tokenizer` is the content of its file.

        Raises ConfigError, with the key at the front, if `config`, `signature` and tokenizer contradict
        each other or the tokenizer cannot encode, and LoadError if `tokenizers` is not installed.
        """
        self._tokenizer = make_tokenizer(config, tokenizer)
        self.input: Final = config.input
        self._ids, self._mask, self._types = find_inputs(config, signature)
        with name_file(config):
            self._highest_type: Final = highest_type(self._tokenizer)
            self.max_tokens: Final = set_truncation(config, self._tokenizer)
            pad_id, pad_type = take_padding(self._tokenizer)
            added = self._tokenizer.get_added_tokens_decoder()
            self._special = {token for token, of in added.items() if of.special}
            self.vocabulary_size: Final[int] = self._tokenizer.get_vocab_size(with_added_tokens=True)
            # This is not the size minus one, because a vocabulary may have gaps.
            known = self._tokenizer.get_vocab(with_added_tokens=True).values()
            self._highest: Final[int] = max(pad_id, *known, 0)
            # A tokenizer that cannot encode at all must fail here, not at the first request.
            self._tokenizer.encode_batch_fast([PROBE])
        self.ids: Final = self._ids.name
        self.fills: Final = {self.ids: pad_id}
        self.mask: Final = None if self._mask is None else self._mask.name
        if self.mask is not None:
            self.fills[self.mask] = 0
        if self._types is not None:
            self.fills[self._types.name] = pad_type
        # With a power of two, the costs of rows add up without rounding.
        self.unit: Final = 1 << (min(MEASURED_TOKENS, self.max_tokens).bit_length() - 1)
        sentences = TensorSpec(self.input, "BYTES", (ANY,))
        self.signature: Final = replace(
            signature, inputs=(sentences, *signature.inputs), substitute_input=self.input
        )

    def decode(self, body: bytes, allowance: Allowance = UNLIMITED) -> Array:
        """Return the sentence that is all of `body`.

        Raises MalformedBody if it is not UTF-8, BodyTooLarge if it has too many characters, and what
        `Allowance.take` raises.
        """
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

        With `apart` every row is a group. Raises InvalidInput with the sentence that cannot be encoded, and
        BodyTooLarge if there are too many characters.
        """
        texts: list[str] = sentences.tolist()
        self._check_size(texts)
        encodings = self._encode(texts)
        by_length: dict[int, list[int]] = {}
        for index, encoding in enumerate(encodings):
            by_length.setdefault(len(encoding), []).append(index)
        if 0 in by_length:
            raise self._fault(by_length[0][0], "has no tokens")
        groups = (
            [[index] for index in range(len(texts))] if apart else [by_length[n] for n in sorted(by_length)]
        )
        return [Rows(indices, self._rows([encodings[index] for index in indices])) for indices in groups]

    def made_up_rows(self, tokens: int, count: int = PROOF_ROWS) -> Tensors:
        """Return `count` rows of `tokens` random tokens, with which batching is proven and measured."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        words = np.array([token for token in range(size) if token not in self._special] or [0])
        ids = np.random.default_rng(_SEED).choice(words, (count, tokens))
        return self._tensors(ids, np.zeros_like(ids))

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

    def _check_size(self, texts: list[str]) -> None:
        if not texts:
            raise InvalidInput(
                f"tensor {name_text(self.input)} is empty: send at least one sentence", tensor=self.input
            )
        if len(texts) > MOST_SENTENCES:
            raise InvalidInput(
                f"tensor {name_text(self.input)} has {len(texts)} sentences; a request may have"
                f" {MOST_SENTENCES}",
                tensor=self.input,
                expected=MOST_SENTENCES,
                got=len(texts),
            )
        characters = sum(map(len, texts))
        if characters > MOST_CHARACTERS:
            raise BodyTooLarge(
                f"tensor {name_text(self.input)} has {characters} characters; a request may have"
                f" {MOST_CHARACTERS}",
                tensor=self.input,
                limit=MOST_CHARACTERS,
            )

    def _encode(self, texts: list[str]) -> Sequence[Any]:
        try:
            with catch_panics():
                # This variant computes no offsets, which are not used, and releases the GIL.
                encodings: Sequence[Any] = self._tokenizer.encode_batch_fast(texts)
        except Exception as error:  # the library has no error type of its own
            for index, text in enumerate(texts):
                if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                    raise self._fault(index, "holds half of a surrogate pair") from None
            raise InvalidInput(
                f"tensor {name_text(self.input)} cannot be encoded: {error}", tensor=self.input
            ) from error
        return encodings

    def _rows(self, encodings: list[Any]) -> Tensors:
        ids = np.array([encoding.ids for encoding in encodings])
        types = np.array([encoding.type_ids for encoding in encodings]) if self._types is not None else ids
        return self._tensors(ids, types)

    def _tensors(self, ids: Array, types: Array) -> Tensors:
        tensors = {self._ids.name: ids.astype(self._ids.dtype)}
        if self._mask is not None:
            tensors[self._mask.name] = np.ones(ids.shape, self._mask.dtype)
        if self._types is not None:
            tensors[self._types.name] = types.astype(self._types.dtype)
        return tensors

    def _fault(self, index: int, what: str) -> InvalidInput:
        return InvalidInput(
            f"tensor {name_text(self.input)} at [{index}] {what}", tensor=self.input, index=[index]
        )


def _check_range(name: str, values: Array, highest: int) -> None:
    """Raise InvalidInput for the first of `values` that is not from 0 to `highest`."""
    if not values.size or (values.min() >= 0 and values.max() <= highest):
        return
    index = np.argwhere((values < 0) | (values > highest))[0].tolist()
    got = str(values[tuple(index)])
    raise InvalidInput(
        f"tensor {name_text(name)} at {index} is {got}; it takes 0 to {highest}",
        tensor=name,
        index=index,
        value=got,
        expected=f"0 to {highest}",
    )
