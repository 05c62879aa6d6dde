"""Sentences to token ids: what `[text]` in a model.toml says, done by Hugging Face's `tokenizers`.

Every sentence is encoded by itself, with the special tokens that the tokenizer's file adds, and truncated as
the file says. It is never padded here: rows of one length come out together, and it is the pool that brings
rows of different lengths together where that changes no answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from inferpool.errors import BodyTooLarge, ConfigError, InvalidInput, LoadError, MalformedBody
from inferpool.system.install_hints import install_command
from inferpool.tensors import ANY, Array, Signature, Tensors, TensorSpec, name_text, names_text, shape_text

DEFAULT_MAX_TOKENS: Final = 512
"""Where neither the table nor the tokenizer's file says: what most encoders were trained for."""
MOST_CHARACTERS: Final = 1_000_000
"""Of a request in all: encoded in about half a second, on one core."""
MOST_SENTENCES: Final = 10_000
"""Of a request: each may become an entry of its own."""
MEASURED_TOKENS: Final = 32
"""The length of the rows that batching is proven and measured with; a power of two."""
PROOF_ROWS: Final = 8

_PROBE: Final = "One sentence, with 2 numbers: 34."
_SEED: Final = 20_260_101
_IDS: Final = ("INT64", "INT32")
_FLAGS: Final = ("INT64", "INT32", "BOOL", "FP32")
_PAD_TOKENS: Final = ("[PAD]", "<pad>", "<PAD>", "<|pad|>", "<|endoftext|>", "</s>")
"""What tokenizers call the token that is none, or have in its place."""


class TextConfig(BaseModel):
    """The table `[text]` of a model.toml.

    Attributes:
        input: the name under which sentences are sent.
        tokenizer: a file of Hugging Face's `tokenizers`, beside the model.toml.
        max_tokens: sentences of more are truncated; when left out, what the tokenizer's file truncates to, or
            else `DEFAULT_MAX_TOKENS`.
        ids: the model's input of token ids, [rows, tokens].
        mask: its input that is 1 for every token and 0 for padding; used where the model has it.
        types: its input of token type ids; used where the model has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Annotated[str, Field(min_length=1)] = Field(
        default="text", description="The name under which clients send sentences."
    )
    tokenizer: Annotated[str, Field(min_length=1)] = Field(
        default="tokenizer.json", description="The tokenizer's file, of Hugging Face's `tokenizers`."
    )
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="Longer sentences are truncated to this many tokens.",
        json_schema_extra={"unset": "from the tokenizer's file, else 512"},
    )
    ids: str = Field(default="input_ids", description="The model's input of token ids, `[rows, tokens]`.")
    mask: str = Field(
        default="attention_mask",
        description="The model's input that is 1 for tokens and 0 for padding, if it has one.",
    )
    types: str = Field(
        default="token_type_ids", description="The model's input of token type ids, if it has one."
    )


class Rows(NamedTuple):
    """Sentences of equally many tokens: their numbers among those of the request, and their tensors."""

    places: list[int]
    tensors: Tensors


class TextCodec:
    """Makes rows of a model's inputs from sentences; safe to share between threads.

    Attributes:
        input: the name under which sentences are sent.
        signature: the model's, with that input in front, in place of all others.
        max_tokens: tokens of a row at the most.
        ids: the name of the input of token ids.
        fills: every input that a sentence becomes, and the value in it that stands for no token.
        unit: the length of the rows that batching is proven and measured with; a power of two.
        words: how many tokens the vocabulary has, from which rows are made up.
    """

    media_types: ClassVar[tuple[str, ...]] = ("text/plain",)

    def __init__(self, config: TextConfig, signature: Signature, file: Path) -> None:
        """Read the tokenizer in `file` and settle what goes where.

        Raises ConfigError, with the key at the front, where `config`, `signature` and tokenizer contradict
        each other or the tokenizer cannot encode, and LoadError where `tokenizers` is not installed.
        """
        self._tokenizer = _read_tokenizer(config, file)
        self.input: Final = config.input
        self._ids, self._mask, self._types = _find_inputs(config, signature)
        with _named(config):
            self._highest_type: Final = _highest_type(self._tokenizer)
            self.max_tokens: Final = _truncate(config, self._tokenizer)
            pad_id, pad_type = _pad_ids(self._tokenizer)
            added = self._tokenizer.get_added_tokens_decoder()
            self._special = {token for token, of in added.items() if of.special}
            self.words: Final[int] = self._tokenizer.get_vocab_size(with_added_tokens=True)
            # Not the count, for a vocabulary may have gaps.
            known = self._tokenizer.get_vocab(with_added_tokens=True).values()
            self._highest: Final[int] = max(pad_id, *known, 0)
            # A file that cannot encode anything at all says so here, not to the first request.
            self._tokenizer.encode_batch_fast([_PROBE])
        self.ids: Final = self._ids.name
        self.fills: Final = {self.ids: pad_id}
        self.mask: Final = None if self._mask is None else self._mask.name
        if self.mask is not None:
            self.fills[self.mask] = 0
        if self._types is not None:
            self.fills[self._types.name] = pad_type
        # A power of two, so that the costs of rows add up without rounding.
        self.unit: Final = 1 << (min(MEASURED_TOKENS, self.max_tokens).bit_length() - 1)
        sentences = TensorSpec(self.input, "BYTES", (ANY,))
        self.signature: Final = replace(
            signature, inputs=(sentences, *signature.inputs), substitute_input=self.input
        )

    def decode(self, body: bytes) -> Array:
        """One sentence, all of `body`, which is UTF-8; raises MalformedBody where it is none."""
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
        """The rows of `sentences` (a vector of `str`), those of equally many tokens together, shortest first.

        With `apart` every row is by itself. Raises InvalidInput naming the sentence that cannot be encoded,
        and BodyTooLarge where there are too many characters.
        """
        texts: list[str] = sentences.tolist()
        self._bound(texts)
        encodings = self._encode(texts)
        by_length: dict[int, list[int]] = {}
        for place, encoding in enumerate(encodings):
            by_length.setdefault(len(encoding), []).append(place)
        if 0 in by_length:
            raise self._fault(by_length[0][0], "has no tokens")
        groups = (
            [[place] for place in range(len(texts))] if apart else [by_length[n] for n in sorted(by_length)]
        )
        return [Rows(places, self._rows([encodings[place] for place in places])) for places in groups]

    def made_up(self, tokens: int, count: int = PROOF_ROWS) -> Tensors:
        """`count` rows of `tokens` random words: what the model is proven and measured with."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        words = np.array([token for token in range(size) if token not in self._special] or [0])
        ids = np.random.default_rng(_SEED).choice(words, (count, tokens))
        return self._tensors(ids, np.zeros_like(ids))

    def check(self, tensors: Tensors) -> None:
        """Raise InvalidInput, naming the tensor, where the model's own inputs are no rows of tokens.

        They are what sentences could become: at least one token a row and no more than `max_tokens`, as many
        in every input, no id beyond the vocabulary, and no type beyond those that the tokenizer gives.
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
                    f"tensor {name_text(name)} has {tensors[name].shape[1]} tokens a row, and"
                    f" {name_text(self.ids)} {tokens}",
                    tensor=name,
                    expected=tokens,
                    got=tensors[name].shape[1],
                )
        _check_range(self.ids, ids, self._highest)
        if self._types is not None and self._types.name in tensors:
            _check_range(self._types.name, tensors[self._types.name], self._highest_type)

    def _bound(self, texts: list[str]) -> None:
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
            with _no_panic():
                # Without the offsets, which nobody asks for, and without the interpreter's lock.
                encodings: Sequence[Any] = self._tokenizer.encode_batch_fast(texts)
        except Exception as error:  # it raises no type of its own
            for place, text in enumerate(texts):
                if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                    raise self._fault(place, "holds half of a surrogate pair") from None
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

    def _fault(self, place: int, what: str) -> InvalidInput:
        return InvalidInput(
            f"tensor {name_text(self.input)} at [{place}] {what}", tensor=self.input, index=[place]
        )


def _check_range(name: str, values: Array, highest: int) -> None:
    """Raise InvalidInput for the first of `values` that is not in 0 to `highest`."""
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


def _read_tokenizer(config: TextConfig, file: Path) -> Any:
    # Threads of its own would take the model's cores, and do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise LoadError(
            f"text needs tokenizers, which is not installed: {install_command('text')}"
        ) from error
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"text.tokenizer: {config.tokenizer} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"text.tokenizer: {config.tokenizer} is not UTF-8 text") from error
    with _named(config):
        return Tokenizer.from_str(content)


@contextmanager
def _no_panic() -> Iterator[None]:
    """Raise what `tokenizers` panics with as a RuntimeError.

    Its panics are no `Exception`s: pyo3 lets them through to the end of a thread. The library goes on after
    one, for it changes nothing while it encodes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(str(panic)) from panic


@contextmanager
def _named(config: TextConfig) -> Iterator[None]:
    """Raise whatever `tokenizers` raises as a ConfigError that names the file."""
    try:
        with _no_panic():
            yield
    except ConfigError:
        raise
    except Exception as error:  # it raises no type of its own
        raise ConfigError(f"text.tokenizer: {config.tokenizer} is no tokenizer: {error}") from error


def _truncate(config: TextConfig, tokenizer: Any) -> int:
    """Let `tokenizer` truncate, and not pad; returns the tokens of a sentence at the most."""
    own = tokenizer.truncation or {}
    most: int = config.max_tokens or own.get("max_length") or DEFAULT_MAX_TOKENS
    added: int = tokenizer.num_special_tokens_to_add(False)
    if most <= added:
        raise ConfigError(
            f"text.max_tokens: {most} leaves no room for a word; the tokenizer adds {added} of its own"
        )
    # A stride is for texts that go on in further rows, and a sentence has one.
    tokenizer.enable_truncation(
        most, strategy=own.get("strategy", "longest_first"), direction=own.get("direction", "right")
    )
    return most


def _highest_type(tokenizer: Any) -> int:
    """The highest type that a token has, in a sentence, in a pair of them, or in padding.

    How many a model has been trained with stands in no file of its own, and it fails on any that is beyond.
    """
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    types = [*tokenizer.encode(_PROBE).type_ids, *tokenizer.encode(_PROBE, _PROBE).type_ids]
    if truncation:
        tokenizer.enable_truncation(**truncation)
    highest: int = max(padding["pad_type_id"] if padding else 0, *types, 0)
    return highest


def _pad_ids(tokenizer: Any) -> tuple[int, int]:
    """The id and the type id of the token that is none; 0 where the tokenizer has no such token."""
    own = tokenizer.padding
    tokenizer.no_padding()
    if own:
        return own["pad_id"], own["pad_type_id"]
    found = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
    return next((token for token in found if token is not None), 0), 0


def _find_inputs(
    config: TextConfig, signature: Signature
) -> tuple[TensorSpec, TensorSpec | None, TensorSpec | None]:
    specs = signature.inputs_by_name
    if config.input in specs:
        raise ConfigError(f'text.input: the model has an input of its own that is called "{config.input}"')
    ids = _find_input("ids", config, signature, _IDS)
    if ids is None:
        raise ConfigError(f'text.ids: no input is called "{config.ids}"; the model takes {names_text(specs)}')
    mask = _find_input("mask", config, signature, _FLAGS)
    types = _find_input("types", config, signature, _IDS)
    given = {spec.name for spec in (ids, mask, types) if spec is not None}
    missing = [spec.name for spec in signature.inputs if not spec.optional and spec.name not in given]
    if missing:
        raise ConfigError(f"text: the model also needs {names_text(missing)}, which no sentence gives")
    return ids, mask, types


def _find_input(
    key: str, config: TextConfig, signature: Signature, datatypes: tuple[str, ...]
) -> TensorSpec | None:
    name = getattr(config, key)
    spec = signature.inputs_by_name.get(name)
    if spec is None:
        if key in config.model_fields_set:
            raise ConfigError(
                f'text.{key}: no input is called "{name}"; the model takes'
                f" {names_text(signature.inputs_by_name)}"
            )
        return None
    if spec.datatype not in datatypes:
        raise ConfigError(f'text.{key}: "{name}" is {spec.datatype}; it must be {" or ".join(datatypes)}')
    if spec.shape is None or len(spec.shape) != 2 or spec.shape[1] != ANY:
        raise ConfigError(
            f'text.{key}: "{name}" is {shape_text(spec.shape)}; it must be [rows, tokens] of any size'
        )
    return spec
