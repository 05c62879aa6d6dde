# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxruntime>=1.27",
#   "tqdm>=4",
# ]
# ///
"""Fit, back-test and export the forecast: linear regression on a sliding window of closing prices.

    inferpool build forecast [--csv FILE] [--window N] [--horizon N]

FILE has a column `date` (2024-12-31) and a column `close`, oldest first; others are passed over. Without it
the series is synthetic: made by `synthesise`, with patterns in it that a regression can find.

What is learned are ratios to the window's last close, so that the model serves prices of any size. The
back-test walks through the last fifth of the series, fits anew every `REFIT_ROWS` days on nothing but the
days before, and sets the mean absolute error beside that of saying that the price stays what it is. Nothing
is written where a forecast errs by more than `STATED_RATIO` of that: the last price is hard to beat.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any, Final, TypeAlias

WINDOW: Final = 20
HORIZON: Final = 5


def read_options() -> argparse.Namespace:
    """Read the command line; exits if it asks for help, or is wrong."""
    parser = argparse.ArgumentParser(
        prog="build.py", description="Fit, back-test and export a forecast of prices."
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="columns date and close; else synthetic")
    parser.add_argument(
        "--window", type=int, default=WINDOW, metavar="N", help=f"closes that it takes (default: {WINDOW})"
    )
    parser.add_argument(
        "--horizon", type=int, default=HORIZON, metavar="N", help=f"closes that it gives (default: {HORIZON})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="model folder to write into (default: the one this script is in)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the synthetic series (default: 0)"
    )
    options = parser.parse_args()
    if options.window < 2 or options.horizon < 1:
        parser.error("--window must be at least 2 and --horizon at least 1")
    return options


if __name__ == "__main__":
    # Before anything is imported that must be installed: help and mistakes need none of it.
    read_options()

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

Array: TypeAlias = npt.NDArray[np.float64]

STATED_RATIO: Final = 1.05
SYNTHETIC_DAYS: Final = 1500
TESTED_PART: Final = 0.2
REFIT_ROWS: Final = 20
SAMPLE_ROWS: Final = 3


def synthesise(seed: int) -> Array:
    """Make closes of 1,500 trading days: a walk of 0.5 % a day, with a swing that fades and a five-day week.

    The walk cannot be foreseen, by anyone. The swing (a fifth of it is gone the next day) and the week can.
    """
    draw = np.random.default_rng(seed)
    walk = np.cumsum(draw.normal(2e-4, 5e-3, SYNTHETIC_DAYS))
    swing = np.zeros(SYNTHETIC_DAYS)
    for day in range(1, SYNTHETIC_DAYS):
        swing[day] = 0.8 * swing[day - 1] + draw.normal(0, 5e-3)
    week = 3e-3 * np.sin(2 * np.pi * np.arange(SYNTHETIC_DAYS) / 5)
    return (100 * np.exp(walk + swing + week)).round(2)


def read_closes(file: Path) -> Array:
    """Read the column `close`; raises SystemExit, which names the line, where it or `date` is wrong."""
    closes: list[float] = []
    last = date.min
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = {name.strip().lower(): name for name in reader.fieldnames or () if name}
            if not {"date", "close"} <= columns.keys():
                raise SystemExit(f"{file}: expected columns date and close; there are {', '.join(columns)}")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                day = date.fromisoformat((row[columns["date"]] or "").strip())
                close = float(row[columns["close"]] or "nan")
                if day <= last:
                    raise SystemExit(f"{where}: {day} comes after {last}; expected oldest first")
                if not (close > 0 and math.isfinite(close)):
                    raise SystemExit(f"{where}: close is {row[columns['close']]!r}; expected a price above 0")
                closes.append(close)
                last = day
    except OSError as error:
        raise SystemExit(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise SystemExit(f"{file}: line {reader.line_num}: {error}") from error
    return np.array(closes)


def to_windows(closes: Array, window: int, horizon: int) -> tuple[Array, Array]:
    """Cut closes into every window (n×`window`) and the closes that followed it (n×`horizon`)."""
    cut = np.lib.stride_tricks.sliding_window_view(closes, window + horizon)
    return cut[:, :window], cut[:, window:]


def fit(windows: Array, futures: Array) -> Array:
    """Fit by least squares, on ratios to the last close less 1: [window, horizon], the offset last."""
    last = windows[:, -1:]
    known = np.hstack([windows[:, :-1] / last - 1, np.ones_like(last)])
    weights: Array = np.linalg.lstsq(known, futures / last - 1, rcond=None)[0]
    return weights


def predict(weights: Array, windows: Array) -> Array:
    """Forecast the next closes: n×`horizon`."""
    last = windows[:, -1:]
    return last * (1 + (windows[:, :-1] / last - 1) @ weights[:-1] + weights[-1])


def back_test(closes: Array, window: int, horizon: int) -> tuple[Array, Array]:
    """Forecast through the last fifth of `closes`, as it would have been done on each of those days.

    Returns the mean absolute errors of the regression and of the last value, by days ahead.
    """
    windows, futures = to_windows(closes, window, horizon)
    first = len(windows) - int(TESTED_PART * len(windows))
    forecasts = []
    for today in tqdm(range(first, len(windows), REFIT_ROWS), desc="back-test", unit="fit"):
        # The last window whose futures are over when today's window ends.
        known = today - horizon + 1
        weights = fit(windows[:known], futures[:known])
        forecasts.append(predict(weights, windows[today : today + REFIT_ROWS]))
    actual = futures[first:]
    errors = np.abs(np.concatenate(forecasts) - actual).mean(axis=0)
    return errors, np.abs(windows[first:, -1:] - actual).mean(axis=0)


def to_onnx(weights: Array) -> onnx.ModelProto:
    """Write the forecast down as an ONNX graph: `closes` [-1, window] in, `forecast` [-1, horizon] out."""
    window, horizon = weights.shape
    constants = {
        "one": np.ones(1, np.float32),
        "last_place": np.array([window - 1]),
        "first_place": np.array([0]),
        "end": np.array([window]),
        "axis": np.array([1]),
        "weights": weights[:-1].astype(np.float32),
        "offset": (1 + weights[-1]).astype(np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["closes", "last_place", "end", "axis"], ["last"]),
        helper.make_node("Slice", ["closes", "first_place", "last_place", "axis"], ["before"]),
        helper.make_node("Div", ["before", "last"], ["ratio"]),
        helper.make_node("Sub", ["ratio", "one"], ["change"]),
        helper.make_node("Gemm", ["change", "weights", "offset"], ["growth"]),
        helper.make_node("Mul", ["last", "growth"], ["forecast"]),
    ]
    graph = helper.make_graph(
        nodes,
        "forecast",
        [helper.make_tensor_value_info("closes", TensorProto.FLOAT, ["rows", window])],
        [helper.make_tensor_value_info("forecast", TensorProto.FLOAT, ["rows", horizon])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="inferpool"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, windows: Array) -> Array:
    """Forecast with ONNX Runtime, as the server will."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    forecast: Array = session.run(["forecast"], {"closes": windows.astype(np.float32)})[0]
    return forecast


def write(out: Path, model: onnx.ModelProto, windows: Array, evaluation: dict[str, Any]) -> None:
    """Write version 1 with its evaluation, the golden samples, and what the server needs beside them."""
    version, samples = out / "1", out / "samples"
    version.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    (version / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    last = windows[-SAMPLE_ROWS:]
    forecast = run(model, last).tolist()
    golden = {
        "inputs": {"closes": last.tolist()},
        # As many digits as a float32 has.
        "outputs": {"forecast": [[float(f"{close:.7g}") for close in row] for row in forecast]},
        "tolerance": float(f"{1e-5 * last.max():.1g}"),
    }
    (samples / "last.json").write_text(json.dumps(golden) + "\n")
    here = Path(__file__).parent
    if out.resolve() != here.resolve():
        shutil.copyfile(here / "model.toml", out / "model.toml")


def main() -> int:
    """Build the model; the exit code is 1 if it is not good enough to be written."""
    options = read_options()
    window, horizon = options.window, options.horizon

    closes = synthesise(options.seed) if options.csv is None else read_closes(options.csv)
    series = f"synthetic, seed {options.seed}" if options.csv is None else options.csv.name
    least = 10 * (window + horizon)
    if len(closes) < least:
        print(f"not built: {len(closes)} closes, and {least} are needed to judge a forecast", file=sys.stderr)
        return 1
    print(f"series: {series}; {len(closes)} closes")
    errors, last_value = back_test(closes, window, horizon)
    ratios = errors / last_value
    print("back-test, mean absolute error:  days ahead   regression   last value   ratio")
    for ahead, (error, baseline, ratio) in enumerate(zip(errors, last_value, ratios, strict=True), start=1):
        print(f"{ahead:43}   {error:10.4f}   {baseline:10.4f}   {ratio:5.3f}")
    lost = [str(ahead) for ahead, ratio in enumerate(ratios, start=1) if ratio >= 1]
    if lost:
        print(f"it does not beat the last value {', '.join(lost)} day(s) ahead")
    # Written so that what is not a number does not pass.
    if not ratios.max() <= STATED_RATIO:
        print(f"not written: the card states at most {STATED_RATIO} times the last value's", file=sys.stderr)
        return 1
    windows, futures = to_windows(closes, window, horizon)
    evaluation = {
        "series": series,
        "closes": len(closes),
        "mean_absolute_error": errors.round(4).tolist(),
        "of_the_last_value": last_value.round(4).tolist(),
    }
    write(options.out, to_onnx(fit(windows, futures)), windows, evaluation)
    print(f"written: {options.out / '1' / 'model.onnx'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
