"""The Llama decoder in plain PyTorch, as small as training and evaluation allow.

Parameter names and configuration keys are those of Hugging Face ``LlamaForCausalLM``, so a
``state_dict()`` is a checkpoint that any Llama implementation loads unchanged.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -1
"""The target of a position at which nothing is to be learnt."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one member of the family; the defaults are the embedded model's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 512
    max_position_embeddings: int = 2048
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5

    def to_hugging_face(self, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
        """Return the contents of ``config.json`` for weights stored in bfloat16."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_hugging_face(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read the fields of this class from a ``config.json``; raises KeyError if one lacks."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float32 ``(length, head_dim)`` each.

    "RoFormer: Enhanced Transformer with Rotary Position Embedding", in the layout that pairs
    element ``i`` with element ``i + head_dim / 2``.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    positions = torch.arange(length, device=device).float()
    angles = torch.outer(positions, config.rope_theta**-exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply the rotary embedding to ``(batch, heads, length, head_dim)``, keeping its dtype."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (states * cosine + rotated * sine).to(states.dtype)


class Attention(nn.Module):
    """Causal self-attention ("GQA: Training Generalized Multi-Query Transformer Models")."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query_width, key_width = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map ``(batch, length, hidden_size)`` to the same shape."""
        batch, length, _ = hidden.shape
        shape = (batch, length, -1, self.head_dim)
        queries = rotate(self.q_proj(hidden).view(shape).transpose(1, 2), cosine, sine)
        keys = rotate(self.k_proj(hidden).view(shape).transpose(1, 2), cosine, sine)
        values = self.v_proj(hidden).view(shape).transpose(1, 2)
        # Repeating the few key heads keeps CPU attention on its fast kernel; enable_gqa does not.
        groups = self.heads // self.key_value_heads
        keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """The SwiGLU block of "GLU Variants Improve Transformer"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(batch, length, hidden_size)`` to the same shape."""
        gated = functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        output: Tensor = self.down_proj(gated)
        return output


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and beside a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map ``(batch, length, hidden_size)`` to the same shape."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosine, sine)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    """Token embedding, the layers and the final norm: everything before the logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def layer(self, index: int) -> DecoderLayer:
        """Return one of the layers."""
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 ``(batch, length)`` to ``(batch, length, hidden_size)``."""
        hidden = self.embed_tokens(tokens)
        cosine, sine = rotary_tables(self.config, tokens.shape[1], tokens.device)
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine)
        output: Tensor = self.norm(hidden)
        return output


class LanguageModel(nn.Module):
    """A decoder whose output projection is its token embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 ``(batch, length)`` to logits ``(batch, length, vocab_size)``."""
        return functional.linear(self.model(tokens), self.model.embed_tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats, of int64 ``(batch, length)`` targets.

        Targets of ``IGNORED`` do not count; at least one must not be.
        """
        hidden, targets = self.model(tokens).flatten(0, 1), targets.flatten()
        counted = targets != IGNORED
        if not bool(counted.all()):
            hidden, targets = hidden[counted], targets[counted]
        return chunked_cross_entropy(hidden, self.model.embed_tokens.weight, targets)

    def parameter_count(self) -> int:
        """Return the number of parameters, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy that holds the logits of one chunk of positions at a time.

    The gradient is computed in the forward pass, chunk by chunk, so nothing is recomputed
    ("Liger Kernel: Efficient Triton Kernels for LLM Training").
    """

    chunk_size = 1024

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, float32 ``()``, of hidden ``(n, d)``, weight ``(v, d)``."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = hidden.dtype
        projection = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ChunkedCrossEntropy.chunk_size):
            rows = slice(start, start + ChunkedCrossEntropy.chunk_size)
            states, labels = hidden[rows].to(dtype), targets[rows, None]
            log_probabilities = (states @ projection.T).float().log_softmax(dim=-1)
            total -= log_probabilities.gather(1, labels).sum()
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1.0))
            gradient = gradient.to(dtype)
            hidden_gradient[rows] = gradient @ projection
            weight_gradient += gradient.T @ states
        ctx.save_for_backward(hidden_gradient / len(hidden), weight_gradient / len(hidden))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the gradients of hidden and weight that the forward pass computed."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        (gradient,) = gradients
        return hidden_gradient * gradient, weight_gradient * gradient, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, float32 ``()``, of int64 targets ``(n,)`` in nats."""
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def initialize(model: LanguageModel, seed: int, embedding_deviation: float = 0.02) -> None:
    """Fill the weights in place from one seed; the same seed gives the same weights anywhere.

    Every projection keeps the variance of its input, and the two that write into the residual
    stream are divided by the square root of their number, so depth leaves the scale as it is.
    The tied embedding starts small, so the first logits are near uniform; where it is to start
    large, the final norm takes its scale away again.
    """
    width = model.config.hidden_size
    final_norm = min(1.0, 1 / (embedding_deviation * math.sqrt(width)))
    generator = torch.Generator().manual_seed(seed)
    depth_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.constant_(parameter, final_norm if name == "model.norm.weight" else 1.0)
            continue
        is_embedding = name.endswith("embed_tokens.weight")
        deviation = embedding_deviation if is_embedding else 1 / math.sqrt(parameter.shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation *= depth_scale
        values = torch.randn(parameter.shape, generator=generator) * deviation
        with torch.no_grad():
            parameter.copy_(values)
