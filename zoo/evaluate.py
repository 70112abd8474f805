"""Bits per byte of an exported model on the held-out modules: ``python -m zoo.evaluate DIR``."""

import argparse
import gzip
import lzma
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from headrace.evaluation.held_out import library_root
from zoo.corpus import differences, held_out_texts, read_manifest, scan_library
from zoo.export import load_model
from zoo.model import LanguageModel
from zoo.tokenizer import load_tokenizer, token_id


@dataclass(frozen=True)
class FileResult:
    """Sizes of one held-out file, in bytes, tokens and bits, as each method codes it alone."""

    path: str
    bytes: int
    tokens: int
    model_bits: float
    gzip_bits: int
    xz_bits: int


@dataclass(frozen=True)
class Evaluation:
    """Results of all held-out files, and of the compressors on their concatenation."""

    files: list[FileResult]
    joined_gzip_bits: int
    joined_xz_bits: int

    def bits_per_byte(self, bits: Callable[[FileResult], float]) -> float:
        """Return total bits over total bytes for one method, such as ``file.model_bits``."""
        return sum(bits(file) for file in self.files) / self.total_bytes

    @property
    def total_bytes(self) -> int:
        """The size of the held-out text in UTF-8."""
        return sum(file.bytes for file in self.files)

    @property
    def total_tokens(self) -> int:
        """The number of tokens coded, one end of text a file included."""
        return sum(file.tokens for file in self.files)

    @property
    def model(self) -> float:
        """Bits per byte of the model, each file alone."""
        return self.bits_per_byte(lambda file: file.model_bits)

    @property
    def gzip(self) -> float:
        """Bits per byte of ``gzip -9``, each file alone."""
        return self.bits_per_byte(lambda file: file.gzip_bits)

    @property
    def xz(self) -> float:
        """Bits per byte of ``xz -9``, each file alone."""
        return self.bits_per_byte(lambda file: file.xz_bits)

    @property
    def joined_gzip(self) -> float:
        """Bits per byte of ``gzip -9`` on all files in one stream."""
        return self.joined_gzip_bits / self.total_bytes

    @property
    def joined_xz(self) -> float:
        """Bits per byte of ``xz -9`` on all files in one stream."""
        return self.joined_xz_bits / self.total_bytes


@torch.inference_mode()
def token_bits(model: LanguageModel, tokens: Tensor, context_length: int) -> Tensor:
    """Return the bits, float32 ``(length - 1,)``, of each of int64 ``(length,)`` but the first.

    Windows of ``context_length`` advance by half of it and score only what is new in them, so
    that every token but those of the first window sees at least half a context.
    """
    stride = max(1, context_length // 2)
    bits: list[Tensor] = []
    scored = 0
    start = 0
    while scored < len(tokens) - 1:
        window = tokens[start : start + context_length + 1]
        logits = model(window[None, :-1])[0, scored - start :].float()
        bits.append(
            functional.cross_entropy(logits, window[1 + scored - start :], reduction="none")
        )
        scored += len(bits[-1])
        start += stride
    return torch.cat(bits) / math.log(2) if bits else torch.empty(0)


def evaluate(
    model: LanguageModel, tokenizer: Tokenizer, texts: dict[str, str], context_length: int
) -> Evaluation:
    """Score each text alone, after an end of text, and with the one that closes it.

    The closing token is counted, because the compressors mark the end of their input as well.
    """
    device = model.model.embed_tokens.weight.device
    end_of_text = token_id(tokenizer, "<|endoftext|>")
    results = []
    for path, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        tokens = torch.tensor([end_of_text, *ids, end_of_text], device=device)
        content = text.encode()
        results.append(
            FileResult(
                path,
                len(content),
                len(tokens) - 1,
                token_bits(model, tokens, context_length).double().sum().item(),
                8 * len(gzip.compress(content, 9, mtime=0)),
                8 * len(lzma.compress(content, preset=9)),
            )
        )
    joined = "".join(texts.values()).encode()
    gzip_bits = 8 * len(gzip.compress(joined, 9, mtime=0))
    return Evaluation(results, gzip_bits, 8 * len(lzma.compress(joined, preset=9)))


@torch.inference_mode()
def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    token_count: int,
    stops: tuple[str, ...],
) -> str:
    """Return the greedy continuation of ``prompt``, up to a token of ``stops`` or the count."""
    stop_ids = {token_id(tokenizer, token) for token in stops}
    start = token_id(tokenizer, "<|endoftext|>")
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    tokens = torch.tensor([[start, *prompt_ids]], device=model.model.embed_tokens.weight.device)
    generated: list[int] = []
    for _ in range(token_count):
        following = int(model(tokens)[0, -1].argmax())
        if following in stop_ids:
            break
        generated.append(following)
        tokens = torch.cat((tokens, tokens.new_tensor([[following]])), dim=1)
    text: str = tokenizer.decode(generated, skip_special_tokens=False)
    return text


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Print bits per byte, one row a file and the totals."""
    table = Table("file", "bytes", "tokens", "model", "gzip -9", "xz -9", title="bits per byte")
    for file in evaluation.files:
        rates = [
            f"{bits / max(1, file.bytes):.3f}"
            for bits in (file.model_bits, file.gzip_bits, file.xz_bits)
        ]
        table.add_row(file.path, str(file.bytes), str(file.tokens), *rates)
    table.add_section()
    counts = (str(evaluation.total_bytes), str(evaluation.total_tokens))
    separate = (evaluation.model, evaluation.gzip, evaluation.xz)
    table.add_row("all, each file alone", *counts, *(f"{rate:.3f}" for rate in separate))
    joined = (evaluation.joined_gzip, evaluation.joined_xz)
    table.add_row("all, in one stream", *counts, "", *(f"{rate:.3f}" for rate in joined))
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate one directory; return 0 if the model beats ``gzip -9`` at its better, else 1."""
    parser = argparse.ArgumentParser(prog="python -m zoo.evaluate", description=__doc__)
    parser.add_argument("directory", type=Path, help="exported model")
    parser.add_argument("--context", type=int, help="context length in tokens; the model's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    files = scan_library(library_root())
    for line in differences(read_manifest(), files):
        print(f"warning: not the library of the manifest: {line}", file=sys.stderr)
    model = load_model(options.directory).to(options.device)
    tokenizer = load_tokenizer(options.directory / "tokenizer.json")
    context_length = options.context or model.config.max_position_embeddings
    texts = held_out_texts(files, library_root())
    evaluation = evaluate(model, tokenizer, texts, context_length)
    print_table(evaluation, Console())
    return 0 if evaluation.model < min(evaluation.gzip, evaluation.joined_gzip) else 1


if __name__ == "__main__":
    sys.exit(main())
