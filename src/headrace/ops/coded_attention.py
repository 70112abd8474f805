"""Attention to keys and values that a codec has coded, beside what a row's own slots hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.contracts.kv_codec import CodedPart, CodedPlace, CodedUnit, KVCodec
from headrace.ops.attention import matmul_kernel
from headrace.ops.device import DTYPES
from headrace.ops.extension import extension
from headrace.ops.paged import AttentionSpec
from headrace.ops.reference import merge_attention, rotate

if TYPE_CHECKING:
    from headrace.ops import _native

_DTYPES = {**DTYPES, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16}

_SLOTS_AT_ONCE = 4096
"""Slots of a layer that are decoded at once."""

_MOST_WIDTH, _MOST_RANK = 512, 64
"""Of what the kernels take."""


@dataclass(slots=True, eq=False)
class CodedRows:
    """Rows of a micro-batch with coded units before their own slots, of one codec and cache group.

    Args:
        unit: how they lie in pages.
        starts, queries: the first input of each row in the micro-batch, and how many it has.
        pages: of each row's units in order, int32 ``[n, unit.pages]``, ``n`` at least 1.
        made: what the operation makes of them.
    """

    codec: KVCodec
    unit: CodedUnit
    starts: list[int]
    queries: list[int]
    pages: list[npt.NDArray[np.int32]]
    made: Any = None


class CodedAttention:
    """The reference: decodes with the codec itself, on any device."""

    def attend(
        self,
        pages: Tensor,
        layer: int,
        rows: CodedRows,
        q: Tensor,
        angles: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        spec: AttentionSpec,
    ) -> None:
        """Attend to the units of rows, and merge that into what attention to their slots gave.

        Args:
            pages: the arena, ``[pages, page_bytes]`` uint8.
            q: ``[T, heads, width]``, not rotated; angles: cos and sin, ``[T, width / 2]``.
            own: of all inputs, which changes where the rows are: ``[T, heads, width]`` and the
                log-sum-exp ``[T, heads]``.
            spec: without a window.
        """
        if rows.made is None:
            rows.made = [torch.from_numpy(each.astype(np.int64)) for each in rows.pages]
        for start, count, table in zip(rows.starts, rows.queries, rows.made, strict=True):
            inputs = slice(start, start + count)
            query = rotate(q[inputs], *(part[inputs] for part in angles)).transpose(0, 1)[None]
            out, lse = (part[inputs] for part in own)
            for units in table.to(q.device).split(max(1, _SLOTS_AT_ONCE // rows.unit.slots)):
                decoded = read_units(pages, layer, rows, units)
                keys, values = (x.to(q.dtype)[None] for x in decoded)
                part, part_lse = matmul_kernel(query, keys, values, spec, None, False)
                out, lse = merge_attention(out, lse, part[0].transpose(0, 1), part_lse[0].T)
            own[0][inputs], own[1][inputs] = out, lse


def read_units(pages: Tensor, layer: int, rows: CodedRows, units: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of units ``[n, pages of a unit]``: fp32 ``[heads, n * slots, width]``."""
    parts = {}
    for place in rows.unit.places[layer]:
        end = place.offset + part_bytes(place.part)
        held = pages[units[:, place.page], place.offset : end]
        shape = (len(units), *place.part.shape)
        parts[place.part.name] = held.view(_DTYPES[place.part.dtype]).view(shape)
    keys, values = rows.codec.decode(parts)
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


def part_bytes(part: CodedPart) -> int:
    """Bytes of its tensor."""
    return prod(part.shape) * _DTYPES[part.dtype].itemsize


class NativeCodedAttention(CodedAttention):
    """On native kernels for bfloat16, where a codec's parts are lines of levels.

    A unit is decoded, attended to while it is in the cache, and forgotten.

    Args:
        context: kernels and threads.
    """

    def __init__(self, context: _native.Context) -> None:
        module = extension()
        assert module is not None, "a context comes out of the extension"
        self._module = module
        self._context = context
        self._layers: WeakKeyDictionary[CodedUnit, dict[int, _native.CodedLayer | None]] = (
            WeakKeyDictionary()
        )

    def attend(
        self,
        pages: Tensor,
        layer: int,
        rows: CodedRows,
        q: Tensor,
        angles: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        spec: AttentionSpec,
    ) -> None:
        described = self._describe(rows, layer)
        if described is None or not all(each.is_contiguous() for each in own):
            super().attend(pages, layer, rows, q, angles, own, spec)
            return
        if rows.made is None:
            rows.made = self._arrange(rows)
        (out, lse), (cos, sin) = own, angles
        _check(q, cos, sin, out, lse, described.width)
        self._context.attend_coded(
            described,
            rows.made,
            pages.data_ptr(),
            pages.shape[1],
            q.shape[1],
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            cos.data_ptr(),
            sin.data_ptr(),
            spec.scale,
            spec.softcap or 0.0,
            out.data_ptr(),
            lse.data_ptr(),
        )

    def _arrange(self, rows: CodedRows) -> _native.CodedRows:
        table = np.ascontiguousarray(np.concatenate(rows.pages), dtype=np.int32)
        starts, queries, units = (
            np.array(values, dtype=np.int64)
            for values in (rows.starts, rows.queries, [len(each) for each in rows.pages])
        )
        arranged: _native.CodedRows = self._module.CodedRows(
            rows=len(starts),
            unit_pages=rows.unit.pages,
            starts=starts.ctypes.data,
            queries=queries.ctypes.data,
            units=units.ctypes.data,
            table=table.ctypes.data,
        )
        return arranged

    def _describe(self, rows: CodedRows, layer: int) -> _native.CodedLayer | None:
        """The units of a layer as kernels know them; ``None``: they do not."""
        known = self._layers.setdefault(rows.unit, {})
        if layer not in known:
            bits = rows.codec.level_bits()
            places = {place.part.name: place for place in rows.unit.places[layer]}
            known[layer] = None if bits is None else self._layer(bits, places, rows.unit.slots)
        return known[layer]

    def _layer(
        self, bits: int, places: Mapping[str, CodedPlace], slots: int
    ) -> _native.CodedLayer | None:
        heads, width = places["key_levels"].part.shape[:2]
        ranks = (_shape(places, name)[-1] for name in ("key_left", "value_left"))
        if width % 2 or width > _MOST_WIDTH or max(ranks) > _MOST_RANK:
            return None
        made: _native.CodedLayer = self._module.CodedLayer(
            heads=heads,
            slots=slots,
            width=width,
            keys=self._lines("key", bits, places, (heads, width, slots)),
            values=self._lines("value", bits, places, (heads, slots, width)),
        )
        return made

    def _lines(
        self, name: str, bits: int, places: Mapping[str, CodedPlace], shape: tuple[int, int, int]
    ) -> _native.CodedLines:
        """Parts whose shapes are those of ``KVCodec.level_bits``."""
        heads, lines, length = shape
        groups = prod(_shape(places, f"{name}_steps")) // (2 * heads * lines)
        rank = _shape(places, f"{name}_left")[-1]
        kept = _shape(places, f"{name}_places")[-1]
        expected = {
            "levels": (heads * lines * length * bits // 8, "uint8"),
            "steps": (heads * lines * groups * 2, "float16"),
            "left": (heads * lines * rank, "float16"),
            "right": (heads * rank * length, "float16"),
            "places": (heads * lines * kept, "int16"),
            "outliers": (heads * lines * kept, "float16"),
        }
        found = []
        for part, (items, dtype) in expected.items():
            place = places.get(f"{name}_{part}")
            if items != (0 if place is None else prod(place.part.shape)) or (
                place is not None and place.part.dtype != dtype
            ):
                raise ValueError(f"{name}_{part}: must be {items} items of {dtype}")
            found.append((-1, 0) if place is None else (place.page, place.offset))
        made: _native.CodedLines = self._module.CodedLines(
            bits=bits,
            lines=lines,
            length=length,
            groups=groups,
            rank=rank,
            kept=kept,
            places=found,
        )
        return made


def _shape(places: Mapping[str, CodedPlace], name: str) -> tuple[int, ...]:
    """Of a part; one that is not there has no items."""
    return places[name].part.shape if name in places else (0,)


def _check(q: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, width: int) -> None:
    """Memory is read by address: what does not fit is refused here."""
    tokens, heads, found = q.shape
    half = torch.bfloat16
    fits = (
        found == width
        and cos.shape == sin.shape == (tokens, width // 2)
        and out.shape == q.shape
        and lse.shape == (tokens, heads)
        and q.stride(2) == 1
        and cos.is_contiguous()
        and sin.is_contiguous()
    )
    if not fits or not (q.dtype == cos.dtype == sin.dtype == out.dtype == half):
        raise ValueError(
            f"attention to coded units: q {tuple(q.shape)}, cos {tuple(cos.shape)}, out "
            f"{tuple(out.shape)} and lse {tuple(lse.shape)} do not fit heads of {width} in bfloat16"
        )
    if lse.dtype != torch.float32:
        raise ValueError("attention to coded units: lse must be float32")
