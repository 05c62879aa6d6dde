"""A fake GPU: a driver that shows cards, and models that run there in buckets, like those on a real GPU.

What a real card does (copies, kernels, memory) is not pretended: this holds what is decided about it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from inferpool.backends.base import REPLAYED, Backend, DeviceModel, LoadedModel, LoadOptions
from inferpool.errors import LoadError, OutOfMemory, UnfitForGpu, Verdict
from inferpool.system.gpus import Gpu
from inferpool.tensors import Signature, Tensors, TensorSpec

PICTURES = "pictures "
"""The file of a model that takes pictures starts with this."""
LOSE = -1007.0
"""A row that begins with this makes the card useless to its process, as a kernel's fault does."""


def expected(rows: np.ndarray) -> np.ndarray:
    """The outputs of the model for these rows."""
    return rows.astype(np.float64).sum(axis=tuple(range(1, rows.ndim))) * 3 + 1


class FakeDriver:
    """A driver with `cards` GPUs."""

    def __init__(self, cards: int = 2, reason: str | None = None, cuda: tuple[int, int] = (13, 0)) -> None:
        self._gpus = [Gpu(number, "NVIDIA Fake", f"uuid-{number}", 2**34) for number in range(cards)]
        self._reason = reason
        self._cuda = cuda

    def unavailable_reason(self) -> str | None:
        return self._reason

    def cuda(self) -> tuple[int, int]:
        return self._cuda

    def gpus(self) -> Sequence[Gpu]:
        return self._gpus


class FakeCard:
    """Records the batches that a GPU runs. The GPU has memory for batches of `room_rows` rows."""

    def __init__(self, room_rows: int = 1000) -> None:
        self.room_rows = room_rows
        self.is_lost = False
        self.batches: list[np.ndarray] = []
        self.refused: list[int] = []


class FakeModel(DeviceModel):
    """Computes three times the sum of a row, plus one.

    With `leaks`, rows of padding change the outputs of the other rows. With `captures`, the model can
    capture graphs; "wrong" makes replayed runs wrong. With `pictures`, a row is a picture of 2 × 2 grey
    pixels: "none" means that the model cannot normalise pixels, "wrong" that it normalises them wrongly.
    A batch that mixes pixels and numbers gives nonsense.
    """

    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("sum", "FP64", (-1,)),))

    def __init__(
        self,
        card: FakeCard,
        options: LoadOptions | None = None,
        leaks: bool = False,
        captures: str = "",
        pictures: str = "",
        run_s: float = 0.0,
    ) -> None:
        self.engine = ""
        self.run_s = run_s
        self.pictures = pictures
        if pictures:
            self.signature = Signature((TensorSpec("x", "FP32", (-1, 2, 2)),), self.signature.outputs)
        self.can_capture = bool(captures)
        self.captures = captures
        self.captured: list[tuple[int, int]] = []
        self.card = card
        self.options = options or LoadOptions()
        self.rounding = self.options.gpu.rounding
        self.leaks = leaks
        self.closed = False
        self.largest = FakeBackend.largest
        if self.options.gpu.normalisation is not None and pictures != "none":
            self.takes_pixels = Verdict(True, "pixels are normalised on the card")
        self.pixels = 0

    def lost(self) -> str | None:
        return "CUDA: an illegal memory access (error 700)" if self.card.is_lost else None

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        rows = self._numbers(inputs["x"])
        assert not self.closed
        if self.run_s:
            time.sleep(self.run_s)
        if len(rows) and (rows.reshape(len(rows), -1)[:, 0] == LOSE).any():
            self.card.is_lost = True
        if self.card.is_lost:
            raise RuntimeError("the card does not answer")
        if len(rows) > self.card.room_rows:
            self.card.refused.append(len(rows))
            raise OutOfMemory("the fake card is full")
        self.card.batches.append(rows.copy())
        answer = expected(rows)
        if self.engine == "wrong":
            answer = answer + 1
        # What a card rounds to as TF32, or in FP16, which ends at 65504.
        if self.options.gpu.fp16:
            answer = np.where(np.abs(answer) > self.largest, np.inf, answer * (1 + 1e-3))
        return {"sum": answer * (1 + 1e-4 * self.options.gpu.tf32)}

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        mixed = len({part["x"].dtype for part in parts}) > 1
        numbers = [self._numbers(part["x"]) for part in parts]
        given = np.concatenate(numbers) * np.float32(1000 if mixed else 1)
        whole = np.zeros((rows, *given.shape[1:]), np.float32)
        whole[: len(given)] = given
        answer = self.run({"x": whole})["sum"][: len(given)]
        return {"sum": answer + 1 if self.leaks and rows > len(given) else answer}

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        if rows.dtype == np.float32:
            return rows
        assert self.options.gpu.normalisation is not None
        assert rows.shape[1:] == (2, 2, 1)
        self.pixels += len(rows)
        return self.options.gpu.normalisation.normalise(rows) + np.float32(self.pictures == "wrong")

    def capture(self, parts: Sequence[Tensors], rows: int | None) -> Tensors:
        assert rows is not None
        assert self.options.gpu.graphs
        self.captured.append((threading.get_ident(), rows))
        self.graphs = REPLAYED
        answer = self.run_padded(parts, rows)
        return {"sum": answer["sum"] + 1} if self.captures == "wrong" else answer

    def uncapture(self, reason: str) -> None:
        self.graphs = Verdict(False, reason)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class FakeBackend(Backend):
    """Loads `.fakegpu` files on any device. A file is empty, or says how the build of its plan ends.

    The model of a file that starts with `PICTURES` takes pictures. A file may also be JSON: a run then takes
    `run_ms`; loading ends when the named pipe `gate` is opened for writing, and fails on those devices of
    which the folder `fails` has a file; `cpu_nodes` are said to run on the CPU. The server finds this backend
    through its entry point. Tests set the class attributes, and read `loaded`.
    """

    name = "fakegpu"
    suffixes = (".fakegpu",)
    lacks: ClassVar[str] = ""
    cards: ClassVar[dict[str, FakeCard]] = {}
    leaks: ClassVar[bool] = False
    captures: ClassVar[str] = ""
    engines: ClassVar[bool] = False
    unfit: ClassVar[str] = ""
    pictures: ClassVar[str] = "right"
    largest: ClassVar[float] = 65504
    fails: ClassVar[Callable[[LoadOptions], bool]] = lambda options: False
    loaded: ClassVar[list[FakeModel]] = []

    @classmethod
    def reset(cls) -> None:
        cls.lacks, cls.leaks, cls.unfit, cls.captures = "", False, "", ""
        cls.largest, cls.pictures = 65504, "right"
        cls.cards, cls.loaded, cls.engines = {}, [], False
        cls.fails = lambda options: False

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        if self.unfit and options.device != "cpu":
            raise UnfitForGpu(self.unfit)
        if type(self).fails(options):
            raise OutOfMemory("the fake card has no room for it")
        card = self.cards.setdefault(options.device, FakeCard())
        behaviour = _behaviour(file)
        if "gate" in behaviour:
            Path(behaviour["gate"]).read_bytes()
        if "fails" in behaviour and Path(behaviour["fails"], options.device).exists():
            raise LoadError(f"{options.device} has fallen off the bus")
        wish = file.read_text().removeprefix(PICTURES)
        pictures = "" if wish == file.read_text() else self.pictures
        run_s = behaviour.get("run_ms", 0) / 1000
        model = FakeModel(card, options, self.leaks, self.captures, pictures, run_s)
        model.cpu_nodes = behaviour.get("cpu_nodes", {})
        if options.gpu.tensorrt is not None:
            model.engine = self._engine(wish, options.gpu.tensorrt.folder)
            if model.engine == "blind":
                model.takes_pixels = Verdict(False, "this engine is blind")
        self.loaded.append(model)
        return model

    def gpu_unavailable_reason(self, file: Path) -> str | None:
        return self.lacks or None

    def tensorrt_unavailable_reason(self) -> str | None:
        return None if self.engines else super().tensorrt_unavailable_reason()

    def _engine(self, wish: str, folder: Path) -> str:
        """The behaviour of the plan in `folder`. If there is none, the model file says how its build ends."""
        engine = folder / "engine"
        if not engine.exists():
            if wish == "fails":
                raise LoadError("TensorRT knows no operator like that")
            if wish == "crashes":
                os.kill(os.getpid(), signal.SIGKILL)
            if wish == "hangs":
                threading.Event().wait()
            engine.write_text(wish)
        return engine.read_text()

    def describe(self) -> str:
        return "fakegpu 1.0"


def _behaviour(file: Path) -> dict[str, Any]:
    """The contents of a file that is JSON; empty for any other file."""
    text = file.read_text()
    return dict(json.loads(text)) if text.startswith("{") else {}
