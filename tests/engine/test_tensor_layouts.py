"""Tensors cross as bytes and are bit-equal afterwards; bytes that are no tensors raise one kind of error."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inferpool.engine.records import LAYOUT_FIELDS, ProtocolError
from inferpool.engine.tensor_bytes import encode, read, write
from inferpool.engine.tensor_layouts import LayoutTable, read_layout
from inferpool.pool.ports import VersionKey
from inferpool.tensors import DTYPES, Tensors

KEY = VersionKey("m", 1)

TEXTS = st.text(st.characters(codec=None), max_size=8)


def arrays(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    def of(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
        if dtype.kind == "O":
            return hnp.arrays(dtype, shape, elements=TEXTS, fill=st.nothing())
        return hnp.arrays(dtype, shape)

    return st.sampled_from(list(DTYPES.values())).flatmap(of)


@st.composite
def tensors_and_rows(draw: st.DrawFn) -> tuple[Tensors, int]:
    rows = draw(st.integers(0, 4))
    shapes = st.one_of(
        st.just(()),
        st.tuples(st.just(rows)),
        st.tuples(st.just(rows), st.integers(0, 3)),
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 2)),
    )
    names = draw(st.lists(st.text(max_size=3), unique=True, max_size=3))
    return {name: draw(shapes.flatmap(arrays)) for name in names}, rows


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (np.ndarray, np.generic)):
        whole = type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        texts = one.dtype == object
        return whole and (one.tolist() == other.tolist() if texts else one.tobytes() == other.tobytes())
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and len(one) == len(other)
            and all(map(same, one, other))
            and all(map(same, one.values(), other.values()))
        )
    return type(one) is type(other) and (one == other or (one != one and other != other))


def sent(table: LayoutTable, tensors: Tensors, rows: int) -> Tensors:
    """The tensors at the other side."""
    layout = table.find(KEY, tensors, rows, ("group", 1), ("a", "b"))
    there = read_layout(layout.record()[LAYOUT_FIELDS.size :])
    assert (there.key, there.group, there.outputs) == (KEY, "('group', 1)", ("a", "b"))
    body = encode(layout, tensors)
    if layout.plain:
        assert len(body) == layout.size(rows)
        memory = bytearray(64 + len(body))
        write(memory, 64, layout, tensors, rows)
        assert memory[64:] == body
    return read(bytearray(bytes(64) + body), 64, 64 + len(body), there, rows)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tensors_and_rows())
def test_tensors_of_every_datatype_and_shape_are_bit_equal_at_the_other_side(
    given_tensors: tuple[Tensors, int],
) -> None:
    tensors, rows = given_tensors
    assert same(sent(LayoutTable(), tensors, rows), tensors)


def test_large_tensors_that_are_not_contiguous_are_bit_equal() -> None:
    wide = np.random.default_rng(1).random((64, 1000)).astype(np.float32)
    tensors = {"x": wide[:, ::2], "y": wide.T[:10], "z": wide.astype(">f4")}
    arrived = sent(LayoutTable(), tensors, 64)
    for name, tensor in tensors.items():
        assert (arrived[name] == tensor).all()


VALUES = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXTS),
        *(arrays(()), arrays((2, 3))),
        st.sampled_from([np.float32(0.5), np.int64(3), np.bool_(True), np.float64(0.25)]),
    ),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.one_of(TEXTS, st.integers(), st.booleans()), children, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES.filter(lambda value: not isinstance(value, np.ndarray)))
def test_outputs_that_are_no_tensors_arrive_as_they_were(value: Any) -> None:
    tensors: dict[str, Any] = {"value": value, "x": np.arange(4, dtype=np.float32)}
    assert same(sent(LayoutTable(), tensors, 4), tensors)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", np.array(["a"])[0:1].astype("S1"), [object()]])
def test_a_value_without_a_form_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        sent(LayoutTable(), {"value": value}, 1)


def test_text_that_is_no_str_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="text expected"):
        sent(LayoutTable(), {"x": np.array([b"bytes"], object)}, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given_tensors=tensors_and_rows(), body=st.binary(max_size=200), rows=st.integers(0, 1 << 24))
def test_random_bytes_are_tensors_or_a_protocol_error(
    given_tensors: tuple[Tensors, int], body: bytes, rows: int
) -> None:
    tensors, own_rows = given_tensors
    value: dict[str, Any] = {**tensors, "value": None}
    layout = LayoutTable().find(KEY, value, own_rows)
    with contextlib.suppress(ProtocolError):
        read(bytearray(body), 0, len(body), layout, rows)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_are_tensors_or_a_protocol_error(data: st.DataObject) -> None:
    value: dict[str, Any] = {
        "text": np.array(["ä", "bc"], object),
        "value": [{"a": (1, np.arange(3)), 2: None}, np.float32(1)],
    }
    layout = LayoutTable().find(KEY, value, 2)
    body = bytearray(encode(layout, value))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        read(body, 0, len(body), layout, 2)


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=4), st.booleans(), st.floats()),
    lambda children: st.one_of(
        st.lists(children, max_size=4), st.dictionaries(st.text(max_size=4), children)
    ),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.binary(max_size=60),
        JSON_VALUES.map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries(
            {
                "model": st.just("m") | JSON_VALUES,
                "version": st.just(1) | JSON_VALUES,
                "group": st.just("") | JSON_VALUES,
                "outputs": st.none() | JSON_VALUES,
                "tensors": st.lists(
                    st.tuples(
                        st.text(max_size=2) | JSON_VALUES,
                        st.sampled_from(["<f4", "text", "json", "O", "<f16"]) | JSON_VALUES,
                        st.booleans() | JSON_VALUES,
                        st.lists(st.integers(-1, 2**70), max_size=70) | JSON_VALUES,
                    )
                )
                | JSON_VALUES,
            }
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_random_layouts_are_read_or_a_protocol_error(body: bytes) -> None:
    try:
        layout = read_layout(body)
    except ProtocolError:
        return
    with contextlib.suppress(ProtocolError):
        read(bytearray(100), 0, 100, layout, 1 << 24)


def test_one_layout_serves_requests_of_any_number_of_rows() -> None:
    table = LayoutTable()
    first = table.find(KEY, {"x": np.zeros((1, 4), np.float32)}, 1)
    assert table.find(KEY, {"x": np.zeros((9, 4), np.float32)}, 9) is first
    assert table.find(KEY, {"x": np.zeros((9, 5), np.float32)}, 9) is not first
    assert table.find(KEY, {"x": np.zeros((9, 4), np.float32)}, 9) is first
    assert table.find(KEY, {"x": np.zeros((9, 4), np.float64)}, 9) is not first
    assert table.find(KEY, {"x": np.zeros((9, 4), np.float32)}, 9, "pixels") is not first
    assert table.find(KEY, {"x": np.zeros((9, 4), np.float32)}, 9, None, ("y",)) is not first
    assert table.find(VersionKey("m", 2), {"x": np.zeros((9, 4), np.float32)}, 9) is not first


def test_the_oldest_layout_is_forgotten_and_gets_a_number_again_when_it_is_needed() -> None:
    table = LayoutTable(most=3)
    layouts = [table.find(KEY, {"x": np.zeros((1, width), np.float32)}, 1) for width in range(5)]
    assert [layout.number for layout in layouts] == [-1, -1, 2, 0, 1]
    again = table.find(KEY, {"x": np.zeros((1, 0), np.float32)}, 1)
    assert again is not layouts[0]
    assert again.number == 2
    again.sent = 7
    table.renumber(layouts[0])
    assert (layouts[0].number, layouts[0].sent, again.number) == (2, 7, -1)
    table.renumber(layouts[1])
    assert sorted(layout.number for layout in layouts) == [-1, -1, 0, 1, 2]
