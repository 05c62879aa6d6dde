"""Fetches one version of a model from a store, and lays it beside the models folder, to be renamed into it.

CACHE/stores/loads/KEY/     what has arrived, until the version is complete: a fetch that was cut goes on
REPOSITORY/.incoming-…/     the version, or the whole model if the folder has none of that name
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferpool.backends.registry import backends_by_suffix
from inferpool.errors import StoreError
from inferpool.repository.stores.allowed_sources import AllowedSources, parse_source
from inferpool.repository.stores.content_cache import Blob, ContentCache, locked
from inferpool.repository.stores.fetch import fetch_contents, open_store
from inferpool.repository.stores.progress import Progress
from inferpool.repository.stores.reference import StoreReference
from inferpool.repository.stores.working_folder import build_folder

log = logging.getLogger(__name__)

UNUSED_S: Final = 24 * 3600.0
"""How long what has arrived of a version that nobody asks for again is kept."""
MADE: Final = "made"
"""The name in the staging folder of what is to be renamed."""
INCOMING: Final = ".inferpool-incoming-"
"""How the names of staging folders begin; no model's name does."""
MOST_VERSION: Final = 2**53 - 1
"""The largest number of a version that is fetched: JSON has no larger ones that every reader takes."""
_VERSION: Final = re.compile(r"([1-9]\d*)/")
_PARTIAL: Final = ("partial", "blobs", "index")


@dataclass(frozen=True, slots=True)
class WantedVersion:
    """What is to be fetched, and where it belongs.

    Attributes:
        source: the store or path, as the administrator wrote it.
        prefixes: the prefixes below which sources may lie.
        model: the name of the model's folder.
        version: the number that the version is to have; None takes that of the source.
        repository: the models folder.
        folder: the model's folder, which is the models folder itself if that has one model only.
        cache: the folder that holds what has arrived.
        staging: where the version is to lie until it is renamed: a new folder in the models folder.
    """

    source: str
    prefixes: tuple[str, ...]
    model: str
    version: int | None
    repository: str
    folder: str
    cache: str
    staging: str

    @property
    def key(self) -> str:
        """A name for what has arrived: the same for the same request."""
        return source_key(f"{self.source}\n{self.model}\n{self.version}")

    def to_json(self) -> dict[str, Any]:
        """The values as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> WantedVersion:
        """What `to_json` has written."""
        return cls(**{**table, "prefixes": tuple(table["prefixes"])})


class FetchedVersion(NamedTuple):
    """What has come.

    Attributes:
        version: its number.
        target: where the staging folder's `made` is to be renamed to: the folder of the version, or that of
            a model that is new; empty if the models folder has the same files already.
    """

    version: int
    target: str


def source_key(text: str) -> str:
    """A name for a source, by its whole text; it gives no secret away."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch_version(wanted: WantedVersion, tell: Callable[[int, int], None]) -> FetchedVersion:
    """Fetch a version; `tell` is called with the bytes that have arrived, and those that are expected.

    Raises StoreError, or Forbidden for a source that is not allowed.
    """
    allowed = AllowedSources(wanted.prefixes)
    source = allowed.allowed(parse_source(wanted.source))
    loads = Path(wanted.cache) / "stores" / "loads"
    contents = ContentCache(loads / wanted.key)
    if not contents.prepare():
        raise StoreError(f"{loads} can only be read; choose another folder with --cache-dir")
    _remove_unused(loads, wanted)
    with locked(contents.folder / "lock"):
        progress = Progress(str(source), tell)
        with contextlib.closing(open_store(source, allowed.covers_address)) as store:
            _, arrangement, blobs = fetch_contents(source, store, contents, progress)
        files = {target: blobs[path] for target, path in arrangement.files.items()}
        version, inside = choose_version(arrangement.depth, files, wanted.model, wanted.version, source)
        try:
            target = _lay_out(wanted, version, inside, contents)
        except OSError as error:
            raise StoreError(f"{wanted.repository} cannot take the version: {error.strerror}") from None
        for name in _PARTIAL:
            shutil.rmtree(contents.folder / name, ignore_errors=True)
    return FetchedVersion(version, target)


def choose_version(
    depth: int, files: Mapping[str, Blob], model: str, version: int | None, source: StoreReference
) -> tuple[int, dict[str, Blob]]:
    """The number that a version gets, and the files of the model's folder with that version alone.

    `files` are arranged in `depth` (see `Arrangement`). Raises StoreError if the source does not have what is
    asked for.
    """
    inside = _of_model(depth, files, model, source)
    found = {int(match[1]) for path in inside if (match := _VERSION.match(path))}
    if version in found or not found:
        chosen = version
    elif len(found) == 1 or version is None:
        chosen = max(found)
    else:
        have = ", ".join(map(str, sorted(found)))
        raise StoreError(f"{source} has no version {version}; it has {have}")
    if chosen is None or not found:
        raise StoreError(f"{source} has no version of {model}: expected {model}/1/model.onnx")
    number = version or chosen
    last = source.path.rpartition("/")[2]
    if version is None and found == {1} and re.fullmatch(r"[1-9]\d{0,8}", last):
        number = int(last)  # s3://bucket/digits/3 has the files of a version, and the number above them
    if number > MOST_VERSION:
        raise StoreError(f"{source} has version {number}; the largest number is {MOST_VERSION}")
    taken = {}
    for path, blob in inside.items():
        match = _VERSION.match(path)
        if match is None:
            taken[path] = blob
        elif int(match[1]) == chosen:
            taken[f"{number}/{path[match.end() :]}"] = blob
    return number, taken


def _of_model(depth: int, files: Mapping[str, Blob], model: str, source: StoreReference) -> dict[str, Blob]:
    """The files of one model, by their paths in its folder."""
    if depth == 0:
        return dict(files)
    suffixes = tuple(backends_by_suffix())
    folders = {path.partition("/")[0] for path in files if "/" in path}
    bare = {path.rpartition(".")[0]: path for path in files if "/" not in path and path.endswith(suffixes)}
    names = sorted(folders | bare.keys())
    name = model if model in names else names[0] if len(names) == 1 else None
    if name is None:
        raise StoreError(f"{source} has no model {model}; it has {', '.join(names[:5])}")
    if name in folders:
        return {path[len(name) + 1 :]: blob for path, blob in files.items() if path.startswith(f"{name}/")}
    file = bare[name]
    # A bare file, and the files of weights that it names: digits.onnx, digits.onnx.data.
    inside = {f"1/{path}": blob for path, blob in files.items() if path.startswith(f"{file}.")}
    return {**inside, f"1/model.{file.rpartition('.')[2]}": files[file]}


def _lay_out(wanted: WantedVersion, version: int, inside: Mapping[str, Blob], contents: ContentCache) -> str:
    """Lay the version into the staging folder; returns its target, as `FetchedVersion` has it."""
    folder, staging = Path(wanted.folder), Path(wanted.staging)
    start = f"{version}/"
    own = {path[len(start) :]: blob for path, blob in inside.items() if path.startswith(start)}
    target = folder / str(version)
    if target.exists():
        if _digests(target) == {path: blob.sha256 for path, blob in own.items()}:
            return ""
        raise StoreError(
            f"{wanted.model}/{version} is there already, with other files, and a version does not change;"
            " give this one another number"
        )
    staging.mkdir()
    try:
        # What lies beside the versions belongs to all of them: only a new model brings its own.
        made = staging / MADE
        if folder.exists():
            build_folder(made, own, contents)
            return str(target)
        build_folder(made, inside, contents)
        return str(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as opened:
                found[str(path.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def _remove_unused(loads: Path, wanted: WantedVersion) -> None:
    """Delete what was left of fetches that nobody has gone on with for a day."""
    now = time.time()
    for folder in (*Path(wanted.repository).glob(f"{INCOMING}*"), *loads.iterdir()):
        with contextlib.suppress(OSError):
            if folder.name == wanted.key or now - folder.stat().st_mtime <= UNUSED_S:
                continue
            if folder.parent == loads:
                with (folder / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            else:
                shutil.rmtree(folder)
