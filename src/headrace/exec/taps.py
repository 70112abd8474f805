"""Taps: where methods see and change what passes between the parts of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from headrace.contracts.method import Method
from headrace.ops.table import Ops

Chosen = TypeVar("Chosen", bound=Method)

Site = Literal["query", "key", "value", "attention", "hidden", "final"]
"""Queries and keys before rotation, and values, ``[T, heads, width]``; what attention makes of
them for each query head, ``[T, heads, width]``; the residual stream that enters a layer,
and that leaves the last one, ``[T, hidden]``."""
SITES: tuple[Site, ...] = ("query", "key", "value", "attention", "hidden", "final")

SiteShapes = Mapping[tuple[Site, int], tuple[int, ...]]
"""(site, layer) -> shape of one input's entry, for all that a model has."""


@dataclass(frozen=True, slots=True)
class TappedRows(Generic[Chosen]):
    """The requests of a micro-batch that chose a method with the same options.

    Args:
        method: as they chose it.
        inputs: int64 ``[n]``: all of their inputs.
        answering: int64 ``[m]``: of these, the ones from which tokens are drawn: the last of the
            prompt and all behind it.
    """

    method: Chosen
    inputs: Tensor
    answering: Tensor


class Tap(ABC, Generic[Chosen]):
    """What a method has made ready to be applied at a site.

    Attributes:
        site: where it is called.
    """

    site: Site

    @abstractmethod
    def __call__(self, layer: int, values: Tensor, rows: Sequence[TappedRows[Chosen]]) -> Tensor:
        """What goes on in place of ``values``, which may be changed; other rows' stay."""

    def check(self, method: Chosen) -> None:
        """Raise ValueError if a request's options do not fit what is ready."""
        return None


class TapMethod(Method):
    """A method that works through a tap."""

    __slots__ = ()

    @abstractmethod
    def open(self, shapes: SiteShapes, ops: Ops) -> Tap[Any]:
        """Make ready, once. Raises ValueError if the model's shapes do not fit."""


class ShapeTap(Tap[Method]):
    """Notes the shapes of a site."""

    def __init__(self, site: Site, shapes: dict[tuple[Site, int], tuple[int, ...]]) -> None:
        self.site = site
        self._shapes = shapes

    def __call__(self, layer: int, values: Tensor, rows: Sequence[TappedRows[Method]]) -> Tensor:
        self._shapes[self.site, layer] = tuple(values.shape[1:])
        return values
