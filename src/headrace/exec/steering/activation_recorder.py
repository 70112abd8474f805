"""Keeps activations, for probes and for finding directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from headrace.contracts.method import MethodCard, Property
from headrace.exec.taps import SITES, Site, SiteShapes, Tap, TapMethod, TappedRows
from headrace.ops.table import Ops


@dataclass(frozen=True, slots=True)
class ActivationRecorder(TapMethod):
    """Keep what passes a site at every input that a token is drawn from.

    Args:
        at: the site: query, key, value, attention, hidden (what enters a layer) or final (what
            leaves the last).
    """

    card: ClassVar[MethodCard] = MethodCard(
        title="",
        summary="Keeps activations where tokens are drawn from, for probes and directions.",
        guarantee="exact",
        requires=frozenset({Property.FULL_DEPTH, Property.FED_TOKENS_STAY}),
    )

    at: str = "attention"

    def __post_init__(self) -> None:
        if self.at not in SITES:
            raise ValueError(f"at must be one of {', '.join(SITES)}, got {self.at!r}")

    def open(self, shapes: SiteShapes, ops: Ops) -> Recorder:
        return Recorder(cast(Site, self.at))


class Recorder(Tap[ActivationRecorder]):
    """What has been kept so far."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._kept: dict[int, list[Tensor]] = {}

    def __call__(
        self, layer: int, values: Tensor, rows: Sequence[TappedRows[ActivationRecorder]]
    ) -> Tensor:
        for row in rows:
            self._kept.setdefault(layer, []).extend(values[row.answering].float().cpu())
        return values

    def take(self) -> dict[int, list[Tensor]]:
        """Layer -> entries in the order in which they passed; they are kept no longer."""
        kept, self._kept = self._kept, {}
        return kept
