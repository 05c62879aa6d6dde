"""Labels that were moved while the server ran: kept beside the model, so that a restart keeps them.

`<model>/.labels.json` holds each move with the version that `model.toml` gave the label at that time. If
`model.toml` says something else later, its owner has decided anew, and the move no longer counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.system.files import read_file

log = logging.getLogger(__name__)

MOVES_FILE: Final = ".labels.json"
_MOST_BYTES: Final = 1024 * 1024


class LabelMove(NamedTuple):
    """A label that was moved.

    Attributes:
        version: the version that it names now; None if it was removed.
        instead_of: the version that `model.toml` names; None if it has no such label.
    """

    version: int | None
    instead_of: int | None


def apply_moves(configured: Mapping[str, int], moves: Mapping[str, LabelMove]) -> dict[str, int]:
    """The labels of `model.toml` with the moves that still count."""
    labels = dict(configured)
    for label, move in moves.items():
        if configured.get(label) != move.instead_of:
            continue
        if move.version is None:
            labels.pop(label, None)
        else:
            labels[label] = move.version
    return labels


def read_moves(folder: Path | None) -> dict[str, LabelMove]:
    """The moves that are kept beside a model; none if there is no file, or none that can be read."""
    if folder is None:
        return {}
    try:
        kept = json.loads(read_file(folder / MOVES_FILE, _MOST_BYTES))
        return {
            str(label): LabelMove(_number(move["version"]), _number(move["instead_of"]))
            for label, move in kept["labels"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.error("%s/%s cannot be read, and its labels are not used: %s", folder.name, MOVES_FILE, error)
        return {}


def keep_moves(folder: Path | None, moves: Mapping[str, LabelMove]) -> bool:
    """Keep the moves for the next start; False if the folder of the model cannot be written."""
    if folder is None:
        return False
    target, unfinished = folder / MOVES_FILE, folder / f"{MOVES_FILE}.{os.getpid()}"
    try:
        content = {"labels": {label: move._asdict() for label, move in moves.items()}}
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        log.warning("%s: labels last until the next start only: %s", target, error.strerror)
        return False
    return True


def _number(value: object) -> int | None:
    if value is None or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError(f"{value!r} is no version")
