"""Results in a JSON file that grows with every measurement, and medians over its rounds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.measure import Record


class Spread(NamedTuple):
    """A median over the rounds, and the least and the most."""

    median: float
    least: float
    most: float
    rounds: int

    @property
    def percent(self) -> float:
        """Half the range, in percent of the median."""
        return 50 * (self.most - self.least) / self.median if self.median else 0.0


class Results:
    """The measurements, and the machine; every record names its workload, peer, version and round."""

    def __init__(self, file: Path) -> None:
        self._file = file
        kept = json.loads(file.read_text()) if file.exists() else {}
        self.machine: dict[str, Any] = kept.get("machine", {})
        self.peers: dict[str, dict[str, Any]] = kept.get("peers", {})
        self._records: list[Record] = kept.get("records", [])

    def save(self) -> None:
        """Write the file completely, or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        records = ",\n".join(json.dumps(record) for record in self._records)
        head = json.dumps({"machine": self.machine, "peers": self.peers}, indent=1)[:-2]
        draft = self._file.with_suffix(".draft")
        draft.write_text(f'{head},\n "records": [\n{records}\n ]\n}}\n')
        draft.replace(self._file)

    def set_peer(self, name: str, **known: Any) -> None:
        """Set the facts about a peer; records of another version are dropped."""
        self.peers[name] = known
        version = known.get("version")
        self._records = [
            record for record in self._records if record["peer"] != name or record["version"] == version
        ]

    def add(self, workload: str, peer: str, records: list[Record]) -> None:
        """Add a round, and write the file."""
        number = self.rounds(workload, peer) + 1
        version = self.peers[peer].get("version")
        key = {"workload": workload, "peer": peer, "version": version, "round": number}
        self._records += [{**key, **record} for record in records]
        self.save()

    def drop(self, workload: str, peer: str) -> None:
        """Forget what was measured of this pair."""
        self._records = [
            record for record in self._records if (record["workload"], record["peer"]) != (workload, peer)
        ]

    def rounds(self, workload: str, peer: str) -> int:
        """How many rounds there are of this pair."""
        return max((record["round"] for record in self._of(workload, peer)), default=0)

    def levels(self, workload: str, peer: str) -> list[int]:
        """The levels of concurrency that were measured."""
        return sorted({record["level"] for record in self._of(workload, peer) if "level" in record})

    def problems(self, workload: str, peer: str) -> list[str]:
        """The failures, each once."""
        found = (record["problem"] for record in self._of(workload, peer) if "problem" in record)
        return list(dict.fromkeys(found))

    def spread(self, workload: str, peer: str, level: int, figure: str) -> Spread | None:
        """The median of a figure over the rounds; None where there is none."""
        values = [
            record[figure]
            for record in self._of(workload, peer)
            if record.get("level") == level and record.get(figure) is not None
        ]
        if not values:
            return None
        return Spread(statistics.median(values), min(values), max(values), len(values))

    def moments(self) -> tuple[str, str] | None:
        """When the first and the last record was made."""
        at = sorted(record["at"] for record in self._records)
        return (at[0], at[-1]) if at else None

    def _of(self, workload: str, peer: str) -> list[Record]:
        return [
            record for record in self._records if (record["workload"], record["peer"]) == (workload, peer)
        ]
