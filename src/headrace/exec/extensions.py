"""What adapters and methods add to a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.contracts.placement import Placement, Tier
from headrace.exec.depth import DepthRouter
from headrace.exec.neurons import NeuronRouter
from headrace.exec.slot_statistics import SlotStatistics
from headrace.exec.taps import Tap
from headrace.ops.adapted_linear import AdapterRoutes


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement, and what brings what is on disk."""

    placement: Placement = field(default_factory=Placement)
    tiers: tuple[Tier, ...] = ()


@dataclass(slots=True)
class Extensions:
    """All of them may be missing; a pass without any is the plain one.

    Args:
        routes: which rows go through which adapter.
        taps: name of a method -> what it has made ready.
        statistics: what policies of slots note of attention.
        neurons: sends inputs through some of the inner neurons.
        depth: lets rows leave before the last layer.
        placed: what is on disk; its tiers are closed with the runner.
    """

    routes: AdapterRoutes = field(default_factory=AdapterRoutes)
    taps: Mapping[str, Tap[Any]] = field(default_factory=dict)
    statistics: SlotStatistics | None = None
    neurons: NeuronRouter | None = None
    depth: DepthRouter | None = None
    placed: Placed = field(default_factory=Placed)
