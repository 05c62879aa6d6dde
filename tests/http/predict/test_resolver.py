"""Which version a request means, while versions are published."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import cast

from inferpool.http.predict.resolver import Resolver
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import READY, Catalog, ModelView, VersionView
from inferpool.tensors import Signature, TensorSpec

SPEC = TensorSpec("x", "FP32", (-1, 2))


def models(*versions: int) -> Mapping[str, ModelView]:
    views = {
        n: VersionView(VersionKey("m", n), READY, signature=Signature((SPEC,), (SPEC,))) for n in versions
    }
    return {"m": ModelView("m", "", views, {})}


class Publishing:
    """A catalog that publishes version 2 while one thread looks the default version up."""

    def __init__(self) -> None:
        self.published = models(1)
        self.calls = 0
        self.looking, self.go_on = threading.Event(), threading.Event()

    def models(self) -> Mapping[str, ModelView]:
        found = self.published
        if threading.current_thread().name == "slow":
            self.calls += 1
            if self.calls == 2:
                self.looking.set()
                assert self.go_on.wait(10)
        return found


def test_what_a_thread_finds_late_is_not_served_from_then_on() -> None:
    catalog = Publishing()
    resolver = Resolver(cast("Catalog", catalog), Metrics({}))
    slow = threading.Thread(target=resolver.find, args=("m", None), name="slow")
    slow.start()
    assert catalog.looking.wait(10)
    catalog.published = models(1, 2)
    assert resolver.find("m", "1").version == "1"
    catalog.go_on.set()
    slow.join()
    assert resolver.find("m", None).version == "2"
