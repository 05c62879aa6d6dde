"""The gauges of every model, read from the catalog at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from inferpool.observe.metrics import Sample
from inferpool.repository.catalog import READY, Catalog
from inferpool.system.gpus import CPU


def catalog_readings(catalog: Catalog) -> Iterable[Sample]:
    """The gauges of every model, at this moment."""
    yield "ready", (), float(catalog.health().ready)
    for model in catalog.models().values():
        for version in model.versions.values():
            labels = (model.name, str(version.key.version))
            yield "model_state", (*labels, READY), float(version.state == READY)
            if version.state != READY:
                yield "model_state", (*labels, version.state), 1.0
                continue
            live = catalog.live(version.key)
            yield "model_load_seconds", labels, version.load_s
            if version.gpu is not None:
                yield "cpu_nodes", labels, float(sum(version.gpu.cpu_nodes.values()))
            yield "queue_rows", labels, float(live.waiting_rows)
            yield "queue_oldest_age_seconds", labels, live.oldest_age_s
            yield "queue_wait_seconds", labels, live.wait_s
            counts = Counter((instance.device, instance.state) for instance in live.instances)
            for device_and_state, count in counts.items():
                yield "instances", (*labels, *device_and_state), float(count)
            for engine in live.missing:
                yield "missing_engines", (*labels, engine), 1.0


def is_shown(catalog: Catalog, name: str, version: str) -> bool:
    """Whether a model, or a version of it unless `version` is "", is in the catalog.

    True for the model "", in which requests are counted that mean no model, and while no model is known yet.
    """
    models = catalog.models()
    if not name or not models:
        return True
    model = models.get(name)
    return model is not None and (not version or any(str(number) == version for number in model.versions))


def uses_gpus(catalog: Catalog) -> bool:
    """Whether an instance of any model is on a GPU."""
    versions = [version for model in catalog.models().values() for version in model.versions.values()]
    return any(
        instance.device != CPU for version in versions for instance in catalog.live(version.key).instances
    )
