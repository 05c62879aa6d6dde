"""What the event loop copies of a request, and which versions have an observer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.observations import MOST_HELD_BYTES, Observations
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.version_observer import MOST_COUNTED_BYTES
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.privacy.config import SamplesConfig
from inferpool.privacy.keys import SampleKeys
from inferpool.privacy.store import SampleStore, StoreLimits
from inferpool.repository.catalog import VersionView
from inferpool.tensors import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "BYTES", (-1,)),), (TensorSpec("y", "FP32", (-1, 2)),))
SAMPLING = SamplesConfig(share=1.0, fields={"x": "keep", "y": "keep"}).model_dump(mode="json")
VIEW = VersionView(VersionKey("m", 1), "ready", signature=SIGNATURE, sampling=SAMPLING)


@pytest.fixture
def observations(tmp_path: Path) -> Iterator[Observations]:
    keys = SampleKeys({"a": bytes(32)})
    own = Observations(Metrics({}), SampleStore(tmp_path, keys, StoreLimits(10, 2**20, 60.0)), keys)
    yield own
    own.close()


def test_a_version_has_one_observer_for_each_load_and_none_if_nothing_is_to_be_done(
    observations: Observations,
) -> None:
    observer = observations.of(VIEW)
    assert observer is not None
    assert observations.of(replace(VIEW, labels=("stable",))) is observer, "a label is no other load"
    assert observations.of(replace(VIEW, load_s=2.0)) is not observer
    assert observations.of(replace(VIEW, sampling={})) is None, "nothing to do costs nothing"
    assert Observations(Metrics({})).of(VIEW) is None, "there is no store"


def test_strings_and_rows_too_large_are_not_copied(observations: Observations) -> None:
    """A request holds memory beyond its own only within bounds, and gives it back wherever it ends."""
    observer = observations.of(VIEW)
    assert observer is not None
    context = PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)
    for text, copied in (("a", ["x"]), ("a" * (MOST_COUNTED_BYTES + 1), [])):
        texts = np.empty(1, np.object_)
        texts[0] = text
        observer.begin(context, {"x": texts}, 0.0)
        assert list(context.observation.inputs[0]) == copied
    context.observation = None
    assert observations.held_bytes == 0
    observations.hold(MOST_HELD_BYTES)
    observer.begin(context, {"x": texts}, 0.0)
    assert context.observation is None
    assert observations.dropped.value == 1
