"""Train the small model that proposes tokens for base: ``python -m zoo.draft``."""

import sys

from zoo.base import DECAY, TOKEN_BUDGET, make_data
from zoo.model import ModelConfig
from zoo.recipe import Recipe, run
from zoo.train import TrainConfig

RECIPE = Recipe(
    "draft",
    "A tenth of base, trained on the same data: it proposes what base then checks.",
    ModelConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=256,
    ),
    TrainConfig(token_budget=TOKEN_BUDGET, induction=True, decay=DECAY),
    make_data,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
