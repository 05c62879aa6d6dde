"""Counts how many nodes of models the row analysis has rules for: `python benchmarks/row_rules.py FOLDER`.

Reads every `.onnx` and `.pt2` file in the folder and below. Files whose names start alike, up to the first
underscore, are one line of the table. The operations without a rule are listed under the table.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from inferpool.backends.onnx.row_analysis import analysis
from inferpool.backends.onnx.row_analysis.graph_file import read_graph
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.backends.torch.row_analysis import exported
from onnx import AttributeProto, GraphProto, inliner


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="Count the nodes of models that the row analysis has rules for."
    )
    parser.add_argument("folder", type=Path, help="a folder with .onnx and .pt2 files")
    verdicts: defaultdict[str, Counter[Independence]] = defaultdict(Counter)
    nodes: defaultdict[str, Counter[bool]] = defaultdict(Counter)
    missing: Counter[str] = Counter()
    for file in sorted(parser.parse_args().folder.rglob("*")):
        if file.suffix not in (".onnx", ".pt2"):
            continue
        family = f"{file.stem.partition('_')[0]} {file.suffix}"
        verdict, operations, without = of_onnx(file) if file.suffix == ".onnx" else of_program(file)
        verdicts[family][verdict.independence] += 1
        for operation in operations:
            nodes[family][operation not in without] += 1
            missing[operation] += operation in without
    print("| models | files | independent | mixes | unknown | nodes | with a rule |")
    print("|---|---|---|---|---|---|---|")
    for family, found in verdicts.items():
        count = nodes[family].total()
        counts = " | ".join(str(found[each]) for each in Independence)
        share = nodes[family][True] / count if count else 1
        print(f"| {family} | {found.total()} | {counts} | {count} | {share:.1%} |")
    for operation, count in (+missing).most_common():
        print(f"without a rule: {operation} ({count})")


def of_onnx(file: Path) -> tuple[RowVerdict, list[str], set[str]]:
    """Return the verdict on an ONNX file, the operations of its nodes, and those without a rule."""
    model = read_graph(file)
    graph = (inliner.inline_local_functions(model) if model.functions else model).graph
    return analysis.analyse_file(file), list(_operations(graph)), analysis.operations_without_rule(model)


def of_program(file: Path) -> tuple[RowVerdict, list[str], set[str]]:
    """Return the same for an exported program of PyTorch."""
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if "/models/" in name and name.endswith(".json"))
        program = json.loads(archive.read(name))
    without = exported.operations_without_rule(program)
    return exported.analyse(program), list(exported.operations_of(program)), without


def _operations(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield analysis.operation_of(node)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _operations(attribute.g)


if __name__ == "__main__":
    main()
