"""Throw all attacks at the models of the project, beside good requests: `scripts/attack` runs this.

    python -m tests.attacks --seconds 300 [--only rows,deaf] [--python .venv/bin/python]

Prints what good clients see without and with the attacks. The exit status is 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.attacks.attacks import ATTACKS
from tests.attacks.report import LIVE_MS, SLOWER, run
from tests.server import ROOT


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="scripts/attack", description="Attack a server of models/.")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--only", default=",".join(ATTACKS), help="names of attacks, separated by commas")
    parser.add_argument("--python", default=sys.executable, help="the Python that has Inferpool installed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        outcome = run(ROOT / "models", Path(cache), given.seconds, given.only.split(","), given.python)
    print(outcome.text())
    faults = outcome.faults(LIVE_MS, SLOWER)
    print(json.dumps({"faults": faults}, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
