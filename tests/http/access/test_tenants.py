"""The tenants of requests: their limits, numbers and metrics, and the file that has them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from inferpool.errors import ConfigError, RateLimited
from inferpool.http.access.tenants import (
    MOST_LABELS,
    MOST_TENANTS,
    OTHER_TENANTS,
    TenantLimits,
    Tenants,
    TenantTable,
    number_of,
)
from inferpool.http.access.tenants_file import TenantsFileWatch, make_tenants, read_tenants
from inferpool.observe.metrics import Metrics
from inferpool.observe.metrics_page import MetricsPage
from inferpool.pool.ports import Entry, Result, VersionKey
from inferpool.pool.token_buckets import MEMORY_BYTES, BucketMemory

KEY = VersionKey("m", 1)


def tenants(table: TenantTable | None = None, metrics: Metrics | None = None) -> Tenants:
    memory = BucketMemory(memoryview(bytearray(MEMORY_BYTES)).cast("d"))
    return Tenants(table or TenantTable({}, TenantLimits()), memory, metrics or Metrics({}))


def entry(priority: int = 5) -> Entry:
    return Entry(1, KEY, {}, 1, None, 0, 0.0, priority=priority)


def test_an_entry_gets_the_share_and_the_rank_of_its_tenant() -> None:
    made = tenants(TenantTable({"acme": TenantLimits(3.0, highest_priority=2)}, TenantLimits()))
    of_acme, of_other = entry(priority=1), entry(priority=1)
    made.of("acme").mark(of_acme)
    made.of("other").mark(of_other)
    assert (of_acme.share, of_acme.rank, of_acme.priority) == (3.0, 2, 1)
    assert (of_other.share, of_other.rank, of_other.priority) == (1.0, 5, 1)
    assert of_acme.tenant != of_other.tenant
    low = entry(priority=9)
    made.of("acme").mark(low)
    assert low.rank == 9


def test_numbers_are_the_same_everywhere_and_fit_the_record() -> None:
    assert number_of("") == 0
    numbers = {number_of(f"tenant{index}") for index in range(1000)}
    assert len(numbers) == 1000
    assert max(numbers) < 2**48
    assert number_of("acme") == number_of("acme")


def test_rates_are_of_requests_and_of_rows() -> None:
    made = tenants(TenantTable({"acme": TenantLimits(1.0, 2.0, 10.0)}, TenantLimits()))
    acme = made.of("acme")
    acme.admit(lambda: 0.0)
    acme.admit(lambda: 0.0)
    with pytest.raises(RateLimited, match="too many requests; try again in 500 ms") as refused:
        acme.admit(lambda: 0.0)
    assert refused.value.retry_after_s == pytest.approx(0.5)
    acme.take_rows(10, 0.0)
    with pytest.raises(RateLimited, match="too many rows; try again in 400 ms"):
        acme.take_rows(4, 0.0)
    acme.give_rows_back(10)
    acme.take_rows(4, 0.0)
    made.of("other").admit(lambda: 0.0)
    made.use(TenantTable({}, TenantLimits()))
    made.of("acme").admit(lambda: 0.0)


def test_new_limits_do_not_refill_a_bucket() -> None:
    table = TenantTable({"acme": TenantLimits(1.0, 1.0)}, TenantLimits())
    made = tenants(table)
    made.of("acme").admit(lambda: 0.0)
    made.use(table)
    with pytest.raises(RateLimited):
        made.of("acme").admit(lambda: 0.0)


def test_metrics_and_tenants_are_bounded() -> None:
    metrics = Metrics({})
    made = tenants(metrics=metrics)
    for index in range(2 * MOST_TENANTS):
        made.of(f"tenant{index}").ended(200)
    made.of("").ended(401)
    text = MetricsPage(metrics).render("text/plain")[0].decode()
    lines = [line for line in text.splitlines() if line.startswith("inferpool_tenant_requests_total{")]
    assert len(lines) == MOST_LABELS + 2
    assert f'tenant="{OTHER_TENANTS}",code="200"}} {2.0 * MOST_TENANTS - MOST_LABELS}' in text
    assert made.of("a").number == made.of("b").number, "the rest are one tenant"


def test_compute_time_is_counted_by_rows() -> None:
    metrics = Metrics({})
    acme = tenants(metrics=metrics).of("acme")
    acme.succeeded(2, Result(1, {}, None, 0.0, 0.4, 8))
    text = MetricsPage(metrics).render("text/plain")[0].decode()
    assert 'inferpool_tenant_compute_seconds_total{tenant="acme"} 0.1' in text
    assert 'inferpool_tenant_rows_total{tenant="acme"} 2.0' in text


FILE = """
[default]
requests_per_s = 20

[tenants.acme]
share = 3
rows_per_s = 2000
highest_priority = 2
"""


def test_a_file_has_the_limits(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(FILE)
    table = read_tenants(file)
    assert table.default == TenantLimits(requests_per_s=20)
    assert table.limits == {"acme": TenantLimits(3, 20, 2000, 2)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "not valid TOML"),
        ("[tenant.a]\n", 'unknown table "tenant"; the tables are'),
        ("tenants = 1\n", r"write a table \[tenants.NAME\]"),
        ("[tenants]\na = 1\n", "tenants.a must be a table"),
        ("[tenants.a]\nshares = 1\n", 'tenants.a has an unknown field "shares"; the fields are share, '),
        ("[tenants.a]\nshare = 0\n", "tenants.a: share is 0; expected a number from 1e-06 to 1e"),
        ("[tenants.a]\nshare = true\n", "share is True"),
        ("[tenants.a]\nrequests_per_s = -1\n", "requests_per_s is -1"),
        ("[tenants.a]\nrows_per_s = nan\n", "rows_per_s is nan"),
        ("[default]\nhighest_priority = 1.5\n", "default: highest_priority is 1.5; expected a whole number"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_tenants(file)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tenants_file needs keys"):
        make_tenants(tmp_path, False, Metrics({}))
    assert make_tenants(None, False, Metrics({})) == (None, [])


def test_a_changed_file_is_read_and_a_wrong_one_keeps_the_limits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Loop:
        def call_soon_threadsafe(self, call: Any, *arguments: Any) -> None:
            call(*arguments)

    def write(text: str, moment: int) -> None:
        file.write_text(text)
        os.utime(file, (moment, moment))

    file = tmp_path / "tenants.toml"
    write(FILE, 1)
    made, [watch] = make_tenants(file, True, Metrics({}))
    assert made is not None
    assert isinstance(watch, TenantsFileWatch)
    watch._loop = Loop()
    write("[tenants.acme]\nshare = 7\n", 2)
    watch.look()
    changed = entry()
    made.of("acme").mark(changed)
    assert changed.share == 7
    with caplog.at_level(logging.ERROR):
        write("[tenants.acme]\nshare = 0\n", 3)
        watch.look()
        watch.look()
    assert len(caplog.records) == 1
    made.of("acme").mark(changed)
    assert changed.share == 7
