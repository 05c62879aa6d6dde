"""The report says what was measured, as data and as a page that runs nothing and asks no other host."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from inferpool.release.evaluate.metrics import (
    ClassAnswers,
    Estimate,
    NumberAnswers,
    class_metrics,
    estimate,
    number_metrics,
)
from inferpool.release.evaluate.report import write_report

MARKUP = "<script>alert('$x')</script>"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert name not in ("src", "onload"), (tag, name, value)

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(answers: ClassAnswers | NumberAnswers, **more: Any) -> dict[str, Any]:
    rows = len(answers.truth)
    metrics = number_metrics(answers) if isinstance(answers, NumberAnswers) else class_metrics(answers)
    return {
        "model": "m", "version": "3", "task": "some", "rows": rows, "data": "d.csv", "data_digest": "0" * 64,
        "date": "2026-01-01T00:00:00+00:00", "inferpool": "1", "slices": {},
        "metrics": estimate(metrics, rows),
        **more,
    }  # fmt: skip


def test_names_are_text_and_the_same_answers_give_the_same_file(tmp_path: Path) -> None:
    scores = np.array([[0.7, 0.3], [0.4, 0.6], [0.8, 0.2]])
    answers = ClassAnswers((MARKUP, "b"), np.array([0, 1, 1]), scores)
    groups = {"city": {MARKUP: {"rows": 3, "metrics": {"accuracy": Estimate(0.5, 0.1, 0.9)}}}}
    files = [write_report(tmp_path / each, report_of(answers, slices=groups), answers) for each in "ab"]
    text = files[0][1].read_text()
    assert text == files[1][1].read_text()
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2
    assert "Confusion" in page.text
    assert "0.5 (0.1 to 0.9)" in page.text
    data = json.loads(files[0][0].read_text())
    assert data["confusion"] == [[1, 0], [1, 1]]
    assert data["metrics"]["accuracy"]["value"] == 2 / 3
    assert sum(each["rows"] for each in data["calibration"]) == 3


def test_a_regression_has_plots_and_many_classes_a_table(tmp_path: Path) -> None:
    numbers = NumberAnswers(np.arange(9.0), np.arange(9.0) + 0.5)
    _, page = write_report(tmp_path, report_of(numbers), numbers)
    assert page.read_text().count("<svg") == 2
    names = tuple(f"word{number}" for number in range(50))
    scores = np.zeros((4, 50))
    scores[:, 7] = 1
    words = ClassAnswers(names, np.array([7, 3, 3, 4]), scores)
    data, page = write_report(tmp_path, report_of(words), words)
    first = json.loads(data.read_text())["most_confused"][0]
    assert first == {"truth": "word3", "answer": "word7", "rows": 2}
    assert "Most confused" in page.read_text()
