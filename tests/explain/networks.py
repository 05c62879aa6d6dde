"""Networks of PyTorch with and without gradients."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

ROW: Final = [0.5, -1.0, 2.0, 1.5]


class Curved(nn.Module):
    """Two numbers for each row of four, by fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)
        with torch.no_grad():
            for number, weights in enumerate(self.parameters()):
                weights.copy_(torch.sin(torch.arange(weights.numel()) + number).reshape(weights.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.hidden(x)
        out: torch.Tensor = self.out(torch.tanh(hidden) + x[:, :1] * x[:, 1:2])
        return out


class Constant(nn.Module):
    """A number that is computed without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            total = x.sum(1, keepdim=True)
        return total + 1


class Jumps(nn.Module):
    """Jumps, between which only a slope is left: no number of steps adds up to them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.floor(x * 20).sum(1, keepdim=True) + 0.1 * x.sum(1, keepdim=True)


class Halved(nn.Module):
    """Halves of whole numbers."""

    def forward(self, n: torch.Tensor) -> torch.Tensor:
        return n.float() / 2


class Overwrites(nn.Module):
    """Writes to its input. The mean over the rows keeps it from being batched."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x *= 2.0
        return (x * scale + x.mean(0, keepdim=True)).sum(1)


class Hungry(nn.Module):
    """Doubles a number of each row. Its gradients need more memory than a process can address."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1].expand(x.shape[0], 1 << 50)[:, :1] * 2
