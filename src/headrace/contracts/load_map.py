"""Where a checkpoint keeps what a model asks for by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A stored tensor, or a part of it.

    Args:
        name: in the checkpoint.
        index: of its first dimension; ``None``: all of it.
        transposed: the last two dimensions have changed places.
    """

    name: str
    index: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class GatedNames:
    """The weights of a gated feed-forward, by the names that a model asks for.

    Args:
        gate_up: linear weights that, stacked, are gate and up, ``[2 * neurons, hidden]``.
        down: one of ``[hidden, neurons]``.
        bias: whether each of them has one.
    """

    gate_up: tuple[str, ...]
    down: str
    hidden: int
    neurons: int
    bias: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """Names that match ``pattern`` are stored as ``stored``, in which groups may be used.

    Args:
        index: group of the pattern that numbers the part of the stored tensor.
    """

    pattern: str
    stored: str
    index: int | None = None
    transposed: bool = False


class LoadMap:
    """Rules, of which the first that matches a whole name counts; other names stay as they are."""

    def __init__(self, *rules: Rule) -> None:
        self._rules: Sequence[tuple[re.Pattern[str], Rule]] = [
            (re.compile(rule.pattern), rule) for rule in rules
        ]

    def find(self, name: str) -> StoredPart:
        """Where ``name`` is stored."""
        for pattern, rule in self._rules:
            match = pattern.fullmatch(name)
            if match is not None:
                index = None if rule.index is None else int(match[rule.index])
                return StoredPart(match.expand(rule.stored), index, rule.transposed)
        return StoredPart(name)
