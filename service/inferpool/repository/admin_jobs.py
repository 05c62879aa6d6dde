"""The jobs that administrators ask for: begins and cancels loads, fetches and unloads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from inferpool.errors import ModelNotFound, VersionNotFound
from inferpool.repository.folder_contents import FolderContents
from inferpool.repository.jobs import Job
from inferpool.repository.load_manager import LoadManager
from inferpool.repository.published_views import PublishedViews
from inferpool.repository.wanted_versions import WantedVersions
from inferpool.settings import Settings

if TYPE_CHECKING:
    from inferpool.repository.version_fetches import VersionFetches


class AdminJobs:
    """Begins and cancels jobs. All methods may be called in any thread."""

    def __init__(
        self,
        contents: FolderContents,
        views: PublishedViews,
        wanted: WantedVersions,
        manager: LoadManager,
        settings: Settings,
    ) -> None:
        """Begin no job yet."""
        self._contents = contents
        self._views = views
        self._wanted = wanted
        self._manager = manager
        self._settings = settings
        self._fetches: VersionFetches | None = None

    def begin_load(
        self, model: str, version: int | None, source: str | None = None, job_id: str | None = None
    ) -> Job:
        """Load a version, or all that `model.toml` serves, from the files that are there now.

        A version that is loaded from the same files is not loaded again. With a `source`, the version is
        fetched from there first, which may be a store or an absolute path. `job_id` is the id of a new job
        that fetches nothing; None makes one.

        Raises ModelNotFound or VersionNotFound if the folder has no such version. With a source, it raises
        InvalidInput, Forbidden for a source that is not allowed, or Conflict if the folder cannot take it.
        """
        if source is not None:
            return self._begin_fetch(model, version, source)
        with self._wanted.lock:
            versions = self._wanted.ask_for(model, version)
            return self._manager.begin_job("load", model, version, versions, job_id)

    def _begin_fetch(self, model: str, version: int | None, source: str) -> Job:
        """Fetch a version in a thread, and load it then."""
        from inferpool.repository.version_fetches import MOST_FETCHES, VersionFetches

        contents = self._contents
        with self._wanted.lock:
            fetches = self._fetches = self._fetches or VersionFetches(contents.path, self._settings)
        reference = fetches.check(source)
        with self._wanted.lock:
            declared = contents.declared.get(model)
            known = None if declared is None else declared.folder
            wanted = fetches.wanted_version(model, known, contents.single_model(), version, source)
            job, is_new = self._manager.begin_fetch(model, version, str(reference), wanted.key, MOST_FETCHES)

        def load_it(rename: Callable[[], int]) -> None:
            with self._wanted.lock:
                if self._manager.is_fetching(job.id):
                    self._manager.end_fetch(job.id, self._wanted.ask_for(model, rename()))

        if is_new:
            tell, fail = self._manager.tell_fetched, self._manager.end_fetch
            fetches.start(job.id, wanted, partial(tell, job.id), load_it, partial(fail, job.id, ()))
        return job

    def begin_unload(self, model: str, version: int | None, job_id: str | None = None) -> Job:
        """Drain a version, or all of the model, and free its memory; it is not loaded again by itself.

        `job_id` is the id of a new job; None makes one. Raises ModelNotFound or VersionNotFound.
        """
        with self._wanted.lock:
            view = self._views.models.get(model)
            if view is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            versions = [version] if version is not None else sorted(view.versions)
            if version is not None and version not in view.versions:
                raise VersionNotFound(f'"{model}" has no version {version}')
            self._wanted.unload(model, versions)
            return self._manager.begin_job("unload", model, version, versions, job_id)

    def cancel(self, job_id: str) -> Job | None:
        """End a job that runs; None if there is none with this id. Raises Conflict if it has ended."""
        with self._wanted.lock:
            job = self._manager.cancel(job_id)
            if self._fetches is not None and job is not None and job.fetching:
                self._fetches.cancel(job_id)
            if job is not None and job.kind == "unload":
                self._wanted.take_back_unload(job.model, job.versions)
            elif job is not None:
                self._wanted.take_back_load(job.model, job.versions)
            return job

    def close(self) -> None:
        """End all fetches."""
        if self._fetches is not None:
            self._fetches.close()
