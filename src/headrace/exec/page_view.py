"""Views: the layers of a forward read some pages of a sequence in place of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor


class PageView(ABC):
    """Which pages each layer reads and writes for the rows of a forward.

    Positions are data: keys are cached rotated at their own, so any pages can stand one after
    another. The last of them take what is fed; what they held there is overwritten.
    """

    @abstractmethod
    def tables(
        self, layer: int, rows: Sequence[int], queries: Callable[[], Tensor]
    ) -> npt.NDArray[np.int32]:
        """``[R, pages]`` for the rows with these table rows, wide enough for their contexts.

        Args:
            queries: of the rows' inputs in this layer, rotated, ``[T, heads, width]``.
        """
