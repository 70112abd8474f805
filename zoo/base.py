"""Train the general model of the family: ``python -m zoo.base``."""

import sys

from tokenizers import Tokenizer

from headrace.evaluation.held_out import library_root
from headrace.evaluation.tasks.arithmetic import Arithmetic
from headrace.evaluation.tasks.countdown import Countdown
from headrace.evaluation.tasks.rearrangement import Rearrangement
from headrace.evaluation.tasks.recall import MultiKey, MultiValue, Needle, VariableTracking
from zoo.chat import chat_documents
from zoo.corpus import scan_library, training_documents
from zoo.data import Phase, SpecialIds, TrainingData, encode_documents
from zoo.generated import Share, conversation_documents, recall_documents
from zoo.model import ModelConfig
from zoo.recipe import Recipe, run
from zoo.train import TrainConfig

MODEL = ModelConfig(
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=768,
)
PHASES = (Phase(0.70, 512), Phase(0.16, 1024), Phase(0.14, 2048))
TOKEN_BUDGET = 10_000_000
PROBLEMS, CONTEXTS = 24_000, 5_000
"""Written anew for the mixture; the rest of it is the library's text and its chats."""
CHAT_SHARE = 0.40
"""Of the tokens of an epoch that are not plain text of the library."""


def mixture() -> list[Share]:
    """Return the problems of the mixture, easy ones more often."""
    return [
        *(Share(Arithmetic(), level, weight) for level, weight in (("2", 3), ("4", 2), ("6", 1))),
        *(Share(Countdown(), level, weight) for level, weight in (("3", 3), ("4", 2))),
        *(Share(Rearrangement(), level, weight) for level, weight in (("2", 2), ("5", 1))),
    ]


def make_data(tokenizer: Tokenizer, config: TrainConfig) -> TrainingData:
    """Return the library, conversations about it, problems and contexts to recall from."""
    root = library_root()
    files = scan_library(root)
    recall = (Needle(), MultiKey(), MultiValue(), VariableTracking())
    others = [
        *chat_documents(files, root, config.seed),
        *conversation_documents(mixture(), PROBLEMS, config.seed),
        *recall_documents(recall, 2000, CONTEXTS, config.seed),
    ]
    return TrainingData(
        encode_documents(tokenizer, list(training_documents(files, root))),
        encode_documents(tokenizer, others),
        SpecialIds.of(tokenizer),
        PHASES,
        config.token_budget,
        config.tokens_per_step,
        config.seed,
        chat_share=CHAT_SHARE,
    )


RECIPE = Recipe(
    "base",
    "Completes Python, answers in the chat format, works out small problems step by step and "
    "recalls from its context.",
    MODEL,
    TrainConfig(token_budget=TOKEN_BUDGET, induction=True),
    make_data,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
