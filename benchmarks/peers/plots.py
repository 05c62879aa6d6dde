"""Charts of throughput against p99: one line for each server, one point for each level of concurrency."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt

from benchmarks.peers.peers import PEERS
from benchmarks.peers.results import Results
from benchmarks.peers.workloads import Workload

MARKERS = "osD^v<>PX*dph"


def plot(results: Results, workload: Workload, file: Path) -> None:
    """Write the plot of a workload, as SVG without a date, so that the same figures give the same file.

    At least one server has figures.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for marker, (name, peer) in zip(MARKERS, PEERS.items(), strict=True):
        points = []
        for level in results.levels(workload.name, name):
            rate = results.spread(workload.name, name, level, "requests_per_s")
            late = results.spread(workload.name, name, level, "p99_ms")
            if rate and late and rate.median and late.median:
                points.append((rate.median, late.median))
        if points:
            style = "--" if name.startswith("floor") else "-"
            width = 2.5 if name == "inferpool" else 1.2
            axes.plot(*zip(*points, strict=True), style, marker=marker, linewidth=width, label=peer.title)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="requests a second",
        ylabel="p99, ms",
        title=workload.title.replace("`", ""),
    )
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    with mpl.rc_context({"svg.hashsalt": "inferpool"}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
