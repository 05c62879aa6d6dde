"""AOTInductor packages (`torch._inductor.aoti_compile_and_package`): exported programs as machine code.

PyTorch's own runner of packages holds the interpreter lock during a run, which stops every other thread
(pytorch/pytorch#197516). So the library in the package is called directly, without the lock. Only a package
that needs PyTorch's help in a run uses PyTorch's runner.

A package has neither the datatypes and shapes nor the names of positional arguments. Compiled code trusts its
inputs, and reads beyond inputs that are smaller than it was compiled for. So the checks in the compiled code
are turned on, and a package that refuses a single row is not served.
"""

from __future__ import annotations

import json
import logging
import platform
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Final, TypeAlias

import torch
from torch.utils import _pytree as pytree

from inferpool.backends.base import LoadOptions, TensorHint
from inferpool.backends.torch.aotinductor_library import Library
from inferpool.backends.torch.model import (
    InputTensors,
    OutputTree,
    Runnable,
    StartedModel,
    check_datatypes,
    quiet,
    run_once,
    start,
)
from inferpool.backends.torch.signature import complete_inputs, flatten, name_inputs, pairs_to_try
from inferpool.errors import LoadError, short_reason
from inferpool.system.cpu import usable_cores
from inferpool.tensors import ANY, names_text

log = logging.getLogger(__name__)

FORM: Final = "AOTInductor package"

_Run: TypeAlias = Callable[[list[torch.Tensor]], Sequence[torch.Tensor | None]]


def load(file: Path, options: LoadOptions) -> StartedModel:
    """Load a package; raises LoadError."""
    with quiet(file), TemporaryDirectory(prefix="inferpool-") as temporary:
        folder = Path(temporary)
        name = _unpack(file, folder)
        _check_machine(folder)
        libraries = list(folder.glob("*.so"))
        if len(libraries) != 1:
            raise LoadError(f"{file.name} has {len(libraries)} compiled libraries; expected one")
        library = Library(libraries[0], usable_cores())
        try:
            if library.needs_weights:
                raise LoadError(f"{file.name} was compiled without its weights; compile it with them")
            run, form = library.run, FORM
            if _calls_pytorch(folder):
                run = torch._C._aoti.AOTIModelPackageLoader(str(file), name, False, 1, -1).boxed_run
                form = f"{FORM}, holding the interpreter lock"
                log.warning(
                    "%s has operations for which compiled code needs PyTorch: the server does nothing else"
                    " during a run",
                    file,
                )
            runnable = _runnable(library, run, form, options)
            started = start(runnable, options)
            _check_single_row(runnable, options)
            return started
        except BaseException:
            library.close()
            raise


def _runnable(library: Library, run: _Run, form: str, options: LoadOptions) -> Runnable:
    input_tree, output_tree = map(pytree.treespec_loads, library.call)
    args, kwargs = pytree.tree_unflatten(range(input_tree.num_leaves), input_tree)
    positional = [index for _, index in flatten(args)]
    by_name = {"_".join(map(str, path)): index for path, index in flatten(kwargs)}
    unnamed = name_inputs(len(positional), by_name.keys(), options.inputs, options.samples)
    order = dict(zip(unnamed, positional, strict=True)) | by_name
    names = sorted(order, key=order.__getitem__)
    if len(names) != input_tree.num_leaves:
        raise LoadError(f"two inputs would have the same name: {names_text(names)}")
    inputs = complete_inputs([TensorHint(name) for name in names], (), options.inputs, options.samples)
    check_datatypes(inputs)
    paths = [path for path, _ in flatten(pytree.tree_unflatten(range(output_tree.num_leaves), output_tree))]

    def forward(feeds: InputTensors) -> OutputTree:
        outputs = zip(paths, run([feeds[name] for name in names]), strict=True)
        return {path: tensor for path, tensor in outputs if tensor is not None}

    return Runnable(forward, inputs, form, copies=True, release=library.close)


def _check_single_row(runnable: Runnable, options: LoadOptions) -> None:
    """Raise LoadError if batches of any size are described but the code refuses a batch of one row.

    By default the compiler writes "at least two" for every size that varies.
    """
    if any(not spec.shape or spec.shape[0] != ANY for spec in runnable.inputs):
        return
    for inputs, _ in pairs_to_try(runnable.inputs, options.samples):
        with suppress(RuntimeError):
            run_once(runnable, inputs, options.threads)
            break
    try:
        run_once(runnable, {name: tensor[:1] for name, tensor in inputs.items()}, options.threads)
    except RuntimeError as error:
        raise LoadError(
            f"the compiled code refuses a single row ({short_reason(error)}); compile it again with"
            ' inductor_configs={"aot_inductor.check_lowerbound": False}'
        ) from error


def _unpack(file: Path, folder: Path) -> str:
    """Extract the files of the compiled model into `folder`; returns the model's name in the package."""
    models: dict[str, list[zipfile.ZipInfo]] = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            parts = PurePosixPath(entry.filename).parts
            if parts[1:3] == ("data", "aotinductor") and len(parts) == 5:
                models.setdefault(parts[3], []).append(entry)
        name = "model" if "model" in models else next(iter(models))
        if len(models) > 1 and name != "model":
            raise LoadError(f'{file.name} has the models {names_text(models)}, but none is called "model"')
        for entry in models[name]:
            (folder / PurePosixPath(entry.filename).name).write_bytes(archive.read(entry))
    return name


def _check_machine(folder: Path) -> None:
    """Raise LoadError if the code was compiled for another kind of machine: it would crash the server."""
    metadata: dict[str, str] = {}
    for file in folder.glob("*_metadata.json"):
        metadata |= json.loads(file.read_text(encoding="utf-8"))
    here = {
        "AOTI_DEVICE_KEY": "cpu",
        "AOTI_PLATFORM": platform.system().lower(),
        "AOTI_MACHINE": platform.machine(),
    }
    for key, expected in here.items():
        if metadata.get(key, expected) != expected:
            raise LoadError(f"it was compiled for {metadata[key]}, but this machine is {expected}")
    wanted = [flag.lower() for flag in metadata.get("AOTI_CPU_ISA", "").split()]
    try:
        has = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return
    lacking = [flag for flag in wanted if flag.startswith(("avx", "amx")) and not has & {flag, f"{flag}f"}]
    if lacking:
        raise LoadError(f"it was compiled for a processor with {', '.join(lacking)}, which this one lacks")


def _calls_pytorch(folder: Path) -> bool:
    """Whether PyTorch has to run some operations for the code; a file of its own lists them."""
    listed = [file for file in folder.glob("*.json") if not file.name.endswith("_metadata.json")]
    return any("nodes" in json.loads(file.read_text(encoding="utf-8")) for file in listed)
