"""Fuzz the modules in C for some time; `scripts/fuzz` builds them with sanitizers and starts this."""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from pathlib import Path
from types import ModuleType

from tests.fuzz import json_cases, response_cases, socket_cases
from tests.fuzz.leaks import check_leaks

NAMES = ("inferpool.wire._json_numbers", "inferpool.http.connection._socketio")


def load(name: str, folder: Path) -> ModuleType:
    """Load the module `name` from `folder` in place of the installed one."""
    (file,) = folder.glob(f"{name.split('.')[-1]}.*")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--modules", type=Path, required=True, help="the folder of the built modules")
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on")
    parser.add_argument("--seed", type=int, help="begin with this case, as a failure names it")
    options = parser.parse_args()
    numbers, sockets = (load(name, options.modules) for name in NAMES)

    # Imported now, so that it prepares the module that was just loaded.
    from inferpool.wire import json_numbers

    assert sys.modules[NAMES[0]] is numbers
    assert json_numbers.AVAILABLE
    end = time.monotonic() + options.seconds
    first = random.SystemRandom().randrange(2**48) if options.seed is None else options.seed
    check_leaks(numbers, sockets, repeats=20)
    seed, taken = first, 0
    while seed == first or time.monotonic() < end:
        chance = random.Random(seed)
        try:
            for _ in range(100):
                taken += json_cases.check_json(numbers, chance)
                json_cases.check_count(numbers, chance)
                json_cases.check_odd_arguments(numbers, chance)
                socket_cases.check_odd_arguments(sockets, chance)
                response_cases.check_join(sockets, chance)
            socket_cases.check_receive(sockets, chance)
            socket_cases.check_send(sockets, chance)
        except BaseException:
            print(f"scripts/fuzz --seed {seed} shows this again:", file=sys.stderr)
            raise
        seed += 1
    cases = 100 * (seed - first)
    assert taken > cases / 10, f"only {taken} of {cases} bodies were read: the check is worth little"
    print(f"{cases} JSON bodies, {taken} of them read by the module, and {seed - first} rounds of socket I/O")
    return 0


if __name__ == "__main__":
    sys.exit(main())
