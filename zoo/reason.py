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
STEPS_BUDGET, TOKEN_BUDGET = 12_000_000, 7_000_000


def steps() -> list[Share]:
    """Return what it learns steps from, the problems that need most of them most rarely."""
    return [
        *(Share(Arithmetic(), level, weight) for level, weight in (("2", 1), ("4", 2), ("6", 2))),
        *(Share(Countdown(), level, weight) for level, weight in (("3", 2), ("4", 3), ("5", 3))),
        *(Share(Rearrangement(), level, w) for level, w in (("2", 1), ("5", 1), ("10", 1))),
    ]


def shares() -> list[Share]:
    """Return what it goes on with: long chains, and games in which it has to choose."""
    return [
        *(Share(Arithmetic(), level, weight) for level, weight in (("6", 1), ("20", 2))),
        *(Share(Countdown(), level, weight) for level, weight in (("3", 6), ("4", 6), ("5", 2))),
        Share(Rearrangement(), "10", 1),
    ]


def make_steps(tokenizer: Tokenizer, config: TrainConfig) -> GeneratedData:
    """Return conversations in which every problem is new."""
    maker = ConversationRows(tokenizer, steps())
    return GeneratedData(maker, PHASES, config.token_budget, config.tokens_per_step, config.seed)


def make_data(tokenizer: Tokenizer, config: TrainConfig) -> GeneratedData:
    """Return conversations in which every problem is new."""
    maker = ConversationRows(tokenizer, shares())
    return GeneratedData(maker, PHASES, config.token_budget, config.tokens_per_step, config.seed)


STEPS = Recipe(
    "reason-steps",
    "Computes, plays Countdown and rearranges letters, step by step.",
    MODEL,
    TrainConfig(token_budget=STEPS_BUDGET, induction=True),
    make_steps,
)
RECIPE = Recipe(
    "reason",
    "Computes, plays Countdown and rearranges letters, step by step, with a final answer that "
    "can be checked.",
    MODEL,
    TrainConfig(token_budget=TOKEN_BUDGET, adamw_rate=2e-3, muon_rate=0.01),
    make_data,
    before=STEPS,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
