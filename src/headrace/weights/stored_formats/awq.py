"""``quant_method`` "awq": 4-bit integers with zero points, in the layout "gemm" of AutoAWQ.

How their values are chosen is described in "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration". The layout is that of AutoAWQ's ``WQLinear_GEMM``: for a weight
``[out, in]``, ``qweight`` is int32 ``[in, out / 8]``, ``qzeros`` int32 ``[G, out / 8]`` and
``scales`` fp16 ``[G, out]``, where a word has eight successive rows of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.weights.stored_formats import StoredQuantized, StoredWeight
from headrace.weights.stored_formats.integers import IntegerWeight, matrix_shape, unpack
from headrace.weights.stored_formats.scales import count_blocks, read_scales
from headrace.weights.stored_formats.section import read_choice, read_group, unsupported
from headrace.weights.tensor_files import TensorFiles

_BITS = 4
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Of rows 0 to 7 of a word, which has them in the order 0, 2, 4, 6, 1, 3, 5, 7."""
_VALUES = ".qweight"


class AwqWeight(IntegerWeight):
    """A weight of a module."""

    def __init__(self, files: TensorFiles, module: str, group: int | None) -> None:
        parts = [module + kind for kind in (_VALUES, ".qzeros", ".scales")]
        super().__init__(files, f"{module}.weight", parts, parts[-1], _BITS, group, False)
        self._module = module

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        columns, words = matrix_shape(self._files[self._module + _VALUES])
        return words * len(_SHIFTS), columns

    def quantized(self) -> StoredQuantized:
        """See ``StoredWeight``."""
        rows, columns = self.shape
        group, words = self._group or columns, rows // len(_SHIFTS)
        groups = count_blocks(columns, group)
        files, module = self._files, self._module
        values = files.load(module + _VALUES, (columns, words), ("I32",))
        zeros = files.load(f"{module}.qzeros", (groups, words), ("I32",))
        scales = read_scales(files, f"{module}.scales", (groups, rows))
        return StoredQuantized(
            unpack(values, _SHIFTS, _BITS).t().contiguous(),
            scales.t().contiguous(),
            unpack(zeros, _SHIFTS, _BITS).t().contiguous(),
            _BITS,
            group,
        )


def find_weights(section: Mapping[str, Any], files: TensorFiles) -> dict[str, StoredWeight]:
    """See ``WeightFinder``."""
    for field in ("version", "format", "checkpoint_format"):
        layout = str(section.get(field) or "gemm")
        if layout.lower() != "gemm":
            raise unsupported(field, layout, ("gemm",))
    if section.get("backend") == "llm-awq":
        raise unsupported("backend", "llm-awq")
    read_choice(section, "bits", (_BITS,))
    read_choice(section, "zero_point", (True,), True)
    group = read_group(section)
    modules = [name.removesuffix(_VALUES) for name in files if name.endswith(_VALUES)]
    return {f"{module}.weight": AwqWeight(files, module, group) for module in modules}
