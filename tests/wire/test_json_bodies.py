"""A body that is no JSON object is refused with the fault and its position, by either way of reading."""

from __future__ import annotations

import pytest
from inferpool.errors import InvalidInput, MalformedBody
from inferpool.wire.native_json import parse_request

from tests.wire.conftest import any_shape


@pytest.mark.usefixtures("way")
class TestMalformedBodies:
    @pytest.mark.parametrize(
        ("body", "position"),
        [
            (b"", 0),
            (b'{"inputs":[1,]}', 12),
            (b'{"inputs":[1]} x', 15),
            (b'{"inputs":[01]}', 11),
            (b'{"inputs":"\xff"}', 11),
            (b'{"inputs":"\xed\xa0\x80"}', 11),
            (b'\xef\xbb\xbf{"inputs":1}', 0),
        ],
    )
    def test_the_error_has_the_position_of_the_fault(self, body: bytes, position: int) -> None:
        with pytest.raises(MalformedBody) as caught:
            parse_request(body)
        assert abs(caught.value.members["position"] - position) <= 1  # type: ignore[operator]

    @pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
    def test_nan_and_infinity_are_refused_with_a_hint_at_the_binary_form(self, literal: str) -> None:
        with pytest.raises(MalformedBody, match="binary form of /v2"):
            parse_request(f'{{"id":"é","inputs":[1,{literal}]}}'.encode())

    @pytest.mark.parametrize("body", [b"[1]", b"1", b'"a"', b"null", b"true"])
    def test_only_an_object_is_a_request(self, body: bytes) -> None:
        with pytest.raises(MalformedBody, match="not a JSON object"):
            parse_request(body)

    def test_a_lone_surrogate_is_malformed(self) -> None:
        with pytest.raises(MalformedBody):
            parse_request(b'{"inputs":["\\ud800"]}')

    @pytest.mark.parametrize("depth", [33, 500, 1010, 1024, 100_000])
    @pytest.mark.parametrize(
        "where", ['{"inputs":%s}', '{"inputs":1,"id":%s}', '{"inputs":1,"parameters":%s}']
    )
    def test_very_deep_nesting_is_refused(self, depth: int, where: str) -> None:
        body = (where % ("[" * depth + "]" * depth)).encode()
        with pytest.raises((InvalidInput, MalformedBody)):
            parse_request(body).tensors(any_shape("FP32", 1))
