"""The file of tenants: which share and which rates each one has. It is read again when it changes.

[default]                  # of tenants without a table
requests_per_s = 20

[tenants.acme]
share = 3                  # three times as much of the instances as a tenant with share 1
requests_per_s = 100
rows_per_s = 2000
highest_priority = 2       # before requests of other tenants; 1 is the highest
"""

from __future__ import annotations

import logging
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from inferpool.errors import ConfigError
from inferpool.http.access.file_watch import FileWatch
from inferpool.http.access.tenants import TenantLimits, Tenants, TenantTable
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import LOWEST_PRIORITY
from inferpool.pool.token_buckets import MEMORY_BYTES, BucketMemory

log = logging.getLogger(__name__)

_LEAST_PER_S: Final = 1 / 86_400
_MOST_SHARE: Final = 1_000_000.0
_FIELDS: Final = TenantLimits._fields


def read_tenants(path: Path) -> TenantTable:
    """Return the limits in the file `path`; raises ConfigError, which names the file and the field."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        if unknown := [name for name in content if name not in ("default", "tenants")]:
            raise ValueError(f'unknown table "{unknown[0]}"; the tables are [default] and [tenants.NAME]')
        default = _limits("default", content.get("default", {}), TenantLimits())
        tenants = content.get("tenants", {})
        if not isinstance(tenants, Mapping):
            raise ValueError("write a table [tenants.NAME] for each tenant")
        limits = {name: _limits(f"tenants.{name}", table, default) for name, table in tenants.items()}
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return TenantTable(limits, default)


def _limits(name: str, table: Any, default: TenantLimits) -> TenantLimits:
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} must be a table")
    if unknown := [field for field in table if field not in _FIELDS]:
        raise ValueError(f'{name} has an unknown field "{unknown[0]}"; the fields are {", ".join(_FIELDS)}')
    bounds = {
        "share": (1 / _MOST_SHARE, _MOST_SHARE),
        "requests_per_s": (_LEAST_PER_S, math.inf),
        "rows_per_s": (_LEAST_PER_S, math.inf),
        "highest_priority": (1, LOWEST_PRIORITY),
    }
    for field, value in table.items():
        low, high = bounds[field]
        whole = field == "highest_priority"
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name}: {field} is {value!r}; expected {kind} from {low:g} to {high:g}")
    return default._replace(**table)


class TenantsFileWatch(FileWatch):
    """Gives tenants the limits of their file whenever it changes."""

    def __init__(self, path: Path, tenants: Tenants) -> None:
        super().__init__(path, "tenants")
        self._tenants = tenants

    def changed(self, *, is_empty: bool) -> None:
        """Read the limits again; an empty file has none."""
        try:
            table = read_tenants(self._path)
        except ConfigError as error:
            log.error("the tenants keep their limits, because the file cannot be read: %s", error.detail)
            return
        self._loop.call_soon_threadsafe(self._tenants.use, table)
        log.info("%s: read again, it has the limits of %d tenants", self._path, len(table.limits))


def make_tenants(
    path: Path | None, keyed: bool, metrics: Metrics, memory: memoryview[float] | None = None
) -> tuple[Tenants | None, list[TenantsFileWatch]]:
    """Return the tenants of a server, None if it has no keys, and what reads their file again.

    `path` is the file of tenants, `keyed` says whether requests need keys. `memory` is what all web processes
    share. Raises ConfigError if the file cannot be read.
    """
    if not keyed:
        if path is not None:
            raise ConfigError("tenants_file needs keys, which say whose a request is; set --keys-file, too")
        return None, []
    table = TenantTable({}, TenantLimits()) if path is None else read_tenants(path)
    cells = memory if memory is not None else memoryview(bytearray(MEMORY_BYTES)).cast("d")
    tenants = Tenants(table, BucketMemory(cells), metrics)
    return tenants, [] if path is None else [TenantsFileWatch(path, tenants)]
