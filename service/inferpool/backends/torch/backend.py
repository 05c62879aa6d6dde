"""The backend for PyTorch's files: TorchScript (`.pt`), exported programs and AOTInductor packages (`.pt2`).

The content of a file decides its kind, not its name. PyTorch is imported when the first such file is loaded,
because the import takes seconds and hundreds of megabytes.
"""

from __future__ import annotations

import contextlib
import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from inferpool.backends.base import Backend, LoadedModel, LoadOptions
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.backends.torch.file_kind import Kind, kind_of
from inferpool.backends.torch.process_env import prepare
from inferpool.backends.torch.trust import check_trust
from inferpool.errors import LoadError, Reason, short_reason
from inferpool.system.gpus import CPU, gpu_support
from inferpool.system.install_hints import install_command

_LOADERS: Final = {
    Kind.SCRIPT: "inferpool.backends.torch.script",
    Kind.PROGRAM: "inferpool.backends.torch.program",
    Kind.COMPILED: "inferpool.backends.torch.aotinductor",
}

_SCRIPT_ANALYSIS: Final = "inferpool.backends.torch.row_analysis.script"
_DEVICE_MODEL: Final = "inferpool.backends.torch.gpu.device_model"
_COMPILED_ON_CPU: Final = "AOTInductor packages run on the CPU only"


class PyTorchBackend(Backend):
    """Loads PyTorch's files if `options` trust them: all kinds can run code while they are loaded."""

    name = "torch"
    suffixes = (".pt", ".pt2")
    runs_code = True

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        """Load `file`; raises LoadError."""
        self.describe()
        kind = kind_of(file)
        check_trust(file, options)
        if options.device == CPU:
            started = _import(_LOADERS[kind]).load(file, options)
            model: LoadedModel = _import("inferpool.backends.torch.model").TorchModel(
                started, options.threads
            )
            return model
        if kind is Kind.COMPILED:
            raise LoadError(_COMPILED_ON_CPU)
        with gpu_support():
            gpu = _import(_DEVICE_MODEL)
        gpu.prepare_gpu(options)
        started = _import(_LOADERS[kind]).load(file, options)
        on_gpu: LoadedModel = gpu.TorchDeviceModel(
            started,
            options.device,
            normalisation=options.gpu.normalisation,
            rounding=options.gpu.rounding,
        )
        return on_gpu

    def read_rows(self, file: Path, options: LoadOptions) -> RowVerdict:
        """Analyse the graph of an exported program, which is data, or of a trusted TorchScript file."""
        try:
            kind = kind_of(file)
            if kind is Kind.PROGRAM:
                # Every server asks this backend for its version, and few read a program.
                from inferpool.backends.torch.row_analysis.exported import analyse_program

                return analyse_program(file)
            if kind is Kind.SCRIPT:
                check_trust(file, options)
                verdict: RowVerdict = _import(_SCRIPT_ANALYSIS).analyse_script(file, options)
                return verdict
        except Exception as error:  # noqa: BLE001 - a file that cannot be read is checked by runs alone
            return RowVerdict(Independence.UNKNOWN, f"the graph cannot be read: {short_reason(error)}")
        return RowVerdict(Independence.UNKNOWN, f"{kind.value}: it has no graph that can be read")

    def gpu_unavailable_reason(self, file: Path) -> Reason | None:
        """Why not, for compiled files and if the installed PyTorch is built for CPUs only."""
        self.describe()
        if kind_of(file) is Kind.COMPILED:
            return _COMPILED_ON_CPU
        try:
            with gpu_support():
                reason: Reason | None = _import(_DEVICE_MODEL).cuda_unavailable_reason()
        except LoadError as error:
            return error.detail
        return reason

    def import_runtime(self) -> None:
        """Import PyTorch."""
        with contextlib.suppress(LoadError):
            _import("inferpool.backends.torch.model")

    def describe(self) -> str:
        """The runtime's version; raises LoadError, which says how to install it, if PyTorch is missing."""
        try:
            return f"torch {version('torch')}"
        except PackageNotFoundError as error:
            raise LoadError(f"PyTorch is not installed: run {install_command('torch')}") from error


def _import(module: str) -> Any:
    """Prepare the process for PyTorch, then import a module that imports PyTorch; raises LoadError."""
    prepare()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("inferpool."):
            raise
        raise _broken(error) from error
    except ImportError as error:
        raise _broken(error) from error


def _broken(error: ImportError) -> LoadError:
    return LoadError(f"PyTorch is installed but cannot be imported: {error}")
