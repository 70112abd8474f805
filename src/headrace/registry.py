"""A lazy registry: names now, imports when a name is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any


class Registry:
    """Maps a name to ``"module:attribute"`` and imports the module on first use.

    Args:
        kind: what is registered, for error messages ("scheduling policy").
        entries: name -> ``"package.module:Attribute"``.
    """

    def __init__(self, kind: str, entries: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._entries = dict(entries or {})

    def register(self, name: str, target: str) -> None:
        """Add an entry. Raises ValueError when the name is taken by another target."""
        if self._entries.get(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is already {self._entries[name]}")
        self._entries[name] = target

    def resolve(self, name: str) -> Any:
        """The registered object. Raises KeyError that lists the known names."""
        try:
            target = self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries)) or "none"
            raise KeyError(f"unknown {self.kind} {name!r}; known: {known}") from None
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
