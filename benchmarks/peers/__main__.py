"""Inferpool and its peers, measured beside each other: `scripts/bench peers`.

Each server is installed into an environment of its own. The servers take turns with the same model files.
Answers are checked, alone and together. wrk loads each server at several levels of concurrency, and the
CPU time and memory of its process tree are counted. The results are in benchmarks/results: `peers.json`
has every record, and `peers.md` and the charts are made from it.

`peers.json` grows: `--rounds` is the number of rounds that each server has under each workload in the
end. The same call continues a run that was stopped, by --stop-after-s or otherwise. Records of Inferpool
are dropped if its code has changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.environments import NotHere, environment, versions
from benchmarks.peers.load import LoadError, need_wrk
from benchmarks.peers.measure import in_process, measure, own_version
from benchmarks.peers.peers import PEERS, Peer
from benchmarks.peers.report import checked, write_report
from benchmarks.peers.results import Results
from benchmarks.peers.targets import IN_PROCESS, targets
from benchmarks.peers.workloads import ROOT, WORKLOADS

NAMES = [*PEERS, IN_PROCESS]


def main() -> int:
    """Measure what is missing and write the report; return 1 if --check finds a missed target."""
    given = parser().parse_args()
    # A server under test must end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    results = Results(given.out / "peers.json")
    if not (given.check or given.report):
        try:
            results.machine = machine()
        except LoadError as error:
            print(error, file=sys.stderr)
            return 1
        run(results, given)
        results.save()
    if not given.check:
        write_report(results, given.out, given.plots)
        return 0
    print("\n".join(checked(results)))
    return 0 if all(target.holds for target in targets(results)) else 1


def run(results: Results, given: argparse.Namespace) -> None:
    """Run all rounds; in each, all servers take turns under all workloads."""
    ends = time.monotonic() + given.stop_after_s
    pythons = set_up(results, given.peers)
    if given.fresh:
        for workload in given.workloads:
            for peer in given.peers:
                results.drop(workload, peer)
    for number in range(given.rounds):
        for workload, peer in pairs(given, number):
            if results.rounds(workload, peer) > number or peer not in pythons:
                continue
            if time.monotonic() > ends:
                say("stopped: time is up; the same call goes on from here")
                return
            try:
                if peer == IN_PROCESS:
                    records = in_process(WORKLOADS[workload], given.seconds, pythons[peer])
                else:
                    records = measure(PEERS[peer], pythons[peer], WORKLOADS[workload], given.seconds)
            except NotHere as error:  # the model, for all of them
                say(f"{workload} is skipped: {error}")
                continue
            results.add(workload, peer, records)
            for record in records:
                told = record.get("problem") or ", ".join(
                    f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, (int, float))
                )
                say(f"{workload} · {peer} · round {number + 1}: {told}")


def pairs(given: argparse.Namespace, number: int) -> Iterator[tuple[str, str]]:
    """Return the workloads and servers of a round; each round begins with another server."""
    first = number % len(given.peers)
    for workload in given.workloads:
        for peer in [*given.peers[first:], *given.peers[:first]]:
            if WORKLOADS[workload].kind in PEERS[peer].requests if peer in PEERS else workload == "resnet50":
                yield workload, peer


def set_up(results: Results, names: list[str]) -> dict[str, Path]:
    """Return the Python of each server that can run here; the results say why others cannot."""
    pythons = {}
    for name in names:
        if name == IN_PROCESS:
            pythons[name] = Path(sys.executable)
            results.set_peer(name, version=f"onnxruntime {importlib.metadata.version('onnxruntime')}")
            continue
        peer = PEERS[name]
        try:
            pythons[name] = python_of(peer)
            results.set_peer(name, version=version_of(peer, pythons[name]))
        except NotHere as error:
            say(f"{name} cannot be set up: {error}")
            results.peers[name] = {**results.peers.get(name, {}), "problem": str(error)}
    results.save()
    return pythons


def python_of(peer: Peer) -> Path:
    """The Python of a peer's environment; raises NotHere."""
    for command in peer.needs:
        if shutil.which(command) is None:
            raise NotHere(f"the command {command} is missing")
    return environment(peer.name, peer.requirements, peer.relaxed)


def version_of(peer: Peer, python: Path) -> str:
    """Return the version of a peer for the tables."""
    if peer.is_own:
        return own_version()
    found = versions(python, (peer.distribution,))
    return (
        f"{found[peer.distribution]}"
        if peer.requirements
        else f"{peer.distribution} {found[peer.distribution]}"
    )


def machine() -> dict[str, object]:
    """Describe the machine; raises LoadError if the load generator is missing."""
    told = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "wrk": need_wrk(),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="scripts/bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(known: list[str]) -> object:
        def listed(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(known):
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))}; there are {', '.join(known)}"
                )
            return chosen

        return listed

    made.add_argument(
        "--workloads", type=names(list(WORKLOADS)), default=list(WORKLOADS), help="some, with commas"
    )
    made.add_argument("--peers", type=names(NAMES), default=NAMES, help="some, with commas")
    made.add_argument("--rounds", type=int, default=3, help="rounds that each pair shall have (default 3)")
    made.add_argument("--seconds", type=float, default=4, help="length of each load (default 4)")
    made.add_argument(
        "--stop-after-s", type=float, default=float("inf"), help="start no server after so long"
    )
    made.add_argument("--fresh", action="store_true", help="forget earlier records of these pairs")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="where results are kept")
    made.add_argument("--no-plots", dest="plots", action="store_false", help="tables only")
    made.add_argument("--report", action="store_true", help="measure nothing, write tables and plots again")
    made.add_argument("--check", action="store_true", help="measure nothing, say which targets hold")
    return made


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
