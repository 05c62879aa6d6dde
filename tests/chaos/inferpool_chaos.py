"""A backend that misbehaves on demand and deterministically; its entry point registers it.

A `.chaos` file is JSON: `{"row": [4], "run_ms": 0, "row_ms": 0, "mix": false, "first": -1}`. It takes "x",
FP32 `[first, *row]` (-1 in `row` is any size), and gives "sum", FP64 `[first]`: the sum of each row times
3 plus 1. A run takes `run_ms` plus `row_ms` a row, without the GIL. With `"reads": false`, or `mix`, nothing
is known of its rows but what runs show. A row whose first element is one of the constants below makes its
run misbehave; no made-up row has one. With `"raises_at": 7` so does a row that begins with 7, in this version
only. With a `"gate"`, the path of a named pipe, loading ends when the pipe
is opened for writing; with a `"run_gate"` so does a run marked `WAIT`. Without one, that run
ends when it is asked to stop. With `"load_crashes": true` loading
ends the process; with `"load_holds": true` it neither ends nor lets any other thread run Python.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from inferpool.backends.base import Backend, LoadedModel, LoadOptions
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.errors import LoadError
from inferpool.tensors import Signature, Tensors, TensorSpec

RAISE = -1001.0
"""The run raises an error that quotes its input."""
DIE = -1002.0
"""The run ends its thread."""
WRONG_ROWS = -1003.0
"""The run returns one row too many, if it has several."""
WAIT = -1004.0
"""The run waits until somebody opens `run_gate` for writing, or without a gate until it is asked to stop."""
HUNGRY = -1005.0
"""The run takes as many MiB of memory as the row's second element says."""
CRASH = -1006.0
"""The run ends the process, as a fault in a native library does."""
LOSE = -1007.0
"""The run raises an error, and so does every later one in its process, as on a GPU after a fault there."""
MIX = -1005.0
"""The run adds the number of its other rows to every answer."""


def open_gate(gate: Path) -> None:
    """Let the load or run that waits at `gate` go on, and all later ones pass."""
    waiting = os.open(gate, os.O_WRONLY)  # returns once somebody waits
    gate.unlink()
    gate.touch()
    os.close(waiting)


def expected(rows: np.ndarray) -> np.ndarray:
    """The model's outputs for these rows, each run alone."""
    return rows.reshape(len(rows), -1).astype(np.float64).sum(axis=1) * 3 + 1


class ChaosBackend(Backend):
    name = "chaos"
    suffixes = (".chaos",)

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        try:
            settings = json.loads(file.read_text())
            if settings.get("load_crashes"):
                ctypes.string_at(0)
            if settings.get("load_holds"):
                while True:
                    ctypes.PyDLL(None).pause()  # functions of a PyDLL keep the GIL
            if "gate" in settings:
                Path(settings["gate"]).read_bytes()
            return ChaosModel(settings)
        except ValueError as error:
            raise LoadError(f"{file.name} is not JSON: {error}") from error

    def read_rows(self, file: Path, options: LoadOptions) -> RowVerdict:
        """As `run` behaves: no row matters to another, unless the file or a mark says so."""
        settings = json.loads(file.read_text())
        if settings.get("reads", "mix" not in settings):
            return RowVerdict(Independence.INDEPENDENT, "each row is summed by itself")
        return super().read_rows(file, options)

    def describe(self) -> str:
        return "chaos 1.0"


class ChaosModel(LoadedModel):
    is_lost = False
    """Whether no model of this process can run any more."""

    def lost(self) -> str | None:
        return "an earlier run has broken it" if ChaosModel.is_lost else None

    def __init__(self, settings: dict[str, Any]) -> None:
        self._run_s = settings.get("run_ms", 0) / 1000
        self._row_s = settings.get("row_ms", 0) / 1000
        self._mix = settings.get("mix", False)
        self._gate = settings.get("run_gate", "")
        self._raises_at = settings.get("raises_at", RAISE)
        self._stopped: set[int] = set()
        first = settings.get("first", -1)
        self.signature = Signature(
            (TensorSpec("x", "FP32", (first, *settings.get("row", [4]))),),
            (TensorSpec("sum", "FP64", (first,)),),
        )

    def stop_run(self, thread: int) -> None:
        self._stopped.add(thread)

    def _wait(self) -> None:
        if self._gate:
            Path(self._gate).read_bytes()
            return
        thread = threading.get_ident()
        self._stopped.discard(thread)
        while thread not in self._stopped:
            time.sleep(0.005)
        raise RuntimeError("the run was stopped")

    def run(self, inputs: Tensors, outputs: object = None) -> Tensors:
        rows = inputs["x"]
        marks = set(rows.reshape(len(rows), -1)[:, 0].tolist()) if rows.size else set()
        if self._run_s or self._row_s:
            time.sleep(self._run_s + self._row_s * len(rows))
        if WAIT in marks:
            self._wait()
        if CRASH in marks:
            ctypes.string_at(0)
        if LOSE in marks:
            ChaosModel.is_lost = True
        if ChaosModel.is_lost:
            raise RuntimeError("the device does not answer")
        if RAISE in marks or self._raises_at in marks:
            raise ValueError(f"a marked row among {rows.ravel().tolist()}, which cannot be")
        if HUNGRY in marks:
            np.ones(int(rows.reshape(len(rows), -1)[0, 1]) * 2**20, np.uint8)
        if DIE in marks:
            raise SystemExit("a marked row")
        answer = expected(rows)
        if MIX in marks:
            answer = answer + (len(rows) - 1)
        if self._mix:
            answer = answer - answer.mean()
        if WRONG_ROWS in marks and len(rows) > 1:
            answer = np.append(answer, 0.0)
        return {"sum": answer}

    def close(self) -> None:
        pass
