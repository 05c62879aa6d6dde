"""Keeps plans between starts: one JSON file for each model, machine and set of constraints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Final

from inferpool import __version__
from inferpool.backends.row_verdict import Evidence
from inferpool.pool.latency_model import Measurement
from inferpool.pool.row_cost import CostPoint, RowCost
from inferpool.repository.load.batching_proof import Fault
from inferpool.repository.load.batching_remedies import Obstacle
from inferpool.repository.load.declared_shapes import ShapeCorrections
from inferpool.repository.load.load_files import LoadFiles
from inferpool.repository.load.plan import Plan, PlanConstraints
from inferpool.system.files import cache_folder, read_file

log = logging.getLogger(__name__)

_MOST_BYTES: Final = 16 * 2**20
"""Bytes of a kept plan; the shapes of a model with many outputs take most of them."""

_END_BYTES: Final = 64 * 1024
"""Bytes at each end of a model file by which the number of threads is guessed."""

_NOWHERE: Final = Path(os.devnull)
"""The folder of a user without a home: no file can be made in it, and plans are kept in memory only."""

_DROPPED: Final = ""
"""In place of a plan that was wrong, so that a folder that is only read does not bring it back."""

_FORMAT = "4"
"""Raised whenever plans are made by other rules, so that no plan made by the old ones is found."""


class PlanCache:
    """Plans by the model's content, the runtime, the machine and the constraints."""

    def __init__(
        self,
        folder: Path | None = None,
        read_only: Path | None = None,
        *,
        remeasure: bool = False,
        plans: Mapping[str, str] | None = None,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep plans in `folder`, or in the user's cache folder, and in memory.

        `read_only` is a folder with plans of other starts; the plans in `folder` are newer.
        `remeasure` ignores the plans that are kept. `plans` are those that another process has measured, as
        `plans` returned them. `on_drop` is called when a plan has turned out to be wrong.
        """
        self._folder = folder
        self._read_only = read_only
        self._remeasure = remeasure
        self._plans = dict(plans or {})
        self._on_drop = on_drop

    def plans(self) -> Mapping[str, str]:
        """The plans of this process as JSON, by the names of their files. They outlive no process."""
        return dict(self._plans)

    def locate(
        self, files: LoadFiles, samples: Sequence[Path], constraints: PlanConstraints, runtime: str
    ) -> Path | None:
        """Where the plan for a model is kept, whether there is one or not; None if no plan can be kept.

        A plan depends on the contents of `samples`, too.
        """
        try:
            return self._file(files, samples, constraints, runtime)
        except OSError as error:
            log.info("measurements are not kept: %s", error)
            return None

    def find(self, target: Path | None) -> Plan | None:
        """The plan that was kept in `target`, or None."""
        if self._remeasure or target is None:
            return None
        try:
            text = self._read(target)
            table = json.loads(text)
            measured = tuple(Measurement(*line) for line in table.pop("table"))
            fault = table.pop("fault")
            if fault is not None:
                fault = Fault(Obstacle(fault[0]), *fault[1:])
            evidence = table.pop("evidence")
            known = {
                "table": measured,
                "buckets": tuple(table["buckets"]),
                "fault": fault,
                "evidence": None if evidence is None else Evidence(evidence),
                "row_cost": _row_cost(table["row_cost"]),
                "shapes": _shapes(*table["shapes"]),
            }
            plan = Plan(**table | known)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
            log.warning("the kept measurement in %s cannot be read, so it is made again: %s", target, error)
            return None
        self._plans[target.name] = text
        return plan

    def keep(self, target: Path | None, plan: Plan) -> None:
        """Keep `plan` in `target`. If that fails (a read-only file system), the next start measures again."""
        if target is not None:
            self._write(target, json.dumps(asdict(plan)))

    def drop(self, target: Path | None) -> None:
        """Forget the plan in `target`, which has turned out to be wrong: the next start makes it again."""
        if target is None:
            return
        if self._read_only is None:
            self._plans.pop(target.name, None)
        else:
            self._plans[target.name] = _DROPPED
        self._on_drop()
        try:
            target.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the kept measurement in %s is wrong, and cannot be removed: %s", target, error)

    def take(self, plans: Mapping[str, str]) -> None:
        """Know plans that another process has made, as `plans` returned them there."""
        self._plans.update(plans)

    def guess_threads(self, file: Path, cores: int) -> int | None:
        """The threads of the plan that is likely to be found once the model is loaded; None if there is none.

        Only then is the file of the plan known. A wrong guess costs a second load.
        """
        target = self._guess_file(file, cores)
        try:
            return None if target is None or self._remeasure else max(1, int(self._read(target)))
        except (OSError, ValueError):
            return None

    def keep_threads(self, file: Path, cores: int, threads: int) -> None:
        """Keep what `guess_threads` returns at the next load."""
        target = self._guess_file(file, cores)
        if target is not None:
            self._write(target, str(threads))

    def _guess_file(self, file: Path, cores: int) -> Path | None:
        try:
            ends = _ends(file)
            digest = hashlib.sha256(f"{_machine()}\n{cores}\n".encode() + ends).hexdigest()
            return cache_folder(self._folder) / f"{file.parent.parent.name}-{digest[:24]}.threads"
        except (OSError, RuntimeError):
            return None

    def _write(self, target: Path, text: str) -> None:
        """Write a text to be kept, with its digest. If that fails, it is kept in memory alone."""
        self._plans[target.name] = text
        encoded = text.encode()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(f".{os.getpid()}.part")
            unfinished.write_bytes(hashlib.sha256(encoded).hexdigest().encode() + b"\n" + encoded)
            unfinished.replace(target)
        except (OSError, RuntimeError, ValueError) as error:
            log.info("measurements are not kept: %s", error)

    def _read(self, target: Path) -> str:
        """The JSON of the plan for `target`; raises OSError, and ValueError if it is damaged."""
        text = self._plans.get(target.name)
        if text:
            return text
        try:
            return _read(target)
        except (FileNotFoundError, NotADirectoryError):
            if self._read_only is None or text == _DROPPED:
                raise
            return _read(self._read_only / target.name)

    def beside(self, files: LoadFiles) -> Path | None:
        """The folder for what a backend derives from a model; None if the user has no cache folder."""
        try:
            return cache_folder(self._folder) / f"{_model_name(files)}-{files.model_digest()[:24]}"
        except (OSError, RuntimeError) as error:
            log.info("files that are derived from %s are not kept: %s", files.file, error)
            return None

    def engine_folder(self, files: LoadFiles, facts: Sequence[str]) -> Path:
        """Where a TensorRT plan for a model is kept; it is valid for `facts` alone.

        Raises RuntimeError if the user has no home, OSError if the model cannot be read.
        """
        digest = hashlib.sha256("\n".join((__version__, *facts, files.model_digest())).encode()).hexdigest()
        return cache_folder(self._folder) / "tensorrt" / f"{_model_name(files)}-{digest[:24]}"

    def _file(
        self, files: LoadFiles, samples: Sequence[Path], constraints: PlanConstraints, runtime: str
    ) -> Path:
        facts = [
            __version__,
            _FORMAT,
            runtime,
            _machine(),
            repr(constraints),
            files.model_digest(),
            files.digest_of(samples),
        ]
        digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        try:
            folder = cache_folder(self._folder)
        except RuntimeError:
            folder = _NOWHERE
        return folder / f"{_model_name(files)}-{digest[:24]}.json"


def _read(target: Path) -> str:
    """The JSON of the plan in `target`; raises OSError, and ValueError if it is damaged."""
    digest, _, text = read_file(target, _MOST_BYTES).partition(b"\n")
    if digest.decode("ascii") != hashlib.sha256(text).hexdigest():
        raise ValueError("it is damaged")
    return text.decode()


def _ends(file: Path) -> bytes:
    """The size of a file, and its first and last bytes: enough to guess which model it is."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        first = stream.read(_END_BYTES)
        stream.seek(max(0, size - _END_BYTES))
        return b"%d\n%b%b" % (size, first, stream.read(_END_BYTES))


def _row_cost(kept: dict[str, Any] | None) -> RowCost | None:
    if kept is None:
        return None
    return RowCost(tuple(CostPoint(*point) for point in kept["points"]), kept["least"])


def _shapes(names: list[str], outputs: list[tuple[str, list[int] | None]]) -> ShapeCorrections:
    shapes = ((name, None if shape is None else tuple(shape)) for name, shape in outputs)
    return ShapeCorrections(tuple(names), tuple(shapes))


def _model_name(files: LoadFiles) -> str:
    """The name of the model in the names of kept files."""
    return files.file.parent.parent.name


@cache
def _machine() -> str:
    """The facts about this machine that measurements depend on."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        models = {line.partition(":")[2] for line in info.splitlines() if line.startswith("model name")}
    except OSError:
        models = set()
    return " ".join((platform.machine(), *sorted(models), str(os.cpu_count())))
