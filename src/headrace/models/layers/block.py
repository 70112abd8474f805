"""How mixers and feed-forward layers are put into the residual stream."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from headrace.models.base import AttentionContext, DecoderLayer
from headrace.models.layers.feed_forward import FeedForward
from headrace.models.layers.normalization import LayerNorm
from headrace.ops.linear import RMSNorm
from headrace.ops.table import Ops


class Mixer(Protocol):
    """Exchange between the tokens of a sequence."""

    def __call__(
        self,
        x: Tensor,
        context: AttentionContext,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``norm(x)`` mixed, ``[T, hidden]``, and added to ``residual``."""


class PreNormBlock(DecoderLayer):
    """Each half behind an RMS norm and added to the stream, as in Llama."""

    def __init__(
        self, mixer: Mixer, mixer_norm: RMSNorm, feed: FeedForward, feed_norm: RMSNorm
    ) -> None:
        self._mixer, self._mixer_norm = mixer, mixer_norm
        self._feed, self._feed_norm = feed, feed_norm
        self.gated = feed.gated

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        return self._mixer(hidden, context, norm=self._mixer_norm, residual=hidden)

    def feed(self, hidden: Tensor) -> Tensor:
        return self._feed(hidden, norm=self._feed_norm, residual=hidden)


class SandwichBlock(DecoderLayer):
    """A norm before each half and one behind it, as in Gemma 2."""

    def __init__(
        self,
        mixer: Mixer,
        mixer_norms: tuple[RMSNorm, RMSNorm],
        feed: FeedForward,
        feed_norms: tuple[RMSNorm, RMSNorm],
        ops: Ops,
    ) -> None:
        self._mixer, self._mixer_norms = mixer, mixer_norms
        self._feed, self._feed_norms, self._ops = feed, feed_norms, ops
        self.gated = feed.gated

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        before, behind = self._mixer_norms
        out = self._mixer(hidden, context, norm=before)
        return hidden + self._ops.rms_norm(out, behind.weight, behind.eps)

    def feed(self, hidden: Tensor) -> Tensor:
        before, behind = self._feed_norms
        out = self._feed(hidden, norm=before)
        return hidden + self._ops.rms_norm(out, behind.weight, behind.eps)


class LayerNormBlock(DecoderLayer):
    """Each half behind a layer norm and added to the stream, as in GPT-2.

    ``parallel``: both halves read the same stream, as in GPT-J and GPT-NeoX.
    """

    def __init__(
        self,
        mixer: Mixer,
        mixer_norm: LayerNorm,
        feed: FeedForward,
        feed_norm: LayerNorm,
        *,
        parallel: bool = False,
    ) -> None:
        self._mixer, self._mixer_norm = mixer, mixer_norm
        self._feed, self._feed_norm, self._parallel = feed, feed_norm, parallel

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        mixed = self._mixer(self._mixer_norm(hidden), context, residual=hidden)
        return self._feed(self._feed_norm(hidden), residual=mixed) if self._parallel else mixed

    def feed(self, hidden: Tensor) -> Tensor:
        if self._parallel:
            return hidden
        return self._feed(self._feed_norm(hidden), residual=hidden)


class PostNormBlock(DecoderLayer):
    """Each half added to the stream, and a layer norm behind it, as in BERT."""

    def __init__(
        self, mixer: Mixer, mixer_norm: LayerNorm, feed: FeedForward, feed_norm: LayerNorm
    ) -> None:
        self._mixer, self._mixer_norm = mixer, mixer_norm
        self._feed, self._feed_norm = feed, feed_norm

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        return self._mixer_norm(self._mixer(hidden, context, residual=hidden))

    def feed(self, hidden: Tensor) -> Tensor:
        return self._feed_norm(self._feed(hidden, residual=hidden))


class MixerBlock(DecoderLayer):
    """A mixer alone, as in Mamba."""

    def __init__(self, mixer: Mixer, norm: RMSNorm) -> None:
        self._mixer, self._norm = mixer, norm

    def mix(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        return self._mixer(hidden, context, norm=self._norm, residual=hidden)

    def feed(self, hidden: Tensor) -> Tensor:
        return hidden
