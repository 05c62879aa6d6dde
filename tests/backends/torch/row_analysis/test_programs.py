"""Exported programs and TorchScript are read: what mixes rows is named, what keeps them apart is proven."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inferpool.backends.base import LoadOptions, TensorHint
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.backends.torch.backend import PyTorchBackend
from inferpool.backends.torch.row_analysis.exported import operations_without_rule
from inferpool.backends.torch.row_analysis.rules import RULES
from inferpool.backends.torch.row_analysis.sizes import size_of, symbol_of
from torch import nn

from tests.backends.torch.networks import Centred, Chosen, Collatz, digits, save_exported, save_scripted

F = nn.functional
ROW = torch.randn(3, 4)
IMAGE = torch.randn(3, 3, 8, 8)
TOKENS = torch.randint(0, 9, (3, 5))
TRUSTED = LoadOptions(trusted=True, inputs=(TensorHint("x", "FP32", (-1, 4)),))


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def read(file: Path, options: LoadOptions | None = None) -> RowVerdict:
    return PyTorchBackend().read_rows(file, options or LoadOptions())


def exported(folder: Path, module: nn.Module, x: torch.Tensor) -> RowVerdict:
    return read(save_exported(folder / "model.pt2", module, x))


MIXING: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, str]] = {
    "one maximum": (lambda x: x / x.max(), ROW, "max takes one value over the whole batch"),
    "over the rows": (lambda x: x - x.mean(0, keepdim=True), ROW, "mean takes one value over the rows"),
    "batch norm that trains": (
        lambda x: F.batch_norm(x, None, None, training=True),
        ROW,
        "batch_norm normalises by statistics of the batch",
    ),
    "running sum": (lambda x: x.cumsum(0), ROW, "cumsum runs along the rows"),
    "reversed": (lambda x: x.flip(0), ROW, "flip moves the rows"),
    "rolled": (lambda x: x.roll(1, 0), ROW, "roll moves the rows"),
    "rolled through": (lambda x: x.roll(1), ROW, "roll moves elements from row to row"),
    "sorted": (lambda x: x.sort(0).values, ROW, "sort sorts the rows"),
    "softmax": (lambda x: x.softmax(0), ROW, "softmax normalises over the rows"),
    "each with each": (lambda x: x @ x.T, ROW, "matmul multiplies each row with each"),
    "summed by a product": (lambda x: x.T @ x, ROW, "matmul sums over the rows"),
    "attention over rows": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        ROW,
        "scaled_dot_product_attention multiplies each row with each",
    ),
    "divided by the rows": (lambda x: x / x.shape[0], ROW, "div computes with the number of rows"),
    "numbered": (
        lambda x: x + torch.arange(x.shape[0])[:, None],
        ROW,
        "add computes with the number of rows",
    ),
    "first row": (lambda x: x - x[0], ROW, "select picks rows by their position"),
    "bags by offsets": (
        lambda x: F.embedding_bag(x.flatten(), torch.ones(9, 2), torch.arange(x.shape[0])),
        TOKENS,
        "embedding_bag pools indices of all rows by their offsets",
    ),
    "condition": (
        lambda x: torch.cond(x.sum() > 0, lambda y: y.relu(), lambda y: -y, (x,)),
        ROW,
        "sum takes one value over the whole batch",
    ),
    "squeezed": (lambda x: x.squeeze(), ROW, "a single row loses its row axis"),
    "same for all": (lambda x: torch.ones(2, 2), ROW, "is the same for all rows"),
    "written over": (lambda x: _first_row_written(x), ROW, "select picks rows by their position"),
}

INDEPENDENT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "softmax": (lambda x: x.softmax(-1), ROW),
    "heads": (lambda x: x.view(x.shape[0], -1, 2).transpose(1, 2).flatten(1), ROW),
    "merged and cut again": (lambda x: (x.reshape(-1, 2) * 2).reshape(-1, 4), ROW),
    "written in place": (lambda x: torch.relu_(x * 2).add_(1), ROW),
    "column written": (lambda x: _first_column_written(x), ROW),
    "own row picked": (lambda x: x[torch.arange(x.shape[0]), x.argmax(1)][:, None], ROW),
    "bags of one length": (lambda x: F.embedding_bag(x, torch.ones(9, 2)), TOKENS),
    "instance norm": (lambda x: F.instance_norm(x), IMAGE),
    "group norm": (lambda x: F.group_norm(x, 3), IMAGE),
    "interpolated": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), IMAGE),
    "dropout that rests": (lambda x: F.dropout(x, 0.5, training=False), ROW),
    "a token for each row": (lambda x: torch.cat([torch.zeros(1, 1).expand(x.shape[0], 1), x], 1), ROW),
    "zeros for each row": (lambda x: torch.cat([torch.zeros(x.shape[0], 1), x], 1), ROW),
    "mask of its own": (lambda x: x.masked_fill(x > 0.1, 0.0), ROW),
    "joined and summed": (lambda x: torch.stack([x, x * 2]).sum(0), ROW),
}


def _first_row_written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[0] = 1
    return y


def _first_column_written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1] * 2
    return y


@pytest.mark.parametrize(("function", "x", "reason"), MIXING.values(), ids=MIXING.keys())
def test_a_program_that_mixes_rows_is_found_out(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, reason: str, tmp_path: Path
) -> None:
    verdict = exported(tmp_path, Of(function), x)
    assert verdict.independence is Independence.MIXES, verdict
    assert reason in verdict.reason


@pytest.mark.parametrize(("function", "x"), INDEPENDENT.values(), ids=INDEPENDENT.keys())
def test_a_program_of_independent_rows_is_proven(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tmp_path: Path
) -> None:
    assert exported(tmp_path, Of(function), x).independence is Independence.INDEPENDENT


def test_the_reason_names_the_module(tmp_path: Path) -> None:
    verdict = exported(tmp_path, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), ROW)
    assert verdict.independence is Independence.MIXES
    assert re.search(r'batch_norm "1"|changes the state of the model', verdict.reason)


def test_dropout_that_trains_is_told_apart(tmp_path: Path) -> None:
    verdict = exported(tmp_path, Of(lambda x: F.dropout(x, 0.5, training=True)), ROW)
    assert verdict == (Independence.UNKNOWN, "dropout drops elements at random")


class Counts(nn.Module):
    """Counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs.add_(1)
        return x + self.runs


def test_a_program_that_changes_its_state_mixes(tmp_path: Path) -> None:
    verdict = exported(tmp_path, Counts(), ROW)
    assert verdict.independence is Independence.MIXES
    assert "changes the state of the model with each run" in verdict.reason


def test_picked_rows_are_told_apart(tmp_path: Path) -> None:
    verdict = exported(tmp_path, Chosen(), ROW)
    assert verdict.independence is Independence.MIXES
    assert verdict.reason == "nonzero lists the elements of all rows one after another"


def test_an_operation_without_a_rule_is_named(tmp_path: Path) -> None:
    file = save_exported(tmp_path / "model.pt2", Of(lambda x: torch.renorm(x, 2, 0, 1.0)), ROW)
    assert read(file) == (Independence.UNKNOWN, "renorm: no rule for this operation")
    with zipfile.ZipFile(file) as archive:
        (graph,) = (name for name in archive.namelist() if "/models/" in name)
        assert operations_without_rule(json.loads(archive.read(graph))) == {"renorm"}


def test_reading_a_program_needs_no_trust_and_no_weights(tmp_path: Path) -> None:
    whole = save_exported(tmp_path / "whole.pt2", digits(), torch.randn(3, 1, 8, 8))
    bare = tmp_path / "bare.pt2"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bare, "w") as target:
        for name in source.namelist():
            if "/weights/" not in name:
                target.writestr(name, source.read(name))
    assert read(bare, LoadOptions(trusted=False)).independence is Independence.INDEPENDENT


def test_a_file_that_is_no_archive_is_unknown(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(b"nothing")
    assert read(file).independence is Independence.UNKNOWN


def test_a_trusted_script_is_proven(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    file = save_scripted(tmp_path / "model.pt", network)
    options = LoadOptions(trusted=True, inputs=(TensorHint("input", "FP32", (-1, 4)),))
    assert read(file, options).independence is Independence.INDEPENDENT


def test_a_script_that_mixes_rows_is_found_out(tmp_path: Path) -> None:
    verdict = read(save_scripted(tmp_path / "model.pt", Centred()), TRUSTED)
    assert verdict == (Independence.MIXES, "mean takes one value over the rows")


def test_a_script_that_is_not_trusted_is_not_loaded(tmp_path: Path) -> None:
    verdict = read(save_scripted(tmp_path / "model.pt", Centred()), LoadOptions(inputs=TRUSTED.inputs))
    assert verdict.independence is Independence.UNKNOWN


def test_a_script_that_loops_over_its_data_is_never_called_independent(tmp_path: Path) -> None:
    file = save_scripted(tmp_path / "model.pt", Collatz())
    options = LoadOptions(trusted=True, inputs=(TensorHint("n", "INT64", (-1, 1)),))
    assert read(file, options).independence is not Independence.INDEPENDENT


def test_sizes_are_read_in_any_order() -> None:
    text = "Mul(Symbol('s1', integer=True), Add(Symbol('s0', positive=True), Integer(-2)))"
    expanded = "Add(Mul(Symbol('s1'), Symbol('s0')), Mul(Integer(-2), Symbol('s1')))"
    assert size_of(text, {"s1"}) == size_of(expanded, {"s1"})
    assert size_of(text, {"s1"}).row_factors == 1
    assert symbol_of("Symbol('s7', integer=True)") == "s7"
    assert symbol_of("Mul(Integer(2), Symbol('s7'))") is None
    with pytest.raises(ValueError, match="no size"):
        size_of("__import__('os').abort()", set())


def test_every_rule_belongs_to_an_operation_that_exists() -> None:
    known = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert not {name for name in RULES if "." not in name and name not in known and f"{name}_" not in known}
