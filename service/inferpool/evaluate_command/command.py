"""The command `inferpool evaluate`: a model and rows with known answers in, metrics and a report out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from inferpool import __version__
from inferpool.command_output import print_lines
from inferpool.errors import ConfigError
from inferpool.predict_command.command import local_settings
from inferpool.settings_sources import CHECK_SETTINGS, add_flags
from inferpool.system.install_hints import install_command

RETRIEVAL: Final = "retrieval"
TASKS: Final = ("classification", "regression", "next-word", RETRIEVAL)
_LEAST_SLICE_ROWS: Final = 2
_FLAGS_OF_ROWS: Final = {
    "target": "--target", "output": "--output", "slices": "--slice", "ignored": "--ignore",
}  # fmt: skip


def add_evaluate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `inferpool`."""
    command = commands.add_parser(
        "evaluate",
        help="measure how good a model's answers are",
        description="Ask MODEL about every row of --data, whose right answers are known, and print the"
        " metrics of its task with 95 % intervals. --report writes them as JSON, and as a page with plots."
        " DATA is CSV, Parquet, JSON lines, npz, a folder that has a folder of pictures for each class, or a"
        " folder with queries, documents and which of them are relevant.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="path of a model")
    command.add_argument(
        "--data", required=True, type=Path, metavar="DATA", help="rows with their right answers"
    )
    command.add_argument("--target", metavar="NAME", help="column or array of the right answers [target]")
    command.add_argument(
        "--task",
        choices=TASKS,
        help="what the model does [classification if it has labels, retrieval if the data are queries and"
        " documents, else regression]",
    )
    command.add_argument("--output", metavar="NAME", help="the output with the answers [the first that fits]")
    command.add_argument("--version", dest="model_version", metavar="VERSION", help="a version, or its label")
    command.add_argument(
        "--against",
        metavar="OTHER",
        help="another served version, or the path of another model, to compare with",
    )
    command.add_argument(
        "--slice",
        dest="slices",
        metavar="COLUMN",
        action="append",
        default=[],
        help="metrics for each value of a column, too; may be repeated",
    )
    command.add_argument(
        "--ignore",
        dest="ignored",
        metavar="COLUMN",
        action="append",
        default=[],
        help="a column that the model is not given; may be repeated",
    )
    command.add_argument("--report", type=Path, metavar="FOLDER", help="where to write the report")
    add_flags(command, CHECK_SETTINGS)


def run_evaluate_command(flags: dict[str, Any], environ: Mapping[str, str]) -> int:
    """Run the command; the exit status is 0, 1 if it failed, 2 if its arguments are wrong."""
    names = (
        "model",
        "data",
        "target",
        "task",
        "output",
        "model_version",
        "against",
        "slices",
        "ignored",
        "report",
    )
    chosen = {name: flags.pop(name) for name in names}
    return print_lines(lambda: _evaluate(chosen, flags, environ))


def _evaluate(chosen: dict[str, Any], flags: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Evaluate, write the report, and return the lines that say what was found."""
    try:
        import sklearn  # noqa: F401 - without it the model would run in vain

        from inferpool.evaluate_command.labelled_rows import read_labelled
        from inferpool.evaluate_command.model_answers import Answered, ask_model
        from inferpool.evaluate_command.retrieval import (
            Searched,
            ask_for_vectors,
            is_retrieval,
            read_retrieval,
        )
    except ImportError as missing:
        raise ImportError(f"{missing.name} is missing: {install_command('evaluate')}") from missing
    from inferpool.release.evaluate.metrics import estimate, estimate_differences
    from inferpool.release.evaluate.report import metric_lines, write_report

    path: Path = chosen["model"]
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    settings, progress = local_settings(flags, environ), sys.stderr.isatty()
    rows: Any
    ask: Callable[[Path, str | None], Answered | Searched]
    if chosen["task"] == RETRIEVAL or (chosen["task"] is None and is_retrieval(chosen["data"])):
        for name, flag in _FLAGS_OF_ROWS.items():
            if chosen[name]:
                raise ConfigError(f"{flag} means nothing for queries and documents; leave it out")
        rows = read_retrieval(chosen["data"])
        count, slices, what = len(rows.queries), {}, "queries"

        def ask(model: Path, version: str | None) -> Answered | Searched:
            return ask_for_vectors(model, version, rows, settings, progress=progress)
    else:
        rows = read_labelled(chosen["data"], chosen["target"], chosen["slices"], chosen["ignored"])
        count, slices, what = len(rows.targets), rows.slices, "rows"
        asked = {"task": chosen["task"], "output": chosen["output"], "progress": progress}

        def ask(model: Path, version: str | None) -> Answered | Searched:
            return ask_model(model, version, rows, settings, **asked)

    found = ask(path, chosen["model_version"])
    metrics = metrics_of(found.answers, found.task)
    report: dict[str, Any] = {
        "model": found.model,
        "version": found.version,
        "task": found.task,
        "rows": count,
        "data": chosen["data"].name,
        "data_digest": rows.digest,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "inferpool": __version__,
        "metrics": estimate(metrics, count),
        "slices": {name: _by_value(found, values) for name, values in slices.items()},
    }
    lines = [f"{found.model} {found.version}, {found.task}, {count} {what}", *metric_lines(report["metrics"])]
    if chosen["against"] is not None:
        other_path = Path(chosen["against"])
        is_path = other_path.exists()
        other = ask(other_path if is_path else path, None if is_path else chosen["against"])
        differences = estimate_differences(metrics, metrics_of(other.answers, other.task), count)
        report["against"] = {"model": other.model, "version": other.version, "differences": differences}
        lines += [f"larger than {other.model} {other.version} by", *metric_lines(differences)]
    for name, groups in report["slices"].items():
        for value, group in groups.items():
            lines += [f"{name} = {value}: {group['rows']} rows", *metric_lines(group["metrics"])]
    if chosen["report"] is not None:
        lines.append("written: " + " ".join(map(str, write_report(chosen["report"], report, found.answers))))
    return lines


def metrics_of(answers: Any, task: str) -> Mapping[str, Any]:
    """Return the metrics of `answers` by name."""
    from inferpool.release.evaluate.metrics import (
        NumberAnswers,
        RankedAnswers,
        class_metrics,
        number_metrics,
        ranked_metrics,
    )

    if isinstance(answers, RankedAnswers):
        return ranked_metrics(answers)
    if isinstance(answers, NumberAnswers):
        return number_metrics(answers)
    return class_metrics(answers, perplexity=task == "next-word")


def _by_value(found: Any, values: Any) -> dict[str, dict[str, Any]]:
    """Return the metrics of the rows with each value; a single row has none."""
    import numpy as np

    from inferpool.release.evaluate.metrics import ClassAnswers, NumberAnswers, estimate

    groups = {}
    column = np.asarray(values, object)
    for value in sorted(set(values)):
        inside = column == value
        count = int(inside.sum())
        answers = found.answers
        if isinstance(answers, ClassAnswers):
            answers = ClassAnswers(answers.names, answers.truth[inside], answers.scores[inside])
        else:
            answers = NumberAnswers(answers.truth[inside], answers.predicted[inside])
        metrics = metrics_of(answers, found.task) if count >= _LEAST_SLICE_ROWS else {}
        groups[value] = {"rows": count, "metrics": estimate(metrics, count)}
    return groups
