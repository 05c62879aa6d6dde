"""Hypothesis strategies for the views of the catalog, with values that are hard to send."""

from __future__ import annotations

from hypothesis import strategies as st
from inferpool.backends.row_verdict import Evidence
from inferpool.codecs.image_config import ImageConfig
from inferpool.codecs.labels import LabelsConfig
from inferpool.codecs.text_config import TextConfig
from inferpool.errors import Verdict
from inferpool.pool.latency_model import Measurement
from inferpool.pool.padding import Padding
from inferpool.pool.ports import VersionKey
from inferpool.pool.row_cost import CostPoint, RowCost
from inferpool.pool.stats import BatchCount, InstanceState
from inferpool.repository.catalog import (
    STATES,
    BatchingView,
    GpuView,
    LiveView,
    ModelView,
    RoundingDifference,
    VersionView,
)
from inferpool.repository.codec_factory import CodecSource
from inferpool.repository.traffic import Canary, Shadow, Traffic
from inferpool.tensors import DTYPES, Signature, TensorSpec

TEXTS = st.text(max_size=8)
NUMBERS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**63)
SHAPES = st.lists(st.integers(-1, 2**40), max_size=3).map(tuple)

SPECS = st.builds(
    TensorSpec, TEXTS, st.sampled_from([*DTYPES, "JSON"]), st.none() | SHAPES, st.booleans(),
    st.lists(TEXTS, max_size=3).map(tuple),
)  # fmt: skip
TENSORS = st.lists(SPECS, max_size=3).map(tuple)
SIGNATURES = st.builds(Signature, TENSORS, TENSORS, st.none() | TEXTS)

BATCHING = st.builds(
    BatchingView, st.booleans(), TEXTS, COUNTS, NUMBERS, st.none() | TEXTS,
    st.none() | st.sampled_from(Evidence),
)  # fmt: skip

PADDINGS = st.builds(
    Padding,
    fills=st.dictionaries(TEXTS, COUNTS | NUMBERS, max_size=3),
    ids=TEXTS,
    unit=COUNTS,
    longest=COUNTS,
    proven=st.booleans(),
    axes=st.dictionaries(TEXTS, st.lists(COUNTS, max_size=2).map(tuple), max_size=2),
    reason=TEXTS,
    mask=st.none() | TEXTS,
    rounded=st.booleans(),
)

POINTS = st.builds(CostPoint, COUNTS, NUMBERS, NUMBERS)
COSTS = st.builds(RowCost, st.lists(POINTS, min_size=1, max_size=3).map(tuple), NUMBERS)

DIFFERENCES = st.builds(RoundingDifference, NUMBERS, NUMBERS, NUMBERS, COUNTS)
GPUS = st.builds(
    GpuView, st.dictionaries(TEXTS, COUNTS, max_size=2), TEXTS, TEXTS, st.none() | DIFFERENCES,
    st.builds(Verdict, st.booleans(), TEXTS), st.none() | TEXTS,
)  # fmt: skip

VERSIONS = st.builds(
    VersionView,
    key=st.builds(VersionKey, TEXTS, st.integers(1, 2**31)),
    state=st.sampled_from(STATES),
    reason=TEXTS,
    labels=st.lists(TEXTS, max_size=2).map(tuple),
    backend=TEXTS,
    signature=st.none() | SIGNATURES,
    batching=BATCHING,
    threads=COUNTS,
    timeout_s=st.none() | NUMBERS,
    image=st.none(),
    text=st.none(),
    padding=st.none() | PADDINGS,
    row_cost=st.none() | COSTS,
    classes=st.none(),
    gpu=st.none() | GPUS,
    load_s=NUMBERS,
)

SHARES = st.floats(0, 1)
CANARIES = st.builds(
    Canary, COUNTS, COUNTS, SHARES, TEXTS, COUNTS,
    st.sampled_from(["running", "promoted", "rolled_back", "ended"]), TEXTS,
)  # fmt: skip
TRAFFIC = st.builds(Traffic, COUNTS, st.none() | CANARIES, st.none() | st.builds(Shadow, COUNTS, SHARES))

MODELS = st.builds(
    lambda name, description, versions, labels, fault, traffic, aliases: ModelView(
        name, description, {view.key.version: view for view in versions}, labels, fault, traffic, aliases
    ),
    TEXTS, TEXTS, st.lists(VERSIONS, max_size=3), st.dictionaries(TEXTS, COUNTS, max_size=2),
    st.none() | TEXTS, st.none() | TRAFFIC, st.lists(TEXTS, max_size=2).map(tuple),
)  # fmt: skip

LIVES = st.builds(
    LiveView,
    instances=st.lists(st.builds(InstanceState, TEXTS, TEXTS, NUMBERS), max_size=2).map(tuple),
    latency=st.lists(st.builds(Measurement, NUMBERS, NUMBERS, COUNTS), max_size=3).map(tuple),
    waiting_rows=COUNTS,
    oldest_age_s=NUMBERS,
    wait_s=NUMBERS,
    batching_stopped=st.none() | TEXTS,
    batches=st.lists(st.builds(BatchCount, COUNTS, COUNTS, NUMBERS), max_size=3).map(tuple),
    buckets=st.lists(COUNTS, max_size=3).map(tuple),
    tensorrt=st.none() | TEXTS,
    loading_s=NUMBERS,
    engine=st.none(),
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
IMAGES = st.sampled_from(
    [
        ImageConfig(),
        ImageConfig(size=(2, 3), resize=4, mode="grey", layout="HW", scale=1e-300, mean=0.1, std=3),
        ImageConfig(input="x", mean=(0.1, 0.2, 0.3), std=(1, 2, 3), max_pixels=7),
    ]
)
TABLES = st.sampled_from([TextConfig(), TextConfig(mask="m"), TextConfig(input="s", max_tokens=3, ids="i")])
LABELS = st.builds(
    lambda threshold, top_k: LabelsConfig(output="y", activation="softmax", threshold=threshold, top_k=top_k),
    st.none() | FINITE,
    st.integers(1, 9),
)
SOURCES = st.builds(
    CodecSource, st.none() | IMAGES, st.none() | TABLES, st.none() | LABELS, SIGNATURES,
    st.binary(max_size=9), st.binary(max_size=9), st.booleans(),
)  # fmt: skip
