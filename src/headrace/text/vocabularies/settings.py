"""Settings that stand beside a vocabulary in ``tokenizer_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError
from headrace.json_file import read_json
from headrace.text.vocabularies.added_tokens import NAMED_TOKENS, special_texts, token_text

_FILE = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a directory.

    Args:
        directory: which one.
        values: of ``special_tokens_map.json`` and ``tokenizer_config.json``; the latter counts.
    """

    directory: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Settings:
        """What the files say; nothing if there are none. Raises CheckpointError."""
        values = read_json(directory / "special_tokens_map.json", required=False)
        values |= read_json(directory / _FILE, required=False)
        texts = [token_text(values.get(name)) for name in NAMED_TOKENS]
        try:
            "".join(filter(None, [*texts, *special_texts(values)])).encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"{directory / _FILE} names a token that is no valid Unicode ({error.object!a}); "
                "fetch it again"
            ) from error
        return cls(directory, values)

    @property
    def tokenizer_class(self) -> str:
        """Name of the class in transformers, the same for its two kinds; empty if unknown."""
        name = self.values.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else ""

    def flag(self, name: str, default: bool) -> bool:
        """A truth value; an absent one, or ``null``, is the default.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.directory / _FILE}: {name} must be true or false, not {value!r}; correct it"
            )
        return value

    def names(self, usual: Mapping[str, str]) -> dict[str, str]:
        """Texts of the named tokens: what the settings say, or else what is usual."""
        texts = {
            name: token_text(self.values[name]) if name in self.values else usual.get(name)
            for name in NAMED_TOKENS
        }
        return {name: text for name, text in texts.items() if text is not None}
