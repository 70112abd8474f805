"""How well a model predicts text, and how far its predictions are from another configuration's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.contracts.outputs import Logprob
from headrace.contracts.sampling import SamplingParams
from headrace.evaluation.held_out import held_out_texts
from headrace.evaluation.statistics import Estimate, mean_estimate
from headrace.llm import LLM

TOP = 64
"""Alternatives of each token that two configurations are compared by."""

Distribution = Mapping[int, Logprob]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read together, of which those from ``first`` on count.

    Args:
        bytes: of text that the counted tokens stand for.
    """

    token_ids: list[int]
    first: int
    bytes: int

    @property
    def counted(self) -> list[int]:
        """The tokens that count."""
        return self.token_ids[self.first :]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model says of a window.

    Args:
        loss: negative log-likelihood of the counted tokens, in nats, in all.
        distributions: of each counted token, the likeliest and itself; empty unless asked for.
    """

    loss: float
    distributions: list[Distribution]


def text_windows(llm: LLM, length: int, tokens: int) -> list[Window]:
    """Windows of the held-out texts that advance by half of ``length``, up to ``tokens`` counted.

    The second half of each counts, so every token that counts has at least half a window before
    it. All texts take part equally: of each the beginning is taken.
    """
    texts = held_out_texts()
    half = length // 2
    share = half + max(half, tokens // len(texts))
    windows: list[Window] = []
    left = tokens
    for text in texts.values():
        ids = llm.tokenizer.encode(text)[:share]
        for start in range(0, len(ids) - half, half):
            if left <= 0:
                return windows
            part = ids[start : start + length]
            counted = llm.tokenizer.decode(part[half:], skip_special_tokens=False)
            windows.append(Window(part, half, len(counted.encode())))
            left -= len(part) - half
    return windows


def score_windows(llm: LLM, windows: Sequence[Window], top: int = 0) -> list[Scored]:
    """What the model says of every window; with ``top`` alternatives of each token.

    Raises:
        InvalidRequestError: a method of the configuration gives no log-probabilities of prompts.
        RuntimeError: a request failed.
    """
    params = SamplingParams(max_tokens=0, prompt_logprobs=top, temperature=0.0)
    # What counts comes in a later step than what it follows, which has met the KV policy by then.
    prompts = [{"segments": [w.token_ids[: w.first], w.counted]} for w in windows]
    outputs = llm.generate(prompts, params)
    scored = []
    for window, output in zip(windows, outputs, strict=True):
        if output.error is not None or output.prompt_logprobs is None:
            raise RuntimeError(f"perplexity: {output.error}")
        entries = [entry or {} for entry in output.prompt_logprobs[window.first :]]
        pairs = zip(window.counted, entries, strict=True)
        loss = -sum(entry[token].logprob for token, entry in pairs)
        scored.append(Scored(loss, list(entries) if top else []))
    return scored


def loss_estimate(windows: Sequence[Window], scored: Sequence[Scored]) -> Estimate:
    """Mean loss in nats a token."""
    counts = [float(len(window.counted)) for window in windows]
    losses = [each.loss / count for each, count in zip(scored, counts, strict=True)]
    return mean_estimate(losses, counts)


def bits_per_byte(windows: Sequence[Window], scored: Sequence[Scored]) -> float:
    """Loss in bits over the bytes of the text."""
    return sum(s.loss for s in scored) / math.log(2) / sum(w.bytes for w in windows)


def divergences(reference: Sequence[Scored], other: Sequence[Scored]) -> list[float]:
    """Mean KL divergence of the other's predictions from the reference's, for every window."""
    means = []
    for first, second in zip(reference, other, strict=True):
        pairs = list(zip(first.distributions, second.distributions, strict=True))
        means.append(sum(divergence(p, q) for p, q in pairs) / len(pairs))
    return means


def divergence(p: Distribution, q: Distribution) -> float:
    """KL(p || q) in nats, with all tokens that one of them does not list taken as one.

    By the data processing inequality it is a lower bound of the divergence over the vocabulary.
    """
    total, p_rest, q_rest = 0.0, 1.0, 1.0
    for token, entry in p.items():
        if token in q:
            share = math.exp(entry.logprob)
            total += share * (entry.logprob - q[token].logprob)
            p_rest -= share
            q_rest -= math.exp(q[token].logprob)
    if p_rest > 1e-9:
        total += p_rest * math.log(p_rest / max(q_rest, 1e-9))
    return max(0.0, total)
