"""Products with GGUF's types in their native layout, beside those of our formats."""

from __future__ import annotations

from dataclasses import replace

from harness import Result
from kernels import TYPES, measure_formats

NOTE = (
    "Where one row takes a smaller share of the bandwidth than our format of the same bits: every "
    "32 (or 16) values have a scale of their own, w8a8 one per row; it is read as a second stream, "
    "and costs a conversion and a multiplication in registers. K types have two levels of scales "
    "to multiply first, and Q2_K and Q3_K the most of them per byte: a core's arithmetic is about "
    "as slow as memory there. With more rows that is done again for every few rows of activations, "
    "whose sums are kept in registers."
)


def measure(rounds: int, quick: bool) -> Result:
    """Every instruction set of this processor, every type."""
    return replace(measure_formats(["w8a8", "w4a8-g32", *TYPES], rounds, quick), note=NOTE)
