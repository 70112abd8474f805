"""Small integers in bytes, and the scales that make numbers of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers below ``2 ** bits``, ``[..., n]``, as uint8 ``[..., n * bits / 8]``.

    The first of a byte has its lowest bits.
    """
    per_byte = 8 // bits
    parts = values.to(torch.uint8).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=values.device) * bits
    return torch.sum(parts << shifts, -1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """What ``pack_bits`` has packed, uint8."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=packed.device) * bits
    return torch.flatten((packed[..., None] >> shifts) & (2**bits - 1), -2)


def quantize_range(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``x`` to evenly spaced levels between its extremes along ``dim``.

    Returns:
        Levels (uint8, as ``x``), and fp16 steps and lowest values, of size 1 along ``dim``. What
        these are after rounding to fp16 is what levels are relative to.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    lowest = low.half()
    step = ((high - lowest.float()) / (2**bits - 1)).clamp_min(1e-7).half()
    levels = ((x - lowest.float()) / step.float().clamp_min(1e-7)).round()
    return levels.clamp_(0, 2**bits - 1).to(torch.uint8), step, lowest


def dequantize_range(levels: Tensor, step: Tensor, lowest: Tensor) -> Tensor:
    """fp32 numbers of ``quantize_range``'s results."""
    return levels.float() * step.float() + lowest.float()


def decode_lines(parts: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Keys and values of lines of levels, as ``KVCodec.level_bits`` describes their parts.

    Args:
        parts: ``[n, *shape]`` each.

    Returns:
        fp32 ``[n, heads, slots, width]`` each.
    """
    return _decode_lines("key", parts, bits).mT, _decode_lines("value", parts, bits)


def _decode_lines(name: str, parts: Mapping[str, Tensor], bits: int) -> Tensor:
    levels = unpack_bits(parts[f"{name}_levels"], bits)
    lines = dequantize_range(levels, *parts[f"{name}_steps"].split(1, dim=-1)).flatten(3)
    if f"{name}_left" in parts:
        lines += parts[f"{name}_left"].float() @ parts[f"{name}_right"].float()
    if f"{name}_places" in parts:
        places, outliers = parts[f"{name}_places"].long(), parts[f"{name}_outliers"].float()
        lines = lines.scatter(-1, places, outliers)
    return lines
