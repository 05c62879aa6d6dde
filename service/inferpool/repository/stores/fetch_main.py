"""The main of the process that fetches models, which `fetch_process` starts.

Its standard input has what to fetch, as one line of JSON, and stays open as long as anybody waits; its
standard output has the result, and before that, for one version, lines that say how far the fetch is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Final

from inferpool.errors import InferpoolError, StoreUnreachable
from inferpool.observe.logs import configure_logs
from inferpool.repository.stores.fetch import fetch
from inferpool.repository.stores.reference import StoreReference, parse_repository
from inferpool.repository.stores.version_fetch import WantedVersion, fetch_version

_OOM_SCORE: Final = 1000
_NICE: Final = 10


def main() -> int:
    """Fetch what the standard input names; the exit status is 0 if that has succeeded."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(_NICE)
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    configure_logs(asked["log_level"], asked["log_format"], process="fetch")
    # These libraries log addresses, and addresses may be signed.
    for library in ("httpx", "httpcore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    result: dict[str, Any]
    reference: object = "the source"
    try:
        if "version" in asked:
            done = fetch_version(WantedVersion.from_json(asked["version"]), _report)
            result = done._asdict()
        else:
            reference = parse_repository(asked["reference"])
            assert isinstance(reference, StoreReference)
            fetched = fetch(reference, Path(asked["cache"]), not_since=asked["not_since"])
            result = {"path": str(fetched.path), "changed": fetched.changed}
    except InferpoolError as error:
        result = {"error": error.detail, "unreachable": isinstance(error, StoreUnreachable)}
    except OSError as error:
        result = {"error": f"{reference}: {error.strerror or type(error).__name__}", "unreachable": False}
    except Exception as error:  # noqa: BLE001 - the parent is told
        # Without the error's text, which may have an address with its signature.
        frames = "".join(traceback.format_tb(error.__traceback__))
        logging.getLogger(__name__).error("a fetch has failed: %s\n%s", type(error).__name__, frames)
        result = {"error": f"fetching failed with {type(error).__name__}", "unreachable": False}
    logging.shutdown()
    print(json.dumps(result), flush=True)  # noqa: T201
    # Threads of libraries need not end first.
    os._exit("error" in result)


def _report(fetched: int, expected: int) -> None:
    """Tell the parent how far the fetch is."""
    print(json.dumps({"fetched": fetched, "expected": expected}), flush=True)  # noqa: T201


def _end_with_parent() -> None:
    """End when nobody waits any more, at once: the parent has ended, or has closed its end."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
