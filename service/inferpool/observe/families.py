"""The tables of all metrics: those that are exported, and those that only processes of the server read.

`FAMILIES` has the exported metrics; a test compares the documented table with it. `HIDDEN` has what web
processes must know of one another to answer other routes than `/metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# A bucket is a series for each version, and Prometheus keeps each series of each server.
REQUEST_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 1.0, 4.0)
"""Upper bounds for the durations of requests in seconds: steps of about 3, from 1 ms to 4 s.

The rules need the bound of 250 ms.
"""

PART_BUCKETS: Final = (0.001, 0.01, 0.1, 1.0)
"""Upper bounds for the parts of a request's duration in seconds, which `REQUEST_BUCKETS` has too."""

ROWS_BUCKETS: Final = (1, 8, 64)
"""Upper bounds for the rows of a batch."""

USUAL_STATUSES: Final = ("200", "429", "500", "503")
"""Statuses whose counters exist from the start: a rate misses the first request of a new series."""


Combine = Literal["sum", "max", "min"]
"""How the same series of several processes becomes one."""


@dataclass(frozen=True, slots=True)
class Family:
    """One exported metric: its name without the prefix, its kind, labels, help text, and `combine`."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()
    combine: Combine = "sum"

    @property
    def cells(self) -> int:
        """How many numbers a series has: one, or those of the buckets and the sum of a histogram."""
        return len(self.bounds) + 2 if self.kind == "histogram" else 1

    @property
    def full_name(self) -> str:
        """The exported name, with prefix."""
        return "inferpool_" + self.name


_VERSION: Final = ("model", "version")

FAMILIES: Final = {
    family.name: family
    for family in (
        Family("requests_total", "counter", (*_VERSION, "code"),
               "Predict requests answered, by HTTP status."),
        Family("server_errors_total", "counter", _VERSION,
               "Predict requests that ended with a 5xx, but for missed deadlines that clients had set."),
        Family("request_duration_seconds", "histogram", _VERSION,
               "Time from a request's head to its response, errors included.", REQUEST_BUCKETS),
        Family("queue_duration_seconds", "histogram", _VERSION,
               "Time that requests waited in the queue.", PART_BUCKETS),
        Family("compute_duration_seconds", "histogram", _VERSION,
               "Time that the batches of requests ran in the model.", PART_BUCKETS),
        Family("batch_rows", "histogram", _VERSION, "Rows of each batch that ran.", ROWS_BUCKETS),
        Family("batches_total", "counter", (*_VERSION, "device", "reason"),
               "Batches that ran, by the reason why they were not larger."),
        Family("tokens_total", "counter", _VERSION,
               "Tokens that text models ran, padding included."),
        Family("padded_tokens_total", "counter", _VERSION,
               "Padding tokens that extended rows to the longest of their batch."),
        Family("padded_rows_total", "counter", _VERSION,
               "Padding rows that extended batches to a size that the GPU has run before."),
        Family("queue_rows", "gauge", _VERSION, "Rows that wait in the queue now."),
        Family("queue_oldest_age_seconds", "gauge", _VERSION,
               "Time that the oldest request in the queue has waited."),
        Family("queue_wait_seconds", "gauge", _VERSION,
               "Work that waits in the queue, in seconds by the measured rate."),
        Family("refused_keys_total", "counter", ("reason",),
               "Requests refused with status 401 or 403, by what their key lacks."),
        Family("stale_keys", "gauge", ("source",),
               "1 while keys cannot be read again, and those that were read before stay valid.",
               combine="max"),
        Family("refused_connections_total", "counter", ("reason",),
               "Connections that were closed before their first request: address_limit for more than"
               " --connections-per-address, handshake if TLS could not begin."),
        Family("tls_certificate_expiry_timestamp_seconds", "gauge", (),
               "When the certificate of the server expires, in seconds since 1970, or one between it and its"
               " authority.", combine="min"),
        Family("tenant_requests_total", "counter", ("tenant", "code"),
               "Predict requests of a tenant, by HTTP status; with keys only."),
        Family("tenant_rows_total", "counter", ("tenant",), "Rows that were answered, by tenant."),
        Family("tenant_compute_seconds_total", "counter", ("tenant",),
               "Time that batches ran for the rows of a tenant."),
        Family("in_flight_requests", "gauge", (), "Predict requests that are read, run or answered now."),
        Family("instance_busy_seconds_total", "counter", (*_VERSION, "device"),
               "Time that instances ran batches."),
        Family("web_busy_seconds_total", "counter", ("process",),
               "Time in which the thread of a web process that reads and answers requests ran or waited for a"
               " core; one second per second is its limit."),
        Family("instances", "gauge", (*_VERSION, "device", "state"), "Instances, by state."),
        Family("missing_engines", "gauge", (*_VERSION, "engine"),
               "1 for each engine of a ready version that cannot run it: the engine is being restarted, does"
               " not answer, or could not load the version."),
        Family("ready", "gauge", (),
               "1 if every required model can answer, as `/health/ready` says, else 0.", combine="max"),
        Family("model_state", "gauge", (*_VERSION, "state"),
               "1 for the current state of a version; the state ready is 0 when it is another."),
        Family("model_load_seconds", "gauge", _VERSION,
               "Time to load, check, measure and warm up a version."),
        Family("loads_total", "counter", (*_VERSION, "outcome"),
               "Loads of a version by how they ended: ready, failed or cancelled."),
        Family("dropped_entries_total", "counter", (*_VERSION, "reason"),
               "Requests that were queued and then given up before the model had answered."),
        Family("audits_total", "counter", _VERSION,
               "Requests that ran again alone, to compare their answers with those in a batch."),
        Family("batching_stopped_total", "counter", (*_VERSION, "reason"),
               "Times that batching was turned off while serving, by what differed from a run alone."),
        Family("replayed_entries_total", "counter", _VERSION,
               "Times that a request was sent to another engine, because its own ended before it had"
               " answered."),
        Family("crashed_entries_total", "counter", _VERSION,
               "Requests that were answered with model_crashed: two engines ended while they ran."),
        Family("engine_restarts_total", "counter", ("engine",),
               "Times that an engine ended without being asked to, and another took its place."),
        Family("web_restarts_total", "counter", (),
               "Times that a web process ended without being asked to, and another took its place."),
        Family("grpc_restarts_total", "counter", (),
               "Times that the process of gRPC ended without being asked to, and another took its place."),
        Family("shared_memory_bytes", "gauge", (),
               "Memory in use that web processes and engines share, for tensors and metrics."),
        Family("cpu_nodes", "gauge", _VERSION,
               "Nodes of a GPU model that run on the CPU."),
        Family("gpu_utilization_ratio", "gauge", ("device",),
               "Share of the recent time in which the GPU was busy.", combine="max"),
        Family("gpu_memory_used_bytes", "gauge", ("device",),
               "GPU memory in use by all processes.", combine="max"),
        Family("gpu_memory_total_bytes", "gauge", ("device",), "GPU memory in total.", combine="max"),
        Family("gpu_temperature_celsius", "gauge", ("device",), "Temperature of the GPU core.",
               combine="max"),
        Family("gpu_power_watts", "gauge", ("device",), "Power that the GPU draws.", combine="max"),
        Family("gpu_energy_joules_total", "counter", ("device",),
               "Energy that the GPU has used since its driver was loaded.", combine="max"),
        Family("memory_limit_bytes", "gauge", (),
               "Memory that the server may take: the limit of its cgroup, or a setting.", combine="max"),
        Family("memory_held_bytes", "gauge", (),
               "Memory of the limit that is taken and that the kernel cannot take back.", combine="max"),
        Family("in_flight_bytes", "gauge", (), "Memory that requests have reserved now."),
        Family("in_flight_limit_bytes", "gauge", (), "Memory that requests may reserve together."),
        Family("cache_requests_total", "counter", (*_VERSION, "outcome"),
               "Requests for models whose answers are cached, by outcome: hit, miss, or shared if the run of"
               " an equal request answered them."),
        Family("cache_bytes", "gauge", (), "Memory that cached outputs take."),
        Family("cache_limit_bytes", "gauge", (), "Memory that cached outputs may take."),
        Family("cache_evictions_total", "counter", (), "Cached outputs that were given up for others."),
        Family("memory_trims_total", "counter", (), "Times that freed memory was given back to the kernel."),
        Family("memory_trim_seconds_total", "counter", (), "Time that giving freed memory back took."),
        Family("memory_trimmed_bytes_total", "counter", (), "Freed memory that was given back."),
        Family("explanations_total", "counter", (*_VERSION, "code"),
               "Requests for explanations, by HTTP status."),
        Family("explain_passes_total", "counter", _VERSION,
               "Rows that a model ran for explanations."),
        Family("canary_share", "gauge", _VERSION,
               "Share of a model's requests that the canary answers, while there is one.", combine="max"),
        Family("canaries_total", "counter", ("model", "outcome"),
               "Canaries that have ended, by how: promoted, rolled_back or ended."),
        Family("shadow_copies_total", "counter", (*_VERSION, "outcome"),
               "Copies of requests for a shadow, by outcome: compared, failed, or dropped without a run."),
        Family("shadow_seconds_total", "counter", (*_VERSION, "answer"),
               "Queue and compute time of the compared pairs: of the answers that were sent, and of copies."),
        Family("shadow_difference_largest", "gauge", (*_VERSION, "output"),
               "Largest difference of a number of an output from the answer that was sent; four outputs have"
               " a series, and all others together one without a name.", combine="max"),
        Family("shadow_difference_mean", "gauge", (*_VERSION, "output"),
               "Mean difference of the numbers of an output from the answers that were sent, likewise.",
               combine="max"),
        Family("shadow_changed_labels_ratio", "gauge", _VERSION,
               "Share of rows whose best label is another one than in the answer that was sent.",
               combine="max"),
        Family("drift_distance_largest", "gauge", (*_VERSION, "measure"),
               "Largest distance of a field of the last window from the version's profile: psi, ks or js.",
               combine="max"),
        Family("drift_distance", "gauge", ("model", "version", "field", "measure"),
               "Distance of a field that `[drift] series` names, likewise.", combine="max"),
        Family("samples_total", "counter", ("outcome",),
               "Requests that were chosen as samples, by outcome: written, dropped because there was no room,"
               " left_out because they are too large, deleted while they waited to be written, or failed if"
               " the store has failed."),
        Family("samples_held", "gauge", (), "Samples in the store.", combine="max"),
        Family("samples_bytes", "gauge", (), "Bytes of the samples in the store.", combine="max"),
        Family("samples_stopped", "gauge", (),
               "1 while no samples are kept because the store has failed, else 0.", combine="max"),
        Family("build_info", "info", (),
               "Versions of Inferpool and its runtimes, and whether the hot path is compiled."),
    )
}  # fmt: skip
"""All exported metrics, by name without the prefix."""

REQUEST_STATS: Final = "request_stats"
"""Of a version: seconds of successes, rows, seconds of decoding and encoding, moment of the last success."""

BATCH_RUNS: Final = "batch_runs"
"""Of a version and a number of rows: batches of this size that ran, and their seconds."""

CPU_SECONDS: Final = "cpu_seconds"
"""CPU time of the processes that ran in one place of the server."""

TRIAL: Final = "trial"
"""Of a version that answers a share of requests: the number of the trial, failures, and then successes by
their queue and compute time, one number for each of `TRIAL_BOUNDS` and one for those above all."""

TRIAL_BOUNDS: Final = tuple(0.0001 * 1.25**step for step in range(60))
"""Upper bounds in seconds: steps of a quarter, from 0.1 ms to 52 s."""

SHADOW: Final = "shadow"
"""Of a shadow: the number of the trial, copies that were compared, failed, were dropped and had other shapes;
rows with labels, rows whose best label has changed; seconds of the answers sent and of the copies, and pairs
whose copy took longer."""

SHADOW_OUTPUT: Final = "shadow_output"
"""Of an output of a shadow: the number of the trial, largest difference, sum of differences, numbers that
were compared, and numbers of which one only is finite."""

DRIFT: Final = "drift"
"""Of a field of a version: the last two windows, each with its number, a tag of the profile, and counts."""

HIDDEN: Final = {
    REQUEST_STATS: 5,
    BATCH_RUNS: 2,
    CPU_SECONDS: 1,
    TRIAL: 3 + len(TRIAL_BOUNDS),
    SHADOW: 10,
    SHADOW_OUTPUT: 5,
    DRIFT: 46,
}
"""Numbers per series of the metrics that only processes of the server read, by name."""
