"""The networks of `sources.py` in PyTorch, each returned by a function, as `inferpool import` takes them."""

from __future__ import annotations

import torch
from torch import nn


def digits() -> nn.Module:
    """Pictures in the layout of MNIST, [rows, 28, 28, 1], to logits of ten digits."""
    return _Digits()


def diabetes() -> nn.Module:
    """Ten measurements of a patient, scaled, to the disease's progression: linear regression."""
    return nn.Sequential(nn.Linear(10, 1))


def reviews() -> nn.Module:
    """Sixteen numbers of words to logits of negative and positive."""
    return _Reviews()


class _Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(16 * 36, 10),
        )  # fmt: skip

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(image.permute(0, 3, 1, 2))
        return logits


class _Reviews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.words(tokens).mean(1))
        return logits
