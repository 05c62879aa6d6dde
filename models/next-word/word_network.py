"""The network of the next-word model, in PyTorch: to be trained, and to be saved as TorchScript."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Final

import torch
from torch import nn

MAX_TOKENS: Final = 128
SIZE: Final = 128
LAYERS: Final = 2
HEADS: Final = 4
DROPOUT: Final = 0.3


class Attention(nn.Module):
    """Causal self-attention, its weights named as in `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * SIZE, SIZE)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * SIZE))
        self.out_proj = nn.Linear(SIZE, SIZE)
        self.heads = HEADS
        self.dropout = DROPOUT

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, size] in and out; no token sees a later one."""
        parts = nn.functional.linear(rows, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = parts.unflatten(-1, [3, self.heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """An encoder layer, its weights named as in `nn.TransformerEncoderLayer`."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.linear1 = nn.Linear(SIZE, 4 * SIZE)
        self.linear2 = nn.Linear(4 * SIZE, SIZE)
        self.norm1 = nn.LayerNorm(SIZE)
        self.norm2 = nn.LayerNorm(SIZE)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, size] in and out."""
        rows = self.norm1(rows + self.dropout(self.self_attn(rows)))
        wide = self.dropout(nn.functional.gelu(self.linear1(rows)))
        return self.norm2(rows + self.dropout(self.linear2(wide)))


class Network(nn.Module):
    """A causal language model that scores words with the vectors it reads them by."""

    def __init__(self, vocabulary: int, first_word: int) -> None:
        """Make a network that reads ids below `vocabulary` and answers those from `first_word` on."""
        super().__init__()
        self.words = nn.Embedding(vocabulary, SIZE)
        self.positions = nn.Embedding(MAX_TOKENS, SIZE)
        nn.init.normal_(self.words.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.02)  # at first, words count for more
        self.norm = nn.LayerNorm(SIZE)
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.bias = nn.Parameter(torch.zeros(vocabulary - first_word))
        self.first_word = first_word

    def everywhere(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of what follows each token: ids [rows, tokens] to [rows, tokens, words]."""
        rows = self.dropout(self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]]))
        for layer in self.layers:
            rows = layer(rows)
        return nn.functional.linear(rows, self.words.weight[self.first_word :], self.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of what follows each row's last token, by the name of the output."""
        last = attention_mask.sum(1) - 1
        everywhere = self.everywhere(input_ids)
        return {"logits": everywhere[torch.arange(input_ids.shape[0], device=last.device), last]}


def to_torchscript(network: Network, file: Path) -> None:
    """Save the network as TorchScript, which PyTorch calls deprecated and many still have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(file))
