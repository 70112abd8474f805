"""What transformers computes for the tokens that an engine fed and sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from headrace import LLM, RequestOutput, SamplingParams
from tests.support.architectures import CONTEXT
from tests.support.checkpoints import VOCAB, make_model, save_checkpoint
from tests.support.logits import LogitsRecorder

TOLERANCE = 1e-4
"""Largest absolute difference of logits in fp32."""


@dataclass(frozen=True)
class Expected:
    """A model of transformers and the checkpoint written from it."""

    model: Any
    directory: Path

    def logits(self, token_ids: list[int]) -> Tensor:
        """``[len(token_ids), vocab]`` of one row without a cache."""
        with torch.inference_mode():
            return self.model(torch.tensor([token_ids])).logits[0].float()

    def sampled_logits(self, output: RequestOutput, index: int = 0) -> Tensor:
        """``[tokens, vocab]``: from what each token of a completion should have been drawn."""
        prompt, tokens = output.prompt_token_ids, output.outputs[index].token_ids
        return self.logits([*prompt, *tokens])[len(prompt) - 1 : -1]

    def cache_bytes(self, slots: int) -> int:
        """Size of an arena for so many tokens in fp32."""
        config = self.model.config
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return slots * config.num_hidden_layers * 2 * config.num_key_value_heads * width * 4


DEEP = 6
"""Layers of a model in which rows leave, or tokens are dropped, more than once."""


def save_deep(directory: Path) -> Expected:
    """A model of ``DEEP`` layers, written to a directory."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=DEEP,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    model = make_model(config)
    return Expected(model, save_checkpoint(model, directory))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(VOCAB, (length,), generator=generator).tolist()


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """Greedy sampling of exactly ``max_tokens`` tokens."""
    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
    )


def load(directory: Path, **options: Any) -> LLM:
    """An engine in fp32. One thread: the models are too small for more."""
    return LLM(str(directory), **{"dtype": "float32", "num_threads": 1, **options})


def difference(expected: Expected, recorder: LogitsRecorder, output: RequestOutput) -> float:
    """Largest absolute difference of logits over all completions and tokens of a request."""
    assert output.error is None and all(c.token_ids for c in output.outputs)
    return max(
        (recorder.logits(output, i) - expected.sampled_logits(output, i)).abs().max().item()
        for i in range(len(output.outputs))
    )


def full_prompt_logprobs(output: RequestOutput) -> Tensor:
    """``[tokens - 1, vocab]``, of a request with ``prompt_logprobs=VOCAB``."""
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    rows = []
    for entry in output.prompt_logprobs[1:]:
        assert entry is not None and len(entry) == VOCAB
        rows.append([entry[token].logprob for token in range(VOCAB)])
    return torch.tensor(rows)
