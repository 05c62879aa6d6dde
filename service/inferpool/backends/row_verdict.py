"""The verdict of a backend that has read a model's graph: whether the rows of a batch are independent."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import NamedTuple

from inferpool.errors import Reason


class Independence(Enum):
    """The three verdicts."""

    INDEPENDENT = "independent"
    """No operation mixes rows."""
    MIXES = "mixes"
    """An operation lets rows depend on one another."""
    UNKNOWN = "unknown"
    """The graph cannot be read to its end."""


class Evidence(StrEnum):
    """The evidence that rows may share a run."""

    GRAPH = "graph"
    """Reading the graph; a short run has confirmed it."""
    RUNS = "runs"
    """Runs of rows alone and together. Such a model is audited while it serves."""


class RowVerdict(NamedTuple):
    """Whether the rows of a batch are independent of one another, and why or why not."""

    independence: Independence
    reason: Reason
