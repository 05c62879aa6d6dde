"""The engine's side of the catalog: tells the supervisor what is served, and web processes how it fares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferpool.engine.catalog_merge import file_digests
from inferpool.engine.catalog_parcel import pack
from inferpool.repository.catalog_json import JsonObject, live_json, model_json, source_files
from inferpool.repository.repository import Repository
from inferpool.repository.version_source import held_json


class CatalogPublisher:
    """Packs the catalog of an engine. It remembers which files it has packed before."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._packed: JsonObject = {}

    def pack(self) -> int:
        """A descriptor of a parcel with the whole catalog, and the files that no earlier parcel had.

        The caller sends and closes it. Raises OSError if there is no memory or no descriptor left.
        """
        sources = self._repository.codec_sources()
        catalog = {
            "models": {name: model_json(model, sources) for name, model in self._repository.models().items()},
            "plans": dict(self._repository.plans()),
            "held": [[*key, held_json(source)] for key, source in self._repository.held().items()],
            "moves": self._repository.routing.moves(),
            "traffic": self._repository.routing.traffic(),
            "jobs": [job.to_json() for job in self._repository.jobs()],
            "loads": [list(key) for key in self._repository.loading()],
            "devices": self._repository.devices_elsewhere(),
            "removed": [list(key) for key in self._repository.removed()],
        }
        files = {
            digest: content for source in sources.values() for digest, content in source_files(source).items()
        }
        wanted = file_digests(catalog, self._packed)
        descriptor = pack(catalog, {digest: files[digest] for digest in wanted})
        self._packed = catalog
        return descriptor


def answer_ask(repository: Repository, question: Mapping[str, Any]) -> JsonObject:
    """The answer to a question of a web process: with `{"live": true}`, the facts that change."""
    answer: JsonObject = {}
    if question.get("live"):
        answer["live"] = [
            [*view.key, live_json(repository.live(view.key))]
            for model in repository.models().values()
            for view in model.versions.values()
        ]
    return answer
