"""Models that guess for others: badly, well, and perfectly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from headrace import RequestOutput
from headrace.contracts.step import SampleState
from headrace.exec.decoding.drafter import Guess
from headrace.exec.decoding.second_model import SecondModel
from tests.exec.plain_sampling import probabilities
from tests.models.expected import Expected
from tests.support.checkpoints import ALL_CONFIGS, make_model, save_checkpoint


def save_other(directory: Path) -> Path:
    """A model of another architecture with the same tokens, which is hardly ever right."""
    return save_checkpoint(make_model(ALL_CONFIGS["qwen3"](), seed=5), directory)


def save_similar(directory: Path, name: str = "llama3", noise: float = 0.25) -> Path:
    """The configuration's model with noise on its weights, which is sometimes right."""
    model = make_model(ALL_CONFIGS[name]())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise * parameter.std())
    return save_checkpoint(model, directory)


def accepted(outputs: list[RequestOutput]) -> tuple[int, int]:
    """Tokens that were accepted, and tokens that were drafted."""
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    return (
        sum(each.num_accepted_tokens for each in metrics),
        sum(each.num_draft_tokens for each in metrics),
    )


def expected_texts(
    expected: Expected, prompt: list[int], state: SampleState, length: int
) -> Mapping[tuple[int, ...], float]:
    """The probability of each continuation, drawn token by token as ``state`` asks."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for text, share in found.items():
            logits = expected.logits([*prompt, *text])[-1].double().numpy()
            chances = probabilities(logits, state.after(text))
            for token in itertools.compress(range(len(chances)), chances > 0):
                grown[(*text, token)] = share * chances[token]
        found = grown
    return found


def listen(model: SecondModel) -> list[tuple[list[int], Tensor]]:
    """From now on, each text that a second model is asked about, and its logits ``[vocab]``."""
    heard: list[tuple[list[int], Tensor]] = []
    kept = model.next_logits

    def next_logits(guesses: Sequence[Guess]) -> Tensor:
        logits = kept(guesses)
        heard.extend((guess.known, row.clone()) for guess, row in zip(guesses, logits, strict=True))
        return logits

    model.next_logits = next_logits  # type: ignore[method-assign]
    return heard


def largest_difference(directory: Path, heard: list[tuple[list[int], Tensor]]) -> float:
    """Between these logits and what transformers computes for the texts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = 0.0
    with torch.inference_mode():
        for text, logits in heard:
            should = model(torch.tensor([text])).logits[0, -1]
            found = max(found, float((logits - should).abs().max()))
    return found
