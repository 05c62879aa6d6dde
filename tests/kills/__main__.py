"""End processes of servers at random, beside clients that check every row: `scripts/chaos` runs this.

    python -m tests.kills [--requests 100000] [--rounds 4] [--at-once 1] [--python .venv/bin/python]

Writes `benchmarks/results/chaos.json` with `--save`. The exit status is 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.kills.report import Round, as_json, as_markdown, run_round
from tests.limited import missing
from tests.server import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="End processes of a server at random.")
    parser.add_argument("--requests", type=int, default=100_000, help="requests of all rounds together")
    parser.add_argument("--rounds", type=int, default=4, help="servers, each for its part of the requests")
    parser.add_argument("--at-once", type=int, default=1, help="servers that run at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="the most that each server runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=sys.executable, help="the Python that has Inferpool installed")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    given = parser.parse_args()
    if missing():
        print(f"nothing is killed for want of memory: this machine lacks {missing()}", flush=True)
    rounds: list[Round] = []
    with ProcessPoolExecutor(given.at_once, multiprocessing.get_context("spawn")) as processes:
        started = [
            processes.submit(
                run_round,
                given.requests // given.rounds,
                seed=given.seed + number,
                python=given.python,
                seconds=60 * given.minutes,
                drain=number % 2 == 1,
            )
            for number in range(given.rounds)
        ]
        for each in as_completed(started):
            rounds.append(each.result())
            print(json.dumps(rounds[-1].summary()), flush=True)
    figures: dict[str, Any] = {"at_once": given.at_once, **as_json(rounds)}
    print(as_markdown(figures))
    if given.save:
        _write(RESULTS / "chaos.json", json.dumps(figures, indent=1))
        _write(RESULTS / "chaos.md", as_markdown(figures))
    return 1 if figures["faults"] else 0


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
