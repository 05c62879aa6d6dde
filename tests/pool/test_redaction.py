"""Error messages in the log quote nothing of a request's inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.pool.redaction import MAX_CHARACTERS, redact_error


def test_a_message_about_text_is_omitted_altogether() -> None:
    text = {"x": np.zeros(2), "text": np.array(["a secret"], object)}
    with pytest.raises(KeyError) as caught:
        raise KeyError("a secret")
    redacted = redact_error(caught.value, text)
    assert (type(redacted).__qualname__, type(redacted).__module__) == ("KeyError", "builtins")
    assert redacted.__traceback__ is caught.value.__traceback__
    assert "secret" not in str(redacted)


def test_an_error_that_raises_when_it_is_printed_still_has_its_name() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("mute")

    redacted = redact_error(Mute(), {"x": np.zeros(2)})
    assert type(redacted).__qualname__.endswith("Mute")
    assert str(redacted) == "…"


@pytest.mark.parametrize("count", [4, 200_000])
def test_numbers_of_the_request_are_omitted(count: int) -> None:
    inputs = {"ids": np.array([[7, 999_999]]), "x": np.linspace(2.718281828, 3, count, dtype=np.float32)}
    message = (
        f"node /layer.7/Gather: idx=999999 is not in [-30,29]; x is {inputs['x'][:1]}, or {2.718281828:.4g}"
    )
    redacted = str(redact_error(ValueError(message), inputs))
    bounds = "-30,29" if count == 4 else "…,…"
    assert redacted == f"node /layer.7/Gather: idx=… is not in [{bounds}]; x is […], or …"


@given(st.text(st.characters(exclude_categories=["N"])), st.integers(0, 3000))
def test_a_long_message_keeps_both_ends(text: str, count: int) -> None:
    message = text + "y" * count + text
    redacted = str(redact_error(ValueError(message), {"x": np.zeros(2)}))
    half = MAX_CHARACTERS // 2
    assert redacted == (
        message if len(message) <= MAX_CHARACTERS else f"{message[:half]} … {message[-half:]}"
    )
