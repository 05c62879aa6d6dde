"""What may be a model's canary or shadow: the checks before its requests are shared out."""

from __future__ import annotations

import re
import time
from typing import Final

from inferpool.errors import Conflict, InvalidInput
from inferpool.repository.catalog import READY, ModelView, VersionView
from inferpool.repository.traffic import BY_HEADER, BY_KEY, BY_REQUEST, BY_TENANT, Canary, Shadow, Traffic

MOST_REQUESTS: Final = 1_000_000_000
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_SECRET_HEADERS: Final = ("authorization", "cookie", "proxy-authorization", "x-api-key")


def plan_traffic(
    model: ModelView,
    *,
    canary: int | None,
    share: float,
    by: str,
    least_requests: int,
    shadow: int | None,
    shadow_share: float,
) -> Traffic:
    """The traffic of a model as somebody wants it; the arguments are the fields of `Canary` and `Shadow`.

    Raises VersionNotFound, InvalidInput for a share or `by` that cannot be, or Conflict if a version is not
    ready, answers already, or takes other inputs.
    """
    stable = model.default
    if stable is None:
        raise Conflict(f'"{model.name}" has no version that is ready; load one first')
    # In microseconds: later ones are larger in all processes, and exact as a float.
    number = time.time_ns() // 1000
    return Traffic(
        number,
        None if canary is None else _canary(model, stable, canary, share, by, least_requests),
        None if shadow is None else _shadow(model, stable, shadow, shadow_share),
    )


def _canary(
    model: ModelView, stable: VersionView, version: int, share: float, by: str, least_requests: int
) -> Canary:
    view = _other_version(model, stable, version, "canary")
    if not 0 <= share <= 1:
        raise InvalidInput(f"the share is {share:g}; expected a number from 0 to 1", field="share")
    if least_requests and not 0 < share < 1:
        raise InvalidInput(
            f"a canary with the share {share:g} cannot be compared with the stable version; a canary that the"
            " server ends needs a share above 0 and below 1",
            field="share",
        )
    if not 0 <= least_requests <= MOST_REQUESTS:
        raise InvalidInput(
            f"{least_requests} requests; expected a number from 0 to {MOST_REQUESTS}", field="requests"
        )
    _check_inputs(view, stable)
    return Canary(version, stable.key.version, share, _checked_by(by), least_requests)


def _shadow(model: ModelView, stable: VersionView, version: int, share: float) -> Shadow:
    view = _other_version(model, stable, version, "shadow")
    if not 0 < share <= 1:
        raise InvalidInput(
            f"the share is {share:g}; expected a number above 0, at most 1", field="shadow.share"
        )
    _check_inputs(view, stable)
    one, other = view.text, stable.text
    if one is not None and other is not None:
        same = (one.ids, one.mask, one.fills, one.vocabulary_size, one.max_tokens) == (
            other.ids, other.mask, other.fills, other.vocabulary_size, other.max_tokens,
        )  # fmt: skip
        if not same:
            # Copies have the tokens that the stable version has had.
            raise Conflict(
                f"version {version} has another tokenizer than version {stable.key.version}; only versions"
                " with one tokenizer can be compared"
            )
    return Shadow(version, share)


def _other_version(model: ModelView, stable: VersionView, version: int, role: str) -> VersionView:
    view = model.version(str(version))
    if view is stable:
        raise Conflict(
            f'version {version} of "{model.name}" answers already, and cannot be the {role}; let the label'
            f" stable name the version that is to answer: inferpool labels {model.name} stable=VERSION"
        )
    if view.state != READY:
        raise Conflict(f'version {version} of "{model.name}" is {view.state}; load it first')
    return view


def _check_inputs(view: VersionView, stable: VersionView) -> None:
    """Raise Conflict if two versions do not take the same requests."""
    if _inputs(view) != _inputs(stable) or (view.text is None) != (stable.text is None):
        raise Conflict(
            f"version {view.key.version} takes other inputs than version {stable.key.version}; clients have"
            " to name the version that they mean"
        )


def _inputs(view: VersionView) -> object:
    assert view.signature is not None  # known before a version is ready
    return {spec.name: (spec.datatype, spec.shape, spec.optional) for spec in view.signature.inputs}


def _checked_by(by: str) -> str:
    if by in (BY_REQUEST, BY_KEY, BY_TENANT):
        return by
    name = by.removeprefix(BY_HEADER)
    if name == by or not _HEADER.fullmatch(name):
        raise InvalidInput(
            f'requests cannot be chosen by "{by[:100]}"; expected "{BY_REQUEST}", "{BY_KEY}", "{BY_TENANT}"'
            f' or "{BY_HEADER}NAME"',
            field="by",
        )
    if name.lower() in _SECRET_HEADERS:
        raise InvalidInput(
            f'the header {name} holds a secret; choose by "{BY_KEY}" or "{BY_TENANT}"', field="by"
        )
    return BY_HEADER + name.lower()
