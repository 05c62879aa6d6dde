"""Random networks of row-wise and mixing operations, and what running them shows of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import nn

from tests.backends.torch.networks import quiet

ROWS = 3
"""Rows that run together."""
Tensor: TypeAlias = torch.Tensor
Action: TypeAlias = Callable[[Tensor, list[Tensor]], Tensor]
SHAPES = ((3, 4), (2, 3), (4,), (3, 2, 2), (1, 3), (3, 3))
"""The shapes of a row: some have as many elements on an axis as there are rows."""

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "abs": torch.abs,
    "clone": torch.clone,
    "negative": lambda x: -x,
    "write": lambda x: (x * 1).mul_(2),
    "clamp": lambda x: x.clamp(-1, 2),
    "standard": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "instance": nn.functional.instance_norm,
    "all maximum": lambda x: x / (x.max() + 1e-3),
    "contrast": lambda x: x - x.mean(),
    "dropped": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "count": lambda x: x / x.shape[0],
    "numbered": lambda x: x + torch.arange(x.shape[0]).reshape(-1, *[1] * (x.dim() - 1)),
    "zeros": lambda x: torch.zeros(x.shape) + 0.5,
    "ones": lambda x: x.new_ones(x.shape[0], 2),
    "like": lambda x: torch.ones_like(x) * 0.1,
    "picked": lambda x: x[torch.arange(x.shape[0]), x.flatten(1).sum(1).gt(0).long() * 0],
    "own": lambda x: x[torch.arange(x.shape[0])],
    "masked": lambda x: torch.where(x > 0.1, x, torch.zeros(())),
    "mask": lambda x: x.masked_fill(x > 0.1, 0.0),
    "put": lambda x: torch.index_put(x, (x > 0.1,), torch.zeros(())),
    "sized": lambda x: x.view(x.shape[0], -1),
    "merged": lambda x: x.reshape(-1, x.shape[-1]),
    "halved": lambda x: x.reshape(-1, 2),
    "one": lambda x: x.reshape(1, -1),
    "heads": lambda x: x.flatten(1).unsqueeze(-1).transpose(1, 2),
    "matrix": lambda x: x @ x.transpose(-1, -2),
    "gram": lambda x: x.transpose(-1, -2) @ x,
    "self": lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
    "causal": lambda x: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
    "squeezed": torch.squeeze,
    "turned": lambda x: x.transpose(0, -1),
    "sorted": lambda x: x.sort(-1).values,
    "first sorted": lambda x: x.sort(0).values,
    "expanded": lambda x: torch.full((1, 1), 0.3).expand(x.shape[0], 2),
    "repeated": lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
    "interleaved": lambda x: x.repeat_interleave(2, dim=0).reshape(x.shape[0], -1),
    "rolled": lambda x: x.roll(1, 0),
    "all rolled": lambda x: x.roll(1),
    "unique": lambda x: torch.unique(x.round()),
    "tril": torch.tril,
    "diagonal": lambda x: x.diagonal(0, 0, -1),
    "row written": lambda x: _written(x),
    "column written": lambda x: _written(x.transpose(0, -1)),
    "pooled": lambda x: nn.functional.avg_pool1d(x, 2, 1),
    "shape": lambda x: x * float(x.shape[-1]),
    "stacked": lambda x: torch.stack([x, x * 2], 1).flatten(1),
    "all stacked": lambda x: torch.stack([x, x * 2], 0).flatten(0, 1),
    "distance": lambda x: torch.cdist(x, x),
    "similar": lambda x: nn.functional.cosine_similarity(x, x.flip(0), dim=-1),
    "bags": lambda x: nn.functional.embedding_bag(
        (x.flatten(1) > 0).long(), torch.arange(8.0).reshape(4, 2), mode="sum"
    ),
    "hot": lambda x: nn.functional.one_hot((x > 0).long(), 3).float(),
    "hot as needed": lambda x: nn.functional.one_hot((x > 30).long()).float(),
    "centred": lambda x: x - x.mean(0, keepdim=True),
    "decided": lambda x: torch.cond(x.sum() > 0, lambda y: y.relu(), lambda y: -y, (x,)),
    "fourier": lambda x: torch.fft.fft(x, dim=-1).abs(),
    "all fourier": lambda x: torch.fft.fft(x, dim=0).abs(),
    "bucketed": lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0])).float(),
    "padded": lambda x: nn.functional.pad(x, (1, 1)),
    "first padded": lambda x: nn.functional.pad(x, (*[0, 0] * (x.dim() - 1), 1, 0))[1:],
}


def _written(x: Tensor) -> Tensor:
    """Return a copy in which the first of one axis is written."""
    y = x.clone()
    y[0] = y[0] * 2 + y[-1]
    return y


@st.composite
def actions(draw: Callable[[Any], Any]) -> tuple[str, Action]:
    """An operation, with a text that describes it."""
    kind = draw(st.integers(0, 15))
    axis, other = draw(st.integers(-3, 2)), draw(st.integers(-2, 3))
    seed = draw(st.integers(0, 99))

    def weights(*shape: int) -> Tensor:
        count = shape[0] * shape[1]
        return torch.sin(torch.arange(count) * 1.7 + seed).reshape(shape)

    if kind == 0:
        names = ("amax", "amin", "mean", "sum", "logsumexp", "std")
        name, keep = draw(st.sampled_from(names)), draw(st.booleans())
        return f"{name} {axis} {keep}", lambda x, _: getattr(x, name)(axis, keepdim=keep)
    if kind == 1:
        name = draw(st.sampled_from(("softmax", "log_softmax", "cumsum", "argsort", "cummax")))
        return f"{name} {axis}", lambda x, _: _first(getattr(x, name)(axis)).float()
    if kind == 2:
        name = draw(st.sampled_from(("add", "mul", "sub", "maximum")))
        return f"{name} with {other}", lambda x, seen: getattr(torch, name)(x, seen[other % len(seen)])
    if kind == 3:
        return f"transpose {axis} {other}", lambda x, _: x.transpose(axis, other)
    if kind == 4:
        return f"flatten {axis}", lambda x, _: x.flatten(axis)
    if kind == 5:
        start, end = draw(st.sampled_from((0, 0, 1))), draw(st.sampled_from((1, 2, -1, 2**40)))
        return (
            f"slice {axis} {start} {end}",
            lambda x, _: (
                x.narrow(axis, start, 1) if end == 1 else (torch.ops.aten.slice.Tensor(x, axis, start, end))
            ),
        )
    if kind == 6:
        return f"select {axis} {other}", lambda x, _: x.select(axis, min(other, 0))
    if kind == 7:
        return f"linear {seed}", lambda x, _: nn.functional.linear(x, weights(2, x.shape[-1]))
    if kind == 8:
        return f"cat {axis} {other}", lambda x, seen: torch.cat([x, seen[other % len(seen)]], axis)
    if kind == 9:
        return f"unsqueeze {axis}", lambda x, _: x.unsqueeze(axis)
    if kind == 10:
        return f"layer norm {axis}", lambda x, _: nn.functional.layer_norm(x, x.shape[axis:])
    if kind == 11:
        return f"matmul {other}", lambda x, seen: x @ seen[other % len(seen)]
    if kind == 12:
        return f"index {axis} {seed}", lambda x, _: x.index_select(axis, torch.tensor([0, seed % 2]))
    if kind == 13:
        return f"flip {axis}", lambda x, _: x.flip(axis)
    name = draw(st.sampled_from(sorted(UNARY)))
    return name, lambda x, _: UNARY[name](x)


def _first(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, tuple) else value
    return found


class Network(nn.Module):
    """Applies actions one after the other; each may use what the ones before it made."""

    def __init__(self, chosen: list[tuple[str, Action]]) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for _, action in self.chosen:
            seen.append(action(seen[-1], seen))
        return seen[-1]


def rows_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """Rows in a range of their own each, so that whatever rows share shows."""
    ranges = torch.tensor([1.0, 40.0, 0.02]).reshape(ROWS, *[1] * len(shape))
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed)) * ranges


@st.composite
def random_networks(draw: Callable[[Any], Any]) -> tuple[Network, Tensor]:
    """A network of a few operations, and rows that it runs together."""
    x = rows_of(draw(st.sampled_from(SHAPES)), draw(st.integers(0, 999)))
    chosen: list[tuple[str, Action]] = []
    for _ in range(draw(st.integers(1, 5))):
        action = draw(actions())
        try:
            with torch.no_grad(), quiet():
                result = Network([*chosen, action])(x)
        except Exception:  # noqa: BLE001 - an operation that cannot run on this value is left out
            continue
        if 0 < result.numel() < 2000 and result.dim() and result.dtype is torch.float32:
            chosen.append(action)
    return Network(chosen), x


def rows_are_independent(run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether each row is answered alone as it is in company, whatever the company."""
    with quiet():  # the deviation of a single number is NaN, with a warning that would be an error
        return _rows_are_independent(run, x)


def _rows_are_independent(run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    try:
        alone = [run(x[row : row + 1]) for row in range(len(x))]
    except Exception:  # noqa: BLE001 - a model that cannot run a single row has no answer to compare with
        return False
    for order in ([0, 1, 2], [2, 1], [1, 0, 0], [0, 2]):
        try:
            together = run(x[order])
        except Exception:  # noqa: BLE001 - a row that fails in company is answered otherwise than alone
            return False
        for index, row in enumerate(order):
            mine = alone[row]
            if mine.dim() < 1 or len(mine) != 1 or together.shape != (len(order), *mine.shape[1:]):
                return False
            if not torch.allclose(together[index], mine[0], rtol=1e-3, atol=1e-5, equal_nan=True):
                return False
    return True
