"""Of log lines that clients can cause, one of a kind is written per minute, and the others are counted."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st
from inferpool.pool.log_limits import EVERY_S, LogLimiter


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 2 * EVERY_S))))
def test_one_line_of_a_kind_is_written_per_minute_and_the_others_are_counted(
    causes: list[tuple[str, float]],
) -> None:
    now = 0.0
    limiter = LogLimiter(lambda: now)
    written: dict[str, float] = {}
    uncounted: dict[str, int] = defaultdict(int)
    for kind, pause_s in causes:
        now += pause_s
        suppressed = limiter.suppressed(kind)
        if kind in written and now < written[kind] + EVERY_S:
            assert suppressed is None
            uncounted[kind] += 1
        else:
            assert suppressed == uncounted.pop(kind, 0)
            written[kind] = now
