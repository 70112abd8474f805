"""Routes: where some rows of a step do not go through all layers as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.contracts.step import PlanRow
from headrace.ops.paged import AttentionSpec
from headrace.ops.recurrent import RowSpans


class Route(ABC):
    """How the rows of a step go through the layers; the layer loop asks it before each exit.

    Attributes:
        exits: layers, ascending.
        watched: layers whose attention it wants to know.
        logits: number of a row that has left -> with what, ``[vocab]``.
    """

    exits: tuple[int, ...]
    watched: frozenset[int] = frozenset()
    logits: dict[int, Tensor]

    @property
    @abstractmethod
    def rows(self) -> list[PlanRow]:
        """What is fed to the layers behind the latest exit."""

    @abstractmethod
    def part(self, layer: int, hidden: Tensor) -> Tensor | None:
        """The residual stream that goes on from an exit, ``[T', hidden]``, row after row.

        Args:
            hidden: what has reached it, ``[T, hidden]``.

        Returns:
            ``None``: just this goes on, as the same rows.
        """

    @abstractmethod
    def join(self, hidden: Tensor) -> Tensor:
        """Hidden states of all inputs of the step.

        Args:
            hidden: from the last layer, of what went through all.
        """

    def watch(
        self,
        layer: int,
        rows: RowSpans,
        q: Tensor,
        lse: Tensor,
        angles: tuple[Tensor, Tensor],
        spec: AttentionSpec,
    ) -> None:
        """Take note of the attention of a micro-batch in a watched layer.

        Args:
            q: ``[T, heads, width]``, not rotated.
            lse: fp32 ``[T, heads]``: the log-sum-exp of its scores.
            angles: cosine and sine of the positions.
        """
        return None

    def join_logits(self, rows: Sequence[int], computed: Tensor | None) -> Tensor:
        """``[R, vocab]`` for rows of the step, by their numbers.

        Args:
            computed: of those that did not leave, in this order; ``None``: all did.
        """
        others = iter(() if computed is None else computed)
        return torch.stack(
            [self.logits[row] if row in self.logits else next(others) for row in rows]
        )
