"""The networks of `sources.py` in PyTorch, each returned by a function, as `inferpool import` takes them."""

from __future__ import annotations

import torch
from torch import nn


def digits() -> nn.Module:
    """Grey pictures [rows, 1, 28, 28] to logits of ten digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(32 * 25, 10),
    )  # fmt: skip


def cifar10() -> nn.Module:
    """Pictures in colour [rows, 3, 32, 32] to logits of ten things."""
    layers: list[nn.Module] = []
    for channels, filters in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(channels, filters, 3, padding=1),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def reviews() -> nn.Module:
    """Tokens and their mask, both [rows, tokens], to logits of negative and positive."""
    return _MeanOfWords()


def news() -> nn.Module:
    """Tokens [rows, tokens] to logits of four topics, by a recurrent network in both directions."""
    return _Recurrent()


def words() -> nn.Module:
    """Eight tokens to logits of the next one."""
    return _NextWord()


def diabetes() -> nn.Module:
    """Ten measurements of a patient, scaled, to the disease's progression: linear regression."""
    return nn.Sequential(nn.Linear(10, 1))


def prices() -> nn.Module:
    """Eight measurements of a district to its median price."""
    return _Prices()


def closes() -> nn.Module:
    """Twenty closing prices to the next one."""
    return _Closes()


class _MeanOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10_000, 16)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[..., None].float()
        logits: torch.Tensor = self.head((self.words(input_ids) * mask).sum(1) / mask.sum(1))
        return logits


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8_000, 32)
        self.steps = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.steps(self.words(input_ids))[0].amax(1))
        return logits


class _NextWord(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1_500, 64)
        self.steps = nn.LSTM(64, 96, batch_first=True)
        self.head = nn.Linear(96, 1_500)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.steps(self.words(input_ids))[0][:, -1])
        return logits


class _Prices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("deviation", torch.ones(8))
        self.layers = nn.Sequential(
            nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def fit_scales(self, rows: torch.Tensor) -> None:
        """Take over the mean and the standard deviation of each column."""
        self.mean, self.deviation = rows.mean(0), rows.std(0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        price: torch.Tensor = 100_000 * self.layers((features - self.mean) / self.deviation)
        return price


class _Closes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.LSTM(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, closes: torch.Tensor) -> torch.Tensor:
        last = closes[:, -1:]
        seen = self.steps((20 * (closes / last - 1))[..., None])[0][:, -1]
        close: torch.Tensor = last * (1 + 0.01 * self.head(seen))
        return close
