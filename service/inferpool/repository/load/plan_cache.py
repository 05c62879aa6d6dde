"""What was found out about models, kept between starts: one JSON file a model, machine and wish."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from inferpool import __version__
from inferpool.pool.latency_model import Measurement
from inferpool.repository.load.planner import Plan, PlanConstraints

log = logging.getLogger(__name__)


class PlanCache:
    """Plans by the model's content, the runtime, the machine and what was wished for."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keep them in `folder`, or in the user's cache folder."""
        self._folder = folder

    def find(self, file: Path, samples: Sequence[Path], wishes: PlanConstraints, runtime: str) -> Plan | None:
        """The plan that was kept for this, or None; the proof may rest on `samples`, so they count."""
        try:
            target = self._file(file, samples, wishes, runtime)
            table = json.loads(target.read_text(encoding="utf-8"))
            measured = tuple(Measurement(*line) for line in table.pop("table"))
            return Plan(**table | {"table": measured, "rungs": tuple(table["rungs"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            log.warning("a kept measurement of %s cannot be read and is made anew: %s", file, error)
            return None

    def keep(
        self, file: Path, samples: Sequence[Path], wishes: PlanConstraints, runtime: str, plan: Plan
    ) -> None:
        """Keep `plan`; where that is not possible (a read-only file system) the next start measures again."""
        try:
            target = self._file(file, samples, wishes, runtime)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(asdict(plan)), encoding="utf-8")
            part.replace(target)
        except (OSError, RuntimeError, ValueError) as error:
            log.info("measurements are not kept: %s", error)

    def beside(self, file: Path) -> Path | None:
        """The folder for what a backend makes of the content of `file`; None where it cannot be had."""
        try:
            return cache_folder(self._folder) / f"{file.parent.parent.name}-{_digest(_whole(file))[:24]}"
        except (OSError, RuntimeError) as error:
            log.info("what is made of %s is not kept: %s", file, error)
            return None

    def engine_folder(self, file: Path, facts: Sequence[str]) -> Path:
        """Where an engine of TensorRT for the model `file` is kept, which holds for `facts` alone.

        Raises RuntimeError where the user has no home, OSError where the model cannot be read.
        """
        told = hashlib.sha256("\n".join((__version__, *facts, _digest(_whole(file)))).encode()).hexdigest()
        return cache_folder(self._folder) / "tensorrt" / f"{file.parent.parent.name}-{told[:24]}"

    def _file(self, file: Path, samples: Sequence[Path], wishes: PlanConstraints, runtime: str) -> Path:
        facts = [__version__, runtime, _machine(), repr(wishes), _digest(_whole(file)), _digest(samples)]
        digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        return cache_folder(self._folder) / f"{file.parent.parent.name}-{digest[:24]}.json"


def cache_folder(chosen: Path | None) -> Path:
    """`chosen`, or the user's own (`XDG_CACHE_HOME`, `~/.cache`); raises RuntimeError without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (chosen if chosen is not None else base / "inferpool").expanduser()


def _whole(file: Path) -> list[Path]:
    """A model's files: external data lies beside it, in a version's folder, or is called like a bare file."""
    pattern = "*" if file.stem == "model" else glob.escape(file.name) + "*"
    return [item for item in file.parent.glob(pattern) if item.is_file()]


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of `files`: a model with its external data, or its samples."""
    digest = hashlib.sha256()
    for item in sorted(files):
        with item.open("rb") as stream:
            digest.update(f"{item.name}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def _machine() -> str:
    """What makes measurements of one machine worthless on another."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        models = {line.partition(":")[2] for line in info.splitlines() if line.startswith("model name")}
    except OSError:
        models = set()
    return " ".join((platform.machine(), *sorted(models), str(os.cpu_count())))
