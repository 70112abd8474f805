"""Byte-level BPE, as in "Language Models are Unsupervised Multitask Learners" (2019), section 2.2:
text is cut into words, and the UTF-8 bytes of each are merged pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from headrace.errors import CheckpointError
from headrace.text.vocabularies.pre_tokenizers import PreTokenizer


def build_byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    way: PreTokenizer,
    origin: Path | str,
    *,
    adds_space: bool = False,
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer without added tokens.

    Args:
        vocabulary: token ids; bytes are named by the characters of GPT-2's alphabet.
        merges: the earlier of two is done first.
        adds_space: a text that begins with no space gets one.
        origin: where the vocabulary comes from, for error messages.

    Raises:
        CheckpointError: a merge is not of tokens.
    """
    try:
        model = models.BPE(
            vocab=dict(vocabulary), merges=list(merges), ignore_merges=way.ignores_merges
        )
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(
            f"{origin}: the merges do not fit the vocabulary ({error}); fetch both again"
        ) from error
    tokenizer = tokenizers.Tokenizer(model)
    if way.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if adds_space:
        steps.append(pre_tokenizers.Metaspace(" ", prepend_scheme="always", split=False))
    steps += [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in way.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges in a ``merges.txt``, two tokens in a line.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise CheckpointError(f"{path}: line {number} is not a pair of tokens; fetch it again")
        merges.append((pair[0], pair[1]))
    return merges
