"""Tables become inputs: columns by name, features in their order, missing values, errors with the cell."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.allowance import UNLIMITED, Allowance
from inferpool.codecs.csv_table import read_csv, write_csv
from inferpool.codecs.table import read_json_table, table_tensors
from inferpool.errors import BodyTooLarge, InferpoolError, InvalidInput, MalformedBody, UnsupportedMediaType
from inferpool.tensors import ANY, Signature, Tensors, TensorSpec

AGE = TensorSpec("age", "FP32", (ANY, 1))
COUNT = TensorSpec("count", "INT64", (ANY,))
CITY = TensorSpec("city", "BYTES", (ANY, 1))
MEMBER = TensorSpec("member", "BOOL", (ANY,))
MIXED = Signature((AGE, COUNT, CITY, MEMBER), (TensorSpec("y", "FP32", (ANY,)),))
FEATURES = Signature((TensorSpec("features", "FP32", (ANY, 3)),), MIXED.outputs)
ROWS: list[dict[str, Any]] = [
    {"age": 41.5, "count": 3, "city": "Bern", "member": True},
    {"age": None, "count": -1, "city": "", "member": False},
]
NAMES = list(ROWS[0])
SPLIT = {"columns": NAMES, "index": [0, 1], "data": [[row[name] for name in NAMES] for row in ROWS]}
ORIENTATIONS = {
    "dataframe_records": ROWS,
    "records": ROWS,
    "dataframe_split": SPLIT,
    "split": SPLIT,
    "list": {name: [row[name] for row in ROWS] for name in NAMES},
}


def of_json(field: str, value: Any, signature: Signature = MIXED) -> Tensors:
    return table_tensors(signature, read_json_table(field, value, signature), UNLIMITED)


def of_csv(text: str, signature: Signature = MIXED, parameters: str = "") -> Tensors:
    return table_tensors(signature, read_csv(text.encode(), parameters, signature, UNLIMITED), UNLIMITED)


def check_rows(tensors: Tensors) -> None:
    """Check that these are the rows above."""
    assert tensors["age"].dtype == np.float32
    np.testing.assert_array_equal(tensors["age"], np.array([[41.5], [np.nan]], np.float32))
    assert tensors["count"].tolist() == [3, -1]
    assert tensors["city"].tolist() == [["Bern"], [""]]
    assert tensors["member"].tolist() == [True, False]


@pytest.mark.parametrize("field", ORIENTATIONS)
def test_every_orientation_gives_the_same_inputs(field: str) -> None:
    check_rows(of_json(field, json.loads(json.dumps(ORIENTATIONS[field]))))


def test_csv_gives_the_same_inputs() -> None:
    body = 'count,age,city,member\r\n3,41.5,"Bern",true\r\n-1,,,FALSE\r\n'
    check_rows(of_csv(body))
    check_rows(of_csv("\ufeff" + body))
    without = "41.5,3,Bern,1\n,-1,,0\n"
    check_rows(of_csv(without))
    check_rows(of_csv(without, parameters="charset=utf-8; header=absent"))


def test_a_model_with_one_input_takes_the_columns_as_features() -> None:
    expected = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    rows = [{"b": 1, "a": 2, "c": 3.0}, {"b": 4, "a": 5, "c": 6}]
    assert of_json("records", rows, FEATURES)["features"].tolist() == expected
    assert of_csv("1,2,3\n4,5,6", FEATURES)["features"].tolist() == expected
    assert of_csv("b,a,c\n1,2,3\n4,5,6\n", FEATURES)["features"].tolist() == expected
    assert of_csv("1,2,3\n4,5,6", FEATURES, "header=present")["features"].tolist() == expected[1:]
    # A column with the name of the input is the input.
    whole = {"features": [[1, 2, 3], [4, 5, 6]]}
    assert of_json("list", whole, FEATURES)["features"].tolist() == expected
    # Records without rows have no names; they are a request without rows.
    assert of_json("records", [], FEATURES)["features"].shape == (0, 3)


def test_a_model_of_sentences_takes_one_column() -> None:
    reviews = Signature((TensorSpec("text", "BYTES", (ANY,)),), MIXED.outputs)
    assert of_csv('text\ngood\n"so, so"\n', reviews)["text"].tolist() == ["good", "so, so"]
    assert of_json("records", [{"review": "good"}], reviews)["text"].tolist() == ["good"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("records", [{**ROWS[0], "count": None}], r'"count" at \[0\] is null'),
        ("records", [ROWS[0], {**ROWS[1], "city": 5}], r'"city" at \[1\] is 5'),
        ("records", [ROWS[0], {**ROWS[1], "tip": 5}], r'\[1\] has "tip", which the first row lacks'),
        ("records", [{**ROWS[0], "tip": 5}], 'no input is called "tip"'),
        ("records", [{"age": 1}], '"count" is missing'),
        ("records", [ROWS[0], 5], r'"records" at \[1\] is 5'),
        ("records", {}, '"records" is an object'),
        ("split", {"columns": ["a"], "data": [[1, 2]]}, r'"split.data" at \[0\] is a list of 2'),
        ("split", {"columns": ["a", "a"], "data": [[1, 2]]}, 'two columns "a"'),
        ("split", {"columns": ["a"], "rows": []}, 'unknown field, "rows"'),
        ("list", {"age": [1], "count": [1, 2]}, "columns of 1 and of 2 rows"),
        ("list", [], '"list" is a list'),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(field: str, value: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        of_json(field, value)


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("age,count,city,member\n1,x,a,1\n", InvalidInput, 'column "count" has "x" in row 1'),
        ("age,count,city,member\n1,,a,1\n", InvalidInput, r'"count" at \[0\] is null'),
        ("age,count,city,member\n1,1_0,a,1\n", InvalidInput, '"1_0"'),
        ("age,count,city,member\n1,1,a,yes\n", InvalidInput, "true or false"),
        ("age,count,city,member\n1,1,a\n", InvalidInput, "row 1 of the table has 3 cells"),
        ("1,2\n", InvalidInput, "2 columns without names"),
        ('age\n"1', MalformedBody, "not CSV"),
        ("", InvalidInput, "empty"),
    ],
)
def test_wrong_csv_is_refused_with_the_place(body: str, kind: type[InferpoolError], said: str) -> None:
    with pytest.raises(kind, match=said):
        of_csv(body)


def test_a_table_that_would_take_too_much_memory_is_refused_before_it_is_read() -> None:
    class Small(Allowance):
        def take(self, size: int, what: str) -> None:
            if size > 1000:
                raise BodyTooLarge(f"{what} takes {size} bytes", limit=1000)

    body = ("," * 100 + "\n").encode()
    with pytest.raises(BodyTooLarge, match="reading the CSV of the body takes"):
        read_csv(body, "", FEATURES, Small(2**20))


@given(st.lists(st.lists(st.floats(width=32, allow_infinity=False), min_size=3, max_size=3), min_size=1))
def test_numbers_come_back_from_csv_as_they_were(rows: list[list[float]]) -> None:
    """What the server writes as CSV it also reads: the numbers are the same, NaN included."""
    table = np.array(rows, np.float32)
    body = b"".join(write_csv({"features": table}, (), header=True))
    assert body.startswith(b"features_0,features_1,features_2\n")
    read = of_csv(body.decode(), FEATURES)["features"]
    np.testing.assert_array_equal(read, table)


def test_outputs_that_are_no_table_are_not_written_as_csv() -> None:
    outputs = {"a": np.array([True, False]), "b": np.array([["x"], ["y, z"]], np.object_)}
    assert b"".join(write_csv(outputs, (), header=True)) == b'a,b\ntrue,x\nfalse,"y, z"\n'
    for wrong in ({"a": np.zeros((2, 2, 2))}, {"a": [1]}, {"a": np.zeros(2), "b": np.zeros(3)}):
        with pytest.raises(UnsupportedMediaType, match="CSV"):
            list(write_csv(wrong, (), header=False))
