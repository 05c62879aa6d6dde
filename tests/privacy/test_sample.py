"""Samples: what the rules leave of a request, and which rules a model can have."""

from __future__ import annotations

import numpy as np
import pytest
from inferpool.errors import ConfigError
from inferpool.privacy.config import FieldRules, NoiseRule, RoundRule, SamplesConfig, kept_fields
from inferpool.privacy.keys import SampleKeys, is_chosen, threshold_of
from inferpool.privacy.sample import Sample, best_labels, from_bytes, redacted
from inferpool.tensors import Array, Signature, TensorSpec

KEYS = SampleKeys({"a": bytes(range(32))})
SIGNATURE = Signature(
    (
        TensorSpec("age", "INT64", (-1,)),
        TensorSpec("name", "BYTES", (-1,)),
        TensorSpec("picture", "FP32", (-1, 3, 8, 8)),
        TensorSpec("features", "FP32", (-1, 4)),
    ),
    (TensorSpec("score", "FP32", (-1, 2)),),
)


def rules(fields: dict, **options) -> dict[str, FieldRules]:
    config = SamplesConfig.model_validate({"share": 1.0, "fields": fields})
    return kept_fields(
        config, SIGNATURE, options.get("pixels"), options.get("text"), options.get("tokens", ())
    )


def strings(*texts: str) -> Array:
    array = np.empty(len(texts), np.object_)
    array[:] = texts
    return array


def test_what_is_not_named_is_not_kept() -> None:
    values = {"age": np.array([31, 47]), "name": strings("Ada", "Bob")}
    assert redacted(values, rules({}), KEYS) == {}
    assert redacted(values, rules({"age": "keep"}), KEYS).keys() == {"age"}


def test_every_number_means_neither_strings_nor_pixels_nor_tokens() -> None:
    assert rules({"*": "keep"}, pixels="picture").keys() == {"age", "features", "score"}
    assert rules({"*": "keep", "age": "drop"}, pixels="picture")["age"].whole == "drop"
    assert rules({"*": "keep"}, text="name", tokens=("name", "age")).keys() == {
        "picture",
        "features",
        "score",
    }
    assert "picture" in rules({"picture": "keep"}, pixels="picture")


@pytest.mark.parametrize(
    ("fields", "options", "fault"),
    [
        ({"wage": "keep"}, {}, 'the model has no "wage"'),
        ({"wage[1]": "keep"}, {}, 'the model has no "wage\\[1\\]"'),
        ({"name": {"round": 10}}, {}, "only numbers can be rounded"),
        ({"score": {"epsilon": 1.0}}, {}, "noise is for counts"),
        ({"picture": {"round": 2}}, {"pixels": "picture"}, "pixels or text"),
        ({"age": "keep"}, {"text": "name", "tokens": ("name", "age")}, "tokens of a text"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(fields: dict, options: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        rules(fields, **options)


def test_columns_have_rules_of_their_own() -> None:
    fields = {"features": "keep", "features[0]": {"round": 10}, "features[1]": "drop", "features[3]": "hash"}
    values = {"features": np.array([[12, 2, 3, 4], [27, 6, 7, 4]], np.float32)}
    kept = redacted(values, rules(fields), KEYS)
    assert kept.keys() == {"features[0]", "features[2]", "features[3]"}
    assert kept["features[0]"].tolist() == [10.0, 30.0]
    assert kept["features[3]"][0] == kept["features[3]"][1] != "4.0"


def test_a_hash_needs_the_key_and_differs_between_fields() -> None:
    values = {"name": strings("Ada", "Bob", "Ada")}
    [one] = redacted(values, {"name": FieldRules("hash", {})}, KEYS).values()
    [other] = redacted(values, {"name": FieldRules("hash", {})}, SampleKeys({"a": bytes(32)})).values()
    assert one[0] == one[2] != one[1]
    assert one[0] != other[0]
    assert KEYS.hashed("name", "Ada") != KEYS.hashed("town", "Ada")


def test_numbers_are_rounded_and_counts_get_noise() -> None:
    values = {"age": np.array([31, 47] * 50)}
    steps = redacted({"age": np.array([0.31, 0.26])}, {"age": FieldRules(RoundRule(round=0.1), {})}, KEYS)
    assert steps["age"].tolist() == [0.3, 0.3]
    noisy = redacted(values, {"age": FieldRules(NoiseRule(epsilon=0.05), {})}, KEYS)["age"]
    assert noisy.dtype == np.int64
    assert (noisy != values["age"]).sum() > 50


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 1.0])
def test_the_share_of_the_requests_is_chosen_and_always_the_same(share: float) -> None:
    threshold = threshold_of(share)
    ids = [f"request-{number}" for number in range(4000)]
    chosen = [name for name in ids if is_chosen(KEYS.choice_key, name, threshold)]
    assert len(chosen) / len(ids) == pytest.approx(share, abs=0.03)
    assert chosen == [name for name in ids if is_chosen(KEYS.choice_key, name, threshold)]
    if 0 < share < 1:
        other = SampleKeys({"b": bytes(32)}).choice_key
        assert chosen != [name for name in ids if is_chosen(other, name, threshold)]


def test_a_sample_comes_back_from_its_bytes() -> None:
    inputs = {"features": np.arange(8, dtype=np.float32).reshape(2, 4), "name": strings("Ada", "ü\0")}
    sample = Sample("../id", "shop", "m", 3, 12.5, 2, inputs, {"score": np.array([[True], [False]])})
    found = from_bytes(sample.to_bytes())
    assert found.request_id == "../id"
    assert found.inputs["features"].tolist() == inputs["features"].tolist()
    assert found.inputs["name"].tolist() == ["Ada", "ü\0"]
    assert found.outputs["score"].dtype == np.bool_
    with pytest.raises(ValueError, match="another layout"):
        from_bytes(b"\x09" + sample.to_bytes()[1:])


def test_the_best_label_of_nan_alone_is_none() -> None:
    scores = np.array([[0.1, 0.9], [np.nan, 0.2], [np.nan, np.nan]])
    assert best_labels(scores, ["no", "yes"]).tolist() == ["yes", "yes", ""]
