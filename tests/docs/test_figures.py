"""The figures of the README are those that `scripts/bench peers` has written."""

from __future__ import annotations

import re

import pytest

from tests.docs import pages
from tests.docs.pages import README, ROOT

RESULTS = (ROOT / "benchmarks" / "results" / "peers.md").read_text(encoding="utf-8")
FIRST_COLUMN = "workload, connections"
ROWS = {
    "a row of 64 floats as JSON, 64": ("A row of 64 floats, JSON", "64", 0),
    "the same, 1: median latency in ms": ("A row of 64 floats, JSON", "1", 1),
    "an image of 150,528 floats as JSON, 16": ("An image of 150,528 floats, JSON", "16", 0),
    "an image in binary form, 16": ("An image of 602,112 bytes, binary", "16", 0),
    "an image as JPEG, 16": ("An image of 224×224 as JPEG", "16", 0),
    "ResNet-50, binary, 16": ("ResNet-50 (random weights), binary", "16", 0),
    "MiniLM, sentences, 64": ("MiniLM, sentences of 3 to 30 words", "64", 0),
}
"""By row of the README: the section of the results, the connections, and which of a cell's three figures."""


def result(section: str, server: str, connections: str, figure: int) -> str:
    """Return a figure of the results; a dash if the server has none."""
    lines = RESULTS.partition(f"\n## {section}\n")[2].partition("\n## ")[0].strip().splitlines()
    columns = [cell.strip().partition(":")[0] for cell in lines[0].strip("|").split("|")]
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == server and len(cells) == len(columns):
            return re.sub(r" ±.*", "", cells[columns.index(connections)].split(" · ")[figure])
    return "–"


@pytest.mark.parametrize("row", pages.table(README, FIRST_COLUMN), ids=lambda row: row[0])
def test_a_row_of_the_readme_is_of_the_results(row: list[str]) -> None:
    header = README.read_text(encoding="utf-8").partition(f"| {FIRST_COLUMN} |")[2].splitlines()[0]
    servers = [cell.strip() for cell in header.strip("|").split("|")]
    section, connections, figure = ROWS[row[0]]
    assert row[1:] == [result(section, server, connections, figure) for server in servers]


def test_the_card_of_resnet50_tells_the_gain_of_the_table_of_forms() -> None:
    tables = (ROOT / "benchmarks" / "results" / "optimise.md").read_text(encoding="utf-8")
    lines = tables.partition("\n## resnet50\n")[2].splitlines()
    columns, form = (
        next(re.split(" {2,}", line) for line in lines if line.startswith(name))
        for name in ("form ", "int8-static ")
    )
    gain = form[columns.index("gain")]
    card = (ROOT / "models" / "resnet50" / "README.md").read_text(encoding="utf-8")
    assert f"`int8-static` is three times as fast ({gain})" in card
