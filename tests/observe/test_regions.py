"""Metrics in shared memory: the sums of all processes, and readers that survive whatever is there."""

from __future__ import annotations

import logging
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inferpool.observe import regions as module
from inferpool.observe.families import BATCH_RUNS
from inferpool.observe.metrics import STALE_S, Metrics
from inferpool.observe.metrics_page import MetricsPage
from inferpool.observe.regions import REGION_BYTES, Region, RegionReader, Regions, make_regions
from prometheus_client.parser import text_string_to_metric_families as parse_text

SLOTS = 3


@contextmanager
def shared_memory(slots: int = SLOTS) -> Iterator[int]:
    """The memory of a server with these slots, which is closed at the end."""
    file = make_regions(slots)
    try:
        yield file
    finally:
        os.close(file)


def scrape(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """The samples of a page, by name and label values."""
    text = MetricsPage(metrics).render("")[0].decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


class Writer:
    """A process in a slot that can be replaced by a successor; all of them are in this process."""

    def __init__(self, file: int, slot: int) -> None:
        self._file, self._slot = file, slot
        self.replace()

    def replace(self) -> None:
        self.metrics = Metrics({}, Regions(self._file, self._slot))


adds = st.tuples(
    st.integers(0, SLOTS - 1), st.sampled_from(["a", "b", 'm"\\\n', "ü" * 40]), st.integers(0, 1000),
    st.booleans(),
)  # fmt: skip


@given(st.lists(adds, max_size=40))
@settings(deadline=None, max_examples=30)
def test_every_process_tells_the_sums_of_all(steps: list[tuple[int, str, int, bool]]) -> None:
    """Whoever adds, and however often processes end in between, each process renders and totals the sums."""
    with shared_memory() as file:
        writers = [Writer(file, slot) for slot in range(SLOTS)]
        sums: dict[str, list[int]] = {}
        for slot, model, amount, ends in steps:
            if ends:
                writers[slot].replace()
            writers[slot].metrics.value("requests_total", model, "1", "200").add(amount)
            writers[slot].metrics.distribution("batch_rows", model, "1").observe(amount)
            sums.setdefault(model, []).append(amount)
        for writer in writers:
            samples = scrape(writer.metrics)
            for model, amounts in sums.items():
                assert samples["inferpool_requests_total", model, "1", "200"] == sum(amounts)
                assert samples["inferpool_batch_rows_sum", model, "1"] == sum(amounts)
                assert samples["inferpool_batch_rows_count", model, "1"] == len(amounts)
                below = sum(amount <= 8 for amount in amounts)
                assert samples["inferpool_batch_rows_bucket", model, "1", "8.0"] == below
                assert writer.metrics.total("requests_total", model, "1", "200") == [sum(amounts)]
                *counts, total = writer.metrics.total("batch_rows", model, "1")
                assert (sum(counts), total) == (len(amounts), sum(amounts))


def write_at(file: int, offset: int, data: bytes) -> None:
    with mmap.mmap(file, REGION_BYTES, offset=REGION_BYTES) as region:
        region[offset : offset + len(data)] = data[: REGION_BYTES - offset]


@given(
    st.lists(st.tuples(st.integers(0, 2000) | st.integers(0, REGION_BYTES - 1), st.binary(max_size=200))),
    st.integers(0, 2**64 - 1) | st.integers(64, 4000),
)
@example([(150, b"\x00\xbd")], 152)  # a counter that has become negative
@settings(deadline=None, max_examples=30)
def test_damaged_regions_do_no_harm(damage: list[tuple[int, bytes]], end: int) -> None:
    """Whatever bytes a process leaves in its region, others render a page with their own numbers."""
    with shared_memory() as file:
        victim = Metrics({}, Regions(file, 1))
        victim.value("requests_total", "a", "1", "200").add(5)
        victim.distribution("batch_rows", "a", "1").observe(3)
        victim.add_source(lambda: [("in_flight_requests", (), 2.0)])
        victim.publish()
        reader = Metrics({}, Regions(file, 0))
        reader.value("requests_total", "a", "1", "200").add(7)
        for number in range(2):  # before and after the reader has seen the series
            for offset, data in damage:
                write_at(file, offset, data)
            write_at(file, 8, end.to_bytes(8, sys.byteorder))
            samples = scrape(reader)
            assert samples["inferpool_requests_total", "a", "1", "200"] >= 7, number
            reader.hidden_series(BATCH_RUNS, "a")
        # A successor starts from what it can read.
        successor = Metrics({}, Regions(file, 1))
        successor.value("requests_total", "b", "1", "200").add(1)
        assert scrape(successor)["inferpool_requests_total", "b", "1", "200"] >= 1


@given(st.binary(max_size=4000))
def test_a_valid_checksum_is_not_trusted(data: bytes) -> None:
    """Records with any text and a right checksum are read or end the reading."""
    with shared_memory(1) as file:
        Region(file, 0)
        head = module._RECORD.pack(module._checksum(data, 1), len(data), 1)
        with mmap.mmap(file, REGION_BYTES) as region:
            region[64 : 64 + len(head) + len(data)] = head + data
            region[8:16] = (4096 + 64).to_bytes(8, sys.byteorder)
        reader = RegionReader(file, 0)
        reader.refresh()
        assert Region(file, 0).numbers("x", ("1",), 1) is not None


def test_text_that_is_nested_too_deeply_ends_the_reading() -> None:
    test_a_valid_checksum_is_not_trusted.hypothesis.inner_test(b"[" * 60_000)  # type: ignore[attr-defined]


def test_a_full_region_keeps_counting_locally(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Series beyond the memory are of their process alone, and one line of the log says so."""
    monkeypatch.setattr(module, "REGION_BYTES", 4096)
    with shared_memory(2) as file, caplog.at_level(logging.ERROR):
        writer, other = (Metrics({}, Regions(file, slot)) for slot in (0, 1))
        values = [writer.value("requests_total", f"model-{number}", "1", "200") for number in range(100)]
        for value in values:
            value.add(3)
        mine, theirs = scrape(writer), scrape(other)
    names = [("inferpool_requests_total", f"model-{number}", "1", "200") for number in range(100)]
    assert [mine[name] for name in names] == [3] * 100
    seen = [theirs.get(name) for name in names]
    assert 10 < seen.count(3) < 100
    assert seen == [3] * seen.count(3) + [None] * seen.count(None)
    assert len(caplog.records) == 1
    assert "the memory of the metrics is full" in caplog.text


def test_gauges_of_living_processes_are_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gauges are summed or the largest is taken; those that vanish or whose process is gone are left out."""
    now = time.monotonic()
    monkeypatch.setattr("inferpool.observe.metrics.time.monotonic", lambda: now)
    with shared_memory() as file:
        first, second = (Metrics({}, Regions(file, slot)) for slot in (0, 1))
        for metrics, number in ((first, 3.0), (second, 4.0)):
            metrics.add_source(lambda number=number: [("in_flight_requests", (), number)])  # type: ignore[misc]
            metrics.add_source(lambda number=number: [("memory_limit_bytes", (), number)])  # type: ignore[misc]
        gpus = [("gpu_power_watts", ("cuda:0",), 200.0)]
        second.add_source(lambda: gpus)
        second.add_source(lambda: [("queue_rows", ("a", "1"), 1.0)], published=False)
        assert scrape(first)["inferpool_in_flight_requests",] == 3
        second.publish()
        samples = scrape(first)
        assert samples["inferpool_in_flight_requests",] == 7
        assert samples["inferpool_memory_limit_bytes",] == 4
        assert samples["inferpool_gpu_power_watts", "cuda:0"] == 200
        assert ("inferpool_queue_rows", "a", "1") not in samples
        gpus.clear()
        second.publish()
        assert ("inferpool_gpu_power_watts", "cuda:0") not in scrape(first)
        now += STALE_S
        assert scrape(first)["inferpool_in_flight_requests",] == 3


def test_metrics_of_processes_are_those_of_all() -> None:
    """CPU time, memory and descriptors are summed over the processes, and CPU time never goes back."""
    with shared_memory() as file:
        code = (
            "import sys, time; from inferpool.observe.metrics import *;"
            " m = Metrics({}, Regions(int(sys.argv[1]), 1));\n"
            "while time.process_time() < 0.3 + m.left_behind('cpu_seconds'): pass\n"
            "m.publish(); print('ready', flush=True); sys.stdin.read()"
        )
        metrics = Metrics({}, Regions(file, 0))
        alone = scrape(metrics)
        seen = alone
        for number in (1, 2):
            child = subprocess.Popen(
                [sys.executable, "-c", code, str(file)], pass_fds=[file], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )  # fmt: skip
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            both = scrape(metrics)
            assert both["process_cpu_seconds_total",] >= alone["process_cpu_seconds_total",] + 0.3 * number
            assert both["process_resident_memory_bytes",] > alone["process_resident_memory_bytes",]
            assert both["process_virtual_memory_bytes",] > alone["process_virtual_memory_bytes",]
            assert both["process_open_fds",] >= alone["process_open_fds",] + 3
            assert both["process_start_time_seconds",] == alone["process_start_time_seconds",]
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe
                pipe.close()
            after = scrape(metrics)
            assert after["process_cpu_seconds_total",] >= both["process_cpu_seconds_total",]
            assert after["process_open_fds",] < both["process_open_fds",]
            seen = after
        assert seen["process_start_time_seconds",] == pytest.approx(alone["process_start_time_seconds",])


def test_a_scrape_asks_once_for_each_version_whether_it_is_shown() -> None:
    """All series of a version or of a model that is gone are left out, whichever process has counted."""
    with shared_memory() as file:
        servers = [Metrics({}, Regions(file, slot)) for slot in range(SLOTS)]
        for metrics in servers:
            for model in ("a", "b"):
                for version in ("1", "2"):
                    metrics.add_version(model, version)
                metrics.value("canaries_total", model, "promoted").add()
        asked: list[tuple[str, str]] = []

        def is_shown(model: str, version: str) -> bool:
            asked.append((model, version))
            return model == "a" and version != "2"

        servers[0].show_only(is_shown)
        samples = scrape(servers[0])
    assert sorted(asked) == [(model, version) for model in "ab" for version in ("", "1", "2")]
    assert {name[1:3] for name in samples if name[0].startswith("inferpool_request_duration")} == {("a", "1")}
    assert samples["inferpool_canaries_total", "a", "promoted"] == SLOTS
    assert ("inferpool_canaries_total", "b", "promoted") not in samples


def test_a_page_of_fifty_versions_takes_less_than_50_ms() -> None:
    """The scrape of a server of two web processes and an engine, all of which know fifty versions."""
    with shared_memory() as file:
        servers = [Metrics({}, Regions(file, slot)) for slot in range(SLOTS)]
        for metrics in servers:
            for number in range(50):
                metrics.add_version(f"model-{number}", "1")
        page = MetricsPage(servers[0])
        page.render("")
        took = []
        for _ in range(7):
            began = time.thread_time()
            page.render("")
            took.append(time.thread_time() - began)
    assert min(took) < 0.05, took
