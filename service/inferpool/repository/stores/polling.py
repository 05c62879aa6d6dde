"""Asks a store again while the server serves.

What is imported late is only for stores: a server of a folder starts without it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from inferpool.errors import StoreError
from inferpool.settings import Settings

if TYPE_CHECKING:
    from inferpool.repository.stores.reference import StoreReference

log = logging.getLogger(__name__)

_EARLY: Final = 0.9
"""The share of the pause after which a store counts as not asked yet, because clocks differ a little."""


class StorePoll:
    """Fetches what has changed. All engines of a server may poll: the first one asks, the others see that.

    Attributes:
        pause_s: seconds between two questions.
    """

    def __init__(self, reference: StoreReference, settings: Settings) -> None:
        self._reference = reference
        self._settings = settings
        self._told = ""
        self.pause_s = settings.store_poll_s

    def ask(self, *, at_once: bool) -> None:
        """Ask the store, and change the folder if it has; not again too soon, unless `at_once`."""
        from inferpool.repository.stores.fetch_process import fetch_models

        since = None if at_once else time.time() - _EARLY * self.pause_s
        try:
            fetch_models(self._reference, self._settings, not_since=since)
            self._told = ""
        except StoreError as error:
            if error.detail != self._told:
                log.error("%s; what is loaded goes on", error.detail)
            self._told = error.detail


def locate(repository: str, settings: Settings) -> tuple[Path, StorePoll | None]:
    """The folder of a repository, and how to ask its store again; None for a folder of this machine.

    The folder of a store is the one that `fetch_models` fills. Raises ConfigError or StoreError.
    """
    if "://" not in repository:
        return Path(repository), None
    from inferpool.repository.stores.fetch_process import store_cache
    from inferpool.repository.stores.reference import parse_repository
    from inferpool.repository.stores.working_folder import WorkingFolder

    parsed = parse_repository(repository)
    if isinstance(parsed, Path):
        return parsed, None
    folder = WorkingFolder(store_cache(settings) / "stores", parsed.key, parsed.model_name)
    return folder.path.absolute(), StorePoll(parsed, settings)
