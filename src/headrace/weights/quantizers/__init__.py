"""Ways to choose a quantized weight's values and scales."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from headrace.errors import ConfigurationError
from headrace.ops.packed_weight import (
    BF16,
    PackedWeight,
    QuantizedWeight,
    WeightFormat,
    pack,
    pack_dense,
)
from headrace.ops.scale_search import ScaleSearch
from headrace.registry import Registry

DEFAULT_QUANTIZER = "round-to-nearest"

QUANTIZERS = Registry(
    "quantizer",
    {DEFAULT_QUANTIZER: "headrace.weights.quantizers.round_to_nearest:RoundToNearest"},
)
"""Name -> a ``Quantizer`` that is made from a ``ScaleSearch``."""


class Quantizer(ABC):
    """Chooses how a weight is approximated; what a format can express is given."""

    @abstractmethod
    def quantize(self, weight: Tensor, format: WeightFormat) -> QuantizedWeight:
        """The approximation of ``weight`` ``[N, K]`` (any float dtype, on the CPU)."""


def make_quantizer(search: ScaleSearch, name: str = DEFAULT_QUANTIZER) -> Quantizer:
    """The quantizer of that name, on the operation that searches scales.

    Raises:
        ConfigurationError: the name is unknown; lists the known ones.
    """
    if name not in QUANTIZERS:
        raise ConfigurationError(f"quantizer: {name!r} is unknown; known: {', '.join(QUANTIZERS)}")
    quantizer: Quantizer = QUANTIZERS.resolve(name)(search)
    return quantizer


def pack_weight(
    weight: Tensor, format: WeightFormat, gated: bool, quantizer: Quantizer
) -> PackedWeight:
    """``[N, K]`` in the packed layout of a format."""
    if format == BF16:
        return pack_dense(weight, gated)
    return pack(quantizer.quantize(weight, format), format, gated)
