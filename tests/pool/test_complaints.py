"""Of lines that others can cause at will one of a kind a minute is written, and none goes uncounted."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from service.pool.complaints import EVERY_S, Complaints


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 2 * EVERY_S))))
def test_one_of_a_kind_a_minute_is_said_and_the_rest_counted(causes: list[tuple[str, float]]) -> None:
    now = 0.0
    complaints = Complaints(lambda: now)
    said: dict[str, float] = {}
    silent: dict[str, int] = defaultdict(int)
    for kind, pause_s in causes:
        now += pause_s
        unsaid = complaints.unsaid(kind)
        if kind in said and now < said[kind] + EVERY_S:
            assert unsaid is None
            silent[kind] += 1
        else:
            assert unsaid == silent.pop(kind, 0)
            said[kind] = now
