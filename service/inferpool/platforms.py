"""What the platform that runs the server says in its own ways: where the models are, which port to use.

SageMaker, Vertex AI, Azure ML, KServe and Cloud Run start an image with variables and mounts of their own.
The settings that follow from them are weaker than every setting that the user has chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from inferpool.errors import ConfigError, Reason

REPOSITORY_VARIABLE: Final = "INFERPOOL_REPOSITORY"
SAGEMAKER_MODELS: Final = Path("/opt/ml/model")
KSERVE_MODELS: Final = Path("/mnt/models")
IMAGE_MODELS: Final = Path("/models")
MOUNT_WAIT_S: Final = 300.0
"""How long the server waits for models where a platform mounts them."""

_VERTEX_MODELS: Final = "AIP_STORAGE_URI"
_AZURE_MODELS: Final = "AZUREML_MODEL_DIR"
_KSERVE_MODE: Final = "MODEL_INIT_MODE"
_PORTS: Final = ("SAGEMAKER_BIND_TO_PORT", "AIP_HTTP_PORT", "PORT")
_SAGEMAKER_PORT: Final = 8080
_ROUTES: Final = (("predict_route", "AIP_PREDICT_ROUTE"), ("health_route", "AIP_HEALTH_ROUTE"))


class Location(NamedTuple):
    """Where the models are, a path or a reference to a store, and why they are looked for there.

    `is_mount` tells that a platform mounts them.
    """

    text: str
    reason: Reason
    is_mount: bool


def find_repository(
    argument: Path | str | None, environ: Mapping[str, str], root: Path = Path("/")
) -> Location:
    """Find the models: the argument, else what the environment says, else where platforms mount them.

    `root` is the root of the file system. Raises ConfigError if the models are nowhere.
    """
    mounts = (str(SAGEMAKER_MODELS), str(KSERVE_MODELS))
    if argument is not None:
        return Location(str(argument), "the command names it", str(argument) in mounts)
    if text := environ.get(REPOSITORY_VARIABLE):
        return Location(text, f"{REPOSITORY_VARIABLE} names it", text in mounts)
    sagemaker, kserve, image = (
        root / path.relative_to("/") for path in (SAGEMAKER_MODELS, KSERVE_MODELS, IMAGE_MODELS)
    )
    if sagemaker.exists():
        return Location(str(sagemaker), "SageMaker has its models there", True)
    if uri := environ.get(_VERTEX_MODELS):
        parts = urlsplit(uri)
        is_file = parts.scheme == "file" and not parts.netloc
        path = unquote(parts.path) if is_file else uri
        return Location(path, f"{_VERTEX_MODELS} names it", "://" not in path)
    if text := environ.get(_AZURE_MODELS):
        return Location(text, f"{_AZURE_MODELS} names it", True)
    if kserve.exists() or kserve.is_symlink() or _KSERVE_MODE in environ:
        return Location(str(kserve), "KServe mounts its models there", True)
    if image.exists():
        return Location(str(image), "images have their models there", False)
    raise ConfigError(
        f"REPOSITORY is missing: name the folder of the models as an argument or in {REPOSITORY_VARIABLE}."
        f" Platforms have none either: {SAGEMAKER_MODELS}, {_VERTEX_MODELS}, {_AZURE_MODELS},"
        f" {KSERVE_MODELS} and {IMAGE_MODELS}"
    )


def platform_settings(location: Location, environ: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """The settings that a platform implies, by name: what says so, a variable or a path, and the value."""
    found: dict[str, tuple[str, Any]] = {}
    if location.is_mount:
        found["repository_wait_s"] = (location.text, MOUNT_WAIT_S)
    if Path(location.text).parts[-3:] == SAGEMAKER_MODELS.parts[1:] and location.is_mount:
        found["port"] = (location.text, _SAGEMAKER_PORT)
    for variable in _PORTS:
        text = environ.get(variable, "")
        # Docker's links set variables of this name to an address.
        if text and "://" not in text:
            found["port"] = (variable, text)
            break
    for setting, variable in _ROUTES:
        if path := environ.get(variable):
            found[setting] = (variable, path.rstrip("/") or "/")
    return found
