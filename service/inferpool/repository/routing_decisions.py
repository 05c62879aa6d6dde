"""Which version answers the requests for a model: moves labels, shares traffic out, and rolls back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from inferpool.errors import Conflict, ModelNotFound, Reason
from inferpool.observe.metrics import Metrics
from inferpool.repository.catalog import READY
from inferpool.repository.config import check_label
from inferpool.repository.declared_model import served_versions
from inferpool.repository.folder_contents import FolderContents
from inferpool.repository.label_moves import LabelMove, keep_moves
from inferpool.repository.published_views import PublishedViews
from inferpool.repository.traffic import (
    ENDED,
    PROMOTED,
    ROLLED_BACK,
    CanaryState,
    Traffic,
    traffic_from_json,
)
from inferpool.repository.wanted_versions import WantedVersions

STABLE: Final = "stable"


class RoutingDecisions:
    """The decisions of administrators and of canaries. All methods may be called in any thread."""

    def __init__(
        self,
        contents: FolderContents,
        views: PublishedViews,
        wanted: WantedVersions,
        traffic: dict[str, Traffic | None],
        metrics: Metrics,
    ) -> None:
        """Go on with `traffic`, by models, which is changed in place."""
        self._contents = contents
        self._views = views
        self._wanted = wanted
        self._traffic = traffic
        self._metrics = metrics

    def moves(self) -> dict[str, dict[str, tuple[int | None, int | None]]]:
        """The labels that were moved, by models: the version of each, and that of `model.toml`."""
        return {name: {label: (move.version, move.instead_of) for label, move in moves.items()}
                for name, moves in list(self._contents.moves.items())}  # fmt: skip

    def traffic(self) -> dict[str, dict[str, Any] | None]:
        """How requests are shared out, as JSON by models; None if the default answers all again."""
        return {
            name: None if traffic is None else traffic.to_json()
            for name, traffic in list(self._traffic.items())
        }

    def take(
        self,
        moves: Mapping[str, Mapping[str, tuple[int | None, int | None]]],
        traffic: Mapping[str, Mapping[str, Any] | None],
    ) -> None:
        """Take the labels and the traffic that another engine has decided about.

        They are as `moves` and `traffic` return them.
        """
        with self._wanted.lock:
            for model in {*moves, *traffic}:
                declared = self._contents.declared.get(model)
                labels = moves_from_json(moves.get(model, {}))
                if model in traffic:
                    self._traffic[model] = traffic_from_json(traffic[model])
                if labels:
                    self._contents.moves[model] = labels
                if declared is None:
                    continue
                if labels != declared.moves:
                    declared.moves |= labels
                    declared.served = served_versions(declared.config, declared.found, declared.labels())
                self._views.publish_model(model)
                self._wanted.tell(model, look=False)

    def move_label(self, model: str, label: str, version: int | None, *, checked: bool = False) -> bool:
        """Let a label name `version`, in one step; None removes it. Returns whether a restart keeps that.

        Raises ModelNotFound, InvalidInput for a word that cannot be a label, or Conflict if the version is
        here and not ready. If that is `checked`, another engine may be the one that is ready.
        """
        check_label(label)
        with self._wanted.lock:
            view, declared = self._views.models.get(model), self._contents.declared.get(model)
            if view is None or declared is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            target = view.versions.get(version or 0)
            if target is not None and target.state != READY and not checked:
                raise Conflict(
                    f'"{label}" cannot name version {version} of "{model}", which is {target.state}; load it'
                    " first"
                )
            configured = declared.config.versions.labels.get(label)
            # A move back to what `model.toml` says is kept too: it must undo an earlier one.
            declared.moves[label] = LabelMove(version, configured)
            self._contents.moves[model] = dict(declared.moves)
            kept = keep_moves(declared.folder.folder, declared.moves)
            declared.served = served_versions(declared.config, declared.found, declared.labels())
            traffic = self._traffic.get(model)
            canary = None if traffic is None else traffic.running
            if traffic is not None and canary is not None and label == STABLE and version != canary.stable:
                state = PROMOTED if version == canary.version else ENDED
                self._set_traffic(model, traffic.ended(state, "somebody has moved the label stable"))
            self._views.publish_model(model)
            self._wanted.tell(model, look=False)
            return kept

    def set_traffic(self, model: str, traffic: Traffic | None) -> None:
        """Share the requests for a model out from now on; None lets the default version answer all of them.

        With a canary, the label `stable` names the version beside it. Raises ModelNotFound.
        """
        with self._wanted.lock:
            view = self._views.models.get(model)
            if view is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            before = self._traffic.get(model)
            if before is not None and before.running is not None:
                self._count_canary(model, ENDED)
            canary = None if traffic is None else traffic.running
            self._traffic[model] = None
            if canary is not None and view.labels.get(STABLE) != canary.stable:
                # Otherwise a restart would let the canary answer everything, if its number is the largest.
                self.move_label(model, STABLE, canary.stable)
            self._traffic[model] = traffic
            self._views.publish_model(model)

    def end_canary(self, model: str, number: int, state: CanaryState, reason: Reason) -> bool:
        """End the canary of the traffic of this number; a promoted one gets the label `stable`.

        Returns whether it has ended by this call: False if there is another one, or none that runs.
        """
        with self._wanted.lock:
            traffic = self._traffic.get(model)
            canary = None if traffic is None else traffic.running
            if traffic is None or canary is None or traffic.number != number:
                return False
            self._set_traffic(model, traffic.ended(state, reason))
            if state == PROMOTED:
                self.move_label(model, STABLE, canary.version)
            self._views.publish_model(model)
            return True

    def _set_traffic(self, model: str, ended: Traffic) -> None:
        """Keep traffic whose canary has ended."""
        assert ended.canary is not None
        self._traffic[model] = ended
        self._count_canary(model, ended.canary.state)

    def _count_canary(self, model: str, state: CanaryState) -> None:
        self._metrics.value("canaries_total", model, state).add()

    def rollback(self, model: str) -> int:
        """Let the version answer that answered before the present one, by the label `stable`; its number.

        While a canary runs, that ends the canary: the stable version answers all requests again.

        Raises ModelNotFound, or Conflict if no other version is ready.
        """
        with self._wanted.lock:
            view = self._views.models.get(model)
            if view is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            traffic = self._traffic.get(model)
            if traffic is not None and (canary := traffic.running) is not None:
                self.end_canary(model, traffic.number, ROLLED_BACK, "somebody has rolled it back")
                return canary.stable
            now = view.default.key.version if view.default is not None else 0
            ready = {number for number, version in view.versions.items() if version.state == READY}
            earlier = self._views.earlier_defaults(model)
            target = next((number for number in reversed(earlier) if number in ready - {now}), None)
            if target is None:
                target = max((number for number in ready if number < now), default=None)
            if target is None:
                raise Conflict(
                    f'"{model}" cannot be rolled back: no version from before the present one is ready;'
                    " load one"
                )
            self.move_label(model, STABLE, target)
            # The version that was rolled back is no version to roll back to.
            self._views.set_earlier_defaults(
                model, [number for number in earlier if number not in (target, now)]
            )
            return target


def moves_from_json(labels: Mapping[str, tuple[int | None, int | None]]) -> dict[str, LabelMove]:
    """The moves of a model's labels, as `RoutingDecisions.moves` returns them."""
    return {label: LabelMove(*move) for label, move in labels.items()}
