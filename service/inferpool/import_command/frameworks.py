"""Which framework a source is of, and the script that converts its models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from inferpool.errors import ConfigError
from inferpool.release.importers.hugging_face_folder import FolderError, read_folder

SCRIPTS: Final = {
    "scikit-learn": "scikit_learn.py",
    "xgboost": "xgboost_model.py",
    "lightgbm": "lightgbm_model.py",
    "catboost": "catboost_model.py",
    "keras": "keras_model.py",
    "keras-tensorflow": "keras_tensorflow.py",
    "tensorflow": "saved_model.py",
    "torch": "torch_program.py",
    "torch-module": "torch_module.py",
    "hugging-face": "hugging_face.py",
}
"""The script in `release/importers` for each value of `--from`."""

BY_SUFFIX: Final = {
    ".joblib": "scikit-learn", ".pkl": "scikit-learn", ".pickle": "scikit-learn",
    ".json": "xgboost", ".ubj": "xgboost", ".txt": "lightgbm", ".cbm": "catboost",
    ".keras": "keras", ".h5": "keras", ".hdf5": "keras",
    ".pt2": "torch", ".pt": "torch-module", ".pth": "torch-module",
}  # fmt: skip
"""The framework whose files usually end so."""

SAVED_MODEL: Final = "saved_model.pb"
HUGGING_FACE: Final = "config.json"
_FUNCTION: Final = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Source:
    """What is imported.

    Attributes:
        path: The file of the model, the folder of a SavedModel or of Hugging Face, or the file of Python that
            builds the model.
        framework: A key of `SCRIPTS`.
        function: The function of the file that returns a PyTorch module; empty for every other source.
    """

    path: Path
    framework: str
    function: str = ""

    @property
    def name(self) -> str:
        """What a card calls the source."""
        return f"{self.path.name}:{self.function}" if self.function else self.path.name


def recognise_source(text: str, framework: str | None, *, weights: bool, trusted: bool) -> Source:
    """Return what SOURCE is; `framework` is that of `--from`.

    Raises:
        ConfigError: there is no such source, its framework is not known, it runs code and is not trusted, or
            there are weights for a source that takes none.
    """
    found = _find(text, framework)
    if weights and not found.function:
        raise ConfigError(
            f"--weights are for a module of PyTorch; SOURCE is {found.name}, not FILE.py:FUNCTION"
        )
    if found.framework == "torch-module" and not trusted:
        what = "runs the code in it" if found.function else "is a pickle, which can run code"
        raise ConfigError(f"{found.name} {what}: if you trust its author, add --trust")
    return found


def _find(text: str, framework: str | None) -> Source:
    called = _FUNCTION.fullmatch(text)
    if called is not None and framework in (None, "torch-module") and not Path(text).exists():
        path = Path(called["file"])
        if not path.is_file():
            raise ConfigError(f"{path} is no file")
        return Source(path, "torch-module", called["function"])
    path = Path(text)
    if path.name == SAVED_MODEL and path.is_file():
        path = path.absolute().parent
    if path.is_dir():
        if framework == "hugging-face" or (framework is None and (path / HUGGING_FACE).is_file()):
            try:
                read_folder(path)  # before packages are fetched for a folder that cannot be converted
            except FolderError as error:
                raise ConfigError(f"{path} cannot be imported: {error}") from None
            return Source(path, "hugging-face")
        if not (path / SAVED_MODEL).is_file():
            raise ConfigError(
                f"{path} is no SavedModel of TensorFlow: it has no {SAVED_MODEL}, nor the"
                f" {HUGGING_FACE} of Hugging Face"
            )
        return Source(path, framework or "tensorflow")
    if not path.is_file():
        raise ConfigError(f"{path} is no file")
    if path.suffix.lower() == ".py":
        raise ConfigError(f"{path.name}: name the function that returns the module, as in {path.name}:build")
    chosen = framework or BY_SUFFIX.get(path.suffix.lower())
    if chosen is None:
        raise ConfigError(f"{path.name}: --from says what it is; expected {', '.join(BY_SUFFIX)}")
    return Source(path, chosen)
