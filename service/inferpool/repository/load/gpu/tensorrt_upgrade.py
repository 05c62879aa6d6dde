"""Builds TensorRT plans in the background while CUDA serves, and switches to them if they answer alike.

*Experimental: TensorRT has not yet run on a GPU.*
"""

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
from typing import Final, TypeAlias

from inferpool.backends.base import Backend, DeviceModel, LoadOptions, TensorRTPlan
from inferpool.backends.onnx.gpu.tensorrt_build import await_build, start_build
from inferpool.errors import InferpoolError, LoadError, Reason, short_reason
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.hot_swap import HotSwapModel
from inferpool.repository.load.comparison import compare_outputs
from inferpool.repository.load.gpu.pixel_check import check_pixels
from inferpool.repository.load.runnable_rows import repeat_rows, repeated_indexes, rows_between
from inferpool.tensors import ANY, Signature, Tensors

log = logging.getLogger(__name__)

FindFolder: TypeAlias = Callable[[str, str], Path]
"""The folder of the TensorRT plan for a device; the second argument: version of TensorRT, and shapes."""
BUILDING: Final = "a TensorRT plan is being built, and CUDA serves meanwhile"
SERVES: Final = "TensorRT serves"


class TensorRTUpgrade:
    """The upgrade of one version from CUDA to TensorRT. A thread of its own works on it.

    Attributes:
        status: how far the upgrade is, as a sentence for `/models`.
    """

    def __init__(
        self,
        backend: Backend,
        file: Path,
        options: LoadOptions,
        find_folder: FindFolder,
        buckets: BatchBuckets | None,
        rows: Tensors,
        switches: Sequence[tuple[str, HotSwapModel]],
    ) -> None:
        """Run `rows`, which may be empty, on the models in `switches`: TensorRT must give the same answers.

        `switches` are the models with their devices. None of them serves yet.
        """
        self.status = BUILDING
        self._backend = backend
        self._file = file
        self._options = options.with_gpu(graphs=False)
        self._find_folder = find_folder
        self._buckets = buckets
        self._rows = rows
        self._switches = switches
        self._expected: Tensors = switches[0][1].run(rows) if rows else {}
        self._no_rows: Tensors | None = None
        if rows and buckets is not None:
            with suppress(Exception):  # the model may need at least one row
                self._no_rows = switches[0][1].run(rows_between(rows, 0, 0))
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="tensorrt", daemon=True)

    def start(self) -> None:
        """Begin to build, in the background."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and end the process that builds. No model is exchanged afterwards."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        if self._thread.ident is not None:
            self._thread.join()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the upgrade; False if that takes longer than `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._switch()
        except Exception as error:  # noqa: BLE001 - whatever the error is, CUDA serves
            self.status = f"CUDA serves: {short_reason(error)}"
            if not self._closed:
                log.warning("%s: no TensorRT: %s", self._file, short_reason(error))

    def _switch(self) -> None:
        if reason := self._backend.tensorrt_unavailable_reason():
            raise LoadError(reason)
        if not self._rows:
            raise LoadError("no made-up rows could be run to compare answers with; add a golden sample")
        shapes = tensorrt_shapes(self._switches[0][1].signature, self._buckets)
        made: list[DeviceModel] = []
        try:
            for device, _ in self._switches:
                options = self._build(device, shapes)
                model = self._backend.load(self._file, options)
                assert isinstance(model, DeviceModel)
                made.append(model)
                fault = self._fault(model)
                if fault is not None:
                    raise LoadError(fault)
                if self._closed:
                    raise LoadError("the version is being unloaded")
        except BaseException:
            for model in made:
                model.close()
            raise
        for (_, switch), model in zip(self._switches, made, strict=True):
            switch.offer(model, self._no_rows)
        self.status = SERVES
        log.info("%s: TensorRT takes over", self._file)

    def _build(self, device: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> LoadOptions:
        """Build the TensorRT plan for `device` unless it is kept; returns the options to load it with."""
        folder = self._find_folder(device, f"{self._backend.tensorrt_version()} {shapes}")
        options = replace(self._options, device=device).with_gpu(tensorrt=TensorRTPlan(folder, shapes))
        if folder.is_dir():
            return options
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Under another name until it is complete, because servers may share the folder.
            building = Path(tempfile.mkdtemp(".part", f"{folder.name}-", folder.parent))
        except OSError as error:
            raise LoadError(
                f"the TensorRT plan cannot be kept in {folder.parent}: {error.strerror}; set --cache-dir to a"
                " folder that can be written to"
            ) from error
        try:
            with self._lock:
                if self._closed:
                    raise LoadError("the version is being unloaded")
                tensorrt = options.with_gpu(tensorrt=TensorRTPlan(building, shapes), normalisation=None)
                self._process = start_build(self._backend.name, self._file, tensorrt)
            await_build(self._process)
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another server has built it meanwhile
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return options

    def _fault(self, model: DeviceModel) -> Reason | None:
        """Run every batch size; returns what is wrong with an answer."""
        normalise = self._options.gpu.normalisation
        if self._buckets is None:
            fault = self._difference(model.run(self._rows), len(next(iter(self._rows.values()))))
            if fault is not None or normalise is None:
                return fault
            return check_pixels(model, normalise, [1], padded=False)
        for bucket in reversed(self._buckets.sizes):
            try:
                outputs = model.run_padded([repeat_rows(self._rows, bucket)], bucket)
            except InferpoolError as error:
                raise LoadError(f"{bucket} rows cannot be run: {error.detail}") from error
            fault = self._difference(outputs, bucket)
            if fault is not None:
                return fault
        return None if normalise is None else check_pixels(model, normalise, self._buckets.sizes, padded=True)

    def _difference(self, outputs: Tensors, count: int) -> Reason | None:
        """How the first `count` outputs differ from those of CUDA; None if they do not."""
        model = self._switches[0][1]
        rows = repeated_indexes(self._rows, count)
        fault, _ = compare_outputs(model.signature, outputs, self._expected, rows, model.rounding)
        return None if fault is None else f"{fault} between TensorRT and CUDA"


def tensorrt_shapes(
    signature: Signature, buckets: BatchBuckets | None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The largest shape of each input that varies in rows; raises LoadError if one varies otherwise."""
    shapes = []
    for spec in signature.inputs:
        if spec.optional:
            raise LoadError(f'TensorRT needs every input, but input "{spec.name}" may be left out')
        if spec.shape is None or ANY in spec.shape[1:] or (buckets is None and ANY in spec.shape):
            raise LoadError(f'TensorRT needs fixed shapes, but that of input "{spec.name}" varies')
        if buckets is not None and spec.shape[0] == ANY:
            shapes.append((spec.name, (buckets.largest, *spec.shape[1:])))
    return tuple(shapes)
