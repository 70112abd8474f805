"""Random prompts, and the options that shape them."""

from __future__ import annotations

import random
from typing import Annotated

import typer

FIRST_ID = 300
"""Most vocabularies have their special tokens and single bytes below, and merges from here on."""

InputLength = Annotated[int, typer.Option("--input-len", min=1, help="Tokens of each prompt.")]
OutputLength = Annotated[
    int, typer.Option("--output-len", min=1, help="Tokens to generate for each prompt.")
]


def random_prompts(
    count: int, length: int, vocab_size: int, *, shared: int = 0, seed: int = 0
) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids, the first ``shared`` of them the same in all."""
    rng = random.Random(seed)
    low = min(FIRST_ID, vocab_size // 2)

    def draw(number: int) -> list[int]:
        return [rng.randrange(low, vocab_size) for _ in range(number)]

    prefix = draw(min(shared, length))
    return [prefix + draw(length - len(prefix)) for _ in range(count)]
