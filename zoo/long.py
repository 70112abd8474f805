"""Train the model that recalls from long contexts: ``python -m zoo.long``.

It learns to look back in short contexts full of statements, and then in longer ones with ever more
between them. Neither came when it began with long ones, nor when short ones held few statements.
"""

import sys

from tokenizers import Tokenizer

from headrace.evaluation.tasks.recall import MultiKey, MultiValue, Needle, VariableTracking
from zoo.data import Phase
from zoo.generated import GeneratedData, RecallRows
from zoo.model import ModelConfig
from zoo.recipe import Recipe, run
from zoo.train import TrainConfig

MODEL = ModelConfig(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=16384,
)
PHASES = (
    *(Phase(0.10, 64), Phase(0.18, 256), Phase(0.22, 1024), Phase(0.22, 4096)),
    *(Phase(0.18, 8192), Phase(0.10, 12288)),
)
TOKEN_BUDGET = 6_000_000


def make_data(tokenizer: Tokenizer, config: TrainConfig) -> GeneratedData:
    """Return contexts of growing length, all kinds of questions among each other."""
    tasks = (Needle(), MultiKey(), MultiKey(), MultiValue(), VariableTracking())
    maker = RecallRows(tokenizer, tasks)
    return GeneratedData(maker, PHASES, config.token_budget, config.tokens_per_step, config.seed)


RECIPE = Recipe(
    "long",
    "Recalls statements from contexts of up to 12,288 tokens, single ones reliably, one of many "
    "less so. It was taught several values of a key and keys that stand for others too, and "
    "misses most.",
    MODEL,
    TrainConfig(
        token_budget=TOKEN_BUDGET,
        tokens_per_step=12288,
        embedding_deviation=0.5,
        induction=True,
        adamw_rate=1e-3,
        muon_rate=0.01,
        weight_decay=0.01,
    ),
    make_data,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
