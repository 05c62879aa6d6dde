"""A model that is offered runs the next batch, and the one before it is closed."""

from __future__ import annotations

import numpy as np
from inferpool.pool.hot_swap import HotSwapModel

from tests.fake_gpu import FakeCard, FakeModel, expected

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
NO_ROWS = np.zeros((0, 4), np.float32)


class Closing(FakeModel):
    """Knows whether it has been closed."""

    closed = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def test_an_offered_model_runs_from_the_next_batch_on() -> None:
    first_card, second_card = FakeCard(), FakeCard()
    first, second = Closing(first_card), Closing(second_card)
    model = HotSwapModel(first)
    model.begin()
    assert model.run({"x": ROWS})["sum"].tolist() == expected(ROWS).tolist()
    model.offer(second, None)
    assert not first.closed, "it may be running"
    answer = model.run_padded([{"x": ROWS}], 4)["sum"]
    assert answer.tolist() == expected(ROWS).tolist()
    assert (len(first_card.batches), len(second_card.batches)) == (1, 1)
    assert first.closed
    assert model.graphs == second.graphs
    model.close()
    assert second.closed


def test_requests_without_rows_are_answered_without_a_run() -> None:
    card = FakeCard()
    model = HotSwapModel(Closing(FakeCard()))
    empty = {"sum": np.zeros(0), "other": np.zeros(0)}
    model.offer(Closing(card), empty)
    assert model.run({"x": NO_ROWS}).keys() == {"sum", "other"}
    assert model.run({"x": NO_ROWS}, ["sum"]).keys() == {"sum"}
    assert not card.batches


def test_a_model_that_was_offered_and_never_ran_is_closed_too() -> None:
    first, second = Closing(FakeCard()), Closing(FakeCard())
    model = HotSwapModel(first)
    model.offer(second, None)
    model.close()
    assert first.closed
    assert second.closed
