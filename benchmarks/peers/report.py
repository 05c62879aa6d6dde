"""The tables of the results, in Markdown, and the plots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.load import SETTLE_S
from benchmarks.peers.measure import LIMIT_S
from benchmarks.peers.peers import PEERS
from benchmarks.peers.results import Results, Spread
from benchmarks.peers.targets import IN_PROCESS, targets
from benchmarks.peers.workloads import WORKLOADS, Workload

ENOUGH = 3
"""Answers for each connection that a load needs before its latencies are shown."""


def write_report(results: Results, folder: Path, plots: bool) -> None:
    """Write `peers.md` into the folder, and a plot for each workload where wanted."""
    parts = ["# Inferpool beside its peers", "", *described(results), ""]
    for workload in WORKLOADS.values():
        if any(results.levels(workload.name, peer) for peer in PEERS):
            parts += [f"## {workload.title}", "", *table(results, workload), ""]
            if plots and not workload.queue:
                from benchmarks.peers.plots import plot  # matplotlib, which tables do without

                name = f"peers-{workload.name}.svg"
                plot(results, workload, folder / name)
                parts += [f"![Throughput against p99]({name})", ""]
    parts += ["## Numbers to reach", "", *checked(results), ""]
    (folder / "peers.md").write_text("\n".join(parts))


def described(results: Results) -> Iterator[str]:
    """Return the lines on the machine, the time and the settings."""
    machine = results.machine
    first, last = results.moments() or ("", "")
    yield (
        f"{machine.get('cores')} cores of {machine.get('processor')}, {machine.get('memory_gib')} GiB; Linux "
        f"{machine.get('kernel')}, Python {machine.get('python')}, "
        f"ONNX Runtime {machine.get('onnxruntime')}; "
        f"load by {machine.get('wrk')} with one thread on the same cores. Measured from {first} to {last}."
    )
    yield ""
    yield (
        "Every server has the same model files and ONNX Runtime with one thread for an operator; batches "
        "of at most 64 rows, 8 images or texts, 4 images for ResNet-50; two sessions for ResNet-50 and "
        "MiniLM, else one. Inferpool finds its own. Figures are medians over rounds in which the servers "
        "take turns; ± is half the range. CPU is user and system time of the server's whole process tree "
        "for each request, memory its PSS after the loads."
    )
    yield ""
    yield "| server | version | settings |"
    yield "|---|---|---|"
    for name, peer in PEERS.items():
        known = results.peers.get(name)
        if known is not None:
            told = f"not set up: {known['problem']}" if "problem" in known else peer.settings
            yield f"| {peer.title} | {known.get('version', '')} | {told} |"


def table(results: Results, workload: Workload) -> Iterator[str]:
    """Return a line for each server, best throughput first, and last the reasons of those without figures."""
    if workload.queue:
        yield (
            f"Twice the capacity that a closed loop of {workload.levels[0]} connections found is offered. "
            f"Goodput is answers within {LIMIT_S:g} s of when their request was due, counted from "
            f"{SETTLE_S:g} s after the start."
        )
        yield ""
        yield (
            "| server | rounds | capacity/s | goodput | good, p50 ms | refused | refusals, p50 ms | lost "
            "| sent late, p99 ms |"
        )
        yield "|---|---|---|---|---|---|---|---|---|"
    else:
        levels = " | ".join(f"{level}: req/s · p50 · p99 ms" for level in workload.levels)
        most = busiest(workload)
        yield f"| server | rounds | {levels} | CPU µs/request, {most} | memory MiB |"
        yield f"|---|---|{'---|' * len(workload.levels)}---|---|"
    lines, without = [], []
    for name, peer in PEERS.items():
        if not results.levels(workload.name, name):
            if reason := absence(results, workload, name):
                without.append(f"| {peer.title} | | {reason} |")
            continue
        line = overload_line if workload.queue else closed_line
        lines.append((throughput(results, workload, name), line(results, workload, name)))
    yield from (line for _, line in sorted(lines, key=lambda entry: -entry[0]))
    if ceiling := results.spread(workload.name, IN_PROCESS, 0, "requests_per_s"):
        yield f"| the best loop without a server | {ceiling.rounds} | {shown(ceiling)} rows/s |"
    yield from without


def absence(results: Results, workload: Workload, name: str) -> str | None:
    """Return why a server has no figures; None if it was not measured yet."""
    if reason := PEERS[name].cannot.get(workload.kind):
        return f"cannot: {reason}"
    if problems := results.problems(workload.name, name):
        return f"failed: {'; '.join(problems)}".replace("|", "/")
    problem = results.peers.get(name, {}).get("problem")
    return f"not set up: {problem}" if problem else None


def closed_line(results: Results, workload: Workload, name: str) -> str:
    """A server's line of a closed loop's table."""

    def figure(level: int, of: str) -> Spread | None:
        return results.spread(workload.name, name, level, of)

    cells = []
    for level in workload.levels:
        rate = figure(level, "requests_per_s")
        if rate is None:
            cells.append("–")
            continue
        answered = figure(level, "requests")
        p50, p99 = figure(level, "p50_ms"), figure(level, "p99_ms")
        late = (
            "– · –"
            if answered is None or answered.median < ENOUGH * level
            else f"{shown(p50)} · {shown(p99)}"
        )
        missing = [(spread.most, of) for of in ("refused", "lost") if (spread := figure(level, of))]
        errors = "".join(f" · **{count:,.0f} {of}**" for count, of in missing if count)
        range_text = f" ±{rate.percent:.0f} %" if rate.rounds > 1 else ""
        cells.append(f"{shown(rate)}{range_text} · {late}{errors}")
    most = busiest(workload)
    cpu, memory = figure(most, "cpu_us"), figure(most, "pss_mib")
    problems = results.problems(workload.name, name)
    note = f" (a round failed: {problems[0]})".replace("|", "/") if problems else ""
    count = results.rounds(workload.name, name)
    return f"| {PEERS[name].title}{note} | {count} | {' | '.join(cells)} | {shown(cpu)} | {shown(memory)} |"


def overload_line(results: Results, workload: Workload, name: str) -> str:
    """A server's line of an overload's table."""
    [level] = workload.levels

    def figure(of: str) -> Spread | None:
        return results.spread(workload.name, name, level, of)

    capacity, goodput = figure("capacity_per_s"), figure("goodput_per_s")
    share = f"{100 * goodput.median / capacity.median:.0f} %" if goodput and capacity else "–"
    cells = [
        shown(capacity),
        share,
        *map(shown, map(figure, ("good_p50_ms", "refused", "refusal_p50_ms", "lost", "sent_late_p99_ms"))),
    ]
    return f"| {PEERS[name].title} | {results.rounds(workload.name, name)} | {' | '.join(cells)} |"


def throughput(results: Results, workload: Workload, name: str) -> float:
    """Return the sort key of a line."""
    of = "goodput_per_s" if workload.queue else "requests_per_s"
    spread = results.spread(workload.name, name, busiest(workload), of)
    return spread.median if spread else 0.0


def busiest(workload: Workload) -> int:
    """Return the level whose CPU and memory are shown: 64 connections if measured, 16 for large bodies."""
    wanted = 16 if workload.kind in ("binary", "jpeg") or workload.model == "image" else 64
    return wanted if wanted in workload.levels else workload.levels[-1]


def checked(results: Results) -> Iterator[str]:
    """The targets and whether they hold."""
    yield "| wanted | measured | |"
    yield "|---|---|---|"
    for target in targets(results):
        if target.measured is None:
            yield f"| {target.wanted} | not measured | |"
        else:
            yield f"| {target.wanted} | {target.measured:.3g} | {'holds' if target.holds else '**missed**'} |"


def shown(spread: Spread | None) -> str:
    """A median with about three digits."""
    if spread is None:
        return "–"
    value = spread.median
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
