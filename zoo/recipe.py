"""What the recipes of the family share: a command that trains, resumes, exports and reports."""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from zoo.card import hardware
from zoo.curve import draw_learning_curve
from zoo.data import Batches
from zoo.export import export_model, load_model, write_json
from zoo.model import ModelConfig
from zoo.tokenizer import load_tokenizer
from zoo.train import TrainConfig, Trainer

TOKENIZER = Path(__file__).parents[1] / "src" / "headrace" / "assets" / "embedded"
MODELS = Path(__file__).parent / "models"
CACHE = Path.home() / ".cache" / "headrace" / "zoo"

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {title}

{about}

{parameters:,} parameters: {layers} layers, width {width}, {heads} query heads and {groups} \
key-value heads of {head_dim},
context {context:,} tokens, the tokenizer of the embedded model.

Trained from {origin} on {tokens:,} tokens in {minutes:.0f} minutes on {hardware};
mean training loss of the last 50 steps {loss:.3f} nats a token. The command is
`{command}`; `python -m zoo.page` writes its scores to `docs/zoo.md`.

![learning curve](learning-curve.svg)
"""


@dataclass(frozen=True)
class Recipe:
    """One member of the family.

    Args:
        name: of its module, its directory and its cache.
        about: a paragraph for its card.
        make_data: the batches of a run.
        start: name of the member whose weights it begins with, of the same shape.
    """

    name: str
    about: str
    model: ModelConfig
    training: TrainConfig
    make_data: Callable[[Tokenizer, TrainConfig], Batches]
    start: str | None = None


def parse_arguments(recipe: Recipe, arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with a message on a mistake."""
    parser = argparse.ArgumentParser(prog=f"python -m zoo.{recipe.name}", description=recipe.about)
    parser.add_argument(
        "--budget", type=int, default=recipe.training.token_budget, help="tokens to train"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; fewer where cores are shared")
    parser.add_argument("--seed", type=int, default=recipe.training.seed)
    parser.add_argument("--output", type=Path, default=MODELS / recipe.name)
    parser.add_argument("--cache", type=Path, default=CACHE / recipe.name)
    parser.add_argument("--fresh", action="store_true", help="discard the checkpoint")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint as it is")
    return parser.parse_args(arguments)


def run(recipe: Recipe, arguments: list[str] | None = None) -> int:
    """Run a recipe; return the exit status, 130 if a signal stopped the training."""
    options = parse_arguments(recipe, arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.fresh:
        shutil.rmtree(options.cache, ignore_errors=True)
    tokenizer = load_tokenizer(TOKENIZER / "tokenizer.json")
    config = replace(recipe.training, token_budget=options.budget, seed=options.seed)
    start = None if recipe.start is None else load_model(MODELS / recipe.start).state_dict()
    trainer = Trainer(
        recipe.model,
        config,
        recipe.make_data(tokenizer, config),
        options.cache,
        torch.device(options.device),
        start,
    )
    if not options.export_only:
        trainer.run()
        if not trainer.is_finished:
            print(f"stopped after step {trainer.step}; the same command goes on from there")
            return 130
    export(recipe, trainer, tokenizer, options.output)
    return 0


def export(recipe: Recipe, trainer: Trainer, tokenizer: Tokenizer, output: Path) -> None:
    """Write the model as it stands, its card, its facts and its learning curve."""
    export_model(trainer.model, tokenizer, output)
    draw_learning_curve(trainer.directory / "loss.jsonl", output / "learning-curve.svg")
    facts = training_facts(trainer)
    write_json(facts, output / "training.json")
    config = recipe.model
    card = CARD.format(
        title=f"Headrace {recipe.name}",
        about=recipe.about,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        context=config.max_position_embeddings,
        origin=describe_origin(recipe),
        command=command_of(recipe, trainer.config.token_budget),
        **facts,
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps(facts))


def command_of(recipe: Recipe, token_budget: int) -> str:
    """What trains the member on so many tokens."""
    usual = token_budget == recipe.training.token_budget
    return f"python -m zoo.{recipe.name}" + ("" if usual else f" --budget {token_budget}")


def describe_origin(recipe: Recipe) -> str:
    """What training began with."""
    if recipe.start is not None:
        return f"the weights of {recipe.start}"
    if recipe.training.induction:
        return "random weights and heads that look back (`zoo/induction.py`)"
    return "random weights"


def training_facts(trainer: Trainer) -> dict[str, Any]:
    """What the documentation says of a run."""
    return {
        "parameters": trainer.model.parameter_count(),
        "tokens": trainer.step * trainer.config.tokens_per_step,
        "minutes": round(trainer.seconds / 60, 1),
        "hardware": hardware(),
        "loss": round(trainer.mean_loss(), 4),
    }
