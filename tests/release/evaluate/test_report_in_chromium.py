"""The page of an evaluation in a real browser: on a light screen, and on a dark and narrow one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from inferpool.release.evaluate.metrics import (
    ClassAnswers,
    Estimate,
    NumberAnswers,
    RankedAnswers,
    estimate,
    ranked_metrics,
)
from inferpool.release.evaluate.report import write_report

from tests.browsers import SCREENS, check_page, chromium, new_page
from tests.release.evaluate.test_report import MARKUP, report_of

# `tests.browsers` skips this module if there is no browser.
from playwright.sync_api import expect  # isort: skip


def write_reports(folder: Path) -> dict[Path, list[str]]:
    """Write a report of each kind; the names of the plots by page."""
    source = np.random.default_rng(0)
    truth = source.integers(0, 10, 300)
    scores = source.dirichlet(np.ones(10), 300)
    scores[np.arange(300), truth] += 0.4
    names = (MARKUP, *(f"class {number}" for number in range(1, 10)))
    classes = ClassAnswers(names, truth, scores / scores.sum(axis=1, keepdims=True))
    numbers = NumberAnswers(source.normal(100, 20, 300), source.normal(100, 20, 300))
    words = ClassAnswers(tuple(f"word{number}" for number in range(50)), truth, source.random((300, 50)))
    ranked = RankedAnswers(source.integers(0, 2, (20, 10)), source.integers(5, 9, 20), np.full(20, 5.0))
    every = {name: Estimate(0.5, 0.1, 0.9) for name in ("accuracy", "top_5_accuracy", "f1", "auc")}
    slices = {"city": {MARKUP: {"rows": 9, "metrics": every}, "Bern": {"rows": 1, "metrics": {}}}}
    against = {"model": "m", "version": "2", "differences": every}
    found: dict[Path, list[str]] = {}
    for name, answers, plots, more in (
        ("classes", classes, ["Confusion", "Calibration"], {"slices": slices, "against": against}),
        ("numbers", numbers, ["Predicted beside true", "Errors"], {}),
        ("words", words, [], {}),
    ):
        found[write_report(folder / name, report_of(answers, **more), answers)[1]] = plots  # type: ignore[arg-type]
    report = report_of(numbers) | {"rows": 20, "metrics": estimate(ranked_metrics(ranked), 20)}
    found[write_report(folder / "ranks", report, ranked)[1]] = ["Rank of the first relevant document"]
    return found


def test_a_report_is_for_people_with_any_screen_and_with_a_screen_reader(tmp_path: Path) -> None:
    pages, faults = write_reports(tmp_path), list[str]()
    with chromium() as browser:
        for options in SCREENS:
            context = browser.new_context(**options)
            for file, plots in pages.items():
                page = new_page(context, faults)
                page.goto(file.as_uri())
                check_page(page, f"{file.parent.name} {options}")
                expect(page.get_by_role("table").first).to_be_visible()
                for plot in plots:
                    expect(page.get_by_role("img", name=plot)).to_be_visible()
            context.close()
    assert faults == []
