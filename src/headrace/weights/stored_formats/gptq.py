"""``quant_method`` "gptq": integers of 4 or 8 bits, in the layouts of AutoGPTQ and GPTQModel.

How their values are chosen is described in "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers". For a weight ``[out, in]`` of B bits, ``qweight`` is int32
``[in * B / 32, out]``, where a word has successive columns of the weight, the first in its lowest
bits; ``qzeros`` is int32 ``[G, out * B / 32]``, where a word has successive rows; ``scales`` is
fp16 ``[G, out]``; ``g_idx`` is int32 ``[in]``, the group of each column, which are out of order
where columns were quantized in the order of their activations (``desc_act``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headrace.weights.stored_formats import StoredQuantized, StoredWeight
from headrace.weights.stored_formats.integers import (
    WORD_BITS,
    IntegerWeight,
    count_words,
    in_turn,
    matrix_shape,
    read_order,
    unpack,
)
from headrace.weights.stored_formats.scales import count_blocks, read_scales
from headrace.weights.stored_formats.section import read_choice, read_group, unsupported
from headrace.weights.tensor_files import TensorFiles

_VALUES = ".qweight"


@dataclass(frozen=True, slots=True)
class GptqVariant:
    """What ``quantization_config`` says.

    Args:
        bits: of a value.
        group: columns that share a scale; ``None``: all of a row.
        symmetric: whether zero points are said to be in the middle.
        ordered: whether ``g_idx`` must be there.
        less_one: whether zero points are stored less 1.
    """

    bits: int
    group: int | None
    symmetric: bool
    ordered: bool
    less_one: bool

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> GptqVariant:
        """Raises CheckpointError: it is a variant that is not read."""
        field = "checkpoint_format" if section.get("checkpoint_format") else "format"
        layout = read_choice(section, field, ("gptq", "gptq_v2"), "gptq")
        if section.get("is_marlin_format"):
            raise unsupported("is_marlin_format", True)
        # Modules that are left out of the quantization ("-:") are stored plainly.
        changed = [name for name in map(str, section.get("dynamic") or ()) if name[:2] != "-:"]
        if changed:
            raise unsupported("dynamic", changed[0])
        return cls(
            read_choice(section, "bits", (4, 8)),
            read_group(section),
            bool(section.get("sym", True)),
            read_choice(section, "desc_act", (False, True), False),
            layout == "gptq",
        )

    def unpack_zeros(self, words: Tensor) -> Tensor:
        """``qzeros`` -> uint8 ``[G, out]``."""
        if self.less_one:
            # The 1 was taken from whole words: zeros of 0 borrowed from what stands above them.
            words = words.long() + sum(1 << shift for shift in in_turn(self.bits))
        return unpack(words, in_turn(self.bits), self.bits)


class GptqWeight(IntegerWeight):
    """A weight of a module."""

    def __init__(self, files: TensorFiles, module: str, variant: GptqVariant) -> None:
        parts = [module + kind for kind in (_VALUES, ".qzeros", ".scales", ".g_idx")]
        values = variant.bits, variant.group, variant.symmetric
        super().__init__(files, f"{module}.weight", parts, f"{module}.scales", *values)
        self._module, self._variant = module, variant

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        words, rows = matrix_shape(self._files[self._module + _VALUES])
        return rows, words * WORD_BITS // self._variant.bits

    def quantized(self) -> StoredQuantized:
        """See ``StoredWeight``; zero points that are all in the middle are left out."""
        files, module, bits = self._files, self._module, self._variant.bits
        rows, columns = self.shape
        group = self._variant.group or columns
        groups = count_blocks(columns, group)
        words = files.load(module + _VALUES, (count_words(columns, bits), rows), ("I32",))
        zeros = files.load(f"{module}.qzeros", (groups, count_words(rows, bits)), ("I32",))
        zeros = self._variant.unpack_zeros(zeros)[:, :rows].t().contiguous()
        scales = read_scales(files, f"{module}.scales", (groups, rows))
        return StoredQuantized(
            unpack(words.t().contiguous(), in_turn(bits), bits),
            scales.t().contiguous(),
            None if bool((zeros == 1 << (bits - 1)).all()) else zeros,
            bits,
            group,
            self.order(),
        )

    def order(self) -> Tensor | None:
        """See ``IntegerWeight``."""
        name = f"{self._module}.g_idx"
        if not self._variant.ordered and name not in self._files:
            return None
        columns = self.shape[1]
        return read_order(self._files, name, columns, self._group or columns)


def find_weights(section: Mapping[str, Any], files: TensorFiles) -> dict[str, StoredWeight]:
    """See ``WeightFinder``."""
    variant = GptqVariant.parse(section)
    modules = [name.removesuffix(_VALUES) for name in files if name.endswith(_VALUES)]
    return {f"{module}.weight": GptqWeight(files, module, variant) for module in modules}
