"""PyTorch's files: TorchScript (`.pt`), exported programs and AOTInductor packages (`.pt2`).

What a file is, is told by what is in it, not by its name. PyTorch itself is imported when the first such
file is loaded, not before: it takes seconds and hundreds of megabytes.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from inferpool.backends.base import Backend, LoadedModel, LoadOptions
from inferpool.backends.torch.file_kind import Kind, kind_of
from inferpool.backends.torch.process_env import prepare
from inferpool.backends.torch.trust import check_trust
from inferpool.errors import LoadError
from inferpool.system.install_hints import install_command

_LOADERS: Final = {
    Kind.SCRIPT: "inferpool.backends.torch.script",
    Kind.PROGRAM: "inferpool.backends.torch.program",
    Kind.COMPILED: "inferpool.backends.torch.aotinductor",
}

_COMPILED: Final = "AOTInductor packages run on the CPU only"


class PyTorchBackend(Backend):
    """Loads PyTorch's files, where `options` trust them: all of them can run code when they are loaded."""

    name = "torch"
    suffixes = (".pt", ".pt2")

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        """Load `file`; raises LoadError."""
        self.describe()
        kind = kind_of(file)
        check_trust(file, options)
        if options.device != "cpu":
            if kind is Kind.COMPILED:
                raise LoadError(_COMPILED)
            _imported("inferpool.backends.torch.gpu.device_model").prepare_gpu(options)
        model: LoadedModel = _imported(_LOADERS[kind]).load(file, options)
        return model

    def gpu_unavailable_reason(self, file: Path) -> str:
        """Why not, for compiled files, and where the PyTorch that is installed is the one for CPUs."""
        self.describe()
        if kind_of(file) is Kind.COMPILED:
            return _COMPILED
        lacks: str = _imported("inferpool.backends.torch.gpu.device_model").lacks_cuda()
        return lacks

    def describe(self) -> str:
        """The runtime's version; raises LoadError, which says how to install it, where it is not."""
        try:
            return f"torch {version('torch')}"
        except PackageNotFoundError as error:
            raise LoadError(f"PyTorch is not installed: {install_command('torch')}") from error


def _imported(module: str) -> Any:
    """A module that imports PyTorch, which the process has to be prepared for."""
    prepare()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LoadError(f"PyTorch is installed but cannot be imported: {error}") from error
