"""Finds out how rows of different lengths are padded, and makes up rows of every length that runs have."""

from __future__ import annotations

from dataclasses import replace

from inferpool.backends.base import LoadedModel
from inferpool.codecs.text import TextCodec
from inferpool.errors import LoadError, short_reason
from inferpool.pool.padding import Padding
from inferpool.repository.load.padding_check import check_padding
from inferpool.tensors import Tensors


def make_padding(text: TextCodec, model: LoadedModel, *, batched: bool) -> Padding:
    """How rows of different lengths are padded; raises LoadError if the model cannot run the longest."""
    try:
        model.run(text.made_up_rows(text.max_tokens, 1))
    except Exception as error:  # whatever the runtime raises, this version cannot be served
        raise LoadError(
            f"a row of {text.max_tokens} tokens cannot be run ({short_reason(error)}); set text.max_tokens in"
            " model.toml to what the model takes, or bring the tokenizer that it was trained with"
        ) from error
    padding = Padding(text.fills, text.ids, text.unit, text.max_tokens, mask=text.mask)
    if text.fixed is not None:
        return replace(padding, reason=f"every row has the {text.fixed} tokens that the model takes")
    return check_padding(model, text.made_up_rows(text.unit), padding) if batched else padding


def make_texts(text: TextCodec | None, padding: Padding | None) -> list[Tensors]:
    """Rows of every length that runs on a GPU have; none if lengths are not rounded."""
    if text is None or padding is None:
        return []
    return [text.made_up_rows(length) for length in padding.run_lengths()]
