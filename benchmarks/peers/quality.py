"""What a number format costs a trained model: KL divergence from bfloat16, and perplexity.

    python benchmarks/peers/quality.py

The embedded model reads the same tokens in every format, inside the program that has the format;
a program's own bfloat16 is its reference. This writes llama.cpp's figures as JSON, and then how far
Headrace's logits are from llama.cpp's for the same files: with its kernels, and in fp32.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

WINDOW = 512
"""Tokens that are read at once; contexts begin anew in each window."""
WINDOWS = 32
KEPT = 8
"""Windows whose logits are compared between programs."""
HELD_OUT = ("calendar", "csv", "fractions", "heapq", "plistlib", "shlex", "statistics", "textwrap")
"""Modules of the standard library that its model card names as held out."""
FORMATS = ("q8_0", "q4_k_m", "q4_0")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Quality:
    """Of one format, over so many predicted tokens.

    Args:
        kl: mean KL divergence of its predictions from the reference's, in nats.
        perplexity_change: in parts of the reference's.
        agreement: share of positions with the same most likely token.
    """

    tokens: int
    kl: float
    perplexity: float
    perplexity_change: float
    agreement: float


def log_softmax(logits: Array) -> Array:
    """In double precision: the divergences are small."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: Array = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def kl_divergence(reference_logits: Array, logits: Array) -> float:
    """Mean over rows of KL(reference || other), in nats."""
    reference, other = log_softmax(reference_logits), log_softmax(logits)
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())


def perplexity(logits: Array, targets: Array) -> float:
    """Of the tokens that followed."""
    chosen = np.take_along_axis(log_softmax(logits), targets[:, None], -1)
    return float(np.exp(-chosen.mean()))


def compare(reference: list[Array], other: list[Array], windows: list[list[int]]) -> Quality:
    """Figures of a format from the logits of every window, each (tokens, vocabulary)."""
    kls, agreements, perplexities = [], [], []
    for expected, given, tokens in zip(reference, other, windows, strict=True):
        targets = np.array(tokens[1:])
        kls.append(kl_divergence(expected[:-1], given[:-1]))
        agreements.append((expected[:-1].argmax(-1) == given[:-1].argmax(-1)).mean())
        perplexities.append([perplexity(logits[:-1], targets) for logits in (expected, given)])
    before, after = np.exp(np.log(perplexities).mean(0))
    return Quality(
        tokens=sum(len(tokens) - 1 for tokens in windows),
        kl=float(np.mean(kls)),
        perplexity=float(after),
        perplexity_change=float(after / before - 1),
        agreement=float(np.mean(agreements)),
    )


def held_out_windows() -> list[list[int]]:
    """Tokens of modules that the model was not trained on, from all over them."""
    from tokenizers import Tokenizer

    from headrace.loading import embedded_model

    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    library = Path(sysconfig.get_paths()["stdlib"])
    windows = []
    for name in HELD_OUT:
        ids = tokenizer.encode((library / f"{name}.py").read_text(encoding="utf-8")).ids
        windows += [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS]


def main() -> None:
    """Make the files, run llama.cpp on them, print the figures and say where they are kept."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from peers.environments import drivers, ensure_environment, variables_of
    from peers.models import ensure_form

    paths = {kind: str(ensure_form("embedded", f"gguf-{kind}")) for kind in ("bf16", *FORMATS)}
    folder = Path(paths["bf16"]).parent
    tokens, target = folder / "windows.json", folder / "quality.json"
    tokens.write_text(json.dumps(held_out_windows()))
    with TemporaryDirectory() as logits:
        job: dict[str, Any] = {"windows": str(tokens), "models": paths, "target": str(target)}
        job |= {"logits": logits, "kept": KEPT}
        subprocess.run(
            [ensure_environment("llama_cpp"), "-m", "peers.run_quality", json.dumps(job)],
            check=True,
            cwd=drivers(),
            env=variables_of("llama_cpp"),
        )
        print(target.read_text())
        print(target, file=sys.stderr)
        for kind in FORMATS:
            theirs = np.load(Path(logits) / f"{kind}.npy")
            for dtype in ("bfloat16", "float32"):
                ours = read_logits(Path(paths[kind]), dtype)
                kl = np.mean([kl_divergence(*pair) for pair in zip(theirs, ours, strict=True)])
                print(f"{kind}: KL of Headrace in {dtype} from llama.cpp {kl:.6f}")


def read_logits(path: Path, dtype: str) -> list[Array]:
    """Headrace's logits at every token of the first windows."""
    import torch
    from weight_formats import load, log_probabilities

    with torch.inference_mode():
        model = load(path, dtype)
        windows = [torch.tensor(window) for window in held_out_windows()[:KEPT]]
        return [log_probabilities(model, window).float().numpy() for window in windows]


def as_json(figures: dict[str, Quality]) -> str:
    """Format -> figures."""
    return json.dumps({name: asdict(quality) for name, quality in figures.items()}, indent=2)


if __name__ == "__main__":
    main()
