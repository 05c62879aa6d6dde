"""Both ways of reading lists agree with a slow reference that reads one element at a time."""

from __future__ import annotations

import json as plain_json
import math
from itertools import chain
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inferpool.errors import InvalidInput
from inferpool.tensors import DTYPES

from tests.wire.conftest import FLOATS, INTEGERS, WAYS, any_shape, bits, outcome


def slow_reference(value: Any, datatype: str, top: bool = True) -> tuple[tuple[int, ...], list[Any]] | None:
    """Return shape and elements, read one at a time; None if the tensor is refused."""
    if isinstance(value, list):
        read = [slow_reference(part, datatype, False) for part in value]
        if not read:
            return (0,), []
        if any(part is None or part[0] != read[0][0] for part in read):  # type: ignore[index]
            return None
        inner = read[0][0]  # type: ignore[index]
        return (len(value), *inner), list(chain.from_iterable(part[1] for part in read if part))
    if value is None and top:
        return None
    element = slow_element(value, datatype)
    return None if element is None else ((), [element])


def slow_element(value: Any, datatype: str) -> Any:
    if datatype == "BOOL":
        return value if isinstance(value, bool) else None
    if datatype == "BYTES":
        return value if isinstance(value, str) else None
    if value is None and datatype in FLOATS:
        return DTYPES[datatype].type(math.nan)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if datatype in FLOATS:
        with np.errstate(over="ignore"):
            number = DTYPES[datatype].type(float(value))
        return number if np.isfinite(number) else None
    if isinstance(value, float) and not (value.is_integer() and abs(value) <= 2**53):
        return None
    limits = np.iinfo(DTYPES[datatype])
    return int(value) if limits.min <= value <= limits.max else None


def lists_of(elements: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    regular = st.lists(st.integers(0, 3), max_size=4).flatmap(lambda shape: of_shape(elements, shape))
    anything = st.recursive(elements, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
    return st.one_of(regular, regular.flatmap(deformed), anything)


def of_shape(elements: st.SearchStrategy[Any], shape: list[int]) -> st.SearchStrategy[Any]:
    strategy = elements
    for size in reversed(shape):
        strategy = st.lists(strategy, min_size=size, max_size=size)
    return strategy


def deformed(value: Any) -> st.SearchStrategy[Any]:
    """Move elements between lists, or put one into a list: the number of elements stays the same."""
    return st.randoms(use_true_random=False).map(lambda random: deform(value, random))


def deform(value: Any, random: Any) -> Any:
    if not isinstance(value, list) or not value:
        return value
    lists = [part for part in value if isinstance(part, list)]
    if len(lists) > 1 and random.random() < 0.5:
        giver, taker = random.sample(lists, 2)
        if giver:
            taker.append(giver.pop())
        return value
    index = random.randrange(len(value))
    value[index] = [value[index]] if random.random() < 0.3 else deform(value[index], random)
    return value


NUMBERS = st.one_of(
    st.integers(-300, 300),
    st.integers(-(2**63) - 2, 2**64 + 2),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**54), 2**54).map(float),
)
ELEMENTS: st.SearchStrategy[Any] = st.one_of(
    NUMBERS, st.booleans(), st.none(), st.text(max_size=3), st.just({})
)
GAPPED: st.SearchStrategy[Any] = st.one_of(NUMBERS, st.none())


@given(
    value=st.one_of(lists_of(NUMBERS), lists_of(st.integers(0, 9)), lists_of(ELEMENTS), lists_of(GAPPED)),
    datatype=st.sampled_from([*INTEGERS, *FLOATS, "BOOL", "BYTES"]),
)
@example(value=[[1, 2, 3], [4]], datatype="FP32")
@example(value=[[1, 2], [[3], 4]], datatype="FP32")
@example(value=[[None, 2.5], [3, None]], datatype="FP16")
@example(value=[[None, 2], [3, 4]], datatype="FP32")
@example(value=None, datatype="FP32")
@example(value=[[1, [2, 3]], [4, []]], datatype="INT64")
@settings(max_examples=300, deadline=None)
def test_both_ways_agree_with_a_slow_reference(value: Any, datatype: str) -> None:
    body = plain_json.dumps({"inputs": {"x": value}}, ensure_ascii=False).encode()
    # Either way, an integer of more than 64 bits is read as a float.
    value = plain_json.loads(plain_json.dumps(value), parse_int=lambda text: wide_or_float(int(text)))
    expected = slow_reference(value, datatype)
    rank = len(expected[0]) if expected else 1
    found = [outcome(body, any_shape(datatype, rank), way) for way in WAYS]
    assert found.count(found[0]) == len(found)
    if expected is None:
        assert found[0][0] is InvalidInput
    else:
        shape, elements = expected
        array = np.array(elements, dtype=DTYPES[datatype]).reshape(shape)
        assert found[0] == (("x", bits(array)),)


def wide_or_float(number: int) -> int | float:
    return number if -(2**63) <= number < 2**64 else float(number)
