"""The report of an evaluation: JSON for programs, and one HTML file with plots for people."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferpool.release.evaluate.metrics import (
    Answers,
    ClassAnswers,
    Estimate,
    NumberAnswers,
    RankedAnswers,
    are_probabilities,
    calibration,
    calibration_error,
    confusion,
)

JSON_FILE: Final = "evaluation.json"
HTML_FILE: Final = "evaluation.html"
METRIC_TITLES: Final = {
    "accuracy": "accuracy",
    "top_5_accuracy": "accuracy among the best five",
    "f1": "F1, mean of all classes",
    "auc": "area under the ROC curve",
    "log_loss": "log loss",
    "perplexity": "perplexity",
    "rmse": "root of the mean squared error",
    "mae": "mean absolute error",
    "mean_error": "mean error",
    "r2": "R²",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "precision_at_1": "precision@1",
    "precision_at_5": "precision@5",
    "precision_at_10": "precision@10",
    "mrr_at_10": "mean reciprocal rank@10",
    "ndcg_at_10": "normalized discounted cumulative gain@10",
}
"""Each metric by its name in JSON, in the order of tables."""
_MOST_SHOWN_CLASSES: Final = 40
"""With more classes the matrix of confusion shows the pairs that are confused most, as a table."""
_SHOWN_PAIRS: Final = 20
_MOST_POINTS: Final = 5000
_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.facts { opacity: .75; margin-top: .2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .8rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } thead th { font-weight: 600; }
.scroll { overflow-x: auto; } figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { max-width: 100%; height: auto; display: block; }
"""


def write_report(folder: Path, report: Mapping[str, Any], answers: Answers) -> tuple[Path, Path]:
    """Write `report`, which is JSON but for its estimates, and the plots of `answers` into `folder`.

    Returns the JSON and the HTML file; raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / JSON_FILE, folder / HTML_FILE
    details = _details(answers)
    data.write_text(json.dumps(_plain({**report, **details}), indent=1, allow_nan=False) + "\n", "utf-8")
    page.write_text(_page(report, details, answers), "utf-8")
    return data, page


def metric_lines(metrics: Mapping[str, Estimate]) -> list[str]:
    """Return a line for each metric: its title, its value and its interval."""
    width = max((len(METRIC_TITLES[name]) for name in metrics), default=0)
    return [
        f"{METRIC_TITLES[name]:{width}}  {number(each.value):>9}   95 %: {_interval(each)}"
        for name, each in metrics.items()
    ]


def number(value: float) -> str:
    """Return a number with four significant digits."""
    return "–" if math.isnan(value) else f"{value:.4g}"


def _interval(estimate: Estimate) -> str:
    return f"{number(estimate.low)} to {number(estimate.high)}"


def _details(answers: Answers) -> dict[str, Any]:
    if isinstance(answers, NumberAnswers):
        return {}
    if isinstance(answers, RankedAnswers):
        return {"first_relevant_rank": _first_ranks(answers)}
    found: dict[str, Any] = {"classes": list(answers.names)}
    if len(answers.names) <= _MOST_SHOWN_CLASSES:
        found["confusion"] = confusion(answers).tolist()
    else:
        found["most_confused"] = _most_confused(answers)
    if are_probabilities(answers.scores):
        bins = calibration(answers)
        found["calibration"] = [each._asdict() for each in bins]
        found["calibration_error"] = calibration_error(bins)
    return found


def _most_confused(answers: ClassAnswers) -> list[dict[str, Any]]:
    best = answers.scores.argmax(axis=1)
    wrong = best != answers.truth
    pairs, counts = np.unique(
        np.stack([answers.truth[wrong], best[wrong]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:_SHOWN_PAIRS]
    return [
        {
            "truth": answers.names[pairs[each][0]],
            "answer": answers.names[pairs[each][1]],
            "rows": int(counts[each]),
        }
        for each in order
    ]


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it: estimates as objects, and null for what is no number."""
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(report: Mapping[str, Any], details: Mapping[str, Any], answers: Answers) -> str:
    title = f"{report['model']} {report['version']}"
    facts = (
        f"{report['rows']} rows of {report['data']} (SHA-256 {report['data_digest'][:16]}…),"
        f" {report['task']}, {report['date']}, inferpool {report['inferpool']}"
    )
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>Evaluation of {_text(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style>",
        f'<main><h1>{_text(title)}</h1><p class="facts">{_text(facts)}</p>',
        "<h2>Metrics</h2>",
        _metrics_table("Metrics", report["metrics"]),
    ]
    against = report.get("against")
    if against:
        beside = f"Beside {against['model']} {against['version']}"
        parts += [
            f"<h2>{_text(beside)}</h2>",
            "<p>How much larger each metric is here, on the same rows.</p>",
            _metrics_table(beside, against["differences"]),
        ]
    for column, groups in report["slices"].items():
        parts += [f"<h2>By {_text(column)}</h2>", _slice_table(f"By {column}", groups)]
    parts += [
        f"<h2>{_text(heading)}</h2><figure>{drawn}</figure>" for heading, drawn in _plots(details, answers)
    ]
    if details.get("most_confused"):
        parts += ["<h2>Most confused</h2>", _table(
            "Most confused", ("truth", "answer", "rows"),
            [(each["truth"], each["answer"], str(each["rows"])) for each in details["most_confused"]],
        )]  # fmt: skip
    return "\n".join([*parts, "</main></html>", ""])


def _metrics_table(label: str, metrics: Mapping[str, Estimate]) -> str:
    rows = [
        (METRIC_TITLES[name], number(each.value), f"{number(each.low)} to {number(each.high)}")
        for name, each in metrics.items()
    ]
    return _table(label, ("metric", "value", "95 % interval"), rows)


def _slice_table(label: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    names = [each for each in METRIC_TITLES if any(each in group["metrics"] for group in groups.values())]
    rows = []
    for value, group in groups.items():
        cells = [
            f"{number(each.value)} ({number(each.low)} to {number(each.high)})" if each else "–"
            for each in map(group["metrics"].get, names)
        ]
        rows.append((value, str(group["rows"]), *cells))
    return _table(label, ("value", "rows", *(METRIC_TITLES[each] for each in names)), rows)


def _table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, which the keyboard can scroll on a narrow screen."""
    cells = "".join(f'<th scope="col">{_text(each)}</th>' for each in head)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(each)}</td>" for each in row[1:])
        + "</tr>"
        for row in rows
    )
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}">'
    return f"{region}<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(text: str) -> str:
    return html.escape(text)


def _plots(details: Mapping[str, Any], answers: Answers) -> list[tuple[str, str]]:
    """Return headings and plots as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # A name with dollar signs is no formula, and the same answers give the same file.
    settings: Any = {"text.parse_math": False, "svg.hashsalt": "inferpool", "font.size": 10}
    found = []
    with mpl.rc_context(settings):
        for heading, draw, size in _drawings(details, answers):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.subplots())
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            svg = file.getvalue().partition("<svg")[2]
            # Its letters are drawn, so that a screen reader has only this name.
            found.append((heading, f'<svg role="img" aria-label="{_text(heading)}"{svg}'))
    return found


def _drawings(details: Mapping[str, Any], answers: Answers) -> list[tuple[str, Any, Any]]:
    if isinstance(answers, RankedAnswers):
        ranks = details["first_relevant_rank"]
        return [("Rank of the first relevant document", lambda axes: _draw_ranks(axes, ranks), (6.5, 3.2))]
    if isinstance(answers, NumberAnswers):
        return [
            ("Predicted beside true", lambda axes: _draw_points(axes, answers), (5.5, 5.0)),
            ("Errors", lambda axes: _draw_errors(axes, answers), (6.5, 3.2)),
        ]
    drawings: list[tuple[str, Any, Any]] = []
    if "confusion" in details:
        side = 2.5 + 0.45 * len(answers.names)
        drawings.append(
            (
                "Confusion",
                lambda axes: _draw_confusion(axes, details["confusion"], answers.names),
                (side, side),
            )
        )
    if "calibration" in details:
        error = number(details["calibration_error"])
        drawings.append(
            (
                f"Calibration: error {error}",
                lambda axes: _draw_calibration(axes, details["calibration"]),
                (5.0, 4.5),
            )
        )
    return drawings


def _draw_confusion(axes: Any, matrix: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    counts = np.asarray(matrix)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=90 if max(map(len, shown)) > 3 else 0)
    axes.set_yticks(range(len(names)), shown)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)


def _draw_calibration(axes: Any, bins: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    axes.plot([each["score"] for each in bins], [each["right"] for each in bins], marker="o")
    for each in bins:
        axes.annotate(
            str(each["rows"]),
            (each["score"], each["right"]),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize=8,
        )
    axes.set(
        xlim=(0, 1.02), ylim=(0, 1.05), xlabel="best score, mean of the bin", ylabel="share that is right"
    )


def _draw_points(axes: Any, answers: NumberAnswers) -> None:
    step = max(1, len(answers.truth) // _MOST_POINTS)
    truth, predicted = answers.truth[::step], answers.predicted[::step]
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    axes.plot(ends, ends, color="grey", linewidth=1, linestyle="--")
    axes.scatter(truth, predicted, s=10, alpha=0.5, linewidths=0)
    axes.set(xlabel="true", ylabel="predicted")


def _first_ranks(answers: RankedAnswers) -> dict[str, int]:
    """Return how many queries have their first relevant document at each rank, from 1, or at none."""
    hits = answers.grades > 0
    first = np.where(hits.any(axis=1), hits.argmax(axis=1), hits.shape[1])
    counts = np.bincount(first, minlength=hits.shape[1] + 1)
    return {
        **{str(rank + 1): int(count) for rank, count in enumerate(counts[:-1])},
        "none": int(counts[-1]),
    }


def _draw_ranks(axes: Any, ranks: Mapping[str, int]) -> None:
    axes.bar(list(ranks), list(ranks.values()))
    axes.set(xlabel="rank", ylabel="queries")


def _draw_errors(axes: Any, answers: NumberAnswers) -> None:
    axes.hist(answers.predicted - answers.truth, bins="auto")
    axes.axvline(0, color="grey", linewidth=1, linestyle="--")
    axes.set(xlabel="predicted − true", ylabel="rows")
