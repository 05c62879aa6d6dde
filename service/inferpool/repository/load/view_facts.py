"""The facts that a version's view shows beside what was measured: batching, samples, drift and digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferpool import __version__
from inferpool.backends.base import Backend, LoadedModel
from inferpool.codecs.text import TextCodec
from inferpool.drift.profile_file import check_series, read_profile
from inferpool.pool.padding import Padding
from inferpool.privacy.config import kept_fields
from inferpool.repository.bare_files import advise_folder
from inferpool.repository.catalog import BatchingView
from inferpool.repository.config import ModelConfig
from inferpool.repository.load.batching_remedies import find_remedy
from inferpool.repository.load.load_files import LoadFiles
from inferpool.repository.load.plan import Plan
from inferpool.tensors import Signature

if TYPE_CHECKING:
    from inferpool.codecs.image import ImageCodec


def batching_view(
    plan: Plan,
    padding: Padding | None,
    config: ModelConfig,
    backend: Backend,
    model: LoadedModel,
    file: Path,
    folder: Path | None,
) -> BatchingView:
    """Whether a version batches, why or why not, and what to change.

    `file` is the file of `model`, and `folder` the folder whose `model.toml` is read; None for a bare file.
    """
    reason = "; ".join(filter(None, (plan.reason, padding.reason if padding is not None else "")))
    remedy = None
    if plan.fault is not None:
        fault = plan.fault
        remedy = find_remedy(
            fault.obstacle, fault.tensor, is_input=fault.is_input, backend=backend.name, form=model.form
        )
        remedy = advise_folder(remedy, file, folder)
    return BatchingView(
        plan.batched, reason, plan.max_rows, config.batching.max_delay_ms, remedy, plan.evidence
    )


def sampling(
    config: ModelConfig, signature: Signature, image: ImageCodec | None, text: TextCodec | None
) -> dict[str, Any]:
    """Return the table `[samples]` if samples are to be kept; raises ConfigError if it does not fit."""
    if not config.samples.share:
        return {}
    tokens = () if text is None else tuple(spec.name for spec in signature.inputs)
    pixels = None if image is None else image.input
    kept_fields(config.samples, signature, pixels, None if text is None else text.input, tokens)
    table: dict[str, Any] = config.samples.model_dump(mode="json")
    return table


def drift(config: ModelConfig, folder: Path | None) -> dict[str, Any]:
    """Return the profile in the version's `folder` and the table `[drift]`; {} without either.

    Raises ConfigError if one is wrong.
    """
    if not config.drift.enabled or folder is None:
        return {}
    profile = read_profile(folder)
    if profile is None:
        return {}
    check_series(config.drift.series, profile)
    return {"config": config.drift.model_dump(mode="json"), "profile": profile.model_dump(mode="json")}


def cache_digest(config: ModelConfig, backend: Backend, files: LoadFiles) -> str:
    """Return a digest of the model's files, its configuration and this release, on which outputs depend."""
    facts = (
        __version__,
        backend.describe(),
        config.model_dump_json(),
        files.model_digest(),
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def shown_digest(files: LoadFiles) -> str:
    """The digest that people are shown; "" if the files of a model that is loaded cannot be read again."""
    try:
        return files.digest()
    except OSError:
        return ""
