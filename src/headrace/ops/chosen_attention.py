"""Several versions of attention as one: each layer goes to the first that takes its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from headrace.ops.paged import Attention, AttentionSpec, LayerCache, PagedPlane, StepShape


@dataclass(slots=True)
class ChosenPlan:
    """What the versions plan for, and the plans of those that were asked."""

    shape: StepShape
    plane: PagedPlane
    made: dict[int, Any]


class ChosenAttention(Attention[ChosenPlan]):
    """The best version for each layer.

    Args:
        versions: the fastest first; the last takes every cache, and does all but sum scores.
    """

    def __init__(self, versions: Sequence[Attention[Any]]) -> None:
        self._versions = versions
        self._choices: WeakKeyDictionary[LayerCache, int] = WeakKeyDictionary()

    def _choose(self, cache: LayerCache) -> int:
        chosen = self._choices.get(cache)
        if chosen is None:
            pairs = enumerate(self._versions)
            chosen = next(index for index, version in pairs if version.takes(cache))
            self._choices[cache] = chosen
        return chosen

    def sums_scores(self, cache: LayerCache) -> bool:
        return self._versions[self._choose(cache)].sums_scores(cache)

    def plan(self, shape: StepShape, plane: PagedPlane) -> ChosenPlan:
        return ChosenPlan(shape, plane, {})

    def _made(self, plan: ChosenPlan, chosen: int) -> Any:
        if chosen not in plan.made:
            plan.made[chosen] = self._versions[chosen].plan(plan.shape, plan.plane)
        return plan.made[chosen]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        spec: AttentionSpec,
        plan: ChosenPlan,
        score_sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        chosen = self._choose(cache)
        made = self._made(plan, chosen)
        return self._versions[chosen].attend(q, k, v, cos, sin, cache, spec, made, score_sums)

    def attend_past(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, plan: ChosenPlan
    ) -> tuple[Tensor, Tensor]:
        last = len(self._versions) - 1
        return self._versions[last].attend_past(q, cache, spec, self._made(plan, last))
