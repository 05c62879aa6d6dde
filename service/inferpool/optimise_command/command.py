"""The command `inferpool optimise`: makes faster forms of a model, and writes the best as a new version."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from inferpool import __version__
from inferpool.command_output import print_lines
from inferpool.errors import ConfigError, InferpoolError
from inferpool.evaluate_command.command import RETRIEVAL, metrics_of
from inferpool.predict_command.command import local_settings
from inferpool.repository.layout import BUILD_SCRIPT
from inferpool.settings_sources import CHECK_SETTINGS, add_flags
from inferpool.system.cpu import usable_cores
from inferpool.system.install_hints import install_command

if TYPE_CHECKING:
    # These need the extra `optimise`, which other commands do not.
    from inferpool.client import Client
    from inferpool.evaluate_command.labelled_rows import LabelledRows
    from inferpool.evaluate_command.model_answers import Answered
    from inferpool.evaluate_command.retrieval import Searched
    from inferpool.optimise_command.model_folders import SourceModel
    from inferpool.release.evaluate.metrics import Estimate
    from inferpool.release.optimise.goal import Goal
    from inferpool.release.optimise.timing import Timing
    from inferpool.settings import Settings

PROVENANCE_FILE: Final = "provenance.json"
_ORIGINAL: Final = "original"
_GOOD: Final = "good"
_STRUCTURED: Final = "structured"
_TENSORRT: Final = "tensorrt"
_WIDTH: Final = 120
"""Columns of a terminal that the tables fit."""
_TOOLS: Final = ("onnx", "onnxruntime", "numpy")


class _Row(NamedTuple):
    """What was found of one form of the model; None where it could not be measured."""

    name: str
    size: int
    timing: Timing | None
    value: float | None
    difference: Estimate | None
    largest: float | None
    verdict: str


def add_optimise_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `inferpool`."""
    command = commands.add_parser(
        "optimise",
        aliases=["optimize"],
        help="make a model faster, as far as its answers stay good",
        description="Make other forms of the ONNX model in MODEL (fused, FP16, BF16, INT8, INT4, fewer"
        " channels), time each on this machine, and evaluate it with --data. The fastest form that keeps"
        " --goal and is at least 5 % faster than the original becomes a new version; else nothing is"
        " written.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="folder of a model")
    command.add_argument("--data", required=True, type=Path, metavar="DATA", help="as for `evaluate`")
    command.add_argument(
        "--goal",
        required=True,
        metavar="GOAL",
        help="how much worse a metric may become: 'accuracy -0.5pp', 'rmse +2%%', 'perplexity +0.3'",
    )
    command.add_argument("--target", metavar="NAME", help="column or array of the right answers [target]")
    command.add_argument(
        "--task", choices=("classification", "regression", "next-word", "retrieval"), help="as for `evaluate`"
    )
    command.add_argument(
        "--ignore", dest="ignored", metavar="COLUMN", action="append", default=[], help="as for `evaluate`"
    )
    command.add_argument(
        "--version",
        dest="model_version",
        type=int,
        metavar="N",
        help="a version [the one that answers]",
    )
    command.add_argument("--no-write", action="store_true", help="print the table only")
    command.add_argument(
        "--calibration-rows", type=int, default=256, metavar="N", help="rows that show INT8 its ranges [256]"
    )
    command.add_argument(
        "--keep-fp32",
        dest="kept",
        metavar="NAME",
        action="append",
        default=[],
        help="a node, or a kind of operation such as Softmax, that FP16 and BF16 leave in FP32; several times"
        " for several",
    )
    command.add_argument(
        "--fine-tune",
        dest="epochs",
        type=int,
        metavar="EPOCHS",
        help="also make forms with fewer channels, trained on for so many epochs by MODEL/build.py,"
        " whose code this runs",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="chooses those rows, and is given to build.py [0]"
    )
    add_flags(command, CHECK_SETTINGS)


def run_optimise_command(flags: dict[str, Any], environ: Mapping[str, str]) -> int:
    """Run the command; the exit status is 0, 1 if it failed, 2 if its arguments are wrong."""
    names = ("model", "data", "goal", "target", "task", "ignored", "model_version", "no_write",
             "calibration_rows", "kept", "epochs", "seed")  # fmt: skip
    chosen = {name: flags.pop(name) for name in names}
    return print_lines(lambda: _optimise(chosen, flags, environ))


def _optimise(chosen: dict[str, Any], flags: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    import numpy as np

    try:
        from inferpool.evaluate_command.retrieval import is_retrieval
        from inferpool.optimise_command.model_folders import find_source, record_inputs, take_rows
        from inferpool.optimise_command.structured_forms import MOST_EPOCHS, find_build_script
        from inferpool.release.optimise import candidates, goal
    except ImportError as missing:
        raise ImportError(f"{missing.name} is missing: {install_command('cpu,optimise')}") from missing

    wanted = goal.parse_goal(chosen["goal"])
    if not chosen["model"].is_dir():
        raise ConfigError(f"{chosen['model']} is no folder")
    source = find_source(chosen["model"], chosen["model_version"])
    if unknown := set(chosen["kept"]) - candidates.names_of(source.file):
        raise ConfigError(f"--keep-fp32 {min(unknown)}: the model has no such node, nor such an operation")
    if chosen["epochs"] is not None:
        find_build_script(chosen["model"])
        if not 0 <= chosen["epochs"] <= MOST_EPOCHS:
            raise ConfigError(f"--fine-tune {chosen['epochs']}: expected 0 to {MOST_EPOCHS} epochs")
    if source.newer_answers and not chosen["no_write"]:
        raise ConfigError(
            f"version {source.newest + 1} would answer requests as soon as it is written: add"
            f" `labels = {{stable = {source.number}}}` to [versions] in model.toml, or give --no-write"
        )
    if chosen["task"] is None and is_retrieval(chosen["data"]):
        chosen["task"] = RETRIEVAL
    rows = _read(chosen)
    settings = local_settings(flags, environ)
    count = min(len(rows.targets), max(1, chosen["calibration_rows"]))
    picked = np.sort(np.random.default_rng(chosen["seed"]).permutation(len(rows.targets))[:count])
    shown = rows._replace(
        inputs=take_rows(rows.inputs, picked), targets=[rows.targets[each] for each in picked]
    )
    with tempfile.TemporaryDirectory(prefix="inferpool-") as temporary:
        parent = Path(temporary)
        _say(f"what the model sees of {count} rows")
        batches = record_inputs(source, shown, _new(parent, "recorded"), settings)
        files, table = _measured(source, batches, rows, wanted, parent, settings, chosen)
        best = _best(source, files, table, parent, settings)
        lines = _lines(table, wanted.metric)
        if best is None:
            return [*lines, "nothing is written: no form is faster and within the goal"]
        if chosen["no_write"]:
            return [*lines, f"{best.name} is the best form; nothing is written"]
        written = _write(source, files[best.name], best, table, chosen, rows, parent / _STRUCTURED)
        return [*lines, f"{best.name} is version {source.newest + 1}: {written}"]


def _read(chosen: Mapping[str, Any]) -> LabelledRows:
    """Read the data; the rows of a search are its texts, which have no targets of their own."""
    from inferpool.evaluate_command.labelled_rows import LabelledRows, read_labelled
    from inferpool.evaluate_command.retrieval import read_retrieval

    if chosen["task"] != RETRIEVAL:
        return read_labelled(chosen["data"], chosen["target"], (), chosen["ignored"])
    search = read_retrieval(chosen["data"])
    texts = [*search.queries, *search.documents]
    return LabelledRows(texts, texts, {}, search.digest)


def _measured(
    source: SourceModel,
    batches: Sequence[Mapping[str, Any]],
    rows: LabelledRows,
    goal: Goal,
    parent: Path,
    settings: Settings,
    chosen: Mapping[str, Any],
) -> tuple[dict[str, Path], list[_Row]]:
    """Make, time and evaluate every form; returns the files that were made, and a row for each form."""
    from inferpool.backends.onnx.backend import OnnxBackend
    from inferpool.client.slices import make_progress
    from inferpool.optimise_command import structured_forms
    from inferpool.optimise_command.model_folders import with_form
    from inferpool.release.optimise import candidates, timing

    names = [_ORIGINAL, *(each.name for each in candidates.CANDIDATES)]
    files, reasons = {_ORIGINAL: source.file}, {}
    for candidate in candidates.CANDIDATES:
        _say(f"making {candidate.name}")
        file = _new(parent, candidate.name) / "model.onnx"
        try:
            kept = {"kept": chosen["kept"]} if candidate.keeps_fp32 else {}
            candidate.make(source.file, file, batches, **kept)
            files[candidate.name] = file
        except Exception as error:  # noqa: BLE001 - the tools raise errors of all kinds
            reasons[candidate.name] = f"cannot be made: {_first_line(error)}"
    if chosen["epochs"] is not None:
        _say("pruning and fine-tuning")
        work = _new(parent, _STRUCTURED)
        made, failed = structured_forms.make_structured(
            source, batches[0], work, chosen["epochs"], chosen["seed"]
        )
        files |= made
        reasons |= failed
        names += map(structured_forms.form_name, structured_forms.PERCENTS)
    refused = OnnxBackend().tensorrt_unavailable_reason()
    sized = timing.batches_of(batches)
    measurements = timing.ROUNDS * len(sized) * (len(files) + (0 if refused else 2))
    _say("timing")
    with make_progress(sys.stderr.isatty(), measurements, "measurement") as bar:
        timed, unusable = timing.time_forms(files, _ORIGINAL, sized, usable_cores(), done=bar.update)
        reasons |= {name: f"cannot run: {_first_line(reason)}" for name, reason in unusable.items()}
        if refused is None:
            from inferpool.optimise_command.gpu import tensorrt_form

            plan = _new(parent, "plan")
            on_gpu, why = tensorrt_form.time_on_gpu(source, sized, plan, settings, bar.update)
            timed, reasons = timed | on_gpu, reasons | why
            names += (tensorrt_form.CUDA, tensorrt_form.TENSORRT)
            files |= dict.fromkeys(on_gpu, source.file)
        else:
            names.append(_TENSORRT)
            reasons[_TENSORRT] = f"not tried: {refused}"
    answered: dict[str, Answered | Searched] = {}
    for name in [each for each in timed if each not in reasons]:
        _say(f"evaluating {name}")
        asked = _new(parent, f"asked-{name}")
        try:
            if name == _TENSORRT:
                folder = tensorrt_form.with_tensorrt(source, asked)
                on_one = tensorrt_form.on_gpu(settings)
                answered[name] = _ask(folder, rows, on_one, chosen, tensorrt_form.await_tensorrt)
            else:
                answered[name] = _ask(with_form(source, files[name], asked), rows, settings, chosen)
        except InferpoolError as error:
            if name == _ORIGINAL:
                raise
            reasons[name] = f"cannot be served: {error}"
    table = [
        _judge(name, files.get(name), timed.get(name), answered, goal, reasons.get(name)) for name in names
    ]
    never = {each.name: "reported only" for each in candidates.CANDIDATES if each.reported_only}
    never[_TENSORRT] = "good: write tensorrt = true below [gpu] in model.toml"
    return files, [
        row._replace(verdict=never[row.name]) if row.verdict == _GOOD and row.name in never else row
        for row in table
    ]


def _best(
    source: SourceModel, files: Mapping[str, Path], table: list[_Row], parent: Path, settings: Settings
) -> _Row | None:
    """Return the fastest good form that the golden samples let through; the others' rows say why not."""
    good = [row for row in table if row.verdict == _GOOD and row.timing is not None]
    for row in sorted(good, key=lambda row: row.timing.gain if row.timing else 0, reverse=True):
        served = _new(parent, f"served-{row.name}")
        refusal = _refused_by_samples(source, files[row.name], served, settings)
        if refusal is None:
            return row
        table[table.index(row)] = row._replace(verdict=refusal)
    return None


def _ask(
    folder: Path,
    rows: LabelledRows,
    settings: Settings,
    chosen: Mapping[str, Any],
    prepare: Callable[[Client], object] = lambda client: None,
) -> Answered | Searched:
    from inferpool.evaluate_command.model_answers import ask_model
    from inferpool.evaluate_command.retrieval import ask_for_vectors, read_retrieval

    shown = sys.stderr.isatty()
    if chosen["task"] == RETRIEVAL:
        search = read_retrieval(chosen["data"])
        return ask_for_vectors(folder, None, search, settings, progress=shown, prepare=prepare)
    return ask_model(folder, None, rows, settings, task=chosen["task"], progress=shown, prepare=prepare)


def _judge(
    name: str,
    file: Path | None,
    timing: Timing | None,
    answered: Mapping[str, Answered | Searched],
    goal: Goal,
    reason: str | None,
) -> _Row:
    """Compare one form with the original."""
    import numpy as np

    from inferpool.release.evaluate.metrics import estimate_differences

    size = file.stat().st_size if file is not None and file.is_file() else 0
    if timing is None or name not in answered:
        return _Row(name, size, timing, None, None, None, reason or "not measured")
    original, own = answered[_ORIGINAL], answered[name]
    before, after = (metrics_of(each.answers, each.task) for each in (original, own))
    if goal.metric not in before:
        raise ConfigError(f"the evaluation has no {goal.metric}; it has {', '.join(before)}")
    answers: Any = original.answers
    count = len(answers.relevant if original.task == RETRIEVAL else answers.truth)
    ones = np.ones(count)
    value = after[goal.metric](ones) if goal.metric in after else float("nan")
    largest = float(np.abs(_numbers(own) - _numbers(original)).max())
    if name == _ORIGINAL:
        return _Row(name, size, timing, value, None, 0.0, "")
    if goal.metric not in after:
        return _Row(name, size, timing, None, None, largest, f"has no {goal.metric}")
    difference = estimate_differences(
        {goal.metric: after[goal.metric]}, {goal.metric: before[goal.metric]}, count
    )[goal.metric]
    kept = goal.holds(before[goal.metric](ones), difference)
    faults = [] if timing.is_faster else [_not_faster(timing)]
    faults += [] if kept else [f"worse than {goal.text}"]
    verdict = " and ".join(faults) or _GOOD
    return _Row(name, size, timing, value, difference, largest, verdict)


def _not_faster(timing: Timing) -> str:
    from inferpool.release.optimise.timing import SIZES

    missing = [str(size) for size in SIZES if size not in timing.p50_ms]
    if not missing:
        return "not faster"
    return f"not faster (too slow with fewer rows to time it with {' and '.join(missing)})"


def _numbers(answered: Any) -> Any:
    if hasattr(answered, "vectors"):
        return answered.vectors
    answers: Any = answered.answers
    return answers.scores if hasattr(answers, "scores") else answers.predicted


def _refused_by_samples(source: SourceModel, file: Path, parent: Path, settings: Settings) -> str | None:
    """Return why the form would not be served beside the golden samples; None if it would."""
    from inferpool.optimise_command.model_folders import with_form
    from inferpool.predict_command.local_server import run_with_model

    try:
        run_with_model(with_form(source, file, parent, samples=True), settings, lambda *_: None)
    except InferpoolError as error:
        return f"refused by golden samples: {error}"
    return None


def _write(
    source: SourceModel,
    file: Path,
    best: _Row,
    table: Sequence[_Row],
    chosen: Mapping[str, Any],
    rows: LabelledRows,
    structured: Path,
) -> Path:
    """Write the form as a version; the folder appears complete."""
    target = source.folder / str(source.newest + 1)
    provenance = {
        "made_by": f"inferpool optimise {__version__}",
        "form": best.name,
        "goal": chosen["goal"],
        "seed": chosen["seed"],
        "calibration_rows": chosen["calibration_rows"],
        "kept_in_fp32": sorted(chosen["kept"]),
        "fine_tuning": _fine_tuning(source, chosen["epochs"], structured),
        "source": {"version": source.number, "sha256": _digest(source.file)},
        "data": {"name": chosen["data"].name, "sha256": rows.digest, "rows": len(rows.targets)},
        "tools": {name: importlib.metadata.version(name) for name in _TOOLS},
        "sha256": _digest(file),
        "forms": [_as_json(row) for row in table],
    }
    with tempfile.TemporaryDirectory(prefix=".optimise-", dir=source.folder) as temporary:
        made = Path(temporary) / "version"
        made.mkdir()
        shutil.copyfile(file, made / "model.onnx")
        (made / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=1, allow_nan=False) + "\n", "utf-8")
        made.rename(target)
    return target


def _fine_tuning(source: SourceModel, epochs: int | None, structured: Path) -> dict[str, Any] | None:
    from inferpool.optimise_command.structured_forms import read_tools

    if epochs is None:
        return None
    digest = _digest(source.folder / BUILD_SCRIPT)
    return {"epochs": epochs, "build_script_sha256": digest, "tools": read_tools(structured)}


def _as_json(row: _Row) -> dict[str, Any]:
    import numpy as np

    timing = row.timing
    return {
        "form": row.name,
        "bytes": row.size,
        "p50_ms": None if timing is None else {str(size): each for size, each in timing.p50_ms.items()},
        "rows_per_s": None
        if timing is None
        else {str(size): each for size, each in timing.rows_per_s.items()},
        "gain": None if timing is None else timing.gain,
        "metric": None if row.value is None or np.isnan(row.value) else row.value,
        "difference": None if row.difference is None else [float(each) for each in row.difference],
        "largest_difference": row.largest,
        "verdict": row.verdict,
    }


def _lines(table: Sequence[_Row], metric: str) -> list[str]:
    """Return two tables as lines of text: size and speed of each form, and what its answers are worth."""
    from inferpool.release.evaluate.report import number
    from inferpool.release.optimise.timing import SIZES

    speed = [
        [
            "form",
            "MB",
            *(f"p50 ms at {size}" for size in SIZES),
            *(f"rows/s at {size}" for size in SIZES),
            "gain",
        ]
    ]
    worth = [["form", metric, "change, 95 %", "largest", "verdict"]]
    for row in table:
        timing, change = row.timing, row.difference
        p50_ms, rates = ({}, {}) if timing is None else (timing.p50_ms, timing.rows_per_s)
        speed.append([
            row.name,
            f"{row.size / 1e6:.2f}" if row.size else "–",
            *(number(p50_ms[size]) if size in p50_ms else "–" for size in SIZES),
            *(f"{rates[size]:.0f}" if size in rates else "–" for size in SIZES),
            "–" if timing is None else f"{timing.gain:.2f}",
        ])  # fmt: skip
        worth.append([
            row.name,
            "–" if row.value is None else number(row.value),
            "–" if change is None else f"{number(change.low)} to {number(change.high)}",
            "–" if row.largest is None else number(row.largest),
            row.verdict,
        ])  # fmt: skip
    return [*_aligned(speed, last=str.rjust), "", *_aligned(worth, last=str.ljust)]


def _aligned(cells: Sequence[Sequence[str]], last: Callable[[str, int], str]) -> Iterator[str]:
    """Yield the lines of a table; what its last column has no room for goes on in the next line."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    before = sum(widths[:-1]) + 2 * len(widths[:-1])
    for line in cells:
        name, *others, end = line
        parts = textwrap.wrap(end, _WIDTH - before, break_on_hyphens=False) or [""]
        shown = [name.ljust(widths[0]), *map(str.rjust, others, widths[1:-1]), last(parts[0], widths[-1])]
        yield "  ".join(shown).rstrip()
        yield from (" " * before + part for part in parts[1:])


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), repr(error))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _new(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"{text} …", file=sys.stderr)
