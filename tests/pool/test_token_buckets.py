"""Token buckets: what a tenant may send, and when it may come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.pool.token_buckets import MEMORY_BYTES, REQUESTS, ROWS, BucketMemory, TokenBucket


def memory() -> memoryview[float]:
    return memoryview(bytearray(MEMORY_BYTES)).cast("d")


def bucket(per_s: float, tenant: int = 7) -> TokenBucket:
    return BucketMemory(memory()).bucket(tenant, REQUESTS, per_s)


def test_a_full_bucket_gives_what_comes_in_a_second_at_once() -> None:
    made = bucket(10.0)
    assert [made.take(1, 100.0) for _ in range(10)] == [0.0] * 10
    assert made.take(1, 100.0) == pytest.approx(0.1)
    assert made.take(1, 100.1) == 0.0


def test_a_rate_below_one_a_second_gives_one_request() -> None:
    made = bucket(0.5)
    assert made.take(1, 0.0) == 0.0
    assert made.take(1, 0.0) == pytest.approx(2.0)
    assert made.take(1, 2.0) == 0.0


def test_a_request_that_is_larger_than_the_bucket_waits_until_it_is_full() -> None:
    made = bucket(10.0)
    assert made.take(1, 0.0) == 0.0
    assert made.take(1000, 0.0) == pytest.approx(0.1)
    assert made.take(1000, 0.1) == 0.0
    assert made.take(1, 0.2) > 98, "those after it wait until its tokens have come"


def test_tokens_are_given_back() -> None:
    made = bucket(10.0)
    assert made.take(10, 0.0) == 0.0
    made.give_back(10)
    assert made.take(10, 0.0) == 0.0
    assert made.take(1, 0.0) > 0


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 30)), max_size=50), st.floats(0.1, 1000))
def test_a_client_that_waits_as_long_as_it_is_told_gets_in_and_never_more_than_the_rate(
    asks: list[tuple[float, int]], per_s: float
) -> None:
    made, now, taken, largest = bucket(per_s), 50.0, 0, 0
    for pause, tokens in asks:
        now += pause
        wait_s = made.take(tokens, now)
        if wait_s > 0:
            assert made.take(tokens, now + wait_s / 2) > 0, "it is not told to wait for longer than it must"
            now += wait_s
            assert made.take(tokens, now) == 0.0
        taken += tokens
        largest = max(largest, tokens)
    assert taken <= per_s * (now - 50.0 + 1e-3) + max(per_s, 1.0) + largest + 1e-6


def test_processes_share_a_bucket_and_tenants_do_not() -> None:
    shared = memory()
    first, second = (BucketMemory(shared).bucket(5, REQUESTS, 1.0) for _ in range(2))
    assert first.take(1, 0.0) == 0.0
    assert second.take(1, 0.0) > 0
    assert BucketMemory(shared).bucket(5, ROWS, 1.0).take(1, 0.0) == 0.0
    assert BucketMemory(shared).bucket(5 + 2048, REQUESTS, 1.0).take(1, 0.0) == 0.0, "the same first slot"
    assert BucketMemory(shared).bucket(0, REQUESTS, 1.0).take(1, 0.0) == 0.0


def test_more_tenants_than_slots_share_buckets() -> None:
    buckets = BucketMemory(memory())
    made = [buckets.bucket(tenant, REQUESTS, 1.0) for tenant in range(1, 3000)]
    assert all(each.take(1, 1e9 * (index + 1)) == 0.0 for index, each in enumerate(made))
