"""Adapters in PEFT's format, beside the weights of a loaded model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.json_file import read_json
from headrace.ops.adapted_linear import AdaptedLinear, AdapterRoutes, LowRank
from headrace.ops.linear import Linear
from headrace.ops.table import Ops
from headrace.weights.reader import Stack

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that are trained whole",
    "target_parameters": "adapters of parameters that are no linear weights",
    "layer_replication": "repeated layers",
}


Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module -> ``[R, K]`` and ``[N, R]``, the scale in the latter; fp32."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """The two factors of each module that an adapter changes."""

    directory: Path
    factors: Factors


def read_adapter(directory: Path) -> AdapterWeights:
    """A directory that PEFT wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of a kind that is not
            supported.
    """
    config_path, path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    config = read_json(config_path)
    _check_kind(config, config_path)
    if not path.is_file():
        if (directory / _PICKLE_FILE).is_file():
            raise CheckpointError(
                f"{directory / _PICKLE_FILE} is a pickle, which could run any code; load it with "
                "PEFT where it is trusted and save it with safe_serialization=True"
            )
        raise CheckpointError(f"{path} does not exist; fetch it from where the adapter came from")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); fetch it again") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(
                f"{path}: tensor {name!r} is no factor of a linear weight; only those are supported"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    factors = {}
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
            raise CheckpointError(f"{path}: the factors of {module!r} do not belong together")
        factors[module] = (pair["A"], pair["B"] * _scale(config, config_path, module))
    if not factors:
        raise CheckpointError(
            f"{path}: holds no factors; fetch it from where the adapter came from"
        )
    return AdapterWeights(directory, factors)


def _check_kind(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported; only LORA"
        )
    for field, meaning in _REFUSED.items():
        if config.get(field):
            raise CheckpointError(f"{path}: {field}: {meaning} are not supported")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias: trained biases are not supported; only 'none'")


def _scale(config: dict[str, Any], path: Path, module: str) -> float:
    """``alpha / r``, or over its root (A Rank Stabilization Scaling Factor for LoRA, section 3)."""
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    numbers = all(isinstance(value, (int, float)) for value in (rank, alpha))
    if not numbers or rank <= 0:
        raise CheckpointError(f"{path}: r and lora_alpha must be numbers, got {rank!r} {alpha!r}")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value for a module: of the first pattern that its name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


@dataclass(frozen=True, slots=True)
class _Target:
    """A linear weight that can be adapted; the stack says which modules it is made of."""

    linear: AdaptedLinear
    stack: Stack


class AdapterBank:
    """All linear weights of a model that can be adapted, and the adapters that are loaded.

    Attributes:
        routes: what the layer loop sets.
    """

    def __init__(self, ops: Ops) -> None:
        self.routes = AdapterRoutes()
        self._ops = ops
        self._targets: list[_Target] = []
        self._shapes: dict[str, tuple[int, int]] = {}

    def adapt(self, base: Linear, stack: Stack) -> Linear:
        """A weight of the model that stands in for ``base``."""
        ops = self._ops
        linear = AdaptedLinear(base, stack.gated, self.routes, ops.rms_norm, ops.silu_and_mul)
        self._targets.append(_Target(linear, stack))
        pairs = zip(stack.names, stack.rows, strict=True)
        self._shapes |= {name: (rows, stack.columns) for name, rows in pairs}
        return linear

    def add(self, key: str, adapter: AdapterWeights) -> None:
        """Make an adapter ready for use. Raises CheckpointError if it is for another model."""
        stored = self._stored_names()
        factors = {}
        for module, (down, up) in adapter.factors.items():
            name = stored.get(module) or stored.get(module.partition(".")[2])
            if name is None:
                raise CheckpointError(
                    f"{adapter.directory}: the adapter changes {module!r}, which this model does "
                    "not have or cannot adapt; it is for another model"
                )
            shape = (len(up), down.shape[1])
            if self._shapes[name] != shape:
                raise CheckpointError(
                    f"{adapter.directory}: the adapter changes {module!r} of shape {list(shape)}, "
                    f"and here it is {list(self._shapes[name])}; it is for another model"
                )
            factors[name] = (down, up)
        for target in self._targets:
            if any(name in factors for name in target.stack.names):
                target.linear.adapters[key] = self._stacked(target.stack, factors)

    def _stored_names(self) -> dict[str, str]:
        """Name of a module, with its first part or without -> the one that the checkpoint has.

        Which it is depends on the class of transformers that was saved, and on the one that was
        adapted ("transformer." of GPT-2, "bert.").
        """
        return {name.partition(".")[2]: name for name in self._shapes} | {
            name: name for name in self._shapes
        }

    def _stacked(self, stack: Stack, factors: Factors) -> LowRank:
        """The additions to all parts of a stack as one."""
        downs, ups = [], []
        for name, rows in zip(stack.names, stack.rows, strict=True):
            empty = (torch.zeros(0, stack.columns), torch.zeros(rows, 0))
            down, up = factors.get(name, empty)
            downs.append(down)
            ups.append(up)
        whole = torch.block_diag(*ups) if len(ups) > 1 else ups[0]
        if stack.order is not None:
            whole = whole[torch.tensor(stack.order)]
        device, dtype = self._ops.device, self._ops.dtype
        return LowRank(torch.cat(downs).to(device, dtype), whole.to(device, dtype))

    def remove(self, key: str) -> None:
        """Forget an adapter that no request uses any more."""
        for target in self._targets:
            target.linear.adapters.pop(key, None)
