"""Products with GGUF's types in their native layout, beside those of our formats."""

from __future__ import annotations

from harness import Result
from kernels import TYPES, measure_formats


def measure(rounds: int, quick: bool) -> Result:
    """Every instruction set of this processor, every type."""
    return measure_formats(["w8a8", "w4a8-g32", *TYPES], rounds, quick)
