"""What each weight format costs in quality: the embedded model on modules it was not trained on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from harness import Result, progress
from torch import Tensor

from headrace.config import EngineConfig
from headrace.loading import embedded_model, quantize_model
from headrace.model_files import open_model
from headrace.models.base import DecoderModel, find_architecture
from headrace.models.layers.rotary import RotaryEmbedding
from headrace.ops.device import Device
from headrace.ops.packed_weight import FORMATS, WeightFormat
from headrace.ops.paged import AttentionSpec
from headrace.ops.recurrent import RowSpans
from headrace.ops.reference import rotate
from headrace.ops.table import make_ops
from headrace.text.tokenizer import Tokenizer
from headrace.weights.formats import AUTO, WeightPlan
from headrace.weights.loader import make_loader

MODULES = (
    *("bisect", "calendar", "csv", "fnmatch", "fractions", "graphlib", "heapq", "plistlib"),
    *("queue", "sched", "shlex", "statistics", "textwrap"),
)
"""Of the standard library, held out from the training of the embedded model."""

WINDOW = 1024
"""Tokens that are seen together."""

TOKENS = 16 * WINDOW
HEADS = (("w4a8-g32", "bf16"), ("w4a8-g32", "w4a8-g32"), ("w4a8-g32", "w4a8-g32-zp"))
"""Formats of the layers and the head, beside each format with its automatic head."""


class WholeText:
    """An ``AttentionContext`` without a cache: a text of ``length`` tokens attends to itself, in
    fp32.
    """

    def __init__(self, length: int) -> None:
        self.rows = RowSpans([length], [0])
        self._positions = torch.arange(length)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryEmbedding,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See ``AttentionContext``."""
        cos, sin = self.angles(rotary)
        turned = rotate(q.float(), cos, sin), rotate(k.float(), cos, sin), v.float()
        query, key, value = (x.transpose(0, 1) for x in turned)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=spec.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1).to(q.dtype)

    def angles(self, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """See ``AttentionContext``."""
        return rotary.cos_sin(self._positions, torch.float32)

    def states(self, layer: int) -> dict[str, Tensor]:
        """See ``AttentionContext``; the embedded model has none."""
        return {}


def read_windows(tokenizer: Tokenizer, count: int) -> list[Tensor]:
    """The first ``count`` tokens of the modules, in windows."""
    ids: list[int] = []
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        ids += tokenizer.encode(Path(spec.origin).read_text("utf-8"))[: 2 * WINDOW]
    return list(torch.tensor(ids[:count]).split(WINDOW))


def load(path: Path, dtype: str = "float32") -> DecoderModel:
    """A model, by default in fp32, so that nothing but the formats' own rounding shows."""
    checkpoint = open_model(path).checkpoint
    ops = make_ops(Device("cpu", WINDOW, frozenset()), dtype)
    architecture = find_architecture(checkpoint.config)
    loader = make_loader(checkpoint, architecture.load_map, ops, WeightPlan())
    return architecture(checkpoint.config, loader, ops)


def log_probabilities(model: DecoderModel, window: Tensor) -> Tensor:
    """``[T, vocab]``, of the token after each."""
    hidden = model.embed(window, torch.arange(len(window)))
    context = WholeText(len(window))
    for layer in model.layers:
        hidden = layer.feed(layer.mix(hidden, context))
    return torch.log_softmax(model.head(hidden), -1)


def surprise(found: Iterable[Tensor], windows: list[Tensor]) -> float:
    """Mean negative log-likelihood of the tokens."""
    pairs = zip(found, windows, strict=True)
    losses = [F.nll_loss(found[:-1], window[1:], reduction="sum") for found, window in pairs]
    return float(sum(losses)) / sum(len(window) - 1 for window in windows)


@torch.inference_mode()
def measure(rounds: int, quick: bool) -> Result:
    """Compare every format with the stored weights; the results have no spread to repeat for."""
    source = embedded_model()
    windows = read_windows(Tokenizer(source), WINDOW if quick else TOKENS)
    model = load(source)
    plain = [log_probabilities(model, window) for window in windows]
    base = surprise(plain, windows)
    rows: list[list[object]] = []
    for body, head in (*((format.name, AUTO) for format in FORMATS), *HEADS):
        progress(f"{body}, head {head}")
        with TemporaryDirectory() as folder:
            config = EngineConfig(str(source), weights=body, head_weights=head)
            packed = quantize_model(config, Path(folder) / "packed")
            model = load(Path(folder) / "packed")
            found = [log_probabilities(model, window) for window in windows]
        pairs = zip(plain, found, strict=True)
        divergences = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        rows.append(
            [
                body,
                packed.head_format,
                WeightFormat.parse(body).bits_per_weight,
                packed.num_bytes / 2**20,
                divergences.mean().item(),
                divergences.quantile(0.99).item(),
                100 * (math.exp(surprise(found, windows) - base) - 1),
            ]
        )
    tokens = sum(map(len, windows))
    return Result(
        f"embedded model, {tokens:,} held-out tokens: KL divergence to the bf16 weights, in nats",
        [
            *("layers", "head", "bits per weight", "all weights, MiB"),
            *("mean KL", "99 % KL", "perplexity change, %"),
        ],
        rows,
        {"perplexity": math.exp(base), "tokens": tokens},
    )
