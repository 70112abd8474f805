"""Train and export the model that ships inside the package: ``python -m zoo.embedded``."""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer

from headrace.evaluation.held_out import library_root
from zoo.card import Run, render_card
from zoo.chat import chat_documents
from zoo.corpus import (
    MANIFEST_PATH,
    SourceFile,
    differences,
    held_out_texts,
    read_manifest,
    repeated_line_share,
    scan_library,
    training_documents,
    write_manifest,
)
from zoo.data import Phase, SpecialIds, TrainingData, encode_documents
from zoo.evaluate import complete, evaluate, print_table
from zoo.export import export_model, load_model
from zoo.model import ModelConfig
from zoo.tokenizer import load_tokenizer, train_tokenizer
from zoo.train import TrainConfig, Trainer

OUTPUT = Path(__file__).parents[1] / "src" / "headrace" / "assets" / "embedded"
CACHE = Path.home() / ".cache" / "headrace" / "zoo" / "embedded"
PHASES = (Phase(0.76, 512), Phase(0.14, 1024), Phase(0.10, 2048))
# The rate falls slowly at first and ever faster, to end at zero under the longest context.
DECAY = ((0.0, 1.0), (0.76, 0.4799), (0.85, 0.3743), (1.0, 0.0))
TOKEN_BUDGET = 11_640_000
SAMPLE_PROMPTS = (
    "def fibonacci(n):",
    "<|user|>\nWhat does shutil.copytree do?<|end|>\n<|assistant|>\n",
    "<|user|>\nWhat does textwrap.wrap do?<|end|>\n<|assistant|>\n",
)
SAMPLE_LENGTH = 100
SAMPLE_STOPS = ("<|endoftext|>", "<|end|>")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with a message on a mistake."""
    parser = argparse.ArgumentParser(prog="python -m zoo.embedded", description=__doc__)
    parser.add_argument("--budget-tokens", type=int, default=TOKEN_BUDGET, help="tokens to train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; fewer where cores are shared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory of the export")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory of the checkpoint")
    parser.add_argument("--fresh", action="store_true", help="discard the checkpoint")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint as it is")
    parser.add_argument("--rebuild-manifest", action="store_true", help="accept this library")
    parser.add_argument("--rebuild-tokenizer", action="store_true", help="learn the merges anew")
    return parser.parse_args(arguments)


def checked_files(rebuild: bool) -> list[SourceFile]:
    """Return the files of the running library and warn of those unlike the manifest."""
    files = scan_library(library_root())
    if rebuild:
        write_manifest(files)
    lines = differences(read_manifest(), files)
    if lines:
        version = ".".join(map(str, sys.version_info[:3]))
        print(f"warning: the library of Python {version} is not that of {MANIFEST_PATH.name}:")
        print("\n".join(f"  {line}" for line in lines))
        print("the results will differ; --rebuild-manifest accepts these files")
    return files


def prepare_tokenizer(files: list[SourceFile], output: Path, rebuild: bool) -> Tokenizer:
    """Return the tokenizer already exported, so that it stays fixed, or else learn it."""
    path = output / "tokenizer.json"
    if path.exists() and not rebuild:
        return load_tokenizer(path)
    return train_tokenizer(training_documents(files, library_root()))


def prepare_data(
    files: list[SourceFile], tokenizer: Tokenizer, config: TrainConfig
) -> TrainingData:
    """Read and encode the training split."""
    root = library_root()
    return TrainingData(
        encode_documents(tokenizer, list(training_documents(files, root))),
        encode_documents(tokenizer, chat_documents(files, root, config.seed)),
        SpecialIds.of(tokenizer),
        PHASES,
        config.token_budget,
        config.tokens_per_step,
        config.seed,
    )


def finish(
    trainer: Trainer,
    data: TrainingData,
    files: list[SourceFile],
    tokenizer: Tokenizer,
    output: Path,
) -> None:
    """Export the model as it stands, evaluate what was written and write the card."""
    export_model(trainer.model, tokenizer, output)
    root = library_root()
    model = load_model(output).to(trainer.device)
    context_length = model.config.max_position_embeddings
    evaluation = evaluate(model, tokenizer, held_out_texts(files, root), context_length)
    print_table(evaluation, Console())
    run = Run(
        phases=PHASES,
        steps=trainer.step,
        tokens_per_step=data.tokens_per_step,
        unique_tokens=sum(len(document) + 1 for document in data.documents),
        chat_share=data.chat_share,
        seconds=trainer.seconds,
        train_loss=trainer.mean_loss(),
    )
    samples = {
        prompt: complete(model, tokenizer, prompt, SAMPLE_LENGTH, SAMPLE_STOPS)
        for prompt in SAMPLE_PROMPTS
    }
    repeated = repeated_line_share(files, root)
    count = model.parameter_count()
    card = render_card(model.config, count, files, repeated, run, evaluation, samples)
    (output / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; return the exit status, 130 if a signal stopped the training."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.fresh:
        shutil.rmtree(options.cache, ignore_errors=True)
    files = checked_files(options.rebuild_manifest)
    tokenizer = prepare_tokenizer(files, options.output, options.rebuild_tokenizer)
    config = TrainConfig(token_budget=options.budget_tokens, decay=DECAY, seed=options.seed)
    data = prepare_data(files, tokenizer, config)
    trainer = Trainer(ModelConfig(), config, data, options.cache, torch.device(options.device))
    is_first_export = not (options.output / "model.safetensors").exists()
    if is_first_export and not trainer.is_finished:
        export_model(trainer.model, tokenizer, options.output)
    if options.export_only:
        finish(trainer, data, files, tokenizer, options.output)
        return 0
    trainer.run()
    if not trainer.is_finished:
        print(f"stopped after step {trainer.step}; the same command goes on from there")
        return 130
    finish(trainer, data, files, tokenizer, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
