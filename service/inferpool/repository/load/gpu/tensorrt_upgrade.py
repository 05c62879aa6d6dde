"""TensorRT's engines of a version: built aside while CUDA serves, and switched to if they answer alike."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from inferpool.backends.base import Backend, DeviceModel, Engine, LoadOptions
from inferpool.backends.onnx.gpu.tensorrt_build import await_build, start_build
from inferpool.errors import InferpoolError, LoadError
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.hot_swap import HotSwapModel
from inferpool.repository.load.batching_check import compare, first_line
from inferpool.repository.load.gpu.pixel_check import try_pixels
from inferpool.repository.load.planner import rows_of
from inferpool.tensors import ANY, Signature, Tensors

log = logging.getLogger(__name__)

Folder = Callable[[str, str], Path]
"""Where the engine for a device is kept, given what it depends on besides the model and the GPU."""


class TensorRTUpgrade:
    """What becomes of the wish for TensorRT; a thread of its own works on it.

    Attributes:
        status: a sentence for `/models`.
    """

    def __init__(
        self,
        backend: Backend,
        file: Path,
        options: LoadOptions,
        folder: Folder,
        ladder: BatchBuckets | None,
        rows: Tensors,
    ) -> None:
        """`rows` are such as the model is known to run; there may be none."""
        self.status = "an engine is being built, and CUDA serves meanwhile"
        self._backend = backend
        self._file = file
        self._options = replace(options, graphs=False)
        self._folder = folder
        self._ladder = ladder
        self._rows = rows
        self._switches: Sequence[tuple[str, HotSwapModel]] = ()
        self._expected: Tensors = {}
        self._nothing: Tensors | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="tensorrt", daemon=True)

    def prepare(self, switches: Sequence[tuple[str, HotSwapModel]]) -> None:
        """Ask the models `switches`, with their devices, what they answer; none of them serves yet."""
        self._switches = switches
        if self._rows:
            self._expected = switches[0][1].run(self._rows)
        if self._rows and self._ladder is not None:
            with suppress(Exception):  # it may take one row at least
                self._nothing = switches[0][1].run({name: rows[:0] for name, rows in self._rows.items()})

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop, whatever it is doing; nothing is switched afterwards."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            self._switch()
        except Exception as error:  # noqa: BLE001 - whatever it is, CUDA serves
            self.status = f"CUDA serves: {first_line(error)}"
            if not self._closed:
                log.warning("%s: no TensorRT: %s", self._file, first_line(error))

    def _switch(self) -> None:
        if lacks := self._backend.lacks_engines():
            raise LoadError(lacks)
        if not self._rows:
            raise LoadError("no made-up rows could be run, to hold its answers against")
        shapes = engine_shapes(self._switches[0][1].signature, self._ladder)
        made: list[DeviceModel] = []
        try:
            for device, _ in self._switches:
                options = self._built(device, shapes)
                model = self._backend.load(self._file, options)
                assert isinstance(model, DeviceModel)
                made.append(model)
                if fault := self._fault(model):
                    raise LoadError(fault)
                if self._closed:
                    raise LoadError("it is being unloaded")
        except BaseException:
            for model in made:
                model.close()
            raise
        for (_, switch), model in zip(self._switches, made, strict=True):
            switch.offer(model, self._nothing)
        self.status = "TensorRT serves"
        log.info("%s: TensorRT takes over", self._file)

    def _built(self, device: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> LoadOptions:
        """The options to load an engine with, which is there."""
        folder = self._folder(device, f"{self._backend.engine_version()} {shapes}")
        options = replace(self._options, device=device, engine=Engine(folder, shapes))
        if folder.is_dir():
            return options
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Under another name until it is whole: servers may share the folder.
            part = Path(tempfile.mkdtemp(".part", f"{folder.name}-", folder.parent))
        except OSError as error:
            raise LoadError(f"there is no place for its engine: {error.strerror}") from error
        try:
            with self._lock:
                if self._closed:
                    raise LoadError("it is being unloaded")
                building = replace(options, engine=Engine(part, shapes), normalise=None)
                self._process = start_build(self._backend.name, self._file, building)
            await_build(self._process)
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another server was there first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return options

    def _fault(self, model: DeviceModel) -> str:
        """Run every size that batches have; what is wrong with an answer, "" if nothing is."""
        normalise = self._options.normalise
        if self._ladder is None:
            outputs = model.run(self._rows)
            fault = self._differs(outputs, len(next(iter(self._rows.values()))))
            return fault or ("" if normalise is None else try_pixels(model, normalise, [1], padded=False))
        for rung in reversed(self._ladder.rungs):
            try:
                outputs = model.run_padded([rows_of(self._rows, rung)], rung)
            except InferpoolError as error:
                raise LoadError(f"{rung} rows cannot be run: {error.detail}") from error
            if fault := self._differs(outputs, rung):
                return fault
        return "" if normalise is None else try_pixels(model, normalise, self._ladder.rungs, padded=True)

    def _differs(self, outputs: Tensors, count: int) -> str:
        available = len(next(iter(self._rows.values())))
        places = [row % available for row in range(count)]
        model = self._switches[0][1]
        fault, _ = compare(model.signature, outputs, self._expected, places, model.rounding)
        return f"{fault} between TensorRT and CUDA" if fault else ""


def engine_shapes(
    signature: Signature, ladder: BatchBuckets | None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The largest shapes of the inputs that vary in rows; raises LoadError where they vary otherwise."""
    shapes = []
    for spec in signature.inputs:
        if spec.optional:
            raise LoadError(f'an engine has all inputs, and "{spec.name}" may be left out')
        if spec.shape is None or ANY in spec.shape[1:] or (ladder is None and ANY in spec.shape):
            raise LoadError(f'an engine has fixed shapes, and that of input "{spec.name}" varies')
        if ladder is not None and spec.shape[0] == ANY:
            shapes.append((spec.name, (ladder.top, *spec.shape[1:])))
    return tuple(shapes)
