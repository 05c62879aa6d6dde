"""Files that can run code when they are loaded: only those that somebody has said to trust."""

from __future__ import annotations

import hashlib
from pathlib import Path

from inferpool.backends.base import LoadOptions
from inferpool.errors import LoadError


def check_trust(file: Path, options: LoadOptions) -> None:
    """Raise LoadError, which says what to write, unless `options` trust `file`; nothing of it is run."""
    if options.trusted:
        return
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest in options.sha256:
        return
    listed = "; the digests in model.toml are of other files" if options.sha256 else ""
    raise LoadError(
        f"{file.name} could run code of its own when it is loaded, and nothing says to trust it{listed}."
        f' If you know who made it, write sha256 = ["{digest}"] at the top of model.toml; or serve with'
        " --trust (INFERPOOL_TRUST=true), which trusts every such file"
    )
