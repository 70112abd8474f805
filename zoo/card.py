"""The model card of the embedded model."""

import math
import os
import sys
from dataclasses import dataclass

import torch

from headrace.evaluation.held_out import HELD_OUT_MODULES
from zoo.corpus import SourceFile, manifest_digest
from zoo.data import Phase
from zoo.evaluate import Evaluation
from zoo.model import ModelConfig

TEMPLATE = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [python, code]
---

# Headrace embedded model

A language model of {parameters:,} parameters, trained from nothing on the source of Python's
standard library. It ships inside the package, so that an engine can be tried, tested and measured
without a download. It completes Python code in the manner of that library and answers short
questions in the style of a docstring. It is far too small to be relied on for either.

## Model

`LlamaForCausalLM`, bfloat16: {layers} layers, width {width}, {heads} query heads and {groups} \
key-value heads of {head_dim},
SwiGLU of {intermediate}, tied embeddings, rotary base {theta:,.0f}, context {context:,} tokens.

The tokenizer is a byte-level BPE of {vocabulary:,} tokens, 64 of them special. It returns any UTF-8
text unchanged and gives every digit a token of its own. No token is put in front of a text; the
training texts are divided by `<|endoftext|>`, and a chat turn ends with `<|end|>`. Files of code
were also written for filling in the middle, in the order `<|fim_prefix|>`, `<|fim_suffix|>`,
`<|fim_middle|>`.

## Data

The standard library of CPython {version} as installed, without its tests and tables of data:
{train_files} files of {train_bytes:,} bytes to train on. `zoo/manifest.json` lists each file with
its digest; the SHA-256 of that list is
`{digest}`.
The pages of `pydoc` topics are read out of their literals. {chat_share:.0%} of the tokens are
questions and answers made from docstrings and signatures of the same files. Nothing else was used.

No training token comes from the held-out modules ({heldout_files} files, {heldout_bytes:,} bytes):
{heldout}.
Of their lines of 30 characters and more, {repeated:.1%} occur word for word in the training files.

The text of the standard library is under the Python Software Foundation License 2.0 (PSF-2.0);
the weights are under the Apache License 2.0.

## Training

{tokens:,} tokens, {epochs:.1f} times the {unique:,} of the training files, in {steps:,} steps at
context lengths of {phases}
tokens; Muon for the matrices of the layers, AdamW for the rest, a linear warm-up and a decay to
zero that steepens towards the end. It took {minutes:.0f} minutes on {hardware}, not all to itself.
The mean training loss of the last 50 steps is {train_loss:.3f} nats a token.

The command is `python -m zoo.embedded`. Repeating it gives an equivalent model; the bits depend on
the processor and on the number of threads.

## Evaluation

Bits per byte of the held-out files: total bits over total bytes of UTF-8, in windows of {context:,}
tokens that advance by half. The size of the weights is not counted, nor is that of a compressor.
The model sees each file alone, so the first column is the one to compare it with.

| method | each file alone | all files in one stream |
| --- | ---: | ---: |
| this model | **{model:.3f}** | |
| `xz -9` | {xz:.3f} | {joined_xz:.3f} |
| `gzip -9` | {gzip:.3f} | {joined_gzip:.3f} |

The held-out loss is {heldout_loss:.3f} nats a token, over {heldout_tokens:,} tokens.
`python -m zoo.evaluate DIRECTORY` computes the table again, file by file.

## Sample

Greedy continuations by the exported weights:

{samples}
"""


@dataclass(frozen=True)
class Run:
    """What the card says of the training: its extent, its time and where its loss ended."""

    phases: tuple[Phase, ...]
    steps: int
    tokens_per_step: int
    unique_tokens: int
    chat_share: float
    seconds: float
    train_loss: float


def hardware() -> str:
    """Describe the processor or accelerator without naming the machine."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    capability = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    return f"{os.cpu_count()} CPU cores ({capability})"


def describe_phases(phases: tuple[Phase, ...]) -> str:
    """Return the context lengths with the share of the tokens that each was given."""
    return ", ".join(f"{phase.context_length:,} ({phase.share:.0%})" for phase in phases)


def sample_block(prompt: str, completion: str) -> str:
    """Return one sample as a fenced block, prompt and continuation as one text."""
    # A longer fence, as a sample may hold one of three.
    return f"````text\n{prompt}{completion.rstrip()}\n````"


def split_size(files: list[SourceFile], split: str) -> tuple[int, int]:
    """Return the number of files and of bytes of one split."""
    sizes = [file.bytes for file in files if file.split == split]
    return len(sizes), sum(sizes)


def render_card(
    config: ModelConfig,
    parameters: int,
    files: list[SourceFile],
    repeated: float,
    run: Run,
    evaluation: Evaluation,
    samples: dict[str, str],
) -> str:
    """Return the card; ``samples`` gives the continuation of each prompt."""
    train_files, train_bytes = split_size(files, "train")
    heldout_files, heldout_bytes = split_size(files, "heldout")
    tokens = run.steps * run.tokens_per_step
    heldout_bits = evaluation.model * evaluation.total_bytes
    return TEMPLATE.format(
        parameters=parameters,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        theta=config.rope_theta,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        version=".".join(map(str, sys.version_info[:3])),
        train_files=train_files,
        train_bytes=train_bytes,
        digest=manifest_digest(),
        chat_share=run.chat_share,
        heldout_files=heldout_files,
        heldout_bytes=heldout_bytes,
        heldout=", ".join(f"`{module}`" for module in HELD_OUT_MODULES),
        repeated=repeated,
        tokens=tokens,
        epochs=tokens / run.unique_tokens,
        unique=run.unique_tokens,
        steps=run.steps,
        phases=describe_phases(run.phases),
        minutes=run.seconds / 60,
        hardware=hardware(),
        train_loss=run.train_loss,
        model=evaluation.model,
        xz=evaluation.xz,
        joined_xz=evaluation.joined_xz,
        gzip=evaluation.gzip,
        joined_gzip=evaluation.joined_gzip,
        heldout_loss=heldout_bits * math.log(2) / evaluation.total_tokens,
        heldout_tokens=evaluation.total_tokens,
        samples="\n\n".join(sample_block(*sample) for sample in samples.items()),
    )
