"""WordPiece with BERT's cutting into words, as in "BERT: Pre-training of Deep Bidirectional
Transformers for Language Understanding" (2018), section 3: of each word the longest piece that
begins it, then the longest that continues it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from headrace.errors import CheckpointError

CONTINUATION = "##"
"""Before a piece that does not begin a word."""


def build_word_piece(
    vocabulary: Mapping[str, int],
    unknown: str,
    origin: Path | str,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    separates_ideographs: bool = True,
) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer without added tokens.

    Args:
        vocabulary: token ids.
        unknown: the token of a word that cannot be made of pieces.
        strip_accents: as ``lowercase`` if ``None``.
        separates_ideographs: each is a word.
        origin: where the vocabulary comes from, for error messages.

    Raises:
        CheckpointError: the vocabulary lacks ``unknown``.
    """
    if unknown not in vocabulary:
        raise CheckpointError(
            f"{origin}: the vocabulary lacks {unknown!r}, the token of unknown words; fetch the "
            "files again"
        )
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=dict(vocabulary), unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=separates_ideographs,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return tokenizer


def read_word_list(path: Path) -> dict[str, int]:
    """The tokens in a ``vocab.txt``, one in a line; of equal ones the last counts.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    if lines[-1] == "":
        lines.pop()
    return {line: index for index, line in enumerate(lines)}
