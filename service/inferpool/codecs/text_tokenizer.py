"""Reads a file of Hugging Face's `tokenizers` and prepares the tokenizer in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferpool.codecs.text_config import TextConfig
from inferpool.errors import ConfigError, LoadError
from inferpool.system.files import read_file
from inferpool.system.install_hints import install_command

DEFAULT_MAX_TOKENS: Final = 512
"""Used if neither the table nor the tokenizer's file has a limit. Most encoders were trained with it."""
_MOST_FILE_BYTES: Final = 256 * 2**20
"""Bytes of a tokenizer's file; those of the largest vocabularies have 35 MB."""
PROBE: Final = "One sentence, with 2 numbers: 34."
"""A sentence that every tokenizer can encode."""
PROBES: Final = (PROBE, "Another one, which is shorter.")
"""A pair of such sentences."""
_PAD_TOKENS: Final = ("[PAD]", "<pad>", "<PAD>", "<|pad|>", "<|endoftext|>", "</s>")
"""Names of the padding token in various tokenizers, or of a token that is used for padding."""


def read_tokenizer_file(config: TextConfig, file: Path) -> bytes:
    """The content of a tokenizer's file; raises ConfigError if the file cannot be read."""
    try:
        return read_file(file, _MOST_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"text.tokenizer: {config.tokenizer} cannot be read ({error.strerror})") from error


def make_tokenizer(config: TextConfig, content: bytes) -> Any:
    """Return the `tokenizers.Tokenizer` that `content`, a tokenizer's file, describes.

    Raises ConfigError if it is not a tokenizer, and LoadError if `tokenizers` is not installed.
    """
    # Threads of the library would take cores from the model, and do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise LoadError(
            f"text needs tokenizers, which is not installed: {install_command('text')}"
        ) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"text.tokenizer: {config.tokenizer} is not UTF-8 text") from error
    with name_file(config):
        return Tokenizer.from_str(text)


@contextmanager
def catch_panics() -> Iterator[None]:
    """Turn panics of `tokenizers` into a RuntimeError.

    pyo3 raises panics as a BaseException, which would end the thread. The library works on after a panic,
    because encoding changes none of its state.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(str(panic)) from panic


@contextmanager
def name_file(config: TextConfig) -> Iterator[None]:
    """Turn every error of `tokenizers` into a ConfigError with the name of the file."""
    try:
        with catch_panics():
            yield
    except ConfigError:
        raise
    except Exception as error:  # the library has no error type of its own
        raise ConfigError(f"text.tokenizer: {config.tokenizer} is not a tokenizer: {error}") from error


class PaddingToken(NamedTuple):
    """The token that fills up rows.

    Attributes:
        id: its number.
        type: its type id.
        on_left: whether it comes before the tokens of the text.
    """

    id: int
    type: int
    on_left: bool


def set_truncation(config: TextConfig, tokenizer: Any, fixed: int | None) -> int:
    """Let `tokenizer` truncate sentences; return the largest number of tokens of a sentence.

    It is `fixed` if the model takes one number of tokens only.
    """
    own = tokenizer.truncation or {}
    if fixed is not None and config.max_tokens not in (None, fixed):
        raise ConfigError(
            f"text.max_tokens: {config.max_tokens}, but the model takes rows of {fixed} tokens only; leave"
            " out the key"
        )
    most: int = fixed or config.max_tokens or own.get("max_length") or DEFAULT_MAX_TOKENS
    added: int = tokenizer.num_special_tokens_to_add(config.pairs)
    if most <= added:
        raise ConfigError(
            f"text.max_tokens: {most} leaves no room for a word; the tokenizer adds {added} special tokens"
        )
    # There is no stride: it is for texts that continue in further rows, and a sentence has one row.
    tokenizer.enable_truncation(
        most, strategy=own.get("strategy", "longest_first"), direction=own.get("direction", "right")
    )
    return most


def highest_type(tokenizer: Any) -> int:
    """Return the highest type id of a token in a sentence, in a pair of sentences, or in padding.

    A model fails on higher type ids. No file says how many type ids the model was trained with.
    """
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    types = [*tokenizer.encode(PROBE).type_ids, *tokenizer.encode(PROBE, PROBE).type_ids]
    if truncation:
        tokenizer.enable_truncation(**truncation)
    highest: int = max(padding["pad_type_id"] if padding else 0, *types, 0)
    return highest


def take_padding(tokenizer: Any) -> PaddingToken:
    """Switch padding off; return the padding token, with the id 0 if there is none."""
    own = tokenizer.padding
    tokenizer.no_padding()
    if own:
        return PaddingToken(own["pad_id"], own["pad_type_id"], own["direction"] == "left")
    found = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
    return PaddingToken(next((token for token in found if token is not None), 0), 0, on_left=False)
