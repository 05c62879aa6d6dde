"""Causal language models with their cache: keys and values of earlier tokens go in, those of all come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from conversion import Array
from transformers import DynamicCache

LEAST_TOKENS = 3
"""Tokens of a text of the example: at least one is in the cache, and two are new."""
NEW_TOKENS = 2
MOST_ROWS = 8
"""Rows that are compared: each has the whole cache."""
TRACED_TOKENS, TRACED_PAST = 3, 5
"""Sizes that the exporter sees. They differ, or it would take one for the other."""
NOTES = (
    "The tokens of a row are `input_ids`, without padding; the third dimension of a `past_key_values` is the"
    " number of tokens before them. Begin with 0, in a binary format, and give each `present` of an answer as"
    " `past_key_values` with the tokens that follow.",
)


class Cached(torch.nn.Module):  # type: ignore[misc]  # mypy does not read torch
    """The model with its cache as tensors: the scores behind the last token, and keys and values."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the scores, and keys and values of each layer; `tensors` are tokens, and the same before."""
        tokens, past, cache = tensors[0], tensors[1:], DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        answered = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return answered.logits[:, -1], *tensors_of(answered.past_key_values)


def tensors_of(cache: Any) -> list[torch.Tensor]:
    """Return keys and values of each layer in turn."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def names_of(prefix: str, count: int) -> list[str]:
    """Return the names of so many tensors of a cache, as Optimum gives them."""
    return [f"{prefix}.{at // 2}.{('key', 'value')[at % 2]}" for at in range(count)]


def answer_with_cache(
    model: torch.nn.Module, rows: Sequence[Array]
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Return inputs, the model's own answers to them, and inputs to export with; `rows` are tokens of texts.

    The answers are those of the model to all tokens at once, without a cache. All rows are cut to the length
    of the shortest one.
    """
    length = min(len(row) for row in rows)
    tokens = torch.from_numpy(np.stack([row[:length] for row in rows]).astype(np.int64))
    with torch.no_grad():
        whole = [model(input_ids=row[None], use_cache=True) for row in tokens]
        before = [model(input_ids=row[None, :-NEW_TOKENS], use_cache=True) for row in tokens]
    past = [_joined(each) for each in zip(*(tensors_of(one.past_key_values) for one in before), strict=True)]
    present = [
        _joined(each) for each in zip(*(tensors_of(one.past_key_values) for one in whole), strict=True)
    ]
    pasts = names_of("past_key_values", len(past))
    inputs = {"input_ids": tokens[:, -NEW_TOKENS:].numpy(), **dict(zip(pasts, past, strict=True))}
    outputs = {"logits": _joined([one.logits[:, -1] for one in whole])}
    outputs |= zip(names_of("present", len(present)), present, strict=True)
    traced = {"input_ids": np.ones((2, TRACED_TOKENS), np.int64)}
    for name, array in zip(pasts, past, strict=True):
        traced[name] = np.zeros((2, array.shape[1], TRACED_PAST, array.shape[3]), np.float32)
    return inputs, outputs, traced


def _joined(tensors: Sequence[torch.Tensor]) -> Array:
    joined: Array = torch.cat(list(tensors)).numpy()
    return joined
