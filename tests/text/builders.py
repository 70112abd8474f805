"""Small tokenizers of the kinds that checkpoints have, and directories that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = (
    "The headrace brings the water to the wheel, fast and steady. Ein Mühlgraben führt das "
    "Wasser zum Rad. Le bief amène l'eau. Водовод подводит воду. 水渠将水引向水轮。🙂🙃 "
    "def wheel(water):\n    return water * 2\n"
)


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE, as in GPT-2 and its many followers, with three special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>", "<｜rôle ▁｜>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer=trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return tokenizer


def sentence_piece() -> tokenizers.Tokenizer:
    """BPE over characters with bytes to fall back on, as converted from SentencePiece."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)}
    merges = [("▁", "t"), ("▁t", "he"), ("h", "e"), ("▁", "w"), ("▁w", "a"), ("ü", "h")]
    pieces = [*"▁thewaürldo.,", *("".join(pair) for pair in merges), "▁▁", "▁▁▁"]
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    order = sorted(merges, key=lambda pair: len("".join(pair)))
    model = models.BPE(vocab=vocab, merges=order, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def words(decoder: Any) -> tokenizers.Tokenizer:
    """A handful of whole words under a decoder of any kind."""
    pieces = ["[UNK]", "▁the", "▁wheel", "run", "##s", "ning</w>", "the</w>", ".", "it", "'s", "▁"]
    model = models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def save(
    tokenizer: tokenizers.Tokenizer, directory: Path, settings: dict[str, Any] | None = None
) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | (settings or {}))
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return directory
