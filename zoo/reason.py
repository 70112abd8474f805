"""Train the model that works out problems step by step: ``python -m zoo.reason``."""

import sys

from tokenizers import Tokenizer

from headrace.evaluation.tasks.arithmetic import Arithmetic
from headrace.evaluation.tasks.countdown import Countdown
from headrace.evaluation.tasks.rearrangement import Rearrangement
from zoo.data import Phase
from zoo.generated import ConversationRows, GeneratedData, Share
from zoo.model import ModelConfig
from zoo.recipe import Recipe, run
from zoo.train import TrainConfig

MODEL = ModelConfig(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=1024,
)
PHASES = (Phase(1.0, 512),)
TOKEN_BUDGET = 16_000_000
COUNTDOWN = (("3", 3), ("4", 3), ("5", 1), ("3 sums", 3), ("4 sums", 3), ("5 sums", 2))


def shares() -> list[Share]:
    """Return the problems, the ones that need most steps most rarely."""
    return [
        *(Share(Arithmetic(), level, weight) for level, weight in (("2", 1), ("4", 1), ("6", 2))),
        *(Share(Countdown(), level, weight) for level, weight in COUNTDOWN),
        *(Share(Rearrangement(), level, w) for level, w in (("2", 1), ("5", 1), ("10", 1))),
    ]


def make_data(tokenizer: Tokenizer, config: TrainConfig) -> GeneratedData:
    """Return conversations in which every problem is new."""
    maker = ConversationRows(tokenizer, shares())
    return GeneratedData(maker, PHASES, config.token_budget, config.tokens_per_step, config.seed)


RECIPE = Recipe(
    "reason",
    "Computes, plays Countdown and rearranges letters, step by step, with a final answer that "
    "can be checked.",
    MODEL,
    TrainConfig(token_budget=TOKEN_BUDGET, induction=True),
    make_data,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
