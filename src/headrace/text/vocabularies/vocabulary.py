"""What a checkpoint says of its tokenizer, whatever files it says it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers

from headrace.text.chat_template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer that is ready for use, and what its checkpoint says beside it.

    Args:
        tokenizer: text to token ids and back; it knows the special tokens and puts those around a
            text that belong there.
        names: texts of the named tokens, such as "bos_token", which chat templates may use.
        templates: chat templates by name; the usual one is called "default".
        bos_token_id, eos_token_id: ``None`` when the checkpoint names none.
    """

    tokenizer: tokenizers.Tokenizer
    names: Mapping[str, str]
    templates: Mapping[str, ChatTemplate]
    bos_token_id: int | None
    eos_token_id: int | None
