"""``quant_method`` "fp8": F8_E4M3 with a scale for each block of a weight, or for all of it.

Blocks are those of the "DeepSeek-V3 Technical Report", section 3.3.2. The scales of blocks are in
``weight_scale_inv``, which despite its name is what values are multiplied with; a single scale is
in ``weight_scale``, or also there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.weights.stored_formats import StoredWeight
from headrace.weights.stored_formats.float8 import FLOAT8, Float8Weight
from headrace.weights.stored_formats.section import read_block, read_choice
from headrace.weights.tensor_files import TensorFiles


def find_weights(section: Mapping[str, Any], files: TensorFiles) -> dict[str, StoredWeight]:
    """See ``WeightFinder``. Modules that are not to be converted are stored in other types."""
    read_choice(section, "expert_dtype", ("fp8",), "fp8")
    block = read_block(section, "weight_block_size")
    weights: dict[str, StoredWeight] = {}
    for name in files:
        if name.endswith(".weight") and files[name].dtype == FLOAT8:
            scales = f"{name}_scale_inv"
            if block is None and scales not in files:
                scales = f"{name}_scale"
            module = name.removesuffix(".weight")
            inputs = [f"{module}.{kind}_scale" for kind in ("input", "activation")]
            weights[name] = Float8Weight(files, name, scales, block or (None, None), inputs)
    return weights
