"""Native JSON bodies become tensors or an error that names the fault, by either way of reading."""

from __future__ import annotations

import itertools
import json
import math
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import InvalidInput, MalformedBody, ModelFailed
from inferpool.tensors import ANY, DTYPES, Signature, TensorSpec
from inferpool.wire.native_json import encode_response, parse_request

from tests.wire.conftest import FLOATS, INTEGERS, WAYS, any_shape, outcome, predict, takes


def tensor_of(text: str, datatype: str, rank: int) -> Any:
    body = f'{{"inputs": {text}}}'.encode()
    return parse_request(body).tensors(any_shape(datatype, rank))["x"]


def refusal(text: str, datatype: str, rank: int = 1) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        tensor_of(text, datatype, rank)
    assert caught.value.members["tensor"] == "x"
    return caught.value


@pytest.mark.usefixtures("way")
class TestFields:
    def test_every_field_is_read(self) -> None:
        request = parse_request(
            b'{"model":"m","version":3,"id":"a","outputs":["p","q","p"],"inputs":[1],'
            b'"parameters":{"timeout_ms":250,"priority":2}}'
        )
        assert (request.model, request.version, request.id) == ("m", "3", "a")
        assert request.outputs == ("p", "q")
        assert (request.timeout_ms, request.priority) == (250.0, 2)

    def test_absent_and_null_fields_are_none(self) -> None:
        for body in (
            b'{"inputs":[1]}',
            b'{"inputs":[1],"model":null,"version":null,"id":null,"outputs":null,"parameters":null}',
            b'{"inputs":[1],"outputs":[],"parameters":{"timeout_ms":null,"priority":null}}',
        ):
            request = parse_request(body)
            fields = (request.model, request.version, request.id, request.outputs)
            assert (*fields, request.timeout_ms, request.priority) == (None,) * 6

    def test_a_version_may_be_a_label(self) -> None:
        assert parse_request(b'{"version":"stable","inputs":1}').version == "stable"

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ('"modle":"m"', "modle"),
            ('"model":1', "model"),
            ('"version":true', "version"),
            ('"version":1.5', "version"),
            ('"id":[]', "id"),
            ('"outputs":"y"', "outputs"),
            ('"outputs":[1]', "outputs"),
            ('"parameters":[]', "parameters"),
            ('"parameters":{"timeout":1}', "parameters.timeout"),
            ('"parameters":{"timeout_ms":0}', "parameters.timeout_ms"),
            ('"parameters":{"timeout_ms":true}', "parameters.timeout_ms"),
            ('"parameters":{"priority":-1}', "parameters.priority"),
            ('"parameters":{"priority":1.5}', "parameters.priority"),
        ],
    )
    def test_the_error_names_a_wrong_field(self, fields: str, field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            parse_request(f'{{{fields},"inputs":[1]}}'.encode())
        assert caught.value.members["field"] == field

    def test_a_body_without_inputs_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match='no "inputs"'):
            parse_request(b'{"model":"m"}')

    def test_a_long_field_name_is_cut_off_in_the_message(self) -> None:
        with pytest.raises(InvalidInput) as caught:
            parse_request(b'{"' + b"z" * 10_000 + b'":1}')
        assert len(caught.value.detail) < 300

    def test_the_last_of_equal_keys_counts(self) -> None:
        request = parse_request(b'{"inputs":{"x":[1],"x":[2]},"inputs":{"x":[3],"x":[4]},"id":"a","id":"b"}')
        assert request.id == "b"
        assert request.tensors(takes("INT8", ANY))["x"].tolist() == [4]

    def test_a_nul_is_part_of_a_key(self) -> None:
        with pytest.raises(InvalidInput, match="unknown field"):
            parse_request(b'{"inputs\\u0000":[1],"inputs":[1]}')
        request = parse_request(b'{"inputs":{"x\\u0000":[1],"x":[2]}}')
        with pytest.raises(InvalidInput, match="no input is called"):
            request.tensors(takes("INT8", ANY))


@pytest.mark.usefixtures("way")
class TestNumbers:
    @pytest.mark.parametrize("datatype", INTEGERS)
    def test_integers_may_be_at_both_ends_of_their_range_but_not_beyond(self, datatype: str) -> None:
        limits = np.iinfo(DTYPES[datatype])
        assert tensor_of(f"[{limits.min}, {limits.max}]", datatype, 1).tolist() == [limits.min, limits.max]
        for beyond in (limits.min - 1, limits.max + 1):
            error = refusal(f"[[0, 1], [2, {beyond}]]", datatype, 2)
            assert error.members["index"] == [1, 1]
            assert error.members["expected"] == datatype

    def test_integers_beyond_2_to_the_53_are_exact(self) -> None:
        assert tensor_of("[9007199254740993]", "INT64", 1).tolist() == [9007199254740993]
        assert tensor_of("[18446744073709551615]", "UINT64", 1).tolist() == [2**64 - 1]

    @pytest.mark.parametrize("datatype", INTEGERS)
    def test_a_float_with_an_integer_value_is_taken_as_an_integer(self, datatype: str) -> None:
        assert tensor_of("[3.0, 1e1, 4]", datatype, 1).tolist() == [3, 10, 4]

    @pytest.mark.parametrize("number", ["3.5", "1e-3", "9007199254740994.0", "1e18", "-9223372036854775809"])
    def test_a_float_without_an_exact_integer_value_is_refused_for_integers(self, number: str) -> None:
        error = refusal(f"[0, {number}]", "INT64")
        assert error.members["index"] == [1]
        assert error.members["value"] == repr(float(number))

    @pytest.mark.parametrize(
        ("datatype", "number"),
        [("FP16", "65520"), ("FP16", "-1e5"), ("FP32", "1e39"), ("FP32", "-3.5e38"), ("FP32", "1e200")],
    )
    def test_a_float_beyond_the_range_is_refused(self, datatype: str, number: str) -> None:
        for count in (1, 5000):
            error = refusal(f"[{'0.5,' * count}{number}]", datatype)
            assert error.members["index"] == [count]
            assert "out of the range" in error.detail

    @pytest.mark.parametrize("number", ["300", "-1", "9007199254740993"])
    def test_the_error_shows_an_integer_beyond_the_range_as_it_was_sent(self, number: str) -> None:
        error = refusal(f"[0, {number}]", "UINT8")
        assert error.members["value"] == number
        assert f"is {number}, out of the range" in error.detail

    def test_a_float_is_rounded_to_the_nearest_one(self) -> None:
        assert tensor_of("[0.1, 16777217, 1e-50]", "FP32", 1).tolist() == [
            struct.unpack("f", struct.pack("f", 0.1))[0],
            16777216.0,
            0.0,
        ]
        assert tensor_of("[65519.9]", "FP16", 1).tolist() == [65504.0]
        assert tensor_of("[123456789012345678901234567890]", "FP64", 1).tolist() == [1.2345678901234568e29]

    def test_minus_zero_keeps_its_sign(self) -> None:
        assert math.copysign(1, tensor_of("[-0.0]", "FP32", 1)[0]) == -1

    @pytest.mark.parametrize(
        ("datatype", "value"),
        [
            *itertools.product([*INTEGERS, *FLOATS, "BF16"], ["true", '"1"', "{}"]),
            *itertools.product(INTEGERS, ["null"]),
        ],
    )
    def test_other_values_than_numbers_are_refused_with_their_index(self, datatype: str, value: str) -> None:
        for text in (f"[[0, 1], [2, {value}]]", f"[[1.5, 1], [2, {value}]]"):
            assert refusal(text, datatype, 2).members["index"] == [1, 1]

    @pytest.mark.parametrize("value", ["0", "1", "0.0", "null", '"true"'])
    def test_only_true_and_false_are_booleans(self, value: str) -> None:
        assert tensor_of("[true, false]", "BOOL", 1).tolist() == [True, False]
        assert refusal(f"[true, {value}]", "BOOL").members["index"] == [1]

    @pytest.mark.parametrize("datatype", FLOATS)
    def test_null_is_nan_where_numbers_are_floating_point(self, datatype: str) -> None:
        for text in ("[[null, 1], [-2.5, null]]", "[[0.5, null], [1, 2]]", "[[null, null]]"):
            tensor = tensor_of(text, datatype, 2)
            sent = np.array(orjson.loads(text), np.float64)
            assert np.array_equal(tensor, sent, equal_nan=True)
            assert tensor.dtype == DTYPES[datatype]

    def test_a_number_out_of_range_is_found_beside_null(self) -> None:
        assert refusal("[null, 70000]", "FP16").members["index"] == [1]
        assert refusal("[null, 3.5e38]", "FP32").members["index"] == [1]

    def test_a_null_in_place_of_a_tensor_is_no_nan(self) -> None:
        assert 'tensor "x" is null' in refusal("null", "FP32").detail
        assert np.isnan(parse_request(b'{"inputs": null}').tensors(takes("FP32"))["x"])

    def test_bf16_is_rounded_to_the_nearest_number(self) -> None:
        """From the number that was sent, not from a float32 close to it."""
        above = float(np.nextafter(1.00390625, 2))
        cases = {
            "[1.5, -2.0, 0.1, null]": [0x3FC0, 0xC000, 0x3DCD, 0x7FC0],
            f"[1.00390625, {above!r}, {-above!r}]": [0x3F80, 0x3F81, 0xBF81],
            "[3, -300, 9007199254740993]": [0x4040, 0xC396, 0x5A00],
            "[3.3895313892515355e38, -0.0, 1e-45]": [0x7F7F, 0x8000, 0x0000],
        }
        for text, expected in cases.items():
            tensor = tensor_of(text, "BF16", 1)
            assert (tensor.dtype, tensor.tolist()) == (np.uint16, expected), text
        found = refusal("[1, 3.4e38]", "BF16")
        assert found.members["index"] == [1]
        assert "out of the range of BF16 (-3.3895313892515355e+38 to 3.3895313892515355e+38)" in found.detail
        assert len(tensor_of(f"[{'0.5,' * 100_000}1]", "BF16", 1)) == 100_001

    def test_empty_lists_have_the_dimensions_that_they_do_not_show(self) -> None:
        for text, shape, expected in (
            ("[]", (ANY, 64), (0, 64)),
            ("[]", (ANY, ANY), (0, 0)),
            ("[[], []]", (ANY, ANY, 3), (2, 0, 3)),
            ("[[]]", (ANY, ANY), (1, 0)),
            ("[]", (ANY,), (0,)),
        ):
            body = b'{"inputs": %s}' % text.encode()
            assert parse_request(body).tensors(takes("FP32", *shape))["x"].shape == expected
        with pytest.raises(InvalidInput):
            parse_request(b'{"inputs": [[]]}').tensors(takes("FP32", ANY, 4))


@pytest.mark.usefixtures("way")
class TestText:
    def test_any_text_is_taken(self) -> None:
        texts = ["", "a\0b", "é", "日本", "🎈", '"[\\', "\n"]
        tensor = tensor_of(orjson.dumps([texts]).decode(), "BYTES", 2)
        assert tensor.dtype == np.object_
        assert tensor.tolist() == [texts]

    @pytest.mark.parametrize("value", ["1", "null", "true", "{}"])
    def test_other_values_than_strings_are_refused(self, value: str) -> None:
        assert refusal(f'["a", {value}]', "BYTES").members["index"] == [1]

    def test_a_long_value_is_cut_off_in_the_message(self) -> None:
        assert len(refusal(f'["{"a" * 10_000}"]', "FP32").detail) < 200


@pytest.mark.usefixtures("way")
class TestShapes:
    @pytest.mark.parametrize(
        ("text", "shape"),
        [
            ("7", ()),
            ("[]", (0,)),
            ("[[], []]", (2, 0)),
            ("[[[]]]", (1, 1, 0)),
            ("[1]", (1,)),
            ("[[1, 2, 3], [4, 5, 6]]", (2, 3)),
            ("[[[1]], [[2]]]", (2, 1, 1)),
        ],
    )
    @pytest.mark.parametrize("datatype", ["INT32", "FP32", "UINT64"])
    def test_the_nesting_is_the_shape(self, text: str, shape: tuple[int, ...], datatype: str) -> None:
        assert tensor_of(text, datatype, len(shape)).shape == shape

    @pytest.mark.parametrize(
        ("text", "index"),
        [
            ("[[1,2,3],[4]]", [1]),
            ("[[1,2],[3,4],[]]", [2]),
            ("[[1,2],[[3],4]]", [1, 0]),
            ("[[1,2],[3,[4]]]", [1, 1]),
            ("[1,[2]]", [1]),
            ("[[1],2]", [1]),
            ("[[[1],[2]],[[3,4]]]", [1]),
            ("[[[1],[2]],[[3],[]]]", [1, 1]),
            ("[[1,[2,3]],[4,[]]]", [0, 1]),
        ],
    )
    def test_ragged_and_mixed_lists_are_refused_with_their_index(self, text: str, index: list[int]) -> None:
        assert refusal(text, "FP32", 2).members["index"] == index

    def test_the_error_for_a_wrong_shape_has_both_shapes(self) -> None:
        with pytest.raises(InvalidInput) as caught:
            parse_request(b'{"inputs":[[1,2]]}').tensors(takes("FP32", ANY, 3))
        assert caught.value.members == {"tensor": "x", "expected": [-1, 3], "got": [1, 2]}

    @pytest.mark.parametrize("decoy", ["[[1,2],[3,4]]", "[[,],[,]]", "[[,],", "],[[,]]", "[", "]"])
    @pytest.mark.parametrize(
        "ragged", ["[[1,2],[3],[4]]", "[[1,2],[3,4,5]]", "[[1,2],[[3],4]]", "[[1,2,3],[4]]"]
    )
    def test_a_ragged_tensor_beside_a_regular_one_is_refused(self, decoy: str, ragged: str) -> None:
        signature = Signature((TensorSpec("x", "FP32", (2, 2)), TensorSpec(decoy, "FP32", (2, 2), True)), ())
        x, name, regular = f'"x":{ragged}', f'"{decoy}"', "[[1,2],[3,4]]"
        for body in (
            f'{{"id":{name},"inputs":{{{x}}}}}',
            f'{{"inputs":{{{x}}},"id":{name}}}',
            f'{{"outputs":[{name}],"inputs":{{{x}}}}}',
            f'{{"inputs":{{{x},{name}:{regular}}}}}',
            f'{{"inputs":{{{name}:{regular},{x}}}}}',
        ):
            with pytest.raises(InvalidInput):
                parse_request(body.encode()).tensors(signature)

    def test_brackets_in_strings_and_names_change_nothing(self) -> None:
        body = b'{"id":"[[","outputs":["y[0]"],"inputs":{"x[0]":[[1,2],[3,4]]}}'
        tensors = parse_request(body).tensors(takes("FP32", ANY, 2, name="x[0]"))
        assert tensors["x[0]"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.usefixtures("way")
class TestSentences:
    """A model of text takes a list of sentences as a substitute for its own inputs."""

    model = Signature(
        (TensorSpec("text", "BYTES", (ANY,)), TensorSpec("ids", "INT64", (ANY, ANY))),
        (),
        substitute_input="text",
    )

    @pytest.mark.parametrize("inputs", ['["a","b"]', '{"text":["a","b"]}'])
    def test_sentences_are_taken_with_and_without_a_name(self, inputs: str) -> None:
        tensors = parse_request(f'{{"inputs":{inputs}}}'.encode()).tensors(self.model)
        assert tensors["text"].tolist() == ["a", "b"]

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ('"a"', 'is a string; send a list of sentences: ["a"]'),
            ('["a",1]', "at [1] is 1; it takes a sentence (string)"),
            ('["a",null]', "at [1] is null; it takes a sentence (string)"),
            ('{"text":{}}', "is an object"),
            ('[["a"]]', "has shape [1, 1]"),
        ],
    )
    def test_the_error_for_other_values_says_what_to_send(self, inputs: str, message: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            parse_request(f'{{"inputs":{inputs}}}'.encode()).tensors(self.model)
        assert message in caught.value.detail


@pytest.mark.usefixtures("way")
class TestNames:
    two = Signature((TensorSpec("a", "FP32", (ANY,)), TensorSpec("b", "BYTES", (ANY,), optional=True)), ())

    def test_inputs_are_found_by_name(self) -> None:
        body = '{"inputs":{"a/b:0":[1],"é.x":["t"],"n":true}}'.encode()
        signature = Signature(
            (
                TensorSpec("a/b:0", "INT8", (ANY,)),
                TensorSpec("é.x", "BYTES", (ANY,)),
                TensorSpec("n", "BOOL", ()),
            ),
            (),
        )
        tensors = parse_request(body).tensors(signature)
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
            "a/b:0": [1],
            "é.x": ["t"],
            "n": True,
        }

    def test_the_only_required_input_needs_no_name(self) -> None:
        assert parse_request(b'{"inputs":[1]}').tensors(self.two)["a"].tolist() == [1]

    def test_the_error_names_an_unknown_or_missing_input(self) -> None:
        with pytest.raises(InvalidInput, match='no input is called "c"'):
            parse_request(b'{"inputs":{"c":[1]}}').tensors(self.two)
        with pytest.raises(InvalidInput, match='"a" is missing'):
            parse_request(b'{"inputs":{"b":["t"]}}').tensors(self.two)

    def test_a_list_is_refused_if_the_model_takes_several_inputs(self) -> None:
        many = Signature(tuple(TensorSpec(name, "FP32", (ANY,)) for name in "ab"), ())
        with pytest.raises(InvalidInput, match="takes an object"):
            parse_request(b'{"inputs":[1]}').tensors(many)

    def test_a_model_without_inputs_takes_none(self) -> None:
        assert parse_request(b'{"inputs":{}}').tensors(Signature((), ())) == {}


KEYS = st.sampled_from(["inputs", "id", "outputs", "parameters", "model", "x", "timeout_ms"])
VALUES = st.recursive(
    st.sampled_from(["1", "[1]", "[[2]]", '"a"', "null", "[]"]),
    lambda inner: st.lists(st.tuples(KEYS, inner), max_size=4).map(
        lambda pairs: "{" + ",".join(f'"{key}":{value}' for key, value in pairs) + "}"
    ),
    max_leaves=6,
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=6))
def test_equal_keys_mean_the_same_in_each_way_of_reading(pairs: list[tuple[str, str]]) -> None:
    """The last of equal keys counts, at any depth: the body means what Python's `json` reads."""
    body = "{" + ",".join(f'"{key}":{value}' for key, value in pairs) + "}"
    once = json.dumps(json.loads(body))
    signature = takes("FP32", ANY)
    expected = outcome(once.encode(), signature, "orjson")
    for way in WAYS:
        assert outcome(body.encode(), signature, way) == expected


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1))
def test_float32_survives_writing_and_reading(numbers: list[float]) -> None:
    array = np.array(numbers, dtype=np.float32)
    written = encode_response("m", "1", "i", {"y": array}, None)
    outputs = orjson.loads(written)["outputs"]
    for way in WAYS:
        body = orjson.dumps({"inputs": outputs["y"]})
        assert predict(body, any_shape("FP32", 1), way)["x"].tobytes() == array.tobytes()


class TestAnswers:
    def test_the_answer_names_model_version_and_id(self) -> None:
        written = encode_response(
            "m", "1", "i", {"y": np.array([[0.1]], np.float32)}, [[{"label": "a", "score": 1.0}]]
        )
        assert written == (
            b'{"model":"m","version":"1","id":"i","outputs":{"y":[[0.1]]},'
            b'"predictions":[[{"label":"a","score":1.0}]]}'
        )

    @pytest.mark.parametrize(
        ("output", "text"),
        [
            (np.array([1.1], np.float16), "[1.0996094]"),
            (np.array(0.1, np.float32), "0.1"),
            (np.array(7, np.ulonglong), "7"),
            ([np.longlong(-7), np.array([7], np.ulonglong)], "[-7,[7]]"),
            (np.array([1e16, -0.0], np.float64), "[1e+16,-0.0]"),
            (np.array([True, False]), "[true,false]"),
            (np.array([2**64 - 1], np.uint64), "[18446744073709551615]"),
            (np.array([[-128]], np.int8), "[[-128]]"),
            (np.array(["a", "é\0"], object), '["a","é\\u0000"]'),
            (np.array("a", object), '"a"'),
            (np.zeros((0, 3)), "[]"),
            (np.zeros((2, 0)), "[[],[]]"),
            (np.arange(6, dtype=np.float32).reshape(2, 3).T, "[[0.0,3.0],[1.0,4.0],[2.0,5.0]]"),
            (np.array([0.1, 0.2, 0.3], np.float32)[::2], "[0.1,0.3]"),
            ([{"cat": np.float32(0.1)}, {2: 0.5}], '[{"cat":0.1},{"2":0.5}]'),
            ([np.array([1], np.int64)], "[[1]]"),
        ],
    )
    def test_outputs_are_written_as_they_are(self, output: Any, text: str) -> None:
        written = encode_response("m", "1", "i", {"y": output}, None).decode()
        assert written == f'{{"model":"m","version":"1","id":"i","outputs":{{"y":{text}}}}}'

    def test_bf16_is_written_as_numbers(self) -> None:
        written = encode_response(
            "m", "1", "i", {"y": np.array([0x3FC0, 0x7F80], np.uint16)}, None, bf16=["y"]
        )
        assert orjson.loads(written)["outputs"] == {"y": [1.5, None]}
        assert orjson.loads(written)["non_finite"] == ["y"]

    @pytest.mark.parametrize(
        "output",
        [
            np.array([1, np.nan], np.float32),
            np.array(np.inf),
            [{"a": float("nan")}],
            [np.array([-np.inf], np.float16)],
        ],
    )
    def test_numbers_that_are_not_finite_are_null_and_their_output_is_named(self, output: Any) -> None:
        written = orjson.loads(encode_response("m", "1", "i", {"a": np.ones(1), "y": output}, None))
        assert written["non_finite"] == ["y"]

    def test_the_text_null_is_not_taken_for_a_number(self) -> None:
        written = orjson.loads(encode_response("null", "1", "i", {"y": np.array(["null"], object)}, None))
        assert "non_finite" not in written

    def test_an_output_that_json_cannot_hold_is_a_failure_of_the_model(self) -> None:
        with pytest.raises(ModelFailed):
            encode_response("m", "1", "i", {"y": [object()]}, None)

    def test_an_empty_or_foreign_body_is_refused_with_a_hint(self) -> None:
        for body, hint in ((b"", "empty"), (b"\x89PNG\r\n", "image/png"), (b"hello", "text/plain")):
            with pytest.raises(MalformedBody, match=hint):
                parse_request(body)
