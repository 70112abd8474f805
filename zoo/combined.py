"""Batches put together from those of other data."""

import bisect
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.data import Batches


class InTurn:
    """One data set after another, each to its end."""

    def __init__(self, parts: Sequence[Batches]) -> None:
        self.parts = list(parts)
        self.ends = list(itertools.accumulate(part.steps for part in parts))
        self.steps = self.ends[-1]

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See ``Batches``."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not one of {self.steps}")
        number = bisect.bisect_right(self.ends, step)
        part = self.parts[number]
        return part.batch(step - self.ends[number] + part.steps)

    def digest(self) -> str:
        """See ``Batches``."""
        return joint_digest("in turn", self.parts)


class SideBySide:
    """Batches whose rows are those of several data sets, of one length, at the same step."""

    def __init__(self, parts: Sequence[Batches]) -> None:
        self.parts = list(parts)
        self.steps = min(part.steps for part in parts)

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See ``Batches``."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not one of {self.steps}")
        inputs, targets = zip(*(part.batch(step) for part in self.parts), strict=True)
        return np.concatenate(inputs), np.concatenate(targets)

    def digest(self) -> str:
        """See ``Batches``."""
        return joint_digest("side by side", self.parts)


def joint_digest(order: str, parts: Sequence[Batches]) -> str:
    """Return the SHA-256, in hexadecimal, of data sets and how they are put together."""
    return hashlib.sha256(repr((order, [part.digest() for part in parts])).encode()).hexdigest()
