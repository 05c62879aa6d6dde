"""The first step for a file that is served without a folder and needs a `model.toml` or a golden sample."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Final

from inferpool.errors import Reason
from inferpool.repository.layout import CONFIG_FILE, is_in_version_folder

_NEEDS_FOLDER: Final = re.compile(rf"{re.escape(CONFIG_FILE)}|golden sample")


def advise_folder(advice: Reason, file: Path, folder: Path | None) -> Reason:
    """`advice` for the model in `file`, with the step that a bare file needs before anybody can follow it.

    `folder` is the folder whose `model.toml` is read; None for a bare file.
    """
    if folder is not None or _NEEDS_FOLDER.search(advice) is None:
        return advice
    file = file.parent.resolve() / file.name  # not what a link points to: the model is served by its name
    if is_in_version_folder(file):
        where = f"the folder {file.parent.parent.name}, not its file {file.parent.name}/{file.name}"
        step = f"name {where}, to have {CONFIG_FILE} and golden samples read"
    else:
        data = [each.name for each in sorted(file.parent.glob(f"{glob.escape(file.name)}?*"))]
        beside = f" and {', '.join(data)} into {file.stem}/1" if data else ""
        target = f"{file.stem}/1/model{file.suffix}{beside}"
        step = f"first move {file.name} to {target}, to have a folder for {CONFIG_FILE} and golden samples"
    between = "\n" if "\n" in advice else "; "
    return f"{advice}{between}{step}"
