"""Of lines that others can cause at will one of a kind a minute is written, and none goes uncounted."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.pool.log_limits import EVERY_S, MOST_CHARACTERS, LogLimiter, redact_error


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 2 * EVERY_S))))
def test_one_of_a_kind_a_minute_is_said_and_the_rest_counted(causes: list[tuple[str, float]]) -> None:
    now = 0.0
    complaints = LogLimiter(lambda: now)
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


def test_of_what_a_model_says_of_text_nothing_is_said() -> None:
    text = {"x": np.zeros(2), "text": np.array(["a secret"], object)}
    with pytest.raises(KeyError) as caught:
        raise KeyError("a secret")
    said = redact_error(caught.value, text)
    assert (type(said).__qualname__, type(said).__module__) == ("KeyError", "builtins")
    assert said.__traceback__ is caught.value.__traceback__
    assert "secret" not in str(said)


def test_an_error_that_cannot_say_what_it_is_is_named_all_the_same() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("mute")

    said = redact_error(Mute(), {"x": np.zeros(2)})
    assert type(said).__qualname__.endswith("Mute")
    assert str(said) == "…"


@pytest.mark.parametrize("count", [4, 200_000])
def test_numbers_of_the_request_are_not_said(count: int) -> None:
    inputs = {"ids": np.array([[7, 999_999]]), "x": np.linspace(2.718281828, 3, count, dtype=np.float32)}
    message = (
        f"node /layer.7/Gather: idx=999999 is not in [-30,29]; x is {inputs['x'][:1]}, or {2.718281828:.4g}"
    )
    said = str(redact_error(ValueError(message), inputs))
    bounds = "-30,29" if count == 4 else "…,…"
    assert said == f"node /layer.7/Gather: idx=… is not in [{bounds}]; x is […], or …"


@given(st.text(st.characters(exclude_categories=["N"])), st.integers(0, 3000))
def test_both_ends_are_left_of_a_long_message(text: str, count: int) -> None:
    message = text + "y" * count + text
    said = str(redact_error(ValueError(message), {"x": np.zeros(2)}))
    half = MOST_CHARACTERS // 2
    assert said == (message if len(message) <= MOST_CHARACTERS else f"{message[:half]} … {message[-half:]}")
