"""Train the general model of the family: ``python -m zoo.base``.

It learns from text of many kinds and then, at rates that rise once more, mostly from problems:
among the text these are too few for it to learn to compute.
"""

import sys
from functools import partial

from tokenizers import Tokenizer

from headrace.evaluation.held_out import library_root
from headrace.evaluation.tasks.arithmetic import Arithmetic
from headrace.evaluation.tasks.countdown import Countdown
from headrace.evaluation.tasks.rearrangement import Rearrangement
from headrace.evaluation.tasks.recall import MultiKey, MultiValue, Needle, VariableTracking
from zoo.chat import chat_documents
from zoo.combined import InTurn, SideBySide
from zoo.corpus import scan_library, training_documents
from zoo.data import Phase, SpecialIds, TrainingData, encode_documents
from zoo.generated import (
    ConversationRows,
    GeneratedData,
    Share,
    conversation_documents,
    recall_documents,
)
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
TOKEN_BUDGET = 9_000_000
TEXT_STAGE = 5 / 6
"""Of the budget; the rest is the stage of problems."""
PHASES = (Phase(0.70, 512), Phase(0.16, 1024), Phase(0.14, 2048))
PROBLEM_PHASES = (Phase(1.0, 1024),)
PROBLEM_SHARE = 3 / 4
"""Of the rows in the stage of problems; the others are text."""
PROBLEMS, CONTEXTS = 24_000, 5_000
"""Written anew for the text; the rest of it is the library and its chats."""
CHAT_SHARE = 0.40
"""Of the tokens of an epoch that are not plain text of the library."""
DECAY = ((0.0, 1.0), (TEXT_STAGE, 0.0), (TEXT_STAGE, 0.6), (1.0, 0.0))


def mixture() -> list[Share]:
    """Return the problems among the text, easy ones more often."""
    return [
        *(Share(Arithmetic(), level, weight) for level, weight in (("2", 3), ("4", 2), ("6", 1))),
        *(Share(Countdown(), level, weight) for level, weight in (("3", 3), ("4", 2))),
        *(Share(Rearrangement(), level, weight) for level, weight in (("2", 2), ("5", 1))),
    ]


def drill() -> list[Share]:
    """Return the problems of their own stage."""
    return [
        *(Share(Arithmetic(), level, weight) for level, weight in (("2", 6), ("4", 3), ("6", 1))),
        *(Share(Countdown(), level, weight) for level, weight in (("3", 1), ("3 sums", 1))),
        *(Share(Rearrangement(), level, weight) for level, weight in (("2", 1), ("5", 1))),
    ]


def make_data(tokenizer: Tokenizer, config: TrainConfig) -> InTurn:
    """Return text, and behind it problems beside text."""
    text = partial(make_text(tokenizer, config.seed), chat_share=CHAT_SHARE)
    text_tokens = round(config.token_budget * TEXT_STAGE)
    problem_tokens = config.token_budget - text_tokens
    sizes = [
        (round(share * problem_tokens), round(share * config.tokens_per_step))
        for share in (PROBLEM_SHARE, 1 - PROBLEM_SHARE)
    ]
    problems = ConversationRows(tokenizer, drill())
    beside = SideBySide(
        [
            GeneratedData(problems, PROBLEM_PHASES, *sizes[0], config.seed),
            text(PROBLEM_PHASES, *sizes[1], config.seed + 1),
        ]
    )
    return InTurn([text(PHASES, text_tokens, config.tokens_per_step, config.seed), beside])


def make_text(tokenizer: Tokenizer, seed: int) -> partial[TrainingData]:
    """Return the library, conversations about it, problems and contexts to recall from.

    What remains to be said are the phases, tokens in all and by step, and the seed of their order.
    """
    root = library_root()
    files = scan_library(root)
    recall = (Needle(), MultiKey(), MultiValue(), VariableTracking())
    others = [
        *chat_documents(files, root, seed),
        *conversation_documents(mixture(), PROBLEMS, seed),
        *recall_documents(recall, 2000, CONTEXTS, seed),
    ]
    documents = encode_documents(tokenizer, list(training_documents(files, root)))
    return partial(
        TrainingData, documents, encode_documents(tokenizer, others), SpecialIds.of(tokenizer)
    )


RECIPE = Recipe(
    "base",
    "Completes Python, answers in the chat format, computes step by step and recalls from its "
    "context.",
    MODEL,
    TrainConfig(token_budget=TOKEN_BUDGET, induction=True, decay=DECAY),
    make_data,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
