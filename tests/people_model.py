"""A small model with inputs of different datatypes, as tables have columns."""

from __future__ import annotations

from pathlib import Path

from onnx import helper

from tests.onnx_models import value, write_model


def write_people(repository: Path, name: str = "people") -> Path:
    """Write a model that gives back ages, doubled, and cities, one value a row; return the repository."""
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["age", "age"], ["twice"]),
            helper.make_node("Identity", ["city"], ["town"]),
        ],
        "people",
        [value("age", "FP32", ["rows", 1]), value("city", "BYTES", ["rows"])],
        [value("twice", "FP32", ["rows", 1]), value("town", "BYTES", ["rows"])],
    )
    write_model(repository, name, graph)
    return repository
