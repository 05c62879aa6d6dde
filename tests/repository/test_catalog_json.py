"""Views of the catalog arrive in another process as they were sent."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from inferpool.repository.catalog import LiveView, ModelView, VersionView
from inferpool.repository.catalog_json import (
    live_from_json,
    live_json,
    model_from_json,
    model_json,
    source_files,
    source_from_json,
    source_json,
    version_from_json,
    version_json,
)
from inferpool.repository.codec_factory import CodecSource

from tests.repository.catalog_views import LIVES, MODELS, SOURCES, VERSIONS


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def sent(value: dict[str, Any]) -> Any:
    """The value after its way as strict JSON."""
    return json.loads(json.dumps(value, allow_nan=False), parse_constant=refuse)


@given(VERSIONS)
def test_a_version_arrives_as_it_was_sent(view: VersionView) -> None:
    arrived = version_from_json(sent(version_json(view)))
    assert arrived == view
    assert repr(arrived) == repr(view)  # no float becomes an integer, and no tuple a list


@given(MODELS)
def test_a_model_arrives_as_it_was_sent(model: ModelView) -> None:
    written = sent(model_json(model, {}))
    versions = {int(number): version_from_json(view) for number, view in written["versions"].items()}
    assert model_from_json(model.name, written, versions) == model


@given(LIVES)
def test_the_facts_that_change_arrive_as_they_were_sent(live: LiveView) -> None:
    arrived = live_from_json(sent(live_json(live)))
    assert arrived == live
    assert repr(arrived) == repr(live)


@given(SOURCES)
def test_the_source_of_codecs_arrives_as_it_was_sent(source: CodecSource) -> None:
    arrived = source_from_json(sent(source_json(source)), source_files(source))
    assert arrived == source
    for table in ("image", "text", "labels"):
        one, other = getattr(arrived, table), getattr(source, table)
        assert one is other is None or one.model_fields_set == other.model_fields_set
