"""Loads the library of ONNX Runtime while the process imports other modules.

The library takes the system tens of milliseconds. `import onnxruntime` holds the GIL for all of that time; a
call by ctypes does not. The later import finds the library loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_FILES: Final = "capi/onnxruntime_pybind11_state*.so"


def load_library_early() -> None:
    """Begin to load the library in a thread. Without ONNX Runtime, nothing happens: a backend tells."""
    spec = find_spec("onnxruntime")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder).glob(_FILES)]
    if len(files) == 1:
        arguments = (os.fsencode(files[0]), sys.getdlopenflags())
        threading.Thread(target=ctypes.CDLL(None).dlopen, args=arguments, name="library", daemon=True).start()
