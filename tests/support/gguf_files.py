"""GGUF files, written byte by byte, and checkpoints as llama.cpp's converter puts them.

The names of tensors and the numbers of types are those of the ``gguf`` package.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.weights.gguf.block_types import BlockType

Config = dict[str, Any]
Named = Iterator[tuple[str, Tensor]]

_SCALARS: dict[type, tuple[int, str]] = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
_ARRAYS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10}
_ARRAYS |= {"i8": 11, "f8": 12}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class RawTensor:
    """A tensor to be written; ``type`` is the number of its element type."""

    name: str
    shape: tuple[int, ...]
    type: int
    data: bytes


# -- the format -------------------------------------------------------------------------------


def string_bytes(text: str | bytes) -> bytes:
    """A string with its length."""
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def value_bytes(value: Any) -> bytes:
    """A value of metadata with its type: integers are uint32, floats float32; numpy arrays and
    scalars keep their type."""
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", _STRING) + string_bytes(value)
    if isinstance(value, list):
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return head + b"".join(map(string_bytes, value))
    if isinstance(value, np.generic):
        return struct.pack("<I", _ARRAYS[value.dtype.str[1:]]) + value.tobytes()
    if isinstance(value, np.ndarray):
        head = struct.pack("<IIQ", _ARRAY, _ARRAYS[value.dtype.str[1:]], value.size)
        return head + value.tobytes()
    kind, form = _SCALARS[type(value)]
    return struct.pack("<I", kind) + struct.pack(form, value)


def tensor_entry(tensor: RawTensor, offset: int) -> bytes:
    """A tensor in the header."""
    sizes = tensor.shape[::-1]
    return (
        string_bytes(tensor.name)
        + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        + struct.pack("<IQ", tensor.type, offset)
    )


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[RawTensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    offsets: Sequence[int] | None = None,
) -> Path:
    """Write a file; ``offsets`` of the tensors, where they are not to follow one another."""

    def padded(size: int) -> int:
        return -(-size // alignment) * alignment

    placed, end = [], 0
    for tensor in tensors:
        placed.append(end)
        end = padded(end + len(tensor.data))
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(string_bytes(key) + value_bytes(value) for key, value in metadata.items())
    for tensor, offset in zip(tensors, offsets or placed, strict=True):
        header += tensor_entry(tensor, offset)
    content = bytearray(header.ljust(padded(len(header)), b"\0"))
    for tensor in tensors:
        content += tensor.data.ljust(padded(len(tensor.data)), b"\0")
    path.write_bytes(content)
    return path


def split_gguf(
    directory: Path, metadata: Mapping[str, Any], pieces: Sequence[Sequence[RawTensor]]
) -> list[Path]:
    """Write a model in several files."""
    count, total = len(pieces), sum(map(len, pieces))
    paths = []
    for number, tensors in enumerate(pieces):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(count),
            "split.tensors.count": np.int32(total),
        }
        path = directory / f"model-{number + 1:05d}-of-{count:05d}.gguf"
        paths.append(write_gguf(path, {**(metadata if number == 0 else {}), **split}, tensors))
    return paths


def encoded(name: str, tensor: Tensor, type: str = "F32") -> RawTensor:
    """A tensor in a type of elements, by the reference implementation."""
    number = gguf.GGMLQuantizationType[type]
    data = gguf.quants.quantize(np.ascontiguousarray(tensor.float().numpy()), number)
    return RawTensor(name, tuple(tensor.shape), int(number), data.tobytes())


# -- what the converter makes of a checkpoint -------------------------------------------------

_COMMON = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon"),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
}
"""Keys -> fields of ``config.json`` that they are taken from."""


def common_metadata(config: Config) -> Config:
    """What the converter writes for most architectures, without the architecture's name."""
    found: Config = {}
    for key, fields in _COMMON.items():
        values = [config[field] for field in fields if config.get(field) is not None]
        if values:
            found[key] = values[0]
    return found | rope_metadata(config)


def rope_metadata(config: Config) -> Config:
    """RoPE of all layers, or of those without a window, and its base in those with one."""
    every = config.get("rope_parameters") or {}
    rope = every.get("full_attention", every)
    found: Config = {"rope.freq_base": float(rope["rope_theta"])} if "rope_theta" in rope else {}
    if "sliding_attention" in every:
        found["rope.freq_base_swa"] = float(every["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        for field in ("beta_fast", "beta_slow"):
            found[f"rope.scaling.yarn_{field}"] = float(rope[field])
    if kind == "longrope":
        found["rope.scaling.type"] = kind
    return found


def llama3_divisors(config: Config) -> Tensor:
    """Of each frequency, by Llama 3.1's rule."""
    rope, width = config["rope_parameters"], config["head_dim"]
    divisors = []
    for exponent in range(0, width, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (exponent / width)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high, factor = (rope[n] for n in ("low_freq_factor", "high_freq_factor", "factor"))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / factor + share))
    return torch.tensor(divisors, dtype=torch.float32)


def side_by_side(tensor: Tensor, heads: int) -> Tensor:
    """Of each head, element i of the first half, then that of the second, and so on."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


@dataclass(frozen=True)
class Rule:
    """How a ``model_type`` is converted.

    Args:
        architecture: its name in files.
        metadata: out of ``config.json``, beyond what is common, or in its place.
        change: a tensor -> those it becomes, by names that the ``gguf`` package maps.
        extra: tensors that are written besides.
    """

    architecture: str
    metadata: Callable[[Config], Config] = lambda config: {}
    change: Callable[[Config, str, Tensor], Named] = lambda config, name, tensor: iter(
        [(name, tensor)]
    )
    extra: Callable[[Config], Mapping[str, Tensor]] = lambda config: {}


def _llama_change(config: Config, name: str, tensor: Tensor) -> Named:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    field = heads.get(name.split(".")[-2])
    yield name, tensor if field is None else side_by_side(tensor, config[field])


def _llama_metadata(config: Config) -> Config:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": width}


def _llama_extra(config: Config) -> Mapping[str, Tensor]:
    llama3 = config["rope_parameters"]["rope_type"] == "llama3"
    return {"rope_freqs.weight": llama3_divisors(config)} if llama3 else {}


def _qwen_moe_metadata(config: Config) -> Config:
    fields = {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }
    return {key: config[field] for key, field in fields.items() if config.get(field)}


def _gemma_change(config: Config, name: str, tensor: Tensor) -> Named:
    yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def _gemma_metadata(config: Config) -> Config:
    found: Config = {"attention.sliding_window": config["sliding_window"]}
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(field):
            found[field] = float(config[field])
    return found


def _phi3_metadata(config: Config) -> Config:
    rope, heads = config["rope_parameters"], config["num_attention_heads"]
    share = rope.get("partial_rotary_factor", 1.0)
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    found: Config = {
        "rope.dimension_count": int(share * config["hidden_size"]) // heads,
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if rope["rope_type"] == "longrope":
        scale = config["max_position_embeddings"] / original
        factor = float(np.sqrt(1 + np.log(scale) / np.log(original)))
        found["rope.scaling.attn_factor"] = factor
    return found


def _phi3_extra(config: Config) -> Mapping[str, Tensor]:
    rope = config["rope_parameters"]
    kinds = [kind for kind in ("long", "short") if f"{kind}_factor" in rope]
    return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in kinds}


def _gpt2_change(config: Config, name: str, tensor: Tensor) -> Named:
    turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    yield name, tensor.T if turned else tensor


def _neox_change(config: Config, name: str, tensor: Tensor) -> Named:
    if "query_key_value" in name:
        by_head = tensor.reshape(config["num_attention_heads"], 3, -1, *tensor.shape[1:])
        tensor = by_head.transpose(0, 1).reshape(tensor.shape)
    yield name, tensor


def _neox_metadata(config: Config) -> Config:
    width = config["hidden_size"] // config["num_attention_heads"]
    share = config["rope_parameters"]["partial_rotary_factor"]
    return {
        "rope.dimension_count": int(share * width),
        "use_parallel_residual": config["use_parallel_residual"],
    }


def _mamba_change(config: Config, name: str, tensor: Tensor) -> Named:
    groups = config.get("n_groups") or config.get("mamba_n_groups")
    if name.endswith("dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    elif name.endswith("conv1d.weight"):
        tensor = tensor.squeeze()
    elif name.endswith("A_log"):
        tensor = -tensor.exp().unsqueeze(1)
    elif name.endswith(".D"):
        tensor = tensor.unsqueeze(1)
    elif name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
        tensor = tensor.reshape(groups, -1)
    yield name, tensor


def _mamba2_metadata(config: Config) -> Config:
    inner = config["expand"] * config["hidden_size"]
    return {
        "context_length": 1 << 20,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": inner,
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": inner // config["head_dim"],
        "ssm.group_count": config["n_groups"],
    }


def _falcon_change(config: Config, name: str, tensor: Tensor) -> Named:
    """The mixer's changes, with the multipliers in the weights."""
    attends, key = config["attention_in_multiplier"], config["key_multiplier"]
    gate, down = config["mlp_multipliers"]
    factors = {
        "q_proj": attends,
        "k_proj": attends * key,
        "v_proj": attends,
        "o_proj": config["attention_out_multiplier"],
        "gate_proj": gate,
        "down_proj": down,
        "in_proj": config["ssm_in_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
        "lm_head": config["lm_head_multiplier"],
    }
    part = name.split(".")[-2]
    tensor = tensor * factors.get(part, 1.0)
    if part == "in_proj":
        inner, group = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
        sizes = torch.tensor([inner, inner, group, group, config["mamba_n_heads"]])
        rows = torch.tensor(config["ssm_multipliers"]).repeat_interleave(sizes)
        tensor = tensor * rows.unsqueeze(1)
    yield from _mamba_change(config, name, tensor)


def _falcon_metadata(config: Config) -> Config:
    return {
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.inner_size": config["mamba_d_ssm"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.time_step_rank": config["mamba_d_ssm"] // config["mamba_d_head"],
        "ssm.group_count": config["mamba_n_groups"],
    }


def _deepseek_change(config: Config, name: str, tensor: Tensor) -> Named:
    if not name.endswith("kv_b_proj.weight"):
        yield name.replace("correction_bias", "correction.bias"), tensor
        return
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    heads = tensor.view(config["num_key_value_heads"], plain + value, -1)
    yield name.replace("kv_b", "k_b"), heads[:, :plain].transpose(1, 2)
    yield name.replace("kv_b", "v_b"), heads[:, plain:]


def _deepseek_metadata(config: Config) -> Config:
    latent, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    found: Config = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "rope.dimension_count": rotated,
    }
    if config.get("q_lora_rank"):
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    if config["model_type"] == "deepseek_v3":
        found |= {"expert_gating_func": 2, "expert_weights_norm": config["norm_topk_prob"]}
    if "mscale_all_dim" in config["rope_parameters"]:
        factor = 0.1 * config["rope_parameters"]["mscale_all_dim"]
        found["rope.scaling.yarn_log_multiplier"] = factor
    return found


def _gpt_oss_change(config: Config, name: str, tensor: Tensor) -> Named:
    if name.endswith("sinks"):
        name += ".weight"
    bias = name.endswith("_bias")
    if "experts." in name:
        name = name.removesuffix("_bias") + (".bias" if bias else ".weight")
        tensor = tensor if bias else tensor.transpose(-1, -2)
    if "gate_up_proj" not in name:
        yield name, tensor
        return
    yield name.replace("gate_up", "gate"), tensor[:, ::2]
    yield name.replace("gate_up", "up"), tensor[:, 1::2]


def _gpt_oss_metadata(config: Config) -> Config:
    return {
        "attention.sliding_window": config["sliding_window"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def _bert_change(config: Config, name: str, tensor: Tensor) -> Named:
    if not name.startswith("pooler."):
        yield name, tensor


_TURNED = {"metadata": _llama_metadata, "change": _llama_change, "extra": _llama_extra}
_GEMMA = {"metadata": _gemma_metadata, "change": _gemma_change}
_DEEPSEEK = {"metadata": _deepseek_metadata, "change": _deepseek_change}

RULES = {
    "llama": Rule("llama", **_TURNED),
    "mixtral": Rule("llama", **_TURNED),
    "smollm3": Rule("smollm3", **_TURNED),
    "qwen2": Rule("qwen2"),
    "qwen2_moe": Rule("qwen2moe", _qwen_moe_metadata),
    "qwen3": Rule("qwen3"),
    "qwen3_moe": Rule("qwen3moe", _qwen_moe_metadata),
    "gemma2": Rule("gemma2", **_GEMMA),
    "gemma3_text": Rule("gemma3", **_GEMMA),
    "phi3": Rule("phi3", _phi3_metadata, extra=_phi3_extra),
    "gpt2": Rule("gpt2", lambda c: {"feed_forward_length": 4 * c["n_embd"]}, _gpt2_change),
    "gpt_neox": Rule("gptneox", _neox_metadata, _neox_change),
    "mamba2": Rule("mamba2", _mamba2_metadata, _mamba_change),
    "falcon_h1": Rule("falcon-h1", _falcon_metadata, _falcon_change),
    "deepseek_v2": Rule("deepseek2", **_DEEPSEEK),
    "deepseek_v3": Rule("deepseek2", **_DEEPSEEK),
    "gpt_oss": Rule("gpt-oss", _gpt_oss_metadata, _gpt_oss_change),
    "bert": Rule("bert", lambda c: {"attention.causal": False}, _bert_change),
}
"""By ``model_type``."""

_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+\.weight)")


def merge_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of experts stacked in one tensor, and the others."""
    merged: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            merged[name] = tensor
        else:
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    for name, parts in experts.items():
        merged[name] = torch.stack([parts[number] for number in range(len(parts))])
    return merged


def convert_tensors(
    config: Config,
    tensors: Mapping[str, Tensor],
    encode: Callable[[str, Tensor], RawTensor] = encoded,
) -> tuple[Config, list[RawTensor]]:
    """Metadata and tensors of a file for a checkpoint.

    Args:
        encode: a tensor by its name in the file -> as it is stored.
    """
    rule = RULES[config["model_type"]]
    (number,) = [n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == rule.architecture]
    values = {**common_metadata(config), **rule.metadata(config)}
    names = gguf.get_tensor_name_map(number, values["block_count"])
    stored = []
    for name, tensor in merge_experts(tensors).items():
        for old, changed in rule.change(config, name, tensor):
            new = names.get_name(old, try_suffixes=(".weight", ".bias"))
            assert new is not None, old
            stored.append(encode(new, changed))
    stored += [encoded(name, tensor) for name, tensor in rule.extra(config).items()]
    metadata = {f"{rule.architecture}.{key}": value for key, value in values.items()}
    return {"general.architecture": rule.architecture, **metadata}, stored


def convert(
    source: Path, target: Path, encode: Callable[[str, Tensor], RawTensor] = encoded
) -> Path:
    """Write a checkpoint of one file as GGUF."""
    config = json.loads((source / "config.json").read_text())
    metadata, tensors = convert_tensors(config, load_file(source / "model.safetensors"), encode)
    return write_gguf(target, metadata, tensors)


# -- for tests --------------------------------------------------------------------------------


def numbers(name: str, *shape: int) -> RawTensor:
    """A tensor in fp32 of different values."""
    return encoded(name, torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape))


def random_blocks(type: BlockType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of random bytes. In every other row, many scales are infinite, denormal, or NaN."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, type.row_bytes(columns)), dtype=np.uint8)
    blocks[1::2] = generator.choice(
        np.array([0, 1, 0x7C, 0xFC, 0xFF], np.uint8), blocks[1::2].shape
    )
    return blocks


def reference_values(type: BlockType, rows: np.ndarray) -> np.ndarray:
    """What the ``gguf`` package makes of rows of blocks, in fp32."""
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(type.number))
    return np.asarray(values, np.float32).reshape(len(rows), -1)


def refusal(open_it: Callable[[], object]) -> str:
    """The message with which something is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_it()
    assert "\n" not in str(caught.value)
    return str(caught.value)
