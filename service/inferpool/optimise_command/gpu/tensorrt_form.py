"""The form `tensorrt`: the model's own file, run by TensorRT. `cuda`, the same on the same GPU, is beside it.

*Experimental: TensorRT has not yet run on a GPU.*

No file is made: TensorRT is a setting of the model, and a server builds the plan on the GPU that it has.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from inferpool.backends.base import DeviceModel, GpuOptions, LoadedModel, LoadOptions, TensorRTPlan
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.client import Client
from inferpool.errors import LoadError
from inferpool.optimise_command.model_folders import SourceModel, with_form
from inferpool.pool.buckets import BatchBuckets
from inferpool.release.optimise.timing import SIZES, Timing, time_forms
from inferpool.repository.layout import CONFIG_FILE
from inferpool.repository.load.gpu.tensorrt_upgrade import BUILDING, SERVES, tensorrt_shapes
from inferpool.settings import Settings
from inferpool.tensors import Signature, Tensors

CUDA: Final = "cuda"
TENSORRT: Final = "tensorrt"
_BASELINE: Final = "what tensorrt is compared with"
_LOOK_S: Final = 0.5
"""Pause between two looks at a plan that is being built, which takes minutes."""


def on_gpu(settings: Settings) -> Settings:
    """Return the settings with one GPU: the first of their devices, or the first of the machine."""
    named = [device for device in settings.devices if device.startswith("cuda")]
    return settings.model_copy(update={"devices": tuple(named[:1]) or ("cuda:0",)})


def time_on_gpu(
    source: SourceModel,
    batches: Mapping[int, Tensors],
    folder: Path,
    settings: Settings,
    done: Callable[[int], object],
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time the version by CUDA and by TensorRT, whose plan is built in `folder`.

    Returns the timings, and a reason for what cannot run.
    """
    gpu = source.config.gpu
    device = on_gpu(settings).devices[0]
    chosen = GpuOptions(gpu.cpu_nodes, gpu.tf32, gpu.fp16, gpu.memory_bytes)
    loaded: list[DeviceModel] = []
    signatures: list[Signature] = []

    def load(name: str, file: Path, options: LoadOptions) -> LoadedModel:
        plan = None
        if name == TENSORRT:
            plan = TensorRTPlan(folder, tensorrt_shapes(signatures[0], BatchBuckets(SIZES)))
        model = OnnxBackend().load(
            file, LoadOptions(device, options.threads, gpu=chosen).with_gpu(tensorrt=plan)
        )
        assert isinstance(model, DeviceModel)
        loaded.append(model)
        signatures.append(model.signature)
        return model

    try:
        files = dict.fromkeys((CUDA, TENSORRT), source.file)
        timed, failed = time_forms(files, CUDA, batches, 1, done=done, load=load)
    except LoadError as error:
        return {}, {CUDA: f"cannot run: {error}", TENSORRT: "not tried: CUDA cannot run the model"}
    finally:
        for model in loaded:
            model.close()
    return timed, {CUDA: _BASELINE} | {name: f"cannot run: {reason}" for name, reason in failed.items()}


def with_tensorrt(source: SourceModel, parent: Path) -> Path:
    """Make a copy of the model's folder in `parent` that TensorRT serves; returns the copy."""
    folder = with_form(source, source.file, parent)
    file = folder / CONFIG_FILE
    file.write_text(add_tensorrt(file.read_text("utf-8") if file.is_file() else ""), "utf-8")
    return folder


def add_tensorrt(table: str) -> str:
    """Return the text of a `model.toml` with `tensorrt = true` below `[gpu]`."""
    text = re.sub(r"(?m)^\s*tensorrt\s*=.*\n?", "", table)
    if re.search(r"(?m)^\[gpu\]", text):
        return re.sub(r"(?m)^\[gpu\].*$", "[gpu]\ntensorrt = true", text, count=1)
    return f"{text}\n[gpu]\ntensorrt = true\n"


def await_tensorrt(client: Client) -> None:
    """Wait until TensorRT serves the only model; raises LoadError if it never will."""
    while True:
        [version] = client.models()[0]["versions"]
        state = (version["gpu"] or {}).get("tensorrt") or "the model is on no GPU"
        if state == SERVES:
            return
        if state != BUILDING:
            raise LoadError(state)
        time.sleep(_LOOK_S)
