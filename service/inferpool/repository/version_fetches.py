"""Fetches versions that somebody has asked for from elsewhere, and renames them into the models folder."""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from inferpool.errors import Conflict, InferpoolError, InvalidInput, Reason, StoreError
from inferpool.repository.layout import ModelFolder, is_model_name
from inferpool.repository.stores.allowed_sources import AllowedSources, parse_source
from inferpool.repository.stores.fetch_process import VersionFetch, store_cache
from inferpool.repository.stores.reference import StoreReference
from inferpool.repository.stores.version_fetch import INCOMING, MADE, WantedVersion
from inferpool.settings import Settings

log = logging.getLogger(__name__)

MOST_FETCHES: Final = 4
"""How many versions are fetched at once; further requests are refused."""
MOST_NAME: Final = 100
"""How many characters the name of a new model may have."""


class VersionFetches:
    """The fetches that run, each with a thread and a process of its own."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """`path` is the models folder."""
        self._path = path
        self._settings = settings
        self._lock = threading.Lock()
        self._running: dict[str, VersionFetch] = {}
        self._cancelled: set[str] = set()
        self._closed = False

    def check(self, source: str) -> StoreReference:
        """Read a source; raises InvalidInput, or Forbidden if it is not allowed."""
        return AllowedSources(self._settings.load_from).allowed(parse_source(source))

    def wanted_version(
        self, model: str, known: ModelFolder | None, single: str | None, version: int | None, source: str
    ) -> WantedVersion:
        """What is to be fetched, and where it belongs.

        `known` is the model's folder if there is one, and `single` the name of the only model if the models
        folder is the folder of that model. Raises InvalidInput for a name that no model can have, or Conflict
        if the folder cannot take versions of the model.
        """
        if known is None and (
            not is_model_name(model) or "/" in model or "\\" in model or len(model) > MOST_NAME
        ):
            raise InvalidInput(f'"{model[:MOST_NAME]}" cannot be the name of a model', field="model")
        if self._path.is_file() or (known is not None and known.folder is None and known.files):
            raise Conflict(f"{model} is a single file, which has no place for versions; serve a folder")
        if single not in (None, model):
            raise Conflict(f"{self._path} is the folder of {single}, and has no place for other models")
        folder = self._path if single is not None else self._path / model
        if known is not None and known.folder is not None:
            folder = known.folder
        try:
            cache = store_cache(self._settings).absolute()
        except StoreError as error:
            raise Conflict(error.detail) from None
        repository = self._path.absolute()
        return WantedVersion(
            source, self._settings.load_from, model, version, str(repository), str(folder.absolute()),
            str(cache),
            str(repository / f"{INCOMING}{secrets.token_hex(6)}"),
        )  # fmt: skip

    def start(
        self,
        job_id: str,
        wanted: WantedVersion,
        tell: Callable[[int, int], None],
        commit: Callable[[Callable[[], int]], None],
        fail: Callable[[Reason], None],
    ) -> None:
        """Fetch in a thread.

        Args:
            job_id: names the fetch for `cancel`.
            wanted: what is to be fetched.
            tell: called with the bytes that have arrived, and those that are expected.
            commit: called at the end with a function that renames the version into place and returns its
                number; it may raise StoreError.
            fail: called with the reason, if the version does not come.
        """
        arguments = (job_id, wanted, tell, commit, fail)
        threading.Thread(target=self._run, args=arguments, name="fetch", daemon=True).start()

    def cancel(self, job_id: str) -> None:
        """End a fetch, if it runs."""
        with self._lock:
            self._cancelled.add(job_id)
            running = self._running.get(job_id)
        if running is not None:
            running.cancel()

    def close(self) -> None:
        """End all fetches."""
        with self._lock:
            self._closed = True
            running = list(self._running.values())
        for fetch in running:
            fetch.cancel()

    def _run(
        self,
        job_id: str,
        wanted: WantedVersion,
        tell: Callable[[int, int], None],
        commit: Callable[[Callable[[], int]], None],
        fail: Callable[[Reason], None],
    ) -> None:
        try:
            with self._lock:
                if self._closed or job_id in self._cancelled:
                    return
                fetch = self._running[job_id] = VersionFetch(wanted.to_json(), self._settings)
            result = fetch.wait(tell)
            version, target = int(result["version"]), str(result["target"])

            def rename() -> int:
                if target:
                    _rename(wanted, version, Path(target))
                return version

            commit(rename)
        except InferpoolError as error:
            fail(error.detail)
        except Exception as error:
            log.exception("a version of %s was fetched in vain", wanted.model)
            fail(f"fetching failed with {type(error).__name__}")
        finally:
            with self._lock:
                self._running.pop(job_id, None)
                self._cancelled.discard(job_id)
            shutil.rmtree(wanted.staging, ignore_errors=True)


def _rename(wanted: WantedVersion, version: int, target: Path) -> None:
    """Rename what was fetched into place; raises StoreError if the place is taken meanwhile."""
    try:
        Path(wanted.staging, MADE).rename(target)
    except OSError as error:
        if target.exists():
            raise StoreError(
                f"{wanted.model}/{version} has come into {wanted.repository} by another way; ask again"
            ) from None
        raise StoreError(f"{wanted.repository} cannot take the version: {error.strerror}") from None
    log.info("%s/%d has come into %s", wanted.model, version, wanted.repository)
