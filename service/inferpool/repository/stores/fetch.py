"""Fetches the models that a reference names into a local folder."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.backends.registry import backends_by_suffix
from inferpool.errors import StoreError, StoreUnreachable
from inferpool.repository.stores.allowed_sources import FOLDER
from inferpool.repository.stores.arrangement import Arrangement, arrange
from inferpool.repository.stores.content_cache import Blob, ContentCache, locked
from inferpool.repository.stores.downloader import Downloader
from inferpool.repository.stores.folder_store import FolderStore
from inferpool.repository.stores.progress import Progress
from inferpool.repository.stores.reference import HUB, OBJECT_STORES, WEB, StoreReference
from inferpool.repository.stores.registry_store import RegistryStore, keep_of_image
from inferpool.repository.stores.store import CredentialsRefused, RemoteFile, Store, StoreChanged, stamp_of
from inferpool.repository.stores.unpacking import keep_all, unpack
from inferpool.repository.stores.working_folder import FolderState, WorkingFolder

log = logging.getLogger(__name__)

TRIES: Final = 3
"""How often a store is listed again because it has changed meanwhile."""
_UNCHANGED: Final = "%s: unchanged since %s, 0 bytes fetched"
_WHITEOUT: Final = ".wh."
"""How a layer of an image says that a file of the layers below is gone."""


class Fetched(NamedTuple):
    """What has come of it.

    Attributes:
        path: the folder of the models.
        changed: whether the folder was another one before.
        fetched_bytes: the bytes of content that came from the store.
    """

    path: Path
    changed: bool
    fetched_bytes: int


def working_folder(reference: StoreReference, cache: Path) -> WorkingFolder:
    """The folder for the models of `reference`, below the folder `cache`."""
    return WorkingFolder(cache / "stores", reference.key, reference.model_name)


def fetch(reference: StoreReference, cache: Path, *, not_since: float | None = None) -> Fetched:
    """Fetch what is missing or has changed, and return the folder.

    If the store does not answer or refuses, or if the cache can only be read, the folder stays as it is. With
    `not_since`, nobody asks the store again if it was asked after that moment, in seconds since 1970.

    Raises StoreError if there is no folder to serve from, or if the store has no models.
    """
    folder, contents = working_folder(reference, cache), ContentCache(cache / "stores")
    if not contents.prepare():
        return _read_only(reference, folder)
    with locked(folder.lock):
        if not_since is not None and folder.asked_at() > not_since and folder.state() is not None:
            return Fetched(folder.path, False, 0)
        folder.note_asked()
        # A store that is asked every minute is not worth a line each time.
        return _fetch(reference, folder, contents, logging.INFO if not_since is None else logging.DEBUG)


def _read_only(reference: StoreReference, folder: WorkingFolder) -> Fetched:
    state = folder.state()
    if state is None:
        raise StoreError(
            f"{reference} is not in the cache, which can only be read; choose another one with --cache-dir"
        )
    try:
        with contextlib.closing(open_store(reference)) as store:
            if stamp_of(store.list_files()) != state.stamp:
                log.warning(
                    "%s has changed, and the cache can only be read: what was fetched at %s is served",
                    reference, _shown_time(state),
                )  # fmt: skip
            else:
                log.info(_UNCHANGED, reference, _shown_time(state))
    except (StoreUnreachable, CredentialsRefused) as error:
        _warn_unreachable(error, state)
    return Fetched(folder.path, False, 0)


def _fetch(
    reference: StoreReference, folder: WorkingFolder, contents: ContentCache, unchanged_level: int
) -> Fetched:
    state = folder.state()
    began = time.monotonic()
    progress = Progress(str(reference))
    try:
        with contextlib.closing(open_store(reference)) as store:
            known = "" if state is None else state.stamp
            stamp, arrangement, blobs = fetch_contents(reference, store, contents, progress, known)
            if state is not None and stamp and stamp == state.stamp:
                log.log(unchanged_level, _UNCHANGED, reference, _shown_time(state))
                return Fetched(folder.path, False, 0)
    except (StoreUnreachable, CredentialsRefused) as error:
        if state is None:
            raise
        _warn_unreachable(error, state)
        return Fetched(folder.path, False, progress.fetched)
    wanted = {target: blobs[path] for target, path in arrangement.files.items()}
    changed = folder.update(stamp, arrangement.depth, wanted, contents)
    contents.remove_unused()
    size = sum(blob.size for blob in wanted.values())
    log.info(
        "%s: %d files of %.1f MB are in %s after %.1f s; %d bytes fetched",
        reference, len(wanted), size / 1e6, folder.path, time.monotonic() - began, progress.fetched,
    )  # fmt: skip
    return Fetched(folder.path, changed, progress.fetched)


def fetch_contents(
    reference: StoreReference,
    store: Store,
    contents: ContentCache,
    progress: Progress,
    known: str = "",
) -> tuple[str, Arrangement, dict[str, Blob]]:
    """Bring all files of a store into the cache: the stamp of the store, its layout and the contents.

    A store whose stamp is `known` is not read, and has no files then. Raises StoreError.
    """
    for number in range(TRIES):
        try:
            files = store.list_files()
            stamp = stamp_of(files)
            if known and stamp == known:
                return stamp, Arrangement(0, {}), {}
            return stamp, *_contents(reference, store, files, contents, progress)
        except StoreChanged as error:
            if number == TRIES - 1:
                raise
            log.info("%s; it is listed again", error.detail)
    raise AssertionError("the last try returns or raises")


def _contents(
    reference: StoreReference,
    store: Store,
    files: Sequence[RemoteFile],
    contents: ContentCache,
    progress: Progress,
) -> tuple[Arrangement, dict[str, Blob]]:
    """The layout of what the store has, and the contents of the files in it, all of them in the cache."""
    suffixes, name = tuple(backends_by_suffix()), reference.model_name
    arrangement = None
    if not any(file.is_archive for file in files):
        try:
            arrangement = arrange((file.path for file in files), name, suffixes)
        except StoreError as error:
            raise StoreError(f"{reference}: {error.detail}") from None
        wanted = set(arrangement.files.values())
        files = [file for file in files if file.path in wanted]
    origin = str(reference)
    found = {file: contents.find(file.key(origin)) for file in files}
    missing = [file for file, blobs in found.items() if blobs is None]
    if missing:
        log.info("%s: fetching %d of %d files", reference, len(missing), len(files))
    arrived = Downloader(store, origin, contents, progress).fetch(missing)
    blobs: dict[str, Blob] = {}
    for file in files:
        known = found[file]
        if known is None:
            result = arrived[file]
            if isinstance(result, Blob):
                known = [result]
            else:
                try:
                    known = unpack(result, contents, keep_of_image if file.address == "image" else keep_all)
                except StoreError as error:
                    raise StoreError(f"{reference}: {error.detail}") from None
                finally:
                    result.unlink(missing_ok=True)
            contents.remember(file.key(origin), known)
        _add(blobs, file, known)
    if arrangement is None:
        try:
            arrangement = arrange(blobs, name, suffixes)
        except StoreError as error:
            raise StoreError(f"{reference}: {error.detail}") from None
    return arrangement, blobs


def _add(blobs: dict[str, Blob], file: RemoteFile, known: Sequence[Blob]) -> None:
    """Lay the contents of a file over those of the files before, as layers of an image are."""
    for blob in known:
        path = blob.path or file.path
        folder, _, name = path.rpartition("/")
        if file.address == "image" and name.startswith(_WHITEOUT):
            above = f"{folder}/" if folder else ""
            gone = above if name == ".wh..wh..opq" else above + name.removeprefix(_WHITEOUT)
            for other in [item for item in blobs if item == gone or item.startswith(gone.rstrip("/") + "/")]:
                del blobs[other]
        else:
            blobs[path] = blob


def open_store(reference: StoreReference, may_ask: Callable[[str], bool] | None = None) -> Store:
    """The store of a reference; raises StoreError if a package for it is not installed.

    With `may_ask`, a web server may redirect only to addresses for which that is true. Hubs, registries and
    object stores send to servers of their own choice all the same.
    """
    suffixes = tuple(backends_by_suffix())
    if reference.scheme in OBJECT_STORES:
        from inferpool.repository.stores.object_store import ObjectStore

        return ObjectStore(reference, suffixes)
    if reference.scheme in WEB:
        from inferpool.repository.stores.web_store import WebStore

        return WebStore(reference, suffixes, may_ask)
    if reference.scheme == FOLDER:
        return FolderStore(reference)
    if reference.scheme == HUB:
        from inferpool.repository.stores.hub_store import HubStore

        return HubStore(reference, suffixes)
    return RegistryStore(reference)


def _warn_unreachable(error: StoreError, state: FolderState) -> None:
    log.warning("%s; what was fetched at %s is served", error.detail, _shown_time(state))


def _shown_time(state: FolderState) -> str:
    return datetime.fromtimestamp(state.fetched_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
