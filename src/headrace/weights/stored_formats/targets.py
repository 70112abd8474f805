"""What a ``quantization_config`` calls modules by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.weights.stored_formats.section import unsupported

_LINEAR = "Linear"
_PATTERN = "re:"


@dataclass(frozen=True, slots=True)
class Target:
    """Modules by a name, by a pattern ("re:.*mlp.*", which a name begins with) or by a class.

    Of classes only "Linear" is known, which every module with a quantized weight is.
    """

    text: str

    @property
    def precedence(self) -> int:
        """The smallest of several targets counts: names before patterns before classes."""
        if self.text == _LINEAR:
            return 2
        return 1 if self.text.startswith(_PATTERN) else 0

    def means(self, module: str) -> bool:
        """Whether the module of that name is one of them."""
        if self.text.startswith(_PATTERN):
            return re.match(self.text.removeprefix(_PATTERN), module) is not None
        return self.text in (_LINEAR, module)


def read_targets(section: Mapping[str, Any], field: str) -> Sequence[Target]:
    """A list of targets; empty where it is absent or null. Raises CheckpointError."""
    texts = section.get(field) or []
    try:
        for text in texts:
            re.compile(text.removeprefix(_PATTERN))
    except (AttributeError, TypeError, re.error):
        raise unsupported(field, texts, ("names", "re:patterns", _LINEAR)) from None
    return [Target(text) for text in texts]
