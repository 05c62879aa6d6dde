"""The suite of `scripts/chaos`, for a short time, against a server of the sources."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.clients import Reply
from tests.kills.census import Census
from tests.kills.report import growth, run_round
from tests.kills.workload import Request

REQUESTS = 2000
FIRST = ("engine", "web process", "poison by fault", "engine")
SUMS = Request("/predict/sums-0", {}, b"", {"sum": np.array([4.0, 7.0])})


def test_processes_that_are_ended_at_random_cost_nobody_an_answer() -> None:
    outcome = run_round(REQUESTS, seed=5, first=FIRST, shares={}, clients=24, censuses=2)
    assert outcome.faults == []
    assert outcome.requests >= REQUESTS
    assert set(outcome.answers) <= {200, 504}
    assert outcome.answers[200] > 0.9 * REQUESTS
    assert outcome.rows > outcome.answers[200]
    assert Counter(FIRST) <= Counter(outcome.ends)


@pytest.mark.parametrize(
    ("outputs", "fault"),
    [
        ('{"sum": [4.0, 7.0]}', None),
        ('{"sum": [7.0, 4.0]}', "sum has 2 wrong rows of 2"),
        ('{"sum": [4.0]}', "sum has the shape (1,), not (2,)"),
        ('{"y": [4.0, 7.0]}', "the output sum is missing"),
    ],
)
def test_rows_of_another_request_are_a_fault(outputs: str, fault: str | None) -> None:
    reply = Reply(200, {"content-type": "application/json"}, f'{{"outputs": {outputs}}}'.encode())
    assert SUMS.fault(reply) == fault


def test_what_grows_is_a_fault() -> None:
    first = Census(100, {"engines": 2}, {"engines": 100 << 20}, {"engines": 26}, 0)
    assert growth([first, first]) == []
    grown = first._replace(pss={"engines": 200 << 20}, descriptors={"engines": 27})
    assert growth([first, grown]) == [
        "engines: from 26 to 27 descriptors",
        "engines: from 100 to 200 MiB",
    ]
    # Another number of processes says nothing.
    assert growth([first, grown._replace(processes={"engines": 3})]) == []
